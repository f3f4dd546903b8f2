"""The words and numbers of the report: labels with units, gains, and the verdict in one sentence. No HTML here."""

import math
from collections.abc import Sequence

from ..errors import shown
from ..parse import format_quantity, format_resolution, name_of
from ..records import (
    OUTSIDE,
    TOO_FEW,
    WITHIN,
    Budget,
    Candidate,
    Drop,
    Flips,
    Latency,
    Preprocessing,
    Result,
    Score,
)
from ..techniques import RESOLUTION

RUNGS = {
    "none": "lowered only",
    "crop": "crop ratio",
    "batchnorm": "BatchNorm recalibration",
    "head": "head refit",
    "distill": "distillation",
    "fixres": "FixRes fine-tuning",
    "finetune": "fine-tuning",
    "ranges": "other 8-bit ranges",
    "layers": "layers in float",
    "qat": "quantization-aware training",
}
"""The rungs of the recovery ladder from cheap to dear, and what the report calls them."""

VERDICT_KEYS = {WITHIN: "within", OUTSIDE: "outside", TOO_FEW: "few"}
"""Verdict → short key, for style sheets and the picture; anything else is 'unknown'."""


def verdict_key(result: Result) -> str:
    if result.drop is None:
        return "unknown"
    if result.reason:
        return "outside"
    verdicts = [result.drop.verdict, *([result.flips.verdict] if result.flips and result.flips.verdict else [])]
    return min(
        (VERDICT_KEYS.get(verdict, "unknown") for verdict in verdicts), key=("outside", "few", "unknown", "within").index
    )


def shown_verdict(result: Result) -> str:
    """What table and page say of a measured candidate; one that its tuning images ruled out is judged by those."""
    if result.reason or result.drop is None:
        return "ruled out" if result.reason else ""
    if result.drop.verdict == WITHIN and result.flips and result.flips.verdict not in ("", WITHIN):
        return f"{result.flips.verdict} (other answers)"
    return result.drop.verdict


def judged(*results: Result) -> type[Score]:
    """What these results were judged by, as far as any was measured."""
    found = [type(q) for r in results for q in (r.quality, r.naive) if q]
    return found[0] if found else Score


def score_title(score: Score) -> str:
    """Of an axis: `top-1 accuracy, %`, `mIoU, %`, `mean absolute error, mm`."""
    named = score.metric if score.noun in ("", score.metric) else f"{score.metric} {score.noun}"
    return f"{named}, {'%' if score.unit == 'points' else score.unit}"


def size(candidate: Candidate) -> str:
    """`128 px`, `192 × 384 px` (height × width)."""
    if candidate.resolution is None:
        return "original size"
    return f"{name_of(candidate.resolution).replace('x', ' × ')} px"


def details(candidate: Candidate) -> list[str]:
    """What else than the input gets smaller, one phrase each: `stem ×0.5`, `patches of 28 px`, `8 tokens merged a block`."""
    phrases = [t.detail(candidate) for t in candidate.techniques if t is not RESOLUTION]
    return list(filter(None, [*phrases, RESOLUTION.detail(candidate)]))


def label(candidate: Candidate) -> str:
    """`128 px`, `300 px, stem ×0.5`, `300 px, ×0.5 after layer1`, `224 px, 8 tokens merged a block`."""
    return shown(", ".join([size(candidate), *details(candidate)]))


def label_beside(candidate: Candidate, original: Candidate) -> str:
    """`128 px`, of the original's size only what else is smaller: `int8`."""
    inside = details(candidate)
    return shown(", ".join(inside)) if inside and candidate.resolution == original.resolution else label(candidate)


def short_label(candidate: Candidate) -> str:
    """`128`, `300 ×0.5`, `224 p28`, `224 merge8`: for a point in the picture."""
    pieces = [t.short(candidate) for t in candidate.techniques if t is not RESOLUTION]
    return shown(" ".join([size(candidate).removesuffix(" px"), *filter(None, pieces)]))


def digits(value: float) -> str:
    """Three significant digits, trailing zeros kept: `11.0`, `0.0520`, `1234`."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def percent(value: float) -> str:
    return f"{value:.1f}\u00a0%"


def interval(quality: Score) -> str:
    low, high = quality.interval
    return f"{low:.1f}–{high:.1f}\u00a0%" if quality.unit == "points" else f"{digits(low)}–{quality.text(high)}"


def fitting(p: Preprocessing) -> str:
    """How a picture is brought to the network's input, in words."""
    to = f"{format_resolution(p.resolution)} px"
    how = f"({p.interpolation}, {'' if p.antialias else 'not '}antialiased)"
    if p.fit == "stretch":
        return f"The whole picture resized {how} to {to}"
    if p.fit == "pad":
        rest = "the rest at the right and bottom filled with the mean"
        return f"The whole picture resized {how} with its aspect ratio to fit {to}, {rest}"
    return f"Short side resized {how}, centre cropped to {to}, crop ratio {p.crop_ratio:.3g}"


def pixels(p: Preprocessing) -> str:
    """What the numbers are that mean and std are of, where it is not what is usual: '', `BGR, 0 to 255`."""
    order = [p.channel_order.upper()] if p.channel_order != "rgb" else []
    order += ["colours made grey (ITU-R 601)"] if len(p.mean) == 1 else []
    return ", ".join([*order, *([f"0 to {255 * p.scale:g}"] if p.scale != 1 / 255 else [])])


def channels(values: Sequence[float]) -> str:
    """A mean or deviation for each channel: `0.485, 0.456, 0.406`."""
    return ", ".join(f"{value:.4g}" for value in values)


def spread(latency: Latency) -> str:
    return f"{digits(latency.p10_ms)}–{digits(latency.p90_ms)} ms"


def count(number: int, noun: str) -> str:
    """`1 image`, `2624 images`: in plain digits, as data describe themselves, which no line breaks."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def points(value: float, decimals: int = 2) -> str:
    """Percentage points with a sign that reads well: `0.40`, `−1.30`."""
    return f"{value:.{decimals}f}".replace("-", "−")


def signed(value: float) -> str:
    """A change in points: `+0.40`, `−1.30`, `0.00`."""
    text = points(value)
    return {"−0.00": "0.00"}.get(text, text if value < 0 or text == "0.00" else f"+{text}")


def bound(drop: Drop) -> str:
    """The bound that decides, `at most 1.98` or `at least 4.20`: an upper one rounded up, a lower one down."""
    return f"at least {_lower(drop)}" if drop.verdict == OUTSIDE else f"at most {_upper(drop)}"


def compared(drop: Drop) -> str:
    """The drop and the bound that decides: `0.50 ≤ 1.98`, `5.10 ≥ 4.20`."""
    measured = points(drop.drop, _decimals(drop))
    return f"{measured} ≥ {_lower(drop)}" if drop.verdict == OUTSIDE else f"{measured} ≤ {_upper(drop)}"


def _decimals(drop: Drop) -> int:
    """Two, more where what is allowed or lost is so small that two would say nothing."""
    scale = min((abs(v) for v in (drop.allowed, drop.upper) if v and math.isfinite(v)), default=1.0)
    return min(max(2, 2 - math.floor(math.log10(scale))), 6) if scale < 0.1 else 2


def _upper(drop: Drop) -> str:
    """Rounded up, for a proof must not be rounded down, without passing the allowed drop needlessly."""
    if not math.isfinite(drop.upper):
        return "∞"
    for decimals in range(_decimals(drop), 7):
        rounded = math.ceil(drop.upper * 10**decimals - 1e-9) / 10**decimals
        if rounded <= drop.allowed or drop.upper > drop.allowed:
            break
    return points(rounded, decimals)


def _lower(drop: Drop) -> str:
    decimals = _decimals(drop)
    return points(math.floor(drop.lower * 10**decimals + 1e-9) / 10**decimals, decimals)


def faster(before: Latency, after: Latency) -> str:
    """`4.5× less time` where the rounds, or without them the spreads, part; '' where the noise could be all of it. Never a
    factor that the rounds contradict: where times have two modes the medians may be of different ones.
    """
    quicker, slower = after.faster, after.slower
    if after.ratio is None:
        quicker, slower = after.p90_ms < before.p10_ms, after.p10_ms > before.p90_ms
    factor = before.latency_ms / after.latency_ms if after.latency_ms > 0 else 0.0
    if after.ratio is not None:
        factor = min(max(factor, after.ratio[0]), after.ratio[1])
    return gain(factor, 1.0, "less time", "more time") if quicker or slower else ""


def change(drop: float, unit: str = "points") -> str:
    """`0.50 points lower`, `0.20 points higher`, `unchanged`; of another unit how much worse or better."""
    if unit != "points":
        return "unchanged" if drop == 0 else f"{digits(abs(drop))} {unit} {'worse' if drop > 0 else 'better'}"
    return "unchanged" if abs(drop) < 0.005 else f"{abs(drop):.2f} points {'lower' if drop > 0 else 'higher'}"


def gain(before: float, after: float, less: str, more: str) -> str:
    """`5.3× fewer`, `1.1× more`, or '' where the two agree to 1 %."""
    if before <= 0 or after <= 0 or abs(before / after - 1) < 0.01:
        return ""
    return f"{_factor(before / after)} {less}" if before > after else f"{_factor(after / before)} {more}"


def _factor(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2f}×" if ratio < 1.1 else f"{ratio:.1f}×"


def _allowed(value: float) -> str:
    return f"{value:.1f}" if math.isclose(round(value, 1), value) else f"{value:g}"


def nearest(results: Sequence[Result]) -> Result | None:
    """The candidate that came nearest to a proof: proven ones first, then fewest images missing, then lowest bound."""
    ranks = {WITHIN: 0, TOO_FEW: 1, OUTSIDE: 2}
    judged = [(r.drop, r) for r in results if r.drop is not None]

    def distance(pair: tuple[Drop, Result]) -> tuple[float, ...]:
        drop = pair[0]
        missing = math.inf if drop.more_images is None else drop.more_images
        return ranks.get(drop.verdict, len(ranks)), missing, drop.upper

    return min(judged, key=distance)[1] if judged else None


def ceilings_missed(result: Result, budget: Budget) -> list[str]:
    """The cost ceilings of the budget that the candidate exceeds, in words."""
    missed = []
    if budget.max_macs and result.cost and result.cost.macs > budget.max_macs:
        missed.append(f"{format_quantity(result.cost.macs)} MACs (ceiling: {format_quantity(budget.max_macs)})")
    if budget.max_memory_bytes and result.cost and result.cost.peak_activation_bytes > budget.max_memory_bytes:
        used, most = (format_quantity(v, "B") for v in (result.cost.peak_activation_bytes, budget.max_memory_bytes))
        missed.append(f"{used} of activations (ceiling: {most})")
    if budget.max_size_bytes and result.footprint and result.footprint.file_bytes > budget.max_size_bytes:
        used, most = (format_quantity(v, "B") for v in (result.footprint.file_bytes, budget.max_size_bytes))
        missed.append(f"a file of {used} (ceiling: {most})")
    if result.flips and result.flips.verdict not in ("", WITHIN):
        missed.append(f"{flipped(result.flips)} (allowed: {budget.max_flips:g} %, {result.flips.verdict})")
    if budget.max_latency_ms and result.latency and result.latency.latency_ms > budget.max_latency_ms:
        missed.append(f"{digits(result.latency.latency_ms)} ms (ceiling: {budget.max_latency_ms:g} ms)")
    return missed


def flipped(flips: Flips) -> str:
    """`2.1 % of the answers are others`, with what became of them where right and wrong are known."""
    return f"{flips.share:.1f} % of the answers are others"


def flips_bound(flips: Flips) -> str:
    """The bound on other answers in percent, rounded up."""
    return f"{math.ceil(10 * flips.upper) / 10:.1f}"


def timed_on(latency: Latency) -> str:
    """What latencies were measured on: hardware, runtime, threads, images at once, runs."""
    batch, many = count(latency.batch_size, "image"), count(latency.runs, "run")
    return f"{latency.hardware}; {latency.runtime}, {count(latency.threads, 'thread')}, batch of {batch}, {many}"


def flips_told(flips: Flips) -> str:
    """In a table: `2.1 % ≤ 3.4, 30 right→wrong, 25 wrong→right`."""
    return f"{flips.share:.1f} % ≤ {flips_bound(flips)}, {flips.lost} right→wrong, {flips.won} wrong→right"


def budget_words(budget: Budget, metric: str = "top-1", unit: str = "points") -> str:
    """`a drop of at most 2.0 points of top-1 with 95 % confidence, at most 500 M MACs`."""
    words = [f"a drop of at most {_allowed(budget.max_drop)} {unit} of {metric} with {budget.confidence * 100:g} % confidence"]
    if budget.max_macs:
        words.append(f"at most {format_quantity(budget.max_macs)} MACs")
    if budget.max_memory_bytes:
        words.append(f"at most {format_quantity(budget.max_memory_bytes, 'B')} of activations")
    if budget.max_latency_ms:
        words.append(f"at most {budget.max_latency_ms:g} ms per forward pass")
    if budget.max_size_bytes:
        words.append(f"a file of at most {format_quantity(budget.max_size_bytes, 'B')}")
    if budget.max_flips:
        words.append(f"another answer on at most {budget.max_flips:g} % of the images")
    return ", ".join(words)


def verdict(
    original: Result, results: Sequence[Result], chosen: Result | None, budget: Budget, score: type[Score] | None = None
) -> str:
    """The whole report in one or two sentences. score: what is judged by, where nothing was measured yet."""
    if waiting := sum(r.status == "waiting" for r in results):
        return (
            f"This run is not finished: {len(results) - waiting} of {count(len(results), 'candidate')} are done. "
            "What is proven is said when all are; the same command goes on."
        )
    what, kinds = score or judged(original, *results), [q for r in (original, *results) for q in (r.quality, r.naive) if q]
    unit = kinds[0].unit if kinds else "points"
    if chosen is None:
        return _unproven(results, budget, what, unit)
    how, proof = _how(chosen.candidate, original.candidate), _proof(chosen.drop, what, unit)
    return f"{how} this network needs {_savings(original, chosen)}{proof}."


def _dropped(score: type[Score]) -> str:
    return f"{score.noun} drop" if score.noun != score.metric else f"drop in {score.metric}"


def _how(chosen: Candidate, original: Candidate) -> str:
    smaller = "" if chosen.resolution in (None, original.resolution) else f"At {size(chosen)} instead of {size(original)}"
    inside = list(filter(None, (t.how(chosen) for t in chosen.techniques if t is not RESOLUTION)))
    if smaller and inside:
        return f"{smaller} and with {' and '.join(inside)},"
    return smaller or (f"With {' and '.join(inside)}" if inside else "Left as it is,")


def _savings(original: Result, chosen: Result) -> str:
    parts = []
    if original.cost and chosen.cost:
        parts.append(gain(original.cost.macs, chosen.cost.macs, "fewer MACs", "more MACs"))
    if original.footprint and chosen.footprint and chosen.candidate.precision != original.candidate.precision:
        parts.append(gain(original.footprint.file_bytes, chosen.footprint.file_bytes, "fewer bytes", "more bytes"))
    if original.latency and chosen.latency:
        parts.append(faster(original.latency, chosen.latency))
    *first, last = [p for p in parts if p] or ["as much as before"]
    return f"{', '.join(first)} and {last}" if first else last


def _proof(drop: Drop | None, score: type[Score], unit: str) -> str:
    if drop is None:
        return f"; its {score.noun or score.metric} was not measured"
    confidence = f"with {drop.confidence * 100:g} % confidence"
    if drop.verdict != WITHIN:
        return f", but its {_dropped(score)} of {points(drop.drop)} {unit} is not proven to be within {_allowed(drop.allowed)}"
    if drop.upper <= 0:
        name, allowed = score.noun or score.metric, _allowed(drop.allowed)
        return f", and its {name} is proven not to drop (allowed: {allowed} {unit}) {confidence}"
    return f", and its {_dropped(score)} is proven to be {bound(drop)} {unit} (allowed: {_allowed(drop.allowed)}) {confidence}"


def _unproven(results: Sequence[Result], budget: Budget, score: type[Score], unit: str) -> str:
    near = nearest(results)
    if near is None or near.drop is None:
        return f"Nothing was proven: of {count(len(results), 'candidate')} none was measured against the original."
    drop, name = near.drop, label(near.candidate)
    if drop.verdict == WITHIN:
        missed = " and ".join(ceilings_missed(near, budget)) or "it was not chosen"
        return (
            f"No candidate meets every limit. Nearest came {name}: its {_dropped(score)} is proven to be "
            f"{bound(drop)} {unit} (allowed: {_allowed(drop.allowed)}), but: {missed}."
        )
    opening = f"Nothing was proven: no candidate is shown to lose at most {_allowed(budget.max_drop)} {unit}."
    if drop.verdict == OUTSIDE:
        return f"{opening} Even the nearest, {name}, is proven to lose more: {bound(drop)} {unit}."
    missing = f"; about {count(drop.more_images, 'more image')} would settle it" if drop.more_images else ""
    return f"{opening} Nearest came {name}: it lost {points(drop.drop)} {unit}, which may be up to {_upper(drop)}{missing}."
