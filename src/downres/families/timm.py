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
    crop_ratio, interpolation, deviations = config["crop_pct"], config["interpolation"], []
    if config["crop_mode"] != "center":
        deviations.append(f"crop mode '{config['crop_mode']}' not followed: centre crop")
    if interpolation not in ("bilinear", "bicubic"):  # a few: 'lanczos', 'random'; bicubic is timm's own default
        deviations.append(f"interpolation '{interpolation}' not followed: bicubic")
        interpolation = "bicubic"
    if crop_ratio > 1:  # some VOLO: timm pads with black; the whole picture is the nearest that we have
        deviations.append(f"crop_pct {crop_ratio:g} not followed: 1")
        crop_ratio = 1.0
    return Preprocessing(
        resolution=(height, width),
        crop_ratio=crop_ratio,
        interpolation=interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        source="timm pretrained_cfg" + (f" ({'; '.join(deviations)})" if deviations else ""),
    )
