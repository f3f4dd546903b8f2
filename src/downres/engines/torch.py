"""Run a model in PyTorch itself."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..copying import copied, parameters
from ..errors import DownresError, first_line
from ..parse import BF16, FP16, FP32, INT8
from . import check_threads
from .engine import Engine, processor_flags
from .fuse import fused


class TorchRuntime:
    """A copy of the model in eval mode, branches that are for training alone put together (`fused`), in the layout that
    `fastest_layout` finds on the first batch, on the model's device.

    threads: of PyTorch's pool during a call; None takes all available cores. The pool's size is put back after each call.
    device: 'cuda' or the like, 'compile' for the CPU through torch.compile, None where the model is. precision: fp32, bf16,
    fp16.
    """

    name = "torch"

    def __init__(
        self, model: nn.Module, threads: int | None = None, *, device: str | None = None, precision: str = FP32
    ) -> None:
        self.name = self.name if device in (None, "cpu") else f"{self.name}:{device}"
        self.threads = check_threads(threads)
        self.versions = {"torch": str(torch.__version__)}
        self._model = nn.Module.eval(copied(model))
        self._compiled = device == "compile"
        self._plain = precision == FP32 and not self._compiled
        if device not in (None, "compile", "cpu"):
            self._model = self._model.to(device)
        if precision != FP32:
            self._model = self._model.to(_TYPES[precision])
        self._layout: torch.memory_format | None = None
        like = next(parameters(self._model), torch.empty(0))
        self._device, self._dtype = like.device, like.dtype

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """(b, c, h, w) float32 → the model's outputs, in order. Copying to numpy waits for the device. DownresError where a
        network does not run in another precision, or compiled, than it was written for.
        """
        try:
            return self._run(batch)
        except DownresError:
            raise
        except Exception as error:  # whatever a network fails with in numbers that nobody asked it to take
            if self._plain:
                raise
            raise DownresError(
                f"The network does not run so in {self.name} ({first_line(error)[:200]}): leave that out."
            ) from error

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        with threads_of(self.threads), torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(batch)).to(self._device, self._dtype)
            if self._layout is None:
                self._model = fused(self._model, x)
                self._layout = fastest_layout(self._model, x)
                if self._compiled:
                    self._model = torch.compile(self._model)  # type: ignore[assignment]
            outputs = self._model(x.contiguous(memory_format=self._layout))
            return tuple(_to_numpy(o) for o in as_tensors(outputs))


_TYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}


class TorchEngine(Engine):
    """PyTorch: on the CPU, through torch.compile (`torch:compile`), on CUDA (`torch:cuda`) or whatever else torch calls so."""

    name, file, exported = "torch", "model.onnx", False

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        if device not in ("cpu", "compile"):
            try:
                torch.empty(1, device=device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise DownresError(f"This torch has no {device} ({first_line(error)[:120]}): leave the device out.") from None

    def why_not(self, precision: str) -> str:
        if precision == INT8:
            return "its 8-bit networks are made by torchao, which downres does not do yet; onnxruntime and openvino have int8"
        if precision == BF16 and self.device in ("cpu", "compile") and not processor_flags() & _HAS_BF16:
            return "the processor has no bfloat16 instructions, torch would compute in float32 with casts"
        if precision == FP16 and self.device in ("cpu", "compile") and not processor_flags() & _HAS_FP16:
            return "the processor has no half-precision instructions, torch would compute in float32 with casts"
        return ""


_HAS_BF16 = {"avx512_bf16", "amx_bf16", "bf16", "avx10_1"}
_HAS_FP16 = {"avx512_fp16", "amx_fp16", "asimdhp", "avx10_1"}
ENGINE = TorchEngine


def as_tensors(outputs: Any) -> tuple[Tensor, ...]:
    """A model's output as a tuple of tensors; DownresError when it is neither a tensor nor a sequence of them."""
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(found, (tuple, list)) or not all(isinstance(o, Tensor) for o in found):
        raise DownresError(
            f"A model returns a tensor or a tuple of tensors, this one returns a {type(outputs).__name__}: "
            "wrap it in a module that picks the tensors."
        )
    return tuple(found)


def fastest_layout(model: nn.Module, x: Tensor) -> torch.memory_format:
    """Channels last, the faster layout on CPUs, where the model runs in it and answers the same; else the layout it came in.

    The model is left in that layout. A `view` of a map, for one, runs in the layout that it was written for alone.
    """
    few = x[:2]
    expected = model(few)
    try:
        model.to(memory_format=torch.channels_last)  # which a parameter of five axes refuses
        found = model(few.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3, equal_nan=True)
    except Exception:  # whatever a network fails with in a layout that nobody asked it to take
        model.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps nn.MultiheadAttention and nn.TransformerEncoder out of their fused kernels, which hide what they compute."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Keeps functions that torch.compile has made from running: on fake tensors their kernels crash the process."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
