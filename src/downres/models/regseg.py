"""RegSeg, the network of the paper's segmentation experiments (Gao 2021, "Rethink Dilated Convolution for Real-time
Semantic Segmentation", arXiv 2111.09957).

Names in the state dict are those of the published checkpoints, which load strictly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DownresError


@dataclass(frozen=True)
class Design:
    """What a RegSeg is made of (Gao 2021, tables 1 and 2, fig. 5).

    stem: channels at half resolution. channels: at 1/4, at 1/8, at 1/16, and of the last block. blocks: how many at 1/4 and
    at 1/8. dilations: of the blocks at 1/16 after the one that halves the map, the last being the one with its own channels;
    two dilations split a block's grouped convolution in two halves. heads: decoder channels that 1/4 and 1/8 (as 1/16) are
    projected to. mixed: decoder channels after the 3×3 convolutions.
    """

    stem: int
    channels: tuple[int, int, int, int]
    group_width: int
    blocks: tuple[int, int]
    dilations: tuple[tuple[int, ...], ...]
    heads: tuple[int, int]
    mixed: int

    def scaled(self, width: float = 1.0, depth: float = 1.0, group_width: int | None = None) -> "Design":
        """Another width (factor on all channels) and depth (factor on the blocks of each kind, at least one of each).

        Channels are rounded to whole groups. group_width: None scales it with the width, to a power of two from 4 to the
        original's, so that the number of groups stays about the same.
        Raises DownresError for factors that are not above 0.
        """
        if not (0.0 < width <= 4.0 and 0.0 < depth <= 4.0):
            raise DownresError(f"Width and depth are factors above 0 and at most 4, {width} and {depth} are not: give 0.5.")
        if group_width is None:
            group_width = self.group_width
            while group_width % 2 == 0 and group_width > 4 and group_width > self.group_width * width:
                group_width //= 2
        if group_width < 1:
            raise DownresError(f"A group has at least one channel, {group_width} is too few: give 16.")

        def grouped(count: int, groups: int = 1) -> int:
            unit = group_width * groups
            return max(unit, round(count * width / unit) * unit)

        c4, c8, c16, last = self.channels
        kinds = list(dict.fromkeys(self.dilations))
        return replace(
            self,
            stem=max(1, round(self.stem * width)),
            channels=(grouped(c4), grouped(c8), grouped(c16, 2), grouped(last, 2)),
            group_width=group_width,
            blocks=(max(1, round(self.blocks[0] * depth)), max(1, round(self.blocks[1] * depth))),
            dilations=tuple(d for d in kinds for _ in range(max(1, round(self.dilations.count(d) * depth)))),
            heads=(max(1, round(self.heads[0] * width)), max(1, round(self.heads[1] * width))),
            mixed=max(1, round(self.mixed * width)),
        )


_FIELD_OF_VIEW = ((1,), (1, 2), *((1, 4),) * 4, *((1, 14),) * 7)

DESIGNS = {
    "exp48_decoder26": Design(32, (48, 128, 256, 320), 16, (1, 3), _FIELD_OF_VIEW, (8, 128), 64),
    "exp53_decoder29": Design(32, (48, 120, 336, 384), 24, (2, 6), _FIELD_OF_VIEW, (16, 256), 128),
}
"""The paper's network and its larger version, by the names of their checkpoints."""


def regseg(
    name: str = "exp48_decoder26",
    num_classes: int = 19,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    group_width: int | None = None,
) -> "RegSeg":
    """A RegSeg with random weights: `exp48_decoder26` or `exp53_decoder29`, at another width and depth if asked for.

    Raises DownresError for an unknown name, no classes, or a scale that is none.
    """
    if name not in DESIGNS:
        raise DownresError(f"There is no RegSeg {name!r}: choose {' or '.join(DESIGNS)}.")
    if num_classes < 1:
        raise DownresError(f"A network has at least one class, {num_classes} is too few: give 19.")
    design = DESIGNS[name]
    if (width, depth, group_width) != (1.0, 1.0, None):
        design = design.scaled(width, depth, group_width)
    return RegSeg(num_classes, design)


class RegSeg(nn.Module):
    """(B, 3, H, W) → logits (B, num_classes, H, W), upsampled bilinearly from 1/4."""

    def __init__(self, num_classes: int = 19, design: Design = DESIGNS["exp48_decoder26"]) -> None:
        super().__init__()
        self.design, self.num_classes = design, num_classes
        self.stem = ConvNormAct(3, design.stem, 3, stride=2)
        self.body = Body(design)
        self.decoder = Decoder(design, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.decoder(*self.body(self.stem(x)))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class ConvNormAct(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class SqueezeExcitation(nn.Module):
    """Channels weighed by what the whole map holds (Hu 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, squeezed, 1)
        self.conv2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.conv2(F.relu(self.conv1(pooled))))


class SplitConv(nn.Module):
    """Grouped 3×3 convolution whose channels are split in parts of equal size, each with a dilation of its own."""

    def __init__(self, channels: int, group_width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        part = channels // len(dilations)
        self.convs = nn.ModuleList(
            nn.Conv2d(part, part, 3, padding=d, dilation=d, groups=part // group_width, bias=False) for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.convs), dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], dim=1)


class Shortcut(nn.Module):
    """What a block adds to its result where its shape changes: average pooling if the map is halved, then 1×1."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.stride == 1 else F.avg_pool2d(x, 2, 2, ceil_mode=True)
        return self.bn(self.conv(x))


class DBlock(nn.Module):
    """The paper's dilated block (fig. 3): RegNet's Y block whose grouped convolution has one or more dilations."""

    def __init__(self, inputs: int, outputs: int, group_width: int, dilations: Sequence[int] = (1,), stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        if len(dilations) == 1:
            (d,) = dilations
            groups = outputs // group_width
            self.conv2: nn.Module = nn.Conv2d(outputs, outputs, 3, stride, d, d, groups, bias=False)
        else:
            self.conv2 = SplitConv(outputs, group_width, dilations)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.se = SqueezeExcitation(outputs, max(1, inputs // 4))
        self.conv3 = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut(inputs, outputs, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(self.se(x)))
        return F.relu(x + kept, inplace=True)


class Body(nn.Module):
    """The encoder; returns its maps at 1/4, 1/8 and 1/16 of the input."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        c4, c8, c16, last = design.channels
        width, (n4, n8) = design.group_width, design.blocks
        stage4 = [DBlock(design.stem, c4, width, stride=2), *(DBlock(c4, c4, width) for _ in range(n4 - 1))]
        # The published checkpoint of the smaller network names its only block here without a number.
        self.stage4 = nn.Sequential(*stage4) if n4 > 1 else stage4[0]
        self.stage8 = nn.Sequential(DBlock(c4, c8, width, stride=2), *(DBlock(c8, c8, width) for _ in range(n8 - 1)))
        *inner, final = design.dilations
        self.stage16 = nn.Sequential(
            DBlock(c8, c16, width, stride=2), *(DBlock(c16, c16, width, d) for d in inner), DBlock(c16, last, width, final)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x4 = self.stage4(x)
        x8 = self.stage8(x4)
        return x4, x8, self.stage16(x8)


class Decoder(nn.Module):
    """Adds 1/16 to 1/8 and concatenates that with 1/4 (fig. 5); returns logits at 1/4."""

    def __init__(self, design: Design, num_classes: int) -> None:
        super().__init__()
        c4, c8, _, c16 = design.channels
        fine, coarse = design.heads
        self.head16 = ConvNormAct(c16, coarse)
        self.head8 = ConvNormAct(c8, coarse)
        self.head4 = ConvNormAct(c4, fine)
        self.conv8 = ConvNormAct(coarse, design.mixed, 3)
        self.conv4 = ConvNormAct(design.mixed + fine, design.mixed, 3)
        self.classifier = nn.Conv2d(design.mixed, num_classes, 1)

    def forward(self, x4: Tensor, x8: Tensor, x16: Tensor) -> Tensor:
        x8 = self.conv8(self.head8(x8) + _grown(self.head16(x16), x8))
        x4 = self.conv4(torch.cat([_grown(x8, x4), self.head4(x4)], dim=1))
        return self.classifier(x4)


def _grown(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
