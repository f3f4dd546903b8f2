"""Distillation: a network at fewer pixels learns to answer as the original does at its own, from photographs without labels
(Hinton et al. 2015, arXiv 1503.02531; of resolutions, Wang et al. 2020, arXiv 2007.09587).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..copying import copied
from .bank import Bank
from .state import DISTILLED, State
from .trainer import Lesson
from .views import Views, pixels_of

KEPT_BYTES = 2**31
"""Of the original's answers in memory; of more each is computed whenever it is needed."""


class Distillation(Lesson):
    """The student sees the state's pixels, the original its own resolution of the same part, mirrored alike: no labels.

    teacher: the original as it is compared with. Each of its answers is computed once and kept as long as they fit, unless
    every epoch shows other parts of the images. Nobody knows what it answers to a mixture: images are not mixed.
    """

    rung: ClassVar = "distill"
    done: ClassVar = DISTILLED
    doing: ClassVar = "distilling"

    def __init__(self, task: Any, bank: Bank, state: State, teacher: State, images: np.ndarray) -> None:
        super().__init__(task)
        self.bank, self.original = bank, teacher
        self.teacher = dataclasses.replace(teacher, crop_ratio=state.crop_ratio)
        network, device = bank.network(self.teacher), bank.team.device
        self.network = network if device.type == "cpu" else copied(network).to(device)  # it may be the user's own
        self.at = {int(i): k for k, i in enumerate(images)}
        self.known = np.zeros((2, len(images)), bool)
        self.values: Tensor | None = None

    def asked(self) -> Any:
        return self.teacher.to_json()

    def loss(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.task.mismatch(self.task.matched(network, x), targets)
        return found

    def told(self) -> str:
        return "without labels"

    def targets(self, views: Views) -> Tensor:
        if views.parts is not None:
            return self._look(views)
        at, rows = np.array([self.at[int(i)] for i in views.images], np.int64), views.mirrored.astype(int)
        todo = np.flatnonzero(~self.known[rows, at])
        if len(todo):
            found = self._look(Views(views.images[todo], views.mirrored[todo]))
            if self.values is None and 2 * len(self.at) * found[0].nbytes <= KEPT_BYTES:
                self.values = torch.zeros(2, len(self.at), *found.shape[1:])
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
        source = pixels_of(self.bank.images, views, self.bank.preprocessing_of(self.teacher), self.bank.batch_size)
        with torch.inference_mode():
            parts = [self.task.matched(self.network, x.to(self.bank.team.device)).float().cpu() for x in source]
        return torch.cat(parts).clone()  # out here, so that a loss may keep it
