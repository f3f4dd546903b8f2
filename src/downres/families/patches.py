"""Patch kernels and position embeddings of another size, in the place of those that a module has."""

import warnings
from typing import Any

from torch import Tensor, nn

from .adapter import Size

# timm is imported where something is resampled: it takes seconds, which other libraries' convnets need not wait for.


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, which may be a part's, by one of another shape; it is trained as the old one was."""
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    before = part._parameters.get(key)
    if before is not None:
        part._parameters[key] = nn.Parameter(value, requires_grad=before.requires_grad)
    else:
        part._buffers[key] = value


def resize_kernel(conv: Any, patch: Size, kernel: Tensor | None = None) -> None:
    """The patch kernel by pseudo-inverse (FlexiViT), in place; made of `kernel` where that is not the one it has."""
    from timm.layers import resample_patch_embed

    put(conv, "weight", resample_patch_embed((conv.weight if kernel is None else kernel).detach(), list(patch)))
    conv.kernel_size = conv.stride = patch


def resize_positions(positions: Tensor, old: Size, new: Size, prefix: int) -> Tensor:
    """(1, prefix + rows·columns, C) → the same for another grid, in float32 and antialiased; the prefix as it is."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions.detach(), list(new), old_size=list(old), num_prefix_tokens=prefix)


def restated(value: Any, size: Size) -> Any:
    """A size in the form in which `value` states another: one number stays one number, as some are divided by."""
    if isinstance(value, int) and size[0] == size[1]:
        return size[0]
    return list(size) if isinstance(value, list) else size


def resize_relative_positions(table: Tensor, old: Size, new: Size, shape: tuple[int, ...]) -> Tensor:
    """A table of relative positions, as of Swin and BEiT, for another window. shape: of the table that is wanted."""
    from timm.layers import resize_rel_pos_bias_table

    with warnings.catch_warnings(action="ignore"):  # timm's interpolation indexes in a way that torch warns of
        return resize_rel_pos_bias_table(table.detach(), new, shape, old_window_size=old)
