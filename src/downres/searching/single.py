"""One resolution without a search: `evaluate` it as it is, or `recover` the model at it."""

from typing import Any

from torch import nn

from ..errors import DownresError
from ..families import Model
from ..parse import Resolution
from ..records import Budget, Candidate, Preprocessing, Recovery, Score
from ..recovery.ladder import chosen_rungs, climb, rungs_for
from ..recovery.state import State
from ..recovery.team import Team
from ..recovery.training import Training
from ..tasks import Question, Task
from .prepare import Measuring, Progress, Source, bank_for_now, check_planned, gather, open_data, prepare_task


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
    native = subject.native_state
    candidate = Candidate(resolution).on(subject.model.preprocessing.resolution)
    state = State(candidate, native.crop_ratio if crop_ratio is None else crop_ratio)
    with bank_for_now(subject, measuring, progress) as bank:
        return subject.quality(subject.evidence(bank, state, subject.proof))


def recover(
    model: Model | nn.Module | str,
    data: Source,
    candidate: Candidate | None = None,
    *,
    resolution: Resolution | None = None,
    max_drop: float = 1.0,
    training: Training = Training(),
    rungs: tuple[str, ...] | None = None,
    recover: str | None = None,
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
    recover, rungs: how far to climb, see `search`. training: how rungs train, where such are among them.
    """
    if (candidate is None) == (resolution is None):
        raise DownresError("Give recover either a candidate or a resolution: for example resolution=128.")
    if Team().count > 1:
        raise DownresError("`recover` trains in one process: `search` with that candidate trains in several.")
    groups = gather({"question": question, "measuring": measuring, "training": training}, flat)
    question, measuring, training = groups["question"], groups["measuring"], groups["training"]
    subject = prepare_task(model, data, question, task, preprocessing)
    open_data(subject, data, measuring, question, progress=progress)
    candidate = (candidate or Candidate(resolution)).on(subject.model.preprocessing.resolution)
    check_planned(subject, [candidate])
    if candidate.network != candidate:
        raise DownresError(
            f"`recover` gives a torch network, {candidate} is a file of one: search with that candidate, or "
            f"recover {candidate.network}."
        )
    rungs = rungs_for(subject, [candidate], chosen_rungs(rungs, recover))
    with bank_for_now(subject, measuring, progress) as bank:
        bank.training = training
        reference = subject.reference(bank, 0, subject.data.folds[0], rungs)
        state, recovery = climb(subject, bank, candidate, reference, Budget(max_drop), rungs)
        return bank.network(state), bank.preprocessing_of(state), recovery
