"""Pictures of the report: photographs as PNG data URIs, and quality against cost as plotly figures.

Colours are written as CSS variables (`var(--ink)`); the page's script puts in the values of the light or dark theme. Names of
points are `customdata`: labels.js places them once widths are known.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from ..parse import format_quantity
from ..records import Budget, Candidate, Result, Score
from . import words

IGNORE = 255
"""In a class map: pixels without a class."""

SHOWN = 6
"""Candidates at most beside each picture."""


def shown(columns: list[tuple[int, Candidate]], chosen: Candidate | None) -> list[tuple[int, Candidate]]:
    """As many as fit beside a picture: the ends and the chosen one always, the rest evenly."""
    if len(columns) <= SHOWN:
        return columns
    wanted = {0, len(columns) - 1, *(i for i, (_, c) in enumerate(columns) if c == chosen)}
    evenly = np.linspace(0, len(columns) - 1, SHOWN).round().astype(int).tolist()
    wanted |= set([i for i in evenly if i not in wanted][: SHOWN - len(wanted)])
    return [columns[i] for i in sorted(wanted)]


def png_data_uri(image: np.ndarray) -> str:
    """The uint8 image (height, width, 3) as a PNG data URI, losslessly; a grey image is stored with one channel."""
    grey = bool((image == image[..., :1]).all())
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def jpeg_data_uri(image: np.ndarray) -> str:
    """The uint8 image (height, width, 3) as a JPEG data URI: for photographs that only lie under something."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def palette_data_uri(indices: np.ndarray, palette: Mapping[int, tuple[int, int, int, int]]) -> str:
    """The uint8 indices (height, width) as a PNG data URI; palette: index → red, green, blue, opacity (0 to 255)."""
    rgba = np.zeros((256, 4), np.uint8)
    for index, colour in palette.items():
        rgba[index] = colour
    image = Image.fromarray(np.ascontiguousarray(indices)).convert("P")
    image.putpalette(rgba[:, :3].tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=rgba[:, 3].tobytes())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def colour_map(classes: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class indices uint8 (height, width) in the classes' colours: uint8 (height, width, 3); 255 and unknown ones black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    return table[classes]


def overlay(image: np.ndarray, classes: np.ndarray, colours: Sequence[tuple[int, int, int]], alpha: float = 0.5) -> np.ndarray:
    """The picture, uint8 (height, width, 3), with its classes over it: uint8 (height, width, 3).

    classes: uint8 (height, width), 255 where there is none: there the picture shows through. alpha: opacity of the classes.
    """
    blended = (1 - alpha) * image + alpha * colour_map(classes, colours)
    return np.where((classes == IGNORE)[..., None], image, blended.round()).astype(np.uint8)


RIGHT, WRONG, IGNORED = 0, 1, 2
ERROR = (255, 45, 120)
"""RGB of wrong pixels, over a picture in grey."""


def errors(classes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Where a prediction is `RIGHT`, where `WRONG`, and where its label says nothing (`IGNORED`): uint8 (height, width).

    classes, truth: uint8 (height, width), in truth 255 where there is no class.
    """
    return np.where(truth == IGNORE, IGNORED, np.where(classes == truth, RIGHT, WRONG)).astype(np.uint8)


def mosaic(image: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The image (height, width, 3) uint8 as a network with merged tokens has it: every group of patches in its mean colour.

    groups: (rows, columns), equal numbers are one token (`downres.token_map`). Edges of groups are darkened.
    """
    height, width = image.shape[:2]
    rows, columns = groups.shape
    at = np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)
    each = groups[at]
    numbers, flat = np.unique(each, return_inverse=True)
    flat = flat.reshape(-1)
    counts = np.bincount(flat, minlength=len(numbers))
    means = np.stack([np.bincount(flat, image[..., c].reshape(-1), len(numbers)) / counts for c in range(3)], axis=1)
    seen = means[flat].reshape(height, width, 3)
    edge = np.zeros((height, width), bool)
    edge[:, 1:] |= each[:, 1:] != each[:, :-1]
    edge[1:] |= each[1:] != each[:-1]
    return np.where(edge[..., None], 0.6 * seen, seen).round().astype(np.uint8)


@dataclass(frozen=True)
class Axis:
    """One cost that can stand on the horizontal axis: button, title, and the value of a result; text: of a tick, to so many
    `digits`.
    """

    key: str
    name: str
    title: str
    value: Callable[[Result], float | None]
    text: Callable[..., str]


def _milliseconds(value: float, digits: int) -> str:
    return f"{value:.{digits}g} ms" if value < 10**digits else f"{value:.0f} ms"


AXES = (
    Axis("macs", "MACs", "MACs per forward pass (log scale)", lambda r: r.cost.macs if r.cost else None, format_quantity),
    Axis(
        "memory",
        "Peak memory",
        "peak activation memory (log scale)",
        lambda r: r.cost.peak_activation_bytes if r.cost else None,
        partial(format_quantity, unit="B"),
    ),
    Axis(
        "latency", "Latency", "median latency (log scale)", lambda r: r.latency.latency_ms if r.latency else None, _milliseconds
    ),
    Axis(
        "file",
        "File",
        "bytes of the file (log scale)",
        lambda r: r.footprint.file_bytes if r.footprint else None,
        partial(format_quantity, unit="B"),
    ),
)


def axes_for(results: Sequence[Result]) -> list[Axis]:
    """In the order of their buttons: of files of one network latency first, of which MACs know nothing; else without files."""
    files = any(r.candidate.network != r.candidate for r in results)
    return sorted((a for a in AXES if files or a.key != "file"), key=lambda a: files and a.key != "latency")


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif"
LONGEST_NAME = 30
"""Letters that the name of the chosen point may have: on a phone a picture is about 45 wide."""
SYMBOLS = {"within": "circle", "outside": "x", "few": "diamond", "unknown": "square"}


def pareto_figures(
    original: Result, results: Sequence[Result], chosen: Result | None, budget: Budget
) -> dict[str, dict[str, Any]]:
    """Axis key → plotly figure as plain JSON values, for every cost that was measured on the original and a candidate."""
    figures = {}
    for axis in axes_for(results):
        drawn = [r for r in results if r.quality and axis.value(r)]
        if drawn and original.quality and axis.value(original):
            figures[axis.key] = json.loads(pareto_figure(axis, original, drawn, chosen, budget).to_json())
    return figures


def pareto_figure(axis: Axis, original: Result, drawn: Sequence[Result], chosen: Result | None, budget: Budget) -> go.Figure:
    """Top-1 or mIoU against one cost. `drawn` have a quality and this cost. `layout.meta` holds the two vertical ranges."""
    figure = go.Figure(_lowered_traces(axis, drawn))
    figure.add_trace(_front_trace(axis, [original, *drawn]))
    for key in SYMBOLS:
        if group := [r for r in drawn if words.verdict_key(r) == key]:
            figure.add_trace(_points_trace(axis, group, f"var(--{key})", SYMBOLS[key], key, chosen))
    figure.add_trace(_points_trace(axis, [original], "var(--ink)", "star", "original", chosen))
    if chosen is not None and chosen in drawn:
        _mark_chosen(figure, axis, chosen)
    _mark_allowed(figure, original, drawn, budget)
    _lay_out(figure, axis, original, drawn)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, quality) pairs that no other beats in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


MOST_TICKS = 6


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` (above 0), for a log axis: three to six, however narrow or wide the range is."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [n for power in powers for digit in digits if low <= (n := digit * 10.0**power) <= high]
        if 3 <= len(found) <= MOST_TICKS:
            return found
    if len(found) > MOST_TICKS:  # every second decade, or fewer
        return found[:: math.ceil(len(found) / MOST_TICKS)]
    # Less than about a decade: there a log axis is nearly a linear one, and its ticks are multiples of a step.
    power = math.floor(math.log10(high - low))
    steps = [digit * 10.0**p for p in (power, power - 1) for digit in (5, 2.5, 2, 1)]
    multiples = ([step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)] for step in steps)
    return next(ticks for ticks in multiples if len(ticks) >= 3)


def tick_texts(ticks: Sequence[float], text: Callable[..., str]) -> list[str]:
    """All different, to as few digits as that takes."""
    every = ([text(tick, digits=digits) for tick in ticks] for digits in range(3, 16))
    return next((texts for texts in every if len({*texts}) == len(texts)), [text(tick, digits=15) for tick in ticks])


def hover_text(result: Result, trace: str) -> str:
    """Everything known of a candidate, one fact a line, in plotly's little HTML."""
    lines = [f"<b>{escape(words.label(result.candidate))}</b>" + (", the original" if trace == "original" else "")]
    if q := result.quality:
        lines.append(f"{q.metric} {q.text(q.score)} (95 %: {words.interval(q)})")
        lines.append(f"on {words.count(q.images, 'image')}")
    if c := result.cost:
        lines.append(f"{format_quantity(c.macs)} MACs, {format_quantity(c.params)} parameters")
        lines.append(f"peak activations {format_quantity(c.peak_activation_bytes, 'B')}")
    if t := result.latency:
        lines.append(f"latency {words.digits(t.latency_ms)} ms (p10–p90: {words.spread(t)})")
    if d := result.drop:
        unit = result.quality.unit if result.quality else "points"
        lines.append(f"drop {words.points(d.drop)} {unit}, {words.bound(d)}")
        lines.append(f"{escape(d.verdict)} {d.allowed:g} {escape(unit)}")
    if r := result.recovery:
        lines.append(f"recovered by: {escape(words.RUNGS.get(r.rung, r.rung))}" if r.rung != "none" else words.RUNGS["none"])
    return "<br>".join(lines)


def _qualities(results: Sequence[Result]) -> list[Score]:
    return [r.quality for r in results if r.quality]


def _points_trace(
    axis: Axis, results: Sequence[Result], colour: str, symbol: str, name: str, chosen: Result | None
) -> go.Scatter:
    q = _qualities(results)
    return go.Scatter(
        name=name,
        x=[axis.value(r) for r in results],
        y=[v.score for v in q],
        error_y={
            "array": [v.interval[1] - v.score for v in q],
            "arrayminus": [v.score - v.interval[0] for v in q],
            "color": colour,
            "thickness": 1.2,
            "width": 0,
        },
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 15 if symbol == "star" else 10, "line": {"width": 0}},
        customdata=["" if r is chosen else words.short_label(r.candidate) for r in results],
        hovertext=[hover_text(r, name) for r in results],
        hoverinfo="text",
        cliponaxis=False,
    )


def _lowered_traces(axis: Axis, drawn: Sequence[Result]) -> list[go.Scatter]:
    """The quality before any recovery, and thin lines from there up to the recovered points."""
    pairs = [(axis.value(r), r.naive, r.quality, r) for r in drawn if r.naive and r.quality]
    lines_x = [x for cost, *_ in pairs for x in (cost, cost, None)]
    lines_y = [y for _, lowered, quality, _ in pairs for y in (lowered.score, quality.score, None)]
    thin = {"color": "var(--faint)", "width": 1}
    return [
        go.Scatter(name="lowered lines", x=lines_x, y=lines_y, mode="lines", line=thin, hoverinfo="skip"),
        go.Scatter(
            name="lowered",
            x=[cost for cost, *_ in pairs],
            y=[lowered.score for _, lowered, _, _ in pairs],
            mode="markers",
            marker={"symbol": "circle-open", "color": "var(--lowered)", "size": 8, "line": {"width": 1.5}},
            hovertext=[
                f"<b>{escape(words.label(r.candidate))}, {words.RUNGS['none']}</b><br>{lowered.metric} "
                f"{lowered.text(lowered.score)} (95 %: {words.interval(lowered)})<br>on {words.count(lowered.images, 'image')}"
                for _, lowered, _, r in pairs
            ],
            hoverinfo="text",
        ),
    ]


def _front_trace(axis: Axis, results: Sequence[Result]) -> go.Scatter:
    pairs = [(cost, r.quality.score) for r in results if r.quality and (cost := axis.value(r))]
    sign = -1 if any(r.quality and r.quality.lower_is_better for r in results) else 1
    front = [(x, sign * y) for x, y in pareto_front([(x, sign * y) for x, y in pairs])]
    return go.Scatter(
        name="front",
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": "var(--front)", "width": 1.6},
        hoverinfo="skip",
    )


def _mark_chosen(figure: go.Figure, axis: Axis, chosen: Result) -> None:
    cost, quality = axis.value(chosen), chosen.quality
    if not cost or not quality:
        return
    ring = {"symbol": "circle-open", "size": 22, "color": "var(--accent)", "line": {"width": 2}}
    name = f"chosen: {words.label(chosen.candidate)}"
    if len(name) > LONGEST_NAME:
        name = f"chosen: {words.short_label(chosen.candidate)}"
    figure.add_trace(
        go.Scatter(name="chosen", x=[cost], y=[quality.score], mode="markers", marker=ring, hoverinfo="skip", customdata=[name])
    )


def _mark_allowed(figure: go.Figure, original: Result, results: Sequence[Result], budget: Budget) -> None:
    if original.quality is None or any(r.quality and r.quality.images != original.quality.images for r in results):
        return  # of a proof in rounds each is compared on images of its own
    top = original.quality.score
    worse = top + budget.max_drop if original.quality.lower_is_better else top - budget.max_drop
    figure.add_hrect(y0=min(top, worse), y1=max(top, worse), fillcolor="var(--band)", line_width=0, layer="below")


def _padded(low: float, high: float, share: float) -> list[float]:
    margin = max((high - low) * share, 0.5)
    return [max(low - margin, -2.0), min(high + margin, 102.0)]


def _room(low: float, high: float, share: float, quality: Score) -> list[float]:
    """The vertical range: of percentages not far beyond 0 and 100."""
    if quality.unit == "points":
        return _padded(low, high, share)
    margin = (high - low) * share or abs(high) * share or 1.0
    return [low - margin, high + margin]


def _lay_out(figure: go.Figure, axis: Axis, original: Result, drawn: Sequence[Result]) -> None:
    qualities = _qualities([original, *drawn])
    low, high = min(q.interval[0] for q in qualities), max(q.interval[1] for q in qualities)
    lowered = [r.naive.score for r in drawn if r.naive]
    whole = _room(min([low, *lowered]), max([high, *lowered]) if qualities[0].lower_is_better else high, 0.06, qualities[0])
    costs = [c for r in [original, *drawn] if (c := axis.value(r))]
    lay_out(figure, axis, costs, whole, words.score_title(qualities[0]))
    if qualities[0].unit != "points":
        figure.update_yaxes(ticksuffix="")
    figure.update_layout(meta={"everything": whole, "recovered": _room(low, high, 0.06, qualities[0])})


def lay_out(figure: go.Figure, axis: Axis, costs: Sequence[float], heights: Sequence[float], title: str) -> None:
    """The look of a picture of quality against cost: wide enough for `costs`, `title` beside the vertical axis."""
    low, high = math.log10(min(costs)), math.log10(max(costs))
    pad = 0.12 * (high - low) + 0.03
    ticks = log_ticks(10 ** (low - pad), 10 ** (high + pad))
    line = {"gridcolor": "var(--grid)", "zeroline": False, "linecolor": "var(--line)", "automargin": True}
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "var(--muted)", "size": 12, "family": FONT},
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        showlegend=False,
        hovermode="closest",
        hoverlabel={
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)", "size": 12, "family": FONT},
            "align": "left",
        },
        template="none",
    )
    figure.update_xaxes(
        **line,
        type="log",
        range=[low - pad, high + pad],
        tickvals=ticks,
        ticktext=tick_texts(ticks, axis.text),
        title={"text": axis.title, "standoff": 12},
        showgrid=False,
        ticks="outside",
        tickcolor="var(--line)",
    )
    figure.update_yaxes(**line, range=heights, ticksuffix=" %", title={"text": title, "standoff": 12})
