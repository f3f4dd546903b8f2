"""Where a model runs: `torch.TorchRuntime`, `onnxruntime.OnnxRuntime`, both a `Runtime`."""

import os
from typing import Protocol

import numpy as np

from ..errors import DownresError

MOST_THREADS = 1024
"""More than any machine's cores would gain from; a typing error is likelier."""


class Runtime(Protocol):
    """A model ready to run: call it with (b, c, h, w) float32, get the outputs in the model's order."""

    name: str
    versions: dict[str, str]
    threads: int

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]: ...


class FileRuntime(Runtime, Protocol):
    """One that runs a file. inputs: (name, shape) of each, a free side by its name; outputs: their names."""

    inputs: list[tuple[str, list]]
    outputs: list[str]


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine has when it is pinned (a container, taskset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int | None) -> int:
    """The number itself, or all available cores for None; DownresError below 1 and above MOST_THREADS."""
    if threads is None:
        return available_cores()
    if not 1 <= threads <= MOST_THREADS:
        raise DownresError(
            f"A runtime has from 1 to {MOST_THREADS} threads, {threads} is out of range: leave it out to use every core."
        )
    return threads
