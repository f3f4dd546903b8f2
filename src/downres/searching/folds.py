"""One candidate on the proof images of every fold: what it depends on is in its arguments, wherever it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Budget, Candidate, Recovery
from ..recovery.bank import Bank
from ..recovery.ladder import Reference, climb
from ..recovery.state import State
from ..tasks import Task


@dataclass(frozen=True)
class Found:
    """Evidence on the proof images of all folds, lowered only and recovered; of each fold the state and how it came about."""

    lowered: Any
    recovered: Any
    states: tuple[State, ...]
    recoveries: tuple[Recovery, ...]

    @property
    def timed_again(self) -> State | None:
        """A state whose file is another one than was timed before."""
        return next((state for state in self.states if is_other_file(state)), None)


def is_other_file(state: State) -> bool:
    """Whether it has layers in float, as what was timed has not."""
    return any(step.how and step.how.kept for step in state.history)


def measured(
    task: Task,
    bank: Bank,
    candidate: Candidate,
    references: Sequence[Reference],
    alike: Sequence[State | None],
    budget: Budget,
    rungs: tuple[str, ...],
) -> Found:
    """alike: of a candidate of 8 bits the states of its network in float, where these were measured."""
    lowered, recovered, states, recoveries = [], [], [], []
    for reference, like in zip(references, alike, strict=True):
        bare = bank.started(reference.state, candidate, reference.index)
        lowered.append(task.evidence(bank, bare, reference.fold.test))
        if candidate == task.native:
            state, recovery = bare, Recovery("none", bare.crop_ratio, 0.0)
        else:
            state, recovery = climb(task, bank, candidate, reference, budget, rungs, like)
        recovered.append(lowered[-1] if state == bare else task.evidence(bank, state, reference.fold.test))
        states.append(state)
        recoveries.append(recovery)
    before, after = (task.evidence_type.concatenate(parts) for parts in (lowered, recovered))
    return Found(before, after, tuple(states), tuple(recoveries))
