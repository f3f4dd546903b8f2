"""Photographs with known content, and small networks that know it: for tasks with labels beside them, or none."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from downres import Model, Preprocessing

MEAN = STD = (0.5, 0.5, 0.5)


class Colours(nn.Module):
    """The mean of each channel over the picture, then a linear layer: red, green and blue are read off exactly."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(3, outputs)
        with torch.no_grad():
            self.stem.weight.zero_()
            for channel in range(3):
                self.stem.weight[channel, channel, 1, 1] = 1.0
            self.head.weight.zero_()
            self.head.bias.zero_()
            for i in range(min(3, outputs)):
                self.head.weight[i, i] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(self.stem(x))).flatten(1))


def model_of(module: nn.Module, side: int = 32, outputs: int | None = None) -> Model:
    return Model(module.eval(), Preprocessing(side, 1.0, "bilinear", MEAN, STD), "", "", outputs)


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """(folder of 80 pictures of one colour with some noise, the colour of each, float (80, 3) in 0 to 1)."""
    folder = tmp_path_factory.mktemp("painted")
    rng = np.random.default_rng(0)
    colours = rng.uniform(0.1, 0.9, (80, 3))
    for i, colour in enumerate(colours):
        noisy = 255 * colour + rng.normal(0, 12, (40, 48, 3))
        Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder, colours


def write_csv(path: Path, heading: list[str], rows: list[list]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([heading, *rows])
    return path
