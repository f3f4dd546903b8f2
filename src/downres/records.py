"""What downres says, as frozen records that go to JSON and back. No torch here.

Units are in the names or stated: `macs` are multiply-accumulates, `*_bytes` bytes, `*_ms` milliseconds,
`top1`, `miou`, `drop` and their bounds percent and percentage points.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from operator import index
from typing import Any, ClassVar, Self

from .errors import DownresError
from .parse import Resolution, as_hw, as_resolution, check_resolution, format_resolution

RAGGED = ("error", "floor", "pad")
"""What to do where the patches do not divide the input; see `Candidate.ragged`."""


class Record:
    """Frozen dataclass that turns into plain JSON values and back, nested records included."""

    def to_json(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: _typed(hints[k], v) for k, v in values.items() if k in known})


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        if isinstance(value, list):
            kinds = [a for a in kinds if typing.get_origin(a) in (tuple, list)]
        elif isinstance(value, dict):  # of several records the one whose fields these are
            kinds = sorted(kinds, key=lambda kind: len(_fields(kind) ^ value.keys()))
        return _typed(kinds[0], value) if kinds else value
    if origin is tuple:
        inner = args[0] if args else Any
        return tuple(_typed(inner, v) for v in value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    return value


def _fields(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


_DECIMAL = r"\d*\.?\d+(?:e-?\d+)?"
CONSTANT, DECREASING = "constant", "decreasing"
MERGE, PRUNE = "merge", "prune"


@dataclass(frozen=True)
class Merge(Record):
    """How many patch tokens to take out of a transformer's sequence, block by block. Give `r` or `keep`.

    r: tokens a block, on average over the blocks. keep: fraction of the patch tokens that is left after the last block.
    schedule: 'constant', or 'decreasing': from 2r in the first block linearly to 0 in the last (Bolya 2023, ToMe, sec. 4.1).
    by: 'merge' joins the most similar tokens (ToMe); 'prune' fuses those that the class token attends to least into one
    (Liang 2022, EViT).
    """

    r: int | None = None
    keep: float | None = None
    schedule: str = CONSTANT
    by: str = MERGE

    def __post_init__(self) -> None:
        if (self.r is None) == (self.keep is None):
            raise DownresError(
                "Give either r (tokens a block) or keep (fraction left at the end): for example r=8 or keep=0.5."
            )
        try:
            if self.r is not None:
                object.__setattr__(self, "r", _count(self.r))
        except (TypeError, ValueError):
            raise DownresError(
                f"The tokens taken out a block are a whole number of at least 1, {self.r!r} is not: give for example 8."
            ) from None
        if self.keep is not None and not 0.0 < self.keep < 1.0:
            raise DownresError(
                f"The fraction of tokens kept is between 0 and 1, {self.keep} is not: give for example 0.5 (50%)."
            )
        if self.schedule not in (CONSTANT, DECREASING):
            raise DownresError(f"The schedule is {CONSTANT} or {DECREASING}, {self.schedule!r} is neither.")
        if self.by not in (MERGE, PRUNE):
            raise DownresError(f"Tokens are taken out by {MERGE} or {PRUNE}, {self.by!r} is neither.")

    def __str__(self) -> str:
        amount = f"{self.r}" if self.keep is None else _share(self.keep)
        return f"{self.by}{amount}" + (f"-{self.schedule}" if self.schedule != CONSTANT else "")

    @classmethod
    def parse(cls, text: str, by: str = MERGE) -> "Merge":
        """The inverse of `str`; the first word may be left out: `8`, `50%`, `8-decreasing`, `merge8`, `prune50%`."""
        match = re.fullmatch(rf"({MERGE}|{PRUNE})?({_DECIMAL})(%)?(?:-({CONSTANT}|{DECREASING}))?", text.strip())
        if match is None or (match[3] is None and not match[2].isdigit() and float(match[2]) >= 1):
            raise DownresError(
                f"Cannot read {text!r} as tokens to {by}: give tokens a block, 8 or 8-decreasing, "
                "or what is kept at the end, 50%."
            )
        value = float(match[2]) / 100 if match[3] else float(match[2])
        how: dict[str, Any] = {"r": int(match[2])} if match[2].isdigit() and not match[3] else {"keep": value}
        return cls(**how, schedule=match[4] or CONSTANT, by=match[1] or by)


def _count(value: Any) -> int:
    """A whole number of at least 1, of whatever integer type; TypeError or ValueError for anything else, also True."""
    if isinstance(value, bool) or index(value) < 1:
        raise ValueError
    return index(value)


def _as_merge(value: Any) -> "Merge":
    """8 (tokens a block), 0.5 (fraction kept) or text, as a `Merge`."""
    if isinstance(value, str):
        return Merge.parse(value)
    try:
        return Merge(r=value) if not isinstance(value, bool) and hasattr(value, "__index__") else Merge(keep=float(value))
    except (TypeError, ValueError):
        raise DownresError(
            f"Cannot read {value!r} as tokens to merge: give 8 (a block), 0.5 (kept) or '8-decreasing'."
        ) from None


def _share(share: float) -> str:
    """`50%`, or the bare fraction where no short percentage reads back as the same: `0.3333333333333333`."""
    short = f"{100 * share:g}"
    return f"{short}%" if float(short) / 100 == share else repr(share)


def _number(value: float) -> str:
    """The shortest text that reads back as the same number, without needless digits."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


@dataclass(frozen=True)
class Candidate(Record):
    """How small: input resolution, resample after the embedding, patch size, tokens, and for cost families depth and width.

    resolution: side of the (square) input in pixels, or (height, width); None leaves the input alone.
    ragged: what a network with patches does with a side that its patch does not divide: 'error', 'floor' (the rest at
        the right and bottom is cut off), 'pad' (with zeros there).
    stem_scale: factor on height and width of the activations after `stem` (1.0: none); of a transformer, of its grid of
        patch tokens.
    stem: name of the module after which to resample; None takes the first convolution executed, of a transformer the
        patch embedding with its position embedding.
    patch_size: side of the patches in pixels; the patch kernel is resized.
    merge: tokens taken out in each block; also given as a number (8: tokens a block; 0.5: fraction kept) or as text.
    depth, width: number of blocks, and factor on the channels: another network of the same design, to be trained.
    """

    resolution: Resolution | None = None
    stem_scale: float = 1.0
    stem: str | None = None
    patch_size: int | None = None
    merge: Merge | None = None
    ragged: str = "error"
    depth: int | None = None
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.resolution is not None:
            object.__setattr__(self, "resolution", check_resolution(as_resolution(self.resolution)))  # type: ignore[arg-type]
        if not 0.0 < self.stem_scale <= 1.0:
            raise DownresError(f"A stem scale is above 0 and at most 1, {self.stem_scale} is not: give for example 0.5.")
        if self.stem_scale == 1.0:
            object.__setattr__(self, "stem", None)  # nothing is resampled: the same candidate wherever that would have been
        self._whole("patch_size", "A patch size is a whole number of pixels above 0", "20")
        if self.merge is not None and not isinstance(self.merge, Merge):
            object.__setattr__(self, "merge", _as_merge(self.merge))
        if self.ragged not in RAGGED:
            raise DownresError(
                f"A side that patches do not divide is handled by {', '.join(RAGGED)}; {self.ragged!r} is none of them."
            )
        self._whole("depth", "A depth is a whole number of blocks above 0", "8")
        if not 0.0 < self.width <= 4.0:
            raise DownresError(f"A width is a factor above 0 and at most 4, {self.width} is not: give for example 0.5.")

    def _whole(self, name: str, rule: str, example: str) -> None:
        value = getattr(self, name)
        try:
            if value is not None:
                object.__setattr__(self, name, _count(value))
        except (TypeError, ValueError):
            raise DownresError(f"{rule}, {value!r} is not: give for example {example}.") from None

    @property
    def hw(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None."""
        return None if self.resolution is None else as_hw(self.resolution)

    @property
    def is_input_only(self) -> bool:
        """Whether nothing but the input gets smaller."""
        return dataclasses.replace(self, resolution=None, ragged="error") == Candidate()

    def at(self, resolution: Resolution | None) -> "Candidate":
        """The same at another resolution."""
        return dataclasses.replace(self, resolution=resolution)

    def __str__(self) -> str:
        words = ["as is" if self.resolution is None else format_resolution(self.resolution)]
        words += [self.ragged] if self.ragged != "error" else []
        words += [f"stem×{_number(self.stem_scale)}" + (f"@{self.stem}" if self.stem else "")] if self.stem_scale != 1.0 else []
        words += [f"patch{self.patch_size}"] if self.patch_size is not None else []
        words += [str(self.merge)] if self.merge is not None else []
        words += [f"depth{self.depth}"] if self.depth is not None else []
        words += [f"width×{_number(self.width)}"] if self.width != 1.0 else []
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """The inverse of `str`: `128`, `192x384`, `300 stem×0.5`, `224 patch28`, `224 merge8-decreasing`, `220 pad patch20`."""
        first, *words = text.strip().replace("as is", "as_is").split() or [""]
        given: dict[str, Any] = {}
        if match := re.fullmatch(r"(\d+)(?:x(\d+))?", first):
            given["resolution"] = (int(match[1]), int(match[2] or match[1]))
        elif first != "as_is":
            words.insert(0, first)
        for word in words:
            if match := re.fullmatch(rf"stem[×*]({_DECIMAL})(?:@(.+))?", word):
                found: dict[str, Any] = {"stem_scale": float(match[1]), "stem": match[2]}
            elif match := re.fullmatch(r"(patch|depth)(\d+)", word):
                found = {{"patch": "patch_size", "depth": "depth"}[match[1]]: int(match[2])}
            elif match := re.fullmatch(rf"width[×*]({_DECIMAL})", word):
                found = {"width": float(match[1])}
            elif word.startswith((MERGE, PRUNE)):
                found = {"merge": Merge.parse(word)}
            elif word in RAGGED:
                found = {"ragged": word}
            else:
                found = {}
            if not found or found.keys() & given.keys():
                raise DownresError(
                    f"Cannot read the candidate {text!r} at {word!r}: give for example '128', '192x384', '300 stem×0.5', "
                    "'224 patch28' or '224 merge8-decreasing'."
                )
            given |= found
        return cls(**given)


@dataclass(frozen=True)
class Budget(Record):
    """What is allowed. max_drop in the unit of the task's score (percentage points of top-1 or mIoU, or the unit of what a
    regression predicts); None means no ceiling.
    """

    max_drop: float = 1.0
    confidence: float = 0.95
    max_macs: int | None = None
    max_memory_bytes: int | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < float("inf"):
            raise DownresError(f"The allowed drop is a number from 0 on, {self.max_drop} is not: give for example 1.0.")
        if not 0.5 < self.confidence < 1.0:
            raise DownresError(f"The confidence is between 0.5 and 1, {self.confidence} is not: 0.95 is usual.")
        for name in ("max_macs", "max_memory_bytes", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise DownresError(f"{name} must be above 0, {value} is not.")


@dataclass(frozen=True)
class Change(Record):
    """One thing that `reduce` did: where and what."""

    kind: str
    module: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.module or 'the input'}: {self.detail}"


@dataclass(frozen=True)
class Cost(Record):
    """Exact counts for one forward pass; the convention is `downres.measuring.cost.CONVENTION`.

    input_size: (batch, channels, height, width). uncounted: ops that do arithmetic and are not in `macs`, with calls.
    """

    macs: int
    params: int
    param_bytes: int
    peak_activation_bytes: int
    input_size: tuple[int, ...]
    uncounted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency(Record):
    """Wall-clock time of one forward pass of `batch_size` images: median, 10th and 90th percentile of `runs`."""

    latency_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    batch_size: int
    runtime: str
    threads: int
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score(Record):
    """How good a network is on n images. Every task states its own kind: subclasses add fields and say what they are called.

    score: the one number that drops are taken of, with its two-sided 95 % `interval`; higher is better unless
    `lower_is_better`. The class attributes are words: metric in tables, noun in sentences, title of a key number.
    """

    metric: ClassVar[str] = "score"
    noun: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = False
    title: ClassVar[str] = ""

    @property
    def score(self) -> float:
        raise NotImplementedError

    @property
    def interval(self) -> tuple[float, float]:
        raise NotImplementedError

    @property
    def unit(self) -> str:
        """What differences are counted in: percentage points, or the unit of what is predicted."""
        return "points"

    def text(self, value: float) -> str:
        """A score in words: `84.8 %`."""
        return f"{value:.1f}\u00a0%"

    def row(self, drop: "Drop | None") -> dict[str, Any]:
        """Its part of `Result.row`, flat."""
        return self.to_json()

    def beside(self) -> dict[str, str]:
        """What a table may show beside the score, by heading."""
        return {}

    def against(self, before: Any) -> str:
        """What a key number says more, compared with that of the original."""
        return ""


WITHIN = "proven within"
OUTSIDE = "proven outside"
TOO_FEW = "too few images"


@dataclass(frozen=True)
class Drop(Record):
    """Top-1 or mIoU of the original minus that of the candidate on the same n images, in points, with a verdict.

    lost: images that only the original gets right; won: only the candidate; of masks None.
    lower, upper: one-sided bounds, each at `confidence`, after Holm's correction for `comparisons` candidates.
    more_images: about how many more images would prove it within `allowed` (verdict 'too few images', else None).
    """

    drop: float
    lower: float
    upper: float
    allowed: float
    verdict: str
    n: int
    lost: int | None = None
    won: int | None = None
    confidence: float = 0.95
    comparisons: int = 1
    more_images: int | None = None


FITS = ("crop", "stretch", "pad")
"""How a picture is brought to the network's input; see `Preprocessing`."""


@dataclass(frozen=True)
class Preprocessing(Record):
    """From a decoded picture to the network's input; see `downres.images.preprocess`.

    fit: 'crop' resizes the short side to floor(side / crop_ratio), antialiased, and crops the centre to `resolution`. For
    answers to every pixel nothing may be cut off: 'stretch' resizes the whole picture to `resolution`, 'pad' the whole picture
    with its aspect ratio to the largest size inside it, the rest, at the right and the bottom, being filled with `mean`.
    any_size: `resolution` is only what is usual, nobody chose it: a segmentation network is then used at its labels' size.
    """

    resolution: Resolution
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "given"
    fit: str = "crop"
    any_size: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", check_resolution(as_resolution(self.resolution)))  # type: ignore[arg-type]
        if self.fit not in FITS:
            raise DownresError(f"A picture is fitted by {', '.join(FITS)}; {self.fit!r} is none of them.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise DownresError(f"The interpolation is bilinear or bicubic, {self.interpolation!r} is neither.")
        if not 0.0 < self.crop_ratio <= 1.0:
            raise DownresError(f"A crop ratio is above 0 and at most 1, {self.crop_ratio} is not: give for example 0.875.")
        if len(self.mean) != len(self.std) or min(self.std, default=0.0) <= 0:
            raise DownresError(f"mean and std need one value a channel, std above 0; got {self.mean} and {self.std}.")

    @property
    def hw(self) -> tuple[int, int]:
        return as_hw(self.resolution)

    def at(self, resolution: Resolution | None = None, crop_ratio: float | None = None) -> "Preprocessing":
        """The same at another resolution or crop ratio."""
        return dataclasses.replace(
            self,
            resolution=self.resolution if resolution is None else resolution,
            crop_ratio=self.crop_ratio if crop_ratio is None else crop_ratio,
        )


LOGITS, CLASSES = "logits", "classes"


@dataclass(frozen=True)
class Dense(Record):
    """The full-size answer of a segmentation network: what is done with its logits, inside what is counted, timed and shipped.

    size: (height, width) in pixels that the logits are brought to: that of the labels. output: 'logits' (B, K, height, width)
    or 'classes', the class map uint8 (B, height, width), made without ever holding the logits of all classes at that size.
    interpolation: 'bilinear' or 'bicubic'; align_corners: as the network was trained.
    """

    size: tuple[int, int]
    output: str = LOGITS
    interpolation: str = "bilinear"
    align_corners: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_hw(check_resolution(as_resolution(self.size))))  # type: ignore[arg-type]
        if self.output not in (LOGITS, CLASSES):
            raise DownresError(f"A segmentation network hands out {LOGITS} or {CLASSES}, {self.output!r} is neither.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise DownresError(f"Logits are upsampled by bilinear or bicubic interpolation, {self.interpolation!r} is neither.")


@dataclass(frozen=True)
class Rung(Record):
    """One rung of the recovery ladder as it was tried: top-1 or mIoU on `n` tuning images (never proof images)."""

    rung: str
    score: float | None
    n: int
    seconds: float
    images: int = 0
    note: str = ""


@dataclass(frozen=True)
class Recovery(Record):
    """What won the accuracy back: the rung used ('none', 'crop', 'batchnorm', 'head'), and every rung tried.

    tuning: the drop on the tuning images with that rung, None where there are no training images.
    """

    rung: str
    crop_ratio: float
    seconds: float
    tried: tuple[Rung, ...] = ()
    tuning: Drop | None = None


@dataclass(frozen=True)
class Result(Record):
    """All that is known of one candidate. status: 'measured', or 'stopped' with the reason."""

    candidate: Candidate
    status: str
    reason: str = ""
    cost: Cost | None = None
    latency: Latency | None = None
    naive: Score | None = None
    quality: Score | None = None
    drop: Drop | None = None
    recovery: Recovery | None = None

    def row(self) -> dict[str, Any]:
        """The flat form that `--json` and the tables print."""
        c, d = self.cost, self.drop
        return {
            "candidate": str(self.candidate),
            "resolution": _plain(self.candidate.resolution),
            "stem_scale": self.candidate.stem_scale,
            "patch_size": self.candidate.patch_size,
            "merge": self.candidate.merge and str(self.candidate.merge),
            "status": self.status,
            "reason": self.reason,
            "macs": c and c.macs,
            "params": c and c.params,
            "param_bytes": c and c.param_bytes,
            "peak_activation_bytes": c and c.peak_activation_bytes,
            "latency_ms": self.latency and self.latency.latency_ms,
            "p10_ms": self.latency and self.latency.p10_ms,
            "p90_ms": self.latency and self.latency.p90_ms,
            "runtime": self.latency and self.latency.runtime,
            "threads": self.latency and self.latency.threads,
            "hardware": self.latency and self.latency.hardware,
            **self._qualities(),
            "drop": d and d.drop,
            "drop_lower": d and d.lower,
            "drop_upper": d and d.upper,
            "verdict": d and d.verdict,
            "more_images": d and d.more_images,
            "rung": self.recovery and self.recovery.rung,
            "crop_ratio": self.recovery and self.recovery.crop_ratio,
        }

    def _qualities(self) -> dict[str, Any]:
        """The part of `row` that depends on the task."""
        q, naive = self.quality, self.naive
        if naive is None and q is None:
            return {}
        named = type(q or naive).metric.lower().replace("-", "").replace(" ", "_")
        return {f"naive_{named}": naive and naive.score, **(q.row(self.drop) if q is not None else {})}
