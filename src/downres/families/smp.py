"""segmentation_models_pytorch: any of its architectures with any of its encoders, `Unet/resnet34`.

Imported only where it is asked for: the library takes seconds, and may not be there.
"""

import json
from typing import Any

import segmentation_models_pytorch as smp
import timm
from huggingface_hub import try_to_load_from_cache
from segmentation_models_pytorch.encoders import encoders
from torch import nn

from ..errors import DownresError
from ..records import Preprocessing
from .adapter import said
from .find import find_adapter
from .options import nearest, split_options

_OPTIONS = {"num_classes": int}


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    """pretrained: the encoder gets its weights from ImageNet; those of the decoder are always drawn anew.

    num_classes: None for that in the name, else the library's own, 1. Raises DownresError for a name that is none.
    """
    architecture, encoder, options = _parts(name)
    classes: Any = num_classes or options.get("num_classes", 1)
    try:
        module = smp.create_model(architecture, encoder, None, classes=classes)
    except Exception as error:  # the library raises many kinds where encoder and architecture do not go together
        raise DownresError(f"smp:{name} cannot be built ({said(error)}): give another encoder.") from None
    if pretrained:
        module = smp.create_model(architecture, encoder, True if _of_timm(encoder) else "imagenet", classes=classes)  # type: ignore[arg-type]
    return module


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    """What the encoder was trained with, where that is known here: of timm's encoders, and of fetched weights."""
    architecture, encoder, _ = _parts(name)
    adapter = find_adapter(model)
    size = (adapter.image if adapter is not None else None) or (512, 512)
    settings = _settings(encoder)
    if settings is None:
        return Preprocessing(size, source=f"assumed: ImageNet's mean and std, {size[0]}x{size[1]} px", fit="pad", any_size=True)
    return Preprocessing(
        size,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        source=f"segmentation_models_pytorch, of the encoder {encoder} ({size[0]}x{size[1]} px assumed)",
        fit="pad",
        any_size=True,
        channel_order=settings.get("input_space", "RGB").lower(),
        scale=(settings.get("input_range") or [0, 1])[-1] / 255,
    )


def _settings(encoder: str) -> dict[str, Any] | None:
    if _of_timm(encoder):
        config = timm.models.get_pretrained_cfg(encoder.removeprefix("tu-"))
        return None if config is None else config.to_dict()
    weights = encoders[encoder]["pretrained_settings"].get("imagenet")
    file = weights and try_to_load_from_cache(weights["repo_id"], "config.json", revision=weights["revision"])
    if not isinstance(file, str):
        return None
    with open(file, encoding="utf-8") as stored:
        return json.load(stored)


def _of_timm(encoder: str) -> bool:
    return encoder.startswith("tu-")


def _parts(name: str) -> tuple[str, str, dict[str, float]]:
    """Architecture, encoder and options, the first two known to the library."""
    base, options = split_options(name, _OPTIONS)
    architecture, slash, encoder = base.partition("/")
    kinds = {kind.__name__.lower(): kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if architecture.lower() not in kinds or not slash:
        what = f"no architecture {architecture!r}" if slash else f"no model {base!r}"
        raise DownresError(
            f"smp has {what}: give ARCHITECTURE/ENCODER, of {', '.join(kinds.values())}, for example smp:Unet/resnet34."
        )
    known = [f"tu-{n}" for n in timm.list_models()] if _of_timm(encoder) else list(encoders)
    if encoder.partition(".")[0] not in known:
        hint = nearest(encoder, known, f"give for example smp:{architecture}/resnet34.")
        raise DownresError(f"smp has no encoder {encoder!r}: {hint}")
    return architecture, encoder, options
