"""A table of labels beside a folder of images: CSV or JSON, one row an image."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DownresError
from ..images import Fold, Images, Progress, Skip
from ..images.images import fingerprint
from ..images.parts import PARTS, as_found, divide, how_found, how_left_out, list_images, listed_names, open_listed, part_of
from ..parse import user_path

PART_COLUMNS = ("split", "part", "subset")
"""Headings under which a table may say which images are to fit on and which to prove on."""


@dataclass(frozen=True)
class Table:
    """Rows of a file of labels. names: of the columns beside the picture's; parts: 'train' or 'val' for each row, or ()."""

    path: Path
    files: tuple[str, ...]
    names: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    parts: tuple[str, ...] = ()


def read_table(path: str | Path) -> Table:
    """A CSV with a heading, whose first column (or one headed file, image, filename, path or name) is the picture's file; or
    JSON: an object of files to values, or a list of objects as the rows of the CSV. Raises DownresError for anything else.
    """
    path = user_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _json_rows(json.loads(text)) if path.suffix.lower() == ".json" else _csv_rows(text)
    except OSError as error:
        raise DownresError(f"Cannot read the labels {path} ({error.strerror}): give a CSV or JSON file.") from None
    except (ValueError, TypeError, AttributeError, LookupError, StopIteration, csv.Error):
        raise DownresError(
            f"{path} is no table of labels: give a CSV with a heading, or JSON, a row for each picture."
        ) from None
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DownresError(f"{path} holds no labels: give a heading and a row for each picture, its file first.")
    heading = [str(name).strip() for name in rows[0]]
    ragged = next((i for i, row in enumerate(rows[1:], 2) if len(row) != len(heading)), None)
    if ragged is not None:
        raise DownresError(f"Row {ragged} of {path} has {len(rows[ragged - 1])} cells, its heading {len(heading)}: correct it.")
    lower = [name.lower() for name in heading]
    where = next((lower.index(n) for n in ("file", "image", "filename", "file_name", "path", "name") if n in lower), 0)
    part = next((lower.index(n) for n in PART_COLUMNS if n in lower), None)
    kept = [i for i in range(len(heading)) if i not in (where, part)]
    body = [[str(cell).strip() for cell in row] for row in rows[1:]]
    files = tuple(row[where] for row in body)
    if twice := [name for name, n in Counter(files).items() if n > 1]:
        raise DownresError(f"{path} has {len(twice)} pictures twice (the first is {twice[0]}): give each one row.")
    parts = () if part is None else tuple(_part(path, row[part]) for row in body)
    return Table(path, files, tuple(heading[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in body), parts)


def _csv_rows(text: str) -> list[list[str]]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return [row for row in rows if any(cell.strip() for cell in row)]


def _json_rows(values: Any) -> list[list[Any]]:
    def text(value: Any) -> str:
        return "|".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)

    if isinstance(values, dict):
        first = next(iter(values.values()))
        if isinstance(first, dict):
            return [["file", *first], *([name, *(text(row[key]) for key in first)] for name, row in values.items())]
        return [["file", "label"], *([name, text(value)] for name, value in values.items())]
    heading = list(values[0])
    return [heading, *([text(row[key]) for key in heading] for row in values)]


def _part(path: Path, word: str) -> str:
    found = part_of(word)
    if found is None:
        known = ", ".join(name for names in PARTS.values() for name in names)
        raise DownresError(f"{path} puts a picture into {word!r}: a part is one of {known}.")
    return found


@dataclass(frozen=True, eq=False)
class TableData:
    """Pictures with a row of finite numbers each. targets: float64 (n, K), names: of the K columns."""

    images: Images
    targets: np.ndarray
    names: tuple[str, ...]
    folds: tuple[Fold, ...]
    skipped: tuple[Skip, ...]
    description: str
    licence: str = ""
    found_in: Path | str = ""

    def __post_init__(self) -> None:
        shape = (len(self.images), len(self.names))
        if self.targets.shape != shape or not np.isfinite(self.targets).all():
            raise DownresError(
                f"{shape[0]} pictures and {shape[1]} columns need finite targets {shape}, an array {self.targets.shape} is "
                "given, or one with NaN or infinity in it: give a number for each."
            )

    def fingerprint(self) -> str:
        targets = "\0".join(self.names).encode(errors="surrogatepass") + np.ascontiguousarray(self.targets, "<f8").tobytes()
        return fingerprint(self.images, targets, [side for fold in self.folds for side in (fold.train, fold.test)])


def open_rows(
    folder: str | Path,
    table: Table,
    strata: np.ndarray,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
    channels: int = 3,
    train_images: int | None = None,
) -> tuple[Images, np.ndarray, tuple[Fold, ...], list[Skip], str]:
    """(images, which rows they are, folds, skipped, how they are divided) of the pictures that a table names.

    Divided as the table says (a column split, part or subset), else by `val_fraction` or `folds`, as `open_folder` divides one
    folder. strata: an integer a row that the division keeps the shares of. Pictures of the folder without a row are left out
    and counted.
    """
    root = _folder(folder)
    if not root.is_dir():
        raise DownresError(f"There is no folder {root}: point `data` to the folder that the files of {table.path} are in.")
    missing = [name for name in table.files if not (root / name).is_file()]
    if missing:
        raise DownresError(
            f"{len(missing)} of {len(table.files)} pictures of {table.path} are not in {root} (the first is {missing[0]}): "
            "point `data` to their folder, or correct the table."
        )
    if folds is not None and table.parts:
        raise DownresError(f"`folds` needs pictures that are not divided, {table.path} divides them: leave one of the two out.")
    if table.parts:
        whole = as_found(table.parts)[0]
        none = np.zeros(0, np.int64)
        listed: tuple[Fold, ...] = (Fold(whole.train if "train" in parts else none, whole.test if "val" in parts else none),)
        if "val" in parts and not len(whole.test):
            raise DownresError(f"{table.path} puts no picture into val: there is nothing to prove on.")
    else:
        listed = divide(strata, parts, val_fraction, folds, seed)
    images, kept, divided, skipped, limited = open_listed(
        root, table.files, listed, strata, seed, cache_gb, progress, channels, train_images
    )
    if table.parts:
        how = how_found(divided[0], {part: Path(part) for part in PARTS})
    elif len(divided) > 1:
        how = f"cross-fitted in {folds} folds (seed {seed})"
    elif not len(divided[0].train):
        how = f"{len(divided[0].test)} to test on (seed {seed})"
    else:
        how = f"split into {len(divided[0].train)} to fit on and {len(divided[0].test)} to test on (seed {seed})"
    how += limited
    how += how_left_out(skipped, ())
    known = {(root / name).resolve() for name in table.files}
    extra = sum((root / name).resolve() not in known for name in list_images(root)[0])
    how += f"; {extra} pictures of the folder have no row and are left out" if extra else ""
    return images, kept, divided, skipped, how


def _folder(data: Any) -> Path:
    if isinstance(data, (str, Path)):
        return user_path(data)
    raise DownresError(
        f"These labels are in a file beside the pictures, a {type(data).__name__} has none: give `data` as their folder, and "
        "the file as `labels='FILE.csv'`."
    )


def numbers(table: Table, read: Callable[[str], float] = float) -> np.ndarray:
    """The cells as float64 (rows, columns). Raises DownresError for one that is no finite number."""
    found = np.empty((len(table.files), len(table.names)))
    for i, row in enumerate(table.cells):
        for j, cell in enumerate(row):
            try:
                found[i, j] = read(cell)
                if not math.isfinite(found[i, j]) or "_" in cell:  # which Python reads over: 1_7 is 17
                    raise ValueError
            except ValueError:
                raise DownresError(
                    f"{table.path} has {cell!r} under {table.names[j]} for {table.files[i]}, which is no finite number: "
                    "correct it, or leave the row out."
                ) from None
    return found


def number_in(cell: str) -> float | None:
    """The number that a cell is, as spreadsheets and pandas write one; None for a text."""
    return float(cell) if _NUMBER.fullmatch(cell) else None


_NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf(?:inity)?|nan)", re.ASCII | re.IGNORECASE)


def no_class(what: str) -> DownresError:
    """Of a label that is a number and no class; what: the label, and whose it is."""
    return DownresError(
        f"{what} is no class, which is a name or a whole number from 0 on: for measurements give `task='regression'` and a CSV "
        "file of them beside a folder of the pictures, else name the classes in words."
    )


def labels_beside(folder: Any, given: str | None, what: str) -> Path:
    """The file of labels: the one given, else the only CSV or JSON file in the folder."""
    root = _folder(folder)
    if given is not None:
        return Path(given)
    found = sorted(p for p in root.glob("*") if p.suffix.lower() in (".csv", ".json")) if root.is_dir() else []
    if len(found) != 1:
        have = "holds none" if not found else f"holds {listed_names([p.name for p in found])}"
        raise DownresError(f"{what} needs a file of labels, and {root} {have}: name it with `labels='FILE.csv'`.")
    return found[0]
