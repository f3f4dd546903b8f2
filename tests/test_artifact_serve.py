"""serve.py: what whoever has the folder alone gets, for every task and every way to make a network's input."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from downres import Arrays, DownresError, Record, Score, Task, check, open_photos, predict, search
from downres.artifacts import read_manifest, served
from downres.artifacts.serving import program, steps
from downres.images import decode, preprocess
from downres.records import CLASSES, FITS, LOGITS, Candidate, Dense, Preprocessing
from downres.recovery.state import RECALIBRATED, REFITTED, State, Step
from downres.searching.ship import changed
from downres.tasks.agreement.task import OfEmbeddings
from downres.tasks.classification.task import Classification
from downres.tasks.multilabel.task import Multilabel
from downres.tasks.regression.task import Regression
from downres.tasks.segmentation.task import Segmentation

MOST_LINES, MOST_LINES_OF_NUMBERS = 59, 69
HALF = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def classifier(outputs=3, probability=False):
    task = Classification(None, outputs)
    task.probability, task.classes = probability, tuple(f"class {i}" for i in range(max(2, outputs)))
    return task


def segmenter(classes=3, **dense):
    task = Segmentation(None, classes, Dense((32, 40), **dense))
    task.classes, task.colours = tuple(f"c{i}" for i in range(classes)), tuple((i, 0, 0) for i in range(classes))
    return task


def loaded(folder: Path, task, p: Preprocessing, numbers: bool = False) -> dict:
    """The names in serve.py, as it would be written for the task, beside a manifest that says what it reads."""
    folder.mkdir(exist_ok=True)
    output = {"name": "x", "shape": [], **task.meaning(p)}
    colours = [list(c) for c in getattr(task, "colours", ())]
    manifest = {"steps": steps(p, numbers), "output": output, "classes": list(getattr(task, "classes", ())), "colours": colours}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    file = folder / "serve.py"
    file.write_text(program(task, p, numbers))
    names = {"__file__": str(file)}
    exec(compile(file.read_text().partition("\nsession = ")[0], str(file), "exec"), names)  # all but the loop
    return names


# --- the program ---


def test_every_variant_is_short_and_compiles():
    tasks = [classifier(), classifier(1), classifier(1, True), Multilabel(None, 3), Regression(None, 2), OfEmbeddings(None, 8)]
    tasks += [
        segmenter(output=output, interpolation=how, threshold=threshold, align_corners=corners)
        for output, how, threshold, corners in itertools.product(
            (LOGITS, CLASSES), ("bilinear", "bicubic"), (None, 0.0), (False, True)
        )
    ]
    tasks += [segmenter(300), segmenter(300, output=CLASSES)]
    texts = set()
    for task, fit, how, antialias, order, channels in itertools.product(
        tasks, FITS, ("bilinear", "bicubic"), (True, False), ("rgb", "bgr"), (1, 3)
    ):
        if channels == 3 or order == "rgb":
            p = Preprocessing(
                32, 0.9, how, (0.5,) * channels, (0.25,) * channels, fit=fit, channel_order=order, antialias=antialias
            )
            for numbers, most in ((False, MOST_LINES), (True, MOST_LINES_OF_NUMBERS)):
                text = program(task, p, numbers)
                compile(text, "serve.py", "exec")
                lines = text.splitlines()
                assert len(lines) <= most and max(map(len, lines)) <= 128, (len(lines), task.name, p)
                assert "torch" not in text and "import downres" not in text
                texts.add(text)
    assert len(texts) > 200


# --- from a file to the network's input ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """A landscape, turned by EXIF in JPEG, PNG and TIFF; 16 bits; grey; palettes with transparency; CMYK; slivers."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    photo = low.resize((131, 97), Image.Resampling.BICUBIC)
    files = {"a.png": photo, "tall.png": photo.rotate(90, expand=True), "small.png": low, "grey.png": photo.convert("L")}
    files |= {"sliver.png": photo.resize((90, 2)), "cmyk.jpg": photo.convert("CMYK"), "alpha.png": photo.convert("RGBA")}
    files["alpha.png"].putalpha(photo.convert("L"))
    files["la.png"] = files["alpha.png"].convert("LA")
    files["palette.png"] = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    files["palette.png"].info["transparency"] = bytes(range(0, 256, 2))
    files["bits.png"] = photo.convert("1")
    wide = np.asarray(photo.convert("L")).astype(np.uint16) * 257 - np.arange(131, dtype=np.uint16)
    files |= {
        "16.png": Image.fromarray(wide),
    }
    for name, picture in files.items():
        picture.save(place / name)
    for orientation, ending in [*((i, "jpg") for i in range(1, 9)), (6, "png"), (8, "tif"), (3, "webp")]:
        exif = Image.Exif()
        exif[274] = orientation
        photo.save(place / f"turned{orientation}.{ending}", exif=exif)
    return sorted(place.iterdir())


PREPROCESSINGS = [
    HALF,
    dataclasses.replace(HALF, crop_ratio=0.875, interpolation="bicubic", resolution=(28, 45)),
    dataclasses.replace(HALF, fit="stretch", resolution=(30, 41), channel_order="bgr", mean=(0.1, 0.4, 0.7)),
    dataclasses.replace(HALF, fit="pad", mean=(12.0, 80.5, 200.0), std=(1.0, 2.0, 3.0), scale=1.0, channel_order="bgr"),
    dataclasses.replace(HALF, fit="pad", antialias=False, resolution=(24, 50), interpolation="bicubic"),
    dataclasses.replace(HALF, antialias=False, crop_ratio=0.9),
    dataclasses.replace(HALF, mean=(0.5,), std=(0.25,), fit="pad", interpolation="bicubic"),
    dataclasses.replace(HALF, mean=(0.5,), std=(0.25,), antialias=False),
]


@pytest.mark.parametrize("p", PREPROCESSINGS, ids=lambda p: f"{p.fit} {p.interpolation} {len(p.mean)} {p.antialias}")
def test_the_input_is_that_of_downres_but_for_rounding(pictures, tmp_path, p):
    """In levels of 255, of which the resizes of PIL and torchvision differ by up to 2 in few pixels."""
    serve = loaded(tmp_path / "best", classifier(), p)
    for file in pictures:
        ours = serve["network_input"](serve["opened"](file))
        theirs = preprocess(decode(file), p)[None].numpy()
        assert ours.dtype == np.float32 and ours.shape == theirs.shape, file.name
        apart = np.abs(ours - theirs) * np.array(p.std, np.float32)[:, None, None] / p.scale
        assert apart.max() < 2.01 and (apart > 0.01).mean() < 0.02, (file.name, apart.max(), (apart > 0.01).mean())


@pytest.mark.parametrize(
    ("shape", "dtype", "ending"),
    [
        ((37, 50, 4), "uint8", "png"),
        ((37, 50, 6), "uint8", "npy"),
        ((50, 37, 5), "uint16", "tif"),
        ((37, 50), "uint16", "tif"),
        ((37, 50, 3), "uint16", "npy"),
        ((2, 37, 50), "float32", "npy"),
    ],
)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("interpolation", "antialias"), list(itertools.product(("bilinear", "bicubic"), (True, False))))
def test_numbers_are_served_as_downres_reads_them(tmp_path, shape, dtype, ending, fit, interpolation, antialias):
    rng = np.random.default_rng(0)
    levels = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    coarse = rng.random((6, 7) if len(shape) == 2 else (6, 7, min(shape)))
    sides = shape[:2] if len(shape) == 2 or shape[2] == min(shape) else shape[1:]
    smooth = F.interpolate(torch.from_numpy(coarse.reshape(6, 7, -1)).permute(2, 0, 1)[None], sides, mode="bilinear")[0]
    values = (levels * smooth.permute(1, 2, 0).numpy()).astype(dtype)
    channels = values.shape[2]
    values = values.reshape(shape) if len(shape) == 2 else np.moveaxis(values, 2, shape.index(min(shape)))
    file = tmp_path / f"picture.{ending}"
    if ending == "npy":
        np.save(file, values)
    elif ending == "png":
        Image.fromarray(values).save(file)
    else:
        pytest.importorskip("tifffile").imwrite(
            file, values, photometric="minisblack", planarconfig="contig" if values.ndim == 3 else None
        )
    p = Preprocessing((24, 20), 0.9, interpolation, (0.4,) * channels, (0.25,) * channels, fit=fit, antialias=antialias)
    serve = loaded(tmp_path / "served", classifier(), p, numbers=True)
    ours = preprocess(decode(file, channels), p).numpy()
    theirs = serve["network_input"](*serve["opened"](str(file)))[0]
    assert theirs.shape == ours.shape and ours.std() > 0.1
    assert np.abs(theirs - ours).max() * 0.25 * 255 <= 2.01  # levels of 255


def test_numbers_are_no_colours(tmp_path):
    serve = loaded(tmp_path / "best", classifier(), HALF)
    for values in (np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32), np.ones((4, 4), np.uint16)):
        Image.fromarray(values).save(tmp_path / "x.tif")
        with pytest.raises(AssertionError, match="holds numbers"):
            serve["opened"](tmp_path / "x.tif")


@pytest.mark.parametrize("p", PREPROCESSINGS, ids=lambda p: f"{p.fit} {p.interpolation} {len(p.mean)} {p.antialias}")
def test_the_example_in_the_manifest_is_what_is_done(p):
    """Its numbers, by hand: the picture of 480 by 640 resized, and where the centre begins."""
    said = steps(p)
    (height, width), example = p.hw, said["example"]
    assert example["picture"] == [480, 640]
    if p.fit == "stretch":
        assert example["resized"] == [height, width]
    elif p.fit == "pad":
        scale = min(height / 480, width / 640)
        assert example["resized"] == [round(480 * scale), round(640 * scale)]
    else:
        tall, wide = said["resize"]["to"]
        assert (tall, wide) == (int(height / p.crop_ratio), int(width / p.crop_ratio))
        scale = max(tall / 480, wide / 640)
        assert example["resized"] == [int(480 * scale + 1e-9), int(640 * scale + 1e-9)]
        assert example["cropped_at"] == [round((have - want) / 2) for have, want in zip(example["resized"], p.hw, strict=True)]
        assert said["crop"]["size"] == [height, width]
    assert ("crop" in said, "pad" in said) == (p.fit == "crop", p.fit == "pad")
    assert said["normalise"]["divide_by"] == pytest.approx(1 / p.scale) and said["normalise"]["mean"] == list(p.mean)


# --- what the answers mean ---


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 40), (63, 90), (17, 9)])
def test_logits_are_brought_to_size_as_torch_does(tmp_path, monkeypatch, how, corners, size):
    monkeypatch.chdir(tmp_path)
    task = segmenter(interpolation=how, align_corners=corners)
    serve = loaded(tmp_path / "best", task, dataclasses.replace(HALF, fit="stretch"))
    logits = np.random.default_rng(0).standard_normal((3, 32, 40)).astype(np.float32)
    said = serve["answer"](logits, Image.new("RGB", size[::-1]), "deep/x.jpg")
    expected = F.interpolate(torch.from_numpy(logits)[None], size, mode=how, align_corners=corners)[0].argmax(0).numpy()
    mask = Image.open(tmp_path / said["mask"])
    assert said["mask"] == "predictions/x_mask.png" and mask.mode == "P"
    assert (np.asarray(mask) == expected).mean() > 0.998
    assert sum(said["shares"]) == pytest.approx(100)


def test_maps_thresholds_and_padding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    stretched, padded = (dataclasses.replace(HALF, fit=fit, resolution=(16, 20)) for fit in ("stretch", "pad"))
    picture = Image.new("RGB", (80, 32))  # padded it fills 8 of 16 rows

    def drawn(task, p, output):
        serve = loaded(tmp_path / "best", task, p)
        return np.asarray(Image.open(serve["answer"](output, picture, "x.png")["mask"]))

    indices = rng.integers(0, 3, (32, 40)).astype(np.uint8)
    assert (drawn(segmenter(output=CLASSES), stretched, indices) == indices.repeat(2, 1)).all()
    assert (drawn(segmenter(output=CLASSES), padded, indices) == indices[:16].repeat(2, 0).repeat(2, 1)).all()
    logit = rng.standard_normal((1, 32, 40)).astype(np.float32)
    single = segmenter(2, threshold=0.25)
    expected = F.interpolate(torch.from_numpy(logit)[None], (32, 80), mode="bilinear")[0, 0].numpy() > 0.25
    assert (drawn(single, stretched, logit) == expected).mean() > 0.999
    many = segmenter(300, output=CLASSES)
    assert (drawn(many, stretched, np.full((32, 40), 299, np.int16)) == 299).all()


def test_probabilities_numbers_and_embeddings(tmp_path):
    def answer(task, values):
        serve = loaded(tmp_path / "best", task, HALF)
        return json.loads(json.dumps(serve["answer"](np.array(values, np.float32), None, "x")))

    three = answer(classifier(), [0.0, np.log(3.0), np.log(6.0)])
    assert three["classes"] == ["class 2", "class 1", "class 0"] and three["probabilities"] == pytest.approx([60, 30, 10])
    single = answer(classifier(1), [np.log(4.0)])
    assert single["classes"] == ["class 1", "class 0"] and single["probabilities"] == pytest.approx([80, 20])
    given = answer(classifier(1, True), [0.25])
    assert given["classes"] == ["class 0", "class 1"] and given["probabilities"] == pytest.approx([75, 25])
    labels = Multilabel(None, 2)
    labels.classes = ("cat", "dog")
    both = answer(labels, [np.log(4.0), np.log(9.0)])
    assert both["classes"] == ["dog", "cat"] and both["probabilities"] == pytest.approx([90, 80])
    assert labels.meaning(HALF)["thresholds"] == [0.5, 0.5]
    sizes = Regression(None, 2)
    sizes.classes = ("height [mm]", "width [mm]")
    assert answer(sizes, [1.5, -2.0]) == {"names": ["height [mm]", "width [mm]"], "values": [1.5, -2.0]}
    assert sizes.meaning(HALF)["unit"] == "mm"
    assert answer(OfEmbeddings(None, 2), [1.5, -2.0]) == {"embedding": [1.5, -2.0]}
    assert len(answer(classifier(1000), np.arange(1000))["classes"]) == 5


# --- run, as whoever has the folder alone runs it, and checked ---

OPTIONS = {"max_drop": 60.0, "resolutions": [32], "stem_scales": (), "runtime": "torch", "threads": 1}
WHAT = "serve.py = predict"


@pytest.fixture
def photo(cells, tmp_path_factory):
    Image.fromarray(cells.pictures[0]).save(file := tmp_path_factory.mktemp("photo") / "photo.png")
    return file


@pytest.fixture
def folder(shipped, tmp_path):
    return shutil.copytree(shipped[0], tmp_path / "best")


def finding(folder, shipped, what=WHAT):
    return next(f for f in check(folder, model=shipped[2], data=shipped[1], threads=1) if f.what == what)


def sign(folder, change=lambda manifest: None):
    """As whoever forges an artifact would: all digests are right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    for name in manifest["sha256"]:
        file = folder / name
        manifest["sha256"][name] = "" if name == "manifest.json" else hashlib.sha256(file.read_bytes()).hexdigest()
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["sha256"]["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_it_serves_elsewhere_with_neither_torch_nor_downres(folder, photo, tmp_path):
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "found = {name.partition('.')[0] for name in sys.modules} & {'torch', 'torchvision', 'downres', 'timm', 'onnx'}\n"
        "assert not found, found"
    )
    code = f"import sys; sys.argv = sys.argv[1:]\n{code}"
    command = [sys.executable, "-P", "-c", code, str(folder / "serve.py"), str(photo), str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    (expected,) = predict(folder, [photo], threads=1)
    assert first == second and first["image"] == str(photo) and first["classes"] == list(expected.classes)
    assert first["probabilities"] == pytest.approx(expected.probabilities, abs=1)
    assert {file.name for file in tmp_path.iterdir()} == {"best"}  # it leaves nothing behind
    assert done.stderr == ""


def test_check_runs_it_on_proof_images(shipped):
    found = finding(shipped[0], shipped)
    assert found.ok is True and "same first class on 8 of 8 real images, probabilities at most " in found.detail


def test_an_edited_one_is_noticed_and_never_run(shipped, folder, photo, tmp_path):
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    file = folder / "serve.py"
    file.write_text(file.read_text().replace("session =", f"{evil}session ="))
    assert [(f.what, f.ok) for f in check(folder)] == [("files", False)]
    with pytest.raises(DownresError, match="changed: serve.py"):
        predict(folder, [photo])
    sign(folder)
    found = finding(folder, shipped)
    assert found.ok is False and found.detail == "serve.py is not the one that downres writes: it was not run"
    sign(folder, lambda manifest: manifest["versions"].update(downres="0.0.1"))  # which may have written another
    found = finding(folder, shipped)
    assert found.ok is None and "0.0.1 wrote it" in found.detail and "it was not run" in found.detail
    assert not (tmp_path / "ran").exists()


def test_modules_beside_it_are_not_imported(shipped, folder, tmp_path):
    for name in ("numpy", "onnxruntime", "json", "PIL"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert finding(folder, shipped).ok is True and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["steps", "output"])
def test_a_manifest_that_says_other_steps_is_wrong(shipped, folder, change):
    def falsify(manifest):
        (manifest["steps"]["normalise"] if change == "steps" else manifest["output"]).update(rule="", meaning="")

    sign(folder, falsify)
    found = finding(folder, shipped)
    assert found.ok is False and found.detail.startswith("what the manifest says of serving is not the one that downres writes")


@pytest.mark.parametrize(("wrong", "said"), [("/ 200", "points apart"), ("/ 0", "it failed: ValueError")])
def test_other_answers_are_wrong(shipped, folder, monkeypatch, wrong, said):
    """Were there a mistake in what downres writes."""
    text = (folder / "serve.py").read_text().replace("/ divide_by", wrong)
    (folder / "serve.py").write_text(text)
    sign(folder)
    monkeypatch.setattr(served, "program", lambda *_, **__: text)
    found = finding(folder, shipped)
    assert found.ok is False and said in found.detail, found.detail


def test_an_older_artifact_has_none(shipped, folder):
    (folder / "serve.py").unlink()
    sign_without = json.loads((folder / "manifest.json").read_text())
    del sign_without["sha256"]["serve.py"]
    (folder / "manifest.json").write_text(json.dumps(sign_without))
    sign(folder)
    found = finding(folder, shipped)
    assert found.ok is None and found.detail.startswith("there is no serve.py")


def test_the_proof_images_are_named_with_checksums(shipped, folder, cells):
    listed = json.loads((folder / "proof.json").read_text())
    proof = shipped[1].folds[0].test
    crc = [zlib.crc32(cells.pictures[i].tobytes(), zlib.crc32(repr(cells.pictures[i].shape).encode())) for i in proof]
    assert listed["images"] == [[f"cell {i}", f"{c:08x}"] for i, c in zip(proof, crc, strict=True)]
    assert (folder / "proof.json").read_text().count("\n") == len(proof) - 1
    listed["images"][0][1] = "00000000"
    (folder / "proof.json").write_text(json.dumps(listed))
    sign(folder)
    with pytest.raises(DownresError, match="proof.json does not list the images"):
        finding(folder, shipped)


def test_the_source_says_what_was_changed(shipped):
    source = read_manifest(shipped[0])["source"]["model"]
    assert source["changed"][0] == "reduced to 32, from 48"
    assert source["changed"][-1].startswith("the last linear layer fitted anew on ")
    task = classifier()
    task._model = shipped[2]
    history = (Step(RECALIBRATED, 0, 256), Step(REFITTED, 0, 100, "x"), Step("pruned", 0, 7))
    assert changed(task, State(Candidate(32), 0.875, history)) == [
        "reduced to 32, from 48",
        "crop ratio 0.875, from 1",
        "statistics of BatchNorm averaged anew on 256 images",
        "the last linear layer fitted anew on 100 images",
        "pruned on 7 images",
    ]
    assert changed(task, State(Candidate(48), 1.0)) == []


# --- a task of one's own ---


@dataclasses.dataclass(frozen=True)
class Brightness(Score):
    error: float
    n: int
    metric = "error"
    lower_is_better = True
    score = property(lambda self: self.error)
    interval = property(lambda self: (self.error, self.error))


@dataclasses.dataclass(frozen=True)
class Bright(Record):
    image: str
    bright: float


class Own(Task, register=False):
    """How bright a picture is, as the network's first number says."""

    name, score = "bright", Brightness

    @classmethod
    def make(cls, model, answer, data, question):
        return cls(model, answer.outputs)

    def open(self, data, question, **options):
        return open_photos(data, **options)

    def judge(self, answers, indices, preprocessing):
        return Arrays(error=np.abs(np.stack(list(answers))[:, 0]))

    def points(self, evidence):
        return -evidence["error"]

    def quality(self, evidence):
        return Brightness(float(evidence["error"].mean()), len(evidence["error"]))

    def predict(self, answer, picture, image, preprocessing, top, out):
        return Bright(image, 100 * float(answer[0]))


class Told(Own, register=False):
    factor = 100

    def serving(self, preprocessing):
        return f"""
def answer(output, picture, name):
    return {{"bright": {self.factor} * float(output[0])}}
"""


def test_a_task_of_ones_own(tiny, cells, tmp_path, monkeypatch):
    from downres.tasks import KINDS

    monkeypatch.setitem(KINDS, "bright", Told)
    data = cells.write(tmp_path / "photos", parts=("all",))
    with pytest.warns(UserWarning):
        run = search(tiny, data, task=Told, out=tmp_path / "run", **OPTIONS)
    found = next(f for f in check(run.artifact, model=tiny, threads=1) if f.what == WHAT)
    assert found.ok is True and found.detail.startswith("bright at most "), found


def test_answers_of_a_task_of_ones_own_are_compared_by_name():
    """One that says nothing of serving prints the network's numbers; a hundredth of the largest is rounding, more is not."""
    own = Own(None, 2)
    answers, predicted = [np.array([1.0, -2.0])] * 2, [{"image": "x", "bright": 100.0, "kind": ["a"]}] * 2
    printed = {"image": "y", "output": [1.0, -2.0]}
    assert own.alike([printed] * 2, predicted, answers) == (
        True,
        "output at most 0 % of the largest number apart, on 2 real images",
    )
    for change, ok in [
        ({"output": [1.0, -2.019]}, True),
        ({"output": [1.0, -2.021]}, False),
        ({"output": [1.0]}, False),
        ({"bright": 101.1}, False),
        ({"bright": 100.9, "kind": ["a"]}, True),
        ({"bright": 100.0, "kind": ["b"]}, False),
        ({"other": 1}, False),
    ]:
        assert own.alike([{"image": "y", **change}] * 2, predicted, answers)[0] is ok, change


def test_classes_are_compared_by_name():
    task = classifier()
    predicted = [{"classes": ["a", "b", "c"], "probabilities": [40.2, 39.8, 20.0]}]
    for classes, probabilities, ok in [
        (["a", "b", "c"], [40.0, 40.0, 20.0], True),
        (["b", "a", "c"], [40.1, 39.9, 20.0], True),  # a tie, within rounding
        (["b", "a", "c"], [45.0, 35.0, 20.0], False),
        (["a", "b", "d"], [40.0, 40.0, 20.0], True),  # of a thousand classes the fifth may be another
        (["a", "d", "b"], [40.0, 40.0, 20.0], False),
    ]:
        served_one = [{"classes": classes, "probabilities": probabilities}]
        assert task.alike(served_one, predicted, [])[0] is ok, (classes, probabilities)
