"""The paired bootstrap over images: drops of several candidates against one original, with verdicts that hold together."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..records import OUTSIDE, TOO_FEW, WITHIN, Budget, Drop
from .statistics import bootstrap_bound, bootstrap_p, holm, more_images_to

RESAMPLES = 10_000


def resamples(n: int, count: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n images is drawn, float64 (rows, n), in chunks of about 32 MB, `count` rows in all."""
    generator = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, min(count, 2**22 // n))
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def resampled(n: int, statistic: Callable[[np.ndarray], np.ndarray], count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """A statistic on each resample, (count,): `statistic` gets how often each image was drawn, (rows, n), and gives (rows,)."""
    return np.concatenate([statistic(times) for times in resamples(n, count, seed)])


def resampled_mean(values: np.ndarray, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """The mean of a number an image (n,) on each resample."""
    return resampled(len(values), lambda times: times @ values / len(values), count, seed)


def percentiles(samples: np.ndarray, n: int) -> tuple[float, float]:
    """The two-sided 95 % interval of a statistic from its resamples over n images."""
    samples = samples[~np.isnan(samples)]
    observed = float(np.median(samples))
    low, high = bootstrap_bound(samples, observed, n, 0.025)
    return max(low, float(samples.min())), min(high, float(samples.max()))


def bootstrap_drops(
    drops: Mapping[str, float],
    samples: Mapping[str, np.ndarray],
    n: int,
    budget: Budget,
    used: int | None = None,
    limit: float = float("inf"),
) -> dict[str, Drop]:
    """A record for each candidate, from its observed drop and the drop on each resample of the same images.

    Proven within: Holm's procedure over all candidates; `upper` is printed at the level at which Holm tested the candidate, so
    the verdict is upper < allowed. Proven outside: Bonferroni, so the verdict is lower > allowed. used: images that say
    anything, of n. limit: beyond which no drop can be.
    """
    used, alpha = n if used is None else used, 1.0 - budget.confidence
    # A resample that has nothing to measure speaks against a proof, of either kind.
    high = {name: np.where(np.isnan(values), np.inf, values) for name, values in samples.items()}
    low = {name: np.where(np.isnan(values), -np.inf, values) for name, values in samples.items()}
    tested = holm([bootstrap_p(high[name], drop, used, budget.max_drop) for name, drop in drops.items()], alpha)
    records = {}
    for (name, drop), test in zip(drops.items(), tested, strict=True):
        upper = min(limit, bootstrap_bound(high[name], drop, used, test.level)[1])
        lower = max(-limit, bootstrap_bound(low[name], drop, used, alpha / len(drops))[0])
        verdict = WITHIN if upper < budget.max_drop else OUTSIDE if lower > budget.max_drop else TOO_FEW
        records[name] = Drop(
            drop=drop,
            lower=lower,
            upper=upper,
            allowed=budget.max_drop,
            verdict=verdict,
            n=n,
            lost=None,
            won=None,
            confidence=budget.confidence,
            comparisons=len(drops),
            more_images=more_images_to(high[name], drop, used, budget.max_drop, test.level) if verdict == TOO_FEW else None,
        )
    return records
