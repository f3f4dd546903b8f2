"""Fewer tokens: matching, merging, pruning and pooling of a transformer's sequence. Pure tensor functions and their state.

A sequence is (B, prefix + N, C): class, distillation and register tokens in front, then N patch tokens. The prefix is never
touched. Sources: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (ToMe, arXiv 2210.09461), sections 3 and 4.1;
Liang et al. 2022, "Not All Patches are What You Need" (EViT, arXiv 2202.07800), section 3.2, for pruning.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DownresError
from .resize import resample, scaled_size


@dataclass(frozen=True)
class Groups:
    """Which tokens of a sequence become one. Tokens and places count the whole sequence, the prefix included.

    stays: (B, tokens - r) the token of the longer sequence that stands at each place of the shorter one.
    goes: (B, r) the tokens that leave. target: (B, r) the place in the shorter sequence that each of them is averaged into.
    weight: (B, tokens) with how much a token counts in its group, times its size; None: by size alone.
    """

    stays: Tensor
    goes: Tensor
    target: Tensor
    weight: Tensor | None = None


def match_similar(metric: Tensor, r: int, prefix: int) -> Groups:
    """Bipartite soft matching (ToMe, sec. 3): the r most similar pairs between alternate tokens.

    metric: (B, prefix + N, D), what similarity (cosine) is measured on: the attention's keys, averaged over heads. r: at most
    half of N, rounded down.
    """
    batch, tokens = metric.shape[:2]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    # Alternate by the place in the whole sequence, as the paper does: behind a class token the first patch is an odd token.
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    best, partner = torch.bmm(metric[:, even::2], metric[:, odd::2].transpose(1, 2)).max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)
    joins = partner.gather(1, ranked[:, :r])
    ranked = 2 * ranked + even
    goes, rest = ranked[:, :r], ranked[:, r:]
    if prefix:
        rest = rest.sort(dim=-1).values  # the order of the image, which the next block alternates on
    front = torch.arange(prefix, device=metric.device).expand(batch, -1)
    receivers = torch.arange(odd, tokens, 2, device=metric.device).expand(batch, -1)
    return Groups(torch.cat([front, rest, receivers], dim=1), goes, joins + (prefix + rest.shape[1]))


def match_unattended(queries: Tensor, keys: Tensor, r: int, prefix: int) -> Groups:
    """The r + 1 patch tokens that the class token attends to least become one, at the end (EViT, sec. 3.2).

    They are averaged by that attention, a mean over heads; EViT sums them, this keeps the scale of the others. The class token
    is the first one. queries, keys: (B, heads, prefix + N, D), not yet scaled; the queries' heads may be a multiple of
    the keys'.
    """
    asking = queries[:, :, 0].unflatten(1, (keys.shape[1], -1))  # queries in groups share a head of keys
    logits = asking @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    exact = torch.promote_types(logits.dtype, torch.float32)
    attention = logits.softmax(dim=-1, dtype=exact).mean(dim=(1, 2))
    attention = attention.clamp_min(torch.finfo(exact).tiny)  # no group's weights are all 0
    batch, tokens = attention.shape
    ranked = attention[:, prefix:].argsort(dim=-1, descending=True) + prefix
    kept = tokens - prefix - r - 1
    front = torch.arange(prefix, device=keys.device).expand(batch, -1)
    stays = torch.cat([front, ranked[:, :kept].sort(dim=-1).values, ranked[:, kept : kept + 1]], dim=1)
    goes = ranked[:, kept + 1 :]
    return Groups(stays, goes, torch.full_like(goes, tokens - r - 1), attention)


def apply_groups(x: Tensor, size: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Average the tokens of each group, weighted by their sizes: (B, tokens, C), (B, tokens) → r fewer of each."""
    (batch, tokens), left = size.shape, groups.stays.shape[1]
    # Places in all sequences one behind the other: index_select copies whole tokens where gather looks every number up,
    # which is several times faster on a CPU.
    row = torch.arange(batch, device=x.device)[:, None]
    first, new_first = row * tokens, row * left
    stays, goes = (groups.stays + first).flatten(), (groups.goes + first).flatten()
    target = (groups.target + new_first).flatten()
    x, size = x.flatten(0, 1), size.flatten()
    share = size.index_select(0, goes)
    new_size = size.index_select(0, stays).index_add_(0, target, share)
    total = new_size
    if groups.weight is not None:
        shares = size * groups.weight.flatten()
        share = shares.index_select(0, goes)
        total = shares.index_select(0, stays).index_add_(0, target, share)
    # A receiver moves towards each token that joins it by that one's share; all others are copied, once, as they are.
    merged = x.index_select(0, stays)
    steps = x.index_select(0, goes) - merged.index_select(0, target)
    merged.index_add_(0, target, steps * (share / total.index_select(0, target)).to(x.dtype)[:, None])
    return merged.view(batch, left, x.shape[1]), new_size.view(batch, left)


def follow(groups: Groups) -> Tensor:
    """(B, tokens): the place that each token of the longer sequence has, or was averaged into, in the shorter one."""
    batch, left = groups.stays.shape
    places = torch.arange(left, device=groups.stays.device).expand(batch, -1)
    found = groups.stays.new_empty(batch, left + groups.goes.shape[1])
    return found.scatter_(1, groups.stays, places).scatter_(1, groups.goes, groups.target)


class TokenState:
    """What travels beside the tokens through one forward pass: sizes, and where every patch went.

    One object is shared by all blocks of a model, so that the model runs one batch at a time. A block calls `enter`, `mask`,
    `shrink` and `leave` in this order; what computes its keys (B, heads, tokens, D), and for pruning its queries, leaves
    them in `keys` and `queries` on the way. It is no module: it adds nothing to the state dict and is copied with the model.
    """

    def __init__(self, removals: tuple[int, ...], prefix: int, by: str, grid: tuple[int, int] | None = None) -> None:
        self.removals, self.prefix, self.by, self.grid = removals, prefix, by, grid
        self.prunes = by == "prune"  # else merged: the two words of `Merge.by`
        self.keep_map = False
        self.map: Tensor | None = None
        self._reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenState, (self.removals, self.prefix, self.by, self.grid)  # a copy carries nothing of a forward pass

    def _reset(self) -> None:
        self.next = 0  # block
        self.rotates = False
        self.size: Tensor | None = None
        self.source: Tensor | None = None
        self.place: Tensor | None = None
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None

    def enter(self, block: int) -> None:
        """Raises DownresError when a block that comes after others that merged does not run after them."""
        if block == 0:
            self._reset()
        elif block != self.next and any(self.removals[:block]):
            raise DownresError(
                f"A model with fewer tokens from block to block runs its blocks in order, block {block} came where {self.next} "
                "was due: turn gradient checkpointing off, and give each thread a copy of the model."
            )
        self.next = block + 1

    def mask(self, like: Tensor) -> Tensor | None:
        """Proportional attention (ToMe, eq. 1): the logarithm of the sizes, (B, 1, 1, tokens), to be added to the logits."""
        return None if self.size is None else self.size.log().to(like.dtype)[:, None, None]

    def of_tokens(self, rotary: Tensor | None) -> Tensor | None:
        """Rotary embeddings of the tokens that are left: a merged token turns as the one that received the others did.

        rotary: of the whole grid, (N, D) or one for each head, (heads, N, D). Returns (B, 1 or heads, tokens, D). A block
        that rotates calls it every time: from the first call on, the places are kept.
        """
        self.rotates = rotary is not None
        if rotary is None or self.place is None:
            return rotary
        return rotary[self.place].unsqueeze(1) if rotary.ndim == 2 else rotary[:, self.place].transpose(0, 1)

    def shrink(self, block: int, x: Tensor) -> Tensor:
        """(B, tokens, C) between attention and MLP → fewer tokens."""
        r, keys, queries = self.removals[block], self.keys, self.queries
        self.keys = self.queries = None
        if r == 0:
            return x
        assert keys is not None
        left = x.shape[1] - self.prefix
        if r > (left // 2 if not self.prunes else left - 2):
            raise DownresError(
                f"Block {block} was to {self.by} {r} tokens, and this input has {left} there: give images of the size that the "
                "model was reduced for, or reduce it with their resolution."
            )
        if self.prunes:
            assert queries is not None
            groups = match_unattended(queries, keys, r, self.prefix)
        else:
            groups = match_similar(keys.mean(dim=1), r, self.prefix)
        size = self.size
        if size is None:  # in float32 at least: bfloat16 cannot count beyond 256
            size = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x, self.size = apply_groups(x, size, groups)
        places = follow(groups)
        self.source = places if self.source is None else places.gather(1, self.source)
        if self.rotates:
            patches = groups.stays[:, self.prefix :] - self.prefix
            self.place = patches if self.place is None else self.place.gather(1, patches)
        return x

    def leave(self, block: int, x: Tensor) -> Tensor:
        """After the last block every patch gets the token that it went into, so that whatever follows sees the whole grid:
        a mean over patches is weighted by size, a dense head finds its grid, a class token is what it was."""
        if block != len(self.removals) - 1:
            return x
        source = self.source
        self._reset()
        if source is None:
            return x
        self.map = source[:, self.prefix :] - self.prefix if self.keep_map else None
        row = torch.arange(x.shape[0], device=x.device)[:, None]
        return x.flatten(0, 1).index_select(0, (source + row * x.shape[1]).flatten()).view(*source.shape, x.shape[2])


def pool_grid(x: Tensor, grid: tuple[int, int], size: tuple[int, int], prefix: int, interpolation: str = "bilinear") -> Tensor:
    """(B, prefix + h·w, C) → (B, prefix + h'·w', C): the grid of patch tokens resampled like a feature map, antialiased."""
    if grid == size:
        return x
    if x.shape[1] != prefix + grid[0] * grid[1]:
        raise DownresError(
            f"The grid of {grid[0]}x{grid[1]} patch tokens was to be resampled, this input makes {x.shape[1] - prefix} tokens: "
            "give images of the size that the model was reduced for, or reduce it with their resolution."
        )
    patches = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    return torch.cat([x[:, :prefix], resample(patches, size, interpolation).flatten(2).transpose(1, 2)], dim=1)


class PoolTokens:
    """Forward pre-hook of a block: pools the grid of patch tokens that comes in (the paper's stem resample, for a sequence)."""

    def __init__(self, grid: tuple[int, int], scale: float, prefix: int, interpolation: str) -> None:
        self.grid, self.size = grid, scaled_size(grid, scale)
        self.prefix, self.interpolation = prefix, interpolation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if not args:  # some callers name it
            key = next(k for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim == 3)
            return args, {**kwargs, key: pool_grid(kwargs[key], self.grid, self.size, self.prefix, self.interpolation)}
        return (pool_grid(args[0], self.grid, self.size, self.prefix, self.interpolation), *args[1:]), kwargs


class UnpoolTokens:
    """Forward hook of the last block: gives the grid of patch tokens its size back, so that dense heads find it."""

    def __init__(self, pooled: PoolTokens) -> None:
        self.pooled = pooled

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        p = self.pooled
        if isinstance(output, tuple):
            return (pool_grid(output[0], p.size, p.grid, p.prefix, p.interpolation), *output[1:])
        return pool_grid(output, p.size, p.grid, p.prefix, p.interpolation)
