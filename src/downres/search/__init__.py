"""The main job and its parts: plan, run, store, select."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .costs import costs
    from .curve import curve
    from .results import Run, load_run
    from .run import search
    from .single import evaluate, recover
    from .task import prepare
    from .view import write_report

__all__ = ["Run", "costs", "curve", "evaluate", "load_run", "prepare", "recover", "search", "write_report"]

# Costs need none of what runs, fits and draws the others: scikit-learn, SciPy, ONNX Runtime and Plotly take seconds.
_HOMES = {
    "costs": ("costs",),
    "curve": ("curve",),
    "results": ("Run", "load_run"),
    "run": ("search",),
    "single": ("evaluate", "recover"),
    "task": ("prepare",),
    "view": ("write_report",),
}
lazy(__name__, _HOMES)
