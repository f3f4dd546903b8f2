"""Wall-clock time of a forward pass, candidates measured in turns so that a noisy machine disturbs all alike."""

import platform
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import nn

from ..copying import refuse_sealed, unwrapped
from ..engines import Runtime, available_cores
from ..engines.onnxruntime import OnnxRuntime, export_onnx
from ..engines.torch import TorchRuntime
from ..errors import DownresError
from ..probe import channels_of, materialised
from ..records import Latency

RUNTIMES = ("onnxruntime", "torch")

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


def measure_latency(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    runtime: str = "onnxruntime",
    batch_size: int = 1,
    threads: int | None = None,
    runs: int = 30,
    warmup: int = 5,
) -> Latency:
    """The latency of one model on random images; `search` times several in turns, which compares them fairly.

    input_size: (channels, height, width); None: 224×224 pixels of as many channels as the first convolution takes.
    threads: None takes all available cores.
    Raises DownresError for an unknown runtime, or for a model that the runtime cannot run.
    """
    if batch_size < 1:
        raise DownresError(f"A batch has at least one image, {batch_size} is too few: give for example 1.")
    refuse_sealed(model)
    input_size = input_size or (channels_of(unwrapped(model)), 224, 224)
    if len(input_size) != 3 or min(input_size) < 1:
        raise DownresError(f"An input size is (channels, height, width), {input_size} is not: give (3, 224, 224).")
    batch, model = random_batch((batch_size, *input_size)), materialised(model, input_size)
    ready = load_runtime(model, input_size, runtime=runtime, threads=threads)
    return interleaved({"model": ready}, {"model": batch}, runs=runs, warmup=warmup)["model"]


def load_runtime(
    model: nn.Module, input_size: tuple[int, int, int], *, runtime: str = "onnxruntime", threads: int | None = None
) -> Runtime:
    """The model, ready to run by the runtime of that name; 'onnxruntime' exports it to a temporary file first."""
    if runtime not in RUNTIMES:
        raise DownresError(f"The runtime is one of {', '.join(RUNTIMES)}, {runtime!r} is not: give one of them.")
    if runtime == "torch":
        return TorchRuntime(model, threads)
    with tempfile.TemporaryDirectory() as folder:
        return OnnxRuntime(export_onnx(model, input_size, Path(folder) / "model.onnx").read_bytes(), threads)


def interleaved(
    runtimes: Mapping[str, Runtime],
    inputs: Mapping[str, np.ndarray],
    *,
    runs: int = 30,
    warmup: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Times every candidate `runs` times, one call each a round, the order of a round shuffled anew (from `seed`).

    The first is what the others are compared with, round by round (`Latency.ratio`).
    inputs: for each candidate its batch, (b, c, h, w) float32. warmup: untimed calls of each candidate before the first
    round.
    """
    seconds = rounds(runtimes, inputs, runs=runs, warmup=warmup, seed=seed, progress=progress)
    first = next(iter(seconds)) if len(seconds) > 1 else None
    return {
        name: described(runtimes[name], inputs[name], times, None if first is None else times_as_fast(seconds[first], times))
        for name, times in seconds.items()
    }


def rounds(
    runtimes: Mapping[str, Runtime],
    inputs: Mapping[str, np.ndarray],
    *,
    runs: int,
    warmup: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Seconds of each candidate in every round, as `interleaved` times them: any two can be compared, round by round."""
    if runs < 1 or warmup < 0:
        raise DownresError(f"Timing needs at least one run and no negative warm-up; runs={runs}, warmup={warmup} is not that.")
    for name, runtime in runtimes.items():
        for _ in range(warmup):
            runtime(inputs[name])

    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    order, shuffle, done, total = list(runtimes), random.Random(seed).shuffle, 0, runs * len(runtimes)
    for _ in range(runs):
        shuffle(order)
        for name in order:
            runtime, batch = runtimes[name], inputs[name]
            start = time.perf_counter()
            runtime(batch)
            seconds[name].append(time.perf_counter() - start)
            done += 1
            if progress is not None:
                progress("latency", done, total)
    return {name: np.array(times) for name, times in seconds.items()}


def random_batch(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Standard normal float32 of that shape: zeros could be faster than photographs."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def processor() -> str:
    """Its name, for example 'AMD EPYC 7B13'."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return name


def hardware() -> str:
    """Processor, cores available and operating system, for example 'AMD EPYC 7B13, 2 cores, Linux x86_64'."""
    cores = available_cores()
    return f"{processor()}, {cores} core{'s' * (cores > 1)}, {platform.system()} {platform.machine()}"


def described(runtime: Runtime, batch: np.ndarray, seconds: np.ndarray, ratio: tuple[float, float] | None = None) -> Latency:
    """The record of what was timed. ratio: see `Latency`."""
    p10, median, p90 = (float(ms) for ms in np.percentile(seconds * 1000, (10, 50, 90)))
    return Latency(
        latency_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        runs=len(seconds),
        batch_size=len(batch),
        runtime=runtime.name,
        threads=runtime.threads,
        hardware=hardware(),
        versions={"python": platform.python_version(), "numpy": np.__version__, **runtime.versions},
        ratio=ratio,
    )


def times_as_fast(than: np.ndarray, seconds: np.ndarray) -> tuple[float, float] | None:
    """A 95 % interval of the median of `than` over `seconds`, round by round, by order statistics; None of too few to have one
    (fewer than six).
    """
    from scipy.stats import quantile_test

    found = quantile_test(than / seconds, q=1.0, p=0.5).confidence_interval(0.95)
    return (float(found.low), float(found.high)) if np.isfinite([found.low, found.high]).all() else None
