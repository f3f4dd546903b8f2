"""The tables of a terminal: every column that something is known for, stacked where its width does not hold them all."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import shown
from ..parse import format_quantity
from ..records import Candidate, Result
from . import words

LEFT = frozenset(("", "family", "candidate", "verdict", "recovered by", "not counted"))
"""Columns of words; the others hold numbers."""
GAP = 2
LEAST = 16
"""Letters that a column of words has at least, or all of its own."""
STYLES = {"within": "green", "outside": "red", "few": "yellow"}


def candidates(results: Sequence[Result], original: Result, chosen: Candidate | None, width: int) -> Group:
    """A search or a curve, a row a candidate, for a terminal of so many columns."""
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

    rows = [cells(r) for r in results]
    return stacked(rows, ("", "candidate"), width, [r.status != "measured" for r in results])


def stacked(rows: Sequence[Mapping[str, str | Text]], key: Sequence[str], width: int, dim: Sequence[bool] = ()) -> Group:
    """One table where it fits the width; else several, one under another, each beginning with the columns of `key`.

    Columns without a word in them are left out; of the others none is cut or left out, whatever the width. dim: rows to be
    printed faintly.
    """
    texts = [{name: c if isinstance(c, Text) else Text(shown(c)) for name, c in row.items()} for row in rows]
    names = [name for name in texts[0] if any(row[name].plain for row in texts)]
    widths = {name: max(cell_len(name), *(row[name].cell_len for row in texts)) for name in names}
    first, rest = [n for n in names if n in key], [n for n in names if n not in key]
    full = dict(widths)
    if not _fits(names, widths, width):  # words go on in the next line
        most = max(LEAST, int(0.4 * width))
        widths |= {name: min(widths[name], most if name in key else LEAST) for name in names if name in LEFT}
    tables: list[list[str]] = [[]]
    for name in rest:
        if tables[-1] and not _fits([*first, *tables[-1], name], widths, width):
            tables.append([])
        tables[-1].append(name)
    drawn: list[Table | str] = []
    for columns in tables:
        for name in columns:  # what is left of the width
            spare = width - sum(widths[n] + GAP for n in (*first, *columns)) + GAP
            widths[name] = min(full[name], widths[name] + max(0, spare))
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for name in (*first, *columns):
            justify = "left" if name in LEFT else "right"
            table.add_column(Text(name), justify=justify, width=widths[name], overflow="fold")  # type: ignore[arg-type]
        for i, row in enumerate(texts):
            table.add_row(*(row[name] for name in (*first, *columns)), style="dim" if i < len(dim) and dim[i] else None)
        drawn += ["", table] if drawn else [table]
    return Group(*drawn)


def findings(told: Sequence[tuple[str, float | None, str]]) -> Table:
    """(sentence, what it saves, of what): `-31 % time` beside the sentence, a dash where nothing is saved."""
    table = Table.grid(padding=(0, GAP, 0, 0))
    for text, gain, of in told:
        saved = "–" if gain is None else f"-{100 * gain:.0f} % {of}" if gain >= 0.01 else f"-<1 % {of}"
        table.add_row(Text(saved, "dim" if gain is None else "yellow", no_wrap=True), Text(shown(text)))
    return table


def _fits(names: Sequence[str], widths: Mapping[str, int], width: int) -> bool:
    return sum(widths[name] + GAP for name in names) - GAP <= width


def _verdict(result: Result, original: Result) -> str | Text:
    if result is original:
        return "the original"
    if result.status != "measured" or result.reason:
        return result.reason
    if result.drop is None:
        return ""
    more = f", about {result.drop.more_images} more needed" if result.drop.more_images else ""
    return Text.assemble((result.drop.verdict, STYLES.get(words.verdict_key(result), "")), more)
