"""Distillation: a network at fewer pixels learns to answer as the original does at its own, from photographs without labels
(Hinton et al. 2015, arXiv 1503.02531; of resolutions, Wang et al. 2020, arXiv 2007.09587).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..copying import copied
from .bank import Bank
from .finetune import last_layers
from .state import DISTILLED, State
from .trainer import Lesson
from .training import TrainingFailed
from .views import Views, pixels_of

KEPT_BYTES = 2**31
"""Of the original's answers in memory; of more each is computed whenever it is needed."""


class Distillation(Lesson):
    """The student sees the state's pixels, the original its own resolution of the same part, mirrored alike: no labels.

    teacher: the original as it is compared with. Each of its answers is computed once and kept as long as they fit, unless
    every epoch shows other parts of the images. Nobody knows what it answers to a mixture: images are not mixed.
    Where `Training.features` asks for it, what the last layer gets of an image is matched beside the answer, a row each (of
    maps and tokens their mean): a target is then the answer with those features behind it, (b, K + F).
    """

    alike: ClassVar[bool] = True  # student and teacher have one last layer each
    features: float = 0.0

    rung: ClassVar = "distill"
    done: ClassVar = DISTILLED
    doing: ClassVar = "distilling"

    def __init__(self, task: Any, bank: Bank, state: State, teacher: State, images: np.ndarray) -> None:
        super().__init__(task)
        self.bank, self.original, self.state = bank, teacher, state
        self.teacher = dataclasses.replace(teacher, crop_ratio=state.crop_ratio)
        network, device = bank.network(self.teacher), bank.team.device
        self.network = network if device.type == "cpu" else copied(network).to(device)  # it may be the user's own
        self.features = bank.training.features
        if self.features and not self.alike:
            raise TrainingFailed("`features` are matched of one network at one resolution: leave it out.")
        self.heads: dict[int, nn.Module] = {id(self.network): self._head(self.network)} if self.features else {}
        self.images, self.size = images, bank.batch_size
        self.at = {int(i): k for k, i in enumerate(images)}
        self.known: set[tuple[bool, int]] = set()
        self.values: Tensor | None = None
        self.too_large = False

    def asked(self) -> Any:
        return self.teacher.to_json()

    def begin(self, network: nn.Module) -> None:
        if self.features:
            self.heads[id(network)] = self._head(network)

    def _head(self, network: nn.Module) -> nn.Module:
        """The last layer with weights, found on a copy: it takes a pass back, and the network may be the user's own."""
        tried = copied(network)
        for parameter in tried.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        state = self.teacher if network is self.network else self.state
        x = torch.zeros(2, len(self.bank.preprocessing.mean), *self.bank.preprocessing_of(state).hw)
        x = x.to(next(tried.parameters()).device)
        found = last_layers(tried, lambda: self.task.matched(nn.Module.eval(tried), x))
        names = {id(module): name for name, module in tried.named_modules()}
        return network.get_submodule(names[id(found[0])])

    def _row(self, answer: Tensor) -> Tensor:
        if answer.ndim != 2:
            raise TrainingFailed("`features` are matched of networks that answer once an image, this one answers with maps.")
        return answer

    def _seen(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what is compared of a network's answer, what its last layer got: (b, F))."""
        if not self.features:
            return self.task.matched(network, x), None
        got: list[Tensor] = []
        hook = self.heads[id(network)].register_forward_pre_hook(lambda _, given: got.append(given[0]))
        try:
            answer = self._row(self.task.matched(network, x))
        finally:
            hook.remove()
        return answer, _pooled(got[-1])

    def loss(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        ours, features = self._seen(network, x)
        if features is None:
            found: Tensor = self.task.mismatch(ours, targets)
            return found
        answers, theirs = targets.split([ours.shape[1], targets.shape[1] - ours.shape[1]], dim=1)
        apart: Tensor = 1 - F.cosine_similarity(features.float(), theirs, dim=1)
        return self.task.mismatch(ours, answers) + self.features * apart.mean()

    def told(self) -> str:
        return "without labels, features matched" if self.features else "without labels"

    def targets(self, views: Views) -> Tensor:
        if views.parts is not None or self.too_large:
            return self._look(views)
        for mirrored, block in sorted(self._blocks(views) - self.known):
            found = self._look(Views(self.images[block : block + self.size], np.full(self._length(block), mirrored)))
            if self.values is None:
                self.too_large = 2 * len(self.images) * found[0].nbytes > KEPT_BYTES
                if self.too_large:
                    return self._look(views)
                self.values = torch.zeros(2, len(self.images), *found.shape[1:])
            self.values[int(mirrored), block : block + self.size] = found
            self.known.add((mirrored, block))
        assert self.values is not None
        return self.values[views.mirrored.astype(int), self._places(views)]

    def _places(self, views: Views) -> np.ndarray:
        return np.array([self.at[int(i)] for i in views.images], np.int64)

    def _blocks(self, views: Views) -> set[tuple[bool, int]]:
        """(mirrored, where it begins): the original's answers are computed in the same batches whichever is needed first: an
        answer's last bits may depend on what is beside it, and a training that goes on needs others first.
        """
        begins = self._places(views) // self.size * self.size
        return set(zip(views.mirrored.astype(bool).tolist(), begins.tolist(), strict=True))

    def _length(self, block: int) -> int:
        return min(self.size, len(self.images) - block)

    def looked(self, epochs: Iterable[Views]) -> int:
        if self.values is None:
            return sum(map(len, epochs))
        return sum(self._length(block) for _, block in set[tuple[bool, int]]().union(*map(self._blocks, epochs)))

    def _look(self, views: Views) -> Tensor:
        assert self.bank.images is not None
        source = pixels_of(self.bank.images, views, self.bank.preprocessing_of(self.teacher), self.bank.batch_size)
        with torch.inference_mode():
            seen = (self._seen(self.network, x.to(self.bank.team.device)) for x in source)
            parts = [torch.cat([part.float() for part in both if part is not None], 1).cpu() for both in seen]
        return torch.cat(parts).clone()  # out here, so that a loss may keep it


def _pooled(features: Tensor) -> Tensor:
    """Of maps (b, F, h, w) and tokens (b, N, F) the mean: (b, F)."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features
