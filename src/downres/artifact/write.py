"""Writing an artifact: model.onnx (the small input, batch free), model.safetensors (the same weights for torch),
manifest.json and, where the quality was cross-fitted, folds.safetensors (the tensors that it was measured with).
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ..probe import logits_of
from ..records import CLASSES, LOGITS, Dense, Preprocessing, Recovery, Result
from ..reductions.dense import Segmenter
from ..runtimes.onnxruntime import export_onnx
from .manifest import FORMAT, sha256


def answering(network: nn.Module, dense: Dense | None) -> nn.Module:
    """The network as it is shipped: bare logits, of a segmentation network at full size."""
    return _Logits(network) if dense is None else Segmenter(network, dense)


def output_name(dense: Dense | None) -> str:
    return LOGITS if dense is None else dense.output


def _output_shape(dense: Dense | None, classes: int) -> list[Any]:
    if dense is None:
        return ["batch", classes]
    return ["batch", *dense.size] if dense.output == CLASSES else ["batch", classes, *dense.size]


class _Logits(nn.Module):
    """A classifier that returns the bare logits, whatever the model wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model(x))


def export(
    folder: Path,
    network: nn.Module,
    *,
    preprocessing: Preprocessing,
    result: Result,
    original: Result,
    recovery: Recovery,
    classes: Sequence[str],
    source: dict[str, Any],
    colours: Sequence[tuple[int, int, int]] = (),
    dense: Dense | None = None,
    folds: Sequence[dict[str, Any]] = (),
    fold_tensors: dict[str, np.ndarray] | None = None,
    versions: dict[str, str] | None = None,
) -> Path:
    """Write the artifact of `network` (final weights; takes the small input) to `folder`, whole or not at all.

    result: as the search measured it; recovery: how these very weights were recovered, which after cross-fitting is
    one more fit on all images. source: 'model' (how to build the network again), 'data' (how to open the proof images again).
    Of a segmentation network dense: its full-size answer, which is what the graph returns; colours: RGB, one a class.
    folds: how the stated quality was measured, fold by fold, when not with the shipped weights themselves.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = (len(preprocessing.mean), *preprocessing.hw)
    export_onnx(answering(network, dense), size, partial / "model.onnx", (output_name(dense),))
    save_file({k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}, partial / "model.safetensors")
    if fold_tensors:
        save_file({k: torch.from_numpy(v).contiguous() for k, v in fold_tensors.items()}, partial / "folds.safetensors")
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "candidate": result.candidate.to_json(),
        "input": {"name": "input", "shape": ["batch", *size], "dtype": "float32"},
        "output": {"name": output_name(dense), "shape": _output_shape(dense, len(classes))},
        "dense": dense and dense.to_json(),
        "preprocessing": preprocessing.to_json(),
        "classes": list(classes),
        "colours": [list(colour) for colour in colours],
        "result": result.to_json(),
        "original": original.to_json(),
        "recovery": recovery.to_json(),
        "source": source,
        "folds": list(folds),
        "versions": versions or {},
        "sha256": {file.name: sha256(file) for file in sorted(partial.iterdir())} | {"manifest.json": ""},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    manifest["sha256"]["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder
