"""One resolution without a search: `evaluate` it as it is, or `recover` the model at it."""

from torch import nn

from ..errors import DownresError
from ..families import Model
from ..measure.quality import count_correct, quality
from ..measure.segmentation import segmentation_quality
from ..parse import Resolution, as_resolution
from ..records import Budget, Candidate, Preprocessing, Quality, Recovery, SegmentationQuality
from ..recover import masks
from ..recover.bank import State
from ..recover.features import FeatureBank, logits
from ..recover.ladder import RUNGS, climb
from ..recover.masks import MaskBank
from .masks import MASK_RUNGS
from .plan import like
from .select import Evidence
from .ship import final_network, reference_of
from .task import Data, Progress, Task, check_planned, prepare, prepare_model


def evaluate(
    model: Model | nn.Module | str,
    data: Data,
    *,
    resolution: Resolution | None = None,
    crop_ratio: float | None = None,
    preprocessing: Preprocessing | None = None,
    val_fraction: float = 0.5,
    runtime: str = "torch",
    threads: int | None = None,
    batch_size: int | None = None,
    label_size: Resolution | None = None,
    upsampling: str = "bilinear",
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
) -> Quality | SegmentationQuality:
    """A model as it is on the validation images, at a resolution and crop ratio (default: its own): top-1 and top-5 of a
    classifier, mIoU and what goes with it of a segmentation network, at `label_size` as in `search`.
    """
    subject = prepare_model(model, data, preprocessing=preprocessing, label_size=label_size, upsampling=upsampling)
    opening = {"val_fraction": val_fraction, "seed": seed, "cache_gb": cache_gb}
    task = prepare(subject, data, **opening, parts=("val",), progress=progress)  # type: ignore[arg-type]
    p = task.subject.model.preprocessing
    p = p.at(None if resolution is None else like(p.resolution, as_resolution(resolution)), crop_ratio)  # type: ignore[arg-type]
    options = {} if batch_size is None else {"batch_size": batch_size}
    bank = subject.bank(None, runtime=runtime, threads=threads, progress=progress, **options)
    task.fill(bank)
    return quality_of(task, bank, State(Candidate(p.resolution), p.crop_ratio))[1]


def quality_of(task: Task, bank: FeatureBank | MaskBank, state: State) -> tuple[Evidence, Quality | SegmentationQuality]:
    """What the network as it came, in that state, does on the proof images."""
    if isinstance(bank, MaskBank):
        tallies = bank.tallies(state, task.proof)
        return tallies, segmentation_quality(tallies)
    out, truth = logits(bank.features(state, task.proof), task.subject.own_head), task.labels[task.proof]
    correct = count_correct(out, truth)
    return correct, quality(correct, count_correct(out, truth, 5) if task.subject.outputs > 5 else None)


def recover(
    model: Model | nn.Module | str,
    data: Data,
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
    cache_gb: float | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Preprocessing, Recovery]:
    """The model at a lower resolution with its quality won back on the training images, as far as `max_drop` requires.

    Returns (network, preprocessing, recovery): the network takes images made by the preprocessing, the recovery names
    the rung that it took and what each rung gave and cost. The model given is not touched; no validation image is looked at.
    """
    if (candidate is None) == (resolution is None):
        raise DownresError("Give recover either a candidate or a resolution: for example resolution=128.")
    subject = prepare_model(model, data, preprocessing=preprocessing)
    task = prepare(subject, data, val_fraction=val_fraction, seed=seed, cache_gb=cache_gb, progress=progress)
    candidate = candidate or Candidate(like(task.subject.native.resolution, as_resolution(resolution)))  # type: ignore[arg-type]
    if candidate.resolution is None:
        candidate = candidate.at(task.subject.native.resolution)
    check_planned([candidate], subject)
    bank = subject.bank(None, runtime=runtime, threads=threads, progress=progress)
    task.fill(bank)
    if isinstance(bank, MaskBank):
        known = masks.make_reference(bank, subject.native_state, 0, task.data.folds[0], seed)
        state, recovery = masks.climb(bank, candidate, known, Budget(max_drop), tuple(r for r in rungs if r in MASK_RUNGS))
        return bank.network(state), bank.preprocessing_of(state), recovery
    reference = reference_of(task, bank, 0, task.data.folds[0], rungs)
    final = climb(bank, candidate, reference, task.labels, task.subject.outputs, Budget(max_drop), rungs)
    return final_network(task, bank, final), bank.preprocessing_of(final.state), final.recovery
