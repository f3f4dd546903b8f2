"""No number changes: a small search of every task against the numbers that tests/pinned.json holds.

`python tests/test_pinned.py` writes the file anew; that is right only where a number was meant to change.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import downres
from downres import Model, Preprocessing, load_model, regseg

FILE = Path(__file__).with_name("pinned.json")
WRITING = "DOWNRES_WRITE_PINNED"
POINTS = 1e-4
"""Points of mIoU, and of all that is counted in pixels, that may differ."""
RELATIVE = 1e-6
"""Of statistics of counts of images."""

COUNTS = ("macs", "params", "param_bytes", "peak_activation_bytes")
NOT_PINNED = ("latency_ms", "p10_ms", "p90_ms", "hardware", "reason")
SIDE = 64
RECIPE = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


# --- pictures and networks ---


def grating(seed: int, label: int) -> np.ndarray:
    """A tinted disc of stripes on noise, uint8 (64, 64, 3): three directions, two widths, one label of six each."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    angle, period = np.pi * (label % 3) / 3 + rng.normal(0, 0.12), (5.0, 11.0)[label // 3]
    wave = np.sin(2 * np.pi * (columns * np.cos(angle) + rows * np.sin(angle)) / period + rng.uniform(0, 2 * np.pi))
    centre, radius = rng.uniform(22, 42, 2), rng.uniform(14, 26)
    inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    tint = rng.uniform(30, 70, 3) * (1 + 0.35 * np.eye(3)[label % 3])
    image = 120 + 35 * rng.standard_normal((SIDE, SIDE, 3)) + (inside * wave)[..., None] * tint
    return image.clip(0, 255).round().astype(np.uint8)


def write_gratings(root: Path, parts: dict[str, int]) -> Path:
    """Class folders of PNG files; parts: how many of each class, '' for an undivided folder."""
    for first, (part, count) in enumerate(parts.items()):
        for label in range(6):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(grating(10_000 * first + 100 * label + i, label)).save(folder / f"{i:02d}.png")
    return root


class Stripes(nn.Module):
    """Random filters with seeded weights: stride 4, BatchNorm, a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()
        )  # fmt: skip
        self.head = nn.Linear(32, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def stripes() -> Model:
    """With the statistics of 180 pictures of its own and a head by least squares on them."""
    torch.manual_seed(0)
    network = Stripes(6)
    labels = np.arange(180) % 6
    pictures = np.stack([grating(100_000 + i, int(label)) for i, label in enumerate(labels)])
    x = (torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        for norm in (network.body[1], network.body[4]):
            norm.momentum = None
        network.train()(x)
        for norm in (network.body[1], network.body[4]):
            norm.momentum = 0.1
        features = network.eval().features(x).double()
        # On float64, rounded: the last bits of the weights then depend on no machine.
        ones = torch.cat([features, torch.ones(180, 1)], 1)
        wanted = torch.eye(6, dtype=torch.float64)[labels]
        solved = torch.linalg.solve(ones.T @ ones + 0.1 * torch.eye(33), ones.T @ wanted).float().mul(1e4).round().div(1e4)
        network.head.weight.copy_(solved[:-1].T)
        network.head.bias.copy_(solved[-1])
    return Model(network, Preprocessing(SIDE, 0.875, **RECIPE))


def small_vit(blocks: int = 3) -> Model:
    """timm's vit_tiny with a few blocks of 48 channels on 8 × 8 patches, its matrices large enough to tell stripes apart."""
    import timm

    torch.manual_seed(0)
    design = {"img_size": SIDE, "patch_size": 8, "depth": blocks, "embed_dim": 48, "global_pool": "avg"}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=6, **design)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                size = 0.02 if name in ("pos_embed", "cls_token") else parameter[0].numel() ** -0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return Model(network.eval(), Preprocessing(SIDE, 1.0, **RECIPE))


def drawn(spec: str, preprocessing: Preprocessing, **options: Any) -> Model:
    """A named network with weights from seed 0."""
    torch.manual_seed(0)
    return dataclasses.replace(load_model(spec, pretrained=False, **options), preprocessing=preprocessing)


@pytest.fixture(scope="module")
def gratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """split/ with 96 pictures to fit on and 96 to prove on, whole/ with 120 in one part."""
    root = tmp_path_factory.mktemp("gratings")
    write_gratings(root / "split", {"train": 16, "val": 16})
    write_gratings(root / "whole", {"": 20})
    return root


def copied(source: Path, target: Path, files: list[Path]) -> Path:
    """Some files of `source` at the same places in `target`."""
    for file in files:
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target / file.relative_to(source))
    return target


@pytest.fixture(scope="module")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 photographs of cats and dogs to fit on, 32 to prove on."""
    source = shared_data / "catdog"
    if not source.is_dir():
        pytest.skip("the cats and dogs are not in ../shared/data on this machine")
    files = [f for part in ("train", "val") for pet in ("cat", "dog") for f in sorted((source / part / pet).iterdir())[:16]]
    return copied(source, tmp_path_factory.mktemp("catdog") / "data", files)


@pytest.fixture(scope="module")
def streets(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 scenes of CamVid to prove on, 8 to fit on."""
    source = shared_data / "camvid"
    if not source.is_dir():
        pytest.skip("CamVid is not in ../shared/data on this machine")
    files = [f for part, step in (("train", 40), ("val", 8)) for f in sorted((source / part).iterdir())[::step][:12]]
    files = [*files, *(source / f"{f.parent.name}annot" / f.name for f in files)]
    return copied(source, tmp_path_factory.mktemp("camvid") / "data", files)


# --- what is stored ---


def machine() -> dict[str, str]:
    """What the last bits of the numbers depend on."""
    packages = ("torch", "torchvision", "timm", "onnxruntime", "numpy", "scikit-learn", "pillow")
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def run_numbers(original: downres.Result, results: tuple[downres.Result, ...]) -> list[dict[str, Any]]:
    """Of every candidate all that is no time and no sentence; the original first."""
    found = []
    for result in (original, *results):
        row = {name: value for name, value in result.row().items() if name not in NOT_PINNED}
        row["ruled_out"] = bool(result.reason)
        row |= {"naive": result.naive and result.naive.to_json(), "drop": result.drop and result.drop.to_json()}
        if result.recovery is not None:
            row["tried"] = [{"rung": r.rung, "score": r.score, "n": r.n} for r in result.recovery.tried]
            row["tuning"] = result.recovery.tuning and result.recovery.tuning.to_json()
        found.append(row)
    return found


def before_shipping(what: str, done: int, total: int) -> None:
    """A progress that presses Ctrl-C when all is measured: an export takes as long as everything else."""
    if "shipping" in what:
        raise KeyboardInterrupt


def searched(model: Model, data: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """The numbers of a search."""
    options = {"runtime": "torch", "threads": 1, "progress": before_shipping} | options
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        downres.search(model, data, out=folder, **options)
    run = downres.load_run(folder)
    assert all(r.status == "measured" for r in (run.original, *run.results))
    document = run.to_json()
    assert document["candidates"] == [r.row() for r in run.results] and document["best"] == (run.best and run.best.row())
    return {"chosen": run.best and str(run.best.candidate), "candidates": run_numbers(run.original, run.results)}


def curved(model: Model, data: Path, *options: Any, **more: Any) -> dict[str, Any]:
    """The numbers of a curve."""
    found = downres.curve(model, data, *options, threads=1, **more)
    return {"candidates": run_numbers(found.original, found.results)}


def counted(*options: Any, **more: Any) -> dict[str, Any]:
    """The numbers of a table of costs."""
    found = downres.costs(*options, **more)
    return {str(row.candidate): {name: getattr(row.cost, name) for name in COUNTS} for row in found.rows}


def differences(stored: Any, found: Any, points: float, where: str = "") -> list[str]:
    """Where a found JSON value is not the stored one: whole numbers by anything, others by more than is allowed.

    What is found beside what is stored may be anything.
    """
    if isinstance(stored, dict) and isinstance(found, dict) and stored.keys() <= found.keys():
        return [line for name in stored for line in differences(stored[name], found[name], points, f"{where}/{name}")]
    if isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        pairs = enumerate(zip(stored, found, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, points, f"{where}/{i}")]
    if isinstance(stored, float) and isinstance(found, float):
        same = found == pytest.approx(stored, rel=RELATIVE, abs=points)
    else:
        same = type(stored) is type(found) and stored == found
    return [] if same else [f"{where}: {stored!r} was pinned, {found!r} was found"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """BatchNorm statistics are taken with torch's own threads, whose number decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pinned():
    """The stored document; while writing, a new one, written in the end."""
    if WRITING not in os.environ:
        yield json.loads(FILE.read_text())
        return
    last = ["git", "log", "-1", "--format=%h", "--", "src"]
    commit = subprocess.run(last, cwd=FILE.parents[1], capture_output=True, text=True)
    made = {"commit": commit.stdout.strip(), "date": datetime.date.today().isoformat(), "machine": machine()}
    document: dict[str, Any] = {"made": made, "numbers": {}}
    yield document
    FILE.write_text(json.dumps(document, indent=1) + "\n")


@pytest.fixture
def pin(pinned: dict[str, Any], request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare numbers with those stored for this test, or store them."""
    name = request.node.name.removeprefix("test_")

    def check(found: dict[str, Any], points: float = 0.0) -> None:
        if WRITING in os.environ:
            pinned["numbers"][name] = found
            return
        here, there = machine(), pinned["made"]["machine"]
        wrong = differences(pinned["numbers"][name], found, points)
        other = ", ".join(f"{key} {there[key]} and not {here[key]}" for key in there if there[key] != here[key])
        if wrong and other:
            # Another processor or library rounds sums in another order, which may move a prediction that is on the edge.
            pytest.skip(f"{len(wrong)} numbers differ, pinned with {other}: write them anew from the pinned commit")
        assert not wrong, "\n".join(wrong[:20])

    return check


# --- classification ---

SIZES = {"resolutions": [48, 32, 16], "stem_scales": (0.5,)}


def test_classifier_with_its_own_head(gratings, tmp_path, pin):
    pin(searched(stripes(), gratings / "split", tmp_path / "r", **SIZES, max_drop=5.0))


def test_classifier_with_its_own_head_cross_fitted(gratings, tmp_path, pin):
    pin(searched(stripes(), gratings / "whole", tmp_path / "r", **SIZES, folds=3, max_drop=10.0))


def test_classifier_with_a_fitted_head(gratings, tmp_path, pin):
    options = {"fit_head": True, "max_drop": 15.0, "runtime": "onnxruntime", "rungs": ("head",)}
    pin(searched(stripes(), gratings / "split", tmp_path / "r", resolutions=[32], stem_scales=(), **options))


def test_classifier_with_a_fitted_head_cross_fitted(gratings, tmp_path, pin):
    options = {"fit_head": True, "max_drop": 15.0, "folds": 3, "minimize": "memory"}
    pin(searched(stripes(), gratings / "whole", tmp_path / "r", **SIZES, **options))


def test_classifier_curve(gratings, pin):
    pin(curved(stripes(), gratings / "whole", [48, 32], stem_scales=(0.5,)))


TOKENS = {"resolutions": [48], "stem_scales": (0.5,), "patch_sizes": (16,), "merges": (0.5, "8-decreasing", "prune50%")}


def test_transformer(gratings, tmp_path, pin):
    pin(searched(small_vit(), gratings / "split", tmp_path / "r", **TOKENS, fit_head=True, max_drop=15.0))


def test_transformer_in_onnxruntime(gratings, tmp_path, pin):
    options = {"resolutions": (), "stem_scales": (), "patch_sizes": (), "merges": (16,), "rungs": (), "fit_head": True}
    pin(searched(small_vit(1), gratings / "split", tmp_path / "r", **options, max_drop=20.0, runtime="onnxruntime"))


def test_photographs(photographs, tmp_path, pin):
    model = drawn("timm:mobilenetv3_small_050", Preprocessing(128, 0.9, "bicubic"))
    options = {"resolutions": [64], "stem_scales": (), "fit_head": True, "max_drop": 5.0, "rungs": ("batchnorm", "head")}
    pin(searched(model, photographs, tmp_path / "r", **options))


# --- segmentation ---


def test_segmenter(segmenter, scenes, tmp_path, pin):
    options = {"resolutions": [(36, 48), (24, 32)], "stem_scales": (0.5,), "max_drop": 10.0}
    pin(searched(segmenter("rough"), scenes, tmp_path / "r", **options), POINTS)


def test_segmenter_in_onnxruntime(segmenter, scenes, tmp_path, pin):
    options = {"resolutions": [(36, 48)], "stem_scales": (), "max_drop": 15.0, "runtime": "onnxruntime"}
    pin(searched(segmenter("rough"), scenes, tmp_path / "r", **options), POINTS)


def test_segmenter_cross_fitted(shapes, segmenter, tmp_path, pin):
    root = shapes.write(tmp_path / "whole", train=0, val=60, sizes=((48, 64), (40, 64)))
    options = {"resolutions": [(36, 48)], "stem_scales": (), "folds": 3, "max_drop": 15.0}
    pin(searched(segmenter("rough", fit="pad"), root, tmp_path / "r", **options), POINTS)


def test_segmenter_curve(segmenter, scenes, pin):
    answer = {"label_size": (96, 128), "output": "classes", "upsampling": "bicubic"}
    pin(curved(segmenter("dictionary"), scenes, [(36, 48), (24, 32)], max_drop=5.0, **answer), POINTS)


def test_streets(streets, tmp_path, pin):
    torch.manual_seed(0)
    network = regseg(num_classes=11, width=0.25, depth=0.25)
    with torch.no_grad():
        for _ in range(20):  # with some statistics it answers more than one class
            network(torch.randn(4, 3, 64, 64))
    model = Model(network.eval(), Preprocessing((192, 256), fit="stretch"))
    options = {"resolutions": [128], "stem_scales": (), "max_drop": 5.0}
    pin(searched(model, streets, tmp_path / "r", **options), POINTS)


# --- costs ---


def test_costs_of_a_convnet(pin):
    pin(counted("torchvision:resnet18", [112], stem_scales=(0.5,)))


def test_costs_of_a_transformer(pin):
    pin(counted("timm:vit_tiny_patch16_224", [160], patch_sizes=(20,), merges=(8,), depths=(6,)))


def test_costs_of_a_segmentation_network(pin):
    model = drawn("torchvision:lraspp_mobilenet_v3_large", Preprocessing((256, 512), fit="stretch"))
    pin(counted(model, [(128, 256)], label_size=(512, 1024), output="classes"))


if __name__ == "__main__":
    os.environ[WRITING] = "1"
    sys.exit(pytest.main([__file__, "-rs"]))
