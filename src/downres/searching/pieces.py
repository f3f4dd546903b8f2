"""A piece of a search where it runs, in a process of a Ray cluster: its task and bank, and what it does with them."""

import dataclasses
import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..engines.torch import threads_of
from ..environment import versions
from ..errors import DownresError, first_line
from ..images import Images
from ..images.chunks import Chunk, Chunked, Division
from ..measuring.latency import processor
from ..record import plain
from ..records import Candidate, Recovery
from ..recovery.bank import Bank
from ..recovery.ladder import Reference, climb
from ..recovery.state import State
from ..recovery.training import Training
from ..tasks import Task
from . import folds
from .gates import latency_gate, time_again


@dataclass(frozen=True)
class Kit:
    """What every piece of a search finds where it runs. pack: the task, in a list so that it is fetched once a process;
    options: of its bank.
    """

    name: str
    pack: list[Any]
    options: dict[str, Any]
    training: Training
    torch_threads: int
    blas_threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Done:
    """What a piece gave, or why it gave nothing. tensors: that its states put in place, by their keys; processor: that looked
    at images; refused: by the piece, as on one machine; unfit: why the node can do none.
    """

    value: Any = None
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
    processor: str = ""
    refused: str = ""
    unfit: str = ""


class _Bench:
    """The task and its bank in a process of the cluster, kept from one piece of a search to the next: what is known of one
    state is of no other, so which pieces came before changes no number.
    """

    now: "_Bench | None" = None

    def __init__(self, kit: Kit) -> None:
        import ray

        self.name = kit.name
        self.task, self.images = _unpacked(*ray.get(kit.pack[0]))
        self.folder = _own_folder()
        self.bank: Bank = self.task.bank(self.folder, **kit.options)
        self.bank.training = kit.training
        self.filled = False

    @classmethod
    def of(cls, kit: Kit) -> "_Bench":
        if cls.now is None or cls.now.name != kit.name:
            if cls.now is not None:
                shutil.rmtree(cls.now.folder, ignore_errors=True)
            cls.now = None  # its memory, before another takes some
            cls.now = cls(kit)
        return cls.now

    def fill(self, chunks: Sequence[dict[int, Any]]) -> None:
        """With what has come of the pictures."""
        for pictures, found in zip(self.images, chunks, strict=True):
            pictures.refs.update(found)
        if not self.filled:
            self.task.fill(self.bank)
            self.filled = True


def work(kit: Kit, chunks: Sequence[dict[int, Any]], tensors: Mapping[str, Any], what: str, given: dict[str, Any]) -> Done:
    """A piece of a search, in a process of the cluster: `_WORK[what]` with what is given."""
    here, found = f"The node {os.uname().nodename}", versions()
    if other := [name for name, has in kit.versions.items() if found.get(name) != has]:
        own, theirs = (", ".join(f"{name} {has.get(name, 'missing')}" for name in other) for has in (found, kit.versions))
        return Done(unfit=f"{here} has {own}, the search {theirs}: install the same on all nodes, as numbers depend on them.")
    with threads_of(kit.torch_threads), threadpool_limits({"blas": kit.blas_threads}):
        try:
            bench = _Bench.of(kit)
        except (ImportError, AttributeError) as error:
            return Done(unfit=f"{here} lacks what the search has ({first_line(error)}): install the same on all nodes.")
        try:
            bench.bank.count_anew()  # a piece that is run twice says what it said before
            for one in tensors.values():
                bench.bank.weights.put(one)
            if chunks:
                bench.fill(chunks)
            value, states = _WORK[what](bench.task, bench.bank, **given)
            return Done(value, bench.bank.weights.of(*states), "" if what in _OF_TIME else processor())
        except DownresError as error:
            return Done(refused=str(error))
        finally:
            bench.bank.release()


def _reference(task: Task, bank: Bank, index: int, rungs: tuple[str, ...]) -> tuple[Reference, Sequence[State]]:
    found = task.reference(bank, index, task.data.folds[index], rungs)
    return _travelling(found), (found.start, found.state)


def _travelling(reference: Reference) -> Reference:
    """With its evidence as arrays."""
    return dataclasses.replace(reference, evidence=None if reference.evidence is None else reference.evidence.to_arrays())


def _arrived(task: Task, reference: Reference) -> Reference:
    if reference.evidence is None:
        return reference
    return dataclasses.replace(reference, evidence=task.evidence_type.from_arrays(reference.evidence))


def _measured(
    task: Task, bank: Bank, candidate: Candidate, references: Sequence[Reference], alike: Sequence[State | None], **how: Any
) -> tuple[folds.Found, Sequence[State]]:
    found = folds.measured(task, bank, candidate, [_arrived(task, one) for one in references], alike, **how)
    return folds.Found(found.lowered.to_arrays(), found.recovered.to_arrays(), found.states, found.recoveries), found.states


def _recovered(
    task: Task, bank: Bank, candidate: Candidate, reference: Reference, **how: Any
) -> tuple[tuple[State, Recovery], Sequence[State]]:
    found = climb(task, bank, candidate, _arrived(task, reference), **how)
    return found, (found[0],)


def _shown(task: Task, bank: Bank, state: State, indices: np.ndarray) -> tuple[dict[str, np.ndarray], Sequence[State]]:
    return task.evidence(bank, state, indices).to_arrays(), ()


class _Notes:
    """As much of a Store as gates ask for: what they put is told to the search, which keeps it."""

    def __init__(self, settings: dict[str, Any], known: dict[str, Any]) -> None:
        self.settings, self.known = settings, known
        self.found: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.found.get(key, self.known.get(key))

    def put(self, key: str, value: Any) -> Any:
        self.found[key] = plain(value)
        return self.found[key]


def _gate(
    task: Task, bank: Bank, settings: dict[str, Any], known: dict[str, Any], candidates: list[Candidate], **how: Any
) -> tuple[dict[str, Any], Sequence[State]]:
    notes: Any = _Notes(settings, known)
    latency_gate(task, notes, candidates=candidates, bank=bank, progress=None, **how)
    return notes.found, ()


def _again(
    task: Task, bank: Bank, settings: dict[str, Any], known: dict[str, Any], state: State
) -> tuple[dict[str, Any], Sequence[State]]:
    notes: Any = _Notes(settings, known)
    time_again(task, notes, bank, state)
    return notes.found, ()


_WORK: dict[str, Callable[..., tuple[Any, Sequence[State]]]] = {
    "reference": _reference,
    "measured": _measured,
    "recovered": _recovered,
    "shown": _shown,
    "gate": _gate,
    "again": _again,
}
_OF_TIME = ("gate", "again")


def _own_folder() -> Path:
    """A new folder for this process; those of processes that were killed go."""
    place, mark = Path(tempfile.gettempdir()), "downres-ray"
    for left in place.glob(f"{mark}-*-*"):
        number = left.name.split("-")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mark}-{os.getpid()}-", dir=place))


class _Come(dict[int, Any]):
    """Chunks of pictures as they are in the cluster's memory."""

    def fetch(self, chunk: int) -> Chunk:
        import ray

        found: Chunk = ray.get(self[chunk])
        return found


@dataclass
class _Arriving:
    refs: dict[int, Any]
    images: Images


def _unpacked(packed: bytes, told: Sequence[tuple[Division, Any, Any, Any]]) -> tuple[Task, list[_Arriving]]:
    """The inverse of `_packed`; pictures are fetched when they are looked at."""
    arriving = []
    for division, shapes, names, checksums in told:
        refs = _Come()
        arriving.append(_Arriving(refs, Images(Chunked(division, shapes, refs.fetch), names, checksums)))

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, number: int) -> Images:
            return arriving[number].images

    task: Task = Unpacker(io.BytesIO(packed)).load()
    return task, arriving
