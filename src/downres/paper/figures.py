"""An experiment as a card, a table and a page with its figure."""

import base64
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..measuring.cost import CONVENTION
from ..parse import INT8, format_quantity
from ..record import write_whole
from ..reports.families_picture import lay_out
from ..reports.page import render
from .experiments import EXPERIMENTS, MODEL, Experiment
from .running import MEMORY_BATCH, Line, Reproduction, slug

COLOURS = ("#2f6fb2", "#c4572e", "#3a8a5f", "#8a5fb0", "#b08a2e", "#5f6b7a", "#b0427a", "#2e9a9a")
DECODED = {"ImageNet": 150, "Cityscapes": 12}
"""Pictures that one core decodes and resizes in a second, about: JPEGs of 110 kB, PNGs of 2 megapixels."""
SUSTAINED = 40e12
"""Floating-point operations a second of a GPU in a training in bfloat16, about: a seventh of an A100's peak."""
GPUS, CORES = 8, 64


def taken(e: Experiment, lines: Sequence[Line]) -> str:
    """What training all of it takes on such a machine, by counting: the slower of computing and decoding."""
    if not e.images:
        return "minutes on one core: costs are counted"
    if e.of:
        return f"a pass over the proof images for each size and network of {e.of}, on one CPU, as that is what 8 bits are for"
    seen, each = e.training.epochs * e.images, DECODED[e.data]
    # 1 MAC is 2 operations, and going back takes twice as many; what is trained on is a square of another side.
    area = (line.entry.trained**2 / (line.entry.look.side**2 * e.aspect) for line in lines)
    computed = sum(6 * line.cost.macs * part * seen for line, part in zip(lines, area, strict=True))
    hours = computed / (_gpus(e) * SUSTAINED) / 3600, len(lines) * seen / (CORES * each) / 3600
    slower = "computing" if hours[0] > hours[1] else "decoding"
    return (
        f"about {max(hours):.0f} hours for {len(lines)} trainings of {e.training.epochs} epochs on {_gpus(e)} "
        f"GPU{'s' * (_gpus(e) > 1)} and {CORES} cores, by counting and without looking ({slower} decides: "
        f"{SUSTAINED / 1e12:.0f} TFLOP/s a GPU and {each} images/s a core are assumed)"
    )


def command(e: Experiment, folder: str = "paper/") -> str:
    data = {"ImageNet": "imagenet/", "Cityscapes": "cityscapes/"}.get(e.data, "")
    run = ["downres", "paper", e.name]
    if not e.images:
        return " ".join([*run, "--table"])
    run += ["--data", data, "--out", folder]
    if e.of:
        return " ".join(run)
    several = ["torchrun", "--nproc-per-node", str(GPUS), "-m"] if _gpus(e) > 1 else []
    return " ".join([*several, *run, "--train", "bf16=true"])


def _gpus(e: Experiment) -> int:
    """Statistics of BatchNorm are of a process's own images: of a small batch they are taken in one."""
    return GPUS if e.training.training_batch >= 8 * GPUS else 1


def listed() -> list[dict[str, str]]:
    """Every experiment, a row each."""
    return [{"name": e.name, "what": e.title, "data": e.data} for e in EXPERIMENTS.values()]


def card(found: Reproduction) -> list[str]:
    """What an experiment is, its command, what it takes, what is known of its result: a line each."""
    e = found.experiment
    run = [line for line in found.lines if line.seen]
    shown = "Nothing of it is run here"
    if run:
        shown = f"{len(run)} of {len(found.lines)} networks are trained in {found.folder}"
    scale = f"; sizes in pixels are {found.scale:g} times the paper's" if found.scale != 1 else ""
    return [
        f"{e.title} ({e.data}). {e.figure}",
        command(e),
        *([f"It takes {taken(e, found.lines)}."] if found.scale == 1 else []),
        e.known,
        f"{shown}{scale}." + (f" Data: {found.data}" if found.data else ""),
    ]


def rows(found: Reproduction) -> list[dict[str, str]]:
    """The table: costs always, quality where there is a network."""
    made = []
    for line in found.lines:
        scores, hours = line.quality(), [one.hours for one in line.seen if one.hours is not None]
        made.append(
            {
                "family": line.entry.family,
                "network": line.entry.name,
                "MACs": format_quantity(line.cost.macs),
                "params": format_quantity(line.cost.params),
                f"memory, batch {MEMORY_BATCH}": format_quantity(line.memory, "B"),
                _metric(found): _mean(scores),
                "seeds": str(len(scores)) if scores else "",
                "training": f"{statistics.mean(hours):.2g} h" if hours else "",
            }
        )
    return made


def looks_rows(found: Reproduction) -> list[dict[str, str]]:
    """Every look at every network, a row each."""
    made = []
    for line in found.lines:
        for look in dict.fromkeys(look for one in line.seen for look in one.looks):
            scores = line.quality(look)
            cost = line.cost if look.side == line.entry.look.side else line.at.get(look.side)
            row = {"network": line.entry.name, "looked at": str(look), "MACs": format_quantity(cost.macs) if cost else ""}
            made.append({**row, _metric(found): _mean(scores), "seeds": str(len(scores))})
    return made


def _metric(found: Reproduction) -> str:
    score = next((s for line in found.lines for one in line.seen for s in one.looks.values()), None)
    return score.metric if score is not None else "quality"


def _mean(scores: Sequence[float]) -> str:
    if not scores:
        return "not run"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


@dataclass(frozen=True)
class _Axis:
    title: str
    unit: str

    def of(self, line: Line) -> float:
        return float(line.memory if self.unit else line.cost.macs)


MACS, MEMORY = _Axis("MACs of one image", ""), _Axis(f"peak activation memory, batch {MEMORY_BATCH}", "B")


def figures(found: Reproduction) -> dict[str, go.Figure]:
    """Quality against MACs and memory, and against the size of looks; memory against MACs where nothing is trained."""
    known = any(line.quality() for line in found.lines)
    made = {}
    if known:
        made = {"macs": _against(found, MACS), "memory": _against(found, MEMORY)}
    else:
        made = {"cost": _cost_plane(found)}
    if sizes := _against_sizes(found):
        made["sizes"] = sizes
    return made


def _families(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.entry.family, []).append(line)
    return found


def _cost_plane(found: Reproduction) -> go.Figure:
    figure = go.Figure()
    for i, (family, lines) in enumerate(_families(found.lines).items()):
        lines = sorted(lines, key=MACS.of)
        many = len(lines) > 60
        figure.add_trace(
            go.Scatter(
                name=family,
                x=[MACS.of(line) for line in lines],
                y=[MEMORY.of(line) for line in lines],
                mode="lines" if many and family != MODEL else "markers" if many else "lines+markers",
                line={"color": COLOURS[i % len(COLOURS)], "width": 2, "dash": "dot" if family.startswith(MODEL) else "solid"},
                marker={"color": COLOURS[i % len(COLOURS)], "size": 4 if many else 8, "opacity": 0.5 if many else 1},
                hovertext=[_hover(line) for line in lines],
                hoverinfo="text",
            )
        )
    _lay_out(figure, MACS.title, MEMORY.title)
    for axis, of in (("xaxis", MACS), ("yaxis", MEMORY)):
        _ticks(figure, axis, [of.of(line) for line in found.lines], of.unit)
    return figure


def _against(found: Reproduction, axis: _Axis) -> go.Figure:
    """Quality of trained entries; where the others stand, a mark on the axis."""
    figure = go.Figure()
    metric = _metric(found)
    for i, (family, lines) in enumerate(_families(found.lines).items()):
        lines = sorted(lines, key=axis.of)
        seen = [line for line in lines if line.quality()]
        if not seen:
            continue
        scores = [line.quality() for line in seen]
        figure.add_trace(
            go.Scatter(
                name=family,
                x=[axis.of(line) for line in seen],
                y=[statistics.mean(s) for s in scores],
                error_y={"array": [statistics.stdev(s) if len(s) > 1 else 0 for s in scores], "thickness": 1, "width": 3},
                mode="lines+markers",
                line={"color": COLOURS[i % len(COLOURS)], "width": 2, "dash": "dot" if family == MODEL else "solid"},
                marker={"color": COLOURS[i % len(COLOURS)], "size": 9},
                hovertext=[f"{_hover(line)}<br>{metric} {_mean(s)}" for line, s in zip(seen, scores, strict=True)],
                hoverinfo="text",
            )
        )
    _lay_out(figure, axis.title, metric)
    _ticks(figure, "xaxis", [axis.of(line) for line in found.lines], axis.unit)
    return figure


def _against_sizes(found: Reproduction) -> go.Figure | None:
    """Of every network its quality against the size that it is looked at with, a line a mode or precision."""
    figure = go.Figure()
    metric = _metric(found)
    colour = 0
    for line in found.lines:
        kinds: dict[tuple[str, str], dict[int, float]] = {}
        for look in dict.fromkeys(look for one in line.seen for look in one.looks):
            best = kinds.setdefault((look.mode, look.precision), {})
            score = statistics.mean(line.quality(look))
            best[look.side] = max(score, best.get(look.side, -math.inf))  # of several resizes the best, as FixRes has it
        for (mode, precision), points in kinds.items():
            if len(points) < 2:
                continue
            sides = sorted(points)
            figure.add_trace(
                go.Scatter(
                    name=" ".join(part for part in (line.entry.name, mode, precision if precision == INT8 else "") if part),
                    x=sides,
                    y=[points[side] for side in sides],
                    mode="lines+markers",
                    line={
                        "color": COLOURS[colour % len(COLOURS)],
                        "width": 2,
                        "dash": "dot" if precision == INT8 or mode == "bicubic" else "solid",
                    },
                    marker={"size": 6},
                )
            )
        colour += any(len(points) > 1 for points in kinds.values())
    if not figure.data:
        return None
    _lay_out(figure, "input, pixels of the short side (of the paper's scale)", metric)
    return figure


def _hover(line: Line) -> str:
    return (
        f"<b>{line.entry.name}</b><br>{format_quantity(line.cost.macs)} MACs<br>"
        f"{format_quantity(line.memory, 'B')} at batch {MEMORY_BATCH}<br>{format_quantity(line.cost.params)} parameters"
    )


def _lay_out(figure: go.Figure, x: str, y: str) -> None:
    lay_out(figure)
    for name, title in (("xaxis", x), ("yaxis", y)):
        figure.update_layout(
            {
                name: {
                    "title": {"text": title, "standoff": 12},
                    "gridcolor": "var(--grid)",
                    "linecolor": "var(--line)",
                    "automargin": True,
                    "zeroline": False,
                }
            }
        )


def _ticks(figure: go.Figure, axis: str, values: Sequence[float], unit: str) -> None:
    """Powers of ten with 2 and 5 between them where costs differ widely, else from 0 on."""
    low, high = min(values), max(values)
    if high > 20 * low:
        ticks = [m * 10.0**p for p in range(int(math.log10(low)), int(math.log10(high)) + 1) for m in (1, 2, 5)]
        kept = [t for t in ticks if 0.8 * low <= t <= 1.25 * high]
        figure.update_layout({axis: {"type": "log"}})
    else:
        step = 10.0 ** math.floor(math.log10(high))
        step = next(s for s in (step, step / 2, step / 5, step / 10) if high / s >= 4)
        kept = [step * i for i in range(int(high / step) + 1)]
        figure.update_layout({axis: {"range": [0, 1.06 * high]}})
    figure.update_layout({axis: {"tickvals": kept, "ticktext": [format_quantity(t, unit) for t in kept]}})


def write_figure(found: Reproduction, path: str | os.PathLike[str]) -> Path:
    """The page with the experiment's figure and tables: HTML that needs no other file and no network."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page = render(
        Path(__file__).parent,
        "paper.html.j2",
        title=found.experiment.title,
        alternative="The figure; all numbers are in the tables below.",
        found=found,
        e=found.experiment,
        taken=taken(found.experiment, found.lines) if found.scale == 1 else "",
        command=command(found.experiment),
        rows=rows(found),
        looks=looks_rows(found),
        scenes=_scenes(found),
        patches=_patches(found),
        figures={key: json.loads(figure.to_json()) for key, figure in figures(found).items()},
        convention=CONVENTION,
        plotlyjs=Markup(get_plotlyjs()),
    )
    write_whole(target, page.encode())
    return target


@dataclass(frozen=True)
class Scenes:
    """Figure 4: a picture, and a network's answers to it by resolution, as data URIs."""

    name: str
    picture: str
    answers: tuple[tuple[str, str, str], ...]


def _scenes(found: Reproduction) -> list[Scenes]:
    made = []
    for line in found.lines:
        for one in line.seen[:1]:
            place = (
                found.folder and found.folder / found.experiment.name / slug(line.entry.name) / f"seed{one.seed}" / "answers"
            )
            if place and (place / "picture.png").is_file():
                answers = [
                    (str(look), one.looks[look].text(one.looks[look].score), _uri(file))
                    for look in one.looks
                    if (file := place / f"{slug(str(look))}_mask.png").is_file()
                ]
                made.append(Scenes(line.entry.name, _uri(place / "picture.png"), tuple(answers)))
    return made


def _uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


@dataclass(frozen=True)
class Patches:
    """Figure 3: an input of `side` pixels in patches."""

    name: str
    side: int
    patch: int

    @property
    def count(self) -> int:
        return self.side // self.patch


def _patches(found: Reproduction) -> list[Patches]:
    if found.experiment.name != "vit":
        return []
    made = [Patches(line.entry.name, line.entry.made["side"], line.entry.made["patch"]) for line in found.lines]
    return list({(p.side, p.patch): p for p in made}.values())[:7]
