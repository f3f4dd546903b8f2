"""The embedded demo set: photographs of solar cells by electroluminescence, defective or not, from the package elpv-dataset."""

import numpy as np

from ...errors import DownresError
from ...images.images import from_arrays as images_from_arrays
from ...images.split import cross_folds
from .folders import Dataset, from_arrays

DEMO_DATA = "demo:elpv"
"""What to give as data for this set."""

CLASSES = ("intact", "defective")

LICENCE = (
    "ELPV dataset (Buerhop-Lutz et al. 2018, Deitsch et al. 2019), ZAE Bayern, CC BY-NC-SA 4.0: "
    "not for commercial use, share alike."
)


def open_elpv(folds: int = 5, seed: int = 0) -> Dataset:
    """2624 grey 300×300 photographs, defective where the defect probability is above 0.5; each is a test image once."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        raise DownresError("The demo's photographs are not installed: pip install 'downres[demo]'.") from None
    pictures, probability, _ = load_dataset()
    labels = (np.asarray(probability) > 0.5).astype(np.int64)
    images = images_from_arrays(np.asarray(pictures), [f"cell {i:04d}" for i in range(1, len(pictures) + 1)])
    description = (
        f"{len(labels)} photographs of solar cells, 300×300 grey, 2 classes, cross-fitted in {folds} folds "
        "(every image is a proof image once)."
    )
    return from_arrays(images, labels, CLASSES, cross_folds(labels, folds, seed), description, LICENCE)
