"""The main job: plan → cost gate → latency gate → recover and measure → select → ship. Resumable at any point."""

import contextlib
import copy
import dataclasses
import datetime
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..artifact import export
from ..data import Dataset
from ..environment import versions
from ..errors import DownresError
from ..families import Model
from ..measure.cost import measure_cost
from ..measure.latency import interleaved
from ..measure.quality import count_correct, quality
from ..parse import Resolution
from ..probe import total_stride
from ..records import OUTSIDE, Budget, Candidate, Cost, Latency, Preprocessing, Quality, Recovery, Result
from ..recover.features import FeatureBank, State, logits
from ..recover.ladder import RUNGS, Recovered, Reference, climb, make_reference
from .photos import keep_photos
from .plan import STEM_SCALES, plan
from .select import MINIMIZE, over_budget, select, verdicts
from .store import Store
from .task import Progress, Task, prepare


@dataclass(frozen=True)
class Run:
    """What is known of a run, finished or not. results: in the order planned; best: the cheapest proven one or None."""

    folder: Path
    settings: dict[str, Any]
    budget: Budget
    original: Result
    results: tuple[Result, ...]
    best: Result | None
    notes: tuple[str, ...]
    finished: bool

    @property
    def artifact(self) -> Path | None:
        """Folder of the shipped model, or None."""
        return self.folder / "best" if (self.folder / "best" / "manifest.json").exists() else None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.folder),
            "finished": self.finished,
            "settings": self.settings,
            "budget": self.budget.to_json(),
            "original": self.original.row(),
            "candidates": [r.row() for r in self.results],
            "best": self.best and self.best.row(),
            "artifact": self.artifact and str(self.artifact),
            "notes": list(self.notes),
        }


def search(
    model: Model | nn.Module | str,
    data: Dataset | str | Path,
    *,
    max_drop: float = 1.0,
    max_macs: int | None = None,
    max_memory_bytes: int | None = None,
    max_latency_ms: float | None = None,
    resolutions: list[Resolution] | None = None,
    stem_scales: tuple[float, ...] | None = None,
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
    progress: Progress | None = None,
) -> Run:
    """Find the cheapest input resolution whose drop in top-1 is proven to be within `max_drop` points, and ship it.

    Args:
        model: `timm:NAME`, `torchvision:NAME`, `file.py:function`, a loaded Model, or an `nn.Module`.
        data: folder with train/ and val/, one folder of class folders, ImageNet's layout, or a Dataset.
        max_drop: points of top-1, proven with `confidence` for all candidates together.
        max_macs, max_memory_bytes, max_latency_ms: ceilings; what is over one is stopped before data are touched.
        resolutions, stem_scales: what to try; default from the network's own resolution down.
        snap: take resolutions to multiples of the network's stride.
        rungs: of the recovery ladder, from 'crop', 'batchnorm', 'head'; () only lowers the input.
        minimize: what 'cheapest' means: 'macs', 'memory' or 'latency'.
        fit_head: replace the final linear layer by one fitted for the data's classes, at full resolution first.
        folds: cross-fit on one folder, so that every image is a proof image once.
        out: folder of the run; the same call again goes on where it was. Default: a new temporary folder.

    Raises:
        DownresError: bad input, said in one sentence. What was measured stays in the run's folder.
    """
    budget = Budget(max_drop, confidence, max_macs, max_memory_bytes, max_latency_ms)
    _check_choices(rungs, minimize, runtime)
    task = prepare(
        model, data, fit_head=fit_head, folds=folds, val_fraction=val_fraction, preprocessing=preprocessing, seed=seed, progress=progress
    )  # fmt: skip
    hw = task.model.preprocessing.hw
    scales = STEM_SCALES if stem_scales is None else stem_scales
    candidates, notes = plan(task.native.resolution, total_stride(task.model.module, hw), resolutions, scales, snap)  # type: ignore[arg-type]
    if not candidates:
        raise DownresError("There is no candidate to try: give resolutions below the original's with --resolution.")

    settings = {
        **task.describe(),
        "budget": budget.to_json(),
        "candidates": [c.to_json() for c in candidates],
        "rungs": list(rungs),
        "minimize": minimize,
        "runtime": runtime,
        "folds": len(task.data.folds),
        "notes": notes,
        "skipped": [s.to_json() for s in task.data.skipped],
        "licence": task.data.licence,
        "data_source": {
            "path": str(data) if isinstance(data, (str, Path)) else "",
            "folds": folds,
            "val_fraction": val_fraction,
        },
    }
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="downres-"))
    store = Store.open(folder, settings)
    try:
        if store.get("started") is None:
            store.put(
                "started", {"when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "versions": versions()}
            )
            store.put_arrays(
                "split", **{f"{part}{i}": getattr(f, part) for i, f in enumerate(task.data.folds) for part in ("train", "test")}
            )
        _work(task, store, budget, [task.native, *candidates], rungs, minimize, runtime, threads, progress)
        return load_run(folder, store)
    finally:
        store.close()


def load_run(folder: str | Path, store: Store | None = None) -> Run:
    """A run as its folder has it, finished or not. Pure reading: nothing is measured again."""
    store = store or Store.read(folder)
    settings = store.settings
    budget = Budget.from_json(settings["budget"])
    native = Candidate(Preprocessing.from_json(settings["preprocessing"]).resolution)
    original = _result(store, native, Budget(budget.max_drop))
    results = [_result(store, Candidate.from_json(c), budget) for c in settings["candidates"]]
    results = _judge(store, native, results, budget, settings["folds"])
    best = select(results, settings["minimize"])
    notes = [*settings["notes"]]
    unmeasured = sum(r.status == "waiting" for r in results)
    if unmeasured:
        notes.append(f"unfinished: {unmeasured} of {len(results)} candidates are not measured yet; the same command goes on")
    finished = store.get("finished") is not None
    return Run(Path(folder), settings, budget, original, tuple(results), best, tuple(notes), finished)


def _work(
    task: Task, store: Store, budget: Budget, candidates: list[Candidate], rungs: tuple[str, ...], minimize: str,
    runtime: str, threads: int | None, progress: Progress | None,
) -> None:  # fmt: skip
    bank = task.bank(store.folder, runtime=runtime, threads=threads, progress=progress)
    alive = _cost_gate(task, store, budget, candidates, bank, progress)
    alive = _latency_gate(task, store, budget, alive, bank, progress)
    with _references(task, bank, rungs) as references:
        for candidate in alive:
            key = f"quality/{candidate}"
            if store.get(key) is None:
                store.put(key, _measure(task, store, bank, candidate, references(), budget, rungs))
            bank.release()
    run = load_run(store.folder, store)
    if store.get("photos") is None:
        keep_photos(store, task, run.original, [r.candidate for r in run.results if r.status == "measured"])
        store.put("photos", True)
    if run.best is not None and store.get("artifact") is None:
        if progress:
            progress(f"{run.best.candidate}: shipping", 0, 1)
        _ship(task, store, bank, run, rungs)
        store.put("artifact", str(run.best.candidate))
        if progress:
            progress(f"{run.best.candidate}: shipping", 1, 1)
    store.put("finished", True)


def _cost_gate(
    task: Task, store: Store, budget: Budget, candidates: list[Candidate], bank: FeatureBank, progress: Progress | None
) -> list[Candidate]:
    """Candidates within the ceilings by cost; the first (the original) always stays. Touches no data."""
    alive = []
    for i, candidate in enumerate(candidates):
        state = State(candidate, 1.0)
        if store.get(f"cost/{candidate}") is None:
            size = (len(task.model.preprocessing.mean), *bank.preprocessing_of(state).hw)
            try:
                value = {"cost": measure_cost(bank.network(state), size).to_json()}
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
    task: Task, store: Store, budget: Budget, candidates: list[Candidate], bank: FeatureBank, progress: Progress | None
) -> list[Candidate]:
    """Measures all together, interleaved; stops those over the latency ceiling. Touches no data: noise has no shortcuts."""
    if store.get("latency") is None:
        runtimes, inputs = {}, {}
        for i, candidate in enumerate(candidates):
            state = State(candidate, task.model.preprocessing.crop_ratio)
            runtimes[str(candidate)] = bank.runtime(state)
            shape = (1, len(task.model.preprocessing.mean), *bank.preprocessing_of(state).hw)
            inputs[str(candidate)] = np.random.default_rng(0).standard_normal(shape, np.float32)
            if progress:
                progress("making runnable models", i + 1, len(candidates))
        measured = interleaved(runtimes, inputs, progress=progress)
        store.put("latency", {name: latency.to_json() for name, latency in measured.items()})
        bank.release()
    latencies = {name: Latency.from_json(value) for name, value in store.get("latency").items()}
    return [c for i, c in enumerate(candidates) if i == 0 or not over_budget(None, latencies[str(c)], budget)]


@contextlib.contextmanager
def _references(task: Task, bank: FeatureBank, rungs: tuple[str, ...]) -> Iterator[Any]:
    """A function that gives the original in every fold, made at its first call: a finished run needs none."""
    made: list[list[Reference]] = []

    def references() -> list[Reference]:
        if not made:
            folds = task.data.folds
            made.append([_reference(task, bank, i, fold, rungs) for i, fold in enumerate(folds)])
            bank.release()
        return made[0]

    yield references


def _reference(task: Task, bank: FeatureBank, index: int, fold: Any, rungs: tuple[str, ...]) -> Reference:
    if not rungs and not task.fit_new:
        # Nothing to climb: the training images need not even be looked at.
        fold = type(fold)(np.zeros(0, np.int64), fold.test)
    return make_reference(
        bank, task.native_state, index, fold, len(task.data.folds), task.data.labels, task.own_head, task.outputs, task.fit_new, task.seed
    )  # fmt: skip


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
    labels, native = task.data.labels, State(candidate, task.model.preprocessing.crop_ratio)
    naive, recovered, climbed = [], [], []
    for reference in references:
        naive.append(logits(bank.features(native, reference.fold.test), reference.head))
        if candidate == task.native:
            one = Recovered(native, reference.head, Recovery("none", native.crop_ratio, 0.0))
        else:
            one = climb(bank, candidate, reference, labels, task.outputs, budget, rungs)
        climbed.append(one)
        recovered.append(logits(bank.features(one.state, reference.fold.test), one.head))
    truth = labels[task.proof]
    out = np.concatenate(recovered)
    correct, correct5 = count_correct(out, truth), count_correct(out, truth, 5) if task.outputs > 5 else None
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
    before5 = count_correct(before, truth, 5) if task.outputs > 5 else None
    return {
        "quality": quality(correct, correct5).to_json(),
        "naive": quality(count_correct(before, truth), before5).to_json(),
        "recovery": _merge([o.recovery for o in climbed]).to_json(),
        "states": [o.state.to_json() for o in climbed],
    }


def _merge(found: list[Recovery]) -> Recovery:
    """The recoveries of the folds as one: the dearest rung that any fold needed, the time of all, the first fold's crop."""
    order = ("none", *RUNGS)
    rung = max((f.rung for f in found), key=order.index)
    return Recovery(
        rung, found[0].crop_ratio, sum(f.seconds for f in found), tuple(r for f in found for r in f.tried), found[0].tuning
    )


def _judge(store: Store, native: Candidate, results: list[Result], budget: Budget, folds: int) -> list[Result]:
    """The drops of what is measured, all at once."""
    done = [r for r in results if r.status == "measured"]
    if store.get(f"quality/{native}") is None or not done:
        return results
    correct = {str(c): _arrays(store, c, store.settings)["correct"] for c in (native, *(r.candidate for r in done))}
    original = correct.pop(str(native))
    ruled_out = {
        str(
            r.candidate
        ): f"ruled out on {r.recovery.tuning.n} tuning images (drop at least {r.recovery.tuning.lower:.1f} points)"
        for r in done
        # With cross folds the tuning images are proof images of another fold: nothing may be ruled out by them.
        if folds == 1 and r.recovery and r.recovery.tuning and r.recovery.tuning.verdict == OUTSIDE
    }
    drops = verdicts(original, {k: v for k, v in correct.items() if k not in ruled_out}, budget)
    for name in ruled_out:
        drops |= verdicts(original, {name: correct[name]}, budget)
    return [
        dataclasses.replace(r, drop=drops[str(r.candidate)], reason=ruled_out.get(str(r.candidate), ""))
        if r.status == "measured"
        else r
        for r in results
    ]


def _result(store: Store, candidate: Candidate, budget: Budget) -> Result:
    """One candidate from its stored measurements; the drop comes later, when all are known."""
    counted = store.get(f"cost/{candidate}") or {}
    cost = Cost.from_json(counted["cost"]) if "cost" in counted else None
    latencies = store.get("latency") or {}
    latency = Latency.from_json(latencies[str(candidate)]) if str(candidate) in latencies else None
    reason = counted.get("failed", "") or over_budget(cost, latency, budget)
    if reason:
        return Result(candidate, "stopped", reason, cost, latency)
    measured = store.get(f"quality/{candidate}")
    if measured is None:
        return Result(candidate, "waiting", "not measured yet", cost, latency)
    return Result(
        candidate, "measured", "", cost, latency,
        Quality.from_json(measured["naive"]), Quality.from_json(measured["quality"]), None, Recovery.from_json(measured["recovery"]),
    )  # fmt: skip


def _arrays(store: Store, candidate: Candidate, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    crop = Preprocessing.from_json(settings["preprocessing"]).crop_ratio
    return store.arrays(f"predictions/{State(candidate, crop).key()}")


def _confidence(out: np.ndarray) -> np.ndarray:
    """Softmax probability of the prediction, in percent, float32 (n,)."""
    shifted = np.exp(out - out.max(1, keepdims=True))
    return (100 * shifted.max(1) / shifted.sum(1)).astype(np.float32)


def _ship(task: Task, store: Store, bank: FeatureBank, run: Run, rungs: tuple[str, ...]) -> None:
    """Export the selected candidate: recovered on all training images, with what its stated quality was measured with."""
    best = run.best
    assert best is not None
    folds = task.data.folds
    crossed = len(folds) > 1
    reference = _reference(task, bank, len(folds) if crossed else 0, task.everything() if crossed else folds[0], rungs)
    final = climb(bank, best.candidate, reference, task.data.labels, task.outputs, run.budget, rungs)
    states = [State.from_json(s) for s in store.get(f"quality/{best.candidate}")["states"]]
    heads = store.arrays(f"heads/{State(best.candidate, task.model.preprocessing.crop_ratio).key()}")
    export(
        store.folder / "best",
        _final_network(task, bank, final),
        preprocessing=bank.preprocessing_of(final.state),
        result=best,
        original=run.original,
        classes=task.data.classes,
        source={
            "model": {
                "spec": task.model.spec,
                "weights": task.model.weights,
                "num_classes": task.outputs,
                "preprocessing": task.model.preprocessing.to_json(),
            },
            "data": {
                **store.settings["data_source"],
                "description": task.data.description,
                "licence": task.data.licence,
                "sha256": task.data.fingerprint(),
                "fit_head": task.fit_new,
                "seed": task.seed,
            },
        },
        folds=[{"crop_ratio": s.crop_ratio, "recalibrated": s.calibration is not None} for s in states] if crossed else (),
        fold_tensors=_fold_tensors(task, bank, states, heads) if crossed else None,
        versions=versions(),
    )


def _final_network(task: Task, bank: FeatureBank, final: Recovered) -> nn.Module:
    """The torch network of a recovered candidate, head included."""
    network = copy.deepcopy(bank.network(final.state))
    if final.head is not None and task.head is not None:
        linear = nn.Linear(task.width, task.outputs)
        linear.weight.data, linear.bias.data = (
            torch.from_numpy(final.head.weight.copy()),
            torch.from_numpy(final.head.bias.copy()),
        )
        network.set_submodule(task.head, linear)
    return network


def _fold_tensors(task: Task, bank: FeatureBank, states: list[State], heads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For every fold the tensors, by their names in the state dict, in which it differs from the shipped network."""
    tensors = {}
    for i, state in enumerate(states):
        if task.head is not None:
            tensors |= {f"{i}/{task.head}.{part}": heads[f"{part}{i}"] for part in ("weight", "bias")}
        if state.calibration is not None:
            buffers = bank.network(state).named_buffers()
            tensors |= {f"{i}/{name}": b.numpy() for name, b in buffers if name.endswith(("running_mean", "running_var"))}
    return tensors


def _check_choices(rungs: tuple[str, ...], minimize: str, runtime: str) -> None:
    for value, known, what in (
        (rungs, RUNGS, "rungs"),
        ((minimize,), MINIMIZE, "minimize"),
        ((runtime,), ("onnxruntime", "torch"), "runtime"),
    ):
        for one in value:
            if one not in known:
                raise DownresError(f"Unknown {what} {one!r}: choose from {', '.join(known)}.")
    if runtime == "torch":
        warnings.warn("runtime 'torch' measures in torch; the shipped model.onnx is checked against it.", stacklevel=3)
