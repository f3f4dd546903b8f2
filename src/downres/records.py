"""What downres says, as frozen records that go to JSON and back. No torch here.

Units are in the names or stated: `macs` are multiply-accumulates, `*_bytes` bytes, `*_ms` milliseconds,
`top1`, `drop` and their bounds percent and percentage points.
"""

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Self

from .errors import DownresError
from .parse import Resolution, as_hw, as_resolution, check_resolution, format_resolution


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
        return _typed(kinds[0], value) if kinds else value
    if origin is tuple:
        inner = args[0] if args else Any
        return tuple(_typed(inner, v) for v in value)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    return value


@dataclass(frozen=True)
class Candidate(Record):
    """How small: the input resolution and a resample of the activations after the embedding.

    resolution: side of the (square) input in pixels, or (height, width); None leaves the input alone.
    stem_scale: factor on height and width of the activations after `stem` (1.0: none).
    stem: name of the module after which to resample; None finds the first convolution executed.
    """

    resolution: Resolution | None = None
    stem_scale: float = 1.0
    stem: str | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None:
            object.__setattr__(self, "resolution", check_resolution(as_resolution(self.resolution)))  # type: ignore[arg-type]
        if not 0.0 < self.stem_scale <= 1.0:
            raise DownresError(f"A stem scale is above 0 and at most 1, {self.stem_scale} is not: give for example 0.5.")
        if self.stem_scale == 1.0:
            object.__setattr__(self, "stem", None)  # nothing is resampled: the same candidate wherever that would have been

    @property
    def hw(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None."""
        return None if self.resolution is None else as_hw(self.resolution)

    def __str__(self) -> str:
        text = "as is" if self.resolution is None else format_resolution(self.resolution)
        if self.stem_scale != 1.0:
            short = f"{self.stem_scale:g}"
            exact = short if float(short) == self.stem_scale else repr(float(self.stem_scale))
            text += f" stem×{exact}" + (f"@{self.stem}" if self.stem else "")
        return text

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """The inverse of `str`: `128`, `192x384`, `300 stem×0.5`, `300 stem*0.5@layer1`."""
        match = re.fullmatch(r"(as is|\d+(?:x\d+)?)(?: stem[×*](\d*\.?\d+(?:e-?\d+)?)(?:@(.+))?)?", text.strip())
        if match is None:
            raise DownresError(f"Cannot read the candidate {text!r}: give for example '128', '192x384' or '300 stem×0.5'.")
        sides = None if match[1] == "as is" else tuple(int(s) for s in match[1].split("x"))
        resolution = None if sides is None else (sides[0], sides[-1])
        return cls(resolution, float(match[2] or 1.0), match[3])


@dataclass(frozen=True)
class Budget(Record):
    """What is allowed. max_drop in percentage points of top-1; None means no ceiling."""

    max_drop: float = 1.0
    confidence: float = 0.95
    max_macs: int | None = None
    max_memory_bytes: int | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < 100.0:
            raise DownresError(f"The allowed drop is in percentage points from 0 to below 100, {self.max_drop} is not.")
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
    """Exact counts for one forward pass; the convention is `downres.measure.cost.CONVENTION`.

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
class Quality(Record):
    """Top-1 as correct/n with a two-sided 95 % Wilson interval, in percent; top-5 where there are more than 5 classes."""

    correct: int
    n: int
    top1: float
    top1_low: float
    top1_high: float
    correct5: int | None = None
    top5: float | None = None


WITHIN = "proven within"
OUTSIDE = "proven outside"
TOO_FEW = "too few images"


@dataclass(frozen=True)
class Drop(Record):
    """Top-1 of the original minus top-1 of the candidate on the same n images, in points, with a verdict.

    lost: images that only the original gets right; won: only the candidate.
    lower, upper: one-sided bounds, each at `confidence`, after Holm's correction for `comparisons` candidates.
    more_images: about how many more images would prove it within `allowed` (verdict 'too few images', else None).
    """

    drop: float
    lower: float
    upper: float
    allowed: float
    verdict: str
    n: int
    lost: int
    won: int
    confidence: float = 0.95
    comparisons: int = 1
    more_images: int | None = None


@dataclass(frozen=True)
class Preprocessing(Record):
    """From a decoded picture to the network's input; see `downres.data.preprocess`.

    The short side is resized to floor(side / crop_ratio), antialiased, then the centre is cropped to `resolution`.
    """

    resolution: Resolution
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "given"

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", check_resolution(as_resolution(self.resolution)))  # type: ignore[arg-type]
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


@dataclass(frozen=True)
class Rung(Record):
    """One rung of the recovery ladder as it was tried: top-1 on `n` tuning images (never proof images)."""

    rung: str
    top1: float | None
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
    naive: Quality | None = None
    quality: Quality | None = None
    drop: Drop | None = None
    recovery: Recovery | None = None

    def row(self) -> dict[str, Any]:
        """The flat form that `--json` and the tables print."""
        c, q, d = self.cost, self.quality, self.drop
        return {
            "candidate": str(self.candidate),
            "resolution": _plain(self.candidate.resolution),
            "stem_scale": self.candidate.stem_scale,
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
            "naive_top1": self.naive and self.naive.top1,
            "top1": q and q.top1,
            "top1_low": q and q.top1_low,
            "top1_high": q and q.top1_high,
            "correct": q and q.correct,
            "n": q and q.n,
            "top5": q and q.top5,
            "correct5": q and q.correct5,
            "drop": d and d.drop,
            "drop_lower": d and d.lower,
            "drop_upper": d and d.upper,
            "lost": d and d.lost,
            "won": d and d.won,
            "verdict": d and d.verdict,
            "more_images": d and d.more_images,
            "rung": self.recovery and self.recovery.rung,
            "crop_ratio": self.recovery and self.recovery.crop_ratio,
        }
