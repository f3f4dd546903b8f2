"""What the paper trains and how it looks at that, as data.

From the abstract, the figures' captions and the authors' code (JeremyMorlier/Resolution_Transformer_CNN): neither tables nor
text of the paper give its numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import DownresError
from ..parse import FP32, INT8
from ..records import Preprocessing, Record
from ..recovery.training import Training

FULL = 1024
"""Height of Cityscapes' pictures, which sizes of street scenes are relative to."""
UNCLIPPED = 1e9


@dataclass(frozen=True)
class Look(Record):
    """One way to look at a network: its input's short side, as many pixels of a picture's short side before the centre is
    cropped (None: the whole picture, stretched), the numbers that it computes in, and where the network is asked in more ways
    than one, how: the interpolation of position embeddings, or of the logits; `DYNAMIC`.
    """

    side: int
    resize: int | None = None
    precision: str = FP32
    mode: str = ""

    def __str__(self) -> str:
        size = f"{self.side}" if self.resize is None else f"{self.side} of {self.resize}"
        return " ".join(part for part in (f"{size} px", self.mode, self.precision if self.precision != FP32 else "") if part)


@dataclass(frozen=True)
class Entry(Record):
    """A network that is trained.

    network: its kind in families/scratch.py, made with the options of `made`. family: the line that it is on in a figure, by
    what it is scaled. trained: side of what training shows; look: how it is looked at first.
    """

    name: str
    family: str
    network: str
    trained: int
    look: Look
    made: dict[str, Any] = field(default_factory=dict)

    def scale(self, scale: float) -> float:
        """Of its sizes in pixels: where it has patches as a whole patch allows, so that sequences stay as long as they are."""
        patch = self.made.get("patch")
        return scaled(patch, scale) / patch if patch else scale

    def options(self, scale: float) -> dict[str, Any]:
        """Of the network's maker, sizes in pixels scaled."""
        scale = self.scale(scale)
        return {
            name: scaled(value, scale) if name in ("side", "patch", "stem_side") else value for name, value in self.made.items()
        }


@dataclass(frozen=True)
class Experiment:
    """One of the paper's. task: of its data. looks: at an entry beside its own. known: what is known of the result.

    images, classes, aspect (width by height): of the data that the paper uses; whole: they are looked at whole, sizes being of
    the short side; square: stretched to a square. of: the experiment whose networks are looked at; sides: at which an entry's
    cost is counted beside its own.
    """

    name: str
    title: str
    data: str
    task: str
    figure: str
    known: str
    entries: tuple[Entry, ...]
    training: Training
    looks: Callable[[Entry], Iterator[Look]]
    images: int
    classes: int
    aspect: float = 1.0
    whole: bool = False
    square: bool = False
    of: str = ""
    sides: tuple[int, ...] = ()


def scaled(pixels: int, scale: float) -> int:
    return max(1, round(pixels * scale))


# ResNet-50 on ImageNet

WIDTHS = {
    "16-32-32-512": (64, 16, 32, 32, 512),
    "16-64-128-256": (64, 16, 64, 128, 256),
    "32-64-256-256": (64, 32, 64, 256, 256),
    "64-128-256-512": (64, 64, 128, 256, 512),
    "128-256-512-1024": (128, 128, 256, 512, 1024),
}
"""Channels of the four stages → with those of the stem before them."""
SIZES = ((176, 232, 224), (128, 168, 160), (112, 152, 144))
"""Side trained at; short side and centre crop that are looked at."""
OTHER_SIZES = ((128, 167, 162), (128, 232, 224))
"""Of the full width alone."""
STEMS = (56, 64, 76, 80, 88)
SWEPT = (16, 32, 64, 128, 256, 512)
"""Channels of every stage in the sweep of 6⁴ = 1296 networks."""
GRID = tuple(range(112, 353, 16))
"""16 crops and 16 resizes."""
MODEL, WITH_RESOLUTION, RESOLUTION, OTHER = "model scaling", "and resolution", "resolution scaling", "other sizes"
STEM, PATCH = "resampled stem", "larger patches"


def _resnets() -> Iterator[Entry]:
    def entry(width: str, sizes: tuple[int, int, int], stem: int | None = None) -> Entry:
        trained, resize, side = sizes
        made: dict[str, Any] = {"channels": list(WIDTHS[width])}
        name = f"{width} {trained}-{resize}-{side}"
        family = MODEL if sizes == SIZES[0] else f"{WITH_RESOLUTION} {trained}-{resize}-{side}" if sizes in SIZES else OTHER
        if stem is not None:
            made["stem_side"], name, family = stem, f"{name} stem {stem}", STEM
        return Entry(name, family, "resnet50", trained, Look(side, resize), made)

    for sizes, width in itertools.product(SIZES, WIDTHS):
        yield entry(width, sizes)
    for sizes in OTHER_SIZES:
        yield entry("64-128-256-512", sizes)
    for stem in STEMS:
        yield entry("64-128-256-512", SIZES[0], stem)


def _grid(entry: Entry) -> Iterator[Look]:
    """A crop larger than what it is taken from would show a black border: those are left out."""
    for side, resize in itertools.product(GRID, GRID):
        if side <= resize:
            yield Look(side, resize)


RESNET = Experiment(
    "resnet50",
    "ResNet-50 with fewer channels and fewer pixels",
    "ImageNet",
    "classification",
    "Figure 1: top-1 against MACs and memory at batch 8, model scaling alone (dotted) and with resolution.",
    "The paper's numbers are in its figure alone. Beside it: FixRes trains at 128 px → 77.1 %, at 224 px → 79.8 %; "
    "torchvision's ResNet-50 with this kind of recipe, 600 epochs, 80.86 % at 176-232-224.",
    tuple(_resnets()),
    Training(
        epochs=120, training_batch=256, learning_rate=0.1, weight_decay=2e-5, warmup=5 / 120, clip=UNCLIPPED, optimizer="sgd",
        ema=0.9999, batchnorm=True, crop_scale=0.08, augment="trivialaugment", moves=True, erasing=0.1, label_smoothing=0.1,
        mixup=0.2, cutmix=1.0,
    ),
    _grid,
    images=1_281_167,
    classes=1000,
)  # fmt: skip


def _swept() -> Iterator[Entry]:
    for channels in itertools.product(SWEPT, repeat=4):
        name = "-".join(map(str, channels))
        yield Entry(name, MODEL, "resnet50", 232, Look(232), {"channels": [64, *channels]})


RESOLUTIONS = tuple(range(100, 400))


def _resolutions() -> Iterator[Entry]:
    for side in RESOLUTIONS:
        yield Entry(
            f"64-128-256-512 at {side}", RESOLUTION, "resnet50", side, Look(side), {"channels": [64, 64, 128, 256, 512]}
        )


SWEEP = Experiment(
    "channels",
    "What 1296 choices of ResNet-50's channels cost at 232 px, beside the full width at 100 to 399 px",
    "none: costs alone",
    "classification",
    "Memory at batch 8 against MACs: every choice of channels, and the line of resolutions.",
    "Costs are exact; nothing is trained.",
    (*_swept(), *_resolutions()),
    RESNET.training,
    lambda entry: iter(()),
    images=0,
    classes=1000,
)
# ViT on ImageNet

VITS = {"ViT-S": {"width": 384, "depth": 12, "heads": 6}, "ViT-B": {"width": 768, "depth": 12, "heads": 12}}


def _vits() -> Iterator[Entry]:
    def entry(vit: str, side: int, patch: int, family: str) -> Entry:
        made = {"side": side, "patch": patch, **VITS[vit]}
        look = Look(side, side * 232 // 224)
        return Entry(f"{vit} {side} patch {patch}", f"{vit}, {family}", "vit", side, look, made)

    for vit in VITS:
        for side in (224, 192, 176, 160, 128, 112):
            yield entry(vit, side, 16, "shorter sequences")
        yield entry(vit, 192, 24, PATCH)
    for tokens in (64, 121, 144, 169, 196, 225):
        side = 16 * math.isqrt(tokens)
        if side not in (224, 192, 176, 160, 128, 112):
            yield entry("ViT-S", side, 16, "shorter sequences")


def _multiples(entry: Entry) -> Iterator[Look]:
    from ..families.scratch import INTERPOLATIONS  # timm, which who lists experiments need not wait for

    patch, side = entry.made["patch"], entry.made["side"]
    for n in range(4, 40):
        for mode in INTERPOLATIONS if n * patch != side else ("",):
            yield Look(n * patch, n * patch * 232 // 224, FP32, mode)


VIT = Experiment(
    "vit",
    "ViT-S and ViT-B with shorter sequences",
    "ImageNet",
    "classification",
    "Figure 3: an input of R × R pixels in patches of P × P, N = R / P of them a side; top-1 against MACs and memory.",
    "The paper's numbers are in its figures alone. Beside it, 300 epochs at 224 px: DeiT-S 79.8 %, DeiT-B 81.8 %.",
    tuple(_vits()),
    Training(
        epochs=300, training_batch=510, learning_rate=3e-3, weight_decay=0.3, warmup=0.1, clip=1.0, optimizer="adamw",
        ema=0.9999, crop_scale=0.08, augment="randaugment", moves=True, repeats=3, label_smoothing=0.11, mixup=0.2, cutmix=1.0,
    ),
    _multiples,
    images=1_281_167,
    classes=1000,
)  # fmt: skip


def _figure5() -> Iterator[Entry]:
    def entry(name: str, family: str, side: int, **other: int) -> Entry:
        return Entry(name, family, "vit", side, Look(side), {"side": side, "patch": 16, **VITS["ViT-S"], **other})

    for heads in range(1, 7):
        yield entry(f"{heads} heads of 64", "model scaling, width", 224, width=64 * heads, heads=heads)
    for depth in range(2, 13, 2):
        yield entry(f"{depth} blocks", "model scaling, depth", 224, depth=depth)
    for rows in range(4, 15):
        yield entry(f"{rows * rows} tokens", "sequence scaling", 16 * rows)


FIGURE5 = Experiment(
    "sequence",
    "What ViT-S costs when the model, and when the sequence is made smaller",
    "none: costs alone",
    "classification",
    "Figure 5: memory and MACs of ViT-S, model scaling against sequence scaling.",
    "Costs are exact; nothing is trained. recipes/figure5.md compares them at equal MACs.",
    tuple(_figure5()),
    VIT.training,
    lambda entry: iter(()),
    images=0,
    classes=1000,
)

# Street scenes

SCENES = tuple(range(128, 1537, 128))
"""Heights of the input; labels stay at their own."""
UPSAMPLINGS = ("bilinear", "bicubic")


def _scenes(entry: Entry) -> Iterator[Look]:
    for side, mode in itertools.product(SCENES, UPSAMPLINGS):
        yield Look(side, None, FP32, mode)


def _regsegs() -> Iterator[Entry]:
    for crop in (1024, 896, 512, 256):
        yield Entry(f"RegSeg {crop}", "RegSeg", "regseg", crop, Look(FULL, mode="bilinear"), {"name": "exp48_decoder26"})
    yield Entry("LR-ASPP 1024", "LR-ASPP", "lraspp", 1024, Look(FULL, mode="bilinear"))


REGSEG = Experiment(
    "regseg",
    "RegSeg on street scenes with smaller inputs",
    "Cityscapes",
    "segmentation",
    "Figure 4: input and prediction by resolution, logits upsampled to the labels' size.",
    "The paper's numbers are in its figure alone. RegSeg's own README: 78.3 % mIoU on Cityscapes' test part, 77.76, "
    "78.85 and 78.07 in three runs on its validation part: a claim of less than a point needs several seeds.",
    tuple(_regsegs()),
    Training(
        epochs=1000, training_batch=8, learning_rate=0.05, weight_decay=1e-4, warmup=9 / 1000, clip=UNCLIPPED, optimizer="sgd",
        schedule="poly", batchnorm=True, zoom_low=400 / 1024, zoom_high=1600 / 1024, uniform=0.5, augment="randaugment",
    ),
    _scenes,
    images=2975,
    classes=19,
    aspect=2.0,
    whole=True,
    sides=SCENES,
)  # fmt: skip

SETR = Experiment(
    "setr",
    "A ViT for street scenes (SETR, naive head), square inputs",
    "Cityscapes",
    "segmentation",
    "mIoU against MACs.",
    "Nothing is known of the authors' result.",
    tuple(
        Entry(f"SETR {side}", "SETR", "setr", side, Look(side, mode="bilinear"), {"side": side, "patch": 16, **VITS["ViT-S"]})
        for side in (512, 448, 384, 256, 224)
    ),
    REGSEG.training,
    lambda entry: iter(()),
    images=2975,
    classes=19,
    aspect=2.0,
    whole=True,
    square=True,
)

# 8 bits of what was trained

RESNET_INT8 = tuple(range(120, 345, 32))
REGSEG_INT8 = (128, 384, 640, 896, 1024, 1280)


def _int8_resnet(entry: Entry) -> Iterator[Look]:
    for side, precision in itertools.product(RESNET_INT8, (FP32, INT8)):
        yield Look(side, side * 232 // 224, precision)


def _int8_regseg(entry: Entry) -> Iterator[Look]:
    for side, precision in itertools.product(REGSEG_INT8, (FP32, INT8)):
        yield Look(side, None, precision, "bilinear")


_IN_8_BITS = (
    "The authors' script converts a copy and evaluates the network in float; here the very file of 8 bits is looked at."
)
RESNET_IN_INT8 = Experiment(
    "int8-resnet50",
    "The trained ResNets in 8 bits at every resolution",
    "ImageNet",
    "classification",
    "Top-1 in float and in 8 bits against the input's size.",
    _IN_8_BITS,
    tuple(e for e in RESNET.entries if "stem_side" not in e.made),
    RESNET.training,
    _int8_resnet,
    images=1_281_167,
    classes=1000,
    of="resnet50",
    sides=RESNET_INT8,
)
REGSEG_IN_INT8 = Experiment(
    "int8-regseg",
    "The trained RegSegs in 8 bits at every resolution",
    "Cityscapes",
    "segmentation",
    "mIoU in float and in 8 bits against the input's size.",
    _IN_8_BITS,
    tuple(e for e in REGSEG.entries if e.network == "regseg"),
    REGSEG.training,
    _int8_regseg,
    images=2975,
    classes=19,
    aspect=2.0,
    whole=True,
    of="regseg",
    sides=REGSEG_INT8,
)

DYNAMIC = "dynamic"
"""Of 8 bits: linear layers alone, the range of an activation taken from each image."""


def _int8_vit(entry: Entry) -> Iterator[Look]:
    yield dataclasses.replace(entry.look, precision=INT8, mode=DYNAMIC)


VIT_IN_INT8 = Experiment(
    "int8-vit",
    "The trained ViTs in 8 bits, linear layers alone, ranges from each image",
    "ImageNet",
    "classification",
    "Top-1 in float and in 8 bits against the length of the sequence.",
    "Nothing is known of the authors' result.",
    VIT.entries,
    VIT.training,
    _int8_vit,
    images=1_281_167,
    classes=1000,
    of="vit",
)

EXPERIMENTS = {e.name: e for e in (RESNET, SWEEP, VIT, FIGURE5, REGSEG, SETR, RESNET_IN_INT8, VIT_IN_INT8, REGSEG_IN_INT8)}


def experiment(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise DownresError(f"The paper has no experiment {name!r}: choose from {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]


def seen_as(look: Look, e: Experiment, scale: float, aspect: float) -> Preprocessing:
    """How pictures come to a network for a look, sizes in pixels scaled. aspect: width by height of whole pictures."""
    side = scaled(look.side, scale)
    if e.whole:
        return Preprocessing((side, side if e.square else max(1, round(side * aspect))), 1.0, fit="stretch")
    ratio = 1.0 if look.resize is None else side / max(side, scaled(look.resize, scale))
    return Preprocessing(side, ratio)
