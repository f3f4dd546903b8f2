"""Average precision by class and its mean, with intervals by bootstrap over images. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import DownresError
from ...measuring.paired import bootstrap_drops, percentiles, resampled
from ...records import Budget, Drop, Score

RESAMPLES = 2_000
"""Fewer than for a mean: each resample ranks every class anew."""


@dataclass(frozen=True)
class MultilabelQuality(Score):
    """Of n images, in percent. ap: class by class, None for a class that no image has; map: their mean (macro), with a
    two-sided 95 % interval by bootstrap over images.
    """

    map: float
    map_low: float
    map_high: float
    n: int
    ap: tuple[float | None, ...] = ()

    metric = "mAP"
    noun = "mAP"
    title = "Mean average precision"

    @property
    def score(self) -> float:
        return self.map

    @property
    def interval(self) -> tuple[float, float]:
        return self.map_low, self.map_high


def average_precision(scores: np.ndarray, truth: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """Average precision of one class, a fraction, on each of B resamples (B,): NaN where no image drawn has the class.

    scores, truth: (n,), float and bool. times: (B, n), how often each image was drawn; None: each once. The sum over distinct
    thresholds of (R_k - R_{k-1}) P_k, without interpolation; images of one score fall together.
    """
    order = np.argsort(-scores, kind="stable")
    drawn = np.ones((1, len(scores))) if times is None else times
    weight = drawn[:, order]
    hits = np.cumsum(weight * truth[order], axis=1)
    seen = np.cumsum(weight, axis=1)
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits, seen = hits[:, ends], seen[:, ends]
    gained = np.diff(hits, axis=1, prepend=0.0)
    total = hits[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, hits / seen, 0.0)
        return np.where(total > 0, (gained * precision).sum(axis=1) / total, np.nan)


def class_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision of each class, fractions (K,), from (n, K)."""
    return np.array([average_precision(scores[:, k], truth[:, k])[0] for k in range(scores.shape[1])])


def resampled_map(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean average precision in percent on each resample of the images, the same for every model, (RESAMPLES,)."""

    def statistic(times: np.ndarray) -> np.ndarray:
        every = np.stack([average_precision(scores[:, k], truth[:, k], times) for k in range(scores.shape[1])])
        return 100 * np.nanmean(every, axis=0)

    return resampled(len(scores), statistic, RESAMPLES)


def multilabel_quality(scores: np.ndarray, truth: np.ndarray) -> MultilabelQuality:
    """scores float (n, K), truth bool (n, K)."""
    check_some(truth)
    ap = class_precision(scores, truth)
    low, high = percentiles(resampled_map(scores, truth), len(scores))
    return MultilabelQuality(
        100 * float(np.nanmean(ap)), low, high, len(scores), tuple(None if np.isnan(a) else 100 * float(a) for a in ap)
    )


def compare_scores(
    original: np.ndarray, candidates: Mapping[str, np.ndarray], truth: np.ndarray, budget: Budget
) -> dict[str, Drop]:
    """The drop in mAP of each candidate, by paired bootstrap over the images; all scores (n, K), truth bool (n, K)."""
    check_some(truth)
    observed, first = float(np.nanmean(class_precision(original, truth))), resampled_map(original, truth)
    drops = {name: 100 * (observed - float(np.nanmean(class_precision(s, truth)))) for name, s in candidates.items()}
    samples = {name: first - resampled_map(s, truth) for name, s in candidates.items()}
    return bootstrap_drops(drops, samples, len(truth), budget, limit=100.0)


def check_some(truth: np.ndarray) -> None:
    if not truth.any():
        raise DownresError("Average precision needs images that have a class, none of these has any: check the labels.")
