"""A model and its data made ready for all stages, the model first: costs need no images."""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data import Dataset, Fold, MaskDataset, MaskFolder, data_classes, find_masks, mask_classes, open_data, open_masks
from ..data.mask_layouts import locate
from ..errors import DownresError
from ..families import Model, load_model
from ..families.adapter import find_adapter
from ..parse import Resolution, as_hw
from ..probe import Answer, find_answer, total_stride
from ..records import LOGITS, Candidate, Dense, Preprocessing
from ..recover import masks
from ..recover.bank import Bank, State
from ..recover.features import FeatureBank
from ..recover.head import Head
from ..recover.ladder import split_tuning
from ..recover.masks import MaskBank
from ..reduction import divided_by, made_for, takes_any_size
from ..reductions.dense import check_size
from .plan import Design, check_trained

Progress = Callable[[str, int, int], None]
Data = Dataset | MaskDataset | MaskFolder | str | Path
"""What `search` and its parts take as data: opened, found, or the name of a folder."""


@dataclass(frozen=True)
class Subject:
    """The model of a task, before any data are opened.

    head: dotted name of the final linear layer or None; width: its inputs (without a head the number of logits);
    outputs: number of logits; fit_new: the head is a place to be filled, to be fitted on the training images first.
    dense: of a segmentation network, its full-size answer; None for a classifier.
    """

    model: Model
    head: str | None
    width: int
    outputs: int
    fit_new: bool
    dense: Dense | None = None

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

    def bank(self, folder: Path | None, **options) -> FeatureBank | MaskBank:  # type: ignore[no-untyped-def]
        """A bank without images yet: it can export and count; `Task.fill` gives it images."""
        if self.dense is not None:
            return MaskBank(
                self.model.module, self.outputs, self.dense, self.model.preprocessing, folder=folder, **options
            )  # fmt: skip
        return FeatureBank(self.model.module, self.head, self.width, self.model.preprocessing, folder=folder, **options)

    def describe(self) -> dict:
        """What measurements depend on, as far as the model goes."""
        return {
            "model": self.model.spec,
            "weights": self.model.weights,
            "model_sha256": self.model.fingerprint(),
            "preprocessing": self.model.preprocessing.to_json(),
            "fit_head": self.fit_new,
            "dense": self.dense and self.dense.to_json(),
        }


@dataclass(frozen=True)
class Task:
    """What all stages that look at images work on."""

    subject: Subject
    data: Dataset | MaskDataset
    seed: int

    @property
    def labels(self) -> np.ndarray:
        """Of a classifier's images."""
        assert isinstance(self.data, Dataset)
        return self.data.labels

    @property
    def proof(self) -> np.ndarray:
        """Indices of all proof images in a fixed order: the test images of all folds."""
        return np.concatenate([fold.test for fold in self.data.folds])

    def everything(self) -> Fold:
        """The fold whose ladder makes the shipped model: the training images of all folds together."""
        train = np.unique(np.concatenate([fold.train for fold in self.data.folds]))
        return Fold(train, np.zeros(0, np.int64))

    def fill(self, bank: Bank) -> None:
        """Give the bank the images, and for each fold (and for everything) those that BatchNorm may be recalibrated on."""
        folds = (*self.data.folds, self.everything())
        if isinstance(self.data, MaskDataset):
            assert isinstance(bank, MaskBank)
            bank.masks = self.data.masks
            fitting = [masks.split_tuning(fold, self.seed)[0] for fold in folds]
        else:
            fitting = [split_tuning(fold, self.data.labels, len(self.data.folds), self.seed)[0] for fold in folds]
        bank.images = self.data.images
        bank.calibration = [np.random.default_rng([self.seed, 2]).permutation(indices) for indices in fitting]

    def describe(self) -> dict:
        """What measurements depend on, as far as the images go, and what is said of them."""
        return {
            "description": self.data.description,
            "sha256": self.data.fingerprint(),
            "fold_count": len(self.data.folds),
            "licence": self.data.licence,
            "skipped": [skip.to_json() for skip in self.data.skipped],
            **self._kind(),
        }

    def _kind(self) -> dict:
        if isinstance(self.data, MaskDataset):
            return {"classes": list(self.data.classes), "colours": self.data.colours, "absent": list(self.data.absent)}
        return {"majority_top1": 100 * float(np.bincount(self.data.labels[self.proof]).max() / len(self.proof))}


def prepare_model(
    model: Model | nn.Module | str,
    data: Data,
    *,
    fit_head: bool = False,
    preprocessing: Preprocessing | None = None,
    label_size: Resolution | None = None,
    output: str = "logits",
    upsampling: str = "bilinear",
) -> Subject:
    """The model: a classifier, its head found or replaced, or a segmentation network and its full-size answer.

    Of the data only folders, and of masks their headers, are looked at: a wrong folder is said at once, not after the costs.
    """
    Dense((1, 1), output, upsampling)  # for its errors
    model = as_model(model, preprocessing)
    answer = _answer(model)
    if answer.size is not None:
        if fit_head:
            raise DownresError(
                "A head is fitted for classes of whole images, this network answers for every pixel: leave --fit-head out."
            )
        return _segmentation(model, answer, data, label_size, output, upsampling)
    chosen = label_size is not None or output != LOGITS or upsampling != "bilinear"
    if chosen or isinstance(data, (MaskDataset, MaskFolder)) or _has_masks(data):
        raise DownresError(
            "Masks, a label size, another output or upsampling are for segmentation networks, this one returns one row of "
            "logits an image: give class folders and none of these, or another network."
        )
    head, width, outputs = answer.head, answer.width, answer.outputs
    if fit_head:
        if head is None:
            raise DownresError(
                "No head can be fitted: the output of this model does not come from a linear layer; "
                "give a model that has one, or weights for these classes."
            )
        outputs = len(data.classes if isinstance(data, Dataset) else data_classes(data))
        module = copy.deepcopy(model.module)
        linear = nn.Linear(width, outputs)
        nn.init.zeros_(linear.weight)  # a place to be filled; random numbers would make every run another one
        nn.init.zeros_(linear.bias)
        module.set_submodule(head, linear)
        weights = f"{model.weights}; head fitted anew on the training images"
        model = Model(module, model.preprocessing, model.spec, weights, outputs)
    elif not isinstance(data, Dataset):
        data_classes(data, outputs)
    return Subject(model, head, width, outputs, fit_head)


def _has_masks(data: Dataset | str | Path) -> bool:
    """Whether it is a folder of images and masks, which would pass for two classes of images."""
    if isinstance(data, Dataset):
        return False
    try:
        return bool(locate(Path(data).expanduser(), None))
    except DownresError:
        return False


def _at_label_size(model: Model, p: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """For a network that nobody chose a resolution for: its labels' size, brought up to what it divides."""
    source = re.sub(r", \d+(x\d+)? px", "", p.source)  # the size that is not used
    for unit in (1, 8, 16, 32, 64):
        hw = (math.ceil(size[0] / unit) * unit, math.ceil(size[1] / unit) * unit)
        said = f"{source}; used at the labels' size" + (f", to multiples of {unit}" if hw != size else "")
        found = dataclasses.replace(p, resolution=hw, source=said, any_size=False)
        try:
            find_answer(model.module, (len(p.mean), *hw))
        except DownresError:
            continue
        return found
    return p


def with_classes(data: Data, classes: str | Path | None) -> Data:
    """The data with the file that names the classes of their masks, if one was given."""
    if classes is None:
        return data
    if isinstance(data, (Dataset, MaskDataset, MaskFolder)):
        raise DownresError("A file of classes goes with a folder of masks, these data are opened already: leave it out.")
    return find_masks(data, classes=classes)


def _answer(model: Model) -> Answer:
    p = model.preprocessing
    return find_answer(made_for(model.module, p.hw), (len(p.mean), *p.hw))


def _segmentation(
    model: Model,
    answer: Answer,
    data: Data,
    label_size: Resolution | None,
    output: str,
    upsampling: str,
) -> Subject:
    """A segmentation network: nothing of a picture is cut off, and the answer has the size of the labels."""
    if isinstance(data, Dataset):
        raise DownresError("A segmentation network needs a mask for every image, these data have labels: give masks.")
    known = data if isinstance(data, MaskDataset) else mask_classes(data, answer.outputs)
    if isinstance(data, MaskDataset) and len(data.classes) != answer.outputs:
        raise DownresError(f"The masks have {len(data.classes)} classes, the network {answer.outputs}: give other weights.")
    p = model.preprocessing
    if p.fit == "crop":
        source = re.sub(r", crop ratio [\d.]+", "", f"{p.source}; whole pictures, stretched")
        p = dataclasses.replace(p, fit="stretch", crop_ratio=1.0, source=source)
    if p.any_size and known.label_size is not None and takes_any_size(model.module):
        p = _at_label_size(model, p, known.label_size)
    if p != model.preprocessing:
        model = dataclasses.replace(model, preprocessing=p)
        answer = _answer(model)
    assert answer.size is not None
    if label_size is not None:
        size = as_hw(label_size)
        check_size(size, answer.size)
    else:
        wanted = known.label_size or p.hw  # smaller than the logits: each image's are resized to its own mask
        size = wanted if wanted[0] >= answer.size[0] and wanted[1] >= answer.size[1] else answer.size
    dense = Dense(size, output, upsampling, answer.align_corners)
    return Subject(model, None, answer.width, answer.outputs, False, dense)


def prepare(
    subject: Subject,
    data: Data,
    *,
    folds: int | None = None,
    val_fraction: float = 0.5,
    parts: tuple[str, ...] = ("train", "val"),
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
) -> Task:
    """The data opened (every image that is looked at decoded, once) and checked against the model."""
    options: dict[str, Any] = {"parts": parts, "val_fraction": val_fraction, "folds": folds, "seed": seed, "progress": progress}
    options["cache_gb"] = cache_gb
    if not isinstance(data, (Dataset, MaskDataset)):
        outputs = None if subject.fit_new else subject.outputs
        if subject.dense is not None:
            data = open_masks(data, outputs=outputs, **options)
        else:
            assert not isinstance(data, MaskFolder)
            data = open_data(data, outputs, **options)
    task = Task(subject, data, seed)
    if len(data.images) == 0 or len(task.proof) == 0:
        raise DownresError("There are no images left to measure quality on: check the folder and the list of skipped images.")
    if isinstance(data, Dataset) and int(data.labels.max()) >= subject.outputs:
        raise DownresError(
            f"The data have labels up to {int(data.labels.max())}, the model has {subject.outputs} outputs: "
            "use fit_head to fit a new head, or other weights."
        )
    return task


def check_planned(candidates: list[Candidate], subject: Subject) -> None:
    """DownresError for a candidate whose quality cannot be measured as it is."""
    check_trained(candidates)
    for c in candidates:
        if subject.dense is not None and c.ragged != "error":
            raise DownresError(
                f"An answer to every pixel needs whole inputs, '{c}' would be cut or padded: give a resolution that the "
                "network divides."
            )


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
