"""A model and its data made ready for all stages, the model first: costs need no images."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ..data import Dataset, Fold, data_classes, open_data
from ..errors import DownresError
from ..families import Model, load_model
from ..families.adapter import find_adapter
from ..probe import find_head, total_stride
from ..records import Candidate, Preprocessing
from ..recover.features import FeatureBank, State
from ..recover.head import Head
from ..recover.ladder import split_tuning
from ..reduction import divided_by, made_for
from .plan import Design

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """The model of a task, before any data are opened.

    head: dotted name of the final linear layer or None; width: its inputs (without a head the number of logits);
    outputs: number of logits; fit_new: the head is a place to be filled, to be fitted on the training images first.
    """

    model: Model
    head: str | None
    width: int
    outputs: int
    fit_new: bool

    @property
    def native(self) -> Candidate:
        """The original as a candidate: its own resolution, nothing else."""
        return Candidate(self.model.preprocessing.resolution)

    @property
    def native_state(self) -> State:
        return State(self.native, self.model.preprocessing.crop_ratio)

    def design(self) -> Design:
        return design_of(self.model)

    @property
    def channels(self) -> int:
        return len(self.model.preprocessing.mean)

    @property
    def own_head(self) -> Head | None:
        """The head that the model came with (of no use when a new one is to be fitted)."""
        if self.head is None:
            return None
        linear = self.model.module.get_submodule(self.head)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().numpy().astype(np.float32)
        bias = np.zeros(len(weight), np.float32) if linear.bias is None else linear.bias.detach().numpy().astype(np.float32)
        return Head(weight, bias)

    def bank(self, folder: Path | None, **options) -> FeatureBank:  # type: ignore[no-untyped-def]
        """A bank without images yet: it can export and count; `Task.fill` gives it images."""
        return FeatureBank(self.model.module, self.head, self.width, self.model.preprocessing, folder=folder, **options)

    def describe(self) -> dict:
        """What measurements depend on, as far as the model goes."""
        return {
            "model": self.model.spec,
            "weights": self.model.weights,
            "model_sha256": self.model.fingerprint(),
            "preprocessing": self.model.preprocessing.to_json(),
            "fit_head": self.fit_new,
        }


@dataclass(frozen=True)
class Task:
    """What all stages that look at images work on."""

    subject: Subject
    data: Dataset
    seed: int

    @property
    def proof(self) -> np.ndarray:
        """Indices of all proof images in a fixed order: the test images of all folds."""
        return np.concatenate([fold.test for fold in self.data.folds])

    def everything(self) -> Fold:
        """The fold whose ladder makes the shipped model: all training images (with cross folds: every image)."""
        train = np.unique(np.concatenate([fold.train for fold in self.data.folds]))
        return Fold(train, np.zeros(0, np.int64))

    def fill(self, bank: FeatureBank) -> FeatureBank:
        """Give the bank the images, and for each fold (and for everything) those that BatchNorm may be recalibrated on."""
        folds = (*self.data.folds, self.everything())
        fitting = [split_tuning(fold, self.data.labels, len(self.data.folds), self.seed)[0] for fold in folds]
        bank.images = self.data.images
        bank.calibration = [np.random.default_rng([self.seed, 2]).permutation(indices) for indices in fitting]
        return bank

    def describe(self) -> dict:
        """What measurements depend on, as far as the images go, and what is said of them."""
        return {
            "description": self.data.description,
            "sha256": self.data.fingerprint(),
            "fold_count": len(self.data.folds),
            "licence": self.data.licence,
            "skipped": [skip.to_json() for skip in self.data.skipped],
            "majority_top1": 100 * float(np.bincount(self.data.labels[self.proof]).max() / len(self.proof)),
        }


def prepare_model(
    model: Model | nn.Module | str,
    data: Dataset | str | Path,
    *,
    fit_head: bool = False,
    preprocessing: Preprocessing | None = None,
) -> Subject:
    """The model, its head found or replaced. Of the data only the class folders are listed, and only for a new head."""
    model = as_model(model, preprocessing)
    module, p = model.module, model.preprocessing
    head, width, outputs = find_head(made_for(module, p.hw), (len(p.mean), *p.hw))
    if fit_head:
        if head is None:
            raise DownresError(
                "No head can be fitted: the output of this model does not come from a linear layer; "
                "give a model that has one, or weights for these classes."
            )
        outputs = len(data.classes if isinstance(data, Dataset) else data_classes(data))
        module = copy.deepcopy(module)
        linear = nn.Linear(width, outputs)
        nn.init.zeros_(linear.weight)  # a place to be filled; random numbers would make every run another one
        nn.init.zeros_(linear.bias)
        module.set_submodule(head, linear)
        weights = f"{model.weights}; head fitted anew on the training images"
        model = Model(module, model.preprocessing, model.spec, weights, outputs)
    elif not isinstance(data, Dataset):
        data_classes(data, outputs)  # a wrong folder is said at once, not after the costs
    return Subject(model, head, width, outputs, fit_head)


def prepare(
    subject: Subject,
    data: Dataset | str | Path,
    *,
    folds: int | None = None,
    val_fraction: float = 0.5,
    parts: tuple[str, ...] = ("train", "val"),
    seed: int = 0,
    progress: Progress | None = None,
) -> Task:
    """The data opened (every image decoded, once) and checked against the model."""
    if not isinstance(data, Dataset):
        data = open_data(data, None if subject.fit_new else subject.outputs, parts, val_fraction, folds, seed, progress)
    task = Task(subject, data, seed)
    if len(data.images) == 0 or len(task.proof) == 0:
        raise DownresError("There are no images left to measure quality on: check the folder and the list of skipped images.")
    if int(data.labels.max()) >= subject.outputs:
        raise DownresError(
            f"The data have labels up to {int(data.labels.max())}, the model has {subject.outputs} outputs: "
            "use fit_head to fit a new head, or other weights."
        )
    return task


def as_model(model: Model | nn.Module | str, preprocessing: Preprocessing | None = None) -> Model:
    """A specification, a bare module or a loaded model as a loaded model."""
    if isinstance(model, str):
        model = load_model(model)
    if isinstance(model, nn.Module):
        from ..families.generic import preprocessing as assumed

        # Measured on the CPU in single precision, wherever and however the caller keeps it.
        return Model(copy.deepcopy(model).cpu().float().eval(), preprocessing or assumed(model))
    if preprocessing is not None:
        model = dataclasses.replace(model, preprocessing=preprocessing)
    return model


def design_of(model: Model) -> Design:
    """What a plan of candidates needs to know of the model."""
    p, adapter = model.preprocessing, find_adapter(model.module)
    patch = adapter.patch[0] if adapter is not None and adapter.patch is not None else None
    original = made_for(model.module, p.hw)
    return Design(
        p.resolution,
        total_stride(original, p.hw, len(p.mean)),
        patch,
        adapter is not None and bool(adapter.block_names()),
        divided_by(original, p.hw, len(p.mean)),
    )
