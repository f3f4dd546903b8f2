"""Logits of a segmentation network at full size: pure tensor functions, and the hook that `reduce` installs."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DownresError
from ..probe import Path, items_of, logits_of
from ..records import CLASSES, Dense
from .resize import image_size, nearest

Size = tuple[int, int]
_DICTS = (dict, OrderedDict)


def upsample(logits: Tensor, size: Size, interpolation: str = "bilinear", align_corners: bool = False) -> Tensor:
    """(B, K, h, w) → (B, K, *size) by 'bilinear' or 'bicubic' interpolation; `logits` itself when it has that size."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    if logits.dtype in (torch.float16, torch.bfloat16):  # classes that are close would become equal
        logits = logits.float()
    # Every class on a plane of its own: torch's kernels differ in the last bit with the number of channels and the memory
    # format, and `class_map` must find the very same numbers.
    batch, classes, *have = logits.shape
    planes = logits.reshape(batch * classes, 1, *have)
    return F.interpolate(planes, size=size, mode=interpolation, align_corners=align_corners).view(batch, classes, *size)


def class_map(
    logits: Tensor, size: Size, interpolation: str = "bilinear", align_corners: bool = False, threshold: float | None = None
) -> Tensor:
    """(B, K, h, w) → (B, *size), the argmax of the upsampled logits, without ever holding more than two of them.

    Goes class by class: each is upsampled on its own, which gives the very numbers of `upsample`, and compared with the
    largest so far, of equal ones the first counting. uint8 for up to 255 classes, else int16; where a logit is NaN the largest
    value of that type. A single logit is class 1 where it is above `threshold`.
    """
    classes = logits.shape[1]
    best = upsample(logits[:, :1], size, interpolation, align_corners)
    index = torch.zeros_like(best, dtype=torch.uint8 if classes <= 255 else torch.int16)
    if threshold is not None:
        index = (best > threshold).to(torch.uint8)
    for k in range(1, classes):
        one = upsample(logits[:, k : k + 1], size, interpolation, align_corners)
        index = torch.where(one > best, torch.full((), k, dtype=index.dtype, device=index.device), index)
        best = torch.maximum(best, one)
    nowhere = torch.full((), torch.iinfo(index.dtype).max, dtype=index.dtype, device=index.device)
    return torch.where(best.isnan(), nowhere, index)[:, 0]  # the maximum keeps a NaN


def full_size(input_size: Size, strides: tuple[float, float]) -> Size:
    """(height, width) of the logits that a network gives for an input, whose side is `strides` times that of its logits."""

    def side(pixels: int, stride: float) -> int:
        whole = round(stride)  # a stride is whole: what padding rounds up at one size it rounds up at another
        return math.ceil(pixels / whole) if whole > 1 and abs(stride - whole) < 0.25 else max(1, round(pixels / stride))

    return side(input_size[0], strides[0]), side(input_size[1], strides[1])


class Segmenter(nn.Module):
    """A segmentation network with its answer at full size: (B, C, h, w) → what `dense` says.

    Understands a tensor, torchvision's {'out': …}, transformers' `.logits`; which: index or name of one of several outputs.
    This is what is counted, timed and exported.
    """

    def __init__(self, network: nn.Module, dense: Dense, which: int | str | None = None) -> None:
        super().__init__()
        self.network, self.dense, self.which = network, dense, which

    def forward(self, x: Tensor) -> Tensor:
        d, logits = self.dense, self._logits(self.network(x))  # what else there is shall not stay in memory
        if logits.ndim != 4:
            raise DownresError(
                f"A segmentation network returns logits (batch, classes, height, width), this one returns "
                f"{tuple(logits.shape)}: give another network."
            )
        check_size(d.size, (logits.shape[-2], logits.shape[-1]))
        if d.left_out is not None:
            logits = torch.cat([logits[:, : d.left_out], logits[:, d.left_out + 1 :]], dim=1)
        if d.output == CLASSES:
            return class_map(logits, d.size, d.interpolation, d.align_corners, d.threshold)
        return upsample(logits, d.size, d.interpolation, d.align_corners)

    def _logits(self, output: Any) -> Tensor:
        return _answer(output) if self.which is None else logits_of(output, self.which)


def check_size(size: Size, have: Size) -> None:
    """DownresError where `size`, of the labels, is below that of the logits."""
    if size[0] < have[0] or size[1] < have[1]:
        raise DownresError(
            f"Logits are brought up to the size of the labels, {size[0]}x{size[1]} is below the {have[0]}x{have[1]} that "
            "the network gives: name the labels' own size, or a lower resolution."
        )


@dataclass(frozen=True)
class Map:
    """Of one tensor in an answer: its rows are along axis `rows`, its columns along the next; strides: input over map."""

    ndim: int
    rows: int
    strides: tuple[float, float]


@dataclass(frozen=True)
class Tokens:
    """Of one tensor in an answer (B, prefix + N, C): the grid of a transformer's patch tokens, small and in the original."""

    prefix: int
    small: Size
    strides: tuple[float, float]


def as_map(whole: Sequence[int], small: Sequence[int], image: Size, ratio: tuple[float, float]) -> Map | None:
    """What differs between two shapes of one tensor as rows and columns, None where it is no map (tokens, anchors, a row).

    whole: of the answer to an image of this size; small: to one whose sides are `ratio` times that, or whose inside is smaller.
    """
    differ = [axis for axis, (a, b) in enumerate(zip(whole, small, strict=False)) if a != b]
    if len(whole) != len(small) or not differ or differ[0] == 0:
        return None

    def fits(rows: int) -> bool:
        """One stride for rows and columns, and both changed alike: up to the cell that is rounded."""
        (h, w), (h_small, w_small) = whole[rows : rows + 2], small[rows : rows + 2]
        factor = max(h_small / (h * ratio[0]), w_small / (w * ratio[1]))
        least = min(h_small / (h * ratio[0]), w_small / (w * ratio[1]))
        alike = (factor - least) * max(h * ratio[0], w * ratio[1]) <= 2
        return alike and (abs(h - w * image[0] / image[1]) <= 1 or abs(w - h * image[1] / image[0]) <= 1)

    for rows in range(len(whole) - 2, 0, -1):
        if {rows, rows + 1}.issuperset(differ) and ((len(differ) == 2 and len(whole) > 3) or fits(rows)):
            return Map(len(whole), rows, (image[0] / whole[rows], image[1] / whole[rows + 1]))
    return None


class FullSize:
    """Two hooks of one reduced model: `before` its input is resized it is looked at, `after` it has run its logits get the
    size that the original's would have for that input, or `size`; so do auxiliary logits and other maps beside them.

    strides: input over logits of the original, None where it gives none. maps: where in the answer there are others; stay:
    where there are some that are as large for every input. What is elsewhere (in train mode, or asked for) is auxiliary
    logits where it has as many channels as the logits, else it stays as it is.
    """

    def __init__(
        self,
        size: Size | None,
        strides: tuple[float, float] | None,
        maps: dict[Path, Map | Tokens],
        stay: frozenset[Path],
        interpolation: str,
        align_corners: bool,
    ) -> None:
        self.size, self.strides, self.maps, self.stay = size, strides, maps, stay
        self.interpolation, self.align_corners = interpolation, align_corners
        self._records = {path[:depth] for path in [(), *maps] for depth in range(len(path) or 1)}
        self._input: Size = (0, 0)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = image_size(args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        main = None if self.strides is None else _answer(output)
        return self._changed(output, main, ())

    def _changed(self, value: Any, main: Tensor | None, path: Path) -> Any:
        """An answer of whatever type with its maps at full size; dictionaries and records are changed in place."""
        if isinstance(value, Tensor):
            return self._full(value, main, path)
        if isinstance(value, dict):  # of whatever class
            for key, item in list(value.items()):
                if (made := self._changed(item, main, (*path, key))) is not item:
                    value[key] = made
        elif isinstance(value, (list, tuple)):
            items = [self._changed(item, main, (*path, i)) for i, item in enumerate(value)]
            if type(value) is list:
                return items
            if isinstance(value, list):
                value[:] = items
            else:
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        elif isinstance(value, np.ndarray):
            return self._full(torch.from_numpy(value), main, path).numpy() if path in self.maps else value
        elif path in self._records:
            for name, item in items_of(value) or ():
                if (made := self._changed(item, main, (*path, name))) is not item:
                    object.__setattr__(value, name, made)
        return value

    def _full(self, x: Tensor, main: Tensor | None, path: Path) -> Tensor:
        """`x` where it is the network's answer (`main`), auxiliary, of as many classes, perhaps at another stride, or a map."""
        if path in self.stay:
            return x
        if main is not None and self.strides is not None and _as_logits(x, main):
            size = self.size or full_size(self._input, self.strides)
            if self.size is not None:
                check_size(self.size, (main.shape[-2], main.shape[-1]))
            if x.shape[-2:] != main.shape[-2:]:
                size = full_size(size, (main.shape[-2] / x.shape[-2], main.shape[-1] / x.shape[-1]))
            return upsample(x, size, self.interpolation, self.align_corners)
        found = self.maps.get(path)
        if isinstance(found, Tokens) and x.ndim == 3 and x.shape[1] == found.prefix + math.prod(found.small):
            grid = x[:, found.prefix :].unflatten(1, found.small)
            grown = self._grown(grid, Map(4, 1, found.strides)).flatten(1, 2)
            return torch.cat([x[:, : found.prefix], grown], 1)
        return self._grown(x, found) if isinstance(found, Map) and x.ndim == found.ndim else x

    def _grown(self, x: Tensor, found: Map) -> Tensor:
        size = full_size(self._input, found.strides)
        planes = x.movedim((found.rows, found.rows + 1), (-2, -1))
        if not x.is_floating_point():
            planes = nearest(planes, size)
        elif tuple(planes.shape[-2:]) != size:
            flat = planes.reshape(1, -1, *planes.shape[-2:])
            flat = upsample(flat, size, self.interpolation, self.align_corners)
            planes = flat.to(x.dtype).reshape(*planes.shape[:-2], *size)
        return planes.movedim((-2, -1), (found.rows, found.rows + 1))


def _as_logits(x: Tensor, main: Tensor) -> bool:
    return x.ndim == main.ndim == 4 and x.shape[1] == main.shape[1] and x.is_floating_point()


def _answer(output: Any) -> Tensor:
    """`logits_of`, without a look at attributes that dictionaries do not have: torch.compile refuses it."""
    found = output.get("logits", output.get("out")) if type(output) in _DICTS else None
    return logits_of(output) if found is None else found
