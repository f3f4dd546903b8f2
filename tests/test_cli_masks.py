"""The command line on masks: every command, its JSON, and one sentence for everything that can be wrong with masks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from downres import load_model, load_run, measure_cost

RECIPE = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--native-resolution", "48x64", "--threads", "1"]


def refused(done, *words):
    """One sentence on standard error, nothing on standard output, exit code 2."""
    assert done.code == 2, done.err
    assert done.out == ""
    last = done.err.strip().splitlines()[-1]
    for word in words:
        assert word in last, done.err
    assert last.endswith(".") or "see downres" in last
    return last


@pytest.fixture(scope="module")
def model(shapes):
    return f"{shapes.__file__}:rough"


def search_command(model, data, out, *more):
    return [
        "search", model, "--data", data, "--out", out, "--resolution", "36", "--stem-scale", "none", "--runtime", "torch",
        "--max-drop", "15", *RECIPE, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(model, scenes, tmp_path_factory, printed):
    """A finished run, made by the command itself; all that it wrote to the standard output was one JSON document."""
    out = tmp_path_factory.mktemp("cli") / "run"
    shown, said = printed(*search_command(model, scenes, out, "--json"))
    document = json.loads(shown)
    assert document["finished"] and document["artifact"] == str(out / "best")
    assert "looking at images" in said
    return out


# --- every command ---


def test_search_goes_on_and_prints_what_it_found(cli, model, scenes, run_folder):
    done = cli(*search_command(model, scenes, run_folder))
    assert done.code == 0, done.err
    for words in (
        "mIoU",
        "36 × 48",
        "48 × 64",
        "★",
        "proven within",
        "stretch",
        "44 in train to fit on and 16 in val",
    ):
        assert words in done.out, done.out
    document = cli(*search_command(model, scenes, run_folder, "--json")).json
    (row,) = document["candidates"]
    assert row["candidate"] == "36x48" and row["rung"] == "batchnorm" and document["best"] == row
    assert row["miou"] == pytest.approx(document["original"]["miou"] - row["drop"]) and row["naive_miou"] < row["miou"]
    assert len(row["iou"]) == 4 and row["n"] == 16 and "top1" not in row and "lost" not in row
    assert document["settings"]["task"]["dense"] == {
        "size": [48, 64], "output": "logits", "interpolation": "bilinear", "align_corners": False, "left_out": None,
        "threshold": None,
    }  # fmt: skip
    assert document["data"]["classes"] == ["ground", "red", "green", "blue"] and document["data"]["absent"] == []


def test_curve(cli, model, scenes, run_folder):
    found = cli("curve", model, "--data", scenes, "--resolution", "36,24x32", *RECIPE, "--json").json
    assert [row["candidate"] for row in found["candidates"]] == ["36x48", "24x32"]
    run = load_run(run_folder)
    assert found["original"]["miou"] == pytest.approx(run.original.quality.miou)
    assert found["candidates"][0]["miou"] == pytest.approx(run.results[0].naive.miou)
    table = cli("curve", model, "--data", scenes, "--resolution", "36", "--upsampling", "bicubic", *RECIPE)
    assert table.code == 0 and "mIoU" in table.out and "36 × 48" in table.out


def test_check(cli, model, scenes, run_folder, tmp_path):
    done = cli("check", run_folder / "best", "--model", model, "--threads", "1")
    assert done.code == 0 and done.out.count("ok") >= 4 and "mIoU" in done.out
    found = cli("check", run_folder / "best", "--data", scenes, "--json").json
    assert found["ok"] and [f["ok"] for f in found["findings"]] == [True, True, None, True, True]
    spoilt = shutil.copytree(run_folder / "best", tmp_path / "best")
    (spoilt / "model.onnx").write_bytes(b"")
    done = cli("check", spoilt)
    assert done.code == 1 and "WRONG" in done.out


def test_predict(cli, scenes, run_folder, tmp_path):
    images = sorted((scenes / "val" / "images").glob("*.png"))[:2]
    found = cli("predict", run_folder / "best", *images, "--out", tmp_path / "masks", "--json").json["predictions"]
    for image, one in zip(images, found, strict=True):
        assert one["image"] == str(image) and one["mask"] == str(tmp_path / "masks" / f"{image.stem}_mask.png")
        assert Image.open(one["mask"]).mode == "P" and Path(one["overlay"]).is_file()
        assert sum(one["shares"]) == pytest.approx(100) and one["classes"][0] == "ground"
    done = cli("predict", run_folder / "best", images[0], "--out", tmp_path / "masks", "--top", "2")
    assert done.code == 0 and "% of the pixels → " in done.out and done.out.count("%") == 2
    refused(cli("predict", run_folder / "best", images[0], images[0], "--out", tmp_path / "m"), "val00", "written twice")
    assert not (tmp_path / "m").exists()


def test_report(cli, run_folder):
    (run_folder / "report.html").unlink()
    done = cli("report", run_folder, "--json").json
    assert Path(done["report"]).stat().st_size > 10_000


def test_cost_includes_the_upsampling(cli):
    """RegSeg at Cityscapes' size: 19 full-size logits are most of what is in memory. Its own upsampling is to its input's."""
    arguments = ["cost", "regseg:exp48_decoder26", "--native-resolution", "1024x2048", "--resolution", "512x1024", "--json"]
    logits = 19 * 1024 * 2048
    original, half = cli(*arguments).json["costs"]
    network = load_model("regseg:exp48_decoder26", pretrained=False).module
    alone = measure_cost(network, (3, 512, 1024))
    assert original["macs"] == measure_cost(network, (3, 1024, 2048)).macs and original["peak_activation_bytes"] > 4 * logits
    assert half["macs"] == alone.macs + 4 * logits and half["params"] == alone.params == original["params"]
    assert half["peak_activation_bytes"] == 4 * (logits + logits // 4) > alone.peak_activation_bytes
    maps = cli(*arguments, "--output", "classes").json["costs"]
    assert maps[1]["macs"] == half["macs"] and maps[1]["peak_activation_bytes"] < half["peak_activation_bytes"] / 2
    small = cli(*arguments, "--label-size", "1024x2048", "--candidate", "256x512", "--upsampling", "bicubic").json["costs"]
    assert small[2]["macs"] == measure_cost(network, (3, 256, 512)).macs + 16 * logits
    assert small[2]["peak_activation_bytes"] == 4 * (logits + logits // 16)


def test_a_regseg_by_name_from_its_weights_to_a_proof(cli, scenes, tmp_path):
    """The network is made again from its name alone, so nothing needs --model."""
    spec = "regseg:exp48_decoder26,width=0.25,depth=0.25"
    torch.manual_seed(0)
    save_file(load_model(f"{spec},num_classes=4", pretrained=False).module.state_dict(), tmp_path / "own.safetensors")
    weights = ["--weights", tmp_path / "own.safetensors", "--data", scenes]
    done = cli(
        "search", spec, *weights, "--out", tmp_path / "run", "--native-resolution", "64x96", "--resolution", "48x64",
        "--stem-scale", "none", "--runtime", "torch", "--max-drop", "90", "--rungs", "none", "--threads", "1", "--json",
    )  # fmt: skip
    assert done.json["artifact"] and "own.safetensors" in done.json["settings"]["weights"]
    found = cli("check", tmp_path / "run" / "best", "--threads", "1", "--json").json
    assert [f["ok"] for f in found["findings"]] == [True] * 5
    other = cli("curve", "regseg:exp48_decoder26,width=0.5,depth=0.25", *weights, "--resolution", "48")
    refused(other, "another RegSeg", "give regseg:exp48_decoder26,width=0.25,depth=0.25")


# --- notes ---


def test_a_class_that_no_proof_image_has_is_noted(cli, model, scenes, shapes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    for file in (data / "val" / "masks").glob("*.png"):
        mask = np.array(Image.open(file))
        mask[mask == 3] = 255
        shapes.save_mask(mask, file)
    done = cli("curve", model, "--data", data, "--resolution", "36", *RECIPE)
    assert done.code == 0 and "no proof image has blue: nothing is known of how well these are found" in done.err
    done = cli(*search_command(model, data, tmp_path / "run", "--max-drop", "0.5"))
    assert done.code == 0 and "no proof image has blue" in done.err
    assert "No proof image has blue" in (tmp_path / "run" / "report.html").read_text()


# --- refused ---


def spoil(kind, data, shapes):
    """One thing wrong with a folder of images and masks."""
    mask = data / "val" / "masks" / "val03.png"
    values = np.array(Image.open(mask))
    if kind == "value":
        values[5, 5] = 9
        shapes.save_mask(values, mask)
    elif kind == "colour":
        picture = np.array(Image.open(mask).convert("RGB"))
        picture[-1], picture[:, :8] = shapes.COLOURS[0], (1, 2, 3)
        Image.fromarray(picture).save(mask)
    elif kind == "rgb":
        (data / "classes.txt").write_text("\n".join(shapes.CLASSES))
        Image.open(mask).convert("RGB").save(mask)
    elif kind == "voc":
        (data / "classes.txt").unlink()
        picture = Image.fromarray(values)
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        picture.convert("RGB").save(mask)
    elif kind == "missing":
        mask.unlink()
    elif kind == "size":
        Image.open(mask).crop((0, 0, 60, 48)).save(mask)
    elif kind == "jpeg":
        Image.fromarray(values).save(mask.with_suffix(".jpg"))
        mask.unlink()
    elif kind == "classes":
        (data / "classes.txt").write_text("a\nb\nc\n")
    elif kind == "ignored":
        for file in (data / "val" / "masks").glob("*.png"):
            shapes.save_mask(np.full_like(values, 255), file)
    elif kind == "broken":
        for file in (data / "val" / "images").glob("*.png"):
            file.write_bytes(b"")


BROKEN = {
    "value": ["val/masks/val03.png", "has the value 9", "0 to 3"],
    "colour": ["val/masks/val03.png", "the colour (1, 2, 3)", "384 pixels"],
    "rgb": ["val/masks/val03.png", "is RGB", "name R G B"],
    "voc": ["val/masks/val03.png", "is RGB", "palette PNG was saved as RGB"],
    "missing": ["1 of 60 images", "have no mask", "val/images/val03.png"],
    "size": ["val/images/val03.png has 48×64 and its mask 48×60"],
    "jpeg": ["is a JPEG"],
    "classes": ["4 outputs and the masks 3 classes"],
    "ignored": ["every pixel is ignored"],
    "broken": [],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_masks(cli, model, scenes, shapes, tmp_path, kind):
    data = shutil.copytree(scenes, tmp_path / "data")
    spoil(kind, data, shapes)
    refused(cli("curve", model, "--data", data, "--resolution", "36", *RECIPE), *BROKEN[kind])


@pytest.mark.parametrize("kind", ["value", "missing", "classes"])
def test_broken_masks_lose_nothing_of_a_run(cli, model, scenes, shapes, run_folder, tmp_path, kind):
    """The same question on spoilt data leaves a finished run as it is; and what was counted before, in a new one."""
    data, out = shutil.copytree(scenes, tmp_path / "data"), shutil.copytree(run_folder, tmp_path / "run")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    spoil(kind, data, shapes)
    refused(cli(*search_command(model, data, out)))
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before
    refused(cli(*search_command(model, data, tmp_path / "new")), *BROKEN[kind])
    assert (tmp_path / "new").exists() == (kind == "value")  # headers are looked at first, pixels after the costs
    if kind == "value":
        assert load_run(tmp_path / "new").original.cost == load_run(run_folder).original.cost


OPTIONS = [
    (["--output", "colours"], ["logits or classes", "'colours'"]),
    (["--upsampling", "nearest"], ["bilinear or bicubic", "'nearest'"]),
    (["--fit", "squeeze"], ["crop, stretch, pad", "'squeeze'"]),
    (["--label-size", "big"], ["'big'"]),
    (["--label-size", "48x64,96x128"], ["--label-size is one size"]),
    (["--label-size", "24x32"], ["24x32 is below the 48x64"]),
    (["--label-size", "0"], ["between 1 and"]),
    (["--classes", "no.txt"], ["no.txt is not there"]),
]


@pytest.mark.parametrize("options, words", OPTIONS, ids=lambda v: "=".join(v) if v and v[0].startswith("--") else "")
def test_options_that_mean_nothing(cli, model, scenes, tmp_path, options, words):
    refused(cli(*search_command(model, scenes, tmp_path / "run", *options)), *words)
    refused(cli("curve", model, "--data", scenes, "--resolution", "36", *RECIPE, *options), *words)
    assert not (tmp_path / "run").exists()
    if options[0] in ("--output", "--upsampling", "--label-size"):
        refused(cli("cost", model, "--native-resolution", "48x64", "--resolution", "36x48", *options), *words)


@pytest.mark.parametrize("content", [b"\x00\xff\xfe", b"", b"sky 1 2 999"], ids=["binary", "empty", "colour"])
def test_a_file_of_classes_that_is_none(cli, model, scenes, tmp_path, content):
    (tmp_path / "c.txt").write_bytes(content)
    refused(cli("curve", model, "--data", scenes, "--classes", tmp_path / "c.txt", "--resolution", "36", *RECIPE), "c.txt")


def test_a_file_of_classes(cli, model, scenes, shapes, tmp_path):
    data = shutil.copytree(scenes, tmp_path / "data")
    names = (data / "classes.txt").rename(tmp_path / "names.txt")
    found = cli("curve", model, "--data", data, "--classes", names, "--resolution", "36", *RECIPE, "--json").json
    assert found["original"]["miou"] == cli("curve", model, "--data", scenes, "--resolution", "36", *RECIPE, "--json").json[
        "original"
    ]["miou"]  # fmt: skip


def test_data_of_another_kind(cli, model, scenes, shapes, tmp_path):
    """Class folders for a segmentation network, masks for a classifier, a head for masks, folds of what is divided."""
    labelled = tmp_path / "labelled"
    for part in ("train", "val"):
        for name in shapes.CLASSES:
            (labelled / part / name).mkdir(parents=True)
            shutil.copy(scenes / "val" / "images" / "val00.png", labelled / part / name)
    refused(cli(*search_command(model, labelled, tmp_path / "run")), "layout of images and masks")
    classifier = f"{shapes.__file__}:classifier"
    refused(cli(*search_command(classifier, scenes, tmp_path / "run")), "segmentation networks", "class folders")
    refused(cli(*search_command(classifier, scenes, tmp_path / "run", "--fit-head")), "segmentation networks", "class folders")
    refused(cli(*search_command(classifier, labelled, tmp_path / "run", "--label-size", "48x64")), "segmentation networks")
    refused(cli(*search_command(model, scenes, tmp_path / "run", "--fit-head")), "--fit-head")
    refused(cli(*search_command(model, scenes, tmp_path / "run", "--folds", "3")), "--folds")
    refused(
        cli(*search_command(model, scenes, tmp_path / "run", "--ragged", "pad", "--no-snap", "--resolution", "35x47")), "whole"
    )
    refused(cli(*search_command(f"{shapes.__file__}:five_classes", scenes, tmp_path / "run")), "5 outputs", "4 classes")
    refused(cli(*search_command(model, tmp_path / "nothing", tmp_path / "run")), "There is no folder")
    refused(cli("cost", classifier, "--label-size", "48x64"), "--label-size")


def test_the_resolution_that_the_user_gives_is_not_that_of_the_labels(cli, shapes, scenes):
    """Which is what an undocumented network is assumed to take, where nothing is said."""
    model, recipe = f"{shapes.__file__}:make", [*RECIPE[:4], "--threads", "1"]
    given = cli("curve", model, "--data", scenes, "--resolution", "36", *recipe, "--native-resolution", "96x128", "--json").json
    assert given["preprocessing"]["resolution"] == [96, 128] and given["original"]["resolution"] == [96, 128]
    found = cli("curve", model, "--data", scenes, "--resolution", "36", *recipe, "--fit", "pad", "--json").json
    assert found["preprocessing"]["resolution"] == [48, 64] and found["preprocessing"]["fit"] == "pad"
    table = cli("curve", model, "--data", scenes, "--resolution", "36", *recipe)
    assert "ImageNet's mean and std; mean, std given; whole pictures, stretched; used at the labels' size)" in table.out
    assert "224 px" not in table.out and "crop ratio" not in table.out
