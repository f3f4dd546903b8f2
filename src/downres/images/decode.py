"""From an image file to pixels: one decoder for every way into downres."""

import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from . import arrays
from .encoded import Encoded
from .unreadable import MAX_PIXELS, Unreadable

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jfif", ".jpe", ".pgm", ".pbm", ".pnm", ".avif",
    ".npy",
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


logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it prints of TIFFs that it leaves to others
_NPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
Source = str | os.PathLike[str] | Encoded
"""A file, or a picture inside one."""
_STRIP = 1 << 20
"""Pixels that are converted at a time."""


def decode(path: Source, channels: int = 3) -> np.ndarray:
    """The first picture in a file, or in a part of one, upright as its EXIF orientation says.

    channels: of the network that it is for. For three, uint8 (H, W, 3): grey is repeated, transparency dropped. For one, grey
    is uint8 (H, W) and colours are (H, W, 3). For four, uint8 (H, W, 4): only files with transparency. 16-bit grey is scaled
    by 255/65535. A TIFF of 16 bits, or whose channels are no colours, and .npy are not scaled: uint8, uint16 or float32 (H, W)
    or (H, W, channels). Raises Unreadable when the file is missing, unreadable, not an image, broken, of other channels, too
    large for the memory, or has more than MAX_PIXELS (known from the header alone).
    """
    try:
        with _opened(path) as file:
            start = file.read(8)
            file.seek(0)
            if start.startswith(_NPY):
                return arrays.npy(file, channels)
            try:
                return _decode_open(file, channels, start.startswith(_TIFF))
            except _Numbers:
                file.seek(0)
                return arrays.tiff(file, channels)
    except MemoryError:
        raise Unreadable("too large for the memory") from None


def size_of(path: Source) -> tuple[int, int] | None:
    """(width, height) by the header of a picture; None where it is none, or has them elsewhere."""
    try:
        with _opened(path) as file, _open_header(file) as image:
            return image.size
    except Exception:  # whatever the file is: it is said when it is decoded
        return None


class _Numbers(Exception):
    """A TIFF that PIL reads not at all, or with fewer bits than it has."""


class _Bounded(io.BufferedReader):
    """A file of which no more is read than it has: a broken length would be reserved in memory before a byte is there."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 0:
            size = min(size, max(0, self.length - self.tell()))
        return super().read(size)


def why_no_image(path: str | os.PathLike[str]) -> str | None:
    """Why a file, whatever its ending, is no image of a format that is read; None where it is one. Its header alone is read."""
    try:
        with _opened(path) as file:
            if file.peek(8).startswith(_NPY):
                return None
            with _open_header(file):
                return None
    except Unreadable as reason:
        return str(reason)
    except Exception:  # whatever stands in a file that nobody called an image
        return "not an image"


@contextmanager
def _opened(path: Source) -> Iterator[_Bounded | io.BufferedReader]:
    """A regular file that is not empty; else, and for what goes wrong with it until the block ends, Unreadable."""
    try:
        if isinstance(path, Encoded):
            yield io.BufferedReader(io.BytesIO(path.read()))
            return
        path = Path(path)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
            raise Unreadable("a folder" if stat.S_ISDIR(mode) else "not a regular file")
        with _Bounded(path) as file:
            if file.length == 0:
                raise Unreadable("empty file")
            yield file
    except FileNotFoundError:
        raise Unreadable("no such file") from None
    except PermissionError:
        raise Unreadable("permission denied") from None
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be read") from None


def _decode_open(file: BinaryIO, channels: int, tiff: bool) -> np.ndarray:
    try:
        image = _open_header(file)
    except Unreadable as error:
        if tiff and str(error) == "not an image":
            raise _Numbers from None
        raise
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Unreadable(f"{width * height / 1e6:.1f} megapixels, more than {MAX_PIXELS // 10**6}")
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _are_numbers(image, channels):
            raise _Numbers
        try:
            image.load()
            return _as_array(_upright(image), channels, tiff)
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


def _are_numbers(image: TiffImagePlugin.TiffImageFile, channels: int) -> bool:
    """Whether PIL would lose bits or channels of it: of 16-bit colours, more samples than its mode has, pages as channels."""
    bits, samples = image.tag_v2.get(258, (1,)), image.tag_v2.get(277, 1)
    pages = channels not in (1, 3) and getattr(image, "n_frames", 1) == channels
    return pages or samples not in (len(image.getbands()), 1) or (samples > 1 and bits[0] == 16)


def _as_array(image: Image.Image, channels: int, numbers: bool) -> np.ndarray:
    """As `decode` says; what is grey is repeated without a copy. numbers: whether 16 bits are left as they are."""
    if image.mode == "F":
        raise Unreadable("floating-point pixels")
    transparent = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    wide = image.mode == "I" or image.mode.startswith("I;16")
    if wide and image.mode != "I" and numbers and channels in (1, 3):
        return np.asarray(image).astype(np.uint16)  # in the order of this machine's bytes
    if channels not in (1, 3) and not (channels == 4 and transparent and not wide):
        has = 1 if wide or image.mode in ("1", "L") else 4 if transparent else 3
        raise Unreadable(f"{has} channel{'s' * (has > 1)}, the network takes {channels}")
    if wide or (image.mode in ("1", "L", "LA") and channels != 4):
        grey = _from_16_bits(image) if wide else np.asarray(image if image.mode == "L" else image.convert("L"))
        return grey if channels == 1 else np.broadcast_to(grey[:, :, None], (*grey.shape, 3))
    if image.mode == "PA" or "transparency" in image.info:  # straight to RGB, PIL warns about the palette
        image = image.convert("RGBA")
    wanted = "RGBA" if channels == 4 else "RGB"
    return np.asarray(image if image.mode == wanted else image.convert(wanted))


def _from_16_bits(image: Image.Image) -> np.ndarray:
    """Rounded to 8 bits, strip by strip; `Image.convert` would clip at 255 and turn nearly all of the picture white."""
    grey = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if strip.min() < 0 or strip.max() > 65535:
            raise Unreadable("32-bit pixels outside 0 to 65535")
        grey[top : top + rows] = (strip.astype(np.uint32) * 255 + 32767) // 65535
    return grey
