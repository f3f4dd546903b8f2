"""A run as its folder has it: pure reading, nothing is measured here."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DownresError, first_line, shown
from ..images import Skip
from ..measuring.statistics import share_bound
from ..notebook import frame_of, page, sentences, table
from ..record import Misfit, Record, plain
from ..records import (
    OUTSIDE,
    TOO_FEW,
    WITHIN,
    Budget,
    Candidate,
    Cost,
    Drop,
    Flips,
    Footprint,
    Latency,
    Preprocessing,
    Recovery,
    Result,
)
from ..recovery.state import State
from ..reports import words
from ..reports.interactions import interactions
from ..reports.tables import candidates
from ..tasks import Task, restored
from .joint import JOINT, Joint
from .select import is_measured_alone, over_budget, select, slower_twin
from .store import IN_TORCH, KINDS, ROUNDS, STOPPED, UNEXPORTED, UNNEEDED, UNSHIPPED, Store

if TYPE_CHECKING:
    from ..artifacts import Embedded

NOT_OPENED = {
    "description": "No image was opened.",
    "fold_count": 1,
    "licence": "",
    "skipped": (),
}
"""The data of a run that has not come to its images: every candidate was over a ceiling, or it was interrupted before."""


@dataclass(frozen=True, repr=False)
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
    data: dict[str, Any]
    task: Task

    def __repr__(self) -> str:
        """A few lines: of what, how far it is, what is best, and where it is."""
        done = sum(r.status != "waiting" for r in self.results)
        every = words.count(len(self.results), "candidate")
        how_far = f"finished, {every}" if self.finished else f"unfinished, {done} of {every} done"
        said = words.verdict(self.original, self.results, self.best, self.budget, self.task.score)
        model = self.settings["model"] or "a module given in Python"
        return "\n".join(
            shown(line)
            for line in (
                f"Run of {model} at {words.label(self.original.candidate)}: {how_far}",
                f"  data: {self.data['description']}",
                f"  best: {words.label(self.best.candidate) if self.best else 'none'}",
                f"  {said}",
                f"  in {self.folder}",
            )
        )

    @property
    def artifact(self) -> Path | None:
        """Folder of the shipped model, or None."""
        return self.folder / "best" if (self.folder / "best" / "manifest.json").exists() else None

    @property
    def embedded(self) -> "Embedded | None":
        """What is beside the shipped model with its preprocessing inside, or None."""
        from ..artifacts import Embedded, read_manifest  # and all runtimes

        said = read_manifest(self.artifact).get("embedded") if self.artifact else None
        return Embedded.from_json(said) if said else None

    def to_json(self) -> dict[str, Any]:
        return plain(
            {
                "run": str(self.folder),
                "finished": self.finished,
                "settings": self.settings,
                "data": self.data,
                "budget": self.budget.to_json(),
                "original": self.original.row(self.task.score),
                "candidates": [r.row(self.task.score) for r in self.results],
                "best": self.best and self.best.row(self.task.score),
                "interactions": [one.to_json() for one in interactions(self.original, self.results, self.best)],
                "artifact": self.artifact and str(self.artifact),
                "notes": list(self.notes),
            }
        )

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, the original first, a row a candidate: the columns of `to_json` and `--json`."""
        document = self.to_json()
        return frame_of([document["original"], *document["candidates"]])

    def _repr_html_(self) -> str:
        """Verdict and table, and below them the report, pictures and all."""
        told = candidates(self.original, self.results, self.best.candidate if self.best else None)
        said = words.verdict(self.original, self.results, self.best, self.budget, self.task.score)
        shown = sentences(self.data["description"], said) + table(told.rows, told.faint)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            shown += page((self.folder / "report.html").read_text("utf-8"), 900)
        return shown + sentences(*self.notes)


def load_run(folder: str | Path, store: Store | None = None) -> Run:
    """A run as its folder has it, finished or not. Pure reading: nothing is measured again.

    Raises DownresError where it is none, or what is in it is not as it was written.
    """
    store = store or Store.read(folder)
    if "own_heads" in store.settings:
        raise DownresError(
            f"{folder} holds a model for several resolutions and no search: `check` and `predict` take its folder `best`."
        )
    with readable(store.folder):
        Settings.from_json(store.settings)
        if store.get("data") is not None:
            Opened.from_json(store.get("data"))
        return _load(Path(folder), store)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """One sentence for what a damaged folder makes fail."""
    try:
        yield
    except Misfit as misfit:
        why = f"{misfit.path} {misfit.why}"
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        why = f"{type(error).__name__}: {first_line(error, 'no reason given')[:100]}"
    else:
        return
    raise DownresError(f"What is in {folder} is not as it was written ({why}): search again with another folder.")


@dataclass(frozen=True)
class Settings(Record):
    """All that is read of run.json, with its types."""

    model: str
    weights: str
    preprocessing: Preprocessing
    task: dict[str, Any]
    budget: Budget
    candidates: tuple[Candidate, ...]
    minimize: str
    runtime: str
    notes: tuple[str, ...]
    command: str
    data_source: dict[str, Any]
    rungs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened(Record):
    """All that is read of what a run notes of its data; its task may have noted more."""

    description: str
    fold_count: int
    licence: str
    skipped: tuple[Skip, ...]
    sha256: str = ""


def _load(folder: Path, store: Store) -> Run:
    settings = store.settings | ({} if store.get(IN_TORCH) is None else {"runtime": "torch"})
    budget = Budget.from_json(settings["budget"])
    native = Candidate(Preprocessing.from_json(settings["preprocessing"]).resolution)
    data = store.get("data") or dict(NOT_OPENED)
    task = restored(settings["task"], data)
    original = _result(store, task, native, Budget(budget.max_drop))
    joint = None if (found := store.get(JOINT)) is None else Joint.from_json(found)
    planned = [Candidate.from_json(c) for c in settings["candidates"]]
    if joint is not None:  # the others were not worth a proof
        planned = [c for c in planned if str(c) in joint.proven]
    results = [_result(store, task, c, budget) for c in planned]
    # Whoever looked at proof images before the choice, in another fold or run, chose of all combinations.
    seen = joint is not None and (joint.again or data["fold_count"] > 1)
    results = _judge(store, task, native, results, budget, data["fold_count"], joint.combinations if joint and seen else 0)
    unmeasured = sum(r.status == "waiting" for r in results)
    best = None if unmeasured else select([r for r in results if not is_measured_alone(r.candidate)], settings["minimize"])
    notes = [*settings["notes"]]
    if joint is not None:
        notes.append(_told(joint, len(results), seen))
    if (why := store.get(IN_TORCH)) is not None:
        notes.append(f"all is measured in torch, as the original could not be exported to ONNX: {why}")
    if original.quality is not None:
        notes += task.warnings(original.quality, data)
    if len(kinds := store.get(KINDS) or ()) > 1:
        notes.append(
            f"measured on {len(kinds)} kinds of processors, whose answers may differ in the last digit: "
            f"{'; '.join(map(str, kinds))}"
        )
    timed = [r for r in (original, *results) if r.latency and r.latency.disturbed]
    if timed:
        shown = ", ".join(str(r.candidate) for r in timed)
        slow = f"every tenth pass took twice the median at {shown}"
        notes.append(f"something else ran while latency was measured ({slow}): time again alone")
    if best and (why := store.get(UNSHIPPED)) is not None:
        said = why if why.startswith("could not") else f"could not be exported to ONNX: {why}"
        notes.append(
            f"no model is shipped, as {best.candidate} {said}; its network is what "
            f"downres.recover(model, data, Candidate.parse({str(best.candidate.network)!r})) gives in Python"
        )
    if alone := [str(r.candidate) for r in results if is_measured_alone(r.candidate)]:
        notes.append(f"measured and not shipped, as torch runs networks and no files: {', '.join(alone)}")
    if unmeasured:
        notes.append(f"unfinished: {unmeasured} of {len(results)} candidates are not measured yet; the same command goes on")
    finished = store.get("finished") is not None and not unmeasured
    return Run(folder, settings, budget, original, tuple(results), best, tuple(notes), finished, data, task)


def _told(joint: Joint, proven: int, seen: bool) -> str:
    """Which of many combinations the table is of."""
    tried = len(joint.tried)
    if tried == joint.combinations:
        said = f"all {words.count(tried, 'combination')} are measured on the proof images"
    else:
        said = (
            f"of {words.count(joint.combinations, 'combination')} {tried} were tried on "
            f"{words.count(joint.images, 'tuning image')}, chosen by Optuna, and the {words.count(proven, 'candidate')} on "
            "their Pareto front measured on the proof images"
        )
    if joint.failed:
        name, why = next(iter(joint.failed.items()))
        said += f"; {len(joint.failed)} of them could not be tried ({name}: {why})"
    why = "proofs were seen before this choice" if joint.again else "proof images of one fold are tuning images of another"
    return f"{said}; as {why}, the proof is corrected for all combinations" if seen else said


def _judge(
    store: Store, task: Task, native: Candidate, results: list[Result], budget: Budget, folds: int, least: int = 0
) -> list[Result]:
    """The drops of what is measured, all at once. least: comparisons that the proof is corrected for at least."""
    done = [r for r in results if r.status == "measured"]
    if store.get(ROUNDS):
        return results
    if not done or store.get(f"quality/{native}") is None or not store.has_arrays(_predictions(store, native)):
        return results
    found = {str(c): _evidence(store, task, c) for c in (native, *(r.candidate for r in done))}
    original = found.pop(str(native))
    ruled_out = {
        str(r.candidate): f"ruled out on {r.recovery.tuning.n} tuning images (drop at least {r.recovery.tuning.lower:.1f} "
        f"{r.quality.unit if r.quality else 'points'})"
        for r in done
        # With cross folds the tuning images are proof images of another fold: nothing may be ruled out by them.
        if folds == 1 and r.recovery and r.recovery.tuning and r.recovery.tuning.verdict == OUTSIDE
    }
    judged = {name: evidence for name, evidence in found.items() if name not in ruled_out}
    waiting = sum(r.status == "waiting" for r in results)
    # Two things to be proven of each: with Bonferroni's level for both, a wrong proof of either kind is one of all.
    many = max(1, least, len(judged) + waiting)
    if waiting or least or budget.max_flips is not None:
        drops = _before_all(task, original, judged, budget, many)
    else:
        drops = task.compare(original, judged, budget)
    for name in ruled_out:
        drops |= task.compare(original, {name: found[name]}, budget)
    return [
        dataclasses.replace(
            r,
            drop=drops[str(r.candidate)],
            reason=ruled_out.get(str(r.candidate), ""),
            flips=_flips(task, original, found[str(r.candidate)], budget, many),
        )
        if r.status == "measured"
        else r
        for r in results
    ]


def _flips(task: Task, original: Any, one: Any, budget: Budget, planned: int) -> Flips | None:
    """How many answers are others, with a bound (Clopper and Pearson 1934); None of a task that does not count answers."""
    changed = task.changed(original, one)
    if changed is None:
        return None
    points = task.points(one).astype(float) - task.points(original).astype(float)
    count, n = int(changed.sum()), len(changed)
    level = (1.0 - budget.confidence) / (planned if budget.max_flips is not None else 1)
    upper = 100 * share_bound(count, n, level)[1]
    verdict = ""
    if budget.max_flips is not None:
        lower = 100 * share_bound(count, n, level)[0]
        verdict = WITHIN if upper < budget.max_flips else OUTSIDE if lower > budget.max_flips else TOO_FEW
    return Flips(count, int((points < 0).sum()), int((points > 0).sum()), n, upper, budget.max_flips, verdict)


def _before_all(task: Task, original: Any, judged: dict[str, Any], budget: Budget, planned: int) -> dict[str, Drop]:
    """The drops of an unfinished run: each at the level of all that are planned (Bonferroni), whatever the others will give,
    so that whoever looks early has no better chance to see a proof.
    """
    level = dataclasses.replace(budget, confidence=1.0 - (1.0 - budget.confidence) / planned)
    drops = {name: task.compare(original, {name: evidence}, level)[name] for name, evidence in judged.items()}
    return {name: dataclasses.replace(d, confidence=budget.confidence, comparisons=planned) for name, d in drops.items()}


def _result(store: Store, task: Task, candidate: Candidate, budget: Budget) -> Result:
    """One candidate from its stored measurements; the drop comes later, when all are known."""
    counted = store.get(f"cost/{candidate}") or {}
    cost = Cost.from_json(counted["cost"]) if "cost" in counted else None
    latency = None if (found := _timed(store, "latency", candidate)) is None else Latency.from_json(found)
    taken = None if (found := _timed(store, "footprint", candidate)) is None else Footprint.from_json(found)
    unexported = (store.get(UNEXPORTED) or {}).get(str(candidate), "") or store.get(f"{STOPPED}/{candidate}") or ""
    unexported = unexported or store.get(f"{UNNEEDED}/{candidate}") or ""
    reason = counted.get("failed", "") or unexported or over_budget(cost, latency, budget, taken)
    if not reason and latency is not None and (twin := (store.get("latency") or {}).get(str(candidate.network))) is not None:
        both = {str(candidate.network): Latency.from_json(twin), str(candidate): latency}
        reason = slower_twin(candidate, both, store.settings["minimize"])
    if reason:
        return Result(candidate, "stopped", reason, cost, latency, footprint=taken)
    measured = store.get(f"quality/{candidate}")
    if measured is None:
        return Result(candidate, "waiting", "waiting: not measured yet", cost, latency, footprint=taken)
    if not store.has_arrays(_predictions(store, candidate)):
        return Result(
            candidate, "waiting", "waiting: its stored answers are lost or damaged, they are measured again", cost, latency
        )
    kind = task.score
    return Result(
        candidate, "measured", "", cost, latency,
        kind.from_json(measured["naive"]) if measured["naive"] else None, kind.from_json(measured["quality"]),
        _proven_in_rounds(measured), Recovery.from_json(measured["recovery"]), taken,
    )  # fmt: skip


def _proven_in_rounds(measured: dict[str, Any]) -> Drop | None:
    """The drop with its verdict where that was found in rounds, of images and levels that only they know."""
    found = measured.get("proof", {}).get("drop")
    return Drop.from_json(found) if found else None


def _timed(store: Store, kind: str, candidate: Candidate) -> dict[str, Any] | None:
    """Of the file that its quality was measured with, where that is another than was timed first."""
    again: dict[str, Any] | None = store.get(f"{kind}/{candidate}")
    return again if again is not None else (store.get(kind) or {}).get(str(candidate))


def _evidence(store: Store, task: Task, candidate: Candidate) -> Any:
    return task.evidence_type.from_arrays(store.arrays(_predictions(store, candidate)))


def predictions_of(state: State) -> str:
    """The name of the arrays that hold what the candidate of a state did on the proof images."""
    return f"predictions/{state.key()}"


def _predictions(store: Store, candidate: Candidate) -> str:
    crop = Preprocessing.from_json(store.settings["preprocessing"]).crop_ratio
    return predictions_of(State(candidate, crop))
