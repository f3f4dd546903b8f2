"""The parts of a folder: which files are images, which are to fit on and which to test on. What every task's layouts share."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import DownresError
from .decode import EXTENSIONS, why_no_image
from .images import Images, Progress, Skip, cache_bytes, from_files
from .split import Fold, cross_folds, sample, split_once

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing", "dev", "eval")}
"""Part to the words its folder may be called by, in any case, the first that exists being taken; see `parts_among`."""
WHOLE = "whole"
_RANKS = {word: (part, rank) for part, words in PARTS.items() for rank, word in enumerate(words)}
_SAY_NOTHING = frozenset(
    (
        "set",
        "data",
        "dataset",
        "images",
        "image",
        "imgs",
        "img",
        "photos",
        "pictures",
        "pics",
        "split",
        "part",
        "folder",
        "files",
    )
)
"""Words that stand beside that of a part: training_set, TestImages."""
_JUNK = frozenset(("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "__pycache__"))
"""Folders, in lower case, that systems leave behind."""


def _read_name(name: str) -> tuple[str, int, tuple[str, ...]] | None:
    """(part, rank among its words, what else the name says) of a folder's name with just one word for a part."""
    words = [w.lower() for run in re.findall(r"[^\W\d_]+", name) for w in re.sub("(?<=[a-z])(?=[A-Z])", " ", run).split()]
    # `trainset` is two words in one.
    split = [next(([p, w[len(p) :]] for p in _RANKS if w.startswith(p) and w[len(p) :] in _SAY_NOTHING), [w]) for w in words]
    told = [w for pieces in split for w in pieces if w not in _SAY_NOTHING]
    found = [w for w in told if w in _RANKS]
    return (*_RANKS[found[0]], tuple(w for w in told if w != found[0])) if len(found) == 1 else None


def part_of(name: str) -> str | None:
    """'train' or 'val' for what people call them: Training, test_set, VAL, dev."""
    read = _read_name(name)
    return read[0] if read is not None and not read[2] else None


def parts_among(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that are of a part, by part, the likeliest first.

    What else a name says must be the same on both sides: seg_train and seg_test are parts, train_station alone is none.
    """
    read = {name: found for name in names if (found := _read_name(name)) is not None}
    sides: dict[tuple[str, ...], set[str]] = {}
    for part, _, rest in read.values():
        sides.setdefault(rest, set()).add(part)
    kept = [(side, bool(rest), rank, name) for name, (side, rank, rest) in read.items() if not rest or len(sides[rest]) == 2]
    return {part: some for part in PARTS if (some := [name for side, *_, name in sorted(kept) if side == part])}


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
    """sources: the folder of each part, as it is to be called."""
    sides = zip((fold.train, fold.test), sources.values(), ("to fit on", "to test on"), strict=True)
    return " and ".join(f"{len(side)} in {source} {use}" for side, source, use in sides if len(side))


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without the hidden ones and what systems leave behind."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise DownresError(f"Cannot list the folder {folder} ({error.strerror}): make it readable.") from None


def unwrapped(folder: Path, in_part: bool = False) -> Path:
    """The folder itself, or the one inside that holds several or a part, where there is nothing around it but folders.

    in_part: of a part already, whose name may be there once more: train/train/CLASS.
    """
    inner = folder
    while len(names := subfolders(inner)) == 1 and (in_part or not parts_among(names)) and not _has_images(inner):
        inner = inner / names[0]
    holds = len(names) > 1 or (bool(parts_among(names)) and not in_part)
    return inner if holds and not _has_images(inner) else folder


def _has_images(folder: Path) -> bool:
    return any(is_image(entry.name) for entry in os.scandir(folder) if not entry.is_dir())


def is_image(name: str) -> bool:
    """Whether a file's name alone says that it is one."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def list_images(folder: Path, *, deep: bool = True, most: int | None = None) -> tuple[list[str], list[Skip]]:
    """(image files in a folder and, if `deep`, in the folders in it, also behind links; what else there is, and why it is no
    image).

    Paths relative to the folder, sorted folder by folder; hidden ones are passed over. Of a file with a usual ending nothing
    but the name is looked at, however many there are; of any other the content decides. most: stop after so many images.
    """
    found: list[str] = []
    left_out: list[Skip] = []
    folders, seen = [""], set()
    while folders and (most is None or len(found) < most):
        inside = folders.pop()
        try:
            status = os.stat(folder / inside)
            if (status.st_dev, status.st_ino) in seen:  # a link back to where we come from
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError as error:
            left_out.append(Skip(inside or ".", (error.strerror or "cannot be listed").lower()))
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.name.lower().endswith(EXTENSIONS):
                found.append(inside + entry.name)
            elif not entry.is_dir():
                reason = why_no_image(entry.path)
                if reason is None:
                    found.append(inside + entry.name)
                else:
                    left_out.append(Skip(inside + entry.name, reason))
            if deep and entry.is_dir():
                folders.append(f"{inside}{entry.name}/")
            if len(found) == most:
                break

    # Folder by folder, as paths are sorted: 'a/1.png' before 'a b/1.png'.
    return sorted(found, key=lambda name: name.split("/")), sorted(left_out, key=lambda skip: skip.path.split("/"))


def how_left_out(unreadable: Sequence[Skip], others: Sequence[Skip], unused: Sequence[str] = ()) -> str:
    """What of a folder is not used, for a description; '' where all is. unused: folders in it."""
    said = f"; {len(unreadable)} unreadable files left out" if unreadable else ""
    if others:
        said += f"; {len(others)} other files left out ({listed_names([f'{o.path}: {o.reason}' for o in others], 3)})"
    return said + (f"; not used: {listed_names(unused)}" if unused else "")


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
    channels: int = 3,
    train_images: int | None = None,
) -> tuple[Images, np.ndarray, tuple[Fold, ...], list[Skip], str]:
    """(images, which of the names they are, their folds, left out, what of the training images is not used) .

    listed: folds of indices into `names`; of the images to fit on a sample of at most `train_images`, else TRAINING_IMAGES, is
    opened, stratified by `strata`. channels: of the network.
    """
    limited = limit_training(listed, strata, train_images or TRAINING_IMAGES, seed)
    needed = looked_at(limited)
    first = np.searchsorted(needed, tested_images(limited))
    opened = [names[i] for i in needed]
    images, skipped = from_files(
        [root / n for n in opened], opened, progress, cache=cache_bytes(cache_gb), first=first, channels=channels
    )
    reasons = {skip.path: skip.reason for skip in skipped}
    kept = np.array([i for i in needed if names[i] not in reasons], dtype=np.int64)
    return (
        images,
        kept,
        without_unreadable(limited, kept, names, reasons),
        skipped,
        how_limited(listed, limited, "random", seed),
    )
