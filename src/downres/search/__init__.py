"""The main job and its parts: plan, run, store, select."""

from .costs import costs
from .curve import curve
from .results import Run, load_run
from .run import search
from .single import evaluate, recover
from .task import prepare
from .view import write_report

__all__ = ["Run", "costs", "curve", "evaluate", "load_run", "prepare", "recover", "search", "write_report"]
