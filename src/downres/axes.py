"""What to try, as one frozen record: every technique along its own axis, or all together, and whole candidates."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import DownresError
from .parse import Resolution
from .records import Candidate, Merge
from .techniques import RESOLUTION, Design, Technique, techniques
from .techniques.technique import whole


@dataclass(frozen=True)
class Axes:
    """What to try, each along its own axis unless `joint`; None takes the default of the network, () leaves the axis out.

    resolutions: of the input. stem_scales: resample after the embedding. patch_sizes: in pixels. merges: `Merge`, or
    what it is made of (8, 0.5, '8-decreasing'). candidates: as they are or as text, in any combination. ragged: what patches
    do where they do not divide the input. depths, widths: model scaling, for costs. prunings: parts of the MACs that are left
    when channels are taken out. precisions, runtimes: each tried with every
    other candidate (`("fp32", "int8")`), None and () the default alone. extra: of techniques registered from
    outside, by their keywords: `{"grey": (True,)}`. snap: take `resolutions` to multiples of the network's stride; the
    defaults are such. joint: try the axes in all combinations, at most so many: of more a search has Optuna choose, on tuning
    images.
    """

    resolutions: Sequence[Resolution] | None = None
    stem_scales: Sequence[float] | None = None
    patch_sizes: Sequence[int] | None = None
    merges: Sequence[Merge | int | float | str] | None = None
    candidates: Sequence[Candidate | str] = ()
    ragged: str = "error"
    depths: Sequence[int] | None = None
    widths: Sequence[float] | None = None
    prunings: Sequence[float] | None = None
    precisions: Sequence[str] | None = None
    runtimes: Sequence[str | None] | None = None
    extra: tuple[tuple[str, Any], ...] | Mapping[str, Any] = ()
    snap: bool = False
    joint: int | None = None

    def __post_init__(self) -> None:
        extra = dict(self.extra)
        for t in techniques():
            values = getattr(self, t.keyword) if t.keyword in _FIELDS else extra.get(t.keyword)
            values = None if values is None else t.parse_option(values) if isinstance(values, str) else tuple(values)
            if t.keyword in _FIELDS:
                object.__setattr__(self, t.keyword, values)
            elif values is not None:
                extra[t.keyword] = values
        if unknown := extra.keys() - {t.keyword for t in techniques()}:
            raise DownresError(f"No technique is tried by {min(unknown)!r}: register the technique first.")
        object.__setattr__(self, "extra", tuple(sorted(extra.items())))
        read = tuple(Candidate.parse(c) if isinstance(c, str) else c for c in self.candidates)
        object.__setattr__(self, "candidates", read)
        whole(self.joint, "`joint` is how many combinations to try at most, a whole number above 0", "40")
        Candidate(ragged=self.ragged)  # these two only for their errors, before anything is opened
        self.free()

    @classmethod
    def of(cls, tried: Mapping[str, Any], **options: Any) -> "Axes":
        """By the keywords of techniques, registered from outside too."""
        own = {keyword: values for keyword, values in tried.items() if keyword in _FIELDS}
        return cls(**own, **options, extra={keyword: values for keyword, values in tried.items() if keyword not in own})

    def given(self, technique: Technique) -> tuple | None:
        """The values to try of one technique, None where nobody chose."""
        keyword = technique.keyword
        found: Any = getattr(self, keyword) if keyword in _FIELDS else dict(self.extra).get(keyword)
        return found

    def replaced(self, tried: Mapping[str, Any]) -> "Axes":
        """With other values for some techniques, by their keywords."""
        before = {t.keyword: self.given(t) for t in techniques()}
        return Axes.of({**before, **tried}, **{name: getattr(self, name) for name in _OPTIONS})

    @property
    def is_empty(self) -> bool:
        return not self.candidates and not any(self.given(t) for t in techniques())

    def free(self) -> list[tuple[Technique, Candidate]]:
        """The variants that have no resolution of their own yet, each with what it is a variant of."""
        others = (t for t in techniques() if t is not RESOLUTION and not t.crosses)
        return [(t, Candidate.of(**t.variant(value))) for t in others for value in self.given(t) or ()]

    def crossed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Each candidate with each value of what is tried with all of them; what names another than the default keeps it."""
        found = list(candidates)
        for t in (t for t in techniques() if t.crosses):
            variants = [t.variant(value) for value in self.given(t) or ()]
            found = [
                one
                for c in found
                for one in ([c] if t.is_on(c) or not variants else [c.having(**variant) for variant in variants])
            ]
        return list(dict.fromkeys(found))


_OPTIONS = ("candidates", "ragged", "snap", "joint")
_FIELDS = frozenset(f.name for f in dataclasses.fields(Axes)) - {*_OPTIONS, "extra"}


def default_axes(design: Design, axes: Axes) -> Axes:
    """The axes with the network's defaults where the caller has not chosen."""
    return axes.replaced({t.keyword: t.defaults(design) for t in techniques() if axes.given(t) is None})


def axes_of(tries: Axes | None, given: Axes, nothing: Axes) -> Axes:
    """One of two ways to say what to try: a whole record, or keywords, which are `nothing` where none was given."""
    if tries is not None and given != nothing:
        raise DownresError("Say what to try either by tries=Axes(…) or by keywords (resolutions, candidates, …), not both.")
    return given if tries is None else tries
