"""The main job end to end with a tiny network: gates, numbers by hand, interruption, and what the proof images may decide."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from downres import Budget, Preprocessing, curve, load_model, load_run
from downres.engines.onnxruntime import OnnxRuntime
from downres.engines.torch import TorchRuntime
from downres.errors import DownresError
from downres.records import OUTSIDE, WITHIN, Candidate
from downres.recovery import bank as bank_module
from downres.recovery.features import FeatureBank
from downres.recovery.state import REFITTED, State
from downres.recovery.weights import Weights
from downres.searching.store import Store
from downres.tasks.classification.quality import compare_all, count_correct

from .conftest import already_exported, measured, run_search


@pytest.fixture(scope="module")
def finished(tiny_file, tiny_preprocessing, cells, tmp_path_factory):
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    return run_search(model, cells.dataset(3), tmp_path_factory.mktemp("whole") / "run").folder


@pytest.fixture
def whole(finished, tmp_path):
    """A search over cross folds that nobody interrupted, in a folder of the test's own."""
    return load_run(shutil.copytree(finished, tmp_path / "whole"))


class Counter:
    """Counts what is run: images through networks outside of timing, exports.

    shipped: the file of the same network's export before, which is then copied in place of another.
    """

    def __init__(self, monkeypatch, shipped=None):
        self.images = self.exports = self.forwards = 0
        note, export = FeatureBank.note, bank_module.export_onnx

        def counted_images(bank, state, looked_at, done, total):
            self.images += looked_at
            note(bank, state, looked_at, done, total)

        def counted(original):
            def call(*args, **kwargs):
                self.exports += 1
                return original(*args, **kwargs)

            return call

        monkeypatch.setattr(FeatureBank, "note", counted_images)
        monkeypatch.setattr(bank_module, "export_onnx", counted(already_exported(shipped) if shipped else export))
        for runtime in (OnnxRuntime, TorchRuntime):
            monkeypatch.setattr(runtime, "__call__", self._forward(runtime.__call__))

    def _forward(self, original):
        def call(runtime, batch):
            self.forwards += 1
            return original(runtime, batch)

        return call


def final(run):
    """All that a run answers, without wall-clock times."""

    def answer(result):
        row = {
            k: v
            for k, v in result.row().items()
            if not k.endswith(("_ms", "seconds", "_per_s", "ratio_low", "ratio_high", "rss_bytes"))
        }
        return row, result.drop and result.drop.to_json(), result.quality and result.quality.to_json()

    states = {
        str(r.candidate): Store.read(run.folder).get(f"quality/{r.candidate}")["states"]
        for r in run.results
        if r.status == "measured"
    }
    return [answer(r) for r in (run.original, *run.results)], states, run.best and run.best.candidate, run.finished


def test_all_candidates_are_judged_together(whole, cells):
    store = Store.read(whole.folder)
    correct = {
        str(r.candidate): store.arrays(f"predictions/{State(r.candidate, 1.0).key()}")["correct"]
        for r in (whole.original, *whole.results)
    }
    original = correct.pop("48")
    by_hand = compare_all(original, correct, Budget(30.0))
    assert {str(r.candidate): r.drop for r in whole.results} == by_hand
    assert all(r.drop.comparisons == 3 for r in whole.results)
    proven = [r for r in whole.results if r.drop.verdict == WITHIN]
    assert proven and whole.best == min(proven, key=lambda r: r.cost.macs)


def test_cheapest_by_another_measure(tiny, cells, tmp_path):
    run = measured(tiny, cells.dataset(), tmp_path / "r", minimize="latency", max_drop=60.0)
    proven = [r for r in run.results if r.drop.verdict == WITHIN and not r.reason]
    assert run.best == min(proven, key=lambda r: r.latency.latency_ms)


@pytest.mark.parametrize("ceiling", [{"max_macs": 10}, {"max_memory_bytes": 10}, {"max_latency_ms": 1e-9}])
def test_nothing_over_a_ceiling_is_shown_an_image(tiny, cells, tmp_path, monkeypatch, ceiling):
    looked = []
    features = FeatureBank.features
    monkeypatch.setattr(
        FeatureBank, "features", lambda bank, state, i: looked.append(state.candidate) or features(bank, state, i)
    )
    run = run_search(tiny, cells.dataset(), tmp_path / "r", **ceiling)
    assert looked == []  # not even the original: there would be nothing to compare with it
    assert run.finished and run.best is None and run.artifact is None
    assert all(r.status == "stopped" and "over the" in r.reason and r.quality is None for r in run.results)
    assert run.original.quality is None and run.original.cost is not None
    assert (run.folder / "report.html").exists()


def test_a_ceiling_stops_only_what_is_over_it(tiny, cells, tmp_path, whole):
    macs = {r.candidate: r.cost.macs for r in whole.results}
    run = run_search(tiny, cells.dataset(), tmp_path / "r", max_macs=macs[Candidate(16)])
    assert [r.status for r in run.results] == ["stopped", "measured", "stopped"]


def test_nothing_proven_ships_nothing(tiny, cells, tmp_path):
    run = run_search(tiny, cells.dataset(), tmp_path / "r", max_drop=0.0)
    assert run.finished and run.best is None and run.artifact is None
    assert not any(r.drop.verdict == WITHIN for r in run.results)


def test_ruled_out_on_tuning_images_is_never_selected(tiny, cells, tmp_path):
    run = measured(tiny, cells.dataset(), tmp_path / "r", max_drop=60.0)
    store = Store.open(run.folder, run.settings)
    key = f"quality/{run.best.candidate}"
    value = store.get(key)
    value["recovery"]["tuning"]["verdict"] = OUTSIDE
    store.put(key, value)
    store.close()
    again = load_run(run.folder)
    out = next(r for r in again.results if r.candidate == run.best.candidate)
    assert "ruled out on" in out.reason and out.drop is not None
    assert again.best is None or again.best.candidate != run.best.candidate
    # The others are fewer looks now: Holm counts only those that could be picked.
    assert {r.drop.comparisons for r in again.results if not r.reason} == {2}


def test_with_cross_folds_tuning_images_rule_nothing_out(whole):
    store = Store.open(whole.folder, whole.settings)
    key = f"quality/{whole.best.candidate}"
    value = store.get(key)
    value["recovery"]["tuning"]["verdict"] = OUTSIDE
    store.put(key, value)
    store.close()
    assert load_run(whole.folder).best.candidate == whole.best.candidate


def test_without_rungs_nothing_is_recovered(tiny, cells, tmp_path):
    run = measured(tiny, cells.dataset(), tmp_path / "r", rungs=())
    assert {r.recovery.rung for r in run.results} == {"none"}
    assert all(r.quality == r.naive for r in run.results)


def test_the_cheap_search_is_the_dear_one_again(tiny, cells, tmp_path, whole):
    assert final(run_search(tiny, cells.dataset(3), tmp_path / "r")) == final(whole)


def test_torch_and_onnxruntime_agree(tiny, cells, tmp_path):
    """Of the same candidates, so that a prediction differs at most where a logit is on the edge."""
    options = {"resolutions": [32], "stem_scales": (), "rungs": ("head",)}
    torch_run = run_search(tiny, cells.dataset(), tmp_path / "t", **options)
    onnx_run = run_search(tiny, cells.dataset(), tmp_path / "o", **options, runtime="onnxruntime")
    for a, b in zip((torch_run.original, *torch_run.results), (onnx_run.original, *onnx_run.results), strict=True):
        assert abs(a.quality.correct - b.quality.correct) <= 1
        assert a.cost == b.cost and b.latency.runtime == "onnxruntime"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rungs": ("crop", "magic")}, "Unknown rungs 'magic': choose from"),
        ({"minimize": "noise"}, "Unknown minimize 'noise'"),
        ({"runtime": "tensorrt"}, "Unknown runtime 'tensorrt'"),
        ({"resolutions": [48], "stem_scales": ()}, "There is no candidate"),
        ({"resolutions": [2]}, "total stride"),
        ({"max_drop": -1.0}, "allowed drop"),
        ({"confidence": 1.0}, "confidence"),
        ({"max_macs": 0}, "max_macs must be above 0"),
    ],
)
def test_bad_options_leave_no_folder(tiny, cells, tmp_path, options, words):
    with pytest.raises(DownresError, match=words):
        run_search(tiny, cells.dataset(), tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_a_resolution_that_the_network_cannot_take_is_stopped_with_its_reason(tiny, cells, tmp_path, monkeypatch):
    forward = type(tiny.module).forward

    def picky(self, x):
        if x.shape[-1] == 32:
            raise ValueError("only multiples of 48 and 16")
        return forward(self, x)

    monkeypatch.setattr(type(tiny.module), "forward", picky)
    run = run_search(tiny, cells.dataset(), tmp_path / "r", stem_scales=())
    assert [r.status for r in run.results] == ["stopped", "measured"]
    assert "only multiples of 48 and 16" in run.results[0].reason and run.finished


# --- interruption ---


def stop_at(stage, nth=1):
    """A progress that presses Ctrl-C at the nth report of a stage."""
    seen = 0

    def progress(what, done, total):
        nonlocal seen
        if stage in what:
            seen += 1
            if seen == nth:
                raise KeyboardInterrupt

    return progress


STAGES = {
    "first cost": ("counting costs", 1),
    "second cost": ("counting costs", 2),
    "making runnable": ("making runnable", 2),
    "timing": ("latency", 7),
    "original's features": ("48: looking", 1),
    "first candidate": ("32: looking", 2),
    "second candidate": ("16: looking", 3),
    "stem variant": ("48 stem×0.5: looking", 1),
}


def test_interrupted_and_started_again_it_gives_the_same_and_measures_nothing_twice(
    tiny, cells, tmp_path, monkeypatch, uninterrupted
):
    """One run, interrupted at every stage, one after the other."""
    expected, images, exports, shipped = uninterrupted
    counter, stored = Counter(monkeypatch, shipped), b""
    options = {"rungs": ("crop", "head")}
    for stage, where in STAGES.items():
        with pytest.raises(KeyboardInterrupt):
            run_search(tiny, cells.dataset(3), tmp_path / "r", progress=stop_at(*where), **options)
        between = load_run(tmp_path / "r")
        assert not between.finished and any(r.status == "waiting" for r in between.results), stage
        assert "unfinished" in between.notes[-1], stage
        log = (tmp_path / "r" / "measurements.jsonl").read_bytes()
        assert log.startswith(stored), stage
        stored = log
    run = run_search(tiny, cells.dataset(3), tmp_path / "r", **options)
    assert final(run) == expected
    assert (counter.images, counter.exports) == (images, exports)
    log = (tmp_path / "r" / "measurements.jsonl").read_bytes()
    assert log.startswith(stored)
    keys = [line.split(b'"')[3] for line in log.splitlines()]
    assert len(keys) == len(set(keys)), "something was measured twice"


@pytest.fixture(scope="module")
def uninterrupted(tiny_file, tiny_preprocessing, cells, tmp_path_factory):
    """(final answers, images looked at, exports, the shipped graph) of a run that nobody stopped."""
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        run = run_search(model, cells.dataset(3), tmp_path_factory.mktemp("u") / "r", rungs=("crop", "head"))
        assert run.best is not None
        return final(run), counter.images, counter.exports, run.artifact / "model.onnx"


@pytest.mark.parametrize("where", [("shipping", 1), ("shipping", 2)])
def test_interrupted_while_shipping(tiny, cells, tmp_path, monkeypatch, uninterrupted, where):
    expected, *_, shipped = uninterrupted
    stage, nth = where
    monkeypatch.setattr(bank_module, "export_onnx", already_exported(shipped))

    def progress(what, done, total):
        if "shipping" in what and done == nth - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(tiny, cells.dataset(3), tmp_path / "r", progress=progress, rungs=("crop", "head"))
    run = run_search(tiny, cells.dataset(3), tmp_path / "r", rungs=("crop", "head"))
    assert final(run) == expected and run.artifact is not None
    assert not list(run.folder.glob("*.partial"))


def test_interrupted_during_an_export_leaves_no_half_file(tiny, cells, tmp_path, monkeypatch):
    export = bank_module.export_onnx
    calls = []

    def cut(model, size, path, names=("logits",)):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of a file")
            raise KeyboardInterrupt
        return export(model, size, path, names)

    options = {"runtime": "onnxruntime", "resolutions": [], "stem_scales": (0.5,), "rungs": ("head",)}
    monkeypatch.setattr(bank_module, "export_onnx", cut)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny, cells.dataset(), tmp_path / "r", **options)
    run = run_search(tiny, cells.dataset(), tmp_path / "r", **options)
    assert run.finished and len(calls) == 3  # the first was not made again; what ships is made of the second


def test_with_batchnorm_interruption_changes_no_answer(tiny, cells, tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny, cells.dataset(3), tmp_path / "r", progress=stop_at("16: looking", 5))
    assert final(run_search(tiny, cells.dataset(3), tmp_path / "r")) == final(whole)


def test_a_finished_run_runs_no_network_again(tiny, cells, tmp_path, monkeypatch, whole):
    counter = Counter(monkeypatch)
    again = run_search(tiny, cells.dataset(3), whole.folder)
    assert (counter.forwards, counter.images, counter.exports) == (0, 0, 0)
    assert again.to_json() == whole.to_json()
    assert not (whole.folder / "features").exists()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"max_drop": 3.0}, "budget"),
        ({"resolutions": [32]}, "candidates"),
        ({"seed": 1}, "data_source"),
        ({"rungs": ()}, "rungs"),
    ],
)
def test_another_question_needs_another_folder(tiny, cells, whole, options, key):
    with pytest.raises(DownresError, match=f"another {key} .*another folder"):
        run_search(tiny, cells.dataset(3), whole.folder, **options)


def test_another_model_or_other_labels_need_another_folder(tiny, cells, whole):
    with pytest.raises(DownresError, match="another data sha256"):
        run_search(tiny, cells.dataset(3, flip=np.array([0])), whole.folder)
    tiny.module.body[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(DownresError, match="another model_sha256"):
        run_search(tiny, cells.dataset(3), whole.folder)


def test_a_run_killed_hard_goes_on(tiny_file, cells, tmp_path, cli, started):
    data, out = cells.write(tmp_path / "data"), tmp_path / "run"
    arguments = [
        "search", f"{tiny_file}:make", "--data", str(data), "--out", str(out), "--max-drop", "30", "--fit-head",
        "--native-resolution", "48", "--resolution", "32,24,16", "--stem-scale", "none", "--runtime", "torch",
        "--threads", "1", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25",
    ]  # fmt: skip
    log = out / "measurements.jsonl"
    command = [sys.executable, "-c", "from downres.cli import main; main()", *arguments]
    process = started(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_text().count('"quality/') >= 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = log.read_bytes()
    found = cli(*arguments)
    assert found.code == 0, found.err
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    run = load_run(out)
    assert run.finished and all(r.status == "measured" for r in run.results)
    keys = [line.split('"')[3] for line in log.read_text().splitlines()]
    assert len(keys) == len(set(keys))


# --- what the proof images may decide ---


@pytest.fixture(scope="module")
def honest_run(tiny_file, tiny_preprocessing, cells, tmp_path_factory):
    """On one split, with the labels and pictures as they are."""
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    return measured(model, cells.dataset(), tmp_path_factory.mktemp("honest") / "run")


def test_in_one_fold_the_proof_labels_decide_nothing_but_the_quality(tiny, cells, tmp_path, honest_run):
    a, honest = honest_run, cells.dataset()
    b = measured(tiny, cells.dataset(flip=honest.folds[0].test[::2]), tmp_path / "b")
    for one, other in zip((a.original, *a.results), (b.original, *b.results), strict=True):
        assert decided(a, one.candidate) == decided(b, other.candidate)
        if one.recovery.tuning:
            assert one.recovery.tuning == other.recovery.tuning
    assert a.original.quality != b.original.quality


def test_in_one_fold_the_proof_pictures_decide_nothing_either(tiny, cells, tmp_path, honest_run):
    honest = cells.dataset()
    pictures = cells.pictures.copy()
    pictures[honest.folds[0].test] = 255 - pictures[honest.folds[0].test]
    corrupted = type(cells)(pictures, cells.labels).dataset()
    a, b = honest_run, measured(tiny, corrupted, tmp_path / "b")
    for result in (a.original, *a.results):
        assert decided(a, result.candidate) == decided(b, result.candidate)
    assert [r.naive for r in a.results] != [r.naive for r in b.results]


def test_with_cross_folds_no_head_has_seen_its_own_test_images(tiny, cells, tmp_path, whole):
    a, honest, k = whole, cells.dataset(3), 1
    b = measured(tiny, cells.dataset(3, flip=honest.folds[k].test), tmp_path / "b")
    for result in (a.original, *a.results):
        mine, theirs = (Store.read(r.folder) for r in (a, b))
        my_heads, their_heads = (heads(r, result.candidate) for r in (a, b))
        for part in ("head.weight", "head.bias"):
            assert (my_heads[k][part] == their_heads[k][part]).all()
            assert (my_heads[0][part] != their_heads[0][part]).any()
        states = [s.get(f"quality/{result.candidate}")["states"][k] for s in (mine, theirs)]
        assert states[0] == states[1]


def heads(run, candidate):
    """For every fold the fitted head that its proof images were judged with: 'head.weight' and 'head.bias'."""
    states = [State.from_json(state) for state in Store.read(run.folder).get(f"quality/{candidate}")["states"]]
    return [Weights(run.folder).get(state.step(REFITTED).tensors) for state in states]


def decided(run, candidate):
    """Rung, crop, state and head of a candidate, as bytes where they are numbers."""
    store = Store.read(run.folder)
    value = store.get(f"quality/{candidate}")
    tried = [(r["rung"], r["score"], r["n"], r["note"]) for r in value["recovery"]["tried"]]
    return (
        value["states"], value["recovery"]["rung"], value["recovery"]["crop_ratio"], tried,
        [{name: array.tobytes() for name, array in head.items()} for head in heads(run, candidate)],
    )  # fmt: skip


def test_predictions_of_the_original_are_those_of_its_head(tiny, cells, tmp_path):
    """The whole chain by hand: preprocess, features, the stored head."""
    from downres.images import preprocess

    dataset = cells.dataset()
    run = measured(tiny, dataset, tmp_path / "r", stem_scales=(), resolutions=[32], rungs=())
    (head,) = heads(run, Candidate(32))
    test = dataset.folds[0].test
    import torch

    with torch.no_grad():
        x = torch.stack([preprocess(dataset.images[int(i)], tiny.preprocessing.at(32)) for i in test])
        pooled = tiny.module.body(x).mean((2, 3)).numpy()
    correct = count_correct(pooled @ head["head.weight"].T + head["head.bias"], dataset.labels[test])
    assert abs(int(correct.sum()) - run.results[0].quality.correct) <= 1


def test_a_cache_smaller_than_the_data_changes_no_number(tiny, cells, tmp_path):
    folder = cells.write(tmp_path / "data")
    whole = measured(tiny, str(folder), tmp_path / "whole")
    small = run_search(tiny, str(folder), tmp_path / "small", cache_gb=3e-4)  # of 1.1 MB
    assert len(whole.results) == len(small.results) > 1 and small.best.candidate == whole.best.candidate
    for one, other in zip((whole.original, *whole.results), (small.original, *small.results), strict=True):
        assert (one.quality, one.naive, one.drop) == (other.quality, other.naive, other.drop)
        assert (one.recovery is None) == (other.recovery is None)
        if one.recovery is not None:
            assert [(r.rung, r.score, r.n, r.images) for r in one.recovery.tried] == [
                (r.rung, r.score, r.n, r.images) for r in other.recovery.tried
            ]
    assert Store.read(small.folder).get("data") == Store.read(whole.folder).get("data")
    # The run goes on with another cache: it is not among what its numbers depend on.
    assert run_search(tiny, str(folder), tmp_path / "small").results == small.results
    with pytest.raises(DownresError, match="The cache of decoded images has 0 GB or more, -1 cannot be"):
        run_search(tiny, str(folder), tmp_path / "none", cache_gb=-1)


def test_a_network_for_grey_pictures(cells, tmp_path):
    """One channel in, from mean and std: nothing takes three for granted."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    grey = Preprocessing(48, 1.0, "bilinear", (0.5,), (0.25,))
    run = run_search(network, cells.dataset(), tmp_path / "r", preprocessing=grey)
    assert run.finished and all(r.status == "measured" for r in run.results)
    assert run.original.cost.input_size == (1, 1, 48, 48)
    found = curve(network, cells.dataset(), [32], preprocessing=grey, threads=1)
    assert found.results[0].drop.n == len(cells.dataset().folds[0].test)
