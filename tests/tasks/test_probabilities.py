"""Networks that end in a softmax or a sigmoid: their numbers are probabilities already, when they are shown and when they are
trained.
"""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from downres import Model, Preprocessing, check, predict, search
from downres.probe import find_answer
from downres.tasks.classification.task import Classification
from downres.tasks.multilabel.task import Multilabel
from downres.tasks.task import of_classes


class Net(nn.Module):
    """The mean of each channel, a linear layer, and what comes after it."""

    def __init__(self, outputs, after, maps=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.outputs, self.after, self.maps = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, outputs, 1), after, maps

    def forward(self, x):
        y = self.outputs(self.conv(x).relu())
        return self.after(y if self.maps else y.mean((2, 3)))


ENDS = {
    "softmax": lambda y: y.softmax(1),
    "softmax of the last axis": lambda y: F.softmax(y, dim=-1),
    "named": lambda y: {"logits": torch.softmax(y, 1)},
    "sigmoid": torch.sigmoid,
    "clamped": lambda y: y.softmax(1).clamp(0, 1),
}
LOGITS = {
    "plain": lambda y: y,
    "logarithms": lambda y: y.log_softmax(1),
    "over the batch": lambda y: y.softmax(0),
    "scaled": lambda y: y.softmax(1) * 3,
}


@pytest.mark.parametrize("end, maps", [(e, m) for e in ENDS for m in (False, True) if not (m and "axis" in e)])
def test_probabilities_are_seen(end, maps):
    """Of a map the last axis is its width."""
    assert find_answer(Net(3, ENDS[end], maps).eval(), (3, 32, 32)).probability


@pytest.mark.parametrize("end", LOGITS)
def test_what_only_looks_like_them_is_not(end):
    assert not find_answer(Net(3, LOGITS[end]).eval(), (3, 32, 32)).probability


def test_one_output_after_a_softmax_is_always_one_and_no_probability():
    assert not find_answer(Net(1, ENDS["softmax"]).eval(), (3, 32, 32)).probability
    assert find_answer(Net(1, torch.sigmoid).eval(), (3, 32, 32)).probability


def classifier(probability):
    task = Classification(None, 4)
    task.probability = probability
    return task


def test_training_is_that_of_the_logits():
    ours, theirs = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    targets = F.one_hot(torch.arange(6) % 4, 4).float()
    told, plain = classifier(True), classifier(False)
    for pair in ((ours, theirs),):
        soft = [y.softmax(1) for y in pair]
        assert float(told.mismatch(*soft)) == pytest.approx(float(plain.mismatch(*pair)), rel=1e-5)
        assert float(told.mismatch(*soft)) == pytest.approx(float(of_classes(*pair)), rel=1e-5)
    assert float(told.loss_of(ours.softmax(1), targets, 0.1)) == pytest.approx(
        float(F.cross_entropy(ours, targets, label_smoothing=0.1))
    )
    np.testing.assert_allclose(told.logits(ours.softmax(1).numpy()), ours.log_softmax(1).numpy(), rtol=1e-4)
    assert np.isfinite(told.logits(np.array([[1.0, 0, 0, 0]], np.float32))).all()

    several = Multilabel(None, 4)
    yes = (targets + torch.roll(targets, 1, 1)).clamp(max=1)
    expected = [several.mismatch(ours, theirs), several.loss_of(ours, yes, 0.1)]
    several.probability = True
    found = [several.mismatch(ours.sigmoid(), theirs.sigmoid()), several.loss_of(ours.sigmoid(), yes, 0.1)]
    assert [float(f) for f in found] == pytest.approx([float(e) for e in expected], rel=1e-4)


HOW = {"resolutions": [24], "stem_scales": (), "threads": 1, "recover": "none", "max_drop": 90.0}


def loaded(end, outputs):
    return Model(Net(outputs, end).eval(), Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3), "", "", outputs)


def served(artifact, picture):
    done = subprocess.run([sys.executable, artifact / "serve.py", picture], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def by_hand(model, picture, side):
    small = np.asarray(Image.open(picture).resize((side, side), Image.Resampling.BILINEAR), np.float32)
    with torch.inference_mode():
        return model.module(torch.from_numpy((small / 255 - 0.5) / 0.25).permute(2, 0, 1)[None])[0].numpy()


def test_a_classifier_shows_its_own_probabilities(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in "abc":
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "data" / part / kind / f"{i}.png")
    model = loaded(ENDS["softmax"], 3)
    run = search(model, str(tmp_path / "data"), out=tmp_path / "run", **HOW)
    picture = tmp_path / "data" / "val" / "a" / "0.png"
    shares = 100 * by_hand(model, picture, 24)
    (said,) = predict(run.artifact, [picture])
    assert said.probabilities == pytest.approx(sorted(shares, reverse=True), abs=0.5)
    assert served(run.artifact, picture)["probabilities"] == pytest.approx(said.probabilities, abs=0.5)
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert manifest["output"]["values"] == "probabilities" and manifest["task"]["probability"] is True
    assert all(f.ok for f in check(run.artifact, model=model, data=str(tmp_path / "data"), threads=1))


def test_a_multilabel_network_shows_its_own_probabilities(tmp_path):
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "data").mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "data" / f"{i}.png")
        rows.append([f"{i}.png", i % 2, i // 2 % 2, i // 4 % 2])
    with open(tmp_path / "data" / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "a", "b", "c"], *rows])
    model = loaded(torch.sigmoid, 3)
    run = search(model, str(tmp_path / "data"), task="multilabel", labels=str(tmp_path / "data" / "labels.csv"),
                 out=tmp_path / "run", **HOW)  # fmt: skip
    picture = tmp_path / "data" / "0.png"
    shares = 100 * by_hand(model, picture, 24)
    (said,) = predict(run.artifact, [picture])
    assert said.probabilities == pytest.approx(sorted(shares, reverse=True), abs=0.5)
    assert served(run.artifact, picture)["probabilities"] == pytest.approx(said.probabilities, abs=0.5)
    assert json.loads((run.artifact / "manifest.json").read_text())["output"]["values"] == "probabilities"
