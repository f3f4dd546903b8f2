"""The tables of a terminal: every column that something is known for, stacked where its width does not hold them all."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import shown
from .tables import Told

LEFT = frozenset(("", "family", "candidate", "verdict", "recovered by", "not counted", "network", "name", "what", "data"))
"""Columns of words; the others hold numbers."""
GAP = 2
LEAST = 16
"""Letters that a column of words has at least, or all of its own."""


def told(table: Told, width: int) -> Group:
    """A table for a terminal of so many columns."""
    return stacked(table.rows, table.key, width, table.faint)


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
