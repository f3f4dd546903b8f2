"""Fewer pixels or fewer channels? RegSeg on CamVid, trained and run at several resolutions, judged at the labels' size.

    for seed in 0 1; do for width in 1.0 0.5; do for size in 360x480 240x320 180x240; do
      python recipes/regseg.py --data ../shared/data/camvid --size $size --width $width --seed $seed --epochs 45 --bf16 \\
        --ema 0.998 --out runs/camvid/w$width-$size-s$seed
    done; done; done
    python recipes/camvid.py --runs runs/camvid --data ../shared/data/camvid
    python recipes/camvid_pictures.py

Writes results/camvid.json: every network of `--runs` on the 101 validation images at its own size, at the next larger and at
all smaller ones, with and without BatchNorm recalibrated there, with activations resampled after the stem, logits upsampled
bilinear and bicubic; MACs, memory and latency of each; and the comparisons that the text of README.md rests on. Whatever was
evaluated is kept beside its network and not evaluated again. Expected time: three hours of one core for the trainings, then a
minute a network, and three for the latencies. Expected result: README.md.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from regseg import load_run
from scipy.special import stdtrit
from torch import Tensor, nn

import downres
from downres import DownresError, Preprocessing
from downres.environment import versions
from downres.images.decode import decode
from downres.images.preprocess import preprocess
from downres.measuring.latency import hardware, interleaved, load_runtime, random_batch
from downres.parse import format_resolution
from downres.records import CLASSES, LOGITS, Dense
from downres.recovery.batchnorm import recalibrate_batchnorm
from downres.reductions.dense import Segmenter, upsample
from downres.tasks.segmentation.masks import MaskFolder, find_masks
from downres.tasks.segmentation.quality import SIZES as SIZES_OF_OBJECTS
from downres.tasks.segmentation.quality import Tallies, Truths, segmentation_quality, tally

RESULTS = Path(__file__).parent / "results"
LABELS = (360, 480)
"""Size of the masks: that of every answer here."""
SIZES = ((360, 480), (300, 400), (240, 320), (180, 240), (120, 160), (90, 120))
TRAINED_FOR = ((360, 480), (240, 320), (180, 240))
STEM_SCALES = (0.75, 0.5)
"""Of the RegSegs of seed 0 that were trained at the labels' size (the paper's 'after embedding')."""
INTERPOLATIONS = ("bilinear", "bicubic")
SMALL = ("pole", "sign", "pedestrian", "cyclist")
"""Named before anything was measured: the classes of thin or small things."""
LEARNT = 5.0
"""IoU in percent below which a class counts as not learnt."""
TRAINING_IMAGES = 96
"""For BatchNorm's statistics, evenly spread over the training part."""
BLOCK = 10
"""Validation frames follow each other in one drive: they are resampled in blocks of so many neighbours (Künsch 1989)."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Way:
    """How a trained network is run. batchnorm: with its statistics taken anew there."""

    hw: tuple[int, int]
    stem_scale: float = 1.0
    batchnorm: bool = False

    def __str__(self) -> str:
        stem = f" stem×{self.stem_scale:g}" if self.stem_scale != 1.0 else ""
        return f"{format_resolution(self.hw)}{stem}{' batchnorm' * self.batchnorm}"


@dataclass(frozen=True)
class Trained:
    """A finished run of regseg.py."""

    folder: Path
    about: dict

    @property
    def seed(self) -> int:
        return self.about["seed"]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.about["size"])

    @property
    def network(self) -> str:
        """Equal for runs that differ by size and seed only."""
        return Path(self.about["model"]).name if self.about.get("model") else f"{self.about['name']} ×{self.about['width']:g}"

    def ways(self) -> Iterator[Way]:
        """The own size first, then the next larger and all smaller ones; what is recalibrated only at sizes trained for.

        Of networks trained at lower sizes, seed 0 alone is run at sizes that no network was trained for.
        """
        yield Way(self.size)
        first, own = self.seed == 0, SIZES.index(self.size)
        for hw in SIZES[max(0, own - 1) :]:
            if hw != self.size and (first or self.size == LABELS or (hw < self.size and hw in TRAINED_FOR)):
                yield Way(hw)
            if hw < self.size and hw in TRAINED_FOR:
                yield Way(hw, batchnorm=True)
        if first and self.size == LABELS and not self.about.get("model"):
            for scale in STEM_SCALES:
                yield Way(self.size, scale)
                yield Way(self.size, scale, batchnorm=True)


class Pictures:
    """Images and masks of the data, decoded once."""

    def __init__(self, found: MaskFolder) -> None:
        train = found.pairs["train"]
        chosen = [train[i] for i in np.linspace(0, len(train) - 1, TRAINING_IMAGES).round().astype(int)]
        self.train = [decode(pair.image) for pair in chosen]
        self.val = [decode(pair.image) for pair in found.pairs["val"]]
        self.classes = found.classes
        masks = [found.read_mask(pair.mask) for pair in found.pairs["val"]]
        wrong = {mask.shape for mask in masks} - {LABELS}
        if wrong:
            raise DownresError(f"This recipe judges at {LABELS} and a mask has {wrong.pop()}: give the CamVid of SegNet.")
        self.truths = Truths(masks, len(found.classes))

    def batches(self, images: Sequence[np.ndarray], p: Preprocessing, size: int = 8) -> Iterator[Tensor]:
        for start in range(0, len(images), size):
            yield torch.stack([preprocess(image, p) for image in images[start : start + size]])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=Path, required=True, help="folder of the folders that regseg.py wrote")
    options.add_argument("--data", default="../shared/data/camvid", help="CamVid as for regseg.py")
    options.add_argument("--threads", type=int, default=1, help="for the evaluation and for the latency")
    options.add_argument("--evaluate-only", action="store_true", help="keep what is evaluated and write no results yet")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    runs = find_runs(given.runs)
    if not runs:
        raise DownresError(f"{given.runs} holds no finished run: train one with recipes/regseg.py first (see --help).")
    found = find_masks(given.data)
    pictures: list[Pictures] = []  # decoded when something needs them
    measured = {}
    for run in runs:
        measured.update(tallies_of(run, found, pictures))
    if given.evaluate_only:
        return
    groups = by_group(runs, measured)
    document = {
        "date": date.today().isoformat(),
        "command": "python recipes/camvid.py",
        "hours_of_training": round(sum(run.about["hours"] for run in runs), 2),
        "hardware": hardware(),
        "versions": versions(),
        "data": {"train": len(found.pairs["train"]), "val": len(found.pairs["val"]), "label_size": LABELS},
        "classes": found.classes,
        "share_of_pixels": shares(measured),
        "recipe": {key: runs[0].about[key] for key in ("batch_size", "weight_decay", "class_uniform", "ema", "bf16")},
        "networks": [
            {"network": run.network, "size": format_resolution(run.size), "seed": run.seed, "epochs": run.about["epochs"],
             "lr": run.about["lr"], "hours": round(run.about["hours"], 3), "threads": run.about["threads"]}
            for run in runs
        ],
        "rows": rows(groups, costs_of(runs), found.classes),
        "latency": latencies(runs, given.runs / "latency.json", given.threads),
        "between_seeds": dict(zip(("sd", "freedom"), between_seeds(groups), strict=True)),
        "comparisons": comparisons(groups),
        "classes_lost": classes_lost(groups, found.classes),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "camvid.json"
    file.write_text(compact(document) + "\n")
    print(f"{file} written from {len(runs)} networks. Draw it: python recipes/camvid_pictures.py")


def find_runs(folder: Path) -> list[Trained]:
    """The finished runs of a folder, by network, from the largest size on, by seed."""
    abouts = {file.parent: json.loads(file.read_text()) for file in folder.glob("*/training.json")}
    runs = [Trained(run, about) for run, about in abouts.items() if (run / "model.safetensors").exists()]
    # A RegSeg before other networks, the wide before the narrow.
    return sorted(runs, key=lambda r: (bool(r.about.get("model")), -r.about["width"], -r.size[0], r.seed))


def tallies_of(run: Trained, found: MaskFolder, pictures: list[Pictures]) -> dict[tuple[Path, Way, str], Tallies]:
    """Of every way that a run is judged in, by run, way and interpolation; read where it was evaluated before."""
    results, network = {}, None
    kept = run.folder / "tallies"
    kept.mkdir(exist_ok=True)
    weights = hashlib.sha256((run.folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    for way in run.ways():
        files = {how: kept / f"{weights} {way} {how}.npz" for how in interpolations(way)}
        if not all(file.exists() for file in files.values()):
            network = network or load_run(run.folder)
            pictures[:] = pictures or [Pictures(found)]
            for how, tallies in evaluated(network, way, pictures[0]).items():
                partial = files[how].with_suffix(".partial.npz")
                np.savez_compressed(partial, **tallies.to_arrays())
                os.replace(partial, files[how])
            print(f"{run.folder.name}, run at {way}", file=sys.stderr, flush=True)
        for how, file in files.items():
            results[run.folder, way, how] = Tallies.from_arrays(dict(np.load(file)))
    return results


def interpolations(way: Way) -> tuple[str, ...]:
    """Bilinear everywhere, bicubic beside it where networks are plainly run at a lower size, as in the paper's fig. 4."""
    return INTERPOLATIONS if way == Way(way.hw) and way.hw < LABELS else INTERPOLATIONS[:1]


def as_run(network: nn.Module, way: Way) -> nn.Module:
    """The network as it is run: its activations resampled after the stem where the way says so."""
    if way.stem_scale == 1.0:
        return network
    return downres.reduce(network, stem_scale=way.stem_scale, input_size=(3, *way.hw))


def evaluated(network: nn.Module, way: Way, pictures: Pictures) -> dict[str, Tallies]:
    """Tallies on the validation images at the labels' size, by interpolation of the logits, from one pass."""
    config = network.pretrained_cfg
    p = Preprocessing(way.hw, 1.0, "bilinear", config["mean"], config["std"], fit="stretch")
    small = as_run(network, way).to(memory_format=torch.channels_last)
    if way.batchnorm:
        small = recalibrate_batchnorm(small, pictures.batches(pictures.train, p, 16))
    classes = len(pictures.classes)
    maps: dict[str, list[np.ndarray]] = {how: [] for how in interpolations(way)}
    with torch.inference_mode():
        for batch in pictures.batches(pictures.val, p):
            logits = small(batch.contiguous(memory_format=torch.channels_last))
            for how in maps:
                maps[how] += list(upsample(logits, LABELS, how).argmax(1).to(torch.uint8).numpy())
    return {how: tally(found, pictures.truths, classes) for how, found in maps.items()}


@dataclass(frozen=True)
class Group:
    """One network, trained at one size, run in one way: what its seeds have in common."""

    network: str
    trained: tuple[int, int]
    way: Way
    interpolation: str = INTERPOLATIONS[0]


Groups = dict[Group, dict[int, Tallies]]
"""Tallies by seed."""


def by_group(runs: list[Trained], measured: dict[tuple[Path, Way, str], Tallies]) -> Groups:
    groups: Groups = {}
    for run in runs:
        for way in run.ways():
            for how in interpolations(way):
                group = groups.setdefault(Group(run.network, run.size, way, how), {})
                group[run.seed] = measured[run.folder, way, how]
    return groups


def costs_of(runs: list[Trained]) -> dict[tuple[str, tuple[int, int], float, str], dict]:
    """By network, input size, stem scale and interpolation; the upsampling to the labels' size is part of it."""
    costs: dict[tuple[str, tuple[int, int], float, str], dict] = {}
    for run in runs:
        network = None
        for way in run.ways():
            for how in interpolations(way):
                key = (run.network, way.hw, way.stem_scale, how)
                if key in costs:
                    continue
                network = network or load_run(run.folder)
                of = {
                    mode: downres.measure_cost(segmenter(network, way, mode, how), (3, *way.hw)) for mode in (LOGITS, CLASSES)
                }
                costs[key] = {
                    "macs": of[LOGITS].macs, "params": of[LOGITS].params,
                    "peak_bytes_logits": of[LOGITS].peak_activation_bytes,
                    "peak_bytes_classes": of[CLASSES].peak_activation_bytes,
                }  # fmt: skip
    return costs


def segmenter(network: nn.Module, way: Way, mode: str, how: str = INTERPOLATIONS[0]) -> nn.Module:
    """What is counted and timed: the network with its answer brought to the labels' size."""
    return Segmenter(as_run(network, way), Dense(LABELS, mode, how)).eval()


def latencies(runs: list[Trained], kept: Path, threads: int) -> dict:
    """One image through onnxruntime, the upsampling included, all in turns; measured once, since weights do not matter."""
    if kept.exists():
        return json.loads(kept.read_text())
    runtimes, inputs, about = {}, {}, {}
    for name, network, way, mode in timed(runs):
        size = (3, *way.hw)
        runtimes[name] = load_runtime(segmenter(network, way, mode), size, threads=threads)
        inputs[name] = random_batch((1, *size))
        about[name] = {"run": format_resolution(way.hw), "stem_scale": way.stem_scale, "output": mode}
        print(f"exported {name}", file=sys.stderr, flush=True)
    before = os.getloadavg()
    times = interleaved(runtimes, inputs, runs=40)
    first = next(iter(times.values()))
    document = {
        "what": f"{first.runtime}, {threads} thread{'s' * (threads > 1)}, batch 1, median of {first.runs}",
        "hardware": first.hardware,
        "load_before_and_after": [round(before[0], 2), round(os.getloadavg()[0], 2)],
        "rows": [
            {"network": name.split(" at ")[0], **about[name], "ms": round(one.latency_ms, 2),
             "p10_ms": round(one.p10_ms, 2), "p90_ms": round(one.p90_ms, 2)}
            for name, one in times.items()
        ],
    }  # fmt: skip
    kept.write_text(compact(document))
    return document


def timed(runs: list[Trained]) -> Iterator[tuple[str, nn.Module, Way, str]]:
    """One network of each kind at every size, as logits and, at the sizes trained for, as class map; and the stem scales."""
    for kind in dict.fromkeys(run.network for run in runs):
        of_kind = [run for run in runs if run.network == kind]
        network, sizes = load_run(of_kind[0].folder), {run.size for run in of_kind}
        for hw in SIZES:
            for mode in (LOGITS, CLASSES) if hw in sizes else (LOGITS,):
                yield f"{kind} at {Way(hw)} {mode}", network, Way(hw), mode
        for scale in sorted({way.stem_scale for run in of_kind for way in run.ways()} - {1.0}, reverse=True):
            yield f"{kind} at {Way(LABELS, scale)} {LOGITS}", network, Way(LABELS, scale), LOGITS


def rows(groups: Groups, costs: dict, classes: Sequence[str]) -> list[dict]:
    found = []
    for group, seeds in groups.items():
        qualities = {seed: segmentation_quality(tallies) for seed, tallies in seeds.items()}
        scores = [q.miou for q in qualities.values()]
        found.append({
            "network": group.network, "trained": format_resolution(group.trained), "run": format_resolution(group.way.hw),
            "stem_scale": group.way.stem_scale, "batchnorm": group.way.batchnorm, "interpolation": group.interpolation,
            **costs[group.network, group.way.hw, group.way.stem_scale, group.interpolation],
            "miou": round(float(np.mean(scores)), 2),
            "miou_sd": round(float(np.std(scores, ddof=1)), 2) if len(scores) > 1 else None,
            "iou": {name: _mean([q.iou[k] for q in qualities.values()]) for k, name in enumerate(classes)},
            "pixel_accuracy": _mean([q.pixel_accuracy for q in qualities.values()]),
            "boundary_miou": _mean([q.boundary_miou for q in qualities.values()]),
            "object_iou": {size: _mean([q.object_iou[size] for q in qualities.values()]) for size in SIZES_OF_OBJECTS},
            "seeds": [
                {"seed": seed, "miou": round(q.miou, 3), "interval": [round(q.miou_low, 2), round(q.miou_high, 2)],
                 "pixel_accuracy": round(q.pixel_accuracy, 3), "boundary_miou": round(q.boundary_miou or 0.0, 3),
                 "iou": [None if v is None else round(v, 2) for v in q.iou],
                 "object_iou": [None if v is None else round(v, 2) for v in q.object_iou.values()]}
                for seed, q in qualities.items()
            ],
        })  # fmt: skip
    return found


def shares(measured: dict[tuple[Path, Way, str], Tallies]) -> list[float]:
    """Percent of the validation pixels that each class has."""
    truth = next(iter(measured.values())).truth.sum(0)
    return (100 * truth / truth.sum()).round(2).tolist()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(float(np.mean(known)), 2) if known else None


def compact(document: dict) -> str:
    """JSON with one line for every entry of the lists in it."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n".join("  " + json.dumps(one, ensure_ascii=False) for one in value)
            parts.append(f' "{key}": [\n{lines}\n ]')
        elif isinstance(value, dict) and "rows" in value:
            parts.append(f' "{key}": {compact(value)}')
        else:
            parts.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(parts) + "\n}"


# --- what is compared ---


def miou(hits: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Percent, the mean over the last axis of the classes that have a union."""
    iou = np.divide(hits, union, out=np.full(np.shape(hits), np.nan), where=union > 0)
    return 100 * np.nanmean(iou, axis=-1)


def drawn(n: int, block: int = BLOCK, seed: int = 0) -> np.ndarray:
    """How often each of n frames is in each resample, float64 (RESAMPLES, n): circular blocks of neighbouring frames."""
    first = np.random.default_rng(seed).integers(n, size=(RESAMPLES, -(-n // block), 1))
    frames = ((first + np.arange(block)) % n).reshape(RESAMPLES, -1)[:, :n]
    counted = np.bincount((frames + n * np.arange(RESAMPLES)[:, None]).ravel(), minlength=RESAMPLES * n)
    return counted.reshape(RESAMPLES, n).astype(float)


def resampled(seeds: dict[int, Tallies], times: np.ndarray) -> np.ndarray:
    """mIoU of each resample, the mean over the seeds: (RESAMPLES,)."""
    union = {seed: (t.predicted + t.truth - t.hits).astype(float) for seed, t in seeds.items()}
    return np.mean([miou(times @ t.hits.astype(float), times @ union[seed]) for seed, t in seeds.items()], axis=0)


def scores(seeds: dict[int, Tallies]) -> list[float]:
    return [float(miou(t.hits.sum(0), (t.predicted + t.truth - t.hits).sum(0))) for t in seeds.values()]


Seeds = dict[int, Tallies]


def between_seeds(groups: Groups) -> tuple[float, int]:
    """Standard deviation of mIoU from training to training, and its degrees of freedom.

    Pooled over the networks at their own sizes: two or three seeds of one alone would hardly tell.
    """
    found = [scores(seeds) for g, seeds in groups.items() if g == own(g.network, g.trained) and len(seeds) > 1]
    freedom = sum(len(one) - 1 for one in found)
    return round(float(np.sqrt(sum(np.var(one) * len(one) for one in found) / max(1, freedom))), 4), freedom


def compared(
    claim: str, what: str, plus: Sequence[Seeds], minus: Sequence[Seeds], times: np.ndarray, between: tuple[float, int],
    share: float = 1.0,
) -> dict:  # fmt: skip
    """The mIoU of `plus` less that of `minus`, summed and times `share`, in points, with 95 % intervals over seeds and frames.

    Over seeds: Student's t, for the same weights run in two ways on the differences seed by seed, for different weights with
    the standard deviation `between_seeds`. Over frames: percentiles of the block bootstrap of the mean over seeds.
    holds: 'yes' where both intervals are above zero.
    """
    common = sorted(set.intersection(*(set(seeds) for seeds in (*plus, *minus))))
    plus, minus = ([{s: seeds[s] for s in common} for seeds in side] for side in (plus, minus))
    a, b = (share * np.sum([scores(seeds) for seeds in side], axis=0) for side in (plus, minus))
    difference = a - b
    spread = np.sum([resampled(seeds, times) for seeds in plus], axis=0) - np.sum([resampled(s, times) for s in minus], axis=0)
    intervals, n = [share * np.percentile(spread, (2.5, 97.5))], len(common)
    if n > 1:
        if claim.endswith("same weights"):
            error, freedom = difference.std(ddof=1) / np.sqrt(n), n - 1
        else:
            error, freedom = share * between[0] * np.sqrt((len(plus) + len(minus)) / n), between[1]
        intervals.append(difference.mean() + stdtrit(freedom, np.array([0.025, 0.975])) * error)
    holds = "not told apart" if n > 1 else "one seed only"
    if n > 1 and all(low > 0 for low, _ in intervals):
        holds = "yes"
    elif n > 1 and all(high < 0 for _, high in intervals):
        holds = "no, the reverse"
    return {
        "claim": claim, "what": what, "seeds": common, "miou": [round(float(x.mean()), 2) for x in (a, b)],
        "difference": round(float(difference.mean()), 2), "by_seed": difference.round(2).tolist(),
        "over_seeds": intervals[1].round(2).tolist() if n > 1 else None,
        "over_frames": intervals[0].round(2).tolist(), "holds": holds,
    }  # fmt: skip


WIDE, NARROW = "exp48_decoder26 ×1", "exp48_decoder26 ×0.5"
EQUAL_MACS = "resolution instead of width, at equal MACs"
EQUAL_TIME = "resolution instead of width, at equal latency"
TRAINED_SMALL = "trained small, instead of trained large and run small"
RECALIBRATED = "trained small, instead of trained large, run small and recalibrated"
RECOVERS = "BatchNorm recalibrated where it runs, same weights"
LOWER_IS_BETTER = "lower than trained for, same weights"
LARGER_IS_BETTER = "larger than trained for, same weights"
SMALLER_TRAINING = "trained at a smaller size, each at its own"
STEM = "lower input, instead of activations resampled after the stem, same weights"
BICUBIC = "logits upsampled bicubic, instead of bilinear, same weights"
NARROWER = "full width, instead of half, at the same size"
TOGETHER = "what narrow and small costs together, less than what each costs alone"


def comparisons(groups: Groups) -> list[dict]:
    """Everything that the text says, those of which the networks are there."""
    n = len(next(iter(next(iter(groups.values())).values())))
    times, between, found = drawn(n), between_seeds(groups), []

    def add(claim: str, better: Group, other: Group) -> None:
        if better in groups and other in groups:
            found.append(
                compared(claim, f"{said(better)}, minus {said(other)}", [groups[better]], [groups[other]], times, between)
            )

    def add_both(claim: str, what: str, pairs: Sequence[tuple[Group, Group]]) -> None:
        """The mean of several pairs, of which no two share weights."""
        if all(group in groups for pair in pairs for group in pair):
            sides = ([groups[group] for group in side] for side in zip(*pairs, strict=True))
            found.append(compared(claim, what, *sides, times, between, 1 / len(pairs)))

    full, two_thirds, half = TRAINED_FOR
    widths = (WIDE, NARROW)
    for size in TRAINED_FOR[1:]:
        mean = f"mean of both widths, {format_resolution(size)}"
        for claim, batchnorm in ((TRAINED_SMALL, False), (RECALIBRATED, True)):
            add_both(claim, mean, [(own(w, size), Group(w, full, Way(size, batchnorm=batchnorm))) for w in widths])
        add_both(SMALLER_TRAINING, f"{mean}, minus 360x480", [(own(w, size), own(w, full)) for w in widths])
    add_both(NARROWER, "mean of three sizes", [(own(WIDE, size), own(NARROW, size)) for size in TRAINED_FOR])
    for small, claim in ((half, EQUAL_MACS), (two_thirds, EQUAL_TIME)):
        add(claim, own(WIDE, small), own(NARROW, full))
        add(claim, Group(WIDE, full, Way(small)), own(NARROW, full))
    for network in (WIDE, NARROW):
        for size in (two_thirds, half):
            small = own(network, size)
            add(TRAINED_SMALL, small, Group(network, full, Way(size)))
            add(RECALIBRATED, small, Group(network, full, Way(size, batchnorm=True)))
            add(SMALLER_TRAINING, small, own(network, full))
        add(SMALLER_TRAINING, own(network, half), own(network, two_thirds))
    for size in (full, two_thirds, half):
        add(NARROWER, own(WIDE, size), own(NARROW, size))
    for size in (two_thirds, half):
        each, both = (own(NARROW, full), own(WIDE, size)), (own(WIDE, full), own(NARROW, size))
        if all(group in groups for group in (*each, *both)):
            what = f"half width and {format_resolution(size)}"
            found.append(compared(TOGETHER, what, [groups[g] for g in both], [groups[g] for g in each], times, between))
    kinds = dict.fromkeys((g.network, g.trained) for g in groups)
    for network, trained in kinds:
        for hw in SIZES:
            at = Group(network, trained, Way(hw))
            if hw != trained and (abs(SIZES.index(hw) - SIZES.index(trained)) == 1 or hw in TRAINED_FOR):
                add(LARGER_IS_BETTER if hw > trained else LOWER_IS_BETTER, at, own(network, trained))
            add(RECOVERS, replace(at, way=Way(hw, batchnorm=True)), at)
        for hw in SIZES:
            if hw < trained:
                at = Group(network, trained, Way(hw))
                add(BICUBIC, replace(at, interpolation="bicubic"), at)
        # Of equal MACs nearly: the stem runs at full size besides.
        for scale, hw in zip(STEM_SCALES, TRAINED_FOR[1:], strict=True):
            stem = Group(network, trained, Way(LABELS, scale))
            add(STEM, Group(network, trained, Way(hw)), stem)
            add(STEM, Group(network, trained, Way(hw, batchnorm=True)), replace(stem, way=replace(stem.way, batchnorm=True)))
            add(RECOVERS, replace(stem, way=replace(stem.way, batchnorm=True)), stem)
    claims = list(dict.fromkeys(one["claim"] for one in found))
    return sorted(found, key=lambda one: claims.index(one["claim"]))


def own(network: str, size: tuple[int, int]) -> Group:
    """Run at the size that it was trained for."""
    return Group(network, size, Way(size))


def said(group: Group) -> str:
    how = "" if group.interpolation == INTERPOLATIONS[0] else f" {group.interpolation}"
    at = "" if group.way == Way(group.trained) else f" run at {group.way}{how}"
    return f"{group.network} trained at {format_resolution(group.trained)}{at}"


def classes_lost(groups: Groups, classes: Sequence[str]) -> list[dict]:
    """What is left of every class's IoU at full size, in percent of it, where it is trained small and where only run small.

    None for classes below LEARNT at full size: they have nothing to lose, and the means leave them out.
    """
    found = []
    for network in (WIDE, NARROW):
        whole = groups.get(own(network, LABELS))
        for size in TRAINED_FOR[1:]:
            for how, group in (("trained small", own(network, size)), ("run small", Group(network, LABELS, Way(size)))):
                if whole is not None and group in groups:
                    before, after = _iou_by_class(whole), _iou_by_class(groups[group])
                    left = {c: float(100 * after[k] / before[k]) for k, c in enumerate(classes) if 100 * before[k] >= LEARNT}
                    objects = 100 * _iou_by_size(groups[group]) / _iou_by_size(whole)
                    found.append({
                        "network": network, "run": format_resolution(size), "how": how,
                        "left": {name: _mean([left.get(name)]) for name in classes},
                        "left_small": _mean([left.get(name) for name in SMALL]),
                        "left_others": _mean([v for name, v in left.items() if name not in SMALL]),
                        "left_objects": dict(zip(SIZES_OF_OBJECTS, objects.round(1).tolist(), strict=True)),
                    })  # fmt: skip
    return found


def _iou_by_class(seeds: Seeds) -> np.ndarray:
    return np.mean([t.hits.sum(0) / (t.predicted + t.truth - t.hits).sum(0) for t in seeds.values()], axis=0)


def _iou_by_size(seeds: Seeds) -> np.ndarray:
    qualities = [segmentation_quality(tallies) for tallies in seeds.values()]
    return np.mean([[q.object_iou[size] for size in SIZES_OF_OBJECTS] for q in qualities], axis=0)


if __name__ == "__main__":
    try:
        main()
    except DownresError as error:
        sys.exit(str(error))
