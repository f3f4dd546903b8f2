"""Where a model runs: `torch.TorchRuntime`, `onnxruntime.OnnxRuntime`, both a `Runtime`."""

import os
from typing import Protocol

import numpy as np

from ..errors import DownresError


class Runtime(Protocol):
    """A model ready to run: call it with (b, c, h, w) float32, get the outputs in the model's order."""

    name: str
    versions: dict[str, str]
    threads: int

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]: ...


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine has when it is pinned (a container, taskset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int | None) -> int:
    """The number itself, or all available cores for None; DownresError below 1."""
    if threads is None:
        return available_cores()
    if threads < 1:
        raise DownresError(f"A runtime needs at least one thread, {threads} is too few: leave it out to use every core.")
    return threads
