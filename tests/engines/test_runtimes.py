import errno
import os

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

from downres.engines import available_cores
from downres.engines.onnxruntime import NotExported, OnnxRuntime, alone_onnx, export_onnx, resize_onnx
from downres.engines.torch import TorchRuntime
from downres.errors import DownresError
from downres.recovery.features import Classifier
from downres.tasks.task import Logits

SIZE = (3, 64, 64)


def images(n, size=SIZE):
    return np.random.default_rng(n).standard_normal((n, *size), dtype=np.float32)


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(scope="module")
def small():
    """timm's smallest EfficientNet."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10).train()
    with torch.no_grad():  # running statistics of real activations, so that the logits are neither huge nor constant
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None
        model(torch.randn(8, *SIZE))
        model.classifier.weight.mul_(0.1)
    return model.eval()


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    return export_onnx(small, SIZE, tmp_path_factory.mktemp("small") / "model.onnx")


def test_onnxruntime_equals_torch_at_any_batch(small, exported):
    path = exported
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]  # weights inside
    ort, eager = OnnxRuntime(path), TorchRuntime(small)
    for n in (1, 2, 5):
        (ours,), (theirs,) = ort(images(n)), eager(images(n))
        with torch.inference_mode():
            plain = small(torch.from_numpy(images(n))).numpy()
        assert ours.shape == (n, 10) and plain.std() > 0.01
        assert np.abs(ours - plain).max() < 1e-4 and np.abs(theirs - plain).max() < 1e-4
    assert np.array_equal(ort(images(2))[0], ort(images(2))[0])
    assert np.array_equal(OnnxRuntime(path.read_bytes())(images(2))[0], ort(images(2))[0])
    spread = OnnxRuntime(path, 3, spread=True)  # fewer images than threads, as many, and a rest
    for n in (1, 2, 3, 7):
        assert np.array_equal(spread(images(n))[0], ort(images(n))[0])
    with pytest.raises(DownresError, match="cannot run on"):
        spread(images(3)[:, :2])


def test_names_and_free_batch_in_the_file(tmp_path, capfd):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny()

        def forward(self, picture):
            y = self.body(picture)
            return y, y.argmax(1)

    path = export_onnx(Two(), (3, 8, 8), tmp_path / "two.onnx", output_names=("logits", "label"))
    assert capfd.readouterr().out == ""
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["input"] and [o.name for o in graph.output] == ["logits", "label"]
    dims = graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param and [d.dim_value for d in dims[1:]] == [3, 8, 8]
    scores, label = OnnxRuntime(path, 2, spread=True)(images(3, (3, 8, 8)))
    assert scores.shape == (3, 4) and label.shape == (3,) and label.dtype == np.int64
    theirs = TorchRuntime(Two())(images(3, (3, 8, 8)))
    assert len(theirs) == 2 and theirs[1].dtype == np.int64


def test_attention_exports(tmp_path):
    model = timm.create_model("test_vit", depth=1, img_size=32, num_classes=4).eval()
    path = export_onnx(model, (3, 32, 32), tmp_path / "vit.onnx")
    batch = images(3, (3, 32, 32))
    assert np.abs(OnnxRuntime(path)(batch)[0] - TorchRuntime(model)(batch)[0]).max() < 1e-4


def test_the_users_model_keeps_its_layout_and_flags(tmp_path):
    net = tiny().train()
    TorchRuntime(net)(images(1))
    export_onnx(net, SIZE, tmp_path / "net.onnx")
    assert net.training and net[0].weight.is_contiguous()
    assert not net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_threads():
    before = torch.get_num_threads()
    runtime = TorchRuntime(tiny(), threads=1)
    seen = []
    runtime._model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    runtime(images(1))
    assert (runtime.threads, set(seen), torch.get_num_threads()) == (1, {1}, before)
    assert TorchRuntime(tiny()).threads == available_cores() <= (os.cpu_count() or 1)
    with pytest.raises(DownresError, match="from 1 to 1024 threads, 0 is"):
        TorchRuntime(tiny(), threads=0)


def test_half_precision_weights_take_and_give_float32():
    (scores,) = TorchRuntime(tiny().bfloat16())(images(1))
    assert scores.dtype == np.float32


class Output(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def test_outputs_that_are_no_tensors():
    with pytest.raises(DownresError, match="returns a dict"):
        TorchRuntime(Output(lambda x: {"out": x}))(images(1))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda x: x if x.sum() > 0 else x + 1,
            r"what it computes depends on the values of a tensor \(at test_runtimes.py, line \d+\)",
        ),
        (lambda x: x.reshape(2, -1), "the number of images is a constant"),
        (lambda x: nn.functional.adaptive_max_pool2d(x, 7), "ONNX has no operator for aten::adaptive_max_pool2d"),
        (lambda x: torch.linalg.svd(x.mean(1))[1], "ONNX has no operator for aten::_linalg_svd"),
        (lambda x: {"a": x}["b"], r"KeyError 'b' \(at test_runtimes.py, line \d+\)"),
    ],
)
def test_models_that_cannot_be_exported_say_why(make, why, tmp_path, capfd):
    with pytest.raises(
        NotExported, match=f"could not be exported to ONNX: {why}.*; `runtime='torch'` measures without"
    ) as told:
        export_onnx(Output(make), SIZE, tmp_path / "no.onnx")
    assert capfd.readouterr().out == "" and "\x1b" not in str(told.value) and "Next steps" not in str(told.value)


def test_a_full_disk_is_no_fault_of_the_network(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise RuntimeError("the exporter's own words") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(nn.Conv2d(3, 4, 1), SIZE, tmp_path / "no.onnx")


def _viewed(x):
    return x.view(len(x), -1)


def _strided(x):
    """Takes the order in memory for the order of the axes: other numbers in another layout, and no error."""
    return x.as_strided((len(x), 3 * 4), (x.stride(0), 1))


@pytest.mark.parametrize("make", [_viewed, _strided])
def test_a_network_that_does_not_stand_channels_last_runs_as_it_was_written(make):
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(2), Output(make))
    x = images(4)
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    (found,) = TorchRuntime(net)(x)
    assert np.allclose(found, expected, atol=1e-6)


def test_a_full_disk_is_no_fault_of_the_model(tmp_path):
    """A device that is always full stands for the disk."""
    (tmp_path / "model.onnx").symlink_to("/dev/full")
    with pytest.raises(OSError) as told:
        export_onnx(nn.Conv2d(3, 4, 3), (3, 8, 8), tmp_path / "model.onnx")
    assert told.value.errno == errno.ENOSPC


def test_content_that_is_not_onnx(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("hello")
    for source in (path, path.read_bytes(), tmp_path / "absent.onnx"):
        with pytest.raises(DownresError, match="is not an ONNX model"):
            OnnxRuntime(source)


class Padded(nn.Module):
    """TensorFlow's "same" padding: how much of it lies where depends on the size, and an exporter takes it for constants."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, 2)

    def forward(self, x):
        missing = max((-(-x.shape[-1] // 2) - 1) * 2 + 5 - x.shape[-1], 0)
        left, right = missing // 2, missing - missing // 2
        return self.conv(nn.functional.pad(x, (left, right, left, right))).mean((2, 3))


class Joined(nn.Module):
    """A map brought to the size of another, as a decoder does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.conv(x), x.shape[-2:]) + x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("network", "size", "same"),
    [
        (tiny, (3, 48, 40), True),
        (None, (3, 64, 96), True),  # timm's
        (Padded, (3, 48, 48), True),
        (Padded, (3, 33, 33), False),
        (Joined, (3, 48, 48), False),
    ],
)
def test_a_graph_at_another_size_is_the_one_exported_there_or_none(network, size, same, tmp_path, capfd, small, exported):
    torch.manual_seed(0)
    model = network() if network else small
    base = export_onnx(model, SIZE, tmp_path / "base.onnx") if network else exported
    assert resize_onnx(base, model, size, tmp_path / "resized.onnx") is same
    assert (tmp_path / "resized.onnx").exists() is same
    assert capfd.readouterr().err == ""
    if same:
        export_onnx(model, size, tmp_path / "own.onnx")
        found, own = OnnxRuntime(tmp_path / "resized.onnx", 1), OnnxRuntime(tmp_path / "own.onnx", 1)
        for n in (1, 3):
            assert np.array_equal(found(images(n, size))[0], own(images(n, size))[0])
        graph = onnx.load(tmp_path / "resized.onnx").graph
        assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim[1:]] == list(size)


@pytest.mark.parametrize("name", ["test_efficientnet", "vit_tiny_patch16_224"])
def test_a_graph_without_its_features_is_the_one_exported_so(name, tmp_path):
    """With another last layer; compared with an export of the whole network, node by node, and with torch."""
    kind = {"depth": 1, "img_size": 64} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=5, **kind).eval()
    head = "head" if kind else "classifier"
    export_onnx(Classifier(model, head), (3, 64, 64), tmp_path / "both.onnx", ("logits", "features"))
    linear = model.get_submodule(head)
    with torch.no_grad():
        linear.weight.normal_(std=0.1)
        linear.bias.normal_()
    numbers = [p.detach().numpy() for p in (linear.weight, linear.bias)]
    assert alone_onnx(tmp_path / "both.onnx", model, (3, 64, 64), tmp_path / "alone.onnx", "logits", *numbers)
    export_onnx(Logits(model), (3, 64, 64), tmp_path / "exported.onnx")
    alone, exported = (onnx.load(tmp_path / f"{which}.onnx").graph for which in ("alone", "exported"))
    assert [node.op_type for node in alone.node] == [node.op_type for node in exported.node]
    # Under the names that an export gives them, by which tensors of folds are put in their place.
    ours, theirs = ({i.name for i in g.initializer if not i.name.startswith("val_")} for g in (alone, exported))
    assert ours == theirs and f"model.{head}.bias" in ours
    assert [output.name for output in alone.output] == ["logits"] and "features" not in str(alone.output)
    image = np.random.default_rng(1).standard_normal((3, 3, 64, 64), dtype=np.float32)
    answers = [OnnxRuntime(tmp_path / f"{which}.onnx")(image)[0] for which in ("alone", "exported")]
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)
    # A head whose answers nearly cancel out, as those of a fitted one do on noise: rounding is that of the summands.
    noise = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    seen, _ = torch.linalg.qr(torch.from_numpy(OnnxRuntime(tmp_path / "both.onnx")(noise)[-1]).T.double())
    with torch.no_grad():
        linear.weight -= (linear.weight.double() @ seen @ seen.T).float()
        linear.bias.zero_()
    numbers = [p.detach().numpy() for p in (linear.weight, linear.bias)]
    assert alone_onnx(tmp_path / "both.onnx", model, (3, 64, 64), tmp_path / "nearly.onnx", "logits", *numbers)
    other = timm.create_model(name, num_classes=5, **kind).eval()  # with another body
    assert not alone_onnx(tmp_path / "both.onnx", other, (3, 64, 64), tmp_path / "wrong.onnx", "logits", *numbers)
    assert not (tmp_path / "wrong.onnx").exists()


class Softened(torch.nn.Module):
    """Something comes behind its last linear layer."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 4, 8, 8)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))) * 2


def test_a_graph_with_more_behind_its_last_layer_is_exported(tmp_path):
    model = Softened().eval()
    export_onnx(Classifier(model, "head"), (3, 16, 16), tmp_path / "both.onnx", ("logits", "features"))
    numbers = [p.detach().numpy() for p in (model.head.weight, model.head.bias)]
    assert not alone_onnx(tmp_path / "both.onnx", model, (3, 16, 16), tmp_path / "alone.onnx", "logits", *numbers)
