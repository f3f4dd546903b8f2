"""examples/serve.js: what a shipped folder answers without Python, beside serve.py and `predict`."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from downres import Preprocessing, predict
from downres.artifacts.embed import front
from downres.artifacts.serving import program, steps
from downres.engines.onnxruntime import OnnxRuntime
from downres.images import decode
from downres.tasks.regression.task import Regression

SERVE = Path(__file__).parents[1] / "examples" / "serve.js"


@pytest.fixture(scope="module")
def node():
    """Runs serve.js on pictures; the answers."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("examples/serve.js needs node on the path")
    probe = "require('onnxruntime-node'); require('sharp')"
    if subprocess.run([found, "-e", probe], cwd=SERVE.parent, capture_output=True).returncode:
        pytest.skip("examples/serve.js needs its packages: npm install, in examples/")

    def run(folder, *pictures, ok=True):
        done = subprocess.run(
            [found, str(SERVE), str(folder), *map(str, pictures)], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode == 0) is ok, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()] if ok else done.stderr

    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Turned by EXIF, grey, a palette, with transparency, a sliver; JPEG and PNG."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    photo = low.resize((131, 97), Image.Resampling.BICUBIC)
    files = {"a.png": photo, "small.png": low, "grey.png": photo.convert("L"), "sliver.png": photo.resize((90, 2))}
    files |= {"alpha.png": photo.convert("RGBA"), "palette.png": photo.convert("P", palette=Image.Palette.ADAPTIVE)}
    files["alpha.png"].putalpha(photo.convert("L"))
    for name, picture in files.items():
        picture.save(place / name)
    for orientation in (3, 6, 7):
        exif = Image.Exif()
        exif[274] = orientation
        photo.save(place / f"turned{orientation}.jpg", exif=exif)
    return sorted(place.iterdir())


HALF = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
WAYS = [
    HALF,
    dataclasses.replace(HALF, crop_ratio=0.875, interpolation="bicubic", resolution=(28, 45)),
    dataclasses.replace(HALF, fit="stretch", resolution=(30, 41), channel_order="bgr", mean=(0.1, 0.4, 0.7)),
    dataclasses.replace(HALF, fit="pad", mean=(12.0, 80.5, 200.0), std=(1.0, 2.0, 3.0), scale=1.0, channel_order="bgr"),
    dataclasses.replace(HALF, mean=(0.5,), std=(0.25,), fit="pad", interpolation="bicubic"),
]


def echo(folder: Path, p: Preprocessing) -> dict:
    """A folder whose graph answers with what it gets, and the names of its serve.py."""
    folder.mkdir()
    count = len(p.mean) * p.hw[0] * p.hw[1]
    task = Regression(None, count)
    task.classes = ()
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", len(p.mean), *p.hw])
    given = helper.make_tensor_value_info("values", TensorProto.FLOAT, ["batch", count])
    graph = helper.make_graph([helper.make_node("Flatten", ["input"], ["values"])], "echo", [taken], [given])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")
    output = {"name": "values", "shape": ["batch", count], **task.meaning(p)}
    manifest = {"format": 3, "runtime": {"name": "onnxruntime"}, "task": {"name": "regression"}, "classes": []}
    manifest |= {"steps": steps(p), "output": output, "input": {"name": "input"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    names = {"__file__": str(folder / "serve.py")}
    exec(compile(program(task, p).partition("\nsession = ")[0], "serve.py", "exec"), names)  # all but the loop
    return names


@pytest.mark.parametrize("p", WAYS, ids=lambda p: f"{p.fit} {p.interpolation} {len(p.mean)}")
def test_the_network_gets_what_serve_py_gives_it(node, pictures, tmp_path, p):
    """To the last bit: Pillow's resize, rule by rule."""
    serve = echo(tmp_path / "best", p)
    for file, answered in zip(pictures, node(tmp_path / "best", *pictures), strict=True):
        ours = serve["network_input"](serve["opened"](file))
        assert np.array_equal(np.float32(answered["values"]), ours.ravel()), file.name


def test_answers_are_those_of_predict_on_real_photographs(node, shipped, shared_data):
    """A tenth of a point: PIL's resize, which it has, and torchvision's differ by a level or two in a few pixels."""
    photographs = sorted(shared_data.glob("catdog/val/*/*.jpg"))[::20]
    assert len(photographs) >= 10
    for ours, theirs in zip(node(shipped[0], *photographs), predict(shipped[0], photographs), strict=True):
        assert ours["image"] == theirs.image and ours["classes"] == list(theirs.classes)
        assert np.allclose(ours["probabilities"], theirs.probabilities, rtol=0, atol=0.1)


def test_the_lines_in_the_guide_give_pixels_to_a_graph_that_has_its_preprocessing_inside(node, pictures, tmp_path):
    (lines,) = re.findall(r"^```js\n(.*?)^```", (SERVE.parents[1] / "docs" / "serving.md").read_text(), re.M | re.S)
    shown = "console.log(JSON.stringify(Array.from(Object.values(answer)[0].data)))"
    needed = 'const ort = require("onnxruntime-node"), sharp = require("sharp");'
    (tmp_path / "run" / "best").mkdir(parents=True)
    graph = front(HALF)
    graph.ir_version = 10  # as in a shipped file, of the model that it stands in front of
    onnx.save(graph, tmp_path / "run" / "best" / "model_uint8.onnx")
    turned = next(file for file in pictures if file.name == "turned6.jpg")
    shutil.copy(turned, tmp_path / "photo.jpg")
    program = f"{needed}\n(async () => {{ process.chdir({json.dumps(str(tmp_path))});\n{lines}\n{shown} }})()"
    done = subprocess.run([shutil.which("node"), "-e", program], cwd=SERVE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (ours,) = OnnxRuntime((tmp_path / "run" / "best" / "model_uint8.onnx"), 1)(decode(turned)[None])
    assert np.allclose(np.float32(json.loads(done.stdout)), ours.ravel(), rtol=0, atol=1e-5)


def test_what_it_has_not_is_said(node, tmp_path, pictures):
    echo(tmp_path / "best", HALF)
    file = tmp_path / "best" / "manifest.json"
    manifest = json.loads(file.read_text())
    for part, said in (
        ({"format": 4}, "format 4"),
        ({"runtime": {"name": "openvino"}}, "openvino"),
        ({"task": {"name": "segmentation"}}, "task segmentation"),
        ({"steps": steps(dataclasses.replace(HALF, antialias=False))}, "OpenCV"),
        ({"steps": steps(HALF, numbers=True)}, "numbers of TIFF"),
    ):
        file.write_text(json.dumps({**manifest, **part}))
        assert said in node(tmp_path / "best", pictures[0], ok=False)
    file.write_text(json.dumps(manifest))
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "16.png")
    assert "more than 8 bits" in node(tmp_path / "best", tmp_path / "16.png", ok=False)
    Image.new("CMYK", (9, 9)).save(tmp_path / "ink.jpg")
    assert "inks" in node(tmp_path / "best", tmp_path / "ink.jpg", ok=False)
