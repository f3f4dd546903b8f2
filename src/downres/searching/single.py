"""One resolution without a search: `evaluate` it as it is, or `recover` the model at it."""

from typing import Any

from torch import nn

from ..errors import DownresError
from ..families import Model
from ..parse import Resolution, as_resolution
from ..records import Budget, Candidate, Preprocessing, Recovery, Score
from ..recovery.ladder import RUNGS, climb
from ..recovery.state import State
from ..tasks import Question, Task
from ..techniques.resolution import like
from .prepare import Measuring, Progress, Source, check_planned, gather, open_data, prepare_task


def evaluate(
    model: Model | nn.Module | str,
    data: Source,
    *,
    resolution: Resolution | None = None,
    crop_ratio: float | None = None,
    task: str | type[Task] | None = None,
    question: Question = Question(),
    measuring: Measuring = Measuring(runtime="torch"),
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
    **flat: Any,
) -> Score:
    """A model as it is on the validation images, at a resolution and crop ratio (default: its own): top-1 and top-5 of a
    classifier, mIoU and what goes with it of a segmentation network, and so on. The groups and flat fields are `search`'s.
    """
    groups = gather({"question": question, "measuring": measuring}, flat)
    question, measuring = groups["question"], groups["measuring"]
    subject = prepare_task(model, data, question, task, preprocessing)
    open_data(subject, data, measuring, question, parts=("val",), progress=progress)
    p = subject.model.preprocessing
    p = p.at(None if resolution is None else like(p.resolution, as_resolution(resolution)), crop_ratio)  # type: ignore[arg-type]
    bank = subject.bank(None, progress=progress, **measuring.options())
    subject.fill(bank)
    return subject.quality(subject.evidence(bank, State(Candidate(p.resolution), p.crop_ratio), subject.proof))


def recover(
    model: Model | nn.Module | str,
    data: Source,
    candidate: Candidate | None = None,
    *,
    resolution: Resolution | None = None,
    max_drop: float = 1.0,
    rungs: tuple[str, ...] = RUNGS,
    task: str | type[Task] | None = None,
    question: Question = Question(),
    measuring: Measuring = Measuring(runtime="torch"),
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
    **flat: Any,
) -> tuple[nn.Module, Preprocessing, Recovery]:
    """The model at a lower resolution with its quality won back on the training images, as far as `max_drop` requires.

    Returns (network, preprocessing, recovery): the network takes images made by the preprocessing, the recovery names
    the rung that it took and what each rung gave and cost. The model given is not touched; no validation image is looked at.
    """
    if (candidate is None) == (resolution is None):
        raise DownresError("Give recover either a candidate or a resolution: for example resolution=128.")
    groups = gather({"question": question, "measuring": measuring}, flat)
    question, measuring = groups["question"], groups["measuring"]
    subject = prepare_task(model, data, question, task, preprocessing)
    open_data(subject, data, measuring, question, progress=progress)
    candidate = candidate or Candidate(like(subject.native.resolution, as_resolution(resolution)))  # type: ignore[arg-type]
    if candidate.resolution is None:
        candidate = candidate.at(subject.native.resolution)
    check_planned(subject, [candidate])
    bank = subject.bank(None, progress=progress, **measuring.options())
    subject.fill(bank)
    rungs = tuple(rung for rung in rungs if rung in subject.rungs)
    reference = subject.reference(bank, 0, subject.data.folds[0], rungs)
    state, recovery = climb(subject, bank, candidate, reference, Budget(max_drop), rungs)
    return bank.network(state), bank.preprocessing_of(state), recovery
