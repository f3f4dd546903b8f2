"""The parts of a folder: which files are images, which are to fit on and which to test on. What every task's layouts share."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DownresError
from .decode import EXTENSIONS
from .images import Images, Progress, Skip, cache_bytes, from_files
from .split import Fold, cross_folds, sample, split_once

PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
"""Part to the names its folder may have, the first that exists being taken."""
WHOLE = "whole"


def as_found(parts: Sequence[str] | np.ndarray) -> tuple[Fold, ...]:
    """The fold that the folders make, from the part of each file."""
    return (Fold(*(np.flatnonzero(np.asarray(parts) == part).astype(np.int64) for part in PARTS)),)


def divide(labels: np.ndarray, parts: Sequence[str], val_fraction: float, folds: int | None, seed: int) -> tuple[Fold, ...]:
    """The folds of one set of labels; those sides that `parts` does not need are empty."""
    none = np.zeros(0, np.int64)
    if "train" not in parts and (folds is not None or val_fraction == 1.0):
        return (Fold(none, np.arange(len(labels), dtype=np.int64)),)
    divided = cross_folds(labels, folds, seed) if folds is not None else (split_once(labels, val_fraction, seed),)
    return tuple(Fold(fold.train if "train" in parts else none, fold.test if "val" in parts else none) for fold in divided)


def limit_training(folds: tuple[Fold, ...], labels: np.ndarray, most: int, seed: int) -> tuple[Fold, ...]:
    """The folds with a stratified sample of at most `most` images to fit on in each."""
    return tuple(Fold(fold.train[sample(labels[fold.train], most, seed)], fold.test) for fold in folds)


def how_limited(listed: tuple[Fold, ...], limited: tuple[Fold, ...], kind: str, seed: int) -> str:
    """What of the images to fit on is not looked at, and why; '' where all are."""
    pairs = [(len(after.train), len(before.train)) for before, after in zip(listed, limited, strict=True)]
    used, there = max(pairs, key=lambda pair: pair[1] - pair[0])
    if used == there:
        return ""
    whose = "in each fold " if len(pairs) > 1 else ""
    return (
        f"; {whose}a {kind} sample of {used} of the {there} images to fit on is used (seed {seed}), so that time, memory and "
        "disk do not grow with their number"
    )


def looked_at(folds: tuple[Fold, ...]) -> np.ndarray:
    """Ascending indices of the images of either side."""
    return np.unique(np.concatenate([side for fold in folds for side in (fold.train, fold.test)]))


def tested_images(folds: tuple[Fold, ...]) -> np.ndarray:
    """Ascending indices of the images to test on: every candidate is shown them, so they come first into the cache."""
    return np.unique(np.concatenate([fold.test for fold in folds]))


def without_unreadable(
    listed: tuple[Fold, ...], kept: np.ndarray, files: Sequence[str], reasons: dict[str, str]
) -> tuple[Fold, ...]:
    """Folds of indices into `files` to folds of indices into `kept`. Raises DownresError where nothing is left of a side."""
    place = np.full(len(files), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))

    def remaining(side: np.ndarray, use: str) -> np.ndarray:
        found = place[side]
        found = found[found >= 0]
        if len(side) and not len(found):
            first = files[side[0]]
            raise DownresError(
                f"None of the {len(side)} images to {use} can be read ({first}: {reasons[first]}): replace or remove them."
            )
        return found

    return tuple(Fold(remaining(fold.train, "fit on"), remaining(fold.test, "test on")) for fold in listed)


def how_found(fold: Fold, sources: dict[str, Path]) -> str:
    sides = zip((fold.train, fold.test), sources.values(), ("to fit on", "to test on"), strict=True)
    return " and ".join(f"{len(side)} in {source.name} {use}" for side, source, use in sides if len(side))


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without the hidden ones."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DownresError(f"Cannot list the folder {folder} ({error.strerror}): make it readable.") from None


def is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def listed_names(names: Sequence[str], most: int = 5) -> str:
    """The first few names, for a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


TRAINING_IMAGES = 10_000
"""Images to fit on that are opened, at most in each fold. Only a refit of the head looks at all of them (ten of each class of
ImageNet's); the ladder's other rungs take hundreds."""


def open_listed(
    root: Path,
    names: Sequence[str],
    listed: tuple[Fold, ...],
    strata: np.ndarray,
    seed: int,
    cache_gb: float | None,
    progress: Progress | None,
) -> tuple[Images, np.ndarray, tuple[Fold, ...], list[Skip], str]:
    """(images, which of the names they are, their folds, left out, what of the training images is not used) .

    listed: folds of indices into `names`; of the images to fit on a sample of at most TRAINING_IMAGES is opened, stratified by
    `strata`.
    """
    limited = limit_training(listed, strata, TRAINING_IMAGES, seed)
    needed = looked_at(limited)
    first = np.searchsorted(needed, tested_images(limited))
    opened = [names[i] for i in needed]
    images, skipped = from_files([root / n for n in opened], opened, progress, cache=cache_bytes(cache_gb), first=first)
    reasons = {skip.path: skip.reason for skip in skipped}
    kept = np.array([i for i in needed if names[i] not in reasons], dtype=np.int64)
    return (
        images,
        kept,
        without_unreadable(limited, kept, names, reasons),
        skipped,
        how_limited(listed, limited, "random", seed),
    )
