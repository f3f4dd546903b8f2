"""`Record`: a frozen dataclass that goes to JSON and back."""

import dataclasses
import types
import typing
from typing import Any, Self


class Record:
    """Frozen dataclass that turns into plain JSON values and back, nested records included."""

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: _typed(hints[k], v) for k, v in values.items() if k in known})


def plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        if isinstance(value, list):
            kinds = [a for a in kinds if typing.get_origin(a) in (tuple, list)]
        elif isinstance(value, dict):  # of several records the one whose fields these are
            kinds = sorted(kinds, key=lambda kind: len(_fields(kind) ^ value.keys()))
        return _typed(kinds[0], value) if kinds else value
    if origin is tuple:
        inner = args[0] if args else Any
        return tuple(_typed(inner, v) for v in value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    return value


def _fields(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
