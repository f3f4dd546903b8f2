"""One self-contained HTML page that shows a whole search: verdict, picture, table, photographs, and how it was made."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from ..errors import DownresError
from ..parse import format_quantity, format_resolution
from ..records import Budget, Candidate, Preprocessing, Quality, Result, SegmentationQuality
from . import pictures, words
from .class_picture import MOST, class_figures
from .classes import class_table, who_loses
from .scenes import draw


@dataclass(frozen=True)
class View:
    """One photograph as the model sees it: uint8 (height, width, 3), resized and cropped, not normalised; percent."""

    label: str
    image: np.ndarray
    prediction: str
    confidence: float
    correct: bool


@dataclass(frozen=True)
class Photo:
    """One photograph with its true class, seen at several resolutions."""

    name: str
    truth: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class Overlay:
    """One candidate's class map of one image: uint8 (H, W), at the label's size; miou of this image alone, in percent.

    miou is None where every pixel of the label is ignored.
    """

    label: str
    classes: np.ndarray
    miou: float | None


@dataclass(frozen=True)
class Scene:
    """One image, uint8 (H, W, 3) at the label's size, with its label, uint8 (H, W), 255 where there is no class.

    overlays: the original's first, then as many candidates as are to be shown.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    overlays: tuple[Overlay, ...]


@dataclass(frozen=True)
class Segmentation:
    """What the page of a segmentation run shows instead of photographs.

    classes, colours: name and RGB of each class, in the order of their indices. hardest: the images on which the candidate
    that the page is about loses most against the original, worst first. notes: what to know of the classes, one sentence
    each. shares: of each class the percentage of all labelled pixels, or empty.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    scenes: tuple[Scene, ...]
    hardest: tuple[Scene, ...] = ()
    notes: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class ReportView:
    """All that the page shows. `results` in the order of cost; `made` says, label → sentence, how each number was made."""

    title: str
    model: str
    data: str
    licence: str
    budget: Budget
    original: Result
    results: tuple[Result, ...]
    best: Candidate | None
    preprocessing: Preprocessing
    photos: tuple[Photo, ...]
    made: dict[str, str]
    command: str
    created: str
    versions: dict[str, str]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    segmentation: Segmentation | None = None


def build_report(view: ReportView) -> str:
    """The page as HTML. It needs no other file and no network."""
    chosen = _chosen(view)
    shown = chosen or words.nearest(view.results)
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            view=view,
            chosen=chosen,
            shown=shown,
            metric=words.metric(view.original, *view.results),
            sentence=words.verdict(view.original, view.results, chosen, view.budget),
            tiles=_tiles(view.original, shown),
            rungs=_rungs(view.results),
            tuning=sorted({rung.n for r in view.results if r.recovery for rung in r.recovery.tried if rung.n}),
            axes=pictures.AXES,
            figures=pictures.pareto_figures(view.original, view.results, chosen, view.budget),
            masks=_masks(view, shown),
            plotlyjs=Markup(get_plotlyjs()),
        )
    )


def write_report(view: ReportView, path: str | os.PathLike[str]) -> Path:
    """Writes the page to `path`, whole or not at all, and returns the path."""
    target = Path(path)
    page = build_report(view)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return target


def _chosen(view: ReportView) -> Result | None:
    if view.best is None:
        return None
    for result in view.results:
        if result.candidate == view.best:
            return result
    raise DownresError(f"The best candidate, {view.best}, is not among the {len(view.results)} results of the report.")


def _masks(view: ReportView, shown: Result | None) -> dict[str, Any] | None:
    """What only the page of a segmentation run has: its table and picture of classes, and its scenes."""
    if (s := view.segmentation) is None:
        return None
    if len(s.colours) != len(s.classes):
        raise DownresError(
            f"Every class has a name and a colour, there are {len(s.classes)} names and {len(s.colours)} colours."
        )
    table = class_table(view.original, view.results, s.classes, s.shares, shown)
    scenes, hardest = ([draw(scene, s) for scene in group] for group in (s.scenes, s.hardest))
    return {
        "table": table,
        "who_loses": who_loses(table) if table else "",
        "figures": class_figures(table, s.colours) if table else {},
        "galleries": {"scenes": scenes, "hardest": hardest},
        "colours": s.colours,
        "classes": s.classes,
        "notes": s.notes,
        "names": _colour_names(s),
        "error": pictures.ERROR,
        "most": MOST,
    }


def _colour_names(segmentation: Segmentation) -> dict[str, str]:
    """`128,64,128` → `road`: what the page reads off a pixel; classes of one colour are named together."""
    names: dict[str, list[str]] = {}
    for name, colour in zip(segmentation.classes, segmentation.colours, strict=True):
        names.setdefault(",".join(map(str, colour)), []).append(name)
    return {colour: " or ".join(found) for colour, found in names.items()}


@dataclass(frozen=True)
class Tile:
    """One key number: of the shown candidate, of the original, and the gain between them."""

    name: str
    after: str
    before: str
    gain: str = ""
    note: str = ""
    more: str = ""


def _tiles(original: Result, shown: Result | None) -> list[Tile]:
    """Top-1 or mIoU, MACs, memory, latency, parameters: those that were measured on the original and on `shown`."""
    after = shown or original
    tiles = []
    if (q := original.quality) and (p := after.quality):
        bound = f"drop at most {words.bound(after.drop.upper)} points; " if after.drop else ""
        tiles.append(
            Tile(
                "mIoU" if isinstance(p, SegmentationQuality) else "Top-1 accuracy",
                words.percent(p.score),
                words.percent(q.score),
                words.change(q.score - p.score),
                f"{bound}95\u00a0% interval {words.interval(p)}, was {words.interval(q)}",
                _beside(p, q),
            )
        )
    if (c := original.cost) and (d := after.cost):
        tiles.append(_cost_tile("Multiply–accumulates", c.macs, d.macs, "", "fewer", "per forward pass"))
        note = f"input {' × '.join(map(str, d.input_size))}"
        tiles.append(_cost_tile("Peak activation memory", c.peak_activation_bytes, d.peak_activation_bytes, "B", "less", note))
    if (t := original.latency) and (u := after.latency):
        tiles.append(
            Tile(
                "Latency, median",
                f"{words.digits(u.latency_ms)} ms",
                f"{words.digits(t.latency_ms)} ms",
                words.gain(t.latency_ms, u.latency_ms, "less", "more"),
                f"p10–p90 {words.spread(u)}, was {words.spread(t)}",
            )
        )
    if (c := original.cost) and (d := after.cost):
        weights = f"{format_quantity(d.param_bytes, 'B')} of weights"
        tiles.append(_cost_tile("Parameters", c.params, d.params, "", "fewer", weights))
    return tiles


def _beside(after: Quality | SegmentationQuality, before: Quality | SegmentationQuality) -> str:
    """Of masks also pixel accuracy and boundary mIoU, where both networks have them."""
    if not isinstance(after, SegmentationQuality) or not isinstance(before, SegmentationQuality):
        return ""
    found = [
        ("pixel accuracy", after.pixel_accuracy, before.pixel_accuracy),
        ("boundary mIoU", after.boundary_miou, before.boundary_miou),
    ]
    return "; ".join(f"{n} {words.percent(a)}, was {words.percent(b)}" for n, a, b in found if a is not None and b is not None)


def _cost_tile(name: str, before: int, after: int, unit: str, less: str, note: str) -> Tile:
    more = less.replace("fewer", "more").replace("less", "more")
    gain = words.gain(before, after, less, more) or "unchanged"
    return Tile(name, format_quantity(after, unit), format_quantity(before, unit), gain, note)


def _rungs(results: tuple[Result, ...]) -> list[str]:
    """The rungs that were tried on any candidate, from cheap to dear; unknown ones last."""
    tried = dict.fromkeys(rung.rung for r in results if r.recovery for rung in r.recovery.tried)
    return [r for r in words.RUNGS if r in tried] + [r for r in tried if r not in words.RUNGS]


def _emphasise(sentence: str) -> Markup:
    """Escapes the sentence, keeps numbers with their units, and sets its factors (`5.3×`) in the accent colour."""
    kept = re.sub(r"(?<=\d) (?=%|px|points)", "\u00a0", sentence)
    return Markup(re.sub(r"(\d[\d.]*×)", r"<em>\1</em>", str(escape(kept))))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Any] = {
        "quantity": format_quantity,
        "resolution": format_resolution,
        "png": pictures.png_data_uri,
        "emphasise": _emphasise,
        "label": words.label,
        "digits": words.digits,
        "percent": words.percent,
        "interval": words.interval,
        "spread": words.spread,
        "points": words.points,
        "signed": words.signed,
        "bound": words.bound,
        "count": words.count,
        "verdict_key": words.verdict_key,
        "budget_words": words.budget_words,
        "fitting": words.fitting,
        "rgb": lambda colour: "rgb({}, {}, {})".format(*colour),
        "rung": lambda name: words.RUNGS.get(name, name),
    }
    environment.filters.update(filters)
    return environment
