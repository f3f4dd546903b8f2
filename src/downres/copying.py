"""The one place that copies a network, and torch's own walk over its modules, whatever attributes it has."""

import contextlib
import copy
import copyreg
import functools
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from .errors import DownresError, first_line

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""They hold the network as `module`, and whoever looks inside looks at that."""


def copied(model: nn.Module, known: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy(model, known)`, several times faster for the thousands of small containers that modules are made of.

    What torch.compile, DataParallel and the like wrap is unwrapped, and what a module keeps of an earlier run (a feature map, a
    weight that is computed from others) is detached.

    known: id of an object → what stands in its place; filled on the way, as by deepcopy.
    Raises DownresError for what is no module, for modules whose inside cannot be changed, and for what does not copy.
    """
    refuse_sealed(model)
    with _Detached():
        return _copied(model, {} if known is None else known)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and the like, itself where it is in none."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, _WRAPPERS):
        return model._modules["module"]
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes a second, and torch.compile has done so
    return model._modules["_orig_mod"] if compiled is not None and isinstance(model, compiled.OptimizedModule) else None


def refuse_sealed(model: nn.Module) -> None:
    """Raises DownresError for what is no module, and for one that a compiler has made, whose inside cannot be changed."""
    if not isinstance(model, nn.Module):
        raise DownresError(f"A network is a torch.nn.Module, this is a {type(model).__name__}: give the module.")
    if isinstance(unwrapped(model), torch.jit.ScriptModule):
        _refuse(model, "a TorchScript module", "that it was scripted or traced from")
    for module in modules(model):
        if isinstance(module, torch.export.UnflattenedModule) or _is_exported(module):
            _refuse(model, "an exported program", "that it was exported from")
        quantized = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        if quantized and type(module).__name__ not in _IN_FLOAT:
            _refuse(model, "a quantized network", "in float32, and quantize what comes out")


_IN_FLOAT = ("FloatFunctional", "FXFloatFunctional")
"""Of PyTorch's quantized modules those that compute in float until they are converted: torchvision's quantizable networks."""


def _refuse(model: nn.Module, what: str, then: str) -> None:
    name = type(unwrapped(model)).__name__
    raise DownresError(f"{name} is {what}, whose inside downres cannot change: give the torch.nn.Module {then}.")


def _is_exported(module: nn.Module) -> bool:
    """A graph of ATen operators, as torch.export makes them: fixed to the shapes, and often to the mode, that it saw."""
    if not isinstance(module, torch.fx.GraphModule):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def is_lazy(model: nn.Module) -> bool:
    """Whether some layer has no weights before the first run."""
    return any(isinstance(m, LazyModuleMixin) and m.has_uninitialized_params() for m in modules(model))


# torch's own walks, past attributes of a network that are called as they are (ESPNet has a list named `modules`).


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`: each module once, by its first name."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        parts = [(f"{name}.{key}" if name else key, part) for key, part in module._modules.items() if part is not None]
        stack.extend(reversed(parts))


def modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for _, module in named_modules(model))


def children(model: nn.Module) -> list[nn.Module]:
    return list({part: None for part in model._modules.values() if part is not None})


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `model.named_parameters()`: each once, by its first name."""
    return _named_tensors(model, "_parameters")


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return _named_tensors(model, "_buffers")


def _named_tensors(model: nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for name, module in named_modules(model):
        for key, tensor in getattr(module, kind).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{name}.{key}" if name else key, tensor


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for _, parameter in named_parameters(model))


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    return (tensor for _, tensor in chain(named_parameters(model), named_buffers(model)))


def first_float(model: nn.Module) -> Tensor:
    """What an input is made like: the first parameter of real numbers, else an empty tensor."""
    return next((p for p in parameters(model) if p.is_floating_point()), torch.empty(0))


def single(model: nn.Module) -> nn.Module:
    """The module itself, in place: on the CPU, in single precision (its plain tensors too) and in eval mode."""
    has_numbers = not any(t.is_meta for t in tensors_of(model))
    model = nn.Module.eval(nn.Module.float(nn.Module.cpu(model) if has_numbers else model))
    for module in modules(model):
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, key, value.cpu().float() if value.is_floating_point() else value.cpu())
    return model


class _Detached(TorchFunctionMode):
    """deepcopy refuses tensors that remember how they were computed: their copy forgets it."""

    def __torch_function__(self, func: Callable, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, known = args
            known[id(tensor)] = made = tensor.detach().clone()
            return made
        return func(*args, **(kwargs or {}))


def _copied(value: Any, known: dict[int, Any]) -> Any:
    kind: Any = type(value)
    made: Any
    if kind in _AS_IS:
        return value
    if (found := known.get(id(value))) is not None:
        return found
    if kind is dict or kind is OrderedDict:
        known[id(value)] = made = kind()
        for key, item in value.items():
            made[_copied(key, known)] = item if type(item) in _AS_IS else _copied(item, known)
        return made
    if kind is list:
        known[id(value)] = made = []
        made.extend(_copied(item, known) for item in value)
        return made
    if (kind is tuple or kind is set) and all(type(item) in _AS_IS for item in value):
        return value if kind is tuple else known.setdefault(id(value), set(value))
    if isinstance(value, nn.Module):
        if (inside := unwrapped(value)) is not value:
            known[id(value)] = made = _copied(inside, known)
            return made
        if _is_copied_by_attributes(kind):
            known[id(value)] = made = kind.__new__(kind)
            own = vars(value)
            state = {k: v if type(v) in _AS_IS else _attribute(value, k, v, known) for k, v in own.items()}
            state.pop("_compiled_call_impl", None)  # `module.compile()`, and `module.forward = torch.compile(module.forward)`
            if (plain := getattr(own.get("forward"), "_torchdynamo_orig_callable", None)) is not None:
                state["forward"] = _copied(plain, known)
            made.__setstate__(state)
            return made
        made = copy.deepcopy(value, known)
        _carry(value, made, known)
        return made
    return copy.deepcopy(value, known)


def _attribute(module: nn.Module, name: str, value: Any, known: dict[int, Any]) -> Any:
    try:
        return _copied(value, known)
    except (TypeError, RuntimeError, NotImplementedError) as error:  # locks, files, generators, …
        reason = first_line(error)
        raise DownresError(
            f"The attribute {name!r} of {type(module).__name__} cannot be copied ({reason}): delete it from the network first."
        ) from error


class Root(nn.Module):
    """Stands before a module whose own way of copying forgets hooks, or which torch.export takes apart past them
    (torch.fx.GraphModule), and has the hooks in its place: the same tensors, parts and attributes by the same names.

    Made by `rooted`, each in a class of its own, so that its `forward` has the module's signature.
    """

    def __reduce__(self) -> tuple:
        state = {key: value for key, value in vars(self).items() if key not in (*_SHARED, "network")}
        return rooted, (self.network,), (state, [m.training for m in modules(self)])

    def __setstate__(self, state: tuple[dict[str, Any], list[bool]]) -> None:
        vars(self).update(state[0])
        _train_as(self, state[1])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # how to copy it, for one
                raise
            return getattr(vars(self)["network"], name)

    def train(self, mode: bool = True) -> "Root":
        self.network.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.network._load_from_state_dict(*args, **kwargs)


_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def rooted(network: nn.Module) -> Root:
    """A `Root` before the module, which takes over its hooks."""

    def forward(self: Root, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    with contextlib.suppress(ValueError, TypeError):  # of a kind that Python cannot look into
        parameters = list(inspect.signature(network.forward).parameters.values())
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = inspect.Signature([itself, *parameters])  # type: ignore[attr-defined]
    made: Root = types.new_class(type(network).__name__, (Root,), {}, lambda names: names.update(forward=forward))()
    vars(made).update({name: vars(network)[name] for name in _SHARED}, network=network, training=network.training)
    for name in _HOOKS:
        if name in vars(network):
            vars(made)[name], vars(network)[name] = vars(network)[name], OrderedDict()
    return made


def keeps_hooks(module: nn.Module) -> bool:
    """Whether its copies have the hooks that it has, and what `reduce` says of itself."""
    names = [name for name in (*_HOOKS, "downres") if vars(module).get(name)]
    kind: Any = type(module)
    if not names or _is_copied_by_attributes(kind) or isinstance(module, Root):
        return True
    made = copy.deepcopy(module, {id(t): t for t in tensors_of(module)})
    return all(vars(made).get(name) for name in names)


def _carry(module: nn.Module, made: nn.Module, known: dict[int, Any]) -> None:
    """Gives a copy what the module's own way of copying forgot: hooks, and who was in train mode."""
    for name in _HOOKS:
        if (value := vars(module).get(name)) and not vars(made).get(name):
            vars(made)[name] = copy.deepcopy(value, known)
    _train_as(made, [m.training for m in modules(module)])


def _train_as(model: nn.Module, modes: list[bool]) -> None:
    found = list(modules(model))
    if [m.training for m in found] != modes:
        model.train(modes[0])
        for module, mode in zip(found[1:], modes[1:], strict=False):
            module.training = mode


_AS_IS = frozenset((type(None), bool, int, float, str, bytes, type, types.FunctionType, torch.dtype, torch.Size, torch.device))


@functools.cache
def _is_copied_by_attributes(kind: type) -> bool:
    """Whether deepcopy of a module is a new object with copies of its attributes: the class has no other idea of it."""
    usual = all(
        getattr(kind, name, None) is getattr(nn.Module, name, None)
        for name in ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")
    )
    return usual and kind not in copyreg.dispatch_table and not any("__slots__" in vars(base) for base in kind.__mro__)
