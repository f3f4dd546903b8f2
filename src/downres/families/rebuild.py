"""A network of fixed size that its library cannot resize, made for another size all the same.

The library builds the network afresh at both sizes; what differs between the two (grids, index tables, position embeddings)
is what has to change in the user's network. Everything else of it stays: weights, head, hooks, dtype.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from ..errors import DownresError
from .adapter import Size, as_pair, dotted, impossible
from .patches import resize_positions, resize_relative_positions

_SIMPLE = (int, float, str, bool, tuple, list, dict, type(None))
_IS_POSITION = re.compile(r"pos|(^|_)rel|bias_table|attention_biases")
_RUNTIME = ("training", "num_classes", "pretrained_cfg", "default_cfg", "pretrained_model_args")


def rebuild(module: Any, fresh: nn.Module, other: nn.Module, old: Size, new: Size) -> int:
    """Make `module` for images of the size `new` where it is for `old`, in place.

    Returns how many tables of positions were resampled.

    fresh, other: the same network with new weights, built by its library for the one size and for the other.
    Raises DownresError where weights other than positions depend on the size.
    """
    before, after = dict(fresh.named_modules()), dict(other.named_modules())
    if before.keys() != after.keys() or any(type(before[name]) is not type(after[name]) for name in before):
        raise impossible(module, new, "it has other layers at that size")
    own = dict(module.named_modules())
    cut = [((old[0] // p, old[1] // p), (new[0] // p, new[1] // p)) for p in range(2, min(new) + 1)]
    grids = _pairs(before, after) + cut
    resampled = 0
    for name in before:
        for kind in ("_parameters", "_buffers"):
            for key, small in getattr(after[name], kind).items():
                like = getattr(before[name], kind).get(key)
                if small is None or (like is not None and _alike(small, like, kind)):
                    continue
                mine = getattr(own.get(name), kind, {}).get(key)
                if mine is None or like is None or mine.shape != like.shape:
                    raise impossible(module, new, f"{dotted(name, key)} is not as its library makes it")
                if kind == "_buffers":
                    found = small.to(mine.device)
                    found = found.to(mine.dtype) if mine.is_floating_point() else found
                else:
                    with torch.no_grad():
                        said = dotted(name, key) if isinstance(before[name], nn.Embedding) else key
                        values = _resampled(said, mine, before[name], after[name], small, grids)
                    if values is None:
                        raise _does_not_follow(module, new, dotted(name, key))
                    found = nn.Parameter(values, requires_grad=mine.requires_grad)
                    resampled += 1
                getattr(own[name], kind)[key] = found
        for key, value in vars(after[name]).items():
            plain = isinstance(value, _SIMPLE) and not key.startswith("_") and key not in _RUNTIME
            if plain and name in own and value != vars(before[name]).get(key):
                setattr(own[name], key, value)
    for found in own.values():
        for key, value in vars(found).items():
            if isinstance(value, dict) and key.endswith("cache"):  # of tables as they were
                value.clear()
    return resampled


def _does_not_follow(module: nn.Module, size: Size, name: str) -> DownresError:
    if _IS_POSITION.search(name):
        return impossible(module, size, f"{name} has a number of positions there that is no grid")
    reason = f"{name} holds a weight for each token, and their number cannot change"
    return impossible(module, size, reason, "leave its resolution as it is")


def _alike(one: Tensor, other: Tensor, kind: str) -> bool:
    """Parameters differ by chance, buffers are computed."""
    return one.shape == other.shape and (kind == "_parameters" or torch.equal(one, other))


def _pairs(before: dict[str, nn.Module], after: dict[str, nn.Module]) -> list[tuple[Size, Size]]:
    """The grids that the two networks note of themselves, where they differ."""
    found = []
    for name in before:
        for key, value in vars(before[name]).items():
            other = vars(after[name]).get(key)
            if _is_pair(value) and _is_pair(other) and list(value) != list(other):
                found.append((as_pair(value), as_pair(other)))
    return list(dict.fromkeys(found))


def _is_pair(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value)


def _resampled(key: str, mine: Tensor, before: Any, after: Any, like: Tensor, grids: list[tuple[Size, Size]]) -> Tensor | None:
    """A table of positions for the other size, in float32 and antialiased; None where it is no such table."""
    old, new = mine.shape, like.shape
    if key == "weight" and mine.ndim == 4 and old[:2] == new[:2] and before.kernel_size == before.stride:
        return resample_patch_embed(mine, list(new[2:]))
    if mine.ndim != like.ndim or not _IS_POSITION.search(key):
        return None
    if isinstance(before, nn.Embedding):  # positions that are looked up, (prefix + rows·columns, channels)
        found = _resampled("positions", mine[None], None, None, like[None], grids)
        return None if found is None else found[0]
    if "relative_position_bias_table" in key:
        return resize_relative_positions(mine, before.window_size, after.window_size, tuple(new))
    if key == "attention_biases":  # LeViT: (heads, rows·columns) of distances
        sides = [as_pair(getattr(m, "resolution", math.isqrt(t.shape[-1]))) for m, t in ((before, mine), (after, like))]
        return _flat(mine, -1, *sides)
    if mine.ndim == 4 and old[1] == new[1] and old[3] == new[3] and _square(old[2]) and _square(new[2]):  # NesT
        return _flat(mine, 2, as_pair(math.isqrt(old[2])), as_pair(math.isqrt(new[2])))
    if mine.ndim == 3:  # (1, prefix + rows·columns, channels)
        pairs = [*grids, *(((i, i), (j, j)) for i in (math.isqrt(old[1]),) for j in (math.isqrt(new[1]),))]
        for (h, w), (rows, columns) in pairs:
            prefix = old[1] - h * w
            if 0 <= prefix <= 2 and prefix == new[1] - rows * columns:
                return resize_positions(mine, (h, w), (rows, columns), prefix)
        return None
    return _stretched(mine, tuple(new))


def _square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


def _flat(table: Tensor, axis: int, old: Size, new: Size) -> Tensor | None:
    """A table with rows and columns in one axis."""
    axis %= table.ndim
    if math.prod(old) != table.shape[axis]:
        return None
    shape = (*table.shape[:axis], *new, *table.shape[axis + 1 :])
    return _stretched(table.unflatten(axis, old), shape).flatten(axis, axis + 1)


def _stretched(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cubic, antialiased, axis by axis; two of them make what `interpolate` does in two dimensions."""
    found = table.float()
    for axis, size in enumerate(shape):
        if found.shape[axis] != size:
            moved = found.movedim(axis, -1)
            rows = moved.reshape(1, 1, -1, moved.shape[-1])
            rows = F.interpolate(rows, size=(rows.shape[2], size), mode="bicubic", antialias=True)
            found = rows.reshape(*moved.shape[:-1], size).movedim(-1, axis)
    return found.to(table.dtype)
