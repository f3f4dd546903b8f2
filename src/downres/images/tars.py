"""Where the pictures in a tar are: WebDataset shards, a tar of class folders, ImageNet's tar of tars. Nothing is unpacked.

The standard library's tarfile reads the headers, once (see `index.index_of`); a picture is then read from its offset. The
library webdataset, whose layout this is, only streams: it has no access by index, without which a proof of some of the images
would read all of them.
"""

import json
import posixpath
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..errors import DownresError
from .decode import EXTENSIONS
from .encoded import MOST_BYTES
from .index import NO_LABEL, SEVERAL, Index, Indexer
from .parts import is_hidden

JSON_LABELS = ("label", "cls", "class_id", "class", "target")
"""Fields of a sample's .json that may hold its label, where it has no .cls."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MOST_LABEL, _MOST_JSON = 1000, 1 << 20
"""Bytes of a label's file that are read."""
_TWO = re.compile(r"-?\d+([\s,;]+-?\d+)+")


def scan(path: Path) -> Index:
    """The index of a tar, by its headers and the labels' files alone.

    A sample is, as in WebDataset, the files one after the other that have one name up to its first dot: its picture, and its
    label in .cls or in a field of .json. Where no sample has a label, that of a picture is the folder that it is in; a tar in
    the tar is a folder of its name. What is no picture, or has no place in a sample, is left out and counted.
    Raises DownresError for a compressed tar, or what is none.
    """
    made = Indexer()
    with open(path, "rb") as file:
        _refuse_compressed(path, file)
        samples = _Samples(made)
        try:
            _read(file, samples, "", 0, path.name)
        except tarfile.TarError as error:
            raise DownresError(f"{path} is no tar ({error}): make it again, or take it out of the data.") from None
    samples.end()
    return made.done()


def _refuse_compressed(path: Path, file: IO[bytes]) -> None:
    start = file.read(6)
    file.seek(0)
    how = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if how is not None:
        raise DownresError(
            f"{path} is compressed by {how}, and no picture in it can be read without all before it: unpack the {how} alone "
            "and give the plain .tar, whose pictures are compressed already."
        )


class _Samples:
    """Gathers the files of a tar into samples, and samples into an index."""

    def __init__(self, made: Indexer) -> None:
        self.made = made
        self._key: str | None = None
        self._pictures: list[tuple[str, int, int]] = []  # name, start, length
        self._others: list[str] = []
        self._cls: list[str | int] = []
        self._json: list[str | int] = []

    def add(self, name: str, start: int, length: int, read: Callable[[int], bytes]) -> None:
        """One file, by its name in the whole. read: gives so many of its first bytes."""
        folder, slash, base = name.rpartition("/")
        stem, _, ending = base.lower().partition(".")
        key = folder + slash + base[: len(stem)]
        if key != self._key:
            self.end()
            self._key = key
        if f".{ending.rpartition('.')[2]}" in EXTENSIONS:
            if any(name == other for other, *_ in self._pictures):
                self.made.leave_out(name, "the same name again")
            elif length > MOST_BYTES:
                self.made.leave_out(name, "larger than any picture")
            else:
                self._pictures.append((name, start, length))
        elif ending == "cls":
            self._cls.append(_text(read(_MOST_LABEL)))
        elif ending == "json" and length <= _MOST_JSON:
            self._json.append(_of_json(read(_MOST_JSON)))
        else:
            self._others.append(name)

    def end(self) -> None:
        """The sample that is gathered is whole."""
        # Beside x.jpg there may be x.seg.png, its mask, and x.npy.
        plain = [one for one in self._pictures if one[0].rpartition("/")[2].count(".") == 1]
        if plain:
            self._others += [name for name, *_ in self._pictures if not any(name == kept for kept, *_ in plain)]
        pictures = [one for one in plain if not one[0].lower().endswith(".npy")] or plain or self._pictures
        cls, told, others, key = self._cls, self._json, self._others, self._key or ""
        self._pictures, self._cls, self._json, self._others, self._key = [], [], [], [], None
        labels = {label for label in cls or told if label != NO_LABEL}
        if cls and all(_is_number(label) for label in [*cls, *told]):
            labels |= set(told)
        if not pictures:
            if cls or told:
                self.made.leave_out(key, "a label without an image")
            for name in others:
                self.made.leave_out(name, "no image")
        elif len(pictures) > 1 and labels:
            self.made.leave_out(key, "several images under one key")
        else:
            label = NO_LABEL if not labels else labels.pop() if len(labels) == 1 else SEVERAL
            for name, start, length in pictures:
                own = key if len(pictures) == 1 else name.rpartition(".")[0]
                self.made.add(name, own, start, length, label, name.rpartition("/")[0])


def _read(file: IO[bytes], samples: _Samples, prefix: str, offset: int, what: str) -> None:
    """One tar, or one inside another, whose first byte is `offset` in the whole. what: its name, for what is said of it."""
    made = samples.made
    tar = tarfile.open(fileobj=file, mode="r:")
    length, at = file.seek(0, 2), -1
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # which it keeps all
            if tar.offset <= at or member.size < 0:  # a broken header may lead back
                raise tarfile.ReadError("a broken header")
            at = tar.offset
            name = prefix + posixpath.normpath("/" + member.name).lstrip(
                "/"
            )  # nothing is unpacked: a way out is a name like others
            if member.isdir() or any(map(is_hidden, name.split("/"))):
                continue
            if not member.isreg() or member.issparse():
                made.leave_out(name, "a link, or another thing that is no file")
            elif member.offset_data + member.size > length:
                made.leave_out(name, "truncated")
            elif name.lower().endswith(".tar") and not prefix:
                samples.end()
                with tar.extractfile(member) as inner:  # type: ignore[union-attr]  # a regular file has one
                    _read(inner, samples, name[:-4] + "/", offset + member.offset_data, name)
                samples.end()
            else:
                data, size = member.offset_data, member.size

                def first(count: int, data: int = data, size: int = size) -> bytes:
                    file.seek(data)
                    return file.read(min(count, size))

                samples.add(name, offset + data, size, first)
        file.seek(max(at, 0))
        rest = file.read(2 * tarfile.RECORDSIZE)
        if len(rest) < tarfile.BLOCKSIZE:
            made.leave_out(what, "the end of the archive is missing: it may be truncated")
        elif rest[: tarfile.BLOCKSIZE].strip(b"\0"):
            made.leave_out(what, "broken, what follows is lost")
        elif rest.strip(b"\0"):
            made.leave_out(what, "more behind its end: another archive was appended")
    except tarfile.ReadError as error:
        if at < 0:
            raise
        made.leave_out(what, "truncated" if "unexpected end" in str(error) else f"broken ({error})")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, UnicodeError, MemoryError) as error:
        if at < 0:
            raise tarfile.ReadError("broken") from error
        made.leave_out(what, "broken, what follows is lost")


def _text(content: bytes) -> str | int:
    text = content.decode("utf-8-sig", errors="replace").strip()
    return SEVERAL if _TWO.fullmatch(text) else text or NO_LABEL


def _of_json(content: bytes) -> str | int:
    """The label in a sample's .json, which may have all kinds of things in it."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return NO_LABEL
    value = next((told[name] for name in JSON_LABELS if told.get(name) is not None), None) if isinstance(told, dict) else told
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else SEVERAL if value else None
        if value == SEVERAL:
            return SEVERAL
    if isinstance(value, bool) or value is None or isinstance(value, (dict, list)):
        return NO_LABEL
    return str(value).strip() or NO_LABEL


def _is_number(label: str | int) -> bool:
    return isinstance(label, str) and label.lstrip("-").isdecimal()
