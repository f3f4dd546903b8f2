"""Distillation: a network at fewer pixels learns to answer as the original does at its own, from photographs without labels
(Hinton et al. 2015, arXiv 1503.02531; of resolutions, Wang et al. 2020, arXiv 2007.09587).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .bank import Bank
from .state import DISTILLED, State
from .views import Views, pixels_of

KEPT_BYTES = 2**31
"""Of the original's answers in memory; of more each is computed whenever it is needed."""


class Matching(Protocol):
    """What is asked of a task; see `tasks.Task`."""

    def matched(self, network: nn.Module, x: Tensor) -> Tensor: ...
    def mismatch(self, ours: Tensor, theirs: Tensor) -> Tensor: ...


class Distillation:
    """The student sees the state's pixels, the original its own resolution of the same crop, mirrored alike: no labels.

    teacher: the original as it is compared with. Each of its answers is computed once and kept as long as they fit, unless
    every epoch shows other parts of the images.
    """

    rung: ClassVar = "distill"
    done: ClassVar = DISTILLED
    doing: ClassVar = "distilling"

    def __init__(self, task: Matching, bank: Bank, state: State, teacher: State, images: np.ndarray) -> None:
        self.task, self.bank, self.images = task, bank, images
        self.original = teacher
        self.teacher = dataclasses.replace(teacher, crop_ratio=state.crop_ratio)
        self.network = bank.network(self.teacher)
        self.at = {int(i): k for k, i in enumerate(images)}
        self.known = np.zeros((2, len(images)), bool)
        self.values: Tensor | None = None

    def asked(self) -> Any:
        return self.teacher.to_json()

    def begin(self, network: nn.Module) -> None:
        pass

    def end(self, network: nn.Module) -> None:
        pass

    def frozen(self, network: nn.Module, part: float) -> Sequence[nn.Parameter]:
        return ()

    def mixed(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return x, targets  # nobody knows what the original answers to a mixture

    def loss(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        return self.task.mismatch(self.task.matched(network, x), targets)

    def told(self) -> str:
        return "without labels"

    def targets(self, views: Views) -> Tensor:
        """The original's answers, (b, …)."""
        if views.parts is not None:
            return self._look(views)
        at, rows = np.array([self.at[int(i)] for i in views.images], np.int64), views.mirrored.astype(int)
        todo = np.flatnonzero(~self.known[rows, at])
        if len(todo):
            found = self._look(Views(views.images[todo], views.mirrored[todo]))
            if self.values is None and 2 * len(self.images) * found[0].nbytes <= KEPT_BYTES:
                self.values = torch.zeros(2, len(self.images), *found.shape[1:])
            if self.values is None:
                return found  # too large to be kept: all of them are always to do
            self.values[rows[todo], at[todo]] = found
            self.known[rows[todo], at[todo]] = True
        assert self.values is not None
        return self.values[rows, at]

    def looked(self, epochs: Sequence[Views]) -> int:
        if self.values is None:
            return sum(map(len, epochs))
        return len(np.unique(np.concatenate([2 * views.images + views.mirrored for views in epochs])))

    def _look(self, views: Views) -> Tensor:
        assert self.bank.images is not None
        device = self.bank.team.device
        self.network.to(device)
        with torch.inference_mode():
            source = pixels_of(self.bank.images, views, self.bank.preprocessing_of(self.teacher), self.bank.batch_size)
            found = torch.cat([self.task.matched(self.network, x.to(device)).float().cpu() for x in source]).clone()
        return found
