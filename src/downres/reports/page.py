"""What every part of the report page is rendered with: one template environment, and a task's own part as HTML."""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..errors import shown
from ..parse import format_quantity, format_resolution
from . import pictures, words


@dataclass(frozen=True)
class Section:
    """A task's own part of the page: style sheet, sections and script, as HTML."""

    style: Markup = Markup("")
    body: Markup = Markup("")
    script: Markup = Markup("")


def render(folder: Path, template: str, **values: Any) -> Markup:
    """A template in a folder as HTML, with the filters of the report; it may build on the report's own templates."""
    return Markup(_environment(folder).get_template(template).render(**values))


def _emphasise(sentence: str) -> Markup:
    """Escapes the sentence, keeps numbers with their units, and sets its factors (`5.3×`) in the accent colour."""
    kept = re.sub(r"(?<=\d) (?=%|px|points)", "\u00a0", shown(sentence))
    return Markup(re.sub(r"(\d[\d.]*×)", r"<em>\1</em>", str(escape(kept))))


def columns(pictures: int, most: int = 4) -> int:
    """Of a grid of so many pictures, at most `most`: rows as even as they can be, so that no picture stands alone."""
    rows = max(1, math.ceil(pictures / most))
    return max(1, math.ceil(pictures / rows))


def _shown(value: Any) -> Any:
    """Of every text that a template writes; HTML of our own is left as it is."""
    return shown(value) if type(value) is str else value


@cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        finalize=_shown,
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
        "timed_on": words.timed_on,
        "bound": words.bound,
        "count": words.count,
        "channels": words.channels,
        "columns": columns,
        "verdict_key": words.verdict_key,
        "shown_verdict": words.shown_verdict,
        "budget_words": words.budget_words,
        "fitting": words.fitting,
        "pixels": words.pixels,
        "rgb": lambda colour: "rgb({}, {}, {})".format(*colour),
        "capital": lambda text: text if text != text.lower() else text[:1].upper() + text[1:],
        "rung": lambda name: words.RUNGS.get(name, name),
    }
    environment.filters.update(filters)
    return environment
