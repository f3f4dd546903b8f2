"""The ladder: crop ratio → BatchNorm recalibration → head refit → training without labels, with labels, in 8 bits; climbed only
as far as the drop requires.

Every decision is taken on tuning images, a part of the training images; proof images are never looked at here. What a drop is,
and which rungs there are, the task says.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..engines.engine import Quantization, QuantizationFailed
from ..errors import DownresError
from ..images import Fold
from ..parse import INT8
from ..records import OUTSIDE, WITHIN, Budget, Candidate, Drop, Recovery, Rung, Score
from .bank import CALIBRATION_IMAGES, Bank
from .batchnorm import has_batchnorm
from .distill import Distillation
from .finetune import Finetuning, FixRes
from .rounded import Rounding
from .sensitivity import most_sensitive
from .state import QUANTIZED, RECALIBRATED, REFITTED, State, Step
from .team import Job
from .trainer import Lesson, trained
from .training import TrainingFailed

TAUGHT: dict[str, type[Distillation] | type[Finetuning]] = {
    lesson.rung: lesson for lesson in (Distillation, FixRes, Finetuning, Rounding)
}
"""The rungs that train."""
OF_FILES = ("ranges", "layers", Rounding.rung)
"""Those of what is made of a network, whatever its task."""
OF_LABELS = (FixRes.rung, Finetuning.rung)
RUNGS = ("crop", "batchnorm", "head", Distillation.rung, *OF_LABELS, *OF_FILES)
"""From cheap to dear; the last three of files."""
UNASKED = tuple(rung for rung in RUNGS if rung not in TAUGHT)
"""Those that are climbed when nobody chose: training takes minutes to hours."""
BEFORE_FILES = ("crop", "batchnorm", Distillation.rung, *OF_LABELS)
"""Those of the network that an 8-bit file is made of."""
_CALIBRATE = ("crop", "batchnorm", "ranges")
HEIGHTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "calibrate": _CALIBRATE,
    "refit": UNASKED,
    "distill": (*UNASKED, Distillation.rung),
    "finetune": (*UNASKED, Distillation.rung, *OF_LABELS),
    "train": RUNGS,
}
"""How far up the ladder may be climbed, in a word."""
GLANCE = 32
"""A recalibration that is proven outside on this many images (calibrated on as many) is given up at once."""


@dataclass(frozen=True)
class Reference:
    """The original in one fold: which training images fit and which tune, and what it does on those.

    start: its state while tuning (a new head is then never fitted on tuning images); state: the one for proof images.
    evidence: on the tuning images; None where there are none.
    """

    index: int
    fold: Fold
    fit: np.ndarray
    tune: np.ndarray
    start: State
    state: State
    evidence: Any


@dataclass(frozen=True)
class Option:
    """A rung that was measured on all tuning images in the state `start`; `state` is what it would serve."""

    rung: str
    evidence: Any
    state: State
    drop: Drop
    start: State | None = None


class Climber(Protocol):
    """What the ladder asks of a task; see `tasks.Task`."""

    glance: int
    seed: int

    def evidence(self, bank: Any, state: State, indices: np.ndarray, *, serving: bool = True) -> Any: ...
    def quality(self, evidence: Any) -> Score: ...
    def compare(self, original: Any, candidates: dict[str, Any], budget: Budget) -> dict[str, Drop]: ...
    def choose(self, options: Sequence[Option]) -> Option: ...
    def crops(self, native: float) -> Sequence[float]: ...
    def why_no_head(self, bank: Any, fit: np.ndarray) -> str: ...
    def refit(self, bank: Any, state: State, index: int, fit: np.ndarray, tune: np.ndarray) -> tuple[State, State, str]: ...


def chosen_rungs(rungs: Sequence[str] | None, recover: str | None) -> tuple[str, ...]:
    """The rungs named, or those up to a word, see `HEIGHTS`. DownresError for another word, and for both."""
    if rungs is not None and recover is not None:
        raise DownresError("Say either how far to climb with `recover`, or which rungs with `rungs`, not both.")
    if recover is not None and recover not in HEIGHTS:
        raise DownresError(f"`recover` is one of {', '.join(HEIGHTS)}, {recover!r} is not.")
    return HEIGHTS[recover] if recover is not None else UNASKED if rungs is None else tuple(rungs)


def rungs_for(task: Any, candidates: Sequence[Candidate], wanted: Sequence[str]) -> tuple[str, ...]:
    """Of the rungs wanted those that there are: of this task, training, and where something is quantized those of 8-bit
    files.
    """
    files = OF_FILES if any(c.precision == INT8 for c in candidates) else ()
    labels = OF_LABELS if task.labelled else ()
    return tuple(rung for rung in wanted if rung in (*task.rungs, Distillation.rung, *labels, *files))


def climb(
    task: Climber,
    bank: Bank,
    candidate: Candidate,
    reference: Reference,
    budget: Budget,
    rungs: Sequence[str] = RUNGS,
    like: State | None = None,
) -> tuple[State, Recovery]:
    """Climb until the drop on the tuning images is shown to be within the budget, else take what the task chooses.

    BatchNorm recalibration and head refit are alternatives on top of the crop: a refitted head absorbs the shift
    itself, and on the recalibrated features of a network far from its own domain it was worse (80.8 against 83.8 %
    on ELPV at 128 px).

    like: for a candidate of 8 bits the state of its network in float, where that was measured, else that is climbed first:
    crop, statistics and trained weights are those, as each try of its own would be a file of its own. What changes that file
    alone, other ranges and layers in float, is tried while the tuning images show a loss beyond doubt that is over the allowed
    one.
    """
    state, start = (bank.started(s, candidate, reference.index) for s in (reference.state, reference.start))
    if len(reference.tune) == 0:
        why = "fewer than 4 training images: nothing can be recovered" if rungs else "no recovery was asked for"
        return state, Recovery("none", state.crop_ratio, 0.0, (Rung("none", None, 0, 0.0, 0, why),))
    ladder, quantized = _Ladder(task, bank, reference, budget), state.step(QUANTIZED) is not None
    enough = ladder.attempt("none", start, state)
    before = [rung for rung in rungs if rung in BEFORE_FILES]
    if quantized and like is None and before and not enough and candidate.network != reference.state.candidate:
        like, _ = climb(task, bank, candidate.network, reference, budget, before)
    if quantized and like is not None and not enough:
        by = next((rung for rung, lesson in TAUGHT.items() if like.trained and lesson.done == like.trained.done), None)
        rung = by or ("batchnorm" if like.step(RECALIBRATED) else "crop")
        begun = [like_float(s, like, reference.index) for s in (start, state)]
        if begun[1] != state and rung in rungs:
            enough = ladder.attempt(rung, begun[0], begun[1], "as the network in float")
            start, state = ladder.best_pair()
    if not enough and "crop" in rungs and not quantized:
        for ratio in task.crops(state.crop_ratio):
            cropped = [dataclasses.replace(s, crop_ratio=ratio) for s in (start, state)]
            enough |= ladder.attempt("crop", cropped[0], cropped[1], f"crop ratio {ratio:.3g}")
        best = ladder.best().state.crop_ratio
        state, start = (dataclasses.replace(s, crop_ratio=best) for s in (state, start))
    if not enough and "batchnorm" in rungs and not quantized:
        step = Step(RECALIBRATED, reference.index, CALIBRATION_IMAGES)
        if not has_batchnorm(bank.model):
            ladder.skip("batchnorm", "nothing to recalibrate: the network has no BatchNorm statistics")
        elif ladder.worth_a_try("batchnorm", start, step):
            enough = ladder.attempt("batchnorm", start.then(step), state.then(step))
    if not enough and "head" in rungs:
        if why := task.why_no_head(bank, reference.fit):
            ladder.skip("head", why)
        else:
            ladder.begin()
            enough = ladder.attempt("head", *task.refit(bank, state, reference.index, reference.fit, reference.tune))
    for rung in (Distillation.rung, *OF_LABELS):
        if not enough and rung in rungs and not quantized:
            enough = _train(ladder, task, bank, reference, rung)
    if quantized and not enough:
        _other_files(ladder, bank, [rung for rung in OF_FILES if rung in rungs and rung not in TAUGHT], reference.tune)
        if Rounding.rung in rungs and not ladder.is_over():
            ladder.skip(Rounding.rung, "tuning images show no loss over the allowed one")
        elif Rounding.rung in rungs:
            _train(ladder, task, bank, reference, Rounding.rung)
    chosen = ladder.best()
    seconds = sum(rung.seconds for rung in ladder.tried)
    return chosen.state, Recovery(chosen.rung, chosen.state.crop_ratio, seconds, tuple(ladder.tried), chosen.drop)


def _train(ladder: "_Ladder", task: Climber, bank: Bank, reference: Reference, rung: str) -> bool:
    """Trained on what is not tuned on; one training serves both."""
    ladder.begin()
    start, _ = ladder.best_pair()
    made = start.step(QUANTIZED)
    begun = start.network
    lesson = lesson_of(rung, task, bank, begun, reference.start, reference.fit)
    watch = ladder.hopeless(begun) if made is None else None
    try:
        state, how = trained(bank, begun, reference.index, reference.fit, bank.training, lesson, task.seed, watch)
    except TrainingFailed as error:
        ladder.skip(rung, str(error).rstrip("."))
        return False
    state = state.at(start.candidate)
    if made is not None:
        state = state.then(made)
    try:
        return ladder.attempt(rung, state, state, how)
    except DownresError as error:  # answers that are no numbers, a file that cannot be made
        ladder.skip(rung, str(error).rstrip("."))
        return False


def lesson_of(rung: str, task: Climber, bank: Bank, begun: State, original: State | None, fit: np.ndarray) -> Lesson:
    """What that rung teaches the network of a state on training images `fit`; original: who teaches without labels."""
    if rung in OF_LABELS:
        labelled = FixRes if rung == FixRes.rung else Finetuning
        return labelled(task, bank, bank.preprocessing_of(begun).hw, bank.training)
    assert original is not None
    unlabelled = Rounding if rung == Rounding.rung else Distillation
    return unlabelled(task, bank, begun, original, fit)


def help_out(task: Climber, bank: Bank, job: Job) -> None:
    """A training that the first process of several has begun."""
    for tensors in job.tensors.values():
        bank.weights.put(tensors)
    lesson = lesson_of(job.rung, task, bank, job.state, job.original, job.images)
    trained(bank, job.state, job.fold, job.images, job.how, lesson, task.seed)


def like_float(state: State, like: State, fold: int) -> State:
    """The state with the crop of another, and with statistics averaged anew or weights trained where that has them."""
    if (step := like.trained) is not None:
        return dataclasses.replace(state.without(REFITTED), crop_ratio=like.crop_ratio).then(step)
    state = dataclasses.replace(state, crop_ratio=like.crop_ratio)
    return state if like.step(RECALIBRATED) is None else state.then(Step(RECALIBRATED, fold, CALIBRATION_IMAGES))


def _other_files(ladder: "_Ladder", bank: Bank, rungs: Sequence[str], tune: np.ndarray) -> None:
    """Other ranges, then layers in float, each on the best so far."""
    for rung in rungs:
        if not ladder.is_over():
            ladder.skip(rung, "tuning images show no loss over the allowed one")
        elif rung == "ranges":
            for ranges in bank.engine(ladder.best().state.candidate).ranges[1:]:
                if not ladder.is_over():
                    break
                start, state = (requantized(s, ranges=ranges) for s in ladder.best_pair())
                try:
                    ladder.attempt("ranges", start, state, str(Quantization(ranges)))
                except QuantizationFailed as error:  # so; others may work
                    ladder.skip("ranges", f"{ranges}: {str(error).rstrip('.')}")
        else:
            _keep_layers(ladder, bank, *ladder.best_pair(), tune)


def requantized(state: State, **changes: Any) -> State:
    """The state with its 8-bit file made otherwise."""
    made = state.step(QUANTIZED)
    assert made is not None and made.how is not None
    return state.quantized_as(dataclasses.replace(made.how, **changes))


KEPT = (1, 2, 4, 8, 16)
"""Layers left in float, one try after the other, until that suffices."""


def _keep_layers(ladder: "_Ladder", bank: Bank, start: State, state: State, tune: np.ndarray) -> None:
    """The fewest layers in float that suffice, the most sensitive first, as far as half of the layers."""
    ladder.begin()
    try:
        ranked = most_sensitive(bank, start, tune)
    except QuantizationFailed as error:
        ladder.skip("layers", str(error).rstrip("."))
        return
    if len(ranked) < 2:
        ladder.skip("layers", "too few layers in 8 bits to keep some in float")
    for count in KEPT:
        if count > len(ranked) // 2:
            break
        kept = tuple(ranked[:count])
        told = f"in float: {', '.join(kept)}"
        if ladder.attempt("layers", requantized(start, kept=kept), requantized(state, kept=kept), told) or not ladder.is_over():
            break


def best_of(options: Sequence[Option], scores: Sequence[float], behind: Any) -> Option:
    """The first option proven within, unless what is only lowered is as good within one standard error; where none is proven,
    the cheapest within one standard error of the best.

    On few tuning images the best of several is often only the luckiest; the one-standard-error rule (Breiman et al.
    1984) keeps what is cheaper unless another is better beyond that. behind(one, best): in standard errors of their paired
    difference.
    """
    proven = [option for option in options if option.drop.verdict == WITHIN]
    if proven:
        return options[0] if behind(options[0].evidence, proven[0].evidence) <= 1.0 else proven[0]
    best = options[max(range(len(options)), key=lambda i: scores[i])]
    return next(option for option in options if behind(option.evidence, best.evidence) <= 1.0)


def standard_errors(one: np.ndarray, best: np.ndarray) -> float:
    """How many standard errors of their paired difference `one` is behind `best`: points of the same images, (n,) both."""
    apart = best.astype(float) - one.astype(float)
    total = float(apart.sum())
    variance = float((apart**2).sum()) - total**2 / len(apart)
    return total / variance**0.5 if variance > 0 else total


def together(found: Sequence[Recovery]) -> Recovery:
    """The recoveries of the folds as one: the dearest rung that any fold needed, the time of all, the commonest crop."""
    if len(found) == 1:
        return found[0]
    order = ("none", *RUNGS)
    tried: dict[tuple[str, str], list[Rung]] = {}
    for rung in (rung for one in found for rung in one.tried):
        # A head's strength, the images of a training differ from fold to fold, a crop ratio or a reason tells rungs apart.
        same = rung.score is not None and rung.rung in ("head", *TAUGHT)
        tried.setdefault((rung.rung, "" if same else rung.note), []).append(rung)
    merged = sorted((_one(rungs) for rungs in tried.values()), key=lambda rung: order.index(rung.rung))
    dearest = max((one.rung for one in found), key=order.index)
    crop = Counter(one.crop_ratio for one in found).most_common(1)[0][0]
    return Recovery(dearest, crop, sum(one.seconds for one in found), tuple(merged), found[0].tuning)


def _one(rungs: list[Rung]) -> Rung:
    """One rung as tried in several folds: the score over the tuning images of all."""
    n = sum(rung.n for rung in rungs)
    score = sum((rung.score or 0.0) * rung.n for rung in rungs) / n if n else None
    note = "; ".join(dict.fromkeys(rung.note for rung in rungs if rung.note))
    where = f"{len(rungs)} folds" if len(rungs) > 1 else "1 fold"
    seconds, images = sum(rung.seconds for rung in rungs), sum(rung.images for rung in rungs)
    return Rung(rungs[0].rung, score, n, seconds, images, f"{note} ({where})" if note else where)


class _Ladder:
    """Bookkeeping of one climb: what was tried, what it cost, what it gave on the tuning images."""

    def __init__(self, task: Climber, bank: Bank, reference: Reference, budget: Budget) -> None:
        self.task, self.bank, self.reference, self.budget = task, bank, reference, budget
        self.tried: list[Rung] = []
        self.options: list[Option] = []
        self.begin()

    def begin(self) -> None:
        """From here on time and images count towards the next rung."""
        self._since = time.perf_counter(), self.bank.passes

    def attempt(self, rung: str, start: State, state: State, note: str = "") -> bool:
        """Measure `start` on all tuning images; `state` serves later. True when the drop is proven within."""
        evidence, drop = self._look(start, self.reference.tune, self.reference.evidence)
        self._note(rung, evidence, note)
        self.options.append(Option(rung, evidence, state, drop, start))
        return drop.verdict == WITHIN

    def worth_a_try(self, rung: str, start: State, step: Step) -> bool:
        """A glance at few images, calibrated on as few: False (and noted) when it is proven outside already there."""
        few = self.task.glance
        if not few:
            return True
        glanced = start.then(dataclasses.replace(step, images=few))
        original = self.reference.evidence.select(np.arange(min(few, len(self.reference.tune))))
        evidence, drop = self._look(glanced, self.reference.tune[:few], original)
        if drop.verdict == OUTSIDE:
            self._note(rung, evidence, f"given up after a glance at {len(evidence)} images")
        return drop.verdict != OUTSIDE

    def skip(self, rung: str, why: str) -> None:
        self.tried.append(Rung(rung, None, 0, 0.0, 0, why))

    def hopeless(self, begun: State) -> Callable[[State], str]:
        """Of a training half-way: beyond doubt outside on tuning images still, and what is missing to the allowed drop is more
        than all that was won so far.
        """
        before = next((o.drop.drop for o in self.options if o.start is not None and o.start.network == begun), None)

        def why(state: State) -> str:
            try:
                _, drop = self._look(state, self.reference.tune, self.reference.evidence)
            except DownresError as error:
                return str(error).rstrip(".")
            missing = drop.lower - self.budget.max_drop
            if before is None or drop.verdict != OUTSIDE or missing <= max(0.0, before - drop.drop):
                return ""
            return f"a drop of {drop.drop:.3g} on {len(self.reference.tune)} tuning images, {before:.3g} before it"

        return why

    def best(self) -> Option:
        return self.task.choose(self.options)

    def is_over(self) -> bool:
        """Whether the best so far loses beyond doubt, and more than is allowed as far as tuning images show."""
        drop = self.best().drop
        return drop.lower > 0 and drop.drop > self.budget.max_drop

    def best_pair(self) -> tuple[State, State]:
        """(start, state) of the best so far."""
        best = self.best()
        assert best.start is not None
        return best.start, best.state

    def _look(self, state: State, indices: np.ndarray, original: Any) -> tuple[Any, Drop]:
        evidence = self.task.evidence(self.bank, state, indices, serving=False)
        return evidence, self.task.compare(original, {"it": evidence}, self.budget)["it"]

    def _note(self, rung: str, evidence: Any, note: str) -> None:
        seconds, images = time.perf_counter() - self._since[0], self.bank.passes - self._since[1]
        self.tried.append(Rung(rung, self.task.quality(evidence).score, len(evidence), seconds, images, note))
        self.begin()
