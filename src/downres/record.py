"""`Record`: a frozen dataclass that goes to JSON and back, and the one reader of JSON files that others may have touched."""

import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import time
import types
import typing
from pathlib import Path
from typing import Any, Self

from .errors import DownresError
from .notebook import fields


class Misfit(DownresError):
    """A value that its field cannot have. path: of the field, `result.cost.macs`; why: what is wrong with it."""

    def __init__(self, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path or 'The record'} {why}: it was changed after it was written.")

    def within(self, name: str) -> "Misfit":
        return Misfit(f"{name}.{self.path}" if self.path else name, self.why)


class Record:
    """Frozen dataclass that turns into plain JSON values and back, nested records included."""

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return fields(self.to_json())

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse; unknown fields are left out. Raises Misfit for one that is missing or of another type."""
        if not isinstance(values, dict):
            raise Misfit("", f"must be an object with names, {_short(values)} is not")
        hints, given = _hints(cls), {}  # type: ignore[arg-type]
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            if f.name in values:
                given[f.name] = _inside(f.name, hints[f.name], values[f.name])
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise Misfit(f.name, "is missing")
        return cls(**given)


def plain(value: Any) -> Any:
    """As JSON has it, which knows neither infinity nor NaN: null stands for both."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(file: Path, most: int) -> Any:
    """What a JSON file of at most `most` bytes holds. FileNotFoundError where there is none; ValueError says why it is not
    read: a pipe or device (which may never end), too large, nested absurdly, no JSON, NaN in it.
    """
    if file.exists() and not file.is_file():
        raise ValueError("it is no regular file")
    with open(file, "rb") as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    try:
        return json.loads(content, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(document: Any, **how: Any) -> str:
    """Strict JSON: a NaN or an infinity in it is an error of whoever computed it."""
    return json.dumps(document, allow_nan=False, **how)


def write_whole(path: Path, content: bytes) -> None:
    """All of it or nothing: a full disk, a hard stop or a power cut leaves the old file, and nothing beside it.

    The content is written to a file without a name, which vanishes with its process, and named when it is complete. It has
    another name for an instant, for ever where the process is killed in it: see `sweep`.
    """
    handle, partial = _unnamed(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            if not partial.exists():
                # A directory descriptor, which an absolute name makes no use of, lets Python follow the link of /proc.
                os.link(f"/proc/self/fd/{file.fileno()}", partial, src_dir_fd=file.fileno(), follow_symlinks=True)
        os.replace(partial, path)
        settled(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Removes the names that processes killed in `write_whole` left in a folder and those in it. Others may be at work."""
    for file in folder.rglob(".*.partial"):
        if (found := _LEFT.fullmatch(file.name)) and not _at_work(int(found[1])):
            with contextlib.suppress(OSError):
                file.unlink()


_LEFT = re.compile(r"\..+\.(\d+)\.\d+\.partial")
"""The names of `_unnamed`."""


def _at_work(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another's
        pass
    return process != os.getpid()  # a container gives the same number again


def _unnamed(path: Path) -> tuple[int, Path]:
    """(descriptor of a new file, the name that it is to have at first); where there are none without a name, it has it now."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    with contextlib.suppress(OSError, AttributeError):
        if Path("/proc/self/fd").is_dir():
            return os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644), partial
    return os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), partial


def sha256(file: Path) -> str:
    """Of what is in a file, in hex."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def settled(file: Path) -> None:
    """What was written to a file or folder is on the disk, before anything else names it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with contextlib.suppress(*((OSError,) if file.is_dir() else ())):  # some network file systems know no fsync of folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _inside(name: str, hint: Any, value: Any) -> Any:
    try:
        return _typed(hint, value)
    except Misfit as misfit:
        raise misfit.within(name) from None


def _typed(hint: Any, value: Any) -> Any:
    """The value as its field has it: lists become tuples, objects become records."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise Misfit("", f"must be a list, {_short(value)} is not")
        if args[-1:] != (...,) and len(args) != len(value):
            raise Misfit("", f"must be a list of {len(args)}, {_short(value)} is not")
        inner = args[:1] * len(value) if args[-1:] == (...,) else args
        return tuple(_inside(str(i), kind, v) for i, (kind, v) in enumerate(zip(inner, value, strict=True)))
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise Misfit("", f"must be an object with names, {_short(value)} is not")
        return {k: _inside(str(k), args[1], v) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    if hint in _PLAIN:
        kinds, what = _PLAIN[hint]
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool) or not _finite(value):
            raise Misfit("", f"must be {what}, {_short(value)} is not")
    return value


_PLAIN: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    type(None): (type(None), "null"),
}


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    """Of several records the one whose fields these are; else the first kind that the value fits."""
    if isinstance(value, dict):
        kinds = tuple(sorted(kinds, key=lambda kind: len(_fields(kind) ^ value.keys())))
    found: Misfit | None = None
    for kind in kinds:
        try:
            return _typed(kind, value)
        except Misfit as misfit:
            found = found or misfit
    assert found is not None
    raise found


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _short(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    return repr(value)[:60]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fields(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
