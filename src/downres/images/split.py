"""Which images to fit on and which to prove on: stratified, and the same for the same labels and seed.

Random numbers come from NumPy's Generator with PCG64(seed), whose stream is stable across platforms. What is inside archives is
divided by hashes of its names instead, so that neither order nor number of the files matters, see `drawn`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from ..errors import DownresError


@dataclass(frozen=True, eq=False)
class Fold:
    """Indices of images, int64, ascending: those that may be fitted on and those that are only reported on."""

    train: np.ndarray
    test: np.ndarray


def split_once(labels: np.ndarray, test_fraction: float, seed: int) -> Fold:
    """One stratified split of n labels into round(n · test_fraction) test and the rest train.

    A class of two or more images has at least one on each side; classes of a single image are spread at random so that
    the total comes out right. Raises DownresError for fewer than 2 images or a fraction outside (0, 1).
    """
    labels = np.asarray(labels)
    n = len(labels)
    if n < 2:
        raise DownresError(f"A split needs at least 2 images, there are {n}: add images to the data.")
    if not 0.0 < test_fraction < 1.0:
        raise DownresError(f"The validation fraction is between 0 and 1, {test_fraction} is not: give for example 0.5.")
    rng = np.random.Generator(np.random.PCG64(seed))
    classes = _by_class(labels, rng)
    groups = [members for members in classes if len(members) > 1]
    singles = [members[0] for members in classes if len(members) == 1]
    low, high = [1] * len(groups), [len(members) - 1 for members in groups]
    if singles:  # one group together, that may go wholly to either side
        groups.append(rng.permutation(np.array(singles, dtype=np.int64)))
        low.append(0)
        high.append(len(singles))
    ideal = np.array([len(members) * test_fraction for members in groups])
    total = min(max(round(n * test_fraction), 1), n - 1)
    counts = _round_to_total(ideal, np.array(low), np.array(high), total, rng)
    test = np.sort(np.concatenate([members[:count] for members, count in zip(groups, counts, strict=True)]))
    return Fold(_without(n, test), test)


def cross_folds(labels: np.ndarray, k: int, seed: int) -> tuple[Fold, ...]:
    """k stratified folds of n labels; every index is a test index exactly once.

    The folds' sizes, and each class's share in them, differ by at most one image. Raises DownresError unless 2 ≤ k ≤ n.
    """
    labels = np.asarray(labels)
    n = len(labels)
    if not 2 <= k <= n:
        raise DownresError(f"The number of folds is from 2 to the number of images, {n}, and {k} is not: give for example 5.")
    # Dealt like cards, class after class: consecutive images of a class go to different folds.
    order = np.concatenate(_by_class(labels, np.random.Generator(np.random.PCG64(seed))))
    tests = [np.sort(order[i::k]) for i in range(k)]
    return tuple(Fold(_without(n, test), test) for test in tests)


def sample(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Ascending indices, int64, of a stratified sample of `most` of the labels, or of all where there are not more.

    A class keeps at least two (or its only one), so that it can still be on both sides of a split.
    """
    labels = np.asarray(labels)
    if len(labels) <= most:
        return np.arange(len(labels), dtype=np.int64)
    rng = np.random.Generator(np.random.PCG64(seed))
    classes = _by_class(labels, rng)
    sizes = np.array([len(members) for members in classes])
    counts = _round_to_total(sizes * (most / len(labels)), np.minimum(sizes, 2), sizes, most, rng)
    return np.sort(np.concatenate([members[:count] for members, count in zip(classes, counts, strict=True)]))


def _by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The int64 indices of each class in label order, shuffled within the class."""
    order = np.argsort(labels, kind="stable").astype(np.int64)
    _, starts = np.unique(labels[order], return_index=True)
    return [rng.permutation(members) for members in np.split(order, starts[1:])]


def _round_to_total(ideal: np.ndarray, low: np.ndarray, high: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers near `ideal`, within [low, high], that sum to `total` or, where the limits forbid, close to it."""
    counts = np.clip(np.floor(ideal).astype(np.int64), low, high)
    ties = rng.random(len(ideal)) * 1e-6  # among equals chance decides, not the order of the classes
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = counts < high if step > 0 else counts > low
        if not movable.any():
            break
        counts[np.argmax(np.where(movable, step * (ideal - counts) + ties, -np.inf))] += step
    return counts


def _without(n: int, test: np.ndarray) -> np.ndarray:
    train = np.ones(n, dtype=bool)
    train[test] = False
    return np.flatnonzero(train).astype(np.int64)


def digest(key: str | bytes) -> int:
    """64 bits of BLAKE2b of a picture's key, or of its content: what decides on its side, with the seed."""
    content = key if isinstance(key, bytes) else key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def drawn(digests: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """float64 (n,) in [0, 1): for each digest a number that looks random, of itself, the seed and the purpose alone.

    An image is in the proof where that number is below its part: no other image moves when images are added, whatever their
    order and in however many files. splitmix64 (Steele, Lea and Flood 2014) of the digest, which is uniform itself, and a key.
    """
    if not 0 <= seed < 2**32:
        raise DownresError(f"The seed is a whole number from 0 to {2**32 - 1}, {seed} is not.")
    key = _mixed(np.array([seed], np.uint64) * np.uint64(256) + np.uint64(purpose))
    # 53 bits are a float64's: the largest stays below 1.
    return (_mixed(digests.astype(np.uint64) ^ key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 of each, uint64 (n,); arrays wrap around where they overflow."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
