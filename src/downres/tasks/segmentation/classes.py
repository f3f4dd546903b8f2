"""IoU class by class and by size of object, of the original and of every candidate: who loses what."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...errors import DownresError
from ...errors import shown as seen
from ...records import Result
from ...reports import words
from .quality import SegmentationQuality

LEAST_WHOLE = 1.0
"""Percent: of an IoU below this no share is told that is left of it."""

LEAST_SCALE = 5.0
"""Points: a loss so large has the full colour at least, so that tenths of a point do not look dramatic."""


@dataclass(frozen=True)
class Line:
    """One row: `values` in percent, of the original and then of each candidate; None where there is nothing to measure."""

    name: str
    values: tuple[float | None, ...]
    note: str = ""
    index: int | None = None

    @property
    def changes(self) -> tuple[float | None, ...]:
        """Points, candidate minus original; of the original itself 0."""
        first = self.values[0]
        return tuple(None if v is None or first is None else v - first for v in self.values)

    @property
    def kept(self) -> tuple[float | None, ...]:
        """Percent of the original's value that each candidate has; None where that is next to nothing."""
        first = self.values[0]
        if first is None or first < LEAST_WHOLE:
            return (None,) * len(self.values)
        return tuple(None if v is None else 100 * v / first for v in self.values)


@dataclass(frozen=True)
class Table:
    """All rows. columns: the results, the original first; at: the column by whose losses `classes` are sorted."""

    columns: tuple[Result, ...]
    at: int
    whole: tuple[Line, ...]
    sizes: tuple[Line, ...]
    classes: tuple[Line, ...]

    @cached_property
    def largest(self) -> float:
        """Points: the largest change of the table, `LEAST_SCALE` at least."""
        every = [abs(c) for line in (*self.whole, *self.sizes, *self.classes) for c in line.changes if c is not None]
        return max([LEAST_SCALE, *every])

    def share(self, change: float | None) -> float:
        """How much colour a change deserves: 0 to 1, the largest of the table 1."""
        return 0.0 if change is None else abs(change) / self.largest


def class_table(
    original: Result,
    results: Sequence[Result],
    names: Sequence[str],
    shares: Sequence[float] = (),
    shown: Result | None = None,
) -> Table | None:
    """The table, None where the original was not measured on masks.

    names, shares: of each class its name and, where known, the percentage of all labelled pixels. Sorted by the losses of
    `shown`, or of the cheapest candidate. Raises DownresError where there are not as many names as classes.
    """
    if not isinstance(original.quality, SegmentationQuality):
        return None
    columns = (original, *(r for r in results if isinstance(r.quality, SegmentationQuality)))
    found = [r.quality for r in columns if isinstance(r.quality, SegmentationQuality)]
    if wrong := [len(q.iou) for q in found if len(q.iou) != len(names)]:
        raise DownresError(f"The report needs a name for each class, {len(names)} are named and {wrong[0]} were measured.")
    at = columns.index(shown) if shown in columns else len(columns) - 1
    whole = [
        Line("mIoU", tuple(q.miou for q in found), "mean over classes"),
        Line("pixel accuracy", tuple(q.pixel_accuracy for q in found)),
        Line("boundary mIoU", tuple(q.boundary_miou for q in found), "along the edges only"),
    ]
    sizes = [
        Line(f"{size} objects", tuple(q.object_iou.get(size) for q in found), words.count(number, "object"))
        for size, number in found[0].objects.items()
    ]
    classes = [Line(seen(name), tuple(q.iou[i] for q in found), _note(found, i, shares), i) for i, name in enumerate(names)]
    classes.sort(key=lambda line: float("inf") if (change := line.changes[at]) is None else change)
    return Table(columns, at, tuple(whole), tuple(sizes), tuple(classes))


def _note(found: Sequence[SegmentationQuality], index: int, shares: Sequence[float]) -> str:
    if all(q.iou[index] is None for q in found):
        return "in no label and no answer"
    if not shares:
        return ""
    percent = shares[index]
    text = "<0.01" if 0 < percent < 0.01 else f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"
    return f"{text}\u00a0% of pixels"


def who_loses(table: Table) -> str:
    """One or two sentences: what the sorted column loses by size of object, and which classes lose most."""
    if table.at == 0:
        return ""
    parts = [f"{line.name} {kept:.0f}\u00a0%" for line in table.sizes if (kept := line.kept[table.at]) is not None]
    name = words.label(table.columns[table.at].candidate)
    sentence = f"Of the IoU that they have in the original, at {name} there is left: of {', of '.join(parts)}." if parts else ""
    losing = [(line.name, c) for line in table.classes if (c := line.changes[table.at]) is not None and c < -0.005]
    if losing:
        most = ", ".join(f"{name} ({words.signed(change)})" for name, change in losing[:3])
        sentence += f" Of the classes {most} lose{'s' if len(losing) == 1 else ''} most."
    return sentence.strip()
