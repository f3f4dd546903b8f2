"""Fake tensors (shapes, no numbers, no memory): FakeTensorMode, many times faster."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_CPU, _META = torch.device("cpu"), torch.device("meta")


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in text.split())


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


@dataclass(frozen=True)
class Made:
    """What an operator returned, so that the same can be made again.

    each: size, strides and type of every new tensor, in order, `None`s among them; None of an operator in place, which returns
    its first argument. several: as a tuple or a list.
    """

    each: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...] | None
    several: Callable[[list], Any] | None = None
    device: torch.device = _CPU


class Known:
    """What operators returned and what they cost, by their arguments. Networks that are alike share one."""

    def __init__(self) -> None:
        self.made: dict[tuple, Made] = {}
        self.cost: dict[tuple, Any] = {}


class Fakes(FakeTensorMode):
    """What an operator returns for fake tensors, without FakeTensorMode's looking up and decomposing where that can be: by the
    kernel for meta tensors, or as it was for arguments that were alike. A network's blocks repeat theirs.

    Also more exact: a view gets the strides that it has in reality (FakeTensorMode's have others in dimensions of size 1,
    and layouts are guessed from strides).
    """

    def __init__(self, known: "Known | None" = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.known = known or Known()
        self._attributes: dict[torch.device, dict[str, Any]] = {}
        self._is_asked = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: what keeps torch.compile out costs as much as an operator."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if self._is_asked:  # an operator of which FakeTensorMode makes others
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors, key = arguments(func, args, kwargs, self)
        if (out := self.quick(func, args, kwargs, tensors, key)) is not NotImplemented:
            return out
        self._is_asked = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_asked = False
        self._learn(key, func, args, tensors, out)
        return out

    def quick(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], key: tuple | None) -> Any:
        """`func(*args, **kwargs)` without FakeTensorMode, or NotImplemented. tensors, key: as of `arguments`."""
        if key is not None and (found := self.known.made.get(key)) is not None:
            return self._again(found, args)
        out = _by_kernel(self, func, args, kwargs, tensors)
        if out is not NotImplemented:
            self._learn(key, func, args, tensors, out)
        return out

    def _learn(self, key: tuple | None, func: Any, args: tuple, tensors: list[Tensor], out: Any) -> None:
        if key is not None and (made := _made(func, args, tensors, out)) is not None:
            self.known.made[key] = made

    def _again(self, made: Made, args: tuple) -> Any:
        """What an operator returns for arguments that are alike, if `made` is what it returned before."""
        if made.each is None:
            return args[0]
        with torch._C._DisableTorchDispatch():
            found = [
                self.like(torch.empty_strided(*one[:2], dtype=one[2], device=_META), made.device) if one else None
                for one in made.each
            ]
        return made.several(found) if made.several else found[0]

    def like(self, shape: Tensor, device: torch.device) -> FakeTensor:
        """`FakeTensor(self, shape, device)`, several times faster. shape: on the meta device, asking for no gradient."""
        if (attributes := self._attributes.get(device)) is None:
            attributes = self._attributes[device] = dict(vars(FakeTensor(self, shape, device)))  # they are the same for all
        made: FakeTensor = Tensor._make_subclass(FakeTensor, shape, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(attributes)
        return made


def arguments(func: Any, args: tuple, kwargs: dict[str, Any], mode: Any) -> tuple[list[Tensor], tuple | None]:
    """The tensors with a storage (sparse ones have none) among the arguments of an operator, and a key: two calls of the same
    key are alike in all that a kernel without numbers can look at. None: it may look at something else.

    mode: of the fake tensors; None where a copy with numbers runs.
    """
    tensors: list[Tensor] = []
    key: list[Any] = [func]
    alike = _key((*args, *kwargs.items()), tensors, key, mode)
    return tensors, tuple(key) if alike and mode is not None else None


def _key(values: Iterable[Any], tensors: list[Tensor], key: list[Any], mode: Any) -> bool:
    alike = True
    for value in values:
        kind = type(value)
        if kind is FakeTensor and _is_simple(value) and value.layout is torch.strided:
            tensors.append(value)
            alike = alike and value.fake_mode is mode
            key += value.shape, value.stride(), value.dtype, value.fake_device
        elif isinstance(value, Tensor):
            if value.layout is torch.strided:
                tensors.append(value)
            alike = False
        elif kind in _AS_IT_IS:
            key.append(value)
        elif kind in _EQUAL_TO_OTHERS:
            key.append((kind, value))
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            alike = _key(value, tensors, key, mode) and alike
        else:
            alike = False
    return alike


_AS_IT_IS = frozenset((int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
_EQUAL_TO_OTHERS = frozenset((bool, float))
"""True is 1 and 1.0 is 1, and what an operator returns for them is not the same."""


def _made(func: Any, args: tuple, tensors: list[Tensor], out: Any) -> Made | None:
    """What an operator returned, or None where it cannot be told by sizes, strides and types: views of what was there, what
    it wrote into, tensors with a known number.

    tensors: all among the arguments.
    """
    mutable = func._schema.is_mutable
    if mutable and out is args[0] and torch.Tag.inplace_view not in func.tags:
        return Made(None, None, out.fake_device)
    several = type(out) if type(out) in (tuple, list) else None
    found = [t for t in (out if several else [out]) if t is not None]
    if mutable or func.is_view or not found or not all(type(t) is FakeTensor and _is_simple(t) for t in found):
        return None
    storages = {t.untyped_storage()._cdata for t in (*tensors, *found)}
    given = {t.untyped_storage()._cdata for t in tensors}
    whole = all(t.layout is torch.strided and _has_its_own_storage(t) for t in found)
    if len(storages) - len(given) != len(found) or not whole or len({t.fake_device for t in found}) > 1:
        return None
    each = tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in (out if several else [out]))
    return Made(each, several, found[0].fake_device)


def _has_its_own_storage(tensor: Tensor) -> bool:
    last = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return bool(tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == (last + 1) * tensor.element_size())


def _by_kernel(mode: Fakes, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """`func(*args, **kwargs)` where the kernel for meta tensors tells what it returns, else NotImplemented."""
    name = func._schema.name
    if not tensors and name in _MADE_FROM_NOTHING and kwargs.get("device") == _CPU:
        with in_kernel_invocation_manager(mode):
            made = func(*args, **{**kwargs, "device": "meta"})
        return mode.like(made, _CPU)
    if not tensors or "out" in kwargs or not all(map(_is_simple, tensors)):
        return NotImplemented
    x, device = tensors[0], tensors[0].fake_device  # type: ignore[attr-defined]
    if any(t.fake_device != device or t.fake_mode is not mode for t in tensors):  # type: ignore[attr-defined]
        return NotImplemented
    with in_kernel_invocation_manager(mode):
        if name in _BY_KERNEL:
            out = func(*args, **kwargs)
        elif name in _ELEMENTWISE and x.is_floating_point() and all(_are_alike(x, t) for t in tensors):
            out = x if name.endswith("_") else torch.empty_like(x)
        elif name in _BROADCAST and all(t.dtype == x.dtype and t.dim() > 0 for t in tensors):
            out = func(*args, **kwargs)
        elif name == "aten::convolution" and _stays_contiguous(*args[:2]):
            out = func(*args, **kwargs)
        elif name == "aten::addmm":
            out = torch.mm(*args[1:3])
        elif name == "aten::native_layer_norm" and x.dtype == torch.float32:
            rows = x.new_empty(*x.shape[: x.dim() - len(args[1])], *[1] * len(args[1]))
            out = torch.empty_like(x, memory_format=torch.contiguous_format), rows, torch.empty_like(rows)
        elif name == "aten::native_batch_norm" and not args[5]:  # in eval mode there are no statistics to return
            out = torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        else:
            return NotImplemented
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
    """Fake, with no number that is known, and none that is read as another (of `x.conj()` and its parts)."""
    return type(tensor) is FakeTensor and tensor.constant is None and not tensor.is_conj() and not tensor.is_neg()


def _are_alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()


def _wrapped(out: Tensor, mode: Fakes, device: torch.device) -> Tensor:
    return out if isinstance(out, FakeTensor) else mode.like(out, device)  # in-place: an argument itself
