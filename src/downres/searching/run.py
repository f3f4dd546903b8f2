"""The main job: plan → cost gate → latency gate → recover and measure → select → ship. Resumable at any point."""

import contextlib
import dataclasses
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..artifacts import is_whole, read_manifest
from ..artifacts.embed import embed_with, refuse_channels, refuse_numbers
from ..axes import Axes, default_axes
from ..engines.engine import QuantizationFailed, engine_of
from ..engines.onnxruntime import NotExported
from ..errors import DownresError
from ..families import Model
from ..records import Budget, Candidate, Preprocessing
from ..recovery.bank import Bank
from ..recovery.ladder import RUNGS, TAUGHT, Reference, chosen_rungs, help_out, rungs_for, together
from ..recovery.state import State
from ..recovery.team import Team
from ..recovery.training import Training
from ..recovery.views import Altered
from ..reports import words
from ..tasks import Question, Task
from ..tasks.dealt import dealt, first
from ..techniques import RUNTIME
from .cluster import Cluster
from .design import design_of, fused_notes
from .folds import Found, measured
from .gates import cost_gate, latency_gate, time_again
from .in_rounds import in_rounds, measure_in_rounds, refused
from .joint import JOINT, choose, decide
from .live import told
from .plan import plan
from .prepare import (
    Measuring,
    Progress,
    Source,
    check_planned,
    data_source,
    describe,
    describe_data,
    gather,
    open_data,
    prepare_task,
)
from .results import Run, load_run, predictions_of
from .select import MINIMIZE
from .ship import Unshipped, ship
from .store import FORMAT, ROUNDS, STOPPED, UNNEEDED, UNSHIPPED, Store
from .view import write_report


def search(
    model: Model | nn.Module | str,
    data: Source,
    *,
    max_drop: float | None = None,
    task: str | type[Task] | None = None,
    tries: Axes = Axes(),
    budget: Budget = Budget(),
    question: Question = Question(),
    measuring: Measuring = Measuring(),
    training: Training = Training(),
    rungs: tuple[str, ...] | None = None,
    recover: str | None = None,
    minimize: str | None = None,
    preprocessing: Preprocessing | None = None,
    embed_preprocessing: bool = False,
    out: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
    ray: str | None = None,
    latency_node: str | None = None,
    **flat: Any,
) -> Run:
    """Find the cheapest way to look at less whose drop is proven to be within `max_drop`, and ship it.

    The options come in groups, and every field of a group may be given flat as well: `search(model, "photos/", max_drop=1,
    resolutions=[160, 128], fit_head=True, seed=3)`.

    Args:
        model: `timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, `file.py:function`, a loaded Model, or an `nn.Module`.
        data: a folder in a layout of the task (class folders; images and masks; images beside a file of labels; only images),
            or what the task's own opener or constructor gives (`open_folder`, `open_masks`, …).
        max_drop: that of `budget`: in the unit of the task's score, percentage points of top-1 or mIoU.
        task: 'classification', 'segmentation', 'multilabel', 'regression', 'agreement', or a `Task` of one's own; None: what
            the network's answers are of.
        tries: what to try; see `Axes`. budget: what is allowed; see `Budget`. question: what is asked of the data; see
            `Question`. measuring: how it is measured; see `Measuring`. training: how rungs train; see `Training`.
        recover: how far up the ladder of recovery may be climbed, which it is only as far as the allowed drop needs: 'none'
            only lowers the input; 'calibrate': crop ratio, BatchNorm statistics, ranges of 8-bit files; 'refit' (the default):
            a head fitted anew, layers left in float; 'distill': all weights trained to answer as the original does, no labels;
            'finetune': on labels, by FixRes and fully; 'train': also quantization-aware. Training takes minutes to hours.
        rungs: the rungs themselves instead, from 'crop', 'batchnorm', 'head', 'distill', 'fixres', 'finetune', and where
            something is quantized 'ranges', 'layers', 'qat'; as far as the task has them.
        minimize: what 'cheapest' means: 'macs', 'memory', 'latency' or 'size'; None: latency where precisions or runtimes are
            tried, of which MACs know nothing, else MACs.
        embed_preprocessing: ship beside the model one that takes pictures of any size, see `downres.embed`; a run that is
            finished gets it too.
        out: folder of the run; the same call again goes on where it was. Default: a new temporary folder.
        command: how the run was asked for, to be shown in its report.
        ray: measure candidates on a Ray cluster: 'auto', the one that this machine is part of; its address, HOST:PORT; 'local',
            one of this machine alone, for the length of the search. A connection that there is already is used. Time is
            measured here.
        latency_node: of that cluster the node that time is measured on instead: its name, address or id, or a resource that one
            of a kind of nodes has.

    Raises:
        DownresError: bad input, said in one sentence. What was measured stays in the run's folder.
    """
    given = {"budget": budget, "tries": tries, "question": question, "measuring": measuring, "training": training}
    groups = gather(given, flat)
    budget, tries, question, measuring, training = (groups[name] for name in given)
    if max_drop is not None:
        budget = dataclasses.replace(budget, max_drop=max_drop)
    rungs = chosen_rungs(rungs, recover)
    _check_choices(rungs, minimize)
    _check_cluster(ray, latency_node, tries, training, out)
    for name in measuring.runtimes:
        engine_of(name)  # one that is not here is said before anything is loaded
    if measuring.runtimes[0] == "torch":
        warnings.warn("runtime 'torch' measures in torch; the shipped model.onnx is checked against it.", stacklevel=2)
    subject = prepare_task(model, data, question, task, preprocessing)
    subject.check_budget(budget)
    subject.refuse_flips(budget)
    if embed_preprocessing:
        refuse_channels(subject.model.preprocessing)
    design = design_of(subject.model)
    if len(measuring.runtimes) > 1 and tries.given(RUNTIME) is None:
        tries = tries.replaced({RUNTIME.keyword: (None, *measuring.runtimes[1:])})
    planned, notes = plan(design, default_axes(design, tries))
    first = measuring.runtimes[0]  # whose candidates need not name it
    planned = [c.having(runtime=None) if c.runtime == first else c for c in planned]
    planned = [c for c in dict.fromkeys(planned) if c != subject.native]
    wanted, rungs = rungs, rungs_for(subject, planned, rungs)
    minimize = minimize or ("latency" if any(c.network != c for c in planned) else "macs")
    if wanted and not rungs:
        have = f"has {', '.join(rungs_for(subject, planned, RUNGS))} alone"
        notes.append(f"of the recovery ladder a {subject.name} network {have}: nothing is recovered")
    notes += fused_notes(subject.model)
    check_planned(subject, planned)
    if not planned:
        raise DownresError("There is no candidate to try: give resolutions below the original's with `resolutions`.")

    settings = {
        "format": FORMAT,
        **describe(subject),
        "budget": budget.to_json(),
        "candidates": [c.to_json() for c in planned],
        "rungs": list(rungs),
        "minimize": minimize,
        "runtime": measuring.runtimes[0],
        "latency_batch": measuring.latency_batch,
        "notes": notes,
        "command": command,
        "data_source": data_source(data, measuring, question),
    }
    if any(rung in TAUGHT for rung in rungs):
        settings["training"] = training.to_json()
        Altered(training, subject.model.preprocessing)  # for its errors
    team = Team()
    if not team.first:  # of `accelerate launch`: it trains where the first does
        open_data(subject, data, measuring, question)
        bank = subject.bank(None, **measuring.options())
        bank.training, bank.team = training, team
        subject.fill(bank)
        return load_run(team.help(lambda job: help_out(subject, bank, job)))
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="downres-"))

    def opened() -> None:
        open_data(subject, data, measuring, question, progress=progress)
        if in_rounds(subject, store, measuring, budget, tries.joint):
            subject.begin(dealt(subject.data, measuring.seed), measuring.seed)
        store.same("data", describe_data(subject), "sha256")
        if embed_preprocessing:
            refuse_numbers(subject, subject.model.preprocessing)

    with (
        team.leading(str(folder)),
        contextlib.nullcontext() if ray is None else Cluster(ray, latency_node) as cluster,
        contextlib.closing(Store.open(folder, settings)) as store,
        told(folder, progress) as progress,
    ):
        store.begin()
        bank = subject.bank(folder, progress=progress, **measuring.options())
        bank.training, bank.team = training, team
        alive = cost_gate(subject, store, budget, [subject.native, *planned], bank, progress)
        made: list[Reference] = []
        most = len(alive) - 1 if tries.joint is None else tries.joint
        if sampled := len(alive) - 1 > most:  # the first is the original
            opened()
            alive = _sample(subject, store, budget, alive, rungs, bank, measuring, most, minimize, made, progress)
            if not rungs:
                made.clear()  # what is only lowered is measured without tuning images
        elif store.get(JOINT) is not None:  # all of what some were chosen of before
            decide(store, alive[1:], alive[1:], alive[1:])
        alive = latency_gate(subject, store, budget, alive, bank, measuring, progress, cluster)
        if len(alive) > 1:
            if not sampled:
                opened()
            _measure_all(subject, store, budget, alive, rungs, bank, made, minimize, progress, cluster)
        if store.get("finished") is None:
            store.put("finished", True)
        bank.forget()
        run = load_run(folder, store)
        bank.weights.keep(_tensors_of(store, [subject.native, *planned]))
        write_report(run)
        if embed_preprocessing and run.artifact is not None and not read_manifest(run.artifact).get("embedded"):
            try:
                embed_with(subject, run.artifact, measuring.threads)
            except DownresError as error:  # the model itself is proven and shipped
                warnings.warn(f"the model is shipped alone: {str(error).rstrip('.')}", stacklevel=2)
        return run


def _measure_all(
    task: Task,
    store: Store,
    budget: Budget,
    candidates: list[Candidate],
    rungs: tuple[str, ...],
    bank: Bank,
    made: list[Reference],
    minimize: str,
    progress: Progress | None,
    cluster: Cluster | None,
) -> None:
    """Everything that needs proof images: quality of each candidate, what the report shows of them, the shipped model. made:
    the original in the first folds, where that is known.
    """
    task.fill(bank)
    if not store.has_arrays("split"):
        sides = {f"{part}{i}": getattr(f, part) for i, f in enumerate(task.data.folds) for part in ("train", "test")}
        store.put_arrays("split", **sides)
    rounds = store.get(ROUNDS)
    done = (store.get(f"{STOPPED}/{c}") or store.get(f"{UNNEEDED}/{c}") or _is_kept(task, store, bank, c) for c in candidates)
    if rounds and not all(done):
        if cluster is None:
            reference = task.reference(bank, 0, task.data.folds[0], rungs)
        else:
            (reference,) = cluster.references(task, bank, rungs)
        bank.release()
        measure_in_rounds(task, store, bank, candidates, reference, budget, rungs, minimize, cluster)
    elif cluster is not None and not rounds:
        _measure_there(task, store, budget, candidates, rungs, bank, cluster)
    for i, candidate in enumerate(candidates if not rounds else ()):
        if store.get(f"{STOPPED}/{candidate}") is None and not _is_kept(task, store, bank, candidate):
            bank.stage = f"{i + 1} of {len(candidates)}, "
            if len(made) < len(task.data.folds):  # a finished run needs none
                left = list(enumerate(task.data.folds))[len(made) :]
                made += [task.reference(bank, i, fold, rungs) for i, fold in left]
                bank.release()
            try:
                alike = _alike(store, candidate, len(made))
                _put(task, store, bank, candidate, measured(task, bank, candidate, made, alike, budget, rungs), None)
            except DownresError as error:
                refused(store, candidate, error)
        bank.release()
    bank.stage = ""
    run = load_run(store.folder, store)
    if not store.has_arrays("photos") and store.get("photos") != "none":
        shown = [r for r in run.results if r.status == "measured"]
        task.keep(store, bank, shown, run.best or words.nearest(run.results))  # the one that the page is about
        bank.release()
        if not store.has_arrays("photos"):
            store.put("photos", "none")  # this task shows none
    if run.best is not None and store.get(UNSHIPPED) is None and not is_whole(store.folder / "best"):
        if rounds:  # what it was proven on is what its artifact is of
            task.begin(first(task.data, store.get(f"quality/{run.best.candidate}")["proof"]["images"]), task.seed)
            task.fill(bank)
        if progress:
            progress(f"{run.best.candidate}: shipping", 0, 1)
        try:
            ship(task, store, bank, run, rungs)
        except NotExported as error:  # measured in torch, it is proven all the same
            store.put(UNSHIPPED, f"could not be exported to ONNX: {error.why}")
        except (QuantizationFailed, Unshipped) as error:
            store.put(UNSHIPPED, f"could not be shipped: {str(error).rstrip('.')}")
        if store.get(UNSHIPPED) is not None:
            shutil.rmtree(store.folder / "best.partial", ignore_errors=True)
        if progress:
            progress(f"{run.best.candidate}: shipping", 1, 1)


def _measure_there(
    task: Task, store: Store, budget: Budget, candidates: list[Candidate], rungs: tuple[str, ...], bank: Bank, cluster: Cluster
) -> None:
    """Quality of each candidate by a cluster, into the store as if it had been measured here."""
    left = [c for c in candidates if store.get(f"{STOPPED}/{c}") is None and not _is_kept(task, store, bank, c)]
    if not left:
        return
    references = cluster.references(task, bank, rungs)
    late: list[tuple[Candidate, Found]] = []
    alike = partial(_alike, store, folds=len(references))
    for candidate, found in cluster.measured(task, bank, left, references, alike, budget, rungs):
        if isinstance(found, DownresError):
            refused(store, candidate, found)
        elif found.timed_again is not None:  # when nothing else runs
            late.append((candidate, found))
        else:
            _put(task, store, bank, candidate, found, cluster)
    for candidate, found in late:
        try:
            _put(task, store, bank, candidate, found, cluster)
        except DownresError as error:
            refused(store, candidate, error)
    cluster.note(store)


def _tensors_of(store: Store, candidates: list[Candidate]) -> set[str]:
    """The keys of all that was put in place in what was measured: what was only tried is not needed any more."""
    measured = [found for c in candidates if (found := store.get(f"quality/{c}")) is not None]
    return {step.tensors for one in measured for state in one["states"] for step in State.from_json(state).history}


def _sample(
    task: Task,
    store: Store,
    budget: Budget,
    candidates: list[Candidate],
    rungs: tuple[str, ...],
    bank: Bank,
    measuring: Measuring,
    count: int,
    minimize: str,
    made: list[Reference],
    progress: Progress | None,
) -> list[Candidate]:
    """The original and those of many combinations that are worth a proof, see `joint`."""
    if len(task.split(task.data.folds[0])[1]) == 0:
        raise DownresError(
            f"Of {len(candidates) - 1} combinations {count} are chosen on tuning images, a part of the training images, and "
            f"there are none of those: give more images, or try all with joint={len(candidates) - 1}."
        )
    latency_gate(task, store, budget, candidates[:1], bank, measuring, progress)  # where it runs at all
    task.fill(bank)

    def reference() -> Reference:
        if not made:
            some = rungs or ("crop",)  # without any the original is not looked at on tuning images
            made.append(task.reference(bank, 0, task.data.folds[0], some))
        return made[0]

    return choose(task, store, budget, candidates, count, reference, rungs, bank, minimize, measuring.seed, progress)


def _is_kept(task: Task, store: Store, bank: Bank, candidate: Candidate) -> bool:
    """Whether it was measured, and all that the measurement names is still there as it was written."""
    measured = store.get(f"quality/{candidate}")
    if measured is None or not store.has_arrays(predictions_of(task.native_state.at(candidate))):
        return False
    steps = [step for state in measured["states"] for step in State.from_json(state).history]
    return all(bank.weights.has(step.tensors) for step in steps if step.tensors)


def _alike(store: Store, candidate: Candidate, folds: int) -> list[State | None]:
    """Of a candidate of 8 bits the states of its network in float, where that was measured before."""
    before = store.get(f"quality/{candidate.network}") if candidate != candidate.network else None
    return [State.from_json(one) for one in before["states"]] if before else [None] * folds


def _put(task: Task, store: Store, bank: Bank, candidate: Candidate, found: Found, cluster: Cluster | None) -> None:
    """Arrays first, then the record that names them."""
    if (state := found.timed_again) is not None:
        time_again(task, store, bank, state, cluster)
    store.put_arrays(predictions_of(task.native_state.at(candidate)), **found.recovered.to_arrays())
    quality = {
        "quality": task.quality(found.recovered).to_json(),
        "naive": task.quality(found.lowered).to_json(),
        "recovery": together(found.recoveries).to_json(),
        "states": [state.to_json() for state in found.states],
    }
    store.put(f"quality/{candidate}", quality)


def _check_cluster(ray: str | None, latency_node: str | None, tries: Axes, training: Training, out: str | Path | None) -> None:
    if out is not None and "://" in str(out):
        raise DownresError(
            f"A run's folder is one that this machine writes to, {out} is an address: mount it, or copy the run there."
        )
    if latency_node is None and ray is None:
        return
    if ray is None:
        raise DownresError("`latency_node` is a node of a cluster: name that with `ray`, for example `ray='auto'`.")
    if Team().count > 1:
        raise DownresError(
            "`accelerate launch` has processes of its own and a cluster has, too: start the search with `ray` as it is."
        )
    if latency_node is not None and tries.joint is not None:
        raise DownresError("Combinations are tried and timed on this machine: leave `latency_node` out, or `joint`.")
    if training.log:
        raise DownresError("`log` keeps numbers where it trains, on whatever node that is: leave it out, or `ray`.")


def _check_choices(rungs: tuple[str, ...], minimize: str | None) -> None:
    for value, known, what in (
        (rungs, RUNGS, "rungs"),
        ((minimize,) if minimize else (), MINIMIZE, "minimize"),
    ):
        for one in value:
            if one not in known:
                raise DownresError(f"Unknown {what} {one!r}: choose from {', '.join(known)}.")
