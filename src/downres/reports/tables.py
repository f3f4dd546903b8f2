"""Tables in words, a row a candidate: what a terminal, a notebook and whoever reads either is told. No layout here."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from ..parse import format_quantity
from ..records import Candidate, Result, TrainingCost
from . import words
from .rows import Row

STYLES = {"within": "green", "outside": "red", "few": "yellow"}


@dataclass(frozen=True)
class Told:
    """rows: column → what stands in it, the same columns in each; key: those that name a row; faint: rows that were not
    measured."""

    rows: list[dict[str, str | Text]]
    key: tuple[str, ...]
    faint: tuple[bool, ...] = ()


def candidates(original: Result, others: Sequence[Result], chosen: Candidate | None = None) -> Told:
    """A search or a curve, the original first, every column that something may be known for. chosen: gets a star."""
    results = [original, *others]
    beside = original.quality.beside() if original.quality else {}
    rounds = len({r.quality.images for r in results if r.quality}) > 1
    files = any(r.candidate.network != r.candidate or (r.flips and r.flips.verdict) for r in results)

    def cells(r: Result) -> dict[str, str | Text]:
        return {
            "": "★" if r.candidate == chosen else "",
            "candidate": words.label(r.candidate),
            "MACs": format_quantity(r.cost.macs) if r.cost else "",
            "peak memory": format_quantity(r.cost.peak_activation_bytes, "B") if r.cost else "",
            "latency": f"{words.digits(r.latency.latency_ms)} ms" if r.latency else "",
            **({"file": format_quantity(r.footprint.file_bytes, "B") if r.footprint else ""} if files else {}),
            words.RUNGS["none"]: r.naive.text(r.naive.score) if r.naive else "",
            getattr(original.quality, "metric", "quality"): r.quality.text(r.quality.score) if r.quality else "",
            **({"images": f"{r.quality.images}" if r.quality else ""} if rounds else {}),
            "95 % interval": words.interval(r.quality) if r.quality else "",
            **{name: r.quality.beside().get(name, "") if r.quality else "" for name in beside},
            "drop, bound": words.compared(r.drop) if r.drop else "",
            **({"another answer": words.flips_told(r.flips) if r.flips else ""} if files else {}),
            "verdict": _verdict(r, original),
            "recovered by": words.RUNGS.get(r.recovery.rung, r.recovery.rung) if r.recovery and r is not original else "",
        }

    return Told([cells(r) for r in results], ("", "candidate"), tuple(r.status != "measured" for r in results))


def families(rows: Sequence[Row]) -> Told:
    """Counted costs, the original first."""
    whole = rows[0].cost
    return Told(
        [
            {
                "family": row.family,
                "candidate": words.label(row.candidate),
                "MACs": format_quantity(row.cost.macs),
                "of original": f"{100 * row.cost.macs / whole.macs:.1f} %",
                "params": format_quantity(row.cost.params),
                "param bytes": format_quantity(row.cost.param_bytes, "B"),
                "peak activations": format_quantity(row.cost.peak_activation_bytes, "B"),
                "not counted": f"{sum(row.cost.uncounted.values())} ops of {len(row.cost.uncounted)} kinds",
                **_of_training(row.training),
            }
            for row in rows
        ],
        ("family", "candidate"),
    )


def _of_training(step: TrainingCost | None) -> dict[str, str | Text]:
    if step is None:
        return {}
    return {
        "training MACs": format_quantity(step.macs),
        "training peak": format_quantity(step.peak_bytes, "B"),
        "gradients and optimizer": format_quantity(step.gradient_bytes + step.optimizer_bytes, "B"),
    }


def _verdict(result: Result, original: Result) -> str | Text:
    if result is original:
        return "the original"
    if result.status != "measured" or result.reason:
        return result.reason
    if result.drop is None:
        return ""
    more = f", about {result.drop.more_images} more needed" if result.drop.more_images else ""
    return Text.assemble((result.drop.verdict, STYLES.get(words.verdict_key(result), "")), more)
