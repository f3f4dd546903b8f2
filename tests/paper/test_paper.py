"""The paper's experiments: their networks against arithmetic and other code, one of each kind run on a few pictures."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet50
from torchvision.models.vision_transformer import interpolate_embeddings

from downres import DownresError, Measuring, Model, Question, Training, reproduce
from downres.engines.engine import engine_of
from downres.engines.onnx_int8 import quantize_linear
from downres.engines.onnxruntime import export_onnx
from downres.families.scratch import INTERPOLATIONS, at_grid, scratch
from downres.images.images import from_arrays
from downres.measuring.cost import measure_cost
from downres.paper.experiments import DYNAMIC, EXPERIMENTS, GRID, REGSEG, RESNET, VIT, Look
from downres.paper.figures import card, listed, looks_rows, rows, write_figure
from downres.paper.running import _in_8_bits, _training
from downres.records import Preprocessing
from downres.recovery.views import Views, cut, drawn, pixels_of
from downres.searching.prepare import open_data, prepare_task


def named(e, name):
    return next(entry for entry in e.entries if entry.name == name)


def bottleneck_macs(channels, side, classes=1000):
    """Multiply-accumulates of a ResNet-50, by hand: convolutions and the last linear layer."""
    stem, *stages = channels
    side = -(-side // 2)
    total, inputs = 49 * 3 * stem * side**2, stem
    side = -(-side // 2)
    for i, (width, depth) in enumerate(zip(stages, (3, 4, 6, 3), strict=True)):
        for block in range(depth):
            before = side
            if block == 0 and i > 0:
                side = -(-side // 2)
            total += inputs * width * before**2 + 9 * width**2 * side**2 + 4 * width**2 * side**2
            if block == 0 and (i > 0 or inputs != 4 * width):  # else the shortcut is the input itself
                total += inputs * 4 * width * side**2
            inputs = 4 * width
    return total + inputs * classes


@pytest.mark.parametrize("name", ["16-32-32-512 112-152-144", "64-128-256-512 176-232-224", "128-256-512-1024 128-168-160"])
def test_channels_cost_what_arithmetic_says(name):
    entry = named(RESNET, name)
    (line,) = reproduce("resnet50", only=name).lines
    assert line.cost.macs == bottleneck_macs(entry.made["channels"], entry.look.side)
    assert line.quality() == [] and line.memory > 7 * line.cost.peak_activation_bytes


def test_full_width_is_torchvisions():
    ours, theirs = scratch("resnet50", 10, 0), resnet50(num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    resized = scratch("resnet50", 10, 0, stem_side=16)
    resized.load_state_dict(ours.state_dict())
    assert torch.equal(resized(x[:, :, ::1]), resized(x)) and not torch.equal(resized(x), ours(x))
    assert measure_cost(resized, (3, 64, 64)).macs < measure_cost(resized, (3, 128, 128)).macs < 1.3e9 / 4


@pytest.mark.parametrize("mode", INTERPOLATIONS)
def test_position_embeddings_are_interpolated_as_torchvision_does(mode, monkeypatch):
    made = {"patch": 4, "width": 32, "depth": 1, "heads": 2}
    network = scratch("vit", 3, 0, side=16, **made)
    assert torch.equal(at_grid(network, 16, mode, **made).pos_embed, network.pos_embed)
    if mode not in ("bilinear", "bicubic"):  # modes that do not take it are given `align_corners` by torchvision
        plain = F.interpolate
        monkeypatch.setattr(F, "interpolate", lambda *a, align_corners=None, **k: plain(*a, **k))
    theirs = {"encoder.pos_embedding": network.pos_embed.detach()}
    wanted = interpolate_embeddings(32, 4, theirs, interpolation_mode=mode)["encoder.pos_embedding"]
    assert torch.equal(at_grid(network, 32, mode, **made).pos_embed, wanted)


def test_the_paper_has_all_that_is_known_of_it():
    widths = {e.name.split()[0] for e in RESNET.entries}
    assert widths == {"16-32-32-512", "16-64-128-256", "32-64-256-256", "64-128-256-512", "128-256-512-1024"}
    assert {e.name.split()[1] for e in RESNET.entries} == {
        "176-232-224", "128-168-160", "112-152-144", "128-167-162", "128-232-224"
    }  # fmt: skip
    assert sum("stem" in e.name for e in RESNET.entries) == 5 and len(GRID) == 16
    sweep = EXPERIMENTS["channels"].entries
    assert len(sweep) == 6**4 + 300 and len({e.name for e in sweep}) == len(sweep)
    sides = {look.side // 16 for look in VIT.looks(VIT.entries[0])}
    assert sides == set(range(4, 40)) and len(list(VIT.looks(VIT.entries[0]))) == 35 * 5 + 1
    tokens = {(e.made["side"] // e.made["patch"]) ** 2 for e in VIT.entries if "ViT-S" in e.name}
    assert {64, 121, 144, 169, 196, 225} <= tokens
    assert {look.side for look in REGSEG.looks(REGSEG.entries[0])} == set(range(128, 1537, 128))
    assert [row["name"] for row in listed()] == list(EXPERIMENTS)
    for e in EXPERIMENTS.values():
        assert len({entry.name for entry in e.entries}) == len(e.entries)
        Training.from_json(e.training.to_json())


# Windows of pictures at sizes of chance


def test_windows_of_pictures_that_grow_and_shrink():
    pictures = from_arrays(np.zeros((4000, 10, 20), np.uint8))
    how = Training(zoom_low=0.5, zoom_high=2.0)
    views = drawn(pictures, np.arange(4000), how, np.random.default_rng(0), (8, 8))
    top, left, height, width = views.parts.T
    assert np.allclose(height, 2 * width)  # as many pixels of the network's, of a picture twice as wide
    assert height.min() < 0.51 and 1.95 < height.max() <= 2.0  # of the network's 8 px the short side is 4 to 16
    inside = height <= 1
    assert (top[inside] >= 0).all() and (top + height)[inside].max() <= 1
    assert (top[~inside] <= 0).all() and (top + height)[~inside].min() >= 1 - 1e-9
    assert (left >= 0).all() and (left + width).max() <= 1 + 1e-9 and sorted(views.images) == list(range(4000))


def test_what_a_picture_has_not_is_filled():
    picture = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
    whole = cut(picture, np.array([-0.5, 0.25, 2.0, 0.5]), 99)
    assert whole.shape == (8, 2) and (whole[[0, 1, 6, 7]] == 99).all() and np.array_equal(whole[2:6], picture[:, 1:3])
    p = Preprocessing(8, 1.0, "bilinear", (0.5,) * 3, (1.0,) * 3, fit="stretch")
    views = Views(np.zeros(1, np.int64), np.zeros(1, bool), np.array([[-0.5, -0.5, 2.0, 2.0]]))
    (x,) = pixels_of(from_arrays(np.full((1, 4, 4, 3), 255, np.uint8)), views, p, 1)
    assert (x[0, :, 0].abs() < 0.01).all() and (x[0, :, 3:5, 3:5] == 0.5).all()


def test_a_window_shows_the_place_that_it_was_drawn_for():
    pictures = from_arrays(np.zeros((3, 40, 60), np.uint8))
    spots = iter([(i % 3, y, x) for i, (y, x) in enumerate(np.random.default_rng(1).random((500, 2)))])
    seen = []

    def spot(random):
        seen.append(next(spots))
        return seen[-1]

    how = Training(zoom_low=1.0, zoom_high=3.0, uniform=0.5)
    views = drawn(pictures, np.zeros(1000, np.int64), how, np.random.default_rng(0), (16, 24), spot)
    assert len(seen) == 500
    windows = {(i, *part) for i, part in zip(views.images.tolist(), views.parts.tolist(), strict=True)}
    for image, y, x in seen:
        assert any(i == image and t <= y <= t + h and a <= x <= a + w for i, t, a, h, w in windows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zoom_low": 2.0}, "at most `zoom_high`"),
        ({"zoom_high": 2.0, "crop_scale": 0.5}, "leave one out"),
        ({"moves": True}, "those of `augment`"),
        ({"uniform": 1.5}, "a part from 0 to 1"),
    ],
)
def test_trainings_that_contradict_themselves(given, said):
    with pytest.raises(DownresError, match=said):
        Training(**given)


# End to end


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """A few cats and dogs."""
    root = tmp_path_factory.mktemp("photographs")
    for part, most in (("train", 8), ("val", 4)):
        for kind in sorted((shared_data / "catdog" / part).iterdir()):
            (root / part / kind.name).mkdir(parents=True)
            for file in sorted(kind.iterdir())[:most]:
                shutil.copy(file, root / part / kind.name)
    return root


@pytest.fixture(scope="module")
def scenes(shared_data, tmp_path_factory):
    """A few street scenes."""
    root = tmp_path_factory.mktemp("scenes")
    for part, most in (("train", 4), ("val", 2)):
        for folder in (part, f"{part}annot"):
            (root / folder).mkdir()
            for file in sorted((shared_data / "camvid" / folder).iterdir())[:most]:
                shutil.copy(file, root / folder)
    return root


SHORT = ["epochs=1", "training_batch=4"]


def test_resnet_is_trained_looked_at_and_gone_on_with(photographs, tmp_path, monkeypatch):
    asked = {"only": "16-32-32-512 112*", "scale": 0.2, "grid": False, "train": SHORT, "threads": 1}
    found = reproduce("resnet50", photographs, tmp_path, **asked)
    (line,) = found.lines
    own = line.entry.look
    assert found.classes == 2 and "16" in found.data and set(line.seen[0].looks) == {own}
    assert line.seen[0].looks[own].n == 8 and line.cost.macs == bottleneck_macs(line.entry.made["channels"], 29, classes=2)
    assert rows(found)[0]["top-1"] == f"{line.quality()[0]:.1f}" and rows(found)[0]["seeds"] == "1"

    with monkeypatch.context() as patched:  # again: nothing is trained, and only what is new is looked at
        patched.setattr("downres.paper.running.trained", None)
        patched.setattr(type(RESNET), "looks", lambda self, entry: iter((own, Look(128, 160))), raising=False)
        patched.setattr("downres.paper.running.experiment", lambda name: _with_looks(RESNET, (own, Look(128, 160))))
        again = reproduce("resnet50", photographs, tmp_path, **{**asked, "grid": True})
    assert set(again.lines[0].seen[0].looks) == {own, Look(128, 160)} and again.lines[0].quality() == line.quality()
    assert len(looks_rows(again)) == 2

    eight = reproduce("int8-resnet50", photographs, tmp_path, **{**asked, "grid": False})
    assert eight.lines[0].quality() and eight.lines[0].seen[0].hours == line.seen[0].hours

    page = write_figure(again, tmp_path / "page.html").read_text()
    assert "16-32-32-512 112-152-144" in page and "Every size in pixels is 0.2 times" in page
    assert any("1 of 22 networks are trained" in text for text in card(reproduce("resnet50", out=tmp_path)))

    other = photographs.parent / "exchanged"
    shutil.copytree(photographs, other, dirs_exist_ok=True)
    for part in ("train", "val"):
        one, two = sorted((other / part).iterdir())
        one.rename(other / part / "x")
        two.rename(one)
        (other / part / "x").rename(two)
    with pytest.raises(DownresError, match="resnet50 in .* was trained on other images"):
        reproduce("int8-resnet50", other, tmp_path, **{**asked, "grid": False})

    with pytest.raises(DownresError, match="trained otherwise"):
        reproduce("resnet50", photographs, tmp_path, **{**asked, "train": ["epochs=2", "training_batch=4"]})
    with pytest.raises(DownresError, match="with scale 0.2: give another folder"):
        reproduce("resnet50", photographs, tmp_path, **{**asked, "scale": 0.25})
    (photographs / "val" / "more").mkdir()
    try:
        shutil.copy(next((photographs / "val").glob("*/*.jpg")), photographs / "val" / "more" / "one.jpg")
        with pytest.raises(DownresError):
            reproduce("resnet50", photographs, tmp_path, **asked)
    finally:
        shutil.rmtree(photographs / "val" / "more")


def _with_looks(e, looks):
    return dataclasses.replace(e, looks=lambda entry: iter(looks))


def _small(e, looks=None):
    """Networks of two narrow blocks."""
    made = {"width": 32, "depth": 2, "heads": 2}
    e = dataclasses.replace(e, entries=tuple(dataclasses.replace(x, made={**x.made, **made}) for x in e.entries))
    return e if looks is None else _with_looks(e, looks)


def test_vit_is_looked_at_on_another_grid(photographs, tmp_path, monkeypatch):
    looks = (Look(64, 66, mode="nearest"), Look(64, 66, mode="bicubic"))
    monkeypatch.setattr("downres.paper.running.experiment", lambda name: _small(EXPERIMENTS[name], looks))
    found = reproduce("vit", photographs, tmp_path, only="ViT-S 112*", scale=0.25, train=[*SHORT, "repeats=1"], threads=1)
    assert set(found.lines[0].seen[0].looks) == {found.lines[0].entry.look, *looks}
    page = write_figure(found, tmp_path / "page.html").read_text()
    assert "N = 7, 49 tokens" in page
    monkeypatch.setattr("downres.paper.running.experiment", lambda name: _small(EXPERIMENTS[name]))
    eight = reproduce("int8-vit", photographs, tmp_path, only="ViT-S 112*", scale=0.25, threads=1)
    dynamic = Look(112, 116, "int8", DYNAMIC)
    assert set(eight.lines[0].seen[0].looks) == {eight.lines[0].entry.look, dynamic}


def test_linear_layers_alone_are_in_8_bits(tmp_path):
    """A fresh ViT: four linear layers a block and the head, while attention's two products stay in float; answers are close."""
    network = scratch("vit", 3, 0, side=16, patch=4, width=32, depth=2, heads=2)
    torch.nn.init.normal_(network.head.weight)  # which begins so small that answers would be all rounding
    export_onnx(network, (3, 16, 16), tmp_path / "f.onnx")
    quantize_linear(tmp_path / "f.onnx", tmp_path / "q.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node)
    assert kinds["MatMulInteger"] == 4 * 2 + 1 and kinds["MatMul"] == 2 * 2
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)
    ours, theirs = (engine_of("onnxruntime").load(tmp_path / name, 1)(x)[0] for name in ("f.onnx", "q.onnx"))
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(ours).max()


def test_setr_is_looked_at_as_a_square(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("downres.paper.running.experiment", lambda name: _small(EXPERIMENTS[name]))
    train = [*SHORT, "training_batch=2"]
    found = reproduce("setr", scenes, tmp_path, only="SETR 224", scale=0.25, train=train, threads=1)
    (line,) = found.lines
    assert line.quality() and line.cost.input_size == (1, 3, 56, 56)
    assert line.memory > 8 * 11 * 256 * 341 * 4  # the logits of eight scenes at the full size, which are 4:3 here


def test_sequences_stay_as_long_at_every_scale():
    """A patch of 16 px at 0.15 is 2 px: what is 14 patches wide stays so."""
    for e, name in ((VIT, "ViT-S 224 patch 16"), (VIT, "ViT-S 192 patch 24")):
        made = named(e, name).made
        for scale in (0.1, 0.15, 0.2, 0.3, 0.25, 1.0):
            options = named(e, name).options(scale)
            assert options["side"] == options["patch"] * (made["side"] // made["patch"])


def test_ranges_of_8_bits_are_of_all_classes(photographs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("downres.paper.running.RANGE_IMAGES", 8)
    monkeypatch.setattr("downres.paper.running.export_onnx", lambda *a: None)
    monkeypatch.setattr("downres.paper.running.engine_of", lambda name: SimpleNamespace(
        quantize=lambda a, b, images, *rest: seen.append(images), load=lambda *a, **k: None
    ))  # fmt: skip
    model = Model(scratch("vit", 2, 0, side=16, patch=4, width=32, depth=1, heads=2), Preprocessing(16), num_classes=2)
    task = prepare_task(model, photographs, Question(), "classification")
    open_data(task, photographs, Measuring(runtime="torch"), Question())
    chosen = []
    monkeypatch.setattr("downres.paper.running.batches", lambda images, indices, p, size: chosen.extend(indices) or [])
    _in_8_bits(task, model.module, tmp_path, model.preprocessing, 1)
    list(seen[0].make())
    assert len(chosen) == 8 and set(task.labels[chosen]) == {0, 1}


@pytest.mark.parametrize("content", ["{}", "[]", "1", '{"asked": 1}'])
def test_damaged_files_are_one_sentence(tmp_path, content):
    place = tmp_path / "resnet50" / "64-128-256-512-112-152-144"
    (place / "seed0").mkdir(parents=True)
    (place / "seed0-old").mkdir()
    (place / "seed0" / "training.json").write_text(content)
    with pytest.raises(DownresError, match="cannot be read"):
        reproduce("resnet50", out=tmp_path, only="64-128-256-512 112-152-144")


def test_the_papers_training_is_what_is_changed():
    assert _training(REGSEG, ["zoom_high=0.8"]) == dataclasses.replace(REGSEG.training, zoom_high=0.8)
    assert _training(VIT, ["repeats=6"]).training_batch == 510


def test_regseg_is_looked_at_at_the_masks_size(scenes, tmp_path):
    found = reproduce(
        "regseg", scenes, tmp_path, only="RegSeg 256", scale=0.25, grid=False, train=[*SHORT, "training_batch=2"], threads=1
    )
    (line,) = found.lines
    score = line.seen[0].looks[line.entry.look]
    assert score.metric == "mIoU" and 0 <= score.score <= 100 and set(line.at) == set(range(128, 1537, 128))
    assert line.at[1024].macs == line.cost.macs > 30 * line.at[128].macs
    kept = json.loads((tmp_path / "regseg" / "data.json").read_text())
    assert kept["classes"] == 11 and kept["aspect"] == pytest.approx(4 / 3)
    page = write_figure(found, tmp_path / "page.html").read_text()
    assert "RegSeg 256: one picture by the input" in page and page.count("data:image/png") >= 2
    assert reproduce("regseg", out=tmp_path, only="RegSeg 256").lines[0].cost == line.cost


def test_what_cannot_be_run_is_refused(tmp_path, photographs):
    for asked, said in (
        ({"name": "resnet"}, "no experiment 'resnet'"),
        ({"name": "vit", "only": "nothing"}, "No entry of vit matches"),
        ({"name": "vit", "scale": 0.0}, "above 0"),
        ({"name": "vit", "seeds": (1, 1)}, "different numbers"),
        ({"name": "vit", "data": photographs}, "needs a folder"),
        ({"name": "channels", "data": photographs, "out": tmp_path}, "about costs alone"),
        ({"name": "int8-resnet50", "data": photographs, "out": tmp_path, "only": "16-32*112*"}, "run resnet50 there first"),
    ):
        with pytest.raises(DownresError, match=said):
            reproduce(**asked)


def test_command(photographs, tmp_path, cli):
    listing = cli("paper")
    assert listing.code == 0 and all(name in listing.out for name in EXPERIMENTS)
    done = cli("paper", "sequence", "--only", "*tokens", "--table", "--figure", tmp_path / "f.html", "--out", tmp_path / "no")
    assert done.code == 0 and "196 tokens" in done.out and "Figure 5" in done.out and (tmp_path / "f.html").is_file()
    document = json.loads(cli("paper", "sequence", "--only", "196 tokens", "--json").out)
    assert document["lines"][0]["cost"]["macs"] == reproduce("vit", only="ViT-S 224*").lines[0].cost.macs
    refused = cli("paper", "vit", "--seeds", "a")
    assert refused.code == 2 and "Seeds are whole numbers" in refused.err


def test_the_folder_is_a_path_of_any_kind(tmp_path):
    assert reproduce("sequence", out=str(tmp_path), only="196*").folder == Path(tmp_path)
