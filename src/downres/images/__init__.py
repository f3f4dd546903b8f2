"""Pictures: decoding, the one preprocessing, the parts of a folder and splits. Nothing of any task."""

from .decode import decode
from .images import Images, Progress, Skip, from_files
from .preprocess import batches, preprocess, resize_and_crop, visible
from .split import Fold, cross_folds, split_once
from .unreadable import Unreadable

__all__ = [
    "Fold", "Images", "Progress", "Skip", "Unreadable", "batches", "cross_folds", "decode", "from_files", "preprocess",
    "resize_and_crop", "split_once", "visible",
]  # fmt: skip
