"""The one trainer: a state's weights, trained on images by what a rung teaches; killed, it goes on to the very same bits."""

import contextlib
import dataclasses
import gc
import hashlib
import io
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import mean
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves

from ..copying import copied
from ..engines import check_threads
from ..engines.torch import fastest_layout, threads_of
from ..errors import first_line
from ..record import write_json, write_whole
from .bank import Bank
from .state import State, Step
from .team import Job
from .training import Training, TrainingFailed
from .views import Altered, Views, drawn, pixels_of

PREVIEWED = 3
"""Steps of which the quickest tells how long all of them take."""

CONSULTED = 4
"""Epochs of which half tell something of the others."""


class Lesson(ABC):
    """What a rung teaches. done: what the state's step is called; doing: what progress calls it; rung: of the ladder. original:
    the state of who teaches, or None.
    """

    rung: ClassVar[str]
    done: ClassVar[str]
    doing: ClassVar[str]
    original: State | None = None

    def __init__(self, task: Any) -> None:
        self.task = task

    @abstractmethod
    def asked(self) -> Any:
        """What else than state, images and `Training` the weights depend on: JSON values."""

    def student(self, bank: Bank, state: State) -> nn.Module:
        """A network of its own, to be trained."""
        return copied(bank.network(state))

    def shown(self, state: State) -> Sequence[State]:
        """Whose pixels the batches have, in turn."""
        return (state,)

    def begin(self, network: nn.Module) -> None:  # noqa: B027
        """Changes the network in place to what is trained."""

    def end(self, network: nn.Module) -> None:  # noqa: B027
        """The inverse of `begin`, weights as they are now."""

    def frozen(self, network: nn.Module, part: float) -> Sequence[nn.Parameter]:
        """What is not trained yet after that part of the epochs."""
        return ()

    @abstractmethod
    def targets(self, views: Views) -> Tensor:
        """What shall be answered, (b, …)."""

    @property
    def moves(self) -> bool:
        """Whether that stays so where the image alone is shifted or turned."""
        return False

    def mixed(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed with one another, and their targets."""
        return x, targets

    @abstractmethod
    def loss(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """Mean over images."""

    def looked(self, epochs: Iterable[Views]) -> int:
        """Images that anyone but the student looks at. epochs: drawn anew as they are asked for, one after the other."""
        return 0

    @abstractmethod
    def told(self) -> str:
        """'without labels', …"""


Watch = Callable[[State], str]
"""The state half-way → why to give up, '' to go on."""


def trained(
    bank: Bank,
    state: State,
    fold: int,
    images: np.ndarray,
    how: Training,
    lesson: Lesson,
    seed: int,
    watch: Watch | None = None,
) -> tuple[State, str]:
    """(the state with trained weights, what was done).

    It starts from the state's own weights and sees the state's pixels. After every epoch all is kept in the run's folder: a
    training that was killed goes on there and ends with the same weights, and one that is done is not done again for another
    file of the same network. Raises TrainingFailed for a network that cannot be trained, a loss that is no number, where
    `max_minutes` are too few for one epoch, and where `watch` gives up; the state given is as it was.
    """
    begun = state.network
    asked = write_json([lesson.done, begun.to_json(), lesson.asked(), how.to_json(), fold, images.tolist()])
    name = hashlib.sha256(asked.encode()).hexdigest()[:16]
    if (known := bank.trained.get(name)) is not None:
        step, told = known
        if step is None:
            raise TrainingFailed(told)
        return State(state.candidate, state.crop_ratio, (step,)), told
    job = Job(lesson.rung, begun, lesson.original, fold, images, how, bank.weights.of(begun, lesson.original))
    with bank.team.working(job), threads_of(check_threads(bank.threads)):
        try:
            run = _Run(bank, begun, fold, images, how, lesson, seed, name, watch)
            told, tensors = run.go(), run.tensors()
        except TrainingFailed as error:  # so it will for another file of the same network
            bank.trained[name] = None, str(error)
            raise
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise TrainingFailed(f"its weights are no numbers at the end: lower `learning_rate`, or leave {lesson.rung} out.")
    step = Step(lesson.done, fold, len(images), bank.weights.put(tensors))
    if run.file is not None:  # not before the weights are in the folder
        run.file.unlink(missing_ok=True)
    bank.trained[name] = step, told
    return State(state.candidate, state.crop_ratio, (step,)), told


class _Run:
    def __init__(
        self,
        bank: Bank,
        begun: State,
        fold: int,
        images: np.ndarray,
        how: Training,
        lesson: Lesson,
        seed: int,
        name: str,
        watch: Watch | None,
    ) -> None:
        self.bank, self.state, self.how, self.lesson, self.watch = bank, begun, how, lesson, watch
        self.images, self.fold, self.seed, self.team = images, fold, seed, bank.team
        assert bank.images is not None
        self.pictures = bank.images
        self.network = lesson.student(bank, begun)
        self.shown_as = [bank.preprocessing_of(one) for one in lesson.shown(begun)]
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        lesson.begin(self.network)
        self.network.to(self.team.device)
        self.layout = self._layout()
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, how)
        self.altered = Altered(how, bank.preprocessing_of(begun))
        if how.moves and not lesson.moves:
            raise TrainingFailed("`moves` are for labels of whole images, and move the picture alone: leave it out.")
        self.spots = lesson.task.spots(images) if how.uniform else None
        if how.uniform and self.spots is None:
            raise TrainingFailed("`uniform` draws pixels of classes, which only masks have: leave it out.")
        if how.augment and (kind := self.pictures[int(images[0])].dtype) != np.uint8:
            raise TrainingFailed(f"`augment` changes colours of 8 bits, the images are {kind}: leave it out.")
        # Statistics that change are averaged with the weights that they are of, as timm's average of a network does.
        buffers = [b for b in self.network.buffers() if b.is_floating_point()] if how.batchnorm else []
        self.averaged: list[Tensor] = [*self.parameters, *buffers] if how.ema else []
        self.average = [p.detach().clone() for p in self.averaged]
        self.count = len(self._views(0))  # of images in an epoch
        self.sizes = self._sizes()
        self.part = max(self.sizes)  # images at once
        self.taken = 0  # steps
        self._refuse_other_answers()
        self.file = None if bank.folder is None or not self.team.first else bank.folder / "training" / f"{name}.pt"
        self.foretold = 0.0
        self.began, self.shown, self.text = time.perf_counter(), 0, ""

    def go(self) -> str:
        done = 0
        if (kept := self.team.shared(self._kept())) is not None:
            done, epochs = kept["done"], kept["epochs"]
            self.network.load_state_dict(kept["network"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.average, self.part = [a.to(self.team.device) for a in kept["average"]], kept["part"]
            self.taken = kept["taken"]
            self._consult(done, epochs)
        else:
            epochs = self._affordable()
        per_epoch = len(self.sizes)
        steps = epochs * per_epoch
        if steps < len(self.shown_as):
            raise TrainingFailed(
                f"{steps} batches cannot show {len(self.shown_as)} resolutions: give more `epochs`, or a smaller "
                "`training_batch`."
            )
        schedule = _schedule(self.optimizer, steps, self.how)
        self.began = time.perf_counter()
        with self.team.logging(self.how.log, self.bank.folder, f"{self.lesson.rung} {self.state.candidate}") as log:
            for epoch in range(done, epochs):
                self._thaw(epoch / epochs)
                total = 0.0
                with self._chance(epoch):
                    for i, (x, targets, whole) in enumerate(self._batches(epoch)):
                        schedule.step_update(epoch * per_epoch + i)
                        total += self._step(x, targets, whole)
                        self.shown += whole
                        self._say(epoch * per_epoch + i + 1, steps, total / (i + 1), i + 1 == per_epoch)
                log({"loss": total / per_epoch}, epoch + 1)
                self.team.averaged(self.network)
                self._keep(epoch + 1, epochs)
                self._consult(epoch + 1, epochs)
        self.bank.passes += epochs * self.count + self.lesson.looked(map(self._views, range(epochs)))
        fewer = f" of {self.how.epochs} asked for" if epochs < self.how.epochs else ""
        parts = f", {self.part} images at a time, as more did not fit" if self.part < max(self.sizes) else ""
        several = f", in {self.team.count} processes" if self.team.count > 1 else ""
        return f"{epochs} epochs{fewer} on {len(self.images)} images{parts}, {self.lesson.told()}{several}"

    def tensors(self) -> dict[str, np.ndarray]:
        """All numbers of the network as it is now, by their names."""
        kept = [p.detach().clone() for p in self.averaged]
        with torch.no_grad():
            for tensor, average in zip(self.averaged, self.average, strict=True):
                tensor.copy_(average)
            network = copied(self.network)
            for tensor, value in zip(self.averaged, kept, strict=True):
                tensor.copy_(value)
        self.lesson.end(network)
        state = network.state_dict()
        return {name: value.detach().cpu().numpy().copy() for name, value in state.items() if value.is_floating_point()}

    @contextlib.contextmanager
    def _chance(self, epoch: int) -> Iterator[None]:
        """Dropout and stochastic depth as only the seed and the epoch say, and nobody else's chance changed."""
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.default_rng([self.seed, 5, self.fold, epoch]).integers(2**31)) + self.team.index)
            yield

    def _views(self, epoch: int) -> Views:
        how = dataclasses.replace(self.how, mirror=self.how.mirror and self.lesson.task.mirrors)
        random = np.random.default_rng([self.seed, 4, self.fold, epoch])
        return drawn(self.pictures, self.images, how, random, self.shown_as[0].hw, self.spots)

    def _sizes(self) -> list[int]:
        """Of an epoch's batches; a rest that has not two for each process goes with the one before."""
        size = self.how.training_batch
        sizes = [min(size, self.count - start) for start in range(0, self.count, size)]
        if len(sizes) > 1 and sizes[-1] < 2 * self.team.count:
            sizes[-2:] = [sizes[-2] + sizes[-1]]
        return sizes

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(pixels, targets, images in the whole batch): of several processes each has its share of every batch."""
        views, sizes = self._views(epoch), self.sizes
        shares = [self.team.share(start, n) for start, n in zip(np.cumsum([0, *sizes]), sizes, strict=False)]
        own = _joined([views[share] for share in shares])
        most = max(share.stop - share.start for share in shares)
        if len(self.shown_as) == 1:
            rows = pixels_of(self.pictures, own, self.shown_as[0], most)
            source = _cut(rows, [share.stop - share.start for share in shares])
        else:
            source = self._in_turn(views, shares, epoch)
        for x, share, n in zip(source, shares, sizes, strict=True):
            yield self.altered(x), self.lesson.targets(views[share]), n

    def _in_turn(self, views: Views, shares: Sequence[slice], epoch: int) -> Iterator[Tensor]:
        """Pixels of another size a batch; the next epoch begins with the next size, so that no image has the same for ever."""
        for i, share in enumerate(shares):
            p = self.shown_as[(epoch + i) % len(self.shown_as)]
            yield from pixels_of(self.pictures, views[share], p, share.stop - share.start)

    def _step(self, x: Tensor, targets: Tensor, whole: int) -> float:
        """One step of the optimizer; of the whole batch this process has x."""
        _to_train(self.network, self.how.batchnorm and whole > 1)  # there are no statistics of one image
        while True:
            error = None
            try:
                self.optimizer.zero_grad()
                total = self._gradients(x, targets, whole)
            except Exception as found:  # whatever a network that was only meant to answer fails with
                error = found
            failed, of_memory = self.team.counted(error is not None, error is not None and _is_of_memory(error))
            if not failed:
                break
            if of_memory < failed or self.part == 1:
                why = first_line(error)[:200] if error is not None else "in another process"
                raise TrainingFailed(f"the network cannot be trained ({why}).") from error
            self.part = max(1, min(self.part, len(x)) // 2)
            gc.collect()
        total = self.team.summed(total, [p.grad for p in self.parameters if p.grad is not None])
        if not np.isfinite(total):
            raise TrainingFailed(f"its loss is no number: lower `learning_rate`, or leave {self.lesson.rung} out.")
        nn.utils.clip_grad_norm_(self.parameters, self.how.clip)
        self.optimizer.step()
        if self.average:  # of few steps that of the last ones, as timm warms it up
            decay = min(self.how.ema, (1 + self.taken) / (10 + self.taken))
            with torch.no_grad():
                get_ema_multi_avg_fn(decay)(self.average, [p.detach() for p in self.averaged], None)
        self.taken += 1
        return total

    def _gradients(self, x: Tensor, targets: Tensor, whole: int) -> float:
        """The loss, its gradients in the parameters; as many images at once as fit into the memory."""
        device, total, count = self.team.device, 0.0, math.ceil(len(x) / self.part)
        for some, wanted in zip(x.tensor_split(count), targets.tensor_split(count), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.how.bf16):
                some = some.to(device, memory_format=self.layout)
                loss = self.lesson.loss(self.network, *self.lesson.mixed(some, wanted.to(device)))
            loss = loss * (len(some) / whole)
            loss.backward()
            total += float(loss.detach())
        return total

    def _layout(self) -> torch.memory_format:
        """Of weights and batches; a network that fails says so in the first step."""
        p = self.bank.preprocessing_of(self.state)
        x = torch.rand(2, len(p.mean), *p.hw, generator=torch.Generator().manual_seed(0)).to(self.team.device)
        self.network.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                return fastest_layout(self.network, x)
        except Exception:
            return torch.contiguous_format

    def _refuse_other_answers(self) -> None:
        """A network that answers otherwise while it is trained would be taught what nobody asks of it."""
        p, made = self.bank.preprocessing_of(self.state), []
        x = torch.zeros(2, len(p.mean), *p.hw, device=self.team.device)
        for training in (False, True):
            network = copied(self.network).eval()
            if training:
                _to_train(network, self.how.batchnorm)
            try:
                with torch.no_grad(), torch.random.fork_rng():
                    made.append([(type(y), getattr(y, "shape", None)) for y in tree_leaves(network(x))])
            except Exception:  # the first step says why
                return
        if made[0] != made[1]:
            kind = type(self.network).__name__
            raise TrainingFailed(f"the network cannot be trained ({kind} returns something else in train mode).")

    def _thaw(self, part: float) -> None:
        """Without gradients what the lesson has frozen yet."""
        frozen = {id(p) for p in self.lesson.frozen(self.network, part)}
        for parameter in self.parameters:
            parameter.requires_grad_(id(parameter) not in frozen)
            if id(parameter) in frozen:
                parameter.grad = None

    def _affordable(self) -> int:
        """Epochs that there is time for, by that of a few steps whose weights are thrown away."""
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        per_image: list[list[float]] = [[] for _ in self.shown_as]
        source = self._batches(0)
        self._thaw(1.0)
        begun = time.perf_counter()
        for group in self.optimizer.param_groups:  # not yet warmed up
            group["lr"] = self.how.learning_rate / 100
        with self._chance(0):
            for i in range(min(max(PREVIEWED, len(self.shown_as)), len(self.sizes))):
                start = time.perf_counter()
                x, targets, whole = next(source)
                self._step(x, targets, whole)
                per_image[i % len(self.shown_as)].append((time.perf_counter() - start) / whole)
        source.close()  # type: ignore[attr-defined]
        self.network.load_state_dict(before)
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.learning_rate
        self.taken, self.average = 0, [p.detach().clone() for p in self.averaged]
        an_epoch = self.team.shared(mean(min(seen) for seen in per_image if seen)) * self.count / 60
        found, spent = self.how.epochs, self.team.shared((time.perf_counter() - begun) / 60)
        if self.how.max_minutes is not None:  # of which the original's answers, where there are any, have taken their part
            found = min(found, max(0, int((self.how.max_minutes - spent) / an_epoch)))
        if found < 1:
            raise TrainingFailed(
                f"an epoch of {self.count} images takes about {spent + an_epoch:.1f} minutes here, {self.how.max_minutes:g} "
                f"are allowed: give more, or leave {self.lesson.rung} out."
            )
        self.foretold = found * an_epoch
        return found

    def _consult(self, done: int, epochs: int) -> None:
        """Half-way: what tuning images say."""
        if done != (epochs + 1) // 2 or epochs < CONSULTED:
            return
        why = ""
        if self.watch is not None:
            step = Step(self.lesson.done, self.fold, done, self.bank.weights.put(self.tensors()))
            why = self.watch(State(self.state.candidate, self.state.crop_ratio, (step,)))
        if why := self.team.shared(why):
            raise TrainingFailed(f"given up after {done} of {epochs} epochs: {why}.")

    def _kept(self) -> dict[str, Any] | None:
        if self.file is None or not self.file.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self.file, weights_only=True)
            whole = {"done", "epochs", "network", "optimizer", "average", "part", "taken"} <= found.keys()
            return found if whole and len(found["average"]) == len(self.average) else None
        except Exception:  # damaged: it is begun again
            return None

    def _keep(self, done: int, epochs: int) -> None:
        """One file, so that weights and the optimizer's moments are always of the same epoch."""
        if self.file is None or done == epochs:
            return
        content = io.BytesIO()
        kept = {"done": done, "epochs": epochs, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**kept, "average": self.average, "part": self.part, "taken": self.taken}, content)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, content.getvalue())

    def _say(self, done: int, steps: int, loss: float, epoch: bool) -> None:
        """Where the output is no terminal every other text is another line: the numbers in it are of the last epoch."""
        if self.bank.progress and self.team.first:
            if epoch or not self.text:
                about = f", about {self.foretold:.0f} min in all" if self.foretold >= 1 else ""
                rate = f", {self.shown / max(time.perf_counter() - self.began, 1e-9):.0f} images/s"
                self.text = f"{self.state.candidate}: {self.lesson.doing}{about}{rate}, loss {loss:.3g}"
            self.bank.progress(f"{self.bank.stage}{self.text}", done, steps)


def _optimizer(parameters: Sequence[nn.Parameter], how: Training) -> torch.optim.Optimizer:
    from timm.optim import Lamb  # seconds, which who reads a run need not wait for

    decayed, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]  # biases and norms
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    rate, decay = how.learning_rate, how.weight_decay
    if how.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    return (torch.optim.AdamW if how.optimizer == "adamw" else Lamb)(groups, lr=rate, weight_decay=decay)


def _schedule(optimizer: torch.optim.Optimizer, steps: int, how: Training) -> Any:
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler

    least = how.learning_rate / 100
    options: dict[str, Any] = {
        "lr_min": least, "warmup_t": round(how.warmup * steps), "warmup_lr_init": least, "t_in_epochs": False,
    }  # fmt: skip
    if how.schedule == "poly":
        return PolyLRScheduler(optimizer, steps, power=0.9, **options)
    return CosineLRScheduler(optimizer, steps, **options)


def _to_train(network: nn.Module, statistics: bool) -> None:
    """Into train mode, but for what the network itself does only there, such as auxiliary answers, and for BatchNorms where no
    statistics are taken.
    """
    network.train()
    network.training = False
    for module in nn.Module.modules(network) if not statistics else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _is_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _joined(views: Sequence[Views]) -> Views:
    parts = [v.parts for v in views if v.parts is not None]
    return Views(
        np.concatenate([v.images for v in views]),
        np.concatenate([v.mirrored for v in views]),
        np.concatenate(parts) if parts else None,
    )


def _cut(source: Iterator[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """A stream of rows in batches of those sizes; closes it."""
    left = torch.empty(0)
    with contextlib.closing(source):  # type: ignore[type-var]
        for size in sizes:
            while len(left) < size:
                more = next(source)
                left = torch.cat([left, more]) if len(left) else more
            yield left[:size]
            left = left[size:]
