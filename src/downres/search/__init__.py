"""The main job and its parts: plan, run, store, select."""

from .curve import curve
from .run import Run, load_run, search
from .task import prepare

__all__ = ["Run", "curve", "load_run", "prepare", "search"]
