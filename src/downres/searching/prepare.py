"""A model made ready for all stages: loaded, its task found, what a plan needs to know of it."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..copying import copied
from ..engines import check_threads
from ..engines.engine import engine_of
from ..errors import DownresError
from ..families import Model
from ..images.images import cache_bytes
from ..images.preprocess import preprocess
from ..parse import check_runtimes, refuse_missing, user_path
from ..records import Candidate, Preprocessing, Record
from ..reduction import made_for
from ..tasks import Data, Question, Task, find_task
from .design import as_model
from .plan import check_trained

Progress = Callable[[str, int, int], None]
Source = Any
"""What `search` and its parts take as data: the name of a folder, or what a task opened."""


@dataclasses.dataclass(frozen=True)
class Measuring(Record):
    """How it is measured.

    runtime: 'onnxruntime', 'openvino' or 'torch', with a device after a colon where it is not the CPU ('onnxruntime:cuda',
    'torch:compile'), or several of them, to be searched in one run, the original measured in the first; None: onnxruntime, and
    torch where the original cannot be exported. threads: of it, None
    takes every core. folds: cross-fit on one folder, so that every image is a proof image once. val_fraction: part of an
    undivided folder that is kept for the proof; None: half of it, and all of it where nothing is fitted (`curve`, `evaluate`).
    seed: of splits and folds. batch_size: images in one pass over the data, None: as is quickest. latency_batch: images in the
    pass that is timed. cache_gb: of
    decoded pixels kept on disk at most, of which no number depends; None: half of what is free there. sequential: of `search`,
    look at proof images in rounds, at each candidate only until its verdict, which keeps the promised error over all looks;
    False looks at all images of all candidates; None: in rounds from 2000 proof images on. train_images: that are opened to fit
    and to train on, in each fold, at most; None: as many as the quick rungs use, 10000, and 400 with masks.
    """

    runtime: str | tuple[str, ...] | None = None
    threads: int | None = None
    folds: int | None = None
    val_fraction: float | None = None
    seed: int = 0
    batch_size: int | None = None
    latency_batch: int = 1
    cache_gb: float | None = None
    sequential: bool | None = None
    train_images: int | None = None

    def __post_init__(self) -> None:
        if self.runtime is not None:
            names = check_runtimes(self.runtime)
            object.__setattr__(self, "runtime", names if len(names) > 1 else names[0])
        check_threads(self.threads)
        if self.cache_gb is not None:
            cache_bytes(self.cache_gb)
        part = self.val_fraction
        if part is not None and not 0 < part <= 1:
            raise DownresError(f"The validation fraction is above 0 and at most 1, {part} is not: give for example 0.5.")
        whole = {"seed": (self.seed, 0, 2**32 - 1), "folds": (self.folds, 2, 10_000), "batch_size": (self.batch_size, 1, 4096)}
        whole |= {"latency_batch": (self.latency_batch, 1, 4096), "train_images": (self.train_images, 2, 10**9)}
        for name, (value, least, most) in whole.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
                raise DownresError(f"{name} is a whole number from {least} to {most}, {value} is not.")

    def part(self, fitted: bool) -> float:
        """`val_fraction`, and what it is where nobody chose."""
        return self.val_fraction if self.val_fraction is not None else 0.5 if fitted else 1.0

    @property
    def runtimes(self) -> tuple[str, ...]:
        """All that are named, the first being that of the original."""
        return self.runtime if isinstance(self.runtime, tuple) else (self.runtime or "onnxruntime",)

    def options(self) -> dict[str, Any]:
        """Of a bank."""
        size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {"runtime": self.runtimes[0], "threads": self.threads, **size}


@contextlib.contextmanager
def bank_for_now(subject: Task, measuring: Measuring, progress: Progress | None) -> Iterator[Any]:
    """A bank with the images, of which nothing is kept; networks that run in onnxruntime are exported to a folder for now."""
    if len(measuring.runtimes) > 1:
        raise DownresError("One runtime at a time is measured here: name one, or search with several.")
    in_files = measuring.runtime is not None and engine_of(measuring.runtimes[0]).text != "torch"
    with tempfile.TemporaryDirectory(prefix="downres-") if in_files else contextlib.nullcontext() as folder:
        bank = subject.bank(Path(folder) if folder else None, progress=progress, **measuring.options())
        subject.fill(bank)
        yield bank


def prepare_task(
    model: Model | nn.Module | str,
    data: Source,
    question: Question,
    task: str | type[Task] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Task:
    """The task of the model, no image opened yet."""
    if task is None or isinstance(task, str):  # a task of one's own knows what its data are
        refuse_missing(data)
    loaded = as_model(model, preprocessing)
    if loaded.preprocessing.guessed:
        takes = len(loaded.preprocessing.mean)
        raise DownresError(
            f"The network takes {takes} channels, and what their mean and std are is not known: give `mean` and `std` with "
            f"{takes} values each."
        )
    return find_task(loaded, data, question, task)


def open_data(
    task: Task,
    data: Source,
    measuring: Measuring,
    question: Question,
    parts: tuple[str, ...] = ("train", "val"),
    progress: Progress | None = None,
) -> None:
    """The data opened and checked against the model, which must answer alike whenever it sees the same images."""
    if task.fit_new and "train" not in parts:
        raise DownresError("No head is fitted here, these would be numbers of an empty one: leave fit_head out, or use search.")
    part = measuring.part(fitted="train" in parts)
    how: dict[str, Any] = {"folds": measuring.folds, "val_fraction": part, "seed": measuring.seed}
    how["cache_gb"] = measuring.cache_gb
    if measuring.train_images is not None:
        how["train_images"] = measuring.train_images
    if task.channels != 3:
        how["channels"] = task.channels
    opened = task.open(data, parts=parts, progress=progress, question=question, **how)
    task.begin(opened, measuring.seed)
    shown = task.data.folds[0].train if len(task.data.folds[0].train) else task.proof
    refuse_random(task.model.module, preprocess(task.data.images[int(shown[0])], task.model.preprocessing)[None])


def refuse_random(network: nn.Module, x: torch.Tensor) -> None:
    """Raises DownresError for a network that answers differently when it runs twice on the same images x (B, C, H, W): nothing
    could be proven of it. Sums in another order, of other threads, are no difference.
    """
    network = nn.Module.eval(copied(made_for(network, (x.shape[-2], x.shape[-1]))))
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            one, other = ([y for y in tree_leaves(network(x)) if isinstance(y, torch.Tensor)] for _ in range(2))
    except Exception:  # whatever a network fails with; where its answers are measured it is said in words
        return
    for apart in (_apart(a, b) for a, b in zip(one, other, strict=False)):
        if apart:
            raise DownresError(
                f"{type(network).__name__} answers differently when it runs twice on the same {len(x)} "
                f"image{'s' * (len(x) > 1)} ({apart}), so nothing can be proven of it: turn off what stays random in eval "
                "mode, for example F.dropout without training=self.training."
            )


def _apart(a: torch.Tensor, b: torch.Tensor) -> str:
    """In which way two answers differ by more than sums of threads in any order do, '' where they do not."""
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.numel() == 0:
        return ""
    if not a.is_floating_point():  # classes, of which a few are close calls
        share = float((a != b).double().mean())
        return f"in {share:.0%} of its values" if share > 0.01 else ""
    worst, largest = (float(t.double().abs().nan_to_num().max()) for t in (a - b, a))
    return f"by up to {worst:.2g}" if worst > 1e-4 * largest else ""


def describe(task: Task) -> dict[str, Any]:
    """What measurements depend on, as far as the model goes."""
    model = task.model
    return {
        "model": model.spec,
        "weights": model.weights,
        "model_sha256": model.fingerprint(),
        "preprocessing": model.preprocessing.to_json(),
        "task": task.described(),
    }


def describe_data(task: Task) -> dict[str, Any]:
    """What measurements depend on, as far as the images go, and what is said of them."""
    data: Data = task.data
    return {
        "description": data.description,
        "sha256": data.fingerprint(),
        "fold_count": len(data.folds),
        "licence": data.licence,
        "skipped": [skip.to_json() for skip in data.skipped],
        **task.facts(),
    }


def check_planned(task: Task, candidates: list[Candidate]) -> None:
    """DownresError for a candidate whose quality cannot be measured as it is."""
    check_trained(candidates)
    task.check(candidates)


def place_of(data: Source) -> str:
    """Where the images are, so that `check` finds them from any folder; '' for images given in Python."""
    root = data if isinstance(data, (str, Path)) else getattr(data, "found_in", "")
    if not root:
        return ""
    return str(root) if str(root).startswith("demo:") else str(user_path(root).resolve())


def resolved(question: Question) -> Question:
    """The same from any folder: `check` asks again from where it is called."""
    files = {name: str(user_path(value).resolve()) for name in ("labels", "classes") if (value := getattr(question, name))}
    return dataclasses.replace(question, **files)  # type: ignore[arg-type]


def data_source(data: Source, measuring: Measuring, question: Question) -> dict[str, Any]:
    """How to open the images of a run again, for its settings and the manifest of what it ships."""
    return {
        "path": place_of(data),
        "folds": measuring.folds,
        "val_fraction": measuring.part(fitted=True),
        "seed": measuring.seed,
        **({} if measuring.train_images is None else {"train_images": measuring.train_images}),
        "question": resolved(question).to_json(),
    }


def gather(kinds: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """Groups of options with the flat ones put in: {'measuring': Measuring(), …} and {'seed': 3} → … Measuring(seed=3).

    Raises DownresError for an option that no group has.
    """
    left = dict(flat)
    found = {}
    for name, group in kinds.items():
        own = {f.name: left.pop(f.name) for f in dataclasses.fields(group) if f.name in left}
        found[name] = dataclasses.replace(group, **own) if own else group
    if left:
        known = sorted({f.name for group in kinds.values() for f in dataclasses.fields(group)})
        raise DownresError(f"There is no option {next(iter(left))!r}: the options are {', '.join(known)}.")
    return found
