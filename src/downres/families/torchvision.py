"""torchvision: names, pretrained weights, and the transforms that come with them."""

from typing import Any

import torchvision.models as models
from torch import nn

from ..records import Preprocessing
from .adapter import Adapter


def names() -> list[str]:
    # Classification models live in torchvision.models itself, the others in submodules.
    return models.list_models(module=models)


def tags(name: str) -> list[str]:
    return []  # get_model knows the best weights only


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("inception_v3", "googlenet"):
        # Their auxiliary heads exist for training alone, and change the output type.
        # The published weights, and what is fine-tuned from them, expect the input scaled by the network itself.
        kwargs |= {"aux_logits": False, "init_weights": False, "transform_input": True}
    model = models.get_model(name, weights=None, **kwargs)
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True), strict=False)
    return model


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    transform = models.get_model_weights(name).DEFAULT.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    return Preprocessing(
        resolution=crop,
        crop_ratio=crop / resize,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        source="torchvision weight transforms",
    )


def adapter(name: str, module: nn.Module) -> Adapter | None:
    return None
