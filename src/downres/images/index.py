"""What is in a file of many pictures: where each begins, its name, its label. Made once, kept with the user's other caches."""

import hashlib
import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .images import Skip
from .parts import parts_among
from .split import digest

NO_LABEL, SEVERAL = -1, -2
"""In the place of a label's number: the picture has none, or it has two that differ."""
NAMED = 20
"""Members left out that are named in each file; all are counted."""
_FORMAT = "2"
_PARTS = {"train": 1, "val": 2}
OTHER = 3
"""In the place of a part's number: the picture is in one that is not used."""


class Index(NamedTuple):
    """The n pictures in one file. No picture is decoded for it.

    digests: uint64 (n,), of their keys. labels: int32 (n,), numbers into `words`, or NO_LABEL or SEVERAL. parts: int8 (n,), 1
    for a picture below a folder that is called as one to fit on, 2 to test on, else 0. start, length: where it is; of a tar in
    bytes, of columns (the group of rows, the row in it). names: all names one after the other as UTF-8, ends: where each ends.
    words: what the labels are, as text. classes: names of numbered labels, where the file has them. by_folder: whether no
    picture has a label, and `words` are the folders inside, which `of_folders` reads. left_out: some of the members that are no
    pictures, counts: why, and how many.
    """

    digests: np.ndarray
    labels: np.ndarray
    parts: np.ndarray
    start: np.ndarray
    length: np.ndarray
    ends: np.ndarray
    names: np.ndarray
    words: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    by_folder: bool = False
    left_out: tuple[Skip, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()

    def name(self, i: int) -> str:
        first = int(self.ends[i - 1]) if i else 0
        return self.names[first : int(self.ends[i])].tobytes().decode(errors="surrogateescape")


_ARRAYS = Index._fields[:7]


class Indexer:
    """Makes an Index, one picture after the other, in a few bytes for each."""

    def __init__(self) -> None:
        self._digests, self._start, self._length, self._ends = array("Q"), array("q"), array("q"), array("q")
        self._labels, self._folders = array("i"), array("i")
        self._names = bytearray()
        self._words: dict[str, int] = {}
        self._folder_numbers: dict[str, int] = {}
        self.left_out: list[Skip] = []
        self.counts: Counter[str] = Counter()
        self.classes: tuple[str, ...] = ()

    def add(self, name: str, key: str | int, start: int, length: int, label: str | int, folder: str = "") -> None:
        """key: a text, or its digest. label: a text, or NO_LABEL or SEVERAL. folder: in which it is inside the file."""
        self._digests.append(digest(key) if isinstance(key, str) else key)
        self._start.append(start)
        self._length.append(length)
        self._names += name.encode(errors="surrogateescape")
        self._ends.append(len(self._names))
        self._labels.append(label if isinstance(label, int) else self._words.setdefault(label, len(self._words)))
        self._folders.append(self._folder_numbers.setdefault(folder, len(self._folder_numbers)))

    def leave_out(self, name: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.left_out) < NAMED:
            self.left_out.append(Skip(name, reason))

    def done(self) -> Index:
        """Where no picture has a label, its label is for now the folder that it is in."""
        digests, labels, start, length, ends, names = (
            np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)
            for values, dtype in (
                (self._digests, np.uint64),
                (self._labels, np.int32),
                (self._start, np.int64),
                (self._length, np.int64),
                (self._ends, np.int64),
                (self._names, np.uint8),
            )
        )
        folder = np.array(self._folders, np.int64)
        words, paths = tuple(self._words), list(self._folder_numbers)
        by_folder = bool(len(labels)) and bool((labels == NO_LABEL).all()) and paths != [""]
        parts = np.zeros(len(labels), np.int8)
        if by_folder:
            words = tuple(path for path in paths if path)
            number = {path: i for i, path in enumerate(words)} | {"": NO_LABEL}
            labels = np.array([number[path] for path in paths], np.int32)[folder]
        elif paths:
            parts = np.array([part for _, part in of_folders(paths)], np.int8)[folder]
        counts = tuple(sorted(self.counts.items()))
        left_out = tuple(self.left_out)
        return Index(digests, labels, parts, start, length, ends, names, words, self.classes, by_folder, left_out, counts)


def of_folders(paths: Sequence[str]) -> list[tuple[str, int]]:
    """(class, part) of folders inside archives, as folders of pictures are read: what is around all is seen through, then come
    the parts, if there are any, then the class; what is below that is no matter. part: 1 to fit on, 2 to test on, OTHER of the
    parts that are not used, 0 where there are none; class: '' of pictures that are in no folder of one.
    """
    split = [path.split("/") if path else [] for path in paths]
    while all(len(names) > 1 for names in split) and len({names[0] for names in split}) == 1:
        if parts_among({names[0] for names in split}):
            break
        split = [names[1:] for names in split]
    found = parts_among({names[0] for names in split if names})
    number = {name: OTHER for some in found.values() for name in some} | {
        names[0]: _PARTS[part] for part, names in found.items()
    }
    told = []
    for names in split:
        part = number.get(names[0], 0) if names else 0
        below = names[1:] if part else names
        told.append((below[0] if below else "", part))
    return told


def index_of(file: Path, scan: Callable[[Path], Index]) -> Index:
    """The index of a file, from the cache where a file of that place, size and times was scanned before.

    The cache is in XDG_CACHE_HOME or ~/.cache, else with temporary files; where nothing can be written the file is scanned
    each time, which costs time and changes no number.
    """
    status = os.stat(file)
    # Tars of one size and a kept time may differ: when the file itself was last changed is no one's to set.
    of_file = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    what = "\0".join([_FORMAT, scan.__module__, str(file.resolve()), *map(str, of_file)])
    name = hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()[:40] + ".npz"
    folder = _folder()
    if folder is not None and (folder / name).is_file():
        try:
            return _loaded(folder / name)
        except Exception:  # whatever stands in a file that was cut or overwritten: it is made again
            pass
    found = scan(file)
    if folder is not None:
        try:
            _save(folder, name, found)
        except OSError:
            pass
    return found


def _folder() -> Path | None:
    """A folder of this user alone."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    user = os.getuid() if hasattr(os, "getuid") else 0
    for folder in (Path(home) / "downres" / "index", Path(tempfile.gettempdir()) / f"downres-index-{user}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = os.lstat(folder)
        except OSError:
            continue
        # With temporary files another user may have made it first, and would tell us what is where.
        if os.access(folder, os.W_OK) and (not hasattr(os, "getuid") or status.st_uid == user) and not folder.is_symlink():
            return folder
    return None


def _save(folder: Path, name: str, found: Index) -> None:
    told = found._asdict()
    text = {key: told[key] for key in Index._fields[7:] if key != "left_out"}
    text["left_out"] = [[skip.path, skip.reason] for skip in found.left_out]
    arrays = {key: told[key] for key in _ARRAYS} | {"told": np.frombuffer(json.dumps(text).encode(), np.uint8)}
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.close()
            os.replace(file.name, folder / name)  # nobody ever sees half of one
        except BaseException:
            os.unlink(file.name)
            raise


def _loaded(file: Path) -> Index:
    with np.load(file, allow_pickle=False) as saved:
        arrays = {key: saved[key] for key in _ARRAYS}
        told = json.loads(saved["told"].tobytes())
    if len({len(arrays[key]) for key in _ARRAYS if key != "names"}) != 1:
        raise ValueError(file)
    return Index(
        **arrays,
        words=tuple(told["words"]),
        classes=tuple(told["classes"]),
        by_folder=bool(told["by_folder"]),
        left_out=tuple(Skip(path, reason) for path, reason in told["left_out"]),
        counts=tuple((reason, int(count)) for reason, count in told["counts"]),
    )
