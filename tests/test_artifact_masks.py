"""What is shipped for masks: logits or class maps in ONNX, proven, and predicted with from the artifact alone."""

import hashlib
import json
import shutil
import warnings

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from downres import check, predict, search
from downres.artifacts import read_manifest
from downres.engines.onnxruntime import OnnxRuntime
from downres.errors import DownresError
from downres.records import Dense, Preprocessing
from downres.tasks.segmentation.bank import classes_at
from downres.tasks.segmentation.masks import open_masks

OPTIONS = {"max_drop": 15.0, "resolutions": [(36, 48)], "stem_scales": (), "runtime": "torch", "threads": 1}
ALL = {
    "files": True, "preprocessing = PIL": True, "torch = onnxruntime": True, "quality": True, "serve.py = predict": True,
}  # fmt: skip


def ship(model, data, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        run = search(model, data, out=out, **{**OPTIONS, **options})
    assert run.artifact is not None
    return run


@pytest.fixture(scope="module")
def run(segmenter, scenes, tmp_path_factory):
    return ship(segmenter("rough"), scenes, tmp_path_factory.mktemp("logits") / "run")


@pytest.fixture(scope="module")
def maps(segmenter, scenes, tmp_path_factory):
    return ship(segmenter("rough"), scenes, tmp_path_factory.mktemp("classes") / "run", output="classes", rungs=("batchnorm",))


@pytest.fixture(scope="module")
def padded(segmenter, shapes, tmp_path_factory):
    """Of pictures of several sizes, padded and cross-fitted, with a network that needs its statistics anew."""
    root = shapes.write(tmp_path_factory.mktemp("mixed") / "data", train=0, val=60, sizes=((48, 64), (45, 64)))
    out = tmp_path_factory.mktemp("padded") / "run"
    return ship(segmenter("rough", fit="pad"), root, out, folds=3), root


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the artifact, to be spoilt."""
    return shutil.copytree(run.artifact, tmp_path / "best")


def found(findings):
    return {f.what: f.ok for f in findings}


def rewritten(folder, change):
    """The manifest changed by someone who knows how to make it look untouched, its digests included."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    for name in manifest["sha256"]:
        manifest["sha256"][name] = "" if name == "manifest.json" else hashlib.sha256((folder / name).read_bytes()).hexdigest()
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    manifest["sha256"]["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


# --- what is in it ---


def test_what_the_manifest_says(run, maps, shapes, segmenter):
    manifest = read_manifest(run.artifact)
    assert manifest["format"] == 3 and manifest["candidate"]["resolution"] == [36, 48]
    assert manifest["input"] == {"name": "input", "shape": ["batch", 3, 36, 48], "dtype": "float32", "layout": "NCHW"}
    output, classes = manifest["output"], read_manifest(maps.artifact)["output"]
    assert (output["name"], output["shape"], output["dtype"]) == ("logits", ["batch", 4, 48, 64], "float32")
    assert (classes["name"], classes["shape"], classes["dtype"]) == ("classes", ["batch", 48, 64], "uint8")
    assert output["upsampling"] == "bilinear" and output["align_corners"] is False and output["threshold"] is None
    assert Dense.from_json(manifest["task"]["dense"]) == Dense((48, 64))
    assert Dense.from_json(read_manifest(maps.artifact)["task"]["dense"]) == Dense((48, 64), "classes")
    p = Preprocessing.from_json(manifest["preprocessing"])
    assert (p.hw, p.fit) == ((36, 48), "stretch")
    assert manifest["classes"] == list(shapes.CLASSES) and manifest["colours"] == [list(c) for c in shapes.COLOURS]
    assert manifest["result"] == run.best.to_json() and manifest["original"] == run.original.to_json()
    assert {"miou", "iou", "boundary_miou", "n"} <= manifest["result"]["quality"].keys()
    source = manifest["source"]
    assert manifest["task"]["name"] == "segmentation" and manifest["task"]["outputs"] == source["model"]["outputs"] == 4
    assert source["data"]["classes"] == list(shapes.CLASSES) and source["data"]["question"]["classes"] is None
    assert manifest["folds"] == [] and manifest["recovery"]["rung"] == "batchnorm"
    assert manifest["sha256"].keys() == {"manifest.json", "model.onnx", "model.safetensors", "serve.py", "proof.json"}


def output_of(file):
    (value,) = onnx.load(file).graph.output
    kind = value.type.tensor_type
    return value.name, [d.dim_param or d.dim_value for d in kind.shape.dim], kind.elem_type


def test_the_graphs_take_any_batch_and_answer_at_full_size(run, maps):
    name, shape, kind = output_of(run.artifact / "model.onnx")
    assert name == "logits" and shape[1:] == [4, 48, 64] and isinstance(shape[0], str) and kind == onnx.TensorProto.FLOAT
    name, shape, kind = output_of(maps.artifact / "model.onnx")
    assert name == "classes" and shape[1:] == [48, 64] and isinstance(shape[0], str) and kind == onnx.TensorProto.UINT8
    logits, classes = (OnnxRuntime(r.artifact / "model.onnx", 1) for r in (run, maps))
    batch = np.random.default_rng(0).standard_normal((3, 3, 36, 48), np.float32)
    (together,), (mapped,) = logits(batch), classes(batch)
    assert together.shape == (3, 4, 48, 64) and together.dtype == np.float32
    assert mapped.shape == (3, 48, 64) and mapped.dtype == np.uint8
    assert (together.argmax(1) == mapped).mean() > 0.9999
    assert np.allclose(logits(batch[1:2])[0][0], together[1], atol=1e-4)


def test_class_maps_have_the_same_quality(run, maps):
    assert maps.best.quality.miou == pytest.approx(run.best.quality.miou, abs=1e-9)
    assert maps.original.quality == run.original.quality


# --- check ---


@pytest.mark.parametrize("which", ["run", "maps"])
def test_check_proves_it(request, which, segmenter):
    shipped = request.getfixturevalue(which)
    findings = check(shipped.artifact, model=segmenter("rough"), threads=1)
    assert found(findings) == ALL, findings
    q = shipped.best.quality
    assert f"on {q.n} images, stated {q.miou:.2f} % on 16" in findings[3].detail
    assert "of the pixels of 16 real images" in findings[2].detail
    assert ("logits up to" in findings[2].detail) == (which == "run")


def test_check_without_the_users_code(run):
    findings = check(run.artifact, threads=1)
    assert found(findings) == {**ALL, "torch = onnxruntime": None} and "`model" in findings[2].detail


def test_check_after_cross_fitting_uses_the_statistics_of_each_fold(padded, segmenter):
    run, root = padded
    assert run.best.recovery.rung == "batchnorm"
    findings = check(run.artifact, model=segmenter("rough", fit="pad"), threads=1)
    assert found(findings) == ALL, findings
    assert f"mIoU {run.best.quality.miou:.2f} % on 60 images" in findings[3].detail
    # In the graph the statistics are part of the convolutions: without the network they cannot be put back.
    without = check(run.artifact, threads=1)
    assert found(without) == {**ALL, "torch = onnxruntime": None, "quality": None} and "`model" in without[3].detail


def test_masks_that_moved_and_masks_that_changed(run, scenes, shapes, folder, segmenter, tmp_path):
    other = shutil.copytree(scenes, tmp_path / "elsewhere")
    assert found(check(folder, model=segmenter("rough"), data=other, threads=1)) == ALL
    opened = open_masks(other, outputs=4)
    assert found(check(folder, data=opened, threads=1))["quality"] is True
    file = other / "val" / "masks" / "val00.png"
    mask = np.array(Image.open(file))
    mask[0, 0] = (mask[0, 0] + 1) % 4
    shapes.save_mask(mask, file)
    with pytest.raises(DownresError, match="not those that the quality was measured on"):
        check(folder, data=other, threads=1)


def test_a_file_of_classes_that_is_gone(folder, segmenter):
    """Its names are in the manifest."""
    rewritten(folder, lambda m: m["source"]["data"].update(classes_file="/nowhere/classes.txt"))
    assert found(check(folder, model=segmenter("rough"), threads=1)) == ALL


def test_masks_that_are_gone(run, folder):
    rewritten(folder, lambda m: m["source"]["data"].update(path="/nowhere/at/all"))
    findings = check(folder, threads=1)
    assert found(findings) == {**{what: None for what in ALL}, "files": True} and "`data`" in findings[1].detail


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "manifest.json"])
def test_a_changed_byte_is_noticed(folder, name):
    file = folder / name
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    try:
        findings = check(folder, threads=1)
    except DownresError as error:
        assert name == "manifest.json" and "broken" in str(error)
    else:
        assert found(findings) == {"files": False} and name in findings[0].detail


def test_weights_that_are_not_those_of_the_graph_are_wrong(folder, segmenter):
    """Even where the digests were made to fit."""
    tensors = load_file(folder / "model.safetensors")
    tensors["classes.bias"] = tensors["classes.bias"] + torch.tensor([0.0, 0.5, 0.0, 0.0])
    save_file(tensors, folder / "model.safetensors")
    rewritten(folder, lambda m: None)
    assert found(check(folder, model=segmenter("rough"), threads=1)) == {**ALL, "torch = onnxruntime": False}


@pytest.mark.parametrize("points", [-0.2, 0.2])
def test_a_falsified_miou_is_wrong(folder, segmenter, points):
    def falsify(manifest):
        manifest["result"]["quality"]["miou"] += points

    rewritten(folder, falsify)
    assert found(check(folder, model=segmenter("rough"), threads=1)) == {**ALL, "quality": False}


def test_a_graph_of_other_weights_is_wrong(folder, segmenter, maps):
    """That gives class maps where logits are said, and one whose classes are others."""
    graph = onnx.load(folder / "model.onnx")
    for one in graph.graph.initializer:
        if one.name.endswith("classes.bias"):
            array = onnx.numpy_helper.to_array(one)[::-1].copy()
            one.CopyFrom(onnx.numpy_helper.from_array(array, one.name))
    onnx.save(graph, folder / "model.onnx")
    rewritten(folder, lambda m: None)
    findings = found(check(folder, model=segmenter("rough"), threads=1))
    assert findings == {**ALL, "torch = onnxruntime": False, "quality": False}


def test_another_network_is_refused(run, segmenter):
    for name in ("five_classes", "without_norm", "classifier"):
        with pytest.raises(DownresError, match="weights do not fit"):
            check(run.artifact, model=segmenter(name), threads=1)


# --- predict ---


@pytest.fixture
def pictures(shapes, tmp_path):
    """Of two sizes, and one grey."""
    files = []
    for name, hw in (("wide", (48, 64)), ("tall", (101, 37))):
        image, _ = shapes.scene(5000, hw)
        files.append(tmp_path / f"{name}.png")
        Image.fromarray(image).save(files[-1])
    files.append(tmp_path / "grey.png")
    Image.fromarray(shapes.scene(5001)[0]).convert("L").save(files[-1])
    return files


def by_hand(shapes, run, file, hw=(36, 48)):
    """The class map by the shipped weights in torch, with PIL's resize."""
    network = shapes.rough().eval()
    network.load_state_dict(load_file(run.artifact / "model.safetensors"))
    picture = np.asarray(Image.open(file).convert("RGB"))
    return shapes.predicted(network, picture, hw, size=(48, 64))


def test_masks_and_overlays(run, shapes, pictures, tmp_path):
    out = tmp_path / "deep" / "out"
    predictions = predict(run.artifact, pictures, out=out, threads=1)
    assert sorted(f.name for f in out.iterdir()) == sorted(f"{f.stem}_{k}.png" for f in pictures for k in ("mask", "overlay"))
    for file, prediction in zip(pictures, predictions, strict=True):
        mask, picture = Image.open(prediction.mask), Image.open(file)
        assert mask.mode == "P" and mask.size == picture.size
        indices = np.asarray(mask)
        expected = by_hand(shapes, run, file)
        assert (indices == expected).mean() > 0.98
        # The colours of the palette are the classes' own.
        assert (np.asarray(mask.convert("RGB")) == np.array(shapes.COLOURS, np.uint8)[indices]).all()
        overlay = Image.open(prediction.overlay)
        assert overlay.mode == "RGB" and overlay.size == picture.size
        share = {c: 100 * float((indices == k).mean()) for k, c in enumerate(shapes.CLASSES) if (indices == k).any()}
        assert prediction.image == str(file) and dict(zip(prediction.classes, prediction.shares, strict=True)) == share
        assert list(prediction.shares) == sorted(prediction.shares, reverse=True)
    assert set(predict(run.artifact, pictures[:1], out=out, top=2)[0].classes) < set(shapes.CLASSES)


def test_the_overlay_shows_picture_and_mask(run, shapes, pictures, tmp_path):
    """A class's colour is mixed in: more of it where the mask says so, and the picture is still there."""
    (prediction,) = predict(run.artifact, pictures[2:], out=tmp_path / "out")
    grey = np.asarray(Image.open(pictures[2])).astype(float)
    over, mask = (np.asarray(Image.open(f)).astype(float) for f in (prediction.overlay, prediction.mask))
    for k in np.unique(mask).astype(int):
        here = (mask == k)[2:-2, 2:-2]
        towards = np.array(shapes.COLOURS[k]) - grey[..., None]
        moved = (over - grey[..., None])[2:-2, 2:-2][here]
        assert (moved * towards[2:-2, 2:-2][here]).mean() > 0
    assert np.corrcoef(over.mean(2).ravel(), grey.ravel())[0, 1] > 0.3


def test_class_maps_of_pictures_of_another_size(maps, shapes, pictures, tmp_path):
    """A class map is all that there is: its nearest pixels."""
    for file, prediction in zip(pictures, predict(maps.artifact, pictures, out=tmp_path / "out"), strict=True):
        network = shapes.rough().eval()
        network.load_state_dict(load_file(maps.artifact / "model.safetensors"))
        picture = Image.open(file).convert("RGB")
        full = Image.fromarray(shapes.predicted(network, np.asarray(picture), (36, 48), size=(48, 64)).astype(np.uint8))
        if picture.size != (64, 48):
            small = picture.resize((48, 36), Image.Resampling.BILINEAR)
            full = Image.fromarray(_at(shapes, network, small, (48, 64)))
        expected = np.asarray(full.resize(picture.size, Image.Resampling.NEAREST))
        assert (np.asarray(Image.open(prediction.mask)) == expected).mean() > 0.99


def _at(shapes, network, small, size):
    """The class map at `size` of a picture that has the network's size already."""
    x = (torch.from_numpy(np.array(small, np.float32)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(network(x), size, mode="bilinear")
    return logits[0].argmax(0).numpy().astype(np.uint8)


def test_padding_is_no_part_of_the_answer(padded, shapes, tmp_path):
    """Blue at the right end of a wide picture and red at its foot stay there, and the ground is not stretched."""
    run, _ = padded
    image = np.full((40, 200, 3), shapes.COLOURS[0], np.uint8)
    image[:, 160:], image[32:, :160] = shapes.COLOURS[3], shapes.COLOURS[1]
    noisy = (image + 20 * np.random.default_rng(0).standard_normal(image.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "wide.png")
    (prediction,) = predict(run.artifact, [tmp_path / "wide.png"], out=tmp_path / "out")
    mask = np.asarray(Image.open(prediction.mask))
    assert mask.shape == (40, 200)
    # 200 pixels are 48 of the input: a step of the network's stride is 17 pixels.
    assert (mask[:28, 180:] == 3).mean() > 0.9 and (mask[:, :140] != 3).mean() > 0.9
    assert (mask[-2:, 20:140] == 1).mean() > 0.5 and (mask[:14, 20:140] == 1).mean() < 0.1


def test_what_predict_refuses(run, folder, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(pictures[0], other / pictures[0].name)
    with pytest.raises(DownresError, match="wide would be written twice"):
        predict(run.artifact, [*pictures, other / "wide.png"], out=tmp_path / "out")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DownresError, match="broken.png"):
        predict(run.artifact, [tmp_path / "broken.png"], out=tmp_path / "out")
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(DownresError, match="not as it was shipped"):
        predict(folder, pictures, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_predict_is_what_the_quality_was_measured_with(run, shapes, scenes, tmp_path):
    """The masks of the proof images, written by predict, have the stated mIoU."""
    files = sorted((scenes / "val" / "images").glob("*.png"))
    found_maps = [np.asarray(Image.open(p.mask)) for p in predict(run.artifact, files, out=tmp_path / "out", threads=1)]
    counts = shapes.confusion(found_maps, [mask for _, mask in shapes.read(scenes / "val")])
    assert shapes.miou(counts) == pytest.approx(run.best.quality.miou, abs=0.05)


def test_classes_at_is_exported_logic_too():
    """Logits of the picture's own size are only compared, not interpolated."""
    logits = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32)
    assert (classes_at(logits, (6, 8), Dense((6, 8))) == logits.argmax(0)).all()
