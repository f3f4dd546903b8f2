"""One model for several resolutions: trained, proven at each, shipped as graphs that share their weights."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..artifacts import export, is_whole, read_manifest
from ..artifacts.manifest import WEIGHTS, part_stem
from ..artifacts.proof import judged
from ..artifacts.write import Shipped
from ..engines import Runtime
from ..engines.engine import engine_of
from ..engines.onnxruntime import export_onnx
from ..engines.shared import share_tensors
from ..environment import versions
from ..errors import DownresError
from ..families import Model
from ..measuring.cost import measure_cost
from ..measuring.latency import interleaved, random_batch
from ..parse import Resolution, as_hw, name_of, parse_resolutions
from ..record import plain
from ..records import Budget, Candidate, Preprocessing, Recovery, Result, Rung
from ..recovery.bank import Bank
from ..recovery.distill import Distillation
from ..recovery.ladder import Reference
from ..recovery.state import State, Step
from ..recovery.switching import Switching, tensors_of
from ..recovery.team import Team
from ..recovery.trainer import trained
from ..recovery.training import Training
from ..recovery.views import Altered
from ..tasks import Question, Task
from .design import fused_notes
from .live import told
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
from .ship import source_of
from .store import FORMAT, Store


@dataclass(frozen=True)
class Switchable:
    """A model for several resolutions. original: as it is, at its own; results: what the model does at each, the most pixels
    first; artifact: its folder. file_bytes: of all that runs; single_bytes: of the original's file in the same runtime.
    """

    artifact: Path
    original: Result
    results: tuple[Result, ...]
    preprocessing: Preprocessing
    file_bytes: int
    single_bytes: int
    data: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        kind = type(self.original.quality) if self.original.quality else None
        return plain(
            {
                "artifact": str(self.artifact),
                "data": self.data,
                "preprocessing": self.preprocessing.to_json(),
                "file_bytes": self.file_bytes,
                "single_bytes": self.single_bytes,
                "original": self.original.row(kind),
                "resolutions": [result.row(kind) for result in self.results],
                "notes": list(self.notes),
            }
        )


def switchable(
    model: Model | nn.Module | str,
    data: Source,
    resolutions: str | Sequence[Resolution],
    *,
    max_drop: float = 1.0,
    confidence: float = 0.95,
    own_heads: bool = False,
    task: str | type[Task] | None = None,
    question: Question = Question(),
    measuring: Measuring = Measuring(),
    training: Training = Training(),
    preprocessing: Preprocessing | None = None,
    out: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
    **flat: Any,
) -> Switchable:
    """Train one set of weights for several resolutions, measure each, and ship them together: whoever runs the model chooses
    the resolution, or says how many milliseconds it may take (`predict(…, max_latency_ms=20)`).

    A resolution-switchable network (Wang et al. 2020, arXiv 2007.09587): weights are shared, normalisations are each
    resolution's own, and it is distilled from the original at its own resolution, without labels, a resolution a batch in turn.
    All training images are trained on; the quality at each resolution is that of the shipped graph on the proof images, its
    drop against the original with a verdict that holds for all resolutions together.

    resolutions: two or more, '224,160,128' or a sequence; the original's own may be one. own_heads: the last layer is each
    resolution's own, too. training: how it trains; `batchnorm=True` gives each resolution statistics of its own. The groups and
    flat fields are `search`'s. out: folder of the run; the same call goes on where it was. The model given is not touched.
    Raises DownresError for bad input, and where the network cannot be trained or exported.
    """
    groups = gather({"question": question, "measuring": measuring, "training": training}, flat)
    question, measuring, training = groups["question"], groups["measuring"], groups["training"]
    if Team().count > 1:
        raise DownresError("`switchable` trains in one process: start it without torchrun.")
    if measuring.folds is not None:
        raise DownresError("One network is trained for all resolutions, not one a fold: give `val_fraction`, and no folds.")
    if measuring.runtimes != ("onnxruntime",):
        raise DownresError(
            f"Weights are shared by ONNX files, {', '.join(measuring.runtimes)} has others: leave `runtime` out."
        )
    for name, value, kinds in (("max_drop", max_drop, (int, float)), ("own_heads", own_heads, (bool,))):
        if not isinstance(value, kinds):
            raise DownresError(f"`{name}` is {'a number' if name == 'max_drop' else 'true or false'}, {value!r} is not.")
    budget = Budget(max_drop, confidence=confidence)
    subject = prepare_task(model, data, question, task, preprocessing)
    subject.check_budget(budget)
    Altered(training, subject.model.preprocessing)  # for its errors
    candidates = _candidates(subject, resolutions)
    settings = {
        "format": FORMAT,
        **describe(subject),
        "budget": budget.to_json(),
        "candidates": [c.to_json() for c in candidates],
        "own_heads": own_heads,
        "training": training.to_json(),
        "command": command,
        "data_source": data_source(data, measuring, question),
    }
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="downres-"))
    with contextlib.closing(Store.open(folder, settings)) as store, told(folder, progress) as progress:
        store.begin()
        if not is_whole(folder / "best"):
            open_data(subject, data, measuring, question, progress=progress)
            store.same("data", describe_data(subject), "sha256")
            bank = subject.bank(folder, progress=progress, **measuring.options())
            bank.training = training
            subject.fill(bank)
            reference = subject.reference(bank, 0, subject.data.folds[0], (Distillation.rung,))
            bank.file(reference.state)  # what cannot be exported is said before hours of training
            states, recovery = _trained(subject, store, bank, reference, candidates, training, own_heads)
            _ship(subject, store, bank, reference.state, states, recovery, budget, measuring, progress)
            bank.forget()
        notes = [*fused_notes(subject.model), *subject.lacks(store.get("data"))]
        found = _found(folder / "best", subject, store.get("data")["description"], notes)
        if found.file_bytes > 1.25 * found.single_bytes:
            few = "little of its weights is the same at each resolution, as where branches with BatchNorms are put together"
            found = dataclasses.replace(found, notes=(*found.notes, f"{few}: a file for each takes about as much"))
        return found


def _candidates(subject: Task, resolutions: str | Sequence[Resolution]) -> list[Candidate]:
    """The most pixels first; DownresError for fewer than two, and for two of one size."""
    native = subject.model.preprocessing
    if not isinstance(resolutions, (str, list, tuple)):
        raise DownresError(f"Resolutions are a list of two or more, {resolutions!r} is none: for example [224, 160, 128].")
    asked = parse_resolutions(resolutions) if isinstance(resolutions, str) else resolutions
    for size in asked:
        as_hw("" if isinstance(size, bool) else size)  # type: ignore[arg-type]  # for its errors
    found = list(dict.fromkeys(Candidate(size).on(native.resolution) for size in asked))
    sizes = {c: native.at(c.resolution).hw for c in found}
    if len(found) < 2:
        raise DownresError(f"A model for several resolutions has two or more, {len(found)} is given: for example 224,160,128.")
    if len(set(sizes.values())) < len(found):
        raise DownresError("Two of the resolutions are the same height and width: name each once.")
    if above := [c for c in found if any(a > b for a, b in zip(sizes[c], native.hw, strict=True))]:
        raise DownresError(
            f"The original is used at {name_of(native.resolution)} px, {above[0]} is more than it has ever answered at: give "
            "at most that."
        )
    check_planned(subject, found)
    return sorted(found, key=lambda c: sizes[c][0] * sizes[c][1], reverse=True)


def _trained(
    task: Task,
    store: Store,
    bank: Bank,
    reference: Reference,
    candidates: list[Candidate],
    training: Training,
    own_heads: bool,
) -> tuple[list[State], Recovery]:
    """The state at each resolution, trained on all training images: nothing is chosen by any."""
    images = reference.fold.train
    if len(images) < 2:
        raise DownresError("There are no training images: give a folder with train/ and val/, or a smaller `val_fraction`.")
    known = store.get("switched")
    if known is None or not all(bank.weights.has(step["tensors"]) for step in known["steps"]):
        first, *others = (reference.state.at(candidate) for candidate in candidates)
        began, seen = time.perf_counter(), bank.passes
        lesson = Switching(task, bank, first, others, reference.state, images, own_heads)
        state, told = trained(bank, first, 0, images, training, lesson, task.seed)
        assert state.trained is not None
        every = bank.weights.get(state.trained.tensors)
        keys = [bank.weights.put(tensors_of(every, i)) for i in range(len(candidates))]
        steps = [Step(state.trained.done, 0, len(images), key).to_json() for key in keys]
        spent = {"seconds": time.perf_counter() - began, "images": bank.passes - seen, "told": told}
        known = store.put("switched", {"steps": steps, **spent})
        bank.weights.keep([*keys, *(step.tensors for step in reference.state.history)])
    crop = reference.state.crop_ratio
    rung = Rung(Distillation.rung, None, 0, known["seconds"], known["images"], known["told"])
    recovery = Recovery(Distillation.rung, crop, known["seconds"], (rung,))
    made = [Step.from_json(step) for step in known["steps"]]
    return [State(c, crop, (step,)) for c, step in zip(candidates, made, strict=True)], recovery


def _ship(
    task: Task,
    store: Store,
    bank: Bank,
    original: State,
    states: list[State],
    recovery: Recovery,
    budget: Budget,
    measuring: Measuring,
    progress: Progress | None,
) -> None:
    """The graphs written, measured as they ship, and the artifact around them."""
    graphs = store.folder / "onnx" / "graphs"
    shutil.rmtree(graphs, ignore_errors=True)
    graphs.mkdir(parents=True)
    engine, native = engine_of("onnxruntime"), task.native
    files: dict[State, Path] = {}
    for i, state in enumerate(states):
        stem = "model" if i == 0 else part_stem(state.candidate)
        files[state] = (graphs / stem).with_suffix(Path(engine.file).suffix)
        size = (task.channels, *bank.preprocessing_of(state).hw)
        export_onnx(task.serve(bank.network(state)), size, files[state], (task.output_name,), own_batchnorm=True)
        if progress:
            progress("writing graphs", i + 1, len(states))
    share_tensors([*files.values()], graphs / WEIGHTS)
    runtimes: dict[str, Runtime] = {"original": bank.timed(original)}
    runtimes |= {str(s.candidate): engine.load(file, bank.threads, spread=False) for s, file in files.items()}
    inputs = {
        name: random_batch((measuring.latency_batch, task.channels, *bank.preprocessing_of(s).hw))
        for name, s in zip(runtimes, (original, *states), strict=True)
    }
    latency = interleaved(runtimes, inputs, progress=progress)
    before = task.evidence(bank, original, task.proof)
    naive, after = {}, {}
    for i, (state, file) in enumerate(files.items()):
        name = str(state.candidate)
        bare = original.at(state.candidate)
        naive[name] = before if state.candidate == native else task.evidence(bank, bare, task.proof, serving=False)
        bank.release()
        runtime = engine.load(file, bank.threads, spread=True)
        after[name] = judged(task, runtime, task.proof, bank.preprocessing_of(state))
        if progress:
            progress("measuring each resolution", i + 1, len(states))
    drops = task.compare(before, after, budget)

    def cost(state: State) -> Any:
        return measure_cost(bank.counted(state), (task.channels, *bank.preprocessing_of(state).hw))

    results = {
        s: Result(
            s.candidate,
            "measured",
            cost=cost(s),
            latency=latency[name],
            naive=task.quality(naive[name]),
            quality=task.quality(after[name]),
            drop=drops[name],
            recovery=recovery,
        )
        for s in states
        for name in [str(s.candidate)]
    }
    quality = task.quality(before)
    as_it_is = Result(native, "measured", cost=cost(original), latency=latency["original"], quality=quality)
    shipped = [Shipped(bank.network(s), bank.preprocessing_of(s), s, results[s]) for s in states]
    single = bank.file(original).stat().st_size

    def graph(place: Path) -> dict[str, Any]:
        for file in graphs.iterdir():
            shutil.copyfile(file, place / file.name)
        taken = sum(file.stat().st_size for file in graphs.iterdir())
        return {"name": engine.text, "precision": states[0].candidate.precision, "file_bytes": taken}

    first, *others = shipped
    export(
        store.folder / "best",
        first.network,
        task,
        graph,
        preprocessing=first.preprocessing,
        state=first.state,
        result=first.result,
        original=as_it_is,
        recovery=recovery,
        source=source_of(task, store, first.state),
        versions=versions(),
        others=others,
        more={"single_bytes": single},
    )


def _found(folder: Path, task: Task, data: str, notes: Sequence[str]) -> Switchable:
    """What is in the artifact."""
    manifest = read_manifest(folder)

    return Switchable(
        folder,
        _result(task, manifest["original"]),
        tuple(_result(task, part["result"]) for part in (manifest, *manifest["resolutions"])),
        Preprocessing.from_json(manifest["preprocessing"]),
        manifest["runtime"]["file_bytes"],
        manifest["single_bytes"],
        data,
        tuple(notes),
    )


def _result(task: Task, said: Mapping[str, Any]) -> Result:
    naive, quality = (task.score.from_json(said[name]) if said.get(name) else None for name in ("naive", "quality"))
    return dataclasses.replace(Result.from_json({**said, "naive": None, "quality": None}), naive=naive, quality=quality)
