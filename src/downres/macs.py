"""Multiply-accumulates of one ATen operator call, from shapes alone."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

Formula = Callable[[tuple, Any], int]
"""(positional arguments, output) → MACs."""


def macs_of(op: OpOverload, args: tuple, kwargs: dict[str, Any], out: Any) -> int | None:
    """MACs of one call, or None for an operator without a formula.

    The formulas are those of `torch.utils.flop_counter` (whose FLOPs are two a MAC), and below what it leaves out.
    """
    if (own := _FORMULAS.get(op_name(op))) is not None:
        return own(args, out)
    if (formula := flop_registry.get(op.overloadpacket)) is not None:
        return int(formula(*args, **kwargs, out_val=out)) // 2
    return None


@cache
def does_arithmetic(op: OpOverload) -> bool:
    """False for views, allocation, copies, selection and metadata, which only move or name numbers."""
    if op.is_view or torch.Tag.inplace_view in op.tags:
        return False
    name = op_name(op).removeprefix("aten.").removesuffix("_").removesuffix("_copy")
    return name not in _MOVES_ONLY


@cache
def op_name(op: OpOverload) -> str:
    """Without the overload: `aten.relu_`."""
    return str(op.overloadpacket)


def _attention(args: tuple, out: Any) -> int:
    """query (b, heads, q, d), key (b, heads or fewer, k, d), value (…, k, v): q·kᵀ and weights·v for each query head."""
    query, key, value = args[:3]
    batch, heads, queries, depth = query.shape
    return batch * heads * queries * key.shape[2] * (depth + value.shape[3])


def _attention_backward(args: tuple, out: Any) -> int:
    """gradient, query, key, value: q·kᵀ once more, and the gradients of weights (v deep), of values, of queries and of keys."""
    query, key, value = args[1:4]
    batch, heads, queries, depth = query.shape
    return batch * heads * queries * key.shape[2] * (3 * depth + 2 * value.shape[3])


def _matrix(first: int) -> Formula:
    """A matrix argument at `first` times what follows: one MAC for each of its entries and columns of the other."""
    return lambda args, out: args[first].numel() * (args[first + 1].shape[-1] if args[first + 1].dim() > 1 else 1)


def _batched_sum(args: tuple, out: Any) -> int:
    """addbmm: (b, n, k) times (b, k, m), summed over b."""
    return args[1].numel() * args[2].shape[-1]


def _taps(per_value: int) -> Formula:
    """A resize that reads a fixed number of input values for each output value."""
    return lambda args, out: per_value * out.numel()


def _grid_sample(taps: int) -> Formula:
    """Mode 0 reads the corners of a cell, 1 the nearest value (no arithmetic), 2 the 4×4 values around."""
    return lambda args, out: {0: taps, 1: 0, 2: 16}[args[2]] * out.numel()


def _antialiased(interp_size: int) -> Formula:
    """Two passes, width first, over (n, c, h, w); a side that stays the same has no pass.

    Taps of one output value: ceil(support) * 2 + 1 with support = interp_size / 2 * max(input / output, 1): the window
    that ATen/native/cpu/UpSampleKernel.cpp lays out, edges (where it is cut) counted as if whole.
    """

    def formula(args: tuple, out: Tensor) -> int:
        n, c, h_in, w_in = args[0].shape
        h_out, w_out = out.shape[2:]
        scale_h, scale_w = (*args[3:5], None, None)[:2]

        def taps(size_in: int, size_out: int, factor: float | None) -> int:
            if args[2]:  # align_corners: the centres of the first and last pixels coincide
                scale = (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
            else:
                scale = 1 / factor if factor else size_in / size_out
            return math.ceil(interp_size / 2 * max(scale, 1.0)) * 2 + 1

        macs = 0
        if w_out != w_in:
            macs += n * c * h_in * w_out * taps(w_in, w_out, scale_w)
        if h_out != h_in:
            macs += n * c * h_out * w_out * taps(h_in, h_out, scale_h)
        return macs

    return formula


def _recurrent(args: tuple, out: Any) -> int:
    """One direction of one layer of an LSTM: every position of (tokens, batch, channels) meets both of its matrices."""
    x, of_input, of_state = args[:3]
    return x.numel() // x.shape[-1] * (of_input.numel() + of_state.numel())


# By name, because not every operator exists in every version of torch that downres accepts.
_FORMULAS: dict[str, Formula] = {
    **{
        f"aten._scaled_dot_product_{kernel}": _attention
        for kernel in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten.mkldnn_rnn_layer": _recurrent,
    "aten.dot": lambda args, out: args[0].numel(),
    "aten.vdot": lambda args, out: args[0].numel(),
    "aten.mv": _matrix(0),
    "aten.addmv": _matrix(1),
    "aten.addmv_": _matrix(1),
    "aten._addmm_activation": _matrix(1),
    "aten._int_mm": _matrix(0),
    "aten.addmm_": _matrix(1),
    "aten.addbmm": _batched_sum,
    "aten.baddbmm_": _batched_sum,
    **{f"aten.{exact}{n}d": _taps(0) for exact in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)},
    "aten.upsample_linear1d": _taps(2),
    "aten.upsample_bilinear2d": _taps(4),
    "aten.upsample_trilinear3d": _taps(8),
    "aten.upsample_bicubic2d": _taps(16),
    "aten._upsample_bilinear2d_aa": _antialiased(2),
    "aten._upsample_bicubic2d_aa": _antialiased(4),
    "aten._upsample_lanczos2d_aa": _antialiased(6),
    "aten.grid_sampler_2d": _grid_sample(4),
    "aten._grid_sampler_2d_cpu_fallback": _grid_sample(4),
    "aten.grid_sampler_3d": _grid_sample(8),
    "aten.cudnn_grid_sampler": _taps(4),
}

_MOVES_ONLY = frozenset(
    # allocation and constants
    "empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones full "
    "full_like new_full scalar_tensor arange eye zero fill lift lift_fresh "
    # copies
    "clone copy _to _unsafe_view _reshape _reshape_alias contiguous cat stack repeat repeat_interleave roll flip rot90 "
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col unfold "
    # selection
    "tril triu where masked_fill masked_select masked_scatter index _unsafe_index index_select index_put "
    "_unsafe_index_put index_copy index_fill gather scatter slice_scatter select_scatter take embedding nonzero "
    # metadata and checks
    "resize set _local_scalar_dense _fused_sdp_choice _assert_async _assert_tensor_metadata is_same_size "
    "sym_size sym_stride sym_numel sym_storage_offset record_stream".split()
)
