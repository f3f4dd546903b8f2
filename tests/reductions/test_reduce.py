"""`reduce`: drop-in, equal to resizing by hand, and leaving the original alone."""

import copy
import io
import pickle
import warnings
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from downres.errors import DownresError
from downres.records import Candidate
from downres.reduction import Reduction, reduce, token_map


class Net(nn.Module):
    """Small, with a BatchNorm, and one place where the map can be resampled by hand."""

    def __init__(self, classes=5):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, classes)

    def rest(self, x):
        return self.head(self.second(self.norm(x).relu()).relu().mean((2, 3)))

    def forward(self, pixel_values, scale=1.0):
        return self.rest(self.first(pixel_values)) * scale


MODELS = {
    "timm resnet": lambda: timm.create_model("test_resnet", num_classes=7),
    "timm efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=7),
    "timm convnext": lambda: timm.create_model("test_convnext", num_classes=7),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
    "plain": lambda: Net(7),
}
STEMS = {
    "timm resnet": "conv1.0",
    "timm efficientnet": "conv_stem",
    "timm convnext": "stem.0",
    "torchvision resnet18": "conv1",
    "torchvision mobilenet_v3_small": "features.0.0",
    "plain": "first",
}


@pytest.fixture(scope="module", params=MODELS)
def named(request):
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, *args, **kwargs):
    return model(*args, **kwargs)


def state(model):
    """All of a module that `reduce` might touch: attributes, hooks, flags."""
    return [
        (name, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_input_resize_equals_resizing_by_hand(named, interpolation):
    _, model = named
    small = reduce(model, resolution=64, interpolation=interpolation)
    for size, target in {(1, 3, 96, 96): (64, 64), (3, 3, 96, 192): (64, 128), (2, 3, 160, 100): (102, 64)}.items():
        x = images(*size)
        by_hand = F.interpolate(x, target, mode=interpolation, antialias=True, align_corners=False)
        assert torch.equal(run(small, x), run(model, by_hand))
        assert run(small, x).shape == run(model, x).shape == (size[0], 7)
    assert not torch.equal(run(small, images(1, 3, 96, 96)), run(model, images(1, 3, 96, 96)))
    x = images(1, 3, 64, 64)
    assert torch.equal(run(small, x), run(model, x))  # that size already


def test_a_pair_is_taken_as_it_is(net):
    x = images(2, 3, 80, 50)
    by_hand = F.interpolate(x, (24, 40), mode="bilinear", antialias=True)
    assert torch.equal(run(reduce(net, resolution=(24, 40)), x), run(net, by_hand))


def test_two_to_one_stays_two_to_one(net):
    seen = []
    small = reduce(net, resolution=32, stem_scale=0.5)
    small.first.register_forward_pre_hook(lambda _m, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    small.norm.register_forward_pre_hook(lambda _m, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    run(small, images(1, 3, 64, 128))
    assert seen == [(32, 64), (16, 32)]


@pytest.mark.parametrize("scale", [0.5, 0.7])
def test_stem_resample_equals_a_forward_written_by_hand(net, scale):
    small = reduce(net, stem_scale=scale)
    for height, width in ((40, 40), (30, 61)):
        x = images(3, 3, height, width)
        with torch.no_grad():
            size = (round(height * scale), round(width * scale))
            expected = net.rest(F.interpolate(net.first(x), size, mode="bilinear", antialias=True))
        assert torch.equal(run(small, x), expected)


def test_stem_resample_of_real_networks(named):
    name, model = named
    small = reduce(model, stem_scale=0.5)
    (change,) = small.downres.changes
    assert change.module == STEMS[name]
    for size in ((1, 3, 96, 96), (3, 3, 128, 64)):
        x = images(*size)
        assert run(small, x).shape == run(model, x).shape
        assert not torch.equal(run(small, x), run(model, x))
    # What comes after the stem sees half of what the stem gives.
    sizes = {}
    small.get_submodule(STEMS[name]).register_forward_hook(
        lambda _m, inputs, out: sizes.update(into=inputs[0].shape, out=out.shape)
    )
    stride = small.get_submodule(STEMS[name]).stride[0]
    run(small, images(1, 3, 128, 64))
    assert sizes["out"][-2:] == (64 // stride, 32 // stride)


def test_after_any_module():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    x = images(2, 3, 96, 96)
    for name in ("layer1", "relu", "maxpool"):
        small = reduce(model, Candidate(stem_scale=0.5, stem=name), interpolation="bicubic")
        assert [c.module for c in small.downres.changes] == [name]
        assert run(small, x).shape == (2, 7)
    with pytest.raises(DownresError, match=r"stem×0.5@layer2.0.bn1' \(layer2.0 \(BasicBlock\): The size of tensor a"):
        reduce(model, stem_scale=0.5, stem="layer2.0.bn1")  # inside a residual block the sum no longer fits
    small = reduce(model, stem_scale=0.5, stem="layer1")
    with torch.no_grad():
        y = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        y = F.interpolate(y, (12, 12), mode="bilinear", antialias=True)
        expected = model.fc(model.layer4(model.layer3(model.layer2(y))).mean((2, 3)))
    assert torch.allclose(run(small, x), expected, atol=1e-5)


def test_input_and_stem_together(net):
    small = reduce(net, Candidate(48, 0.5))
    x = images(2, 3, 96, 96)
    with torch.no_grad():
        y = net.first(F.interpolate(x, (48, 48), mode="bilinear", antialias=True))
        expected = net.rest(F.interpolate(y, (24, 24), mode="bilinear", antialias=True))
    assert torch.equal(run(small, x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(net, dtype):
    small = reduce(copy.deepcopy(net).to(dtype), resolution=24, stem_scale=0.5)
    out = run(small, images(2, 3, 40, 60).to(dtype))
    assert out.dtype == dtype
    expected = run(reduce(net, resolution=24, stem_scale=0.5), images(2, 3, 40, 60))
    assert torch.allclose(out.float(), expected, atol=0.05)


def test_keyword_and_further_inputs(net):
    x = images(2, 3, 40, 40)
    small = reduce(net, resolution=24)
    assert torch.equal(run(small, pixel_values=x), run(small, x))
    assert torch.equal(run(small, x, scale=2.0), 2 * run(small, x))
    assert torch.equal(run(small, pixel_values=x, scale=2.0), 2 * run(small, x))
    assert not torch.equal(run(small, x), run(net, x))

    class Mask(nn.Module):
        def forward(self, mask, image):
            return mask, image.mean((2, 3)) * image.shape[-1]

    mask, colours = run(reduce(Mask(), resolution=24), images(2, 40), x)
    assert mask.shape == (2, 40)
    torch.testing.assert_close(colours, F.interpolate(x, (24, 24), mode="bilinear", antialias=True).mean((2, 3)) * 24)


def test_gradients_flow(net):
    x = images(2, 3, 40, 40).requires_grad_()
    reduce(net, resolution=24, stem_scale=0.5)(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


# --- what it leaves alone, and what the result survives --------------------------------------------------------------


def test_the_original_is_untouched(named):
    _, model = named
    model.train()  # the flag, too
    weights, before = copy.deepcopy(model.state_dict()), state(model)
    small = reduce(model, resolution=64, stem_scale=0.5)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    small.eval()(images(1, 3, 96, 96))
    assert state(model) == before and not hasattr(model, "downres")
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert small.training is False and model.training is True
    model.eval()


def test_state_dicts_are_interchangeable(named):
    _, model = named
    small = reduce(model, resolution=64, stem_scale=0.5)
    assert list(small.state_dict()) == list(model.state_dict())
    x = images(1, 3, 96, 96)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    expected = run(reduce(other, resolution=64, stem_scale=0.5), x)
    assert not torch.equal(run(small, x), expected)
    small.load_state_dict(other.state_dict())
    assert torch.equal(run(small, x), expected)
    back = copy.deepcopy(model)
    back.load_state_dict(small.state_dict())
    assert torch.equal(run(back, x), run(other, x))


def test_copies(named):
    _, model = named
    small = reduce(model, resolution=64, stem_scale=0.5)
    x = images(1, 3, 96, 120)
    saved = io.BytesIO()
    torch.save(small, saved)
    saved.seek(0)
    for copied in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(run(copied, x), run(small, x))
        assert copied.downres == small.downres
        with pytest.raises(DownresError, match="reduced before"):
            reduce(copied, resolution=32)


@pytest.mark.parametrize("name", ["timm resnet", "timm convnext", "plain"])
def test_compile(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    small = reduce(model, resolution=64, stem_scale=0.5)
    x = images(2, 3, 96, 120)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled, x), run(small, x), atol=1e-5)
    assert run(compiled, x).shape == (2, 7)


@pytest.mark.parametrize("strict", [False, True])
def test_export(net, strict):
    small = reduce(net, resolution=24, stem_scale=0.5)
    x = images(2, 3, 40, 60)
    program = torch.export.export(small, (x,), strict=strict)
    assert torch.allclose(run(program.module(), x), run(small, x), atol=1e-5)
    resizes = [n for n in program.graph.nodes if "_upsample_bilinear2d_aa" in str(n.target)]
    assert [tuple(n.meta["val"].shape[-2:]) for n in resizes] == [(24, 36), (12, 18)]


def test_export_with_any_batch():
    torch.manual_seed(0)
    small = reduce(timm.create_model("test_resnet", num_classes=7).eval(), resolution=64, stem_scale=0.5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(small, (images(2, 3, 96, 120),), dynamic_shapes=({0: batch},))
    x = images(5, 3, 96, 120)
    assert torch.allclose(run(program.module(), x), run(small, x), atol=1e-5)


# --- what it says -------------------------------------------------------------------------------------------------


def test_changes(net):
    small = reduce(net, resolution=(192, 384), stem_scale=0.5)
    assert small.downres.candidate == Candidate((192, 384), 0.5)
    assert [str(c) for c in small.downres.changes] == [
        "input resize at the input: height x width 192x384 px, bilinear, antialiased",
        "activation resample at first: height and width ×0.5, bilinear, antialiased",
    ]
    assert Reduction.from_json(small.downres.to_json()) == small.downres
    assert "short side 96 px, bicubic" in str(reduce(net, resolution=96, interpolation="bicubic").downres.changes[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduce(net, resolution=96)


def test_nothing_changed_warns(net):
    for candidate in (None, Candidate(), Candidate(None, 1.0, "first")):
        with pytest.warns(UserWarning, match="changed nothing: it looked for a resolution, a stem_scale below 1"):
            same = reduce(net, candidate)
        x = images(1, 3, 40, 40)
        assert torch.equal(run(same, x), run(net, x)) and same is not net and same.downres.changes == ()


def test_reducing_twice_is_refused(net):
    with pytest.raises(DownresError, match=r"reduced before \(128\): reduce the original"):
        reduce(reduce(net, resolution=128), stem_scale=0.5)
    net.downres = SimpleNamespace()  # somebody's own attribute of that name
    assert run(reduce(net, resolution=24), images(1, 3, 40, 40)).shape == (1, 5)


@pytest.mark.parametrize(
    ("wrong", "near"), [("layer1.0.conv3", "layer1.0.conv1"), ("con1", "conv1"), ("zzz", "conv1"), ("", "conv1")]
)
def test_wrong_names_suggest_the_nearest(wrong, near):
    model = torchvision.models.resnet18()
    candidate = Candidate(stem_scale=0.5, stem=wrong)
    if wrong == "":  # no name is none given
        assert reduce(model, candidate).downres.changes[0].module == "conv1"
        return
    with pytest.raises(DownresError, match=f"no module '{wrong}'.*{near}"):
        reduce(model, candidate)


def test_tokens_cannot_be_resampled():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1).eval()
    with pytest.raises(DownresError, match=r"'norm' returns \(1, 197, 192\): name another module"):
        reduce(vit, stem_scale=0.5, stem="norm")

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(DownresError, match="'0' returns tuple: name another"):
        run(reduce(nn.Sequential(Pair()), stem_scale=0.5, stem="0"), images(1, 3, 8, 8))


def test_bad_arguments(net):
    with pytest.raises(DownresError, match="bilinear or bicubic, 'nearest' is neither"):
        reduce(net, resolution=96, interpolation="nearest")
    with pytest.raises(DownresError, match="either a candidate or its fields"):
        reduce(net, Candidate(96), resolution=96)
    with pytest.raises(DownresError, match="above 0 and at most 1, 2.0 is not"):
        reduce(net, stem_scale=2.0)
    with pytest.raises(DownresError, match="between 1 and 8192 pixels, 0 is not"):
        reduce(net, resolution=0)
    with pytest.raises(DownresError, match="No convolution was executed: name the module"):
        reduce(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), stem_scale=0.5, input_size=(3, 8, 8))
    with pytest.raises(DownresError, match=r"no image tensor: its input must be of shape \(batch, channels"):
        run(reduce(net, resolution=96), images(2, 4))
    with pytest.raises(DownresError, match=r"Linear does not run on an image of 3x224x224 .* give the size that it is used at"):
        reduce(nn.Linear(4, 2), resolution=96)


def test_rows_that_are_no_images_are_refused():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 4, 4), nn.Linear(4 * 16 * 16, 2)

        def forward(self, x):
            return self.fc(self.conv(x).reshape(-1, 4 * 16 * 16))

    with pytest.raises(
        DownresError, match=r"\(1, 2\) and, reduced to '128', \(4, 2\), which is no row an image any more: give"
    ):
        reduce(Flattening(), resolution=128, input_size=(3, 64, 64))
    with pytest.raises(DownresError, match="does not run as '32'"):
        reduce(Flattening(), resolution=32, input_size=(3, 64, 64))


def test_the_stem_of_another_input_size():
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 2 * 2, 2)).eval()
    assert reduce(grey, stem_scale=0.5).downres.changes[0].module == "0"  # one channel: the first convolution says so
    assert reduce(grey, stem_scale=0.5, input_size=(1, 8, 8)).downres.changes[0].module == "0"
    fixed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2)).eval()
    with pytest.raises(DownresError, match="does not run on an (input|image) of 1x(1x)?224x224"):
        reduce(fixed, stem_scale=0.5)


def test_ragged_convnet_inputs_are_cut_or_padded_alike_with_and_without_the_resize():
    model = torchvision.models.resnet18(num_classes=3).eval()
    x = images(1, 3, 200, 200)
    for ragged, side in (("floor", 192), ("pad", 224)):
        by_hand = x[..., :side, :side] if ragged == "floor" else F.pad(x, (0, 24, 0, 24))
        for resize_input in (True, False):
            small = reduce(model, resolution=200, ragged=ragged, resize_input=resize_input)
            assert torch.equal(run(small, x), run(model, by_hand)), (ragged, resize_input)
            assert "ragged input" in [change.kind for change in small.downres.changes]
        wide = run(reduce(model, resolution=200, ragged=ragged), images(1, 3, 200, 400))
        assert wide.shape == (1, 3)  # the aspect ratio is kept, whole strides of each side


def test_a_vit_made_for_ragged_patches_takes_that_size_only():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=1).eval()
    small = reduce(model, patch_size=20, ragged="floor", resize_input=False)
    assert run(small, images(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(DownresError, match="made for images of 64x64 px, it got 96x96"):
        run(small, images(1, 3, 96, 96))


def test_a_pooled_grid_is_compared_as_a_grid_not_as_a_count():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, dynamic_img_size=True).eval()
    small = reduce(model, stem_scale=0.5)
    assert run(small, images(1, 3, 224, 224)).shape == (1, 3)
    with pytest.raises(DownresError, match="made for images of 224x224 px, it got 112x448"):
        run(small, images(1, 3, 112, 448))  # as many tokens, another grid
    merged = reduce(model, merge=4)
    assert token_map(merged, images(1, 3, 112, 448)).shape == (1, 7, 28)


def test_a_square_pair_is_a_square_whatever_the_network_is_made_for():
    """One number is the short side: of lines of text 64 is 64x256, and (64, 64) has a quarter of its tokens."""
    lines = timm.create_model("vit_tiny_patch16_224", img_size=(32, 128), depth=1, num_classes=2).eval()
    for given, expected in ((64, (64, 256)), ((64, 64), (64, 64)), ([64, 64], (64, 64))):
        small = reduce(lines, resolution=given)
        assert small.patch_embed.img_size == expected and small(torch.rand(1, 3, 32, 128)).shape == (1, 2)
        assert reduce(lines, small.downres.candidate).patch_embed.img_size == expected
    for given, expected in ((64, (64, 85)), ((64, 64), (64, 64))):
        small, seen = reduce(Net(), resolution=given), []
        small.first.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(tuple(args[0].shape[-2:])))
        small(torch.rand(1, 3, 120, 160))
        assert seen == [expected]
