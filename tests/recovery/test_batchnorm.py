"""BatchNorm recalibration against means and variances computed by hand."""

import copy

import pytest
import timm
import torch
from torch import nn

from downres.errors import DownresError
from downres.recovery.batchnorm import has_batchnorm, recalibrate_batchnorm


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=0.3)
    )
    with torch.no_grad():  # statistics of other images
        for norm in (model[1], model[5]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            norm.weight.uniform_(0.5, 2.0)
    return model.eval()


def images(n, size=12, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def statistics(x):
    """(mean, unbiased variance) of each channel over all images and pixels."""
    rows = x.transpose(0, 1).flatten(1).double()
    return rows.mean(1), rows.var(1)


@torch.no_grad()
def test_one_batch_is_the_statistics_of_its_pixels():
    model, x = net(), images(8)
    out = recalibrate_batchnorm(model, [x])
    first = model[0](x)
    mean, var = statistics(first)
    torch.testing.assert_close(out[1].running_mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1].running_var.double(), var, rtol=1e-5, atol=1e-6)
    # The second layer sees what the first makes of its own recalibrated statistics; dropout, if it ran, would change it.
    shape = (1, 4, 1, 1)
    biased = first.transpose(0, 1).flatten(1).var(1, unbiased=False)
    normed = (first - mean.float().view(shape)) / (biased + model[1].eps).sqrt().view(shape)
    second = model[4]((normed * model[1].weight.view(shape) + model[1].bias.view(shape)).relu())
    mean, var = statistics(second)
    torch.testing.assert_close(out[5].running_mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(out[5].running_var.double(), var, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_equal_batches_are_averaged():
    model, x = net(), images(24)
    out = recalibrate_batchnorm(model, iter(x.split(8)))
    each = [statistics(model[0](batch)) for batch in x.split(8)]
    torch.testing.assert_close(out[1].running_mean.double(), statistics(model[0](x))[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1].running_mean.double(), sum(m for m, _ in each) / 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1].running_var.double(), sum(v for _, v in each) / 3, rtol=1e-5, atol=1e-6)
    assert out[1].num_batches_tracked == 3


@torch.no_grad()
def test_a_small_last_batch_counts_as_small():
    model, x = net(), images(17)
    x[16] += 10  # an image unlike the others, alone in its batch
    out = recalibrate_batchnorm(model, x.split(8))
    torch.testing.assert_close(out[1].running_mean.double(), statistics(model[0](x))[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_what_is_left_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    out = recalibrate_batchnorm(model.train(), [images(8)])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert [m.training for m in model.modules()] == [True] * 7 and [m.training for m in out.modules()] == [False] * 7
    assert (model[1].momentum, out[1].momentum, out[5].momentum) == (0.1, 0.1, 0.3)
    changed = {k for k, v in before.items() if not torch.equal(v, out.state_dict()[k])}
    assert changed == {f"{i}.{k}" for i in (1, 5) for k in ("running_mean", "running_var", "num_batches_tracked")}
    again = recalibrate_batchnorm(model, [images(8)])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in out.state_dict().items())  # no dropout, no chance


@torch.no_grad()
def test_real_network_is_normalised():
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0", num_classes=3, drop_rate=0.5, drop_path_rate=0.5)
    x = images(16, 64)
    out = recalibrate_batchnorm(model, [x])
    seen = {}
    out.bn1.register_forward_hook(lambda _m, inputs, _out: seen.update(x=inputs[0]))
    out(x)
    mean, var = statistics(seen["x"])
    torch.testing.assert_close(out.bn1.running_mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.bn1.running_var.double(), var, rtol=1e-4, atol=1e-6)


def test_a_single_image_on_a_single_pixel():
    """One value has no variance: torch refuses it, and a last batch of one image must not end the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).eval()
    x = images(9)
    out = recalibrate_batchnorm(model, x.split(8))
    with torch.no_grad():
        expected = model[1](model[0](x[:8])).mean((0, 2, 3))
    torch.testing.assert_close(out[2].running_mean, expected)
    with pytest.raises(DownresError, match="cannot be recalibrated .*: give batches of several images"):
        recalibrate_batchnorm(model, x[:1].split(1))
    with pytest.raises(ValueError, match="anything else"):  # other errors are not hidden
        recalibrate_batchnorm(nn.Sequential(nn.BatchNorm2d(3), Raises()), [x])


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("anything else")


def test_no_images():
    with pytest.raises(DownresError, match="no images were given"):
        recalibrate_batchnorm(net(), [])


def test_nothing_to_recalibrate():
    assert has_batchnorm(net()) and has_batchnorm(timm.create_model("resnet18"))
    assert not has_batchnorm(timm.create_model("convnext_atto"))
    assert not has_batchnorm(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True))
    )
    assert not has_batchnorm(nn.BatchNorm2d(4, track_running_stats=False))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    out = recalibrate_batchnorm(model, [])
    assert out is not model and all(torch.equal(v, out.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_network_that_does_not_stand_channels_last_is_recalibrated():
    class View(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), View())
    x = torch.randn(6, 3, 8, 8)
    done = recalibrate_batchnorm(net, [x])
    assert torch.allclose(done[1].running_mean, net[0](x).mean((0, 2, 3)), atol=1e-5)
