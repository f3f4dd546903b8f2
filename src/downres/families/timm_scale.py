"""Model scaling of timm's ViTs: another network of the same design with other depth and width, its weights drawn anew."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ..errors import DownresError
from .adapter import said

WIDTH_TOLERANCE = 0.005 + 1e-9
"""A width with two decimals stands for the nearest whole number of heads: 0.67 of 6 heads are 4."""
OTHERWISE = "scale the resolution instead, or make the smaller network yourself."


def scale_vit(vit: Any, depth: int | None, width: float, name: str = "") -> nn.Module:
    """A ViT or EVA of timm's like `vit`, with `depth` blocks (None: as many) and `width` times the channels.

    Heads keep their size, so their number scales with the embedding and the MLP, as from ViT-Ti to ViT-S and ViT-B (Touvron
    et al. 2021, DeiT). Image, patches, classes, prefix tokens, layer scale, normalisation and pooling stay. Made by
    timm itself, on the device of `vit` and in its precision.

    name: of `vit` inside the user's model, '' for the model itself.
    Raises DownresError where the width gives no whole number of heads, where a model around `vit` takes its channels, and
    where timm's constructor cannot make this network.
    """
    given = _constructor_arguments(vit)
    heads, channels = given["num_heads"], given["embed_dim"]
    scaled = max(1, round(width * heads))
    if abs(scaled / heads - width) > WIDTH_TOLERANCE:
        raise DownresError(
            f"A width of {width:g} makes {width * heads:.3g} attention heads of {heads}, and heads keep their size: "
            f"give {scaled / heads:.4g} ({scaled} head{'s' * (scaled > 1)})."
        )
    if name and scaled != heads and not vit.num_classes:
        raise DownresError(
            f"At this width {name} would hand on {channels // heads * scaled} channels to a model around it that takes "
            f"{channels}: scale the depth instead, or make the narrower model yourself."
        )
    build, like = _builder(vit, given), next(vit.parameters())
    smaller: dict[str, Any] = {"depth": depth or given["depth"], "num_heads": scaled, "embed_dim": channels // heads * scaled}
    if like.is_meta:
        smaller |= _undrawn(vit)
    try:
        with torch.device(like.device):
            found = build(**{**given, **smaller}).to(like.dtype).train(vit.training)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # what timm's constructors object with
        raise DownresError(f"timm cannot make this {type(vit).__name__} smaller ({said(error)}): {OTHERWISE}") from error
    if not _is_scaled(found.blocks[0], vit.blocks[0], scaled / heads):
        raise DownresError(f"timm makes not every layer of this {type(vit).__name__} ×{width:g} as wide: {OTHERWISE}")
    for key in ("pretrained_cfg", "default_cfg"):
        if hasattr(vit, key):
            setattr(found, key, getattr(vit, key))
    if any(getattr(m, "fused_attn", True) is False for m in vit.blocks.modules()):
        for module in found.blocks.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    return found


def _constructor_arguments(vit: Any) -> dict[str, Any]:
    """What the network was built with, read off what was built; what users seldom change is left to the architecture."""
    embedding, plain = vit.patch_embed, isinstance(vit, VisionTransformer)
    block, kinds = vit.blocks[0], [type(m) for m in vit.blocks[0].modules()]
    given = {
        "img_size": embedding.img_size,
        "patch_size": None if hasattr(embedding, "backbone") else embedding.patch_size,
        "in_chans": next(m for m in embedding.modules() if isinstance(m, nn.Conv2d)).in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": next(m.num_heads for m in block.modules() if hasattr(m, "num_heads")),
        "class_token": vit.cls_token is not None,
        "reg_tokens" if plain else "num_reg_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
        "no_embed_class": vit.no_embed_class,
        "fc_norm" if plain else "use_fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "dynamic_img_size": vit.dynamic_img_size,
        "drop_rate": vit.head_drop.p,
        "pos_drop_rate": vit.pos_drop.p,
        "drop_path_rate": max(getattr(m, "drop_prob", 0.0) or 0.0 for m in vit.blocks.modules()),
    }
    if plain and kinds[0] is Block:
        given["qkv_bias"] = block.attn.qkv.bias is not None
        given["qk_norm"] = not isinstance(block.attn.q_norm, nn.Identity)
        if not isinstance(block.ls1, nn.Identity):
            given["init_values"] = getattr(block.ls1, "init_values", 1e-5)
        if Mlp in kinds:
            given["mlp_ratio"] = (block.mlp.fc1.out_features + 0.5) / vit.embed_dim  # timm rounds the product down
    return {key: value for key, value in given.items() if value is not None}


def _undrawn(vit: nn.Module) -> dict[str, Any]:
    """The argument that leaves out the drawing of weights, most of the time that it takes; EVA has none."""
    return {"weight_init": "skip"} if isinstance(vit, VisionTransformer) else {}


def _builder(vit: nn.Module, given: dict[str, Any]) -> Callable[..., Any]:
    """What builds this very network from these arguments: timm's function for the architecture, else the class."""
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    builders: list[Callable[..., Any]] = [type(vit)]
    if name and timm.is_model(name):
        builders.insert(0, functools.partial(timm.create_model, name))
    for build in builders:
        with contextlib.suppress(Exception), torch.device("meta"):  # whatever a constructor objects to
            if list(_design(build(**given, **_undrawn(vit)))) == list(_design(vit)):
                return build
    raise DownresError(f"This {type(vit).__name__} has parts that timm's constructor does not know of: {OTHERWISE}")


def _design(network: nn.Module) -> Iterator[tuple]:
    """All of a network but its weights: kinds, settings and shapes, module by module."""
    passing = ("training", "fused_attn", "grad_checkpointing", "weight_init_mode")
    for name, module in network.named_modules():
        settings = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not key.startswith("_") and key not in passing
        }
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield name, type(module), settings, {key: tensor.shape for key, tensor in own}


def _is_scaled(new: nn.Module, old: nn.Module, factor: float) -> bool:
    """Whether every linear layer of a block is the old one with its channels scaled, up to rounding."""
    pairs = zip(new.modules(), old.modules(), strict=True)
    linear = [(a, b) for a, b in pairs if isinstance(a, nn.Linear) and isinstance(b, nn.Linear)]
    # A gated MLP rounds its two halves.
    return all(
        abs(a.in_features - factor * b.in_features) < 2 and abs(a.out_features - factor * b.out_features) < 2 for a, b in linear
    )
