"""From a decoded picture to the network's input: the one preprocessing that measuring, recovery and serving share."""

import math
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from ..errors import DownresError
from ..records import BGR, Preprocessing
from .decode import MAX_PIXELS
from .images import Images

_FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def resize_and_crop(image: np.ndarray, p: Preprocessing) -> torch.Tensor:
    """The picture at the network's size, resized and fitted as `p.fit` says; 'crop': to cover hw / crop_ratio, its centre
    cropped to hw.

    image: (H, W) or (H, W, C), uint8, uint16 or float32. Returns (C, h, w), uint8 or, of other types, float32, in the picture's
    own numbers; C as in the picture, but 1 for a network of one channel, for which colours become grey (ITU-R 601) before
    resizing; colours are red, green, blue whatever `p.channel_order` is. For square targets the geometry is that of
    torchvision's Resize(int) and CenterCrop, and of timm's. The resize is torchvision's on uint8: six times as fast as PIL's,
    of which it is at most 2 of 255 levels off (in about 0.3 % of the values with AVX2 or AVX-512); without antialiasing it is
    OpenCV's, but for rounding.
    """
    if len(p.mean) == 1 and image.shape[2:] == (3,) and image.dtype == np.uint8:
        image = np.array(Image.fromarray(image).convert("L"))
    by = divisor(image.dtype, p)
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
    if not image.flags.writeable or 1 in image.shape[:2]:
        # torch has no read-only tensors, and reads slivers wrongly whose strides are not the plain ones.
        image = np.array(image, order="C")
    if image.ndim == 2 or image.shape[2] == 1:
        pixels = torch.from_numpy(np.ascontiguousarray(image.reshape(image.shape[:2])))[None]
    else:
        pixels = torch.from_numpy(image).permute(2, 0, 1)
    if p.fit != "crop":
        return _whole(pixels, p, by)
    height, width = cover_of(p)
    size = covering_size((pixels.shape[2], pixels.shape[1]), (width, height))
    if math.prod(size) > MAX_PIXELS:
        # A sliver such as 5000 x 1 would grow to gigabytes that the crop then throws away: cut before.
        keep_width, keep_height = _needed_part((pixels.shape[2], pixels.shape[1]), (width, height))
        pixels = v2.center_crop(pixels, [keep_height, keep_width]).clone()
        size = covering_size((keep_width, keep_height), (width, height))
    return v2.center_crop(_resized(pixels, (size[1], size[0]), p), list(p.hw))


def _resized(pixels: torch.Tensor, size: tuple[int, int], p: Preprocessing) -> torch.Tensor:
    """uint8 or float32 (C, H, W) → the same (C, *size)."""
    whole = pixels.dtype == torch.uint8
    if tuple(pixels.shape[1:]) == size or (p.antialias and whole):
        return v2.resize(pixels, list(size), _FILTERS[p.interpolation])
    # On uint8 torch has another cubic than OpenCV, and than itself on floats. One channel at a time: a float is four bytes.
    each = [F.interpolate(c[None, None].float(), size, mode=p.interpolation, antialias=p.antialias)[0, 0] for c in pixels]
    return torch.stack([c.round_().clamp_(0, 255).to(torch.uint8) if whole else c for c in each])


def visible(pixels: np.ndarray) -> np.ndarray:
    """A picture of any channels and type as people see it: uint8 (H, W, 3). Of more than three channels the first three, of two
    the first; other types than uint8 are stretched from their 2nd to their 98th percentile.
    """
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        pixels = pixels.reshape(*pixels.shape[:2], -1)[:, :, :1]
    pixels = np.broadcast_to(pixels[:, :, :3], (*pixels.shape[:2], 3))
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    low, high = np.percentile(pixels, (2, 98))
    return np.clip(255 * (pixels - low) / max(high - low, 1e-12), 0, 255).round().astype(np.uint8)


def shown_size(image_size: tuple[int, int], p: Preprocessing) -> tuple[int, int]:
    """(height, width) of the part of the network's input, from its upper left corner, that a picture of that size fills.

    Smaller than p.hw only with the fit 'pad', and in one direction.
    """
    if p.fit != "pad":
        return p.hw
    scale = min(p.hw[0] / image_size[0], p.hw[1] / image_size[1])
    height, width = (min(side, max(1, round(have * scale))) for side, have in zip(p.hw, image_size, strict=True))
    return height, width


def divisor(dtype: np.dtype, p: Preprocessing) -> float:
    """What pixels of that type are divided by before mean and std are: as `p.scale` says, whose 1/255 means to 0…1."""
    return {"uint8": 255.0, "uint16": 65535.0}.get(dtype.name, 1.0) if p.scale == 1 / 255 else 1 / p.scale


def _whole(pixels: torch.Tensor, p: Preprocessing, by: float) -> torch.Tensor:
    """Nothing cut off: stretched to hw, or inside it and the rest filled. by: see `divisor`."""
    height, width = shown_size((pixels.shape[1], pixels.shape[2]), p)
    if p.antialias and height < pixels.shape[1] and width > pixels.shape[2]:
        # Less work, and PIL's order of the passes, between which bicubic overshoot is cut off.
        pixels = _resized(pixels, (height, pixels.shape[2]), p)
    resized = _resized(pixels, (height, width), p)
    if (height, width) == p.hw:
        return resized
    fill = fill_of(p, len(resized), None if resized.dtype is torch.uint8 else by)
    return v2.pad(resized, [0, 0, p.hw[1] - width, p.hw[0] - height], fill=fill)


def fill_of(p: Preprocessing, channels: int, by: float | None = None) -> list[float]:
    """What is put beside a padded picture, for each of its channels: the mean; for grey ones the mean of means. by: what its
    pixels are divided by, None for those of 8 bits, which are whole.
    """
    means = p.mean[::-1] if p.channel_order == BGR else p.mean
    means = means if len(means) == channels else (sum(means) / len(means),)
    if by is not None:
        return [m * by for m in means]
    return [min(255, max(0, round(m * (1 / p.scale)))) for m in means]


def cover_of(p: Preprocessing) -> tuple[int, int]:
    """(height, width) that a picture is resized to cover before its centre is cropped."""
    height, width = (math.floor(side / p.crop_ratio + 1e-6) for side in p.hw)
    return height, width


def covering_size(size: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of size's aspect ratio with both sides at least `cover`; rounds as torchvision does."""
    width, height = size
    if cover[0] * height >= cover[1] * width:
        return cover[0], max(cover[1], int(cover[0] * height / width))
    return max(cover[0], int(cover[1] * width / height)), cover[1]


def _needed_part(size: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a central part of a sliver that still more than covers `cover`."""
    width, height = size
    return (
        min(width, 2 * math.ceil(cover[0] * height / cover[1]) + 2),
        min(height, 2 * math.ceil(cover[1] * width / cover[0]) + 2),
    )


def preprocess(image: np.ndarray, p: Preprocessing) -> torch.Tensor:
    """One picture, (H, W) or (H, W, C) of uint8, uint16 or float32, as float32 (channels of p.mean, h, w), normalised.

    Raises DownresError when the picture's channels cannot serve the network.
    """
    network_input = _empty_batch(1, p)
    _fill(network_input, [image], p)
    return network_input[0]


def batches(
    images: Images, indices: Sequence[int] | np.ndarray, p: Preprocessing, batch_size: int, workers: int = 2
) -> Generator[torch.Tensor]:
    """`preprocess` of images[i] for each i in `indices`, in that order, as float32 (b, c, h, w), b ≤ batch_size.

    While the consumer works on one batch, `workers` threads prepare the next. They end with the iterator, also when it
    is closed early; what goes wrong in them is raised here.
    """
    if batch_size < 1:
        raise DownresError(f"A batch has at least 1 image, {batch_size} is not: give for example 32.")
    # One torch thread in each worker: teams of their own would spin on the cores that the network needs.
    pool = ThreadPoolExecutor(workers, "downres-preprocess", initializer=torch.set_num_threads, initargs=(1,))

    def begin(start: int) -> tuple[torch.Tensor, list[Future[None]]]:
        chosen = [int(i) for i in indices[start : start + batch_size]]
        batch = _empty_batch(len(chosen), p)
        share = max(1, math.ceil(len(chosen) / workers))
        return batch, [pool.submit(fill, batch[k : k + share], chosen[k : k + share]) for k in range(0, len(chosen), share)]

    def fill(part: torch.Tensor, chosen: list[int]) -> None:
        _fill(part, [images[i] for i in chosen], p)

    try:
        batch, tasks = begin(0)
        for start in range(0, len(indices), batch_size):
            for task in tasks:
                task.result()
            ready = batch
            batch, tasks = begin(start + batch_size)
            yield ready
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _empty_batch(n: int, p: Preprocessing) -> torch.Tensor:
    return torch.empty(n, len(p.mean), *p.hw)


def _fill(batch: torch.Tensor, images: Sequence[np.ndarray], p: Preprocessing) -> None:
    """Write (pixels · scale - mean) / std of each picture into float32 (b, c, h, w)."""
    # NumPy's arithmetic, which is torch's bit for bit: torch would start threads for each operation, and these wait for
    # one another where the cores are busy with the network (30 ms an image instead of 1 were seen).
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (p.mean, p.std))
    for slot, image in zip(batch.numpy(), images, strict=True):
        pixels = resize_and_crop(image, p).numpy()
        if len(pixels) != len(slot) and (len(pixels), len(slot)) != (1, 3):
            raise DownresError(
                f"The network takes {len(slot)} channels and an image has {len(pixels)}: "
                "give mean and std with one value for each channel of the images."
            )
        # Divided, as torchvision does. Grey is expanded only here, after resizing: a third of the work.
        np.divide(pixels[::-1] if p.channel_order == BGR else pixels, np.float32(divisor(image.dtype, p)), out=slot)
        slot -= mean
        slot /= std
