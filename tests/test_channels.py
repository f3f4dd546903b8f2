"""Networks of one, four and more channels: costs, curve, evaluate, search, check and predict, from files to numbers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import downres
from downres import Budget, Preprocessing
from downres.artifacts import check, predict
from downres.errors import DownresError

RNG = np.random.default_rng(0)
BRIGHT, DARK = 0.7, 0.3


class Brightness(nn.Module):
    """(B, C, h, w) → (B, 2): whether the mean of the last channel, as it comes in, is above zero."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        with torch.no_grad():
            self.stem.weight.zero_()[0, -1, 1, 1] = 1.0

    def forward(self, x):
        mean = self.stem(x).mean(dim=(2, 3))
        return torch.cat([mean, -mean], 1)


def values(level, channels, size=(24, 24)):
    """Numbers around a level of 0…1, (H, W, C), the last channel alone; the others are around the opposite."""
    picture = np.full((*size, channels), 1 - level) if channels > 1 else np.full((*size, 1), level)
    picture[:, :, -1] = level
    return np.clip(picture + RNG.normal(0, 0.02, picture.shape), 0, 1)


def npy(path, picture):
    np.save(path.with_suffix(".npy"), np.moveaxis(np.round(65535 * picture).astype(np.uint16), 2, 0))


def floats(path, picture):
    np.save(path.with_suffix(".npy"), picture.astype(np.float32))


def png(path, picture):
    pixels = np.round(255 * picture).astype(np.uint8)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path.with_suffix(".png"))


def tiff(path, picture):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.round(65535 * picture).astype(np.uint16)
    tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")


def folder(root, channels, save, n=12):
    for name, level in (("bright", BRIGHT), ("dark", DARK)):
        (root / name).mkdir(parents=True)
        for i in range(n):
            save(root / name / str(i), values(level, channels))
    return root


def half(channels):
    return Preprocessing(16, mean=(0.5,) * channels, std=(0.25,) * channels)


@pytest.mark.parametrize(("channels", "save"), [(1, png), (1, npy), (4, png), (5, npy), (5, floats), (13, tiff), (2, npy)])
def test_every_number_of_channels_is_evaluated(tmp_path, channels, save):
    data = folder(tmp_path, channels, save)
    found = downres.evaluate(Brightness(channels), str(data), preprocessing=half(channels))
    assert (found.top1, found.n) == (100.0, 24)
    other = Brightness(channels)
    other.stem.weight.data.neg_()
    assert downres.evaluate(other, str(data), preprocessing=half(channels)).top1 == 0.0


def test_from_costs_to_predictions(tmp_path):
    """Five channels of 16 bits: as arrays (5, H, W)."""
    data = folder(tmp_path / "data", 5, npy)
    assert downres.measure_cost(Brightness(5), (5, 32, 32)).macs == 32 * 32 * 5 * 9
    assert downres.costs(Brightness(5), resolutions=[112]).rows[-1].cost.macs == 112 * 112 * 5 * 9
    curve = downres.curve(Brightness(5), str(data), resolutions=[8], preprocessing=half(5), snap=False)
    assert [r.quality.top1 for r in (curve.original, *curve.results)] == [100.0, 100.0]
    run = downres.search(
        Brightness(5), str(data), resolutions=[8], stem_scales=(), snap=False, preprocessing=half(5), budget=Budget(40.0),
        rungs=(), out=tmp_path / "run",
    )  # fmt: skip
    assert run.best is not None
    findings = check(run.artifact, model=Brightness(5))
    assert {f.what: f.ok for f in findings} == dict.fromkeys([f.what for f in findings], True)
    files = [data / "dark/0.npy", data / "bright/0.npy"]
    assert [p.classes[0] for p in predict(run.artifact, files)] == ["dark", "bright"]
    assert (run.folder / "report.html").exists()
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DownresError, match="a.png: 3 channels, the network takes 5"):
        predict(run.artifact, [tmp_path / "a.png"])


def test_mean_and_std_of_channels_that_are_no_colours_are_asked_for(tmp_path):
    data = folder(tmp_path, 5, npy, n=2)
    for call in (downres.evaluate, downres.curve, downres.search):
        with pytest.raises(DownresError, match="takes 5 channels, .* not known: give `mean` and `std` with 5 values each"):
            call(Brightness(5), str(data))
    model = downres.Model(Brightness(5), downres.searching.design.as_model(Brightness(5)).preprocessing)
    with pytest.raises(DownresError, match="The network takes 5 channels, mean has 3: give `mean` and `std` with one value"):
        downres.with_preprocessing(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    given = downres.with_preprocessing(model, mean=(0.5,) * 5, std=(0.25,) * 5, resolution=16)
    assert downres.evaluate(given, str(data)).top1 == 100.0


def test_files_of_other_channels_are_left_out_and_said(tmp_path):
    data = folder(tmp_path, 4, png, n=4)
    Image.new("RGB", (24, 24)).save(data / "dark/colours.png")
    dataset = downres.open_folder(data, outputs=2, channels=4)
    assert [(s.path, s.reason) for s in dataset.skipped] == [("dark/colours.png", "3 channels, the network takes 4")]
    assert "1 unreadable files left out" in dataset.description
