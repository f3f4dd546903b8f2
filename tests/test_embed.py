"""Preprocessing inside the graph: the pixels, sizes and answers that the model was measured with, whatever the picture."""

import hashlib
import itertools
import json
import math
import shutil
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from downres import check, embed
from downres.artifacts import Embedded, read_manifest
from downres.artifacts.embed import _centre, _Nodes, _shown, front, refuse_channels
from downres.artifacts.manifest import PICTURE, changed_files, write_manifest
from downres.artifacts.proof import INSIDE
from downres.engines.engine import Batches, Quantization, engine_of
from downres.engines.onnxruntime import OnnxRuntime
from downres.errors import DownresError
from downres.images import decode, preprocess
from downres.images.decode import MAX_PIXELS
from downres.images.preprocess import _needed_part, cover_of, covering_size, shown_size
from downres.record import sha256
from downres.records import FITS, Preprocessing

HERE = sys.modules[embed.__module__]  # its name in the package is the function's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WAYS = [*itertools.product(FITS, ("bilinear", "bicubic"), (True, False))]


def way(fit, how, antialias, channels=3, scale=1 / 255, **given):
    many = 1 if scale != 1 else 255
    mean, std = (tuple(many * v for v in values[:channels]) for values in (MEAN, STD))
    return Preprocessing((32, 47), 0.875, how, mean, std, fit=fit, antialias=antialias, scale=scale, **given)


@pytest.fixture(scope="module")
def pictures():
    """Odd sizes, both ways up: noise, and smooth; smaller than the input, larger, a sliver, one pixel, grey."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((97, 131), (7, 5), (33, 47), (2, 300), (1, 1), (64, 40))]
    low = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    smooth = [np.asarray(low.resize(size, Image.Resampling.BICUBIC)) for size in ((333, 501), (640, 360))]
    return [*noise, *smooth, np.repeat(smooth[1][:90, :61, :1], 3, 2)]


def levels_apart(run, picture, p):
    """Of 255, in each value of the network's input."""
    (ours,) = run(picture[None])
    apart = np.abs(ours[0].astype(float) - preprocess(picture, p).numpy())
    return apart * np.array(p.std)[:, None, None] / p.scale


def in_onnxruntime(p):
    made = front(p)
    onnx.checker.check_model(made, full_check=True)
    return OnnxRuntime(made.SerializeToString(), 1)


@pytest.mark.parametrize(("fit", "how", "antialias"), WAYS)
def test_pixels_are_within_a_level_or_two_of_those_measured_with(pictures, fit, how, antialias):
    p = way(fit, how, antialias)
    run = in_onnxruntime(p)
    apart = [levels_apart(run, picture, p) for picture in pictures]
    most = 1.01 if how == "bilinear" else 2.01  # where tiny pictures grow
    assert max(one.max() for one in apart) < most and max(one.mean() for one in apart) < 0.04
    assert [shape for _, shape in run.inputs] == [[1, "height", "width", 3]]


@pytest.mark.parametrize("fit", FITS)
def test_other_orders_scales_and_grey_networks(pictures, fit):
    for p in (way(fit, "bilinear", True, channel_order="bgr", scale=1), way(fit, "bicubic", True, channels=1)):
        run = in_onnxruntime(p)
        assert max(levels_apart(run, picture, p).max() for picture in pictures) < 2.01


def test_real_photographs(shared_data):
    files = sorted(shared_data.glob("camvid/**/*.png"))[:1] + sorted(shared_data.glob("catdog/**/*.jpg"))[:12:3]
    assert files
    p = Preprocessing((96, 96), 0.875, "bilinear", MEAN, STD)
    run = in_onnxruntime(p)
    apart = [levels_apart(run, decode(file), p) for file in files]
    assert max(one.max() for one in apart) < 1.01 and np.mean([one.mean() for one in apart]) < 0.02


@pytest.mark.parametrize(("fit", "how", "antialias"), [("crop", "bilinear", True), ("stretch", "bicubic", True), WAYS[-1]])
def test_openvino_makes_the_same_pixels(pictures, fit, how, antialias):
    ov = pytest.importorskip("openvino")
    p = way(fit, how, antialias)
    model = ov.Core().read_model(front(p).SerializeToString())
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    assert max(levels_apart(lambda x: (compiled(x)[0],), picture, p).max() for picture in pictures[:4]) < 2.01


def computed(p, heights, widths):
    """The whole numbers of the graph for many sizes at once, (n, numbers)."""
    g = _Nodes()
    found = [n for pair in _centre(g, ["h", "w"], p) for n in pair] if p.fit == "crop" else _shown(g, ["h", "w"], p)
    taken = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in "hw"]
    given = [helper.make_tensor_value_info(g.Identity(name), TensorProto.INT64, ["n"]) for name in found]
    graph = helper.make_graph(g.nodes, "sizes", taken, given, g.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = OnnxRuntime(model.SerializeToString(), 1)._session
    return np.stack(session.run(None, {"h": heights, "w": widths}), 1)


def centre(height, width, p):
    """The same as `resize_and_crop` has them."""
    wide = cover_of(p)[::-1]
    keep, size = (width, height), covering_size((width, height), wide)
    if math.prod(size) > MAX_PIXELS:
        keep = _needed_part(keep, wide)
        size = covering_size(keep, wide)
    start = [round((have - want) / 2) for have, want in zip((height, width), keep[::-1], strict=True)]
    first = [round((have - want) / 2) for have, want in zip(size[::-1], p.hw, strict=True)]
    return [*keep[::-1], *start, *size[::-1], *first]


@pytest.mark.parametrize(("hw", "ratio"), [((224, 224), 0.875), ((50, 300), 0.9)])
def test_sizes_and_offsets_of_thousands_of_pictures(hw, ratio):
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 4000, (2, 4000))
    heights, widths = (
        np.concatenate(both) for both in ((heights, rng.integers(1, 9, 99)), (widths, rng.integers(3000, 60000, 99)))
    )
    for fit, wanted in (("crop", centre), ("pad", lambda h, w, p: shown_size((h, w), p))):
        p = Preprocessing(hw, ratio, fit=fit)
        expected = [wanted(h, w, p) for h, w in zip(heights.tolist(), widths.tolist(), strict=True)]
        assert np.array_equal(computed(p, heights, widths), expected), fit


# --- beside a shipped model ---


@pytest.fixture(scope="module")
def embedded(shipped, tmp_path_factory):
    """(a copy of the tiny artifact with its preprocessing inside, what was said of it)"""
    folder = shutil.copytree(shipped[0], tmp_path_factory.mktemp("embedded") / "best")
    return folder, embed(folder, data=shipped[1], threads=1)


@pytest.fixture
def folder(embedded, tmp_path):
    """A copy of that, to be spoilt."""
    return shutil.copytree(embedded[0], tmp_path / "best")


def test_it_answers_as_the_model_and_the_manifest_says_how_nearly(shipped, embedded):
    (_, dataset, _), (folder, said) = shipped, embedded
    manifest = read_manifest(folder)
    assert Embedded.from_json(manifest["embedded"]) == said and changed_files(folder, manifest) == []
    assert said.file == "model_uint8.onnx" and said.input.shape == (1, "height", "width", 3) and said.input.dtype == "uint8"
    assert 0 <= said.mean_level <= said.largest_level <= 1.01 and said.other_answers == 0 and said.images == 32
    p = Preprocessing.from_json(manifest["preprocessing"])
    whole, model = OnnxRuntime(folder / said.file, 1), OnnxRuntime(folder / "model.onnx", 1)
    assert [name for name, _ in whole.inputs] == [PICTURE] and whole.outputs == model.outputs
    apart = norm = 0.0
    for i in range(0, len(dataset.images), 9):
        picture = dataset.images[i]
        picture = np.repeat(picture.reshape(*picture.shape[:2], -1), 3 if picture.ndim == 2 else 1, 2)
        ours, theirs = whole(picture[None])[0], model(preprocess(picture, p)[None].numpy())[0]
        apart, norm = apart + np.square(ours - theirs).sum(), norm + np.square(theirs).sum()
        assert ours.shape == theirs.shape and ours.argmax() == theirs.argmax()
    assert math.sqrt(apart / norm) < 0.01 and said.distance < 0.01


def test_check_looks_at_it(shipped, embedded):
    _, dataset, model = shipped
    findings = {f.what: f for f in check(embedded[0], model=model, data=dataset, threads=1)}
    assert all(f.ok for f in findings.values()) and "of 255 levels" in findings[INSIDE].detail
    assert INSIDE not in {f.what for f in check(shipped[0], threads=1)}
    unseen = {f.what: f for f in check(embedded[0], threads=1)}
    assert unseen[INSIDE].ok is None and unseen[INSIDE].detail


def signed_again(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {name: sha256(folder / name) for name in manifest["sha256"] if name != "manifest.json"}
    write_manifest(folder, manifest)


def test_another_file_is_noticed(shipped, folder):
    _, dataset, model = shipped
    file = folder / "model_uint8.onnx"
    graph = onnx.load(file)
    mean = next(n for n in graph.graph.node if n.output[0] == "preprocessing/input").input[0]
    mean = next(n for n in graph.graph.node if n.output[0] == mean).input[1]
    target = next(one for one in graph.graph.initializer if one.name == mean)
    target.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(target) + np.float32(0.02), mean))
    file.write_bytes(graph.SerializeToString())
    assert [f.detail for f in check(folder, data=dataset)] == ["changed: model_uint8.onnx"]
    signed_again(folder)
    found = {f.what: f for f in check(folder, model=model, data=dataset, threads=1)}
    assert found["files"].ok and found[INSIDE].ok is False and "stated: " in found[INSIDE].detail
    file.unlink()
    assert changed_files(folder, read_manifest(folder)) == ["model_uint8.onnx (missing)"]


def test_a_manifest_that_names_another_file_is_broken(folder):
    manifest = read_manifest(folder)
    for name in ("../model_uint8.onnx", "model.onnx"):
        manifest["embedded"]["file"] = name
        write_manifest(folder, manifest)
        with pytest.raises(DownresError, match="broken"):
            read_manifest(folder)


def test_what_cannot_be_embedded_is_refused_in_a_sentence(shipped, tmp_path, monkeypatch):
    with pytest.raises(DownresError, match="4 channels"):
        refuse_channels(Preprocessing(32, mean=(0.5,) * 4, std=(0.5,) * 4))
    with pytest.raises(DownresError, match="images are not at|give them as data"):
        embed(shipped[0])
    folder = shutil.copytree(shipped[0], tmp_path / "best")
    monkeypatch.setattr(HERE, "takes_numbers", lambda *_: True)
    with pytest.raises(DownresError, match="numbers of TIFF"):
        embed(folder, data=shipped[1])
    assert {f.name for f in folder.iterdir()} == {f.name for f in shipped[0].iterdir()}


def test_pixels_that_are_too_far_off_are_not_shipped(shipped, tmp_path, monkeypatch):
    folder = shutil.copytree(shipped[0], tmp_path / "best")
    monkeypatch.setattr(HERE, "front", lambda p: front(Preprocessing.from_json({**p.to_json(), "mean": [0.6] * 3})))
    with pytest.raises(DownresError, match=r"up to 25\.5 of 255 levels off"):
        embed(folder, data=shipped[1])
    assert changed_files(folder, read_manifest(folder)) == [] and "embedded" not in read_manifest(folder)


def test_openvino_and_8_bits_get_it_in_front_unchanged(shipped, embedded, tmp_path):
    """Through the engine's own files, an 8-bit ONNX file and an OpenVINO one."""
    pytest.importorskip("openvino")
    _, dataset, _ = shipped
    p = Preprocessing.from_json(read_manifest(embedded[0])["preprocessing"])
    seen = [preprocess(dataset.images[i], p).numpy()[None] for i in range(16)]
    pictures = [
        np.repeat(np.atleast_3d(dataset.images[i]), 3 // np.atleast_3d(dataset.images[i]).shape[2], 2)[None] for i in range(4)
    ]
    for name, int8 in (("onnxruntime", True), ("openvino", False)):
        engine = engine_of(name)
        file, path = ((tmp_path / f"{name}{stem}").with_suffix(engine.file[5:]) for stem in ("", "_uint8"))
        if int8:
            engine.quantize(embedded[0] / "model.onnx", file, Batches.of(seen), Quantization(), None)
        else:
            engine.write(embedded[0] / "model.onnx", file, "fp32")
        engine.put_in_front(front(p), file, path)
        model, whole = engine.load(file, 1), engine.load(path, 1)
        if int8:
            assert engine.layers(path) == engine.layers(file) and engine.layers(path).quantized
        for picture, x in zip(pictures, seen, strict=False):
            theirs = model(x)[0]
            assert np.abs(whole(picture)[0] - theirs).max() < 0.02 * np.abs(theirs).max()


def test_the_commands(cli, embedded, cells, tiny_file, tmp_path):
    root = cells.write(tmp_path / "data")
    out = tmp_path / "run"
    options = ["--resolution", 32, "--stem-scale", "none", "--fit-head", "--max-drop", 60, "--threads", 1]
    options += ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--native-resolution", 48, "--runtime", "torch"]
    done = cli("search", f"{tiny_file}:make", "--data", root, "--out", out, *options, "--embed-preprocessing")
    assert done.code == 0 and "model_uint8.onnx has its preprocessing inside: pixels at most" in done.out
    before = hashlib.sha256((out / "best" / "manifest.json").read_bytes())
    said = cli("embed", out / "best", "--json").json
    assert said == read_manifest(out / "best")["embedded"] and said["file"] == "model_uint8.onnx"
    assert hashlib.sha256((out / "best" / "manifest.json").read_bytes()).digest() == before.digest()
    assert "of 255 levels" in cli("embed", out / "best").out
