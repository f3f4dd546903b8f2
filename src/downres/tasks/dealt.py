"""Proof images in an order of their own, so that the first of them are a sample of all."""

import dataclasses
from typing import Any

import numpy as np

from ..images import Fold


def can_deal(data: Any) -> bool:
    """Whether there is one set of proof images, and data of a kind that can be changed in a copy."""
    return len(data.folds) == 1 and dataclasses.is_dataclass(data)


def dealt(data: Any, seed: int) -> Any:
    """The same with its proof images in an order that the seed draws."""
    (fold,) = data.folds
    test = np.random.default_rng([seed, 6]).permutation(fold.test)
    return dataclasses.replace(data, folds=(Fold(fold.train, test),))


def first(data: Any, count: int) -> Any:
    """The same with the first `count` of its proof images alone."""
    (fold,) = data.folds
    return dataclasses.replace(data, folds=(Fold(fold.train, fold.test[:count]),))
