"""One resolution without a search: evaluate, recover, curve; the model given is never touched."""

import dataclasses

import numpy as np
import pytest
import torch

from downres import Candidate, curve, evaluate, recover
from downres.errors import DownresError
from downres.images import preprocess
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
