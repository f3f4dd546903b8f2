"""Which candidates to try: one family for each way to look at fewer pixels or tokens, or all combinations of them; what is
named is tried as it is named.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

from ..axes import Axes
from ..errors import DownresError
from ..parse import Resolution, as_hw
from ..records import Candidate
from ..techniques import RESOLUTION, Design, Technique


def plan(design: Design, axes: Axes) -> tuple[list[Candidate], list[str]]:
    """(candidates, notes): input variants from large to small, then the others at the native resolution, then those given."""
    notes: list[str] = []
    whole = axes.ragged == "error"  # who says how to treat ragged sizes wants them
    inputs = RESOLUTION.chosen(axes.given(RESOLUTION) or (), design, axes.snap and whole, notes)
    if axes.joint is not None:
        candidates = _combined(design, axes, inputs)
    else:
        candidates = [Candidate(r, ragged=_ragged(axes, r, design.divided_by)) for r in inputs]
        candidates += [_placed(variant, design, axes, notes) for _, variant in axes.free()]
    given = [Candidate.parse(c) if isinstance(c, str) else c for c in axes.candidates]
    candidates += [c.on(design.native) for c in given]
    candidates = axes.crossed([Candidate(design.native), *candidates])
    notes += RESOLUTION.ragged_notes(candidates, design)
    return [c for c in dict.fromkeys(candidates) if c != Candidate(design.native)], notes


def _combined(design: Design, axes: Axes, inputs: Sequence[Resolution]) -> list[Candidate]:
    """Every resolution, the original's too, with every value of every other technique and without it."""
    variants: dict[Technique, list[Candidate]] = {}
    for technique, variant in axes.free():
        variants.setdefault(technique, []).append(variant)
    found = []
    for resolution in (design.native, *inputs):
        combined = [Candidate()]
        for technique, values in variants.items():
            chosen = [{name: v.get(name, neutral) for name, neutral in technique.fields.items()} for v in values]
            combined += [c.having(**values) for c in combined for values in chosen]
        for c in combined:
            with contextlib.suppress(DownresError):  # patches larger than the image
                found.append(_placed(c, dataclasses.replace(design, native=resolution), axes, []))
    return found


def _placed(c: Candidate, design: Design, axes: Axes, notes: list[str]) -> Candidate:
    """At the resolution that its techniques ask for, the nearest to the design's."""
    units = [design.divided_by]
    for technique in c.techniques:
        if technique is not RESOLUTION:
            resolution, unit = technique.place(c, design, axes.ragged == "error", notes)
            design, units = dataclasses.replace(design, native=resolution), [*units, unit]
    unit = next((unit for unit in reversed(units) if unit != units[0]), units[0])
    return dataclasses.replace(c, resolution=design.native, ragged=_ragged(axes, design.native, unit))


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
