"""A curve in one picture: quality against multiply-accumulates, beside the table that a notebook has."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..records import Budget, Result
from . import words
from .page import render
from .pictures import pareto_figures


def curve_page(original: Result, results: Sequence[Result]) -> str:
    """The picture as HTML that needs no other file and no network; empty where no candidate could be measured."""
    drop = next((r.drop for r in results if r.drop), None)
    figures = pareto_figures(original, results, None, Budget(drop.allowed if drop else 0.0))
    if not figures or original.quality is None:
        return ""
    return render(
        Path(__file__).parent,
        "curve.html.j2",
        title=f"{words.score_title(original.quality)} against cost",
        alternative="Quality against multiply-accumulates; all numbers are in the table above.",
        band=drop is not None,
        better="Down" if original.quality.lower_is_better else "Up",
        figures=figures,
        plotlyjs=Markup(get_plotlyjs()),
    )
