"""`load_model`: MODEL as the user writes it → a module with its weights and its preprocessing."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DownresError, first_line
from ..models.regseg import RegSeg
from ..probe import channels_of
from ..records import Preprocessing
from . import generic
from .options import MOST_CLASSES, nearest
from .weights import fingerprint, floating, load_weights, match, read_checkpoint

_PRETRAINED = {
    "timm": "the library's pretrained weights",
    "torchvision": "the library's pretrained weights",
    "regseg": "",  # never: they are given as a file
    "smp": "the library's pretrained weights in the encoder, the decoder drawn anew",
}


@dataclass(frozen=True)
class Model:
    """A network to be reduced. spec: how the user named it ('' for a module handed over in Python)."""

    module: nn.Module
    preprocessing: Preprocessing
    spec: str = ""
    weights: str = ""
    num_classes: int | None = None

    def fingerprint(self) -> str:
        return fingerprint(self.module)


def load_model(
    spec: str, weights: str | Path | None = None, *, pretrained: bool = True, num_classes: int | None = None
) -> Model:
    """`timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, `regseg:NAME`, `smp:ARCHITECTURE/ENCODER` or
    `path/to/file.py:function`, in eval mode. Image classifiers and segmentation networks.

    Of transformers, a folder made by `save_pretrained`, a `config.json`, a model type (`vit`) or class
    (`SegformerForSemanticSegmentation`), both in their default configuration, for costs, or a name on the hub; code that comes
    with a model is never run. Of RegSeg (Gao 2021), `exp48_decoder26` or `exp53_decoder29`, with options after commas
    (`width=0.5,depth=0.5,group_width=8,num_classes=11`). Of segmentation_models_pytorch, for example `Unet/resnet34`.

    Args:
        weights: a .safetensors or .pth file. A library model takes its number of classes from the file.
        pretrained: without `weights`, a library model gets its own pretrained weights; False leaves it random
            (enough for costs).
        num_classes: size of the head of a library model, for weights that are loaded later.

    Raises:
        DownresError: unknown name (the nearest are suggested), weights that don't fit, no pretrained weights to be had.
    """
    if num_classes is not None and not 0 <= num_classes <= MOST_CLASSES:
        raise DownresError(f"A network has from 1 to {MOST_CLASSES} classes, {num_classes} is out of range.")
    family, _, name = spec.partition(":")
    tensors = None if weights is None else read_checkpoint(weights)
    if family in _PRETRAINED and name:
        library = _library(spec)
        if family in ("timm", "torchvision"):  # every model has a name of its own
            _check_name(family, name, library)
        with _fetching(spec) if pretrained and tensors is None else contextlib.nullcontext():
            module = library.create(name, pretrained and tensors is None, num_classes)
        classes = None if tensors is None else _classes_of(module, tensors)
        if classes is not None:
            module, num_classes = library.create(name, False, classes), classes
        if tensors is not None and family == "torchvision":
            library.follow(module, tensors)
        # `timm:vit.tag` keeps its tag in the model's own configuration; torchvision needs the name.
        preprocessing = library.preprocessing(module, name)
    elif family == "transformers" and name:
        return _transformers(name, weights, tensors, pretrained, num_classes)
    elif ".py:" in spec:
        module = generic.create(spec)
        preprocessing = generic.preprocessing(module)
    else:
        raise DownresError(
            f"Cannot read the model {spec!r}: give timm:NAME, torchvision:NAME or path/to/file.py:function, "
            "or transformers:FOLDER, regseg:NAME, smp:ARCHITECTURE/ENCODER."
        )
    how = _PRETRAINED[family] if pretrained and family in _PRETRAINED else "as the module came"
    if tensors is not None:
        how = f"{Path(str(weights)).name}, matched {_load(module, tensors)}"
    return Model(nn.Module.eval(module), preprocessing, spec, how, num_classes)


def with_preprocessing(
    model: Model,
    *,
    resolution: int | tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
    crop_ratio: float | None = None,
    fit: str | None = None,
    channel_order: str | None = None,
    scale: float | None = None,
    antialias: bool | None = None,
) -> Model:
    """The same model with some of its preprocessing given by the user, see `Preprocessing`.

    Raises DownresError for values out of range, and for a scale without the mean and std that are counted in it.
    """
    given = {"resolution": resolution, "mean": mean, "std": std, "interpolation": interpolation, "crop_ratio": crop_ratio}
    given |= {"fit": fit, "channel_order": channel_order, "scale": scale, "antialias": antialias}
    given = {k: v for k, v in given.items() if v is not None}
    if not given:
        return model
    _check_scale(model.preprocessing.scale, scale, mean, std)
    if mean is not None:
        takes = channels_of(model.module, (len(mean), *model.preprocessing.hw))
        if takes != len(mean):
            raise DownresError(
                f"The network takes {takes} channel{'s' * (takes > 1)}, mean has {len(mean)}: give `mean` and `std` with one "
                "value for each."
            )
        given["guessed"] = std is None and model.preprocessing.guessed
    source = f"{model.preprocessing.source}; {', '.join(name for name in given if name != 'guessed')} given"
    if resolution is not None:
        given |= {"any_size": False, "resolution": model.preprocessing.at(resolution).resolution}
    return dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, source=source, **given))  # type: ignore[arg-type]


def _check_scale(models: float, scale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Mean and std are of scaled pixels: DownresError where one is given without the other, or does not look like it."""
    if scale not in (None, models) and (mean is None or std is None):
        raise DownresError(
            "Mean and std are those of pixels that are scaled already, the model's are for another scale: give `mean` and "
            "`std` with `scale`, 0,0,0 and 1,1,1 for none."
        )
    if scale is None and (mean, std) != (None, None) and models != 1 / 255:
        raise DownresError(
            f"The model takes pixels of 0 to {255 * models:g}, and mean and std may be meant for 0 to 1: give `scale` with "
            f"them, {models:g} or 1/255."
        )
    largest = 255 * (models if scale is None else scale)
    if mean is not None and std is not None and 0 < max(map(abs, mean)) < largest / 100 and max(std) < largest / 100:
        raise DownresError(
            f"A mean of {max(mean):g} and a std of {max(std):g} are nothing beside pixels of 0 to {largest:g}: give them on "
            "that range, or `scale=1/255` where they are on 0 to 1."
        )


def _library(spec: str) -> Any:
    """What makes the models of a library; imported where it is asked for alone, as some take seconds or are not installed."""
    family = spec.partition(":")[0]
    found: Any
    try:
        if family == "timm":
            from . import timm as found
        elif family == "torchvision":
            from . import torchvision as found
        elif family == "regseg":
            from . import regseg as found
        elif family == "smp":
            from . import smp as found
        else:
            from . import transformers as found
        return found
    except ImportError as error:
        library = {"smp": "segmentation_models_pytorch"}.get(family, family)
        raise DownresError(
            f"{spec} needs the library {library} ({str(error).splitlines()[0]}): pip install 'downres[{family}]'."
        ) from None


@contextlib.contextmanager
def _fetching(spec: str) -> Iterator[None]:
    try:
        yield
    except DownresError:
        raise
    except Exception as error:  # the hubs raise many kinds: no network, no such weights, a broken download
        reason = first_line(error)[:120]
        raise DownresError(
            f"The pretrained weights of {spec} could not be fetched ({reason}): give a file with `weights`."
        ) from None


def _load(module: nn.Module, tensors: dict[str, Any]) -> str:
    """`load_weights`; of a RegSeg of another width the error says which."""
    try:
        return load_weights(module, tensors)
    except DownresError:
        if isinstance(module, RegSeg):
            from .regseg import explain

            explain(module, tensors)
        raise


def _transformers(
    name: str, weights: str | Path | None, tensors: dict[str, Any] | None, pretrained: bool, num_classes: int | None
) -> Model:
    library = _library(f"transformers:{name}")
    if library.is_local(name):
        name = str(Path(name).resolve())  # found again from wherever an artifact is checked
    spec = f"transformers:{name}"
    with _fetching(spec):
        module, how = library.create(name, pretrained, num_classes, None if tensors is None else floating(tensors))
    if tensors is not None:
        how, num_classes = f"{Path(str(weights)).name}, {how}", module.config.num_labels
    return Model(module.eval(), library.preprocessing(module, name), spec, how, num_classes)


def _check_name(family: str, name: str, library: Any) -> None:
    known = library.names()
    base, _, tag = name.partition(".")
    if base not in known:
        hint = nearest(base, known, f"{family} knows {len(known)} names, for example {known[0]}.")
        raise DownresError(f"{family} has no model {name!r}: {hint}")
    tags = library.tags(base) if tag else []
    if tag and tag not in tags:
        hint = f"it has {', '.join(tags)}." if tags else f"give {family}:{base}."
        raise DownresError(f"{family} has no pretrained weights {tag!r} for {base}: {hint}")


def _classes_of(module: nn.Module, tensors: dict) -> int | None:
    """Number of classes of the checkpoint when its classifier has another size than the module's, else None."""
    try:
        matched, _ = match(module, tensors)
    except DownresError:
        return None  # load_weights says it properly
    wanted = module.state_dict()
    sizes = {
        t.shape[0] for k, t in matched.items() if t.shape[:1] != wanted[k].shape[:1] and t.shape[1:] == wanted[k].shape[1:]
    }
    return sizes.pop() if len(sizes) == 1 else None
