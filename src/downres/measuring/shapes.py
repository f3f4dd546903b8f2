"""What an operator returns for fake tensors, several times faster than by FakeTensorMode."""

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

from .macs import op_name

_CPU = torch.device("cpu")


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


_BY_KERNEL = _names(
    "view _unsafe_view t transpose permute expand unsqueeze squeeze select slice split split_with_sizes unbind alias detach "
    "mm bmm baddbmm cat embedding gather scatter_ scatter_add index_add_ index_select sort max mean _softmax new_empty clone "
    "linalg_vector_norm _scaled_dot_product_flash_attention_for_cpu"
)
"""Operators whose kernel for meta tensors gives the shape and the strides that the result has on any device."""

_BROADCAST = _names("add sub mul div add_ sub_ mul_ div_")
"""Of these too, where all tensors are of one type: what is promoted to another is left to FakeTensorMode."""

_MADE_FROM_NOTHING = _names("empty arange")

_ELEMENTWISE = _names(
    "add sub mul div neg exp log sqrt rsqrt relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid "
    "add_ sub_ mul_ div_ relu_ silu_ sigmoid_ hardtanh_ hardswish_ hardsigmoid_"
)
"""Operators whose result is like an argument, where all of them are alike; in-place ones return it."""


def run(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], like: Tensor) -> Any:
    """`func(*args, **kwargs)`; of fake tensors without FakeTensorMode's looking up, decomposing and caching, where that can be.

    Also more exact: a view gets the strides that it has in reality (FakeTensorMode's have others in dimensions of size 1,
    and layouts are guessed from strides). tensors: those among the arguments. like: the model's input.
    """
    if not tensors and op_name(func) in _MADE_FROM_NOTHING and _is_simple(like) and kwargs.get("device") == _CPU:
        with in_kernel_invocation_manager(like.fake_mode):  # type: ignore[attr-defined]
            made = func(*args, **{**kwargs, "device": "meta"})
        return _wrapped(made, like.fake_mode, _CPU)  # type: ignore[attr-defined]
    if not tensors or "out" in kwargs or not all(map(_is_simple, tensors)):
        return func(*args, **kwargs)
    mode, device = tensors[0].fake_mode, tensors[0].fake_device  # type: ignore[attr-defined]
    if any(t.fake_device != device or t.fake_mode is not mode for t in tensors):  # type: ignore[attr-defined]
        return func(*args, **kwargs)
    name, x = op_name(func), tensors[0]
    with in_kernel_invocation_manager(mode):
        if name in _BY_KERNEL:
            out = func(*args, **kwargs)
        elif name in _ELEMENTWISE and x.is_floating_point() and all(_are_alike(x, t) for t in tensors):
            return x if name.endswith("_") else _wrapped(torch.empty_like(x), mode, device)
        elif name in _BROADCAST and all(t.dtype == x.dtype and t.dim() > 0 for t in tensors):
            out = func(*args, **kwargs)
        elif name == "aten.convolution" and _stays_contiguous(*args[:2]):
            out = func(*args, **kwargs)
        elif name == "aten.addmm":
            out = torch.mm(*args[1:3])
        elif name == "aten.native_layer_norm" and x.dtype == torch.float32:
            rows = x.new_empty(*x.shape[: x.dim() - len(args[1])], *[1] * len(args[1]))
            out = torch.empty_like(x, memory_format=torch.contiguous_format), rows, torch.empty_like(rows)
        elif name == "aten.native_batch_norm" and not args[5]:  # in eval mode there are no statistics to return
            out = torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        else:
            out = None
    if out is None:
        return func(*args, **kwargs)
    if isinstance(out, (tuple, list)):
        return tuple(_wrapped(o, mode, device) for o in out)
    return _wrapped(out, mode, device)


def _stays_contiguous(image: Tensor, kernel: Tensor) -> bool:
    """Whether a convolution's result has the usual layout: only then the meta kernel knows which."""
    both = image, kernel
    return (
        image.dtype == kernel.dtype
        and image.dim() == kernel.dim() == 4
        and all(t.is_contiguous() and suggest_memory_format(t) == torch.contiguous_format for t in both)
    )


def _is_simple(tensor: Tensor) -> bool:
    """Fake, and with no number that is known."""
    return type(tensor) is FakeTensor and tensor.constant is None


def _are_alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()


def _wrapped(out: Tensor, mode: Any, device: torch.device) -> Tensor:
    return out if isinstance(out, FakeTensor) else FakeTensor(mode, out, device)  # in-place: an argument itself
