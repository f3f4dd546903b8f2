"""Networks with branches for training alone are counted, timed and exported without them."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from downres import costs, measure_cost, reduce
from downres.engines.fuse import fused
from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.engines.torch import TorchRuntime


class Branches(nn.Module):
    """Two convolutions and a skip connection, as in RepVGG, which `deploy` makes one of."""

    def __init__(self, right=True, needs=False):
        super().__init__()
        self.wide, self.point, self.right = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), right

    def forward(self, x):
        return self.wide(x) if not hasattr(self, "point") else self.wide(x) + self.point(x) + x

    def together(self):
        with torch.no_grad():
            kernel, bias = self.wide.weight.clone(), self.wide.bias + self.point.bias
            kernel[:, :, 1, 1] += self.point.weight[:, :, 0, 0] + (torch.eye(3) if self.right else 0)
        return kernel, bias


class InPlace(Branches):
    def switch_to_deploy(self):
        if hasattr(self, "point"):
            kernel, bias = self.together()
            self.wide.weight, self.wide.bias = nn.Parameter(kernel), nn.Parameter(bias)
            del self.point


class Reparameterized(InPlace):
    def reparameterize(self):
        self.switch_to_deploy()


class Replaced(Branches):
    def fuse(self):
        kernel, bias = self.together()
        made = nn.Conv2d(3, 3, 3, padding=1)
        made.weight, made.bias = nn.Parameter(kernel), nn.Parameter(bias)
        return made


class Fusion(Branches):
    """A method of that name for something else: it merges two maps."""

    def fuse(self, one, other):
        return one + other


class Layer(Branches):
    """An attribute of that name, which is a layer."""

    def __init__(self):
        super().__init__()
        self.fuse = nn.Conv2d(3, 3, 1)


def net(block) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(block, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()


ONE, TWO = 32 * 32 * 81 + 6, 32 * 32 * (81 + 9) + 6


@pytest.mark.parametrize("block", [InPlace, Reparameterized, Replaced])
def test_branches_are_put_together_in_a_copy(block, tmp_path) -> None:
    model = net(block())
    before, x = copy.deepcopy(model.state_dict()), torch.rand(2, 3, 32, 32)
    assert measure_cost(model, (3, 32, 32)).macs == ONE and measure_cost(model, (3, 32, 32), fuse=False).macs == TWO
    assert measure_cost(model, (3, 32, 32)).params == 81 + 3 + 8
    found = costs(model, resolutions=[32, 64])
    assert {r.cost.input_size[-1]: r.cost.macs for r in found.rows}.items() >= {32: ONE, 64: 4 * (ONE - 6) + 6}.items()
    assert "Sequential with its training branches put together" in found.notes[0]
    small = reduce(model, resolution=16, input_size=(3, 32, 32))
    expected = small(x).detach().numpy()
    file = export_onnx(small, (3, 32, 32), tmp_path / "model.onnx")
    for runtime in (TorchRuntime(small), OnnxRuntime(file)):
        np.testing.assert_allclose(runtime(x.numpy())[0], expected, atol=1e-5)
    assert len([i for i in __import__("onnx").load(file).graph.node if i.op_type == "Conv"]) == 1
    assert before.keys() == model.state_dict().keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def wrong():
    return InPlace(right=False)


@pytest.mark.parametrize("block", [Fusion, Layer, wrong, lambda: nn.Sequential(wrong(), InPlace())])
def test_what_is_no_such_offer_or_gives_other_outputs_is_left_as_it_is(block) -> None:
    model = net(block())
    assert fused(model, torch.rand(1, 3, 32, 32)) is model
    assert measure_cost(model, (3, 32, 32)).macs == measure_cost(model, (3, 32, 32), fuse=False).macs
    found = costs(model, resolutions=[16])
    assert not any("branches" in note for note in found.notes)
    assert found.rows[1].cost.macs == measure_cost(model, (3, 16, 16), fuse=False).macs


def test_a_hook_inside_keeps_its_branches() -> None:
    model = net(Replaced())
    model[0].wide.register_forward_hook(lambda module, args, output: output * 2)
    assert measure_cost(model, (3, 32, 32)).macs == TWO
    moved = net(Replaced())
    moved[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(fused(moved, x)(x), moved(x))
    assert measure_cost(moved, (3, 32, 32)).macs == ONE


@pytest.mark.parametrize("name, side, share", [("repvgg_a0", 64, 0.91), ("mobileone_s0", 64, 0.28)])
def test_timms_networks(name, side, share) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    served = timm.utils.reparameterize_model(model)
    found = measure_cost(model, (3, side, side))
    assert found.macs == measure_cost(served, (3, side, side), fuse=False).macs
    assert found.params == sum(p.numel() for p in served.parameters())
    assert found.macs <= share * measure_cost(model, (3, side, side), fuse=False).macs
    small = reduce(model, resolution=48, input_size=(3, side, side))
    assert measure_cost(small, (3, side, side)).macs < found.macs


@pytest.mark.parametrize("name", ["levit_128s", "fastvit_t8", "repvit_m0_9", "repghostnet_050"])
def test_timms_networks_answer_the_same(name) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.rand(1, 3, 224, 224)
    served = fused(model, x)
    assert served is not model and type(served) is type(model)
    torch.testing.assert_close(served(x), model(x), rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in served.parameters()) < sum(p.numel() for p in model.parameters())
