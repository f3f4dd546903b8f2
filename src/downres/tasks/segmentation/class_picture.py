"""IoU by size of object and by class against cost, as plotly figures: which things go first when pixels get fewer."""

import colorsys
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from ...parse import format_quantity
from ...reports import pictures, words
from .classes import Line, Table

MOST = 20
"""Lines in one picture; of more classes those that lose most."""

SIZE_STYLES = {"small": ("#d0558f", 6), "medium": ("#b0851a", 10), "large": ("#3f86d1", 15)}
"""Size of objects → colour, and size of the marker in pixels."""

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "pentagon", "triangle-down", "star")
"""Of the markers of classes in turn, since colours of classes are often close to each other."""

SCALES = {"iou": "IoU, %", "kept": "IoU, % of the original's", "change": "IoU, points against the original"}


def class_figures(table: Table, colours: Sequence[tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
    """`sizes-iou`, `sizes-kept`, `sizes-change`, `classes-iou`, … → figure as plain JSON values; {} without costs."""
    axis = pictures.AXES[0]
    if len(table.columns) < 2 or not all(axis.value(r) for r in table.columns[:1]):
        return {}
    lines = {"sizes": table.sizes, "classes": table.classes[:MOST]}
    return {
        f"{group}-{scale}": json.loads(_figure(axis, table, [*members, table.whole[0]], colours, scale).to_json())
        for group, members in lines.items()
        for scale in SCALES
        if any(value is not None for line in members for value in _values(line, scale))
    }


def readable(colour: tuple[int, int, int]) -> str:
    """The colour, lighter or darker until it stands out from a white and from a black page: `rgb(…)`.

    By WCAG 2's relative luminance: from 0.13 to 0.27, about 3:1 and more against both.
    """
    hue, _, saturation = colorsys.rgb_to_hls(*(c / 255 for c in colour))
    every = [colorsys.hls_to_rgb(hue, lightness / 100, saturation) for lightness in range(101)]
    allowed = [rgb for rgb in every if 0.13 <= luminance(rgb) <= 0.27]
    nearest = min(allowed, key=lambda rgb: abs(luminance(rgb) - luminance([c / 255 for c in colour])))
    return f"rgb({', '.join(str(round(255 * c)) for c in nearest)})"


def luminance(rgb: Sequence[float]) -> float:
    """WCAG 2's relative luminance of an sRGB colour, each channel 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _values(line: Line, scale: str) -> tuple[float | None, ...]:
    return {"iou": line.values, "kept": line.kept, "change": line.changes}[scale]


def _figure(
    axis: pictures.Axis, table: Table, lines: Sequence[Line], colours: Sequence[tuple[int, int, int]], scale: str
) -> go.Figure:
    figure = go.Figure()
    heights: list[float] = []
    for line in lines:
        values = _values(line, scale)
        found = [(axis.value(r), v, i) for i, (r, v) in enumerate(zip(table.columns, values, strict=True)) if v is not None]
        points = sorted((cost, value, i) for cost, value, i in found if cost)
        if not points:
            continue
        colour, size, symbol = _style(line, colours)
        joined = [p for p in points if table.columns[p[2]].candidate.is_input_only]
        heights += [value for _, value, _ in points]
        figure.add_trace(
            go.Scatter(
                name=line.name, x=[p[0] for p in joined], y=[p[1] for p in joined], mode="lines", hoverinfo="skip",
                line={"color": colour, "width": 2, "dash": "dot" if line is table.whole[0] else "solid"},
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                name=line.name, x=[p[0] for p in points], y=[p[1] for p in points], mode="markers", hoverinfo="text",
                marker={"color": colour, "size": size, "symbol": symbol, "opacity": 1, "line": {"width": 0}}, cliponaxis=False,
                hovertext=[hover_text(table, line, p[2]) for p in points], customdata=[line.name, *[""] * (len(points) - 1)],
            )
        )  # fmt: skip
    low, high = min(heights), max(heights)
    margin = max(0.06 * (high - low), 0.5)
    costs = [cost for r in table.columns if (cost := axis.value(r))]
    pictures.lay_out(figure, axis, costs, [low - margin, high + margin], SCALES[scale])
    left, right = figure.layout.xaxis.range  # the names stand beside the cheapest points
    figure.update_xaxes(range=[left - 0.22 * (right - left), right])
    if scale == "change":
        figure.update_yaxes(ticksuffix="", zeroline=True, zerolinecolor="var(--line)")
    return figure


def _style(line: Line, colours: Sequence[tuple[int, int, int]]) -> tuple[str, int, str]:
    """Colour, size in pixels and symbol of a line's markers."""
    if line.index is not None:
        return readable(colours[line.index]), 8, SYMBOLS[line.index % len(SYMBOLS)]
    return (*SIZE_STYLES.get(line.name.removesuffix(" objects"), ("var(--ink)", 7)), "circle")


def hover_text(table: Table, line: Line, column: int) -> str:
    """What one point shows, one fact a line, in plotly's little HTML."""
    result, value, change = table.columns[column], line.values[column], line.changes[column]
    lines = [f"<b>{escape(line.name)}</b>" + (f", {escape(line.note)}" if line.note else "")]
    lines.append(f"{escape(words.label(result.candidate))}" + (", the original" if column == 0 else ""))
    if value is not None:
        kept = line.kept[column] if column else None
        lines.append(f"IoU {words.percent(value)}" + (f", {kept:.0f}\u00a0% of the original's" if kept is not None else ""))
    if column and change is not None:
        lines.append(f"{words.change(-change)} than the original" if abs(change) >= 0.005 else "as the original")
    if result.cost:
        lines.append(f"{format_quantity(result.cost.macs)} MACs")
    return "<br>".join(lines)
