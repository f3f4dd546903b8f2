"""Files of numbers and not of colours: .npy, and TIFF of 16 bits or other channels than a picture has. Nothing is rescaled."""

import logging
import math
import os
import threading
from typing import Any, BinaryIO

import numpy as np

from .unreadable import MAX_PIXELS, Unreadable

_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""Orientation to what undoes it, of arrays (H, W, …)."""


_ONE_AT_A_TIME = threading.Lock()
"""NumPy has Python's own parser read the headers of .npy files, which in Python 3.11 fails now and then where two threads are
in it: a sound file would be skipped as broken.
"""


def npy(file: BinaryIO, channels: int) -> np.ndarray:
    """An array (H, W), (H, W, C) or (C, H, W), C as the network takes it; see `_checked`."""
    with _ONE_AT_A_TIME:
        values = _values(file)
    if values.ndim == 3:
        last, first = (values.shape[axis] == channels for axis in (2, 0))
        if last and first:
            raise Unreadable(f"an array {values.shape}, height and width first or last")
        if first or (not last and values.shape[0] == 1 != values.shape[2]):
            values = np.moveaxis(values, 0, 2)
    return _checked(values, channels)


def _values(file: BinaryIO) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
    except Exception:  # whatever stands where the header should be
        raise Unreadable("broken") from None
    _check_size(shape, dtype)
    if math.prod(shape) * dtype.itemsize > _size(file) - file.tell():
        raise Unreadable("truncated")
    file.seek(0)
    found: np.ndarray = np.load(file, allow_pickle=False)
    return found


def _size(file: BinaryIO) -> int:
    """Bytes of a file, on disk or in memory."""
    here = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(here)
    return length


def tiff(file: BinaryIO, channels: int) -> np.ndarray:
    """The first picture in a TIFF, or its first pages where there are as many as the network has channels; see `_checked`."""
    try:
        import tifffile
    except ImportError:
        raise Unreadable("a TIFF of 16 bits or many channels: pip install 'downres[tiff]'") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it prints what it finds wrong, and goes on
    length = _size(file)
    try:
        with tifffile.TiffFile(file) as found:
            series: Any = found.series[0]
            if len(series.shape) == 3 and series.axes.endswith("YX") and series.shape[0] != channels:
                series = found.pages[0]
            _check_size(series.shape, series.dtype)
            for page in getattr(series, "pages", [series]):  # what is not there would be read as zeros
                if any(start + count > length for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)):
                    raise Unreadable("truncated")
            values = series.asarray(maxworkers=1)
            sides = [(axis, side) for axis, side in zip(series.axes, series.shape, strict=True) if side > 1 or axis in "YX"]
            tag = found.pages.first.tags.get("Orientation")
        values = values.reshape([side for _, side in sides])
    except (Unreadable, MemoryError):
        raise
    except Exception:  # what the library raises on broken data is not limited to any list
        raise Unreadable("broken") from None
    if values.ndim == 3 and sides[-1][0] == "X":
        values = np.moveaxis(values, 0, 2)
    return np.ascontiguousarray(_UPRIGHT.get(tag.value if tag is not None else 1, lambda a: a)(_checked(values, channels)))


def _check_size(shape: tuple[int, ...], dtype: Any) -> None:
    """From the header alone: what would fill the memory is not read."""
    if dtype is None or dtype.name not in ("uint8", "uint16", "float16", "float32", "float64"):
        raise Unreadable(f"{dtype} pixels, neither uint8, uint16 nor floats")
    if len(shape) not in (2, 3) or not all(shape):
        raise Unreadable(f"an array {tuple(shape)}, no picture")
    if math.prod(shape) // min(shape) > MAX_PIXELS or math.prod(shape) > 16 * MAX_PIXELS:
        raise Unreadable(f"{math.prod(shape) / 1e6:.1f} million values, more than are read")


def _checked(values: np.ndarray, channels: int) -> np.ndarray:
    """uint8, uint16 or float32 (H, W) or (H, W, channels); one channel also serves a network of three. Else Unreadable."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    has = 1 if values.ndim == 2 else values.shape[2]
    if has != channels and (has, channels) != (1, 3):
        raise Unreadable(f"{has} channel{'s' * (has > 1)}, the network takes {channels}")
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise Unreadable("NaN or infinite values")
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False))
