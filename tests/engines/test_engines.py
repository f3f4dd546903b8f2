"""What each engine makes of an exported network: its file, its 8 bits, what it refuses."""

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from downres.engines import engine, onnx_int8
from downres.engines.engine import Batches, Quantization, QuantizationFailed, engine_of
from downres.engines.onnxruntime import _refuse_fallback, export_onnx
from downres.errors import DownresError
from downres.measuring.footprint import footprint

SIZE = (3, 32, 32)
RNG = np.random.default_rng(0)
IMAGES = [RNG.standard_normal((4, *SIZE), dtype=np.float32) for _ in range(4)]
IMAGES[1][2, 0, 5, 7] = 40.0  # one value that no other image comes near


batches = Batches.of(IMAGES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Attention(nn.Module):
    """Patches, one block of attention written out, a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out, self.head = (
            nn.Conv2d(3, 16, 8, 8),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    return export_onnx(net, SIZE, tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(params=["onnxruntime", "openvino"])
def runs(request):
    for module in ("openvino", "nncf") if request.param == "openvino" else ():
        pytest.importorskip(module, reason="openvino and nncf come with downres[openvino]")
    return engine_of(request.param)


def made(runs, tmp_path, name="made"):
    return tmp_path / f"{name}.{runs.file.rpartition('.')[2]}"


def answers(net, batch):
    with torch.inference_mode():
        return net(torch.from_numpy(batch)).numpy()


def test_a_file_answers_as_the_network_at_any_batch(runs, net, exported, tmp_path):
    runs.write(exported, file := made(runs, tmp_path), "fp32")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in runs.files(file))
    ready = runs.load(file, 1, limit_s=30.0)
    assert (ready.inputs[0][0], ready.inputs[0][1][1:], ready.outputs) == ("input", list(SIZE), ["logits"])
    for n in (1, 3):
        (ours,) = ready(IMAGES[0][:n])
        assert ours.shape == (n, 5) and np.abs(ours - answers(net, IMAGES[0][:n])).max() < 1e-5
    with pytest.raises(DownresError, match="cannot run on"):
        ready(np.zeros((1, 4, 32, 32), np.float32))
    (tmp_path / f"broken{file.suffix}").write_bytes(b"no graph")
    with pytest.raises(DownresError, match="is not a.* model that"):
        runs.load(tmp_path / f"broken{file.suffix}", 1)


def test_eight_bits_all_but_the_head(runs, net, exported, tmp_path):
    head = net.head.weight.detach().numpy()
    runs.quantize(exported, file := made(runs, tmp_path), batches, Quantization(), head)
    found = runs.layers(file)
    assert sum(found.quantized.values()) == 2 and sum(found.in_float.values()) == 1
    assert str(found).startswith("in 8 bits: 2 Conv")
    (ours,), theirs = runs.load(file, 1, precision="int8")(IMAGES[0]), answers(net, IMAGES[0])
    assert 1e-6 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    names = runs.layer_names(exported, head)
    assert names == ["body.0.weight", "body.3.weight"]
    runs.quantize(exported, file, batches, Quantization(kept=(names[0],)), head)
    assert sum(runs.layers(file).quantized.values()) == 1
    with pytest.raises(QuantizationFailed, match="no layer nowhere"):
        runs.quantize(exported, file, batches, Quantization(kept=("nowhere",)), head)
    for ranges in ("percentile", "entropy"):
        runs.quantize(exported, file, batches, Quantization(ranges), None)
        assert sum(runs.layers(file).quantized.values()) == 3


def test_onnx_by_nncf_too(net, exported, tmp_path):
    """Another quantizer for the same runtime: as near to the network, with what is kept and the head in float."""
    pytest.importorskip("nncf", reason="nncf comes with downres[openvino]")
    runs, head = engine_of("onnxruntime"), net.head.weight.detach().numpy()
    assert runs.ranges == ("minmax", "percentile", "entropy", "nncf") and engine_of("openvino").ranges == runs.ranges[:3]
    runs.quantize(exported, file := tmp_path / "q.onnx", batches, Quantization("nncf"), head)
    assert runs.layers(file).quantized == {"Conv": 2} and sum(runs.layers(file).in_float.values()) == 1
    (ours,), theirs = runs.load(file, 1, precision="int8")(IMAGES[0]), answers(net, IMAGES[0])
    assert 1e-6 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    runs.quantize(exported, file, batches, Quantization("nncf", ("body.0.weight",)), head)
    assert runs.layers(file).quantized == {"Conv": 1}
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(1)).eval()
    exported = export_onnx(depthwise, SIZE, tmp_path / "depthwise.onnx")
    runs.quantize(exported, file, batches, Quantization("nncf"), None)
    assert np.isfinite(runs.load(file, 1, precision="int8")(IMAGES[0])[0]).all()  # one zero point an activation


def test_products_of_activations_stay_in_float(runs, tmp_path):
    torch.manual_seed(0)
    network = Attention().eval()
    exported = export_onnx(network, SIZE, tmp_path / "attention.onnx")
    runs.quantize(exported, file := made(runs, tmp_path), batches, Quantization(), network.head.weight.detach().numpy())
    found = runs.layers(file)
    assert sum(found.quantized.values()) == 3 and sum(found.in_float.values()) == 1  # of layers that have weights
    apart = np.abs(runs.load(file, 1)(IMAGES[0])[0] - answers(network, IMAGES[0]))
    assert apart.max() < 0.1


def test_logits_are_brought_to_size_in_float(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Upsample(scale_factor=8, mode="bilinear")
    )
    exported = export_onnx(network.eval(), SIZE, tmp_path / "dense.onnx")
    onnx_int8.quantize_onnx(exported, tmp_path / "q.onnx", batches, Quantization(), None)
    nodes = onnx.load(tmp_path / "q.onnx").graph.node
    (resize,) = (node for node in nodes if node.op_type == "Resize")
    assert not any(node.op_type == "QuantizeLinear" and set(node.input) & set(resize.output) for node in nodes)
    (answer,) = engine_of("onnxruntime").load(tmp_path / "q.onnx", 1)(IMAGES[0][:1])
    assert len(np.unique(answer)) > 1000 and np.abs(answer - answers(network, IMAGES[0][:1])).max() < 0.2


def test_nothing_to_quantize(runs, tmp_path):
    exported = export_onnx(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), SIZE, tmp_path / "plain.onnx")
    with pytest.raises(QuantizationFailed, match="found no layer in it that it quantizes"):
        runs.quantize(exported, made(runs, tmp_path), batches, Quantization(), None)


def test_other_weights_in_a_file(runs, net, exported, tmp_path):
    runs.write(exported, file := made(runs, tmp_path), "fp32")
    weight, bias = np.ones((5, 16), np.float32), np.arange(5, dtype=np.float32)
    assert runs.with_tensors(file, {"head.weight": weight, "head.bias": bias}, other := made(runs, tmp_path, "other"))
    with torch.inference_mode():
        features = net.body(torch.from_numpy(IMAGES[0])).mean((2, 3)).numpy()
    assert np.abs(runs.load(other, 1)(IMAGES[0])[0] - (features @ weight.T + bias)).max() < 1e-4
    assert not runs.with_tensors(file, {"nobody.weight": weight}, other)


def test_ranges_are_what_is_seen(exported, tmp_path, monkeypatch):
    """The step of an 8-bit activation is its range over 255; min-max has all of it, a percentile cuts a lonely value off."""
    steps = {}
    for ranges in ("minmax", "percentile"):
        onnx_int8.quantize_onnx(exported, tmp_path / "q.onnx", batches, Quantization(ranges), None)
        values = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "q.onnx").graph.initializer}
        steps[ranges] = float(values["input_scale"])
    seen = np.concatenate(IMAGES)
    assert steps["minmax"] == pytest.approx((seen.max() - seen.min()) / 255, rel=1e-5)
    assert steps["percentile"] < 0.75 * steps["minmax"]
    largest = {}
    for saturates in (False, True):  # sums of 16 bits hold two products of 8 by 7 bits, not of 8 by 8
        monkeypatch.setattr(onnx_int8, "sums_saturate", lambda answer=saturates: answer)
        onnx_int8.quantize_onnx(exported, tmp_path / "q.onnx", batches, Quantization(), None)
        graph = onnx.load(tmp_path / "q.onnx").graph
        weights = [numpy_helper.to_array(i) for i in graph.initializer if i.name.endswith("weight_quantized")]
        largest[saturates] = max(int(np.abs(w.astype(int)).max()) for w in weights)
    assert largest == {False: 127, True: 64}


def test_what_an_engine_has_not_is_said(monkeypatch):
    with pytest.raises(DownresError, match="Unknown runtime 'onnx': choose from onnxruntime, openvino, torch"):
        engine_of("onnx")
    with pytest.raises(DownresError, match="This onnxruntime has no cuda, it has .*cpu"):
        engine_of("onnxruntime:cuda").load(None, 1)
    with pytest.raises(DownresError, match="fell back from cuda to the CPU"):
        _refuse_fallback(["CPUExecutionProvider"], "cuda")
    with pytest.raises(DownresError, match="onnxruntime does not compute in bf16 here: on the CPU it has no bf16 kernels"):
        engine_of("onnxruntime").refuse("bf16")
    from downres.engines import torch as own

    monkeypatch.setattr(own, "processor_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(DownresError, match="torch does not compute in bf16 here: the processor has no bfloat16"):
        engine_of("torch").refuse("bf16")
    monkeypatch.setattr(own, "processor_flags", lambda: frozenset({"avx512_bf16"}))
    assert engine_of("torch").why_not("bf16") == ""
    with pytest.raises(DownresError, match="^This torch has no nowhere"):
        engine_of("torch:nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownresError, match=r"The runtime openvino is not installed: pip install 'downres\[openvino\]'"):
        engine_of("openvino")


def test_a_processor_without_vnni_adds_in_16_bits(monkeypatch):
    monkeypatch.setattr(engine.platform, "machine", lambda: "x86_64")
    for flags, saturates in (({"avx2"}, True), ({"avx2", "avx512_vnni"}, False), ({"avx_vnni"}, False)):
        monkeypatch.setattr(engine, "processor_flags", lambda flags=flags: frozenset(flags))
        assert engine.sums_saturate() is saturates
    monkeypatch.setattr(engine.platform, "machine", lambda: "aarch64")
    assert not engine.sums_saturate()


def test_bf16_in_torch_is_bf16(net, monkeypatch):
    from downres.engines.torch import TorchRuntime

    (ours,), theirs = TorchRuntime(net, 1, precision="bf16")(IMAGES[0]), answers(net, IMAGES[0])
    assert ours.dtype == np.float32 and 1e-6 < np.abs(ours - theirs).max() < 0.05
    assert next(net.parameters()).dtype == torch.float32


def test_footprint_is_that_of_a_process_of_its_own(runs, exported, tmp_path):
    runs.write(exported, file := made(runs, tmp_path), "fp32")
    held = np.zeros(2**28, np.uint8)  # which is ours, and not the file's
    held[::4096] = 1
    found = footprint(runs, file, (1, *SIZE), 1)
    assert found.file_bytes == sum(f.stat().st_size for f in runs.files(file))
    assert 0 < found.runtime_bytes <= found.peak_rss_bytes < 2**28
    large = export_onnx(nn.Conv2d(3, 64, 1), (3, 512, 512), tmp_path / "large.onnx")
    runs.write(large, other := made(runs, tmp_path, "large_made"), "fp32")
    answer = 4 * 64 * 512 * 512
    assert footprint(runs, other, (1, 3, 512, 512), 1).peak_rss_bytes > found.peak_rss_bytes + 0.8 * answer
