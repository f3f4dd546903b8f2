"""Scenes whose classes are colours, and small networks with fixed weights that tell the colours apart.

Also a user's own file: `shapes.py:make`.
"""

import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

CLASSES = ("ground", "red", "green", "blue")
COLOURS = ((96, 96, 96), (200, 60, 60), (60, 190, 70), (60, 70, 210))
IGNORE = 255
HW = (48, 64)


def scene(seed: int, hw: tuple[int, int] = HW, noise: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles and discs on noisy ground: picture uint8 (H, W, 3), mask uint8 (H, W), whose last row is ignored."""
    rng = np.random.default_rng(seed)
    height, width = hw
    rows, columns = np.mgrid[:height, :width]
    mask = np.zeros(hw, np.uint8)
    for k in range(7):
        side, tall = rng.integers(4, 8, 2) if k < 2 else rng.integers(10, 26, 2)
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        if rng.random() < 0.5:
            inside = (abs(rows - top - tall / 2) < tall / 2) & (abs(columns - left - side / 2) < side / 2)
        else:
            inside = (rows - top) ** 2 + (columns - left) ** 2 < (side / 1.5) ** 2
        mask[inside] = rng.integers(1, len(CLASSES))
    image = np.array(COLOURS, float)[mask] + noise * rng.standard_normal((*hw, 3))
    mask[-1] = IGNORE
    return image.clip(0, 255).round().astype(np.uint8), mask


def write(root: Path, train: int = 12, val: int = 16, sizes: tuple[tuple[int, int], ...] = (HW,), **options) -> Path:
    """train/ and val/, each with images/ and masks/ (palette PNG), and classes.txt with the colours. One undivided set
    without `train`.
    """
    (root / "images" if not train else root).mkdir(parents=True, exist_ok=True)
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(CLASSES, COLOURS, strict=True)]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    for part, count, first in (("train", train, 0), ("val", val, 1000)):
        folder = root / part if train else root
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = scene(first + i, sizes[i % len(sizes)], **options)
            Image.fromarray(image).save(folder / "images" / f"{part}{i:02d}.png")
            save_mask(mask, folder / "masks" / f"{part}{i:02d}.png")
    return root


def save_mask(mask: np.ndarray, file: Path) -> None:
    picture = Image.fromarray(mask)
    # All 256 colours: of fewer PIL makes a PNG of fewer bits, in which there is no 255.
    picture.putpalette([value for colour in COLOURS for value in colour] + [0] * 3 * (256 - len(COLOURS)))
    picture.save(file)


def read(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs of a folder with images/ and masks/, by name, through PIL alone."""
    files = sorted((folder / "images").glob("*.png"))
    return [(np.asarray(Image.open(f)), np.asarray(Image.open(folder / "masks" / f.name))) for f in files]


class Colours(nn.Module):
    """Stride 4: sums of the colours and of what is rough, then the nearest of the classes' colours.

    texture: how much roughness speaks for the ground; there is less of it in a smaller picture, which shifts the second
    BatchNorm's statistics. answer: 'tensor' (of the input's size), 'dict' (with aligned corners) or 'logits' (a quarter).
    """

    def __init__(self, texture: float = 0.0, norm: bool = True, answer: str = "tensor") -> None:
        super().__init__()
        self.answer = answer
        layers = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)]
        self.body = nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)))
        self.classes = nn.Conv2d(4, len(CLASSES), 1)
        self.aux = nn.Conv2d(4, len(CLASSES), 1)
        first, second = [m for m in self.body if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            for weights in (first.weight, second.weight, self.classes.weight, *self.aux.parameters()):
                weights.zero_()
            for c in range(3):
                first.weight[c, c], first.weight[3 + c, c] = 1 / 9, -1 / 9
                second.weight[c, c], second.weight[c, 3 + c] = 1 / 9, -1 / 9
            rough = torch.full((3, 3), -1 / 9)
            rough[1, 1] += 1
            first.weight[6], first.weight[7] = rough, -rough
            second.weight[3, 6:] = 1 / 9
            colours = (torch.tensor(COLOURS) / 255 - 0.5) / 0.25
            self.classes.weight[:, :3, 0, 0] = 2 * colours
            self.classes.bias.copy_(-(colours**2).sum(1))
            self.classes.weight[0, 3] = texture
            if norm:
                self.body[-1].running_mean[3], self.body[-1].running_var[3] = 0.41, 0.12**2  # as they are at 48×64

    def forward(self, x):
        features = self.body(x)
        logits = self.classes(features)
        if self.answer == "logits":
            return types.SimpleNamespace(logits=logits)
        if self.answer == "dict":
            full = {"mode": "bilinear", "size": x.shape[-2:], "align_corners": True}
            return {"out": F.interpolate(logits, **full), "aux": F.interpolate(self.aux(features), **full)}
        return F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)


def make():
    return Colours()


def quarter():
    return Colours(answer="logits")


def dictionary():
    return Colours(answer="dict")


def rough():
    return Colours(texture=1.5)


def without_norm():
    return Colours(norm=False)


def idle_norm():
    """Its only BatchNorm is where nothing comes of it."""
    model = Colours(norm=False, answer="dict")
    model.aux = nn.Sequential(nn.BatchNorm2d(4), model.aux)
    return model


def nan():
    model = Colours()
    model.classes.weight.data[:] = float("nan")
    return model


def five_classes():
    model = Colours()
    model.classes = model.aux = nn.Conv2d(4, 5, 1)
    return model


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, len(CLASSES))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def classifier():
    return Classifier()


def predicted(network, image, hw, size=None, mode="bilinear", align=False) -> np.ndarray:
    """The class map of one picture at its own size, by PIL and torch alone. size: that the logits are brought to first."""
    small = np.asarray(Image.fromarray(image).resize((hw[1], hw[0]), Image.Resampling.BILINEAR))
    x = (torch.from_numpy(small.astype(np.float32)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.no_grad():
        logits = network(x)
    logits = logits["out"] if isinstance(logits, dict) else getattr(logits, "logits", logits)
    for target in (size or image.shape[:2], image.shape[:2]):
        if logits.shape[-2:] != target:
            logits = F.interpolate(logits, target, mode=mode, align_corners=align)
    return logits[0].argmax(0).numpy()


def confusion(maps, masks, classes: int = len(CLASSES)) -> np.ndarray:
    """Rows the truth, columns the prediction."""
    found = np.zeros((classes, classes), np.int64)
    for there, mask in zip(maps, masks, strict=True):
        known = mask != IGNORE
        np.add.at(found, (mask[known], there[known]), 1)
    return found


def miou(counts: np.ndarray) -> float:
    """Percent, over the classes that are there."""
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float(100 * np.mean([counts[k, k] / union[k] for k in range(len(counts)) if union[k]]))
