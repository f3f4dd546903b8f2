"""Many machines: the pieces of a search that depend on nothing but their arguments run as tasks of a Ray cluster.

The search itself stays in one process, with the run's folder: it plans, times, decides, and puts what comes back into the
folder as it would put what it had measured itself. So a piece that runs twice, because the node of the first died, changes
nothing.
"""

import contextlib
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

from ..engines import check_threads
from ..engines.engine import engine_of
from ..environment import versions
from ..errors import DownresError, first_line
from ..images import Images
from ..images.chunks import Chunk, Division
from ..records import Budget, Candidate, Recovery
from ..recovery.bank import Bank
from ..recovery.ladder import TAUGHT, Reference
from ..recovery.state import State
from ..reports import words
from ..tasks import Task
from . import folds
from .pieces import Kit, work
from .prepare import Measuring
from .store import IN_TORCH, KINDS

LOCAL = "local"
"""The address of a cluster that is this machine alone, and ends with the search."""
RETRIES = 3
"""Of a piece whose node or process died."""


class Cluster:
    """A Ray cluster that this process is part of. latency_node: what a node is called that time is measured on; None: here.

    Raises DownresError where there is no Ray, no such cluster, or no such node in it.
    """

    def __init__(self, address: str, latency_node: str | None = None) -> None:
        self._ray = _ray(address)
        self._own = not self._ray.is_initialized()
        if self._own:
            _connect(self._ray, address)
        self._named = latency_node
        self._running: dict[Any, str] = {}
        self._looking: dict[tuple[str, int], Any] = {}
        self._packed: _Pack | None = None
        self._kinds: set[str] = set()
        self._work = self._ray.remote(work)
        try:
            self.node = _node(self._ray, latency_node) if latency_node is not None else None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what runs for this search, and the cluster where this search has begun it."""
        for ref in (*self._running, *self._looking.values()):
            with contextlib.suppress(Exception):  # of a cluster that is gone
                self._ray.cancel(ref, force=True)
        self._running, self._looking = {}, {}
        self._packed = None
        if self._own:
            self._ray.shutdown()

    # What a search asks for

    def references(self, task: Task, bank: Bank, rungs: tuple[str, ...]) -> list[Reference]:
        """The original in every fold."""
        found: dict[str, Reference] = {}

        def asked(name: str) -> tuple[str, dict[str, Any], Sequence[State]]:
            return "reference", {"index": int(name), "rungs": rungs}, ()

        for name, value in self._each(
            task, bank, list(map(str, range(len(task.data.folds)))), {}, asked, rungs, "the original"
        ):
            if isinstance(value, DownresError):
                raise value
            found[name] = value
        return [found[str(i)] for i in range(len(found))]

    def measured(
        self,
        task: Task,
        bank: Bank,
        candidates: Sequence[Candidate],
        references: Sequence[Reference],
        alike: Callable[[Candidate], Sequence[State | None]],
        budget: Budget,
        rungs: tuple[str, ...],
    ) -> Iterator[tuple[Candidate, "folds.Found | DownresError"]]:
        """Candidates as they come, each with what was found or why nothing was. alike: asked once what comes before is kept."""

        def asked(name: str) -> tuple[str, dict[str, Any], Sequence[State]]:
            before = alike(of[name])
            given = {"references": list(references), "alike": list(before), "budget": budget, "rungs": rungs}
            used = [*(r.start for r in references), *(r.state for r in references), *(s for s in before if s is not None)]
            return "measured", {"candidate": of[name], **given}, used

        of = {str(c): c for c in candidates}
        for name, value in self._each(task, bank, list(of), _before(candidates), asked, rungs, "candidates"):
            if isinstance(value, folds.Found):
                before, after = (task.evidence_type.from_arrays(part) for part in (value.lowered, value.recovered))
                value = folds.Found(before, after, value.states, value.recoveries)
            yield of[name], value

    def recovered(
        self,
        task: Task,
        bank: Bank,
        candidates: Sequence[Candidate],
        reference: Reference,
        alike: Callable[[Candidate], State | None],
        budget: Budget,
        rungs: tuple[str, ...],
    ) -> Iterator[tuple[Candidate, "tuple[State, Recovery] | DownresError"]]:
        """The same of candidates that are recovered alone, once."""

        def asked(name: str) -> tuple[str, dict[str, Any], Sequence[State]]:
            like = alike(of[name])
            given = {"reference": reference, "like": like, "budget": budget, "rungs": rungs}
            used = [reference.start, reference.state, *([like] if like is not None else [])]
            return "recovered", {"candidate": of[name], **given}, used

        of = {str(c): c for c in candidates}
        for name, value in self._each(task, bank, list(of), _before(candidates), asked, rungs, "candidates"):
            yield of[name], value

    def look(self, task: Task, bank: Bank, wanted: Mapping[str, tuple[State, np.ndarray]]) -> None:
        """Begins to look, with each state at its images; what is not `seen` by the next call is not wanted any more."""
        for ref in self._looking.values():
            self._ray.cancel(ref)
        self._looking = {}
        for name, (state, indices) in wanted.items():
            given = {"state": state, "indices": indices}
            ref = self._begin(task, bank, "shown", given, [state], (), indices)
            self._looking[name, len(indices)] = ref

    def seen(self, task: Task, bank: Bank, name: str, count: int) -> Any:
        """Evidence on the `count` images that `look` was asked to look at; None where it was not."""
        ref = self._looking.get((name, count))
        if ref is None:
            return None
        arrays = self._end(bank, ref, name)
        del self._looking[name, count]
        return task.evidence_type.from_arrays(arrays)

    def timed(
        self, task: Task, store: Any, bank: Bank, budget: Budget, candidates: Sequence[Candidate], measuring: Measuring
    ) -> None:
        """What `latency_gate` measures, on the node that was named, into the store."""
        given = {"candidates": list(candidates), "budget": budget, "measuring": measuring, **_of(store)}
        self._on_node(task, store, bank, "gate", given, ())

    def timed_again(self, task: Task, store: Any, bank: Bank, state: State) -> None:
        """What `time_again` measures, on the node that was named, into the store."""
        self._on_node(task, store, bank, "again", {"state": state, **_of(store)}, [state])

    def note(self, store: Any) -> None:
        """Keeps what kinds of processors measured, where there are several."""
        kinds = sorted({*(store.get(KINDS) or ()), *self._kinds})
        if len(kinds) > 1 and kinds != store.get(KINDS):
            store.put(KINDS, kinds)

    # How a piece travels

    def _each(
        self,
        task: Task,
        bank: Bank,
        names: list[str],
        after: Mapping[str, str],
        asked: Callable[[str], tuple[str, dict[str, Any], Sequence[State]]],
        rungs: tuple[str, ...],
        stage: str,
    ) -> Iterator[tuple[str, Any]]:
        """Results as they come. after: what must have come before; asked: the piece, once that has."""
        waiting, done = list(names), 0
        told = f"{stage} on {words.count(len(_alive(self._ray)), 'node')}"
        while waiting or self._running:
            pending = {*waiting, *self._running.values()}
            for name in [name for name in waiting if after.get(name) not in pending]:
                self._running[self._begin(task, bank, *asked(name), rungs)] = name
                waiting.remove(name)
            if bank.progress:
                bank.progress(told, done, len(names))
            (ref,), _ = self._ray.wait(list(self._running), num_returns=1)
            name = self._running[ref]
            try:
                value = self._end(bank, ref, name)
            except Lost:
                raise
            except DownresError as error:
                value = error
            del self._running[ref]
            done += 1
            yield name, value
        if bank.progress:
            bank.progress(told, done, len(names))

    def _begin(
        self,
        task: Task,
        bank: Bank,
        what: str,
        given: dict[str, Any],
        states: Sequence[State],
        rungs: Sequence[str] = (),
        indices: np.ndarray | None = None,
    ) -> Any:
        kit = self._kit(task, bank, False)
        count = len(task.data.images)
        if type(task).fill is not Task.fill:  # a task of answers of the original looks at more than it is asked to
            indices = None
        chunks = [one.refs(indices if len(one) == count else None) for one in self._pack(task).sent]
        piece = self._work.options(max_retries=RETRIES, **self._needs(bank, rungs))
        return piece.remote(kit, chunks, bank.weights.of(*states), what, given)

    def _on_node(self, task: Task, store: Any, bank: Bank, what: str, given: dict[str, Any], states: Sequence[State]) -> None:
        """Nothing else of this search runs meanwhile, and nothing of others on the node: it is taken whole."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assert self.node is not None
        kit = self._kit(task, bank, True)
        chunks = [one.refs(None) for one in self._pack(task).sent] if what == "again" else []
        here = NodeAffinitySchedulingStrategy(self.node["NodeID"], soft=False)
        cores = self.node["Resources"].get("CPU", 0)
        piece = self._work.options(max_retries=RETRIES, num_cpus=cores, scheduling_strategy=here)
        ref = piece.remote(kit, chunks, bank.weights.of(*states), what, given)
        self._running[ref] = what
        found = self._end(bank, ref, f"latency on {self._named}")
        del self._running[ref]
        for key, value in found.items():
            store.put(key, value)

    def _end(self, bank: Bank, ref: Any, name: str) -> Any:
        """What a piece gave; the tensors that it names are kept. Raises the DownresError that it ended with."""
        errors = self._ray.exceptions
        try:
            done = self._ray.get(ref)
        except errors.RayTaskError as error:  # what one machine would have failed with
            raise error.as_instanceof_cause() from None
        except errors.RayError as error:
            raise Lost(
                f"The work on {name} was lost on the cluster, {RETRIES} times begun anew ({first_line(error)[:200]}): look at "
                "its nodes; the same command goes on where it was."
            ) from None
        if done.unfit:
            raise Lost(done.unfit)
        if done.refused:
            raise DownresError(done.refused)
        self._kinds |= {done.processor} - {""}
        for tensors in done.tensors.values():
            bank.weights.put(tensors)
        return done.value

    def _needs(self, bank: Bank, rungs: Sequence[str]) -> dict[str, Any]:
        """What a piece takes of a node: the threads that it computes with, and a GPU where it trains or runs on one."""
        most = max((node["Resources"].get("CPU", 0) for node in _alive(self._ray)), default=0)
        threads = check_threads(bank.threads)
        on_gpu = any(rung in TAUGHT for rung in rungs) or engine_of(bank.runtime_name).device not in ("cpu", "compile")
        gpus = 1 if on_gpu and self._ray.cluster_resources().get("GPU", 0) >= 1 else 0
        return {"num_cpus": min(threads, most) if most else threads, "num_gpus": gpus}

    def _pack(self, task: Task) -> "_Pack":
        """The task with its network and data, put where every node gets it once."""
        if self._packed is None or self._packed.data is not task._data:
            packed, images = _packed(task)
            divisions = [_division(task, one) for one in images]
            told = [(d, one.shapes, one.names, one.checksums) for d, one in zip(divisions, images, strict=True)]
            sent = [_Sent(self._ray, *both) for both in zip(images, divisions, strict=True)]
            self._packed = _Pack(task._data, uuid.uuid4().hex, self._ray.put((packed, told)), sent)
        return self._packed

    def _kit(self, task: Task, bank: Bank, timed: bool) -> "Kit":
        pack = self._pack(task)
        # The node that is named has all its cores; elsewhere sums are those of as many threads as here.
        threads = bank.threads if timed else check_threads(bank.threads)
        options = {"runtime": bank.runtime_name, "threads": threads, "batch_size": bank.batch_size}
        name = f"{pack.name} {options}"
        return Kit(name, [pack.ref], options, bank.training, torch.get_num_threads(), _blas_threads(), versions())


class Lost(DownresError):
    """A piece that the cluster could not finish, whatever is in it."""


@dataclass
class _Pack:
    """A task in the cluster's memory. data: that it had then; sent: its pictures, as far as they were asked for."""

    data: Any
    name: str
    ref: Any
    sent: list["_Sent"]


class _Sent:
    """Pictures that go to the nodes, chunk by chunk, each put into the cluster's memory when it is first needed: a node that
    looks at it fetches it once.
    """

    def __init__(self, ray: ModuleType, images: Images, division: Division) -> None:
        self._ray, self._images, self._division = ray, images, division
        self._refs: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._images)

    def refs(self, indices: np.ndarray | None) -> dict[int, Any]:
        """Of the chunks that have these pictures; None: all."""
        if not len(self._images):
            return {}
        every = np.arange(len(self._images)) if indices is None else indices
        for chunk in self._division.chunks(every):
            if chunk not in self._refs:
                pictures = [self._images[int(i)] for i in self._division.inside(chunk)]
                self._refs[chunk] = self._ray.put(Chunk.of(pictures))
        return {chunk: self._refs[chunk] for chunk in self._division.chunks(every)}


def _division(task: Task, images: Images) -> Division:
    """What is looked at together is beside each other: proof images in their order, then the others."""
    order = np.arange(len(images))
    if len(images) == len(task.data.images):
        order = np.concatenate([task.proof, np.setdiff1d(order, task.proof)])
    return Division.of(images, order)


def _packed(task: Task) -> tuple[bytes, list[Images]]:
    """The task pickled, its pictures apart. Classes that no other process could import go with it."""
    from ray import cloudpickle

    found: list[Images] = []

    class Packer(cloudpickle.CloudPickler):  # type: ignore[misc]  # it has no types
        def persistent_id(self, one: Any) -> int | None:
            if not isinstance(one, Images):
                return None
            if not any(one is known for known in found):
                found.append(one)
            return next(i for i, known in enumerate(found) if known is one)

        def reducer_override(self, one: Any) -> Any:
            if isinstance(one, ModuleType) and type(one) is not ModuleType:  # torch.ops, torch.classes
                return import_module, (one.__name__,)
            return super().reducer_override(one)

    file, own = io.BytesIO(), _own_modules()
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        Packer(file, protocol=5).dump(task)
    except Exception as error:  # whatever a network, or data of one's own, fails with
        raise DownresError(
            f"The {type(task.model.module).__name__} and its data cannot be sent to other machines ({first_line(error)[:200]})"
            ": search without `ray`."
        ) from None
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
    return file.getvalue(), found


def _own_modules() -> list[ModuleType]:
    """Those of the user's own files, run or imported from the folder where the search was started: other machines lack them."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    lacking = {"", os.getcwd(), *([os.path.dirname(os.path.abspath(script))] if script else [])}
    paths = [path for path in sys.path if path not in lacking]
    found = []
    for name, module in list(sys.modules.items()):
        is_python = str(getattr(module, "__file__", None)).endswith(".py")
        if is_python and "." not in name and name not in ("__main__", __package__.partition(".")[0]):
            others = (finder for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_spec"))
            if PathFinder.find_spec(name, paths) is None and all(finder.find_spec(name, None) is None for finder in others):
                found.append(module)
    return found


def _blas_threads() -> int:
    return max((one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"), default=1)


def _ray(address: str) -> ModuleType:
    if address.startswith("ray://"):
        raise DownresError(
            f"A search is part of its cluster, {address} is for clients from outside: run it on a node, with `ray='auto'`."
        )
    try:
        import ray
    except ImportError:
        raise DownresError(
            "A cluster needs Ray, which is not installed: pip install 'downres[ray]', or leave `ray` out."
        ) from None
    found: ModuleType = ray
    return found


def _connect(ray: ModuleType, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless the user wants it
    own = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise DownresError(
            f"No Ray cluster answers at {address!r} ({first_line(error)[:200]}): start one with 'ray start --head', or give "
            "'local' for one of this machine alone."
        ) from None


def _alive(ray: ModuleType) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _node(ray: ModuleType, name: str) -> dict[str, Any]:
    """The node of that name, address or id, or one of those that have a resource of that name."""
    known = ("NodeID", "NodeName", "NodeManagerHostname", "NodeManagerAddress")
    nodes = sorted(_alive(ray), key=lambda node: str(node["NodeID"]))
    found = [node for node in nodes if name in (node.get(key) for key in known) or name in node["Resources"]]
    if not found:
        there = ", ".join(sorted({str(node["NodeManagerHostname"]) for node in nodes}))
        raise DownresError(
            f"The cluster has no node {name!r}, nor one with a resource of that name: it has {there}; 'ray list nodes' tells "
            "more."
        )
    return found[0]


def _before(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Of each candidate of a file its network, where that comes before it: it starts from what that came to."""
    names = [str(c) for c in candidates]
    network = {str(c): str(c.network) for c in candidates if c != c.network}
    return {one: other for one, other in network.items() if other in names[: names.index(one)]}


def _of(store: Any) -> dict[str, Any]:
    """As much of a run as gates ask for."""
    known = {IN_TORCH: store.get(IN_TORCH)}
    settings = {name: store.settings[name] for name in ("minimize", "latency_batch")}
    return {"settings": settings, "known": known}
