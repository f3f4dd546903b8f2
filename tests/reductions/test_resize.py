"""The resampling functions against PIL and against arithmetic."""

import numpy as np
import pytest
import torch
from PIL import Image

from downres.reductions.resize import input_size, resample, scaled_size

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(16, 16), (31, 57), (40, 12), (90, 130)])
def test_agrees_with_pil(interpolation, size):
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    ours = resample(x, size, interpolation)
    assert ours.shape == (2, 3, *size)
    for ours_plane, plane in zip(ours.flatten(0, 1), x.flatten(0, 1), strict=True):
        theirs = np.asarray(Image.fromarray(plane.numpy(), "F").resize(size[::-1], FILTERS[interpolation]))
        assert np.abs(ours_plane.numpy() - theirs).max() < 1e-3


def test_is_antialiased():
    """A checkerboard halved is grey; without antialiasing, every fourth pixel of it would do for the picture."""
    x = torch.zeros(1, 1, 64, 64)
    x[..., ::4, :] = 1.0
    small = resample(x, (16, 16))
    assert torch.allclose(small[..., 2:-2, :], torch.tensor(0.25), atol=0.08)
    assert small.mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_same_size_is_the_same_tensor():
    x = torch.rand(1, 3, 20, 30)
    assert resample(x, (20, 30)) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    x = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    small = resample(x, (13, 17))
    assert small.dtype == dtype
    # No worse than rounding the exact answer once.
    exact = resample(x.float(), (13, 17)).to(dtype)
    assert torch.allclose(small.float(), exact.float(), atol=1e-6)


def test_input_size():
    assert input_size((480, 640), 96) == (96, 128)
    assert input_size((640, 480), 96) == (128, 96)
    assert input_size((512, 1024), 128) == (128, 256)
    assert input_size((100, 100), (64, 32)) == (64, 32)
    assert input_size((3, 3000), 1) == (1, 1000)
    assert input_size((375, 500), 224) == (224, round(500 * 224 / 375))
    for short in range(1, 400, 7):  # the short side is met exactly, whatever floats do
        for long in (short, short + 1, 3 * short + 2):
            assert input_size((short, long), 97)[0] == 97 == input_size((long, short), 97)[1]


def test_scaled_size():
    assert scaled_size((56, 112), 0.5) == (28, 56)
    assert scaled_size((7, 7), 0.01) == (1, 1)
    assert scaled_size((10, 20), 0.75) == (8, 15)
