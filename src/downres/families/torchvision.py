"""torchvision: names, pretrained weights, the transforms that come with them, and its transformers."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torchvision.models as models
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from ..errors import DownresError
from ..parse import format_resolution
from ..records import Preprocessing
from ..reductions.resize import scaled_size
from ..reductions.tokens import TokenState
from .adapter import Adapter, Merging, Size, as_pair, impossible, packed_attention, swap_class
from .patches import put, resize_kernel, resize_positions
from .weights import match


def names() -> list[str]:
    # Classification models live in torchvision.models itself, the others in submodules.
    return models.list_models(module=models) + models.list_models(module=models.segmentation)


def tags(name: str) -> list[str]:
    return []  # get_model knows the best weights only


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("inception_v3", "googlenet"):
        # Their auxiliary heads exist for training alone, and change the output type.
        # The published weights, and what is fine-tuned from them, expect the input scaled by the network itself.
        kwargs |= {"aux_logits": False, "init_weights": False, "transform_input": True}
    if name.startswith("vit_"):  # for 224 px unless told: the weights of vit_h_14 are for 518
        kwargs["image_size"] = _default(name).meta["min_size"][0]
    if name in models.list_models(module=models.segmentation):
        kwargs["weights_backbone"] = None  # fetched otherwise
    model = models.get_model(name, weights=None, **kwargs)
    if pretrained:
        weights = _default(name)
        model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True), strict=False)
    return model


def _default(name: str) -> Any:
    """The weights that torchvision names as its best."""
    return models.get_model_weights(name).DEFAULT


def follow(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make a ViT, in place, for the grid of positions in the weights that it is to be given, where that is a square."""
    if not isinstance(model, VisionTransformer):
        return
    with contextlib.suppress(DownresError):  # weights of another network: whoever loads them says so
        positions = match(model, tensors)[0].get("encoder.pos_embedding")
        many = 0 if positions is None or positions.ndim != 3 else positions.shape[1] - 1
        side = math.isqrt(max(many, 0))
        if side and side**2 == many and side * model.patch_size != model.image_size:
            Vit("", model).fit((side * model.patch_size,) * 2, None)


def preprocessing(model: Any, name: str) -> Preprocessing:
    transform, note = _default(name).transforms(), ""
    if isinstance(model, VisionTransformer) and model.image_size != transform.crop_size[0]:
        others = [w.transforms() for w in models.get_model_weights(name)]
        transform = next((t for t in others if t.crop_size[0] == model.image_size), transform)
        note = "" if transform.crop_size[0] == model.image_size else f" ({model.image_size} px as in the weights)"
    if not hasattr(transform, "crop_size"):  # of segmentation: the whole picture
        side = transform.resize_size[0]
        return Preprocessing(
            side,
            interpolation=transform.interpolation.value,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            source=f"torchvision weight transforms ({side} px are the short side there, the longer one here)",
            fit="pad",
            any_size=True,
            antialias=transform.antialias is not False,
        )
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    return Preprocessing(
        resolution=model.image_size if note else crop,
        crop_ratio=crop / resize,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        source=f"torchvision weight transforms{note}",
        antialias=transform.antialias is not False,  # None: as PIL does
    )


def adapter(name: str, module: nn.Module) -> Adapter | None:
    kinds: dict[type, type[Adapter]] = {VisionTransformer: Vit, SwinTransformer: Swin, MaxVit: Windows}
    return next((adapted(name, module) for kind, adapted in kinds.items() if isinstance(module, kind)), None)


class Vit(Adapter):
    """`vit_b_16` and its kin, also those with a stem of convolutions in place of patches."""

    prefix, class_token = 1, True

    @property
    def image(self) -> Size:  # type: ignore[override]
        return as_pair(self.module.image_size)

    @property
    def patch(self) -> Size | None:  # type: ignore[override]
        return as_pair(self.module.patch_size) if isinstance(self.module.conv_proj, nn.Conv2d) else None

    @property
    def unit(self) -> Size:
        return as_pair(self.module.patch_size)

    def fit(self, image: Size, patch: Size | None) -> str:
        vit, old = self.module, self.grid(self.image)
        if image[0] != image[1] and type(vit) is not _AnyAspect:
            if type(vit) is not VisionTransformer:
                raise impossible(vit, image, "it is derived from torchvision's VisionTransformer, which takes square images")
            vit.__class__ = _AnyAspect
        if patch is not None and patch != self.patch:
            resize_kernel(vit.conv_proj, patch)
            vit.patch_size = patch[0]
        vit.image_size = image[0] if image[0] == image[1] else image
        new = self.grid(image)
        put(vit.encoder, "pos_embedding", resize_positions(vit.encoder.pos_embedding, old, new, self.prefix))
        vit.seq_length = math.prod(new) + self.prefix
        return "position embedding and patch kernel resampled"

    def block_names(self) -> list[str]:
        return [f"encoder.layers.{name}" for name, _ in self.module.encoder.layers.named_children()]

    def merge(self, state: TokenState, blocks: Sequence[nn.Module]) -> None:
        for i, block in enumerate(blocks):
            swap_class(block, {EncoderBlock: _MergingBlock}, state, i)


class _AnyAspect(VisionTransformer):
    """torchvision's own takes square images alone."""

    def _process_input(self, x: Tensor) -> Tensor:
        size, wanted = tuple(x.shape[-2:]), as_pair(self.image_size)
        torch._assert(size == wanted, f"Wrong image size! Expected {wanted} but got {size}!")
        return self.conv_proj(x).flatten(2).transpose(1, 2)


class _MergingBlock(Merging, EncoderBlock):
    def attended(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.dropout(packed_attention(self.self_attention, self.ln_1(x), self.tokens))

    def widened(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class Swin(Adapter):
    """`swin_*` and `swin_v2_*` pad to whole windows in each run: they take any size as they are."""

    why_no_sequence = "its attention needs the grid: windows"

    @property
    def _embedding(self) -> nn.Conv2d:
        return self.module.features[0][0]

    @property
    def patch(self) -> Size:  # type: ignore[override]
        return as_pair(self._embedding.kernel_size)

    @property
    def unit(self) -> Size:
        return 1, 1  # the convolution leaves out what does not fill a patch

    def fit(self, image: Size, patch: Size | None) -> str:
        if patch is None:
            return "as it takes any size"
        resize_kernel(self._embedding, patch)
        return "patch kernel resampled"

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        return self.inside("features.0.0"), scale


class Windows(Adapter):
    """`maxvit_t`: the number of its windows is fixed when it is built, and their size with it."""

    why_no_sequence = "its attention needs the grid: windows"

    @property
    def image(self) -> Size:  # type: ignore[override]
        rows, columns = self.module.blocks[0].grid_size
        return 4 * rows, 4 * columns  # behind the stem and the first block, each of stride 2

    def fit(self, image: Size, patch: Size | None) -> str:
        raise self._cannot_follow(image)

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        raise self._cannot_follow(scaled_size(image, scale))

    def _cannot_follow(self, image: Size) -> DownresError:
        size = self.module.partition_size
        return DownresError(
            f"The windows of torchvision's MaxVit cannot follow an image of {format_resolution(image)} px, as it is built for "
            f"windows of {size}x{size} on the maps of {format_resolution(self.image)} px alone: take timm's maxvit_tiny_tf_224."
        )
