"""What a plan of candidates needs to know of a model; costs need no more, and none of what looks at images."""

import dataclasses

from torch import nn

from ..copying import copied, first_float, refuse_sealed, single
from ..engines.fuse import fused, is_fusible, noise
from ..families import Model, load_model
from ..families.find import find_adapter
from ..probe import materialised, total_stride
from ..records import Preprocessing
from ..reduction import divided_by, made_for
from ..techniques import Design


def as_model(model: Model | nn.Module | str, preprocessing: Preprocessing | None = None) -> Model:
    """A specification, a bare module or a loaded model as a loaded model."""
    if isinstance(model, str):
        model = load_model(model)
    from ..families.generic import preprocessing as assumed
    from ..families.generic import ready

    if isinstance(model, nn.Module):
        # Measured on the CPU in single precision, wherever and however the caller keeps it.
        module = single(copied(materialised(model)))
        return Model(module, preprocessing or assumed(module))
    if not isinstance(model, Model):
        refuse_sealed(model)
    return dataclasses.replace(model, module=ready(model.module), preprocessing=preprocessing or model.preprocessing)


def fused_notes(model: Model) -> list[str]:
    """What is said of a network with branches that are put together for whatever is counted, timed and exported; or nothing."""
    p, module = model.preprocessing, model.module
    if not is_fusible(module) or fused(module, noise((1, len(p.mean), *p.hw), first_float(module))) is module:
        return []
    return [
        f"counted, timed and exported is {type(module).__name__} with its training branches put together, as its own code does"
    ]


def design_of(model: Model) -> Design:
    """What a plan of candidates needs to know of the model."""
    p, adapter = model.preprocessing, find_adapter(model.module)
    patch = adapter.patch[0] if adapter is not None and adapter.patch is not None else None
    original = made_for(model.module, p.hw)
    stride = total_stride(original, p.hw, len(p.mean))
    tokens = adapter is not None and bool(adapter.block_names())
    return Design(p.resolution, stride, patch, tokens, divided_by(original, p.hw, stride=stride))
