"""From an image file to pixels: one decoder for every way into downres. PIL and NumPy only."""

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused from their header; the same number as PIL's own decompression-bomb threshold."""

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jfif", ".jpe", ".pgm", ".pbm", ".pnm", ".avif",
)  # fmt: skip
"""Endings, in lower case, of the files that count as images; of any other ending the content decides, see `why_no_image`."""

# Named so that no other PIL plugin (EPS would start Ghostscript) ever sees a file, whatever its ending.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transposition that undoes it."""

# `warnings.catch_warnings` swaps process-wide state; threads that decode at the same time must take turns in it.
_header_lock = threading.Lock()


class Unreadable(Exception):
    """A file that gives no picture. Its text is the short reason: 'empty file', 'not an image', 'truncated'."""


def decode(path: str | os.PathLike[str]) -> np.ndarray:
    """The first picture in a file as uint8 (height, width, 3), upright as its EXIF orientation says.

    Grey is repeated, transparency is dropped, 16-bit grey is scaled by 255/65535. Raises Unreadable when the file
    is missing, unreadable, not an image, broken, or has more than MAX_PIXELS (known from the header alone).
    """
    with _opened(path) as file:
        return _decode_open(file)


def why_no_image(path: str | os.PathLike[str]) -> str | None:
    """Why a file, whatever its ending, is no image of a format that is read; None where it is one. Its header alone is read."""
    try:
        with _opened(path) as file, _open_header(file):
            return None
    except Unreadable as reason:
        return str(reason)
    except Exception:  # whatever stands in a file that nobody called an image
        return "not an image"


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A regular file that is not empty; else, and for what goes wrong with it until the block ends, Unreadable."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
            raise Unreadable("a folder" if stat.S_ISDIR(mode) else "not a regular file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise Unreadable("empty file")
            yield file
    except FileNotFoundError:
        raise Unreadable("no such file") from None
    except PermissionError:
        raise Unreadable("permission denied") from None
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be read") from None


def _decode_open(file: BinaryIO) -> np.ndarray:
    with _open_header(file) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Unreadable(f"{width * height / 1e6:.1f} megapixels, more than {MAX_PIXELS // 10**6}")
        try:
            image.load()
            return _to_rgb(_upright(image))
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # what PIL's decoders raise on broken data is not limited to any list
            cut_short = isinstance(error, EOFError) or "truncated" in str(error).lower()
            raise Unreadable("truncated" if cut_short else "broken") from None


def _open_header(file: BinaryIO) -> Image.Image:
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked by our own limit, broken metadata is no one's concern
        try:
            return Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError:
            raise Unreadable(f"far more than {MAX_PIXELS // 10**6} megapixels") from None
        except UnidentifiedImageError:
            raise Unreadable("not an image") from None
        except (MemoryError, OSError):
            raise
        except Exception:  # a header cut in the middle
            raise Unreadable("broken") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        orientation = 1
    transposition = _TRANSPOSITIONS.get(orientation)
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = _from_16_bits(np.array(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise Unreadable("floating-point pixels")
    if image.mode == "PA" or "transparency" in image.info:  # straight to RGB, PIL warns about the palette
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _from_16_bits(grey: np.ndarray) -> np.ndarray:
    """Rounded to 8 bits; `Image.convert` would clip at 255 and turn nearly all of the picture white."""
    wide = grey.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise Unreadable("32-bit pixels outside 0 to 65535")
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)
