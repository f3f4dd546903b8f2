"""How a rung trains."""

import math
from dataclasses import dataclass

from ..errors import DownresError
from ..records import Record


@dataclass(frozen=True)
class Training(Record):
    """How a training rung trains: AdamW, warmed up and then lowered along a cosine, images mirrored at random.

    epochs: passes over the training images, as many as `max_minutes` allow. learning_rate: the highest. clip: of the
    gradient's norm.
    """

    epochs: int = 20
    training_batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    clip: float = 1.0
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "training_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
                raise DownresError(f"`{name}` is a whole number from 1 to 100000, {value!r} is not: give for example 20.")
        for name in ("learning_rate", "clip", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DownresError(f"`{name}` is a number above 0, {value!r} is not: leave it out for the default.")
        if not 0 <= self.weight_decay < math.inf:
            raise DownresError(f"`weight_decay` is a number from 0 on, {self.weight_decay!r} is not: give for example 0.01.")
        if not 0 <= self.warmup <= 1:
            raise DownresError(f"`warmup` is a part from 0 to 1 of all steps, {self.warmup!r} is not: give for example 0.1.")
