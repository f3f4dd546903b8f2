"""From the selected candidate to the artifact: its final weights, and what its stated quality was measured with."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import export
from ..artifacts.proof import distance, parity_images
from ..environment import versions
from ..errors import DownresError
from ..parse import FP32, INT8, format_quantity
from ..recovery.bank import Bank
from ..recovery.state import DISTILLED, FINETUNED, FIXRES, QUANTIZED, RECALIBRATED, REFITTED, ROUNDED, SWITCHED, State
from ..tasks import Task
from .results import Run
from .store import Store

STEPS = {
    RECALIBRATED: "statistics of BatchNorm averaged anew",
    REFITTED: "the last linear layer fitted anew",
    DISTILLED: "all weights trained to answer as the original's",
    FIXRES: "all weights trained on labels, the head and the last normalisation first",
    FINETUNED: "all weights trained on labels",
    ROUNDED: "all weights trained to answer as the original's while they are rounded to 8 bits",
    SWITCHED: "all weights trained to answer as the original's at several resolutions",
    QUANTIZED: "brought to 8 bits",
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
    stems = _stems(state, states) if crossed else {}
    export(
        store.folder / "best",
        bank.network(state),
        task,
        partial(
            _write, task, bank, state, {stems[_file(s)]: s for s in states if _file(s) in stems}, run.budget.max_size_bytes
        ),
        preprocessing=bank.preprocessing_of(state),
        state=state,
        result=best,
        recovery=recovery,
        original=run.original,
        source=source_of(task, store, state, store.get(f"quality/{best.candidate}").get("proof")),
        folds=[
            {"crop_ratio": s.crop_ratio, "recalibrated": r, **({"stem": stem} if (stem := stems.get(_file(s))) else {})}
            for s, r in zip(states, recalibrated, strict=True)
        ]
        if crossed
        else (),
        fold_tensors=_fold_tensors(bank, state, states) if crossed else None,
        versions=versions(),
    )


def source_of(task: Task, store: Store, state: State, proof: dict[str, Any] | None = None) -> dict[str, Any]:
    """Where what is shipped came from, as its manifest says it. proof: of rounds, on how many images."""
    model = {
        "spec": task.model.spec,
        "weights": task.model.weights,
        "outputs": task.outputs,
        "num_classes": task.model.num_classes,
        "preprocessing": task.model.preprocessing.to_json(),
        "changed": changed(task, state),
    }
    shown = {"proof": proof["images"]} if proof else {}
    return {"model": model, "data": {**store.settings["data_source"], **store.get("data"), **shown}}


def _file(state: State) -> State:
    """What the file of a state depends on but for its head, which is of float and can be replaced in it."""
    return state.without(REFITTED)


def _stems(shipped: State, states: Sequence[State]) -> dict[State, str]:
    """What stands in files of their own, by name: folds whose 8-bit file is another one than the shipped."""
    own = dict.fromkeys(_file(s) for s in states if s.step(QUANTIZED) and _file(s) != _file(shipped))
    return {file: f"fold{i}" for i, file in enumerate(own)}


class Unshipped(DownresError):
    """What was proven, and is not what would ship; why in words."""


def _write(task: Task, bank: Bank, state: State, others: Mapping[str, State], most: int | None, folder: Path) -> dict[str, Any]:
    """Writes the file that runs and those of folds; says what it is. most: bytes that it may have. Raises Unshipped where it
    has more, or does not answer as what was measured did.
    """
    engine = bank.ship(state, folder, task.serve, task.output_name)
    for stem, other in others.items():
        bank.ship(other, folder, task.serve, task.output_name, stem)
    precision, file = state.candidate.precision, folder / engine.file
    taken = sum(one.stat().st_size for one in engine.files(file))
    if most is not None and taken > most:
        raise Unshipped(f"its file of {format_quantity(taken, 'B')} is over the {format_quantity(most, 'B')} allowed")
    said: dict[str, Any] = {"name": engine.text, "precision": precision, "file_bytes": taken}
    if precision == FP32:
        return said
    p, chosen = bank.preprocessing_of(state), parity_images(task)
    runtime = engine.load(file, bank.threads, precision=precision, spread=True)
    if bank.output_names != (task.output_name,):  # what was judged is another file, with features
        answers = (runtime(np.asarray(batch))[0] for batch in bank.batches(state, chosen, task.batch_size))
        ours = task.judge((answer for part in answers for answer in part), chosen, p)
        judged = task.evidence(bank, state, chosen)
        if not np.allclose(task.points(ours), task.points(judged), rtol=1e-2, atol=1e-6):
            raise Unshipped(f"its {precision} file answers otherwise than what was judged")
    apart = distance(task, bank.network(state), runtime, chosen, p)
    layers = engine.layers(file).to_json() if precision == INT8 else None
    return said | {"layers": layers, "distance": apart}


def changed(task: Task, state: State) -> list[str]:
    """What parts the shipped network from the one that `source` names: pixels and tokens, the crop, and the weights."""
    said = [] if state.candidate == task.native else [f"reduced to {state.candidate}, from {task.native}"]
    if state.crop_ratio != task.native_state.crop_ratio:
        said.append(f"crop ratio {state.crop_ratio:g}, from {task.native_state.crop_ratio:g}")
    return said + [f"{STEPS.get(step.done, step.done)} on {step.images} images" for step in state.history]


def _fold_tensors(bank: Bank, shipped: State, states: Sequence[State]) -> dict[str, np.ndarray]:
    """For every fold the tensors, by their names in the state dict, in which it may differ from the shipped network."""
    every = [step for state in (shipped, *states) for step in state.history]
    in_8_bits = shipped.step(QUANTIZED) is not None  # such a file has all but the head in its own weights
    kept = [step for step in every if step.tensors and (not in_8_bits or step.done == REFITTED)]
    names = {name for step in kept for name in bank.weights.get(step.tensors)}
    recalibrated = any(step.done == RECALIBRATED for step in every) and not in_8_bits
    tensors: dict[str, np.ndarray] = {}
    for i, state in enumerate(states):
        for name, tensor in bank.network(state).state_dict().items():
            # One fold's statistics differ, so all of them are told apart.
            if name in names or (recalibrated and name.endswith(("running_mean", "running_var"))):
                tensors[f"{i}/{name}"] = tensor.detach().numpy()
    return tensors
