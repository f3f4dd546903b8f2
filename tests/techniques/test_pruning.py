"""Structured pruning: which channels go, what stays as it was, and the way through a search."""

import dataclasses
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from downres import Axes, Candidate, Preprocessing, check, load_model, measure_cost, reduce, search
from downres.errors import DownresError

tp = pytest.importorskip("torch_pruning", reason="downres[pruning]")
SIZE = (3, 48, 48)
FILE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two pairs of convolutions, the second with a sum; what the head reads is 16 wide."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3, 1, 1))
        self.last = nn.Sequential(nn.Conv2d(32, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(x + self.first(x)).mean((2, 3)))


def make():
    torch.manual_seed(0)
    return Net().eval()
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "net.py"
    file.write_text(FILE)
    return file


@pytest.fixture(scope="module")
def net(file):
    return load_model(f"{file}:make").module


def test_the_least_channels_go_and_the_others_stay_as_they_were(net):
    """The hidden channels of `first` by their norm over both layers and the BatchNorm between, by NumPy."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = reduce(net, Candidate(pruning=0.6), input_size=SIZE)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    left, own = measure_cost(small, SIZE).macs, measure_cost(net, SIZE).macs
    assert 0.3 * own < left <= 0.6 * own
    kept = small.first[0].out_channels
    assert kept % 8 == 0 and 8 <= kept < 64 and small.first[3].in_channels == kept
    assert small.stem[0].out_channels == small.first[3].out_channels == small.last[0].in_channels < 32  # they are added
    assert small.head.in_features == 16 and small(torch.zeros(2, *SIZE)).shape == (2, 2)
    # Whole filters of the original, in their order.
    own_rows = net.first[0].weight.detach().flatten(2).sum(2)
    rows = small.first[0].weight.detach().flatten(2).sum(2)
    inputs = [int((net.stem[0].weight - w).flatten(1).abs().sum(1).argmin()) for w in small.stem[0].weight]
    assert inputs == sorted(inputs)
    chosen = [int((own_rows[:, inputs] - row).abs().sum(1).argmin()) for row in rows]
    assert chosen == sorted(set(chosen))
    for k, i in enumerate(chosen):
        assert torch.equal(small.first[0].weight[k], net.first[0].weight[i, inputs])
        assert small.first[1].running_var[k] == net.first[1].running_var[i]
    norms = [float(net.first[0].weight[i].norm() ** 2 + net.first[3].weight[:, i].norm() ** 2) for i in range(64)]
    assert np.mean([norms[i] for i in chosen]) > np.mean(norms)
    again = reduce(net, Candidate(pruning=0.6), input_size=SIZE)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))
    (change,) = [c for c in small.downres.changes if c.kind == "structured pruning"]
    assert f"MACs ×{left / own:.3g}" in change.detail


def test_in_train_mode_statistics_stay(net):
    import copy

    training = copy.deepcopy(net).train()
    small, same = (reduce(m, Candidate(pruning=0.6), input_size=SIZE) for m in (training, net))
    assert small.training and small.first[1].training and not same.training
    assert torch.equal(small.first[1].running_mean, same.first[1].running_mean)
    assert int(small.first[1].num_batches_tracked) == 0


def test_of_a_transformer_hidden_units_go():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    small = reduce(vit, Candidate(pruning=0.8), input_size=(3, 64, 64))
    assert small.blocks[0].mlp.fc1.out_features < 768 and small.blocks[0].attn.qkv.out_features == 576
    assert small(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert measure_cost(small, (3, 64, 64)).macs <= 0.8 * measure_cost(vit, (3, 64, 64)).macs
    with pytest.raises(DownresError, match=r"VisionTransformer cannot be pruned to ×0.2 of its MACs \(.*keep more"):
        reduce(vit, Candidate(pruning=0.2), input_size=(3, 64, 64))


def test_its_word_and_its_errors(net, monkeypatch):
    c = Candidate.parse("128 channels×0.5")
    assert c == Candidate(128, pruning=0.5) and str(c) == "128 channels×0.5" and Candidate.from_json(c.to_json()) == c
    assert "pruning" not in Candidate(128).to_json()
    assert [str(c) for _, c in Axes(prunings=(0.5, 0.7)).free()] == ["as is channels×0.5", "as is channels×0.7"]
    for wrong in (0, 1.5, True, "0.5"):
        with pytest.raises(DownresError, match="Pruning leaves a part of the MACs above 0"):
            Candidate(pruning=wrong)
    with pytest.raises(DownresError, match="Sequential has no layers|Sequential cannot be pruned"):
        reduce(nn.Sequential(nn.ReLU()), Candidate(pruning=0.5), input_size=SIZE)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(DownresError, match=r"pip install 'downres\[pruning\]'"):
        reduce(net, Candidate(pruning=0.5), input_size=SIZE)


def test_it_is_searched_with_pixels_and_bits_recovered_shipped_and_checked(file, cells, tmp_path):
    p = Preprocessing(48, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    model, data = dataclasses.replace(load_model(f"{file}:make"), preprocessing=p), cells.dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = search(
            model, data, resolutions=[], stem_scales=(), candidates=["40 channels×0.6 int8"], prunings=[0.6], fit_head=True,
            max_drop=60.0, minimize="size", threads=1, out=tmp_path / "run", recover="finetune", epochs=2,
        )  # fmt: skip
    assert [str(r.candidate) for r in run.results] == ["48 channels×0.6", "40 channels×0.6 int8"]
    native, pruned_, both = run.original, *run.results
    assert both.footprint.file_bytes < pruned_.footprint.file_bytes < native.footprint.file_bytes
    assert pruned_.cost.macs <= 0.6 * native.cost.macs
    assert "channels×0.6" in str(run.best.candidate)
    assert all(f.ok for f in check(run.artifact, model=f"{file}:make", data=data))
