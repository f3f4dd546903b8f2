"""Distillation: a network at fewer pixels learns to answer as the original does at its own, from photographs without labels
(Hinton et al. 2015, arXiv 1503.02531; of resolutions, Wang et al. 2020, arXiv 2007.09587).
"""

import contextlib
import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..copying import copied
from ..engines import check_threads
from ..engines.torch import threads_of
from ..errors import DownresError, first_line
from ..record import write_json, write_whole
from .bank import Bank
from .state import DISTILLED, State, Step
from .training import Training

KEPT_BYTES = 2**31
"""Of the original's answers in memory; of more each is computed whenever it is needed."""
PREVIEWED = 3
"""Steps of which the quickest tells how long all of them take."""


class Trainable(Protocol):
    """What is asked of a task; see `tasks.Task`."""

    seed: int

    def matched(self, network: nn.Module, x: Tensor) -> Tensor: ...
    def mismatch(self, ours: Tensor, theirs: Tensor) -> Tensor: ...


class TrainingFailed(DownresError):
    """A training that came to nothing; why in words."""


def distilled(
    task: Trainable, bank: Bank, state: State, teacher: State, fold: int, images: np.ndarray, how: Training
) -> tuple[State, str]:
    """(the state with weights that answer on `images` as those of `teacher` do, what was done).

    The student starts from the state's own weights and sees the state's pixels; the original sees its own resolution of the
    same crop, mirrored alike. BatchNorms take their statistics on the way. After every epoch all is kept in the run's folder:
    a training that was killed goes on there and ends with the same weights, and one that is done is not done again for another
    file of the same network. Raises TrainingFailed for a network that cannot be trained, a loss that is no number, and where
    `max_minutes` are too few for one epoch; the state given is as it was.
    """
    begun, teacher = state.network, dataclasses.replace(teacher, crop_ratio=state.crop_ratio)
    asked = write_json([begun.to_json(), teacher.to_json(), how.to_json(), fold, images.tolist()])
    name = hashlib.sha256(asked.encode()).hexdigest()[:16]
    if (done := bank.trained.get(name)) is not None:
        step, told = done
        return State(state.candidate, state.crop_ratio, (step,)), told
    network = copied(bank.network(begun))
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    run = _Run(task, bank, begun, teacher, fold, images, how, network, name)
    with threads_of(check_threads(bank.threads)):
        told = run.go()
    tensors = {name: value.detach().numpy().copy() for name, value in network.state_dict().items() if value.is_floating_point()}
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise TrainingFailed("its weights are no numbers at the end: lower `learning_rate`, or leave distill out of the rungs.")
    step = Step(DISTILLED, fold, len(images), bank.weights.put(tensors))
    bank.trained[name] = step, told
    return State(state.candidate, state.crop_ratio, (step,)), told


class _Run:
    def __init__(
        self,
        task: Trainable,
        bank: Bank,
        begun: State,
        teacher: State,
        fold: int,
        images: np.ndarray,
        how: Training,
        network: nn.Module,
        name: str,
    ) -> None:
        self.task, self.bank, self.state, self.how, self.network = task, bank, begun, how, network
        self.images, self.fold = images, fold
        self.original = _Original(task, bank, teacher, len(images))
        decayed = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]  # biases and norms
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=how.learning_rate, weight_decay=how.weight_decay)
        self.file = None if bank.folder is None else bank.folder / "training" / f"{name}.pt"

    def go(self) -> str:
        from timm.scheduler import CosineLRScheduler  # seconds, which who reads a run need not wait for

        epochs, done = self.how.epochs, 0
        if (kept := self._kept()) is not None:
            done, epochs = kept["done"], kept["epochs"]
            self.network.load_state_dict(kept["network"])
            self.optimizer.load_state_dict(kept["optimizer"])
        elif self.how.max_minutes is not None:
            epochs = self._affordable()
        per_epoch = -(-len(self.images) // self.how.training_batch)
        steps = epochs * per_epoch
        schedule = CosineLRScheduler(
            self.optimizer, steps, lr_min=self.how.learning_rate / 100, warmup_t=round(self.how.warmup * steps),
            warmup_lr_init=self.how.learning_rate / 100, t_in_epochs=False,
        )  # fmt: skip
        for epoch in range(done, epochs):
            total = 0.0
            with self._chance(epoch):
                for i, (ours, theirs) in enumerate(self._batches(epoch)):
                    schedule.step_update(epoch * per_epoch + i)
                    total += self._step(ours, theirs)
                    self._say(epoch * per_epoch + i + 1, steps, total / (i + 1))
            self._keep(epoch + 1, epochs)
        self.network.eval()
        self.bank.passes += epochs * len(self.images) + self._answered(epochs)
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        fewer = f" of {self.how.epochs} asked for" if epochs < self.how.epochs else ""
        return f"{epochs} epochs{fewer} on {len(self.images)} images, without labels"

    @contextlib.contextmanager
    def _chance(self, epoch: int) -> Iterator[None]:
        """Dropout and stochastic depth as only the seed and the epoch say, and nobody else's chance changed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([self.task.seed, 5, self.fold, epoch]).integers(2**31)))
            yield

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(which image comes when, whether it is mirrored), as only the seed and the epoch say."""
        random = np.random.default_rng([self.task.seed, 4, self.fold, epoch])
        return random.permutation(len(self.images)), random.random(len(self.images)) < 0.5

    def _answered(self, epochs: int) -> int:
        """Images that the original looks at, of a training that nobody interrupts."""
        seen = np.zeros((2, len(self.images)), bool)
        for order, mirrored in map(self._order, range(epochs)):
            seen[mirrored.astype(int), order] = True
        return epochs * len(self.images) if self.original.values is None else int(seen.sum())

    def _batches(self, epoch: int) -> Any:
        """(the student's pixels, the original's answers)."""
        order, mirrored = self._order(epoch)
        size = self.how.training_batch
        for k, x in enumerate(self.bank.batches(self.state, self.images[order], size)):
            at = order[k * size : (k + 1) * size]
            flips = mirrored[k * size : (k + 1) * size]
            yield _mirrored(x, flips), self.original(self.images, at, flips)

    def _step(self, x: Tensor, theirs: Tensor) -> float:
        self.network.train(len(x) > 1)  # BatchNorm has no statistics of one
        try:
            loss = self.task.mismatch(self.task.matched(self.network, x), theirs)
            if not torch.isfinite(loss):
                raise TrainingFailed("its loss is no number: lower `learning_rate`, or leave distill out of the rungs.")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.how.clip)
            self.optimizer.step()
        except TrainingFailed:
            raise
        except Exception as error:  # whatever a network that was only meant to answer fails with
            raise TrainingFailed(f"the network cannot be trained ({first_line(error)[:200]}).") from error
        return float(loss.detach())

    def _affordable(self) -> int:
        """Epochs that `max_minutes` are enough for, by the time of a few steps whose weights are thrown away."""
        assert self.how.max_minutes is not None
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        per_image, source = [], self._batches(0)
        with self._chance(0):
            for _ in range(min(PREVIEWED, -(-len(self.images) // self.how.training_batch))):
                start = time.perf_counter()
                x, theirs = next(source)
                self._step(x, theirs)
                per_image.append((time.perf_counter() - start) / len(x))
        source.close()
        self.network.load_state_dict(before)
        self.optimizer.state.clear()
        an_epoch = min(per_image) * len(self.images) / 60
        found = min(self.how.epochs, int(self.how.max_minutes / an_epoch))
        if found < 1:
            raise TrainingFailed(
                f"an epoch of {len(self.images)} images takes about {an_epoch:.1f} minutes here, {self.how.max_minutes:g} are "
                "allowed: give more, or leave distill out of the rungs."
            )
        return found

    def _kept(self) -> dict[str, Any] | None:
        if self.file is None or not self.file.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self.file, weights_only=True)
            return found if {"done", "epochs", "network", "optimizer"} <= found.keys() else None
        except Exception:  # damaged: it is begun again
            return None

    def _keep(self, done: int, epochs: int) -> None:
        if self.file is None or done == epochs:
            return
        content = io.BytesIO()
        kept = {"done": done, "epochs": epochs, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(kept, content)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, content.getvalue())

    def _say(self, done: int, steps: int, loss: float) -> None:
        if self.bank.progress:
            self.bank.progress(f"{self.bank.stage}{self.state.candidate}: distilling, loss {loss:.3g}", done, steps)


class _Original:
    """The original's answers, each computed once and kept as long as they fit."""

    def __init__(self, task: Trainable, bank: Bank, teacher: State, count: int) -> None:
        self.task, self.bank, self.teacher = task, bank, teacher
        self.network = bank.network(teacher)
        self.known, self.count = np.zeros((2, count), bool), count
        self.values: Tensor | None = None

    def __call__(self, images: np.ndarray, at: np.ndarray, flips: np.ndarray) -> Tensor:
        """Answers to images[at], mirrored where `flips` says so: (b, …)."""
        rows = flips.astype(int)
        todo = np.flatnonzero(~self.known[rows, at])
        if len(todo):
            found = self._look(images[at[todo]], flips[todo])
            if self.values is None and 2 * self.count * found[0].nbytes <= KEPT_BYTES:
                self.values = torch.zeros(2, self.count, *found.shape[1:])
            if self.values is None:
                return found  # too large to be kept: all of them are always to do
            self.values[rows[todo], at[todo]] = found
            self.known[rows[todo], at[todo]] = True
        assert self.values is not None
        return self.values[rows, at]

    def _look(self, images: np.ndarray, flips: np.ndarray) -> Tensor:
        parts, done = [], 0
        with torch.inference_mode():
            for x in self.bank.batches(self.teacher, images, self.bank.batch_size):
                parts.append(self.task.matched(self.network, _mirrored(x, flips[done : done + len(x)])))
                done += len(x)
        return torch.cat(parts).clone()


def _mirrored(x: Tensor, flips: np.ndarray) -> Tensor:
    chosen = torch.from_numpy(flips)
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)
