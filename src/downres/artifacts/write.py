"""Writing an artifact: the graph of its runtime (model.onnx, or model.xml and model.bin; the small input, batch free),
model.safetensors (the same weights for torch), manifest.json, serve.py (a program that needs nothing else), proof.json (which
images were the proof) and, where the quality was cross-fitted, folds.safetensors (the tensors that it was measured with). Of a
model for several resolutions a graph (model-160.onnx) and the tensors of its own (model-160.safetensors) for each but the
first, and weights.bin, where all graphs have their large tensors.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from .manifest import FORMAT, PROOF, SERVE, part_stem, write_manifest
from .serving import output_of, program, proof_of, steps, takes_numbers


@dataclass(frozen=True)
class Shipped:
    """A network (final weights; takes the small input) as it is used at one resolution."""

    network: nn.Module
    preprocessing: Preprocessing
    state: State
    result: Result


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
    others: Sequence[Shipped] = (),
    more: dict[str, Any] | None = None,
) -> Path:
    """Write the artifact of `network` (final weights; takes the small input) to `folder`, whole or not at all.

    graph: writes the file that runs, and what belongs to it, into a folder and says what it is: the manifest's `runtime`.
    result: as the search measured it; recovery: how these very weights were recovered, which after cross-fitting is
    one more fit on all images. source: 'model' (how to build the network again), 'data' (how to open the proof images again).
    state: what was done to the weights. The task says what the graph returns, and what else of it is needed to use the file.
    folds: how the stated quality was measured, fold by fold, when not with the shipped weights themselves. others: the same
    model at more resolutions, whose graphs `graph` has written, too. more: what else the manifest says.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    runtime = graph(partial)
    weights = _weights(network)
    (partial / "model.safetensors").write_bytes(save(weights))  # whose errors of a full disk are the system's own
    for one in others:
        own = {k: v for k, v in _weights(one.network).items() if k not in weights or not torch.equal(v, weights[k])}
        (partial / f"{part_stem(one.result.candidate)}.safetensors").write_bytes(save(own))
    if targets := task.targets():
        np.savez_compressed(partial / "targets.npz", **targets)  # type: ignore[arg-type]
    if fold_tensors:
        folds_own = save({k: torch.from_numpy(v).contiguous() for k, v in fold_tensors.items()})
        (partial / "folds.safetensors").write_bytes(folds_own)
    numbers = takes_numbers(task, preprocessing)
    served = engine_of(runtime["name"]), runtime["precision"]
    (partial / SERVE).write_text(program(task, preprocessing, numbers, *served, several=bool(others)))
    (partial / PROOF).write_text(write_json(proof_of(task)).replace("], [", "],\n["))
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
        settled(file)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **_part(task, Shipped(network, preprocessing, state, result), numbers),
        "runtime": runtime,
        "task": task.described(),
        **task.facts(),
        "original": original.to_json(),
        "recovery": recovery.to_json(),
        "source": source,
        "folds": list(folds),
        **({"resolutions": [_part(task, o, numbers, part_stem(o.result.candidate)) for o in others]} if others else {}),
        **(more or {}),
        "versions": versions or {},
        "sha256": {file.name: sha256(file) for file in sorted(partial.iterdir())},
    }
    write_manifest(partial, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}


def _part(task: Task, one: Shipped, numbers: bool, stem: str = "") -> dict[str, Any]:
    """What a manifest says of the model at one resolution. stem: of its graph's file, '' where that is the manifest's own."""
    p = one.preprocessing
    return {
        **({"stem": stem} if stem else {}),
        "candidate": one.result.candidate.to_json(),
        "input": {"name": "input", "shape": ["batch", len(p.mean), *p.hw], "dtype": "float32", "layout": "NCHW"},
        "output": output_of(task, p),
        "steps": steps(p, numbers),
        "preprocessing": p.to_json(),
        "state": one.state.to_json(),
        "result": one.result.to_json(),
    }
