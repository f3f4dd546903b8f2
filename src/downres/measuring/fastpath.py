"""PyTorch's fused inference kernels of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, step by step, on a CPU.

In inference these modules call one operator each. What it does inside costs as much as if it were written out, and holds the
whole matrix of attention weights; so it is written out here, in the order in which the operator makes and drops its tensors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`aten::_native_multi_head_attention` on query = key = value of (batch, tokens, width)."""
    batch, tokens = query.shape[:2]
    qkv = F.linear(query, qkv_weight).add_(qkv_bias).view(batch, tokens, 3, heads, -1)
    qkv = qkv.permute(2, 0, 3, 1, 4).contiguous()
    q, k, v = qkv.flatten(1, 2)  # each (batch·heads, tokens, width of a head), in one storage
    del qkv
    weights = torch.bmm(q.mul_(q.shape[-1] ** -0.5), k.transpose(1, 2)).view(batch, heads, tokens, tokens)
    if mask is not None:  # mask_type 1: (batch, tokens), of padding
        weights = weights.masked_fill(mask[:, None, None] if mask_type == 1 else mask, -torch.inf)
    torch.softmax(weights, -1, out=weights)
    out = torch.bmm(weights.flatten(0, 1), v, out=q).view(batch, heads, tokens, -1)  # where q was
    kept = weights if need_weights else None
    del weights
    out = F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
    return out, kept.mean(1) if kept is not None and average_weights else kept


def encoder_layer(
    x: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`aten::_transformer_encoder_layer_fwd`: attention and MLP with their norms before or after, (batch, tokens, width)."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, eps)

    before = x
    if norm_first:
        x = norm(x, norm_weight_1, norm_bias_1)
    x = attention(
        x, x, x, width, heads, qkv_weight, qkv_bias, out_weight, out_bias, mask, need_weights=False, mask_type=mask_type
    )[0]
    x += before
    if not norm_first:
        x = norm(x, norm_weight_1, norm_bias_1)
    before = x
    if norm_first:
        x = norm(x, norm_weight_2, norm_bias_2)
    hidden = torch._addmm_activation(up_bias, x.flatten(0, 1), up_weight.t(), use_gelu=gelu)
    x = F.linear(hidden, down_weight, down_bias).view_as(before)
    del hidden
    x += before
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)
