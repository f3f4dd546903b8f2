"""RegSeg against arithmetic from the paper's tables, and against the authors' own code where a checkout of it is at hand."""

import copy
import hashlib
import importlib
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from downres.errors import DownresError
from downres.families import load_model
from downres.measuring.cost import measure_cost
from downres.models.regseg import DESIGNS, RegSeg, SqueezeExcitation, regseg
from downres.probe import total_stride

NAMES = ("exp48_decoder26", "exp53_decoder29")

# Gao 2021, tables 1 and 2 and fig. 5, written out: (inputs, outputs, stride) of every block; the channels that the decoder
# projects 1/4, 1/8 and 1/16 to; its channels after the 3×3 convolutions; the group width.
BLOCKS = {
    "exp48_decoder26": [(32, 48, 2), (48, 128, 2), *[(128, 128, 1)] * 2, (128, 256, 2), *[(256, 256, 1)] * 12, (256, 320, 1)],
    "exp53_decoder29": [(32, 48, 2), (48, 48, 1), (48, 120, 2), *[(120, 120, 1)] * 5]
    + [(120, 336, 2), *[(336, 336, 1)] * 12, (336, 384, 1)],
}
DECODERS = {
    "exp48_decoder26": ((48, 8), (128, 128), (320, 128), 64),
    "exp53_decoder29": ((48, 16), (120, 256), (384, 256), 128),
}
GROUP_WIDTH = {"exp48_decoder26": 16, "exp53_decoder29": 24}


def by_hand(name, classes, height, width):
    """(parameters, multiply-accumulates) of convolutions and of the upsampling, 4 an output value."""
    params = macs = 0
    size = math.ceil(height / 2), math.ceil(width / 2)

    def conv(inputs, outputs, kernel, at, groups=1, bias=False, norm=True):
        nonlocal params, macs
        weights = outputs * inputs // groups * kernel**2
        params += weights + outputs * bias + 2 * outputs * norm
        macs += weights * at[0] * at[1]

    conv(3, 32, 3, size)
    maps = {}
    for inputs, outputs, stride in BLOCKS[name]:
        before, size = size, tuple(math.ceil(side / stride) for side in size)
        conv(inputs, outputs, 1, before)
        conv(outputs, outputs, 3, size, groups=outputs // GROUP_WIDTH[name])
        conv(outputs, inputs // 4, 1, (1, 1), bias=True, norm=False)  # squeeze and excitation
        conv(inputs // 4, outputs, 1, (1, 1), bias=True, norm=False)
        conv(outputs, outputs, 1, size)
        if stride == 2 or inputs != outputs:
            conv(inputs, outputs, 1, size)
        maps[len(maps) if stride == 2 else len(maps) - 1] = size
    (c4, fine), (c8, coarse), (c16, _), mixed = DECODERS[name]
    for channels, to, at in ((c4, fine, maps[0]), (c8, coarse, maps[1]), (c16, coarse, maps[2])):
        conv(channels, to, 1, at)
    conv(coarse, mixed, 3, maps[1])
    conv(mixed + fine, mixed, 3, maps[0])
    conv(mixed, classes, 1, maps[0], bias=True, norm=False)
    grown = coarse * math.prod(maps[1]) + mixed * math.prod(maps[0]) + classes * height * width
    return params, macs, 4 * grown


@pytest.mark.parametrize(("name", "params"), [("exp48_decoder26", 3_334_951), ("exp53_decoder29", 6_131_579)])
def test_parameters_of_the_paper(name, params):
    """3.34 M of the smaller network for the 19 classes of Cityscapes (Gao 2021, table 5)."""
    assert by_hand(name, 19, 64, 64)[0] == params
    assert sum(p.numel() for p in regseg(name).parameters()) == params


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("classes", "size"), [(11, (360, 480)), (5, (97, 131))])
def test_multiply_accumulates(name, classes, size):
    _, convolutions, upsampling = by_hand(name, classes, *size)
    with torch.device("meta"):
        net = regseg(name, classes).eval()
    assert measure_cost(net, (3, *size)).macs == convolutions + upsampling
    seen = []

    def count(module, inputs, output):
        per_value = module.weight[0].numel()
        seen.append(per_value * output.numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    net(torch.empty(1, 3, *size, device="meta"))
    assert sum(seen) == convolutions


def test_the_cost_that_the_recipe_states():
    _, convolutions, upsampling = by_hand("exp48_decoder26", 11, 360, 480)
    assert convolutions + upsampling == 3_204_413_184


# --- the authors' network -----------------------------------------------------------------------------------------

# Of the sorted lines "name shape" of the state dict of their RegSeg(name, 19), commit 0f61c66.
THEIRS = {
    "exp48_decoder26": (470, "e4e2cbef42d26101e59b91685a35392833aeedf7a57d7980c6aee24ed85de79b"),
    "exp53_decoder29": (558, "fbd33df1e0a04b303f01112bcf38d70810eaeb2368ffc131520559cf3951f73f"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_the_published_checkpoints(name):
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in regseg(name, 19).state_dict().items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == THEIRS[name]


@pytest.fixture(scope="module")
def authors():
    """Their class RegSeg, from the checkout that DOWNRES_REGSEG names."""
    folder = os.environ.get("DOWNRES_REGSEG")
    if not folder:
        pytest.skip("DOWNRES_REGSEG names no checkout of github.com/RolandGao/RegSeg to compare with")
    if not (Path(folder) / "model.py").is_file():
        pytest.fail(f"DOWNRES_REGSEG={folder} has no model.py")
    stub = types.ModuleType("benchmark")  # theirs times networks when it is imported
    stub.benchmark_eval = stub.benchmark_train = stub.benchmark_memory = None
    names = ("benchmark", "model", "blocks", "competitor_blocks")
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    sys.modules["benchmark"] = stub
    try:
        yield importlib.import_module("model").RegSeg
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def uneven(net, seed=0):
    """Every parameter and statistic away from what it starts as, so that none can be mistaken for another."""
    drawn = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=drawn)
            module.bias.data.normal_(0, 0.1, generator=drawn)
            module.running_mean.normal_(0, 0.1, generator=drawn)
            module.running_var.uniform_(0.5, 1.5, generator=drawn)
    return net


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers_as_the_authors_network(authors, name):
    torch.manual_seed(0)
    theirs = uneven(authors(name, 19))
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in regseg(name).state_dict().items()}
    for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        theirs, ours = copy.deepcopy(theirs).to(dtype), regseg(name).to(dtype)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for size in ((64, 128), (97, 131), (33, 33)):
            x = torch.randn(2, 3, *size, dtype=dtype)
            with torch.no_grad():
                a, b = theirs.eval()(x), ours.eval()(x)
            assert a.shape == b.shape == (2, 19, *size)
            assert (a - b).abs().max() <= bound * a.abs().max()
    # Training: statistics of the batch, and the gradients of all parameters. float64 from above.
    x, target = torch.randn(2, 3, 65, 96, dtype=dtype), torch.randint(0, 19, (2, 65, 96))
    for net in (theirs, ours):
        net.train().zero_grad()
        F.cross_entropy(net(x), target).backward()
    found = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        a, b = parameter.grad, found[key].grad
        assert (a - b).abs().max() <= 1e-9 * a.abs().max() + 1e-14, key
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_of_their_training(authors, tmp_path):
    """What their train.py saves: the weights under "model", beside the states of optimiser and schedule."""
    torch.manual_seed(0)
    theirs = uneven(authors("exp48_decoder26", 11)).eval()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9)
    checkpoint = {"model": theirs.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "best_mIU": 0.7}
    torch.save(checkpoint, tmp_path / "theirs.pth")
    model = load_model("regseg:exp48_decoder26", tmp_path / "theirs.pth")
    assert model.num_classes == 11 and model.weights == "theirs.pth, matched by name"
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), theirs(x), rtol=1e-4, atol=1e-5)


# --- what the network does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_size_of_the_input(name):
    net = regseg(name, 4, width=0.25, depth=0.5).eval()
    with torch.no_grad():
        for size in ((64, 128), (97, 131), (1, 1), (5, 40)):
            assert net(torch.randn(1, 3, *size)).shape == (1, 4, *size)
    assert total_stride(net, (128, 256)) == 16
    assert net.num_classes == 4


def test_field_of_view():
    """A position of the deepest map sees 3807 pixels a side: a 3×3 convolution adds 2·dilation·stride so far (table 1)."""
    expected = 1 + 2 * 1 + 2 * 2 + 2 * 4 + 2 * (2 * 8) + 2 * 8  # stem, 1/4, 1/8 and two more there, 1/16
    expected += 2 * 16 * (1 + 2 + 4 * 4 + 7 * 14)
    net = regseg("exp48_decoder26", 2, width=0.25).double().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0 / module.weight[0].numel())
        elif isinstance(module, SqueezeExcitation):  # sees the whole map
            module.forward = lambda x: x
    x = torch.ones(1, 3, 1, 8192, dtype=torch.float64, requires_grad=True)
    deepest = net.body(net.stem(x))[-1]
    deepest[..., 256].sum().backward()
    seen = x.grad.sum((0, 1, 2)).nonzero().flatten()
    assert int(seen[-1] - seen[0]) + 1 == expected == 3807


# --- scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [0.1, 0.375, 1.0, 2.0])
@pytest.mark.parametrize("group_width", [None, 4, 40])
def test_groups_divide_the_channels(name, width, group_width):
    design = DESIGNS[name].scaled(width, 0.5, group_width)
    assert all(count % design.group_width == 0 for count in design.channels)
    assert all(count % (2 * design.group_width) == 0 for count in design.channels[2:])  # two dilations split them
    if group_width is not None:
        assert design.group_width == group_width
    with torch.device("meta"):
        assert RegSeg(3, design).eval()(torch.empty(1, 3, 32, 64, device="meta")).shape == (1, 3, 32, 64)


def test_half_the_width():
    """Every channel number of the smaller network halves, and so does the width of the groups: as many groups as before."""
    half = DESIGNS["exp48_decoder26"].scaled(0.5)
    assert (half.stem, half.channels, half.group_width, half.heads, half.mixed) == (16, (24, 64, 128, 160), 8, (4, 64), 32)
    assert (half.blocks, half.dilations) == (DESIGNS["exp48_decoder26"].blocks, DESIGNS["exp48_decoder26"].dilations)
    assert DESIGNS["exp48_decoder26"].scaled() == DESIGNS["exp48_decoder26"]
    assert DESIGNS["exp53_decoder29"].scaled() == DESIGNS["exp53_decoder29"]


def test_half_the_depth_keeps_every_dilation():
    half = DESIGNS["exp48_decoder26"].scaled(depth=0.5)
    assert half.dilations == ((1,), (1, 2), *((1, 4),) * 2, *((1, 14),) * 4) and half.blocks == (1, 2)
    assert half.channels == DESIGNS["exp48_decoder26"].channels


@pytest.mark.parametrize("name", NAMES)
def test_more_is_more(name):
    def params(**how):
        with torch.device("meta"):
            return sum(p.numel() for p in regseg(name, 11, **how).parameters())

    widths = [params(width=w / 4) for w in range(1, 9)]
    depths = [params(depth=d / 4) for d in range(1, 9)]
    assert widths == sorted(widths) and depths == sorted(depths)
    assert params(width=2.0) > 3 * params() > 9 * params(width=0.5)
    assert params(group_width=8) < params() < params(depth=1.5)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"name": "exp48"}, "There is no RegSeg 'exp48': choose exp48_decoder26 or exp53_decoder29"),
        ({"width": 0.0}, "Width and depth are factors above 0 and at most 4, 0.0 and 1.0 are not"),
        ({"depth": -1.0}, "Width and depth are factors above 0"),
        ({"width": 5.0}, "at most 4"),
        ({"width": float("nan")}, "Width and depth"),
        ({"group_width": 0}, "A group has at least one channel, 0 is too few"),
        ({"num_classes": 0}, "A network has at least one class, 0 is too few"),
    ],
)
def test_what_is_no_network(how, says):
    with pytest.raises(DownresError, match=says) as caught:
        regseg(**how)
    assert "\n" not in str(caught.value)
