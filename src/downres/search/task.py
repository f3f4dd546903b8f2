"""A model and its data made ready: the head found or fitted anew, everything that features depend on in one place."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ..data import Dataset, Fold, open_data
from ..errors import DownresError
from ..families import Model, load_model
from ..families.weights import fingerprint
from ..probe import find_head, input_size_of
from ..records import Candidate, Preprocessing
from ..recover.features import FeatureBank, State
from ..recover.head import Head

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Task:
    """What all stages work on. head: dotted name of the final linear layer or None; outputs: number of logits."""

    model: Model
    data: Dataset
    head: str | None
    width: int
    outputs: int
    fit_new: bool
    seed: int

    @property
    def native(self) -> Candidate:
        """The original as a candidate: its own resolution, nothing else."""
        return Candidate(self.model.preprocessing.resolution)

    @property
    def native_state(self) -> State:
        return State(self.native, self.model.preprocessing.crop_ratio)

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

    @property
    def proof(self) -> np.ndarray:
        """Indices of all proof images in a fixed order: the test images of all folds."""
        return np.concatenate([fold.test for fold in self.data.folds])

    def everything(self) -> Fold:
        """The fold whose ladder makes the shipped model: all training images (with cross folds: every image)."""
        train = np.unique(np.concatenate([fold.train for fold in self.data.folds]))
        return Fold(train, np.zeros(0, np.int64))

    def bank(self, folder: Path | None, **options) -> FeatureBank:  # type: ignore[no-untyped-def]
        from ..recover.ladder import split_tuning

        folds = (*self.data.folds, self.everything())
        calibration = [split_tuning(fold, len(self.data.folds), self.seed)[0] for fold in folds]
        shuffled = [np.random.default_rng([self.seed, 2]).permutation(indices) for indices in calibration]
        return FeatureBank(
            self.model.module, self.head, self.width, self.data.images, self.model.preprocessing,
            calibration=shuffled, folder=folder, **options,
        )  # fmt: skip

    def describe(self) -> dict:
        """What a measurement depends on, for the store."""
        return {
            "model": self.model.spec,
            "weights": self.model.weights,
            "model_sha256": fingerprint(self.model.module),
            "preprocessing": self.model.preprocessing.to_json(),
            "data": self.data.description,
            "data_sha256": self.data.fingerprint(),
            "fit_head": self.fit_new,
            "seed": self.seed,
        }


def prepare(
    model: Model | nn.Module | str,
    data: Dataset | str | Path,
    *,
    fit_head: bool = False,
    folds: int | None = None,
    val_fraction: float = 0.5,
    parts: tuple[str, ...] = ("train", "val"),
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Task:
    """Model and data, checked against each other. A bare `nn.Module` needs a preprocessing unless it carries its own."""
    model = as_model(model, preprocessing)
    module = model.module
    size = (len(model.preprocessing.mean), *model.preprocessing.hw)
    head, width, outputs = find_head(module, size)
    if fit_head:
        if head is None:
            raise DownresError("No head can be fitted: the output of this model does not come from a linear layer.")
        dataset = data if isinstance(data, Dataset) else open_data(data, None, parts, val_fraction, folds, seed, progress)
        outputs = len(dataset.classes)
        module = copy.deepcopy(module)
        linear = nn.Linear(width, outputs)
        nn.init.zeros_(linear.weight)  # a place to be filled; random numbers would make every run another one
        nn.init.zeros_(linear.bias)
        module.set_submodule(head, linear)
        model = Model(
            module, model.preprocessing, model.spec, f"{model.weights}; head fitted anew on the training images", outputs
        )
    else:
        dataset = data if isinstance(data, Dataset) else open_data(data, outputs, parts, val_fraction, folds, seed, progress)
        if int(dataset.labels.max()) >= outputs:
            raise DownresError(
                f"The data have labels up to {int(dataset.labels.max())}, the model has {outputs} outputs: "
                "use fit_head to fit a new head, or other weights."
            )
    if len(dataset.images) == 0 or sum(len(f.test) for f in dataset.folds) == 0:
        raise DownresError("There are no images left to measure quality on: check the folder and the list of skipped images.")
    return Task(model, dataset, head, width, outputs, fit_head, seed)


def as_model(model: Model | nn.Module | str, preprocessing: Preprocessing | None = None) -> Model:
    """A specification, a bare module or a loaded model as a loaded model."""
    if isinstance(model, str):
        model = load_model(model)
    if isinstance(model, nn.Module):
        from ..families.generic import preprocessing as assumed

        found = preprocessing or assumed(model)
        if preprocessing is None and not getattr(model, "pretrained_cfg", None):
            found = found.at(resolution=input_size_of(model)[1:])  # type: ignore[arg-type]
        return Model(copy.deepcopy(model).eval(), found)
    if preprocessing is not None:
        model = Model(model.module, preprocessing, model.spec, model.weights, model.num_classes)
    return model
