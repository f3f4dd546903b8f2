"""The rows of families of candidates, apart from their picture: to count costs nothing is drawn."""

from dataclasses import dataclass

from ..records import Candidate, Cost, TrainingCost

ORIGINAL = "original"
"""The family of the network as it came: the first row, and the start of every line."""


@dataclass(frozen=True)
class Row:
    """One candidate with its cost, and the family that it was counted for. training: of a step, where that was asked for."""

    family: str
    candidate: Candidate
    cost: Cost
    training: TrainingCost | None = None
