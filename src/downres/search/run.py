"""The main job: plan → cost gate → latency gate → recover and measure → select → ship. Resumable at any point."""

import datetime
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..axes import Axes, axes_of, default_axes
from ..data import DEMO_DATA, Dataset, MaskDataset, MaskFolder
from ..environment import versions
from ..errors import DownresError
from ..families import Model
from ..measure.cost import measure_cost
from ..measure.latency import RUNTIMES, interleaved, random_batch
from ..measure.quality import count_correct, quality
from ..parse import Resolution
from ..records import Budget, Candidate, Cost, Latency, Merge, Preprocessing, Recovery, Rung
from ..recover.bank import Bank, State
from ..recover.features import FeatureBank, logits
from ..recover.ladder import RUNGS, Recovered, Reference, climb
from ..recover.masks import MaskBank
from ..report import words
from ..runtimes import check_threads
from .masks import MASK_RUNGS, keep_scenes, masks_measure
from .photos import keep_photos
from .plan import plan
from .results import Run, load_run
from .select import MINIMIZE, over_budget
from .ship import reference_of, ship
from .store import FORMAT, Store
from .task import Data, Progress, Subject, Task, check_planned, prepare, prepare_model, with_classes
from .view import write_report


def search(
    model: Model | nn.Module | str,
    data: Data,
    *,
    max_drop: float = 1.0,
    max_macs: int | None = None,
    max_memory_bytes: int | None = None,
    max_latency_ms: float | None = None,
    resolutions: Sequence[Resolution] | None = None,
    stem_scales: Sequence[float] | None = None,
    patch_sizes: Sequence[int] | None = None,
    merges: Sequence[Merge | int | float | str] | None = None,
    candidates: Sequence[Candidate | str] = (),
    ragged: str = "error",
    tries: Axes | None = None,
    snap: bool = True,
    rungs: tuple[str, ...] = RUNGS,
    minimize: str = "macs",
    fit_head: bool = False,
    folds: int | None = None,
    val_fraction: float = 0.5,
    confidence: float = 0.95,
    preprocessing: Preprocessing | None = None,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    classes: str | Path | None = None,
    label_size: Resolution | None = None,
    output: str = "logits",
    upsampling: str = "bilinear",
    command: str = "",
    progress: Progress | None = None,
) -> Run:
    """Find the cheapest way to look at less whose drop is proven to be within `max_drop` points, and ship it.

    Of a classifier the drop is in top-1, of a segmentation network in mIoU at the size of the masks: then costs and latency
    include the upsampling of the logits, and proofs are by bootstrap over images.

    Args:
        model: `timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, `file.py:function`, a loaded Model, or an `nn.Module`.
        data: folder with train/ and val/, one folder of class folders, ImageNet's layout, or a Dataset; for a segmentation
            network images and masks (Cityscapes, CamVid, Pascal VOC, ADE20K, pairs of folders), or a MaskDataset.
        max_drop: points of top-1 or mIoU, proven with `confidence` for all candidates together.
        max_macs, max_memory_bytes, max_latency_ms: ceilings; what is over one is stopped before data are touched.
        resolutions, stem_scales, patch_sizes, merges: what to try, each along its own axis; None takes the network's default
            (from its own resolution down; patches and merging for transformers), () leaves an axis out.
        candidates: more to try as they are, in any combination: `Candidate`s or their text, '168 merge4'.
        ragged: what patches do where they do not divide the input: 'error', 'floor' (cut) or 'pad'.
        tries: all of these in one `Axes` instead.
        snap: take resolutions to multiples of the network's stride.
        rungs: of the recovery ladder, from 'crop', 'batchnorm', 'head'; () only lowers the input.
        minimize: what 'cheapest' means: 'macs', 'memory' or 'latency'.
        fit_head: replace the final linear layer by one fitted for the data's classes, at full resolution first.
        folds: cross-fit on one folder, so that every image is a proof image once.
        out: folder of the run; the same call again goes on where it was. Default: a new temporary folder.
        classes: file with the names and colours of the masks' classes, where the layout does not tell them.
        label_size: of a segmentation network, (height, width) that its logits are brought to; None: that of the masks, where
            they have one, else the network's own resolution.
        output: what a segmentation network hands out at that size, 'logits' or 'classes'; see `Dense`.
        upsampling: of its logits, 'bilinear' or 'bicubic'.
        command: how the run was asked for, to be shown in its report.

    Raises:
        DownresError: bad input, said in one sentence. What was measured stays in the run's folder.
    """
    budget = Budget(max_drop, confidence, max_macs, max_memory_bytes, max_latency_ms)
    _check_choices(rungs, minimize, runtime)
    check_threads(threads)
    axes = axes_of(tries, Axes(resolutions, stem_scales, patch_sizes, merges, candidates, ragged), Axes())
    data_source: dict[str, Any] = {"path": _place(data), "folds": folds, "val_fraction": val_fraction, "seed": seed}
    data_source["classes_file"] = None if classes is None else str(Path(classes).resolve())
    data = with_classes(data, classes)
    subject = prepare_model(
        model, data, fit_head=fit_head, preprocessing=preprocessing, label_size=label_size, output=output, upsampling=upsampling
    )
    if subject.dense is not None:
        wanted, rungs = rungs, tuple(rung for rung in rungs if rung in MASK_RUNGS)
        no_rung = wanted and not rungs
    design = subject.design()
    planned, notes = plan(design, default_axes(design, axes), snap)
    if subject.dense is not None and no_rung:
        notes.append(f"of the recovery ladder a segmentation network has {', '.join(MASK_RUNGS)} alone: nothing is recovered")
    check_planned(planned, subject)
    if not planned:
        raise DownresError("There is no candidate to try: give resolutions below the original's with --resolution.")

    settings = {
        "format": FORMAT,
        **subject.describe(),
        "budget": budget.to_json(),
        "candidates": [c.to_json() for c in planned],
        "rungs": list(rungs),
        "minimize": minimize,
        "runtime": runtime,
        "notes": notes,
        "command": command,
        "data_source": data_source,
    }
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="downres-"))
    store = Store.open(folder, settings)
    try:
        if store.get("started") is None:
            when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            store.put("started", {"when": when, "versions": versions()})
        bank = subject.bank(folder, runtime=runtime, threads=threads, progress=progress)
        alive = _cost_gate(subject, store, budget, [subject.native, *planned], bank, progress)
        alive = _latency_gate(subject, store, budget, alive, bank, progress)
        if len(alive) > 1:  # the first is the original
            task = prepare(subject, data, folds=folds, val_fraction=val_fraction, seed=seed, progress=progress)
            store.same("data", task.describe(), "sha256")
            _measure_all(task, store, budget, alive, rungs, bank, progress)
        store.put("finished", True)
        bank.forget()
        run = load_run(folder, store)
        write_report(run)
        return run
    finally:
        store.close()


def _measure_all(
    task: Task,
    store: Store,
    budget: Budget,
    candidates: list[Candidate],
    rungs: tuple[str, ...],
    bank: FeatureBank | MaskBank,
    progress: Progress | None,
) -> None:
    """Everything that needs images: quality of each candidate, the photographs of the report, the shipped model."""
    task.fill(bank)
    if store.get("split") is None:
        sides = {f"{part}{i}": getattr(f, part) for i, f in enumerate(task.data.folds) for part in ("train", "test")}
        store.put_arrays("split", **sides)
        store.put("split", True)
    measure: Callable[[Candidate], dict[str, Any]]
    if isinstance(bank, MaskBank):
        measure = masks_measure(task, store, bank, budget, rungs)
    else:
        references = _references(task, bank, rungs)

        def measure(candidate: Candidate) -> dict[str, Any]:
            return _measure(task, store, bank, candidate, references(), budget, rungs)

    for i, candidate in enumerate(candidates):
        key = f"quality/{candidate}"
        if store.get(key) is None:
            bank.stage = f"{i + 1} of {len(candidates)}, "
            store.put(key, measure(candidate))
        bank.release()
    bank.stage = ""
    run = load_run(store.folder, store)
    if store.get("photos") is None:
        shown = [r.candidate for r in run.results if r.status == "measured"]
        if isinstance(bank, MaskBank):
            told = run.best or words.nearest(run.results)  # the one that the page is about
            keep_scenes(store, task, shown, None if told is None else told.candidate, bank)
        else:
            keep_photos(store, task, shown, bank)
        store.put("photos", True)
    if run.best is not None and run.artifact is None:
        if progress:
            progress(f"{run.best.candidate}: shipping", 0, 1)
        ship(task, store, bank, run, rungs)
        if progress:
            progress(f"{run.best.candidate}: shipping", 1, 1)


def _cost_gate(
    subject: Subject, store: Store, budget: Budget, candidates: list[Candidate], bank: Bank, progress: Progress | None
) -> list[Candidate]:
    """Candidates within the ceilings by cost; the first (the original) always stays. Touches no data."""
    alive = []
    for i, candidate in enumerate(candidates):
        state = State(candidate, 1.0)
        if store.get(f"cost/{candidate}") is None:
            size = (subject.channels, *bank.preprocessing_of(state).hw)
            value: dict[str, Any]
            try:
                value = {"cost": measure_cost(bank.counted(state), size).to_json()}
            except DownresError as error:
                if i == 0:
                    raise
                value = {"failed": str(error)}
            store.put(f"cost/{candidate}", value)
        found = store.get(f"cost/{candidate}")
        cost = Cost.from_json(found["cost"]) if "cost" in found else None
        if i == 0 or (cost is not None and not over_budget(cost, None, budget)):
            alive.append(candidate)
        if progress:
            progress("counting costs", i + 1, len(candidates))
    return alive


def _latency_gate(
    subject: Subject, store: Store, budget: Budget, candidates: list[Candidate], bank: Bank, progress: Progress | None
) -> list[Candidate]:
    """Measures all together, interleaved; stops those over the latency ceiling. Touches no data: noise has no shortcuts."""
    if store.get("latency") is None:
        runtimes, inputs = {}, {}
        for i, candidate in enumerate(candidates):
            state = State(candidate, subject.model.preprocessing.crop_ratio)
            runtimes[str(candidate)] = bank.runtime(state)
            shape = (1, subject.channels, *bank.preprocessing_of(state).hw)
            inputs[str(candidate)] = random_batch(shape)
            if progress:
                progress("making runnable models", i + 1, len(candidates))
        measured = interleaved(runtimes, inputs, progress=progress)
        store.put("latency", {name: latency.to_json() for name, latency in measured.items()})
        bank.release()
    latencies = {name: Latency.from_json(value) for name, value in store.get("latency").items()}
    return [c for i, c in enumerate(candidates) if i == 0 or not over_budget(None, latencies[str(c)], budget)]


def _references(task: Task, bank: FeatureBank, rungs: tuple[str, ...]) -> Callable[[], list[Reference]]:
    """A function that gives the original in every fold, made at its first call: a finished run needs none."""
    made: list[Reference] = []

    def references() -> list[Reference]:
        if not made:
            made.extend(reference_of(task, bank, i, fold, rungs) for i, fold in enumerate(task.data.folds))
            bank.release()
        return made

    return references


def _measure(
    task: Task,
    store: Store,
    bank: FeatureBank,
    candidate: Candidate,
    references: list[Reference],
    budget: Budget,
    rungs: tuple[str, ...],
) -> dict[str, Any]:
    """Quality on the proof images of every fold, naive and recovered; arrays first, then the record that names them."""
    labels, native = task.labels, State(candidate, task.subject.model.preprocessing.crop_ratio)
    naive, recovered, climbed = [], [], []
    for reference in references:
        naive.append(logits(bank.features(native, reference.fold.test), reference.head))
        if candidate == task.subject.native:
            one = Recovered(native, reference.head, Recovery("none", native.crop_ratio, 0.0))
        else:
            one = climb(bank, candidate, reference, labels, task.subject.outputs, budget, rungs)
        climbed.append(one)
        recovered.append(logits(bank.features(one.state, reference.fold.test), one.head))
    truth = labels[task.proof]
    out = np.concatenate(recovered)
    correct, correct5 = count_correct(out, truth), count_correct(out, truth, 5) if task.subject.outputs > 5 else None
    before = np.concatenate(naive)
    store.put_arrays(
        f"predictions/{native.key()}",
        correct=correct,
        predicted=out.argmax(1).astype(np.int32),
        confidence=_confidence(out),
    )
    heads = {
        f"{part}{i}": getattr(o.head, part) for i, o in enumerate(climbed) if o.head is not None for part in ("weight", "bias")
    }
    store.put_arrays(f"heads/{native.key()}", **heads)
    before5 = count_correct(before, truth, 5) if task.subject.outputs > 5 else None
    return {
        "quality": quality(correct, correct5).to_json(),
        "naive": quality(count_correct(before, truth), before5).to_json(),
        "recovery": _merge([o.recovery for o in climbed]).to_json(),
        "states": [o.state.to_json() for o in climbed],
    }


def _merge(found: list[Recovery]) -> Recovery:
    """The recoveries of the folds as one: the dearest rung that any fold needed, the time of all, the commonest crop."""
    if len(found) == 1:
        return found[0]
    order = ("none", *RUNGS)
    tried: dict[tuple[str, str], list[Rung]] = {}
    for rung in (rung for one in found for rung in one.tried):
        # A head's strength differs from fold to fold, a crop ratio or a reason tells rungs apart.
        tried.setdefault((rung.rung, "" if rung.rung == "head" and rung.score is not None else rung.note), []).append(rung)
    merged = sorted((_together(rungs) for rungs in tried.values()), key=lambda rung: order.index(rung.rung))
    dearest = max((one.rung for one in found), key=order.index)
    crop = Counter(one.crop_ratio for one in found).most_common(1)[0][0]
    return Recovery(dearest, crop, sum(one.seconds for one in found), tuple(merged), found[0].tuning)


def _together(rungs: list[Rung]) -> Rung:
    """One rung as tried in several folds: top-1 over the tuning images of all."""
    n = sum(rung.n for rung in rungs)
    score = sum((rung.score or 0.0) * rung.n for rung in rungs) / n if n else None
    note = "; ".join(dict.fromkeys(rung.note for rung in rungs if rung.note))
    where = f"{len(rungs)} folds" if len(rungs) > 1 else "1 fold"
    seconds, images = sum(rung.seconds for rung in rungs), sum(rung.images for rung in rungs)
    return Rung(rungs[0].rung, score, n, seconds, images, f"{note} ({where})" if note else where)


def _confidence(out: np.ndarray) -> np.ndarray:
    """Softmax probability of the prediction, in percent, float32 (n,)."""
    shifted = np.exp(out - out.max(1, keepdims=True))
    return (100 * shifted.max(1) / shifted.sum(1)).astype(np.float32)


def _place(data: Data) -> str:
    """Where the images are, so that `check` finds them from any folder; '' for images given in Python."""
    if isinstance(data, (Dataset, MaskDataset)):
        return ""
    if isinstance(data, MaskFolder):
        return str(data.root.resolve())
    return str(data) if str(data) == DEMO_DATA else str(Path(data).expanduser().resolve())


def _check_choices(rungs: tuple[str, ...], minimize: str, runtime: str) -> None:
    for value, known, what in (
        (rungs, RUNGS, "rungs"),
        ((minimize,), MINIMIZE, "minimize"),
        ((runtime,), RUNTIMES, "runtime"),
    ):
        for one in value:
            if one not in known:
                raise DownresError(f"Unknown {what} {one!r}: choose from {', '.join(known)}.")
    if runtime == "torch":
        warnings.warn("runtime 'torch' measures in torch; the shipped model.onnx is checked against it.", stacklevel=3)
