"""What a network did on a row of images: arrays with one entry an image, which add up, can be kept and cut."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np


class Evidence(Protocol):
    """What a task keeps of a network's answers, image by image, and all that its quality and verdicts are computed from."""

    def __len__(self) -> int: ...
    def select(self, images: np.ndarray) -> Any: ...
    def to_arrays(self) -> dict[str, np.ndarray]: ...
    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self: ...
    @classmethod
    def concatenate(cls, parts: Sequence[Any]) -> Self: ...


class Arrays(dict[str, np.ndarray]):
    """The plain kind of evidence: arrays by name, each with the images along its first axis."""

    def __len__(self) -> int:
        return len(next(iter(self.values())))

    def select(self, images: np.ndarray) -> "Arrays":
        """Those images, in that order."""
        return Arrays({name: values[images] for name, values in self.items()})

    def to_arrays(self) -> dict[str, np.ndarray]:
        return dict(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        return cls(arrays)

    @classmethod
    def concatenate(cls, parts: Sequence["Arrays"]) -> Self:
        return cls({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
