"""Quality against resolution, patches and tokens: the model with its own weights, no search and no recovery."""

import dataclasses
from typing import Any

from torch import nn

from ..axes import Axes
from ..errors import DownresError
from ..families import Model
from ..measuring.cost import measure_cost
from ..notebook import frame_of, page, sentences, table
from ..parse import INT8
from ..record import plain
from ..records import Budget, Preprocessing, Result
from ..reports.tables import candidates
from ..tasks import Question, Task
from .design import design_of, fused_notes
from .plan import plan
from .prepare import Measuring, Progress, Source, bank_for_now, check_planned, gather, open_data, prepare_task


@dataclasses.dataclass(frozen=True)
class Curve:
    """What `curve` found: of the original, and of each candidate in the order asked for; every drop is a plain comparison."""

    original: Result
    results: tuple[Result, ...]
    preprocessing: Preprocessing
    data: str
    notes: tuple[str, ...]

    def to_json(self) -> dict:
        return plain(
            {
                "data": self.data,
                "preprocessing": self.preprocessing.to_json(),
                "original": self.original.row(),
                "candidates": [r.row(type(self.original.quality) if self.original.quality else None) for r in self.results],
                "notes": list(self.notes),
            }
        )

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, the original first, a row a candidate: the columns of `to_json` and `--json`."""
        document = self.to_json()
        return frame_of([document["original"], *document["candidates"]])

    def _repr_html_(self) -> str:
        from ..reports.curve_picture import curve_page  # Plotly is needed for nothing else here

        told = candidates(self.original, self.results)
        drawn = curve_page(self.original, self.results)
        shown = sentences(self.data) + table(told.rows, told.faint) + sentences(*self.notes)
        return shown + (page(drawn, 620) if drawn else "")


NOTHING = Axes((), (), (), ())
"""A curve tries what it is given."""


def curve(
    model: Model | nn.Module | str,
    data: Source,
    resolutions: Any = None,
    *,
    max_drop: float = 1.0,
    task: str | type[Task] | None = None,
    tries: Axes = NOTHING,
    question: Question = Question(),
    measuring: Measuring = Measuring(runtime="torch"),
    preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
    **flat: Any,
) -> Curve:
    """Quality of `model` at its own resolution and as each candidate, on the same images, decoded once: top-1 of a
    classifier, mIoU of a segmentation network, and so on.

    task, tries, question, measuring: as in `search`, every field also flat; nothing is tried by default. A candidate that the
    network cannot be reduced to comes back as 'stopped', with the reason.

    Nothing is fitted, so every image of an undivided folder may be looked at; a `val_fraction` below 1 keeps to the
    images that `search` would prove on.

    The verdict says of each candidate alone whether its drop is within `max_drop`; whoever picks one of many
    by it should use `search`, which pays for the number of looks.
    """
    if resolutions is not None:
        flat["resolutions"] = resolutions
    groups = gather({"tries": tries, "question": question, "measuring": measuring}, flat)
    tries, question, measuring = groups["tries"], groups["question"], groups["measuring"]
    subject = prepare_task(model, data, question, task, preprocessing)
    planned, notes = plan(design_of(subject.model), tries)
    notes += fused_notes(subject.model)
    check_planned(subject, planned)
    if not planned:
        raise DownresError("There is nothing to try: give for example resolutions below the original's, 96:256:32.")
    if tries.joint is not None and len(planned) > tries.joint:
        raise DownresError(
            f"A curve measures all {len(planned)} combinations, joint={tries.joint} are allowed: allow as many, or search."
        )
    if named := next((c for c in planned if c.runtime), None):
        raise DownresError(f"A curve is measured in one runtime, {named} names another: give it as `runtime`.")
    if any(c.precision == INT8 for c in planned):
        raise DownresError("A curve looks at no training images, on which int8 is calibrated: search with that precision.")
    open_data(subject, data, measuring, question, parts=("val",), progress=progress)
    p = subject.model.preprocessing
    results: list[Result] = []
    original: Any = None
    with bank_for_now(subject, measuring, progress) as bank:
        for candidate in [subject.native, *planned]:
            state = subject.native_state.at(candidate)
            try:
                bank.engine(candidate)
                cost = measure_cost(subject.counted(bank.network(state)), (len(p.mean), *bank.preprocessing_of(state).hw))
            except DownresError as error:
                if not results:
                    raise
                results.append(Result(candidate, "stopped", str(error)))
                continue
            evidence = subject.evidence(bank, state, subject.proof)
            drop = None if original is None else subject.compare(original, {"it": evidence}, Budget(max_drop))["it"]
            original = evidence if original is None else original
            results.append(Result(candidate, "measured", "", cost, None, None, subject.quality(evidence), drop))
    assert results[0].quality is not None
    # A curve asserts nothing of the level: only what the data lack is said.
    notes += subject.lacks(subject.facts())
    notes += [f"{len(subject.data.skipped)} images skipped"] if subject.data.skipped else []
    return Curve(results[0], tuple(results[1:]), p, subject.data.description, tuple(notes))
