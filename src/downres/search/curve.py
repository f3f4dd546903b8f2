"""Quality against resolution, patches and tokens: the model with its own weights, no search and no recovery."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..axes import Axes, axes_of
from ..errors import DownresError
from ..families import Model
from ..measure.cost import measure_cost
from ..parse import Resolution
from ..records import Budget, Candidate, Merge, Preprocessing, Result
from ..recover.bank import State
from .plan import plan
from .select import Evidence, verdicts
from .single import quality_of
from .task import Data, Progress, check_planned, prepare, prepare_model, with_classes


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
    data: Data,
    resolutions: Sequence[Resolution] = (),
    *,
    stem_scales: Sequence[float] = (),
    patch_sizes: Sequence[int] = (),
    merges: Sequence[Merge | int | float | str] = (),
    candidates: Sequence[Candidate | str] = (),
    ragged: str = "error",
    tries: Axes | None = None,
    snap: bool = True,
    max_drop: float = 1.0,
    val_fraction: float = 1.0,
    preprocessing: Preprocessing | None = None,
    classes: str | Path | None = None,
    label_size: Resolution | None = None,
    output: str = "logits",
    upsampling: str = "bilinear",
    runtime: str = "torch",
    threads: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curve:
    """Quality of `model` at its own resolution and as each candidate, on the same images, decoded once: top-1 of a
    classifier, mIoU of a segmentation network.

    What is tried is given as in `search`: `resolutions`, `stem_scales`, `patch_sizes`, `merges`, `candidates`, or all in one
    `tries`; nothing by default; `classes`, `label_size`, `output` and `upsampling` of a segmentation network too. A candidate
    that the network cannot be reduced to comes back as 'stopped', with the reason.

    Nothing is fitted, so every image of an undivided folder may be looked at; a `val_fraction` below 1 keeps to the
    images that `search` would prove on.

    The verdict says of each candidate alone whether its drop is within `max_drop` points; whoever picks one of many
    by it should use `search`, which pays for the number of looks.
    """
    given = Axes(resolutions, stem_scales, patch_sizes, merges, candidates, ragged)
    axes = axes_of(tries, given, Axes((), (), (), ()))
    data = with_classes(data, classes)
    subject = prepare_model(
        model, data, preprocessing=preprocessing, label_size=label_size, output=output, upsampling=upsampling
    )  # fmt: skip
    planned, notes = plan(subject.design(), axes, snap)
    check_planned(planned, subject)
    if not planned:
        raise DownresError("There is nothing to try: give for example resolutions below the original's, 96:256:32.")
    task = prepare(subject, data, val_fraction=val_fraction, parts=("val",), seed=seed, progress=progress)
    p = task.subject.model.preprocessing
    options = {} if batch_size is None else {"batch_size": batch_size}
    bank = subject.bank(None, runtime=runtime, threads=threads, progress=progress, **options)
    task.fill(bank)
    results: list[Result] = []
    original: Evidence | None = None
    for candidate in [task.subject.native, *planned]:
        state = State(candidate, p.crop_ratio)
        try:
            cost = measure_cost(bank.counted(state), (len(p.mean), *bank.preprocessing_of(state).hw))
        except DownresError as error:
            if not results:
                raise
            results.append(Result(candidate, "stopped", str(error)))
            continue
        evidence, found = quality_of(task, bank, state)
        drop = None if original is None else verdicts(original, {"it": evidence}, Budget(max_drop))["it"]
        original = evidence if original is None else original
        results.append(Result(candidate, "measured", "", cost, None, None, found, drop))
    absent = getattr(task.data, "absent", ())
    notes += [f"no proof image has {', '.join(absent)}: nothing is known of how well these are found"] if absent else []
    notes += [f"{len(task.data.skipped)} images skipped"] if task.data.skipped else []
    return Curve(results[0], tuple(results[1:]), p, task.data.description, tuple(notes))
