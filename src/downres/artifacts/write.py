"""Writing an artifact: the graph of its runtime (model.onnx, or model.xml and model.bin; the small input, batch free),
model.safetensors (the same weights for torch), manifest.json, serve.py (a program that needs nothing else), proof.json (which
images were the proof) and, where the quality was cross-fitted, folds.safetensors (the tensors that it was measured with).
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from ..engines.engine import engine_of
from ..record import settled, sha256, write_json
from ..records import Preprocessing, Recovery, Result
from ..recovery.state import State
from ..tasks import Task
from .manifest import FORMAT, PROOF, SERVE, write_manifest
from .serving import output_of, program, proof_of, steps, takes_numbers


def export(
    folder: Path,
    network: nn.Module,
    task: Task,
    graph: Callable[[Path], dict[str, Any]],
    *,
    preprocessing: Preprocessing,
    state: State,
    result: Result,
    original: Result,
    recovery: Recovery,
    source: dict[str, Any],
    folds: Sequence[dict[str, Any]] = (),
    fold_tensors: dict[str, np.ndarray] | None = None,
    versions: dict[str, str] | None = None,
) -> Path:
    """Write the artifact of `network` (final weights; takes the small input) to `folder`, whole or not at all.

    graph: writes the file that runs, and what belongs to it, into a folder and says what it is: the manifest's `runtime`.
    result: as the search measured it; recovery: how these very weights were recovered, which after cross-fitting is
    one more fit on all images. source: 'model' (how to build the network again), 'data' (how to open the proof images again).
    state: what was done to the weights. The task says what the graph returns, and what else of it is needed to use the file.
    folds: how the stated quality was measured, fold by fold, when not with the shipped weights themselves.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = (len(preprocessing.mean), *preprocessing.hw)
    runtime = graph(partial)
    weights = {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
    (partial / "model.safetensors").write_bytes(save(weights))  # whose errors of a full disk are the system's own
    if targets := task.targets():
        np.savez_compressed(partial / "targets.npz", **targets)  # type: ignore[arg-type]
    if fold_tensors:
        folds_own = save({k: torch.from_numpy(v).contiguous() for k, v in fold_tensors.items()})
        (partial / "folds.safetensors").write_bytes(folds_own)
    numbers = takes_numbers(task, preprocessing)
    (partial / SERVE).write_text(program(task, preprocessing, numbers, engine_of(runtime["name"]), runtime["precision"]))
    (partial / PROOF).write_text(write_json(proof_of(task)).replace("], [", "],\n["))
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
        settled(file)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "candidate": result.candidate.to_json(),
        "input": {"name": "input", "shape": ["batch", *size], "dtype": "float32", "layout": "NCHW"},
        "output": output_of(task, preprocessing),
        "steps": steps(preprocessing, numbers),
        "runtime": runtime,
        "task": task.described(),
        "preprocessing": preprocessing.to_json(),
        **task.facts(),
        "state": state.to_json(),
        "result": result.to_json(),
        "original": original.to_json(),
        "recovery": recovery.to_json(),
        "source": source,
        "folds": list(folds),
        "versions": versions or {},
        "sha256": {file.name: sha256(file) for file in sorted(partial.iterdir())},
    }
    write_manifest(partial, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder
