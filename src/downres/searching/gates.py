"""What is known of a candidate before any image is looked at: costs and time, and who is stopped by them."""

from typing import TYPE_CHECKING, Any

from ..engines.onnxruntime import NotExported
from ..errors import DownresError
from ..measuring.cost import measure_cost
from ..measuring.latency import interleaved, random_batch
from ..records import Budget, Candidate, Cost, Footprint, Latency
from ..recovery.bank import Bank
from ..recovery.state import State
from ..tasks import Task
from .prepare import Measuring, Progress
from .select import over_budget, slower_twin
from .store import IN_TORCH, UNEXPORTED, Store

if TYPE_CHECKING:
    from .cluster import Cluster


def time_again(task: Task, store: Store, bank: Bank, state: State, cluster: "Cluster | None" = None) -> None:
    """A file with layers in float is another one than what was timed before: it is timed once more, beside the original.

    cluster: times it where that has a node for it.
    """
    if cluster is not None and cluster.node is not None:
        cluster.timed_again(task, store, bank, state)
        return
    batch = store.settings["latency_batch"]
    states = {str(task.native): task.native_state, str(state.candidate): state}
    inputs = {name: random_batch((batch, task.channels, *bank.preprocessing_of(s).hw)) for name, s in states.items()}
    found = interleaved({name: bank.timed(s) for name, s in states.items()}, inputs)[str(state.candidate)]
    store.put(f"latency/{state.candidate}", found.to_json())
    if (size := bank.footprint(state, inputs[str(state.candidate)].shape)) is not None:
        store.put(f"footprint/{state.candidate}", size.to_json())


def cost_gate(
    subject: Task, store: Store, budget: Budget, candidates: list[Candidate], bank: Bank, progress: Progress | None
) -> list[Candidate]:
    """Candidates within the ceilings by cost; the first (the original) always stays. Touches no data."""
    alive: list[Candidate] = []
    known: dict[Candidate, dict[str, Any]] = {}
    for i, candidate in enumerate(candidates):
        state = State(candidate, 1.0)
        if (same := known.get(candidate.network)) is not None and store.get(f"cost/{candidate}") is None:
            store.put(f"cost/{candidate}", same)  # another file of the same network
        if store.get(f"cost/{candidate}") is None:
            size = (subject.channels, *bank.preprocessing_of(state).hw)
            value: dict[str, Any]
            try:
                value = {"cost": measure_cost(subject.counted(bank.network(state)), size).to_json()}
            except DownresError as error:
                if i == 0:
                    raise
                value = {"failed": str(error)}
            store.put(f"cost/{candidate}", value)
        known[candidate.network] = found = store.get(f"cost/{candidate}")
        cost = Cost.from_json(found["cost"]) if "cost" in found else None
        if i == 0 or (cost is not None and not over_budget(cost, None, budget)):
            alive.append(candidate)
        if progress:
            progress("counting costs", i + 1, len(candidates))
    return alive


def latency_gate(
    subject: Task,
    store: Store,
    budget: Budget,
    candidates: list[Candidate],
    bank: Bank,
    measuring: Measuring,
    progress: Progress | None,
    cluster: "Cluster | None" = None,
) -> list[Candidate]:
    """Measures all together, interleaved; stops those over the latency ceiling, and those that cannot be exported. Touches no
    data: noise has no shortcuts. cluster: measures them where that has a node for it.

    Where nobody chose the runtime and the original cannot be exported all are measured in torch.
    """
    may_change = measuring.runtime is None
    if (why := store.get(IN_TORCH)) is not None:
        if not may_change:
            raise NotExported(why)
        bank.runtime_name = "torch"
    if cluster is not None and cluster.node is not None and not _all_timed(store, candidates, bank.runtime_name):
        cluster.timed(subject, store, bank, budget, candidates, measuring)
        if store.get(IN_TORCH) is not None:
            bank.runtime_name = "torch"
    if not _all_timed(store, candidates, bank.runtime_name):
        runtimes, inputs, unexported, sizes = {}, {}, {}, {}
        for i, candidate in enumerate(candidates):
            state = State(candidate, subject.model.preprocessing.crop_ratio)
            shape = (measuring.latency_batch, subject.channels, *bank.preprocessing_of(state).hw)
            batch = inputs[str(candidate)] = random_batch(shape)
            try:
                runtimes[str(candidate)] = ready = bank.timed(state)
                ready(batch)  # whether it runs at all
            except DownresError as error:
                runtimes.pop(str(candidate), None)
                why = (
                    f"could not be exported to ONNX: {error.why}" if isinstance(error, NotExported) else str(error).rstrip(".")
                )
                if i > 0:
                    unexported[str(candidate)] = why
                    continue
                if not isinstance(error, NotExported) or not may_change:
                    raise
                store.put(IN_TORCH, error.why)
                bank.runtime_name = "torch"
                runtimes[str(candidate)] = bank.timed(state)
            if (found := bank.footprint(state, shape)) is not None:
                sizes[str(candidate)] = found.to_json()
            if progress:
                progress("making runnable models", i + 1, len(candidates))
        measured = interleaved(runtimes, inputs, progress=progress)
        store.put(UNEXPORTED, unexported)
        store.put("footprint", sizes)
        store.put("latency", {name: latency.to_json() for name, latency in measured.items()})
        bank.release()
    latencies = {name: Latency.from_json(value) for name, value in store.get("latency").items()}
    timed = [c for c in candidates if str(c) in latencies]
    taken = {name: Footprint.from_json(value) for name, value in (store.get("footprint") or {}).items()}
    return [
        c
        for i, c in enumerate(timed)
        if i == 0
        or not over_budget(None, latencies[str(c)], budget, taken.get(str(c)))
        and not slower_twin(c, latencies, store.settings["minimize"])
    ]


def _all_timed(store: Store, candidates: list[Candidate], runtime: str) -> bool:
    """Whether it is known of each how long it takes in that runtime, or why it does not run there."""
    timed, unexported = store.get("latency") or {}, store.get(UNEXPORTED) or {}
    if any(timed[str(c)]["runtime"] != (c.runtime or runtime) for c in candidates if str(c) in timed):
        return False
    return bool(timed) and all(str(c) in timed or str(c) in unexported for c in candidates)
