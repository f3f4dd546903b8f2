"""Data that are files of many pictures: which files, what is in them, which pictures are the proof, and those opened."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DownresError
from ..parse import is_pattern, user_path
from . import columns, tars
from .encoded import Encoded, Member
from .images import Images, Progress, Skip, cache_bytes, from_files
from .index import NO_LABEL, OTHER, Index, index_of, of_folders
from .parts import PARTS, TRAINING_IMAGES, WHOLE, list_images, listed_names, parts_among, subfolders
from .split import Fold, drawn

PROOF_IMAGES = 50_000
"""Images to test on that are opened, at most: as many as ImageNet's own, with which half a tenth of a point can be told."""
TUNING = 0.25
"""Of the images to fit on, the part that tunes."""
TUNING_IMAGES = 1000
"""Of those so many are opened at most, as many as choose the rungs of a ladder: the others are not fitted on instead."""
_TAR, _COLUMNS = (".tar",), (".parquet", ".arrow")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PROOF, _KEPT, _TUNED = range(3)
"""What numbers are drawn for, each apart from the others."""


@dataclass(frozen=True)
class Archives:
    """Files of pictures. files: of each part, 'train' and 'val' or one of them, else all as 'whole', sorted; called: what the
    part is called in their names. idle: files of other parts.
    """

    root: Path
    files: dict[str, tuple[Path, ...]]
    called: dict[str, str]
    idle: tuple[str, ...] = ()

    def relative(self, file: Path) -> str:
        return Path(os.path.relpath(file, self.root)).as_posix()


def find_archives(data: Any) -> Archives | None:
    """The files of pictures that `data` names: a .tar, .parquet or .arrow file, several by `*` or `{000..146}`, or a folder of
    them that holds no picture of its own. None for anything else. Raises DownresError for what cannot be read in place.
    """
    if not isinstance(data, (str, os.PathLike)) or str(data).startswith("demo:"):
        return None
    path = user_path(data)
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return _of_files(path.parent, [path]) if _kind(path) else None
    if not is_pattern(path):
        return None
    found = matched(path)
    if not found:
        raise DownresError(f"No file is called {path}: point `data` to a folder, or to files that are there.")
    if absent := [text for text in _unbraced(str(path)) if not _matching(text)]:
        raise DownresError(
            f"{path} names {len(absent)} that are not there ({listed_names([Path(text).name for text in absent], 3)}): fetch "
            "them, or name those that are there."
        )
    if all(file.is_dir() for file in found):
        raise DownresError(f"{path} names {len(found)} folders: point `data` to one, or to files in them.")
    unread = [file.name for file in found if not _kind(file)]
    if unread:
        raise DownresError(f"{path} names what is no .tar, .parquet or .arrow file ({listed_names(unread)}): name those alone.")
    return _of_files(Path(os.path.commonpath([file.parent for file in found])), found)


def matched(path: str | Path) -> list[Path]:
    """The files that a name with `*`, `?`, `[…]` and `{a,b}` or `{000..146}` stands for, sorted, each once."""
    return sorted({Path(name) for text in _unbraced(str(path)) for name in _matching(text)})


def _matching(text: str) -> list[str]:
    names = glob.glob(text, recursive=True) if glob.has_magic(text) else [text]
    return [name for name in names if os.path.exists(name)]


def _unbraced(text: str) -> list[str]:
    """As a shell, and WebDataset, write several names in one."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if abs(last - first) > 1_000_000:
            raise DownresError(f"{text} stands for more than a million files: give a folder.")
        width = len(span[1]) if span[1].startswith("0") else 0
        inside = [f"{i:0{width}d}" for i in range(min(first, last), max(first, last) + 1)]
    else:
        inside = found[1].split(",")
    return [name for one in inside for name in _unbraced(text[: found.start()] + one + text[found.end() :])]


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(_COMPRESSED):
        raise DownresError(
            f"{path} is a compressed tar, and no picture in it can be read without all before it: unpack the compression alone "
            "and give the plain .tar, whose pictures are compressed already."
        )
    return "tar" if name.endswith(_TAR) else "columns" if name.endswith(_COLUMNS) else ""


def _in_folder(root: Path) -> Archives | None:
    saved = _saved_to_disk(root)
    if saved is not None:
        return saved
    inner = root
    while len(names := subfolders(inner)) == 1 and not parts_among(names) and not _files_in(inner):
        inner = inner / names[0]
    if (saved := _saved_to_disk(inner)) is not None:
        return saved
    parts = [name for some in parts_among(names).values() for name in some]
    places = [inner, *(inner / name for name in names if name in parts or name.lower() in ("data", "shards"))]
    files = [file for place in places for file in _files_in(place)]
    if not any(_kind(file) for file in files if not file.name.lower().endswith(_COMPRESSED)):
        compressed = [file for file in files if file.name.lower().endswith(_COMPRESSED)]
        if compressed and not list_images(root, most=1)[0]:
            _kind(compressed[0])
        return None
    if list_images(root, most=1)[0]:  # a folder of pictures, beside which there is an archive of them perhaps
        return None
    plain = [file for file in files if not file.name.lower().endswith(_COMPRESSED)]
    return _of_files(inner, [file for file in plain if _kind(file)])


def _files_in(folder: Path) -> list[Path]:
    """The archives in a folder, without what systems leave behind."""
    try:
        entries = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_file()]
    except OSError:
        return []
    return [folder / name for name in sorted(entries) if name.lower().endswith((*_TAR, *_COLUMNS, *_COMPRESSED))]


def _saved_to_disk(folder: Path) -> Archives | None:
    """A folder that Hugging Face's `save_to_disk` wrote, of one dataset or of several parts."""
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            files = [file for name in names for file in _data_files(folder / _plain(name))]
        elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            files = _data_files(folder)
        else:
            return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DownresError(f"{folder} looks like a saved dataset and cannot be read ({error}): save it again.") from None
    return _of_files(folder, files)


def _data_files(folder: Path) -> list[Path]:
    return [folder / _plain(file["filename"]) for file in json.loads((folder / "state.json").read_text())["_data_files"]]


def _plain(name: str) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name in it")
    return name


def _of_files(root: Path, files: Sequence[Path]) -> Archives:
    if len({_kind(file) for file in files}) > 1:
        raise DownresError(f"{root} holds tar files and files of columns ({files[0].name}, …): name the ones of a kind alone.")
    if not files:
        raise DownresError(f"{root} names no files of pictures: save the data again.")
    groups: dict[str, list[Path]] = {}
    places = {file: Path(os.path.relpath(file, root)) for file in sorted(set(files))}
    beside = {inside.parts[0] for inside in places.values() if len(inside.parts) > 1}
    folders = {name for some in parts_among(beside).values() for name in some}
    for file, inside in places.items():
        # A part is told by the folder, else by the file's name without its number.
        of = inside.parts[0] if inside.parts[0] in folders else re.sub(r"\d+", "", inside.stem)
        groups.setdefault(of, []).append(file)
    parts = {part: names[0] for part, names in parts_among(groups).items()}
    if not parts:
        return Archives(root, {WHOLE: tuple(sorted(set(files)))}, {WHOLE: ""})
    idle = [file.name for of, some in groups.items() if of not in parts.values() for file in some]
    called = {part: re.sub(r"[\W_]+", "-", of).strip("-") for part, of in parts.items()}
    return Archives(root, {part: tuple(groups[of]) for part, of in parts.items()}, called, tuple(idle))


@dataclass(eq=False)
class Listing:
    """All pictures of some archives, a few bytes for each. Row i is the picture `at[i]` of file `file[i]`.

    digests: of the keys. labels: int32 (n,), numbers into `words`, or NO_LABEL or SEVERAL. parts: int8, 1 to fit on, 2 to test
    on, 0 where nothing tells. classes: names of numbered labels. by_folder: whether labels are names of folders.
    """

    archives: Archives
    files: list[Path]
    digests: np.ndarray
    labels: np.ndarray
    parts: np.ndarray
    file: np.ndarray
    at: np.ndarray
    words: list[str]
    classes: tuple[str, ...]
    left_out: list[Skip] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    by_folder: bool = False

    def __len__(self) -> int:
        return len(self.digests)

    def index(self, number: int) -> Index:
        return _index(self.files[number])

    def without(self, dropped: np.ndarray, reason: str) -> None:
        """Leave out the rows where `dropped`, bool (n,), is true."""
        gone = np.flatnonzero(dropped)
        if not len(gone):
            return
        for i in gone[:3]:
            file = self.files[self.file[i]]
            self.left_out.append(Skip(f"{self.archives.relative(file)}: {_index(file).name(int(self.at[i]))}", reason))
        self.counts[reason] += len(gone)
        for name in ("digests", "labels", "parts", "file", "at"):
            setattr(self, name, getattr(self, name)[~dropped])


def _index(file: Path) -> Index:
    return index_of(file, tars.scan if file.suffix.lower() in _TAR else columns.scan)


def list_archives(archives: Archives, progress: Progress | None = None) -> Listing:
    """What is in the files, from their indices: the first time every header is read, then a few bytes for each picture."""
    files = [file for some in archives.files.values() for file in some]
    told = {file: list(PARTS).index(part) + 1 for part, some in archives.files.items() if part != WHOLE for file in some}
    words: dict[str, int] = {}
    classes: dict[tuple[str, ...], Path] = {}
    gathered: list[list[np.ndarray]] = []
    left_out: list[Skip] = []
    counts: Counter[str] = Counter()
    by_folder, labelled = [], False
    for number, file in enumerate(files):
        try:
            index = _index(file)
        except OSError as error:
            raise DownresError(f"Cannot read {file} ({error.strerror or error}): make it readable.") from None
        n = len(index.digests)
        new = np.array([words.setdefault(word, len(words)) for word in index.words] + [0], np.int32)
        labels = np.where(index.labels >= 0, new[np.maximum(index.labels, -1)], index.labels).astype(np.int32)
        parts = np.full(n, told[file], np.int8) if file in told else index.parts
        gathered.append([index.digests, labels, parts, np.full(n, number, np.int32), np.arange(n, dtype=np.int32)])
        left_out += [Skip(f"{archives.relative(file)}: {skip.path}", skip.reason) for skip in index.left_out]
        counts.update(dict(index.counts))
        by_folder.append(index.by_folder)
        labelled = labelled or (not index.by_folder and bool((labels >= 0).any()))
        if n:
            classes.setdefault(index.classes, file)
        if progress is not None:
            progress("indexing", number + 1, len(files))
    if len(classes) > 1:
        (one, other) = list(classes.values())[:2]
        raise DownresError(f"{one} and {other} have other names for their classes: give data of one set.")
    digests, labels, parts, of, at = (np.concatenate(some) for some in zip(*gathered, strict=True))
    rows = np.isin(of, np.flatnonzero(by_folder)) & (labels >= 0)  # whose label is a folder for now
    known = list(words)
    if rows.any():
        places = np.unique(labels[rows])
        read = of_folders([known[i] for i in places])
        part = np.zeros(len(known), np.int8)
        part[places] = [number for _, number in read]
        untold = rows & ~np.isin(of, [number for number, file in enumerate(files) if file in told])
        parts[untold] = part[labels[untold]]
        named = sorted({name for name, _ in read if name})
        new = np.full(len(known), NO_LABEL, np.int32)
        new[places] = [named.index(name) if name else NO_LABEL for name, _ in read]
        # Where some say their labels, folders are no more than folders.
        labels[rows] = NO_LABEL if labelled else new[labels[rows]]
        known = known if labelled else named
    listing = Listing(archives, files, digests, labels, parts, of, at, known, next(iter(classes), ()), left_out, counts)
    listing.by_folder = bool(rows.any()) and not labelled
    listing.without(listing.parts == OTHER, "in a part that is not used")
    return listing


class Opened(NamedTuple):
    """Pictures in an order of their keys' hashes. rows: which of the listing they are; tuning: bool (n,), those that tune.
    how: they are divided, left_out: what is not used and why, for a description.
    """

    images: Images
    rows: np.ndarray
    folds: tuple[Fold, ...]
    tuning: np.ndarray
    skipped: tuple[Skip, ...]
    how: str
    left_out: str


def open_listing(
    listing: Listing,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
    channels: int = 3,
    train_images: int | None = None,
) -> Opened:
    """The pictures of a listing divided, and those that are looked at decoded once; options as for `open_folder`.

    A picture is in the proof, tunes or is fitted on as the hash of its key and the seed tell: neither order nor number of files
    matters, and others that are added move none. Of more than PROOF_IMAGES to test on, and `train_images` to fit on, else
    TRAINING_IMAGES, those of the lowest numbers are opened. One to fit on with the pixels of one to test on is left out.
    """
    chosen = _divide(listing, parts, val_fraction, folds, seed, train_images)
    opened, place, skipped = _decode(listing, chosen, cache_gb, progress, channels)

    def remaining(side: np.ndarray, use: str) -> np.ndarray:
        found = place[side]
        if len(side) and not (found >= 0).any():
            raise DownresError(
                f"None of the {len(side)} images to {use} can be read ({skipped[0].path}: {skipped[0].reason}): replace them."
            )
        return found[found >= 0]

    divided = [Fold(remaining(fold.train, "fit on"), remaining(fold.test, "test on")) for fold in chosen.folds]
    apart = [_without_copies(opened, fold) for fold in divided]
    copies = sum(len(fold.train) - len(clean.train) for fold, clean in zip(divided, apart, strict=True))
    said = ""
    if copies:
        said += f"; {copies} with the pixels of an image to test on are not fitted on"
    if skipped:
        said += f"; {len(skipped)} unreadable left out"
    if listing.counts:
        reasons = [f"{reason}: {count}" for reason, count in listing.counts.most_common()]
        said += f"; {listing.counts.total()} others left out ({listed_names(reasons, 4)})"
    if listing.archives.idle:
        said += f"; not used: {listed_names(listing.archives.idle)}"
    kept = place >= 0
    every = (*skipped, *listing.left_out)
    return Opened(opened, chosen.rows[kept], tuple(apart), chosen.tuning[kept], every, chosen.how, said)


class _Chosen(NamedTuple):
    """rows: of the listing, those that are opened, in the order of their digests. folds: indices into them. tuning: bool."""

    rows: np.ndarray
    folds: list[Fold]
    tuning: np.ndarray
    how: str


def _divide(
    listing: Listing,
    parts: Sequence[str],
    val_fraction: float,
    folds: int | None,
    seed: int,
    train_images: int | None,
) -> _Chosen:
    as_found = {1, 2} <= set(np.unique(listing.parts).tolist())
    if as_found and folds is not None:
        raise DownresError(
            f"`folds` needs data that are not divided, {listing.archives.root} has a part to fit on and one to test on: leave "
            "`folds` out, or name the files of one part."
        )
    if as_found:
        listing.without(listing.parts == 0, "in no part")
    n, none = len(listing), np.zeros(0, np.int64)
    drawn_proof, order, drawn_tuning = (drawn(listing.digests, seed, purpose) for purpose in (_PROOF, _KEPT, _TUNED))
    tuned, everything = drawn_tuning < TUNING, np.arange(n, dtype=np.int64)

    def lowest(rows: np.ndarray, most: int) -> np.ndarray:
        return rows if len(rows) <= most else rows[np.argsort(order[rows], kind="stable")[:most]]

    def to_fit(rows: np.ndarray) -> np.ndarray:
        # Where somebody names their number, those that tune are as many as their part: who trains from scratch fits on both.
        tunes = TUNING_IMAGES if train_images is None else max(1, round(train_images * TUNING))
        sides = (rows[~tuned[rows]], (train_images or TRAINING_IMAGES) - tunes), (rows[tuned[rows]], tunes)
        return np.concatenate([lowest(side, most) for side, most in sides])

    if folds is not None:
        if not 2 <= folds <= n:
            raise DownresError(
                f"The number of folds is from 2 to the number of images, {n}, and {folds} is not: give for example 5."
            )
        of = np.minimum((drawn_proof * folds).astype(np.int64), folds - 1)
        used = lowest(everything, PROOF_IMAGES)
        trained = "train" in parts
        listed = [Fold(used[of[used] != i] if trained else none, used[of[used] == i]) for i in range(folds)]
        how = f"cross-fitted in {folds} folds" + (f", {len(used)} of {n} used" if len(used) < n else "")
    else:
        if as_found:
            test = listing.parts == 2
        elif "train" not in parts and val_fraction == 1.0:
            test = np.ones(n, bool)
        elif not 0.0 < val_fraction < 1.0:
            raise DownresError(f"The validation fraction is between 0 and 1, {val_fraction} is not: give for example 0.5.")
        else:
            test = drawn_proof < val_fraction
        train = everything[~test] if "train" in parts else none
        proof = everything[test] if "val" in parts else none
        listed = [Fold(to_fit(train), lowest(proof, PROOF_IMAGES))]
        how = " and ".join(
            f"{len(used)}{f' of {len(there)}' * (len(used) < len(there))}"
            f"{f' in {listing.archives.called.get(part) or part}' * as_found} {use}"
            for used, there, part, use in (
                (listed[0].train, train, "train", "to fit on"),
                (listed[0].test, proof, "val", "to test on"),
            )
            if len(there)
        )
    for side, part, use in (("train", "train", "to fit on"), ("test", "val", "to test on")):
        if part in parts and (part == "val" or val_fraction < 1) and not all(len(getattr(fold, side)) for fold in listed):
            raise DownresError(
                f"None of the {n} images is left {use}, by the hashes of their {len(np.unique(listing.digests))} keys: give "
                "more images, each with a key of its own, or another seed or part."
            )
    chosen_by = f" by the hash of each one's key and the seed ({seed})"
    if not as_found and not (folds is None and test.all()):
        how += f", divided{chosen_by}"
    elif any(len(fold.train) + len(fold.test) < n for fold in listed) and " of " in how:
        how += f", chosen{chosen_by}"
    rows = np.unique(np.concatenate([side for fold in listed for side in (fold.train, fold.test)]))
    rows = rows[np.argsort(listing.digests[rows], kind="stable")]
    where = np.full(n, -1, np.int64)
    where[rows] = np.arange(len(rows))
    return _Chosen(rows, [Fold(np.sort(where[f.train]), np.sort(where[f.test])) for f in listed], tuned[rows], how)


def encoded_in(listing: Listing, rows: np.ndarray) -> tuple[list[Encoded], np.ndarray]:
    """(the pictures of those rows, to be read, and where each begins in its file, int64 (n, 2))."""
    found: dict[int, Encoded] = {}
    begins = np.zeros((len(rows), 2), np.int64)
    for number in np.unique(listing.file[rows]):
        here = np.flatnonzero(listing.file[rows] == number)
        path, index = listing.files[number], listing.index(number)
        at = listing.at[rows[here]]
        begins[here] = np.stack([index.start[at], index.length[at]], 1)
        column = None if path.suffix.lower() in _TAR else columns.image_column(path)
        for i, row in zip(here.tolist(), at.tolist(), strict=True):
            place = path, int(index.start[row]), int(index.length[row])
            found[i] = Member(*place, index.name(row)) if column is None else columns.Row(*place, column, index.name(row))
    return [found[i] for i in range(len(rows))], begins


def _decode(
    listing: Listing, chosen: _Chosen, cache_gb: float | None, progress: Progress | None, channels: int
) -> tuple[Images, np.ndarray, list[Skip]]:
    """(pictures, the place of each row among them or -1, those that cannot be read): each decoded once, as they lie in their
    files, those to test on first.
    """
    sources, begins = encoded_in(listing, chosen.rows)
    tested = np.zeros(len(sources), bool)
    tested[np.concatenate([fold.test for fold in chosen.folds])] = True
    in_order = np.lexsort((begins[:, 1], begins[:, 0], listing.file[chosen.rows], ~tested))
    # Two files may have pictures of one name: here they go by their numbers.
    images, unread = from_files(
        sources,
        [str(i) for i in range(len(sources))],
        progress,
        cache=cache_bytes(cache_gb),
        first=in_order,
        channels=channels,
    )
    reasons = {int(skip.path): skip.reason for skip in unread}
    place_of = np.full(len(sources), -1, np.int64)
    kept = np.array([i for i in range(len(sources)) if i not in reasons], np.int64)
    place_of[kept] = np.arange(len(kept))
    images.names = [sources[i].name for i in kept]
    skipped = []
    for i, reason in reasons.items():
        file = listing.archives.relative(listing.files[listing.file[chosen.rows[i]]])
        skipped.append(Skip(f"{file}: {sources[i].name}", reason))
    return images, place_of, skipped


def _without_copies(images: Images, fold: Fold) -> Fold:
    """The fold without images to fit on whose pixels are those of one to test on: other keys do not make them others."""
    if not len(fold.train) or not len(fold.test):
        return fold
    looks: dict[tuple[Any, ...], list[int]] = {}
    shapes = images.shapes
    for i in fold.test.tolist():
        looks.setdefault((images.checksums[i], shapes[i]), []).append(i)

    def is_copy(i: int) -> bool:
        alike = looks.get((images.checksums[i], shapes[i]), ())
        return any(np.array_equal(images[i], images[other]) for other in alike[:1])

    train = np.array([i for i in fold.train.tolist() if not is_copy(i)], np.int64)
    if not len(train):
        raise DownresError(
            f"All {len(fold.train)} images to fit on have the pixels of one to test on: nothing could be proven of what is "
            "fitted on them; give other images to one of the parts."
        )
    return Fold(train, fold.test)
