"""The main job on a vision transformer: every axis in one search, from the plan to the checked artifact."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from downres import (
    Candidate,
    Preprocessing,
    check,
    curve,
    load_model,
    load_run,
    measure_cost,
    reduce,
    search,
    with_preprocessing,
)
from downres.searching.store import Store

VIT = '''
import torch
from timm.models.vision_transformer import VisionTransformer


def make():
    """Random filters, like the tiny convnet: a head on its features still tells something about a solar cell."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=2)
    torch.nn.init.normal_(model.pos_embed, std=0.2)
    model.pretrained_cfg = {"input_size": (3, 48, 48), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0,
                            "interpolation": "bilinear", "crop_mode": "center"}
    return model
'''


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("own") / "vit.py"
    file.write_text(VIT)
    return f"{file}:make"


@pytest.fixture(scope="module")
def run(vit_file, cells, tmp_path_factory):
    return search(
        vit_file, cells.dataset(), fit_head=True, max_drop=40.0, resolutions=[32], stem_scales=(0.5,), patch_sizes=[12],
        merges=[4, "50%-decreasing", "prune4", 30], candidates=["40 merge3"], rungs=("crop", "head"), threads=1,
        runtime="torch",  # where nothing is exported but the artifact: the curve below exports the axes
        out=tmp_path_factory.mktemp("vit") / "run",
    )  # fmt: skip


def test_every_axis_is_measured_and_what_cannot_be_says_why(run):
    found = {str(r.candidate): r for r in run.results}
    assert set(found) == {
        "32", "48 stem×0.5", "48 patch12", "48 merge4", "48 merge50%-decreasing", "48 prune4", "48 merge30",
        "40 merge3",
    }  # fmt: skip
    stopped = {name: r.reason for name, r in found.items() if r.status != "measured"}
    assert set(stopped) == {"48 merge30"}
    assert "would take 60 tokens out of 36 in 2 blocks: give at most 17 a block" in stopped["48 merge30"]
    for name, r in found.items():
        if name not in stopped:
            assert r.cost.macs < run.original.cost.macs and r.quality.n == run.original.quality.n > 50
            assert r.latency is not None and r.drop is not None and r.naive is not None


def test_costs_are_those_of_reduce(run, vit_file):
    model = load_model(vit_file).module
    for r in run.results:
        if r.status == "measured":
            small = reduce(model, r.candidate, resize_input=False)
            assert measure_cost(small, (3, *r.candidate.hw)).macs == r.cost.macs


def test_the_artifact_of_a_transformer_passes_its_check(run, vit_file, cells):
    assert run.best is not None and run.artifact is not None
    findings = check(run.artifact, model=vit_file, data=cells.dataset(), threads=1)
    assert [f.ok for f in findings] == [True] * 5, findings
    manifest = json.loads((Path(run.artifact) / "manifest.json").read_text())
    assert Candidate.from_json(manifest["candidate"]) == run.best.candidate


def test_the_report_shows_merged_tokens(run):
    kept = Store.read(run.folder).arrays("photos")
    names = [str(name) for name in kept["candidates"]]
    groups = kept[f"map{names.index('48 merge4')}"]
    assert groups.shape[1:] == (6, 6)
    for one in groups:
        assert len(np.unique(one)) == 36 - 2 * 4
    page = (run.folder / "report.html").read_text()
    assert "4 tokens merged a block" in page and "patches of 12 px" in page
    assert load_run(run.folder).results == run.results


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_curve_gives_what_the_reduced_models_say(vit_file, cells, runtime):
    data = cells.dataset()
    # Exports take long: one of the axes together; merging is exported in test_tokens.py.
    texts = ["32", "48 merge4", "36 patch12 merge1"] if runtime == "torch" else ["48 stem×0.5 patch12 prune1"]
    found = curve(vit_file, data, merges=[30], candidates=texts, runtime=runtime, threads=1, snap=False)
    assert [str(r.candidate) for r in found.results] == ["48 merge30", *texts]
    assert found.results[0].status == "stopped" and "give at most" in found.results[0].reason
    model = load_model(vit_file)
    from downres.images import batches

    proof = np.concatenate([fold.test for fold in data.folds])
    for r in found.results[1:]:
        small = reduce(model.module, r.candidate, resize_input=False)
        p = model.preprocessing.at(r.candidate.resolution)
        with torch.no_grad():
            out = np.concatenate([small(b).numpy() for b in batches(data.images, proof, p, 8)])
        correct = int((out.argmax(1) == data.labels[proof]).sum())
        assert abs(correct - r.quality.correct) <= 1, r.candidate  # one rounded tie at most


def test_an_original_at_another_resolution_than_it_was_built_for(vit_file, cells):
    model = with_preprocessing(load_model(vit_file), resolution=32)
    found = curve(model, cells.dataset(), [24], threads=1)
    assert found.original.cost.input_size == (1, 3, 32, 32)
    assert measure_cost(reduce(model.module, resolution=32, resize_input=False), (3, 32, 32)) == found.original.cost
    assert model.module.patch_embed.img_size == (48, 48)  # the caller's model is left alone


def test_depth_and_width_are_for_costs_alone(vit_file, cells):
    from downres import DownresError

    with pytest.raises(DownresError, match="has to be trained first"):
        search(vit_file, cells.dataset(), candidates=["48 depth2"], preprocessing=Preprocessing(48, 1.0))


def test_a_network_of_fixed_size_is_used_at_the_size_it_is_built_for(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    from downres import costs

    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=2)
    assert costs(model, []).original.input_size == (1, 3, 64, 64)
    model.pretrained_cfg = {"input_size": (3, 224, 224)}  # says another: what is built counts
    assert costs(torch.nn.Sequential(model), []).original.input_size == (1, 3, 64, 64)
    file = tmp_path / "own64.py"
    file.write_text(VIT.replace("img_size=48", "img_size=64"))
    found = load_model(f"{file}:make").preprocessing
    assert found.resolution == 64 and "64 px is what the network is built for" in found.source


def test_positions_are_resampled_once_from_the_original(vit_file, cells):
    """An original at 40 px of a network built for 48: a candidate at 24 px goes 6×6 → 3×3, not by way of 5×5."""
    from timm.layers import resample_abs_pos_embed

    from downres.recovery.state import State
    from downres.searching.prepare import prepare_task
    from downres.tasks import Question

    model = with_preprocessing(load_model(vit_file), resolution=40)
    subject = prepare_task(model, cells.dataset(), Question())
    small = subject.bank(None).network(State(Candidate(24), 1.0))
    wanted = resample_abs_pos_embed(model.module.pos_embed, [3, 3], old_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(small.pos_embed, wanted)
    twice = resample_abs_pos_embed(model.module.pos_embed, [5, 5], old_size=[6, 6], num_prefix_tokens=1)
    twice = resample_abs_pos_embed(twice, [3, 3], old_size=[5, 5], num_prefix_tokens=1)
    assert not torch.allclose(small.pos_embed, twice, atol=1e-3)
