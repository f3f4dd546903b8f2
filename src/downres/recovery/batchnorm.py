"""BatchNorm recalibration: the running statistics of a network at the resolution it will see."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..copying import copied, modules
from ..engines.torch import fastest_layout
from ..errors import DownresError


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there is anything to recalibrate: BatchNorm layers that keep running statistics."""
    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in modules(model))


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of `model` whose BatchNorm statistics are the average over `batches` (each (B, C, H, W)) by their images.

    Only the BatchNorm layers are in training mode (dropout and stochastic depth stay off), with the momentum that makes
    the cumulative average: a last batch of few images counts as few. Needs no labels; give evaluation-style inputs of
    training images. Raises DownresError when there is no batch to take statistics from.
    """
    model = nn.Module.eval(copied(model))
    layers = [m for m in modules(model) if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return model
    batches = iter(batches)
    first = next(batches, None)
    if first is not None:
        with torch.no_grad():
            layout = fastest_layout(model, first)
        batches = itertools.chain([first], batches)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen, reason = 0, "no images were given"
    with torch.no_grad():
        for batch in batches:
            for layer in layers:
                layer.momentum = len(batch) / (seen + len(batch))
            try:
                model(batch.contiguous(memory_format=layout))
            except ValueError as error:  # one value per channel has no variance: a single image on a 1×1 feature map
                if len(batch) > 1:
                    raise
                reason = str(error).rstrip(".")
                continue
            seen += len(batch)
    if not seen:
        raise DownresError(f"BatchNorm statistics cannot be recalibrated ({reason}): give batches of several images.")
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    return model
