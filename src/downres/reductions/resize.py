"""Resampling of images and activations: pure tensor functions, and the two hooks that `reduce` installs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DownresError
from ..parse import Resolution


def resample(x: Tensor, size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """(B, C, H, W) → (B, C, *size), antialiased (agrees with PIL, as plain `interpolate` does not).

    Returns `x` itself when it has that size already, so a small input costs nothing.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if x.dtype in (torch.float16, torch.bfloat16):
        # The filter sums many small weights: half precision would lose them, and CPU kernels lack it.
        return resample(x.float(), size, interpolation).to(x.dtype)
    return F.interpolate(x, size=size, mode=interpolation, antialias=True, align_corners=False)


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(…, H, W) of any type → (…, *size) by the nearest value, as 'nearest-exact' of `F.interpolate` takes it."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    for axis, side in zip((-2, -1), size, strict=True):
        place = (torch.arange(side, device=x.device) + 0.5) * (x.shape[axis] / side)
        x = x.index_select(axis, place.long())
    return x


def input_size(shape: tuple[int, int], resolution: Resolution) -> tuple[int, int]:
    """(height, width) that an input of `shape` is resized to.

    One number is the short side, aspect ratio kept (a 2:1 street scene stays 2:1); a pair is taken as it is.
    """
    if not isinstance(resolution, int):
        return resolution
    height, width = shape
    short = min(height, width)
    return max(1, round(height * resolution / short)), max(1, round(width * resolution / short))


def scaled_size(shape: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) of a feature map of `shape` resampled by `scale`, at least 1×1."""
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


# The hooks are objects of module-level classes, not closures: they survive copy.deepcopy and pickle,
# add no key to the state dict, and are traced by torch.compile and torch.export like any other code.


def on_image(args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The arguments of a model with its images changed: the first (B, C, H, W) tensor among them, and whatever has its size:
    further images, masks (B, C, H, W) or (B, H, W). DownresError for images of several sizes.
    """
    first = _first_image(args, kwargs)
    size = first.shape[-2], first.shape[-1]

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.ndim in (3, 4) and (value.shape[-2], value.shape[-1]) == size:
                return change(value)
            if value.ndim == 4 and value.shape[1] == first.shape[1]:
                raise DownresError(
                    f"All images that go into a reduced model are resized together, here one is of {size[0]}x{size[1]} and "
                    f"one of {value.shape[-2]}x{value.shape[-1]}: give them at one size, or reduce with resize_input=False."
                )
            return value
        if isinstance(value, dict):
            return {key: one(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(one(item) for item in value)
        return value

    return tuple(one(value) for value in args), {key: one(value) for key, value in kwargs.items()}


def image_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the first (B, C, H, W) tensor among the arguments of a model."""
    first = _first_image(args, kwargs)
    return first.shape[-2], first.shape[-1]


def _first_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    stack = [*args, *kwargs.values()][::-1]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor) and value.ndim == 4:
            return value
        if isinstance(value, dict):
            stack += [*value.values()][::-1]
        elif type(value) in (list, tuple):
            stack += value[::-1]
    raise DownresError("The reduced model got no image tensor: its input must be of shape (batch, channels, height, width).")


class ResizeInput:
    """Forward pre-hook: resizes the images among the arguments, see `on_image`; masks of whole numbers by the nearest.

    unit: where one side is given and the aspect ratio kept, both are rounded to multiples of this, as patches need.
    """

    def __init__(self, resolution: Resolution, interpolation: str, unit: tuple[int, int] = (1, 1)) -> None:
        self.resolution, self.interpolation, self.unit = resolution, interpolation, unit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return on_image(args, kwargs, self._small)

    def _small(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = input_size((height, width), self.resolution)
        if isinstance(self.resolution, int):
            rows, columns = (max(1, round(side / u)) * u for side, u in zip(size, self.unit, strict=True))
            size = rows, columns
        if not x.is_floating_point() and x.dtype != torch.uint8:
            return nearest(x, size)
        return resample(x, size, self.interpolation) if x.ndim == 4 else resample(x[:, None], size, self.interpolation)[:, 0]


def fitted(size: tuple[int, int], unit: tuple[int, int], pad: bool) -> tuple[int, int]:
    """(height, width) in whole units: what is left when the rest is cut off, or the next size up when it is padded."""
    height, width = (-(-side // u) * u if pad else side // u * u for side, u in zip(size, unit, strict=True))
    return height, width


class FitInput:
    """Forward pre-hook: cuts or zero-pads the image tensor at the right and bottom to whole units.

    expected: (height, width) that the image must have, None for any: a grid of tokens is of one size.
    """

    def __init__(self, unit: tuple[int, int], pad: bool, expected: tuple[int, int] | None) -> None:
        self.unit, self.pad, self.expected = unit, pad, expected

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return on_image(args, kwargs, self._fitted)

    def _fitted(self, x: Tensor) -> Tensor:
        size = x.shape[-2], x.shape[-1]
        if self.expected is not None and size != self.expected:
            raise DownresError(
                f"This reduced model is made for images of {self.expected[0]}x{self.expected[1]} px, "
                f"it got {size[0]}x{size[1]}: resize them, or reduce with a resolution, which does it inside."
            )
        height, width = fitted(size, self.unit, self.pad)
        if (height, width) == size:
            return x
        if min(height, width) == 0:
            raise DownresError(
                f"Nothing is left of {size[0]}x{size[1]} px in steps of {self.unit[0]}: pad, or give more pixels."
            )
        return F.pad(x, (0, width - size[1], 0, height - size[0]))  # negative padding cuts


class ResampleOutput:
    """Forward hook: resamples the feature map (B, C, H, W) that a module returns by a relative factor."""

    def __init__(self, name: str, scale: float, interpolation: str) -> None:
        self.name, self.scale, self.interpolation = name, scale, interpolation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise DownresError(
                f"Only a feature map (batch, channels, height, width) can be resampled, {self.name!r} returns {shape}: "
                "name another module with stem=..."
            )
        return resample(output, scaled_size(tuple(output.shape[-2:]), self.scale), self.interpolation)  # type: ignore[arg-type]
