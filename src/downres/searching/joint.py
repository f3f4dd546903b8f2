"""All axes together: of many combinations the few that are worth a proof, found on tuning images alone."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import DownresError
from ..measuring.latency import interleaved, random_batch
from ..parse import as_hw
from ..record import Record
from ..records import OUTSIDE, Budget, Candidate, Cost
from ..recovery.bank import Bank
from ..recovery.ladder import Reference, climb
from ..recovery.state import State
from ..tasks import Task
from ..techniques import techniques
from .select import is_measured_alone, over_budget
from .store import UNSHIPPED, Store

TRIAL, JOINT = "trial", "joint"
"""Measurements: of each combination that was tried, by name; which of them are to be proven."""
PROBED = 15
"""Rounds of the quick look at the time of a combination, the original and it in turns."""


@dataclass(frozen=True)
class Trial(Record):
    """One combination on tuning images. expense: what is minimised, of latency the original's part; drop: in the unit of the
    task's score, after recovery; outside: beyond doubt over the allowed one. failed: why it could not be tried, then there is
    nothing else.
    """

    expense: float = 0.0
    drop: float = 0.0
    outside: bool = False
    images: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Joint(Record):
    """What was tried of how many combinations, and what of it goes to the proof. again: proofs were seen before the choice.
    failed: why some could not be tried, by name.
    """

    tried: tuple[str, ...]
    proven: tuple[str, ...]
    combinations: int
    images: int
    again: bool = False
    failed: dict[str, str] = field(default_factory=dict)


class Sampler:
    """Optuna's multi-objective tree-structured Parzen estimator (Bergstra et al. 2011; Ozaki et al. 2022) over the candidates
    of a pool. The same seed and the same answers ask for the same candidates.
    """

    def __init__(self, pool: Sequence[Candidate], seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise DownresError(
                "Combinations are chosen by Optuna, which is not installed: pip install 'downres[optuna]', or allow as many "
                f"as there are, joint={len(pool)}."
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=min(10, max(2, len(pool) // 4)))
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        self._pool = {c: _words(c) for c in pool}
        self._left = dict.fromkeys(pool)
        self._values: dict[str, list[str]] = {}
        for c in sorted(pool, key=_pixels):
            for name, word in self._pool[c].items():
                known = self._values.setdefault(name, [])
                known += [] if word in known else [word]
        self._ordered = {t.name for t in techniques() if not t.crosses}  # sizes are near each other, precisions are not
        whole, choice = optuna.distributions.IntDistribution, optuna.distributions.CategoricalDistribution
        self._axes: dict[str, optuna.distributions.BaseDistribution] = {
            name: whole(0, len(words) - 1) if name in self._ordered else choice(tuple(range(len(words))))
            for name, words in self._values.items()
            if len(words) > 1
        }

    def ask(self) -> Candidate | None:
        """The one nearest to what the sampler suggests that was not told of yet, None where none is left."""
        if not self._left:
            return None
        trial = self._study.ask(self._axes)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # what is tried may be its neighbour
        return min(self._left, key=lambda c: self._distance(c, trial.params))

    def tell(self, candidate: Candidate, found: Trial) -> None:
        self._left.pop(candidate)
        if not found.failed:
            params = {name: self._values[name].index(self._pool[candidate][name]) for name in self._axes}
            made = self._optuna.trial.create_trial(params=params, distributions=self._axes, values=[found.expense, found.drop])
            self._study.add_trial(made)

    def _at(self, c: Candidate) -> dict[str, int]:
        return {name: self._values[name].index(self._pool[c][name]) for name in self._axes}

    def _distance(self, c: Candidate, params: dict[str, int]) -> float:
        """In steps along the axes that are ordered, whole axes along the others."""
        steps = {name: abs(at - params[name]) / (len(self._values[name]) - 1) for name, at in self._at(c).items()}
        return sum(step if name in self._ordered else float(step > 0) for name, step in steps.items())


def _words(c: Candidate) -> dict[str, str]:
    return {t.name: t.word(c) if t.always or t.is_on(c) else "" for t in techniques()}


def _pixels(c: Candidate) -> int:
    height, width = as_hw(c.resolution or 0)
    return height * width


def front(trials: dict[Candidate, Trial]) -> list[Candidate]:
    """The Pareto front of expense and drop: none costs as little and loses as little, one of both less. Where any may be within
    the allowed drop, only such.
    """
    sound = {c: t for c, t in trials.items() if not t.failed}
    sound = {c: t for c, t in sound.items() if not t.outside} or sound

    def beaten(one: Trial) -> bool:
        at = (one.expense, one.drop)
        others = ((t.expense, t.drop) for t in sound.values())
        return any(o[0] <= at[0] and o[1] <= at[1] and o != at for o in others)

    return [c for c, t in sound.items() if not beaten(t)]


def choose(
    task: Task,
    store: Store,
    budget: Budget,
    candidates: Sequence[Candidate],
    count: int,
    reference: Callable[[], Reference],
    rungs: tuple[str, ...],
    bank: Bank,
    minimize: str,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Candidate]:
    """Tries `count` of the candidates, of which the first is the original, on tuning images, and returns the original and
    those that no other beats there. No proof image is looked at.

    What was tried is kept: the same call goes on, and one that allows more goes on from there.
    """
    native, *pool = (c for c in candidates if not is_measured_alone(c))  # which ships nothing
    sampler, trials = Sampler(pool, seed), dict[Candidate, Trial]()
    while len(trials) < count and (one := sampler.ask()) is not None:
        key = f"{TRIAL}/{one}"
        if store.get(key) is None:
            bank.stage = f"trying {len(trials) + 1} of {count}, "
            store.put(key, _trial(task, store, bank, native, one, reference(), budget, rungs, minimize).to_json())
            bank.release()
        trials[one] = Trial.from_json(store.get(key))
        sampler.tell(one, trials[one])
        if progress:
            progress("trying combinations", len(trials), count)
    bank.stage = ""
    best = front(trials)
    failed = {str(c): t.failed for c, t in trials.items() if t.failed}
    if not best:
        raise DownresError(f"None of the {len(trials)} combinations that were tried can be measured: {min(failed.values())}.")
    images = max(t.images for t in trials.values())
    chosen = [c for c in pool if c in best]
    decide(store, pool, trials, chosen, images, failed)
    return [native, *chosen]


def decide(
    store: Store,
    pool: Sequence[Candidate],
    tried: Iterable[Candidate],
    chosen: Sequence[Candidate],
    images: int = 0,
    failed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Keep what of a pool goes to the proof. Where proofs were seen before another choice, that is kept too, and the run, which
    may have been finished, is open again: it has no model until it is chosen anew.
    """
    before = None if store.get(JOINT) is None else Joint.from_json(store.get(JOINT))
    seen = any(store.get(f"quality/{c}") is not None for c in pool)
    names, proven = tuple(map(str, tried)), tuple(map(str, chosen))
    if before is not None and (before.tried, before.proven) == (names, proven):
        return
    if seen:
        for key in ("finished", UNSHIPPED, "photos", "arrays/photos"):
            store.put(key, None)
        shutil.rmtree(store.folder / "best", ignore_errors=True)
    again = seen or (before is not None and before.again)
    store.put(JOINT, Joint(names, proven, len(pool), images, again, dict(failed)).to_json())


def _trial(
    task: Task,
    store: Store,
    bank: Bank,
    native: Candidate,
    candidate: Candidate,
    reference: Reference,
    budget: Budget,
    rungs: tuple[str, ...],
    minimize: str,
) -> Trial:
    try:
        expense, why = _expense(task, store, bank, native, candidate, minimize, budget)
        if why:
            return Trial(failed=why)
        _, recovery = climb(task, bank, candidate, reference, budget, rungs)
    except DownresError as error:  # of this combination; others may be sound
        return Trial(failed=str(error).rstrip("."))
    drop = recovery.tuning
    assert drop is not None
    return Trial(expense, drop.drop, drop.verdict == OUTSIDE, len(reference.tune))


def _expense(
    task: Task, store: Store, bank: Bank, native: Candidate, candidate: Candidate, minimize: str, budget: Budget
) -> tuple[float, str]:
    """(what is minimised, why it is over a ceiling or ''), before any image is looked at."""
    cost = Cost.from_json(store.get(f"cost/{candidate}")["cost"])
    states = {str(c): State(c, task.model.preprocessing.crop_ratio) for c in (native, candidate)}
    batch = store.settings["latency_batch"]
    inputs = {name: random_batch((batch, task.channels, *bank.preprocessing_of(s).hw)) for name, s in states.items()}
    name, latency, footprint = str(candidate), None, None
    if minimize == "size" or budget.max_size_bytes:
        footprint = bank.footprint(states[name], inputs[name].shape)
        if footprint is None:
            return 0.0, "the bytes of its file are not known, as it is measured in torch"
    if minimize == "latency" or budget.max_latency_ms:
        timed = interleaved({one: bank.timed(s) for one, s in states.items()}, inputs, runs=PROBED)
        latency = timed[name]
    ways = {
        "macs": float(cost.macs),
        "memory": float(cost.peak_activation_bytes),
        "size": float(footprint.file_bytes) if footprint else 0.0,
        "latency": latency.latency_ms / timed[str(native)].latency_ms if latency else 0.0,
    }
    return ways[minimize], over_budget(None, latency, budget, footprint)
