"""Logits of a segmentation network at full size: pure tensor functions, and the hook that `reduce` installs."""

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import DownresError
from ..probe import logits_of
from ..records import CLASSES, Dense
from .resize import on_image

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
        d, output = self.dense, self.network(x)
        logits = _answer(output) if self.which is None else logits_of(output, self.which)
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


def check_size(size: Size, have: Size) -> None:
    """DownresError where `size`, of the labels, is below that of the logits."""
    if size[0] < have[0] or size[1] < have[1]:
        raise DownresError(
            f"Logits are brought up to the size of the labels, {size[0]}x{size[1]} is below the {have[0]}x{have[1]} that "
            "the network gives: name the labels' own size, or a lower resolution."
        )


class FullSizeLogits:
    """Two hooks of one reduced model: `before` its input is resized it is looked at, `after` it has run its logits get the
    size that the original's would have for that input, or `size`; so do auxiliary logits beside them.

    strides: input over logits of the original.
    """

    def __init__(
        self, size: Size | None, strides: tuple[float, float], interpolation: str, align_corners: bool, ragged: bool
    ) -> None:
        self.size, self.strides, self.ragged = size, strides, ragged
        self.interpolation, self.align_corners = interpolation, align_corners
        self._input: Size = (0, 0)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = _image_size(args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        main = _answer(output)
        if self.ragged and main.ndim == 4:
            raise DownresError(
                "An answer to every pixel needs an input that is neither cut nor padded: reduce to a resolution that "
                "the network divides, with ragged='error'."
            )
        if type(output) not in _DICTS and not isinstance(output, tuple) and hasattr(output, "logits"):
            output.logits = self._full(main, main)  # transformers: other maps beside them are not logits
        elif isinstance(output, dict):  # of whatever class
            for name, value in output.items():
                output[name] = tree_map_only(Tensor, lambda x: self._full(x, main), value)
        else:
            output = tree_map_only(Tensor, lambda x: self._full(x, main), output)
        return output

    def _full(self, logits: Tensor, main: Tensor) -> Tensor:
        """`logits` where they are the network's answer (`main`) or auxiliary, of as many classes, perhaps at another stride."""
        if logits.ndim != 4 or logits.shape[1] != main.shape[1]:
            return logits
        size = self.size or full_size(self._input, self.strides)
        if self.size is not None:
            check_size(self.size, (main.shape[-2], main.shape[-1]))
        if logits.shape[-2:] != main.shape[-2:]:
            size = full_size(size, (main.shape[-2] / logits.shape[-2], main.shape[-1] / logits.shape[-1]))
        return upsample(logits, size, self.interpolation, self.align_corners)


def _answer(output: Any) -> Tensor:
    """`logits_of`, without a look at attributes that dictionaries do not have: torch.compile refuses it."""
    found = output.get("logits", output.get("out")) if type(output) in _DICTS else None
    return logits_of(output) if found is None else found


def _image_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Size:
    found: list[Size] = []

    def see(x: Tensor) -> Tensor:
        found.append((x.shape[-2], x.shape[-1]))
        return x

    on_image(args, kwargs, see)
    return found[0]
