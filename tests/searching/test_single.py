"""One resolution without a search: evaluate, recover, curve; the model given is never touched."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from downres import Candidate, curve, evaluate, measure_cost, recover, reduce
from downres.errors import DownresError
from downres.images import preprocess
from downres.recovery import bank
from downres.searching.prepare import refuse_random
from downres.tasks.classification.head import fit_head
from downres.tasks.classification.quality import count_correct


@pytest.fixture
def trained(tiny, cells):
    """The tiny network with a head of its own, fitted on the training images at its own resolution."""
    fold = cells.dataset().folds[0]
    with torch.no_grad():
        x = torch.stack([preprocess(cells.pictures[i], tiny.preprocessing) for i in fold.train])
        pooled = tiny.module.body(x).mean((2, 3)).numpy()
    head = fit_head(pooled, cells.labels[fold.train], 2, 0.1)
    tiny.module.head.weight.data = torch.from_numpy(head.weight)
    tiny.module.head.bias.data = torch.from_numpy(head.bias)
    return tiny


def correct_by_hand(network, p, dataset):
    test = dataset.folds[0].test
    with torch.no_grad():
        out = network(torch.stack([preprocess(dataset.images[int(i)], p) for i in test])).numpy()
    return int(count_correct(out, dataset.labels[test]).sum())


@pytest.mark.parametrize(("resolution", "crop"), [(None, None), (32, None), (32, 0.875), ((24, 48), None)])
def test_evaluate_is_the_plain_loop(trained, cells, resolution, crop):
    dataset = cells.dataset()
    found = evaluate(trained, dataset, resolution=resolution, crop_ratio=crop, threads=1)
    assert found.n == len(dataset.folds[0].test)
    assert abs(found.correct - correct_by_hand(trained.module, trained.preprocessing.at(resolution, crop), dataset)) <= 1


def test_the_runtime_that_is_named_is_the_one_that_runs(trained, cells, monkeypatch):
    """Without a run's folder, too: its files are exported for now and gone afterwards."""
    exported = []
    export = bank.export_onnx
    monkeypatch.setattr(
        bank, "export_onnx", lambda model, size, path, names: exported.append(path) or export(model, size, path, names)
    )
    dataset = cells.dataset()
    for resolution in (None, 32):
        theirs, ours = (
            evaluate(trained, dataset, resolution=resolution, runtime=name, threads=1) for name in ("onnxruntime", "torch")
        )
        assert abs(theirs.correct - ours.correct) <= 1
    assert len(exported) == 2 and not any(path.parent.exists() for path in exported)
    found = curve(trained, dataset, [32], runtime="onnxruntime", threads=1)
    assert found.results[0].quality == theirs and len(exported) == 3  # one export for every size
    with pytest.raises(DownresError, match="Unknown runtime 'onnx'"):
        curve(trained, dataset, [32], runtime="onnx")


def test_one_number_is_the_short_side_and_a_pair_height_and_width(trained, cells):
    """Of a network used at 24x48 16 is 16x32 and (16, 16) a square: in evaluate, curve, recover and by a candidate's text."""
    dataset, wide = cells.dataset(), dataclasses.replace(trained, preprocessing=trained.preprocessing.at((24, 48)))
    found = curve(wide, dataset, [16, (16, 16), (16, 32)], candidates=["16x16", "16"], threads=1)
    assert [str(r.candidate) for r in found.results] == ["16x32", "16x16"]
    assert [r.cost.input_size[2:] for r in found.results] == [(16, 32), (16, 16)]
    for given, size, result in ((16, (16, 32), found.results[0]), ((16, 16), (16, 16), found.results[1])):
        assert evaluate(wide, dataset, resolution=given, threads=1) == result.quality
        assert abs(result.quality.correct - correct_by_hand(wide.module, wide.preprocessing.at(size), dataset)) <= 1
        assert recover(wide, dataset, resolution=given, rungs=(), threads=1)[1].hw == size
        assert recover(wide, dataset, Candidate(given), rungs=(), threads=1)[1].hw == size


def test_recover_gives_a_network_that_is_what_its_record_says(trained, cells):
    dataset = cells.dataset()
    before = {k: v.clone() for k, v in trained.module.state_dict().items()}
    network, p, recovery = recover(trained, dataset, resolution=16, threads=1)
    assert p.hw == (16, 16) and p.crop_ratio == recovery.crop_ratio
    assert recovery.rung in ("none", "crop", "batchnorm", "head") and recovery.tried[0].rung == "none"
    tune_n = recovery.tried[0].n
    assert recovery.tuning.n == tune_n == len(dataset.folds[0].train) // 4
    assert all(torch.equal(before[k], v) for k, v in trained.module.state_dict().items())
    assert network(torch.zeros(3, 3, 16, 16)).shape == (3, 2)


class Restless(nn.Module):
    """Random in eval mode too. kind: of what."""

    def __init__(self, body, kind):
        super().__init__()
        self.body, self.kind = body, kind

    def forward(self, x):
        if self.kind == "noise":
            x = x + 0.1 * torch.randn_like(x)
        if self.kind == "dropped inputs":
            x = F.dropout(x, 0.1)
        y = self.body(x)
        if self.kind == "dropout":
            return F.dropout(y, 0.5)
        if self.kind == "rounding":  # as threads make it
            return y * (1 + 1e-6 * torch.rand(()))
        return y


@pytest.mark.parametrize("kind", ["dropout", "dropped inputs", "noise"])
def test_a_network_that_stays_random_is_noticed_before_anything_is_proven(tiny, cells, kind):
    model, dataset = dataclasses.replace(tiny, module=Restless(tiny.module, kind).eval()), cells.dataset()
    before = torch.random.get_rng_state()
    for run in (
        lambda: evaluate(model, dataset, threads=1),
        lambda: curve(model, dataset, [32], threads=1),
        lambda: recover(model, dataset, resolution=32, threads=1),
    ):
        with pytest.raises(DownresError, match="Restless answers differently when it runs twice on the same 1 image .by up to"):
            run()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert measure_cost(model.module, (3, 48, 48)).macs == measure_cost(tiny.module, (3, 48, 48)).macs
    assert reduce(model.module, resolution=32)(torch.rand(1, 3, 48, 48)).shape == (1, 2)


def test_rounding_is_no_randomness(tiny, cells):
    for kind in ("rounding", "none"):
        model = dataclasses.replace(tiny, module=Restless(tiny.module, kind).eval())
        assert evaluate(model, cells.dataset(), threads=1).n > 0


def test_what_counts_as_random():
    x = torch.zeros(1, 3, 8, 8)

    class Says(nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.answers = iter(answers)

        def forward(self, x):
            return next(self.answers)

        def __deepcopy__(self, known):
            return self

    maps = torch.arange(1000).view(1, 1000)
    close = maps.clone()
    close[0, 3] = 7
    for alike in ([maps, close], [torch.ones(1, 2), torch.ones(1, 2) + 1e-5], [torch.full((1, 2), torch.nan)] * 2):
        refuse_random(Says(alike), x)
    for apart, says in (
        ([maps, maps + 1], "in 100% of its values"),
        ([torch.ones(1, 2), torch.ones(1, 3)], r"shapes \(1, 2\) and \(1, 3\)"),
        ([[maps, {"a": torch.ones(2)}], [maps, {"a": torch.ones(2) + 1e-3}]], "by up to 0.001"),
    ):
        with pytest.raises(DownresError, match=says):
            refuse_random(Says(apart), x)


def test_recover_looks_at_no_proof_image(trained, cells):
    honest = cells.dataset()
    pictures = cells.pictures.copy()
    pictures[honest.folds[0].test] = 0
    blinded = type(cells)(pictures, cells.labels).dataset(flip=honest.folds[0].test)
    a, b = (recover(trained, d, resolution=16, threads=1)[0].state_dict() for d in (honest, blinded))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_recover_at_a_stem_variant(trained, cells):
    network, p, _ = recover(trained, cells.dataset(), Candidate(None, 0.5), rungs=("head",), threads=1)
    assert p.hw == (48, 48) and network(torch.zeros(2, 3, 48, 48)).shape == (2, 2)


def test_recover_needs_one_of_the_two(trained, cells):
    for options in ({}, {"candidate": Candidate(32), "resolution": 32}):
        with pytest.raises(DownresError, match="either a candidate or a resolution"):
            recover(trained, cells.dataset(), **options)


def test_a_curve_is_evaluate_at_each_resolution(trained, cells):
    dataset = cells.dataset()
    found = curve(trained, dataset, [16, 32, 16], threads=1)
    assert [r.candidate.resolution for r in found.results] == [16, 32]
    for result in (found.original, *found.results):
        alone = evaluate(trained, dataset, resolution=result.candidate.resolution, threads=1)
        assert alone == result.quality
    assert all(r.drop.drop == pytest.approx(found.original.quality.top1 - r.quality.top1) for r in found.results)
    assert all(r.drop.comparisons == 1 for r in found.results) and found.original.drop is None


def test_labels_beyond_the_models_outputs(tiny, cells):
    three = type(cells)(cells.pictures, cells.labels.copy())
    dataset = three.dataset()
    object.__setattr__(dataset, "labels", np.where(np.arange(len(cells.labels)) == 0, 2, cells.labels))
    with pytest.raises(DownresError, match="2 outputs"):
        evaluate(tiny, dataset)
