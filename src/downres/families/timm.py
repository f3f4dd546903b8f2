"""timm: names, pretrained weights, and what `pretrained_cfg` says of the input."""

import timm
from torch import nn

from ..records import Preprocessing


def names() -> list[str]:
    return timm.list_models()


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    config = timm.data.resolve_data_config(model=model)
    height, width = config["input_size"][1:]
    return Preprocessing(
        resolution=(height, width),
        crop_ratio=config["crop_pct"],
        # timm's tables name a few other filters ('lanczos', 'random'); bicubic is its own default.
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        source="timm pretrained_cfg",
    )
