"""The command line: every command, its JSON, its exit codes, and one clear sentence for everything that can be wrong."""

import contextlib
import gc
import importlib.metadata
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import downres
from downres import load_model, load_run

COMMANDS = ("demo", "search", "switchable", "curve", "cost", "paper", "doctor", "report", "watch", "check", "embed", "predict")
RECIPE = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--native-resolution", "48", "--threads", "1"]
MAIN = [sys.executable, "-m", "downres"]


def refused(done, *words, code=2):
    """One sentence on standard error, nothing on standard output."""
    assert done.code == code, done.err
    assert done.out == ""
    last = done.err.strip().splitlines()[-1]
    for word in words:
        assert word in last, done.err
    assert "Traceback" not in done.err
    return last


@pytest.fixture(scope="module")
def data(cells, tmp_path_factory):
    return cells.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tiny_file):
    return f"{tiny_file}:make"


def search_command(model, data, out):
    return [
        "search", model, "--data", data, "--out", out, "--fit-head", "--resolution", "32", "--stem-scale", "none",
        "--runtime", "torch", "--max-drop", "60", "--rungs", "head", *RECIPE,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(model, data, tmp_path_factory, printed):
    """A finished run, made by the command itself; all that it wrote to the standard output was one JSON document."""
    out = tmp_path_factory.mktemp("cli") / "run"
    shown, said = printed(*search_command(model, data, out), "--json")
    document = json.loads(shown)
    assert document["finished"] and document["artifact"] == str(out / "best")
    assert "looking at images" in said
    return out


# --- every command ---


def test_cost_counts_every_family_and_draws_them(cli, tmp_path):
    page = tmp_path / "families.html"
    done = cli(
        "cost", "timm:vit_tiny_patch16_224", "--resolution", "112", "--patch-size", "28", "--merge", "8", "--stem-scale", "0.5",
        "--depth", "6", "--width", "0.67", "--candidate", "160 merge4", "--picture", page, "--json",
    )  # fmt: skip
    rows = {row["family"]: row for row in done.json["costs"]}
    assert set(rows) == {"original", "resolution", "patch size", "merging", "pooling", "depth", "width", "given"}
    # By hand: N tokens (class token among them), C channels: 12 C² N + 2 N² C a block, 192 C² of patches of 16 px, C·1000.
    c, blocks = 192, 12

    def vit(n, patch=16, grid=14, c=c, blocks=blocks):
        return blocks * (12 * c * c * n + 2 * n * n * c) + grid * grid * 3 * patch * patch * c + 1000 * c

    assert rows["original"]["macs"] == vit(197)
    assert rows["resolution"]["macs"] == vit(50, grid=7)
    assert rows["patch size"]["macs"] == vit(65, 28, 8)
    assert rows["depth"]["macs"] == vit(197, blocks=6)
    assert rows["width"]["macs"] == vit(197, c=128)
    assert page.read_text().lower().startswith("<!doctype html>") and "merge8" in page.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    done = cli(command, "--help")
    assert done.code == 0 and "Usage" in done.out and "--json" in done.out


def test_no_command_shows_them_all(cli):
    for arguments in (["--help"], ["-h"], []):
        done = cli(*arguments)
        assert all(name in done.out for name in COMMANDS) and done.code == (0 if arguments else 2)
        assert not done.err


def test_version(cli):
    done = cli("--version")
    assert done.code == 0 and done.out.strip() == f"downres {importlib.metadata.version('downres')}"


def test_options_stand_under_headings(cli):
    """--max-latency-ms is told under "What is allowed", a technique's own option under "What to try"."""
    shown = cli("search", "--help").out
    heads = [
        shown.index(f" {head} ") for head in ("Task and data", "What is allowed", "What to try", "Model and preprocessing")
    ]
    assert heads == sorted(heads)
    assert heads[1] < shown.index("--max-latency-ms") < heads[2] < shown.index("--stem-scale") < heads[3]


@pytest.mark.parametrize("name", downres.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(downres, name)
    assert isinstance(value, str) or (value.__doc__ and len(value.__doc__) > 20)


def test_the_public_names_stay_what_they_are():
    """`search`, `recover` and `demo` are functions, although modules of these names are imported."""
    code = (
        "import downres, downres.searching.store, downres.tasks.classification.head, downres.searching.demo\n"
        "assert all(callable(getattr(downres, n)) for n in ('search', 'recover', 'demo')); downres.evaluate"
        "\nassert callable(downres.recover)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_search_prints_the_table_the_verdict_and_where_things_are(cli, run_folder, model, data):
    done = cli(*search_command(model, data, run_folder))  # finished: only shown again
    assert done.code == 0
    for words in ("candidate", "MACs", "latency", "drop", "verdict", "48", "32", "Report:", "Model:", "downres check"):
        assert words in done.out, words
    assert "Preprocessing" in done.err + done.out
    latency = load_run(run_folder).original.latency
    assert (
        f"Latency: median, {latency.hardware}; {latency.runtime}, 1 thread, batch of 1 image, {latency.runs} runs." in done.out
    )


def test_search_json_has_the_records_field_names(cli, run_folder, model, data):
    document = cli(*search_command(model, data, run_folder), "--json").json
    row = document["candidates"][0]
    names = {"resolution", "macs", "params", "peak_activation_bytes", "latency_ms", "top1", "n", "drop", "verdict"}
    assert names <= row.keys() and row["resolution"] == 32 and row["n"] == 80
    assert document["settings"]["preprocessing"]["mean"] == [0.5] * 3


def test_report(cli, run_folder):
    (run_folder / "report.html").unlink()
    assert cli("report", run_folder, "--json").json == {"report": str(run_folder / "report.html")}
    assert "report.html" in cli("report", run_folder).out and (run_folder / "report.html").exists()


def test_check(cli, run_folder, model, data):
    done = cli("check", run_folder / "best", "--model", model, "--threads", 1)
    assert done.code == 0 and done.out.count("ok ") == 5
    document = cli("check", run_folder / "best", "--threads", 1, "--json").json
    assert document["ok"] is True and [f["ok"] for f in document["findings"]] == [True, True, None, True, True]


def test_check_of_a_changed_file(cli, run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "best", tmp_path / "best")
    with open(folder / "model.onnx", "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    done = cli("check", folder)
    assert done.code == 1 and "WRONG" in done.out and "model.onnx" in done.out
    done = cli("check", folder, "--json")
    assert done.code == 1 and json.loads(done.out)["ok"] is False
    refused(cli("predict", folder, next((run_folder / "best").iterdir())), "changed: model.onnx")


def test_check_where_the_images_are_gone(cli, model, cells, tmp_path):
    here = cells.write(tmp_path / "here")
    assert cli(*search_command(model, here, tmp_path / "run"), "--json").json["finished"]
    here.rename(tmp_path / "there")
    done = cli("check", tmp_path / "run" / "best", "--model", model)
    assert done.code == 0 and "not checked" in done.out and "not at" in done.out
    assert "ok quality" in cli("check", tmp_path / "run" / "best", "--data", tmp_path / "there").out


def test_predict(cli, run_folder, data):
    pictures = sorted((data / "val" / "intact").iterdir())[:2]
    done = cli("predict", run_folder / "best", *pictures)
    assert done.code == 0 and done.out.count("%") == 4 and "intact" in done.out
    document = cli("predict", run_folder / "best", *pictures, "--top", 1, "--json").json
    assert [len(p["classes"]) for p in document["predictions"]] == [1, 1]


def test_curve(cli, model, data):
    done = cli("curve", model, "--data", data, "--resolution", "16,32", *RECIPE)
    assert done.code == 0 and "80 in val" in done.out
    document = cli("curve", model, "--data", data, "--resolution", "16,32", *RECIPE, "--json").json
    assert [c["resolution"] for c in document["candidates"]] == [16, 32] and document["original"]["resolution"] == 48


def test_cost_needs_no_data(cli, model):
    document = cli("cost", model, "--resolution", "32:64:32", "--native-resolution", "64", "--json").json
    assert [c["resolution"] for c in document["costs"]] == [64, 32]
    assert document["costs"][0]["macs"] == pytest.approx(4 * document["costs"][1]["macs"], rel=0.01)
    done = cli("cost", model, "--resolution", "32", "--native-resolution", "64", "--batch-size", "2")
    assert done.code == 0 and "For 2 images" in done.out and "Not counted" in done.out


def test_cost_of_library_models(cli):
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        document = cli("cost", spec, "--resolution", "224", "--json").json
        assert document["costs"][0]["macs"] == pytest.approx(1.81e9, rel=0.02)


def test_weights_from_a_file(cli, model, data, tiny_file, tmp_path):
    module = load_model(model).module
    save_file({f"module.{k}": v.clone() for k, v in module.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "w.pth")
    tops = {
        cli("curve", model, "--data", data, "--resolution", "32", *RECIPE, *weights, "--json").json["original"]["top1"]
        for weights in ([], ["--weights", tmp_path / "w.safetensors"], ["--weights", tmp_path / "w.pth"])
    }
    assert len(tops) == 1


def test_real_pictures_of_cats_and_dogs(cli, model, shared_data, tmp_path):
    """A plain module of the user's on photographs of mixed sizes."""
    data = tmp_path / "few"
    for file in sorted((shared_data / "catdog").glob("*/*/*"))[::12]:
        target = data / file.relative_to(shared_data / "catdog")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    done = cli(*search_command(model, data, tmp_path / "run"), "--json")
    assert done.json["finished"] and done.json["candidates"][0]["status"] == "measured"


# --- bad input ---


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("0", ["0"]), ("-5", ["-5"]), ("2", ["stride"]), ("1000000", ["1000000"]), ("abc", ["'abc'", "96:256:32"]),
        ("", ["resolution"]), ("96:", ["96:"]), ("32x", ["32x"]), ("32:64:0", ["step"]),
    ],
)  # fmt: skip
def test_impossible_resolutions(cli, model, data, spec, words):
    refused(cli("curve", model, "--data", data, "--resolution", spec, *RECIPE), *words)


def test_seven_pixels_on_a_real_network(cli, data):
    refused(cli("curve", "timm:resnet18", "--data", data, "--resolution", "7", "--weights", "none.pth"), "none.pth")


def test_seven_pixels_are_below_the_stride(cli, tmp_path, data):
    (tmp_path / "deep.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    convs = [nn.Conv2d(3, 3, 3, 2, 1) for _ in range(4)]\n"
        "    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))\n"
    )
    refused(cli("curve", f"{tmp_path}/deep.py:make", "--data", data, "--resolution", "7", *RECIPE), "below", "stride of 16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "timm:resnet18", "--dta", "x"], ["There is no option --dta, did you mean --data?"]),
        (["serach"], ["serach"]),
        (["search"], ["--help"]),
        (["search", "timm:resnet18", "--device", "x"], ["There is no option --device: see", "downres search --help."]),
        (["cost", "timm:resnet-18"], ["resnet"]),
        (["cost", "timm:resnett18"], ["did you mean", "resnet18"]),
        (["cost", "torchvision:resnet5O"], ["did you mean", "resnet50"]),
        (["cost", "resnet18"], ["timm:"]),
        (["cost", "nowhere.py:make"], ["nowhere.py"]),
        (["search", "timm:resnet18", "--data", "x", "--max-macs", "many"], ["--max-macs", "500M"]),
        (["search", "timm:resnet18", "--data", "x", "--max-drop", "x"], ["max-drop"]),
        (["search", "timm:resnet18", "--data", "x", "--mean", "a,b"], ["--mean"]),
        (["search", "timm:resnet18", "--data", "x", "--stem-scale", "half"], ["--stem-scale"]),
        (["search", "timm:resnet18", "--data", "x", "--patch-size", "big"], ["--patch-size", "20,24"]),
        (["search", "timm:resnet18", "--data", "x", "--merge", "many"], ["'many'", "8-decreasing", "50%"]),
        (["search", "timm:resnet18", "--data", "x", "--merge", "0"], ["at least 1"]),
        (["search", "timm:resnet18", "--data", "x", "--candidate", "224 merge"], ["'merge'"]),
        (["cost", "timm:resnet18", "--merge", "8"], ["Merging tokens needs a vision transformer", "ResNet"]),
        (["cost", "timm:resnet18", "--patch-size", "8"], ["Another patch size needs a vision transformer"]),
        (["cost", "timm:vit_tiny_patch16_224", "--patch-size", "300"], ["larger than the image of 224 px"]),
        (["cost", "timm:vit_tiny_patch16_224", "--merge", "17"], ["204 tokens out of 196", "at most 16 a block"]),
        (["cost", "timm:vit_tiny_patch16_224", "--resolution", "100"], ["100 px is not a multiple of 16", "pad"]),
        (["cost", "timm:maxvit_tiny_rw_224", "--resolution", "200"], ["200 px is not a multiple of 32"]),
        (["cost", "timm:swin_tiny_patch4_window7_224", "--merge", "8"], ["neither merged nor pooled", "windows"]),
        (["report", "/nonexistent"], ["not a run"]),
        (["check", "/nonexistent"], ["not a shipped model"]),
        (["predict", "/nonexistent", "x.jpg"], ["not a shipped model"]),
    ],
)
def test_mistyped_commands(cli, arguments, words):
    refused(cli(*arguments), *words)


def test_a_mistyped_command_suggests_the_nearest(cli):
    assert "search" in refused(cli("serach"), "serach").replace("serach", "")


def test_no_such_function_in_the_users_file(cli, tiny_file):
    refused(cli("cost", f"{tiny_file}:mak"), "mak")


def test_a_folder_that_is_missing_or_empty(cli, model, tmp_path):
    refused(cli("curve", model, "--data", tmp_path / "no", "--resolution", "32", *RECIPE), "There is no folder")
    refused(cli("curve", model, "--data", tmp_path, "--resolution", "32", *RECIPE), "holds no class folders")
    for command in ("curve", "search"):  # before the weights of the model, which may have to be fetched
        refused(cli(command, "timm:no_such_network", "--data", tmp_path / "no"), "There is no folder")
    with pytest.raises(downres.DownresError, match="There is no folder"):
        downres.search("timm:no_such_network", tmp_path / "no", max_drop=1)


def test_a_class_without_images(cli, model, cells, tmp_path):
    data = cells.write(tmp_path / "d")
    shutil.rmtree(data / "val" / "intact")
    (data / "val" / "intact").mkdir()
    refused(cli("curve", model, "--data", data, "--resolution", "32", *RECIPE), "intact", "holds no images")


def test_class_folders_that_do_not_match_the_weights(cli, model, cells, tmp_path):
    data = cells.write(tmp_path / "d")
    for part in ("train", "val"):
        shutil.copytree(data / part / "intact", data / part / "third")
    words = ("2 outputs", "3 class folders", "--fit-head")
    command = ["--data", data, "--resolution", "32", *RECIPE]
    refused(cli("search", model, *command, "--out", tmp_path / "r", "--runtime", "torch"), *words)
    refused(cli("curve", model, *command), *words[:2])


def spoil(folder):
    """Every kind of odd picture that users have, in one class folder: (to be skipped, to be used)."""
    good = Image.open(next(p for p in sorted(folder.iterdir()) if p.suffix == ".png")).convert("RGB").resize((64, 48))
    good.save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "broken.jpg").write_bytes(content[:2] + bytes(100) + content[2:])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is not a picture")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    good.convert("L").save(folder / "grey.jpg")
    good.convert("CMYK").save(folder / "cmyk.jpg")
    good.convert("RGBA").save(folder / "rgba.png")
    Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(folder / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    return (
        {"truncated.jpg", "broken.jpg", "zero.jpg", "text.jpg", "huge.png"},
        {"whole.jpg", "grey.jpg", "cmyk.jpg", "rgba.png", "deep.png", "rotated.jpg", "one.png"},
    )


def test_odd_pictures_are_used_or_listed_and_the_search_works(cli, model, cells, tmp_path):
    data = cells.write(tmp_path / "d")
    skipped, used = spoil(data / "val" / "intact")
    done = cli(*search_command(model, data, tmp_path / "run"), "--json")
    document = done.json
    assert document["finished"] and document["original"]["n"] == 80 + len(used)
    listed = document["data"]["skipped"]
    assert {Path(s["path"]).name for s in listed} == skipped and all(s["reason"] for s in listed)
    shown = cli(*search_command(model, data, tmp_path / "run"))
    assert all(name in shown.err for name in skipped)
    for i in range(8):
        (data / "val" / "intact" / f"more{i}.jpg").write_bytes(b"")
    many = cli(*search_command(model, data, tmp_path / "many"))
    assert many.code == 0 and "13 images skipped" in many.err
    curve = cli("curve", model, "--data", data, "--resolution", "32", *RECIPE)
    assert curve.code == 0 and "13 images skipped" in curve.err + curve.out
    for name in used:
        assert cli("predict", tmp_path / "run" / "best", data / "val" / "intact" / name).code == 0
    for name in skipped:
        refused(cli("predict", tmp_path / "run" / "best", data / "val" / "intact" / name), name)


def test_a_model_that_returns_nan(cli, tiny_file, data, tmp_path):
    command = ["--data", data, "--resolution", "32", *RECIPE]
    refused(cli("curve", f"{tiny_file}:nan", *command), "NaN")
    refused(cli("search", f"{tiny_file}:nan", *command, "--runtime", "torch", "--out", tmp_path / "r"), "NaN")


def test_a_checkpoint_that_tries_to_run_code(cli, model, data, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"state_dict": Evil()}, tmp_path / "torch.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("torch.pth", "bare.pth"):
        refused(cli("cost", model, "--weights", tmp_path / name), "refused", "code")
    assert not (tmp_path / "owned").exists()


def test_a_broken_checkpoint(cli, model, tmp_path):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        refused(cli("cost", model, "--weights", tmp_path / name), name)
    refused(cli("cost", model, "--weights", tmp_path / "missing.pth"), "There is no weights file")


def test_the_out_folder_must_be_a_run_or_new(cli, model, data, run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    refused(cli(*search_command(model, data, tmp_path / "file")), "is a file")
    refused(cli(*search_command(model, data, tmp_path / "mine")), "holds other files")
    refused(cli(*search_command(model, data, run_folder), "--seed", "4"), "another", "--out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(cli, model, data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(cli(*search_command(model, data, tmp_path / "locked" / "run")), "Cannot use")


# --- a full disk, Ctrl-C ---


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("only root with the right to mount can make a small disk")
    try:
        yield folder
    finally:
        gc.collect()  # files that are mapped until then keep it busy
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [0, 24, 48, 64, 128])
def test_a_full_disk_on_a_small_one(cli, model, data, tmp_path, size):
    """At every point where it can get full: one sentence; with more room the same command ends well."""
    with small_disk(tmp_path / "disk", "4k") as disk:
        command = search_command(model, data, disk / "run")
        subprocess.run(["mount", "-o", f"remount,size={size + 4}k", str(disk)], check=True)
        done = cli(*command)
        if done.code:
            assert "full" in refused(done)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert cli(*command, "--json").json["finished"]


@pytest.mark.parametrize("kilobytes", [4, 20])
def test_files_that_may_not_grow(cli, model, data, tmp_path, monkeypatch, kilobytes):
    """A limit on file sizes stands for a disk that gets full at different points, also where nobody may mount."""
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export))  # so that it is made, and not copied (exports.py)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
    try:
        done = cli(*search_command(model, data, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(done)


@pytest.mark.parametrize("where", ["savez", "fsync", "replace"])
def test_a_full_disk_loses_nothing(cli, model, data, tmp_path, monkeypatch, where):
    home = {"savez": np, "fsync": os, "replace": Path}[where]
    calls = 0
    original = getattr(home, where)

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    command = search_command(model, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(home, where, full)
        refused(cli(*command), "The disk is full")
    kept = (tmp_path / "run" / "measurements.jsonl").read_text()
    assert cli(*command, "--json").json["finished"]
    assert (tmp_path / "run" / "measurements.jsonl").read_text().startswith(kept)


def test_ctrl_c_in_a_process_and_on_again(cli, started, model, data, tmp_path):
    out = tmp_path / "run"
    arguments = [*search_command(model, data, out), "--rungs", "crop,head"]
    arguments[arguments.index("32")] = "40,32,24,16"
    log = out / "measurements.jsonl"
    process = started([*MAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and '"quality/' in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    refused(SimpleNamespace(code=process.returncode, out=printed, err=said), "Interrupted", "goes on", code=130)
    kept = log.read_text()
    assert not load_run(out).finished
    assert "unfinished" in cli("report", out).err + (out / "report.html").read_text()
    document = cli(*arguments, "--json").json
    assert document["finished"] and all(c["status"] == "measured" for c in document["candidates"])
    assert log.read_text().startswith(kept)


def test_ctrl_c_before_anything_was_measured(cli, model, data, tmp_path, monkeypatch):
    from downres.images import images

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "decode", interrupt)
    refused(cli(*search_command(model, data, tmp_path / "run")), "Interrupted", code=130)


# --- numbers that cannot be ---


@pytest.mark.parametrize(
    "options",
    [
        ["--max-latency-ms", "nan"], ["--max-latency-ms", "inf"], ["--max-latency-ms", "-1"], ["--max-latency-ms", "0"],
        ["--max-drop", "nan"], ["--max-drop", "inf"], ["--confidence", "nan"], ["--std", "inf,inf,inf"], ["--std", "nan,1,1"],
        ["--std", "1e-300,1,1"], ["--std", "1e300,1,1"], ["--mean", "nan,0,0"], ["--mean", "1e300,0,0"],
        ["--crop-ratio", "0.001"], ["--crop-ratio", "1e-320"], ["--crop-ratio", "nan"], ["--seed", "-1"],
        ["--seed", "99999999999999999999"], ["--threads", "10000000000"], ["--threads", "0"], ["--threads", "-3"],
        ["--val-fraction", "nan"], ["--val-fraction", "-0.5"], ["--val-fraction", "2"], ["--folds", "1"], ["--folds", "-2"],
        ["--folds", "100000000000"], ["--cache-gb", "nan"], ["--cache-gb", "-1"], ["--cache-gb", "inf"],
        ["--resolution", "1e9"], ["--resolution", "9" * 5000], ["--stem-scale", "nan"], ["--max-macs", "nan"],
        ["--max-macs", "1e999"], ["--candidate", "patch" + "9" * 5000], ["--data", "~nouser123/x"],
    ],
    ids=lambda options: " ".join(options)[:40],
)  # fmt: skip
def test_numbers_out_of_range_are_said_at_once(cli, model, data, tmp_path, options):
    """Nothing is opened for them, no folder made."""
    start = time.monotonic()
    recipe = [] if options[0] in ("--mean", "--std", "--threads") else RECIPE
    refused(cli("search", model, "--data", data, "--out", tmp_path / "r", "--resolution", "32", *recipe, *options))
    assert not (tmp_path / "r").exists() and time.monotonic() - start < 20


@pytest.mark.parametrize("options", ["num_classes=1000000000", "width=1e30", "width=nan"])
def test_networks_of_absurd_size_are_said_at_once(cli, options):
    refused(cli("cost", f"regseg:exp48_decoder26,{options}"), "up to")
    with pytest.raises(downres.DownresError, match="from 1 to 1000000 classes"):
        load_model("torchvision:resnet18", pretrained=False, num_classes=10**9)


def test_a_curve_looks_at_the_same_images_however_it_is_asked_for(cli, model, cells, tmp_path):
    """Of an undivided folder all of them, and its first line says so; half only for who asks for it."""
    whole = cells.write(tmp_path / "whole", parts=("",))
    n = len(cells.labels)
    command = ["curve", model, "--data", whole, "--resolution", "16", *RECIPE]
    document = cli(*command, "--json").json
    assert document["original"]["n"] == n == document["candidates"][0]["n"]
    loaded = downres.with_preprocessing(load_model(model), resolution=48, mean=(0.5,) * 3, std=(0.25,) * 3)
    found = downres.curve(loaded, whole, [16], threads=1)
    measuring = downres.Measuring(threads=1, runtime="torch")
    again = downres.curve(loaded, whole, [16], measuring=measuring)
    alone = downres.evaluate(loaded, whole, resolution=16, measuring=measuring)
    assert found.original.quality.n == n and found.results[0].quality == again.results[0].quality == alone
    assert document["candidates"][0]["top1"] == pytest.approx(alone.top1)
    first = cli(*command).out.splitlines()[0]
    assert f"{n} images" in first and "all to test on" in first
    half = cli(*command, "--val-fraction", "0.5").out.splitlines()[0]
    assert cli(*command, "--val-fraction", "0.5", "--json").json["original"]["n"] == n // 2
    assert f"{n // 2} images" in half and f"split of {n}" in half


def test_python_m_is_the_command_line():
    ran = subprocess.run([sys.executable, "-m", "downres", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"downres {importlib.metadata.version('downres')}\n"
