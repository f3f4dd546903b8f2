"""Networks that are trained with branches and served without them (RepVGG, MobileOne, FastViT, RepViT, GhostNetV3, …): the
branches of a copy put together, as the network's own code does it.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..copying import copied, modules, tensors_of

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""Of a module: `fuse` returns what takes its place or changes it, as timm has it, the others change it."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
TOLERANCE = 1e-3
"""Of the largest output: sums of many products in another order differ by less."""
_CORNER = 256
"""Pixels, a side."""


def is_fusible(model: nn.Module) -> bool:
    """Whether something in the network offers to put its branches together."""
    return any(_method(module) is not None for module in modules(model))


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose branches are put together where its modules offer it; the model itself where none does, or
    where its outputs are not the same then, within float tolerance. A network without numbers is believed.

    x: (B, C, H, W), not all alike, that both are compared on; a corner of its first image, where the network runs on that.
    """
    if not is_fusible(model):
        return model
    try:
        with torch.inference_mode(False), torch.no_grad():
            made = _fused(nn.Module.eval(copied(model)))
            return made if any(t.is_meta for t in tensors_of(model)) or _same(model, made, x[:1].clone()) else model
    except Exception:  # whatever the network's own code raises: it is not meant to be called so
        return model


def noise(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Random pixels of this size, always the same, of the type and on the device of a parameter."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)


def _fused(module: nn.Module) -> nn.Module:
    """The module, its parts first asked as a whole, as timm asks them; what something hooks into stays as it is."""
    method = _method(module)
    if method is not None and not any(_is_hooked(part) for part in modules(module) if part is not module):
        found = getattr(module, method)()
        if isinstance(found, nn.Module) and found is not module:
            vars(found).update({key: value for key, value in vars(module).items() if key.startswith(_HOOKS)})
            module = found
    for name, part in list(module._modules.items()):
        if part is not None and (new := _fused(part)) is not part:
            module._modules[name] = new
    return module


def _method(module: nn.Module) -> str | None:
    """The first of the methods that its class has and that asks for nothing."""
    for name in _METHODS:
        found = getattr(type(module), name, None)
        if inspect.isfunction(found):
            given = list(inspect.signature(found).parameters.values())[1:]
            if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
                return name
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _same(model: nn.Module, made: nn.Module, x: Tensor) -> bool:
    original = nn.Module.eval(copied(model))
    try:  # enough to tell, and nobody waits for it
        expected = tree_leaves(original(corner := x[..., :_CORNER, :_CORNER]))
    except Exception:  # it is made for one size
        expected = tree_leaves(original(corner := x))
    pairs = [(a, b) for a, b in zip(expected, tree_leaves(made(corner)), strict=True) if isinstance(a, Tensor)]
    return all(
        a.shape == b.shape and torch.allclose(a, b, 0, TOLERANCE * a.abs().max().item(), equal_nan=True) for a, b in pairs
    )
