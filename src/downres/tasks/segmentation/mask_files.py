"""Mask files: the indices or colours in them, never converted, and what their headers say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from ...images.decode import MAX_PIXELS, Unreadable, _open_header
from .mask_legends import Colour

_RGB_MODES = ("RGB", "RGBA", "RGBX")
_INDEX_MODES = ("1", "L", "LA", "P", "PA", "I")
# PIL stretches grey of 2 and 4 bits to 0 to 255; in a mask the numbers count.
_STRETCHED = {"L;2": 85, "L;4": 17}


class Header(NamedTuple):
    """size: (height, width), upright. rgb: colours and not indices. jpeg: inexact pixels. palette: see `values_of`."""

    size: tuple[int, int]
    rgb: bool
    jpeg: bool
    palette: np.ndarray | None = None


def header_of(path: Path) -> Header | None:
    """What the header of an image file says, None where it cannot be read."""
    try:
        with _opened(path) as picture:
            width, height = picture.size
            # PIL would decode a PNG to look for its orientation, which hardly one has.
            if picture.format != "PNG" and picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
                width, height = height, width
            return Header((height, width), picture.mode in _RGB_MODES, picture.format == "JPEG", _palette_of(picture))
    except Unreadable:
        return None


def values_of(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(a mask file's indices, integers (H, W), or colours, uint8 (H, W, 3); the colours, uint8 (n, 3), that the file itself
    says its indices have, or None). 16-bit grey that is 8-bit grey made wider becomes that again. Raises Unreadable.
    """
    with _opened(path) as picture:
        if picture.mode not in (*_RGB_MODES, *_INDEX_MODES) and not picture.mode.startswith("I;16"):
            raise Unreadable(f"pixels of mode {picture.mode}, neither indices nor RGB")
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise Unreadable(f"{width * height / 1e6:.1f} megapixels, more than {MAX_PIXELS // 10**6}")
        raw = _raw_mode(picture)
        palette = _palette_of(picture)
        values = np.array(picture)
    if picture.mode in _RGB_MODES:
        return values[..., :3], None
    if values.ndim == 3:  # transparency
        values = values[..., 0]
    if values.dtype == bool:
        return values.astype(np.uint8), palette
    if values.dtype == np.uint16 and values.max() > 255 and not (values % 257).any():
        return (values // 257).astype(np.uint8), None
    return values // _STRETCHED[raw] if isinstance(raw, str) and raw in _STRETCHED else values, palette


def _raw_mode(picture: Image.Image) -> object:
    """How the file has its pixels; gone when they are loaded."""
    tiles = getattr(picture, "tile", [])
    return tiles[0].args if tiles else None


def _palette_of(picture: Image.Image) -> np.ndarray | None:
    """Of an indexed picture, and of grey of less than 8 bits, whose few levels are as good as indices."""
    if picture.mode == "1":
        return np.array([(0, 0, 0), (255, 255, 255)], np.uint8)
    if picture.mode in ("P", "PA"):
        return np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    raw = _raw_mode(picture)
    if isinstance(raw, str) and (step := _STRETCHED.get(raw)):
        return np.array([(level,) * 3 for level in range(0, 256, step)], np.uint8)
    return None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture of which only the header is read. Whatever is wrong with it until the block ends becomes Unreadable."""
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise Unreadable("not a regular file" if path.exists() else "no such file")
        if path.stat().st_size == 0:
            raise Unreadable("empty file")
        with path.open("rb") as file, _open_header(file) as picture:
            yield picture
    except (Unreadable, MemoryError):
        raise
    except PermissionError:
        raise Unreadable("permission denied") from None
    except Exception as error:  # what PIL's decoders raise on broken data is not limited to any list
        raise Unreadable("truncated" if "truncated" in str(error).lower() else "broken") from None


def packed(colours: np.ndarray) -> np.ndarray:
    """uint8 (…, 3) to uint32 (…), in the order of the colours."""
    red, green, blue = (colours[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


def colours_of(pixels: np.ndarray) -> list[Colour]:
    """The colours that occur, the most frequent first."""
    found, counts = np.unique(packed(pixels), return_counts=True)
    ordered = (int(colour) for colour in found[np.argsort(-counts, kind="stable")])
    return [(colour >> 16, colour >> 8 & 255, colour & 255) for colour in ordered]
