"""The vision transformers of the transformers library: made for other sizes and patches, with fewer tokens block by block."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, __version__
from transformers.models.beit.modeling_beit import BeitEmbeddings, BeitModel, BeitRelativePositionBias
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings, CLIPVisionModel
from transformers.models.deit.modeling_deit import DeiTEmbeddings, DeiTLayer, DeiTModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings, Dinov2Layer, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersModel,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer, DINOv3ViTModel, apply_rotary_pos_emb
from transformers.models.segformer.modeling_segformer import SegformerModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings, SiglipVisionModel
from transformers.models.swin.modeling_swin import SwinModel, SwinRelativePositionBias
from transformers.models.swinv2.modeling_swinv2 import Swinv2Model
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer, ViTModel

from ..copying import copied, first_float, modules
from ..errors import DownresError
from ..parse import format_resolution
from ..probe import input_size_of
from ..reductions.resize import scaled_size
from ..reductions.tokens import TokenState
from .adapter import Adapter, KeepOutput, Merging, SetKeyword, Size, as_pair, impossible, no_mask, swap_class
from .patches import put, resize_kernel, resize_positions, resize_relative_positions, restated
from .rebuild import rebuild
from .unknown import Unknown, may_be_fixed

if tuple(map(int, __version__.split(".")[:2])) < (5, 21):  # layers and their projections were named otherwise before
    raise ImportError(f"{__version__} is installed, 5.21 is needed")

_ADDITIVE = ("eager", "sdpa")
"""Attention implementations of the library to which a float mask can be added; the flash and flex ones take none."""


def adapter(name: str, module: nn.Module) -> Adapter | None:
    found = next((kind(name, module) for kind, classes in _KINDS.items() if isinstance(module, classes)), None)
    return Configured(name, module) if found is None and _is_built_for_one_size(module) else found


def _is_built_for_one_size(module: nn.Module) -> bool:
    """Whether a model of the library states a size, may be fixed to it, and none of its parts has an adapter of its own."""
    if not isinstance(module, PreTrainedModel) or not getattr(module.config, "image_size", None) or not may_be_fixed(module):
        return False
    own = tuple(kind for kinds in _KINDS.values() for kind in kinds)
    return not any(isinstance(m, own) or type(m).__module__.startswith("timm.models") for m in modules(module))


class _Patches(Adapter):
    """What the families share: one convolution that makes patches, and perhaps learned positions of their grid.

    `fit` always starts from the tensors found here, so that nothing is resampled twice.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.embeddings: Any = self.module.embeddings
        self.config: Any = self.module.config
        path, self.convolution = next((n, m) for n, m in self.embeddings.named_modules() if isinstance(m, nn.Conv2d))
        self.convolution_name = self.inside(f"embeddings.{path}")
        self.kernel = self.convolution.weight
        table = getattr(self.embeddings, "position_embedding", None)  # SigLIP and CLIP look positions up in an nn.Embedding
        learned = getattr(self.embeddings, "position_embeddings", None) if table is None else table.weight
        self.positions = None if learned is None else learned.detach().reshape(1, -1, learned.shape[-1])
        self.original_grid = self.grid(as_pair(self.config.image_size))

    @property
    def image(self) -> Size | None:  # type: ignore[override]
        return as_pair(self.config.image_size)

    @property
    def patch(self) -> Size:  # type: ignore[override]
        return as_pair(self.config.patch_size)

    def fit(self, image: Size, patch: Size | None) -> str:
        patch = patch or self.patch
        return self._refit(image, patch, (image[0] // patch[0], image[1] // patch[1]))

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        self._refit(image, self.patch, scaled_size(self.grid(image), scale))
        return self.convolution_name, scale

    def _refit(self, image: Size, patch: Size, grid: Size) -> str:
        """Kernel for `patch`, positions for `grid`, and every attribute that states a size. The config is the copy's own.

        Says what was done, in words.
        """
        resize_kernel(self.convolution, patch, self.kernel)
        if self.positions is not None:
            extra = self.positions.shape[1] - self.original_grid[0] * self.original_grid[1]
            self._set_positions(resize_positions(self.positions, self.original_grid, grid, extra))
        stated = {"image_size": image, "patch_size": patch, "grid_size": grid, "patch_grid": grid}
        owners: tuple[Any, ...] = self.config, self.embeddings, getattr(self.embeddings, "patch_embeddings", None)
        for owner in owners:
            if hasattr(owner, "num_patches"):
                owner.num_patches = grid[0] * grid[1]
            for key, value in stated.items():
                if hasattr(owner, key):
                    setattr(owner, key, restated(getattr(owner, key), value))
        return "patch kernel and positions resampled"

    def _set_positions(self, positions: Tensor) -> None:
        """positions: (1, prefix + N, C)."""
        table = getattr(self.embeddings, "position_embedding", None)
        if table is None:
            put(self.embeddings, "position_embeddings", positions)
            return
        put(table, "weight", positions[0])
        table.num_embeddings = self.embeddings.num_positions = positions.shape[1]
        self.embeddings.position_ids = torch.arange(positions.shape[1], device=positions.device)[None]


class Plain(_Patches):
    """ViT, DeiT, DINOv2 with and without registers, the image towers of SigLIP and CLIP, and DINOv3."""

    @property
    def resamples_itself(self) -> bool:  # type: ignore[override]
        return isinstance(self.embeddings, (Dinov2Embeddings, Dinov2WithRegistersEmbeddings)) and self.image is None

    @property
    def image(self) -> Size | None:  # type: ignore[override]
        if isinstance(self.module, DINOv3ViTModel):  # rotary
            return None
        if isinstance(self.module, (Dinov2Model, Dinov2WithRegistersModel)) and not isinstance(self.embeddings, _Fitted):
            return None
        return super().image

    @property
    def prefix(self) -> int:  # type: ignore[override]
        if isinstance(self.module, SiglipVisionModel):
            return 0
        if isinstance(self.module, DeiTModel):
            return 2
        return 1 + getattr(self.config, "num_register_tokens", 0)

    @property
    def class_token(self) -> bool:  # type: ignore[override]
        return self.prefix > 0

    def _refit(self, image: Size, patch: Size, grid: Size) -> str:
        super()._refit(image, patch, grid)
        if self.positions is None:
            return "rotary embeddings follow"
        self.embeddings.__class__ = _FITTED.get(type(self.embeddings), type(self.embeddings))
        self.embeddings.fitted = image
        return "position embeddings resampled once (float32, bicubic, antialiased)"

    def block_names(self) -> list[str]:
        return [name for name, m in self.module.named_modules() if isinstance(m, tuple(_MERGING))]

    def merge(self, state: TokenState, blocks: Sequence[nn.Module]) -> None:
        implementation = self.config._attn_implementation
        if implementation not in _ADDITIVE:
            raise DownresError(
                f"Merged tokens count by their size through an attention mask, which {implementation!r} attention does not "
                f"take: call set_attn_implementation('sdpa') on the {type(self.module).__name__} first."
            )
        self.module.register_forward_pre_hook(_RefuseMask(), with_kwargs=True)
        for i, block in enumerate(blocks):
            swap_class(block, _MERGING, state, i)
            attention: Any = block.self_attn if hasattr(block, "self_attn") else block.attention
            heads = self.config.num_attention_heads
            attention.k_proj.register_forward_hook(KeepOutput(state, "keys", heads))
            if state.prunes:
                attention.q_proj.register_forward_hook(KeepOutput(state, "queries", heads))

    def after_pooling(self, blocks: Sequence[nn.Module], grid: Size) -> None:
        if not isinstance(self.module, DINOv3ViTModel):
            return
        size = [side * unit for side, unit in zip(grid, self.patch, strict=True)]
        rope = copy.deepcopy(self.module.rope_embeddings).eval()  # in training it moves the positions at random
        turns = rope(self.kernel.new_empty(1, 1, *size))
        for block in blocks:
            block.register_forward_pre_hook(SetKeyword("position_embeddings", turns), with_kwargs=True)

    def scale(self, depth: int | None, width: float) -> nn.Module:
        if width != 1.0:
            raise DownresError(
                f"The width of a {type(self.module).__name__} cannot change without the head behind it: give the narrower "
                "network as transformers:path/to/config.json."
            )
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = depth
        pooler = {"add_pooling_layer": self.module.pooler is not None} if hasattr(self.module, "pooler") else {}
        fresh = type(self.module)._from_config(config, dtype=self.kernel.dtype, **pooler)
        return fresh.to(self.kernel.device).train(self.module.training)


class Windowed(_Patches):
    """Swin and SwinV2: attention in windows of the grid. The library builds the windows from the size in the configuration."""

    why_no_sequence = "its attention works in windows of the grid"

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        found = [m for m in module.modules() if isinstance(m, SwinRelativePositionBias)]
        self.tables = {m: m.relative_position_bias_table for m in found}

    def _refit(self, image: Size, patch: Size, grid: Size) -> str:
        super()._refit(image, patch, grid)
        return f"windows of {', '.join(map(str, self._fit_windows(grid)))} tokens a side, stage by stage"

    def _fit_windows(self, grid: Size) -> list[int]:
        """The side of the windows of each stage, for `grid` patch tokens in the first; later stages halve it, rounding up."""
        sides, window = [], self.config.window_size
        for stage in self.module.encoder.layers:
            for i, block in enumerate(stage.blocks):
                block.input_resolution = grid
                shift = 0 if i % 2 == 0 else window // 2
                if isinstance(self.module, Swinv2Model):
                    _resize_window_v2(block, window, shift)
                else:
                    block.window_size = min(window, *grid)
                    block.shift_size = 0 if min(grid) <= window else shift
                    self._cut_bias(block.attention.relative_position_bias, block.window_size)
            if hasattr(stage.downsample, "input_resolution"):
                stage.downsample.input_resolution = grid
            sides.append(stage.blocks[0].window_size)
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return sides

    def _cut_bias(self, bias: Any, side: int) -> None:
        """Swin cuts its windows to a small grid while it runs, and then fails on the bias of the whole window: cut that too.

        The offsets that are left keep the bias that they had; nothing is interpolated.
        """
        table, whole = self.tables[bias], self.config.window_size
        inner = slice(whole - side, whole + side - 1)
        cut = table.detach().unflatten(0, (2 * whole - 1, 2 * whole - 1))[inner, inner].flatten(0, 1)
        put(bias, "relative_position_bias_table", cut.clone())
        bias.window_size, bias.window_area = (side, side), side * side
        bias.relative_position_index = bias._create_relative_position_index().view(-1).to(table.device)


def _resize_window_v2(block: Any, window: int, shift: int) -> None:
    """SwinV2 computes the bias from coordinates: the same for the offsets that are left if their unit stays the same."""
    (side, _), (block.shift_size, _) = block._compute_window_shift((window, window), (shift, shift))
    block.window_size, attention = side, block.attention.self
    if side == attention.window_size[0]:
        return
    if attention.pretrained_window_size[0] == 0:
        attention.pretrained_window_size = attention.window_size
    attention.window_size = (side, side)
    device = attention.relative_coords_table.device
    table, index = attention.create_coords_table_and_index()
    attention.relative_coords_table, attention.relative_position_index = table.to(device), index.to(device)


class Relative(_Patches):
    """BEiT: tables of relative positions of the whole grid, which the library resamples in every forward pass."""

    why_no_sequence = "its attention adds a bias for every pair of places in the grid"

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        found = [m for m in module.modules() if isinstance(m, BeitRelativePositionBias)]
        self.tables = [(m, m.relative_position_bias_table, m.window_size) for m in found]

    def _refit(self, image: Size, patch: Size, grid: Size) -> str:
        super()._refit(image, patch, grid)
        self.embeddings.__class__, self.embeddings.fitted = _FITTED[BeitEmbeddings], image
        for bias, table, window in self.tables:
            shape = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, table.shape[1]
            put(bias, "relative_position_bias_table", resize_relative_positions(table, window, grid, shape))
            bias.window_size, bias.num_relative_distance = grid, shape[0]
            bias.__class__ = _FittedBias
            bias.register_buffer("index", bias.generate_relative_position_index(grid).to(table.device, copy=True), False)
        for block in self.module.layers:
            block.patch_size = self.config.patch_size
        return "tables of relative positions and position embeddings resampled once"


class Configured(Unknown):
    """Whatever else the library builds for the size in its configuration: Hiera, LeViT, PVT, ViT-MSN, …"""

    @property
    def unit(self) -> Size:
        config = self.module.config
        patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None)  # Hiera's patches overlap
        return as_pair(patch) if isinstance(patch, (int, list, tuple)) and self.image is not None else (1, 1)

    def fit(self, image: Size, patch: Size | None) -> str:
        if patch is not None:
            return super().fit(image, patch)
        assert self.image is not None
        resampled = rebuild(self.module, self._fresh(self.image), self._fresh(image), self.image, image)
        for part in modules(self.module):
            if hasattr(part, "config") and hasattr(part.config, "image_size"):
                part.config.image_size = restated(part.config.image_size, image)
        try:
            with torch.no_grad():  # a run with numbers: looking up positions that a table does not have shows in no other
                x = torch.zeros(1, input_size_of(self.module)[0], *image).to(first_float(self.module))
                copied(self.module).eval().forward(x)  # past the hooks that `reduce` has put before it
        except Exception as error:  # whatever the library raises
            raise impossible(self.module, image, error) from error
        self.__dict__["image"] = image
        return f"as the library builds it for that size, {resampled} position tables resampled"

    def _fresh(self, size: Size) -> nn.Module:
        """The same network with new weights, for images of this size."""
        config = copy.deepcopy(self.module.config)
        config.image_size = restated(config.image_size, size)
        try:
            with torch.random.fork_rng(devices=[]):  # these weights are thrown away: they take no random numbers from the user
                return type(self.module)._from_config(config)
        except Exception as error:  # whatever a constructor objects with
            square = size[0] != size[1] and isinstance(self.module.config.image_size, int)
            why = "its configuration has one side alone: it is built for squares" if square else error
            raise impossible(self.module, size, why) from error


class Pyramid(Adapter):
    """SegFormer: overlapping patches, no position embeddings, any input size; a convnet as far as sizes go."""

    why_no_sequence = "its attention makes keys by a convolution over the grid"
    sure = False  # that convolution may be larger than what is left of the grid

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        return self.inside("stages.0.patch_embeddings.proj"), scale


# --- embeddings that were made for one size -----------------------------------------------------------------------


class _Fitted:
    """Embeddings whose positions `fit` resampled: neither again in every forward pass, nor taken for those of a square."""

    fitted: Size

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        if (height, width) != self.fitted:
            raise DownresError(
                f"This model was made for images of {format_resolution(self.fitted)} px, it got {height}x{width}: "
                "resize them, or reduce the original for that size."
            )
        table = getattr(self, "position_embedding", None)
        return self.position_embeddings if table is None else table.weight[None]  # type: ignore[attr-defined]


class _FittedFixed(_Fitted):
    """Those that compare the input with one square size unless they are asked to interpolate."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **{**kwargs, "interpolate_pos_encoding": True})  # type: ignore[misc]


class _FittedBias(BeitRelativePositionBias):
    index: Tensor

    def forward(self, window_size: Size, interpolate_pos_encoding: bool = False, dim_size: int | None = None) -> Tensor:
        """(1, heads, tokens, tokens), whatever window is asked for."""
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]


# --- layers that hand their tokens on -----------------------------------------------------------------------------


class _RefuseMask:
    """Forward pre-hook of the whole transformer. Its layers ignore masks: tracing makes the library build empty ones."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        no_mask(kwargs.get("attention_mask"))


class _Merging(Merging):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Tensor:  # type: ignore[override]
        return self.merging(hidden_states, **given)


class _MergingViT(_Merging):
    def attended(self: Any, x: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
        return x + self.dropout(self.attention(self.layernorm_before(x), mask, **given)[0])

    def widened(self: Any, x: Tensor) -> Tensor:
        return x + self.dropout(self.mlp(self.layernorm_after(x)))


class _MergingDINO(_Merging):
    def attended(
        self: Any, x: Tensor, mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor] | None = None, **given: Any
    ) -> Tensor:
        if position_embeddings is not None:
            given["position_embeddings"] = turns = tuple(map(self.tokens.of_tokens, position_embeddings))
        out, _ = self.attention(self.norm1(x), attention_mask=mask, **given)
        if position_embeddings is not None and self.tokens.prunes:  # the class token attends to keys that are turned
            self.tokens.queries, self.tokens.keys = apply_rotary_pos_emb(self.tokens.queries, self.tokens.keys, *turns)
        return x + self.drop_path(self.layer_scale1(out))

    def widened(self: Any, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class _MergingCLIP(_Merging):
    def attended(self: Any, x: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
        return x + self.self_attn(hidden_states=self.layer_norm1(x), attention_mask=mask, **given)[0]

    def widened(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(self.layer_norm2(x))


def _derived(first: type, *kinds: type) -> dict[type, type]:
    """A subclass of each of the library's kinds with the methods of `first`; in this module under its name, as pickle asks.

    Subclasses: what the library records of its layers, it records by their class.
    """
    found = {kind: type(f"{first.__name__}_{kind.__name__}", (first, kind), {"__module__": __name__}) for kind in kinds}
    globals().update({made.__name__: made for made in found.values()})
    return found


_MERGING = {
    **_derived(_MergingViT, ViTLayer, DeiTLayer),
    **_derived(_MergingDINO, Dinov2Layer, Dinov2WithRegistersLayer, DINOv3ViTLayer),
    **_derived(_MergingCLIP, SiglipEncoderLayer, CLIPEncoderLayer),
}
_FITTED = {
    **_derived(_FittedFixed, ViTEmbeddings, DeiTEmbeddings, SiglipVisionEmbeddings, CLIPVisionEmbeddings),
    **_derived(_Fitted, Dinov2Embeddings, Dinov2WithRegistersEmbeddings, BeitEmbeddings),
}
_KINDS: dict[type[Adapter], tuple[type, ...]] = {
    Plain: (ViTModel, DeiTModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, SiglipVisionModel, CLIPVisionModel),
    Windowed: (SwinModel, Swinv2Model),
    Relative: (BeitModel,),
    Pyramid: (SegformerModel,),
}
