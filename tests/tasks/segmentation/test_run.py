"""Search, curve, evaluate and recover on masks: every number by hand, interruption, sizes, and what is refused."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from downres import Candidate, Preprocessing, curve, evaluate, load_model, load_run, measure_cost, recover, search
from downres.engines.torch import TorchRuntime
from downres.errors import DownresError
from downres.images import split_once
from downres.images.images import from_arrays as images_of
from downres.records import TOO_FEW, WITHIN, Dense
from downres.recovery import ladder
from downres.reductions.dense import Segmenter
from downres.searching.prepare import prepare_task
from downres.searching.store import Store
from downres.tasks import Question
from downres.tasks.classification.folders import from_arrays
from downres.tasks.segmentation.bank import MaskBank
from downres.tasks.segmentation.masks import open_masks
from downres.tasks.segmentation.quality import Tallies
from downres.tasks.segmentation.task import Segmentation

SMALLER = [(36, 48), (24, 32)]
OPTIONS = {"max_drop": 15.0, "resolutions": SMALLER, "stem_scales": (), "runtime": "torch", "threads": 1}
RESIZES = 0.2
"""Points of mIoU that PIL's resize and torchvision's, at most 2 of 255 levels apart, may differ by."""


def run_search(model, data, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        return search(model, data, out=out, **{**OPTIONS, **options})


def by_hand(shapes, network, folder, hw, **how):
    """mIoU in percent of a network on a folder of images and masks, by PIL, torch and numpy alone."""
    pairs = shapes.read(folder)
    return shapes.miou(shapes.confusion([shapes.predicted(network, i, hw, **how) for i, _ in pairs], [m for _, m in pairs]))


@pytest.fixture(scope="module")
def run(segmenter, scenes, tmp_path_factory):
    """Through onnxruntime, of a network that loses its BatchNorm statistics with the resolution."""
    return run_search(segmenter("rough"), scenes, tmp_path_factory.mktemp("masks") / "run", runtime="onnxruntime")


@pytest.fixture(scope="module")
def seen(segmenter, scenes):
    """A curve of a network whose statistics stay."""
    return curve(segmenter(), scenes, [*SMALLER, (12, 16)], threads=1)


# --- numbers ---


def test_the_original_is_what_numpy_counts(run, shapes, scenes):
    q = run.original.quality
    pairs = shapes.read(scenes / "val")
    counts = shapes.confusion([shapes.predicted(shapes.rough().eval(), i, shapes.HW) for i, _ in pairs], [m for _, m in pairs])
    iou = 100 * counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert q.n == 16 and q.miou == pytest.approx(iou.mean(), abs=0.02)  # onnxruntime may round a tie the other way
    assert q.iou == pytest.approx(tuple(iou), abs=0.05)
    assert q.pixel_accuracy == pytest.approx(100 * counts.trace() / counts.sum(), abs=0.02)
    assert q.miou_low < q.miou < q.miou_high


def test_lowered_only_is_the_same_network_on_smaller_pictures(run, shapes, scenes):
    for result, hw in zip(run.results, SMALLER, strict=True):
        expected = by_hand(shapes, shapes.rough().eval(), scenes / "val", hw)
        assert result.naive.miou == pytest.approx(expected, abs=RESIZES)


def test_batchnorm_statistics_are_those_of_the_small_training_images(run, shapes, scenes):
    """The shipped network's first BatchNorm, and its mIoU, both by hand."""
    assert run.best.candidate.hw == (36, 48) and run.best.recovery.rung == "batchnorm"
    data = open_masks(scenes, outputs=4)
    fit, tune = Segmentation(None, 4, Dense((48, 64))).split(data.folds[0])
    assert len(fit) == 33 and len(tune) == 11
    network = shapes.rough().eval()
    inputs = []
    for i in fit:
        small = Image.fromarray(data.images[int(i)]).resize((48, 36), Image.Resampling.BILINEAR)
        inputs.append((torch.from_numpy(np.asarray(small).astype(np.float32)).permute(2, 0, 1) / 255 - 0.5) / 0.25)
    with torch.no_grad():
        first = network.body[0](torch.stack(inputs))
    shipped = load_file(run.artifact / "model.safetensors")
    assert torch.allclose(shipped["body.1.running_mean"], first.mean((0, 2, 3)), atol=2e-3)
    network.load_state_dict(shipped)
    assert run.best.quality.miou == pytest.approx(by_hand(shapes, network, scenes / "val", (36, 48)), abs=RESIZES)
    assert run.best.quality.miou > run.best.naive.miou + 10
    none, batchnorm = run.best.recovery.tried
    assert (none.rung, none.n, batchnorm.rung, batchnorm.n) == ("none", 11, "batchnorm", 11)
    assert none.images == 11 and batchnorm.images == 33 + 11 and batchnorm.score > none.score


def test_drops_and_verdicts(run):
    for r in run.results:
        assert r.drop.drop == pytest.approx(run.original.quality.miou - r.quality.miou)
        assert r.drop.lower < r.drop.drop < r.drop.upper and (r.drop.verdict == WITHIN) == (r.drop.upper < 15)
        assert r.drop.n == 16 and r.drop.lost is r.drop.won is None
    assert run.results[0].drop.verdict == WITHIN
    within = [r for r in run.results if r.drop.verdict == WITHIN and not r.reason]
    assert run.best == min(within, key=lambda r: r.cost.macs)


def test_what_is_stored_adds_up_to_what_is_said(run, scenes, shapes):
    (file,) = [f for f in (run.folder / "predictions").glob("*.npz") if f.name.startswith("36x48")]
    tallies = Tallies.from_arrays(dict(np.load(file)))
    assert shapes.miou(tallies.confusion) == pytest.approx(run.results[0].quality.miou)
    truth = sum(np.bincount(m[m != 255], minlength=4) for _, m in shapes.read(scenes / "val"))
    assert tallies.confusion.sum(1).tolist() == truth.tolist()


def by_layers(hw, upsampled):
    """MACs of tests/shapes.py's network: 3×3 convolutions at a half and a quarter, 1×1 at a quarter, 4 a value upsampled."""
    half, quarter = hw[0] * hw[1] // 4, hw[0] * hw[1] // 16
    return half * 8 * 27 + quarter * 4 * 72 + quarter * 16 + 4 * 4 * sum(h * w for h, w in upsampled)


def test_costs_include_the_upsampling(run, segmenter, scenes):
    assert run.original.cost.macs == by_layers((48, 64), [(48, 64)])  # its own; more is not needed
    assert run.original.cost.input_size == (1, 3, 48, 64)
    for r in run.results:
        assert r.cost.macs == by_layers(r.candidate.hw, [r.candidate.hw, (48, 64)])
    quarter = segmenter("quarter")
    found = curve(quarter, scenes, [(36, 48)], label_size=(96, 128), threads=1)
    assert found.original.cost.macs == by_layers((48, 64), [(96, 128)])
    assert found.original.cost == measure_cost(Segmenter(quarter.module, Dense((96, 128))), (3, 48, 64))
    # Full-size logits of 4 classes in float32 and those that they come from.
    assert found.original.cost.peak_activation_bytes == 4 * 4 * (96 * 128 + 12 * 16)
    assert found.results[0].cost.peak_activation_bytes == 4 * 4 * (96 * 128 + 9 * 12)


def test_the_report_shows_the_scenes(run):
    page = (run.folder / "report.html").read_text()
    kept = np.load(run.folder / "photos.npz")
    assert kept["names"].tolist()[0].startswith("val/images/val") and kept["hardest"].tolist() == [False] * 3 + [True] * 3
    assert page.count("data:image/") >= 6 * 3  # each scene in at least three pictures
    for name in ("ground", "red", "green", "blue", *(Path(name).stem for name in kept["names"])):
        assert name in page
    assert run.artifact == run.folder / "best" and not (run.folder / "onnx").exists()


# --- kinds of networks ---


def test_what_the_network_returns_does_not_matter(seen, segmenter, shapes, scenes):
    quarter = curve(segmenter("quarter"), scenes, [(36, 48)], threads=1)
    for hw, found in (((48, 64), quarter.original), ((36, 48), quarter.results[0])):
        assert found.quality.miou == pytest.approx(by_hand(shapes, shapes.quarter().eval(), scenes / "val", hw), abs=RESIZES)
    assert quarter.original.quality.miou == pytest.approx(seen.original.quality.miou, abs=1e-4)  # the same upsampling
    assert prepare_task(segmenter("dictionary"), scenes, Question()).dense == Dense((48, 64), align_corners=True)
    aligned = curve(segmenter("dictionary"), scenes, [(36, 48)], threads=1)
    for hw, found in (((48, 64), aligned.original), ((36, 48), aligned.results[0])):
        wanted = by_hand(shapes, shapes.dictionary().eval(), scenes / "val", hw, align=True)
        assert found.quality.miou == pytest.approx(wanted, abs=RESIZES)


def test_bicubic_upsampling(segmenter, shapes, scenes):
    found = curve(segmenter("quarter"), scenes, [(24, 32)], upsampling="bicubic", threads=1)
    network = shapes.quarter().eval()
    for hw, result in (((48, 64), found.original), ((24, 32), found.results[0])):
        wanted = by_hand(shapes, network, scenes / "val", hw, mode="bicubic")
        assert result.quality.miou == pytest.approx(wanted, abs=RESIZES)
        assert abs(wanted - by_hand(shapes, network, scenes / "val", hw)) > 0.02  # it is another upsampling
    assert found.original.cost.macs == by_layers((48, 64), []) + 16 * 4 * 48 * 64


def test_class_maps_are_the_logits_largest_in_less_memory(segmenter, scenes):
    """Also in the runtime: what is judged are the maps that the network itself hands out."""
    logits, maps = (curve(segmenter("quarter"), scenes, SMALLER, output=output, threads=1) for output in ("logits", "classes"))
    for one, other in zip([logits.original, *logits.results], [maps.original, *maps.results], strict=True):
        assert one.quality == other.quality and one.cost.macs == other.cost.macs
        assert (one.drop and one.drop.to_json()) == (other.drop and other.drop.to_json())
    big = [
        curve(segmenter("quarter"), scenes, [(36, 48)], output=output, label_size=(192, 256), threads=1).original.cost
        for output in ("logits", "classes")
    ]
    pixels = 192 * 256
    assert big[0].peak_activation_bytes == 4 * 4 * (pixels + 12 * 16) and big[0].macs == big[1].macs
    # Two float maps and what the comparison makes of them: far less than four.
    assert 2 * 4 * pixels < big[1].peak_activation_bytes < 0.85 * big[0].peak_activation_bytes


def test_a_network_without_batchnorm_says_so(segmenter, scenes, tmp_path):
    run = run_search(segmenter("without_norm"), scenes, tmp_path / "r", resolutions=[(24, 32)], max_drop=1.0)
    tried = run.results[0].recovery.tried
    assert run.results[0].recovery.rung == "none" and "no BatchNorm" in tried[1].note and tried[1].images == 0
    assert run.results[0].quality == run.results[0].naive


def test_statistics_that_do_no_good_stay(segmenter, scenes, tmp_path):
    """Recalibration is tried and left."""
    run = run_search(segmenter("idle_norm"), scenes, tmp_path / "r", resolutions=[(36, 48)], max_drop=1.0)
    (result,) = run.results
    none, batchnorm = result.recovery.tried
    assert (none.rung, batchnorm.rung, result.recovery.rung) == ("none", "batchnorm", "none")
    assert none.score == batchnorm.score and result.quality == result.naive
    assert run.best is None and run.artifact is None


def test_without_rungs_nothing_is_recovered(segmenter, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "_Ladder", None)
    run = run_search(segmenter("rough"), scenes, tmp_path / "r", rungs=(), max_drop=1.0)
    for r in run.results:
        assert r.quality == r.naive and r.recovery.rung == "none"
        assert [(t.score, t.n, t.images, t.note) for t in r.recovery.tried] == [(None, 0, 0, "no recovery was asked for")]


def test_rungs_for_classifiers_do_nothing_here(segmenter, scenes, tmp_path):
    run = run_search(segmenter("rough"), scenes, tmp_path / "r", rungs=("crop", "head"), max_drop=1.0)
    assert run.settings["rungs"] == [] and all(r.recovery.rung == "none" for r in run.results)


def test_nan_names_the_image(segmenter, scenes, tmp_path):
    with pytest.raises(DownresError, match=r"NaN.*48x64.*train/images/train04\.png"):
        run_search(segmenter("nan"), scenes, tmp_path / "r")
    assert load_run(tmp_path / "r").original.cost is not None  # what was counted is kept


def test_a_module_given_in_python(shapes, scenes, seen):
    """Its resolution is assumed to be that of the masks, for nothing else is said."""
    preprocessing = Preprocessing((48, 64), mean=(0.5,) * 3, std=(0.25,) * 3)
    found = curve(shapes.make(), scenes, [(36, 48)], preprocessing=preprocessing, threads=1)
    assert found.original.quality == seen.original.quality and found.results[0] == seen.results[0]
    assert found.preprocessing.fit == "stretch" and "stretched" in found.preprocessing.source
    assumed = curve(shapes.make(), scenes, [(36, 48)], threads=1)
    assert assumed.preprocessing.hw == (48, 64) and "the labels' size" in assumed.preprocessing.source


def test_the_callers_module_is_left_alone(shapes, scenes):
    network = shapes.rough().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    small, preprocessing, recovery = recover(
        network, scenes, resolution=(36, 48), preprocessing=Preprocessing((48, 64), mean=(0.5,) * 3, std=(0.25,) * 3), threads=1
    )
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert recovery.rung == "batchnorm" and preprocessing.hw == (36, 48) and preprocessing.fit == "stretch"
    assert small(torch.zeros(1, 3, 36, 48)).shape == (1, 4, 36, 48)


# --- curve, evaluate, recover ---


def test_a_curve_is_what_a_search_measures_before_recovery(run, segmenter, scenes):
    found = curve(segmenter("rough"), scenes, SMALLER, runtime="onnxruntime", threads=1)
    assert found.original.quality == run.original.quality
    for ours, theirs in zip(found.results, run.results, strict=True):
        assert ours.quality == theirs.naive and ours.cost == theirs.cost and ours.candidate == theirs.candidate


def test_one_number_is_the_short_side(seen, segmenter, scenes):
    found = curve(segmenter(), scenes, [36, 24, 12], threads=1)
    assert found == seen
    assert [r.candidate.hw for r in found.results] == [(36, 48), (24, 32), (12, 16)]


def test_a_candidate_that_cannot_be_made_is_stopped_with_its_reason(seen, segmenter, scenes):
    given = ["48x64 patch8", "36x48", Candidate(stem_scale=0.5, stem="no.such")]
    found = curve(segmenter(), scenes, candidates=given, threads=1)
    assert [r.status for r in found.results] == ["stopped", "measured", "stopped"]
    assert "patches" in found.results[0].reason and "no.such" in found.results[2].reason
    assert found.results[1].quality == seen.results[0].quality


def test_stem_candidates(segmenter, shapes, scenes):
    """Half of the activations after the first convolution, with the pictures as they are."""
    found = curve(segmenter("quarter"), scenes, stem_scales=[0.5], threads=1).results[0]
    network = shapes.quarter().eval()
    resize = {"size": (12, 16), "mode": "bilinear", "antialias": True, "align_corners": False}
    network.body[0].register_forward_hook(lambda _m, _x, out: nn.functional.interpolate(out, **resize))
    assert found.quality.miou == pytest.approx(by_hand(shapes, network, scenes / "val", (48, 64)), abs=0.01)
    assert found.cost.input_size == (1, 3, 48, 64)


def test_a_cache_smaller_than_the_data_changes_no_number(seen, segmenter, scenes):
    with pytest.warns(UserWarning, match="are decoded again each time they are looked at"):
        small = curve(segmenter(), scenes, [*SMALLER, (12, 16)], threads=1, cache_gb=1e-4)  # of 0.2 MB
    assert small.to_json() == seen.to_json()


def test_evaluate(seen, segmenter, scenes):
    assert evaluate(segmenter(), scenes, threads=1) == seen.original.quality
    assert evaluate(segmenter(), scenes, resolution=(24, 32), threads=1) == seen.results[1].quality


def test_recover(run, segmenter, scenes):
    network, preprocessing, recovery = recover(segmenter("rough"), scenes, resolution=(36, 48), max_drop=15.0, threads=1)
    assert recovery.rung == "batchnorm" and preprocessing.hw == (36, 48)
    shipped = load_file(run.artifact / "model.safetensors")
    assert all(torch.allclose(v, shipped[k], atol=1e-5) for k, v in network.state_dict().items())
    _, _, none = recover(segmenter("rough"), scenes, resolution=(36, 48), rungs=(), threads=1)
    assert none.rung == "none"


# --- pictures of several sizes ---


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_each_picture_is_judged_at_its_own_size(segmenter, shapes, tmp_path, fit):
    sizes = ((48, 64), (64, 48), (30, 80))
    root = shapes.write(tmp_path / "mixed", train=3, val=12, sizes=sizes)
    found = curve(segmenter("quarter", fit=fit), root, [(36, 48)], threads=1)
    network, fill = shapes.quarter().eval(), (128, 128, 128)  # the mean, 0.5
    for hw, result in (((48, 64), found.original), ((36, 48), found.results[0])):
        maps, pairs = [], shapes.read(root / "val")
        for image, _ in pairs:
            if fit == "stretch":
                maps.append(shapes.predicted(network, image, hw, size=(48, 64)))
                continue
            height, width = image.shape[:2]
            scale = min(hw[0] / height, hw[1] / width)
            shown = round(height * scale), round(width * scale)
            canvas = Image.new("RGB", hw[::-1], fill)
            canvas.paste(Image.fromarray(image).resize(shown[::-1], Image.Resampling.BILINEAR))
            x = (torch.from_numpy(np.array(canvas, np.float32)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
            with torch.no_grad():
                full = nn.functional.interpolate(network(x).logits, (48, 64), mode="bilinear")
            part = full[..., : round(48 * shown[0] / hw[0]), : round(64 * shown[1] / hw[1])]
            maps.append(nn.functional.interpolate(part, (height, width), mode="bilinear")[0].argmax(0).numpy())
        wanted = shapes.miou(shapes.confusion(maps, [m for _, m in pairs]))
        assert result.quality.miou == pytest.approx(wanted, abs=RESIZES)
        assert result.quality.n == 12
    assert "several sizes" in found.data


# --- cross-fitting ---


def test_folds_prove_on_every_image_with_statistics_of_the_others(segmenter, shapes, tmp_path):
    root = shapes.write(tmp_path / "whole", train=0, val=60)
    run = run_search(segmenter("rough"), root, tmp_path / "r", folds=3, resolutions=[(36, 48)], max_drop=15.0)
    assert run.original.quality.n == 60 and run.data["fold_count"] == 3
    network = shapes.rough().eval()
    assert run.original.quality.miou == pytest.approx(by_hand(shapes, network, root, (48, 64)), abs=0.01)
    assert run.results[0].recovery.rung == "batchnorm"
    data = open_masks(root, outputs=4, folds=3)
    maps, masks = [], []
    tensors = load_file(run.artifact / "folds.safetensors")
    assert not torch.equal(tensors["0/body.1.running_mean"], tensors["1/body.1.running_mean"])
    for i, fold in enumerate(data.folds):
        network.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith(f"{i}/")}, strict=False)
        for j in fold.test:
            maps.append(shapes.predicted(network, data.images[int(j)], (36, 48)))
            masks.append(data.masks[int(j)])
    assert run.results[0].quality.miou == pytest.approx(shapes.miou(shapes.confusion(maps, masks)), abs=RESIZES)
    # Shipped is one more network, with the statistics of all.
    shipped = load_file(run.artifact / "model.safetensors")["body.1.running_mean"]
    assert all(not torch.equal(shipped, tensors[f"{i}/body.1.running_mean"]) for i in range(3))


# --- going on ---


class Counter:
    """Counts images that networks looked at, outside of timing: all, and of which candidates."""

    def __init__(self, monkeypatch):
        self.images = self.forwards = 0
        self.candidates = set()
        tallies, forward = MaskBank.tallies, TorchRuntime.__call__

        def counted(bank, state, indices, **options):
            before = bank.passes
            try:
                return tallies(bank, state, indices, **options)
            finally:
                self.images += bank.passes - before
                self.candidates |= {str(state.candidate)} if bank.passes > before else set()

        def run(runtime, batch):
            self.forwards += 1
            return forward(runtime, batch)

        monkeypatch.setattr(MaskBank, "tallies", counted)
        monkeypatch.setattr(TorchRuntime, "__call__", run)


def final(run):
    """All that a run answers, without wall-clock times."""

    def answer(result):
        row = {
            k: v for k, v in result.row().items() if not k.endswith(("_ms", "_per_s", "ratio_low", "ratio_high", "rss_bytes"))
        }
        return row, result.drop and result.drop.to_json(), result.quality and result.quality.to_json()

    states = [Store.read(run.folder).get(f"quality/{r.candidate}")["states"] for r in run.results]
    return [answer(r) for r in (run.original, *run.results)], states, run.best and run.best.candidate, run.finished


GOING_ON = {"max_drop": 1.0}  # nothing is proven: no time goes into shipping


@pytest.fixture(scope="module")
def uninterrupted(segmenter, scenes, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        run = run_search(segmenter("rough"), scenes, tmp_path_factory.mktemp("u") / "r", **GOING_ON)
        return final(run), counter.images, run.folder


STAGES = [("counting costs", 2), ("latency", 5), ("48x64: looking", 1), ("36x48: looking", 14), ("24x32: looking", 30)]


def test_interrupted_and_started_again_it_gives_the_same_and_measures_nothing_twice(
    segmenter, scenes, tmp_path, monkeypatch, uninterrupted
):
    """One run, interrupted at every stage, one after the other."""
    expected, images, _ = uninterrupted
    # 16 proof images of the original; of each candidate 11 to tune and 16 to prove, before and after, 33 to recalibrate.
    each = {"48x64": 16, "36x48": 11 + 33 + 11 + 16 + 16, "24x32": 11 + 33 + 11 + 16 + 16}
    assert images == sum(each.values()) + 11  # the original's own on the tuning images
    stored, done = b"", set()

    def stop_at(stage, nth):
        reports = 0

        def ctrl_c(what, done, total):
            nonlocal reports
            reports += stage in what
            if stage in what and reports == nth:
                raise KeyboardInterrupt

        return ctrl_c

    for stage in [*STAGES, None]:
        with monkeypatch.context() as patch:
            counter = Counter(patch)
            if stage is None:
                run = run_search(segmenter("rough"), scenes, tmp_path / "r", **GOING_ON)
            else:
                with pytest.raises(KeyboardInterrupt):
                    run_search(segmenter("rough"), scenes, tmp_path / "r", progress=stop_at(*stage), **GOING_ON)
                between = load_run(tmp_path / "r")
                assert not between.finished and "unfinished" in between.notes[-1], stage
        left = sum(n for key, n in each.items() if key not in done)
        assert counter.images <= left + 11  # the original's on the tuning images are not kept
        assert not counter.candidates & (done - {"48x64"}), stage
        log = (tmp_path / "r" / "measurements.jsonl").read_bytes()
        assert log.startswith(stored), stage
        stored = log
        done = {key for key in each if f'"quality/{key}"'.encode() in stored}
    assert final(run) == expected
    assert counter.images == left + 11
    keys = [line.split(b'"')[3] for line in log.splitlines()]
    assert len(keys) == len(set(keys)), "something was measured twice"


def test_a_finished_run_runs_no_network_again(segmenter, scenes, tmp_path, monkeypatch, uninterrupted):
    expected, _, folder = uninterrupted
    shutil.copytree(folder, tmp_path / "r")
    counter = Counter(monkeypatch)
    assert final(run_search(segmenter("rough"), scenes, tmp_path / "r", **GOING_ON)) == expected
    assert counter.forwards == counter.images == 0


@pytest.mark.parametrize(
    "options", [{"label_size": (96, 128)}, {"output": "classes"}, {"upsampling": "bicubic"}], ids=lambda o: next(iter(o))
)
def test_another_answer_needs_another_folder(segmenter, scenes, tmp_path, uninterrupted, options):
    folder = shutil.copytree(uninterrupted[2], tmp_path / "r")
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with pytest.raises(DownresError, match="another task .*`out`"):
        run_search(segmenter("rough"), scenes, folder, **GOING_ON, **options)
    assert before == {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_other_masks_need_another_folder(segmenter, shapes, scenes, tmp_path, uninterrupted):
    folder = shutil.copytree(uninterrupted[2], tmp_path / "r")
    (folder / "measurements.jsonl").write_text(
        "".join(line + "\n" for line in (folder / "measurements.jsonl").read_text().splitlines() if '"finished"' not in line)
    )
    other = shutil.copytree(scenes, tmp_path / "other")
    mask = np.array(Image.open(other / "val" / "masks" / "val03.png"))
    mask[0, 0] = (mask[0, 0] + 1) % 4
    shapes.save_mask(mask, other / "val" / "masks" / "val03.png")
    with pytest.raises(DownresError, match="another data"):
        run_search(segmenter("rough"), other, folder, **GOING_ON)


# --- refused ---


@pytest.mark.parametrize(
    "options, words",
    [
        ({"label_size": (47, 63)}, "below the 48x64"),
        ({"output": "colours"}, "logits or classes"),
        ({"upsampling": "nearest"}, "bilinear or bicubic"),
        ({"fit_head": True}, "leave `fit_head` out"),
        ({"ragged": "pad", "resolutions": [(35, 47)]}, "whole inputs"),
        ({"candidates": ["48x64 width×0.5"]}, "trained first"),
        ({"classes": "no.txt"}, "is not there"),
    ],
)
def test_bad_options_leave_no_folder(segmenter, scenes, tmp_path, options, words):
    with pytest.raises(DownresError, match=words) as error:
        run_search(segmenter(), scenes, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists() and "\n" not in str(error.value)


def test_networks_and_data_that_do_not_belong_together(segmenter, scenes, tmp_path):
    labels = np.arange(8) % 4
    pictures = images_of(np.zeros((8, 48, 64, 3), np.uint8))
    labelled = from_arrays(pictures, labels, tuple("abcd"), (split_once(labels, 0.5, 0),), "Black.", "")
    with pytest.raises(DownresError, match="needs a mask for every image"):
        run_search(segmenter(), labelled, tmp_path / "r")
    with pytest.raises(DownresError, match="5 outputs and the masks 4 classes"):
        run_search(segmenter("five_classes"), scenes, tmp_path / "r")
    opened = open_masks(scenes, outputs=None)
    with pytest.raises(DownresError, match="4 classes, the network 5"):
        run_search(segmenter("five_classes"), opened, tmp_path / "r")
    with pytest.raises(DownresError, match="for segmentation networks"):
        run_search(segmenter("classifier"), opened, tmp_path / "r")
    with pytest.raises(DownresError, match="opened already"):
        run_search(segmenter(), opened, tmp_path / "r", classes="classes.txt")
    assert not (tmp_path / "r").exists()


def test_few_images_prove_nothing(segmenter, shapes, tmp_path):
    root = shapes.write(tmp_path / "few", train=8, val=8)
    run = run_search(segmenter(), root, tmp_path / "r", resolutions=[(44, 60)], max_drop=50.0)
    assert run.results[0].drop.verdict == TOO_FEW and run.best is None and run.results[0].drop.more_images > 0


def test_real_street_scenes(shared_data, tmp_path):
    """An untrained RegSeg on a few images of CamVid, whole: 11 classes, 360×480."""
    source = shared_data / "camvid"
    if not (source / "val").is_dir():
        pytest.skip("CamVid is not in ../shared/data on this machine")
    for part, count in (("train", 12), ("val", 8)):
        for image in sorted((source / part).glob("*.png"))[:: 20 if part == "train" else 10][:count]:
            for folder in (part, f"{part}annot"):
                (tmp_path / "camvid" / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(source / folder / image.name, tmp_path / "camvid" / folder)
    network = load_model("regseg:exp48_decoder26,width=0.25,depth=0.25,num_classes=11", pretrained=False)
    network = dataclasses.replace(network, preprocessing=Preprocessing((360, 480), fit="stretch"))
    run = run_search(network, tmp_path / "camvid", tmp_path / "r", resolutions=[240], max_drop=5.0)
    (small,) = run.results
    assert small.candidate.hw == (240, 320) and run.original.quality.n == 8 and len(run.data["classes"]) == 11
    assert small.drop.drop == pytest.approx(run.original.quality.miou - small.quality.miou)
    assert run.original.cost.peak_activation_bytes > 4 * 11 * 360 * 480
    assert small.drop.verdict == TOO_FEW and run.best is None  # 8 images


@pytest.mark.parametrize("rung", ["distill", "fixres", "finetune"])
def test_training_wins_pixels_back(segmenter, scenes, rung):
    """With masks or without; with random parts of the pictures the masks follow."""
    options = {"resolution": (24, 32), "max_drop": 0.0, "threads": 1, "epochs": 25, "training_batch": 8, "learning_rate": 1e-3}
    if rung == "finetune":
        options["crop_scale"] = 0.5
    network, p, recovery = recover(segmenter("rough"), scenes, rungs=(rung,), **options)
    none, trained = recovery.tried
    assert trained.rung == rung and trained.n == none.n and trained.score > none.score + 5
    assert network(torch.zeros(1, 3, *p.hw)).shape[-2:] == (24, 32)
