"""What is shipped: complete, provable, and nothing that was changed afterwards passes for it."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from downres import check, predict, search
from downres.artifacts import proof, read_manifest, write
from downres.artifacts.manifest import changed_files
from downres.engines.onnxruntime import OnnxRuntime
from downres.errors import DownresError
from downres.images import preprocess
from downres.records import Preprocessing
from downres.recovery import ladder
from downres.tasks.classification.quality import count_correct

OPTIONS = {"fit_head": True, "max_drop": 40.0, "resolutions": [32], "stem_scales": (), "runtime": "torch", "threads": 1}


def ship(model, data, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        run = search(model, data, out=out, **{**OPTIONS, **options})
    assert run.artifact is not None
    return run.artifact


@pytest.fixture
def folder(shipped, tmp_path):
    """A copy of the tiny artifact, to be spoilt."""
    return shutil.copytree(shipped[0], tmp_path / "best")


def found(findings):
    return {f.what: f.ok for f in findings}


ALL = {
    "files": True, "preprocessing = PIL": True, "torch = onnxruntime": True, "quality": True, "serve.py = predict": True,
}  # fmt: skip


def test_check_works_where_the_folder_was_moved_to(shipped, folder):
    _, dataset, model = shipped
    findings = check(folder, model=model, data=dataset, threads=1)
    assert found(findings) == ALL


def test_the_weights_are_those_of_the_onnx_file(shipped):
    folder, dataset, model = shipped
    torch_side = proof._network(folder, read_manifest(folder), model)[0]
    p = Preprocessing.from_json(read_manifest(folder)["preprocessing"])
    x = torch.stack([preprocess(dataset.images[i], p) for i in range(20)])
    with torch.no_grad():
        theirs = torch_side(x).numpy()
    ours = OnnxRuntime(folder / "model.onnx", 1)(x.numpy())[0]
    assert np.abs(theirs - ours).max() < 1e-4
    assert load_file(folder / "model.safetensors").keys() == model.module.state_dict().keys()


def test_check_leaves_the_callers_model_alone(shipped):
    folder, dataset, model = shipped
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    check(folder, model=model.module, data=dataset, threads=1)
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())


def test_every_changed_byte_of_the_manifest_is_noticed(folder):
    """Also one that means the same, as a space for a line break."""
    file = folder / "manifest.json"
    whole = file.read_bytes()
    for i in range(0, len(whole), 7):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            manifest = read_manifest(folder)
        except DownresError:
            continue
        assert changed_files(folder, manifest) == ["manifest.json"], whole[max(0, i - 20) : i + 20]
    for i in [i for i, byte in enumerate(whole) if byte == ord("\n")][::9]:
        file.write_bytes(whole[:i] + b" " + whole[i + 1 :])
        assert changed_files(folder, read_manifest(folder)) == ["manifest.json"]
    file.write_bytes(whole)
    assert changed_files(folder, read_manifest(folder)) == []


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_every_changed_byte_of_a_file_is_noticed(folder, name):
    file, manifest = folder / name, read_manifest(folder)
    whole = file.read_bytes()
    for i in range(0, len(whole), max(1, len(whole) // 400)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert changed_files(folder, manifest) == [name]
    for spoilt in (whole[:-1], whole + b"\0", b""):
        file.write_bytes(spoilt)
        assert changed_files(folder, manifest) == [name]


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "manifest.json"])
def test_check_says_wrong_and_predict_refuses(folder, name):
    file = folder / name
    content = file.read_bytes()
    at = content.index(b'"top1"') + 2 if name == "manifest.json" else len(content) // 2
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    (finding,) = check(folder)
    assert finding.what == "files" and finding.ok is False and name in finding.detail
    with pytest.raises(DownresError, match=f"changed: {name}"):
        predict(folder, [])


def test_a_better_number_in_the_manifest_is_noticed(folder):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["result"]["quality"]["top1"] = 99.9
    for digest in (manifest["sha256"]["manifest.json"], "", "x"):
        manifest["sha256"]["manifest.json"] = digest
        file.write_text(json.dumps(manifest))
        assert found(check(folder)) == {"files": False}
    del manifest["sha256"]["manifest.json"]
    file.write_text(json.dumps(manifest))
    assert found(check(folder)) == {"files": False}
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(DownresError, match="sha256 is missing"):
        check(folder)


def test_a_missing_file_is_named(folder):
    (folder / "model.onnx").unlink()
    assert "model.onnx (missing)" in check(folder)[0].detail


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 99}', "\xff"])
def test_a_broken_manifest_is_one_sentence(folder, content):
    (folder / "manifest.json").write_bytes(content.encode("latin1"))
    for verb in (check, lambda f: predict(f, [])):
        with pytest.raises(DownresError, match="broken or of another format"):
            verb(folder)


def test_no_manifest_is_no_shipped_model(tmp_path):
    with pytest.raises(DownresError, match="not a shipped model"):
        check(tmp_path)


def test_without_the_images_it_says_what_was_not_checked(folder):
    findings = check(folder)  # the images were given in Python
    assert findings[0].ok and all(f.ok is None and "give them as data" in f.detail for f in findings[1:])
    assert "quality" in found(findings)


def test_a_network_of_the_users_own_must_be_named(shipped, tiny_file):
    folder, dataset, _ = shipped
    findings = check(folder, data=dataset, threads=1)
    assert found(findings) == ALL | {"torch = onnxruntime": None}
    assert "`model" in findings[2].detail
    named = check(folder, model=f"{tiny_file}:make", data=dataset, threads=1)
    assert found(named)["torch = onnxruntime"] is True


def test_another_network_does_not_fit(shipped, tiny_file):
    folder, dataset, _ = shipped
    with pytest.raises(DownresError, match="its weights do not fit"):
        check(folder, model=f"{tiny_file}:without_norm", data=dataset)


def test_other_images_are_not_taken_for_the_proof(shipped, cells):
    folder, _, _ = shipped
    with pytest.raises(DownresError, match="not those that the quality was measured on"):
        check(folder, data=cells.dataset(flip=np.array([0])))


def test_changed_pixels_of_the_same_size_are_not_taken_for_the_proof(shipped, cells):
    folder, _, model = shipped
    black = type(cells)(np.zeros_like(cells.pictures), cells.labels).dataset()
    with pytest.raises(DownresError, match="not those that the quality was measured on"):
        check(folder, model=model, data=black)


def test_a_quality_that_is_not_reached_is_wrong(folder, shipped):
    """A manifest that is whole but states what the model does not do."""
    file, (_, dataset, model) = folder / "manifest.json", shipped
    manifest = json.loads(file.read_text())
    manifest["result"]["quality"]["correct"] -= 5
    text = json.dumps({**manifest, "sha256": {**manifest["sha256"], "manifest.json": ""}})
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({**manifest, "sha256": {**manifest["sha256"], "manifest.json": digest}}))
    assert found(check(folder, model=model, data=dataset, threads=1)) == ALL | {"quality": False}


def test_a_network_that_computes_otherwise_is_noticed(shipped, monkeypatch):
    folder, dataset, model = shipped

    class Other(type(model.module)):
        def forward(self, x):
            return super().forward(x.flip(-1)) * 1.01

    other = Other()
    findings = check(folder, model=other, data=dataset, threads=1)
    assert found(findings) == ALL | {"torch = onnxruntime": False}


def test_predict_needs_only_the_artifact(shipped, tmp_path, cells):
    """In a fresh process, elsewhere, with nothing but the folder: the class that torch gives."""
    folder, dataset, model = shipped
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "m")
    files = []
    for i in range(12):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(cells.pictures[i]).save(files[-1])
    code = (
        "import sys; from downres.cli import main; from unittest import mock\n"
        "with mock.patch('downres.families.load_model', side_effect=AssertionError('no torch model')): main()"
    )
    command = [sys.executable, "-c", code, "predict", "m", *(str(f) for f in files), "--json", "--top", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=moved.parent)
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)["predictions"]
    network = proof._network(folder, read_manifest(folder), model)[0]
    p = Preprocessing.from_json(read_manifest(folder)["preprocessing"])
    with torch.no_grad():
        shares = network(torch.stack([preprocess(cells.pictures[i], p) for i in range(12)])).softmax(1)
    for prediction, file, share in zip(predictions, files, shares, strict=True):
        assert prediction["image"] == str(file)
        assert prediction["classes"][0] == ("intact", "defective")[int(share.argmax())]
        assert prediction["probabilities"][0] == pytest.approx(100 * float(share.max()), abs=0.01)
        assert sum(prediction["probabilities"]) == pytest.approx(100, abs=0.01)


def test_predict_names_the_picture_it_cannot_read(folder, tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(DownresError, match="x.jpg: not an image"):
        predict(folder, [tmp_path / "x.jpg"])


def test_folds_with_recalibrated_batchnorm(tiny, cells, tmp_path, monkeypatch):
    """Statistics folded into convolutions by the export are no initializers: the torch network is exported anew."""
    monkeypatch.setattr(ladder._Ladder, "best", lambda self: next(o for o in self.options if o.rung == "batchnorm"))
    monkeypatch.setattr(ladder._Ladder, "attempt", _never_enough(ladder._Ladder.attempt))
    monkeypatch.setattr(ladder._Ladder, "worth_a_try", lambda *_: True)
    dataset = cells.dataset(2)
    folder = ship(tiny, dataset, tmp_path / "run", rungs=("batchnorm",), max_drop=60.0)
    assert all(fold["recalibrated"] for fold in read_manifest(folder)["folds"])
    names = {k.split("/", 1)[1] for k in load_file(folder / "folds.safetensors")}
    assert {"body.1.running_mean", "body.4.running_var", "head.weight"} <= names
    findings = check(folder, model=tiny, data=dataset, threads=1)
    assert found(findings) == ALL
    without = check(folder, data=dataset, threads=1)
    assert found(without)["quality"] in (None, True)
    if found(without)["quality"] is None:
        assert "`model" in without[3].detail


def _never_enough(attempt):
    def call(*args, **kwargs):
        attempt(*args, **kwargs)
        return False

    return call


def test_a_stem_variant_round_trip(tiny, cells, tmp_path):
    dataset = cells.dataset(2)
    folder = ship(tiny, dataset, tmp_path / "run", resolutions=[], stem_scales=(0.5,), max_drop=60.0)
    manifest = read_manifest(folder)
    assert manifest["candidate"]["stem_scale"] == 0.5 and manifest["input"]["shape"] == ["batch", 3, 48, 48]
    findings = check(folder, model=tiny, data=dataset, threads=1)
    assert found(findings) == ALL


def test_without_a_fitted_head_the_models_own_is_shipped(tiny, cells, tmp_path):
    dataset = cells.dataset()
    folder = ship(tiny, dataset, tmp_path / "run", fit_head=False, rungs=(), max_drop=90.0)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["head.weight"], tiny.module.head.weight)
    assert not (folder / "folds.safetensors").exists()
    p = Preprocessing.from_json(read_manifest(folder)["preprocessing"])
    test = dataset.folds[0].test
    with torch.no_grad():
        out = tiny.module(torch.stack([preprocess(dataset.images[int(i)], p) for i in test])).numpy()
    correct = int(count_correct(out, dataset.labels[test]).sum())
    assert abs(correct - read_manifest(folder)["result"]["quality"]["correct"]) <= 1


def test_an_export_that_fails_leaves_the_old_artifact(shipped, tmp_path, monkeypatch):
    folder, dataset, model = shipped
    copied = shutil.copytree(folder, tmp_path / "best")
    before = {p.name: p.read_bytes() for p in copied.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save", full)
    manifest = read_manifest(folder)
    from downres import Measuring, Question
    from downres.records import Result
    from downres.recovery.state import State
    from downres.searching.prepare import open_data, prepare_task
    from downres.tasks.classification.quality import Quality

    task = prepare_task(model, dataset, Question())
    open_data(task, dataset, Measuring(), Question())
    with pytest.raises(OSError):
        bare = [{**manifest[which], "quality": None, "naive": None} for which in ("result", "original")]
        qualities = [Quality.from_json(manifest[which]["quality"]) for which in ("result", "original")]
        result, original = (dataclasses.replace(Result.from_json(b), quality=q) for b, q in zip(bare, qualities, strict=True))
        write.export(
            copied, model.module, task, lambda _: {"name": "onnxruntime"}, preprocessing=model.preprocessing,
            state=State.from_json(manifest["state"]), result=result, recovery=result.recovery, original=original, source={},
        )  # fmt: skip
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
