"""What a network is at a moment of a search: a candidate, and what was done to its weights since it was reduced."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engines.engine import Quantization
from ..records import Candidate, Record

RECALIBRATED, REFITTED, QUANTIZED = "recalibrated", "refitted", "quantized"
"""BatchNorm statistics averaged anew on training images; the last linear layer fitted anew on its features; the file brought to
8 bits, with ranges from training images, all but that last layer.
"""
DISTILLED, FIXRES, FINETUNED, ROUNDED, SWITCHED = "distilled", "fixres", "finetuned", "rounded", "switched"
"""All weights trained: to answer as the original's; on labels, the head and the last normalisation first; on labels; to answer
as the original's while they are rounded to 8 bits; to answer as the original's at several resolutions with the same weights.
"""
TRAINED = (DISTILLED, FIXRES, FINETUNED, ROUNDED, SWITCHED)


@dataclass(frozen=True)
class Step(Record):
    """One thing done to the weights.

    done: RECALIBRATED, REFITTED, or whatever a later rung or precision calls itself. fold: on whose training images; images:
    how many of them. tensors: the key in `Weights` of the tensors that it put in place ('' where it is done again, by name,
    each time the network is made). how: of QUANTIZED, whose fold is that of `Bank.ranged`.
    """

    done: str
    fold: int | None = None
    images: int = 0
    tensors: str = ""
    how: Quantization | None = None

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        return values if self.how else {name: value for name, value in values.items() if name != "how"}


def like_most(state: "State", others: Sequence["State"]) -> "State":
    """The state with its 8-bit file, if it has one, made as most of the others' are."""
    hows = [made.how for one in others if (made := one.step(QUANTIZED)) is not None and made.how is not None]
    return state.quantized_as(Counter(hows).most_common(1)[0][0]) if hows else state


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
        """The same after one more step. What is done to weights in float comes before the file of 8 bits is made of them."""
        if step.done in (RECALIBRATED, *TRAINED) and (made := self.step(QUANTIZED)) is not None:
            return self.without(QUANTIZED).then(step).then(made)
        return dataclasses.replace(self, history=(*self.history, step))

    def quantized_as(self, how: Quantization) -> "State":
        """The same with its 8-bit file made otherwise."""
        steps = tuple(dataclasses.replace(step, how=how) if step.how else step for step in self.history)
        return dataclasses.replace(self, history=steps)

    @property
    def network(self) -> "State":
        """Its network in torch, whatever file that becomes."""
        return dataclasses.replace(self.without(QUANTIZED), candidate=self.candidate.network)

    def without(self, done: str) -> "State":
        """The same without the steps of that name: of a refitted head its backbone."""
        return dataclasses.replace(self, history=tuple(step for step in self.history if step.done != done))

    def step(self, done: str) -> Step | None:
        """The last step of that name, or None."""
        return next((step for step in reversed(self.history) if step.done == done), None)

    @property
    def trained(self) -> Step | None:
        """The step that trained its weights, or None: there is one at most, as each starts from what is there."""
        return next((step for step in reversed(self.history) if step.done in TRAINED), None)
