"""What a network is at a moment of a search: a candidate, and what was done to its weights since it was reduced."""

import dataclasses
import hashlib
from dataclasses import dataclass

from ..records import Candidate, Record

RECALIBRATED, REFITTED = "recalibrated", "refitted"
"""BatchNorm statistics averaged anew on training images; the last linear layer fitted anew on its features."""


@dataclass(frozen=True)
class Step(Record):
    """One thing done to the weights.

    done: RECALIBRATED, REFITTED, or whatever a later rung or precision calls itself. fold: on whose training images; images:
    how many of them. tensors: the key in `Weights` of the tensors that it put in place ('' where it is done again, by name,
    each time the network is made).
    """

    done: str
    fold: int | None = None
    images: int = 0
    tensors: str = ""


@dataclass(frozen=True)
class State(Record):
    """One network and the pixels it gets: what its answers depend on. history: what was done to the weights, in order."""

    candidate: Candidate
    crop_ratio: float
    history: tuple[Step, ...] = ()

    def key(self) -> str:
        """A file name: readable, and unique by a hash of everything in it."""
        digest = hashlib.sha256(repr(self.to_json()).encode()).hexdigest()[:8]
        return f"{str(self.candidate).replace(' ', '_').replace('×', '')}-{digest}".replace("/", "_")

    def at(self, candidate: Candidate) -> "State":
        """The same steps on another candidate."""
        return dataclasses.replace(self, candidate=candidate)

    def then(self, step: Step) -> "State":
        """The same after one more step."""
        return dataclasses.replace(self, history=(*self.history, step))

    def without(self, done: str) -> "State":
        """The same without the steps of that name: of a refitted head its backbone."""
        return dataclasses.replace(self, history=tuple(step for step in self.history if step.done != done))

    def step(self, done: str) -> Step | None:
        """The last step of that name, or None."""
        return next((step for step in reversed(self.history) if step.done == done), None)
