"""MODEL as a user writes it: library names, files, weights, and one clear sentence where it cannot be."""

import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from downres.errors import DownresError
from downres.families import Model, load_model, with_preprocessing
from downres.families import timm as timm_family
from downres.families import torchvision as torchvision_family
from downres.families.find import find_adapter
from downres.families.generic import preprocessing as assumed
from downres.records import Preprocessing


def seen(model, size=64):
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


# --- names --------------------------------------------------------------------------------------------------------


def test_timm():
    model = load_model("timm:resnet18", pretrained=False)
    assert isinstance(model.module, timm.models.ResNet) and not model.module.training
    assert (model.spec, model.weights, model.num_classes) == ("timm:resnet18", "as the module came", None)
    assert model.preprocessing == Preprocessing(
        224, 0.95, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "timm pretrained_cfg"
    )
    assert model.fingerprint() == model.fingerprint() != load_model("timm:resnet18", pretrained=False).fingerprint()
    tagged = load_model("timm:resnet18.tv_in1k", pretrained=False, num_classes=7)
    assert (tagged.preprocessing.crop_ratio, tagged.preprocessing.interpolation) == (0.875, "bilinear")
    assert seen(tagged.module).shape == (2, 7) and tagged.num_classes == 7


def test_torchvision_vits_are_built_for_their_weights():
    """vit_h_14 has weights for 518 px; whatever grid a file's positions have is followed, and so is what goes with it."""
    with torch.device("meta"):
        model = load_model("torchvision:vit_h_14", pretrained=False)
        other = torchvision.models.vit_b_16(image_size=384).state_dict()
        followed = torchvision.models.vit_b_16()
        torchvision_family.follow(followed, other)
    published = torchvision.models.ViT_H_14_Weights.DEFAULT.meta
    assert sum(p.numel() for p in model.module.parameters()) == published["num_params"]
    assert model.preprocessing.resolution == model.module.image_size == find_adapter(model.module).image[0] == 518
    assert {k: v.shape for k, v in followed.state_dict().items()} == {k: v.shape for k, v in other.items()}
    found = torchvision_family.preprocessing(followed, "vit_b_16")
    assert (found.resolution, found.crop_ratio, found.interpolation) == (384, 1.0, "bicubic")  # as torchvision's 384 px weights
    with torch.device("meta"):
        assert torchvision_family.preprocessing(torchvision.models.vit_b_16(image_size=32), "vit_b_16").resolution == 32


def test_torchvision():
    model = load_model("torchvision:mobilenet_v3_small", pretrained=False)
    assert isinstance(model.module, torchvision.models.MobileNetV3) and not model.module.training
    assert model.preprocessing == Preprocessing(224, 224 / 256, source="torchvision weight transforms")
    assert seen(model.module).shape == (2, 1000)
    assert seen(load_model("torchvision:mobilenet_v3_small", pretrained=False, num_classes=7).module).shape == (2, 7)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads(name):
    """They return bare logits, and scale their input as the published weights expect."""
    model = load_model(f"torchvision:{name}", pretrained=False, num_classes=5)
    assert seen(model.module, 96).shape == (2, 5)
    assert model.module.transform_input and getattr(model.module, "aux_logits", False) is False


def test_preprocessing_of_every_library_model():
    for name in torchvision_family.names():
        transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        found = torchvision_family.preprocessing(nn.Identity(), name)
        if not hasattr(transform, "crop_size"):  # segmentation
            assert (found.resolution, found.fit, found.crop_ratio) == (transform.resize_size[0], "pad", 1.0)
            continue
        assert found.hw == (transform.crop_size[0],) * 2
        assert int(found.hw[0] / found.crop_ratio + 1e-6) == transform.resize_size[0], name
    for name in timm.list_models(pretrained=True):
        config = timm.models.get_pretrained_cfg(name).to_dict()
        found = timm_family.preprocessing(SimpleNamespace(pretrained_cfg=config), name)
        assert found.hw == config["input_size"][1:] and found.mean == config["mean"] and found.std == config["std"]
        assert found.crop_ratio == min(config["crop_pct"], 1.0)
        followed = found.crop_ratio == config["crop_pct"] and found.interpolation == config["interpolation"]
        assert (found.source == "timm pretrained_cfg") == (followed and config["crop_mode"] == "center"), name


@pytest.mark.parametrize(
    ("changed", "source"),
    [
        ({}, "timm pretrained_cfg"),
        ({"crop_mode": "squash"}, "timm pretrained_cfg (crop mode 'squash' not followed: centre crop)"),
        ({"interpolation": "lanczos"}, "timm pretrained_cfg (interpolation 'lanczos' not followed: bicubic)"),
        (
            {"crop_mode": "border", "crop_pct": 1.15},
            "timm pretrained_cfg (crop mode 'border' not followed: centre crop; crop_pct 1.15 not followed: 1)",
        ),
    ],
)
def test_what_of_timm_is_not_followed_is_said(changed, source):
    config = timm.models.get_pretrained_cfg("resnet18").to_dict() | changed
    assert timm_family.preprocessing(SimpleNamespace(pretrained_cfg=config), "resnet18").source == source


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("timm:resnet-18", "resnet18"),
        ("timm:ResNet18", "resnet18"),
        ("timm:resnet81", "resnet18"),
        ("timm:mobilenet_v3_small", "mobilenetv3_small_"),
        ("timm:resnet18d_.a1_in1k", "resnet18d"),
        ("torchvision:resnet81", "resnet18"),
        ("torchvision:mobilenetv3_small", "mobilenet_v3_small"),
        ("torchvision:efficientnetb0", "efficientnet_b0"),
        ("torchvision:zzzz", "torchvision knows 86 names"),
        ("timm:resnet18.a9_in1k", "it has .*a1_in1k"),
        ("torchvision:resnet18.a1_in1k", "give torchvision:resnet18"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_unknown_names_suggest_the_nearest(spec, near, pretrained):
    family, _, name = spec.partition(":")
    with pytest.raises(DownresError, match=rf"^{family} has no .*'.*: .*{near}"):
        load_model(spec, pretrained=pretrained)


@pytest.mark.parametrize("spec", ["", "resnet18", "timm:", "tim:resnet18", "torchvision", "model.py", "model.pt:make", ":"])
def test_malformed_models(spec):
    with pytest.raises(DownresError, match="Cannot read the model .*: give timm:NAME, torchvision:NAME or path/to/file.py:"):
        load_model(spec)


@pytest.mark.parametrize("error", [OSError("No route to host\nand 40 more lines"), RuntimeError(), ValueError("x" * 4000)])
@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_no_network(monkeypatch, family, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(timm, "create_model", fails)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fails)
    start = time.perf_counter()
    with pytest.raises(DownresError) as caught:
        load_model(f"{family}:resnet18")
    assert time.perf_counter() - start < 5
    text = str(caught.value)
    assert text.startswith(f"The pretrained weights of {family}:resnet18 could not be fetched (")
    assert text.endswith("): give a file with `weights`.") and "\n" not in text and len(text) < 250


def test_pretrained(monkeypatch):
    """The library's weights reach the model, in eval mode, and are named as such."""
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: theirs)
    model = load_model("torchvision:resnet18")
    assert all(torch.equal(v, theirs[k]) for k, v in model.module.state_dict().items())
    assert model.weights == "the library's pretrained weights" and not model.module.training


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18", "timm:mobilenetv3_small_050"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_bring_their_number_of_classes(tmp_path, spec, suffix):
    torch.manual_seed(0)
    trained = load_model(spec, pretrained=False, num_classes=7).module
    file = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"model": {f"module.{k}": v for k, v in trained.state_dict().items()}}, file)
    else:
        save_file(trained.state_dict(), file)
    model = load_model(spec, file)
    assert model.num_classes == 7 and model.weights.startswith(f"w.{suffix}, matched by name")
    assert not model.module.training
    assert torch.equal(seen(model.module), seen(trained))
    assert torch.equal(seen(load_model(spec, str(file), num_classes=7).module), seen(trained))


def test_weights_of_as_many_classes(tmp_path):
    torch.manual_seed(0)
    trained = torchvision.models.mobilenet_v3_small().eval()
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = load_model("torchvision:mobilenet_v3_small", tmp_path / "w.pth")
    assert torch.equal(seen(model.module), seen(trained))


def test_weights_that_do_not_fit(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "w.pth")
    with pytest.raises(DownresError, match="for another network: .*check the model's name"):
        load_model("timm:mobilenetv3_small_050", tmp_path / "w.pth")
    with pytest.raises(DownresError, match="check the model's name"):
        load_model("torchvision:resnet50", tmp_path / "w.pth")
    torch.save(timm.create_model("mobilenetv3_small_075", num_classes=3).state_dict(), tmp_path / "w.pth")
    with pytest.raises(DownresError, match="The weights have shape .* the file belongs to another width"):
        load_model("timm:mobilenetv3_small_050", tmp_path / "w.pth")
    with pytest.raises(DownresError, match="There is no weights file .*none.pth: give"):
        load_model("timm:resnet18", tmp_path / "none.pth")


# --- a file of the user's -----------------------------------------------------------------------------------------

FILE = """
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.fc = nn.Linear(WIDTH, 5)
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def make():
    return Net()

def with_config():
    net = Net()
    net.pretrained_cfg = {"input_size": (3, 96, 96), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.25,) * 3,
                          "interpolation": "bilinear"}
    return net

def number():
    return 3

def fails():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    raise SystemExit(1)

def needs(x):
    return Net()

value = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "users_net.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    before = list(sys.path)
    yield tmp_path / "users_net.py"
    assert sys.path == before
    for name in ("users_net", "beside", "broken_net"):
        sys.modules.pop(name, None)


def test_file(file):
    model = load_model(f"{file}:make")
    assert seen(model.module).shape == (2, 5) and not model.module.training and model.weights == "as the module came"
    assert model.preprocessing.resolution == 224 and model.preprocessing.source.startswith("assumed: ")
    assert seen(load_model(f"{file}:Net").module).shape == (2, 5)
    own = load_model(f"{file}:with_config").preprocessing
    assert (own.resolution, own.crop_ratio, own.interpolation, own.mean) == (96, 0.9, "bilinear", (0.5,) * 3)


def test_file_with_weights(file, tmp_path):
    torch.manual_seed(0)
    trained = load_model(f"{file}:make").module
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    model = load_model(f"{file}:make", tmp_path / "w.safetensors")
    assert torch.equal(seen(model.module), seen(trained)) and model.weights == "w.safetensors, matched by name"
    save_file(nn.Conv2d(3, 3, 3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(DownresError, match="for another network"):
        load_model(f"{file}:make", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("mak", r"has no function 'mak': it has Net, make, with_config"),
        ("", r"has no function ''"),
        ("value", r"has no function 'value'"),
        ("number", r"number\(\) in .* must return a torch.nn.Module, it returned int"),
        ("fails", r"fails\(\) in .* failed \(RuntimeError: first line\): correct the file\.$"),
        ("leaves", r"leaves\(\) in .* failed \(SystemExit: 1\)"),
        ("needs", r"needs\(\) in .* failed \(TypeError: .*missing 1 required"),
    ],
)
def test_functions_that_do_not_do(file, function, says):
    with pytest.raises(DownresError, match=says) as caught:
        load_model(f"{file}:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError.*: correct the file"),
        ("import no_such_package_x", "ModuleNotFoundError.*: install it"),
        ("raise SystemExit", "SystemExit: no message.*: correct the file"),
    ],
)
def test_files_that_do_not_run(file, text, says):
    broken = file.with_name("broken_net.py")
    broken.write_text(text)
    with pytest.raises(DownresError, match=f"Running .*broken_net.py failed .{says}"):
        load_model(f"{broken}:make")
    with pytest.raises(DownresError, match="There is no file .*absent.py: give the model as path/to/file.py:function"):
        load_model(f"{file.with_name('absent.py')}:make")


# --- preprocessing ------------------------------------------------------------------------------------------------


def test_with_preprocessing():
    model = Model(nn.Identity(), Preprocessing(224, 0.875, source="there"))
    assert with_preprocessing(model) is model
    other = with_preprocessing(model, resolution=(96, 128), std=(0.5,) * 3, interpolation="bicubic")
    assert other.preprocessing == Preprocessing(
        (96, 128), 0.875, "bicubic", std=(0.5,) * 3, source="there; resolution, std, interpolation given"
    )
    assert model.preprocessing.resolution == 224 and other.module is model.module
    with pytest.raises(DownresError, match="crop ratio"):
        with_preprocessing(model, crop_ratio=2.0)


def test_mean_and_std_go_with_their_scale():
    """Numbers of other pixels than the network gets would make a picture of nothing, and nobody would say so."""
    model = Model(nn.Identity(), Preprocessing(224))
    caffe = {"mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395)}
    given = with_preprocessing(model, scale=1, channel_order="bgr", antialias=False, **caffe).preprocessing
    assert (given.scale, given.channel_order, given.antialias, given.mean) == (1, "bgr", False, caffe["mean"])
    assert given.source == "given; mean, std, channel_order, scale, antialias given"
    with pytest.raises(DownresError, match="the model's are for another scale: give `mean` and `std` with `scale`"):
        with_preprocessing(model, scale=1)
    with pytest.raises(DownresError, match="A mean of 123.675 is above every pixel, which are 0 to 1"):
        with_preprocessing(model, **caffe)
    with pytest.raises(DownresError, match="A mean of 0.485 and a std of 0.229 are nothing beside pixels of 0 to 255"):
        with_preprocessing(model, scale=1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert with_preprocessing(model, scale=1, mean=(0.0,) * 3, std=(1.0,) * 3).preprocessing.scale == 1
    other = Model(nn.Identity(), given)
    with pytest.raises(DownresError, match="takes pixels of 0 to 255, .* give `scale` with them, 1 or 1/255"):
        with_preprocessing(other, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert with_preprocessing(other, mean=(0.5,) * 3, std=(0.5,) * 3, scale=1 / 255).preprocessing.scale == 1 / 255
    assert with_preprocessing(other, resolution=96).preprocessing.scale == 1


def test_assumed_preprocessing():
    assert assumed(nn.Identity()).source.startswith("assumed: ImageNet's mean and std")
    assert assumed(timm.create_model("test_vit")).resolution == 160


def test_a_library_is_imported_where_a_network_of_it_is_asked_for():
    """Each takes a second or more. A plain convnet needs none of them, one of torchvision's not timm."""
    code = """
        import sys
        from torch import nn
        from downres import load_model, reduce
        libraries = {"timm", "torchvision", "transformers", "segmentation_models_pytorch", "sklearn", "scipy", "plotly"}
        reduce(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), resolution=64)
        print(sorted(libraries & sys.modules.keys()))
        reduce(load_model("torchvision:resnet18", pretrained=False).module, resolution=64)
        print(sorted(libraries & sys.modules.keys()))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n['torchvision']\n"
