"""Searches over precisions and runtimes: the file that ships is what was judged."""

import dataclasses
import json
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from downres import Axes, Budget, Candidate, check, curve, evaluate, load_model, load_run, recover, reduce, search
from downres.engines import onnx_int8
from downres.engines.engine import QuantizationFailed
from downres.engines.torch import TorchRuntime
from downres.errors import DownresError
from downres.images import preprocess
from downres.records import TOO_FEW, WITHIN, Latency, Preprocessing, Recovery
from downres.recovery import ladder
from downres.recovery.ladder import climb
from downres.recovery.state import QUANTIZED, RECALIBRATED, Step
from downres.searching.select import over_budget
from downres.tasks import Task

LATENCY = Latency(1.0, 1.0, 1.0, 30, 1, "torch", 1, "a processor")
OPTIONS = {"stem_scales": (), "max_drop": 60.0, "threads": 1, "fit_head": True}


@pytest.fixture(scope="module")
def loaded(tiny_file, tiny_preprocessing):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)


@pytest.fixture(scope="module")
def both(loaded, cells, tmp_path_factory):
    """A run over two resolutions, two precisions and two runtimes."""
    pytest.importorskip("nncf", reason="openvino and nncf come with downres[openvino]")
    out = tmp_path_factory.mktemp("bits") / "run"
    options = {"resolutions": [32], "precisions": "fp32,int8", "runtime": "onnxruntime,openvino", "max_flips": 50.0}
    return search(loaded, cells.dataset(), out=out, **options, **OPTIONS)


def test_each_with_each(both):
    """Every precision and every runtime with every other candidate, the original's resolution too."""
    texts = [f"{size}{bits}{runtime}" for size in ("48", "32") for bits in ("", " int8") for runtime in ("", " openvino")]
    assert [str(r.candidate) for r in both.results] == texts[1:] and both.settings["minimize"] == "latency"
    for r in (both.original, *both.results):
        assert r.latency.runtime == (r.candidate.runtime or "onnxruntime")
        assert Candidate.parse(str(r.candidate)) == r.candidate == Candidate.from_json(r.candidate.to_json())
        row = r.row()
        assert (row["precision"], row["runtime"]) == (r.candidate.precision, r.latency.runtime)
        assert row["file_bytes"] == r.footprint.file_bytes > 1000 and r.cost.macs == both_macs(both, r.candidate)
    assert str(both.best.candidate) == str(
        min((r for r in both.results if r.proven), key=lambda r: r.latency.latency_ms).candidate
    )


def both_macs(run, candidate):
    """Of the network in float: what a file makes of it are no other multiplications."""
    return next(r.cost.macs for r in (run.original, *run.results) if r.candidate == candidate.network)


def test_flips_are_counted_one_by_one(both, cells, loaded):
    """From the stored answers, and their bound from the binomial distribution itself."""
    from scipy.stats import binom

    stored = {f.name.split("-")[0]: np.load(f) for f in (both.folder / "predictions").glob("*.npz")}
    dataset = cells.dataset()
    labels = dataset.labels[dataset.folds[0].test]
    before = stored["48"]["predicted"]
    measured = [r for r in both.results if r.status == "measured"]
    assert len(measured) >= 5  # in float32 one runtime may be slower than the first beyond doubt, at two sizes
    for r in measured:
        after, flips = stored[str(r.candidate).replace(" ", "_")]["predicted"], r.flips
        assert flips.flips == int((before != after).sum()) and flips.n == len(labels)
        assert flips.lost == int(((before == labels) & (after != labels)).sum()) == r.drop.lost
        assert flips.won == int(((before != labels) & (after == labels)).sum()) == r.drop.won
        # Of the bound's share as few flips are seen once in 20 times their number, the level of each candidate.
        level = 0.05 / len(measured)
        assert binom.cdf(flips.flips, flips.n, flips.upper / 100) == pytest.approx(level, rel=1e-3)
        assert flips.verdict == (WITHIN if flips.upper < 50 else flips.verdict)


def test_what_ships_is_the_file_that_was_judged(loaded, cells, tiny_file, tmp_path):
    """Its answers, by ONNX Runtime alone, are right as often as stated; and a file of other scales is noticed."""
    dataset = cells.dataset()
    run = search(loaded, dataset, resolutions=[], candidates=["32 int8"], out=tmp_path / "run", **OPTIONS)
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert manifest["runtime"]["precision"] == "int8" and manifest["runtime"]["layers"]["quantized"] == {"Conv": 2}
    assert manifest["runtime"]["layers"]["in_float"] == {"Gemm": 1}
    assert any("brought to 8 bits on 60 images" in told for told in manifest["source"]["model"]["changed"])
    session = onnxruntime.InferenceSession(run.artifact / "model.onnx", providers=["CPUExecutionProvider"])
    p = Preprocessing.from_json(manifest["preprocessing"])
    test = dataset.folds[0].test
    batch = np.stack([preprocess(dataset.images[int(i)], p).numpy() for i in test])
    right = int((session.run(None, {"input": batch})[0].argmax(1) == dataset.labels[test]).sum())
    assert right == manifest["result"]["quality"]["correct"]
    assert [f.ok for f in check(run.artifact, model=f"{tiny_file}:make", data=dataset)] == [True] * 5
    assert load_run(run.folder).best.candidate == Candidate(32, precision="int8")
    again = search(loaded, dataset, resolutions=[], candidates=["32 int8"], out=run.folder, **OPTIONS)
    assert [r.to_json() for r in again.results] == [r.to_json() for r in run.results]


def test_a_broken_quantizer_is_refused(loaded, cells, tmp_path, monkeypatch):
    """One layer's scale four times too large: what is judged is the file, so nothing of it is shipped."""
    good = onnx_int8.quantize_static

    def broken(source, path, *arguments, **options):
        good(source, path, *arguments, **options)
        graph = onnx.load(path)
        for one in graph.graph.initializer:
            if one.name.endswith("body.3.weight_scale"):
                one.CopyFrom(numpy_helper.from_array(4 * numpy_helper.to_array(one), one.name))
        onnx.save(graph, path)

    options = {**OPTIONS, "resolutions": [], "candidates": ["32 int8"], "rungs": (), "max_drop": 30.0}
    assert search(loaded, cells.dataset(), out=tmp_path / "sound", **options).best is not None
    monkeypatch.setattr(onnx_int8, "quantize_static", broken)
    run = search(loaded, cells.dataset(), out=tmp_path / "broken", **options)
    assert run.best is None and run.artifact is None
    assert all(r.quality.score < run.original.quality.score for r in run.results)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_cross_fitted_files_are_checked_fold_by_fold(runtime, loaded, cells, tiny_file, tmp_path):
    """A fold's ranges come from images that it does not prove on: one fold has a file of its own."""
    if runtime == "openvino":
        pytest.importorskip("nncf", reason="openvino and nncf come with downres[openvino]")
    dataset = cells.dataset(2)
    run = search(
        loaded, dataset, resolutions=[], candidates=["24 int8"], runtime=runtime, rungs=("head",),
        out=tmp_path / "run", **OPTIONS,
    )  # fmt: skip
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert manifest["runtime"]["name"] == runtime and [f.get("stem") for f in manifest["folds"]] == ["fold0", None]
    findings = check(run.artifact, model=f"{tiny_file}:make", data=dataset)
    assert [f.ok for f in findings] == [True] * 5, findings
    fold = run.artifact / f"fold0.{'onnx' if runtime == 'onnxruntime' else 'bin'}"
    content = bytearray(fold.read_bytes())
    content[len(content) // 2] ^= 255
    fold.write_bytes(content)
    assert "changed: fold0" in check(run.artifact, model=f"{tiny_file}:make", data=dataset)[0].detail


def test_rungs_of_files(loaded, cells, tmp_path, monkeypatch):
    """Other ranges, the head on quantized features, the most sensitive layers in float: until the drop is within, or all are
    tried."""
    monkeypatch.setattr(ladder._Ladder, "is_over", lambda self: True)
    run = search(
        loaded, cells.dataset(), resolutions=[], candidates=["24 int8"], rungs=("ranges", "head", "layers"),
        out=tmp_path / "run", **{**OPTIONS, "max_drop": 0.0},
    )  # fmt: skip
    for r in run.results:
        tried = [(rung.rung, rung.note) for rung in r.recovery.tried]
        ways = ["percentile ranges", "entropy ranges", "nncf ranges"]
        assert [name for name, _ in tried] == ["none", "head", *["ranges"] * 3, "layers"]
        assert [note for _, note in tried[2:5]] == ways
        assert tried[5][1] in ("in float: body.0.weight", "in float: body.3.weight")
    assert run.artifact is None and "layers in float" in (run.folder / "report.html").read_text()


def test_a_way_to_quantize_that_fails_is_left_out(loaded, cells, tmp_path, monkeypatch):
    real = onnx_int8._by_nncf

    def fails(*arguments):
        real(*arguments)
        raise QuantizationFailed("NNCF cannot quantize it (for a reason).")

    monkeypatch.setattr(onnx_int8, "_by_nncf", fails)
    monkeypatch.setattr(ladder._Ladder, "is_over", lambda self: True)
    options = {**OPTIONS, "max_drop": 0.0, "rungs": ("ranges",)}
    run = search(loaded, cells.dataset(), resolutions=[], candidates=["24 int8"], out=tmp_path / "run", **options)
    tried = run.results[0].recovery.tried
    assert run.results[0].status == "measured"
    assert tried[-1].note == "nncf: NNCF cannot quantize it (for a reason)" and tried[-1].score is None


def test_layers_in_float_are_timed_again(loaded, cells, tmp_path, monkeypatch):
    """The file whose quality is stated is the one whose time and bytes are."""
    from downres.searching import folds as folds_module

    def keeps_a_layer(task, bank, candidate, reference, budget, rungs, like):
        state, recovery = climb(task, bank, candidate, reference, budget, (), like)
        name = bank.engine(candidate).layer_names(bank.onnx(state.network), bank.head_weight(state))[0]
        step = state.step(QUANTIZED)
        return state.without(QUANTIZED).then(
            dataclasses.replace(step, how=dataclasses.replace(step.how, kept=(name,)))
        ), recovery

    monkeypatch.setattr(folds_module, "climb", keeps_a_layer)
    options = {"resolutions": [], "candidates": ["32 int8"], **OPTIONS}
    run = search(loaded, cells.dataset(), out=tmp_path / "run", **options)
    log = [json.loads(line) for line in (run.folder / "measurements.jsonl").read_text().splitlines()]
    first = next(e["value"] for e in log if e["key"] == "footprint")["32 int8"]
    again = next(e["value"] for e in log if e["key"] == "footprint/32 int8")
    assert run.results[0].footprint.file_bytes == again["file_bytes"] != first["file_bytes"]
    assert run.results[0].latency.to_json() == next(e["value"] for e in log if e["key"] == "latency/32 int8")
    assert json.loads((run.artifact / "manifest.json").read_text())["runtime"]["layers"]["in_float"] == {"Conv": 1, "Gemm": 1}


def test_ceilings_on_bytes_and_answers(loaded, cells, tmp_path):
    options = {"resolutions": [32], "candidates": ["32 int8"], "rungs": (), **OPTIONS}
    run = search(loaded, cells.dataset(), out=tmp_path / "bytes", max_size_bytes=16_000, **options)
    assert {str(r.candidate): r.reason.split(" is over")[0] for r in run.results if r.status == "stopped"} == {
        "32": f"a file of {run.results[0].footprint.file_bytes / 1000:.3g} kB"
    }
    run = search(loaded, cells.dataset(), out=tmp_path / "answers", max_flips=0.5, **options)
    assert run.best is None and all(r.drop.verdict == WITHIN and r.flips.verdict != WITHIN for r in run.results)
    assert "another answer on at most 0.5 % of the images" in (run.folder / "report.html").read_text()


def test_too_few_images_stop_that_file_alone(loaded, cells, tmp_path):
    few = dataclasses.replace(cells, pictures=cells.pictures[:24], labels=cells.labels[:24])
    run = search(loaded, few.dataset(), resolutions=[32], candidates=["32 int8"], out=tmp_path / "run", **OPTIONS)
    said = {str(r.candidate): (r.status, r.reason) for r in run.results}
    assert said["32"][0] == "measured"
    assert said["32 int8"][1].startswith("int8 is calibrated on at least 16 training images, there are 9")


def test_bad_input_is_one_sentence(loaded, cells, tmp_path):
    for text, said in (("32 int8", "makes a network of float32"), ("32 openvino", "makes a torch network")):
        with pytest.raises(DownresError, match=f"`reduce` {said}"):
            reduce(loaded.module, Candidate.parse(text), input_size=(3, 48, 48))
    with pytest.raises(DownresError, match="A precision is one of fp32, bf16, fp16, int8; 'int4' is none of them"):
        Axes(precisions="int4")
    with pytest.raises(DownresError, match="max_flips is a percentage of images above 0"):
        Budget(max_flips=0)
    with pytest.raises(DownresError, match="A curve looks at no training images"):
        curve(loaded, cells.dataset(), [32], precisions="int8")
    with pytest.raises(DownresError, match="`recover` gives a torch network, 32 int8 is a file of one"):
        recover(loaded, cells.dataset(), Candidate(32, precision="int8"))
    with pytest.raises(DownresError, match="One runtime at a time is measured here"):
        evaluate(loaded, cells.dataset(), runtime="torch,onnxruntime")
    with pytest.raises(DownresError, match="Unknown runtime 'onnx'"):
        search(loaded, cells.dataset(), runtime="onnx", out=tmp_path / "run")


def test_evaluated_where_it_is_said(tiny_file, tiny_preprocessing, cells):
    """A head of its own numbers, so that there is something to agree on."""
    pytest.importorskip("nncf", reason="openvino and nncf come with downres[openvino]")
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    scores = [evaluate(model, cells.dataset(), runtime=runtime, threads=1) for runtime in ("torch", "openvino")]
    assert scores[0] == scores[1] and scores[0].n == 80


def test_precisions_that_the_machine_has_not_stop_alone(loaded, cells, tmp_path, monkeypatch):
    from downres.engines.onnxruntime import OnnxEngine

    monkeypatch.setattr(OnnxEngine, "why_not", lambda self, precision: "it was built without" if precision == "bf16" else "")
    run = search(loaded, cells.dataset(), resolutions=[32], precisions="fp32,bf16", out=tmp_path / "run", **OPTIONS)
    said = {str(r.candidate): r.reason for r in run.results}
    assert said["32"] == "" and said["32 bf16"] == "onnxruntime does not compute in bf16 here: it was built without"


def test_masks_cross_fitted_in_8_bits(segmenter, shapes, tmp_path):
    """What ships after cross-fitting is a file of 8 bits, and not the float one under its name."""
    root = shapes.write(tmp_path / "data", train=0, val=40, sizes=((48, 64),))
    options = {"folds": 2, "candidates": ["36x48 int8"], "resolutions": [], "stem_scales": (), "rungs": (), "max_drop": 90.0}
    run = search(segmenter(), root, out=tmp_path / "run", threads=1, **options)
    served = json.loads((run.artifact / "manifest.json").read_text())["runtime"]
    assert served["layers"]["quantized"] and served["distance"] > 1e-6
    assert served["file_bytes"] == (run.artifact / "model.onnx").stat().st_size
    assert check(run.artifact, model=segmenter())[3].ok


def test_what_cannot_be_counted_is_refused(loaded, cells, tmp_path):
    class Anything(Task, register=False):
        name = "anything"
        make = open = judge = quality = predict = None

    with pytest.raises(DownresError, match="`max_flips` counts answers that become others, a anything network"):
        Anything(None, 1).refuse_flips(Budget(max_flips=1.0))
    assert (
        over_budget(None, LATENCY, Budget(max_size_bytes=1))
        == "the bytes of its file are not known, as it was measured in torch"
    )
    with pytest.raises(DownresError, match="A curve is measured in one runtime, 32 openvino names another"):
        curve(loaded, cells.dataset(), candidates=["32 openvino"])


def test_torch_beside_another_runtime_is_measured_and_not_shipped(loaded, cells, tmp_path):
    options = {"resolutions": [], "candidates": ["32", "32 torch", "32 onnxruntime"], "rungs": (), **OPTIONS}
    run = search(loaded, cells.dataset(), out=tmp_path / "run", runtime="onnxruntime:cpu", minimize="latency", **options)
    assert [str(r.candidate) for r in run.results] == ["32", "32 torch"]  # the first runtime need not be named
    assert str(run.best.candidate) == "32" and run.results[1].latency.runtime == "torch"
    assert "measured and not shipped, as torch runs networks and no files: 32 torch" in run.notes


def test_a_file_over_the_ceiling_or_with_other_answers_is_not_shipped(loaded, cells, tmp_path, monkeypatch):
    from downres.recovery.bank import Bank

    options = {"resolutions": [], "candidates": ["32 int8"], "rungs": (), **OPTIONS}
    ship = Bank.ship

    def other(bank, state, folder, *arguments):
        engine = ship(bank, state, folder, *arguments)
        tensors = {"head.weight": -bank.head_weight(state), "head.bias": np.zeros(2, np.float32)}
        assert engine.with_tensors(folder / engine.file, tensors, folder / engine.file)
        return engine

    monkeypatch.setattr(Bank, "ship", other)
    run = search(loaded, cells.dataset(), out=tmp_path / "run", **options)
    assert run.best is not None and run.artifact is None
    assert any("could not be shipped: its int8 file answers otherwise than what was judged" in note for note in run.notes)


def test_one_layer_has_none_to_spare(tiny_preprocessing, cells, tmp_path, monkeypatch):
    """The rung is left out, and the candidate stays."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    options = {**OPTIONS, "resolutions": [], "candidates": ["32 int8"], "rungs": ("layers",), "max_drop": 0.0}
    monkeypatch.setattr(ladder._Ladder, "is_over", lambda self: True)
    run = search(network.eval(), cells.dataset(), preprocessing=tiny_preprocessing, out=tmp_path / "run", **options)
    (result,) = run.results
    assert result.status == "measured" and result.recovery.tried[-1].note == "too few layers in 8 bits to keep some in float"


def test_a_network_that_does_not_run_in_another_precision_stops_alone(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mean((2, 3)) + torch.ones(1, 3)) @ torch.ones(2, 2)

    with pytest.raises(DownresError, match="The network does not run so in torch"):
        TorchRuntime(Mixed(), 1, precision="bf16")(np.zeros((1, 3, 8, 8), np.float32))


def test_it_begins_where_its_network_in_float_ended(loaded, cells, tmp_path, monkeypatch):
    """Crop and statistics are those of the float network; what changes the file alone is left where the drop is within."""
    from downres.searching import folds as folds_module

    def recalibrated(task, bank, candidate, reference, budget, rungs, like):
        if candidate == candidate.network:
            state = dataclasses.replace(reference.state.at(candidate), crop_ratio=0.875)
            return state.then(Step(RECALIBRATED, reference.index, 32)), Recovery("batchnorm", 0.875, 0.0)
        monkeypatch.setattr(task, "compare", partial(too_few, task.compare))
        return climb(task, bank, candidate, reference, budget, rungs, like)

    def too_few(compare, *arguments):  # on tuning images nothing is proven
        return {name: dataclasses.replace(d, verdict=TOO_FEW) for name, d in compare(*arguments).items()}

    monkeypatch.setattr(folds_module, "climb", recalibrated)
    options = {"resolutions": [], "candidates": ["32", "32 int8"], **OPTIONS, "rungs": ("batchnorm", "ranges", "layers")}
    run = search(loaded, cells.dataset(), out=tmp_path / "run", **options)
    tried = [(rung.rung, rung.note) for rung in run.results[1].recovery.tried]
    assert tried == [
        ("none", ""),
        ("batchnorm", "as the network in float"),
        ("ranges", "tuning images show no loss over the allowed one"),
        ("layers", "tuning images show no loss over the allowed one"),
    ]
