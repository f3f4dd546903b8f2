"""Families of candidates in one picture: multiply-accumulates against memory, one line a family. No accuracy in it."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..parse import format_quantity
from ..record import write_whole
from ..records import Cost
from ..techniques import Style, techniques
from . import words
from .page import render
from .pictures import FONT
from .rows import ORIGINAL, Row

OTHER = Style("#7d8590", "x")
"""Of candidates that came whole, in any combination."""


@dataclass(frozen=True)
class Memory:
    """One kind of memory that can stand on the vertical axis, in bytes."""

    key: str
    title: str
    value: Callable[[Cost], int]


MEMORIES = (
    Memory("activations", "peak activation memory", lambda cost: cost.peak_activation_bytes),
    Memory("parameters", "memory of the parameters", lambda cost: cost.param_bytes),
)


def families_figures(rows: Sequence[Row]) -> dict[str, go.Figure]:
    """A figure for each kind of memory; parameters only where a family changes them by more than position embeddings do."""
    sizes = [row.cost.param_bytes for row in rows]
    return {m.key: families_figure(rows, m) for m in MEMORIES if m.key != "parameters" or max(sizes) > 1.1 * min(sizes)}


def families_figure(rows: Sequence[Row], memory: Memory = MEMORIES[0]) -> go.Figure:
    """MACs against one kind of memory, both axes from 0. rows: the original first."""
    families: dict[str, list[Row]] = {}
    for row in rows[1:]:
        families.setdefault(row.family, []).append(row)
    figure = go.Figure([_line(family, members, rows[0], memory, len(families) < 4) for family, members in families.items()])
    figure.add_trace(_star(rows[0], memory))
    lay_out(figure)
    figure.update_xaxes(**_axis("MACs per forward pass", max(row.cost.macs for row in rows), ""))
    figure.update_yaxes(**_axis(memory.title, max(memory.value(row.cost) for row in rows), "B"))
    return figure


def lay_out(figure: go.Figure) -> None:
    """As every picture of costs is: the page's colours, the legend above."""
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "var(--muted)", "size": 12, "family": FONT},
        margin={"l": 8, "r": 24, "t": 12, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 13}},
        hovermode="closest",
        hoverlabel={
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)", "size": 12, "family": FONT},
            "align": "left",
        },
        template="none",
    )


def hover_text(row: Row, original: Row) -> str:
    """What a point costs and what that is of the original, one fact a line, in plotly's little HTML."""
    c, o = row.cost, original.cost
    lines = [f"<b>{escape(words.label(row.candidate))}</b>" + (", the original" if row is original else f" ({row.family})")]
    for what, value, whole, unit in (
        ("MACs", c.macs, o.macs, ""),
        ("peak activations", c.peak_activation_bytes, o.peak_activation_bytes, "B"),
        ("parameters", c.params, o.params, ""),
    ):
        share = "" if row is original else f", {100 * value / whole:.3g} % of the original"
        lines.append(f"{what} {format_quantity(value, unit)}{share}")
    return "<br>".join(lines)


def families_page(rows: Sequence[Row], model: str, batch_size: int, convention: str) -> str:
    """The picture and its table as HTML that needs no other file and no network."""
    return render(
        Path(__file__).parent,
        "families.html.j2",
        rows=rows,
        title=f"Cost of {model}",
        alternative="Memory against multiply-accumulates; all numbers are in the table below.",
        batch_size=batch_size,
        convention=convention,
        figures={key: json.loads(figure.to_json()) for key, figure in families_figures(rows).items()},
        plotlyjs=Markup(get_plotlyjs()),
    )


def write_families(
    rows: Sequence[Row], path: str | os.PathLike[str], model: str, batch_size: int = 1, convention: str = ""
) -> Path:
    """Writes the page to `path`, with the folders that it needs, and returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, families_page(rows, model, batch_size, convention).encode())
    return target


def _line(family: str, members: Sequence[Row], original: Row, memory: Memory, label_all: bool) -> go.Scatter:
    own = next((t.styles[family] for t in techniques() if family in t.styles), None)
    style = own or OTHER
    points = sorted(members, key=lambda row: row.cost.macs)
    labelled = [p for p in points if p.cost != original.cost] if label_all or not own else points[:1]
    if own:  # one thing changes along it, and the original is where that begins
        points = sorted([*points, original], key=lambda row: row.cost.macs)
    return go.Scatter(
        name=family,
        x=[row.cost.macs for row in points],
        y=[memory.value(row.cost) for row in points],
        mode="lines+markers" if own else "markers",
        line={"color": style.colour, "width": 2},
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": [0 if row is original else 9 for row in points],
            "line": {"width": 0},
            "opacity": 1,
        },
        customdata=[_short_label(row, original) if row in labelled else "" for row in points],
        hovertext=[hover_text(row, original) for row in points],
        hoverinfo="text",
        cliponaxis=False,
    )


def _star(original: Row, memory: Memory) -> go.Scatter:
    return go.Scatter(
        name=ORIGINAL,
        x=[original.cost.macs],
        y=[memory.value(original.cost)],
        mode="markers",
        marker={"color": "var(--ink)", "symbol": "star", "size": 15, "line": {"width": 0}},
        hovertext=[hover_text(original, original)],
        hoverinfo="text",
        cliponaxis=False,
    )


def _short_label(row: Row, original: Row) -> str:
    """What the family changes, alone: `160`, `p28`, `8 blocks`, `×0.67`; of a combination all: `168 merge8`."""
    c = row.candidate
    if mark := next((t.mark(c) for t in techniques() if row.family in t.styles), ""):
        return mark
    own = words.short_label(c)
    return own.removeprefix(words.short_label(original.candidate)).strip() or own


def _axis(title: str, high: float, unit: str) -> dict[str, Any]:
    ticks = _ticks(high)
    return {
        "range": [0, 1.08 * high],
        "tickvals": ticks,
        "ticktext": [format_quantity(tick, unit) for tick in ticks],
        "title": {"text": title, "standoff": 12},
        "gridcolor": "var(--grid)",
        "zeroline": False,
        "linecolor": "var(--line)",
        "automargin": True,
    }


def _ticks(high: float) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten up to `high`: at most six."""
    power = 10.0 ** (len(str(int(high))) - 2)
    step = next(s * power for s in (1, 2, 5, 10, 20) if high / (s * power) < 6)
    return [step * i for i in range(int(high / step) + 1)]
