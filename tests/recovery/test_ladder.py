"""The ladder's decisions, on made-up features whose right answers are known, and on the tiny network's."""

from typing import NamedTuple

import numpy as np
import pytest
from torch import nn

from downres.images import Fold, cross_folds
from downres.records import OUTSIDE, TOO_FEW, WITHIN, Budget, Candidate, Drop, Preprocessing, Recovery
from downres.recovery.features import FeatureBank, Head
from downres.recovery.ladder import GLANCE, Option, best_of, climb, standard_errors
from downres.recovery.state import RECALIBRATED, State
from downres.tasks.classification.task import Classification

N = 400
LABELS = np.arange(N) % 2
NATIVE = State(Candidate(48), 0.875)
OWN = Head(np.array([[-1.0], [1.0]], np.float32), np.zeros(2, np.float32))
SMALL = Candidate(16)


class Task(Classification):
    """The task of a made-up network, with these labels and no pictures; `folds`: how many, of which nothing else is asked."""

    def __init__(self, labels, fit_new=False, folds=1, seed=0):
        super().__init__(None, 2, "head", 1, fit_new)
        self._labels, self._data, self.seed = labels, Folds(folds), seed

    @property
    def labels(self):
        return self._labels

    @property
    def native_state(self):
        return NATIVE


class Folds:
    def __init__(self, count):
        self.folds = (None,) * count


class Bank(FeatureBank):
    """Features on demand: one number an image, positive for class 1, with some shares of the images wrong.

    wrong: for (crop_ratio, recalibrated) the share of wrong signs at the small resolution. shift: added to all.
    """

    def __init__(self, wrong, *, norm=True, head="head", shift=0.0):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3) if norm else nn.ReLU())
        super().__init__(model, None, 1, Preprocessing(48, NATIVE.crop_ratio))
        self.wrong, self.head, self.shift, self._own = wrong, head, shift, OWN
        self.looked = []

    def features(self, state, indices, *, serving=True):
        self.passes += len(indices)
        self.looked.append((state, np.asarray(indices)))
        sign = np.where(LABELS == 1, 1.0, -1.0)
        if state.candidate == SMALL:
            share = self.wrong[state.crop_ratio, recalibrated(state)]
            flipped = np.random.default_rng(0).permutation(N)[: round(share * N)]
            sign[flipped] *= -1
            sign = sign + self.shift
        return sign[indices, None].astype(np.float32)


def recalibrated(state):
    return state.step(RECALIBRATED) is not None


def wrong(none=0.4, crop=0.4, batchnorm=0.4):
    return {(0.875, False): none, (1.0, False): crop, (0.875, True): batchnorm, (1.0, True): batchnorm}


def run(bank, fold=None, budget=None, rungs=("crop", "batchnorm", "head"), fit_new=False, labels=LABELS):
    fold = fold or Fold(np.arange(0, 300), np.arange(300, N))
    task = Task(labels, fit_new)
    found = Found(*climb(task, bank, SMALL, task.reference(bank, 0, fold, rungs), budget or Budget(6.0), rungs))
    return found, [r.rung for r in found.recovery.tried]


class Found(NamedTuple):
    state: State
    recovery: Recovery


def test_the_tuning_images_are_a_quarter_of_the_training_images_and_no_others():
    fold = Fold(np.arange(10, 210), np.arange(10))
    fit, tune = Task(LABELS).split(fold)
    assert len(tune) == 50 and sorted([*fit, *tune]) == list(range(10, 210))
    again = Task(LABELS).split(fold)
    assert (fit == again[0]).all() and (tune == again[1]).all()
    assert (Task(LABELS, seed=1).split(fold)[1] != tune).any()
    assert len(set(LABELS[tune])) == len(set(LABELS[fit])) == 2


def test_over_all_folds_together_there_are_at_most_so_many():
    fold = Fold(np.arange(100_000), np.zeros(0, np.int64))
    labels = np.arange(100_000) % 2
    assert [len(Task(labels, folds=k).split(fold)[1]) for k in (1, 5)] == [1000, 200]


def test_it_stops_where_nothing_is_lost():
    bank = Bank(wrong(none=0.0))
    found, tried = run(bank)
    assert bank.head_of(found.state) is OWN
    assert tried == ["none"] and found.recovery.rung == "none" and found.recovery.tuning.verdict == WITHIN
    assert found.state == State(SMALL, 0.875)


def test_the_crop_is_enough():
    found, tried = run(Bank(wrong(crop=0.0)))
    assert tried == ["none", "crop"] and found.recovery.rung == "crop" and found.recovery.crop_ratio == 1.0


def test_recalibration_is_enough():
    found, tried = run(Bank(wrong(batchnorm=0.0)))
    assert tried == ["none", "crop", "batchnorm"] and found.recovery.rung == "batchnorm"
    assert found.state.step(RECALIBRATED).fold == 0


def test_the_head_is_refitted_last_and_on_all_training_images():
    """Everything is shifted by 2: useless to the old head, perfect for a new one."""
    bank = Bank(wrong(0.0, 0.0, 0.0), shift=2.0)
    found, tried = run(bank)
    assert tried[-1] == "head" and found.recovery.rung == "head" and "C=" in found.recovery.tried[-1].note
    assert found.recovery.tried[-1].score == 100.0
    out = bank.logits(found.state, np.arange(N))
    assert (out.argmax(1) == LABELS).all()


def test_no_proof_image_is_ever_looked_at():
    for bank in (Bank(wrong()), Bank(wrong(), shift=2.0)):
        run(bank, fit_new=True)
        assert max(int(indices.max()) for _, indices in bank.looked) < 300


def test_a_hopeless_recalibration_is_given_up_after_a_glance():
    bank = Bank(wrong(none=0.4, crop=0.4, batchnorm=0.9))
    found, _ = run(bank)
    (rung,) = [r for r in found.recovery.tried if r.rung == "batchnorm"]
    assert rung.n == GLANCE and "given up after a glance" in rung.note
    assert all(len(indices) == GLANCE for state, indices in bank.looked if recalibrated(state))


def test_what_cannot_be_tried_says_why():
    found, _ = run(Bank(wrong(), norm=False, head=None))
    notes = {r.rung: r.note for r in found.recovery.tried if r.score is None}
    assert "no BatchNorm" in notes["batchnorm"] and "linear layer" in notes["head"]
    labels = np.where(np.arange(N) < 300, 0, LABELS)
    found, _ = run(Bank(wrong()), labels=labels)
    assert "1 of 2 classes have no training image" in found.recovery.tried[-1].note


def test_without_training_images_nothing_is_recovered():
    found, tried = run(Bank(wrong()), fold=Fold(np.zeros(0, np.int64), np.arange(N)))
    assert tried == ["none"] and found.recovery.rung == "none" and found.recovery.tuning is None
    assert "fewer than 4 training images" in found.recovery.tried[0].note


@pytest.mark.parametrize("rungs", [(), ("crop",), ("batchnorm",), ("head",), ("crop", "head")])
def test_only_the_rungs_asked_for_are_tried(rungs):
    _, tried = run(Bank(wrong()), rungs=rungs)
    assert set(tried) == {"none", *rungs}


def test_of_equals_the_cheapest_is_taken():
    found, _ = run(Bank(wrong(0.4, 0.4, 0.4)), rungs=("crop", "batchnorm"))
    assert found.recovery.rung == "none" and found.recovery.tuning.verdict == OUTSIDE


def test_a_lucky_image_or_two_do_not_make_a_dearer_rung_worth_it():
    """The one-standard-error rule: 40 % against 39.5 % wrong is luck, 40 % against 20 % is not."""
    assert run(Bank(wrong(none=0.4, crop=0.395)), rungs=("crop",))[0].recovery.rung == "none"
    assert run(Bank(wrong(none=0.4, crop=0.2)), rungs=("crop",))[0].recovery.rung == "crop"


def test_every_rung_says_what_it_took():
    bank = Bank(wrong())
    before = bank.passes
    found, _ = run(bank)
    assert all(r.seconds >= 0 and r.n in (0, GLANCE, 75) for r in found.recovery.tried)
    assert found.recovery.seconds == pytest.approx(sum(r.seconds for r in found.recovery.tried))
    assert sum(r.images for r in found.recovery.tried) + 75 == bank.passes - before  # 75 for the original


def test_new_heads_of_the_original_have_not_seen_the_tuning_images():
    bank = Bank(wrong())
    for i, fold in enumerate(cross_folds(LABELS, 4, 0)):
        reference = Task(LABELS, True, 4).reference(bank, i, fold, ("head",))
        flipped = LABELS.copy()
        flipped[fold.test] = 1 - flipped[fold.test]
        other = Task(flipped, True, 4).reference(bank, i, fold, ("head",))
        mine, theirs = (bank.head_of(r.state) for r in (reference, other))
        assert (mine.weight == theirs.weight).all() and mine is not OWN
        assert (bank.head_of(reference.start).bias == bank.head_of(other.start).bias).all()


def test_a_recovery_that_is_not_better_beyond_noise_does_not_replace_what_is_only_lowered():
    def option(rung, wrong, verdict):
        points = np.ones(250)
        points[wrong] = 0
        return Option(rung, points, NATIVE, Drop(0.0, 0.0, 0.0, 1.0, verdict, 250))

    lowered = option("none", [0, 1, 2], TOO_FEW)
    for wrong in ([2, 3], [0, 1, 3], [0, 1, 2, 3]):  # 248, 247 and 246 right
        head = option("head", wrong, WITHIN)
        scores = [o.evidence.sum() for o in (lowered, head)]
        assert best_of([lowered, head], scores, standard_errors).rung == "none"
    assert (
        best_of([option("none", np.arange(20), TOO_FEW), option("head", [0], WITHIN)], [230, 249], standard_errors).rung
        == "head"
    )
