"""Labels of classes from elsewhere than folders' names: a CSV or JSON file, a Hugging Face dataset, any PyTorch dataset."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from ...errors import DownresError
from ...images import Progress, from_files
from ...images.images import cache_bytes
from ...images.parts import divide, listed_names
from ..table import Table, no_class, number_in, open_rows, read_table
from .folders import Dataset, whole

MOST_CLASSES = 1_000_000
"""That a label may number; above it, it is a key of something else."""


@dataclass(frozen=True)
class Labels:
    """A table with one label a picture: names, or numbers from 0 on."""

    table: Table

    @classmethod
    def read(cls, path: str | Path) -> "Labels":
        table = read_table(path)
        if len(table.names) != 1:
            raise DownresError(
                f"A classifier has one label a picture, {table.path} has {len(table.names)} columns of them "
                f"({listed_names(table.names)}): give file,label, or `task='multilabel'` or `task='regression'`."
            )
        rows = [(file, row[0], number_in(row[0])) for file, row in zip(table.files, table.cells, strict=True)]
        all_numbers = all(number is not None for _, _, number in rows)  # among words inf is one of them
        for file, value, number in rows:
            if value in ("", "None", "nan", "NaN"):
                raise DownresError(f"{table.path} has no label for {file}: give it one, or leave its row out.")
            if number is not None and (all_numbers or math.isfinite(number)) and not number.is_integer():
                raise no_class(f"The label {value} of {file} in {table.path}")
        return cls(dataclasses.replace(table, cells=tuple((_plain(value, number),) for _, value, number in rows)))

    def names(self, outputs: int | None) -> tuple[str, ...]:
        """The classes in the order of the outputs: numbers count from 0, names are sorted. Checked against the outputs."""
        values = [row[0] for row in self.table.cells]
        if all(value.isdecimal() for value in values):
            if max(map(int, values)) >= MOST_CLASSES:
                raise DownresError(
                    f"{self.table.path} has labels up to {max(map(int, values)):.3g}, beyond {MOST_CLASSES} classes: "
                    "number them from 0, or name them in words."
                )
            count = 1 + max(map(int, values)) if outputs is None else outputs
            if max(map(int, values)) >= count:
                raise DownresError(
                    f"{self.table.path} has labels up to {max(map(int, values))}, the network {count} outputs: "
                    "number the classes from 0, or pass `fit_head=True`."
                )
            return tuple(str(i) for i in range(count))
        found = tuple(sorted(set(values)))
        if outputs is not None and len(found) != outputs:
            raise DownresError(
                f"The weights have {outputs} outputs and {self.table.path} {len(found)} labels ({listed_names(found)}): "
                "pass `fit_head=True` to fit a new linear head for them, or number them as the outputs are."
            )
        if len(found) < 2:
            raise DownresError(f"A classifier needs at least 2 classes, {self.table.path} has 1 ({found[0]}): add the others.")
        return found

    def indices(self, classes: Sequence[str]) -> np.ndarray:
        index = {name: i for i, name in enumerate(classes)}
        return np.array(
            [index[str(int(row[0])) if classes_are_numbers(classes) else row[0]] for row in self.table.cells], np.int64
        )


def _plain(value: str, number: float | None) -> str:
    """A whole number without what pandas writes it with beside missing ones: 2.0."""
    return value if number is None or value.isdecimal() or not number.is_integer() else str(int(number))


def classes_are_numbers(classes: Sequence[str]) -> bool:
    """Whether labels are the outputs' numbers, and no names."""
    return list(classes) == [str(i) for i in range(len(classes))]


def open_labelled(folder: str | Path, labels: Labels, outputs: int | None, **options: Any) -> Dataset:
    """The pictures of a folder with the labels of a table; options as for `open_folder`."""
    classes = labels.names(outputs)
    numbers = labels.indices(classes)
    images, rows, folds, skipped, how = open_rows(folder, labels.table, numbers, **options)
    order = (
        "" if outputs is None else f"; outputs taken to be: {listed_names([f'{i} {name}' for i, name in enumerate(classes)])}"
    )
    description = f"{len(images)} images of {len(set(numbers.tolist()))} classes, {how}{order}."
    return Dataset(images, numbers[rows], classes, folds, tuple(skipped), description)


def is_dataset(data: Any) -> bool:
    """Whether it is a map-style dataset: Hugging Face's, or one of PyTorch's, of (image, target)."""
    known = (str, Path, Dataset, IterableDataset)  # PyTorch's have a __getitem__ that is none, and may have a length
    return not isinstance(data, known) and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def no_data(data: Any) -> DownresError:
    """Of what is neither a folder nor gives its items by index."""
    name = type(data).__name__
    if hasattr(data, "__iter__"):
        return DownresError(
            f"A {name} gives its items one after the other, and a proof looks at some of them many times: give what it reads, "
            "the folder of its shards or parquet files as `data='shards/'`, or the dataset, by load_dataset without streaming."
        )
    return DownresError(f"A {name} is no data of a classifier: give a folder, or a dataset of (image, target).")


def names_of(dataset: Any, outputs: int | None) -> tuple[str, ...]:
    """The classes of a dataset: its own names, else numbers."""
    if getattr(dataset, "target_transform", None) is not None:  # its names are of other numbers than its targets
        return tuple(f"class {i}" for i in range(outputs or int(_labels_in(dataset).max()) + 1))
    features = getattr(dataset, "features", None)
    if features is not None and hasattr(features, "get"):
        names = getattr(features.get(_label_column(dataset)), "names", None)
    else:
        names = getattr(dataset, "classes", None)
    count = len(names) if names else outputs or int(_labels_in(dataset).max()) + 1
    if outputs is not None and names and len(names) != outputs:
        raise DownresError(
            f"The weights have {outputs} outputs and the dataset {len(names)} classes ({listed_names(list(names))}): "
            "use fit_head to fit a new linear head for them."
        )
    return tuple(names) if names else tuple(f"class {i}" for i in range(count))


def from_dataset(
    dataset: Any,
    outputs: int | None,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
    channels: int = 3,
    train_images: int | None = None,
) -> Dataset:
    """Its pictures, all of them, each taken once and kept within the cache. Targets are whole numbers; pictures are PIL images
    or uint8 arrays (H, W) or (H, W, 3): a dataset that makes tensors of them is to be given without its transforms.
    """
    labels, classes = _labels_in(dataset), names_of(dataset, outputs)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DownresError(
            f"Labels of {len(classes)} classes are 0 to {len(classes) - 1}, {labels.min()} to {labels.max()} are not: "
            "number the classes from 0."
        )
    pictures = _Pictures(dataset)
    # In one thread: what a dataset of somebody else's does in two is not known.
    images, _ = from_files(
        range(len(dataset)),  # type: ignore[arg-type]  # what `read` is given
        [f"item {i}" for i in range(len(dataset))],
        progress,
        workers=1,
        read=pictures.__getitem__,
        cache=cache_bytes(cache_gb),
    )
    divided = divide(labels, parts, val_fraction, folds, seed)
    description = (
        f"{len(labels)} images of {len(classes)} classes, given in Python, {len(divided)} fold{'s' * (len(divided) > 1)}."
    )
    return Dataset(images, labels, classes, divided, (), description)


class _Pictures(Sequence[np.ndarray]):
    """The pictures of a dataset as uint8 arrays."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> np.ndarray:  # type: ignore[override]  # one at a time: no slices
        item = self.dataset[int(index)]
        picture = item[_image_column(self.dataset)] if isinstance(item, dict) else item[0]
        if isinstance(picture, Image.Image):
            picture = np.array(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise DownresError(
                f"Item {index} of the dataset is a {type(picture).__name__}, no PIL image and no uint8 array (H, W, 3): "
                "give the dataset without its transforms."
            )
        return picture


def _labels_in(dataset: Any) -> np.ndarray:
    """int64 (n,), without decoding where the dataset tells them apart."""
    if isinstance(getattr(dataset, "column_names", None), dict):
        raise DownresError(f"A dictionary of datasets has several parts: give one of {listed_names(list(dataset))}.")
    try:
        if hasattr(dataset, "column_names"):
            values = dataset[_label_column(dataset)]
        elif hasattr(dataset, "targets"):
            values, transform = dataset.targets, getattr(dataset, "target_transform", None)
            if transform is not None:
                values = [transform(v) for v in np.asarray(values).tolist()]
        else:
            values = [dataset[i][1] for i in range(len(dataset))]
        found = np.asarray(values)
        if not len(found):
            raise DownresError(f"The {type(dataset).__name__} given as `data` is empty: give one with pictures.")
    except (LookupError, TypeError, ValueError):
        raise DownresError(
            f"A {type(dataset).__name__} does not give (image, target) by index: give the dataset itself, whose items are "
            "pictures with a class number, or a folder."
        ) from None
    return whole(found, lambda i: f"item {i}")


def _label_column(dataset: Any) -> str:
    return next((n for n in ("label", "labels", "fine_label", "target") if n in dataset.column_names), "label")


def _image_column(dataset: Any) -> str:
    return next((n for n in ("image", "img", "picture") if n in dataset.column_names), "image")
