"""BatchNorm recalibration: the running statistics of a network at the resolution it will see."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there is anything to recalibrate: BatchNorm layers that keep running statistics."""
    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of `model` whose BatchNorm statistics are the plain average over `batches` (each (B, C, H, W)).

    Only the BatchNorm layers are in training mode (dropout and stochastic depth stay off), with `momentum=None`,
    the cumulative average. Needs no labels; give evaluation-style inputs of training images.
    """
    model = copy.deepcopy(model).eval()
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return model
