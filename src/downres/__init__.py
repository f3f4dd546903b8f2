"""downres: compress vision models by letting them look at fewer pixels."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import Finding, MaskPrediction, Prediction, check, predict
    from .axes import Axes
    from .data import Dataset, Fold, Images, MaskDataset, MaskFolder, find_masks, from_arrays, open_folder, open_masks
    from .demo import demo
    from .errors import DownresError
    from .families import Model, load_model, with_preprocessing
    from .measure.cost import CONVENTION, measure_cost
    from .measure.latency import measure_latency
    from .models.regseg import regseg
    from .records import (
        Budget,
        Candidate,
        Change,
        Cost,
        Dense,
        Drop,
        Latency,
        Merge,
        Preprocessing,
        Quality,
        Recovery,
        Result,
        Rung,
        SegmentationQuality,
    )  # fmt: skip
    from .reduction import Reduction, reduce, token_map
    from .reductions.dense import Segmenter
    from .search import Run, costs, curve, evaluate, load_run, recover, search, write_report

__all__ = [
    # the verbs
    "reduce", "token_map", "measure_cost", "measure_latency", "evaluate", "recover", "costs", "curve", "search", "demo",
    "check", "predict", "write_report",
    # models and data
    "load_model", "with_preprocessing", "Model", "open_folder", "from_arrays", "Dataset", "Images", "Fold",
    "find_masks", "open_masks", "MaskFolder", "MaskDataset", "Segmenter", "regseg",
    # records
    "Candidate", "Merge", "Axes", "Budget", "Cost", "Latency", "Quality", "SegmentationQuality", "Dense", "Drop",
    "Preprocessing", "Recovery", "Rung", "Result", "Run", "Change", "Reduction", "Finding", "Prediction", "MaskPrediction",
    "load_run", "CONVENTION", "DownresError",
]  # fmt: skip

# Importing torch, timm and the runtimes takes seconds; a name is imported when it is first used, so that
# `downres --help` and a mistyped option answer at once. The imports above say the same to type checkers.
_HOMES = {
    "artifact": ("Finding", "MaskPrediction", "Prediction", "check", "predict"),
    "axes": ("Axes",),
    "data": (
        "Dataset", "Fold", "Images", "MaskDataset", "MaskFolder", "find_masks", "from_arrays", "open_folder", "open_masks",
    ),
    "demo": ("demo",),
    "errors": ("DownresError",),
    "families": ("Model", "load_model", "with_preprocessing"),
    "measure.cost": ("CONVENTION", "measure_cost"),
    "measure.latency": ("measure_latency",),
    "records": (
        "Budget", "Candidate", "Change", "Cost", "Dense", "Drop", "Latency", "Merge", "Preprocessing", "Quality", "Recovery",
        "Result", "Rung", "SegmentationQuality",
    ),
    "models.regseg": ("regseg",),
    "reductions.dense": ("Segmenter",),
    "reduction": ("Reduction", "reduce", "token_map"),
    "search": ("Run", "costs", "curve", "evaluate", "load_run", "recover", "search", "write_report"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'downres' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Python binds an imported submodule's name here; `search`, `recover` and `demo` must stay the functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
