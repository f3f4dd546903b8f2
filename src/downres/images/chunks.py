"""Pictures on their way to another machine: in chunks of a few megabytes, each fetched when a picture in it is looked at."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from .images import Images, Pictures

CHUNK_BYTES = 1 << 23
"""Of pictures in a chunk, about."""
_HELD = 4
"""Chunks that are in a reader's hands at once."""


@dataclass(frozen=True)
class Chunk:
    """Some pictures one after the other in `pixels`, uint8; of each the start in bytes, the shape and the kind of number."""

    pixels: np.ndarray
    parts: tuple[tuple[int, tuple[int, ...], str], ...]

    @classmethod
    def of(cls, pictures: Sequence[np.ndarray]) -> "Chunk":
        starts = np.cumsum([0, *(picture.nbytes for picture in pictures)])
        pixels = np.concatenate([np.ascontiguousarray(picture).reshape(-1).view(np.uint8) for picture in pictures])
        parts = zip(starts.tolist(), pictures, strict=False)
        return cls(pixels, tuple((start, picture.shape, picture.dtype.str) for start, picture in parts))

    def __getitem__(self, place: int) -> np.ndarray:
        start, shape, kind = self.parts[place]
        dtype = np.dtype(kind)
        return self.pixels[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Division:
    """Which chunk, and where in it, each of n pictures is: as `order` has them, `each` in a chunk."""

    places: np.ndarray
    each: int

    @classmethod
    def of(cls, images: Images, order: np.ndarray) -> "Division":
        """order: all indices, those that are looked at together beside each other."""
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return cls(places, max(1, CHUNK_BYTES // max(1, images[int(order[0])].nbytes)) if len(order) else 1)

    def chunks(self, indices: np.ndarray) -> list[int]:
        """The chunks that have these pictures."""
        found: list[int] = np.unique(self.places[indices] // self.each).tolist()
        return found

    def inside(self, chunk: int) -> np.ndarray:
        """Indices of the pictures in a chunk, in its order."""
        return self._order[chunk * self.each : (chunk + 1) * self.each]

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.places)


class Chunked(Pictures):
    """The pictures of chunks that `fetch` gets by their numbers; shapes: of each picture. Threads may read at the same time."""

    def __init__(self, division: Division, shapes: Sequence[tuple[int, ...]], fetch: Callable[[int], Chunk]) -> None:
        self.division, self._shapes, self.fetch = division, shapes, fetch
        self._got = lru_cache(_HELD)(fetch)

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return self._shapes

    def take(self, indices: Sequence[int]) -> "Chunked":
        chosen = Division(self.division.places[np.asarray(indices, np.int64)], self.division.each)
        return Chunked(chosen, [self._shapes[i] for i in indices], self.fetch)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # one at a time: no slices
        chunk, place = divmod(int(self.division.places[index]), self.division.each)
        return self._got(chunk)[place]
