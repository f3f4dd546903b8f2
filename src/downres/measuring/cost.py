"""What one forward pass costs: MACs, parameters, peak activation memory."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..copying import first_float, refuse_sealed, unwrapped
from ..copying import parameters as parameters_of
from ..engines.fuse import fused, is_fusible, noise
from ..fakes import arguments
from ..macs import does_arithmetic, macs_of, op_name
from ..probe import FakeCopy, batched, channels_of, check_rows, materialised, rows
from ..records import Cost
from . import fastpath

CONVENTION = (
    "1 MAC = 1 multiply + 1 add, for the whole batch. Counted: convolutions, linear layers, matrix products, attention "
    "(both products, causal or masked ones in full), LSTMs, and resizes at one MAC a tap (bilinear 4 an output value, "
    "bicubic 16, antialiased ones as two passes of the filter's width, nearest 0). Not counted: biases; and normalisation, "
    "activations, softmax, pooling (area resizes are pooling), additions and whatever else has no formula, listed by operator "
    "with the number of calls. Parameters: each once, however often it is shared; buffers are not parameters. Peak activation "
    "memory: the largest sum of simultaneously live storages that are not parameters, buffers or constants of the model "
    "(views share a storage), checked after every operator, the input counted until the last operator that reads it. What an "
    "operator holds while it runs counts where it is as large as an activation (contiguous copies in convolutions and layer "
    "norms, on a CPU the first pass of an antialiased resize); the workspace of convolution, LSTM and fused attention kernels "
    "does not. Attention counts as the model runs it, fused or not; nn.MultiheadAttention on a CPU by its fast path, which "
    "holds the whole matrix of weights, unless torch.backends.mha.set_fastpath_enabled(False)."
)
"""What the numbers of `measure_cost` mean, to be printed beside them."""


def measure_cost(model: nn.Module, input_size: tuple[int, ...] | None = None, *, fuse: bool = True) -> Cost:
    """Exact counts for one forward pass in eval mode; see CONVENTION. The model is not touched and nothing is computed.

    input_size: (channels, height, width) for a batch of one, or (batch, channels, height, width); None: 224×224 pixels of as
    many channels as the first convolution takes. fuse: branches that are for training alone (RepVGG, MobileOne, …) are put
    together first, by the network's own code and where that gives the same outputs.
    Raises DownresError when the size is neither, or when the model does not run at it or gives other rows than one an image
    there, which it gives at its own size.
    """
    refuse_sealed(model)
    input_size = batched(input_size or (channels_of(unwrapped(model)), 224, 224))
    model = materialised(unwrapped(model), input_size)
    model = fused(model, noise((1, *input_size[1:]), first_float(model))) if fuse and is_fusible(model) else model
    return count(FakeCopy(model), input_size)


def count(copy: FakeCopy, input_size: tuple[int, ...]) -> Cost:
    """`measure_cost` of a network as it is. copy: of it, which may be counted at many sizes.

    input_size: (batch, channels, height, width).
    """
    seen = copy.run(input_size, partial(_watch, fast_path=torch.backends.mha.get_fastpath_enabled()))
    check_rows(copy.model, input_size, seen.rows)
    parameters = list(parameters_of(copy.model))
    return Cost(
        macs=seen.macs,
        params=sum(p.numel() for p in parameters),
        param_bytes=sum(p.numel() * p.element_size() for p in parameters),
        peak_activation_bytes=seen.live.peak,
        input_size=input_size,
        uncounted=dict(sorted(seen.uncounted.items())),
    )


@contextmanager
def _watch(model: nn.Module, x: Tensor, fast_path: bool = False) -> "Iterator[_Observer]":
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path and x.device.type == "cpu")  # elsewhere it is plain attention
    try:
        with _Observer(x) as observer:
            handle = model.register_forward_hook(lambda _model, _inputs, output: observer.rows.extend(rows(output)))
            yield observer
            handle.remove()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Observer(TorchDispatchMode):
    """Sees every ATen operator of the forward pass."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.macs = 0
        self.uncounted: Counter[str] = Counter()
        self.rows: list[int] = []
        self.live = LiveStorages(x)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: what keeps torch.compile out costs as much as an operator, and is for that alone."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about a tensor
            is_device = func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor)
            return args[0].fake_device if is_device else func(*args, **kwargs)
        if (parts := _parts(func)) is not None:
            with self:
                whole = parts(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        fakes: Any = getattr(self.x, "fake_mode", None)  # none where a copy with numbers runs
        tensors, key = arguments(func, args, kwargs, fakes)
        self.live.before(tensors)
        out = NotImplemented if fakes is None else fakes.quick(func, args, kwargs, tensors, key)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        cost = fakes.known.cost.get(key) if key is not None else None
        if cost is None:
            cost = held_bytes(op_name(func), args, out), macs_of(func, args, kwargs, out)
            if key is not None:
                fakes.known.cost[key] = cost
        held, macs = cost
        self.live.after(tensors_in((out,)), held)
        if macs is not None:
            self.macs += macs
        elif does_arithmetic(func):
            self.uncounted[op_name(func)] += 1
        return out


@cache
def _parts(func: Any) -> Callable | None:
    """What does the same by smaller operators, so that we see what a compound operator is made of."""
    if op_name(func) in _FUSED:
        return _FUSED[op_name(func)]
    # inference_mode inside a model lets these through
    compound = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return func.decompose if compound else None


_FUSED: dict[str, Callable] = {
    "aten._native_multi_head_attention": fastpath.attention,
    "aten._transformer_encoder_layer_fwd": fastpath.encoder_layer,
}


def held_bytes(name: str, args: tuple, out: Any) -> int:
    """Bytes that an operator holds, for as long as it runs, of tensors as large as activations."""
    if name == "aten.convolution":
        image_and_kernel = args[:2]  # copied where they are strided: both into channels-last layout when either is in it
        layouts = {suggest_memory_format(t) for t in image_and_kernel} - {torch.contiguous_format}
        layout = layouts.pop() if layouts and args[0].dim() > 3 else torch.contiguous_format
        return sum(_bytes(t) for t in image_and_kernel if not t.is_contiguous(memory_format=layout))
    if name == "aten.native_layer_norm" and not args[0].is_contiguous():
        return _bytes(args[0])
    if name.startswith("aten._upsample_") and name.endswith("2d_aa") and out.device.type == "cpu":
        return _bytes(args[0]) // args[0].shape[-1] * out.shape[-1]  # all rows at their new width, before the columns follow
    if name == "aten._safe_softmax":
        return args[0].numel()  # one byte each: which are minus infinity
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class LiveStorages:
    """Bytes of the storages that operators made and that nobody has dropped yet, with their peak."""

    def __init__(self, x: Tensor) -> None:
        self._input = x.untyped_storage()
        # By address; what was given stays referenced, so that no address of theirs is used again.
        self._given = {self._input._cdata: self._input}  # the input, parameters, buffers, constants
        self._made: dict[int, tuple[int, weakref.ref]] = {}  # bytes, and what takes them off when the storage goes
        self._live = 0
        self._reads_input = False
        self._peak_with_input = 0
        self._peak_since = 0

    @property
    def peak(self) -> int:
        """Bytes. Whoever called the model still holds the input; that is not held against the model once it is read."""
        return max(self._peak_with_input + self._input.nbytes(), self._peak_since)

    @property
    def made_peak(self) -> int:
        """Bytes of what operators made alone, the input not among them."""
        return max(self._peak_with_input, self._peak_since)

    def before(self, tensors: Iterable[Tensor]) -> None:
        """The arguments of an operator: what none made before was there already."""
        self._reads_input = False
        for storage in map(Tensor.untyped_storage, tensors):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = storage
            self._reads_input |= storage._cdata == self._input._cdata

    def after(self, tensors: Iterable[Tensor], held: int = 0) -> None:
        """The results of the operator, its arguments still alive. held: bytes that it held besides while it ran."""
        for storage in map(Tensor.untyped_storage, tensors):
            if storage._cdata not in self._given:
                self._dropped(storage._cdata)  # its size may have changed
                gone = weakref.ref(storage, lambda _, key=storage._cdata: self._dropped(key))  # type: ignore[misc]
                self._made[storage._cdata] = storage.nbytes(), gone
                self._live += storage.nbytes()
        self._peak_since = max(self._peak_since, self._live + held)
        if self._reads_input:
            self._peak_with_input, self._peak_since = max(self._peak_with_input, self._peak_since), 0

    def _dropped(self, key: int) -> None:
        self._live -= self._made.pop(key, (0,))[0]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors with a storage (sparse ones have none) in the arguments of an operator, some of which are lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found
