"""One self-contained HTML page that shows a whole search: verdict, picture, table, photographs, and how it was made."""

import os
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..errors import DownresError
from ..parse import format_quantity
from ..record import write_whole
from ..records import Budget, Candidate, Preprocessing, Result, Score
from . import pictures, words
from .interactions import interactions
from .page import Section, render


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
    made: dict[str, str]
    command: str
    created: str
    versions: dict[str, str]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    score: type[Score] = Score
    section: Section = Section()


def build_report(view: ReportView) -> str:
    """The page as HTML. It needs no other file and no network."""
    chosen = chosen_of(view)
    shown = chosen or words.nearest(view.results)
    return render(
        Path(__file__).parent,
        "template.html.j2",
        view=view,
        chosen=chosen,
        shown=shown,
        score=view.score,
        metric=view.score.metric,
        unit=view.original.quality.unit if view.original.quality else "points",
        sentence=words.verdict(view.original, view.results, chosen, view.budget, view.score),
        tiles=_tiles(view.original, shown, any(r.candidate.network != r.candidate for r in view.results)),
        rungs=_rungs(view.results),
        interactions=interactions(view.original, view.results, chosen),
        tuning=sorted({rung.n for r in view.results if r.recovery for rung in r.recovery.tried if rung.n}),
        axes=pictures.axes_for(view.results),
        figures=pictures.pareto_figures(view.original, view.results, chosen, view.budget),
        section=view.section,
        plotlyjs=Markup(get_plotlyjs()),
    )


def write_report(view: ReportView, path: str | os.PathLike[str]) -> Path:
    """Writes the page to `path`, whole or not at all, and returns the path."""
    target = Path(path)
    page = build_report(view)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page.encode())
    return target


def chosen_of(view: ReportView) -> Result | None:
    if view.best is None:
        return None
    for result in view.results:
        if result.candidate == view.best:
            return result
    raise DownresError(f"The best candidate, {view.best}, is not among the {len(view.results)} results of the report.")


@dataclass(frozen=True)
class Tile:
    """One key number: of the shown candidate, of the original, and the gain between them."""

    name: str
    after: str
    before: str
    gain: str = ""
    note: str = ""
    more: str = ""


def _tiles(original: Result, shown: Result | None, files: bool) -> list[Tile]:
    """The score, MACs, memory, latency, parameters: those that were measured on the original and on `shown`. files: whether the
    search was one over files of one network, too.
    """
    after = shown or original
    tiles = []
    if (q := original.quality) and (p := after.quality):
        bound = f"drop {words.bound(after.drop)} {p.unit}; " if after.drop else ""
        before, was = q.score, f", was {words.interval(q)}"
        if after.drop and p.images != q.images:  # of a proof in rounds: on the same images
            before = p.score - after.drop.drop if p.lower_is_better else p.score + after.drop.drop
            was = f", both on {words.count(p.images, 'image')}"
        tiles.append(
            Tile(
                p.title or p.metric,
                p.text(p.score),
                q.text(before),
                words.change(after.drop.drop if after.drop else q.score - p.score, p.unit),
                f"{bound}95\u00a0% interval {words.interval(p)}{was}",
                p.against(q),
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
                words.faster(t, u).removesuffix(" time") or "not beyond the noise",
                f"p10–p90 {words.spread(u)}, was {words.spread(t)}",
            )
        )
    if files and (f := original.footprint) and (g := after.footprint):
        resident = f"{format_quantity(g.peak_rss_bytes, 'B')} resident to load it and answer once" if g.peak_rss_bytes else ""
        tiles.append(_cost_tile("File", f.file_bytes, g.file_bytes, "B", "less", resident))
    if (flips := after.flips) is not None and (files or flips.verdict):
        told = f"{flips.lost} right→wrong, {flips.won} wrong→right; at most {words.flips_bound(flips)}\u00a0%"
        tiles.append(Tile("Another answer than before", words.percent(flips.share), words.percent(0.0), "", told))
    if (c := original.cost) and (d := after.cost):
        weights = f"{format_quantity(d.param_bytes, 'B')} of weights"
        tiles.append(_cost_tile("Parameters", c.params, d.params, "", "fewer", weights))
    return tiles


def _cost_tile(name: str, before: int, after: int, unit: str, less: str, note: str) -> Tile:
    more = less.replace("fewer", "more").replace("less", "more")
    gain = words.gain(before, after, less, more) or "unchanged"
    return Tile(name, format_quantity(after, unit), format_quantity(before, unit), gain, note)


def _rungs(results: tuple[Result, ...]) -> list[str]:
    """The rungs that were tried on any candidate, from cheap to dear; unknown ones last."""
    tried = dict.fromkeys(rung.rung for r in results if r.recovery for rung in r.recovery.tried)
    return [r for r in words.RUNGS if r in tried] + [r for r in tried if r not in words.RUNGS]
