"""The answer to a picture at its own size, and the ladder's decisions on made-up masks whose right answers are known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from downres.errors import DownresError
from downres.images import Fold
from downres.images.images import Images
from downres.images.preprocess import shown_size
from downres.records import OUTSIDE, WITHIN, Budget, Candidate, Dense, Preprocessing
from downres.recovery.ladder import climb
from downres.recovery.state import RECALIBRATED, State, Step
from downres.tasks.segmentation.bank import MaskBank, classes_at
from downres.tasks.segmentation.quality import Truths, tally
from downres.tasks.segmentation.task import Segmentation

# --- the answer at a picture's own size ---


def smooth(shape, seed=0):
    """Random logits without pixel noise, so that resizing them is not all ties."""
    coarse = torch.from_numpy(np.random.default_rng(seed).standard_normal((shape[0], 5, 6)))
    return nn.functional.interpolate(coarse[None], shape[1:], mode="bicubic")[0].float().numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(24, 32), (48, 60), (17, 90)])
def test_logits_are_resized_before_the_largest_is_taken(interpolation, align_corners, size):
    logits, dense = smooth((5, 24, 32)), Dense((24, 32), "logits", interpolation, align_corners)
    resized = nn.functional.interpolate(torch.from_numpy(logits)[None], size, mode=interpolation, align_corners=align_corners)
    found = classes_at(logits, size, dense)
    assert found.dtype == np.uint8 and found.shape == size
    assert (found == resized[0].argmax(0).numpy()).all()


def test_class_maps_are_resized_by_their_nearest_pixels():
    answer = smooth((5, 24, 32)).argmax(0).astype(np.uint8)
    for size in ((24, 32), (48, 64), (16, 128)):  # where no middle of a pixel falls between two others
        expected = np.asarray(Image.fromarray(answer).resize(size[::-1], Image.Resampling.NEAREST))
        assert (classes_at(answer, size, Dense((24, 32), "classes")) == expected).all()


def test_what_is_padded_is_cut_off_first():
    logits = smooth((5, 24, 32))
    dense = Dense((24, 32))
    assert (classes_at(logits, (15, 32), dense, (15 / 24, 1.0)) == logits[:, :15].argmax(0)).all()
    assert (classes_at(logits, (24, 20), dense, (1.0, 20 / 32)) == logits[..., :20].argmax(0)).all()
    half = nn.functional.interpolate(torch.from_numpy(logits[:, :12])[None], (36, 96), mode="bilinear")[0].argmax(0)
    assert (classes_at(logits, (36, 96), dense, (0.5, 1.0)) == half.numpy()).all()
    maps = logits.argmax(0).astype(np.uint8)
    assert (classes_at(maps, (12, 32), Dense((24, 32), "classes"), (0.5, 1.0)) == maps[:12]).all()
    assert classes_at(logits, (3, 900), dense, (1e-6, 1.0)).shape == (3, 900)  # a sliver keeps a row


def test_many_classes_need_more_than_a_byte():
    logits = np.zeros((300, 2, 2), np.float32)
    logits[299, 0, 0] = logits[256, 1, 1] = 1
    found = classes_at(logits, (2, 2), Dense((2, 2)))
    assert found.dtype == np.int16 and found[0, 0] == 299 and found[1, 1] == 256


class Bins(nn.Module):
    """Class k where the k-th of four equal steps of the red channel is, pixel by pixel: no blur, no stride."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(3, 4, 1)
        middle = (torch.arange(4) + 0.5) / 4
        with torch.no_grad():
            self.score.weight.zero_()
            self.score.weight[:, 0, 0, 0] = 2 * middle
            self.score.bias.copy_(-(middle**2))

    def forward(self, x):
        return self.score(x)


def gradient(hw, downwards):
    """A picture whose red channel is its own position, 0 to 255 over its width or height, and which class each pixel has."""
    height, width = hw
    position = (np.arange(height)[:, None] + 0.5) / height if downwards else (np.arange(width)[None] + 0.5) / width
    position = np.broadcast_to(position, hw)
    picture = np.zeros((*hw, 3), np.uint8)
    picture[..., 0] = np.round(255 * position)
    return picture, position


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("output", ["logits", "classes"])
@pytest.mark.parametrize("label", [(48, 64), (96, 128)])
@pytest.mark.parametrize("downwards", [False, True])
def test_every_pixel_gets_the_answer_for_its_own_place(fit, output, label, downwards):
    """Pictures wider and taller than the network's input, as they are and at half the resolution."""
    sizes = [(48, 64), (40, 120), (120, 40), (64, 48), (200, 90)]
    pictures, positions = zip(*(gradient(hw, downwards) for hw in sizes), strict=True)
    p = Preprocessing((48, 64), mean=(0.0,) * 3, std=(1.0,) * 3, fit=fit)
    bank = MaskBank(Bins(), 4, Dense(label, output), p, runtime="torch", threads=1)
    bank.images = Images(list(pictures), [f"{hw}" for hw in sizes])
    bank.masks = [(4 * position).astype(np.uint8) for position in positions]
    for hw in ((48, 64), (24, 32)):
        maps = list(bank.class_maps(State(Candidate(hw), 1.0), np.arange(len(sizes))))
        for found, mask, position, size in zip(maps, bank.masks, positions, sizes, strict=True):
            shown = shown_size(size, p.at(hw))
            assert found.shape == size
            # Upsampling mixes padding into what is beside it, less than two pixels of the network's; the rest is exact.
            inside = np.ones(size, bool)
            if shown[0] < hw[0]:
                inside[-2 * -(-size[0] // shown[0]) :] = False
            if shown[1] < hw[1]:
                inside[:, -2 * -(-size[1] // shown[1]) :] = False
            steps = np.abs(4 * position - np.round(4 * position)) / 4 * shown[0 if downwards else 1]
            wrong = inside & (found != mask)
            assert inside.mean() > 0.7 and np.all(steps[wrong] < (0.01 if output == "logits" else 0.5))
    assert bank.passes == 2 * len(sizes)


def test_tallies_are_made_once_for_each_state_and_set_of_images():
    pictures, positions = zip(*(gradient((48, 64), k % 2 == 0) for k in range(4)), strict=True)
    bank = MaskBank(Bins(), 4, Dense((48, 64)), Preprocessing((48, 64), mean=(0.0,) * 3, std=(1.0,) * 3), runtime="torch")
    bank.images = Images(list(pictures), ["a", "b", "c", "d"])
    bank.masks = [(4 * position).astype(np.uint8) for position in positions]
    state = State(Candidate((48, 64)), 1.0)
    first = bank.tallies(state, np.array([0, 2]))
    assert len(first) == 2 and bank.tallies(state, np.array([0, 2])) is first and bank.passes == 2
    assert first.hits.sum() > 0.98 * first.truth.sum()
    assert len(bank.tallies(state, np.array([1]))) == 1 and bank.passes == 3
    bank.release()
    again = bank.tallies(state, np.array([0, 2]))
    assert (again.confusion == first.confusion).all() and bank.passes == 5


def test_values_that_are_no_numbers_name_the_picture():
    network = Bins()
    network.score.bias.data[3] = float("inf")
    bank = MaskBank(network, 4, Dense((4, 4)), Preprocessing(4), runtime="torch")
    bank.images, bank.masks = Images([np.zeros((4, 4, 3), np.uint8)], ["street.png"]), [np.zeros((4, 4), np.uint8)]
    with pytest.raises(DownresError, match=r"NaN or infinite values at 4 .*street\.png"):
        bank.tallies(State(Candidate(4), 1.0), np.array([0]))


# --- which training images tune ---


class Task(Segmentation):
    """The task of a made-up network."""

    def __init__(self, seed=0):
        super().__init__(None, 3, Dense((48, 64)))
        self.seed = seed

    @property
    def native_state(self):
        return NATIVE


@pytest.mark.parametrize("n, tuned", [(0, 0), (3, 0), (4, 1), (44, 11), (367, 91), (2975, 100)])
def test_a_quarter_tunes(n, tuned):
    fold = Fold(np.arange(n) * 2, np.zeros(0, np.int64))
    fit, tune = Task().split(fold)
    assert len(tune) == tuned and sorted([*fit, *tune]) == fold.train.tolist()
    assert fit.tolist() == sorted(fit) and tune.tolist() == sorted(tune)
    if tuned > 10:
        assert tune.tolist() != Task(1).split(fold)[1].tolist()
        assert tune.tolist() == Task(0).split(fold)[1].tolist()


# --- the ladder ---

N = 40
TRUTH = [(np.arange(24 * 24).reshape(24, 24) * 7 + i) % 3 for i in range(N)]
TRUTH = [mask.astype(np.uint8) for mask in TRUTH]
NATIVE, SMALL = State(Candidate((48, 64)), 1.0), Candidate((24, 32))


class Made:
    """Tallies on demand, with a share of each image's pixels wrong; share by whether BatchNorm was recalibrated."""

    def __init__(self, before, after, norm=True, spread=0.0):
        self.wrong, self.spread = {False: before, True: after}, spread
        self.model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3) if norm else nn.ReLU())
        self.preprocessing, self.passes, self.looked = Preprocessing((48, 64)), 0, []

    def started(self, state, candidate, fold):
        return state.at(candidate)

    def tallies(self, state, indices, *, serving=True):
        self.passes += len(indices)
        self.looked.append((state, indices.tolist(), serving))
        maps = []
        for i in indices:
            again = state.step(RECALIBRATED) is not None
            rng = np.random.default_rng([int(i), again])
            share = 0.05 if state == NATIVE else self.wrong[again] + self.spread * rng.standard_normal()
            mask = TRUTH[int(i)].copy()
            flipped = rng.random(mask.shape) < share
            mask[flipped] = (mask[flipped] + 1) % 3
            maps.append(mask)
        return tally(maps, Truths([TRUTH[int(i)] for i in indices], 3), 3)


FOLD = Fold(np.arange(N), np.zeros(0, np.int64))


def climbed(bank, max_drop=10.0, rungs=("batchnorm",), fold=FOLD):
    task = Task()
    return climb(task, bank, SMALL, task.reference(bank, 0, fold, rungs), Budget(max_drop), rungs)


def test_within_the_budget_nothing_is_recalibrated():
    bank = Made(0.06, 0.0)
    state, recovery = climbed(bank)
    assert state == State(SMALL, 1.0) and recovery.rung == "none" and [r.rung for r in recovery.tried] == ["none"]
    assert recovery.tuning.verdict == WITHIN and recovery.tuning.n == 10
    # The original and the candidate on the tuning images alone.
    _, tune = Task().split(FOLD)
    assert [looked for _, looked, _ in bank.looked] == [tune.tolist()] * 2


def test_what_is_better_beyond_doubt_is_taken():
    state, recovery = climbed(Made(0.4, 0.2))
    assert state == State(SMALL, 1.0, (Step(RECALIBRATED, 0, 256),)) and recovery.rung == "batchnorm"
    none, batchnorm = recovery.tried
    assert none.score < batchnorm.score and recovery.tuning.drop == pytest.approx(recovery.tuning.drop)
    original = Task().reference(Made(0, 0), 0, FOLD, ("batchnorm",)).evidence
    hits, union = original.hits.sum(0), (original.predicted + original.truth - original.hits).sum(0)
    assert recovery.tuning.drop == pytest.approx(100 * (hits / union).mean() - batchnorm.score)
    assert recovery.tuning.verdict == OUTSIDE  # still far from the original


@pytest.mark.parametrize("after", [0.41, 0.395])
def test_what_is_worse_or_may_be_luck_is_left(after):
    """The second is better on these images, by less than they differ from one another."""
    state, recovery = climbed(Made(0.4, after, spread=0.1))
    assert state == State(SMALL, 1.0) and recovery.rung == "none" and len(recovery.tried) == 2


def test_nothing_to_recalibrate():
    _, recovery = climbed(Made(0.4, 0.0, norm=False))
    assert recovery.rung == "none" and recovery.tried[1].score is None and "no BatchNorm" in recovery.tried[1].note


def test_nothing_asked_for_or_nothing_to_tune_on():
    bank = Made(0.4, 0.1)
    _, recovery = climbed(bank, rungs=())
    assert recovery.rung == "none" and "no recovery was asked for" in recovery.tried[0].note
    few = Fold(np.arange(3), np.arange(3, N))
    _, recovery = climbed(bank, fold=few)
    assert recovery.rung == "none" and "fewer than 4" in recovery.tried[0].note and recovery.tuning is None
