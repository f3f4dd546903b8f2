"""A vision transformer of the user's own, as most write it since timm, DINO and MAE: known by its parts, not by its class.

A convolution whose kernel is its stride, or a linear layer, cuts the patches, a table of positions is added to the tokens, and
a list of equal blocks follows. What cannot be read off the parts is learned from one run without numbers.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..copying import copied, first_float, modules, named_buffers, named_modules, named_parameters, tensors_of
from ..errors import DownresError
from ..probe import fake_run, input_size_of
from ..reductions.resize import resample
from ..reductions.tokens import TokenState
from .adapter import (
    IMAGE,
    Adapter,
    Merging,
    Size,
    as_pair,
    attend,
    dotted,
    impossible,
    packed_attention,
    said,
    split_heads,
    swap_class,
)
from .patches import put, resize_kernel, resize_positions, restated
from .unknown import tables

PATCH = ("patch_size", "patch_dim")
GRID = ("grid_size", "grid", "patches_resolution", "feat_size", "patch_shape", "num_patches_hw")
TOKENS = ("num_patches", "n_patches", "num_tokens", "num_positions", "num_embeddings", "seq_length", "seq_len")
"""Names that attributes of this meaning usually have, as IMAGE; one is changed only where it holds the old value."""
CLASS_TOKENS = ("cls_token", "class_token", "cls", "class_embedding", "cls_embedding")


def find(model: nn.Module) -> "OwnViT | None":
    """The transformer in `model`, or None where the parts are missing or a run does not show a plain sequence."""
    lists = {name: [dotted(name, child) for child, _ in m._modules.items()] for name, m in _lists(model)}
    for cut in _cuts(model):
        for size in _sizes(model, cut):
            try:
                seen = _look(model, cut, lists, size)
            except DownresError:
                continue
            least = max(2, math.prod(seen.grid))
            blocks = next((names for names in lists.values() if seen.tokens_through(names) >= least), None)
            if seen.grid != (0, 0) and (through := blocks or seen.sequence(least)):
                return OwnViT(model, cut, through, size, seen)
            break
    return None


@dataclass(frozen=True)
class _Cut:
    """What cuts the patches: the module of that name, a convolution or a linear layer; patch: (height, width) in pixels."""

    name: str
    channels: int
    patch: Size
    is_linear: bool = False


def _cuts(model: nn.Module) -> list[_Cut]:
    """The first convolution whose kernel is its stride; without convolutions, the first linear layer if it may take patches."""
    convolutions = [(name, m) for name, m in named_modules(model) if isinstance(m, nn.Conv2d)]
    for name, conv in convolutions:
        if _cuts_patches(conv):
            return [_Cut(name, conv.in_channels, as_pair(conv.kernel_size))]
    linear = next(((name, m.in_features) for name, m in named_modules(model) if isinstance(m, nn.Linear)), None)
    if convolutions or linear is None:
        return []
    name, many = linear
    sides = {c: math.isqrt(many // c) for c in (3, 1, 4, 2) if c * math.isqrt(many // c) ** 2 == many}
    return [_Cut(name, c, (side, side), True) for c, side in sides.items() if side > 1]


def _cuts_patches(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and min(module.kernel_size) > 1
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists of at least two modules of one class."""
    for name, module in named_modules(model):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and len({type(m) for m in module}) == 1:
            yield name, module


def _sizes(model: nn.Module, cut: _Cut) -> Iterator[tuple[int, ...]]:
    """(channels, height, width) that the model may be made for, the likeliest first."""
    found = []
    for module in modules(model):
        for key in IMAGE:
            if (size := _pair(vars(module).get(key))) is not None:
                found.append(size)
    if getattr(model, "pretrained_cfg", None):
        found.append(input_size_of(model)[1:])
    for _, position in [*_positions(model), *_tables(model)]:
        many = position.shape[-1] ** 2 if position.ndim == 4 else max(position.shape[:-1])
        # A square grid, with up to eight class and register tokens besides.
        sides = [math.isqrt(many - more) for more in range(9) if many > more and math.isqrt(many - more) ** 2 == many - more]
        found += [(side * cut.patch[0], side * cut.patch[1]) for side in sides]
    found.append(input_size_of(model)[1:])
    yield from dict.fromkeys((cut.channels, *size) for size in found)


def _pair(value: Any) -> Size | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None


def _positions(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and values of what may be position embeddings; those that are looked up by index come as (N, C)."""
    tensors = [*named_parameters(model), *named_buffers(model)]
    return [(name, t) for name, t in tensors if "pos" in name.lower() and t.is_floating_point() and 2 <= t.ndim <= 4]


def _tables(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The same of any other name: what a module of the user's, or an `nn.Embedding`, holds itself."""
    found = [(dotted(name, key), t) for name, module in named_modules(model) for key, t in tables(module)]
    return [(name, t) for name, t in found if "pos" not in name.lower()]


@dataclass
class _Seen:
    """What a run shows: the size of the image, its patches, and the tokens into every module that keeps their number.

    tokens: by the module's name. calls: how often each ran; width: of the tokens that the patches become.
    tokens_first: the modules whose sequence is (tokens, images, channels).
    """

    image: Size = (0, 0)
    grid: Size = (0, 0)
    width: int = 0
    cuts: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    tokens_first: set[str] = field(default_factory=set)

    def tokens_through(self, names: Sequence[str]) -> int:
        """Tokens that go in and come out of all these modules alike, 0 where they do not."""
        counts = {self.tokens.get(name, 0) for name in names}
        return counts.pop() if len(counts) == 1 else 0

    def sequence(self, least: int) -> list[str]:
        """Of a network without a list of blocks: the modules that see the number of tokens that most see, `least` or more."""
        many = Counter(n for n in self.tokens.values() if n >= least).most_common(1)
        return [name for name, n in self.tokens.items() if n == many[0][0]] if many else []

    def runs_once(self, names: Sequence[str]) -> bool:
        return all(self.calls[name] <= max(1, self.cuts) for name in names)


def _look(model: nn.Module, cut: _Cut, lists: dict[str, list[str]], size: tuple[int, ...]) -> _Seen:
    """Raises DownresError where the model does not run at this size."""

    @contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[_Seen]:
        seen = _Seen()

        def patches(_module: nn.Module, args: tuple, output: Tensor) -> None:
            height, width = x.shape[-2:] if cut.is_linear else args[0].shape[-2:]
            grid = (height // cut.patch[0], width // cut.patch[1]) if cut.is_linear else output.shape[-2:]
            if cut.is_linear and args[0].shape[:-1].numel() != math.prod(grid):
                return  # no patches come in
            seen.image, seen.grid, seen.cuts = (height, width), (grid[0], grid[1]), seen.cuts + 1
            seen.width = output.shape[-1 if cut.is_linear else 1]

        def sequence(name: str) -> Any:
            def note(module: nn.Module, args: tuple, output: object) -> None:
                first, state = args[0] if args else None, getattr(module, "tokens", None)
                if not isinstance(first, Tensor) or first.ndim != 3:
                    return
                tokens_first = first.shape[1] == 1 < first.shape[0]  # one image runs
                many = first.shape[0 if tokens_first else 1]
                if isinstance(state, TokenState):  # a reduced model's
                    seen.tokens[name] = many + sum(state.removals[: module.index])  # type: ignore[index, arg-type]
                elif isinstance(output, Tensor) and first.shape == output.shape:
                    seen.tokens[name] = many
                    if tokens_first:
                        seen.tokens_first.add(name)
                seen.calls[name] += 1

            return note

        parts = dict(named_modules(copied))
        parts[cut.name].register_forward_hook(patches)
        for name in {*(name for names in lists.values() for name in names), *parts} - {"", cut.name}:
            copied.get_submodule(name).register_forward_hook(sequence(name))
        yield seen

    return fake_run(model, size, watch)


class OwnViT(Adapter):
    """Changes `module`, the user's whole model, of which the transformer is a part."""

    sure = False

    def __init__(self, model: nn.Module, cut: _Cut, through: list[str], size: tuple[int, ...], seen: _Seen) -> None:
        """through: the modules that the sequence of tokens goes through, its blocks where it has a list of them."""
        super().__init__("", model)
        self._cut, self._through, self._size, self._seen = cut, through, size, seen
        self.prefix = seen.tokens_through(through) - math.prod(seen.grid)
        self.class_token = self.prefix > 0 and any(
            name.rpartition(".")[2] in CLASS_TOKENS for name, _ in named_parameters(model)
        )
        self._any_size: bool | None = None
        self._in_order = False

    @property
    def image(self) -> Size | None:  # type: ignore[override]
        if self._any_size is None:
            (rows, columns), (channels, height, width) = self._cut.patch, self._size
            self._any_size = self._follows((channels, height + 2 * rows, width + columns))
        return None if self._any_size else self._seen.image

    def _follows(self, size: tuple[int, ...]) -> bool:
        """Whether it runs at this size, with as many tokens as that has patches."""
        try:
            other = self._run(size)
        except DownresError:
            return False
        return other.tokens_through(self._through) == math.prod(other.grid) + self.prefix

    def _run(self, size: tuple[int, ...]) -> _Seen:
        return _look(self.module, self._cut, {"": self._through}, size)

    @property
    def unit(self) -> Size:
        return self._cut.patch

    @property
    def patch(self) -> Size | None:  # type: ignore[override]
        return None if self._cut.is_linear else self._cut.patch  # in which order a row holds its pixels nothing tells

    @property
    def why_no_sequence(self) -> str:  # type: ignore[override]
        if not self._is_list:
            return "it has no list of like blocks"
        if not self._seen.runs_once(self._through):
            return "it runs the same block several times, and each place that takes tokens out has to be a block of its own"
        return "its sequence is (tokens, images, channels), make it (images, tokens, channels)"

    @property
    def _is_list(self) -> bool:
        return any([dotted(name, child) for child in m._modules] == self._through for name, m in _lists(self.module))

    def block_names(self) -> list[str]:
        seen = self._seen
        plain = self._is_list and seen.tokens_first.isdisjoint(self._through) and seen.runs_once(self._through)
        return self._through if plain else []

    def blocks(self) -> list[nn.Module]:
        self._check_order()
        return super().blocks()

    def _check_order(self) -> None:
        """Raises DownresError unless the first block gets `prefix` tokens and then the patches, row by row.

        Learned by numbers: which token moves most when the first, or the last, patch of the first row changes. A network
        without numbers is believed.
        """
        if self._in_order:
            return
        found, columns = self._places(), self._seen.grid[1]
        if found is not None and found != [self.prefix, self.prefix + columns - 1]:
            raise DownresError(
                f"The tokens of {type(self.module).__name__} are not its patches row by row behind {self.prefix} others (their "
                f"first row is at {found[0]} to {found[1]}): put class and register tokens in front, or leave its tokens as "
                "they are."
            )
        self._in_order = True

    def _places(self) -> list[int] | None:
        """Where the first and the last patch of the first row are among the tokens of the first block."""
        if any(t.is_meta for t in tensors_of(self.module)):
            return None
        height, width = self._cut.patch
        channels, rows, columns = self._size
        pixels = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(0))
        images = torch.zeros(3, channels, rows, columns)
        images[1, :, :height, :width] = pixels
        right = (self._seen.grid[1] - 1) * width
        images[2, :, :height, right : right + width] = pixels
        model = nn.Module.eval(copied(self.module))
        empty, *seen = (self._tokens_into(model, image[None])[0] for image in images)
        moved = (torch.stack(seen) - empty).norm(dim=-1)  # (2, tokens)
        return moved.argmax(dim=1).tolist() if moved.amax(dim=1).min() > 0 else None

    def _tokens_into(self, model: nn.Module, image: Tensor) -> list[Tensor]:
        """(tokens, C), what comes into the blocks of a copy of the module, one after the other."""
        seen: list[Tensor] = []
        first = [model.get_submodule(name) for name in self._through]
        handles = [
            m.register_forward_pre_hook(lambda _m, args: seen.append(args[0].float()), prepend=True)
            for m in dict.fromkeys(first)
        ]
        with torch.no_grad():
            model.forward(image.to(first_float(model)))  # past the hooks that `reduce` has put before it
        for handle in handles:
            handle.remove()
        return [x[:, 0] if self._through[0] in self._seen.tokens_first else x[0] for x in seen]

    def _is_added(self, name: str) -> bool:
        """Whether the last row of a table belongs to the last token: a change there moves that one alone."""
        if any(t.is_meta for t in tensors_of(self.module)):
            return True
        model, image = nn.Module.eval(copied(self.module)), torch.zeros(1, *self._size)
        before = self._tokens_into(model, image)
        table = dict([*named_parameters(model), *named_buffers(model)])[name]
        with torch.no_grad():
            last = table[:, :, -1, -1] if table.ndim == 4 and table.shape[1] == self._seen.width else table.flatten(0, -2)[-1:]
            last.add_(torch.randn(last.shape, generator=torch.Generator().manual_seed(0)).to(last))
        for one, other in zip(before, self._tokens_into(model, image), strict=True):
            moved = (one != other).any(dim=-1).nonzero().flatten().tolist()
            if moved:
                return moved == [len(one) - 1]
        return False

    def fit(self, image: Size, patch: Size | None) -> str:
        old, new = self._seen.grid, (image[0] // (patch or self.unit)[0], image[1] // (patch or self.unit)[1])
        before, any_size = self._seen.image, self.image is None
        kernel = self._cut.patch
        if not any_size:
            self._check_order()
        if patch is not None and patch != kernel:
            resize_kernel(self.module.get_submodule(self._cut.name), patch)
            self._cut = replace(self._cut, patch=patch)
            self._rename(PATCH, kernel, patch)
        if not any_size:
            others = [(name, t) for name, t in _tables(self.module) if self._fits(t) and self._is_added(name)]
            for name, position in [*_positions(self.module), *others]:
                self._place(name, position, old, new)
            self._rename(IMAGE, before, image)
            self._rename(GRID, old, new)
            self._recount(math.prod(old), math.prod(new))
        self._size = (self._size[0], *image)
        try:
            self._seen = self._run(self._size)
        except DownresError as error:
            raise impossible(self.module, image, error.__cause__ or error) from error
        found = self._seen.tokens_through(self._through)
        if self._seen.grid != new or found != math.prod(new) + self.prefix:
            raise impossible(self.module, image, f"its blocks then see {found} tokens of {math.prod(new) + self.prefix}")
        return "position embedding resampled" if self.patch is None else "position embedding and patch kernel resampled"

    def _fits(self, table: Tensor) -> bool:
        """Whether a table has a row, as wide as the tokens, for each patch or for each token."""
        grid, width, shape = self._seen.grid, self._seen.width, tuple(table.shape)
        if len(shape) == 4:
            return shape[1:] in ((width, *grid), (*grid, width))
        many = math.prod(grid)
        return shape[-1] == width and math.prod(shape[:-1]) in (many, many + self.prefix)

    def _place(self, name: str, position: Tensor, old: Size, new: Size) -> None:
        """Resample one position embedding of the old grid, if it is one."""
        many, tokens = math.prod(old), max(position.shape[:-1])
        with torch.no_grad():
            if position.ndim == 4 and tuple(position.shape[2:]) == old:
                found = resample(position, new, "bicubic")
            elif position.ndim == 4 and tuple(position.shape[1:3]) == old:
                found = resample(position.permute(0, 3, 1, 2), new, "bicubic").permute(0, 2, 3, 1)
            elif position.ndim < 4 and math.prod(position.shape[:-1]) == tokens and tokens in (many, many + self.prefix):
                found = resize_positions(position.reshape(1, tokens, -1), old, new, tokens - many)
                # (1, N, C), (N, C) or (N, 1, C)
                sides = [found.shape[1] if side == tokens else side for side in position.shape[:-1]]
                found = found.reshape(*sides, position.shape[-1])
            else:
                return
        put(self.module, name, found)

    def _rename(self, keys: tuple[str, ...], old: Size, new: Size) -> None:
        """Attributes with one of these names and the old size get the new one, in the form that they had."""
        for module in modules(self.module):
            for key in keys:
                if _pair(value := vars(module).get(key)) == old:
                    setattr(module, key, restated(value, new))

    def _recount(self, old: int, new: int) -> None:
        """The same for numbers of tokens, with and without the prefix, and for indices of positions that are looked up."""
        for module in modules(self.module):
            for key in TOKENS:
                if (value := vars(module).get(key)) in (old, old + self.prefix) and isinstance(value, int):
                    setattr(module, key, value - old + new)
            for key, value in list(module._buffers.items()):
                if value is None or value.is_floating_point() or value.numel() not in (old, old + self.prefix):
                    continue
                if "pos" in key or (not value.is_meta and value.flatten().tolist() == list(range(value.numel()))):
                    many = value.numel() - old + new
                    module._buffers[key] = torch.arange(many, device=value.device).expand(*value.shape[:-1], many).clone()

    def merge(self, state: TokenState, blocks: Sequence[nn.Module]) -> None:
        for i, block in enumerate(blocks):
            if _is_block(block):
                _verify(block)
                swap_class(block, {type(block): _MergingBlock}, state, i)
                continue
            if type(block) is nn.TransformerEncoderLayer:
                _check_packed(block)
            swap_class(block, {nn.TransformerEncoderLayer: _MergingEncoderLayer}, state, i)


# Blocks: norm1, attn (qkv, proj, num_heads), norm2, mlp, and what may stand between.


def _is_block(block: nn.Module) -> bool:
    attention = getattr(block, "attn", None)
    return all(isinstance(getattr(block, part, None), nn.Module) for part in ("norm1", "norm2", "mlp")) and (
        isinstance(getattr(attention, "qkv", None), nn.Linear)
        and isinstance(getattr(attention, "proj", None), nn.Linear)
        and isinstance(getattr(attention, "num_heads", None), int)
    )


def _attend(attention: Any, x: Tensor, state: TokenState) -> Tensor:
    """(B, tokens, C) → the same: multi-head attention with the mask of the merged tokens."""
    queries, keys, values = split_heads(attention.qkv(x), attention.num_heads)
    if isinstance(getattr(attention, "q_norm", None), nn.Module):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    dropout = getattr(attention, "attn_drop", 0.0)
    dropout = float(getattr(dropout, "p", dropout)) if attention.training else 0.0
    scale = getattr(attention, "scale", None)
    scale = scale if isinstance(scale, float) else None
    out = attention.proj(attend(queries, keys, values, x, state, dropout, scale))
    drop = getattr(attention, "proj_drop", None)
    return drop(out) if isinstance(drop, nn.Module) else out


def _branch(block: nn.Module, out: Tensor, which: int) -> Tensor:
    """Layer scale and stochastic depth of the first (attention) or second (MLP) residual branch."""
    for key in (f"ls{which}", f"gamma_{which}", f"gamma{which}"):
        part = getattr(block, key, None)
        if part is not None:
            out = part(out) if isinstance(part, nn.Module) else part * out
    drop = getattr(block, f"drop_path{which}", getattr(block, "drop_path", None))
    return drop(out) if isinstance(drop, nn.Module) else out


class _MergingBlock(Merging):
    attn: Any
    norm1: Any
    norm2: Any
    mlp: Any

    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + _branch(self, _attend(self.attn, self.norm1(x), self.tokens), 1)

    def widened(self, x: Tensor) -> Tensor:
        return x + _branch(self, self.mlp(self.norm2(x)), 2)


class _MergingEncoderLayer(Merging, nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *masks: Any, **named_masks: Any) -> Tensor:  # type: ignore[override]
        return super().forward(src, *masks, **named_masks)

    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.norm_first:
            return x + self.dropout1(packed_attention(self.self_attn, self.norm1(x), self.tokens))
        return self.norm1(x + self.dropout1(packed_attention(self.self_attn, x, self.tokens)))

    def widened(self, x: Tensor) -> Tensor:
        return x + self._ff_block(self.norm2(x)) if self.norm_first else self.norm2(x + self._ff_block(x))


def _verify(block: nn.Module) -> None:
    """Whether the merging block computes what the user's does, on random tokens of two lengths, in double precision.

    Relative positions, other orders of the parts and whatever else a block may do are noticed here.
    """
    original = nn.Module.eval(copied(block).cpu().double())
    rewritten = copied(original)
    generator = torch.Generator().manual_seed(0)
    width: int = rewritten.attn.qkv.in_features  # type: ignore[union-attr, assignment]
    swap_class(rewritten, {type(rewritten): _MergingBlock}, TokenState((0, 0), 0, ""), 0)
    difference = "its result is another"
    try:
        with torch.no_grad():
            for length in (7, 12):  # past the hooks, which may be there to pool what comes in
                x = torch.randn(2, length, width, generator=generator, dtype=torch.float64)
                # Differences that layer scale makes small are seen on what the block adds, not on the sum.
                if not torch.allclose(rewritten.forward(x) - x, original.forward(x) - x, rtol=1e-6, atol=1e-12):
                    break
            else:
                return
    except Exception as error:  # whatever the user's block raises for a length that it is not made for
        difference = said(error)
    raise DownresError(
        f"The tokens of blocks of kind {type(block).__name__} cannot be merged: what downres makes of norm1, attn, norm2 and "
        f"mlp does not compute what the block does ({difference}); pool them with stem_scale or lower the resolution instead."
    )


def _check_packed(layer: nn.TransformerEncoderLayer) -> None:
    attention = layer.self_attn
    plain = attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
    if not (plain and attention.batch_first):
        raise DownresError(
            "The tokens of nn.TransformerEncoderLayer can be merged with batch_first=True and plain self-attention alone, "
            "this one has other options: make it so, or lower the resolution instead."
        )
