"""What wastes compute on this machine for this network: measured, and said in sentences."""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engines import Runtime, check_threads
from ..engines.engine import Batches, Engine, Operator, Quantization, engine_of, processor_flags, sums_saturate
from ..engines.fuse import is_fusible
from ..engines.onnxruntime import NotExported, export_onnx
from ..engines.torch import TorchRuntime
from ..environment import versions
from ..errors import DownresError, first_line
from ..families import Model, load_model, with_preprocessing
from ..families.find import find_adapter
from ..images.archives import encoded_in, find_archives, list_archives
from ..images.decode import decode
from ..images.encoded import Encoded
from ..images.parts import list_images
from ..images.preprocess import preprocess
from ..images.unreadable import Unreadable
from ..measuring.cost import measure_cost
from ..measuring.latency import Progress, described, hardware, random_batch, rounds, times_as_fast
from ..parse import (
    BF16,
    FP16,
    FP32,
    INT8,
    PRECISIONS,
    RUNTIMES,
    Resolution,
    check_runtimes,
    format_quantity,
    format_resolution,
    user_path,
)
from ..probe import chosen_answer, find_answers, leaf_outputs
from ..record import Record
from ..records import Cost, Latency
from ..recovery.bank import PROBE_IMAGES
from ..reduction import made_for
from ..tasks import Question, counted
from ..tasks.task import Logits
from .design import as_model, design_of, fused_notes

RUNS = 30
LEAST_RUNS = 6
"""Rounds below which no interval of 95 % is to be had."""
WARMUP = 3
PICTURES = 32
"""Of a folder that are decoded."""
TIME, MACS, CORES = "time", "MACs", "cores"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Advice(Record):
    """One thing that was found, in sentences.

    about: 'ragged', 'precision', 'sums', 'runtime', 'threads', 'decoding', 'float', 'branches', or 'missing' for what does not
    run here. gain: the part of `of` ('time', 'MACs' or 'cores') that the better of the two ways named saves of the worse; None
    where nothing is saved, or not known. measured: the numbers of the sentence.
    """

    about: str
    text: str
    gain: float | None = None
    of: str = TIME
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing(Record):
    """One way to run the network, and its time for one image. latency.ratio: of the first way that was timed over this one."""

    runtime: str
    precision: str
    latency: Latency


@dataclass(frozen=True)
class Diagnosis(Record):
    """What `doctor` found, the largest gain first, what gains nothing last.

    input_size: (channels, height, width). cost: of one image. notes: what the numbers mean.
    """

    model: str
    input_size: tuple[int, int, int]
    hardware: str
    versions: dict[str, str]
    cost: Cost
    timings: tuple[Timing, ...]
    findings: tuple[Advice, ...]
    notes: tuple[str, ...]

    @property
    def wastes(self) -> tuple[Advice, ...]:
        """The findings by which something is gained."""
        return tuple(one for one in self.findings if one.gain is not None)

    @property
    def verdict(self) -> str:
        if not self.wastes:
            return "Nothing that was looked at wastes compute here."
        first = self.wastes[0]
        many = "" if len(self.wastes) == 1 else f", of {len(self.wastes)} things that do"
        return f"What wastes most here{many}: {_ABOUT[first.about]}, {_percent(first.gain)} of the {first.of}."

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "verdict": self.verdict}


_ABOUT = {
    "ragged": "a size that does not fit the network",
    "precision": "the type of numbers",
    "runtime": "the runtime",
    "threads": "the number of threads",
    "decoding": "making pictures ready",
    "float": "operators in float between those of 8 bits",
    "branches": "branches that are for training",
}


def doctor(
    model: Model | nn.Module | str,
    *,
    runtimes: Sequence[str] | str | None = None,
    resolution: Resolution | None = None,
    data: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    runs: int = RUNS,
    progress: Progress | None = None,
) -> Diagnosis:
    """What wastes compute on this machine for this network, each with its measured numbers and what to do.

    Args:
        runtimes: names, the device after a colon where it is not the CPU; None: onnxruntime, openvino and torch, as far as
            installed.
        resolution: that it is used at; None: its own.
        data: a folder of pictures: how long they take to be decoded and preprocessed is compared with the network's time.
        threads: the most that a runtime may have; None: all cores.
        runs: rounds in which all ways to run it take turns.

    A library model has random weights, which change no time. Networks of 8 bits are quantized on noise: their times are real,
    of their quality nothing is known. Raises DownresError for an unknown runtime and one that is not installed; what does not
    run here is among the findings.
    """
    if runs < LEAST_RUNS:
        raise DownresError(f"Intervals need {LEAST_RUNS} rounds at least, {runs} are too few: give for example {RUNS}.")
    names, notes = _named(runtimes)
    threads = check_threads(threads)
    loaded = as_model(load_model(model, pretrained=False) if isinstance(model, str) else model)
    loaded = with_preprocessing(loaded, resolution=resolution)
    loaded, findings = _fitting(loaded)
    network, size = _network(loaded), (len(loaded.preprocessing.mean), *loaded.preprocessing.hw)
    cost = measure_cost(network, size)
    findings += [*_ragged(loaded, cost), *_branches(loaded, network, cost)]
    with tempfile.TemporaryDirectory(prefix="downres-") as folder:
        ways = _Ways(network, size, names, threads, Path(folder))
        findings += ways.make()
        timings, seconds = time_ways(ways.ready, size, runs, progress, "latency")
        findings += [*precisions(timings, seconds), *runtimes_compared(timings, seconds), *ways.between()]
        quickest = min((way for way in timings if way.precision == FP32), key=lambda way: timings[way].latency_ms)
        more, times = time_ways(ways.on_threads(quickest), size, runs, progress, "threads")
        findings += threads_compared(more, times)
        if data is not None:
            findings += decoding(data, loaded, quickest, ways.ready[quickest], notes)
    notes += [
        f"times are medians of one image in {runs} rounds in which all ways take turns, intervals 95 % ones of the median of "
        "paired rounds"
    ]
    if any(way.precision == INT8 for way in timings):
        notes.append("int8 is quantized on noise here: its times are real, of its quality nothing is known")
    if any(one.disturbed for one in [*timings.values(), *more.values()]):
        notes.append(
            "something else ran here at the same time, every tenth pass took twice the median: times of a quiet machine differ"
        )
    return Diagnosis(
        loaded.spec or type(loaded.module).__name__,
        size,
        hardware(),
        {**versions(), **{name: text for one in timings.values() for name, text in one.versions.items()}},
        cost,
        tuple(Timing(way.runtime, way.precision, one) for way, one in timings.items()),
        tuple(sorted(findings, key=lambda one: -(one.gain or 0.0))),
        tuple(notes),
    )


# The network


def _named(runtimes: Sequence[str] | str | None) -> tuple[tuple[str, ...], list[str]]:
    """The runtimes to be timed, and what is said of those that are not installed when nobody named any."""
    if runtimes is None:
        have = tuple(name for name in RUNTIMES if name == "torch" or _installed(name))
        return have, [f"{name} is not installed and was not timed" for name in RUNTIMES if name not in have]
    names = check_runtimes(runtimes)
    for name in names:
        engine_of(name.partition(":")[0])  # whether it is installed; whether it has the device is a finding
    return names, []


def _installed(name: str) -> bool:
    try:
        engine_of(name)
    except DownresError:
        return False
    return True


def _network(model: Model) -> nn.Module:
    """The model for its size as it would be served: bare logits, or those of every pixel at the size of the input."""
    p = model.preprocessing
    network = made_for(model.module, p.hw)
    try:
        answer = chosen_answer(find_answers(network, (len(p.mean), *p.hw)), None)
        return counted(model, answer, Question())(network) if answer.size is not None else Logits(network, answer.which)
    except (DownresError, LookupError):  # features, or several outputs: timed as it is
        return network


def _fitting(model: Model) -> tuple[Model, list[Advice]]:
    """The model where it runs at its size; else at the nearest that its patches divide, and a finding that says so."""
    p, adapter = model.preprocessing, find_adapter(model.module)
    try:
        made_for(model.module, p.hw)
    except DownresError as error:
        if adapter is None or not any(side % unit for side, unit in zip(p.hw, adapter.unit, strict=True)):
            raise
        height, width = (max(unit, _nearest(side, unit)) for side, unit in zip(p.hw, adapter.unit, strict=True))
        nearest = height, width
        text = (
            f"Patches of {format_resolution(adapter.unit)} px do not divide {format_resolution(p.hw)} px, at which the network "
            f"does not run: all that follows is measured at {format_resolution(nearest)} px, the nearest size that they divide."
        )
        try:
            fitting = with_preprocessing(model, resolution=nearest)
            made_for(fitting.module, fitting.preprocessing.hw)
        except DownresError:
            raise error from None
        return fitting, [Advice("ragged", text, measured={"asked": list(p.hw), "nearest": list(nearest)})]
    return model, []


def _nearest(side: int, unit: int) -> int:
    """The nearest multiple, of two the larger."""
    return (2 * side + unit) // (2 * unit) * unit


def _ragged(model: Model, cost: Cost) -> list[Advice]:
    """Sides that the total stride, or patches, do not divide: what the sizes that fit cost."""
    p, design = model.preprocessing, design_of(model)
    (height, width), (down, across) = p.hw, (math.lcm(design.stride, unit) for unit in design.divided_by)
    if height % down == 0 and width % across == 0:
        return []
    below, nearest = (height // down * down, width // across * across), (_nearest(height, down), _nearest(width, across))
    macs: dict[tuple[int, int], int] = {}
    for hw in dict.fromkeys([nearest, below]):
        if min(hw) > 0:
            try:
                at = with_preprocessing(model, resolution=hw)
                macs[hw] = measure_cost(_network(at), (len(p.mean), *hw)).macs
            except DownresError:  # it is made for one size
                continue
    what = f"Patches of {design.patch} px do" if design.patch else f"The network's total stride of {design.stride} does"
    here = f"{format_resolution(p.hw)} px"
    maps = _maps(model)
    many = f" (its maps have {', '.join(maps)})" if maps and not design.patch else ""
    said = [
        f"{format_resolution(hw)} px {'take' if found < cost.macs else 'would take'} {_signed(found / cost.macs)} MACs "
        f"({format_quantity(found)} instead of {format_quantity(cost.macs)}) for {_signed(math.prod(hw) / math.prod(p.hw))} "
        "pixels"
        for hw, found in macs.items()
    ]
    text = f"{what} not divide {here}{many}: {'; '.join(said) or 'no size that fits runs'}."
    if macs:
        text += f" Use {format_resolution(next(iter(macs)))} px, the nearest that fits."
    least = min(macs.values(), default=cost.macs)
    return [
        Advice(
            "ragged",
            text,
            1 - least / cost.macs if least < cost.macs else None,
            MACS,
            {
                "stride": design.stride,
                "hw": list(p.hw),
                "macs": cost.macs,
                "fitting": [{"hw": list(hw), "macs": found} for hw, found in macs.items()],
            },
        )
    ]


def _maps(model: Model) -> list[str]:
    """Sizes of the feature maps, the largest first."""
    height, width = model.preprocessing.hw
    shapes = leaf_outputs(made_for(model.module, (height, width)), (len(model.preprocessing.mean), height, width))
    maps = [s[2:] for s in shapes if min(s[2:]) > 1 and abs(s[2] * width / height - s[3]) <= 1]
    return [format_resolution((h, w)) for h, w in sorted(dict.fromkeys(maps), reverse=True)]


def _branches(model: Model, network: nn.Module, cost: Cost) -> list[Advice]:
    """Branches that are for training alone, still apart."""
    if not is_fusible(model.module) or not fused_notes(model):
        return []
    apart = measure_cost(network, cost.input_size[1:], fuse=False)
    text = (
        f"{type(model.module).__name__} still has the branches that it was trained with: put together by its own code it takes "
        f"{_signed(cost.macs / apart.macs)} MACs ({format_quantity(cost.macs)} instead of {format_quantity(apart.macs)}) and "
        f"{_signed(cost.peak_activation_bytes / apart.peak_activation_bytes)} peak memory. downres does so before it counts, "
        "times and exports; do it wherever else the network runs."
    )
    gain = 1 - cost.macs / apart.macs
    return [Advice("branches", text, gain if gain > 0 else None, MACS, {"apart": apart.macs, "together": cost.macs})]


# Ways to run it


@dataclass(frozen=True)
class Way:
    """Where and in what numbers the network runs."""

    runtime: str
    precision: str
    threads: int

    def __str__(self) -> str:
        return f"{self.precision} in {self.runtime} on {_threads(self)}"


class _Ways:
    """All ways in which the network runs here. ready: those that did, made by `make`, the first runtime's float32 first."""

    def __init__(
        self, network: nn.Module, size: tuple[int, int, int], names: Sequence[str], threads: int, folder: Path
    ) -> None:
        self.network, self.size, self.names, self.threads, self.folder = network, size, names, threads, folder
        self.batch = random_batch((1, *size))
        self.ready: dict[Way, Runtime] = {}
        self.engines: dict[str, Engine] = {}

    def make(self) -> list[Advice]:
        """What cannot run is a finding. DownresError where nothing can in float32."""
        findings = []
        names, exported = list(self.names), self.folder / "exported.onnx"
        if any(not name.startswith("torch") for name in names):
            try:
                export_onnx(self.network, self.size, exported)
            except NotExported as error:
                names = [name for name in names if name.startswith("torch")] or ["torch"]
                text = f"The network cannot be exported to ONNX ({error.why}): it was timed in torch alone."
                findings.append(Advice("missing", text, measured={"what": "export"}))
        for name in names:
            try:
                self.engines[name] = engine_of(name)
            except DownresError as error:
                findings.append(Advice("missing", str(error), measured={"runtime": name}))
        lacking: dict[str, list[str]] = {}
        for name, engine in self.engines.items():
            for precision in PRECISIONS:
                if why := engine.why_not(precision):
                    lacking.setdefault(precision, []).append(f"{name}: {why}")
                    continue
                try:
                    runtime = self._load(engine, exported, precision)
                    runtime(self.batch)  # OpenVINO says only now whether it keeps to a precision
                    self.ready[Way(name, precision, self.threads)] = runtime
                except Exception as error:  # DownresError, and whatever torch says of other types of numbers
                    text = f"{precision} does not run in {name} here: {first_line(error)[:300]}."
                    findings.append(Advice("missing", text, measured={"runtime": name, "precision": precision}))
                    if precision == FP32:  # nor will the others
                        break
        if not any(way.precision == FP32 for way in self.ready):
            raise DownresError(findings[0].text if findings else "The network runs in no runtime here: give another.")
        findings += self._sums()
        for precision, reasons in lacking.items():
            if not any(way.precision == precision for way in self.ready):
                text = f"Nothing here computes in {precision}: {'; '.join(reasons)}."
                findings.append(Advice("missing", text, measured={"precision": precision}))
        return findings

    def on_threads(self, way: Way) -> dict[Way, Runtime]:
        """The same way on 1, 2, 4, … threads, all of them last; nothing where there is one thread or another device."""
        engine = self.engines[way.runtime]
        if self.threads == 1 or engine.device not in ("cpu", "compile"):
            return {}
        numbers = [2**i for i in range(self.threads.bit_length()) if 2**i < self.threads]
        made = {replace(way, threads=n): self._load(engine, self.folder / "exported.onnx", way.precision, n) for n in numbers}
        return {**made, way: self.ready[way]}

    def between(self) -> list[Advice]:
        """Operators of the int8 files that compute in float between those that compute in 8 bits."""
        findings = []
        for way in self.ready:
            if way.precision == INT8:
                engine = self.engines[way.runtime]
                findings += in_float(way.runtime, engine.executed(self._file(engine, INT8), self.batch, self.threads))
        return findings

    def _sums(self) -> list[Advice]:
        """Whether 8-bit sums would overflow, where that shortens the weights of a file that was made."""
        if not sums_saturate() or not any(w.precision == INT8 and w.runtime.startswith("onnxruntime") for w in self.ready):
            return []
        seen = "has no VNNI instructions" if processor_flags() else "is not known to have VNNI instructions"
        text = (
            f"The processor {seen}: it adds 8-bit products in 16 bits, where they would overflow, so the weights of int8 files "
            "for onnxruntime have 7 bits here. Make the files on a machine that has VNNI if they are served on one."
        )
        return [Advice("sums", text)]

    def _load(self, engine: Engine, exported: Path, precision: str, threads: int | None = None) -> Runtime:
        threads = threads or self.threads
        if not engine.exported:
            return TorchRuntime(self.network, threads, device=engine.device, precision=precision)
        file = self._file(engine, precision)
        if not file.exists():
            if precision == INT8:
                noise = [random_batch((1, *self.size), seed) for seed in range(PROBE_IMAGES)]
                engine.quantize(exported, file, Batches.of(noise), Quantization(), None)
            else:
                engine.write(exported, file, precision)
        return engine.load(file, threads, precision=precision)

    def _file(self, engine: Engine, precision: str) -> Path:
        return self.folder / f"{engine.text.replace(':', '-')}-{precision}{Path(engine.file).suffix}"


def time_ways(
    ready: Mapping[Way, Runtime],
    size: tuple[int, int, int],
    runs: int = RUNS,
    progress: Progress | None = None,
    stage: str = "latency",
) -> tuple[dict[Way, Latency], dict[Way, np.ndarray]]:
    """The latency of each, its ratio with the first, and the seconds of every round."""
    batch, by_name = random_batch((1, *size)), {str(way): way for way in ready}
    told: Progress | None = None if progress is None else lambda _what, done, total: progress(stage, done, total)
    runtimes, inputs = {str(way): runtime for way, runtime in ready.items()}, dict.fromkeys(by_name, batch)
    seconds = rounds(runtimes, inputs, runs=runs, warmup=WARMUP, progress=told)
    found = {by_name[name]: times for name, times in seconds.items()}
    first = next(iter(found.values()), None)
    latencies = {
        way: described(ready[way], batch, times, None if first is None or times is first else times_as_fast(first, times))
        for way, times in found.items()
    }
    return latencies, found


def precisions(timings: Mapping[Way, Latency], seconds: Mapping[Way, np.ndarray]) -> list[Advice]:
    """Fewer bits against float32, and int8 against the fastest of the float types, in each runtime."""
    findings = []
    for way in timings:
        rivals = [w for w in timings if w.runtime == way.runtime and w.precision not in (INT8, way.precision)]
        if way.precision in (BF16, FP16):
            rivals = [w for w in rivals if w.precision == FP32]
        if way.precision == FP32 or not rivals:
            continue
        rival = min(rivals, key=lambda w: timings[w].latency_ms)
        mine, theirs = timings[way].latency_ms, timings[rival].latency_ms
        numbers = f"{_ms(mine)} against {_ms(theirs)}"
        faster = times_as_fast(seconds[rival], seconds[way])
        assert faster is not None
        measured = {"runtime": way.runtime, way.precision: mine, rival.precision: theirs, "times_as_fast": list(faster)}
        compared = f"{{}} {rival.precision} in {way.runtime} here: {numbers}, "
        if faster[0] > 1 and mine < theirs:
            text = f"{way.precision} is {compared.format('faster than')}{_range(faster)} as fast. Search with "
            text += f"`precisions={way.precision!r}` to know what it costs in quality."
            findings.append(Advice("precision", text, 1 - mine / theirs, TIME, measured))
        elif faster[1] < 1 and mine > theirs:
            text = f"{way.precision} is {compared.format('slower than')}{_range(_inverse(faster))} as long. Leave it out here."
            findings.append(Advice("precision", text, 1 - theirs / mine, TIME, measured))
        else:
            text = (
                f"{way.precision} is not seen to be faster or slower than {rival.precision} in {way.runtime} here: {numbers}."
            )
            findings.append(Advice("precision", text, None, TIME, measured))
    return findings


def runtimes_compared(timings: Mapping[Way, Latency], seconds: Mapping[Way, np.ndarray]) -> list[Advice]:
    """In each type of numbers the fastest runtime against those that it is faster than."""
    findings = []
    for precision in dict.fromkeys(way.precision for way in timings):
        best, *others = sorted((w for w in timings if w.precision == precision), key=lambda w: timings[w].latency_ms)
        slower = [(w, faster) for w in others if (faster := times_as_fast(seconds[w], seconds[best])) and faster[0] > 1]
        if not slower:
            continue
        mine = timings[best].latency_ms
        said = " and ".join(f"{_ms(timings[w].latency_ms)} in {w.runtime}, {_range(faster)} as long" for w, faster in slower)
        text = f"{best.runtime} is faster here in {precision}: {_ms(mine)} against {said}. Serve {precision} in {best.runtime}."
        measured = {"precision": precision, **{w.runtime: timings[w].latency_ms for w in (best, *others)}}
        gain = 1 - mine / max(timings[w].latency_ms for w, _ in slower)
        findings.append(Advice("runtime", text, gain, TIME, measured))
    return findings


def threads_compared(timings: Mapping[Way, Latency], seconds: Mapping[Way, np.ndarray]) -> list[Advice]:
    """The number of threads from which more do not help. The ways differ in that alone, and come in its order."""
    ways = list(timings)
    if len(ways) < 2:
        return []

    def helps(few: Way, many: Way) -> bool:
        faster = times_as_fast(seconds[few], seconds[many])
        return faster is not None and faster[0] > 1

    enough = next(i for i, way in enumerate(ways) if not any(helps(way, more) for more in ways[i + 1 :]))
    best, most = ways[enough], ways[-1]
    times = ", ".join(f"{_ms(timings[w].latency_ms)} on {w.threads}" for w in ways)
    measured = {"runtime": best.runtime, "enough": best.threads, **{str(w.threads): timings[w].latency_ms for w in ways}}
    if best is most:
        return [Advice("threads", f"All {_threads(most)} help {most.runtime} here: {times}.", None, CORES, measured)]
    slower = times_as_fast(seconds[most], seconds[best])
    if slower is not None and slower[0] > 1:
        text = f"{_threads(most)} take {_range(slower)} as long as {best.threads} in {best.runtime} here: {times}. "
        text += f"Run it with `threads={best.threads}`."
        return [Advice("threads", text, 1 - timings[best].latency_ms / timings[most].latency_ms, TIME, measured)]
    text = f"More than {_threads(best)} {'is' if best.threads == 1 else 'are'} not seen to help {best.runtime} here: {times}. "
    text += f"`threads={best.threads}` leaves {most.threads - best.threads} of {most.threads} cores to other work."
    return [Advice("threads", text, 1 - best.threads / most.threads, CORES, measured)]


def in_float(runtime: str, operators: Sequence[Operator]) -> list[Advice]:
    """Those of an int8 file that compute in float with 8 bits before and after them."""
    before: set[str] = set()
    for op in operators:
        if any(name in before for name in op.takes) or (op.in_8_bits and op.takes):
            before.add(op.name)
    takers: dict[str, list[Operator]] = {}
    for op in operators:
        for name in op.takes:
            takers.setdefault(name, []).append(op)
    then: set[str] = set()
    for op in reversed(operators):
        if any(taker.in_8_bits or taker.name in then for taker in takers.get(op.name, ())):
            then.add(op.name)
    found = [op for op in operators if not (op.in_8_bits or op.converts) and op.name in before & then]
    if not found:
        return []
    names = {op.name for op in found}
    read = {name for op in found for name in op.takes}
    around = [op for op in operators if op.converts and (op.name in read or names & {*op.takes})]
    kinds = Counter(op.kind for op in found)
    spent, whole = sum(op.us for op in [*found, *around]), sum(op.us for op in operators)
    named = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    share = spent / whole if whole else 0.0
    profile = f"{_ms(spent / 1000)} of {_ms(whole / 1000)}"
    text = (
        f"In the int8 file of {runtime} these compute in float between operators of 8 bits: {named}. With the conversions "
        f"around them they take {_percent(share)} of the time in its profile ({profile}); layers that it has in 8 bits would "
        "save a part."
    )
    measured = {"runtime": runtime, "operators": dict(kinds), "us": spent, "of_us": whole}
    return [Advice("float", text, share or None, TIME, measured)]


# The pictures


def _some_pictures(data: str | os.PathLike[str]) -> Sequence[Path | Encoded]:
    """PICTURES of a folder, or of archives, from all over them."""
    if (archives := find_archives(data)) is not None:
        listing = list_archives(archives)
        if not len(listing):
            raise DownresError(f"{data} holds no pictures: point `data` to files that do.")
        return encoded_in(listing, np.linspace(0, len(listing) - 1, min(len(listing), PICTURES)).astype(int))[0]
    folder = user_path(data)
    if not folder.is_dir():
        raise DownresError(f"There is no folder {folder}: point `data` to a folder of pictures.")
    names, _ = list_images(folder)
    if not names:
        raise DownresError(f"{folder} holds no pictures: point `data` to a folder of pictures.")
    return [folder / names[i] for i in np.linspace(0, len(names) - 1, min(len(names), PICTURES)).astype(int)]


def decoding(
    data: str | os.PathLike[str], model: Model, way: Way, runtime: Callable[[np.ndarray], Any], notes: list[str]
) -> list[Advice]:
    """How long a picture takes until it can be looked at, against the time that the network then takes, one after the other."""
    p, chosen = model.preprocessing, _some_pictures(data)

    def prepare(path: Path | Encoded) -> tuple[float, np.ndarray]:
        path.read() if isinstance(path, Encoded) else path.read_bytes()  # the disk's time is another matter
        start = perf_counter()
        x = preprocess(decode(path, len(p.mean)), p)
        return perf_counter() - start, x.numpy()[None]

    # One torch thread, as in every worker that prepares pictures for a search.
    found: list[tuple[float, float]] = []
    unread = 0
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for path in chosen:
            try:
                for _ in range(1 if found else 2):  # the first pays for what is made once
                    took, x = pool.submit(prepare, path).result()
                    start = perf_counter()
                    runtime(x)
            except (Unreadable, DownresError, OSError):  # broken, or of other channels than the network's
                unread += 1
                continue
            found.append((took, perf_counter() - start))
    pairs = np.array(found)
    if not len(pairs):
        raise DownresError(f"None of {len(chosen)} pictures in {data} can be read: point `data` to others.")
    if unread:
        notes.append(f"{unread} of {len(chosen)} pictures could not be read")
    ready, net = (float(1000 * values) for values in np.median(pairs, axis=0))
    longer = int((pairs[:, 0] > pairs[:, 1]).sum())
    measured = {"pictures": len(pairs), "longer": longer, "ready_ms": ready, "network_ms": net}
    numbers = (
        f"a median of {_ms(ready)} on one thread against {_ms(net)} of the network ({way}), and longer for {longer} of "
        f"{len(pairs)} pictures"
    )
    if ready <= net:
        text = f"Decoding and preprocessing a picture does not hold the network up: {numbers}."
        return [Advice("decoding", text, None, TIME, measured)]
    text = (
        f"Decoding and preprocessing a picture takes longer than the network: {numbers}. Prepare them in "
        f"{math.ceil(ready / net)} threads or more beside the network, or store them near {format_resolution(p.hw)} px."
    )
    return [Advice("decoding", text, 1 - net / ready, TIME, measured)]


# Words


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def _threads(way: Way) -> str:
    return f"{way.threads} thread{'s' * (way.threads > 1)}"


def _percent(part: float | None) -> str:
    return f"{100 * (part or 0.0):.1f} %"


def _signed(ratio: float) -> str:
    """Of a new number over the old: `13.1 % fewer`."""
    return f"{_percent(abs(1 - ratio))} {'fewer' if ratio <= 1 else 'more'}"


def _range(interval: Interval) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f} times"


def _inverse(interval: Interval) -> Interval:
    return 1 / interval[1], 1 / interval[0]
