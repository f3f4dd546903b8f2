"""Where the pictures in a file of columns are: parquet, and the Arrow files of Hugging Face's `save_to_disk`.

Read by pyarrow, of the extra downres[datasets], in place: the library datasets would copy all of a parquet file into its cache.
"""

import functools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DownresError
from ..parse import format_quantity
from .encoded import Encoded
from .index import NO_LABEL, SEVERAL, Index, Indexer
from .parts import listed_names
from .split import digest
from .unreadable import Unreadable

IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "target", "cls")
KEYS = ("__key__", "key", "image_id", "id", "file_name", "filename", "path")
"""Columns, in the order in which they are looked for."""
MOST_GROUP = 1 << 30
"""Bytes of a group of rows, of which a parquet file gives no part."""
_ROWS = 256
_reading = threading.Lock()


class Row(Encoded):
    """The picture in one row: `row` of group or batch `group`."""

    __slots__ = ("column", "group", "name", "path", "row")

    def __init__(self, path: Path, group: int, row: int, column: str, name: str) -> None:
        self.path, self.group, self.row, self.column, self.name = path, group, row, column, name

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def read(self) -> bytes:
        # One at a time: threads ask for neighbours, and two groups side by side would be read over and over.
        with _reading:
            group = _group(self.path, self.group, self.column)
            if not self.row < len(group):
                raise Unreadable("not there any more")
            value = group[self.row].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise Unreadable("the row has a path in the place of the picture")
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise Unreadable("no picture in the row")
        return value


@functools.lru_cache(maxsize=2)
def _group(path: Path, group: int, column: str) -> Any:
    """The pictures of a group of rows: of Arrow not in memory, of parquet read whole."""
    if is_parquet(path):
        return _parquet(path).read_row_group(group, columns=[column]).column(0).combine_chunks()
    return _batches(path)[group].column(column)


@functools.lru_cache(maxsize=4)
def _parquet(path: Path) -> Any:
    return _arrow().parquet.ParquetFile(path)


@functools.lru_cache(maxsize=64)
def _batches(path: Path) -> list[Any]:
    """All batches of an Arrow file, mapped into memory: nothing is read until it is looked at."""
    pa = _arrow()
    mapped = pa.memory_map(str(path))
    try:
        return list(pa.ipc.open_stream(mapped))
    except pa.ArrowInvalid:
        found = pa.ipc.open_file(mapped)
        return [found.get_batch(i) for i in range(found.num_record_batches)]


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise DownresError("Parquet and Arrow files are read by pyarrow: pip install 'downres[datasets]'.") from None
    return pyarrow


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def image_column(path: Path) -> str:
    """The name of the column with the pictures. Raises DownresError where there is none, or more than one."""
    schema = _schema(path)
    features = _features(schema)
    pa = _arrow()

    def holds(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
        return (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and name.lower() in IMAGES

    found = [name for name in schema.names if features.get(name, {}).get("_type") == "Image" and holds(name)]
    found = found or [name for name in schema.names if holds(name)]
    chosen = next((name for name in IMAGES if name in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        what = f"several columns of pictures ({listed_names(found)})" if found else "no column of pictures"
        raise DownresError(
            f"{path} has {what} among {listed_names(schema.names)}: the one looked at is called {IMAGES[0]}, and holds the "
            "bytes of picture files."
        )
    return chosen


def scan(path: Path) -> Index:
    """The index of a file of columns, from all columns but the pictures' bytes.

    The key of a row is the path that is kept with its picture, else a column __key__, image_id, id or file_name, and where
    there is none the content of the picture: then all are read this once. A label is a whole number or a text in the column
    label; a row with null or -1 has none. Raises DownresError for what is no such file.
    """
    pa = _arrow()
    for kept in (_group, _parquet, _batches):  # of a file that has changed since
        kept.cache_clear()
    try:
        return _scan(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DownresError(f"{path} cannot be read ({why}): make it again, or take it out of the data.") from None


def _scan(path: Path, by_content: bool = False) -> Index:
    pa = _arrow()
    schema, column = _schema(path), image_column(path)
    features = _features(schema)
    kind = schema.field(column).type
    inner = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    label = next((name for name in LABELS if name in schema.names and name != column), None)
    beside = next((name for name in KEYS if name in schema.names and name != column), None) if not by_content else None
    made = Indexer()
    made.classes = tuple(map(str, features.get(label, {}).get("names") or ())) if label else ()
    if is_parquet(path):
        _refuse_large(path, column)
    for group in range(_parquet(path).num_row_groups if is_parquet(path) else len(_batches(path))):
        wanted = [name for name in (label, beside) if name] + ([f"{column}.path"] if "path" in inner else [])
        row = 0
        for batch in _columns(path, group, wanted):
            rows = batch.num_rows
            labels = batch.column(label).to_pylist() if label else [None] * rows
            keys: list[Any] = [None] * rows
            if "path" in inner:
                at = batch.column(column)
                keys = (
                    [value and value["path"] for value in at.to_pylist()] if is_parquet(path) else at.field("path").to_pylist()
                )
            if beside:
                keys = [own or other for own, other in zip(keys, batch.column(beside).to_pylist(), strict=True)]
            if any(key in (None, "") for key in keys):
                keys = _by_content(path, group, column, row, keys)
            for value, key in zip(labels, keys, strict=True):
                text = key if isinstance(key, (str, int)) and not isinstance(key, bool) else str(key)
                name = f"{text:016x}" if isinstance(text, _Digest) else str(text).replace("\\", "/").rpartition("/")[2] or "row"
                made.add(name, int(text) if isinstance(text, _Digest) else str(text), group, row, _label(value))
                row += 1
    if by_content or not beside:
        return made.done()
    found = made.done()
    # A column that is a class, or a patient, is no key: whole classes would fall to one side.
    return found if len(np.unique(found.digests)) > 0.9 * len(found.digests) else _scan(path, by_content=True)


class _Digest(int):
    """A key that is that of the content."""


def _by_content(path: Path, group: int, column: str, first: int, keys: list[Any]) -> list[Any]:
    """The keys, the missing ones replaced by those of the pictures' bytes."""
    found = list(keys)
    for i, key in enumerate(keys):
        if key in (None, ""):
            try:
                found[i] = _Digest(digest(Row(path, group, first + i, column, "").read()))
            except Unreadable:
                found[i] = f"no picture {group} {first + i}"
    return found


def _columns(path: Path, group: int, names: list[str]) -> Any:
    """Batches of some columns of a group; of parquet nothing else is read."""
    if not is_parquet(path):
        yield _batches(path)[group]
    elif names:
        yield from _parquet(path).iter_batches(batch_size=_ROWS, row_groups=[group], columns=names)
    else:
        pa = _arrow()
        rows = _parquet(path).metadata.row_group(group).num_rows
        yield pa.RecordBatch.from_arrays([pa.nulls(rows)], names=[""])


def _refuse_large(path: Path, column: str) -> None:
    """A group of rows is read whole."""
    metadata = _parquet(path).metadata
    for group in range(metadata.num_row_groups):
        told = metadata.row_group(group)
        size = sum(
            told.column(i).total_uncompressed_size
            for i in range(told.num_columns)
            if told.column(i).path_in_schema.split(".")[0] == column
        )
        if size > MOST_GROUP:
            raise DownresError(
                f"{path} has {format_quantity(size, 'B')} of pictures in one group of rows, and any of them is read with all: "
                "write it again with 100 rows a group, as datasets' to_parquet(batch_size=100) does."
            )


def _label(value: Any) -> str | int:
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None if not value else SEVERAL
        if value == SEVERAL:
            return SEVERAL
    if value is None or isinstance(value, (dict, bytes)):
        return NO_LABEL
    return str(value).strip() or NO_LABEL


def _schema(path: Path) -> Any:
    return _parquet(path).schema_arrow if is_parquet(path) else _batches_schema(path)


def _batches_schema(path: Path) -> Any:
    pa = _arrow()
    with pa.memory_map(str(path)) as mapped:
        try:
            return pa.ipc.open_stream(mapped).schema
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).schema


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets wrote of the columns; {} where it did not."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}
