"""Top-1 and top-5 of a model, and the verdict on the drop between two models on the same images. No torch here.

Accuracy is always correct / total over the data set, never a mean of batch means. Percent and percentage points.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DownresError
from ...measuring.statistics import holm, more_images, noninferiority_p, paired_bound, wilson
from ...records import OUTSIDE, TOO_FEW, WITHIN, Budget, Drop, Score


@dataclass(frozen=True)
class Quality(Score):
    """Top-1 as correct/n with a two-sided 95 % Wilson interval, in percent; top-5 where there are more than 5 classes."""

    correct: int
    n: int
    top1: float
    top1_low: float
    top1_high: float
    correct5: int | None = None
    top5: float | None = None

    metric = "top-1"
    noun = "accuracy"
    title = "Top-1 accuracy"

    @property
    def score(self) -> float:
        return self.top1

    @property
    def interval(self) -> tuple[float, float]:
        return self.top1_low, self.top1_high

    def row(self, drop: Drop | None) -> dict[str, Any]:
        names = ("top1", "top1_low", "top1_high", "correct", "n", "top5", "correct5")
        found = {name: getattr(self, name) for name in names}
        return {**found, "lost": drop and drop.lost, "won": drop and drop.won}

    @classmethod
    def blank(cls) -> dict[str, Any]:
        return {**super().blank(), "lost": None, "won": None}

    def beside(self) -> dict[str, str]:
        return {} if self.top5 is None else {"top-5": self.text(self.top5)}


def count_correct(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Which images have their label among the k largest logits: bool (n,).

    Equal logits rank by class number, as argmax does, so that a constant output is right only for the first k classes.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or len(logits) != len(labels):
        raise DownresError(
            f"A classifier returns one row of logits an image, shape ({len(labels)}, classes), and not "
            f"{logits.shape}: check the model's output."
        )
    if nan := int(np.isnan(logits).any(axis=1).sum()):
        raise DownresError(
            f"The model returns NaN for {nan} of {len(logits)} images, where logits must be numbers: "
            "check its weights and the preprocessing."
        )
    classes = logits.shape[1]
    wrong = labels[~((labels >= 0) & (labels < classes) & (labels == np.floor(labels)))]
    if len(wrong):
        raise DownresError(
            f"A label is a class number from 0 to {classes - 1} for this model, {wrong[0]} is not: check the data set's labels."
        )
    labels = labels.astype(np.int64)[:, None]
    own = np.take_along_axis(logits, labels, axis=1)
    ahead = (logits > own) | ((logits == own) & (np.arange(classes) < labels))
    return ahead.sum(axis=1) < k


def quality(correct: np.ndarray, correct5: np.ndarray | None = None) -> Quality:
    """Top-1 (and top-5) in percent from which images are right: bool (n,), at least one image."""
    n, hits = len(correct), int(np.count_nonzero(correct))
    low, high = wilson(hits, n)
    hits5 = None if correct5 is None else int(np.count_nonzero(correct5))
    return Quality(
        correct=hits,
        n=n,
        top1=100 * hits / n,
        top1_low=100 * low,
        top1_high=100 * high,
        correct5=hits5,
        top5=None if hits5 is None else 100 * hits5 / n,
    )


def compare(original: np.ndarray, candidate: np.ndarray, budget: Budget) -> Drop:
    """The drop of one candidate, given which of the same images each model gets right: bool (n,) both."""
    return compare_all(original, {"the candidate": candidate}, budget)["the candidate"]


def compare_all(original: np.ndarray, candidates: Mapping[str, np.ndarray], budget: Budget) -> dict[str, Drop]:
    """The drop of each candidate, with verdicts that hold together at `budget.confidence`.

    Proven within: Holm's procedure over all candidates; `upper` is printed at the level at which Holm tested the
    candidate, so the verdict is upper < allowed. Proven outside: Bonferroni, and `lower` is printed at that level,
    so the verdict is lower > allowed. Each of the two kinds of proof is wrong anywhere at most 1 - confidence of the time.
    """
    tables = {name: _discordant(original, correct, name) for name, correct in candidates.items()}
    n, margin = len(original), budget.max_drop / 100
    alpha = 1.0 - budget.confidence
    tested = holm([noninferiority_p(lost, won, n, margin) for lost, won in tables.values()], alpha)
    return {
        name: _drop(lost, won, n, budget, 1.0 - test.level, len(tables))
        for (name, (lost, won)), test in zip(tables.items(), tested, strict=True)
    }


def _discordant(original: np.ndarray, candidate: np.ndarray, name: str) -> tuple[int, int]:
    """(lost, won): images that only the original, only the candidate gets right."""
    original, candidate = np.asarray(original, dtype=bool), np.asarray(candidate, dtype=bool)
    if original.shape != candidate.shape:
        raise DownresError(
            f"A drop is measured on the same images, the original saw {original.size} and {name} {candidate.size}: "
            "evaluate both on the same split."
        )
    return int(np.count_nonzero(original & ~candidate)), int(np.count_nonzero(candidate & ~original))


def _drop(lost: int, won: int, n: int, budget: Budget, holm_confidence: float, comparisons: int) -> Drop:
    """The record of one candidate; the verdict is read from the very bounds that are printed."""
    bonferroni_confidence = 1.0 - (1.0 - budget.confidence) / comparisons
    upper = 100 * paired_bound(lost, won, n, holm_confidence)[1]
    lower = 100 * paired_bound(lost, won, n, bonferroni_confidence)[0]
    verdict = WITHIN if upper < budget.max_drop else OUTSIDE if lower > budget.max_drop else TOO_FEW
    more = more_images(lost, won, n, budget.max_drop / 100, holm_confidence) if verdict == TOO_FEW else None
    return Drop(
        drop=100 * (lost - won) / n,
        lower=lower,
        upper=upper,
        allowed=budget.max_drop,
        verdict=verdict,
        n=n,
        lost=lost,
        won=won,
        confidence=budget.confidence,
        comparisons=comparisons,
        more_images=more,
    )
