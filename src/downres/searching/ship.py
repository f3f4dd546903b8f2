"""From the selected candidate to the artifact: its final weights, and what its stated quality was measured with."""

from collections.abc import Sequence

import numpy as np

from ..artifacts import export
from ..environment import versions
from ..recovery.bank import Bank
from ..recovery.state import RECALIBRATED, REFITTED, State
from ..tasks import Task
from .results import Run
from .store import Store

STEPS = {
    RECALIBRATED: "statistics of BatchNorm averaged anew",
    REFITTED: "the last linear layer fitted anew",
}


def ship(task: Task, store: Store, bank: Bank, run: Run, rungs: tuple[str, ...]) -> None:
    """Export the selected candidate.

    After a single split that is the very network that was proven. After cross-fitting it is fitted once more, on all
    images, and the tensors of each fold go with it, so that the stated quality can be measured again.
    """
    best = run.best
    assert best is not None and best.recovery is not None
    states = [State.from_json(s) for s in store.get(f"quality/{best.candidate}")["states"]]
    crossed = len(states) > 1
    bank.count_anew()  # the manifest of a resumed run says what that of an uninterrupted one says
    state, recovery = task.final(bank, best.candidate, states, best.recovery, run.budget, rungs)
    recalibrated = [s.step(RECALIBRATED) is not None for s in states]
    export(
        store.folder / "best",
        bank.network(state),
        task,
        preprocessing=bank.preprocessing_of(state),
        state=state,
        result=best,
        recovery=recovery,
        original=run.original,
        source={
            "model": {
                "spec": task.model.spec,
                "weights": task.model.weights,
                "outputs": task.outputs,
                "num_classes": task.model.num_classes,
                "preprocessing": task.model.preprocessing.to_json(),
                "changed": changed(task, state),
            },
            "data": {**store.settings["data_source"], **store.get("data")},
        },
        folds=[{"crop_ratio": s.crop_ratio, "recalibrated": r} for s, r in zip(states, recalibrated, strict=True)]
        if crossed
        else (),
        fold_tensors=_fold_tensors(bank, state, states) if crossed else None,
        versions=versions(),
    )


def changed(task: Task, state: State) -> list[str]:
    """What parts the shipped network from the one that `source` names: pixels and tokens, the crop, and the weights."""
    said = [] if state.candidate == task.native else [f"reduced to {state.candidate}, from {task.native}"]
    if state.crop_ratio != task.native_state.crop_ratio:
        said.append(f"crop ratio {state.crop_ratio:g}, from {task.native_state.crop_ratio:g}")
    return said + [f"{STEPS.get(step.done, step.done)} on {step.images} images" for step in state.history]


def _fold_tensors(bank: Bank, shipped: State, states: Sequence[State]) -> dict[str, np.ndarray]:
    """For every fold the tensors, by their names in the state dict, in which it may differ from the shipped network."""
    every = [step for state in (shipped, *states) for step in state.history]
    names = {name for step in every if step.tensors for name in bank.weights.get(step.tensors)}
    recalibrated = any(step.done == RECALIBRATED for step in every)
    tensors: dict[str, np.ndarray] = {}
    for i, state in enumerate(states):
        for name, tensor in bank.network(state).state_dict().items():
            # One fold's statistics differ, so all of them are told apart.
            if name in names or (recalibrated and name.endswith(("running_mean", "running_var"))):
                tensors[f"{i}/{name}"] = tensor.detach().numpy()
    return tensors
