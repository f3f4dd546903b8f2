"""Pixels alone, bits alone, tokens alone, and all together: what was measured beside what it would be if gains multiplied."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..record import Record
from ..records import Candidate, Result
from . import words

MOST = 4
"""Combinations that the page shows."""


@dataclass(frozen=True)
class Part(Record):
    """One line: a way alone, the product of all, or all together as measured. Gains are of the original's value over this one,
    1 where nothing changes, None where it was not measured; drop in the unit of the score.
    """

    name: str
    speed: float | None
    memory: float | None
    size: float | None
    drop: float | None

    def text(self, gain: float | None) -> str:
        return "" if gain is None else f"{gain:.2f}×" if gain < 10 else f"{gain:.0f}×"


@dataclass(frozen=True)
class Interaction(Record):
    """A candidate that is smaller in several ways, each of which was measured alone, too."""

    candidate: Candidate
    alone: tuple[Part, ...]
    expected: Part
    measured: Part

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"candidate": str(self.candidate)}

    @property
    def lines(self) -> tuple[Part, ...]:
        return (*self.alone, self.expected, self.measured)

    @property
    def sentence(self) -> str:
        """What the gains in time would be, and are."""
        each = ", ".join(f"{part.name} alone {part.text(part.speed)}" for part in self.alone)
        return (
            f"Less time: {each}; multiplied {self.expected.text(self.expected.speed)}, "
            f"measured together {self.measured.text(self.measured.speed)}."
        )


def interactions(original: Result, results: Sequence[Result], chosen: Result | None = None) -> list[Interaction]:
    """The combinations whose parts were all measured alone: the chosen first, then by their time."""
    known = {r.candidate: r for r in results if r.latency is not None}
    order = sorted(known.values(), key=lambda r: (r is not chosen, r.latency.latency_ms if r.latency else math.inf))
    found = []
    for result in order:
        alone = parts_of(result.candidate, original.candidate)
        if len(alone) > 1 and all(part in known for part in alone):
            each = tuple(_part(words.label_beside(part, original.candidate), original, known[part]) for part in alone)
            speed, memory, size = (_product([getattr(part, kind) for part in each]) for kind in ("speed", "memory", "size"))
            expected = Part("gains multiplied, drops added", speed, memory, size, _sum([part.drop for part in each]))
            found.append(Interaction(result.candidate, each, expected, _part("together, measured", original, result)))
    return found[:MOST]


def parts_of(candidate: Candidate, original: Candidate) -> list[Candidate]:
    """For each way in which a candidate is smaller than the original the candidate that is so in this way alone."""
    ways = [{name: candidate.get(name, n) for name, n in t.fields.items()} for t in candidate.techniques]
    alone = [original.having(**values) for values in ways]
    return [one for one in alone if one != original]


def _part(name: str, original: Result, result: Result) -> Part:
    before, after = original.latency, result.latency
    here, there = original.footprint, result.footprint
    memory = size = None
    if here and there:
        size = here.file_bytes / there.file_bytes
        if here.peak_rss_bytes and there.peak_rss_bytes:
            memory = here.peak_rss_bytes / there.peak_rss_bytes
    speed = before.latency_ms / after.latency_ms if before and after else None
    return Part(name, speed, memory, size, result.drop.drop if result.drop else None)


def _product(gains: Sequence[float | None]) -> float | None:
    return None if any(g is None for g in gains) else math.prod(g for g in gains if g is not None)


def _sum(drops: Sequence[float | None]) -> float | None:
    return None if any(d is None for d in drops) else sum(d for d in drops if d is not None)
