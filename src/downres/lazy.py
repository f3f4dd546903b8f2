"""Names of a package that are imported when they are first used."""

import contextlib
import gc
import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Where very many objects are made that stay (imports) or die by themselves: Python's collector looks at all in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def lazy(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """`package` offers names of its submodules, each imported when somebody asks for it.

    homes: submodule → the names that come from it. A name that a submodule has too stays what comes from it, whenever the
    submodule is imported: Python would bind the submodule there.
    """
    home = {name: module for module, names in homes.items() for name in names}

    class Package(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in home:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            with no_collector():
                value = getattr(importlib.import_module(f".{home[name]}", package), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in home and isinstance(value, types.ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted(home)

    sys.modules[package].__class__ = Package
