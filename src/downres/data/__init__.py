"""Pictures: decoding, the one preprocessing, class folders, masks and splits."""

import os
from collections.abc import Sequence

from .decode import Unreadable, decode
from .elpv import CLASSES, DEMO_DATA, open_elpv
from .folders import Dataset, class_names, from_arrays, open_folder
from .images import Images, Progress, Skip, from_files
from .masks import IGNORE, MaskDataset, MaskFolder, find_masks, mask_classes, open_masks
from .preprocess import batches, preprocess, resize_and_crop
from .split import Fold, cross_folds, split_once

__all__ = [
    "DEMO_DATA",
    "Dataset",
    "Fold",
    "IGNORE",
    "Images",
    "MaskDataset",
    "MaskFolder",
    "Progress",
    "Skip",
    "Unreadable",
    "batches",
    "class_names",
    "cross_folds",
    "data_classes",
    "decode",
    "find_masks",
    "from_arrays",
    "from_files",
    "mask_classes",
    "open_data",
    "open_elpv",
    "open_folder",
    "open_masks",
    "preprocess",
    "resize_and_crop",
    "split_once",
]


def open_data(
    source: str | os.PathLike[str],
    outputs: int | None,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The data that a command names: a folder (see `open_folder`) or the embedded demo set."""
    if str(source) == DEMO_DATA:
        return open_elpv(folds or 5, seed)
    return open_folder(
        source, outputs=outputs, parts=parts, val_fraction=val_fraction, folds=folds, seed=seed,
        cache_gb=cache_gb, progress=progress,
    )  # fmt: skip


def data_classes(source: str | os.PathLike[str], outputs: int | None = None) -> tuple[str, ...]:
    """The classes of the data that a command names, checked against the network's outputs, without decoding an image."""
    return CLASSES if str(source) == DEMO_DATA else class_names(source, outputs)
