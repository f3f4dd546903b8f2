"""What a real forward pass does, counted without `downres.measuring`: MACs by hand formulas, memory by the allocator.

MACs: forward hooks on convolutions, linear layers and multi-head attention; what runs outside those modules (attention
written with matrix products, functional convolutions, resizes) is seen as it is called, by a `TorchFunctionMode`. Every
formula is written here from the shapes seen, and none is taken from torch or downres.

Memory: the profiler's allocation events, that is each call of the CPU allocator with its bytes and its address.
"""

import contextlib
import copy
import functools
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[tuple, dict[str, Any], Any]
"""Arguments, keyword arguments and result of a call."""


@dataclass
class Counted:
    """MACs of one pass, in all and by kind; number of operators that read the input."""

    macs: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    reads: int = 0


def count(model: nn.Module, input_size: tuple[int, ...]) -> Counted:
    """Runs a copy of the model on zeros of (batch, channels, height, width) and counts."""
    model, x = copy.deepcopy(model).eval(), _zeros(model, input_size)
    counting = _Counting()
    with torch.no_grad(), _hooks(model, counting), counting, _Reading(x) as reading:
        model(x)
    counting.found.macs, counting.found.reads = counting.found.by_kind.total(), reading.reads
    return counting.found


# --- MACs: modules ------------------------------------------------------------------------------------------------


def _conv(weight: Tensor, x: Tensor, y: Tensor) -> int:
    """Each output value is a sum over the kernel and the channels of its group."""
    return y.numel() * math.prod(weight.shape[1:])


def _transposed(weight: Tensor, x: Tensor, y: Tensor) -> int:
    """Each input value is spread over the kernel and the output channels of its group."""
    return x.numel() * math.prod(weight.shape[1:])


def _linear(weight: Tensor, x: Tensor, y: Tensor) -> int:
    return y.numel() * weight.shape[1]


def _attend(batch: int, heads: int, queries: int, keys: int, depth: int, value_depth: int) -> int:
    """q·kᵀ, then the weights times v."""
    return batch * heads * queries * keys * (depth + value_depth)


def _multi_head(query: Tensor, key: Tensor, value: Tensor, heads: int, batch_first: bool) -> Counter[str]:
    """Three projections in, attention, one projection out."""
    width, (queries, keys) = query.shape[-1], (t.shape[-2 if batch_first else 0] for t in (query, key))
    batch = query.numel() // (queries * width)
    rows = queries * width + keys * key.shape[-1] + keys * value.shape[-1] + queries * width
    depth = width // heads
    return Counter(linear=batch * rows * width, attention=_attend(batch, heads, queries, keys, depth, depth))


def _recurrent(module: nn.RNNBase, x: Tensor) -> int:
    """Every position meets every weight matrix: those of the input and those of the state, layer by layer, both ways."""
    return x.numel() // x.shape[-1] * sum(p.numel() for p in module.parameters() if p.dim() == 2)


_MODULES: tuple[tuple[tuple[type, ...], str, Callable], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "convolution", _conv),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "convolution", _transposed),
    ((nn.Linear,), "linear", _linear),
)


@contextlib.contextmanager
def _hooks(model: nn.Module, counting: "_Counting") -> Iterator[None]:
    handles = []

    def enter(_module: nn.Module, _args: tuple) -> None:
        counting.inside += 1

    def leave(module: Any, args: tuple, kwargs: dict, y: Any) -> None:
        counting.inside -= 1
        if counting.inside:
            return
        if isinstance(module, nn.MultiheadAttention):
            q, k, v = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key", "value")))
            counting.found.by_kind += _multi_head(q, k, v, module.num_heads, module.batch_first)
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, nn.RNNBase):
            counting.found.by_kind["recurrent"] += _recurrent(module, x)
            return
        kind, formula = next((kind, formula) for types, kind, formula in _MODULES if isinstance(module, types))
        counting.found.by_kind[kind] += formula(module.weight, x, y)

    known = (nn.MultiheadAttention, nn.RNNBase, *(t for types, _, _ in _MODULES for t in types))
    for module in model.modules():
        if isinstance(module, known):
            handles.append(module.register_forward_pre_hook(enter))
            # Before the hooks that are there: those may change the output, and what they call is outside the module.
            handles.append(module.register_forward_hook(leave, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- MACs: functions ----------------------------------------------------------------------------------------------


class _Counting(TorchFunctionMode):
    """Sees every call of torch's Python functions and tensor methods, but not what they call in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.inside = Counted(), 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside:
            name = _name(func)
            if name in _REFUSED:
                raise NotImplementedError(f"a formula for {name}")
            if (known := _FUNCTIONS.get(name)) is not None:
                kind, formula = known
                self.found.by_kind[kind] += formula((args, kwargs, out))
        return out


def _name(func: Any) -> str:
    """`matmul` for torch.matmul, Tensor.matmul and Tensor.__matmul__ alike."""
    name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
    return name.strip("_")


def _argument(call: Call, position: int, name: str, default: Any = None) -> Any:
    args, kwargs, _ = call
    return args[position] if len(args) > position else kwargs.get(name, default)


def _product(first: int) -> Callable[[Call], int]:
    """A matrix product whose first factor is argument `first`: each output value sums over the factor's columns."""
    names = ("input", "mat1") if first else ("self",)
    return lambda call: call[2].numel() * (call[0][first] if len(call[0]) > first else call[1][names[-1]]).shape[-1]


def _einsum(call: Call) -> int:
    """One MAC for each combination of all indices. Two operands, or the order of the sums would matter."""
    equation, *operands = call[0]
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        raise NotImplementedError(f"einsum {equation}")
    sizes = {
        letter: n for term, operand in zip(terms, operands, strict=True) for letter, n in zip(term, operand.shape, strict=True)
    }
    return math.prod(sizes.values())


def _functional_attention(call: Call) -> int:
    q, k, v = (_argument(call, i, name) for i, name in enumerate(("query", "key", "value")))
    return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _functional_conv(formula: Callable) -> Callable[[Call], int]:
    return lambda call: formula(_argument(call, 1, "weight"), _argument(call, 0, "input"), call[2])


def _interpolate(call: Call) -> int:
    """Input values that an output value is made of, as PIL and torch lay out their filters."""
    x, y = _argument(call, 0, "input"), call[2]
    mode, antialias = _argument(call, 3, "mode", "nearest"), _argument(call, 6, "antialias", False)
    if mode in ("nearest", "nearest-exact", "area"):
        return 0
    if not antialias:
        return y.numel() * {"linear": 2, "bilinear": 4, "bicubic": 16, "trilinear": 8}[mode]
    if _argument(call, 2, "scale_factor") is not None and _argument(call, 5, "recompute_scale_factor") is not True:
        raise NotImplementedError("an antialiased resize by a factor that is not that of the sizes")
    if _argument(call, 4, "align_corners"):
        raise NotImplementedError("an antialiased resize with aligned corners")
    radius = {"bilinear": 1, "bicubic": 2}[mode]  # of the filter, in pixels of the coarser of both grids

    def window(before: int, after: int) -> int:
        return 2 * math.ceil(radius * max(1.0, before / after)) + 1

    (*_, height, width), (batch, channels, new_height, new_width) = x.shape, y.shape
    # separable: every row to its new width, then every column of those to its new height
    rows = batch * channels * height * new_width * window(width, new_width) * (width != new_width)
    columns = batch * channels * new_height * new_width * window(height, new_height) * (height != new_height)
    return rows + columns


def _grid_sample(call: Call) -> int:
    mode = _argument(call, 2, "mode", "bilinear")
    return call[2].numel() * {"bilinear": 2 ** (call[2].dim() - 2), "nearest": 0, "bicubic": 16}[mode]


def _functional_multi_head(call: Call) -> int:
    q, k, v, _, heads = call[0][:5]
    return _multi_head(q, k, v, heads, batch_first=False).total()


_FUNCTIONS: dict[str, tuple[str, Callable[[Call], int]]] = {
    **{name: ("matrix product", _product(0)) for name in ("matmul", "mm", "bmm", "mv", "dot", "vdot")},
    "rmatmul": ("matrix product", lambda call: call[2].numel() * call[0][1].shape[-1]),
    **{name: ("matrix product", _product(1)) for name in ("addmm", "baddbmm", "addmv")},
    "einsum": ("matrix product", _einsum),
    "linear": ("linear", _functional_conv(_linear)),
    **{f"conv{n}d": ("convolution", _functional_conv(_conv)) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ("convolution", _functional_conv(_transposed)) for n in (1, 2, 3)},
    "scaled_dot_product_attention": ("attention", _functional_attention),
    "multi_head_attention_forward": ("attention", _functional_multi_head),
    "interpolate": ("resize", _interpolate),
    "upsample": ("resize", _interpolate),
    "grid_sample": ("resize", _grid_sample),
}

_REFUSED = frozenset("addbmm bilinear cdist chain_matmul inner kron multi_dot tensordot matrix_power lstm gru rnn".split())
"""Functions that multiply and add and that no model here should have: better loud than left out."""


# --- memory -------------------------------------------------------------------------------------------------------

SCRATCH = frozenset(
    f"aten::{kernel}"
    for kernel in (
        "mkldnn_convolution",
        "mkldnn_convolution_transpose",
        "_slow_conv2d_forward",
        "slow_conv3d_forward",
        "slow_conv_dilated2d",
        "slow_conv_transpose2d",
        "mkldnn_rnn_layer",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
"""CPU kernels that free, at their own end, memory of a size that depends on the library and the threads: convolutions and
LSTMs reorder weights and images in it or unfold them, fused attention keeps a tile of weights for each thread."""


@dataclass(frozen=True)
class Allocated:
    """Peak bytes allocated in one pass: without what the kernels in SCRATCH free at their own end, and with it."""

    peak: int
    with_scratch: int


def allocated(model: nn.Module, input_size: tuple[int, ...], reads: int) -> Allocated:
    """Profiles one pass of a copy of the model on zeros, which are really freed once `reads` operators have read them."""
    _forget()
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        time.sleep(0.01)  # the profiler loses some of what happens in its first microseconds
        x = _zeros(model, input_size)
        address = x.data_ptr()
        with _Reading(x, reads):
            kept = model(x)
    del kept
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    found = sorted(_events(profiled.profiler.kineto_results.experimental_event_tree()), key=lambda event: event.time)
    assert any(event.address == address and event.size > 0 for event in found), "the profiler did not see the input"
    opened: dict[int, int] = {}  # address → index of its allocation
    scratch: set[int] = set()
    ours: set[int] = set()  # but not garbage of an earlier pass that happens to be freed in this one
    for i, event in enumerate(found):
        if event.size > 0:
            opened[event.address] = i
            ours.add(i)
        elif (made := opened.pop(event.address, None)) is not None:
            ours.add(i)
            if found[made].kernel == event.kernel is not None:
                scratch |= {made, i}
    but_scratch = ours - scratch
    return Allocated(
        _peak(event.size for i, event in enumerate(found) if i in but_scratch),
        _peak(event.size for i, event in enumerate(found) if i in ours),
    )


def _forget() -> None:
    """Empties the caches of functions that make tables, in transformers: every pass is a first pass."""
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and str(cached.__module__).startswith("transformers.models."):
            cached.cache_clear()


class _Reading(TorchDispatchMode):
    """Counts the operators that read the input, and frees it after the given number of them, if one is given.

    Whoever calls a model holds its input until the end; the peak of the model alone is without that. (A mode of this kind,
    and no `TorchFunctionMode`, because that keeps modules from their fused kernels.)
    """

    def __init__(self, x: Tensor, last: int = 0) -> None:
        super().__init__()
        self._storage, self._last, self.reads = x.untyped_storage(), last, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(a, Tensor) and a.untyped_storage() is self._storage for a in tree_leaves((args, kwargs))):
            self.reads += 1
            if self.reads == self._last:
                self._storage.resize_(0)
        return out


@dataclass(frozen=True)
class _Event:
    """An allocation (size above 0) or a release; kernel: the id of the kernel of SCRATCH in which it happened."""

    time: int
    address: int
    size: int
    kernel: int | None


def _events(nodes: list, kernel: int | None = None) -> Iterator[_Event]:
    for node in nodes:
        if node.tag.name == "Allocation":
            yield _Event(node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, kernel)
        yield from _events(node.children, node.id if node.name in SCRATCH else kernel)


def _peak(sizes: Iterable[int]) -> int:
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return peak


def _zeros(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    return torch.zeros(input_size, dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
