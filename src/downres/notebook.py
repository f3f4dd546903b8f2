"""How results show themselves in a notebook: HTML tables in its own colours. No other room knows of notebooks."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .errors import DownresError, shown

_NUMBER = ' style="text-align:right"'
_WORDS = ' style="text-align:left"'
_FAINT = ' style="opacity:0.55"'


def table(rows: Sequence[Mapping[str, Any]], faint: Sequence[bool] = ()) -> str:
    """A row each, columns by the names that they have; those without a word in them are left out. faint: rows in pale."""
    if not rows:
        return ""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(_said(row.get(name)) for row in rows)]
    head = "".join(f"<th{_WORDS}>{escape(name)}</th>" for name in names)
    body = []
    for i, row in enumerate(rows):
        cells = "".join(_cell(row.get(name)) for name in names)
        body.append(f"<tr{_FAINT if i < len(faint) and faint[i] else ''}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def fields(values: Mapping[str, Any]) -> str:
    """Name and value, one under another; of a list of objects a table."""
    rows = "".join(f"<tr><th{_WORDS}>{escape(name)}</th>{_cell(value)}</tr>" for name, value in values.items())
    return f"<table><tbody>{rows}</tbody></table>"


def sentences(*texts: str) -> str:
    """A paragraph each; what is empty is left out."""
    return "".join(f"<p>{escape(shown(text))}</p>" for text in texts if text)


def page(document: str, height: int) -> str:
    """A whole page of ours, with its own style and scripts, in a frame of so many pixels."""
    document = str(document)  # of a template's markup, which would escape what replaces its letters, the letters
    return (
        f'<iframe srcdoc="{escape(document)}" width="100%" height="{height}" style="border:0" '
        'sandbox="allow-scripts" loading="lazy"></iframe>'
    )


def frame_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas DataFrame, a row each; what is nested becomes columns with dots in their names, `cost.macs`."""
    try:
        import pandas
    except ImportError:
        raise DownresError("A DataFrame needs pandas: pip install 'downres[pandas]'.") from None
    return pandas.json_normalize(list(rows))


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"<td{_WORDS}>{fields(value) if value else ''}</td>"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return f"<td{_WORDS}>{table(value)}</td>"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"<td{_NUMBER if number else _WORDS}>{escape(shown(_said(value)))}</td>"


def _said(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\u202f")  # 4 089 284 608
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(one) for one in value)
    return str(value)  # of a styled text its letters
