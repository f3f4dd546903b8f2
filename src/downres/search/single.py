"""One resolution without a search: `evaluate` it as it is, or `recover` the model at it."""

from pathlib import Path

from torch import nn

from ..data import Dataset
from ..errors import DownresError
from ..families import Model
from ..measure.quality import count_correct, quality
from ..parse import Resolution, as_resolution
from ..records import Budget, Candidate, Preprocessing, Quality, Recovery
from ..recover.features import State, logits
from ..recover.ladder import RUNGS, climb
from .ship import final_network, reference_of
from .task import Progress, prepare, prepare_model


def evaluate(
    model: Model | nn.Module | str,
    data: Dataset | str | Path,
    *,
    resolution: Resolution | None = None,
    crop_ratio: float | None = None,
    preprocessing: Preprocessing | None = None,
    val_fraction: float = 0.5,
    runtime: str = "torch",
    threads: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """Top-1 and top-5 of a model as it is on the validation images, at a resolution and crop ratio (default: its own)."""
    subject = prepare_model(model, data, preprocessing=preprocessing)
    task = prepare(subject, data, val_fraction=val_fraction, parts=("val",), seed=seed, progress=progress)
    p = task.subject.model.preprocessing.at(resolution, crop_ratio)
    bank = task.fill(subject.bank(None, runtime=runtime, threads=threads, batch_size=batch_size, progress=progress))
    out = logits(bank.features(State(Candidate(p.resolution), p.crop_ratio), task.proof), task.subject.own_head)
    truth = task.data.labels[task.proof]
    return quality(count_correct(out, truth), count_correct(out, truth, 5) if task.subject.outputs > 5 else None)


def recover(
    model: Model | nn.Module | str,
    data: Dataset | str | Path,
    candidate: Candidate | None = None,
    *,
    resolution: Resolution | None = None,
    max_drop: float = 1.0,
    rungs: tuple[str, ...] = RUNGS,
    preprocessing: Preprocessing | None = None,
    val_fraction: float = 0.5,
    runtime: str = "torch",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Preprocessing, Recovery]:
    """The model at a lower resolution with its accuracy won back on the training images, as far as `max_drop` requires.

    Returns (network, preprocessing, recovery): the network takes images made by the preprocessing, the recovery names
    the rung that it took and what each rung gave and cost. The model given is not touched; no validation image is looked at.
    """
    if (candidate is None) == (resolution is None):
        raise DownresError("Give recover either a candidate or a resolution: for example resolution=128.")
    subject = prepare_model(model, data, preprocessing=preprocessing)
    task = prepare(subject, data, val_fraction=val_fraction, seed=seed, progress=progress)
    candidate = candidate or Candidate(as_resolution(resolution))  # type: ignore[arg-type]
    if candidate.resolution is None:
        candidate = candidate.at(task.subject.native.resolution)
    bank = task.fill(subject.bank(None, runtime=runtime, threads=threads, progress=progress))
    reference = reference_of(task, bank, 0, task.data.folds[0], rungs)
    final = climb(bank, candidate, reference, task.data.labels, task.subject.outputs, Budget(max_drop), rungs)
    return final_network(task, bank, final), bank.preprocessing_of(final.state), final.recovery
