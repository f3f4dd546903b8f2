"""A function in a file of the user's that returns an `nn.Module`."""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DownresError
from ..parse import format_resolution
from ..probe import input_size_of
from ..records import Preprocessing
from .find import find_adapter


def from_file(spec: str, what: str = "model") -> Any:
    """`path/to/file.py:name` → what has that name in the file. Runs the file: the user named it."""
    file, _, function = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        name = "function" if what == "model" else "Class"
        raise DownresError(f"There is no file {path}: give the {what} as path/to/file.py:{name}.")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(path.stem, module)
    with _running(f"Running {path}", path):
        module_spec.loader.exec_module(module)
    maker = getattr(module, function, None)
    if not callable(maker):
        found = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise DownresError(f"{path} has no function {function!r}: it has {', '.join(found) or 'none'}.")
    return maker


def create(spec: str) -> nn.Module:
    """`path/to/file.py:function` → the module that the function returns."""
    maker = from_file(spec)
    file, _, function = spec.rpartition(":")
    path = Path(file)
    with _running(f"{function}() in {path}", path):
        model = maker()
    if not isinstance(model, nn.Module):
        raise DownresError(f"{function}() in {path} must return a torch.nn.Module, it returned {type(model).__name__}.")
    return model


@contextlib.contextmanager
def _running(what: str, path: Path) -> Iterator[None]:
    """The user's code runs as a script would: files beside it can be imported. What it raises becomes one sentence."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except (Exception, SystemExit) as error:
        text = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        then = "install it" if isinstance(error, ModuleNotFoundError) else "correct the file"
        raise DownresError(f"{what} failed ({type(error).__name__}: {text}): {then}.") from error
    finally:
        sys.path.remove(folder)


def preprocessing(model: nn.Module) -> Preprocessing:
    """What the module says of itself (timm's `pretrained_cfg`), else ImageNet's usual numbers, marked as assumed.

    The resolution is that which a network of fixed size is built for, whatever else is said of it.
    """
    if getattr(model, "pretrained_cfg", None):
        from . import timm

        found = timm.preprocessing(model, "")
    else:
        _, height, width = input_size_of(model)
        source = f"assumed: ImageNet's mean and std, {format_resolution((height, width))} px, crop ratio 0.875"
        found = Preprocessing((height, width), 0.875, "bilinear", source=source, any_size=True)
    transformer = find_adapter(model)
    if transformer is None or transformer.image in (None, found.hw):
        return found
    source = f"{found.source}; {format_resolution(transformer.image)} px is what the network is built for"
    return dataclasses.replace(found, resolution=transformer.image, source=source)
