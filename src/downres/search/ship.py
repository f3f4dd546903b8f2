"""From the selected candidate to the artifact: its final weights, and what its stated quality was measured with."""

import copy
import dataclasses

import numpy as np
import torch
from torch import nn

from ..artifact import export
from ..data import Fold
from ..environment import versions
from ..recover.bank import State
from ..recover.features import FeatureBank
from ..recover.head import Head
from ..recover.ladder import Recovered, Reference, climb, make_reference
from ..recover.masks import MaskBank
from .results import Run
from .store import Store
from .task import Task


def reference_of(task: Task, bank: FeatureBank, index: int, fold: Fold, rungs: tuple[str, ...]) -> Reference:
    if not rungs and not task.subject.fit_new:
        # Nothing to climb: the training images need not even be looked at.
        fold = Fold(np.zeros(0, np.int64), fold.test)
    return make_reference(
        bank, task.subject.native_state, index, fold, len(task.data.folds), task.labels,
        task.subject.own_head, task.subject.outputs,
        task.subject.fit_new, task.seed,
    )  # fmt: skip


def ship(task: Task, store: Store, bank: FeatureBank | MaskBank, run: Run, rungs: tuple[str, ...]) -> None:
    """Export the selected candidate.

    After a single split that is the very network that was proven. After cross-fitting it is fitted once more, on all
    images, and the tensors of each fold go with it, so that the stated quality can be measured again.
    """
    best = run.best
    assert best is not None and best.recovery is not None
    folds = task.data.folds
    crossed = len(folds) > 1
    states = [State.from_json(s) for s in store.get(f"quality/{best.candidate}")["states"]]
    native = State(best.candidate, task.subject.model.preprocessing.crop_ratio)
    heads = store.arrays(f"heads/{native.key()}") if task.subject.dense is None else {}
    if isinstance(bank, MaskBank):
        # After cross-fitting, BatchNorm statistics of all images where most folds wanted them.
        wanted = sum(state.calibration is not None for state in states) * 2 > len(states)
        state = dataclasses.replace(native, calibration=len(folds) if wanted else None) if crossed else states[0]
        rung = "none" if state.calibration is None else "batchnorm"
        final = Recovered(state, None, dataclasses.replace(best.recovery, rung=rung))
    elif crossed:
        reference = reference_of(task, bank, len(folds), task.everything(), rungs)
        final = climb(bank, best.candidate, reference, task.labels, task.subject.outputs, run.budget, rungs)
    else:
        head = Head(heads["weight0"], heads["bias0"]) if heads else None
        final = Recovered(states[0], head, best.recovery)
    export(
        store.folder / "best",
        final_network(task, bank, final),
        preprocessing=bank.preprocessing_of(final.state),
        result=best,
        recovery=final.recovery,
        original=run.original,
        classes=task.data.classes,
        colours=getattr(task.data, "colours", ()),
        dense=task.subject.dense,
        source={
            "model": {
                "spec": task.subject.model.spec,
                "weights": task.subject.model.weights,
                "num_classes": task.subject.outputs,
                "dense": task.subject.dense and task.subject.dense.to_json(),
                "preprocessing": task.subject.model.preprocessing.to_json(),
            },
            "data": {
                **store.settings["data_source"],
                **store.get("data"),
                "fit_head": task.subject.fit_new,
            },
        },
        folds=[{"crop_ratio": s.crop_ratio, "recalibrated": s.calibration is not None} for s in states] if crossed else (),
        fold_tensors=_fold_tensors(task, bank, final.state, states, heads) if crossed else None,
        versions=versions(),
    )


def final_network(task: Task, bank: FeatureBank | MaskBank, final: Recovered) -> nn.Module:
    """The torch network of a recovered candidate, head included."""
    network = copy.deepcopy(bank.network(final.state))
    if final.head is not None and task.subject.head is not None:
        linear = nn.Linear(task.subject.width, task.subject.outputs)
        linear.weight.data, linear.bias.data = (
            torch.from_numpy(final.head.weight.copy()),
            torch.from_numpy(final.head.bias.copy()),
        )
        network.set_submodule(task.subject.head, linear)
    return network


def _fold_tensors(
    task: Task, bank: FeatureBank | MaskBank, shipped: State, states: list[State], heads: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """For every fold the tensors, by their names in the state dict, in which it may differ from the shipped network."""
    tensors: dict[str, np.ndarray] = {}
    recalibrated = any(state.calibration is not None for state in (shipped, *states))
    for i, state in enumerate(states):
        if task.subject.head is not None:
            tensors |= {f"{i}/{task.subject.head}.{part}": heads[f"{part}{i}"] for part in ("weight", "bias")}
        if recalibrated:  # one fold's statistics differ, so all of them are told apart
            buffers = bank.network(state).named_buffers()
            tensors |= {f"{i}/{name}": b.numpy() for name, b in buffers if name.endswith(("running_mean", "running_var"))}
    return tensors
