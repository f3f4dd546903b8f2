"""The ladder: crop ratio → BatchNorm recalibration → head refit, climbed only as far as the allowed drop requires.

Every decision is taken on tuning images, a part of the training images; proof images are never looked at here.
"""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from ..data import Fold, split_once
from ..measure.quality import compare, count_correct
from ..records import OUTSIDE, WITHIN, Budget, Candidate, Drop, Recovery, Rung
from .bank import State
from .batchnorm import has_batchnorm
from .crop import crop_options
from .features import FeatureBank, logits
from .head import STRENGTHS, Head, fit_head, log_loss, why_not

RUNGS = ("crop", "batchnorm", "head")
TUNING_IMAGES = 1000
"""Tuning images at most, over all folds together."""
GLANCE = 32
"""A recalibration that is proven outside on this many images (calibrated on as many) is given up at once."""


@dataclass(frozen=True)
class Reference:
    """The original in one fold: which training images fit and which tune, its heads, and what it gets right.

    start: the head that candidates begin with on tuning images (never fitted on those); head: the one for proof images.
    """

    index: int
    fold: Fold
    fit: np.ndarray
    tune: np.ndarray
    start: Head | None
    head: Head | None
    tune_correct: np.ndarray


@dataclass(frozen=True)
class Recovered:
    """A candidate in one fold after the ladder: backbone state, head, and the record of what was tried."""

    state: State
    head: Head | None
    recovery: Recovery


def split_tuning(fold: Fold, labels: np.ndarray, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, tune): about a quarter of the training images tune, at most TUNING_IMAGES / folds; both have every class.

    Tuning images come in random order: the first few of them are a sample.
    """
    n = len(fold.train)
    if n < 4:
        return fold.train, np.zeros(0, np.int64)
    split = split_once(labels[fold.train], min(0.25, max(1, TUNING_IMAGES // folds) / n), seed)
    return fold.train[split.train], np.random.default_rng([seed, 1]).permutation(fold.train[split.test])


def make_reference(
    bank: FeatureBank,
    native: State,
    index: int,
    fold: Fold,
    folds: int,
    labels: np.ndarray,
    own: Head | None,
    outputs: int,
    fit_new: bool,
    seed: int,
) -> Reference:
    """The original in fold `index`: with its own head, or (fit_new) with heads fitted at its native resolution."""
    fit, tune = split_tuning(fold, labels, folds, seed)
    if not fit_new:
        start = head = own
    else:
        start, head, _ = _refit(bank, native, labels, fit, tune, outputs)
    correct = count_correct(logits(bank.features(native, tune), start), labels[tune]) if len(tune) else np.zeros(0, bool)
    return Reference(index, fold, fit, tune, start, head, correct)


def climb(
    bank: FeatureBank,
    candidate: Candidate,
    reference: Reference,
    labels: np.ndarray,
    outputs: int,
    budget: Budget,
    rungs: tuple[str, ...] = RUNGS,
) -> Recovered:
    """Climb until the drop on the tuning images is shown to be within the budget, else take the best rung tried.

    BatchNorm recalibration and head refit are alternatives on top of the crop: a refitted head absorbs the shift
    itself, and on the recalibrated features of a network far from its own domain it was worse (80.8 against 83.8 %
    on ELPV at 128 px).
    """
    native = State(candidate, bank.preprocessing.crop_ratio)
    if len(reference.tune) == 0:
        why = "fewer than 4 training images: nothing can be recovered" if rungs else "no recovery was asked for"
        nothing = Rung("none", None, 0, 0.0, 0, why)
        return Recovered(native, reference.head, Recovery("none", native.crop_ratio, 0.0, (nothing,)))
    ladder = _Ladder(bank, reference, labels, budget)
    start, head = reference.start, reference.head
    state = native
    enough = ladder.attempt("none", native, start, head)
    if not enough and "crop" in rungs:
        for ratio in crop_options(native.crop_ratio)[1:]:
            cropped = dataclasses.replace(native, crop_ratio=ratio)
            enough |= ladder.attempt("crop", cropped, start, head, f"crop ratio {ratio:.3g}")
        state = ladder.best().state
    if not enough and "batchnorm" in rungs:
        if not has_batchnorm(bank.model):
            ladder.skip("batchnorm", "nothing to recalibrate: the network has no BatchNorm statistics")
        elif ladder.worth_a_try("batchnorm", dataclasses.replace(state, calibration=reference.index), start):
            enough = ladder.attempt("batchnorm", dataclasses.replace(state, calibration=reference.index), start, head)
    if not enough and "head" in rungs:
        why = why_not(labels[reference.fit], outputs) if bank.head else "the model's output does not come from a linear layer"
        if why:
            ladder.skip("head", why)
        else:
            ladder.begin()
            start, head, strength = _refit(bank, state, labels, reference.fit, reference.tune, outputs)
            ladder.attempt("head", state, start, head, f"logistic regression, C={strength:g}")
    chosen = ladder.best()
    seconds = sum(rung.seconds for rung in ladder.tried)
    return Recovered(
        chosen.state, chosen.head, Recovery(chosen.rung, chosen.state.crop_ratio, seconds, tuple(ladder.tried), chosen.drop)
    )


@dataclass(frozen=True)
class _Option:
    """A rung that was measured on all tuning images."""

    rung: str
    correct: np.ndarray
    state: State
    head: Head | None
    drop: Drop


def _behind(one: np.ndarray, best: np.ndarray) -> float:
    """How many standard errors of their paired difference `one` is behind `best` (both bool, on the same images)."""
    lost, won = int((best & ~one).sum()), int((one & ~best).sum())
    variance = lost + won - (lost - won) ** 2 / len(one)
    return (lost - won) / variance**0.5 if variance > 0 else float(lost - won)


class _Ladder:
    """Bookkeeping of one climb: what was tried, what it cost, what it gave on the tuning images."""

    def __init__(self, bank: FeatureBank, reference: Reference, labels: np.ndarray, budget: Budget) -> None:
        self.bank, self.reference, self.labels, self.budget = bank, reference, labels, budget
        self.tried: list[Rung] = []
        self.options: list[_Option] = []
        self.begin()

    def begin(self) -> None:
        """From here on time and images count towards the next rung."""
        self._since = time.perf_counter(), self.bank.passes

    def attempt(self, rung: str, state: State, start: Head | None, head: Head | None, note: str = "") -> bool:
        """Measure on all tuning images with `start`; `head` serves later. True when the drop is proven within."""
        correct, drop = self._look(state, start, self.reference.tune)
        self._note(rung, correct, note)
        self.options.append(_Option(rung, correct, state, head, drop))
        return drop.verdict == WITHIN

    def worth_a_try(self, rung: str, state: State, start: Head | None) -> bool:
        """A glance at few images, calibrated on as few: False (and noted) when it is proven outside already there."""
        few = self.reference.tune[:GLANCE]
        correct, drop = self._look(dataclasses.replace(state, calibration_images=GLANCE), start, few)
        if drop.verdict == OUTSIDE:
            self._note(rung, correct, f"given up after a glance at {len(few)} images")
        return drop.verdict != OUTSIDE

    def skip(self, rung: str, why: str) -> None:
        self.tried.append(Rung(rung, None, 0, 0.0, 0, why))

    def best(self) -> _Option:
        """The first option proven within, else the first (so the cheapest) within one standard error of the best.

        On few tuning images the best of several is often only the luckiest; the one-standard-error rule (Breiman et al.
        1984) keeps what is cheaper unless another is better beyond that.
        """
        proven = [option for option in self.options if option.drop.verdict == WITHIN]
        if proven:
            return proven[0]
        best = max(self.options, key=lambda option: int(option.correct.sum()))
        return next(option for option in self.options if _behind(option.correct, best.correct) <= 1.0)

    def _look(self, state: State, head: Head | None, indices: np.ndarray) -> tuple[np.ndarray, Drop]:
        correct = count_correct(logits(self.bank.features(state, indices, serving=False), head), self.labels[indices])
        return correct, compare(self.reference.tune_correct[: len(indices)], correct, self.budget)

    def _note(self, rung: str, correct: np.ndarray, note: str) -> None:
        seconds, images = time.perf_counter() - self._since[0], self.bank.passes - self._since[1]
        self.tried.append(Rung(rung, 100 * float(correct.mean()), len(correct), seconds, images, note))
        self.begin()


def _refit(
    bank: FeatureBank, state: State, labels: np.ndarray, fit: np.ndarray, tune: np.ndarray, outputs: int
) -> tuple[Head, Head, float]:
    """(head fitted without the tuning images, head fitted on all training images, the L2 strength chosen on tuning)."""
    train = np.concatenate([fit, tune])
    features = bank.features(state, train)
    inner, held = features[: len(fit)], features[len(fit) :]
    # By log loss, not by accuracy: on a few hundred images accuracies of neighbouring strengths differ by luck alone.
    trials = []
    for strength in STRENGTHS if len(tune) else (STRENGTHS[len(STRENGTHS) // 2],):
        head = fit_head(inner, labels[fit], outputs, strength)
        trials.append((log_loss(head(held), labels[tune]) if len(tune) else 0.0, strength, head))
    _, strength, start = min(trials, key=lambda trial: trial[:2])
    return start, fit_head(features, labels[train], outputs, strength), strength
