"""What downres says, as frozen records that go to JSON and back. No torch here.

Units are in the names or stated: `macs` are multiply-accumulates, `*_bytes` bytes, `*_ms` milliseconds,
`top1`, `miou`, `drop` and their bounds percent and percentage points.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from .errors import DownresError
from .parse import Resolution, as_hw, check_resolution, like, short_form
from .record import Record
from .techniques import Technique, techniques
from .techniques.resolution import RAGGED as RAGGED
from .techniques.tokens import CONSTANT as CONSTANT
from .techniques.tokens import DECREASING as DECREASING
from .techniques.tokens import MERGE as MERGE
from .techniques.tokens import PRUNE as PRUNE
from .techniques.tokens import Merge as Merge


@dataclass(frozen=True)
class Candidate(Record):
    """How small: input resolution, resample after the embedding, patch size, tokens, and for cost families depth and width.

    resolution: short side of the input in pixels, its aspect ratio kept, or (height, width), which is kept as a pair even where
        it is a square; None leaves the input alone.
    ragged: what a network with patches does with a side that its patch does not divide: 'error', 'floor' (the rest at
        the right and bottom is cut off), 'pad' (with zeros there).
    stem_scale: factor on height and width of the activations after `stem` (1.0: none); of a transformer, of its grid of
        patch tokens.
    stem: name of the module after which to resample; None takes the first convolution executed, of a transformer the
        patch embedding with its position embedding.
    patch_size: side of the patches in pixels; the patch kernel is resized.
    merge: tokens taken out in each block; also given as a number (8: tokens a block; 0.5: fraction kept) or as text.
    depth, width: number of blocks, and factor on the channels: another network of the same design, to be trained.
    precision: what the file that runs computes in: 'fp32', 'bf16', 'fp16' or 'int8'.
    runtime: the engine that it is measured in and shipped for; None: the first that a run was given.
    pruning: part of the MACs that is left after structured pruning of channels.
    extra: values of techniques that were registered from outside, by their names: `{"grey": True}`.

    Each field is checked, written, read and applied by its technique, see `downres.techniques`.
    """

    resolution: Resolution | None = None
    stem_scale: float = 1.0
    stem: str | None = None
    patch_size: int | None = None
    merge: Merge | None = None
    ragged: str = "error"
    depth: int | None = None
    width: float = 1.0
    precision: str = "fp32"
    runtime: str | None = None
    extra: tuple[tuple[str, Any], ...] | Mapping[str, Any] = ()
    pruning: float = 1.0

    def __post_init__(self) -> None:
        extra, kept = dict(self.extra), {}
        for t in techniques():
            given = {n: getattr(self, n) if n in _FIELDS else extra.pop(n, neutral) for n, neutral in t.fields.items()}
            for name, value in t.check(given).items():
                if name in _FIELDS:
                    object.__setattr__(self, name, value)
                elif value != t.fields[name]:
                    kept[name] = value
        if extra:
            names = ", ".join(name for t in techniques() for name in t.fields)
            raise DownresError(f"No technique has a value {min(extra)!r}, there are {names}: register the technique first.")
        object.__setattr__(self, "extra", tuple(sorted(kept.items())))

    @classmethod
    def of(cls, **values: Any) -> Self:
        """By the names of values, of techniques registered from outside too: `Candidate.of(resolution=128, grey=True)`."""
        own = {name: value for name, value in values.items() if name in _FIELDS}
        return cls(**own, extra={name: value for name, value in values.items() if name not in own})

    def get(self, name: str, neutral: Any = None) -> Any:
        """A value by its name; neutral: where a technique registered from outside has none here."""
        return getattr(self, name) if name in _FIELDS else dict(self.extra).get(name, neutral)

    def having(self, **values: Any) -> "Candidate":
        """The same with other values, by their names."""
        before = {name: self.get(name, n) for t in techniques() for name, n in t.fields.items()}
        return Candidate.of(**{**before, **values})

    def without(self, *left_out: Technique) -> "Candidate":
        """The same with some techniques left out."""
        values = {name: self.get(name, n) for t in techniques() if t not in left_out for name, n in t.fields.items()}
        return Candidate.of(**values)

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """Those that are at work in it."""
        return tuple(t for t in techniques() if t.is_on(self))

    @property
    def hw(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None."""
        return None if self.resolution is None else as_hw(self.resolution)

    @property
    def is_input_only(self) -> bool:
        """Whether nothing but the input gets smaller."""
        return dataclasses.replace(self, resolution=None, ragged="error") == Candidate()

    @property
    def network(self) -> "Candidate":
        """The network of it, whatever file it becomes."""
        return self.without(*(t for t in self.techniques if t.in_file))

    def at(self, resolution: Resolution | None) -> "Candidate":
        """The same at another resolution."""
        return dataclasses.replace(self, resolution=resolution)

    def on(self, native: Resolution) -> "Candidate":
        """The same for a network used at the size `native`: at that where it names no resolution, else see `parse.like`.

        What means the same of that network is then equal.
        """
        return self.at(native if self.resolution is None else like(native, self.resolution))

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        extra = values.pop("extra")
        for t in techniques():  # what only few name is left out where it is not named
            if (t.in_file or t.seldom) and not t.is_on(self):
                values.pop(t.name, None)
        return {**values, "extra": dict(extra)} if extra else values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        if not isinstance(values, dict) or not isinstance(values.get("extra", {}), dict):
            return super().from_json(values)  # which refuses it
        known = super().from_json({name: value for name, value in values.items() if name != "extra"})
        return dataclasses.replace(known, extra=values.get("extra", {}))

    def __str__(self) -> str:
        return " ".join(t.word(self) for t in techniques() if t.always or t.is_on(self))

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """The inverse of `str`: `128`, `192x384`, `300 stem×0.5`, `224 patch28`, `224 merge8-decreasing`, `220 pad patch20`."""
        given: dict[str, Any] = {}
        if len(text) > MOST_LETTERS:
            raise DownresError(
                f"A candidate is a few words, {text[:40]!r}… has {len(text)} letters: give for example '224 patch28'."
            )
        for i, word in enumerate(text.strip().replace("as is", "as_is").split() or [""]):
            found = next(filter(None, (t.read(word) for t in techniques())), {})
            if not found or found.keys() & given.keys() or ("resolution" in found and i > 0):  # the size comes first
                raise DownresError(
                    f"Cannot read the candidate {text!r} at {word!r}: give for example '128', '192x384', '300 stem×0.5', "
                    "'224 patch28' or '224 merge8-decreasing'."
                )
            given |= found
        return cls.of(**given)


MOST_LETTERS = 1000
_FIELDS = frozenset(f.name for f in dataclasses.fields(Candidate)) - {"extra"}


@dataclass(frozen=True)
class Budget(Record):
    """What is allowed. max_drop in the unit of the task's score (percentage points of top-1 or mIoU, or the unit of what a
    regression predicts); max_flips: percent of the images that may get another answer, proven like the drop; max_size_bytes: of
    the file that is shipped. None means no ceiling.
    """

    max_drop: float = 1.0
    confidence: float = 0.95
    max_macs: int | None = None
    max_memory_bytes: int | None = None
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    max_flips: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < math.inf:
            raise DownresError(f"The allowed drop is a number from 0 on, {self.max_drop} is not: give for example 1.0.")
        if not 0.5 < self.confidence < 1.0:
            raise DownresError(f"The confidence is between 0.5 and 1, {self.confidence} is not: 0.95 is usual.")
        if self.max_flips is not None and not 0 < self.max_flips < 100:
            raise DownresError(f"max_flips is a percentage of images above 0 and below 100, {self.max_flips} is not.")
        for name in ("max_macs", "max_memory_bytes", "max_latency_ms", "max_size_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DownresError(
                    f"{name} must be above 0 and finite, {value} is not: leave it out where there is no ceiling."
                )


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
class TrainingCost(Record):
    """Exact counts for one training step; the convention is `downres.measuring.training_cost.CONVENTION`.

    macs: of forward and backward pass. peak_bytes: all memory, of which param_bytes, gradient_bytes and optimizer_bytes (what
    the optimizer keeps from step to step) are parts. input_size: (batch, channels, height, width). uncounted: as in `Cost`.
    """

    macs: int
    peak_bytes: int
    param_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    optimizer: str
    input_size: tuple[int, ...]
    uncounted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency(Record):
    """Wall-clock time of one forward pass of `batch_size` images: median, 10th and 90th percentile of `runs`.

    ratio: a 95 % interval of the original's time over this one in the same round; None where none was timed beside it.
    """

    latency_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    batch_size: int
    runtime: str
    threads: int
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)
    ratio: tuple[float, float] | None = None

    @property
    def faster(self) -> bool:
        """Whether the rounds say that it takes less time than the original."""
        return self.ratio is not None and self.ratio[0] > 1

    @property
    def slower(self) -> bool:
        return self.ratio is not None and self.ratio[1] < 1

    @property
    def disturbed(self) -> bool:
        """Whether something else ran: every tenth pass took twice the median."""
        return self.p90_ms > 2 * self.latency_ms

    @property
    def images_per_s(self) -> float:
        """Throughput: images over the median time."""
        return 1000 * self.batch_size / self.latency_ms


@dataclass(frozen=True)
class Footprint(Record):
    """What the file that runs takes: its bytes, and, in a fresh process with nothing but NumPy and the runtime, the peak
    resident memory of loading it and answering once; of that what was there before the file was loaded (`runtime_bytes`).
    """

    file_bytes: int
    peak_rss_bytes: int | None = None
    runtime_bytes: int | None = None


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
    def images(self) -> int:
        """How many it was measured on: every kind has a field `n`."""
        return self.n  # type: ignore[attr-defined, no-any-return]

    @property
    def unit(self) -> str:
        """What differences are counted in: percentage points, or the unit of what is predicted."""
        return "points"

    def text(self, value: float) -> str:
        """A score in words: `84.8 %`."""
        return f"{value:.1f}\u00a0%"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        if cls is not Score or not isinstance(values, dict):
            return super().from_json(values)  # which refuses what is no object
        # Of all kinds the one whose fields these are.
        nearest = min(_kinds(Score), key=lambda kind: len({f.name for f in dataclasses.fields(kind)} ^ values.keys()))
        return nearest.from_json(values)  # type: ignore[return-value]

    def row(self, drop: "Drop | None") -> dict[str, Any]:
        """Its part of `Result.row`, flat."""
        return self.to_json()

    @classmethod
    def blank(cls) -> dict[str, Any]:
        """The same of a candidate that was not measured: every name, no value."""
        return {f.name: None for f in dataclasses.fields(cls)}

    def beside(self) -> dict[str, str]:
        """What a table may show beside the score, by heading."""
        return {}

    def against(self, before: Any) -> str:
        """What a key number says more, compared with that of the original."""
        return ""


def _kinds(kind: type[Score]) -> list[type[Score]]:
    return [found for own in kind.__subclasses__() for found in (own, *_kinds(own))] or [kind]


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

    @property
    def unbounded(self) -> str:
        """Why a bound is infinite (null in JSON), '' where both are numbers."""
        if math.isfinite(self.lower) and math.isfinite(self.upper):
            return ""
        return f"{self.n} images are too few for a bound at this confidence"

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | ({"unbounded": self.unbounded} if self.unbounded else {})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        if not isinstance(values, dict):
            return super().from_json(values)  # which refuses it
        open_ended = {n: end for n, end in (("lower", -math.inf), ("upper", math.inf)) if values.get(n, 0.0) is None}
        return dataclasses.replace(super().from_json({**values, **dict.fromkeys(open_ended, 0.0)}), **open_ended)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Flips(Record):
    """Error growth: of n images, how many get another answer than the original's, of them those that were right and are wrong
    (lost) and the other way round (won). upper: one-sided bound on the share, in percent, at `confidence` after Bonferroni's
    correction where a ceiling (allowed, percent) is to be proven; verdict: '' without one.
    """

    flips: int
    lost: int
    won: int
    n: int
    upper: float
    allowed: float | None = None
    verdict: str = ""

    @property
    def share(self) -> float:
        return 100 * self.flips / self.n


LEAST_CROP_RATIO = 0.1
"""Below it a picture would be made more than ten times as large as what is looked at: a typing error is likelier."""
LEAST_STD, LEAST_SCALE, MOST = 1e-6, 1e-12, 65535.0
"""Of pixels; beyond, every picture would be one constant, or overflow."""
FITS = ("crop", "stretch", "pad")
"""How a picture is brought to the network's input; see `Preprocessing`."""
RGB, BGR = "rgb", "bgr"


@dataclass(frozen=True)
class Preprocessing(Record):
    """From a decoded picture to the network's input; see `downres.images.preprocess`.

    resolution: of the input: side of a square, or (height, width), both in pixels.
    The network gets (pixels · scale - mean) / std, its channels in the order `channel_order` ('rgb' or 'bgr'), which is also
    that of mean and std. scale: 1/255, the default, means to 0…1: pixels of 8 bits are divided by 255, of 16 bits by 65535, and
    floats are left as they are; any other number multiplies what is in the file (1: 0…255 of 8 bits).
    fit: 'crop' resizes the short side to floor(side / crop_ratio) and crops the centre to `resolution`. For
    answers to every pixel nothing may be cut off: 'stretch' resizes the whole picture to `resolution`, 'pad' the whole picture
    with its aspect ratio to the largest size inside it, the rest, at the right and the bottom, being filled with `mean`.
    antialias: whether a picture that gets smaller is filtered as much (PIL, torchvision); False as OpenCV's resize, which reads
    the nearest pixels alone.
    guessed: mean and std are placeholders, enough for costs: of a network whose channels are no colours, before they are given.
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
    guessed: bool = False
    channel_order: str = RGB
    scale: float = 1 / 255
    antialias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", short_form(check_resolution(self.resolution)))
        if self.fit not in FITS:
            raise DownresError(f"A picture is fitted by {', '.join(FITS)}; {self.fit!r} is none of them.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise DownresError(f"The interpolation is bilinear or bicubic, {self.interpolation!r} is neither.")
        if not LEAST_CROP_RATIO <= self.crop_ratio <= 1.0:
            raise DownresError(
                f"A crop ratio is from {LEAST_CROP_RATIO} to 1, {self.crop_ratio} is not: give for example 0.875."
            )
        if len(self.mean) != len(self.std) or not self.std:
            raise DownresError(f"mean and std need one value a channel; got {self.mean} and {self.std}.")
        if not all(abs(m) <= MOST for m in self.mean) or not all(LEAST_STD <= s <= MOST for s in self.std):
            raise DownresError(
                f"mean and std are finite, one value a channel, std above 0; {self.mean} and {self.std} are not: "
                "give for example 0.5,0.5,0.5."
            )
        if self.channel_order not in (RGB, BGR):
            raise DownresError(f"The order of channels is {RGB} or {BGR}, {self.channel_order!r} is neither.")
        if self.channel_order == BGR and len(self.mean) != 3:
            raise DownresError(f"{BGR} is an order of three channels, mean and std are of {len(self.mean)}: leave it out.")
        if not LEAST_SCALE <= self.scale <= MOST:
            raise DownresError(
                f"Pixels are multiplied by a number above 0, {self.scale} is not: give 1/255 or, for 0 to 255, 1."
            )
        if not isinstance(self.antialias, bool):
            raise DownresError(f"antialias is True or False, {self.antialias!r} is neither.")
        most = 1 if self.scale == 1 / 255 else 65535 * self.scale
        if max(self.mean) > 2 * most:
            raise DownresError(
                f"A mean of {max(self.mean):g} is above every pixel, which are 0 to {most:g} with this `scale`: "
                "give mean and std on that range, or `scale=1` where they are on 0 to 255."
            )

    @property
    def hw(self) -> tuple[int, int]:
        return as_hw(self.resolution)

    def at(self, resolution: Resolution | None = None, crop_ratio: float | None = None) -> "Preprocessing":
        """The same at another resolution, of one number as its short side, or crop ratio."""
        return dataclasses.replace(
            self,
            resolution=self.resolution if resolution is None else like(self.resolution, resolution),
            crop_ratio=self.crop_ratio if crop_ratio is None else crop_ratio,
        )


LOGITS, CLASSES = "logits", "classes"


@dataclass(frozen=True)
class Dense(Record):
    """The full-size answer of a segmentation network: what is done with its logits, inside what is counted, timed and shipped.

    size: (height, width) in pixels that the logits are brought to: that of the labels. output: 'logits' (B, K, height, width)
    or 'classes', the class map uint8 (B, height, width), made without ever holding the logits of all classes at that size.
    interpolation: 'bilinear' or 'bicubic'; align_corners: as the network was trained. left_out: index of a logit that is
    dropped first, for pixels without a class. threshold: of a single logit (B, 1, h, w), above which a pixel is foreground
    (class 1 and not 0); None where there are more.
    """

    size: tuple[int, int]
    output: str = LOGITS
    interpolation: str = "bilinear"
    align_corners: bool = False
    left_out: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_hw(check_resolution(self.size)))
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
    footprint: Footprint | None = None
    flips: Flips | None = None

    @property
    def proven(self) -> bool:
        """Whether all that has to be proven of it is."""
        return (
            self.drop is not None and self.drop.verdict == WITHIN and (self.flips is None or self.flips.verdict in ("", WITHIN))
        )

    def row(self, kind: type[Score] | None = None) -> dict[str, Any]:
        """The flat form that `--json` and the tables print. kind: what is measured, for one that was not."""
        c, d = self.cost, self.drop
        return {
            "candidate": str(self.candidate),
            **{name: value for t in techniques() for name, value in t.columns(self.candidate).items()},
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
            "batch_size": self.latency and self.latency.batch_size,
            "images_per_s": self.latency and self.latency.images_per_s,
            "ratio_low": self.latency and self.latency.ratio and self.latency.ratio[0],
            "ratio_high": self.latency and self.latency.ratio and self.latency.ratio[1],
            "file_bytes": self.footprint and self.footprint.file_bytes,
            "peak_rss_bytes": self.footprint and self.footprint.peak_rss_bytes,
            "threads": self.latency and self.latency.threads,
            "hardware": self.latency and self.latency.hardware,
            **self._qualities(kind),
            "drop": d and d.drop,
            "drop_lower": d and d.lower,
            "drop_upper": d and d.upper,
            "unbounded": d and d.unbounded or None,
            "verdict": d and d.verdict,
            "more_images": d and d.more_images,
            "flips": self.flips and self.flips.share,
            "flips_upper": self.flips and self.flips.upper,
            "right_to_wrong": self.flips and self.flips.lost,
            "wrong_to_right": self.flips and self.flips.won,
            "rung": self.recovery and self.recovery.rung,
            "crop_ratio": self.recovery and self.recovery.crop_ratio,
        }

    def _qualities(self, kind: type[Score] | None) -> dict[str, Any]:
        """The part of `row` that depends on the task."""
        q, naive = self.quality, self.naive
        if (first := q or naive) is not None:
            kind = type(first)
        if kind is None:
            return {}
        named = kind.metric.lower().replace("-", "").replace(" ", "_")
        return {f"naive_{named}": naive and naive.score, **(kind.blank() if q is None else q.row(self.drop))}
