"""What one engine does with a network, behind one interface: make its file, quantize it, run it, say what is in it."""

import contextlib
import importlib
import importlib.util
import io
import logging
import platform
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import DownresError
from ..parse import FP32, INT8, check_runtime
from ..record import Record
from . import FileRuntime

if TYPE_CHECKING:
    import onnx

RANGES = ("minmax", "percentile", "entropy")
"""How the range of an activation is taken from what is seen on calibration images: all of it; without the largest 0.001 %; that
which loses the least information (Kullback-Leibler).
"""
BY_NNCF = "nncf"
"""Of ONNX, where NNCF is installed: it takes the ranges, all of what is seen, and corrects the biases for what is lost."""
LEAST_OPSET = 18
"""Of ONNX; whatever downres writes has it or a later one."""
LEAST_CALIBRATION = 16
"""Images below which a range is luck."""

PROFILED = 10
"""Passes of a profiler, after the first, in which memory is taken."""


@dataclass(frozen=True)
class Batches:
    """Calibration images in batches. make: the batches (b, c, h, w) float32, from the start each time it is called, which may
    decode and resize; images, count: how many images and how many batches these are.
    """

    make: Callable[[], Iterator[np.ndarray]]
    images: int
    count: int

    @classmethod
    def of(cls, batches: Sequence[np.ndarray]) -> "Batches":
        """What is in memory already."""
        return cls(lambda: iter(batches), sum(map(len, batches)), len(batches))


@dataclass(frozen=True)
class Quantization(Record):
    """How a network is quantized. ranges: of activations, one of `Engine.ranges`; kept: layers that stay in float, by the names
    of their weights in the network's state dict.
    """

    ranges: str = RANGES[0]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        many = f", {len(self.kept)} layer{'s' * (len(self.kept) != 1)} in float" if self.kept else ""
        return f"{self.ranges} ranges{many}"


@dataclass(frozen=True)
class Layers(Record):
    """Convolutions and matrix products of a file, by operator: how many compute in 8 bits, how many in float."""

    quantized: dict[str, int]
    in_float: dict[str, int]

    def __str__(self) -> str:
        parts = [
            f"{what}: {', '.join(f'{n} {kind}' for kind, n in sorted(found.items())) or 'none'}"
            for what, found in (("in 8 bits", self.quantized), ("in float", self.in_float))
        ]
        return "; ".join(parts)


@dataclass(frozen=True)
class Operator:
    """One of what a runtime executes, once its own optimisations are done.

    kind: as the engine calls it; takes: names of those whose results it reads; in_8_bits: whether what it reads is in 8 bits;
    converts: it changes the type or layout of numbers and computes nothing; us: microseconds in a pass, by the engine's own
    profiler.
    """

    name: str
    kind: str
    takes: tuple[str, ...]
    in_8_bits: bool
    converts: bool
    us: float


class QuantizationFailed(DownresError):
    """A network that this engine cannot quantize; why in words."""


class Engine(ABC):
    """Where networks run. device: as the engine names it, in small letters.

    name: that of `--runtime`; file: of a shipped model; exported: whether it starts from an ONNX file. One that does not runs
    networks and has no files: all that is of files is refused.
    alone: a program that needs nothing but NumPy and the engine: `python -c alone FILE THREADS B C H W` loads the file,
    answers once and prints two numbers, the peak resident memory before and after, in KiB; '' where there is none.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    exported: ClassVar[bool] = True
    alone: ClassVar[str] = ""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @property
    def text(self) -> str:
        """As `--runtime` has it."""
        return self.name if self.device == "cpu" else f"{self.name}:{self.device}"

    @property
    def ranges(self) -> tuple[str, ...]:
        """How it can take the ranges of activations, the first unless another is asked for."""
        return RANGES

    @abstractmethod
    def why_not(self, precision: str) -> str:
        """Why this engine does not compute in that precision on this machine, '' where it does."""

    def refuse(self, precision: str) -> None:
        if why := self.why_not(precision):
            raise DownresError(f"{self.text} does not compute in {precision} here: {why}.")

    def without_files(self) -> DownresError:
        return DownresError(f"{self.text} runs networks and no files: use onnxruntime or openvino.")

    def write(self, exported: Path, path: Path, precision: str) -> None:
        """Makes the engine's file of an exported network."""
        raise self.without_files()

    def quantize(
        self,
        exported: Path,
        path: Path,
        images: Batches,
        how: Quantization,
        head: np.ndarray | None,
        ranges: Path | None = None,
    ) -> None:
        """Makes an int8 file of an exported network. head: weight (K, F) of the linear layer that stays in float, with all that
        comes after it. ranges: a file where an engine that can keeps the ranges of activations, and finds them again for the
        same network, images and `how.ranges`. Raises QuantizationFailed where that is not possible.
        """
        raise self.without_files()

    def layers(self, file: Path) -> Layers:
        """What of a file computes in 8 bits."""
        raise self.without_files()

    def layer_names(self, exported: Path, head: np.ndarray | None) -> list[str]:
        """The layers of an exported network that `quantize` takes to 8 bits unless they are kept, in the order they run."""
        raise self.without_files()

    def executed(self, file: Path, batch: np.ndarray, threads: int | None = None) -> list[Operator]:
        """What runs when an int8 file does, in order, timed over `PROFILED` passes."""
        raise self.without_files()

    def load(
        self,
        file: Path,
        threads: int | None = None,
        limit_s: float | None = None,
        *,
        precision: str = FP32,
        spread: bool = False,
    ) -> FileRuntime:
        """The file ready to run. spread: for many images, see `OnnxRuntime`."""
        raise self.without_files()

    def with_tensors(self, file: Path, tensors: Mapping[str, np.ndarray], path: Path) -> bool:
        """Writes the file with other values for tensors of these names in the network's state dict; False where it has not
        all."""
        return False

    def put_in_front(self, front: "onnx.ModelProto", file: Path, path: Path) -> None:
        """Writes the file with what another graph gives as its input. front: of opset LEAST_OPSET, one input and one output."""
        raise self.without_files()

    def up_to(self, file: Path, tensor: str, path: Path) -> None:
        """Writes what of a file leads to a tensor."""
        raise self.without_files()

    def provider(self, precision: str) -> tuple[str, ...]:
        """What a program that serves a file has to ask the engine for, in its own words."""
        return ()

    def files(self, file: Path) -> list[Path]:
        """All that belongs to a file."""
        return [file]


_NEEDS = {"openvino": (("openvino", "nncf"), "downres[openvino]")}


def engine_of(runtime: str) -> Engine:
    """The engine of a name such as `openvino` or `onnxruntime:cuda`. DownresError where it is not installed."""
    name, _, device = check_runtime(runtime).partition(":")
    needed, how = _NEEDS.get(name, ((), ""))
    if any(importlib.util.find_spec(module) is None for module in needed):
        raise DownresError(f"The runtime {name} is not installed: pip install '{how}'.")
    found: Any = importlib.import_module(f".{name}", __package__).ENGINE
    made: Engine = found(device or "cpu")
    return made


def is_whole_file(engine: Engine, file: Path) -> bool:
    return all(one.is_file() for one in engine.files(file))


@cache
def processor_flags() -> frozenset[str]:
    """Instruction sets of the processor as Linux names them; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").partition(":")[2].split())


def sums_saturate() -> bool:
    """Whether 8-bit products are added in 16 bits, which overflow: x86 without VNNI. Weights of 7 bits keep within them."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return x86 and not processor_flags() & {"avx512_vnni", "avx_vnni", "avx10_1"}


def check_calibration(count: int) -> None:
    """DownresError for too few images."""
    if count < LEAST_CALIBRATION:
        raise QuantizationFailed(
            f"{INT8} is calibrated on at least {LEAST_CALIBRATION} training images, there are {count}: give more, or leave "
            "int8 out."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers print, warn and log their progress; standard output belongs to `--json`."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def plain_name(name: str) -> str:
    """A tensor's name in a graph as the network's state dict has it: what makes it ready to be served stands around it."""
    return re.sub(r"^(model|network)\.", "", name)


def is_head(values: np.ndarray, head: np.ndarray) -> bool:
    """Whether these are the weights of the head, as it has them or transposed."""
    return any(v.shape == head.shape and np.array_equal(v, head) for v in (values, values.T))


def after(roots: Sequence[str], edges: dict[str, list[str]]) -> set[str]:
    """The roots and all that comes after them in a graph, node → nodes that take what it gives."""
    found, todo = set(roots), list(roots)
    while todo:
        for follower in edges.get(todo.pop(), ()):
            if follower not in found:
                found.add(follower)
                todo.append(follower)
    return found
