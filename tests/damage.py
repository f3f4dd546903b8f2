"""Every place in a JSON document, and the document with another value there: what damaged files are made with."""

import json
from collections.abc import Iterator
from typing import Any

Place = tuple[Any, ...]


def paths(value: Any, at: Place = ()) -> Iterator[Place]:
    """The names and indices that lead to each value in it; () is the whole."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from paths(child, (*at, name))


def changed(document: Any, at: Place, value: Any) -> Any:
    """A copy with another value at a path; `...` deletes it."""
    if not at:
        return value
    copied = json.loads(json.dumps(document))
    owner = copied
    for name in at[:-1]:
        owner = owner[name]
    if value is ...:
        del owner[at[-1]]
    else:
        owner[at[-1]] = value
    return copied
