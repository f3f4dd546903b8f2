"""Several processes that train one network together, started by `accelerate launch`: the first searches, the others help.

Gradients are summed over the processes, each of which sees its share of every batch: what comes out is what one process gives,
but for the order of the sums and for BatchNorms, whose statistics are of each share.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DownresError
from .state import State
from .training import Training, TrainingFailed

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Job:
    """A training that all take part in. tensors: what the state's steps put in place."""

    rung: str
    state: State
    original: State | None
    fold: int
    images: np.ndarray
    how: Training
    tensors: dict[str, Any]


class Team:
    """index: of this process, 0 being the first, of `count`. device: on which it trains."""

    def __init__(self) -> None:
        self.count, self.index = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.at_work = False
        self._made: Any = None

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def accelerator(self) -> Any:
        if self._made is None:
            from accelerate import Accelerator, InitProcessGroupKwargs  # a second, which only training needs

            # The others wait for the first, which measures for hours between two trainings.
            patient = InitProcessGroupKwargs(timeout=datetime.timedelta(days=30))
            self._made = Accelerator(kwargs_handlers=[patient], cpu=not torch.cuda.is_available())
        return self._made

    @property
    def device(self) -> torch.device:
        found: torch.device = self.accelerator.device
        return found

    def share(self, start: int, n: int) -> slice:
        """Which of n rows from `start` on are this process's."""
        if n < self.count:
            raise TrainingFailed(
                f"a batch of {n} images cannot be shared by {self.count} processes: give another `training_batch`, or fewer."
            )
        return slice(start + n * self.index // self.count, start + n * (self.index + 1) // self.count)

    def summed(self, loss: float, gradients: Sequence[Tensor]) -> float:
        """The loss of all; the gradients become the sums over all."""
        if self.count == 1:
            return loss
        flat = torch.cat([torch.tensor([loss], device=self.device), *(g.flatten() for g in gradients)])
        flat = self.accelerator.reduce(flat, "sum")
        parts = flat[1:].split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return float(flat[0])

    def counted(self, *flags: bool) -> list[int]:
        """In how many processes each is true."""
        if self.count == 1:
            return list(map(int, flags))
        found = self.accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self.device), "sum")
        return [int(n) for n in found]

    def averaged(self, network: nn.Module) -> None:
        """BatchNorm's statistics become the mean over all processes."""
        if self.count > 1:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def shared(self, value: Any) -> Any:
        """The first process's value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        assert self.accelerator is not None
        return broadcast_object_list([value])[0]

    @contextlib.contextmanager
    def working(self, job: Job) -> Iterator[None]:
        """The others do what the first begins; what all of them fail with alike is no reason to part."""
        if self.first:
            self.shared(job)
        self.at_work = True
        try:
            yield
        except TrainingFailed:
            self.at_work = False
            raise
        self.at_work = False

    @contextlib.contextmanager
    def leading(self, result: str) -> Iterator[None]:
        """The first process: at its end the others are sent home with the result, or with nothing where it failed."""
        try:
            yield
        except BaseException:
            if not self.at_work:  # else they are in the middle of something and end with this process
                self.shared(None)
            raise
        self.shared(result)

    def help(self, train: Callable[[Job], None]) -> str:
        """What the others do: each job as it comes, until the first is done; its result."""
        while isinstance(job := self.shared(None), Job):
            with contextlib.suppress(TrainingFailed):  # the first says so
                train(job)
        if job is None:
            raise DownresError("The first process has ended with an error, which it says.")
        return str(job)

    @contextlib.contextmanager
    def logging(self, tracker: str, folder: Path | None, name: str) -> Iterator[Log]:
        """Numbers to a tracker of accelerate's, in the run's folder."""
        if not tracker or not self.first:
            yield lambda values, step: None
            return
        from accelerate import Accelerator

        made = Accelerator(log_with=tracker, project_dir=str((folder or Path.cwd()) / "logs"), cpu=self.device.type == "cpu")
        made.init_trackers(name)
        try:
            yield lambda values, step: made.log(values, step=step)
        finally:
            for one in made.trackers:  # `end_training` ends the processes, too
                one.finish()
