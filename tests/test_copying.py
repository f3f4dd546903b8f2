"""Networks as users keep them: not to be copied, wrapped, lazy, in another precision, or of other channels than three."""

import copy
import io
import pickle
import threading
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor

from downres import DownresError, costs, measure_cost, measure_latency, reduce
from downres.copying import copied, first_float, modules, named_modules, unwrapped
from downres.families import load_model
from downres.probe import input_size_of
from downres.searching.design import as_model

MACS = {48: 24 * 24 * 8 * 27 + 8 * 2, 24: 12 * 12 * 8 * 27 + 8 * 2}
"""Of `net` by its side: a 3×3 convolution of stride 2 from 3 to 8 channels, and a linear layer from 8 to 2."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


class Cam(nn.Module):
    """Keeps its feature map, in a list and a dictionary too."""

    def __init__(self):
        super().__init__()
        self.net, self.kept, self.more = net(), None, {}

    def forward(self, x):
        self.kept = self.net[0](x)
        self.more["maps"] = [self.kept, (self.kept * 2,)]
        return self.net[1:](self.kept)


def cam():
    model = Cam()
    model(torch.rand(1, 3, 48, 48))
    return model


def old_norm(norm):
    with warnings.catch_warnings(action="ignore"):
        model = net()
        norm(model[4])
        model[4](torch.rand(2, 8))
    return model


class Espnet(nn.Module):
    """As published: a list named `modules`, which its forward goes through."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.modules = list(self.net)

    def forward(self, x):
        for module in self.modules:
            x = module(x)
        return x


def shadowed(name):
    model = net()
    object.__setattr__(model, name, ["not", "a", "method"])
    return model


def compiled_inside():
    model = net()
    model[0] = torch.compile(model[0])
    return model


def compiled_in_place():
    model = net()
    model.compile()
    return model


def compiled_forward():
    model = Cam()
    model.forward = torch.compile(model.forward)
    return model


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    @torch.compile
    def forward(self, x):
        return self.net(x)


WORKING = {
    "method compiled": Decorated,
    "weight norm": lambda: old_norm(nn.utils.weight_norm),
    "spectral norm": lambda: old_norm(nn.utils.spectral_norm),
    "feature map kept": cam,
    "compiled": lambda: torch.compile(net()),
    "compiled inside": compiled_inside,
    "compiled in place": compiled_in_place,
    "forward compiled": compiled_forward,
    "DataParallel": lambda: nn.DataParallel(net()),
    "DataParallel inside": lambda: nn.Sequential(nn.DataParallel(net())),
    "compiled DataParallel": lambda: torch.compile(nn.DataParallel(net())),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(net()),
    "modules": Espnet,
    "bfloat16": lambda: net().bfloat16(),
    "half": lambda: net().half(),
    "float64": lambda: net().double(),
    **{
        name: lambda name=name: shadowed(name)
        for name in ("modules", "parameters", "buffers", "named_parameters", "type", "half")
    },
}


@pytest.mark.parametrize("kind", WORKING)
def test_networks_as_they_are_kept_are_reduced_and_counted(kind) -> None:
    model = nn.Module.eval(WORKING[kind]())
    x = torch.rand(2, 3, 48, 48, dtype=first_float(model).dtype)
    flags = [m.training for m in modules(model)]
    small = reduce(model, resolution=24, input_size=(3, 48, 48))
    own = 8 * 2 + 2 if kind == "spectral norm" else 0  # it multiplies its matrix in each run
    served = reduce(model, resolution=24, input_size=(3, 48, 48), resize_input=False)
    assert measure_cost(model, (3, 48, 48)).macs == MACS[48] + own and measure_cost(served, (3, 24, 24)).macs == MACS[24] + own
    plain = unwrapped(model)
    with torch.no_grad():
        by_hand = nn.functional.interpolate(x.float(), (24, 24), mode="bilinear", antialias=True).to(x)
        expected = None if "compiled" in kind else plain.forward(by_hand)
        found = small(x)
    assert found.shape == (2, 2) and found.dtype == x.dtype
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-2 if x.dtype in (torch.half, torch.bfloat16) else 1e-5, atol=1e-3)
    assert [m.training for m in modules(model)] == flags


@pytest.mark.parametrize("kind", WORKING)
def test_networks_as_they_are_kept_are_measured_in_single_precision(kind) -> None:
    model = WORKING[kind]()
    own = 8 * 2 + 2 if kind == "spectral norm" else 0
    found = {row.cost.input_size[2]: row.cost.macs for row in costs(model, resolutions=[24, 48]).rows}
    assert found[24] == MACS[24] + own and found[48] == MACS[48] + own
    assert {t.dtype for t in as_model(model).module.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert np.isfinite(measure_latency(model, (3, 32, 32), runtime="torch", runs=1, warmup=0).latency_ms)


@pytest.mark.parametrize("kind", ["DataParallel", "weight norm", "half", "modules"])
def test_they_are_exported(kind) -> None:
    assert measure_latency(WORKING[kind](), (3, 32, 32), runs=1, warmup=0).runtime == "onnxruntime"


def lazy() -> nn.Sequential:
    return nn.Sequential(
        nn.LazyConv2d(8, 3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(2)
    )


def test_lazy_layers_get_their_weights_by_one_run_of_a_copy() -> None:
    model, before = lazy(), torch.random.get_rng_state()
    macs = 24 * 24 * 8 * 27 + 32 * 2
    assert measure_cost(model, (3, 48, 48)).macs == macs and measure_cost(model, (3, 48, 48)).params == 8 * 27 + 32 * 2 + 2
    small = reduce(model, resolution=24, input_size=(3, 48, 48))
    assert small.training and small(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    assert costs(model, resolutions=[48]).rows[1].cost.macs == macs
    assert model[0].has_uninitialized_params() and torch.equal(torch.random.get_rng_state(), before)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.LazyLinear(2))
    assert measure_cost(flat, (3, 8, 8)).macs == 4 * 4 * 4 * 27 + 4 * 16 * 2
    hopeless = nn.Sequential(nn.Linear(7, 7), nn.LazyLinear(2))
    with pytest.raises(DownresError, match="run it once on an image of its own size first"):
        reduce(hopeless, resolution=24)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: torch.jit.script(net()), "is a TorchScript module"),
        (lambda: torch.jit.trace(net().eval(), torch.rand(1, 3, 48, 48)), "is a TorchScript module"),
        (lambda: nn.DataParallel(torch.jit.script(net())), "is a TorchScript module"),
        (lambda: torch.export.export(net(), (torch.rand(1, 3, 48, 48),)).module(), "is an exported program"),
        (lambda: nn.Sequential(torch.export.export(net(), (torch.rand(1, 3, 48, 48),)).module()), "is an exported program"),
        (lambda: torch.export.export(net(), (torch.rand(1, 3, 48, 48),)), "this is a ExportedProgram: give the module"),
    ],
)
def test_what_cannot_be_changed_says_what_to_give_instead(make, sentence) -> None:
    model = make()
    for run in (
        lambda: reduce(model, resolution=24),
        lambda: measure_cost(model, (3, 48, 48)),
        lambda: measure_latency(model, (3, 48, 48)),
        lambda: costs(model, resolutions=[24]),
    ):
        with pytest.raises(DownresError, match=sentence):
            run()


def test_a_quantized_network_is_refused() -> None:
    with warnings.catch_warnings(action="ignore"):
        model = torch.ao.quantization.quantize_dynamic(net().eval(), {nn.Linear})
    with pytest.raises(DownresError, match="quantized network.*in float32"):
        measure_cost(model, (3, 48, 48))


@pytest.mark.parametrize("name", ["quantized_resnet18", "quantized_shufflenet_v2_x0_5"])
def test_a_network_that_may_be_quantized_later_is_none_yet(name) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    small = reduce(model, resolution=64, input_size=(3, 128, 128))
    assert small(torch.rand(2, 3, 128, 128)).shape == (2, 5)
    assert measure_cost(small, (3, 128, 128)).macs < 0.3 * measure_cost(model, (3, 128, 128)).macs


def test_a_network_of_clips_is_refused_with_what_it_takes() -> None:
    clips = nn.Sequential(nn.Conv3d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    for run in (lambda: reduce(clips, resolution=24), lambda: measure_cost(clips, (3, 48, 48))):
        with pytest.raises(DownresError, match="takes clips of several frames: give a network that takes single images"):
            run()


def test_a_network_that_makes_a_clip_of_an_image_is_none_of_clips() -> None:
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bias = nn.Conv3d(3, 4, (1, 3, 3), 2, 1), nn.Parameter(torch.zeros(4, 2, 12, 12))

        def forward(self, x):
            return (self.conv(x.unsqueeze(2).repeat(1, 1, 2, 1, 1)) + self.bias).mean((2, 3, 4))

    assert measure_cost(Frames().eval(), (3, 24, 24)).macs > 0
    with pytest.raises(DownresError, match="give a size that it accepts"):
        measure_cost(Frames().eval(), (3, 48, 48))


def test_what_does_not_copy_is_named_and_can_be_deleted() -> None:
    model = net()
    model[1].lock = threading.Lock()
    with pytest.raises(
        DownresError, match=r"The attribute 'lock' of ReLU cannot be copied .*: delete it from the network first"
    ):
        reduce(model, resolution=24)
    del model[1].lock
    assert reduce(model, resolution=24)(torch.rand(1, 3, 48, 48)).shape == (1, 2)


def test_a_copy_shares_nothing_and_keeps_what_is_shared_inside() -> None:
    model = nn.Sequential(net(), nn.Identity())
    model[1].twin = model[0][4]
    made = copied(model)
    assert made[1].twin is made[0][4] and not {id(p) for p in made.parameters()} & {id(p) for p in model.parameters()}
    assert [name for name, _ in named_modules(model)] == [name for name, _ in model.named_modules()]


# Roots that forget their hooks when they are copied.


class OwnCopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, image):
        return self.net(image)

    def __deepcopy__(self, known):
        made = OwnCopy()
        made.net = copy.deepcopy(self.net, known)
        return made


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.fx.symbolic_trace(net()[:2]), net()[2:]

    def forward(self, image):
        return self.head(self.body(image))


def extractor():
    """torchvision's has a graph for each mode; a batch norm tells them apart."""
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, 2, 1), norm=nn.BatchNorm2d(8), rest=net()[1:]))
    return create_feature_extractor(model.eval(), {"conv": "map", "rest": "logits"})


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


FORGETFUL = {
    "fx": (lambda: torch.fx.symbolic_trace(net()), {"resolution": (24, 32)}),
    "fx, behind the stem": (lambda: torch.fx.symbolic_trace(net()), {"stem_scale": 0.5}),
    "extractor": (extractor, {"resolution": (24, 32)}),
    "own copy": (OwnCopy, {"resolution": (24, 32)}),
    "inside": (Inside, {"stem_scale": 0.5, "stem": "body"}),
}
WAYS = {
    "deepcopy": copy.deepcopy,
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "save": saved,
    "ours": copied,
    "trained": lambda model: copy.deepcopy(model).train().eval(),
}


@pytest.mark.parametrize("kind", FORGETFUL)
@torch.no_grad()
def test_a_copy_of_a_reduced_model_is_reduced(kind) -> None:
    make, how = FORGETFUL[kind]
    model, x = nn.Module.eval(make()), torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    small = reduce(model, input_size=(3, 48, 64), **how)
    assert not small.training and list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    wanted = small(x)
    if "resolution" in how:
        by_hand = nn.functional.interpolate(x, (24, 32), mode="bilinear", antialias=True)
        inside = tree_leaves(model(by_hand))
        torch.testing.assert_close(tree_leaves(wanted)[-1], inside[-1])
    macs = measure_cost(small, (3, 48, 64)).macs
    assert macs != measure_cost(model, (3, 48, 64)).macs
    for name, way in WAYS.items():
        made = way(small)
        for found, expected in zip(tree_leaves(made(x)), tree_leaves(wanted), strict=True):
            torch.testing.assert_close(found, expected, msg=name)
        assert made.downres == small.downres and not made.training and list(made.state_dict()) == list(model.state_dict())
        with pytest.raises(DownresError, match="reduced before"):
            reduce(made, resolution=24)
    assert measure_cost(copy.deepcopy(small), (3, 48, 64)).macs == macs
    for weights in (model.state_dict(), {key: 0 * value for key, value in model.state_dict().items()}):
        made = copy.deepcopy(small)
        made.load_state_dict(weights)
        again = reduce(model, input_size=(3, 48, 64), **how)
        for key, value in again.state_dict().items():
            value.copy_(weights[key])
        torch.testing.assert_close(tree_leaves(made(x)), tree_leaves(again(x)))


@pytest.mark.parametrize("kind", ["fx", "own copy"])
@torch.no_grad()
def test_a_copy_of_a_reduced_model_is_compiled_and_exported(kind) -> None:
    make, how = FORGETFUL[kind]
    x = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    small = copy.deepcopy(reduce(nn.Module.eval(make()), input_size=(3, 48, 64), **how))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), small(x))
    torch.testing.assert_close(copy.deepcopy(torch.compile(small, backend="eager"))(x), small(x))
    for strict in (False, True):
        shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
        program = torch.export.export(small, (x,), dynamic_shapes=shapes, strict=strict)
        torch.testing.assert_close(program.module()(x[:1]), small(x[:1]))


def test_hooks_of_the_users_own_go_along() -> None:
    model = torch.fx.symbolic_trace(net())
    plain = reduce(model, resolution=24)(x := torch.rand(1, 3, 48, 48))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(copy.deepcopy(reduce(model, resolution=24))(x), plain + 1)


# Channels.


class Grey(nn.Module):
    """A U-Net of two levels. extra: coordinates that it makes itself."""

    def __init__(self, channels=1, extra=0, order=False):
        super().__init__()
        if order:  # registered before, executed after
            self.out = nn.Conv2d(8, 3, 1)
        self.extra, self.first = extra, nn.Conv2d(channels + extra, 8, 3, 1, 1)
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        if not order:
            self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = torch.cat([x, x.new_zeros(len(x), self.extra, *x.shape[2:])], 1) if self.extra else x
        x = self.first(x)
        return self.out(x + self.up(self.down(x)))


@pytest.mark.parametrize(
    ("channels", "order"), [*((n, False) for n in (1, 2, 3, 4, 5, 8, 13)), (1, True), (3, True), (4, True)]
)
def test_the_first_convolution_knows_the_channels(channels, order) -> None:
    model = Grey(channels, order=order).eval()
    assert input_size_of(model) == (channels, 224, 224)
    small = reduce(model, resolution=112)
    assert small(torch.rand(1, channels, 224, 224)).shape == (1, 3, 224, 224)
    assert "logits upsample" in [change.kind for change in small.downres.changes]
    assert reduce(model, stem_scale=0.5)(torch.rand(1, channels, 224, 224)).shape == (1, 3, 224, 224)
    per_pixel = 9 * channels * 8 + 9 * 64 / 4 + 64 + 24
    assert measure_cost(model).macs == 224 * 224 * per_pixel
    found = costs(model, resolutions=[112], stem_scales=[0.5])
    assert [row.cost.input_size[1:] for row in found.rows] == [(channels, side, side) for side in (224, 112, 224)]
    p = as_model(model).preprocessing
    assert len(p.mean) == len(p.std) == channels and ("assumed" in p.source)


def test_channels_that_the_network_makes_itself_are_not_counted() -> None:
    assert input_size_of(Grey(3, extra=2)) == (3, 224, 224)


def test_the_averages_of_the_colours_serve_one_channel() -> None:
    p = as_model(Grey(1)).preprocessing
    assert p.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,)) and p.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))


def test_another_number_of_channels_is_said() -> None:
    with pytest.raises(DownresError, match=r"its first convolution takes 1 channel, give \(1, 64, 64\)"):
        measure_cost(Grey(1), (3, 64, 64))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_networks_of_other_channels_are_reduced(name) -> None:
    import timm

    kwargs = {"depth": 2} if name.startswith("vit") else {}
    model = timm.create_model(name, in_chans=1, num_classes=2, **kwargs).eval()
    side = 176 if name == "resnet10t" else 224
    assert reduce(model, resolution=128)(torch.rand(1, 1, side, side)).shape == (1, 2)
    assert reduce(model, stem_scale=0.5)(torch.rand(1, 1, side, side)).shape == (1, 2)
    assert costs(model, resolutions=[128]).rows[1].cost.input_size == (1, 1, 128, 128)
    if name.startswith("vit"):
        assert reduce(model, patch_size=32)(torch.rand(1, 1, side, side)).shape == (1, 2)


def test_the_command_line_takes_them_too(cli, tmp_path) -> None:
    (tmp_path / "grey.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def grey(): return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))\n"
        "def compiled(): return torch.compile(grey().half())\n"
    )
    for name in ("grey", "compiled"):
        rows = cli("cost", f"{tmp_path}/grey.py:{name}", "--resolution", "112", "--json").json["costs"]
        assert [row["input_size"] for row in rows] == [[1, 1, 224, 224], [1, 1, 112, 112]]
    assert load_model(f"{tmp_path}/grey.py:compiled").module[0].weight.dtype == torch.float32
