"""Families of candidates in one picture: multiply-accumulates against memory, one line a family. No accuracy in it."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from ..parse import format_quantity
from ..records import Candidate, Cost
from . import words
from .pictures import FONT

ORIGINAL = "original"
"""The family of the network as it came: the first row, and the start of every line."""

STYLES = {
    "resolution": ("#1a8f86", "circle", "bottom right"),
    "patch size": ("#3f86d1", "diamond", "bottom right"),
    "merging": ("#b0851a", "triangle-up", "top left"),
    "pruning": ("#d0558f", "triangle-down", "top left"),
    "pooling": ("#6b8e23", "hexagon", "bottom right"),
    "stem": ("#6b8e23", "hexagon", "bottom right"),
    "depth": ("#c2552d", "square", "top center"),
    "width": ("#9a6fd0", "pentagon", "top left"),
}
"""Family → colour (readable on a light and on a dark page), symbol, where its labels stand."""
OTHER = ("#7d8590", "x", "bottom center")


@dataclass(frozen=True)
class Row:
    """One candidate with its cost, and the family that it was counted for."""

    family: str
    candidate: Candidate
    cost: Cost


@dataclass(frozen=True)
class Panel:
    """One kind of memory on the vertical axis, in bytes."""

    title: str
    value: Callable[[Cost], int]


ACTIVATIONS = Panel("peak activation memory", lambda cost: cost.peak_activation_bytes)
PARAMETERS = Panel("memory of the parameters", lambda cost: cost.param_bytes)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """What is drawn: parameters only where a family changes them by more than its position embeddings do."""
    sizes = [row.cost.param_bytes for row in rows]
    return [ACTIVATIONS, PARAMETERS] if max(sizes) > 1.1 * min(sizes) else [ACTIVATIONS]


def families_figure(rows: Sequence[Row]) -> go.Figure:
    """MACs against memory, both axes from 0, a panel for each kind of memory. rows: the original first."""
    shown = panels(rows)
    figure = make_subplots(rows=1, cols=len(shown), horizontal_spacing=0.12)
    families = dict.fromkeys(row.family for row in rows[1:])
    for column, panel in enumerate(shown, 1):
        for family in families:
            members = [row for row in rows if row.family == family]
            figure.add_trace(_line(family, members, rows[0], panel, column == 1), row=1, col=column)
        figure.add_trace(_star(rows[0], panel, column == 1), row=1, col=column)
        for axes, title, values, unit in (
            (figure.update_xaxes, "MACs per forward pass", [row.cost.macs for row in rows], ""),
            (figure.update_yaxes, panel.title, [panel.value(row.cost) for row in rows], "B"),
        ):
            _lay_out_axis(axes, title, max(values), unit, column)
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "var(--muted)", "size": 12, "family": FONT},
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
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
    return figure


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(quantity=format_quantity, label=words.label)
    return environment.get_template("families.html.j2").render(
        rows=rows,
        model=model,
        batch_size=batch_size,
        convention=convention,
        figure=json.loads(families_figure(rows).to_json()),
        plotlyjs=Markup(get_plotlyjs()),
    )


def write_families(
    rows: Sequence[Row], path: str | os.PathLike[str], model: str, batch_size: int = 1, convention: str = ""
) -> Path:
    """Writes the page to `path`, with the folders that it needs, and returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(families_page(rows, model, batch_size, convention), encoding="utf-8")
    return target


def _line(family: str, members: Sequence[Row], original: Row, panel: Panel, legend: bool) -> go.Scatter:
    colour, symbol, position = STYLES.get(family, OTHER)
    points = sorted(members, key=lambda row: row.cost.macs)
    if family in STYLES:  # one thing changes along it, and the original is where that begins
        points = sorted([*points, original], key=lambda row: row.cost.macs)
    return go.Scatter(
        name=family,
        legendgroup=family,
        showlegend=legend,
        x=[row.cost.macs for row in points],
        y=[panel.value(row.cost) for row in points],
        mode="lines+markers+text" if family in STYLES else "markers+text",
        line={"color": colour, "width": 2},
        marker={"color": colour, "symbol": symbol, "size": [0 if row is original else 9 for row in points]},
        text=["" if row is original else _short_label(row, original) for row in points],
        textposition=position,
        textfont={"color": "var(--muted)", "size": 11},
        hovertext=[hover_text(row, original) for row in points],
        hoverinfo="text",
        cliponaxis=False,
    )


def _star(original: Row, panel: Panel, legend: bool) -> go.Scatter:
    return go.Scatter(
        name=ORIGINAL,
        legendgroup=ORIGINAL,
        showlegend=legend,
        x=[original.cost.macs],
        y=[panel.value(original.cost)],
        mode="markers",
        marker={"color": "var(--ink)", "symbol": "star", "size": 15},
        hovertext=[hover_text(original, original)],
        hoverinfo="text",
        cliponaxis=False,
    )


def _short_label(row: Row, original: Row) -> str:
    """Of what all of a family share nothing: `160`, `p28`, `8 blocks`, `×0.67`; of the others `168 merge8`."""
    c = row.candidate
    if row.family == "depth":
        return str(c.depth)
    if row.family == "width":
        return f"×{c.width:.3g}"
    own = words.short_label(c)
    return own.removeprefix(words.short_label(original.candidate)).strip() or own


def _lay_out_axis(update: Callable[..., Any], title: str, high: float, unit: str, column: int) -> None:
    ticks = _ticks(high)
    update(
        col=column,
        row=1,
        range=[0, 1.08 * high],
        tickvals=ticks,
        ticktext=[format_quantity(tick, unit) for tick in ticks],
        title={"text": title, "standoff": 12},
        gridcolor="var(--grid)",
        zeroline=False,
        linecolor="var(--line)",
        automargin=True,
    )


def _ticks(high: float) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten up to `high`: at most six."""
    power = 10.0 ** (len(str(int(high))) - 2)
    step = next(s * power for s in (1, 2, 5, 10, 20) if high / (s * power) < 6)
    return [step * i for i in range(int(high / step) + 1)]
