"""The feature bank: everything computed once, kept, resumed, and equal to the network itself."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from downres.errors import DownresError
from downres.images import preprocess
from downres.records import Candidate
from downres.recovery import features as module
from downres.recovery.batchnorm import recalibrate_batchnorm
from downres.recovery.features import Classifier, FeatureBank, Head, head_of
from downres.recovery.state import RECALIBRATED, State, Step

STATE = State(Candidate(32), 1.0)


def recalibrated(fold, images=256):
    return STATE.then(Step(RECALIBRATED, fold, images))


@pytest.fixture
def bank(tiny, cells):
    def make(folder=None, runtime="torch", model=None, head="head", width=16, calibration=(), **options):
        made = FeatureBank(
            model or tiny.module, head, width, tiny.preprocessing, folder=folder, runtime=runtime, threads=1, **options
        )
        made.images, made.calibration = cells.dataset().images, list(calibration)
        return made

    return make


def by_hand(tiny, cells, indices, state=STATE, network=None):
    p = tiny.preprocessing.at(state.candidate.resolution, state.crop_ratio)
    with torch.no_grad():
        x = torch.stack([preprocess(cells.pictures[i], p) for i in indices])
        return (network or tiny.module).body(x).mean((2, 3)).numpy()


def test_features_are_the_heads_inputs(bank, tiny, cells):
    indices = np.array([5, 3, 11])
    found = bank().features(STATE, indices)
    assert found.shape == (3, 16) and np.allclose(found, by_hand(tiny, cells, indices), atol=1e-5)


def test_onnxruntime_gives_the_same(bank, tmp_path):
    indices = np.arange(12)
    ours = bank(tmp_path, "onnxruntime")
    assert np.allclose(ours.features(STATE, indices), bank().features(STATE, indices), atol=1e-4)
    assert len(list((tmp_path / "onnx").iterdir())) == 1
    ours.features(State(Candidate(32), 0.875), indices)  # the crop happens before the network: the same graph
    assert len(list((tmp_path / "onnx").iterdir())) == 1


def test_an_image_is_looked_at_once(bank):
    one = bank()
    one.features(STATE, np.array([0, 1, 2]))
    one.features(STATE, np.array([2, 1, 5]))
    assert one.passes == 4
    one.features(State(Candidate(32), 0.875), np.array([0]))
    assert one.passes == 5


def test_in_a_folder_they_are_kept_for_the_next_process(bank, tmp_path):
    first, told = bank(tmp_path).features(STATE, np.arange(10)), []
    second = bank(tmp_path, progress=lambda *a: told.append(a))
    assert (second.features(STATE, np.arange(10)) == first).all() and not told
    second.features(STATE, np.arange(10))
    assert second.passes == 10  # counted once, as in a run that nobody interrupted


def test_what_was_interrupted_goes_on(bank, tmp_path):
    def stop(_stage, done, _total):
        if done >= 16:
            raise KeyboardInterrupt

    first = bank(tmp_path, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        first.features(STATE, np.arange(40))
    told = []
    second = bank(tmp_path, progress=lambda *a: told.append(a[1:]))
    assert np.allclose(second.features(STATE, np.arange(40)), bank().features(STATE, np.arange(40)), atol=1e-6)
    assert (first.passes, second.passes) == (16, 40) and told == [(8, 24), (16, 24), (24, 24)]


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file):
    file.write_bytes(b"")


def zeroed(file):
    rows = np.load(file)
    rows["values"][3] = 0
    np.save(file, rows)


def one_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def of_other_shape(file):
    np.save(file, np.ones((len(np.load(file)), 16), np.float32))


@pytest.mark.parametrize("damage", [Path.unlink, emptied, cut, zeroed, one_bit, of_other_shape])
def test_lost_or_damaged_features_are_computed_again(bank, tmp_path, damage):
    right = bank(tmp_path).features(STATE, np.arange(len(bank().images)))
    (file,) = (tmp_path / "features").iterdir()
    damage(file)
    assert np.allclose(bank(tmp_path).features(STATE, np.arange(len(right))), right, atol=1e-6)


def test_features_of_another_state_network_or_image_are_not_taken(bank, tiny, tmp_path):
    other, indices = State(Candidate(16), 1.0), np.arange(12)
    ours = bank(tmp_path)
    wrong, right = ours.features(other, indices), ours.features(STATE, indices)
    files = {state: tmp_path / "features" / f"{state.key()}.npy" for state in (STATE, other)}
    shutil.copy(files[other], files[STATE])
    assert (bank(tmp_path).features(STATE, indices) == right).all() and not np.allclose(wrong, right)
    with torch.no_grad():
        tiny.module.body[0].weight.mul_(2)
    assert np.array_equal(bank(tmp_path).features(STATE, indices), bank().features(STATE, indices))
    swapped = bank(tmp_path)
    swapped.images = swapped.images.take(np.arange(len(swapped.images))[::-1])
    fresh = bank()
    fresh.images = swapped.images
    assert np.array_equal(swapped.features(STATE, indices), fresh.features(STATE, indices))


def test_progress_tells_how_far(bank):
    told = []
    bank(progress=lambda *a: told.append(a), batch_size=4).features(STATE, np.arange(10))
    assert [t[1:] for t in told] == [(4, 10), (8, 10), (10, 10)] and "32: looking" in told[0][0]


def test_forget_deletes_what_only_an_unfinished_run_needs(bank, tmp_path):
    one = bank(tmp_path, "onnxruntime")
    one.features(STATE, np.arange(3))
    one.forget()
    assert not list(tmp_path.iterdir())


def test_recalibration_uses_the_named_images_only(bank, tiny, cells):
    chosen = np.arange(40, 72)
    state = recalibrated(0)
    found = bank(calibration=[chosen]).features(state, np.arange(4))
    p = tiny.preprocessing.at(32)
    batch = torch.stack([preprocess(cells.pictures[i], p) for i in chosen])
    network = recalibrate_batchnorm(tiny.module, [batch])
    assert np.allclose(found, by_hand(tiny, cells, range(4), state, network), atol=1e-5)
    assert not np.allclose(found, by_hand(tiny, cells, range(4)), atol=1e-3)


def test_fewer_calibration_images_are_another_state(bank):
    one = bank(calibration=[np.arange(40)])
    few = recalibrated(0, 8)
    one.features(few, np.arange(2))
    assert one.passes == 8 + 2


def test_a_stem_variant_takes_the_native_input(bank):
    one = bank()
    state = State(Candidate(48, 0.5), 1.0)
    assert one.features(state, np.arange(3)).shape == (3, 16) and one.preprocessing_of(state).hw == (48, 48)


def test_keys_are_file_names_and_tell_states_apart():
    states = [
        STATE, State(Candidate(32), 0.875), recalibrated(0), recalibrated(1),
        recalibrated(0, 32), STATE.then(Step("refitted", 0, 32, "a")), STATE.then(Step("refitted", 0, 32, "b")),
        State(Candidate((32, 64)), 1.0), State(Candidate(32, 0.5), 1.0),
        State(Candidate(32, 0.5, "a/b"), 1.0), State(Candidate(32, 0.5, "a_b"), 1.0),
    ]  # fmt: skip
    keys = [s.key() for s in states]
    assert len(set(keys)) == len(keys) and not any("/" in k or " " in k for k in keys)
    assert State.from_json(states[-2].to_json()) == states[-2]


def test_nan_is_said_with_the_image(bank, tiny):
    tiny.module.body[0].weight.data.fill_(float("nan"))
    with pytest.raises(DownresError, match="NaN or infinite values at 32 on real images .cell 7"):
        bank().features(STATE, np.array([7, 8]))


def test_without_a_linear_head_the_logits_are_the_features(bank):
    network = nn.Sequential(nn.Conv2d(3, 2, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    one = bank(model=network, head=None, width=2)
    found = one.features(STATE, np.arange(3))
    assert found.shape == (3, 2) and (one.logits(STATE, np.arange(3)) == found).all()


def test_logits_are_the_heads(bank, tiny):
    head = Head(np.array([[1.0, 0.0], [0.0, 2.0]], np.float32), np.array([0.5, 0.0], np.float32))
    assert head(np.array([[1.0, 1.0]], np.float32)).tolist() == [[1.5, 2.0]]
    one, own = bank(), head_of(tiny.module, "head")
    features = one.features(STATE, np.arange(3))
    assert (one.logits(STATE, np.arange(3)) == features @ own.weight.T + own.bias).all()
    fitted = Head(np.arange(32, dtype=np.float32).reshape(2, 16), np.array([1.0, 2.0], np.float32))
    state = one.refitted(STATE, fitted, 0, 100)
    assert (one.logits(state, np.arange(3)) == features @ fitted.weight.T + fitted.bias).all()
    assert one.passes == 3  # a head changes nothing of the features


@pytest.mark.parametrize("in_folder", [False, True])
def test_the_network_of_a_refitted_state_has_that_head(bank, tmp_path, in_folder):
    """Also for the next process, which has only the folder; and the model that was given keeps its own."""
    folder = tmp_path if in_folder else None
    first = bank(folder)
    fitted = Head(np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32), np.array([1.0, 2.0], np.float32))
    state = first.refitted(STATE, fitted, 0, 100)
    own = first.model.head.weight.detach().clone()
    again = bank(folder) if in_folder else first
    with torch.no_grad():
        network = again.network(State.from_json(state.to_json()))
    assert (network.head.weight.detach().numpy() == fitted.weight).all() and (
        network.head.bias == torch.tensor([1.0, 2.0])
    ).all()
    assert torch.equal(again.model.head.weight, own)
    assert (
        list((tmp_path / "weights").iterdir()) == [tmp_path / "weights" / f"{state.history[-1].tensors}.safetensors"]
        if (in_folder)
        else not list(tmp_path.iterdir())
    )


def test_one_pass_gives_logits_and_features_and_the_model_is_left_alone(tiny):
    x = torch.randn(2, 3, 32, 32)
    tapped = Classifier(tiny.module, "head").eval()
    with torch.no_grad():
        out, features = tapped(x)
        assert torch.equal(out, tiny.module(x)) and torch.equal(tiny.module.head(features.contiguous()), out)
    assert isinstance(tiny.module.head, nn.Linear)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_is_an_error_and_no_crash(bank, tmp_path, monkeypatch):
    """A sparse file that is mapped would end the process with a bus error when the disk is full."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OSError) as caught:
        bank(tmp_path).features(STATE, np.arange(3))
    assert caught.value.errno == errno.ENOSPC
