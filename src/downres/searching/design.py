"""What a plan of candidates needs to know of a model; costs need no more, and none of what looks at images."""

import copy
import dataclasses

from torch import nn

from ..families import Model, load_model
from ..families.find import find_adapter
from ..probe import total_stride
from ..records import Preprocessing
from ..reduction import divided_by, made_for
from ..techniques import Design


def as_model(model: Model | nn.Module | str, preprocessing: Preprocessing | None = None) -> Model:
    """A specification, a bare module or a loaded model as a loaded model."""
    if isinstance(model, str):
        model = load_model(model)
    if isinstance(model, nn.Module):
        from ..families.generic import preprocessing as assumed

        # Measured on the CPU in single precision, wherever and however the caller keeps it.
        return Model(copy.deepcopy(model).cpu().float().eval(), preprocessing or assumed(model))
    if preprocessing is not None:
        model = dataclasses.replace(model, preprocessing=preprocessing)
    return model


def design_of(model: Model) -> Design:
    """What a plan of candidates needs to know of the model."""
    p, adapter = model.preprocessing, find_adapter(model.module)
    patch = adapter.patch[0] if adapter is not None and adapter.patch is not None else None
    original = made_for(model.module, p.hw)
    return Design(
        p.resolution,
        total_stride(original, p.hw, len(p.mean)),
        patch,
        adapter is not None and bool(adapter.block_names()),
        divided_by(original, p.hw, len(p.mean)),
    )
