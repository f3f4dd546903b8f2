"""What `reduce` asks of a transformer, whatever library it is from: its patches, its grid, its blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import DownresError
from ..parse import format_resolution
from ..probe import said
from ..reductions.tokens import TokenState

Size = tuple[int, int]
"""(height, width)"""
IMAGE = ("img_size", "image_size", "input_size", "input_resolution", "img_dim")
"""Names that attributes with the size of the image usually have."""


class Adapter:
    """One transformer inside a model and what can be done with it. Changes `module` in place: give it a copy.

    Attributes:
        name: dotted name of the transformer inside the model, '' for the model itself.
        image: (height, width) in pixels that it is made for; None where it takes any size as it is.
        patch: (height, width) in pixels of a patch, None where there is no resizable patch embedding.
        prefix: class, distillation and register tokens in front of the patch tokens.
        class_token: whether the first of them is a class token.
    """

    image: Size | None = None
    patch: Size | None = None
    prefix: int = 0
    class_token: bool = False
    resamples_itself: bool = False
    """Takes any size (`image` is None) by resampling its position embeddings in every forward pass; `fit` does it once."""
    why_no_sequence = "its tokens are no plain sequence"
    """Ends the sentence 'cannot merge or pool tokens: …' where `blocks` is empty."""
    sure = True
    """False where only a run can tell whether a reduced model works: `reduce` then makes one."""
    gives_way = False
    """A transformer of a library inside it counts in its place."""

    module: Any
    """Of a library, with attributes that nn.Module does not declare."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def inside(self, name: str) -> str:
        """The dotted name, in the model, of a part of the transformer."""
        return dotted(self.name, name)

    @property
    def unit(self) -> Size:
        """Multiples, in pixels, that height and width must be of."""
        return self.patch or (1, 1)

    def grid(self, image: Size) -> Size:
        """(rows, columns) of patch tokens that it makes of an image."""
        return image[0] // self.unit[0], image[1] // self.unit[1]

    def fit(self, image: Size, patch: Size | None) -> str:
        """Make it for images of another size, and for patches of another size unless None; says what was done, in words.

        Position embeddings are resampled in float32 from the original's grid, prefix tokens apart; the patch kernel is
        resized by pseudo-inverse (FlexiViT, Beyer et al. 2023). Raises DownresError with the reason when it cannot be.
        """
        raise NotImplementedError

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        """Keep the embedding for `image`, and make all that follows it for a map about `scale` times as large.

        For networks without a plain sequence of tokens. Returns the name, inside the model, of the module after which the
        map is to be resampled, and the exact factor. Raises DownresError with the reason when it cannot be.
        """
        raise DownresError(
            f"The activations of {type(self.module).__name__} cannot be resampled ({self.why_no_sequence}): "
            "lower its resolution instead."
        )

    def block_names(self) -> list[str]:
        """Names, inside `module`, of the blocks between which the sequence of tokens may change its length; may be empty."""
        return []

    def blocks(self) -> list[nn.Module]:
        found = [self.module.get_submodule(name) for name in self.block_names()]
        if not found:
            raise DownresError(
                f"The tokens of {type(self.module).__name__} can be neither merged nor pooled ({self.why_no_sequence}): "
                "lower its resolution instead."
            )
        return found

    def merge(self, state: TokenState, blocks: Sequence[nn.Module]) -> None:
        """Make these blocks hand their tokens to `state` between attention and MLP. Raises DownresError where it cannot."""
        raise NotImplementedError

    def after_pooling(self, blocks: Sequence[nn.Module], grid: Size) -> None:
        """What the blocks that follow a pooling need to know of the smaller grid (rotary embeddings)."""

    def scale(self, depth: int | None, width: float) -> nn.Module:
        """Another network of the same design with `depth` blocks and `width` times the channels; weights drawn anew."""
        raise DownresError(
            f"The depth and width of {type(self.module).__name__} cannot be scaled here: make the smaller network yourself."
        )


def impossible(
    module: nn.Module, image: Size, reason: str | BaseException, then: str = "give another resolution"
) -> DownresError:
    """To be raised where a network does not follow the size of its image. reason: in words, or what its library raised."""
    reason = reason if isinstance(reason, str) else said(reason)
    return DownresError(f"{type(module).__name__} cannot be made for {format_resolution(image)} px ({reason}): {then}.")


class KeepOutput:
    """Forward hook on what computes an attention's keys or queries: hands them to the state that the blocks share.

    heads: number of heads where the output is (B, tokens, heads·D); None where it is (B, heads, tokens, D) already.
    tokens_first: the output is (B, tokens, heads, D).
    join: the block has several attentions: their heads are put side by side.
    """

    def __init__(
        self, state: TokenState, what: str, heads: int | None = None, tokens_first: bool = False, join: bool = False
    ) -> None:
        self.state, self.what, self.heads, self.tokens_first, self.join = state, what, heads, tokens_first, join

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.heads is not None:
            output = output.unflatten(-1, (self.heads, -1))
        if self.heads is not None or self.tokens_first:
            output = output.transpose(1, 2)
        if self.join and (before := getattr(self.state, self.what)) is not None:
            output = torch.cat([before, output], dim=1)
        setattr(self.state, self.what, output)


class SetKeyword:
    """Forward pre-hook: the module gets this value under this name, whatever the caller gave.

    value: a tensor or several, which belong to no module: they follow the tokens to their device and type.
    """

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.value = key, value

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        self.value = tree_map_only(Tensor, lambda t: t.to(tokens.device), self.value)
        # Kept as precise as it was made: the next tokens may be of another type.
        return args, {**kwargs, self.key: tree_map_only(Tensor, lambda t: t.to(tokens.dtype), self.value)}


def packed_attention(attention: nn.MultiheadAttention, x: Tensor, state: TokenState) -> Tensor:
    """Self-attention of torch's own module with the mask of the merged tokens: (B, tokens, C) → the same.

    The module itself hands out no keys, and its fast path takes no additive mask.
    """
    packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = split_heads(packed, attention.num_heads)
    return attention.out_proj(attend(queries, keys, values, x, state, attention.dropout if attention.training else 0.0))


def split_heads(packed: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, tokens, 3·heads·D) → queries, keys and values, each (B, heads, tokens, D)."""
    return packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, x: Tensor, state: TokenState, dropout: float, scale: float | None = None
) -> Tensor:
    """Three of (B, heads, tokens, D) → (B, tokens, heads·D), with the mask of the merged tokens x (B, tokens, C)."""
    state.keys, state.queries = keys, queries if state.prunes else None
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=state.mask(x), dropout_p=dropout, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


class Merging(nn.Module):
    """A block whose tokens become fewer between attention and MLP. Stands before a library's block among the bases."""

    tokens: TokenState
    index: int

    attended: Callable[..., Tensor]
    """x (B, tokens, C), a mask to be added to the logits, … → x after the attention and its residual."""
    widened: Callable[..., Tensor]
    """x (B, tokens, C) → x after the MLP and its residual."""

    def merging(self, x: Tensor, **given: Any) -> Tensor:
        self.tokens.enter(self.index)
        x = self.attended(x, self.tokens.mask(x), **given)
        x = self.tokens.shrink(self.index, x)
        return self.tokens.leave(self.index, self.widened(x))

    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        no_mask(*masks, *named_masks.values())
        return self.merging(x)


def no_mask(*masks: object) -> None:
    """For the blocks that merge: whatever masks or flags the caller gives besides the tokens must be empty."""
    if any(mask is not None and mask is not False for mask in masks):
        raise DownresError(
            "A model with merged tokens takes no attention mask, whose tokens are no longer its own: leave the mask out, "
            "or reduce without merging."
        )


def swap_class(block: nn.Module, classes: dict[type, type], state: TokenState, index: int) -> None:
    """Give a block the `forward` of its `Merging` kind. Its class changes, its submodules and state dict do not."""
    kind = classes.get(type(block))
    if kind is None:
        known = ", ".join(c.__name__ for c in classes)
        raise DownresError(
            f"The tokens of blocks of kind {type(block).__name__} cannot be merged (known kinds: {known}): "
            "pool them with stem_scale or lower the resolution instead."
        )
    block.__class__ = kind
    block.tokens, block.index = state, index  # type: ignore[assignment]


def dotted(name: str, part: str) -> str:
    """The name of a part of the module of this name, '' for the model itself."""
    return f"{name}.{part}" if name else part


def as_pair(size: int | Sequence[int] | torch.Size) -> Size:
    """One number or two as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
