"""Networks of the paper (Morlier et al. 2025, arXiv 2504.03749) with random weights, to be trained from scratch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from ..models.regseg import regseg

DEPTHS = (3, 4, 6, 3)
"""Blocks of ResNet-50's stages."""


class ResNet50(ResNet):
    """torchvision's ResNet-50 with other numbers of channels: x (B, 3, H, W) → (B, classes).

    channels: of the stem and, inside the blocks, of the four stages. stem_side: height and width to which the activations
    behind the first convolution are brought, whatever the input, by nearest pixels, as the authors' code does; None: they stay.
    """

    def __init__(self, classes: int, channels: Sequence[int] = (64, 64, 128, 256, 512), stem_side: int | None = None) -> None:
        super().__init__(Bottleneck, list(DEPTHS), classes)
        self.stem_side = stem_side
        if tuple(channels) == (64, 64, 128, 256, 512):
            return
        stem, *stages = channels
        self.inplanes = stem
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        for i, (width, depth) in enumerate(zip(stages, DEPTHS, strict=True)):
            setattr(self, f"layer{i + 1}", self._make_layer(Bottleneck, width, depth, stride=1 if i == 0 else 2))
        self.fc = nn.Linear(stages[-1] * Bottleneck.expansion, classes)
        for module in self.modules():  # as torchvision does
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.stem_side is not None:
            x = F.interpolate(x, (self.stem_side, self.stem_side))
        x = self.maxpool(self.relu(self.bn1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        found: Tensor = self.fc(self.avgpool(x).flatten(1))
        return found


def vit(classes: int, side: int, patch: int = 16, width: int = 384, depth: int = 12, heads: int = 6) -> VisionTransformer:
    """ViT (Dosovitskiy 2021) for images of side × side: width 384 and 6 heads are ViT-S, 768 and 12 ViT-B."""
    return VisionTransformer(side, patch, num_classes=classes, embed_dim=width, depth=depth, num_heads=heads)


INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")


def at_grid(network: VisionTransformer, side: int, mode: str, **made: Any) -> VisionTransformer:
    """The same ViT for another side, its position embeddings (the class token's kept) brought to the new grid by torch's
    `interpolate` in that mode, without a filter and with corners aligned, as torchvision does. made: what `vit` was given
    beside classes and side.
    """
    other = vit(network.num_classes, side, **made)
    old, (height, width) = network.pos_embed, other.patch_embed.grid_size
    assert old is not None
    prefix, grid = old[:, : network.num_prefix_tokens], old[:, network.num_prefix_tokens :]
    rows, columns = network.patch_embed.grid_size
    grid = grid.reshape(1, rows, columns, -1).permute(0, 3, 1, 2).float()
    options = {"align_corners": True} if mode in ("bilinear", "bicubic") else {}
    grid = F.interpolate(grid, (height, width), mode=mode, **options) if (rows, columns) != (height, width) else grid
    tensors = {**network.state_dict(), "pos_embed": torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)}
    other.load_state_dict(tensors)
    return other.eval()


class Setr(nn.Module):
    """SETR with its naive head (Zheng 2021): a ViT's tokens as a map, two 1×1 convolutions: x (B, 3, s, s) → (B, classes, s/p,
    s/p) logits.
    """

    def __init__(self, classes: int, side: int, patch: int = 16, width: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.encoder = vit(0, side, patch, width, depth, heads)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens :]
        side = x.shape[-1] // self.encoder.patch_embed.patch_size[0]
        found: Tensor = self.head(tokens.transpose(1, 2).unflatten(2, (x.shape[-2] * side // x.shape[-1], side)))
        return found


def lraspp(classes: int) -> nn.Module:
    """LR-ASPP on MobileNetV3-Large (Howard 2019), torchvision's."""
    made: nn.Module = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
    return made


def scratch(kind: str, classes: int, seed: int, **options: Any) -> nn.Module:
    """One of them by its name, with weights of that seed, in eval mode."""
    makers: dict[str, Callable[..., nn.Module]] = {
        "resnet50": ResNet50,
        "vit": vit,
        "regseg": _regseg,
        "setr": Setr,
        "lraspp": lraspp,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = makers[kind](classes, **options)
    return made.eval()


def _regseg(classes: int, name: str = "exp48_decoder26", width: float = 1.0) -> nn.Module:
    return regseg(name, classes, width=width)
