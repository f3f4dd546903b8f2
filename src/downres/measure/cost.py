"""What one forward pass costs: MACs, parameters, peak activation memory."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..probe import batched, fake_run
from ..records import Cost
from .macs import does_arithmetic, macs_of, op_name

CONVENTION = (
    "1 MAC = 1 multiply + 1 add, for the whole batch. Counted: convolutions, linear layers, matrix products, attention "
    "(both products, causal or masked ones in full), and resizes at one MAC a tap (bilinear 4 an output value, bicubic 16, "
    "antialiased ones as two passes of the filter's width, nearest 0). Not counted: biases; and normalisation, activations, "
    "softmax, pooling (area resizes are pooling), additions and whatever else has no formula, listed by operator with the "
    "number of calls. Parameters: each once, however often it is shared; buffers are not parameters. Peak activation "
    "memory: the largest sum of simultaneously live storages that are not parameters, buffers or constants of the model "
    "(views share a storage), checked after every operator, the input counted until the last operator that reads it; "
    "workspace inside a kernel is not seen."
)
"""What the numbers of `measure_cost` mean, to be printed beside them."""


def measure_cost(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> Cost:
    """Exact counts for one forward pass in eval mode; see CONVENTION. The model is not touched and nothing is computed.

    input_size: (channels, height, width) for a batch of one, or (batch, channels, height, width).
    Raises DownresError when the size is neither, or when the model does not run at it.
    """
    seen = fake_run(model, input_size, _watch)
    parameters = list(model.parameters())
    return Cost(
        macs=seen.macs,
        params=sum(p.numel() for p in parameters),
        param_bytes=sum(p.numel() * p.element_size() for p in parameters),
        peak_activation_bytes=seen.live.peak,
        input_size=batched(input_size),
        uncounted=dict(sorted(seen.uncounted.items())),
    )


@contextmanager
def _watch(_model: nn.Module, x: Tensor) -> "Iterator[_Observer]":
    with _Observer(x) as observer:
        yield observer


class _Observer(TorchDispatchMode):
    """Sees every ATen operator of the forward pass."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.macs = 0
        self.uncounted: Counter[str] = Counter()
        self.live = LiveStorages(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about a tensor, such as its device
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # inference_mode inside a model lets compound operators through: look at what they are made of
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.live.before(_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        self.live.after(_tensors(out))
        macs = macs_of(func, args, kwargs, out)
        if macs is not None:
            self.macs += macs
        elif does_arithmetic(func):
            self.uncounted[op_name(func)] += 1
        return out


class LiveStorages:
    """Bytes of the storages that operators made and that nobody has dropped yet, with their peak."""

    def __init__(self, x: Tensor) -> None:
        self._input = x.untyped_storage()
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage → bytes
        self._given: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters, buffers, constants, the input
        self._reads_input = False
        self._peak_with_input = 0
        self._peak_since = 0

    @property
    def peak(self) -> int:
        """Bytes. Whoever called the model still holds the input; that is not held against the model once it is read."""
        return max(self._peak_with_input + self._input.nbytes(), self._peak_since)

    def before(self, tensors: Iterable[Tensor]) -> None:
        """The arguments of an operator: what none made before was there already."""
        self._reads_input = False
        for storage in map(Tensor.untyped_storage, tensors):
            if storage not in self._made:
                self._given[storage] = None
            self._reads_input |= storage._cdata == self._input._cdata

    def after(self, tensors: Iterable[Tensor]) -> None:
        """The results of the operator, its arguments still alive."""
        for storage in map(Tensor.untyped_storage, tensors):
            if storage not in self._given:
                self._made[storage] = storage.nbytes()
        self._peak_since = max(self._peak_since, sum(self._made.values()))
        if self._reads_input:
            self._peak_with_input, self._peak_since = max(self._peak_with_input, self._peak_since), 0


def _tensors(values: Any) -> list[Tensor]:
    """The tensors with a storage (sparse ones have none) in nested arguments."""
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout == torch.strided]
