"""Channels taken out of a network by torch-pruning, of whole groups of layers that depend on one another (DepGraph, Fang et al.
2023, arXiv 2301.12900).
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..copying import copied, modules
from ..errors import DownresError, first_line
from ..macs import macs_of
from ..probe import given

STEPS = 40
"""In which all channels but a few would go: after each the MACs are counted."""
MOST = 0.95
ROUND_TO = 8
"""Channels left are a multiple of it, as runtimes compute them."""


def pruned(model: nn.Module, keep: float, size: tuple[int, ...]) -> tuple[nn.Module, str]:
    """(a network with channels taken out until at most `keep` of its MACs is left, what was done).

    Every layer loses the same part of its channels, those of least L2 norm over all layers that depend on them. What the last
    layer reads keeps its width, so that a head can be fitted anew, and what the network returns its shape. Of networks whose
    attention or normalisation cannot be taken apart only hidden units between two layers go. size: (C, H, W).
    Raises DownresError where torch-pruning is missing or finds nothing to take out, and where that does not go far enough.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            import torch_pruning as tp
    except ImportError:
        raise DownresError("Structured pruning is done by torch-pruning: pip install 'downres[pruning]'.") from None
    training = [m.training for m in modules(model)]
    model = copied(model).eval()
    own = _macs(model, size)
    shapes = _shapes(model, size)
    why: list[str] = []
    for hidden in (False, True):
        network = copied(model)
        try:
            with _gradients(network), warnings.catch_warnings(action="ignore"):
                left, channels = _take_out(tp, network, keep * own, size, hidden)
            if _shapes(network, size) != shapes:
                why.append("what it returns would have another shape")
                continue
        except _NothingToPrune:
            raise
        except Exception as error:  # whatever a network that cannot be taken apart fails with
            why.append(first_line(error)[:200])
            continue
        if left <= keep * own:
            for module, flag in zip(modules(network), training, strict=True):
                module.training = flag
            what = "hidden units" if hidden else "channels"
            return network, f"{what} of least norm out, {channels[0]} of {channels[1]} left; MACs ×{left / own:.3g}"
        why.append(f"at most ×{left / own:.3g} of its MACs can be reached by what can be taken out")
    raise DownresError(
        f"{type(model).__name__} cannot be pruned to ×{keep:g} of its MACs ({'; '.join(why)}): keep more, or lower the "
        "resolution instead."
    )


class _NothingToPrune(DownresError):
    """There are no layers."""


def _take_out(tp: Any, network: nn.Module, target: float, size: tuple[int, ...], hidden: bool) -> tuple[int, tuple[int, int]]:
    """(MACs that are left, channels that are left and were there); the network is changed in place."""
    x = torch.zeros(1, *size[-3:])
    layers = [m for m in modules(network) if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]

    def forward(model: nn.Module, inputs: Tensor) -> Any:
        arguments, named = given(model, inputs)
        return model(*arguments, **named)

    graph = tp.DependencyGraph().build_dependency(network, example_inputs=x, forward_fn=forward)
    known = [m for m in layers if m in graph.module2node]
    if not known:
        raise _NothingToPrune(
            f"{type(network).__name__} has no layers whose channels could be taken out: lower the resolution."
        )
    ignored = {known[-1], *_read_by(tp, graph, known[-1])}
    if hidden:
        ignored |= {layer for layer in known if not _is_between_two(tp, graph, layer)}
    else:
        ignored |= {layer for layer in known if _reaches_the_end(graph, layer)}
    pruner = tp.pruner.MagnitudePruner(
        network, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=MOST, iterative_steps=STEPS,
        ignored_layers=[m for m in known if m in ignored], round_to=ROUND_TO, forward_fn=forward,
    )  # fmt: skip
    before = sum(_channels(m) for m in layers)
    left = _macs(network, size)
    for _ in range(STEPS):
        if left <= target:
            break
        pruner.step()
        left = _macs(network, size)
    return left, (sum(_channels(m) for m in layers), before)


class _Counted(TorchDispatchMode):
    macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.macs += macs_of(func, args, kwargs or {}, out) or 0
        return out


def _macs(network: nn.Module, size: tuple[int, ...]) -> int:
    """Of one image; with gradients, as attention that is one operator without them cannot be counted."""
    arguments, named = given(network, torch.zeros(1, *size[-3:]))
    with torch.enable_grad(), _Counted() as counted:
        network(*arguments, **named)
    return counted.macs


def _channels(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _reads(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def _read_by(tp: Any, graph: Any, layer: nn.Module) -> set[nn.Module]:
    """The layers that make what this one reads."""
    prune = tp.prune_linear_in_channels if isinstance(layer, nn.Linear) else tp.prune_conv_in_channels
    group = graph.get_pruning_group(layer, prune, [0])
    return {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)} - {layer}


def _out_group(graph: Any, layer: nn.Module) -> Any:
    return graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, [0])


def _reaches_the_end(graph: Any, layer: nn.Module) -> bool:
    """Whether a channel of this layer is one of what the network returns."""
    return any(not dep.target.outputs for dep, _ in _out_group(graph, layer))


def _is_between_two(tp: Any, graph: Any, layer: nn.Module) -> bool:
    """Whether its channels are read by one other layer alone, with nothing but elementwise functions between."""
    readers = set()
    for dep, _ in _out_group(graph, layer):
        one = dep.target.module
        if isinstance(one, (nn.Conv1d, nn.Conv2d, nn.Linear)) and getattr(one, "groups", 1) == 1:
            readers.add(one)
        elif not isinstance(one, nn.BatchNorm2d | tp.ops._ElementWiseOp | tp.ops._ReshapeOp):
            return False
    readers.discard(layer)
    return len(readers) == 1 and _reads(readers.pop()) == _channels(layer)  # of attention each head reads a part


def _shapes(network: nn.Module, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of all that it returns to one image of noise."""
    arguments, named = given(network, torch.zeros(1, *size[-3:]))
    with torch.inference_mode():
        return [tuple(y.shape) for y in tree_leaves(network.eval()(*arguments, **named)) if isinstance(y, Tensor)]


@contextlib.contextmanager
def _gradients(network: nn.Module) -> Iterator[None]:
    """The graph is read off gradients."""
    asked = {id(p): p.requires_grad for p in network.parameters()}
    everything = all(asked.values()) if asked else True
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in network.parameters():  # those that were cut are others
            parameter.grad = None
            parameter.requires_grad_(asked.get(id(parameter), everything) and parameter.is_floating_point())
