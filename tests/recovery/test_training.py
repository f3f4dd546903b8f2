"""The trainer whatever it teaches: views, options, labels, 8 bits, memory, several processes, and the ladder above it."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from downres import Candidate, Preprocessing, Training, check, load_model, load_run, recover, search
from downres.errors import DownresError
from downres.images import preprocess
from downres.images.images import from_arrays
from downres.records import Dense
from downres.recovery import trainer
from downres.recovery.finetune import Finetuning, FixRes, last_layers
from downres.recovery.ladder import HEIGHTS, RUNGS, TAUGHT, chosen_rungs, lesson_of, rungs_for
from downres.recovery.rounded import Rounding
from downres.recovery.state import FINETUNED, FIXRES, QUANTIZED, ROUNDED, State
from downres.recovery.training import TrainingFailed
from downres.recovery.views import Altered, Views, cut, drawn, pixels_of
from downres.searching.prepare import Measuring, open_data, prepare_task
from downres.tasks import Question
from downres.tasks.classification.task import Classification

pytestmark = pytest.mark.filterwarnings("ignore:runtime .torch. measures in torch")
SMALL = Preprocessing(48, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def loaded(tiny_file):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=SMALL)


@pytest.fixture
def prepared(loaded, cells, tmp_path):
    return prepare(loaded, cells.dataset(), tmp_path / "run")


def prepare(loaded, data, folder, question=Question(), task=None):
    """(task, bank, fit images), nothing measured yet."""
    subject = prepare_task(loaded, data, question, task)
    open_data(subject, data, Measuring(), question)
    bank = subject.bank(folder, runtime="torch", threads=1)
    subject.fill(bank)
    return subject, bank, subject.split(subject.data.folds[0])[0]


START = State(Candidate(24), 1.0)


def teach(rung, prepared, how, start=START, watch=None):
    task, bank, fit = prepared
    lesson = lesson_of(rung, task, bank, start.network, task.native_state, fit)
    return trainer.trained(bank, start, 0, fit, how, lesson, task.seed, watch)


def right(prepared, state):
    """Share of the fit images that get their label."""
    task, bank, fit = prepared
    return float(np.mean(task.evidence(bank, state, fit, serving=False)["correct"]))


# Views


def test_the_part_of_a_random_resized_crop():
    """Areas, shapes and places as torchvision's RandomResizedCrop draws them, of pictures twice as wide as high."""
    pictures = from_arrays(np.zeros((4000, 10, 20), np.uint8))
    views = drawn(pictures, np.arange(4000), Training(crop_scale=0.25), np.random.default_rng(0))
    top, left, height, width = views.parts.T
    assert (views.parts >= 0).all() and (top + height <= 1 + 1e-9).all() and (left + width <= 1 + 1e-9).all()
    inside = (height < 1) & (width < 1)
    area, aspect = (height * width)[inside], (2 * width / height)[inside]
    assert area.min() >= 0.25 and 0.5 < (height * width).mean() <= 0.63  # uniform from 0.25 to 1, less what does not fit
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.34
    assert abs(views.mirrored.mean() - 0.5) < 0.03
    assert sorted(views.images) == list(range(4000))


def test_repeats_and_order_are_as_the_seed_says():
    pictures = from_arrays(np.zeros((10, 4, 4), np.uint8))
    one, same, other = (drawn(pictures, np.arange(10), Training(repeats=2), np.random.default_rng(s)) for s in (0, 0, 1))
    assert np.array_equal(one.images, same.images) and not np.array_equal(one.images, other.images)
    assert len(one) == 10 and len(set(one.images)) == 5 and np.array_equal(one.images[::2], one.images[1::2])
    with pytest.raises(DownresError, match="cannot have each 3 times"):
        Training(repeats=3)


def test_a_view_is_that_part_mirrored():
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    part = np.array([0.25, 0.5, 0.5, 0.5])
    assert np.array_equal(cut(picture, part), picture[2:6, 4:8])
    views = Views(np.array([0, 0]), np.array([False, True]), np.stack([part, part]))
    p = Preprocessing(4, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3)
    (x,) = pixels_of(from_arrays(picture[None]), views, p, 2)
    assert np.array_equal((x[0] * 255).round().byte().permute(1, 2, 0).numpy(), picture[2:6, 4:8])
    assert torch.equal(x[1], x[0].flip(-1))
    assert cut(picture, np.array([0.99, 0.99, 0.01, 0.01])).shape == (1, 1, 3)


@pytest.mark.parametrize("augment", ["randaugment", "trivialaugment"])
def test_nothing_is_moved(augment):
    """A vertical edge stays where it is: masks, and what the original was shown, know of no other place."""
    p = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    x = torch.ones(64, 3, 16, 16)
    x[..., :8] = -1
    torch.manual_seed(0)
    made = Altered(Training(augment=augment), p)(x)
    assert torch.equal(made[..., 1:-1, :], made[..., 1:2, :].expand(-1, -1, 14, -1)) and not torch.equal(made, x)  # rows alike
    steps = made[:, :, 8].diff(dim=-1).abs().amax(1)
    assert (steps.argmax(1)[steps.amax(1) > 0] == 7).all()


@pytest.mark.parametrize("augment", ["randaugment", "trivialaugment"])
def test_other_colours_are_of_eight_bits(augment):
    p = Preprocessing(16, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = preprocess(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8), p)[None].repeat(16, 1, 1, 1)
    torch.manual_seed(0)
    made = Altered(Training(augment=augment), p)(x)
    assert made.shape == x.shape and not torch.equal(made, x)
    levels = (made * torch.tensor(p.std)[:, None, None] + torch.tensor(p.mean)[:, None, None]) * 255
    assert (levels - levels.round()).abs().max() < 1e-2 and levels.min() > -0.1 and levels.max() < 255.1
    assert len({one.sum().item() for one in made}) > 3  # each its own
    assert torch.equal(Altered(Training(), p)(x), x)
    erased = Altered(Training(erasing=1.0), p)(torch.ones_like(x))
    assert ((erased == 0).flatten(1).any(1)).all() and len({one.sum().item() for one in erased}) > 3
    with pytest.raises(DownresError, match="`augment` changes colours of 8 bits, the network takes 1 channels"):
        Altered(Training(augment=augment), Preprocessing(16, 1.0, "bilinear", (0.5,), (0.5,)))


# Labels


def test_losses_of_labels(prepared):
    task, bank, fit = prepared
    views = Views(fit[:6], np.zeros(6, bool))
    targets = task.learned(bank, views, (24, 24))
    assert targets.tolist() == [[1.0, 0.0] if label == 0 else [0.0, 1.0] for label in task.labels[fit[:6]]]
    ours = torch.randn(6, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    p = ours.softmax(1)
    smooth = targets.double() * 0.8 + 0.1
    assert float(task.loss_of(ours, targets.double(), 0.2)) == pytest.approx(float(-(smooth * p.log()).sum(1).mean()))
    single = Classification(None, 1, None, 1, False)
    q, y = ours[:, :1].sigmoid(), targets[:, 1:].double()
    expected = float(-((y * 0.8 + 0.1) * q.log() + (0.9 - 0.8 * y) * (1 - q).log()).mean())
    assert float(single.loss_of(ours[:, :1], y, 0.2)) == pytest.approx(expected)
    single.probability = True
    assert float(single.loss_of(q, y, 0.2)) == pytest.approx(expected)


@pytest.mark.parametrize(("rung", "done"), [("finetune", FINETUNED), ("fixres", FIXRES)])
def test_labels_are_learned(prepared, rung, done):
    task, bank, fit = prepared
    start = State(Candidate(24), 1.0)
    state, told = teach(rung, prepared, Training(epochs=80, learning_rate=2e-2, training_batch=20, batchnorm=True), start)
    assert [step.done for step in state.history] == [done]
    assert told.startswith(f"80 epochs on {len(fit)} images, with labels")
    assert right(prepared, start) < 0.6 and right(prepared, state) > 0.75


def test_fixres_begins_with_the_head_and_the_last_normalisation(prepared):
    task, bank, _ = prepared
    network = bank.network(State(Candidate(24), 1.0))
    x = torch.zeros(2, 3, 24, 24)
    assert last_layers(network, lambda: network(x)) == [network.head, network.body[4]]
    lesson = FixRes(task, bank, (24, 24), Training())
    lesson.begin(network)
    own = {id(p) for part in (network.head, network.body[4]) for p in part.parameters()}
    assert {id(p) for p in network.parameters()} - {id(p) for p in lesson.frozen(network, 0.3)} == own
    assert not lesson.frozen(network, 0.34)
    # Of three epochs in the first nothing else moves.
    seen = []
    real = trainer._Run._keep

    def looked(run, done, epochs):
        seen.append({name: p.detach().clone() for name, p in run.network.named_parameters()})
        real(run, done, epochs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "_keep", looked)
        teach("fixres", prepared, Training(epochs=3, weight_decay=0.5))
    before = dict(network.named_parameters())
    moved = [{name for name in before if not torch.equal(before[name], after[name])} for after in seen]
    assert moved[0] == {"head.weight", "head.bias", "body.4.weight", "body.4.bias"}
    assert moved[1] == set(before)


def test_statistics_stay_unless_they_are_asked_for(prepared):
    task, bank, _ = prepared
    before = bank.network(START).state_dict()
    for asked in (False, True):
        state, _ = teach("finetune", prepared, Training(epochs=1, batchnorm=asked))
        kept = bank.weights.get(state.history[0].tensors)
        assert np.array_equal(kept["body.1.running_mean"], before["body.1.running_mean"].numpy()) == (not asked)
        assert not np.array_equal(kept["body.1.weight"], before["body.1.weight"].numpy())


def test_mixed_labels_are_mixed_as_their_images_are(prepared):
    task, bank, fit = prepared
    for options in ({"mixup": 1.0}, {"cutmix": 1.0}):
        lesson = Finetuning(task, bank, (24, 24), Training(**options))
        targets = torch.eye(2).repeat(4, 1)
        x = targets[:, 1].view(-1, 1, 1, 1).expand(-1, 3, 24, 24)  # each pixel is its label
        torch.manual_seed(1)
        mixed, labels = lesson.mixed(x, targets)
        torch.testing.assert_close(labels.sum(1), torch.ones(8))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), labels[:, 1])
        assert ((labels > 0.01) & (labels < 0.99)).any()
    plain = Finetuning(task, bank, (24, 24), Training())
    assert plain.mixed(x, targets) == (x, targets)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "sgd", "learning_rate": 0.05}, {"optimizer": "lamb", "schedule": "poly"}, {"ema": 0.9}, {"bf16": True},
     {"crop_scale": 0.3, "augment": "trivialaugment", "erasing": 0.3, "repeats": 2, "mixup": 0.2, "label_smoothing": 0.1}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_killed_with_any_option_it_ends_with_the_same_weights(prepared, options, monkeypatch):
    task, bank, fit = prepared
    how = Training(epochs=3, **options)
    whole, _ = teach("finetune", prepared, how)
    bank.trained.clear()
    real = trainer._Run._keep

    def killed(run, done, epochs):
        real(run, done, epochs)
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._Run, "_keep", killed)
        teach("finetune", prepared, how)
    assert teach("finetune", prepared, how)[0] == whole
    bank.trained.clear()
    assert teach("finetune", prepared, Training(epochs=3))[0] != whole  # the option does something


def test_the_average_is_that_of_the_weights(prepared, monkeypatch):
    """After each step a · average + (1 - a) · weights, from the weights before the first; a is warmed up."""
    task, bank, fit = prepared
    expected, real = [], trainer._Run._step

    def step(run, *arguments):
        if not expected:
            expected.append([p.detach().clone() for p in run.parameters])
        loss = real(run, *arguments)
        d = min(0.7, len(expected) / (9 + len(expected)))
        expected.append([d * a + (1 - d) * p.detach() for a, p in zip(expected[-1], run.parameters, strict=True)])
        return loss

    monkeypatch.setattr(trainer._Run, "_affordable", lambda run: run.how.epochs)
    monkeypatch.setattr(trainer._Run, "_step", step)
    state, _ = teach("finetune", prepared, Training(epochs=2, ema=0.7))
    kept = bank.weights.get(state.history[0].tensors)
    names = [name for name, _ in bank.network(State(Candidate(24), 1.0)).named_parameters()]
    for name, average in zip(names, expected[-1], strict=True):
        np.testing.assert_allclose(kept[name], average.numpy(), rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_fit_is_looked_at_in_parts(tiny_file, cells, tmp_path, monkeypatch):
    """Without BatchNorm the step is the same but for the order of sums; and it is said."""
    loaded = dataclasses.replace(load_model(f"{tiny_file}:without_norm"), preprocessing=SMALL)
    prepared = prepare(loaded, cells.dataset(), tmp_path / "run")
    task, bank, fit = prepared
    how = Training(epochs=2, training_batch=32)
    whole, _ = teach("finetune", prepared, how)
    bank.trained.clear()
    real = Finetuning.loss

    def hungry(lesson, network, x, targets):
        if len(x) > 10:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(lesson, network, x, targets)

    monkeypatch.setattr(Finetuning, "loss", hungry)
    parts, told = teach("finetune", prepared, how)
    assert "8 images at a time, as more did not fit" in told
    one, other = (bank.weights.get(state.history[0].tensors) for state in (whole, parts))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)
    bank.trained.clear()
    monkeypatch.setattr(Finetuning, "loss", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(TrainingFailed, match="the network cannot be trained"):
        teach("finetune", prepared, how)


def test_numbers_go_to_a_tracker(prepared):
    pytest.importorskip("tensorboard", reason="downres[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task, bank, _ = prepared
    teach("finetune", prepared, Training(epochs=3, log="tensorboard"))
    (folder,) = {file.parent for file in (bank.folder / "logs").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3] and folder.name == "finetune 24"
    with pytest.raises(DownresError, match="Training is logged to mlflow, which is not installed: pip install mlflow"):
        Training(log="mlflow")


class Headed(torch.nn.Module):
    """Its head is declared first, an auxiliary one last; while it is trained a wrapper would answer with both."""

    def __init__(self, tuple_inside=False):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(8, 2)
        self.body = torch.nn.Conv2d(3, 8, 3, 2)
        self.aux = torch.nn.Linear(8, 2)
        self.tuple_inside = tuple_inside

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return (self.aux(x), self.head(x)) if self.training else self.head(x)


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = Headed()

    def forward(self, x):
        return self.inside(x)


def test_the_head_is_what_answers(cells, tmp_path, loaded):
    module = Headed().eval()
    task, bank, fit = prepare(dataclasses.replace(loaded, module=module), cells.dataset(), tmp_path / "run")
    state, _ = teach("fixres", (task, bank, fit), Training(epochs=2))
    kept = bank.weights.get(state.history[0].tensors)
    assert not np.array_equal(kept["head.weight"], module.head.weight.detach().numpy())
    assert np.array_equal(kept["aux.weight"], module.aux.weight.detach().numpy())
    other = prepare(dataclasses.replace(loaded, module=Wrapped().eval()), cells.dataset(), tmp_path / "other")
    with pytest.raises(TrainingFailed, match="Wrapped returns something else in train mode"):
        teach("finetune", other, Training(epochs=2))


class Viewing(torch.nn.Module):
    """Runs in the layout that its view was written for alone, or asks for nothing."""

    def __init__(self, views):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(3, 8, 3, 2)
        self.head = torch.nn.Linear(8, 2)
        self.views = views

    def forward(self, x):
        x = self.body(x)
        return self.head(x.view(len(x), -1).unflatten(1, (8, -1)).mean(2) if self.views else x.mean((2, 3)))


@pytest.mark.parametrize(("views", "layout"), [(False, torch.channels_last), (True, torch.contiguous_format)])
def test_channels_are_last_where_the_network_takes_them_so(cells, tmp_path, loaded, monkeypatch, views, layout):
    prepared = prepare(dataclasses.replace(loaded, module=Viewing(views).eval()), cells.dataset(), tmp_path / "run")
    seen, real = [], Finetuning.loss
    monkeypatch.setattr(Finetuning, "loss", lambda lesson, network, x, y: seen.append(x) or real(lesson, network, x, y))
    state, _ = teach("finetune", prepared, Training(epochs=1))
    assert all(x.is_contiguous(memory_format=layout) for x in seen)
    _, bank, _ = prepared
    assert bank.weights.get(state.history[0].tensors)["body.weight"].flags.c_contiguous


def test_a_rest_of_one_image_goes_with_the_batch_before(prepared, monkeypatch):
    task, bank, fit = prepared
    seen, real = [], Finetuning.loss
    monkeypatch.setattr(Finetuning, "loss", lambda lesson, network, x, y: seen.append(len(x)) or real(lesson, network, x, y))
    teach("finetune", (task, bank, fit[:33]), Training(epochs=1))
    assert seen == [33, 33]  # the preview, and the epoch


class Crowded(Headed):
    """What it answers depends a little on how many images it is given, as last bits do on processors with wide vectors."""

    def forward(self, x):
        return super().forward(x) * (1 + len(x) / 100)


def test_a_training_that_goes_on_is_taught_the_same(cells, tmp_path, loaded, monkeypatch):
    task, bank, fit = prepare(dataclasses.replace(loaded, module=Crowded().eval()), cells.dataset(), tmp_path / "run")
    how, real = Training(epochs=4, training_batch=24), trainer._Run._keep
    (whole,) = teach("distill", (task, bank, fit), how)[0].history
    assert bank.passes == 4 * len(fit) + 2 * len(fit)  # the student's, and the original's of each image and its mirror image
    bank.trained.clear()

    def killed(self, done, epochs):
        real(self, done, epochs)
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer._Run, "_keep", killed)
        teach("distill", (task, bank, fit), how)
    (again,) = teach("distill", (task, bank, fit), how)[0].history
    before, after = bank.weights.get(whole.tensors), bank.weights.get(again.tensors)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("task_loss", ["mse", "probability"])
def test_the_originals_answers_may_be_kept_by_a_loss(prepared, monkeypatch, task_loss):
    """Of parts they are computed each time."""
    loss = {"mse": torch.nn.functional.mse_loss, "probability": lambda a, b: (a * b.sigmoid()).mean()}[task_loss]
    monkeypatch.setattr(Classification, "mismatch", lambda self, ours, theirs: loss(ours, theirs))
    assert teach("distill", prepared, Training(epochs=1, crop_scale=0.5))[1].endswith("without labels")


# 8 bits


def test_rounding_is_that_of_eight_bits(loaded):
    """Weights on 255 levels a channel, activations on 256; the last layer in float; undone without a trace."""
    network = copy.deepcopy(loaded.module)
    lesson = Rounding.__new__(Rounding)
    lesson.bank = type("Bank", (), {"head": "head"})()
    lesson.begin(network)
    x = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    network.train()(x)
    for name, own in (("body.0", loaded.module.body[0].weight), ("body.3", loaded.module.body[3].weight)):
        found = network.get_submodule(name).weight.detach()
        for channel, before in zip(found, own.detach(), strict=True):
            step = before.abs().max() / 127
            torch.testing.assert_close(channel, (before / step).round() * step, rtol=0, atol=1e-6)
    assert torch.equal(network.head.weight, loaded.module.head.weight) and not network.head._forward_pre_hooks
    low, high = network.body[0].rounded_range
    assert float(low) == pytest.approx(float(x.min())) and float(high) == pytest.approx(float(x.max()))
    x.requires_grad_()
    network(x).sum().backward()
    assert network.body[0].parametrizations.weight.original.grad.abs().sum() > 0  # straight through
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    lesson.end(network)
    assert network.state_dict().keys() == loaded.module.state_dict().keys()
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert torch.equal(network.body[0].weight, loaded.module.body[0].weight)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_an_8_bit_file_is_made_of_what_was_trained_for_it(loaded, cells, tiny_file, tmp_path, monkeypatch):
    """Through ONNX Runtime, after the rungs that train nothing; shipped, and checked."""
    monkeypatch.setattr(Classification, "choose", lambda self, options: options[-1])
    monkeypatch.setattr("downres.recovery.ladder._Ladder.is_over", lambda self: True)
    dataset = cells.dataset()
    options = {"resolutions": [], "candidates": ["24 int8"], "rungs": ("qat",), "max_drop": 90.0, "minimize": "size"}
    options |= {"threads": 1, "stem_scales": (), "fit_head": True, "epochs": 2}
    run = search(loaded, dataset, out=tmp_path / "run", **options)
    (r,) = run.results
    assert r.recovery.rung == "none"  # within at once: nothing was needed
    monkeypatch.setattr("downres.recovery.ladder._Ladder.attempt", unsatisfied())
    run = search(loaded, dataset, out=tmp_path / "again", **options)
    (r,) = run.results
    assert r.recovery.rung == "qat" and "rounded to 8 bits" in r.recovery.tried[-1].note
    lines = map(json.loads, (run.folder / "measurements.jsonl").read_text().splitlines())
    (state,) = next(one["value"]["states"] for one in lines if one["key"] == "quality/24 int8")
    assert [step.done for step in State.from_json(state).history] == [ROUNDED, QUANTIZED]
    assert all(f.ok for f in check(run.artifact, model=f"{tiny_file}:make", data=dataset))


def unsatisfied():
    from downres.recovery.ladder import _Ladder

    real = _Ladder.attempt

    def tried(ladder, *arguments, **options):
        real(ladder, *arguments, **options)
        return False

    return tried


# The ladder


def test_how_far_to_climb_in_a_word(prepared, loaded, cells):
    task = prepared[0]
    assert list(HEIGHTS) == ["none", "calibrate", "refit", "distill", "finetune", "train"]
    rungs = [chosen_rungs(None, word) for word in HEIGHTS]
    assert rungs[0] == () and set(rungs[-1]) == set(RUNGS)
    assert all(set(low) < set(high) for low, high in zip(rungs, rungs[1:], strict=False))
    assert chosen_rungs(None, None) == HEIGHTS["refit"] and not set(HEIGHTS["refit"]) & set(TAUGHT)
    assert rungs_for(task, [Candidate(24)], RUNGS) == ("crop", "batchnorm", "head", "distill", "fixres", "finetune")
    assert set(rungs_for(task, [Candidate(24, precision="int8")], RUNGS)) == set(RUNGS)
    with pytest.raises(DownresError, match="`recover` is one of none, calibrate, .*, 'all' is not"):
        chosen_rungs(None, "all")
    with pytest.raises(DownresError, match="not both"):
        chosen_rungs(("crop",), "none")
    network, p, recovery = recover(
        loaded, cells.dataset(), resolution=24, max_drop=0.0, threads=1, fit_head=True, recover="finetune", epochs=2
    )
    tried = [rung.rung for rung in recovery.tried if rung.n]
    assert tried[-3:] == ["distill", "fixres", "finetune"] and p.hw == (24, 24)
    assert network(torch.zeros(1, 3, 24, 24)).shape == (1, 2)


def test_what_was_trained_stays_of_its_candidate(loaded, cells, tmp_path):
    """Of another runtime too: measured and shipped there."""
    from downres.records import Budget
    from downres.recovery.ladder import climb

    task, bank, _ = prepare(loaded, cells.dataset(), tmp_path / "run")
    bank.training = Training(epochs=2)
    reference = task.reference(bank, 0, task.data.folds[0], ("distill",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "choose", lambda self, options: options[-1])
        state, recovery = climb(task, bank, Candidate(24, runtime="onnxruntime"), reference, Budget(0.0), ("distill",))
    assert recovery.rung == "distill" and state.candidate == Candidate(24, runtime="onnxruntime")


def test_without_labels_none_are_learned(loaded, cells, tmp_path):
    cells.write(tmp_path / "photos")
    task, *_ = prepare(loaded, str(tmp_path / "photos"), None, Question(task="agreement", compare="classes"))
    assert rungs_for(task, [Candidate(24)], RUNGS) == ("crop", "batchnorm", "distill")


def test_a_hopeless_training_ends_half_way(prepared):
    """And what it had by then is not taken."""
    looks = []

    def watch(state):
        looks.append(state)
        return "a drop of 9 on 12 tuning images, 9.5 before it"

    with pytest.raises(TrainingFailed, match="given up after 2 of 4 epochs: a drop of 9 on 12 tuning images"):
        teach("finetune", prepared, Training(epochs=4), watch=watch)
    assert [step.done for step in looks[0].history] == [FINETUNED]
    assert right(prepared, looks[0]) >= 0  # it is a whole state, which was measured
    with pytest.raises(TrainingFailed, match="given up after 2 of 4"):  # remembered
        teach("finetune", prepared, Training(epochs=4))
    prepared[1].trained.clear()  # in another process it is asked again before it goes on
    with pytest.raises(TrainingFailed, match="given up after 2 of 4"):
        teach("finetune", prepared, Training(epochs=4), watch=watch)
    watched, _ = teach("finetune", prepared, Training(epochs=4, learning_rate=2e-3), watch=lambda state: "")
    prepared[1].trained.clear()
    assert teach("finetune", prepared, Training(epochs=4, learning_rate=2e-3))[0] == watched  # a look changes nothing


def test_what_is_hopeless():
    """Half-way beyond doubt outside still, and more is missing than was won."""
    from downres.records import OUTSIDE, TOO_FEW, WITHIN, Budget, Drop
    from downres.recovery.ladder import Option, _Ladder

    begun = State(Candidate(24), 1.0)

    def why(before, now, lower, verdict, allowed=1.0):
        ladder = _Ladder.__new__(_Ladder)
        ladder.budget, ladder.options = (
            Budget(allowed),
            [Option("none", None, begun, Drop(before, before, before, allowed, OUTSIDE, 50), begun)],
        )
        ladder.reference = type("R", (), {"tune": range(50), "evidence": None})()
        ladder._look = lambda *a: (None, Drop(now, lower, now + 1, allowed, verdict, 50))
        return ladder.hopeless(begun)(begun)

    assert why(20, 19, 15, OUTSIDE) == "a drop of 19 on 50 tuning images, 20 before it"
    assert why(20, 8, 5, OUTSIDE) == ""  # 12 won, 4 missing
    assert why(20, 25, 5, OUTSIDE) != ""
    assert why(20, 19, -3, TOO_FEW) == why(20, 0, -1, WITHIN) == ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "adam"}, "`optimizer` is one of adamw, sgd, lamb, 'adam' is not"), ({"ema": 1.0}, "`ema` is a decay"),
        ({"crop_scale": 0.0}, "`crop_scale` is a number above 0"), ({"crop_scale": 1.5}, "`crop_scale` is a part from 0 to 1"),
        ({"mixup": -1.0}, "`mixup` is a number from 0"), ({"augment": "autoaugment"}, "`augment` is one of randaugment"),
    ],
)  # fmt: skip
def test_wrong_options(wrong, said):
    with pytest.raises(DownresError, match=said):
        Training(**wrong)


def test_options_as_text():
    found = Training.parse(["mixup=0.2", "optimizer=sgd", "bf16=true", "training-batch=16"], epochs=3, max_minutes=None)
    assert found == Training(epochs=3, mixup=0.2, optimizer="sgd", bf16=True, training_batch=16)
    for text, said in (
        ("speed=3", "NAME=VALUE"),
        ("mixup", "NAME=VALUE"),
        ("mixup=much", "is a number"),
        ("bf16=2", "true or"),
    ):
        with pytest.raises(DownresError, match=said):
            Training.parse([text])


def test_the_command_line_trains(cells, tiny_file, tmp_path, cli):
    cells.write(tmp_path / "data")
    command = ["search", f"{tiny_file}:make", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--fit-head"]
    command += ["--native-resolution", "48", "--resolution", "24", "--max-drop", "0", "--epochs", "2", "--threads", "1"]
    command += ["--recover", "finetune", "--train", "label_smoothing=0.1", "--stem-scale", "none", "--json"]
    assert cli(*command).code == 0
    (result,) = load_run(tmp_path / "run").results
    tried = {rung.rung: rung for rung in result.recovery.tried}
    assert tried["finetune"].n and tried["fixres"].n and "2 epochs" in tried["finetune"].note
    refused = cli(*command, "--rungs", "head")
    assert refused.code == 2 and "not both" in refused.err


# Several processes


SEVERAL = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "downres"]


def in_two_processes(command):
    environment = {**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*SEVERAL, *command], env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_train_what_one_does(cells, tiny_file, tmp_path, cli):
    """`torchrun`, a real search; without BatchNorm, whose statistics are of each process's share."""
    cells.write(tmp_path / "data")
    command = [
        "search",
        f"{tiny_file}:without_norm",
        "--data",
        str(tmp_path / "data"),
        "--fit-head",
        "--json",
        "--threads",
        "1",
    ]
    command += ["--native-resolution", "48", "--resolution", "24", "--max-drop", "0", "--epochs", "3", "--runtime", "torch"]
    command += ["--rungs", "distill,finetune", "--stem-scale", "none", "--train", "log=tensorboard", "--out"]
    assert cli(*command, tmp_path / "one").code == 0
    done = in_two_processes([*command, str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["finished"]  # one document, though two ran
    assert len(list((tmp_path / "two" / "logs").rglob("events*"))) == 2  # a training each
    found = []
    for name in ("one", "two"):
        (result,) = load_run(tmp_path / name).results
        found.append((result, load_file(max((tmp_path / name / "weights").iterdir(), key=lambda f: f.stat().st_size))))
    (one, a), (two, b) = found
    assert one.recovery.rung == two.recovery.rung != "none" and one.quality == two.quality
    for ours, theirs in zip(one.recovery.tried, two.recovery.tried, strict=True):
        assert ours.rung == theirs.rung and ours.score == pytest.approx(theirs.score, abs=1e-9)
    assert "in 2 processes" in two.recovery.tried[-1].note
    assert len(a) == 6  # all weights, trained
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-5)


def test_targets_of_masks():
    """Each pixel of the network's input has the class under it; void where there is none, and in padding."""
    from downres.tasks.segmentation.task import Segmentation

    class Data:
        images = from_arrays(np.zeros((2, 4, 8, 3), np.uint8))

    mask = np.arange(8, dtype=np.uint8)[None].repeat(4, 0)
    mask[0] = 255

    class Masks(Segmentation, register=False):
        truth = (mask, mask)

    task = Masks.__new__(Masks)
    task.dense = Dense((2, 4))
    task._data = Data()
    task._model = type("M", (), {"preprocessing": dataclasses.replace(SMALL, fit="stretch")})()
    made = task.learned(None, Views(np.array([0, 1]), np.array([False, True])), (2, 4))
    assert made[0].tolist() == [[1, 3, 5, 7]] * 2 and torch.equal(made[1], made[0].flip(-1))
    task._model = type("M", (), {"preprocessing": dataclasses.replace(SMALL, fit="pad")})()
    padded = task.learned(None, Views(np.array([0]), np.array([False])), (8, 8))
    assert (padded[0, 4:] == 255).all() and (padded[0, 0] == 255).all()
    assert padded[0, 1:4].tolist() == mask[1:].tolist()
    # A mean over pixels of which those without a class count as 0, so that it does not depend on how images are divided.
    logits = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0))
    void = torch.full((1, 2, 4), 255)
    assert float(task.loss_of(logits, void, 0.0)) == 0
    half = void.clone()
    half[0, 0] = 3
    log_p = logits.double().log_softmax(1)[0, 3, 0]
    assert float(task.loss_of(logits, half, 0.0)) == pytest.approx(float(-log_p.sum() / 8), rel=1e-5)
    parts = task.learned(None, Views(np.array([0]), np.array([False]), np.array([[0.5, 0.5, 0.5, 0.5]])), (2, 4))
    assert parts[0].tolist() == [[4, 5, 6, 7]] * 2


def test_statistics_are_averaged_with_the_weights(prepared, monkeypatch):
    """The average of weights and running statistics by hand, step by step, as a network that is used has both."""
    task, bank, fit = prepared
    seen, real = [], trainer.get_ema_multi_avg_fn

    def recorded(decay):
        def step(average, values, count):
            seen.append((decay, [value.clone() for value in values]))
            real(decay)(average, values, count)

        return step

    monkeypatch.setattr(trainer, "get_ema_multi_avg_fn", recorded)
    start = {name: value.clone() for name, value in bank.network(START).state_dict().items()}
    state, _ = teach("finetune", prepared, Training(epochs=2, training_batch=16, ema=0.9, batchnorm=True, learning_rate=0.05))
    made = bank.weights.get(state.trained.tensors)
    network = bank.network(START)
    names = [name for name, _ in network.named_parameters()]
    names += [name for name, b in network.named_buffers() if b.is_floating_point()]
    last = [*names[:3], "body.1.running_mean", "body.1.running_var"]
    for name in last:
        by_hand = start[name]
        for decay, values in seen:
            by_hand = decay * by_hand + (1 - decay) * values[names.index(name)]
        assert np.allclose(made[name], by_hand, atol=1e-5), name
        assert not np.allclose(made[name], seen[-1][1][names.index(name)], atol=1e-5), name


def test_younger_fields_at_their_defaults_are_not_told():
    """A folder that was begun before there were any asks for the same training."""
    told = Training().to_json()
    assert "moves" not in told and "ema" in told and Training.from_json(told) == Training()
    other = Training(zoom_high=2.0, features=1.0)
    assert {"zoom_high", "features"} <= other.to_json().keys() and Training.from_json(other.to_json()) == other
