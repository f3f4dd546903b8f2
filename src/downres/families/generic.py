"""A function in a file of the user's that returns an `nn.Module`."""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..copying import copied, is_lazy, modules, refuse_sealed, single, tensors_of, unwrapped
from ..errors import DownresError, first_line, shown
from ..parse import format_resolution
from ..probe import input_size_of, materialised
from ..records import Preprocessing
from .find import find_adapter


def from_file(spec: str, what: str = "model") -> Any:
    """`path/to/file.py:name` → what has that name in the file. Runs the file: the user named it."""
    file, _, function = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        name = "function" if what == "model" else "Class"
        raise DownresError(f"There is no file {path}: give the {what} as path/to/file.py:{name}.")
    module_spec = importlib.util.spec_from_file_location(shown(path.stem), path)
    assert module_spec is not None and module_spec.origin is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(module.__name__, module)
    with _running(f"Running {path}", path):
        # Compiled here, and named as shown: torch's exporter writes names down, and fails at one that is no UTF-8.
        exec(compile(path.read_bytes(), shown(module_spec.origin), "exec"), vars(module))
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
    return ready(model)


@contextlib.contextmanager
def _running(what: str, path: Path) -> Iterator[None]:
    """The user's code runs as a script would: files beside it can be imported. What it raises becomes one sentence."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except (Exception, SystemExit) as error:
        text = first_line(error, "no message")
        then = "install it" if isinstance(error, ModuleNotFoundError) else "correct the file"
        raise DownresError(f"{what} failed ({type(error).__name__}: {text}): {then}.") from error
    finally:
        sys.path.remove(folder)


def ready(model: nn.Module) -> nn.Module:
    """The module as it is measured: on the CPU, in single precision, in eval mode; itself where it is all that, else a copy."""
    refuse_sealed(model)
    as_it_is = unwrapped(model) is model and not is_lazy(model) and not any(m.training for m in modules(model))
    if as_it_is and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors_of(model) if t.is_floating_point()
    ):
        return model
    return single(copied(materialised(model)))


def _of_channels(found: Preprocessing, channels: int) -> Preprocessing:
    """The same for a network of another number of channels: of one channel the averages, of more 0.5, and said so."""
    if len(found.mean) == channels:
        return found
    grey = channels == 1
    mean, std = ([fmean(found.mean)], [fmean(found.std)]) if grey else ([0.5] * channels, [0.5] * channels)
    how = "averaged over the colours" if grey else "0.5"
    source = f"{found.source}; for its {channels} channel{'s' * (channels > 1)} mean and std {how}, assumed"
    return dataclasses.replace(found, mean=tuple(mean), std=tuple(std), source=source, guessed=not grey)


def preprocessing(model: nn.Module) -> Preprocessing:
    """What the module says of itself (timm's `pretrained_cfg`), else ImageNet's usual numbers, marked as assumed.

    The resolution is that which a network of fixed size is built for, whatever else is said of it.
    """
    if getattr(model, "pretrained_cfg", None):
        from . import timm

        found, size = timm.preprocessing(model, ""), input_size_of(model)
    else:
        _, height, width = size = input_size_of(model)
        source = f"assumed: ImageNet's mean and std, {format_resolution((height, width))} px, crop ratio 0.875"
        found = Preprocessing((height, width), 0.875, "bilinear", source=source, any_size=True)
    found = _of_channels(found, size[0])
    transformer = find_adapter(model)
    if transformer is None or transformer.image in (None, found.hw):
        return found
    source = f"{found.source}; {format_resolution(transformer.image)} px is what the network is built for"
    return dataclasses.replace(found, resolution=transformer.image, source=source)
