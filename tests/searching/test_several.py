"""One model for several resolutions: what is shared, what it learns, what ships, and how it is chosen at run time."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from downres import Candidate, Training, check, load_model, load_run, predict, switchable
from downres.artifacts import read_manifest
from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.engines.shared import share_tensors
from downres.errors import DownresError
from downres.images import preprocess
from downres.recovery import trainer
from downres.recovery.finetune import NORMS
from downres.recovery.state import State
from downres.recovery.switching import Several, Switching, tensors_of
from downres.searching.prepare import Measuring, open_data, prepare_task
from downres.searching.store import Store
from downres.tasks import Question

SIZES = (48, 32, 16)
HOW = {"fit_head": True, "epochs": 6, "threads": 1, "max_drop": 40.0}


@pytest.fixture(scope="module")
def model(tiny_file, tiny_preprocessing):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)


@pytest.fixture(scope="module")
def folder(cells, tmp_path_factory):
    return cells.write(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def made(model, folder, tmp_path_factory):
    return switchable(model, str(folder), SIZES, out=tmp_path_factory.mktemp("several") / "run", **HOW)


@pytest.fixture
def prepared(model, cells, tmp_path):
    """(task, bank, training images) of the cells."""
    data = cells.dataset()
    task = prepare_task(model, data, Question())
    open_data(task, data, Measuring(), Question())
    bank = task.bank(tmp_path / "run", runtime="torch", threads=1)
    task.fill(bank)
    return task, bank, data.folds[0].train


def several_of(prepared, how, sizes=SIZES, own_heads=False):
    task, bank, images = prepared
    first, *others = (State(Candidate(size), 1.0) for size in sizes)
    lesson = Switching(task, bank, first, others, task.native_state, images, own_heads)
    state, told = trainer.trained(bank, first, 0, images, how, lesson, task.seed)
    every = bank.weights.get(state.trained.tensors)
    return [tensors_of(every, i) for i in range(len(sizes))], told


# --- what is shared ---


def test_normalisations_are_private_and_the_rest_is_one_tensor():
    networks = [timm.create_model("resnet10t", num_classes=3) for _ in range(2)]
    several = Several()
    for side, network in zip((64, 32), networks, strict=True):
        several.add((side, side), network, {n for n, m in network.named_modules() if isinstance(m, NORMS)})
    a, b = (dict(network.named_parameters()) for network in networks)
    norms = {n for n, m in networks[0].named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name in a:
        assert (a[name] is b[name]) == (name.rpartition(".")[0] not in norms), name
    assert len({id(p) for p in several.parameters()}) == len(a) + 2 * len(norms)
    several.eval()
    for side, network in zip((64, 32), networks, strict=True):
        x = torch.randn(2, 3, side, side)
        assert torch.equal(several(x), network(x))
    several.train()
    assert not any(network.training for network in networks) and networks[0].bn1.training


def test_position_embeddings_of_another_size_are_each_its_own(tmp_path, cells):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=2, depth=1).eval()
    model = dataclasses.replace(load_model("timm:resnet10t", pretrained=False), module=vit)
    p = dataclasses.replace(model.preprocessing, resolution=48, crop_ratio=1.0)
    task = prepare_task(dataclasses.replace(model, preprocessing=p), cells.dataset(), Question())
    open_data(task, cells.dataset(), Measuring(), Question())
    bank = task.bank(None, runtime="torch", threads=1)
    task.fill(bank)
    first, other = (State(Candidate(size), 1.0) for size in (48, 32))
    images = task.data.folds[0].train
    several = Switching(task, bank, first, [other], task.native_state, images, own_heads=False).student(bank, first)
    a, b = (dict(network.named_parameters()) for network in several.networks)
    assert a["pos_embed"].shape[1] == 10 and b["pos_embed"].shape[1] == 5
    assert a["blocks.0.attn.qkv.weight"] is b["blocks.0.attn.qkv.weight"]
    assert a["blocks.0.norm1.weight"] is not b["blocks.0.norm1.weight"]


@pytest.mark.parametrize("own_heads", [False, True])
def test_what_is_trained_is_the_same_in_all_but_for_what_is_private(prepared, own_heads):
    task, bank, images = prepared
    before = {n: v.numpy().copy() for n, v in task.model.module.state_dict().items()}
    tensors, told = several_of(prepared, Training(epochs=2), own_heads=own_heads)
    assert told == f"2 epochs on {len(images)} images, 48, 32, 16 in turn, without labels"
    private = {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"} | (
        {"head.weight", "head.bias"} if own_heads else set()
    )
    for name, value in tensors[0].items():
        others = [one[name] for one in tensors[1:]]
        if name in private:
            assert not any(np.array_equal(value, other) for other in others), name
        else:
            assert all(np.array_equal(value, other) for other in others), name
        trained = "running" not in name and "num_batches" not in name
        assert np.array_equal(value, before[name]) != trained, name
    assert all(np.array_equal(v, before[n]) for n, v in task.model.module.state_dict().items())


def test_statistics_are_each_resolutions_own_where_they_are_taken(prepared):
    tensors, _ = several_of(prepared, Training(epochs=2, batchnorm=True))
    means = [one["body.4.running_mean"] for one in tensors]
    assert not any(np.array_equal(means[0], other) for other in means[1:])


def test_every_batch_has_one_size_and_each_its_turn(prepared, monkeypatch):
    seen = []
    real = Several.forward
    monkeypatch.setattr(Several, "forward", lambda self, x: seen.append((len(x), x.shape[-1])) or real(self, x))
    monkeypatch.setattr(trainer._Run, "_refuse_other_answers", lambda self: None)
    monkeypatch.setattr(trainer._Run, "_affordable", lambda self: self.how.epochs)
    monkeypatch.setattr(trainer._Run, "_layout", lambda self: torch.contiguous_format)
    _, _, images = prepared
    several_of(prepared, Training(epochs=3, training_batch=20))
    assert len(images) == 80
    assert seen == [(20, size) for epoch in range(3) for size in np.roll(SIZES, -epoch)[[0, 1, 2, 0]]]


def test_killed_after_an_epoch_it_ends_with_the_same_weights(prepared, monkeypatch):
    how, bank = Training(epochs=4), prepared[1]
    whole, _ = several_of(prepared, how)
    bank.trained.clear()
    real = trainer._Run._keep

    def killed(self, done, epochs):
        real(self, done, epochs)
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._Run, "_keep", killed)
        several_of(prepared, how)
    again, _ = several_of(prepared, how)
    assert all(np.array_equal(value, again[i][name]) for i, one in enumerate(whole) for name, value in one.items())


# --- the files ---


class Plain(nn.Module):
    """Convolutions with a BatchNorm behind each, whose weights are many times their graph."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 128, 3, 4, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(128, 256, 3, 2, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU())
        self.conv3 = nn.Sequential(nn.Conv2d(256, 256, 3, 2, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU())
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        return self.head(self.conv3(self.conv2(self.conv1(x))).mean((2, 3)))


def test_graphs_share_what_is_the_same_to_the_byte(tmp_path):
    network = Plain().eval()
    files, whole = [], []
    for side in (64, 32):
        own = copy.deepcopy(network)
        for module in own.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        files.append(export_onnx(own, (3, side, side), tmp_path / f"{side}.onnx", own_batchnorm=True))
        whole.append(export_onnx(own, (3, side, side), tmp_path / f"whole{side}.onnx"))
    share_tensors(files, tmp_path / "weights.bin")
    weights = sum(v.nbytes for n, v in ((n, p.numpy(force=True)) for n, p in network.named_parameters()) if v.ndim > 1)
    norms = sum(4 * 4 * m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))  # four vectors of float32
    assert weights < (tmp_path / "weights.bin").stat().st_size < weights + 2 * norms + 64 * 200
    assert sum(f.stat().st_size for f in [*files, tmp_path / "weights.bin"]) < 1.1 * whole[0].stat().st_size
    for side, file, own in zip((64, 32), files, whole, strict=True):
        kinds = [node.op_type for node in onnx.load(file).graph.node]
        assert "BatchNormalization" in kinds  # ONNX Runtime puts it into the convolution when it loads the file
        assert "BatchNormalization" not in [node.op_type for node in onnx.load(own).graph.node]
        x = np.random.default_rng(0).standard_normal((2, 3, side, side), dtype=np.float32)
        np.testing.assert_allclose(OnnxRuntime(file, 1)(x)[0], OnnxRuntime(own, 1)(x)[0], rtol=1e-4, atol=1e-5)
        initial = {
            i.name: onnx.numpy_helper.to_array(i, str(tmp_path))
            for i in onnx.load(file, load_external_data=False).graph.initializer
        }
        assert np.array_equal(initial["conv1.0.weight"], network.conv1[0].weight.detach())


def test_it_is_measured_as_it_ships_and_checked(made, folder, model, tiny_file):
    assert [str(r.candidate) for r in made.results] == ["48", "32", "16"]
    assert made.original.quality.n == 80 and all(r.quality.n == r.drop.n == r.naive.n == 80 for r in made.results)
    assert {r.drop.comparisons for r in made.results} == {3}
    for result in made.results:
        assert result.drop.drop == pytest.approx(made.original.quality.score - result.quality.score)
        assert result.latency.ratio is not None and result.recovery.rung == "distill"
        # By hand: the graph on the small pictures.
        p = dataclasses.replace(model.preprocessing, resolution=result.candidate.resolution)
        stem = "model" if result.candidate.resolution == 48 else f"model-{result.candidate}"
        session, right = OnnxRuntime(made.artifact / f"{stem}.onnx", 1), []
        for k, kind in enumerate(("defective", "intact")):
            for file in sorted((folder / "val" / kind).iterdir()):
                x = preprocess(np.asarray(Image.open(file)), p)[None].numpy()
                right.append(session(x)[0].argmax() == k)
        assert result.quality.score == pytest.approx(100 * np.mean(right))
    findings = check(made.artifact, model=f"{tiny_file}:make", data=str(folder), threads=1)
    assert all(finding.ok for finding in findings), findings
    assert len(findings) == 1 + 3 * 4 and {f.what.partition(" px: ")[0] for f in findings[1:]} == {"48", "32", "16"}
    with pytest.raises(DownresError, match="holds a model for several resolutions and no search"):
        load_run(made.artifact.parent)


def test_the_artifact_has_the_weights_once(made):
    manifest = read_manifest(made.artifact)
    running = [made.artifact / f for f in ("model.onnx", "model-32.onnx", "model-16.onnx", "weights.bin")]
    assert manifest["runtime"]["file_bytes"] == made.file_bytes == sum(file.stat().st_size for file in running)
    own = load_file(made.artifact / "model-16.safetensors")
    assert own.keys() == {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"}


def test_a_changed_file_of_any_resolution_is_seen(made, tmp_path, folder, tiny_file):
    for name in ("model-16.onnx", "weights.bin", "model-32.safetensors"):
        other = tmp_path / name
        shutil.copytree(made.artifact, other)
        content = bytearray((other / name).read_bytes())
        content[-1] ^= 1
        (other / name).write_bytes(content)
        assert [f.ok for f in check(other, model=f"{tiny_file}:make", data=str(folder))] == [False]
        with pytest.raises(DownresError, match=name):
            predict(other, [next((folder / "val" / "intact").iterdir())])
    manifest = json.loads((made.artifact / "manifest.json").read_text())
    manifest["resolutions"][0]["stem"] = "../model-32"
    other = tmp_path / "stem"
    shutil.copytree(made.artifact, other)
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DownresError, match="is broken"):
        check(other)


# --- chosen at run time ---


def test_pictures_at_a_resolution_or_in_time(made, folder):
    picture = sorted((folder / "val" / "intact").iterdir())[0]
    found = {size: predict(made.artifact, [picture], resolution=size)[0].to_json() for size in SIZES}
    assert predict(made.artifact, [picture])[0].to_json() == found[48]
    assert len({str(one["probabilities"]) for one in found.values()}) == 3
    with pytest.warns(UserWarning, match="at 48 px, .* ms a pass on this machine now"):
        assert predict(made.artifact, [picture], max_latency_ms=1e6)[0].to_json() == found[48]
    for options, why in (
        ({"resolution": 24}, "The model runs at 48, 32, 16 px, 24 is none of these"),
        ({"resolution": 32, "max_latency_ms": 5}, "not both"),
        ({"max_latency_ms": 0}, "above 0"),
        ({"max_latency_ms": "5"}, "above 0"),
        ({"max_latency_ms": float("nan")}, "above 0"),
        ({"max_latency_ms": 1e-6}, "At its smallest resolution, 16 px, the model takes .* ms a pass here, 1e-06 are allowed"),
    ):
        with pytest.raises(DownresError, match=why):
            predict(made.artifact, [picture], **options)


def test_the_largest_that_is_fast_enough_is_taken(made, folder, monkeypatch):
    from downres.artifacts import use

    picture = sorted((folder / "val" / "intact").iterdir())[0]
    monkeypatch.setattr(use, "rounds", lambda runtimes, inputs, **_: {"it": np.array([inputs["it"].shape[-1] / 1000])})
    with pytest.warns(UserWarning, match="at 32 px, 32 ms"):
        found = predict(made.artifact, [picture], max_latency_ms=40)
    assert found[0].to_json() == predict(made.artifact, [picture], resolution=32)[0].to_json()


def test_a_folder_whose_name_a_runtime_does_not_take(made, folder, tmp_path, monkeypatch):
    """ONNX Runtime is given bytes then, and must not look for weights where the process happens to be."""
    picture = sorted((folder / "val" / "intact").iterdir())[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.bin").write_bytes(bytes((made.artifact / "weights.bin").stat().st_size))
    expected = predict(made.artifact, [picture], resolution=16)[0].to_json()
    for name in ("a\u200eb", "tab\tx"):
        copied = shutil.copytree(made.artifact, tmp_path / name)
        monkeypatch.chdir(other)
        assert predict(copied, [picture], resolution=16)[0].to_json() == expected


def test_height_and_width_say_the_same_as_a_side(made, folder):
    picture = sorted((folder / "val" / "intact").iterdir())[0]
    expected = predict(made.artifact, [picture], resolution=16)[0].to_json()
    assert predict(made.artifact, [picture], resolution=(16, 16))[0].to_json() == expected
    with pytest.raises(DownresError, match="16x32 is none of these"):
        predict(made.artifact, [picture], resolution=(16, 32))


def test_serve_takes_the_same_options(made, folder):
    picture = sorted((folder / "val" / "intact").iterdir())[0]

    def served(*options):
        return subprocess.run(
            [sys.executable, made.artifact / "serve.py", *options, picture], capture_output=True, text=True, check=False
        )

    for options, size in (((), 48), (("--resolution", "16"), 16), (("--max-latency-ms", "100000"), 48)):
        said, expected = json.loads(served(*options).stdout), predict(made.artifact, [picture], resolution=size)[0].to_json()
        assert said["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-3)
    assert served("--resolution", "24").stderr == "the model has no such resolution\n"
    assert served("--max-latency-ms", "0.00001").stderr == "no resolution is that fast here\n"


# --- the way there ---


def test_a_finished_run_is_only_read_and_an_unfinished_one_goes_on(made, model, folder, monkeypatch, tmp_path):
    out = made.artifact.parent
    monkeypatch.setattr(trainer._Run, "go", lambda self: pytest.fail("trained again"))
    assert switchable(model, str(folder), SIZES, out=out, **HOW) == made
    other = tmp_path / "run"
    shutil.copytree(out, other)
    shutil.rmtree(other / "best")  # killed while it was written: what was trained is there
    again = switchable(model, str(folder), SIZES, out=other, **HOW)
    assert [r.quality for r in again.results] == [r.quality for r in made.results]
    assert again.results[0].recovery == made.results[0].recovery
    with pytest.raises(DownresError, match="another own_heads"):
        switchable(model, str(folder), SIZES, out=out, own_heads=True, **HOW)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"resolutions": [32]}, "has two or more, 1 is given"),
        ({"resolutions": [32, 32]}, "has two or more, 1 is given"),
        ({"resolutions": [32, (32, 32)]}, "has two or more, 1 is given|same height and width"),
        ({"resolutions": [64, 32]}, "The original is used at 48 px, 64 is more"),
        ({"folds": 2}, "give `val_fraction`, and no folds"),
        ({"resolutions": 160}, "Resolutions are a list of two or more, 160 is none"),
        ({"resolutions": [True, 32]}, "whole number of pixels"),
        ({"own_heads": "no"}, "`own_heads` is true or false"),
        ({"max_drop": "1"}, "`max_drop` is a number"),
        ({"epochs": 1, "training_batch": 128}, "1 batches cannot show 3 resolutions"),
        ({"runtime": "torch"}, "Weights are shared by ONNX files"),
        ({"epochs": 0}, "`epochs` is a whole number"),
        ({"nonsense": 1}, "There is no option 'nonsense'"),
    ],
)
def test_what_is_refused(model, folder, tmp_path, options, why):
    with pytest.raises(DownresError, match=why):
        switchable(model, str(folder), options.pop("resolutions", SIZES), out=tmp_path / "run", **{**HOW, **options})
    assert not (tmp_path / "run" / "best").exists()


class Counting(nn.Module):
    """Runs in torch alone: what it does depends on the values."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return self.head(y * (1 + int((y.sum() > 1e9).item())))


def test_what_cannot_be_exported_is_said_before_it_is_trained(folder, tiny_preprocessing, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer._Run, "go", lambda self: pytest.fail("trained"))
    with pytest.raises(DownresError, match="could not be exported to ONNX"):
        switchable(Counting().eval(), str(folder), SIZES, out=tmp_path / "run", preprocessing=tiny_preprocessing, **HOW)


def test_masks_too(segmenter, scenes, tmp_path, shapes):
    found = switchable(segmenter(), str(scenes), [(48, 64), (24, 32)], out=tmp_path / "run", threads=1, epochs=2, max_drop=50)
    assert [r.quality.n for r in found.results] == [16, 16]
    findings = check(found.artifact, model=f"{shapes.__file__}:make", threads=1)
    assert all(finding.ok for finding in findings), findings


def test_the_command(cli, tiny_file, folder, tmp_path):
    command = ["switchable", f"{tiny_file}:make", "--data", folder, "--native-resolution", "48", "--mean", "0.5,0.5,0.5"]
    command += ["--std", "0.25,0.25,0.25", "--fit-head", "--resolution", "48,24", "--epochs", "1", "--threads", "1"]
    done = cli(*command, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "48 px" in done.out and "24 px" in done.out and "for all resolutions, the original's file is" in done.out
    document = cli(*command, "--out", tmp_path / "run", "--json").json
    assert [row["candidate"] for row in document["resolutions"]] == ["48", "24"]
    picture = sorted((folder / "val" / "intact").iterdir())[0]
    done = cli("predict", tmp_path / "run" / "best", picture, "--max-latency-ms", "10000")
    assert done.code == 0 and "Note: at 48 px" in done.err
    assert cli("predict", tmp_path / "run" / "best", picture, "--resolution", "24").code == 0
    refused = cli("embed", tmp_path / "run" / "best")
    assert refused.code == 2 and "a model of one resolution" in refused.err


def test_what_was_trained_is_lost_and_made_again(made, model, folder, tmp_path):
    out = shutil.copytree(made.artifact.parent, tmp_path / "run")
    shutil.rmtree(out / "best")
    shutil.rmtree(out / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = switchable(model, str(folder), SIZES, out=out, **HOW)
    assert [r.quality for r in again.results] == [r.quality for r in made.results]
    assert Store.read(out).get("switched")["steps"] == Store.read(made.artifact.parent).get("switched")["steps"]
