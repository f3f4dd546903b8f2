"""What training shows of images: mirrored, parts of them, other colours, erased; drawn from the seed and the epoch alone."""

import dataclasses
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from ..errors import DownresError
from ..images import Images, batches
from ..images.images import helpers
from ..images.preprocess import divisor, fill_of
from ..records import BGR, Preprocessing
from .training import Training

_RATIO = math.log(4 / 3)
"""Of a random resized crop's sides, at most, as torchvision's and timm's."""


@dataclass(frozen=True)
class Views:
    """Which image, whether mirrored, which part: (n,), (n,), and (n, 4) as top, left, height, width in fractions of the image
    or None for what the network is served. A part may reach beyond the image.
    """

    images: np.ndarray
    mirrored: np.ndarray
    parts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: slice) -> "Views":
        return Views(self.images[chosen], self.mirrored[chosen], None if self.parts is None else self.parts[chosen])


Spots = Callable[[np.random.Generator], tuple[int, float, float]]
"""Draws a place of a class that is drawn before it: which image, and (y, x) in fractions of it."""


def drawn(
    images: Images,
    indices: np.ndarray,
    how: Training,
    random: np.random.Generator,
    hw: tuple[int, int] | None = None,
    spots: Spots | None = None,
) -> Views:
    """An epoch's views of images[indices], in its order; with `repeats` fewer images, each several times. hw: of the network's
    input, which windows are of; spots: of `how.uniform`.
    """
    order = random.permutation(len(indices))
    if how.repeats > 1:
        order = np.repeat(order[: -(-len(order) // how.repeats)], how.repeats)
    chosen, mirrored = indices[order], (random.random(len(order)) < 0.5) & how.mirror
    if how.zoomed:
        assert hw is not None
        return _windows(images, chosen, mirrored, how, random, hw, spots)
    if how.crop_scale == 1:
        return Views(chosen, mirrored)
    area = random.uniform(how.crop_scale, 1, len(order))
    shapes = images.shapes  # made anew at every look
    aspect = np.array([shapes[int(i)][1] / shapes[int(i)][0] for i in chosen])
    ratio = np.exp(random.uniform(-_RATIO, _RATIO, len(order))) / aspect
    height, width = np.minimum(np.sqrt(area / ratio), 1), np.minimum(np.sqrt(area * ratio), 1)
    top, left = random.random((2, len(order))) * (1 - np.stack([height, width]))
    return Views(chosen, mirrored, np.stack([top, left, height, width], 1))


def _windows(
    images: Images,
    chosen: np.ndarray,
    mirrored: np.ndarray,
    how: Training,
    random: np.random.Generator,
    hw: tuple[int, int],
    spots: Spots | None,
) -> Views:
    """Windows of the network's size of pictures at sizes of chance; the first of them, as the order is one of chance, of places
    of classes that are drawn alike.
    """
    chosen, corner, shapes = chosen.copy(), random.random((len(chosen), 2)), images.shapes
    zoom = random.uniform(how.zoom_low, how.zoom_high, len(chosen))
    drawn_for = round(how.uniform * len(chosen)) if spots else 0
    places = np.full((len(chosen), 2), np.nan)
    for k in range(drawn_for):
        assert spots is not None
        chosen[k], *places[k] = spots(random)
    sides = np.array([shapes[int(i)][:2] for i in chosen], float)
    part = np.array(hw) / (sides * (zoom * min(hw) / sides.min(1))[:, None])  # (n, 2), of the picture
    start = corner * (1 - part)  # of a picture that is smaller: where it lies in the window
    wanted = np.clip(places - corner * part, 0, np.maximum(1 - part, 0))
    start = np.where(np.isnan(places) | (part >= 1), start, wanted)
    order = random.permutation(len(chosen))
    return Views(chosen[order], mirrored[order], np.concatenate([start, part], 1)[order])


def cut(picture: np.ndarray, part: np.ndarray, fill: Any = 0) -> np.ndarray:
    """That part of a picture (H, W, …), at least a pixel; what it has not is filled."""
    rows, columns = picture.shape[:2]
    top, left, height, width = part * (rows, columns, rows, columns)
    row, column = (min(int(round(start)), side - 1) for start, side in ((top, rows), (left, columns)))
    high, wide = max(1, round(height)), max(1, round(width))
    inside = picture[max(row, 0) : max(row + high, 0), max(column, 0) : max(column + wide, 0)]
    if max(part[2:]) <= 1:
        return inside
    whole = np.empty((high, wide, *picture.shape[2:]), picture.dtype)
    whole[...] = fill
    at = max(-row, 0), max(-column, 0)
    whole[at[0] : at[0] + inside.shape[0], at[1] : at[1] + inside.shape[1]] = inside
    return whole


class _Parts:
    """As much of Images as `batches` asks for: the k-th is the part that the k-th view shows."""

    def __init__(self, images: Images, views: Views, p: Preprocessing) -> None:
        self.images, self.views, self.p = images, views, p

    def __getitem__(self, k: int) -> np.ndarray:
        assert self.views.parts is not None
        picture = self.images[int(self.views.images[k])]
        by = None if picture.dtype == np.uint8 else divisor(picture.dtype, self.p)
        fill = fill_of(self.p, picture.shape[2] if picture.ndim == 3 else 1, by)
        return cut(picture, self.views.parts[k], fill if picture.ndim == 3 else fill[0])


def pixels_of(images: Images, views: Views, p: Preprocessing, size: int) -> Generator[Tensor]:
    """The network's input for views in batches of `size`: (b, c, h, w). A part is stretched to it."""
    workers = helpers()
    if views.parts is None:
        source = batches(images, views.images, p, size, workers)
    else:
        whole = dataclasses.replace(p, fit="stretch", crop_ratio=1.0)
        source = batches(_Parts(images, views, p), range(len(views)), whole, size, workers)  # type: ignore[arg-type]
    for k, x in enumerate(source):
        yield mirror(x, views.mirrored[k * size : (k + 1) * size])


def mirror(x: Tensor, chosen: np.ndarray) -> Tensor:
    """Those rows of x (B, …, W) turned left to right."""
    return torch.where(torch.from_numpy(chosen).view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
"""Of the policies, what would leave masks, and what the original was shown, in another place."""


class _RandAugment(v2.RandAugment):
    _AUGMENTATION_SPACE = {k: v for k, v in v2.RandAugment._AUGMENTATION_SPACE.items() if k not in _MOVES}


class _TrivialAugment(v2.TrivialAugmentWide):
    _AUGMENTATION_SPACE = {k: v for k, v in v2.TrivialAugmentWide._AUGMENTATION_SPACE.items() if k not in _MOVES}


class Altered:
    """Other colours and erased parts, image by image, by torch's own random numbers: x (B, C, h, w) of `p` → the same.

    torchvision's, whose draws are torch's: a training that goes on then draws what it would have drawn.
    """

    def __init__(self, how: Training, p: Preprocessing) -> None:
        policies: dict[str, Any] = {"randaugment": _RandAugment, "trivialaugment": _TrivialAugment}
        if how.moves:
            policies = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
        self.colours = policies[how.augment]() if how.augment else None
        self.erase = v2.RandomErasing(how.erasing) if how.erasing else None
        if self.colours and (len(p.mean) != 3 or p.scale != 1 / 255):
            raise DownresError(
                f"`augment` changes colours of 8 bits, the network takes {len(p.mean)} channels scaled by {p.scale:.6g}: leave "
                "it out."
            )
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (p.mean, p.std))
        self.turned = p.channel_order == BGR

    def __call__(self, x: Tensor) -> Tensor:
        if self.colours:
            whole = ((x * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
            whole = whole.flip(1) if self.turned else whole
            whole = torch.stack([self.colours(one) for one in whole])
            x = ((whole.flip(1) if self.turned else whole).float() / 255 - self.mean) / self.std
        return torch.stack([self.erase(one) for one in x]) if self.erase else x
