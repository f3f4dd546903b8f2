"""timm: names, pretrained weights, what `pretrained_cfg` says of the input, and its transformers."""

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, apply_rot_embed_cat, resample_patch_embed
from timm.models._features import feature_take_indices
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.gemma4_vit import Gemma4VitEncoder
from timm.models.naflexvit import NaFlexVit
from timm.models.qwen3_vit import Qwen3VitEncoder
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..copying import copied
from ..errors import DownresError
from ..probe import find_stem, total_stride
from ..records import Preprocessing
from ..reductions.tokens import TokenState
from .adapter import Adapter, KeepOutput, Merging, SetKeyword, Size, as_pair, impossible, no_mask, swap_class
from .patches import put
from .rebuild import rebuild
from .timm_scale import scale_vit


def names() -> list[str]:
    return timm.list_models()


def tags(name: str) -> list[str]:
    """The kinds of pretrained weights that can be asked for as `name.tag`."""
    return [found.partition(".")[2] for found in timm.list_models(f"{name}.*", include_tags=True)]


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    config = timm.data.resolve_data_config(model=model)
    height, width = config["input_size"][1:]
    crop_ratio, interpolation, deviations = config["crop_pct"], config["interpolation"], []
    if config["crop_mode"] != "center":
        deviations.append(f"crop mode '{config['crop_mode']}' not followed: centre crop")
    if interpolation not in ("bilinear", "bicubic"):  # a few: 'lanczos', 'random'; bicubic is timm's own default
        deviations.append(f"interpolation '{interpolation}' not followed: bicubic")
        interpolation = "bicubic"
    if crop_ratio > 1:  # some VOLO: timm pads with black; the whole picture is the nearest that we have
        deviations.append(f"crop_pct {crop_ratio:g} not followed: 1")
        crop_ratio = 1.0
    return Preprocessing(
        resolution=(height, width),
        crop_ratio=crop_ratio,
        interpolation=interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        source="timm pretrained_cfg" + (f" ({'; '.join(deviations)})" if deviations else ""),
    )


def adapter(name: str, module: nn.Module) -> Adapter | None:
    if isinstance(module, (VisionTransformer, Eva)):
        return Plain(name, module)
    if isinstance(module, NaFlexVit):
        return NaFlex(name, module)
    if isinstance(module, (Gemma4VitEncoder, Qwen3VitEncoder)):
        return Cells(name, module)
    if not type(module).__module__.startswith("timm.models.") or not hasattr(module, "forward_features"):
        return None  # another library's, or a part of a model
    if hasattr(module, "set_input_size"):
        return Resizable(name, module)
    return Rebuilt(name, module) if _is_of_fixed_size(module) else None


def _is_of_fixed_size(module: nn.Module) -> bool:
    config = getattr(module, "pretrained_cfg", None) or {}
    fixed = getattr(module, "_traits", {}).get("fixed_input_size", config.get("fixed_input_size"))
    return bool(fixed and config.get("architecture"))


class Resizable(Adapter):
    """Whatever timm resizes by `set_input_size`: Swin, SwinV2, MaxViT, BEiT, … whose tokens are no plain sequence."""

    why_no_sequence = "its attention needs the grid: windows, or a table of relative positions"

    @property
    def embedding(self) -> Any:
        return getattr(self.module, "patch_embed", None)

    @property
    def image(self) -> Size | None:  # type: ignore[override]
        if getattr(self.module, "dynamic_img_size", False):
            return None
        size = getattr(self.embedding, "img_size", None) or getattr(self.module, "_traits", {}).get("img_size")
        size = size or getattr(self.module, "img_size", None)
        return None if size is None else as_pair(size)

    @property
    def patch(self) -> Size | None:  # type: ignore[override]
        proj = getattr(self.embedding, "proj", None)
        if not isinstance(proj, nn.Conv2d) or hasattr(self.embedding, "backbone"):
            return None  # no patches, or patches of a convnet's feature map
        if "patch_size" not in inspect.signature(self.module.set_input_size).parameters:
            return None
        return as_pair(self.embedding.patch_size)

    @property
    def unit(self) -> Size:
        ratio = getattr(self.module, "partition_ratio", None)  # MaxViT: windows and grids follow only this multiple
        if ratio is not None:
            return ratio, ratio
        if getattr(self.embedding, "dynamic_img_pad", False):
            return 1, 1  # it pads by itself
        return super().unit

    def fit(self, image: Size, patch: Size | None) -> str:
        given: dict[str, Any] = {"img_size": image}
        if patch is not None and patch != self.patch:
            given["patch_size"] = patch
        try:
            with warnings.catch_warnings(action="ignore"):  # timm's interpolation of tables indexes as torch dislikes
                self.module.set_input_size(**given)
        except (AssertionError, RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
            raise impossible(self.module, image, error) from error
        return "by timm's set_input_size"

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        self.sure = False
        name, unit = find_stem(self.module, (_channels(self.module), *image)), self._step(image)
        stem = self.module.get_submodule(name)
        if unit == (1, 1) and isinstance(stem, nn.Conv2d):
            unit = as_pair(stem.stride)
        # The factor that gives the map whole numbers, and the size of an image that has such a map.
        exact = max(1, round(image[0] // unit[0] * scale)) * unit[0] / image[0]
        smaller = round(image[0] * exact), max(1, round(image[1] // unit[1] * exact)) * unit[1]
        if self.image is not None:
            self.fit(smaller, None)
            embedding = self._embedding_of(name)
            if hasattr(embedding, "img_size"):
                embedding.img_size = image  # it alone still sees all pixels
        return self.inside(name), exact

    def _step(self, image: Size) -> Size:
        """What the sides of the map are counted in, in pixels; (1, 1) for the stride of the first convolution."""
        return self.patch or self.unit

    def _embedding_of(self, stem: str) -> Any:
        return self.embedding


def _channels(module: nn.Module) -> int:
    return next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))


class Rebuilt(Resizable):
    """Whatever timm builds for one size and cannot resize: CaiT, CoaT, GC-ViT, Hiera, LeViT, PiT, TNT, VOLO, …"""

    why_no_sequence = "it is no plain ViT: downres knows no list of like blocks in it"
    unit = Adapter.unit

    @property
    def image(self) -> Size:  # type: ignore[override]
        return super().image or as_pair(self.module.pretrained_cfg["input_size"][1:])

    @property
    def patch(self) -> Size | None:  # type: ignore[override]
        return as_pair(self.embedding.patch_size) if isinstance(self.embedding, PatchEmbed) else None

    def fit(self, image: Size, patch: Size | None) -> str:
        with warnings.catch_warnings(action="ignore"):
            changed = {} if patch is None else {"patch_size": patch[0]}
            builds = _fresh(self.module, self.image, {}), _fresh(self.module, image, changed)
            resampled = rebuild(self.module, *builds, self.image, image)
        try:
            with torch.no_grad():  # a run with numbers: looking up positions that a table does not have shows in no other
                x = torch.zeros(1, _channels(self.module), *image).to(next(self.module.parameters()))
                copied(self.module).eval().forward(x)  # past the hooks that `reduce` has put before it
        except Exception as error:  # whatever the library raises
            raise impossible(self.module, image, error) from error
        self.module._traits = {**getattr(self.module, "_traits", {}), "img_size": image}
        return f"as timm builds it for that size, {resampled} position tables resampled"

    def _step(self, image: Size) -> Size:
        stride = total_stride(self.module, image, _channels(self.module))  # its maps halve evenly in multiples of this
        return (1, 1) if image[0] % stride or image[1] % stride else (stride, stride)

    def _embedding_of(self, stem: str) -> Any:
        return self.module.get_submodule(stem.rpartition(".")[0])


def _fresh(module: Any, size: Size, changed: dict[str, Any]) -> nn.Module:
    """The same network with new weights, for images of this size."""
    name = module.pretrained_cfg["architecture"]
    given = {k: v for k, v in getattr(module, "_model_args", {}).items() if not k.endswith("_rate")}
    try:
        with torch.random.fork_rng(devices=[]):  # these weights are thrown away: they take no random numbers from the user
            made = timm.create_model(name, pretrained=False, **{**given, "img_size": size, **changed})
            for block in made.modules():
                if isinstance(getattr(block, "token_mixer", None), EfficientFormerAttention):
                    block.token_mixer = _attention_at(block.token_mixer, size)
            return made
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:  # what constructors object with
        raise impossible(module, size, error) from error


def _attention_at(attention: Any, image: Size) -> nn.Module:
    """EfficientFormer's: its table of distances is for 7×7 positions, those of 224 px, whatever size timm is asked for."""
    grid = -(-image[0] // 32), -(-image[1] // 32)
    made = EfficientFormerAttention(
        attention.qkv.in_features,
        attention.key_dim,
        attention.num_heads,
        attention.attn_ratio,
        grid,  # type: ignore[arg-type]
    )
    made.resolution = grid  # type: ignore[assignment]
    return made


class Plain(Resizable):
    """ViT, DeiT, DINOv2, SigLIP, hybrids (one class in timm), and EVA, DINOv3 (another)."""

    @property
    def prefix(self) -> int:  # type: ignore[override]
        return self.module.num_prefix_tokens

    @property
    def class_token(self) -> bool:  # type: ignore[override]
        return self.module.cls_token is not None

    @property
    def unit(self) -> Size:
        image, grid = self.image, self.embedding.grid_size
        if image is None or grid is None or self.patch is not None:
            return super().unit
        return image[0] // grid[0], image[1] // grid[1]  # of a hybrid: the stride of its convnet times its patch

    def grid(self, image: Size) -> Size:
        if getattr(self.embedding, "dynamic_img_pad", False):
            return as_pair(self.embedding.dynamic_feat_size(image))
        return super().grid(image)

    def block_names(self) -> list[str]:
        return [f"blocks.{i}" for i in range(len(self.module.blocks))]

    def merge(self, state: TokenState, blocks: Sequence[nn.Module]) -> None:
        self._refuse_maps_between(blocks)
        self.module.grad_checkpointing = False  # a block that runs again would find other sizes
        for i, block in enumerate(blocks):
            swap_class(block, _MERGING, state, i)
            if state.prunes and any(hasattr(m, "lambda_init") for m in block.modules()):
                raise DownresError(
                    "Pruning goes by the attention of the class token, and differential attention subtracts one from another: "
                    "merge instead."
                )
            join = isinstance(block, ParallelThingsBlock)
            for norm, what in (("k_norm", "keys"), ("q_norm", "queries")):
                for part in block.modules():
                    if hasattr(part, norm) and (what == "keys" or state.prunes):
                        first = isinstance(part, ParallelScalingBlock)
                        getattr(part, norm).register_forward_hook(KeepOutput(state, what, tokens_first=first, join=join))

    def _refuse_maps_between(self, blocks: Sequence[nn.Module]) -> None:
        first = list(self.module.blocks).index(blocks[0])
        self.module.forward_intermediates = _WholeMaps(self.module, first)

    def after_pooling(self, blocks: Sequence[nn.Module], grid: Size) -> None:
        self._refuse_maps_between(blocks)
        rope = getattr(self.module, "rope", None)
        if rope is None:
            return
        if getattr(self.module, "rope_mixed", False) or getattr(self.module, "rope_is_mixed", False):
            every, learned = list(self.module.blocks), _LearnedRotations(rope, grid)
            for block in blocks:
                hook = _OwnRotation(learned, every.index(block), block is blocks[0], block is blocks[-1])
                block.register_forward_pre_hook(hook, with_kwargs=True)
            return
        if getattr(rope, "feat_shape", None) is not None:
            rope = copy.deepcopy(rope)  # the blocks before still turn on the whole grid
            rope.update_feat_shape(list(grid))
            found = rope.get_embed().detach()
        else:
            found = rope.get_embed(shape=list(grid)).detach()
        for block in blocks:
            block.register_forward_pre_hook(SetKeyword("rope", found), with_kwargs=True)

    def scale(self, depth: int | None, width: float) -> nn.Module:
        return scale_vit(self.module, depth, width, self.name)


class _WholeMaps:
    """In the place of a ViT's `forward_intermediates`, which reshapes whatever tokens a block returns to the whole grid.

    Blocks from `first` on return fewer, the last one all of them again. An attribute of the model: its class stays, of
    which there are many; no module, so that the state dict does.
    """

    def __init__(self, vit: Any, first: int) -> None:
        self.vit, self.first, self.last = vit, first, len(vit.blocks) - 1

    def __call__(self, x: Tensor, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        wanted, _ = feature_take_indices(len(self.vit.blocks), indices)
        if short := [i for i in wanted if self.first <= i != self.last]:
            raise DownresError(
                f"Block {short[0]} of this reduced {type(self.vit).__name__} returns fewer tokens than its grid has, which "
                f"make no map: take the last block's (indices=[{self.last}]), or lower the resolution instead."
            )
        return type(self.vit).forward_intermediates(self.vit, x, indices, *args, **kwargs)


@dataclass
class _LearnedRotations:
    """Rotations of all blocks on a pooled grid, from the frequencies as they are now: they may be trained or loaded."""

    rope: Any
    grid: Size
    found: Tensor | None = None


class _OwnRotation:
    """Forward pre-hook of a block: its own of them. The first block has them made, the last one drops them."""

    def __init__(self, learned: _LearnedRotations, index: int, first: bool, last: bool) -> None:
        self.learned, self.index, self.first, self.last = learned, index, first, last

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        learned = self.learned
        if self.first:
            learned.found = learned.rope.get_embed(shape=list(learned.grid))
        own = learned.found[self.index]  # type: ignore[index]
        if self.last:
            learned.found = None
        return args, {**kwargs, "rope": own}


class Cells(Adapter):
    """Gemma 4 and Qwen3: any size, in whole cells of patches where these are put together for a language model."""

    sure = False
    why_no_sequence = "each of its blocks takes the places of all tokens beside the tokens"

    @property
    def unit(self) -> Size:
        rows, columns = as_pair(getattr(self.module, "patch_embed", self.module).patch_size)
        cell = getattr(self.module, "pooling_kernel_size", None) or self.module.merge_size
        cell = cell if self.module.global_pool in ("soft", "merge") else 1
        return rows * cell, columns * cell


class NaFlex(Plain):
    """NaFlexViT: takes images of any size in whole patches (its way of ready-made patches is left alone)."""

    image = None
    scale = Adapter.scale

    @property
    def embedding(self) -> Any:
        return self.module.embeds

    @property
    def class_token(self) -> bool:  # type: ignore[override]
        return self.embedding.cls_token is not None

    @property
    def patch(self) -> Size:  # type: ignore[override]
        return as_pair(self.embedding.patch_size)

    @property
    def unit(self) -> Size:
        return (1, 1) if self.embedding.dynamic_img_pad else self.patch

    def fit(self, image: Size, patch: Size | None) -> str:
        embeds = self.embedding
        if patch is None:
            return "as it takes any size"
        if embeds.norm_input is not None:
            raise DownresError(
                "The patch size of this NaFlexVit cannot change, because it normalises the pixels of a patch: "
                "lower its resolution instead."
            )
        proj, last = embeds.proj, embeds.channels_last
        with torch.no_grad():
            kernel = proj.weight
            if embeds.is_linear:  # a row holds the pixels of a patch, its channels innermost or outermost
                kernel = kernel.unflatten(1, (*embeds.patch_size, -1) if last else (-1, *embeds.patch_size))
                kernel = kernel.permute(0, 3, 1, 2) if last else kernel
            kernel = resample_patch_embed(kernel, list(patch))
            if embeds.is_linear:
                kernel = (kernel.permute(0, 2, 3, 1) if last else kernel).flatten(1)
                proj.in_features = kernel.shape[1]
            else:
                proj.kernel_size = proj.stride = patch
            put(proj, "weight", kernel.contiguous())
        embeds.patch_size = patch
        return "patch kernel resampled; position embeddings follow the grid in each run"


class _MergingBlock(Merging, Block):
    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=mask)))

    def widened(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _MergingResPostBlock(Merging, ResPostBlock):
    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.drop_path1(self.norm1(self.attn(x, attn_mask=mask)))

    def widened(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class _Turning(Merging):
    """With rotary embeddings."""

    def forward(self, x: Tensor, rope: Tensor | None = None, *masks: Any, **named_masks: Any) -> Tensor:
        no_mask(*masks, *named_masks.values())
        return self.merging(x, rope=rope)

    def attention(self: Any, x: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        tokens, rope = self.tokens, self.tokens.of_tokens(rope)
        out = self.attn(x, rope=rope, attn_mask=mask)
        # Keys as the class token attends to them, rotated; for pruning only, merging compares them as they were before.
        if rope is not None and tokens.prunes and tokens.keys is not None:
            keys, half = tokens.keys, bool(getattr(self.attn, "rotate_half", False))
            patches = apply_rot_embed_cat(keys[:, :, tokens.prefix :], rope, half=half)
            tokens.keys = torch.cat([keys[:, :, : tokens.prefix], patches.to(keys.dtype)], dim=2)
        return out


class _MergingEvaBlock(_Turning, EvaBlock):
    def attended(self, x: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        out = self.attention(self.norm1(x), mask, rope)
        return x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def widened(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class _MergingEvaBlockPostNorm(_Turning, EvaBlockPostNorm):
    def attended(self, x: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        return x + self.drop_path1(self.norm1(self.attention(x, mask, rope)))

    def widened(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class _MergingParallelScalingBlock(Merging, ParallelScalingBlock):
    """Attention and MLP side by side: there is no place between them, tokens merge behind both."""

    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return ParallelScalingBlock.forward(self, x, attn_mask=mask)

    def widened(self, x: Tensor) -> Tensor:
        return x


class _MergingParallelThingsBlock(Merging, ParallelThingsBlock):
    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        branches: list[Any] = list(self.attns)
        return x + sum(b.drop_path(b.ls(b.attn(b.norm(x), attn_mask=mask))) for b in branches)

    def widened(self, x: Tensor) -> Tensor:
        return x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)


_MERGING = {
    Block: _MergingBlock,
    ParallelScalingBlock: _MergingParallelScalingBlock,
    ParallelThingsBlock: _MergingParallelThingsBlock,
    ResPostBlock: _MergingResPostBlock,
    EvaBlock: _MergingEvaBlock,
    EvaBlockPostNorm: _MergingEvaBlockPostNorm,
}
