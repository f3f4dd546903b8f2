"""`reduce`: a new model that looks at fewer pixels, with the inputs and outputs of the original."""

import copy
import difflib
import warnings
from dataclasses import dataclass

from torch import nn

from ..errors import DownresError
from ..parse import Resolution, format_resolution
from ..probe import find_stem, input_size_of
from ..records import Candidate, Change, Record
from .resize import ResampleOutput, ResizeInput


@dataclass(frozen=True)
class Reduction(Record):
    """What `reduce` did to a model; kept on the reduced model as `model.downres`."""

    candidate: Candidate
    changes: tuple[Change, ...]


def reduce(
    model: nn.Module,
    candidate: Candidate | None = None,
    *,
    resolution: Resolution | None = None,
    stem_scale: float = 1.0,
    stem: str | None = None,
    interpolation: str = "bilinear",
    input_size: tuple[int, ...] | None = None,
) -> nn.Module:
    """A copy of `model` that works at a lower resolution; `model` itself is not touched.

    Drop-in: takes the same inputs at any size, returns outputs of the same shape. The state dict keeps its keys,
    and the copy goes through copy.deepcopy, torch.compile and torch.export. What was changed is on the result as
    `reduced.downres.changes`; a call that changes nothing warns.

    Args:
        candidate: what to reduce; or give its fields as keywords.
        resolution: the input is resized to this before the embedding: short side in pixels with the aspect ratio
            kept, or (height, width).
        stem_scale: factor on height and width of the activations after the embedding (Morlier et al. 2025, sec. III).
        stem: dotted name of the module after which to resample; found by running the model once when None.
        interpolation: 'bilinear' or 'bicubic', always antialiased.
        input_size: (C, H, W) used to find the stem; default: the model's own configuration, else 3×224×224.

    Raises:
        DownresError: no such module, the model was reduced before; and by the result when it runs, if the module returns
            no feature map.
    """
    if candidate is None:
        candidate = Candidate(resolution, stem_scale, stem)
    elif resolution is not None or stem_scale != 1.0 or stem is not None:
        raise DownresError("Give reduce either a candidate or its fields (resolution, stem_scale, stem), not both.")
    if interpolation not in ("bilinear", "bicubic"):
        raise DownresError(f"The interpolation is bilinear or bicubic, {interpolation!r} is neither.")
    if isinstance(before := getattr(model, "downres", None), Reduction):
        raise DownresError(f"This model was reduced before ({before.candidate}): reduce the original instead.")

    changes = []
    small = copy.deepcopy(model)
    if candidate.resolution is not None:
        small.register_forward_pre_hook(ResizeInput(candidate.resolution, interpolation), with_kwargs=True)
        size = format_resolution(candidate.resolution)
        side = "short side" if isinstance(candidate.resolution, int) else "height x width"
        changes.append(Change("input resize", "", f"{side} {size} px, {interpolation}, antialiased"))
    if candidate.stem_scale != 1.0:
        name = candidate.stem or find_stem(model, input_size or input_size_of(model))
        module = _named(small, name)
        module.register_forward_hook(ResampleOutput(name, candidate.stem_scale, interpolation))
        changes.append(
            Change("activation resample", name, f"height and width ×{candidate.stem_scale:g}, {interpolation}, antialiased")
        )
    if not changes:
        warnings.warn(
            "reduce changed nothing: it looked for a resolution and a stem_scale below 1, and the candidate has neither.",
            stacklevel=2,
        )
    small.downres = Reduction(candidate, tuple(changes))  # type: ignore[assignment]
    return small


def _named(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules or name == "":
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"its first modules are {', '.join(list(modules)[1:6])}."
        raise DownresError(f"The model has no module {name!r}: {hint}")
    return modules[name]
