"""Decoded pictures: kept as raw pixels, so that many resolutions can be measured after decoding once."""

import errno
import mmap
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import numpy as np

from ..errors import DownresError
from ..parse import format_quantity
from ..records import Record
from .decode import Unreadable, decode

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""

_Read = Callable[[str | os.PathLike[str]], np.ndarray]
_Outcome = tuple[np.ndarray, int] | Unreadable
"""Of decoding a file: the picture and its checksum, or the reason why there is none."""


@dataclass(frozen=True)
class Skip(Record):
    """A file that was left out, by its name in the data set, and why: 'truncated', 'empty file'."""

    path: str
    reason: str


class Images(Sequence[np.ndarray]):
    """A sequence of pictures, each uint8 (H, W, 3) or (H, W). Sizes may differ.

    names: one a picture, a path relative to the data folder or 'photo 12'. checksums: where they are known already.
    """

    def __init__(self, pictures: Sequence[np.ndarray], names: Sequence[str], checksums: Sequence[int] | None = None) -> None:
        if len(pictures) != len(names):
            raise DownresError(f"{len(pictures)} images need as many names, not {len(names)}: give one name for each image.")
        self._pictures = pictures
        self.names = list(names)
        self._checksums = None if checksums is None else list(checksums)

    @property
    def checksums(self) -> list[int]:
        """CRC-32 of each picture's shape and pixels; where not given, computed when first asked for."""
        if self._checksums is None:
            self._checksums = [_checksum(picture) for picture in self._pictures]
        return self._checksums

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # one at a time: no slices
        return self._pictures[index]


def from_arrays(array: np.ndarray, names: Sequence[str] | None = None) -> Images:
    """Pictures that are in memory already, not copied: uint8 (n, H, W), (n, H, W, 1) or (n, H, W, 3)."""
    if array.dtype != np.uint8 or not (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))):
        raise DownresError(
            f"Images are uint8 arrays (n, height, width) or (n, height, width, 3), not {array.dtype} {array.shape}: "
            "convert them to 0–255 and put the channels last."
        )
    if names is None:
        names = [f"photo {i}" for i in range(len(array))]
    return Images(list(array), names)


def from_files(
    paths: Sequence[str | os.PathLike[str]],
    names: Sequence[str],
    progress: Progress | None = None,
    workers: int = 2,
    read: _Read | None = None,
    stage: str = "decoding",
) -> tuple[Images, list[Skip]]:
    """Decode every file once, in `workers` threads, in order; the unreadable ones come back as Skips.

    read: instead of `decode`, for files that are no photographs; raises Unreadable as it does. stage: for `progress`.
    The pixels are in a temporary file without a name, mapped into memory: as fast as memory while it fits, and bounded
    by the disk and not by memory when it does not. Raises DownresError when that disk is full.
    """
    kept: list[int] = []
    shapes: list[tuple[int, ...]] = []
    checksums: list[int] = []
    skipped: list[Skip] = []
    written = 0
    with tempfile.TemporaryFile(buffering=0) as file:
        for i, outcome in enumerate(_decode_in_order(paths, workers, read or decode)):
            if isinstance(outcome, Unreadable):
                skipped.append(Skip(names[i], str(outcome)))
            else:
                picture, checksum = outcome
                written += picture.nbytes
                _write(file, picture, needed=written * len(paths) // (i + 1))
                kept.append(i)
                shapes.append(picture.shape)
                checksums.append(checksum)
            if progress is not None:
                progress(stage, i + 1, len(paths))
        # The mapping keeps the file alive after its descriptor is closed; an empty file cannot be mapped.
        pixels = np.frombuffer(mmap.mmap(file.fileno(), 0) if written else b"", np.uint8)
    return Images(_cut(pixels, shapes), [names[i] for i in kept], checksums), skipped


def _decode_in_order(paths: Sequence[str | os.PathLike[str]], workers: int, read: _Read) -> Iterator[_Outcome]:
    """The outcome for each path. At most 2 · workers pictures wait, so memory stays bounded."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="downres-decode")
    todo = iter(paths)
    try:
        waiting: deque[Future[_Outcome]] = deque(
            pool.submit(_decode_or_reason, path, read) for path in islice(todo, 2 * workers)
        )
        while waiting:
            outcome = waiting.popleft().result()
            waiting.extend(pool.submit(_decode_or_reason, path, read) for path in islice(todo, 1))
            yield outcome
    finally:  # also after Ctrl-C: nothing that has not begun is decoded any more
        pool.shutdown(wait=True, cancel_futures=True)


def _decode_or_reason(path: str | os.PathLike[str], read: _Read) -> _Outcome:
    try:
        picture = read(path)
    except Unreadable as reason:
        return reason
    return picture, _checksum(picture)


def _checksum(picture: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(picture).data, zlib.crc32(repr(picture.shape).encode()))


def _write(file: BinaryIO, pixels: np.ndarray, needed: int) -> None:
    """Append the pixels; `needed` is the estimate, in bytes, for the whole data set."""
    left = np.ascontiguousarray(pixels).data.cast("B")
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DownresError(
            f"The disk for temporary files ({tempfile.gettempdir()}) is full: the decoded images need about "
            f"{format_quantity(needed, 'B')} ({needed} bytes); point TMPDIR to a larger disk or give fewer images."
        ) from None


def _cut(pixels: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Views of the flat bytes, one of each shape, in a row."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes], dtype=np.int64)
    return [pixels[end - int(np.prod(shape)) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]
