"""timm: names, pretrained weights, and what `pretrained_cfg` says of the input."""

from typing import Any

import timm
from torch import nn

from ..records import Preprocessing


def names() -> list[str]:
    return timm.list_models()


def tags(name: str) -> list[str]:
    """The kinds of pretrained weights that can be asked for as `name.tag`."""
    return [found.partition(".")[2] for found in timm.list_models(f"{name}.*", include_tags=True)]


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    config = timm.data.resolve_data_config(model=model)
    height, width = config["input_size"][1:]
    return Preprocessing(
        resolution=(height, width),
        # Above 1 (some VOLO) timm pads with black; the whole picture is the nearest that we have.
        crop_ratio=min(config["crop_pct"], 1.0),
        # timm's tables name a few other filters ('lanczos', 'random'); bicubic is its own default.
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        source="timm pretrained_cfg",
    )
