"""The parts of a folder: which files are images, which are to fit on and which to test on. What every task's layouts share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DownresError
from .decode import EXTENSIONS
from .split import Fold, cross_folds, split_once

PARTS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
"""Part to the names its folder may have, the first that exists being taken."""
WHOLE = "whole"


class File(NamedTuple):
    part: str
    label: int
    path: Path
    name: str


def as_found(parts: Sequence[str]) -> tuple[Fold, ...]:
    """The fold that the folders make, from the part of each file."""
    return (Fold(*(np.flatnonzero(np.array(parts) == part).astype(np.int64) for part in PARTS)),)


def divide(labels: np.ndarray, parts: Sequence[str], val_fraction: float, folds: int | None, seed: int) -> tuple[Fold, ...]:
    """The folds of one set of labels; those sides that `parts` does not need are empty."""
    none = np.zeros(0, np.int64)
    if "train" not in parts and (folds is not None or val_fraction == 1.0):
        return (Fold(none, np.arange(len(labels), dtype=np.int64)),)
    divided = cross_folds(labels, folds, seed) if folds is not None else (split_once(labels, val_fraction, seed),)
    return tuple(Fold(fold.train if "train" in parts else none, fold.test if "val" in parts else none) for fold in divided)


def without_unreadable(
    listed: tuple[Fold, ...], kept: np.ndarray, files: Sequence[File], reasons: dict[str, str]
) -> tuple[Fold, ...]:
    """Folds of indices into `files` to folds of indices into `kept`. Raises DownresError where nothing is left of a side."""
    place = np.full(len(files), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))

    def remaining(side: np.ndarray, use: str) -> np.ndarray:
        found = place[side]
        found = found[found >= 0]
        if len(side) and not len(found):
            first = files[side[0]].name
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
