"""transformers: image classifiers and segmentation networks from a folder, a configuration or the hub, and what their image
processor says of the input.

Imported only where it is asked for: the library takes seconds.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import logging

from ..errors import DownresError
from ..parse import format_resolution
from ..records import Preprocessing
from . import transformers_vit  # noqa: F401  (refuses versions of the library that are too old)
from .adapter import Size, as_pair
from .find import find_adapter
from .options import nearest
from .weights import read_checkpoint

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Numbers of PIL's filters, as image processors store them."""
_SEGMENTATION = {kind: name for name, kind in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.items()}
"""Model types by the class that answers to every pixel."""
_HEAD = re.compile(r"classifier|^(auxiliary_)?head\.head\.4\.")
"""In the names of what the number of classes decides; the second of DPT."""


def names() -> list[str]:
    """The model types that have an image classifier or a segmentation network, and the classes of the latter."""
    return list(
        {**MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, **MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, **_SEGMENTATION}
    )


def _kind(config: Any) -> Any:
    """A segmentation network where the configuration names one, or there is no classifier of the type."""
    dense = (config.architectures or [""])[0] in _SEGMENTATION
    classifies = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return AutoModelForSemanticSegmentation if dense or not classifies else AutoModelForImageClassification


def is_local(name: str) -> bool:
    """Whether the name is that of a folder or file; a model type stays one beside a folder of the same name."""
    return name not in names() and Path(name).exists()


def create(
    name: str, pretrained: bool, num_classes: int | None, tensors: dict[str, Tensor] | None = None
) -> tuple[nn.Module, str]:
    """A network in float32, and in words where its weights are from. Code that comes with a model is never run.

    name: a folder with config.json and weights, a config.json, a model type (of a classifier, where there is one), the class
    of a segmentation network, or a repository on the hub.
    tensors: a checkpoint in the names of this or an older version of the library; the number of classes follows it.
    Raises DownresError for an unknown or broken model, without network, and for weights that are missing or do not fit.
    """
    config = _configuration(name)
    if num_classes is not None and num_classes != config.num_labels:
        config.num_labels = num_classes
    if tensors is not None:
        module, headless = _loaded(name, None, config, tensors, follow=True)
        return module, f"matched by name{headless}"
    if not pretrained:
        return _built(name, config, torch.float32), "as the module came"
    if name in names() or Path(name).is_file():
        raise DownresError(
            f"transformers:{name} is a configuration without weights: give a folder that has both, or a file with `weights`."
        )
    if is_local(name) and (file := next((Path(name) / w for w in _WEIGHTS if (Path(name) / w).exists()), None)):
        module, headless = _loaded(name, None, config, read_checkpoint(file), follow=False)
    else:
        module, headless = _loaded(name, name, config, None, follow=False)
    return module, f"the pretrained weights{headless}"


def _built(name: str, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    try:
        with _quiet():
            return _kind(config).from_config(config, trust_remote_code=False, dtype=dtype)
    except Exception as error:  # some default configurations are those of no network
        raise DownresError(
            f"The network of transformers:{name} cannot be built ({_reason(error)}): give a folder with its config.json."
        ) from None


def _configuration(name: str) -> Any:
    """The configuration, of a type that has an image classifier or a segmentation network."""
    with _quiet():
        if name in names():
            config = AutoConfig.for_model(_SEGMENTATION.get(name, name))
            config.architectures = [name] if name in _SEGMENTATION else None
            return config
        path = Path(name)
        if path.is_dir() and not (path / "config.json").is_file():
            raise DownresError(f"The folder {name} has no config.json: give one that save_pretrained of transformers has made.")
        if not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise _unknown(name)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # broken files, unknown types, and all that a hub can raise
            if path.exists():
                what, then = "cannot be read", "correct its config.json"
            else:
                what, then = "could not be fetched, and there is no such folder", "give a folder with its config.json"
            raise DownresError(f"The configuration of transformers:{name} {what} ({_reason(error)}): {then}.") from None
    if config.model_type not in names():
        raise _unknown(config.model_type, f"in the configuration of {name}")
    return config


def _unknown(kind: str, where: str = "and there is no such folder") -> DownresError:
    otherwise = "give a folder with config.json, a hub name org/name, or for example vit."
    hint = nearest(kind, names(), otherwise, cutoff=0.45)
    return DownresError(f"transformers has no classifier or segmentation network {kind!r}, {where}: {hint}")


def _loaded(
    name: str, where: str | None, config: Any, tensors: dict[str, Tensor] | None, follow: bool
) -> tuple[nn.Module, str]:
    """Through from_pretrained, which knows the names that older versions stored; and what to say of a head that is missing.

    follow: the number of classes in the file decides.
    """
    with torch.device("meta"):
        kind: Any = type(_built(name, config))
    with _quiet():
        try:
            module, seen = kind.from_pretrained(
                where,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            if where is None or is_local(name):
                raise DownresError(
                    f"The weights of transformers:{name} cannot be loaded ({_reason(error)}): "
                    "save them again with save_pretrained."
                ) from None
            raise
    heads = {theirs[0] for key, theirs, ours in seen["mismatched_keys"] if theirs[1:] == ours[1:] and _of_head(key)}
    if follow and len(heads) == 1:
        config.num_labels = heads.pop()
        return _loaded(name, where, config, tensors, follow=False)
    for key, theirs, ours in sorted(seen["mismatched_keys"]):
        if follow or not _of_head(key):
            raise DownresError(
                f"The weights have shape {tuple(theirs)} at {key}, the network {tuple(ours)}: the file belongs to another size."
            )
    # Mask tokens and auxiliary heads are for training alone, and files may lack them.
    missing = sorted(k for k in seen["missing_keys"] if "mask_token" not in k and not k.startswith("auxiliary_head."))
    more = [k for k in sorted(seen["unexpected_keys"]) if _is_next_layer(k, module)]
    if more or any(not _of_head(k) for k in missing):
        first = next((k for k in missing if not _of_head(k)), None)
        what = f"{first} is not in the file" if first else f"{more[0]} in the file has no place in it"
        raise DownresError(
            f"The weights are for another network than transformers:{name} ({what}): "
            "check that file and configuration belong together."
        )
    redrawn = missing or seen["mismatched_keys"]
    return module, ", no head among them: drawn anew, to be fitted" if redrawn else ""


def _of_head(key: str) -> bool:
    return _HEAD.search(key) is not None


def _is_next_layer(key: str, module: nn.Module) -> bool:
    """`vit.layers.12.…` in a file for a network that ends at `vit.layers.11`; other extras (text towers, poolers) may be."""
    numbered = re.match(r"(.*?\.)\d+\.", key)
    return numbered is not None and any(re.match(re.escape(numbered[1]) + r"\d+\.", ours) for ours in module.state_dict())


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    """What the image processor beside the model says; without one ImageNet's usual numbers, marked as assumed."""
    config: Any = model.config
    stated = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    found = find_adapter(model)
    fixed = None if found is None else found.image  # a network of fixed size takes no other, whatever the processor says
    processor = _processor(name)
    dense = type(model).__name__ in _SEGMENTATION
    known = fixed or stated
    stated = as_pair(stated or (512 if dense else 224))
    if processor is None:
        size = fixed or stated
        ratio, fit, how = (1.0, "stretch", "stretched") if dense else (0.875, "crop", "crop ratio 0.875")
        said = f"assumed: ImageNet's mean and std, {how}; {format_resolution(size)} px"
        said += " by the configuration" if known or not dense else ""
        channels = getattr(config, "num_channels", 3)
        halves: dict[str, Any] = {} if channels == 3 else {"mean": (0.5,) * channels, "std": (0.5,) * channels}
        return Preprocessing(size, ratio, source=said, fit=fit, any_size=not known, guessed=channels not in (1, 3), **halves)
    size, crop_ratio, notes = (_whole if dense else _geometry)(processor, fixed or stated)
    if fixed is not None and size != fixed:
        notes.append(f"size {format_resolution(size)} not followed: the network takes {format_resolution(fixed)}")
        size = fixed
    interpolation = _INTERPOLATIONS.get(int(processor.resample or 0), "")
    if not interpolation:
        notes.append(f"filter {processor.resample} not followed: bicubic")
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    if processor.do_rescale and getattr(processor, "rescale_offset", False):
        mean = [m + 1 for m in mean]  # EfficientNet's subtracts 1 first
    if getattr(processor, "include_top", False):
        std = [s * again for s, again in zip(std, processor.image_std, strict=True)]  # and divides twice
    return Preprocessing(
        size,
        crop_ratio,
        interpolation or "bicubic",
        tuple(mean),
        tuple(std),
        "transformers image processor" + (f" ({'; '.join(notes)})" if notes else ""),
        "stretch" if dense else "crop",
        channel_order="bgr" if getattr(processor, "do_flip_channel_order", False) else "rgb",
        scale=1 / 255 if abs(255 * scale - 1) < 1e-6 else scale,
    )


def _processor(name: str) -> Any:
    """The image processor stored beside the model, None when there is none."""
    path = Path(name)
    folder = path.parent if path.is_file() else path
    if name in names() or (is_local(name) and not any((folder / p).is_file() for p in _PROCESSORS)):
        return None
    try:
        with _quiet():
            return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        if not is_local(name):  # many repositories have none
            return None
        raise DownresError(
            f"The image processor in {folder} cannot be read ({_reason(error)}): correct its {_PROCESSORS[0]}."
        ) from None


def _geometry(processor: Any, otherwise: Size) -> tuple[Size, float, list[str]]:
    """(height, width) that the network gets, the crop ratio, and what is done differently from there."""
    notes: list[str] = []
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
    share = getattr(processor, "crop_pct", None) or 1.0
    shown = otherwise if crop is None else (crop.height, crop.width)
    if not processor.do_resize or size is None:
        return shown, 1.0, notes
    if size.height and size.width:
        short = min(size.height, size.width)
        shown = (size.height, size.width) if crop is None else shown
        notes.append("resized without keeping the aspect ratio there, by the short side here")
    else:
        short = size.shortest_edge or min(otherwise)
        shown = (short, short) if crop is None else shown
        if crop is None and (share == 1.0 or short >= 384):  # ConvNeXt's processor: no crop from 384 on
            share = 1.0
            notes.append("not cropped there, to the centre square here")
    ratio = min(shown) / (short / share)
    if ratio > 1:
        notes.append(f"crop larger than the image ({ratio:.3g}) not followed: 1")
    return shown, min(ratio, 1.0), notes


def _whole(processor: Any, otherwise: Size) -> tuple[Size, float, list[str]]:
    """As `_geometry`, of a segmentation network: it sees the whole picture, whatever its aspect ratio."""
    notes: list[str] = []
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", False) else None
    if crop is not None:
        shown = crop.height, crop.width
        notes.append("the centre cropped there, the whole stretched here")
    elif not processor.do_resize or size is None:
        shown = otherwise
        notes.append(f"not resized there, to {format_resolution(shown)} px here")
    elif size.height and size.width:
        shown = size.height, size.width
    else:
        shown = as_pair(size.shortest_edge or size.longest_edge or otherwise)
        notes.append(f"the aspect ratio kept there, stretched to {format_resolution(shown)} px here")
    if getattr(processor, "keep_aspect_ratio", False):
        notes.append("the aspect ratio kept there, stretched here")
    if getattr(processor, "do_reduce_labels", False):
        notes.append("do_reduce_labels: its class 0 is the labels' 1, and 0 is no class")
    return shown, 1.0, notes


def _reason(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text[:120].rstrip(". ")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library reports its progress on standard error; what matters of it is said in an error or in `Model.weights`."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
