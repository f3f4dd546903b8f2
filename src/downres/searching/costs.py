"""Costs of families of candidates: no data, no weights, no arithmetic."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..axes import Axes, axes_of
from ..copying import copied, tensors_of
from ..errors import DownresError
from ..fakes import Known
from ..families import Model, load_model
from ..families.find import find_adapter
from ..measuring.cost import CONVENTION, count, measure_cost
from ..measuring.training_cost import CONVENTION as OF_TRAINING
from ..measuring.training_cost import measure_training_cost
from ..notebook import frame_of, page, sentences, table
from ..parse import Resolution, format_quantity, format_resolution
from ..probe import Answer, FakeCopy, chosen_answer, find_answers
from ..records import Candidate, Cost, Merge, TrainingCost
from ..reduction import made_for, reduce
from ..reports.rows import ORIGINAL, Row
from ..reports.tables import families
from ..tasks import Question, counted
from ..techniques import RESOLUTION, Design, techniques
from .design import as_model, design_of, fused_notes
from .plan import plan

GIVEN = "given"
"""The family of candidates that came whole, in any combination."""


@dataclass(frozen=True)
class Costs:
    """What `costs` counted: the original first, then family by family.

    Each candidate's cost is that of the network fed images of its resolution.
    """

    model: str
    rows: tuple[Row, ...]
    batch_size: int
    convention: str
    notes: tuple[str, ...]

    @property
    def original(self) -> Cost:
        return self.rows[0].cost

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "convention": self.convention,
            "costs": [
                {"family": row.family, **row.candidate.to_json(), **row.cost.to_json()}
                | ({"training": row.training.to_json()} if row.training else {})
                for row in self.rows
            ],
            "notes": list(self.notes),
        }

    def write_picture(self, path: str | os.PathLike[str]) -> Path:
        """The families as one self-contained HTML page: MACs against peak activation memory. Returns the path."""
        from ..reports.families_picture import write_families  # Plotly is needed for nothing else here

        return write_families(self.rows, path, self.model or "the model", self.batch_size, self.convention)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of what `to_json` has, a row a candidate."""
        return frame_of(self.to_json()["costs"])

    def _repr_html_(self) -> str:
        from ..reports.families_picture import families_page

        told = families(self.rows)
        shown = families_page(self.rows, self.model or "the model", self.batch_size, self.convention)
        return table(told.rows) + sentences(*self.notes) + page(shown, 620)


def costs(
    model: Model | nn.Module | str,
    resolutions: Sequence[Resolution] | None = None,
    *,
    stem_scales: Sequence[float] | None = (),
    patch_sizes: Sequence[int] | None = (),
    merges: Sequence[Merge | int | float | str] | None = (),
    depths: Sequence[int] | None = (),
    widths: Sequence[float] | None = (),
    candidates: Sequence[Candidate | str] = (),
    ragged: str = "error",
    tries: Axes | None = None,
    batch_size: int = 1,
    label_size: Resolution | None = None,
    output: str = "logits",
    upsampling: str = "bilinear",
    output_index: int | str | None = None,
    training: str | None = None,
) -> Costs:
    """Cost at the model's own resolution and of families of candidates, each along its own axis; no weights are needed.

    Args:
        resolutions: as in `search`; None: from the model's own down; () leaves them out.
        stem_scales, patch_sizes, merges: as in `search`, at the model's own resolution (of patches, at their nearest
            multiple to it); None and () leave them out.
        depths, widths: model scaling, numbers of blocks and factors on the channels; see `Candidate`.
        candidates: more, in any combination: `Candidate`s or their text, '168 merge4'.
        ragged: what patches do where they do not divide the input: 'error', 'floor' (cut) or 'pad'.
        tries: all of these in one `Axes` instead; None and () leave an axis out there too, but for resolutions.
        batch_size: images in one pass.
        label_size: of a segmentation network: its answer is brought to this size, None: to the model's own resolution; output,
            upsampling, output_index: as in `search`. Always counted; of a network with several outputs none of which is named
            nothing is brought to that size.
        training: count a training step too, by 'adamw' or 'sgd', on `batch_size` images; see `measure_training_cost`.

    A candidate that cannot be made of this network or does not run is left out, with the reason among the notes. Raises
    DownresError when that is all of them.
    """
    given = Axes(resolutions, stem_scales, patch_sizes, merges, candidates, ragged, depths, widths)
    model = as_model(load_model(model, pretrained=False) if isinstance(model, str) else model)
    native, design = Candidate(model.preprocessing.resolution), design_of(model)
    measure = _Measuring(
        model, batch_size, Question(label_size=label_size, output=output, upsampling=upsampling, output_index=output_index)
    )
    axes = axes_of(tries, given, Axes(None, (), (), (), depths=(), widths=()))
    if axes.given(RESOLUTION) is None:
        axes = axes.replaced({RESOLUTION.keyword: RESOLUTION.defaults(design)})
    along, _ = plan(design, dataclasses.replace(axes, candidates=()))
    planned, notes = plan(design, axes)

    def row(family: str, candidate: Candidate) -> Row:
        return Row(family, candidate, measure(candidate), measure.training(candidate, training) if training else None)

    rows, refused = [row(ORIGINAL, native)], []
    for candidate in planned:
        try:
            rows.append(row(_family(candidate, design) if candidate in along else GIVEN, candidate))
        except DownresError as error:
            refused.append((candidate, error))
    if refused and len(rows) == 1:
        raise refused[0][1]
    notes += [*measure.notes, *_higher_peaks(rows)]
    notes += [f"{candidate} left out: {str(error).rstrip('.')}" for candidate, error in refused]
    convention = f"{CONVENTION} {OF_TRAINING}" if training else CONVENTION
    return Costs(model.spec, tuple(rows), batch_size, convention, tuple(notes))


def _higher_peaks(rows: Sequence[Row]) -> list[str]:
    """Which networks need more memory as drop-ins than the original, and what avoids it; or nothing."""
    native, *others = rows
    batch, channels, *own = native.cost.input_size
    found = {}
    for row in others:
        side = row.cost.input_size[2:]
        if row.candidate.resolution is not None and list(side) != own:
            # The resize holds what comes in, all its rows at their new width, and the small image.
            peak = 4 * batch * channels * (own[0] * own[1] + own[0] * side[1] + side[0] * side[1])
            if peak > native.cost.peak_activation_bytes:
                found[format_resolution(row.candidate.resolution)] = format_quantity(peak, "B")
    if not found:
        return []
    many = ", ".join(f"{size} px {peak}" for size, peak in found.items())
    return [
        "peaks are of networks given images of their own size; a drop-in, which holds the native image beside the resized one, "
        f"needs more than the original's {format_quantity(native.cost.peak_activation_bytes, 'B')}: {many}; reduce with "
        "resize_input=False and resize before"
    ]


def _family(candidate: Candidate, design: Design) -> str:
    """What a candidate of one axis changes."""
    inside = (t for t in techniques() if t is not RESOLUTION and t.is_on(candidate))
    return next(inside, RESOLUTION).family(candidate, design)


class _Measuring:
    """Costs of candidates of one model, whose weights are copied for none of them."""

    def __init__(self, model: Model, batch_size: int, question: Question) -> None:
        self.model, self.batch_size = model, batch_size
        self.channels, self.native = len(model.preprocessing.mean), model.preprocessing.hw
        self.notes = fused_notes(model)
        self.fuse = bool(self.notes)
        self.known = Known()
        self.answering: Callable[[nn.Module], nn.Module] = lambda network: network
        try:
            answers = find_answers(made_for(self.weightless, self.native), (self.channels, *self.native))
        except DownresError:  # features, or something else than one image goes in: costs are counted all the same
            answers = {}
        if question.output_index is not None and answers:
            answer: Answer | None = chosen_answer(answers, question.output_index)
        else:
            answer = answers.get(None)
        if answer is not None:
            self.answering = counted(model, answer, question)

    def __call__(self, candidate: Candidate) -> Cost:
        size = self.batch_size, self.channels, *(candidate.hw or self.native)
        if candidate == Candidate(self.model.preprocessing.resolution):
            return measure_cost(self._reduced(self.model.module, candidate), size, fuse=self.fuse)
        if self.fuse:  # what the network's own code makes of its weights
            return measure_cost(self._reduced(self.model.module, candidate), size)
        try:
            # A convnet is the same network at every resolution: `reduce` would copy it and change nothing.
            if self.convnet and candidate == Candidate(candidate.resolution):
                return count(self.as_it_is, size)
            return count(FakeCopy(_only_fake(self._reduced(self.weightless, candidate)), known=self.known), size)
        except Exception:  # something looked at numbers that are not there; the real one says what else is wrong
            return measure_cost(self._reduced(self.model.module, candidate), size, fuse=False)

    def training(self, candidate: Candidate, optimizer: str) -> TrainingCost:
        """Of a network that is fed the candidate's pixels; its answer is that of the network itself, at its own size."""
        size = self.batch_size, self.channels, *(candidate.hw or self.native)
        return measure_training_cost(self._made(self.model.module, candidate), size, optimizer=optimizer)

    @cached_property
    def convnet(self) -> bool:
        return find_adapter(self.weightless) is None

    @cached_property
    def as_it_is(self) -> FakeCopy:
        return FakeCopy(_only_fake(copied(self.answering(self.weightless))), again=True, known=self.known)

    @cached_property
    def weightless(self) -> nn.Module:
        return _hollow(self.model.module, "meta")

    def _reduced(self, network: nn.Module, candidate: Candidate) -> nn.Module:
        return self.answering(self._made(network, candidate))

    def _made(self, network: nn.Module, candidate: Candidate) -> nn.Module:
        """The network that is fed the candidate's pixels."""
        if candidate == Candidate(self.model.preprocessing.resolution):
            return made_for(network, self.native)
        return reduce(network, candidate, input_size=(self.channels, *self.native), resize_input=False)


def _hollow(network: nn.Module, device: str) -> nn.Module:
    """A copy on another device whose parameters and buffers are not initialised: memory that nobody touches costs nothing."""
    known: dict[int, Any] = {}
    for t in tensors_of(network):
        hollow = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        known[id(t)] = nn.Parameter(hollow, t.requires_grad) if isinstance(t, nn.Parameter) else hollow
    return copied(network, known)


def _only_fake(hollow: nn.Module) -> nn.Module:
    """A network without numbers can be looked at, not computed with."""

    def refuse(module: nn.Module, inputs: tuple) -> None:
        if not isinstance(inputs[0], FakeTensor):
            raise RuntimeError("its weights are not there")

    hollow.register_forward_pre_hook(refuse, prepend=True)
    return hollow
