"""Which candidates to try: one family for each way to look at fewer pixels or tokens; what is named is tried as it is named."""

import dataclasses

from ..axes import Axes
from ..errors import DownresError
from ..parse import Resolution, as_hw
from ..records import Candidate
from ..techniques import RESOLUTION, Design


def plan(design: Design, axes: Axes) -> tuple[list[Candidate], list[str]]:
    """(candidates, notes): input variants from large to small, then the others at the native resolution, then those given."""
    notes: list[str] = []
    whole = axes.ragged == "error"  # who says how to treat ragged sizes wants them
    inputs = RESOLUTION.chosen(axes.given(RESOLUTION) or (), design, axes.snap and whole, notes)
    candidates = [Candidate(r, ragged=_ragged(axes, r, design.divided_by)) for r in inputs]
    for technique, variant in axes.free():
        resolution, unit = technique.place(variant, design, whole, notes)
        candidates.append(dataclasses.replace(variant, resolution=resolution, ragged=_ragged(axes, resolution, unit)))
    given = [Candidate.parse(c) if isinstance(c, str) else c for c in axes.candidates]
    candidates += [c.on(design.native) for c in given]
    candidates = axes.crossed([Candidate(design.native), *candidates])
    notes += RESOLUTION.ragged_notes(candidates, design)
    return [c for c in dict.fromkeys(candidates) if c != Candidate(design.native)], notes


def check_trained(candidates: list[Candidate]) -> None:
    """DownresError for a candidate whose weights would be drawn anew: there is no accuracy of it to measure yet."""
    for c in candidates:
        if not all(t.measurable for t in c.techniques):
            raise DownresError(
                f"{c} is another network that has to be trained first, here accuracy of a trained one is measured: "
                "count its cost with downres cost."
            )


def _ragged(axes: Axes, resolution: Resolution, unit: tuple[int, int]) -> str:
    return axes.ragged if any(side % u for side, u in zip(as_hw(resolution), unit, strict=True)) else "error"
