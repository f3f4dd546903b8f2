"""A model's name: the part that follows commas, `exp48_decoder26,width=0.5`, and what to say where there is none like it."""

import difflib
from collections.abc import Iterable, Mapping

from ..errors import DownresError

MOST_CLASSES = 1_000_000
"""Of a network, many times more than any has."""

_WORDS = {int: "a whole number up to 1000000", float: "a number up to 16"}
_MOST = {int: MOST_CLASSES, float: 16.0}
"""Larger ones are typing errors, which would fill all memory."""


def split_options(spec: str, kinds: Mapping[str, type]) -> tuple[str, dict[str, float]]:
    """`NAME,key=value,…` → NAME and its options. kinds: int or float for each option that there is.

    Raises DownresError for an option that is unknown, given twice or no number.
    """
    name, *words = spec.split(",")
    found: dict[str, float] = {}
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if key not in kinds or key in found:
            known = () if key in found else kinds
            hint = nearest(key, known, f"give {', '.join(f'{k}=…' for k in kinds)}.", most=1, cutoff=0.6)
            what = "was given twice" if key in found else "is none"
            raise DownresError(f"The options of {name} are {', '.join(kinds)}, {key!r} {what}: {hint}")
        try:
            found[key] = kinds[key](value)
            if not abs(found[key]) <= _MOST[kinds[key]]:
                raise ValueError
        except (ValueError, OverflowError):
            raise DownresError(
                f"The option {key} of {name} is {_WORDS[kinds[key]]}, {value[:40]!r} is not: give for example "
                f"{key}={8 if kinds[key] is int else 0.5}."
            ) from None
    return name, found


def nearest(word: str, known: Iterable[str], otherwise: str, most: int = 3, cutoff: float = 0.5) -> str:
    """The end of a sentence on a word that is not known: the nearest that are, else what to do."""
    near = difflib.get_close_matches(word.lower(), list(known), n=most, cutoff=cutoff)
    return f"did you mean {', '.join(near)}?" if near else otherwise
