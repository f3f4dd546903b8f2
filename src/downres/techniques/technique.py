"""What a technique tells of itself, in one place, and the register that everything else asks. No torch here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DownresError
from ..parse import Resolution, floats

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work

DECIMAL = r"\d{0,9}\.?\d{1,20}(?:e-?\d{1,3})?"
"""Of a regular expression: a number above 0 as `number` writes it."""


@dataclass(frozen=True)
class Design:
    """What the plan needs to know of a network: its resolution, total stride, patch side, and whether it has a sequence.

    unit: what height and width are divided by, None: the total stride.
    """

    native: Resolution
    stride: int
    patch: int | None = None
    sequence: bool = False
    unit: tuple[int, int] | None = None

    @property
    def divided_by(self) -> tuple[int, int]:
        return self.unit or (self.stride, self.stride)


@dataclass(frozen=True)
class Style:
    """Of a line in the picture of costs: colour (readable on light and dark) and symbol."""

    colour: str
    symbol: str


class Technique:
    """One way to look at fewer pixels or tokens. One instance a technique; `register` makes it known everywhere.

    As it is here it is a switch: off by default, in a candidate's text by its name. A subclass says what differs.

    name: of its value in a candidate: a field of `Candidate`, else a key of `Candidate.extra`. Values are hashable and JSON.
    neutral: the value that changes nothing.
    keyword: of Python calls, for the several values to try (`stem_scales`): a field of `Axes`, else a key of `Axes.extra`.
    option, metavar, help: of the command line; without a metavar it is a flag, without an option none.
    order: techniques are applied to a network from low to high: 10 makes another network, 20 other patches, 30 gives it its
        input size, from 40 on what is inside changes.
    always: applied to every candidate, whatever its value.
    measurable: False where weights are drawn anew, so that there is no accuracy yet and only costs can be counted.
    inside: changes the number of tokens or the size of a feature map behind the embedding.
    refits: changes the size of images or patches that a transformer is made for.
    sought: what a call of `reduce` that changes nothing says it looked for.
    in_file: changes the file that a runtime gets, and nothing of the network: costs are those of the network.
    crosses: its values are tried with every other candidate, and not at the original's resolution alone.
    seldom: left out of JSON where it is off, as is what is in the file: runs of before its time are read as ever.
    """

    name: str = ""
    neutral: Any = False
    keyword: str = ""
    option: str = ""
    metavar: str = ""
    help: str = ""
    order: float = 40
    always: ClassVar[bool] = False
    measurable: bool = True
    inside: bool = False
    refits: bool = False
    sought: str = ""
    in_file: bool = False
    crosses: bool = False
    seldom: bool = False
    styles: Mapping[str, Style] = {}
    """Family in the picture of costs → its line."""

    # Its part of a candidate

    @property
    def fields(self) -> Mapping[str, Any]:
        """Names of its values with the ones that change nothing."""
        return {self.name: self.neutral}

    def value(self, c: "Candidate") -> Any:
        return c.get(self.name, self.neutral)

    def is_on(self, c: "Candidate") -> bool:
        return any(c.get(name, neutral) != neutral for name, neutral in self.fields.items())

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        """Its values as they are kept. DownresError for what is none."""
        return {self.name: self.normalise(values[self.name])}

    def normalise(self, value: Any) -> Any:
        if not isinstance(value, bool):
            raise DownresError(f"{self.name} is True or False, {value!r} is neither.")
        return value

    def word(self, c: "Candidate") -> str:
        """In the text of a candidate that it is on in; no blanks inside a value."""
        return self.name

    def read(self, word: str) -> dict[str, Any]:
        """The inverse of `word`: its values, {} for a word of another technique."""
        return {self.name: True} if word == self.name else {}

    def columns(self, c: "Candidate") -> dict[str, Any]:
        """Its part of a flat row of results, of a candidate that it is on in or not."""
        return {self.name: self.value(c)} if self.measurable else {}

    # What is tried

    def defaults(self, design: Design) -> tuple:
        """Values that a search tries on a network when nobody chose."""
        return ()

    def variant(self, value: Any) -> dict[str, Any]:
        """One value to try, as values of a candidate."""
        return {self.name: value}

    def place(self, c: "Candidate", design: Design, whole: bool, notes: list[str]) -> tuple[Resolution, tuple[int, int]]:
        """(resolution that a variant is tried at, what its sides are divided by).

        whole: the sides shall be divided without rest; notes: to be added to where another resolution than the original's
        does that.
        """
        return design.native, design.divided_by

    def parse_option(self, text: str) -> tuple:
        """The text of its option as values to try."""
        return (True,)

    # Words; all for a candidate that it is on in

    def detail(self, c: "Candidate") -> str:
        """In a label: `8 tokens merged a block`."""
        return self.word(c)

    def short(self, c: "Candidate") -> str:
        """Beside a point of a picture: `merge8`."""
        return self.word(c)

    def how(self, c: "Candidate") -> str:
        """In the sentence of the verdict, after 'with': `8 tokens merged a block`; '' says nothing."""
        return self.detail(c)

    def family(self, c: "Candidate", design: Design) -> str:
        """Of a variant, in the table and picture of costs."""
        return self.name

    def mark(self, c: "Candidate") -> str:
        """Beside a point of its own line in the picture of costs; '': the short label."""
        return ""

    # How it is applied; `work` is one call of `reduce`. Torch is imported in here, not above.

    def prepare(self, work: "Work") -> None:
        """Before the network is made for its input size."""

    def apply(self, work: "Work") -> None:
        """Once every technique is prepared."""

    def finish(self, work: "Work") -> None:
        """Once every technique is applied."""

    def has_map(self, c: "Candidate") -> bool:
        """Whether `token_map` tells which patches went together."""
        return False


class Factor(Technique):
    """One number at most: `width×0.5`. prefix: of its word, before the ×."""

    prefix: ClassVar[str]

    def word(self, c: "Candidate") -> str:
        return f"{self.prefix}×{number(self.value(c))}"

    def read(self, word: str) -> dict[str, Any]:
        match = re.fullmatch(rf"{self.prefix}[×*]({DECIMAL})", word)
        return {self.name: float(match[1])} if match else {}

    def parse_option(self, text: str) -> tuple[float, ...]:
        return tuple(floats(text, self.option))

    def mark(self, c: "Candidate") -> str:
        return f"×{self.value(c):.3g}"


_TECHNIQUES: list[Technique] = []
_OPTION = "an option"


def techniques() -> tuple[Technique, ...]:
    """All that are registered, in the order of their words in a candidate's text."""
    return tuple(_TECHNIQUES)


def register(technique: Technique) -> None:
    """Make a technique known: it is now read, written, planned, applied, counted, told, and an option of the commands."""
    names = {(kind, name) for t in _TECHNIQUES for kind, name in _names(t)}
    for kind, name in _names(technique):
        if not name and kind == _OPTION:
            continue
        if not name or (kind, name) in names:
            raise DownresError(f"A technique has {kind} of its own, {name!r} is {'taken' if name else 'none'}: give another.")
    _TECHNIQUES.append(technique)


def unregister(technique: Technique) -> None:
    """Forget a technique that was registered."""
    _TECHNIQUES.remove(technique)


def _names(technique: Technique) -> list[tuple[str, str]]:
    return [("a name", technique.name), ("a keyword", technique.keyword), (_OPTION, technique.option)]


def whole(value: Any, rule: str, example: str) -> int | None:
    """A whole number of at least 1, or None; DownresError that opens with the rule."""
    try:
        return None if value is None else count(value)
    except (TypeError, ValueError):
        raise DownresError(f"{rule}, {value!r} is not: give for example {example}.") from None


def count(value: Any) -> int:
    """A whole number of at least 1, of whatever integer type; TypeError or ValueError for anything else, also True."""
    if isinstance(value, bool) or index(value) < 1:
        raise ValueError
    return index(value)


def number(value: float) -> str:
    """The shortest text that reads back as the same number, without needless digits."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
