"""Decoded pictures: kept as raw pixels within a bounded cache, so that many resolutions can be measured after decoding once."""

import functools
import hashlib
import math
import mmap
import os
import shutil
import tempfile
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..engines import check_threads
from ..errors import NO_SPACE, DownresError
from ..parse import format_quantity
from ..records import Record
from .decode import Source, decode, size_of
from .unreadable import Unreadable

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""

_Read = Callable[[Any], np.ndarray]
_PART = 1 << 24
"""Bytes of a picture that are written or summed at a time."""
_LOOKED_AT = 100
"""Headers that are read to know how much space all pictures need."""
_Outcome = tuple[np.ndarray, int] | Unreadable
"""Of decoding a file: the picture and its checksum, or the reason why there is none."""


@dataclass(frozen=True)
class Skip(Record):
    """A file that was left out, by its name in the data set, and why: 'truncated', 'empty file'."""

    path: str
    reason: str


def fingerprint(images: "Images", targets: bytes, indices: Sequence[np.ndarray], masks: "Images | None" = None) -> str:
    """SHA-256, in hex, of names and checksums of the pixels (and those of masks), of what is asked of them, and of arrays of
    indices.
    """
    digest = hashlib.sha256()
    checksums = (images.checksums,) if masks is None else (images.checksums, masks.checksums)
    for name, *of in zip(images.names, *checksums, strict=True):
        digest.update("\0".join([name, *map(str, of)]).encode(errors="surrogatepass") + b"\n")
    digest.update(targets)
    for array in indices:
        digest.update(f"\n{len(array)}\n".encode() + array.astype("<i8").tobytes())
    return digest.hexdigest()


class Pictures(Sequence[np.ndarray], ABC):
    """Pictures that are somewhere else until they are looked at. shapes: of each; take: those, in that order."""

    @property
    @abstractmethod
    def shapes(self) -> Sequence[tuple[int, ...]]: ...
    @abstractmethod
    def take(self, indices: Sequence[int]) -> "Pictures": ...


class Images(Sequence[np.ndarray]):
    """A sequence of pictures, each (H, W) or (H, W, C), uint8 or, of no colours, uint16 or float32. Sizes may differ.

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

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of each picture; no file is decoded for it."""
        if isinstance(self._pictures, Pictures):
            return self._pictures.shapes
        return [picture.shape for picture in self._pictures]

    def take(self, indices: Sequence[int] | np.ndarray) -> "Images":
        """Those pictures, in that order; no file is decoded and nothing copied for it."""
        chosen = [int(i) for i in indices]
        if isinstance(self._pictures, Pictures):
            pictures: Sequence[np.ndarray] = self._pictures.take(chosen)
        else:
            pictures = [self._pictures[i] for i in chosen]
        checksums = None if self._checksums is None else [self._checksums[i] for i in chosen]
        return Images(pictures, [self.names[i] for i in chosen], checksums)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # one at a time: no slices
        return self._pictures[index]


class _File(NamedTuple):
    """A file that was decoded once; start: of its pixels in the cache, bytes, or None where they are not in it."""

    path: Source
    shape: tuple[int, ...]
    checksum: int
    start: int | None
    dtype: np.dtype


class _Decoded(Pictures):
    """Pictures of files, each decoded once: from the cache those that are in it, the others from their files again.

    What is in the cache stays there. Every state of a network looks at the same images in the same order, so of a cache that
    drops what was used longest ago each image would be gone just before it is needed again. Nothing here changes, so
    threads may read at the same time.
    """

    def __init__(self, files: list[_File], pixels: np.ndarray, read: _Read) -> None:
        self.files, self._pixels, self._read = files, pixels, read

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [file.shape for file in self.files]

    def take(self, indices: Sequence[int]) -> "_Decoded":
        return _Decoded([self.files[i] for i in indices], self._pixels, self._read)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        file = self.files[index]
        if file.start is not None:
            end = file.start + math.prod(file.shape) * file.dtype.itemsize
            return self._pixels[file.start : end].view(file.dtype).reshape(file.shape)
        outcome = _decode_or_reason(file.path, self._read)
        if isinstance(outcome, Unreadable) or outcome[1] != file.checksum:
            why = str(outcome) if isinstance(outcome, Unreadable) else "other pixels"
            raise DownresError(f"The file {file.path} changed while it was in use ({why}): run again once the data rest.")
        return outcome[0]


def from_arrays(array: np.ndarray, names: Sequence[str] | None = None) -> Images:
    """Pictures that are in memory already, not copied: (n, H, W) or (n, H, W, C), uint8, or numbers of uint16 or float32."""
    channels_first = array.ndim == 4 and array.shape[1] in (1, 3, 4) and array.shape[3] not in (1, 3, 4)
    if array.dtype not in (np.uint8, np.uint16, np.float32) or array.ndim not in (3, 4) or channels_first:
        raise DownresError(
            "Images are arrays (n, height, width) or (n, height, width, channels) of uint8, uint16 or float32, not "
            f"{array.dtype} {array.shape}: convert them, and put the channels last."
        )
    if names is None:
        names = [f"photo {i}" for i in range(len(array))]
    return Images(list(array), names)


def cache_bytes(cache_gb: float | None = None) -> int:
    """How much of decoded images this process may keep: of what is asked for, or of half of what is free where temporary files
    go, its share where several train together on this machine.
    """
    if cache_gb is None:
        return shutil.disk_usage(tempfile.gettempdir()).free // 2 // processes()
    if not 0 <= cache_gb < math.inf:
        raise DownresError(f"The cache of decoded images has 0 GB or more, {cache_gb} cannot be: give for example 10.")
    return int(cache_gb * 1e9) // processes()


def processes() -> int:
    """That train together on this machine, see `recovery/team.py`."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"))


def helpers() -> int:
    """Threads that decode and resize beside a network: this process's share of the cores, as a GPU eats more than two make."""
    return max(2, min(16, check_threads(None) // processes()))


def from_files(
    paths: Sequence[Source],
    names: Sequence[str],
    progress: Progress | None = None,
    workers: int | None = None,
    read: _Read | None = None,
    stage: str = "decoding",
    cache: int | None = None,
    first: Sequence[int] | np.ndarray = (),
    channels: int = 3,
) -> tuple[Images, list[Skip]]:
    """Decode every file once, in `workers` threads, else `helpers()`; images in the order of the files, the unreadable ones as
    Skips.

    read: instead of `decode`, for files that are no photographs; raises Unreadable as it does. stage: for `progress`.
    cache: bytes of pixels that are kept at most, None for `cache_bytes()`; what does not fit is decoded again each time it
    is asked for, and a warning says so, before anything is decoded too. first: indices of the files that are to be kept before
    the others. channels: for `decode`.
    The pixels are in a temporary file without a name, mapped into memory: as fast as memory while it fits, and bounded
    by the disk and not by memory when it does not.
    """
    limit = cache_bytes() if cache is None else cache
    if read is None:
        _say_what_is_needed(paths, channels, limit)
        read = decode if channels == 3 else functools.partial(decode, channels=channels)
    rest = np.ones(len(paths), bool)
    rest[np.asarray(first, np.int64)] = False
    order = [*map(int, first), *map(int, np.flatnonzero(rest))]
    found: dict[int, _File] = {}
    skipped: dict[int, Skip] = {}
    written = total = 0
    with tempfile.TemporaryFile(buffering=0) as file:
        outcomes = _decode_in_order([paths[i] for i in order], workers or helpers(), read)
        for done, (i, outcome) in enumerate(zip(order, outcomes, strict=True), 1):
            if isinstance(outcome, Unreadable):
                skipped[i] = Skip(names[i], str(outcome))
            else:
                picture, checksum = outcome
                total += picture.nbytes
                start = None
                if written + picture.nbytes <= limit:
                    if _write(file, picture):
                        start, written = written, written + picture.nbytes
                    else:  # the disk is full: what is there stays, half a picture goes
                        limit = written
                        file.seek(written)
                found[i] = _File(paths[i], picture.shape, checksum, start, picture.dtype)
            if progress is not None:
                progress(stage, done, len(paths))
        # The mapping keeps the file alive after its descriptor is closed; an empty file cannot be mapped.
        if written:
            file.truncate(written)
        pixels = np.frombuffer(mmap.mmap(file.fileno(), written) if written else b"", np.uint8)
    kept = sorted(found)
    again = sum(found[i].start is None for i in kept)
    if again:
        warnings.warn(
            f"{len(kept)} decoded images need {format_quantity(total, 'B')} and the cache for them has "
            f"{format_quantity(limit, 'B')}: {again} of them are decoded again each time they are looked at, which costs "
            "time and changes no number; give more with `cache_gb`, or point TMPDIR to a larger disk.",
            stacklevel=2,
        )
    files = _Decoded([found[i] for i in kept], pixels, read)
    return Images(files, [names[i] for i in kept], [found[i].checksum for i in kept]), [skipped[i] for i in sorted(skipped)]


def _decode_in_order(paths: Sequence[Source], workers: int, read: _Read) -> Iterator[_Outcome]:
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


def _decode_or_reason(path: Source, read: _Read) -> _Outcome:
    try:
        picture = read(path)
    except Unreadable as reason:
        return reason
    except MemoryError:  # of this file: the next may be smaller
        return Unreadable("too large for the memory")
    return picture, _checksum(picture)


def _checksum(picture: np.ndarray) -> int:
    found = zlib.crc32(repr(picture.shape).encode())
    for part in _parts(picture):
        found = zlib.crc32(part, found)
    return found


def _parts(picture: np.ndarray) -> Iterator[memoryview]:
    """The bytes of a picture in order, some rows at a time: a view that repeats its channels is never whole in memory."""
    rows = max(1, _PART * len(picture) // max(1, picture.nbytes))
    for top in range(0, len(picture), rows):
        yield np.ascontiguousarray(picture[top : top + rows]).data.cast("B")


def _say_what_is_needed(paths: Sequence[Source], channels: int, limit: int) -> None:
    """A warning where the headers of some of the files say that the pictures will not fit into the cache, or onto its disk."""
    some = [paths[i] for i in np.linspace(0, len(paths) - 1, min(len(paths), _LOOKED_AT)).astype(int)]
    sizes = [size for path in some if (size := size_of(path)) is not None]
    if not sizes:
        return
    needed = sum(width * height for width, height in sizes) * max(channels, 1) // len(some) * len(paths)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > min(limit, free):
        warnings.warn(
            f"By their headers {len(paths)} images need about {format_quantity(needed, 'B')} decoded, the cache for them may "
            f"have {format_quantity(limit, 'B')} of the {format_quantity(free, 'B')} that are free in {folder}: what does not "
            "fit is decoded again each time.",
            stacklevel=3,
        )


def _write(file: BinaryIO, pixels: np.ndarray) -> bool:
    """Append the pixels; False where the disk is full before they are all there."""
    try:
        for left in _parts(pixels):
            while left:
                left = left[file.write(left) :]
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return False
    return True
