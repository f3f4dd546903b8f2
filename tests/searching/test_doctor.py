"""What is told of a network and what is not; runtimes are faked where it is their time that is told."""

import importlib
import importlib.util
import json
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import downres
from downres import Diagnosis, doctor
from downres.engines.engine import Operator, engine_of
from downres.engines.torch import TorchEngine, TorchRuntime
from downres.errors import DownresError
from downres.families import load_model, with_preprocessing
from downres.images.decode import decode
from downres.searching.design import as_model

here = importlib.import_module("downres.searching.doctor")
Way = here.Way
FAST, SLOW = 0.001, 0.02
OWN = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    return f"{file}:make"


class Sleepy:
    """A runtime that only takes time."""

    name, versions, threads = "fake", {"fake": "1"}, 2

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, batch):
        time.sleep(self.seconds)
        return (batch,)


def timed(**seconds):
    """name_precision_threads=seconds → what `precisions` and the others are given."""
    ready = {}
    for key, took in seconds.items():
        name, precision, threads = key.split("_")
        ready[Way(name, precision, int(threads))] = Sleepy(took)
    return here.time_ways(ready, (1, 2, 2), runs=8)


def of(found, about):
    return [one for one in found if one.about == about]


@pytest.fixture
def float_alone(monkeypatch):
    """Whether bfloat16 is quicker the processor decides; who looks at something else wants none of that."""
    why_not = "the processor has none"
    monkeypatch.setattr(TorchEngine, "why_not", lambda self, precision: "" if precision == "fp32" else why_not)


@pytest.mark.usefixtures("float_alone")
def test_a_size_that_does_not_fit_is_told_and_one_that_does_is_not(own):
    found = {side: doctor(own, runtimes="torch", resolution=side, threads=1, runs=6) for side in (57, 64)}
    (told,) = of(found[57].findings, "ragged")
    fits, ragged = (measured_macs(own, side) for side in (56, 57))
    assert "stride of 8" in told.text and "29, 15, 8" in told.text
    assert told.measured["fitting"] == [{"hw": [56, 56], "macs": fits}] and told.measured["macs"] == ragged
    assert told.of == "MACs" and told.gain == pytest.approx(1 - fits / ragged)
    assert of(found[64].findings, "ragged") == []
    assert found[57].input_size == (3, 57, 57) and found[57].cost.macs == ragged
    assert found[64].wastes == () and found[64].verdict == "Nothing that was looked at wastes compute here."
    assert "ragged" not in found[57].verdict and "does not fit" in found[57].verdict


def measured_macs(spec, side):
    return downres.measure_cost(load_model(spec).module, (3, side, side)).macs


def test_where_the_nearest_size_is_larger_both_are_told(own):
    model = with_preprocessing(load_model(own), resolution=62)
    (told,) = here._ragged(model, downres.measure_cost(model.module, (3, 62, 62)))
    sizes = [one["hw"] for one in told.measured["fitting"]]
    assert sizes == [[64, 64], [56, 56]] and "more MACs" in told.text and "fewer MACs" in told.text


def test_patches_that_do_not_divide_are_told_and_the_rest_is_measured_beside():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    model = with_preprocessing(as_model(vit), resolution=50)
    fitting, (told,) = here._fitting(model)
    assert fitting.preprocessing.hw == (48, 48) and "do not divide 50" in told.text and "48" in told.text
    assert here._fitting(with_preprocessing(model, resolution=64))[1] == []


class Branches(nn.Module):
    """3×3 and 1×1 side by side, which `fuse` puts together."""

    def __init__(self):
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def fuse(self):
        with torch.no_grad():
            self.wide.weight[:, :, 1:2, 1:2] += self.point.weight
            self.wide.bias += self.point.bias
        self.point = None

    def forward(self, x):
        return (self.wide(x) if self.point is None else self.wide(x) + self.point(x)).mean((2, 3))


def test_branches_for_training_are_told():
    model = with_preprocessing(as_model(Branches().eval()), resolution=32)
    cost = downres.measure_cost(model.module, (3, 32, 32))
    (told,) = here._branches(model, model.module, cost)
    assert told.measured == {"apart": 32 * 32 * 3 * 4 * 10, "together": 32 * 32 * 3 * 4 * 9} and told.gain == pytest.approx(0.1)


def test_int8_slower_faster_and_neither():
    (slower,) = here.precisions(*timed(onnxruntime_fp32_2=FAST, onnxruntime_int8_2=SLOW))
    assert slower.text.startswith("int8 is slower than fp32 in onnxruntime here: ") and 0.5 < slower.gain < 1
    low, high = slower.measured["times_as_fast"]
    assert 0 < low <= high < 1
    (faster,) = here.precisions(*timed(onnxruntime_fp32_2=SLOW, onnxruntime_int8_2=FAST))
    assert faster.text.startswith("int8 is faster than fp32 in onnxruntime here: ") and 0.5 < faster.gain < 1
    latencies, seconds = timed(onnxruntime_fp32_2=0, onnxruntime_int8_2=0)
    alike = {way: np.tile([1.0, 2.0], 4) if way.precision == "int8" else np.tile([2.0, 1.0], 4) for way in seconds}
    (neither,) = here.precisions(latencies, alike)
    assert "not seen" in neither.text and neither.gain is None


def test_int8_is_compared_with_the_fastest_float_and_with_its_own_runtime():
    found = here.precisions(*timed(openvino_fp32_2=2 * SLOW, openvino_bf16_2=FAST, openvino_int8_2=SLOW, torch_fp32_2=0))
    assert [(one.measured["runtime"], "bf16 is faster than fp32" in one.text) for one in found] == [
        ("openvino", True),
        ("openvino", False),
    ]
    assert "int8 is slower than bf16" in found[1].text


def test_a_runtime_that_is_faster_is_named_with_those_that_are_slower():
    (told,) = here.runtimes_compared(*timed(onnxruntime_fp32_2=SLOW, openvino_fp32_2=FAST, openvino_int8_2=0))
    assert told.text.startswith("openvino is faster here in fp32: ") and "in onnxruntime" in told.text and told.gain > 0.5
    assert here.runtimes_compared(*timed(onnxruntime_fp32_2=FAST)) == []


@pytest.mark.parametrize(
    ("one", "two", "four", "enough", "of_what", "words"),
    [
        (SLOW, FAST, FAST, 2, "cores", "More than 2 threads are not seen to help"),
        (FAST, SLOW, 2 * SLOW, 1, "time", "4 threads take "),
        (4 * SLOW, 2 * SLOW, FAST, 4, None, "All 4 threads help"),
    ],
)
def test_threads(one, two, four, enough, of_what, words):
    latencies, seconds = timed(torch_fp32_1=0, torch_fp32_2=0, torch_fp32_4=0)
    rounds = {way: np.full(8, took) for way, took in zip(seconds, (one, two, four), strict=True)}
    given = {way: here.described(Sleepy(0), np.zeros((1, 1, 2, 2)), rounds[way]) for way in latencies}
    (told,) = here.threads_compared(given, rounds)
    assert told.text.startswith(words) and told.measured["enough"] == enough
    assert (told.of if told.gain else None) == of_what


def test_one_thread_is_compared_with_nothing():
    assert here.threads_compared({}, {}) == []


@pytest.mark.parametrize(("seconds", "longer"), [(0.0, True), (0.2, False)])
def test_pictures_against_the_network(own, tmp_path, seconds, longer, monkeypatch):
    monkeypatch.setattr(here, "decode", lambda *given: time.sleep(0 if seconds else SLOW) or decode(*given))
    for i in range(4):
        Image.effect_noise((160, 120), 80).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    notes = []
    (told,) = here.decoding(tmp_path, load_model(own), Way("fake", "fp32", 1), Sleepy(seconds), notes)
    assert told.measured["pictures"] == 4 and f"longer for {told.measured['longer']} of 4 pictures" in told.text
    assert (told.measured["longer"] >= 2) == longer
    assert ("takes longer than the network" in told.text) == longer == (told.gain is not None)
    assert notes == ["1 of 5 pictures could not be read"]
    with pytest.raises(DownresError, match="no pictures"):
        here.decoding(tmp_path.parent / "own0", load_model(own), Way("fake", "fp32", 1), Sleepy(0), [])


def op(name, takes, in_8_bits, kind=None, converts=False, us=1.0):
    return Operator(name, kind or name, takes, in_8_bits, converts, us)


def test_float_between_8_bits():
    graph = [
        op("first", ("input",), False, "Quantize", True),
        op("conv", ("first",), True),
        op("back", ("conv",), True, "Dequantize", True),
        op("gelu", ("back",), False, "Gelu"),
        op("tanh", ("gelu",), False, "Tanh"),
        op("again", ("tanh",), False, "Quantize", True),
        op("last", ("again", "conv"), True, us=5.0),
        op("softmax", ("last",), False, "Softmax"),  # nothing in 8 bits comes after it
    ]
    (told,) = here.in_float("onnxruntime", graph)
    assert told.measured["operators"] == {"Gelu": 1, "Tanh": 1} and told.gain == pytest.approx(4 / 12)
    assert here.in_float("onnxruntime", [one for one in graph if one.name not in ("gelu", "tanh", "again")]) == []


def test_onnxruntime_and_openvino_as_they_are(own):
    """Both, once: what is told is of numbers that were measured, in strict JSON, the largest gain first."""
    pytest.importorskip("openvino", reason="openvino and nncf come with downres[openvino]")
    found = doctor(own, runtimes="onnxruntime,openvino", resolution=64, threads=1, runs=6)
    assert {(one.runtime, one.precision) for one in found.timings} >= {
        (runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in ("fp32", "int8")
    }
    assert all(one.latency.latency_ms > 0 and one.latency.threads == 1 for one in found.timings)
    gains = [one.gain for one in found.findings]
    assert gains == sorted(gains, key=lambda gain: -(gain or 0))
    compared = {one.measured["runtime"] for one in of(found.findings, "precision") if "int8" in one.measured}
    assert compared == {"onnxruntime", "openvino"}
    kinds = {one.measured["runtime"]: one.measured["operators"] for one in of(found.findings, "float")}
    assert "HardSigmoid" in kinds["onnxruntime"] and "Sigmoid" not in kinds["onnxruntime"]  # SiLU's runs in 8 bits there
    assert "Subgraph" in kinds["openvino"]
    assert any("noise" in note for note in found.notes)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Diagnosis.from_json(document) == found and document["verdict"] == found.verdict


class Unexported(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return x.mean((2, 3)) * (2.0 if float(x.abs().sum()) > 0 else 1.0)


def test_what_cannot_be_exported_is_timed_in_torch(tmp_path):
    ways = here._Ways(Unexported().eval(), (3, 32, 32), ["onnxruntime"], 1, tmp_path)
    told = ways.make()
    assert "cannot be exported to ONNX (what it computes depends on" in told[0].text and told[0].gain is None
    assert next(iter(ways.ready)) == Way("torch", "fp32", 1)


def test_what_does_not_run_here_is_a_finding(tmp_path, monkeypatch):
    def load(self, engine, exported, precision, threads=None):
        if precision == "bf16":
            raise DownresError("OpenVINO computes in f32 here and not in bf16: leave that precision out.")
        return TorchRuntime(nn.Flatten(), 1)

    monkeypatch.setattr(here._Ways, "_load", load)
    monkeypatch.setattr(engine_of("torch").__class__, "why_not", lambda self, precision: "" if precision != "int8" else "no")
    ways = here._Ways(nn.Flatten(), (3, 8, 8), ["torch", "torch:nowhere"], 1, tmp_path)
    texts = [one.text for one in ways.make()]
    assert any("This torch has no nowhere" in text for text in texts)
    assert any("bf16 does not run in torch here: OpenVINO computes in f32 here" in text for text in texts)
    assert any("Nothing here computes in int8: torch: no." == text for text in texts)
    monkeypatch.setattr(here._Ways, "_load", lambda *_: (_ for _ in ()).throw(DownresError("it fails.")))
    with pytest.raises(DownresError, match="it fails"):
        here._Ways(nn.Flatten(), (3, 8, 8), ["torch"], 1, tmp_path).make()


@pytest.mark.usefixtures("float_alone")
def test_command(cli, own, tmp_path):
    done = cli("doctor", own, "--runtime", "torch", "--resolution", "57", "--threads", "1", "--json")
    assert done.json["findings"][0]["about"] == "ragged" and done.json["input_size"] == [3, 57, 57]
    done = cli("doctor", own, "--runtime", "torch", "--resolution", "57", "--threads", "1")
    assert done.code == 0 and "does not divide 57 px" in done.out and "torch" in done.out and "Python" in done.out
    for wrong, words in (
        (["--runtime", "tensorrt"], "Unknown runtime 'tensorrt'"),
        (["--runtime", "torch", "--data", tmp_path / "none"], "There is no folder"),
        (["--resolution", "57,64"], "--resolution is one resolution"),
        (["--threads", "0"], "A runtime has from 1"),
    ):
        done = cli("doctor", own, *wrong)
        assert done.code == 2 and words in done.err and done.out == ""


def test_a_runtime_that_is_not_installed_is_refused_where_it_is_named(own, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(DownresError, match="The runtime openvino is not installed"):
        doctor(own, runtimes="openvino")
    assert here._named(None) == (("onnxruntime", "torch"), ["openvino is not installed and was not timed"])


def test_too_few_rounds_are_refused(own):
    with pytest.raises(DownresError, match="6 rounds"):
        doctor(own, runs=5)
