"""Distillation: losses against closed forms, what is trained, interruptions, and the way through a search."""

import copy
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import downres
from downres import Candidate, Dense, Training, check, load_model, recover, search
from downres.errors import DownresError
from downres.images import preprocess
from downres.recovery import distill, trainer
from downres.recovery.bank import Bank
from downres.recovery.ladder import UNASKED, lesson_of
from downres.recovery.state import DISTILLED, QUANTIZED, State
from downres.recovery.switching import Switching
from downres.recovery.training import TrainingFailed
from downres.searching.prepare import Measuring, open_data, prepare_task
from downres.tasks import Question, Task
from downres.tasks.agreement.task import OfEmbeddings
from downres.tasks.classification.task import Classification
from downres.tasks.multilabel.task import Multilabel
from downres.tasks.segmentation.task import Segmentation
from downres.tasks.task import of_classes

OPTIONS = {"stem_scales": (), "threads": 1, "runtime": "torch", "fit_head": True, "max_drop": 0.0, "epochs": 3}
pytestmark = pytest.mark.filterwarnings("ignore:runtime .torch. measures in torch")


@pytest.fixture(scope="module")
def loaded(tiny_file, tiny_preprocessing):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)


@pytest.fixture(scope="module")
def sharp(loaded, cells):
    """The same with statistics of the photographs, and logits that differ from image to image."""
    module = copy.deepcopy(loaded.module)
    batch = torch.stack([preprocess(picture, loaded.preprocessing) for picture in cells.dataset().images])
    with torch.no_grad():
        for part in module.body:
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = None
        module.train()(batch)
        module.head.weight *= 100
        module.eval()
        module.head.bias -= module(batch).mean(0)
    return dataclasses.replace(loaded, module=module)


@pytest.fixture
def prepared(sharp, cells, tmp_path):
    """(task, bank, fit images) of the cells, nothing measured yet."""
    data = cells.dataset()
    task = prepare_task(sharp, data, Question())
    open_data(task, data, Measuring(), Question())
    bank = task.bank(tmp_path / "run", runtime="torch", threads=1)
    task.fill(bank)
    return task, bank, task.split(data.folds[0])[0]


def distilled(task, bank, start, teacher, fold, images, how):
    lesson = lesson_of("distill", task, bank, start.network, teacher, images)
    return trainer.trained(bank, start, fold, images, how, lesson, task.seed)


def mismatch(task, bank, state, teacher, images):
    """On the plain images, in eval mode."""
    with torch.inference_mode():
        sides = [torch.cat([task.matched(bank.network(s), x) for x in bank.batches(s, images, 16)]) for s in (state, teacher)]
        return float(task.mismatch(*sides))


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("shape", [(), (3, 4)])
def test_the_divergence_of_classes(classes, shape):
    """Against its definition, sum p (log p - log q), by NumPy in double precision."""
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(2, 5, classes, *shape))

    def softmax(x):
        e = np.exp(x / 2 - (x / 2).max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(theirs), softmax(ours)
    expected = 4 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    found = of_classes(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(found) == pytest.approx(expected)
    assert float(of_classes(*2 * [torch.from_numpy(ours)])) == pytest.approx(0, abs=1e-12)


def test_other_answers_have_other_losses():
    ours, theirs = torch.randn(2, 6, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    p, q = theirs.sigmoid(), ours.sigmoid()
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    assert float(of_classes(ours, theirs)) == pytest.approx(float(expected))
    assert float(Multilabel(None, 1).mismatch(ours, theirs)) == pytest.approx(float(expected))
    assert float(Task.mismatch(None, ours, theirs)) == pytest.approx(float((ours - theirs).square().mean()))
    a, b = torch.randn(2, 6, 5, dtype=torch.double)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert float(OfEmbeddings.mismatch(None, a, b)) == pytest.approx(1 - float(cosine.mean()))
    maps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)
    smaller = F.interpolate(maps[1], (8, 8), mode="bilinear", antialias=True)
    assert torch.equal(Segmentation(None, 3, Dense((16, 16))).mismatch(*maps), of_classes(maps[0], smaller))
    yes = Classification(None, 1, None, 1, False)
    yes.probability = True
    assert float(yes.mismatch(q, p)) == pytest.approx(float(expected))


def test_it_comes_nearer_to_the_original_and_nothing_else_changes(prepared, sharp):
    task, bank, fit = prepared
    before = {name: value.clone() for name, value in sharp.module.state_dict().items()}
    start = State(Candidate(24), 1.0)
    state, told = distilled(task, bank, start, task.native_state, 0, fit, Training(epochs=40, training_batch=16))
    assert told == f"40 epochs on {len(fit)} images, without labels"
    assert [step.done for step in state.history] == [DISTILLED] and state.candidate == start.candidate
    assert mismatch(task, bank, state, task.native_state, fit) < 0.5 * mismatch(task, bank, start, task.native_state, fit)
    assert all(torch.equal(value, before[name]) for name, value in sharp.module.state_dict().items())
    assert not any(parameter.grad is not None for parameter in sharp.module.parameters())
    network = bank.network(state)
    assert not network.training
    # What answers in the bank is that network, its head too.
    x = torch.cat(list(bank.batches(state, fit[:4], 4)))
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(bank.logits(state, fit[:4])), network(x), rtol=1e-4, atol=1e-5)


def test_labels_are_not_looked_at(prepared):
    task, bank, fit = prepared
    how, found = Training(epochs=2), []
    for labels in (task.data.labels, 1 - task.data.labels):
        task._data = dataclasses.replace(task.data, labels=labels)
        found.append(distilled(task, bank, State(Candidate(24), 1.0), task.native_state, 0, fit, how)[0])
    assert found[0] == found[1]


def test_killed_after_any_epoch_it_ends_with_the_same_weights(prepared, monkeypatch):
    task, bank, fit = prepared
    start, how = State(Candidate(24), 1.0), Training(epochs=4)
    whole, _ = distilled(task, bank, start, task.native_state, 0, fit, how)
    seen = bank.passes
    for epoch in (1, 2, 3):
        bank.trained.clear()  # as in another process
        real = trainer._Run._keep

        def killed(run, done, epochs, epoch=epoch, real=real):
            real(run, done, epochs)
            if done == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(trainer._Run, "_keep", killed)
            with pytest.raises(KeyboardInterrupt):
                distilled(task, bank, start, task.native_state, 0, fit, how)
        assert len(list((bank.folder / "training").iterdir())) == 1
        bank.passes = 0
        again, _ = distilled(task, bank, start, task.native_state, 0, fit, how)
        assert again == whole and bank.passes == seen
        assert not list((bank.folder / "training").iterdir())
    # One that is damaged is begun again.
    bank.trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            distilled(task, bank, start, task.native_state, 0, fit, how)
    file = next((bank.folder / "training").iterdir())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert distilled(task, bank, start, task.native_state, 0, fit, how)[0] == whole


def test_dropout_is_as_the_seed_says(prepared, sharp):
    """Twice the same, killed or not, and nobody else's random numbers are others."""
    task, _, fit = prepared
    module = copy.deepcopy(sharp.module)
    module.head = torch.nn.Sequential(torch.nn.Dropout(0.5), module.head)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        bank = Bank(module, sharp.preprocessing, lambda network: network, runtime="torch", threads=1)
        bank.images = task.data.images
        state, _ = distilled(task, bank, State(Candidate(24), 1.0), task.native_state, 0, fit, Training(epochs=2))
        found.append(state)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert found[0] == found[1]


@pytest.mark.parametrize("crop_scale", [1.0, 0.25])
def test_the_original_sees_the_same_crop(prepared, monkeypatch, crop_scale):
    """At its own resolution, mirrored alike, of the same part."""
    task, bank, fit = prepared
    looks = {}
    for name, module in {"student": trainer, "original": distill}.items():

        def seen(images, views, p, size, name=name, real=module.pixels_of):
            for k, x in enumerate(real(images, views, p, size)):
                for i, one in zip(range(k * size, k * size + len(x)), x, strict=True):
                    part = None if views.parts is None else tuple(views.parts[i])
                    looks.setdefault((int(views.images[i]), bool(views.mirrored[i]), part), {})[name] = one
                yield x

        monkeypatch.setattr(module, "pixels_of", seen)
    how = Training(epochs=1, crop_scale=crop_scale)
    distilled(task, bank, State(Candidate(24), 0.75), task.native_state, 0, fit, how)
    shown = [look for look in looks.values() if "student" in look]  # the original sees a batch of whole images mirrored, too
    assert len(shown) == len(fit) and all(part is None for _, _, part in looks) == (crop_scale == 1)
    for look in shown:
        small, large = look["student"], look["original"]
        assert small.shape == (3, 24, 24) and large.shape == (3, 48, 48)
        shrunk = F.interpolate(large[None], (24, 24), mode="bilinear", antialias=True)[0]
        assert (small - shrunk).abs().mean() < 0.25 * small.std()


def test_a_network_is_trained_once(prepared, monkeypatch):
    """Whatever files it becomes."""
    task, bank, fit = prepared
    how = Training(epochs=1)
    first = distilled(task, bank, State(Candidate(24), 1.0), task.native_state, 0, fit, how)
    monkeypatch.setattr(trainer, "_Run", None)
    other = State(Candidate(24, runtime="openvino"), 1.0)
    assert distilled(task, bank, other, task.native_state, 0, fit, how) == (first[0].at(other.candidate), first[1])


class NoGradients(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    @torch.no_grad()
    def forward(self, x):
        return self.module(x)


class Auxiliary(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return {"a": self.module(x), "b": self.module(x)} if self.module.training else self.module(x)


@pytest.mark.parametrize(("kind", "why"), [(NoGradients, "does not require grad"), (Auxiliary, "something else in train mode")])
def test_what_cannot_be_trained_stays_as_it_was(sharp, cells, kind, why):
    loaded = dataclasses.replace(sharp, module=kind(sharp.module).eval())
    _, _, recovery = recover(loaded, cells.dataset(), resolution=24, max_drop=0.0, threads=1, rungs=("distill",), epochs=1)
    assert recovery.rung == "none" and recovery.tried[1].note.startswith("the network cannot be trained (")
    assert why in recovery.tried[1].note


def test_weights_that_are_no_numbers_are_not_kept(prepared, monkeypatch):
    task, bank, fit = prepared
    real = trainer._Run.go

    def spoilt(run):
        told = real(run)
        run.network.head.weight.data[0, 0] = float("inf")  # by the last step, after which no loss is computed
        return told

    monkeypatch.setattr(trainer._Run, "go", spoilt)
    with pytest.raises(TrainingFailed, match="its weights are no numbers at the end"):
        distilled(task, bank, State(Candidate(24), 1.0), task.native_state, 0, fit, Training(epochs=1))
    assert not bank.trained


def test_answers_that_do_not_fit_are_computed_each_time(prepared, monkeypatch):
    task, bank, fit = prepared
    start, how = State(Candidate(24), 1.0), Training(epochs=2)
    kept, _ = distilled(task, bank, start, task.native_state, 0, fit, how)
    bank.trained.clear()
    monkeypatch.setattr(distill, "KEPT_BYTES", 0)
    assert distilled(task, bank, start, task.native_state, 0, fit, how)[0] == kept


def test_minutes_are_kept_to(prepared, monkeypatch):
    task, bank, fit = prepared
    start = State(Candidate(24), 1.0)
    seconds = iter(range(0, 10**6, 30))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(seconds))  # a step takes half a minute
    steps, preview = len(fit) / 32, 5 * 0.5  # of two steps
    how = Training(epochs=9, max_minutes=preview + 2 * 0.5 * steps)
    state, told = distilled(task, bank, start, task.native_state, 0, fit, how)
    assert told == f"2 epochs of 9 asked for on {len(fit)} images, without labels"
    monkeypatch.undo()
    assert distilled(task, bank, start, task.native_state, 0, fit, Training(epochs=2))[0] == state  # the looks left no trace
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(seconds))
    with pytest.raises(TrainingFailed, match=rf"an epoch of {len(fit)} images takes about .* minutes here, 0.1 are allowed"):
        distilled(task, bank, start, task.native_state, 0, fit, Training(max_minutes=0.1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "`epochs` is a whole number from 1"), ({"epochs": 2.5}, "`epochs` is a whole"),
        ({"training_batch": True}, "`training_batch` is a whole"), ({"learning_rate": math.nan}, "`learning_rate` is a number"),
        ({"clip": 0.0}, "`clip` is a number above 0"), ({"max_minutes": -1.0}, "`max_minutes` is a number above 0"),
        ({"weight_decay": -0.1}, "`weight_decay` is a number from 0"), ({"warmup": 1.5}, "`warmup` is a part from 0 to 1"),
    ],
)  # fmt: skip
def test_wrong_options(wrong, said):
    with pytest.raises(DownresError, match=said):
        Training(**wrong)


def test_it_is_climbed_only_when_it_is_asked_for(loaded, cells):
    assert "distill" not in UNASKED
    options = {"resolution": 24, "max_drop": 0.0, "threads": 1, "fit_head": True}
    _, _, recovery = recover(loaded, cells.dataset(), **options)
    assert "distill" not in [rung.rung for rung in recovery.tried]
    network, p, recovery = recover(loaded, cells.dataset(), rungs=("distill",), epochs=2, **options)
    assert [rung.rung for rung in recovery.tried] == ["none", "distill"] and p.hw == (24, 24)
    assert network(torch.zeros(1, 3, 24, 24)).shape == (1, 2)


def test_a_loss_that_is_no_number_leaves_the_candidate_as_it_was(loaded, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "mismatch", lambda self, ours, theirs: (ours - theirs).sum() * float("nan"))
    run = search(loaded, cells.dataset(), resolutions=[24], rungs=("distill",), out=tmp_path / "run", **OPTIONS)
    (r,) = run.results
    assert r.status == "measured" and r.recovery.rung == "none"
    assert r.recovery.tried[1].note.startswith("its loss is no number")


@pytest.mark.parametrize(("folds", "minimize"), [(1, "macs"), (2, "macs"), (2, "size")])
def test_what_was_trained_is_shipped_and_proven(loaded, cells, tiny_file, tmp_path, folds, minimize, monkeypatch):
    """Through ONNX Runtime; with an 8-bit file that begins where its network in float ended."""
    monkeypatch.setattr(Classification, "choose", lambda self, options: options[1 if len(options) > 1 else 0])
    dataset = cells.dataset(folds=folds)
    options = {**OPTIONS, "runtime": "onnxruntime", "max_drop": 90.0, "minimize": minimize}
    options["folds"] = folds if folds > 1 else None
    tried = ["24", "24 int8"]
    with monkeypatch.context() as patch:
        patch.setattr("downres.recovery.ladder._Ladder.attempt", unsatisfied(downres.recovery.ladder._Ladder.attempt))
        run = search(loaded, dataset, resolutions=[], candidates=tried, rungs=("distill",), out=tmp_path / "run", **options)
    by_name = {str(r.candidate): r for r in run.results}
    assert by_name["24"].recovery.rung == "distill"
    states = states_of(run)
    assert all([step.done for step in state.history] == [DISTILLED] for state in states["24"])
    for ours, of_float in zip(states["24 int8"], states["24"], strict=True):
        assert [step.done for step in ours.history] == [DISTILLED, QUANTIZED] and ours.history[0] == of_float.history[0]
    assert len({state.history[0].tensors for state in states["24"]}) == folds  # each has its own
    kept = {file.stem for file in (run.folder / "weights").iterdir()}
    assert kept == {step.tensors for every in states.values() for state in every for step in state.history if step.tensors}
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert manifest["runtime"]["precision"] == ("int8" if minimize == "size" else "fp32")
    images = len(dataset.images) if folds > 1 else len(dataset.folds[0].train)
    assert manifest["state"]["history"][0]["images"] > 0.7 * images  # all but those that are tuned on
    assert any("trained to answer as the original's" in told for told in manifest["source"]["model"]["changed"])
    assert all(f.ok for f in check(run.artifact, model=f"{tiny_file}:make", data=dataset))
    assert not (run.folder / "training").exists()


def unsatisfied(attempt):
    """No rung is enough."""

    def tried(ladder, *arguments, **options):
        attempt(ladder, *arguments, **options)
        return False

    return tried


def states_of(run):
    lines = map(json.loads, (run.folder / "measurements.jsonl").read_text().splitlines())
    found = {one["key"][8:]: one["value"] for one in lines if one["key"].startswith("quality/")}
    return {name: [State.from_json(s) for s in value["states"]] for name, value in found.items()}


def test_photographs_are_enough(sharp, cells, tmp_path):
    """Agreement has no labels: what the rung is for."""
    folder = cells.write(tmp_path / "labelled")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        shutil.copy(file, photos / f"{i}.png")
    options = {
        "resolution": 24,
        "max_drop": 0.0,
        "threads": 1,
        "task": "agreement",
        "epochs": 15,
        "training_batch": 16,
        "batchnorm": True,
    }
    for compare in ("classes", "embeddings"):
        _, _, recovery = recover(sharp, photos, rungs=("distill",), compare=compare, **options)
        none, trained = recovery.tried
        assert trained.rung == "distill" and trained.score > none.score


def test_other_settings_are_another_run(loaded, cells, tmp_path):
    options = {**OPTIONS, "resolutions": [24], "rungs": ("distill",)}
    search(loaded, cells.dataset(), out=tmp_path, **options)
    with pytest.raises(DownresError, match="another training epochs"):
        search(loaded, cells.dataset(), out=tmp_path, **{**options, "epochs": 4})


def test_pictures_of_sixteen_bits_keep_them(prepared):
    task, bank, fit = prepared

    class Sixteen:
        def __getitem__(self, i):
            return task.data.images[i].astype(np.uint16) * 257

    bank.images = Sixteen()
    with pytest.raises(TrainingFailed, match="`augment` changes colours of 8 bits, the images are uint16"):
        distilled(task, bank, State(Candidate(24), 1.0), task.native_state, 0, fit, Training(epochs=1, augment="randaugment"))


# Features


def test_features_are_matched_beside_the_answers(prepared, loaded):
    """The loss is that of the answers and the weighted cosine of what the head gets, by hand; training brings both together."""
    task, bank, fit = prepared
    images, start = fit[:32], State(Candidate(24), task.native_state.crop_ratio)
    bank.training = Training(epochs=3, training_batch=16, features=2.0)
    lesson = lesson_of("distill", task, bank, start.network, task.native_state, images)
    student = lesson.student(bank, start)
    lesson.begin(student)
    views = distill.Views(images[:4], np.zeros(4, bool))
    wanted = lesson.targets(views)
    (small,), (large,) = (list(bank.batches(s, images[:4], 4)) for s in (start, task.native_state))

    def features(network, x):
        return network.body(x).mean((2, 3))

    teacher = bank.network(task.native_state)
    with torch.no_grad():
        assert torch.allclose(wanted, torch.cat([task.matched(teacher, large), features(teacher, large)], 1), atol=1e-5)
        apart = 1 - F.cosine_similarity(features(student, small), features(teacher, large))
        by_hand = task.mismatch(task.matched(student, small), task.matched(teacher, large)) + 2 * apart.mean()
        assert float(lesson.loss(student, small, wanted)) == pytest.approx(float(by_hand), rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())

    def cosine(state):
        with torch.no_grad():
            ours, theirs = (
                torch.cat([features(bank.network(s), x) for x in bank.batches(s, images, 16)])
                for s in (state, task.native_state)
            )
        return float(F.cosine_similarity(ours, theirs).mean())

    done, told = trainer.trained(bank, start, 0, images, bank.training, lesson, task.seed)
    assert "features matched" in told and cosine(done) > cosine(start)


def test_features_of_maps_are_refused(prepared, monkeypatch):
    task, bank, fit = prepared
    bank.training = Training(features=1.0)
    start = State(Candidate(24), 1.0)
    lesson = lesson_of("distill", task, bank, start.network, task.native_state, fit[:8])
    monkeypatch.setattr(task, "matched", lambda network, x: network(x)[:, :, None, None])
    with pytest.raises(TrainingFailed, match="answers with maps"):
        lesson.targets(distill.Views(fit[:2], np.zeros(2, bool)))
    with pytest.raises(DownresError, match="`features` are matched of one network"):
        Switching(task, bank, start, [State(Candidate(16), 1.0)], task.native_state, fit[:8], False)
