"""From a decoded picture to the network's input: the one preprocessing that measuring, recovery and serving share."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ..errors import DownresError
from ..records import Preprocessing
from .decode import MAX_PIXELS
from .images import Images

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize_and_crop(image: np.ndarray, p: Preprocessing) -> torch.Tensor:
    """The picture at the network's size: resized with antialiasing to cover hw / crop_ratio, its centre cropped to hw.

    image: uint8 (H, W), (H, W, 1) or (H, W, 3). Returns uint8 (C, h, w), C as in the picture, but 1 for a network of one
    channel, for which colours become grey (ITU-R 601) before resizing. For square targets the
    pixels equal, bit for bit, those of torchvision's Resize(int) and CenterCrop, and timm's, on PIL pictures.
    """
    picture = Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)
    if len(p.mean) == 1:
        picture = picture.convert("L")
    height, width = (math.floor(side / p.crop_ratio + 1e-6) for side in p.hw)
    size = _covering_size(picture.size, (width, height))
    if math.prod(size) > MAX_PIXELS:
        # A sliver such as 5000 x 1 would grow to gigabytes that the crop then throws away: cut before.
        picture = _centre(picture, _needed_part(picture.size, (width, height)))
        size = _covering_size(picture.size, (width, height))
    # PIL's resize, not torch's: on uint8 that is three times as fast, but its weights have 16 bits and about 0.3 % of
    # the values come out 1 or 2 levels off, and it computes otherwise on CPUs without AVX2.
    cropped = np.array(_centre(picture.resize(size, _FILTERS[p.interpolation]), (p.hw[1], p.hw[0])))
    return torch.from_numpy(cropped if cropped.ndim == 3 else cropped[:, :, None]).permute(2, 0, 1)


def _covering_size(size: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
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


def _centre(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central (width, height); an odd margin is divided as torchvision's CenterCrop does."""
    left, top = (round((have - want) / 2) for have, want in zip(picture.size, size, strict=True))
    return picture.crop((left, top, left + size[0], top + size[1]))


def preprocess(image: np.ndarray, p: Preprocessing) -> torch.Tensor:
    """One picture, uint8 (H, W), (H, W, 1) or (H, W, 3), as float32 (channels of p.mean, h, w), normalised.

    Raises DownresError when the picture's channels cannot serve the network.
    """
    network_input = _empty_batch(1, p)
    _fill(network_input, [image], p)
    return network_input[0]


def batches(
    images: Images, indices: Sequence[int] | np.ndarray, p: Preprocessing, batch_size: int, workers: int = 2
) -> Iterator[torch.Tensor]:
    """`preprocess` of images[i] for each i in `indices`, in that order, as float32 (b, c, h, w), b ≤ batch_size.

    While the consumer works on one batch, `workers` threads prepare the next. They end with the iterator, also when it
    is closed early; what goes wrong in them is raised here.
    """
    if batch_size < 1:
        raise DownresError(f"A batch has at least 1 image, {batch_size} is not: give for example 32.")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="downres-preprocess")

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
    """Write (pixels / 255 - mean) / std of each picture into float32 (b, c, h, w)."""
    # NumPy's arithmetic, which is torch's bit for bit: torch would start threads for each operation, and these wait for
    # one another where the cores are busy with the network (30 ms an image instead of 1 were seen).
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (p.mean, p.std))
    for slot, image in zip(batch.numpy(), images, strict=True):
        pixels = resize_and_crop(image, p).numpy()
        if len(pixels) not in (1, len(slot)):
            raise DownresError(
                f"The network takes {len(slot)} channels and an image has {len(pixels)}: "
                "give mean and std with one value for each channel of the images."
            )
        np.divide(pixels, np.float32(255), out=slot)  # grey is expanded only here, after resizing: a third of the work
        slot -= mean
        slot /= std
