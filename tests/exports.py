"""ONNX exports that are made once a session: hundreds of tests ask for the graph of the very same network, at a second each."""

import hashlib
import importlib
import io
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from downres.engines import onnxruntime

EXPORT = onnxruntime.export_onnx
USERS = ("searching.several", "searching.doctor", "measuring.latency", "recovery.bank")
"""Modules of downres that export, but for `check`, which does it to see whether the same comes out. What a test imports of
`downres.engines` itself exports each time, too."""
MOST = 64 * 2**20
BY_TORCH = torch.export.export, torch.onnx.export


class _Content(pickle.Pickler):
    """Writes all that a network is: its attributes, the numbers of its tensors, and the code that it runs."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.seen: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, (Tensor, FunctionType, type, ModuleType, CodeType)):
            return None
        known, number = id(value) in self.seen, self.seen.setdefault(id(value), len(self.seen))
        if known:
            return "again", number
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().numpy()
            kind = type(value).__name__, str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad
            return "tensor", kind, hashlib.sha256(array.tobytes()).digest()
        if isinstance(value, ModuleType):
            return "module", value.__name__
        if isinstance(value, CodeType):
            return "code", value.co_code, value.co_consts, value.co_names, value.co_varnames
        name = value.__module__, value.__qualname__
        if isinstance(value, type):
            if _found(value):
                # What it runs may be put in place of its own by a test: PyTorch's base class alone is taken as it is.
                ran = [base for base in value.__mro__ if base is not object and not base.__module__.startswith("torch.nn")]
                return "type", name, [(k, v) for base in ran for k, v in sorted(vars(base).items()) if _is_code(v)]
            own = {k: v for k, v in vars(value).items() if not k.startswith("__") or k in ("__call__", "__init__")}
            return "type", name, value.__bases__, [(k, getattr(v, "__func__", v)) for k, v in sorted(own.items())]
        if _found(value):
            return "function", name, value.__code__
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        globals_ = [(k, value.__globals__[k]) for k in _names(value.__code__) if k in value.__globals__]
        return "function", name, value.__code__, value.__defaults__, value.__kwdefaults__, cells, globals_


def _found(value: Any) -> bool:
    """Whether it is what an installed module has by this name: no file of a test, nothing made on the way."""
    found: Any = sys.modules.get(value.__module__)
    top = value.__module__.partition(".")[0]
    if top != "downres" and top not in sys.stdlib_module_names and "-packages" not in (getattr(found, "__file__", None) or ""):
        return False
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _is_code(value: Any) -> bool:
    return isinstance(value, FunctionType)


def _names(code: CodeType) -> list[str]:
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return sorted({*code.co_names, *inner})


def content(*values: Any) -> str | None:
    """The same for the same values; None where that cannot be said."""
    file = io.BytesIO()
    try:
        _Content(file).dump(values)
    except Exception:  # whatever does not pickle: a lock, a hook's own state
        return None
    return hashlib.sha256(file.getvalue()).hexdigest()


def once(folder: Path) -> Callable[..., Path]:
    """`export_onnx`, with a copy in `folder` of each file that it made."""

    def export(model: nn.Module, size: Sequence[int], path: str | Path, names: Sequence[str] = ("logits",), **how: Any) -> Path:
        patched = (torch.export.export, torch.onnx.export) != BY_TORCH
        key = None if patched else content(model, tuple(size), tuple(names), how)
        kept = folder / f"{key}.onnx"
        if key is None or not kept.exists():
            made = EXPORT(model, size, path, names, **how)
            if key is not None and made.stat().st_size <= MOST:
                partial = kept.with_suffix(".partial")  # which a test of a full disk may cut
                shutil.copy(made, partial)
                partial.replace(kept)
            return made
        return Path(shutil.copy(kept, path))

    return export


def patch(export: Callable[..., Path]) -> dict[ModuleType, Callable[..., Path]]:
    """Put in place of what these modules export with; returns what was there."""
    before = {}
    for name in USERS:
        module = importlib.import_module(f"downres.{name}")
        before[module] = vars(module)["export_onnx"]
        module.export_onnx = export  # type: ignore[attr-defined]
    return before
