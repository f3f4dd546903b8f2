"""The results of camvid.py as pictures and as the tables of README.md.

    python recipes/camvid_pictures.py

Reads results/camvid.json; writes results/camvid_*.png in the style of the paper's figures 1 and 4 (Morlier et al. 2025), and
the tables between the marks of README.md. Needs the package playwright and chromium; takes half a minute.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import camvid
import numpy as np
import plotly.graph_objects as go
from camvid import NARROW, RESULTS, WIDE
from pictures import GRID, INK, MUTED, save_png
from plotly.subplots import make_subplots

from downres.parse import format_quantity
from downres.reports import words

README = Path(__file__).parent / "README.md"
COLOURS = {WIDE: "#2563eb", NARROW: "#d97706"}
NAMES = {WIDE: "full width", NARROW: "half width"}
FULL = "360x480"
CLAIMS = (
    camvid.EQUAL_MACS, camvid.EQUAL_TIME, camvid.TOGETHER, camvid.NARROWER, camvid.SMALLER_TRAINING, camvid.TRAINED_SMALL,
    camvid.RECALIBRATED, camvid.LOWER_IS_BETTER,
)  # fmt: skip
"""In the table; the others are in the results only."""


def main() -> None:
    measured = json.loads((RESULTS / "camvid.json").read_text())
    drawn = {"macs": against_macs, "sizes": against_size, "memory": against_memory_and_time, "classes": by_class}
    for name, draw in drawn.items():
        save_png(draw(measured), RESULTS / f"camvid_{name}.png")
    text = README.read_text()
    for name, made in tables(measured).items():
        start, end = f"<!-- camvid {name} -->\n", f"<!-- end of camvid {name} -->"
        before, _, rest = text.partition(start)
        text = before + start + made + end + rest.partition(end)[2]
    README.write_text(text)


# --- what is drawn ---


def found(measured: dict, **wanted: object) -> list[dict]:
    """The rows with these values, bilinear, plain and without recalibration unless something else is asked for."""
    wanted = {"stem_scale": 1.0, "batchnorm": False, "interpolation": "bilinear", **wanted}
    return [row for row in measured["rows"] if all(row[key] == value for key, value in wanted.items())]


def height(size: str) -> int:
    return int(size.partition("x")[0])


def trained_small(measured: dict, network: str) -> list[dict]:
    """Every size that the network was trained for, each run there; the largest first."""
    rows = [row for row in found(measured, network=network) if row["trained"] == row["run"]]
    return sorted(rows, key=lambda row: -height(row["run"]))


def run_small(measured: dict, network: str, trained: str = FULL, **wanted: object) -> list[dict]:
    """One network at its own size and below, the largest first."""
    rows = found(measured, network=network, trained=trained, **wanted)
    return sorted((r for r in rows if height(r["run"]) <= height(trained)), key=lambda row: -height(row["run"]))


def spread(rows: list[dict]) -> dict:
    """Error bars from the worst to the best seed."""
    scores = [[seed["miou"] for seed in row["seeds"]] for row in rows]
    up = [max(s) - row["miou"] for s, row in zip(scores, rows, strict=True)]
    down = [row["miou"] - min(s) for s, row in zip(scores, rows, strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 4}


def line(rows: list[dict], x: list[float], name: str, colour: str, **more: object) -> go.Scatter:
    return go.Scatter(
        x=x, y=[row["miou"] for row in rows], name=name, error_y=spread(rows), mode="lines+markers+text",
        textfont={"color": colour, "size": 11}, **({"line": {"color": colour, "width": 2}, "marker": {"size": 9}} | more),
    )  # fmt: skip


def against_macs(measured: dict) -> go.Figure:
    figure = go.Figure()
    tops = [trained_small(measured, network)[0] for network in (WIDE, NARROW)]
    figure.add_scatter(
        x=[row["macs"] / 1e9 for row in tops], y=[row["miou"] for row in tops], mode="lines", name="model scaling alone",
        line={"color": INK, "width": 2, "dash": "dot"},
    )  # fmt: skip
    for network, colour in COLOURS.items():
        for rows, what, style in (
            (trained_small(measured, network), "trained at each size", {}),
            (run_small(measured, network), f"trained at {FULL}, run smaller",
             {"line": {"color": colour, "width": 1.2, "dash": "dash"}, "marker": {"size": 8, "symbol": "circle-open"}}),
        ):  # fmt: skip
            labels = [row["run"].replace("x", "×") for row in rows]
            labels[0] = "" if style else labels[0]  # both begin at the same network
            where = "bottom right" if not style else "top left"
            figure.add_trace(
                line(rows, [row["macs"] / 1e9 for row in rows], f"{NAMES[network]}, {what}", colour, text=labels,
                     textposition=where, **style)
            )  # fmt: skip
    ticks = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    figure.update_xaxes(
        title="GMACs per image, answer at 360×480 included",
        type="log",
        tickvals=ticks,
        ticktext=list(map(str, ticks)),
        range=np.log10([0.045, 4.8]).tolist(),
    )
    figure.update_yaxes(title="mIoU on 101 validation images")
    return styled(figure, "RegSeg on CamVid: fewer channels (dotted) and fewer pixels (solid); bars: worst and best seed")


def against_size(measured: dict) -> go.Figure:
    figure = make_subplots(
        1, 2, subplot_titles=[NAMES[n].capitalize() for n in COLOURS], shared_yaxes=True, horizontal_spacing=0.04
    )
    for column, (network, colour) in enumerate(COLOURS.items(), 1):
        small = run_small(measured, network)
        for rows, name, style in (
            (trained_small(measured, network), "trained at each size", {}),
            (small, f"trained at {FULL}, bilinear", {"line": {"color": MUTED, "width": 2}, "marker": {"size": 7}}),
            (small[:1] + run_small(measured, network, interpolation="bicubic"), f"trained at {FULL}, bicubic",
             {"line": {"color": INK, "width": 1.2, "dash": "dot"}, "marker": {"size": 7, "symbol": "x-thin-open"}}),
            (run_small(measured, network, batchnorm=True), f"trained at {FULL}, BatchNorm recalibrated",
             {"line": {"color": "#059669", "width": 1.5, "dash": "dash"}, "marker": {"size": 8, "symbol": "diamond-open"}}),
        ):  # fmt: skip
            trace = line(rows, [height(row["run"]) for row in rows], name, colour, legendgroup=name, **style)
            trace.showlegend = column == 1
            figure.add_trace(trace, 1, column)
    figure.update_xaxes(title="height of the input in pixels, width 4/3 of it", tickvals=[90, 120, 180, 240, 300, 360])
    figure.update_yaxes(title="mIoU at 360×480", col=1)
    return styled(figure, "Small input, full-size answer: logits brought to 360×480", width=1100)


def against_memory_and_time(measured: dict) -> go.Figure:
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    for network, colour in COLOURS.items():
        rows = trained_small(measured, network)
        hollow = {"line": {"color": colour, "width": 1.2, "dash": "dash"}, "marker": {"size": 9, "symbol": "circle-open"}}
        for mode, style in (("logits", {}), ("classes", hollow)):
            name = f"{NAMES[network]}, {'logits' if mode == 'logits' else 'class map'} out"
            labels = [row["run"].replace("x", "×") if mode == "logits" else "" for row in rows]
            x = [row[f"peak_bytes_{mode}"] / 1e6 for row in rows]
            where = "top center" if network == WIDE else "bottom right"
            figure.add_trace(line(rows, x, name, colour, text=labels, textposition=where, **style), 1, 1)
            x = [latency(measured, row, mode) for row in rows]
            trace = line(rows, x, name, colour, text=labels, textposition=where, **style)
            trace.showlegend = False
            figure.add_trace(trace, 1, 2)
    figure.update_xaxes(title="peak activation memory, MB", rangemode="tozero", col=1)
    figure.update_xaxes(title="latency, ms", rangemode="tozero", col=2)
    figure.update_yaxes(title="mIoU at 360×480", col=1)
    return styled(figure, f"Memory and time of networks trained at each size ({measured['latency']['what']})", width=1100)


def by_class(measured: dict) -> go.Figure:
    panels = [*((name, "iou", name) for name in measured["classes"]),
              *((f"{size} objects", "object_iou", size) for size in ("small", "medium", "large"))]  # fmt: skip
    share = dict(zip(measured["classes"], measured["share_of_pixels"], strict=True))
    titles = [f"{title} ({share[key]:.1f} %)" if key in share else title for title, _, key in panels]
    figure = make_subplots(3, 5, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.09, horizontal_spacing=0.035)
    lines = [
        (trained_small(measured, WIDE), "full width, trained at each size", {"color": COLOURS[WIDE], "width": 2}),
        (run_small(measured, WIDE), f"full width, trained at {FULL}, run smaller",
         {"color": COLOURS[WIDE], "width": 1.2, "dash": "dash"}),
        (trained_small(measured, NARROW), "half width, trained at each size", {"color": COLOURS[NARROW], "width": 2}),
    ]  # fmt: skip
    for i, (_, kind, key) in enumerate(panels):
        for rows, name, style in lines:
            figure.add_trace(
                go.Scatter(x=[height(row["run"]) for row in rows], y=[row[kind][key] for row in rows], name=name, line=style,
                           mode="lines+markers", marker={"size": 5}, showlegend=i == 0),
                i // 5 + 1, i % 5 + 1,
            )  # fmt: skip
        # From zero, and never so near that the noise of a class that was not learnt fills the panel.
        top = max(10.0, *(1.1 * row[kind][key] for rows, *_ in lines for row in rows))
        figure.update_yaxes(range=[0, top], row=i // 5 + 1, col=i % 5 + 1)
    figure.update_xaxes(tickvals=[90, 180, 240, 360])
    figure = styled(
        figure, "IoU of each class (share of the pixels) and of objects by size, against the input's height", 1200, 760
    )
    legend = {"orientation": "h", "y": 1.07, "x": 0, "xanchor": "left", "yanchor": "bottom"}
    return figure.update_layout(margin_t=130, legend=legend, title={"y": 0.98, "yanchor": "top"})


def styled(figure: go.Figure, title: str, width: int = 1000, height: int = 620) -> go.Figure:
    axis = {"gridcolor": GRID, "zeroline": False, "ticks": "outside", "tickcolor": GRID}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure.update_layout(
        template="none", width=width, height=height, margin={"l": 70, "r": 20, "t": 70, "b": 60},
        font={"family": "system-ui, Arial, sans-serif", "size": 13, "color": INK},
        title={"text": title, "x": 0.01, "font_size": 16},
        legend={"x": 0.99, "xanchor": "right", "y": 0.02, "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.85)"},
    )  # fmt: skip


def latency(measured: dict, row: dict, output: str = "logits") -> float | None:
    keys = ("network", "run", "stem_scale")
    return next((one["ms"] for one in measured["latency"]["rows"]
                 if one["output"] == output and all(one[k] == row[k] for k in keys)), None)  # fmt: skip


# --- what is written ---


def tables(measured: dict) -> dict[str, str]:
    return {
        "networks": networks(measured),
        "comparisons": comparisons(measured),
        "classes": classes(measured),
        "objects": objects(measured),
    }


def listed(measured: dict) -> Iterator[dict]:
    """What the table shows: every network at its own size, the largest ones run smaller, recalibrated, and cut at the stem."""
    kinds = list(dict.fromkeys(row["network"] for row in measured["rows"]))
    for network in kinds:
        yield from trained_small(measured, network)
    for network in kinds:
        yield from run_small(measured, network)[1:]
        yield from run_small(measured, network, batchnorm=True)
        for scale in (0.75, 0.5):
            for batchnorm in (False, True):
                yield from run_small(measured, network, stem_scale=scale, batchnorm=batchnorm)


def networks(measured: dict) -> str:
    lines = [
        "| network | trained at | run at | MACs | peak, logits out | class map out | latency | mIoU | seeds | boundary mIoU "
        "| small objects |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in listed(measured):
        run = "" if row["run"] == row["trained"] else row["run"]
        run += f" stem ×{row['stem_scale']:g}" if row["stem_scale"] != 1.0 else ""
        run += ", recalibrated" if row["batchnorm"] else ""
        sd = "" if row["miou_sd"] is None else f" ± {row['miou_sd']:.1f}"
        ms = latency(measured, row)
        cells = [
            row["network"], row["trained"], run, format_quantity(row["macs"]), format_quantity(row["peak_bytes_logits"], "B"),
            format_quantity(row["peak_bytes_classes"], "B"), "" if ms is None else f"{words.digits(ms)} ms",
            f"{row['miou']:.1f}{sd}", str(len(row["seeds"])), f"{row['boundary_miou']:.1f}",
            f"{row['object_iou']['small']:.1f}",
        ]  # fmt: skip
        cells[1:3] = (cell.replace("x", "×") for cell in cells[1:3])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def comparisons(measured: dict) -> str:
    lines = ["| | points | seed by seed | over seeds | over frames | holds |", "|---|--:|--:|--:|--:|---|"]
    claim = ""
    for one in sorted((c for c in measured["comparisons"] if c["claim"] in CLAIMS), key=lambda c: CLAIMS.index(c["claim"])):
        if one["claim"] != claim:
            claim = one["claim"]
            lines.append(f"| **{claim}** | | | | | |")
        over = ["" if pair is None else " to ".join(map(signed, pair)) for pair in (one["over_seeds"], one["over_frames"])]
        what = one["what"].replace("exp48_decoder26 ", "")
        cells = [what, signed(one["difference"]), ", ".join(map(signed, one["by_seed"])), *over, one["holds"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def classes(measured: dict) -> str:
    names = measured["classes"]
    lines = ["| | " + " | ".join(names) + " | small | others |", "|---|" + "--:|" * (len(names) + 2)]
    lines.append("| share of the pixels, % | " + " | ".join(f"{v:.1f}" for v in measured["share_of_pixels"]) + " | | |")
    for network in (WIDE, NARROW):
        for row in trained_small(measured, network)[:1]:
            cells = " | ".join(f"{row['iou'][name]:.1f}" for name in names)
            lines.append(f"| IoU, {NAMES[network]}, {FULL.replace('x', '×')} | {cells} | | |")
    for one in measured["classes_lost"]:
        values = [*(one["left"][name] for name in names), one["left_small"], one["left_others"]]
        cells = " | ".join("" if value is None else f"{value:.0f}" for value in values)
        what = f"left of it, %: {NAMES[one['network']]}, {one['how']}, {one['run'].replace('x', '×')}"
        lines.append(f"| {what} | {cells} |")
    return "\n".join(lines) + "\n"


def objects(measured: dict) -> str:
    """IoU of objects by size, at full size and what is left of it."""
    sizes = ("small", "medium", "large")
    lines = ["| | " + " | ".join(sizes) + " |", "|---|" + "--:|" * len(sizes)]
    for network in (WIDE, NARROW):
        for row in trained_small(measured, network)[:1]:
            cells = " | ".join(f"{row['object_iou'][size]:.1f}" for size in sizes)
            lines.append(f"| IoU, {NAMES[network]}, {FULL.replace('x', '×')} | {cells} |")
    for one in measured["classes_lost"]:
        cells = " | ".join(f"{one['left_objects'][size]:.0f}" for size in sizes)
        lines.append(f"| left of it, %: {NAMES[one['network']]}, {one['how']}, {one['run'].replace('x', '×')} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
