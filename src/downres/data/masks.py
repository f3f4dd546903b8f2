"""Pictures with a class for every pixel: finding pairs of image and mask, and reading masks as class indices."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import DownresError

IGNORE = 255
"""Pixels without a class: left out of every count and every loss."""


class Pair(NamedTuple):
    """One picture and its mask; name: the picture's path inside the data folder."""

    image: Path
    mask: Path
    name: str


@dataclass(frozen=True)
class MaskFolder:
    """What a folder of images and masks holds, before any is decoded.

    pairs: by part, 'train' and 'val'. classes: a name for each class index. colours: RGB, one a class, for pictures.
    """

    layout: str
    root: Path
    pairs: dict[str, tuple[Pair, ...]]
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def read_mask(self, path: Path) -> np.ndarray:
        """Class indices uint8 (height, width), IGNORE where there is none."""
        with Image.open(path) as picture:
            mask = np.array(picture)
        mask[mask == 11] = IGNORE
        return mask


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
CAMVID_COLOURS = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
                  (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192))  # fmt: skip


def find_masks(root: str | os.PathLike[str]) -> MaskFolder:
    """The pairs of a folder in one of the known layouts. Raises DownresError where it has none of them."""
    root = Path(root).expanduser()
    pairs = {}
    for part in ("train", "val"):
        if not (root / part).is_dir() or not (root / f"{part}annot").is_dir():
            raise DownresError(f"{root} has no {part} and {part}annot.")
        pairs[part] = tuple(
            Pair(image, root / f"{part}annot" / image.name, f"{part}/{image.name}") for image in sorted((root / part).glob("*.png"))
        )
    return MaskFolder("camvid", root, pairs, CAMVID, CAMVID_COLOURS)
