"""The proof in rounds: every candidate is recovered, then shown only as many proof images as its verdict needs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import DownresError
from ..measuring.sequential import Unshown, Verdict, prove
from ..records import OUTSIDE, Budget, Candidate, Recovery
from ..recovery.bank import Bank
from ..recovery.ladder import Reference, climb
from ..recovery.state import State
from ..tasks import Task
from ..tasks.dealt import can_deal
from .cluster import Cluster, Lost
from .folds import is_other_file
from .gates import time_again
from .joint import JOINT
from .prepare import Measuring
from .results import load_run, predictions_of
from .select import expense, is_measured_alone
from .store import COMPARED, ROUNDS, STOPPED, UNNEEDED, Store

MANY = 2000
"""Proof images from which on a search looks at them in rounds unless it is told otherwise: of fewer, the last round is soon
reached.
"""


def in_rounds(task: Task, store: Store, measuring: Measuring, budget: Budget, joint: int | None) -> bool:
    """Whether this run is proven in rounds, as it was begun; decided once its data are open. DownresError where it is asked for
    and cannot be, or was begun otherwise.
    """
    why = ""
    if not task.sequential:
        why = f"is of classes that are right or wrong: few images say nothing of what is rare in a {task.score.metric}"
    elif len(task.data.folds) > 1:
        why = "needs one set of proof images, there are folds of them"
    elif not can_deal(task.data):
        why = f"needs data that can be put in order, a {type(task.data).__name__} is no dataclass"
    elif budget.max_flips is not None:
        why = "judges the drop alone: leave `max_flips` out"
    elif joint is not None or store.get(JOINT) is not None:
        why = "is of candidates that are planned, not of combinations that are chosen on the way"
    if measuring.sequential and why:
        raise DownresError(f"A proof in rounds {why}; or measure with all images, sequential=False.")
    begun = store.get(ROUNDS)
    if begun is None and store.get(f"quality/{task.native}") is not None:
        begun = False
    wanted = measuring.sequential if measuring.sequential is not None else begun
    if wanted is None:
        wanted = not why and len(task.proof) >= MANY
    if begun is not None and wanted != begun:
        how = "in rounds" if begun else "on all images"
        raise DownresError(f"{store.folder} holds a run that is proven {how}: give another folder with `out`.")
    if begun is None:
        store.put(ROUNDS, wanted)
    return bool(wanted)


def measure_in_rounds(
    task: Task,
    store: Store,
    bank: Bank,
    candidates: Sequence[Candidate],
    reference: Reference,
    budget: Budget,
    rungs: tuple[str, ...],
    minimize: str,
    cluster: Cluster | None = None,
) -> None:
    """A verdict on every candidate, of which the first is the original, into the store.

    Answers are kept as they come: the same call goes on, and comes to the same verdicts.
    """
    native, *planned = candidates
    states: dict[str, State] = {str(native): reference.state}
    recoveries = {str(native): Recovery("none", reference.state.crop_ratio, 0.0)}
    if cluster is not None:
        _recover_there(task, store, bank, planned, reference, budget, rungs, cluster)
    for i, candidate in enumerate(planned):
        if store.get(f"{STOPPED}/{candidate}") is None:
            bank.stage = f"{i + 1} of {len(planned)}, "
            try:
                states[str(candidate)], recoveries[str(candidate)] = _recovered(
                    task, store, bank, candidate, reference, budget, rungs
                )
            except DownresError as error:
                refused(store, candidate, error)
            bank.release()
    bank.stage = ""
    for candidate in planned:  # decided anew
        if store.get(f"{UNNEEDED}/{candidate}"):
            store.put(f"{UNNEEDED}/{candidate}", None)
    for name, recovery in recoveries.items():
        if (tuning := recovery.tuning) is not None and tuning.verdict == OUTSIDE:
            ruled = f"ruled out on {tuning.n} tuning images (drop at least {tuning.lower:.1f} points)"
            store.put(f"{STOPPED}/{name}", ruled)
    costs = {str(r.candidate): r for r in load_run(store.folder, store).results}
    of = {str(c): c for c in candidates}
    if (names := store.get(COMPARED)) is None:  # how many they are is in every level: once for all
        names = [n for n in map(str, planned) if n in states and costs[n].status != "stopped"]
        names = store.put(COMPARED, sorted(names, key=lambda name: expense(costs[name], minimize)))
    ends = [name for name in names if not is_measured_alone(of[name])]
    looked: dict[str, Any] = {}

    def seen(name: str) -> int:
        """How many of the first proof images it was shown already."""
        place = predictions_of(task.native_state.at(of[name]))
        if name not in looked and store.has_arrays(place):
            looked[name] = task.evidence_type.from_arrays(store.arrays(place))
        return len(looked[name]) if name in looked else 0

    def ahead(undecided: Sequence[str], count: int) -> None:
        """Has the cluster look at what a look will ask for, all at once."""
        assert cluster is not None
        left = {n: seen(n) for n in (str(native), *undecided) if not store.get(f"{STOPPED}/{n}")}
        wanted = {n: (states[n], task.proof[known:count]) for n, known in left.items() if known < count}
        cluster.look(task, bank, wanted)

    def shown(name: str, count: int) -> Any:
        """Evidence on the first so many proof images. Unshown for a file that fails; others may be sound."""
        if why := store.get(f"{STOPPED}/{name}"):
            raise Unshown(why)
        known = seen(name)
        if known < count:
            bank.stage = f"{count} of {len(task.proof)} images, "
            try:
                more = None if cluster is None else cluster.seen(task, bank, name, count - known)
                if more is None:
                    more = task.evidence(bank, states[name], task.proof[known:count])
            except Lost:  # by the cluster, whatever the file is
                raise
            except DownresError as error:
                if of[name] == of[name].network:
                    raise
                raise Unshown(store.put(f"{STOPPED}/{name}", str(error).rstrip("."))) from error
            looked[name] = task.evidence_type.concatenate([looked[name], more]) if known else more
            store.put_arrays(predictions_of(task.native_state.at(of[name])), **looked[name].to_arrays())
            bank.release()
        return looked[name].select(np.arange(count))

    on_cluster = None if cluster is None else ahead
    verdicts = prove(
        names, len(task.proof), budget, lambda count: shown(str(native), count), shown, task.compare, ends, on_cluster
    )
    if cluster is not None:
        cluster.look(task, bank, {})
        cluster.note(store)
    bank.stage = ""
    if not names:
        shown(str(native), len(task.proof))
    for name in [one for one in names if not verdicts[one].failed]:
        _put(task, store, name, verdicts[name], looked, states[name], recoveries[name])
    whole = Verdict(len(looked[str(native)]), None)
    _put(task, store, str(native), whole, looked, reference.state, recoveries[str(native)])


def refused(store: Store, candidate: Candidate, error: DownresError) -> None:
    """Of a file alone what is wrong is kept, others may be sound; of a network it is raised, and so is what a cluster lost."""
    if candidate == candidate.network or isinstance(error, Lost):
        raise error
    store.put(f"{STOPPED}/{candidate}", str(error).rstrip("."))


def _known(store: Store, bank: Bank, candidate: Candidate) -> tuple[State, Recovery] | None:
    """What it was recovered to, where all of that is still there."""
    if (known := store.get(f"recovered/{candidate}")) is not None:
        state = State.from_json(known["state"])
        if all(bank.weights.has(step.tensors) for step in state.history if step.tensors):
            return state, Recovery.from_json(known["recovery"])
    return None


def _recovered(
    task: Task, store: Store, bank: Bank, candidate: Candidate, reference: Reference, budget: Budget, rungs: tuple[str, ...]
) -> tuple[State, Recovery]:
    """By the ladder, once."""
    if (known := _known(store, bank, candidate)) is not None:
        return known
    state, recovery = climb(task, bank, candidate, reference, budget, rungs, _like(store, candidate))
    _keep(task, store, bank, candidate, state, recovery, None)
    return state, recovery


def _like(store: Store, candidate: Candidate) -> State | None:
    """Of a candidate of 8 bits the state of its network in float, where that was recovered before."""
    before = store.get(f"recovered/{candidate.network}") if candidate != candidate.network else None
    return State.from_json(before["state"]) if before else None


def _keep(
    task: Task, store: Store, bank: Bank, candidate: Candidate, state: State, recovery: Recovery, cluster: Cluster | None
) -> None:
    if is_other_file(state):
        time_again(task, store, bank, state, cluster)
    store.put(f"arrays/{predictions_of(task.native_state.at(candidate))}", None)  # of whatever was there before
    store.put(f"recovered/{candidate}", {"state": state.to_json(), "recovery": recovery.to_json()})


def _recover_there(
    task: Task,
    store: Store,
    bank: Bank,
    planned: Sequence[Candidate],
    reference: Reference,
    budget: Budget,
    rungs: tuple[str, ...],
    cluster: Cluster,
) -> None:
    """What is not recovered yet, by a cluster, into the store as if it had been recovered here."""
    left = [c for c in planned if store.get(f"{STOPPED}/{c}") is None and _known(store, bank, c) is None]
    late: list[tuple[Candidate, State, Recovery]] = []
    for candidate, found in cluster.recovered(task, bank, left, reference, partial(_like, store), budget, rungs):
        if isinstance(found, DownresError):
            refused(store, candidate, found)
        elif is_other_file(found[0]):  # is timed when nothing else runs
            late.append((candidate, *found))
        else:
            _keep(task, store, bank, candidate, *found, cluster)
    for candidate, state, recovery in late:
        try:
            _keep(task, store, bank, candidate, state, recovery, cluster)
        except DownresError as error:
            refused(store, candidate, error)


def _put(
    task: Task, store: Store, name: str, verdict: Verdict, looked: dict[str, Any], state: State, recovery: Recovery
) -> None:
    if verdict.dearer_than:
        seen = f" after {verdict.images} images" if verdict.images else ""
        store.put(f"{UNNEEDED}/{name}", f"not needed{seen}: {verdict.dearer_than} is proven and cheaper")
        return
    found = {
        "quality": task.quality(looked[name].select(np.arange(verdict.images))).to_json(),
        "naive": None,
        "recovery": recovery.to_json(),
        "states": [state.to_json()],
        "proof": {"images": verdict.images, "drop": verdict.drop.to_json() if verdict.drop else None},
    }
    if store.get(f"quality/{name}") != found:
        store.put(f"quality/{name}", found)
