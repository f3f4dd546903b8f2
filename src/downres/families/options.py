"""The part of a model's name that follows commas: `exp48_decoder26,width=0.5`."""

import difflib
from collections.abc import Mapping

from ..errors import DownresError

_WORDS = {int: "a whole number", float: "a number"}


def split_options(spec: str, kinds: Mapping[str, type]) -> tuple[str, dict[str, float]]:
    """`NAME,key=value,…` → NAME and its options. kinds: int or float for each option that there is.

    Raises DownresError for an option that is unknown, given twice or no number.
    """
    name, *words = spec.split(",")
    found: dict[str, float] = {}
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if key not in kinds or key in found:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near and near[0] != key else f"give {', '.join(f'{k}=…' for k in kinds)}."
            what = "was given twice" if key in found else "is none"
            raise DownresError(f"The options of {name} are {', '.join(kinds)}, {key!r} {what}: {hint}")
        try:
            found[key] = kinds[key](value)
        except ValueError:
            raise DownresError(
                f"The option {key} of {name} is {_WORDS[kinds[key]]}, {value!r} is not: give for example {key}="
                f"{8 if kinds[key] is int else 0.5}."
            ) from None
    return name, found
