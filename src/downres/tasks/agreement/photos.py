"""A folder of photographs, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DownresError
from ...images import Fold, Images, Progress, Skip
from ...images.archives import find_archives, list_archives, open_listing
from ...images.images import fingerprint
from ...images.parts import divide, how_left_out, list_images, open_listed
from ...parse import user_path


@dataclass(frozen=True, eq=False)
class Photos:
    """Pictures and how they are divided. tuning: as of a `Dataset`."""

    images: Images
    folds: tuple[Fold, ...]
    skipped: tuple[Skip, ...]
    description: str
    licence: str = ""
    tuning: np.ndarray | None = None

    def fingerprint(self) -> str:
        return fingerprint(self.images, b"", [side for fold in self.folds for side in (fold.train, fold.test)])


def open_photos(
    folder: Any,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
    channels: int = 3,
    train_images: int | None = None,
) -> Photos:
    """Every picture in a folder and the folders in it, whatever they are called, divided at random as `open_folder` does; or
    all in archives, their labels not looked at, divided by the hash of their keys.
    """
    if (archives := find_archives(folder)) is not None:
        listing = list_archives(archives, progress)
        found = open_listing(listing, parts, val_fraction, folds, seed, cache_gb, progress, channels, train_images)
        said = f"{len(found.images)} photographs, their labels not looked at, {found.how}{found.left_out}."
        return Photos(found.images, found.folds, found.skipped, said, tuning=found.tuning)
    root = user_path(folder)
    if not root.is_dir():
        raise DownresError(f"There is no folder {root}: point `data` to a folder of photographs.")
    names, others = list_images(root)
    if len(names) < 2:
        raise DownresError(f"{root} holds {len(names)} pictures, agreement needs at least 2: point `data` to photographs.")
    alike = np.zeros(len(names), np.int64)
    listed = divide(alike, parts, val_fraction, folds, seed)
    images, _, divided, skipped, limited = open_listed(
        root, names, listed, alike, seed, cache_gb, progress, channels, train_images
    )
    test = sum(len(fold.test) for fold in divided)
    how = (
        f"cross-fitted in {len(divided)} folds" if len(divided) > 1 else f"{test} to compare on, {len(images) - test} to fit on"
    )
    left_out = how_left_out(skipped, others)
    description = f"{len(images)} photographs without labels, {how} (seed {seed}){limited}{left_out}."
    return Photos(images, divided, (*skipped, *others), description)
