"""A picture that is a part of a larger file: what `decode` takes in place of a file of its own."""

from abc import ABC, abstractmethod
from pathlib import Path

from .unreadable import Unreadable

MOST_BYTES = 1 << 30
"""Of one encoded picture; more is read of none, whatever an archive says of its length."""


class Encoded(ABC):
    """The bytes of a picture file, wherever they are. Reading may be done by several threads at a time."""

    name: str

    @abstractmethod
    def read(self) -> bytes:
        """All of them. Raises OSError or Unreadable."""


class Member(Encoded):
    """`length` bytes of a file from byte `start` on, as a tar holds them: nothing is unpacked."""

    __slots__ = ("length", "name", "path", "start")

    def __init__(self, path: Path, start: int, length: int, name: str) -> None:
        self.path, self.start, self.length, self.name = path, start, length, name

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def read(self) -> bytes:
        if self.length == 0:
            raise Unreadable("empty file")
        with open(self.path, "rb") as file:
            file.seek(self.start)
            found = file.read(self.length)
        if len(found) < self.length:
            raise Unreadable("truncated")
        return found
