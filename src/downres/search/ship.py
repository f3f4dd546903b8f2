"""From the selected candidate to the artifact: its final weights, and what its stated quality was measured with."""

import copy

import numpy as np
import torch
from torch import nn

from ..artifact import export
from ..data import Fold
from ..environment import versions
from ..recover.features import FeatureBank, State
from ..recover.ladder import Recovered, Reference, climb, make_reference
from .results import Run
from .store import Store
from .task import Task


def reference_of(task: Task, bank: FeatureBank, index: int, fold: Fold, rungs: tuple[str, ...]) -> Reference:
    if not rungs and not task.fit_new:
        # Nothing to climb: the training images need not even be looked at.
        fold = Fold(np.zeros(0, np.int64), fold.test)
    return make_reference(
        bank, task.native_state, index, fold, len(task.data.folds), task.data.labels, task.own_head, task.outputs,
        task.fit_new, task.seed,
    )  # fmt: skip


def ship(task: Task, store: Store, bank: FeatureBank, run: Run, rungs: tuple[str, ...]) -> None:
    """Export the selected candidate: recovered on all training images, with what its stated quality was measured with."""
    best = run.best
    assert best is not None
    folds = task.data.folds
    crossed = len(folds) > 1
    reference = reference_of(task, bank, len(folds) if crossed else 0, task.everything() if crossed else folds[0], rungs)
    final = climb(bank, best.candidate, reference, task.data.labels, task.outputs, run.budget, rungs)
    states = [State.from_json(s) for s in store.get(f"quality/{best.candidate}")["states"]]
    heads = store.arrays(f"heads/{State(best.candidate, task.model.preprocessing.crop_ratio).key()}")
    export(
        store.folder / "best",
        final_network(task, bank, final),
        preprocessing=bank.preprocessing_of(final.state),
        result=best,
        original=run.original,
        classes=task.data.classes,
        source={
            "model": {
                "spec": task.model.spec,
                "weights": task.model.weights,
                "num_classes": task.outputs,
                "preprocessing": task.model.preprocessing.to_json(),
            },
            "data": {
                **store.settings["data_source"],
                "description": task.data.description,
                "licence": task.data.licence,
                "sha256": task.data.fingerprint(),
                "fit_head": task.fit_new,
                "seed": task.seed,
            },
        },
        folds=[{"crop_ratio": s.crop_ratio, "recalibrated": s.calibration is not None} for s in states] if crossed else (),
        fold_tensors=_fold_tensors(task, bank, states, heads) if crossed else None,
        versions=versions(),
    )


def final_network(task: Task, bank: FeatureBank, final: Recovered) -> nn.Module:
    """The torch network of a recovered candidate, head included."""
    network = copy.deepcopy(bank.network(final.state))
    if final.head is not None and task.head is not None:
        linear = nn.Linear(task.width, task.outputs)
        linear.weight.data, linear.bias.data = (
            torch.from_numpy(final.head.weight.copy()),
            torch.from_numpy(final.head.bias.copy()),
        )
        network.set_submodule(task.head, linear)
    return network


def _fold_tensors(task: Task, bank: FeatureBank, states: list[State], heads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For every fold the tensors, by their names in the state dict, in which it differs from the shipped network."""
    tensors: dict[str, np.ndarray] = {}
    for i, state in enumerate(states):
        if task.head is not None:
            tensors |= {f"{i}/{task.head}.{part}": heads[f"{part}{i}"] for part in ("weight", "bias")}
        if state.calibration is not None:
            buffers = bank.network(state).named_buffers()
            tensors |= {f"{i}/{name}": b.numpy() for name, b in buffers if name.endswith(("running_mean", "running_var"))}
    return tensors
