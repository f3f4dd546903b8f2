"""Counts against arithmetic written out here, against hooks on a real pass, and against other tools."""

import copy
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from downres import probe
from downres.errors import DownresError
from downres.measuring.cost import _watch, measure_cost
from downres.probe import fake_run, find_stem, total_stride


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def macs(model, size=(3, 16, 16)):
    return measure_cost(model if isinstance(model, nn.Module) else Apply(model), size).macs


def test_absurd_sizes_are_refused():
    """Not as what is long and narrow, such as sound."""
    with pytest.raises(DownresError, match="An input has at most 8192x8192 pixels, 100000x100000 are more"):
        measure_cost(nn.Conv2d(3, 8, 3), (3, 100_000, 100_000))
    assert macs(nn.Conv2d(1, 8, 1), (1, 1, 480_000)) == 8 * 480_000


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_convolutions():
    assert macs(nn.Conv2d(3, 8, 3, padding=1)) == 8 * 3 * 9 * 16 * 16
    assert macs(nn.Conv2d(3, 8, 3, stride=2)) == 8 * 3 * 9 * 7 * 7
    assert macs(nn.Conv2d(3, 8, (1, 5), padding=(0, 2), dilation=1)) == 8 * 3 * 5 * 16 * 16
    assert macs(nn.Conv2d(8, 16, 3, padding=1, groups=4), (8, 16, 16)) == 16 * 2 * 9 * 16 * 16
    assert macs(nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 16, 16)) == 8 * 9 * 16 * 16
    assert macs(nn.ConvTranspose2d(3, 8, 2, stride=2)) == 8 * 3 * 4 * 16 * 16  # each input value meets the whole kernel


def test_macs_scale_with_the_batch():
    net = nn.Conv2d(3, 8, 3, padding=1)
    assert macs(net, (4, 3, 16, 16)) == 4 * macs(net)
    assert measure_cost(net, (4, 3, 16, 16)).input_size == (4, 3, 16, 16)
    assert measure_cost(net, (3, 16, 16)).input_size == (1, 3, 16, 16)


def test_linear_and_products():
    assert macs(nn.Sequential(nn.Flatten(), nn.Linear(768, 10))) == 768 * 10
    assert macs(nn.Linear(16, 10)) == 3 * 16 * 16 * 10
    assert macs(lambda x: x @ x.transpose(-1, -2)) == 3 * 16 * 16 * 16
    assert macs(lambda x: torch.einsum("bchw,bcvw->bchv", x, x)) == 3 * 16 * 16 * 16
    assert macs(lambda x: x[0, 0] @ x[0, 0, 0]) == 16 * 16
    assert macs(lambda x: torch.addmv(x[0, 0, 0], x[0, 0], x[0, 0, 0])) == 16 * 16
    assert macs(lambda x: torch.dot(x[0, 0, 0], x[0, 0, 1])) == 16
    assert macs(lambda x: torch.baddbmm(x[0], x[0], x[0])) == 3 * 16**3
    assert macs(lambda x: torch.addbmm(x[0, 0], x[0], x[0])) == 3 * 16**3


@pytest.mark.parametrize("mask", [None, torch.zeros(16, 16)])
def test_attention_counts_both_products(mask):
    # q, k, v: (1, 3 heads, 16 tokens, 16 wide)
    assert macs(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask)) == 2 * 3 * 16 * 16 * 16


def test_compound_operators_of_inference_mode_are_taken_apart():
    @torch.inference_mode()
    def inference(x):
        return F.linear(x, torch.ones(10, 16))

    assert macs(inference) == 3 * 16 * 16 * 10


def test_multi_head_attention_is_counted_without_its_fused_kernel():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            x = x[:, 0]  # (1, 16 tokens, 16 wide)
            return self.mha(x, x, x, need_weights=False)[0]

    enabled = torch.backends.mha.get_fastpath_enabled()
    assert macs(Attend()) == 16 * 16 * 16 * 4 + 2 * 16 * 16 * 16
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def resize(size, **kwargs):
    return lambda x: F.interpolate(x, size=size, **kwargs)


def test_resizes_count_their_taps():
    values = 3 * 8 * 12
    assert macs(resize((8, 12), mode="nearest")) == 0
    assert macs(resize((8, 12), mode="nearest-exact")) == 0
    assert macs(resize((8, 12), mode="bilinear")) == 4 * values
    assert macs(resize((8, 12), mode="bicubic")) == 16 * values
    assert macs(lambda x: F.interpolate(x[None], size=(4, 8, 8), mode="trilinear")) == 8 * 4 * 8 * 8
    assert macs(lambda x: F.interpolate(x[0], size=8, mode="linear")) == 2 * 3 * 16 * 8
    grid = torch.zeros(1, 5, 7, 2)
    assert macs(lambda x: F.grid_sample(x, grid, align_corners=False)) == 4 * 3 * 5 * 7
    assert macs(lambda x: F.grid_sample(x, grid, mode="nearest", align_corners=False)) == 0


def test_antialiased_resizes_are_two_passes():
    # halving: support 2/2*2 = 2, 5 taps; bicubic 4/2*2 = 4, 9 taps. Width first, on all 16 rows; then height.
    aa = {"antialias": True}
    assert macs(resize((8, 8), mode="bilinear", **aa)) == 3 * 16 * 8 * 5 + 3 * 8 * 8 * 5
    assert macs(resize((8, 8), mode="bicubic", **aa)) == 3 * 16 * 8 * 9 + 3 * 8 * 8 * 9
    assert macs(resize((16, 8), mode="bilinear", **aa)) == 3 * 16 * 8 * 5  # the height stays: no second pass
    assert macs(resize((8, 16), mode="bilinear", **aa)) == 3 * 8 * 16 * 5
    assert macs(resize((32, 16), mode="bilinear", **aa)) == 3 * 32 * 16 * 3  # enlarging: support 1, 3 taps
    assert macs(resize((16, 16), mode="bilinear", **aa)) == 0


# --- anchors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: timm.create_model("resnet50"), torchvision.models.resnet50])
def test_resnet50(build):
    cost = measure_cost(build(), (3, 224, 224))
    assert cost.macs == 4_089_184_256
    assert cost.params == 25_557_032 and cost.param_bytes == 4 * cost.params
    # first stage: the max-pool's output, the branch, and the shortcut before and after its batch norm
    assert cost.peak_activation_bytes == 4 * 56 * 56 * (64 + 3 * 256) == 10_436_608
    assert measure_cost(build(), (3, 112, 112)).peak_activation_bytes == 4 * 28 * 28 * (64 + 3 * 256) == 2_609_152


@pytest.mark.parametrize("build", [lambda: timm.create_model("vit_base_patch16_224"), torchvision.models.vit_b_16])
def test_vit_base(build):
    n, d = 197, 768
    layer = n * (3 * d * d + d * d + 2 * d * 4 * d) + 2 * n * n * d
    assert macs(build(), (3, 224, 224)) == 196 * d * d + 12 * layer + d * 1000 == 17_563_828_224


# --- independent counts -------------------------------------------------------------------------------------------


def hooked_macs(model, size):
    """A real pass: output positions times weights, for every convolution and linear layer."""
    total = 0

    def conv(module, inputs, output):
        nonlocal total
        total += output.numel() // output.shape[1] * module.weight.numel()

    def linear(module, inputs, output):
        nonlocal total
        total += output.numel() // output.shape[-1] * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(conv)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *size))
    return total


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 96), ("mobilenetv3_small_100", 225), ("tf_efficientnet_lite0", 130), ("convnext_atto", 96)],
)
def test_hooks_on_a_real_pass_agree(name, side):
    model = timm.create_model(name)
    assert macs(model, (3, side, side)) == hooked_macs(model, (3, side, side))


def test_hooks_and_attention_agree_for_a_vit():
    model = timm.create_model("vit_tiny_patch16_224")
    attention = 12 * 2 * 197 * 197 * 192
    assert macs(model, (3, 224, 224)) == hooked_macs(model, (3, 224, 224)) + attention


def test_torchinfo_agrees_for_a_convnet():
    torchinfo = pytest.importorskip("torchinfo")
    model = timm.create_model("resnet18")
    theirs = torchinfo.summary(copy.deepcopy(model), (1, 3, 224, 224), verbose=0).total_mult_adds
    assert macs(model, (3, 224, 224)) == pytest.approx(theirs, rel=1e-3)  # theirs has batch norms and biases in it


# --- parameters ---------------------------------------------------------------------------------------------------


def test_shared_parameters_count_once_and_buffers_not():
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), nn.BatchNorm2d(3))
    net[1].weight = net[0].weight
    cost = measure_cost(net, (3, 16, 16))
    assert (cost.params, cost.param_bytes, cost.macs) == (256 + 6, 4 * (256 + 6), 2 * 3 * 16 * 256)
    net[0].spare = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    assert measure_cost(net, (3, 16, 16)).param_bytes == cost.param_bytes + 2 * 5


# --- peak ---------------------------------------------------------------------------------------------------------

SIDE = 16 * 16 * 4  # bytes of one float32 channel


def test_peak_by_hand():
    a, b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
    peak = measure_cost(nn.Sequential(a, b), (3, 16, 16)).peak_activation_bytes
    assert peak == (3 + 8) * SIDE  # input and 8 channels; then 8 + 2, the input no longer read
    skip = Apply(lambda x: x + x.relu().square())
    assert measure_cost(skip, (3, 16, 16)).peak_activation_bytes == 4 * 3 * SIDE - 3 * SIDE  # relu dropped before the add
    assert measure_cost(Apply(lambda x: x), (3, 16, 16)).peak_activation_bytes == 3 * SIDE


def test_views_and_in_place_operators_take_no_memory():
    model = Apply(lambda x: (x * 2).flatten(1).relu_().reshape(3, -1).t())
    assert measure_cost(model, (3, 16, 16)).peak_activation_bytes == 2 * 3 * SIDE


def test_outputs_stay_alive():
    model = Apply(lambda x: [x.sin(), x.cos(), x.exp()])
    assert measure_cost(model, (3, 16, 16)).peak_activation_bytes == 4 * 3 * SIDE


def test_parameters_buffers_and_constants_are_no_activations():
    model = nn.Conv2d(3, 1, 1)
    model.register_buffer("table", torch.ones(1000, 1000))
    model.constant = torch.ones(1000, 1000)
    model.register_forward_hook(lambda module, _, y: y.add_(module.table.view(-1)[0]).add_(module.constant.t()[0, 0]))
    assert measure_cost(model, (3, 16, 16)).peak_activation_bytes == (3 + 1) * SIDE


def fake_only(model, size):
    """The counts of the fake run; fails when it fell back to real tensors."""
    inputs = []

    @contextmanager
    def watch(copied, x):
        inputs.append(x)
        with _watch(copied, x) as observer:
            yield observer

    seen = fake_run(model, size, watch)
    assert [type(x) for x in inputs] == [FakeTensor]
    return seen


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", 96),
        ("tf_efficientnet_lite0", 128),
        ("convnext_atto", 96),
        ("vit_tiny_patch16_224", 224),
        ("mobilevit_xxs", 128),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_fake_and_real_tensors_give_the_same(name, side):
    model = timm.create_model(name)
    fake = fake_only(model, (3, side, side))
    real = probe._forward(copy.deepcopy(model), (1, 3, side, side), _watch)
    assert (fake.macs, fake.live.peak, fake.uncounted) == (real.macs, real.live.peak, real.uncounted)


def test_the_allocator_agrees():
    """PyTorch's own allocation events; a transformer, because its CPU kernels need next to no workspace."""
    model, x = timm.create_model("vit_tiny_patch16_224", depth=2).eval(), torch.zeros(1, 3, 224, 224)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(x)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert measure_cost(model, (3, 224, 224)).peak_activation_bytes == pytest.approx(peak, rel=0.01)


# --- the rest -----------------------------------------------------------------------------------------------------


def test_what_is_not_counted_is_listed():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(1)
    )
    assert measure_cost(net, (3, 16, 16)).uncounted == {
        "aten.native_batch_norm": 1,
        "aten.relu_": 1,
        "aten.max_pool2d_with_indices": 1,
        "aten._softmax": 1,
    }
    moves = Apply(lambda x: torch.cat([x.clone(), x.flip(-1)]).permute(1, 0, 2, 3).contiguous()[:, :1].unsqueeze_(0))
    assert measure_cost(moves, (3, 16, 16)).uncounted == {}


def test_the_model_is_untouched():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.cached = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), None

        def forward(self, x):
            assert not self.norm.training
            self.cached = self.norm(self.conv(x))
            return self.cached

    model = Caching().train()
    model.conv.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    for use in (measure_cost, find_stem):
        use(model, (3, 16, 16))
    total_stride(model, (16, 16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags == [True, False, True]
    assert model.cached is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_nothing_is_computed_or_allocated():
    model = nn.Conv2d(3, 4096, 3, padding=1)
    assert measure_cost(model, (3, 8192, 8192)).peak_activation_bytes == (3 + 4096) * 4 * 8192**2  # a terabyte


def test_a_model_that_looks_at_its_numbers_runs_on_zeros(capfd):
    def depends(x):
        return x @ x if x.sum() == 0 else x

    assert macs(depends) == 3 * 16**3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(224, 224), (3, 0, 224), (3, 224.0, 224), (1, 1, 3, 224, 224)])
def test_a_size_that_is_none(size):
    with pytest.raises(DownresError, match="input size"):
        measure_cost(nn.Identity(), size)


def test_a_size_that_the_model_refuses():
    with pytest.raises(DownresError, match=r"1x3x225x225 .*225.*give a size"):
        measure_cost(timm.create_model("vit_tiny_patch16_224", depth=1), (3, 225, 225))


class Flattening(nn.Module):
    """Made for 64 px: a convolution of stride 4 leaves 16×16 cells of 4 channels."""

    def __init__(self, flatten=lambda x: x.reshape(-1, 4 * 16 * 16)):
        super().__init__()
        self.conv, self.fc, self.flatten = nn.Conv2d(3, 4, 4, 4), nn.Linear(4 * 16 * 16, 2), flatten
        self.pretrained_cfg = {"input_size": (3, 64, 64)}

    def forward(self, x):
        return {"logits": self.fc(self.flatten(self.conv(x)))}


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((3, 128, 128), "returns 4 rows for 1 image of 3x128x128, and one an image of 3x64x64: .* before fc .Linear. counts"),
        ((4, 3, 32, 32), "returns 1 row for 4 images of 3x32x32, and one an image"),
        ((2, 3, 64, 128), "returns 4 rows for 2 images of 3x64x128"),
        ((3, 48, 48), "fc|shape"),
    ],
)
def test_rows_that_are_no_images_are_refused(size, says):
    with pytest.raises(DownresError, match=says):
        measure_cost(Flattening(), size)


def test_rows_that_are_as_at_the_networks_own_size_are_counted():
    conv, fc = 16 * 16 * 4 * 3 * 16, 4 * 16 * 16 * 2
    for batch in (1, 3):
        assert measure_cost(Flattening(), (batch, 3, 64, 64)).macs == batch * (conv + fc)
    assert measure_cost(Flattening(lambda x: x.flatten(0)), (3, 64, 64)).macs == conv + fc  # a row in all, as it always has
    for rows in (lambda x: x.flatten(0, 1), lambda x: x[0], lambda x: x.permute(0, 2, 3, 1).reshape(-1, 3), lambda x: x.sum()):
        assert macs(rows, (2, 3, 32, 32)) == macs(rows, (2, 3, 48, 48)) == 0


def test_a_network_of_several_inputs_is_named():
    class Pair(nn.Module):
        def forward(self, left, right):
            return left + right

    with pytest.raises(DownresError, match="it takes left, right, give a network that takes one image"):
        measure_cost(Pair(), (3, 8, 8))


@pytest.mark.parametrize(
    ("name", "side", "stride", "stem"),
    [
        ("resnet50", 224, 32, "conv1"),
        ("tf_efficientnet_lite0", 300, 32, "conv_stem"),
        ("mobilenetv3_small_100", 224, 32, "conv_stem"),
        ("vit_base_patch16_224", 224, 16, "patch_embed.proj"),
        ("swin_tiny_patch4_window7_224", 224, 32, "patch_embed.proj"),
        ("vgg11", 224, 32, "features.0"),  # its 7×7 convolution without padding shrinks, but is no stride
    ],
)
def test_stride_and_stem(name, side, stride, stem):
    with torch.device("meta"):  # fast, and enough for shapes
        model = timm.create_model(name)
    assert total_stride(model, (side, side)) == stride
    assert find_stem(model, (3, side, side)) == stem


def test_stride_ignores_maps_that_do_not_grow():
    """A pyramid-pooling branch has a 2×2 map at every input size."""
    branch = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(8, 8, 1))
    assert total_stride(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), branch), (64, 96)) == 4


def test_stride_and_stem_of_small_nets():
    assert total_stride(nn.Conv2d(3, 8, 3, padding=1), (32, 48)) == 1
    assert total_stride(nn.Conv2d(1, 8, 3, stride=2, padding=1), (31, 47), channels=1) == 2
    assert find_stem(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1))), (3, 8, 8)) == "1.0"
    with pytest.raises(DownresError, match="stem="):
        find_stem(nn.ReLU(), (3, 8, 8))
