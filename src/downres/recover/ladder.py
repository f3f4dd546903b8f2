"""The ladder: crop ratio → BatchNorm recalibration → head refit, climbed only as far as the allowed drop requires.

Every decision is taken on tuning images, a part of the training images; proof images are never looked at here.
"""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from ..data import Fold
from ..measure.quality import compare, count_correct
from ..records import WITHIN, Budget, Candidate, Drop, Recovery, Rung
from .batchnorm import has_batchnorm
from .crop import crop_options
from .features import FeatureBank, State, logits
from .head import STRENGTHS, Head, fit_head, why_not

RUNGS = ("crop", "batchnorm", "head")
TUNING_IMAGES = 1000
"""Tuning images at most, over all folds together."""


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


def split_tuning(fold: Fold, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, tune): a quarter of the training images tune, at most TUNING_IMAGES / folds of them."""
    order = np.random.default_rng([seed, 1]).permutation(fold.train)
    n = min(len(order) // 4, TUNING_IMAGES // folds)
    return np.sort(order[n:]), np.sort(order[:n])


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
    fit, tune = split_tuning(fold, folds, seed)
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
    tried: list[Rung] = []
    options: list[tuple[float, State, Head | None, Drop]] = []  # tuning top-1, state, head for proof images, tuning drop
    started = time.perf_counter()
    tune = reference.tune
    if len(tune) == 0:
        note = "no training images: nothing can be recovered"
        return Recovered(
            native, reference.head, Recovery("none", native.crop_ratio, 0.0, (Rung("none", None, 0, 0.0, 0, note),))
        )

    def attempt(
        rung: str, state: State, start: Head | None, head: Head | None, since: tuple[float, int], note: str = ""
    ) -> bool:
        correct = count_correct(logits(bank.features(state, tune), start), labels[tune])
        seconds, images = time.perf_counter() - since[0], bank.passes - since[1]
        tried.append(Rung(rung, 100 * float(correct.mean()), len(tune), seconds, images, note))
        drop = compare(reference.tune_correct, correct, budget)
        options.append((float(correct.mean()), state, head, drop))
        return drop.verdict == WITHIN

    def since() -> tuple[float, int]:
        return time.perf_counter(), bank.passes

    def skipped(rung: str, why: str) -> None:
        tried.append(Rung(rung, None, 0, 0.0, 0, why))

    enough = attempt("none", native, reference.start, reference.head, since())
    state = native
    if not enough and "crop" in rungs:
        ratios = crop_options(native.crop_ratio)[1:]
        for ratio in ratios:
            other = dataclasses.replace(native, crop_ratio=ratio)
            enough = attempt("crop", other, reference.start, reference.head, since(), f"crop ratio {ratio:.3g}") or enough
        # The first of equals wins: the native ratio unless another is really better.
        state = max(options, key=lambda option: option[0])[1]
    if not enough and "batchnorm" in rungs:
        if has_batchnorm(bank.model):
            calibrated = dataclasses.replace(state, calibration=reference.index)
            enough = attempt("batchnorm", calibrated, reference.start, reference.head, since())
        else:
            skipped("batchnorm", "nothing to recalibrate: the network has no BatchNorm statistics")
    if not enough and "head" in rungs:
        why = (
            "the model's output does not come from a linear layer"
            if bank.head is None
            else why_not(labels[reference.fit], outputs)
        )
        if why:
            skipped("head", why)
        else:
            begun = since()
            start, head, strength = _refit(bank, state, labels, reference.fit, tune, outputs)
            attempt("head", state, start, head, begun, f"logistic regression, C={strength:g}")

    measured = [rung for rung in tried if rung.top1 is not None]
    best = max(range(len(options)), key=lambda i: options[i][0])
    if enough:  # the last rung tried sufficed; among the crops it may be an earlier one that did best
        best = max(range(len(options)), key=lambda i: (measured[i].rung == measured[-1].rung, options[i][0]))
    _, state, head, drop = options[best]
    recovery = Recovery(measured[best].rung, state.crop_ratio, time.perf_counter() - started, tuple(tried), drop)
    return Recovered(state, head, recovery)


def _refit(
    bank: FeatureBank, state: State, labels: np.ndarray, fit: np.ndarray, tune: np.ndarray, outputs: int
) -> tuple[Head, Head, float]:
    """(head fitted without the tuning images, head fitted on all training images, the L2 strength chosen on tuning)."""
    train = np.concatenate([fit, tune])
    features = bank.features(state, train)
    inner, held = features[: len(fit)], features[len(fit) :]
    trials = []
    for strength in STRENGTHS if len(tune) else STRENGTHS[1:2]:
        head = fit_head(inner, labels[fit], outputs, strength)
        score = float(count_correct(head(held), labels[tune]).mean()) if len(tune) else 0.0
        trials.append((score, -strength, head))
    score, negative, start = max(trials, key=lambda trial: trial[:2])
    return start, fit_head(features, labels[train], outputs, -negative), -negative
