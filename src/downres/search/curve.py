"""Quality against resolution, patches and tokens: the model with its own weights, no search and no recovery."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from ..data import Dataset
from ..errors import DownresError
from ..families import Model
from ..measure.cost import measure_cost
from ..measure.quality import compare, count_correct, quality
from ..parse import Resolution
from ..records import Budget, Candidate, Merge, Preprocessing, Result
from ..recover.features import State, logits
from .plan import check_trained, make_axes, plan
from .task import Progress, prepare, prepare_model


@dataclasses.dataclass(frozen=True)
class Curve:
    """The original first, then a result for each candidate in the order asked for; every drop is a plain comparison."""

    original: Result
    results: tuple[Result, ...]
    preprocessing: Preprocessing
    data: str
    notes: tuple[str, ...]

    def to_json(self) -> dict:
        return {
            "data": self.data,
            "preprocessing": self.preprocessing.to_json(),
            "original": self.original.row(),
            "candidates": [r.row() for r in self.results],
            "notes": list(self.notes),
        }


def curve(
    model: Model | nn.Module | str,
    data: Dataset | str | Path,
    resolutions: Sequence[Resolution] = (),
    *,
    stem_scales: Sequence[float] = (),
    patch_sizes: Sequence[int] = (),
    merges: Sequence[Merge | int | float | str] = (),
    candidates: Sequence[Candidate | str] = (),
    ragged: str = "error",
    snap: bool = True,
    max_drop: float = 1.0,
    val_fraction: float = 1.0,
    preprocessing: Preprocessing | None = None,
    runtime: str = "torch",
    threads: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curve:
    """Top-1 of `model` at its own resolution and as each candidate, on the same images, decoded once.

    What is tried is given as in `search`: `resolutions`, `stem_scales`, `patch_sizes`, `merges`, `candidates`; nothing by
    default. A candidate that the network cannot be reduced to comes back as 'stopped', with the reason.

    Nothing is fitted, so every image of an undivided folder may be looked at; a `val_fraction` below 1 keeps to the
    images that `search` would prove on.

    The verdict says of each candidate alone whether its drop is within `max_drop` points; whoever picks one of many
    by it should use `search`, which pays for the number of looks.
    """
    axes = make_axes(resolutions, stem_scales, patch_sizes, merges, candidates, ragged)
    subject = prepare_model(model, data, preprocessing=preprocessing)
    planned, notes = plan(subject.design(), axes, snap)
    check_trained(planned)
    if not planned:
        raise DownresError("There is nothing to try: give for example resolutions below the original's, 96:256:32.")
    task = prepare(subject, data, val_fraction=val_fraction, parts=("val",), seed=seed, progress=progress)
    p = task.subject.model.preprocessing
    bank = task.fill(subject.bank(None, runtime=runtime, threads=threads, batch_size=batch_size, progress=progress))
    truth = task.data.labels[task.proof]
    results: list[Result] = []
    original = np.zeros(0, bool)
    for candidate in [task.subject.native, *planned]:
        state = State(candidate, p.crop_ratio)
        try:
            cost = measure_cost(bank.network(state), (len(p.mean), *bank.preprocessing_of(state).hw))
        except DownresError as error:
            if not results:
                raise
            results.append(Result(candidate, "stopped", str(error)))
            continue
        out = logits(bank.features(state, task.proof), task.subject.own_head)
        correct = count_correct(out, truth)
        correct5 = count_correct(out, truth, 5) if task.subject.outputs > 5 else None
        drop = compare(original, correct, Budget(max_drop)) if len(original) else None
        original = original if len(original) else correct
        results.append(Result(candidate, "measured", "", cost, None, None, quality(correct, correct5), drop))
    notes += [f"{len(task.data.skipped)} images skipped"] if task.data.skipped else []
    return Curve(results[0], tuple(results[1:]), p, task.data.description, tuple(notes))
