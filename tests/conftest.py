"""Fixtures for all tests."""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from downres import Dataset, Model, Preprocessing, load_model, search
from downres.cli import main
from downres.images import cross_folds, split_once
from downres.images.images import from_arrays as images_of
from downres.record import Record
from downres.tasks.classification.folders import from_arrays

# Torch, timm and transformers are millions of objects that stay: to look through them for garbage at every turn is a tenth of
# the suite's time.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real photographs of ../shared/data are not on this machine")
    return folder


TINY = '''
"""A small network whose features are fixed random filters: stride 4, BatchNorm, a linear head."""
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, classes=2, norm=True):
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
        self.body = nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d)))
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def make(classes=2, norm=True):
    torch.manual_seed(0)
    return Tiny(classes, norm).eval()


def without_norm():
    return make(norm=False)


def nan():
    model = make()
    model.head.weight.data.fill_(float("nan"))
    return model
'''


@dataclass(frozen=True)
class Cells:
    """A balanced part of the real photographs of solar cells: pictures (n, side, side) uint8, labels 0 or 1."""

    pictures: np.ndarray
    labels: np.ndarray

    def dataset(self, folds: int = 1, flip: np.ndarray | None = None) -> Dataset:
        """One split, or cross-fitted; the split is that of the true labels even where `flip` names labels to be wrong."""
        divided = cross_folds(self.labels, folds, 0) if folds > 1 else (split_once(self.labels, 0.5, 0),)
        labels = self.labels.copy()
        if flip is not None:
            labels[flip] = 1 - labels[flip]
        names = [f"cell {i}" for i in range(len(labels))]
        return from_arrays(images_of(self.pictures, names), labels, ("intact", "defective"), divided, "Solar cells.", "CC")

    def write(self, root: Path, parts: tuple[str, ...] = ("train", "val")) -> Path:
        """The pictures as class folders of PNG files, dealt in turn to the parts."""
        for i, (picture, label) in enumerate(zip(self.pictures, self.labels, strict=True)):
            folder = root / parts[i % len(parts)] / ("intact", "defective")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{i:04d}.png")
        return root


def _balanced(each: int, side: int | None) -> Cells:
    """Read from the package's own files: `open_elpv` would decode all 2624 of them."""
    data = Path(importlib.import_module("elpv_dataset").__file__ or "").parent / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    labels = (np.array([float(probability) for _, probability, _ in rows]) > 0.5).astype(np.int64)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:each] for label in (0, 1)]))
    pictures = [Image.open(data / rows[i][0]) for i in chosen]
    if side is not None:
        pictures = [picture.resize((side, side), Image.Resampling.BOX) for picture in pictures]
    return Cells(np.stack([np.asarray(picture) for picture in pictures]), labels[chosen])


@pytest.fixture(scope="session")
def cells() -> Cells:
    """160 photographs at 48×48, for the tiny network."""
    pytest.importorskip("elpv_dataset", reason="the photographs come with downres[demo]")
    return _balanced(80, 48)


@pytest.fixture(scope="session")
def large_cells() -> Cells:
    """200 photographs as they are, 300×300, for the real network."""
    pytest.importorskip("elpv_dataset", reason="the photographs come with downres[demo]")
    return _balanced(100, None)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own file with networks in it."""
    file = tmp_path_factory.mktemp("own") / "tiny.py"
    file.write_text(TINY)
    return file


@pytest.fixture(scope="session")
def tiny_preprocessing() -> Preprocessing:
    return Preprocessing(48, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def tiny(tiny_file: Path, tiny_preprocessing: Preprocessing) -> Model:
    """The tiny network as a loaded model at 48 px."""
    loaded = load_model(f"{tiny_file}:make")
    return dataclasses.replace(loaded, preprocessing=tiny_preprocessing)


@pytest.fixture(scope="session")
def shipped(
    tiny_file: Path, tiny_preprocessing: Preprocessing, cells: Cells, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Dataset, Model]:
    """(folder, data set, model) of a tiny network from a user's file, fitted and proven on one split, and shipped."""
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    dataset = cells.dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        run = search(
            model, dataset, fit_head=True, max_drop=40.0, resolutions=[32], stem_scales=(), runtime="torch", threads=1,
            out=tmp_path_factory.mktemp("tiny") / "run",
        )  # fmt: skip
    assert run.artifact is not None
    return run.artifact, dataset, model


def _beside(name: str) -> ModuleType:
    """A module in this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports of the very same network with the very same weights are made once (tests/exports.py)."""
    exports = _beside("exports")
    before = exports.patch(exports.once(tmp_path_factory.mktemp("exports")))
    yield
    for module, export in before.items():
        module.export_onnx = export  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def shapes() -> ModuleType:
    """tests/shapes.py: scenes with masks and networks that find them."""
    return _beside("shapes")


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand documents that differ in one value each, what is the same is turned into records once."""
    known: dict[tuple[type, str], Any] = {}
    read = vars(Record)["from_json"].__func__

    def from_json(kind: type, values: Any) -> Any:
        key = kind, json.dumps(values)
        if key not in known:
            known[key] = read(kind, values)
        return known[key]

    monkeypatch.setattr(Record, "from_json", classmethod(from_json))


@pytest.fixture(scope="session")
def damage() -> ModuleType:
    """tests/damage.py: JSON documents with one value changed."""
    return _beside("damage")


@pytest.fixture(scope="session")
def scenes(shapes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 scenes to fit on and 16 to prove on, 48×64, as folders of images and palette masks."""
    return shapes.write(tmp_path_factory.mktemp("scenes"), train=44, val=16)


@pytest.fixture(scope="session")
def segmenter(shapes: ModuleType) -> Callable[..., Model]:
    """A network of tests/shapes.py, by its function there, as a loaded model at 48×64."""

    def load(name: str = "make", **preprocessing: Any) -> Model:
        given = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "fit": "stretch", "resolution": shapes.HW} | preprocessing
        model = load_model(f"{shapes.__file__}:{name}")
        return dataclasses.replace(model, preprocessing=Preprocessing(**given))

    return load


class Done:
    """How a command ended: code, out, err."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)  # exactly one document, nothing around it


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command in this process, as the entry point does."""

    def run(*arguments: Any) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["downres", *(str(a) for a in arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code: Any = 0
        with warnings.catch_warnings():
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err + out
        return Done(code, out, err)

    return run


@pytest.fixture(scope="session")
def printed() -> Callable[..., tuple[str, str]]:
    """Runs a command in this process; all that it wrote to the two outputs, whoever of its libraries did so."""

    def run(*arguments: Any) -> tuple[str, str]:
        said = []
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, pytest.MonkeyPatch.context() as patch:
            before = os.dup(1), os.dup(2)
            try:
                for number, file, name in ((1, out, "stdout"), (2, err, "stderr")):
                    os.dup2(file.fileno(), number)
                    patch.setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
                patch.setattr(sys, "argv", ["downres", *map(str, arguments)])
                with contextlib.suppress(SystemExit), warnings.catch_warnings():
                    main()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                for number, kept in zip((1, 2), before, strict=True):
                    os.dup2(kept, number)
                    os.close(kept)
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode())
        return said[0], said[1]

    return run


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that Ctrl-C ends, also where this one was started in the background of a shell and ignores it.

    The process ends with the test, and after two minutes.
    """
    processes: list[tuple[subprocess.Popen, threading.Timer]] = []

    def start(command: list[Any], **options: Any) -> subprocess.Popen:
        process = subprocess.Popen(
            list(map(str, command)), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
        )
        processes.append((process, threading.Timer(120, process.kill)))
        processes[-1][1].start()
        return process

    yield start
    for process, timer in processes:
        timer.cancel()
        process.kill()
        process.communicate()


BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """Chromium, started once: two of Playwright's drivers cannot run in one process."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the playwright package")
    found = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if found is None:
        pytest.skip("the browser test needs chromium or google-chrome on the path")
    with playwright.sync_playwright() as driver:
        chrome = driver.chromium.launch(executable_path=found, args=[*BROWSER_OPTIONS, "--no-first-run"])
        yield chrome
        chrome.close()


@pytest.fixture
def open_page(browser):
    """Opens an address at a width and in a colour scheme; fails on any request to the network or console error."""
    contexts, troubles = [], []

    def opened(address: str, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)

        def check(route):
            if not route.request.url.startswith(("file:", "data:", "blob:")):
                troubles.append(f"request {route.request.url}")
            route.continue_()

        context.route("**/*", check)
        page = context.new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.goto(address)
        page.wait_for_selector("#plot .scatterlayer .point")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


COLLISIONS = """(plot) => {
    const all = (selector) => [...document.querySelectorAll(selector.replaceAll("#", plot + " "))].map(
        (e) => [e.textContent || "a point", e.getBoundingClientRect()]);
    const names = all("#.labels text"), others = all("#.scatterlayer .point, #.xtick text, #.ytick text");
    const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    return names.flatMap(([name, a], i) =>
        [...names.slice(i + 1), ...others].filter(([, b]) => meet(a, b)).map(([other]) => `${name} on ${other}`)) }"""


@pytest.fixture
def collisions():
    """Names in a picture of a page that lie on another, on a point or on the numbers of an axis."""
    return lambda page, plot="#plot": page.evaluate(COLLISIONS, plot)


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of a CSS colour `rgb(…)`."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture
def contrast():
    """WCAG 2's contrast ratio of two CSS colours."""

    def ratio(a: str, b: str) -> float:
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    return ratio
