"""The paper's street scenes, small: RegSeg and LR-ASPP trained on CamVid with crops of four sizes, looked at at twelve, in
float and in 8 bits.

    python recipes/small_paper.py --data ../shared/data/camvid --out runs/small

Two experiments of `downres paper` with every size in pixels 0.1757 times the paper's (CamVid at 180×240, its labels at their
own 360×480) and 40 epochs where the paper has 1000; otherwise its recipe, but for bfloat16 and an average of weights. Then two
of the networks at heights between the paper's, which RegSeg's cells of 16 px divide or do not. Goes on where it was; writes
results/small_paper.json and .png, and the tables between the marks of README.md. Expected time: an hour a seed on one core of a
Xeon with bfloat16 instructions. The picture needs the package playwright and chromium.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import plotly.graph_objects as go
from pictures import GRID, INK, save_png

import downres
from downres.environment import versions
from downres.measuring.latency import hardware
from downres.paper import running
from downres.paper.experiments import FULL, Look, experiment, scaled
from downres.paper.running import Line
from downres.parse import format_quantity
from downres.recovery.weights import Weights, with_tensors
from downres.searching.prepare import Measuring
from downres.tasks import Question

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCALE = 0.1757
TRAIN = ("epochs=40", "bf16=true", "ema=0.998")
SEEDS = (0, 1, 2)
EXPERIMENTS = {"sizes": "regseg", "8 bits": "int8-regseg"}
HEIGHTS = (90, 96, 105, 112, 120, 128, 135, 144, 150, 157, 165, 176, 180)
BETWEEN = ("RegSeg 1024", "RegSeg 896")
CLASSES = 11
CELL = 16
"""Pixels a side that one place of RegSeg's last feature map stands for."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CamVid; without it what is in --out is written down")
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="kept here, and gone on with")
    options = parser.parse_args()
    found = {}
    for title, name in EXPERIMENTS.items():
        if options.data is not None:
            downres.reproduce(name, options.data, options.out, seeds=SEEDS, scale=SCALE, train=TRAIN, threads=1, progress=said)
        found[title] = downres.reproduce(name, out=options.out)
    if options.data is not None:
        look_between(options.data, options.out)
    between = options.out / "between.json"
    document = {
        "date": date.today().isoformat(),
        "command": "python recipes/small_paper.py",
        "hardware": hardware(),
        "versions": versions(),
        "scale": SCALE,
        "training": list(TRAIN),
        "data": found["sizes"].data,
        "rows": [row for title, one in found.items() for line in one.lines for row in rows(title, line)],
        "between": json.loads(between.read_text()) if between.is_file() else [],
    }
    (RESULTS / "small_paper.json").write_text(json.dumps(document, indent=1) + "\n")
    save_png(against_sizes(document["rows"]), RESULTS / "small_paper.png")
    readme = HERE / "README.md"
    tables = {title: table(document["rows"], title) for title in EXPERIMENTS} | {"cells": cells(document["between"])}
    for title, made in tables.items():
        start, end = f"<!-- small paper, {title} -->\n", f"<!-- end of small paper, {title} -->"
        before, _, rest = readme.read_text().partition(start)
        readme.write_text(before + start + made + end + rest.partition(end)[2])


def look_between(data: Path, out: Path) -> None:
    """mIoU of every seed at heights between the paper's, into out/between.json."""
    e, file = experiment("regseg"), out / "between.json"
    measuring = Measuring(runtime="torch", threads=1)
    run = running._Run(e, out, SCALE, CLASSES, 480 / 360, measuring, Question(), None)
    known = {
        (row["trained"], row["height"], row["seed"]): row for row in (json.loads(file.read_text()) if file.is_file() else [])
    }
    for entry in (entry for entry in e.entries if entry.name in BETWEEN):
        trained = scaled(entry.trained, SCALE)
        for seed in SEEDS:
            wanted = [h for h in HEIGHTS if (trained, h, seed) not in known]
            if not wanted or not (run.place(entry, seed) / "training.json").is_file():
                continue
            run.opened(entry, seed, data)
            step, weights = run.step_of(entry, seed), Weights(run.place(entry, seed))
            network = with_tensors(run.network(entry, seed), weights.get(step.tensors)).eval()
            for height in wanted:
                side = next(side for side in range(1, 2 * FULL) if scaled(side, SCALE) == height)
                score = run.looked(entry, network, Look(side, mode="bilinear"))
                known[trained, height, seed] = {
                    "trained": trained,
                    "height": height,
                    "seed": seed,
                    "miou": round(score.score, 3),
                }
                file.write_text(json.dumps(list(known.values())))


def said(text: str, done: int, total: int) -> None:
    print(f"{text} ({done} of {total})", flush=True)


def rows(title: str, line: Line) -> Iterator[dict]:
    """A network at a look: mIoU of each seed with the interval over images."""
    for look in dict.fromkeys(look for one in line.seen for look in one.looks):
        scores = {one.seed: one.looks[look] for one in line.seen if look in one.looks}
        yield {
            "experiment": title,
            "network": line.entry.name.split()[0],
            "trained": scaled(line.entry.trained, SCALE),
            "height": scaled(look.side, SCALE),
            "upsampling": look.mode,
            "precision": look.precision,
            "macs": cost(line, look),
            "seeds": {
                str(seed): {"miou": round(s.miou, 3), "interval": [round(s.miou_low, 3), round(s.miou_high, 3)]}
                for seed, s in scores.items()
            },
        }


def cost(line: Line, look: Look) -> int:
    return line.at[look.side].macs if look.side in line.at else line.cost.macs


def mious(row: dict) -> list[float]:
    return [one["miou"] for one in row["seeds"].values()]


def by_network(rows: list[dict], **wanted: str) -> dict[tuple[str, int], list[dict]]:
    """(network, pixels that it was trained at) → its rows with these values, from small to large."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["height"]):
        if all(row[key] == value for key, value in wanted.items()):
            found.setdefault((row["network"], row["trained"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] == "LR-ASPP", -item[0][1])))


def table(rows: list[dict], title: str) -> str:
    """mIoU, a column a height."""
    rows = [row for row in rows if row["experiment"] == title and row["upsampling"] == "bilinear"]
    heights = sorted({row["height"] for row in rows})
    lines = [
        "| network | crops of | precision | seeds | " + " | ".join(f"{h} px" for h in heights) + " |",
        "|---|--:|---|--:|" + "--:|" * len(heights),
    ]
    for precision in sorted({row["precision"] for row in rows}):
        for (network, trained), some in by_network(rows, precision=precision).items():
            cells = {row["height"]: shown(mious(row)) for row in some}
            seeds = min(len(row["seeds"]) for row in some)
            begin = [network, f"{trained} px", precision, str(seeds)]
            lines.append("| " + " | ".join(begin + [cells.get(h, "") for h in heights]) + " |")
    if title == "sizes":
        costs = {row["height"]: row["macs"] for row in rows if row["network"] == "RegSeg"}
        lines.append("| MACs, RegSeg | | | | " + " | ".join(format_quantity(costs[h]) for h in heights) + " |")
    return "\n".join(lines) + "\n"


def cells(rows: list[dict]) -> str:
    """A row a height: how far its cells reach over the picture, and mIoU."""
    trained = sorted({row["trained"] for row in rows}, reverse=True)
    lines = [
        "| height | cells | cells' pixels by height | " + " | ".join(f"crops of {t} px" for t in trained) + " |",
        "|--:|--:|--:|" + "--:|" * len(trained),
    ]
    for height in sorted({row["height"] for row in rows}):
        count = -(-height // CELL)
        found = [[r["miou"] for r in rows if r["height"] == height and r["trained"] == t] for t in trained]
        lines.append(f"| {height} px | {count} | {count * CELL / height:.3f} | " + " | ".join(map(shown, found)) + " |")
    return "\n".join(lines) + "\n"


def shown(scores: list[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def against_sizes(rows: list[dict]) -> go.Figure:
    """A colour a network, in float; bars: standard deviation over the seeds."""
    figure = go.Figure()
    networks = by_network(rows, experiment="sizes", upsampling="bilinear")
    for colour, (key, some) in zip(COLOURS, networks.items(), strict=True):
        scores = [mious(row) for row in some]
        figure.add_trace(
            go.Scatter(
                name=f"{key[0]}, crops of {key[1]} px",
                x=[row["height"] for row in some],
                y=[statistics.mean(s) for s in scores],
                error_y={"array": [statistics.stdev(s) if len(s) > 1 else 0 for s in scores], "thickness": 1, "width": 3},
                mode="lines+markers",
                line={"color": colour, "width": 2},
            )
        )
    axis = {"gridcolor": GRID, "zeroline": False, "rangemode": "tozero"}
    figure.update_layout(
        template="plotly_white",
        font={"color": INK, "size": 14},
        xaxis={**axis, "title": "height of the input, pixels (labels: 360)"},
        yaxis={**axis, "title": "mIoU at the labels' size, %"},
        width=900,
        height=560,
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
    )
    return figure


if __name__ == "__main__":
    main()
