"""Labels from elsewhere than folders' names: what is a class, and what is a measurement that would be cut to one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from downres import DownresError, Fold, from_arrays
from downres.images.images import from_arrays as images_from_arrays
from downres.tasks.classification.folders import Dataset
from downres.tasks.classification.labels import MOST_CLASSES, Labels, from_dataset

from ..conftest import write_csv

NAN, INF = float("nan"), float("inf")


class Pairs:
    """A dataset of (picture, target); more: attributes that datasets have."""

    def __init__(self, given: Any, **more: Any) -> None:
        self.pairs = given
        vars(self).update(more)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        return np.zeros((4, 4, 3), np.uint8), self.pairs[index]


class Columns(Pairs):
    """As Hugging Face has them: a column by its name."""

    column_names = ("image", "label")

    def __getitem__(self, index: Any) -> Any:
        return self.pairs if index == "label" else {"image": super().__getitem__(index)[0]}


def arrays(labels: Any) -> Dataset:
    images = images_from_arrays(np.zeros((3, 4, 4), np.uint8))
    return from_arrays(images, labels, ("x", "y"), [Fold(np.array([0]), np.array([1, 2]))], "Three squares.")


def table(folder: Path, values: Any, ending: str) -> Path:
    if ending == "csv":
        return write_csv(folder / "labels.csv", ["file", "label"], [[f"{i}.png", v] for i, v in enumerate(values)])
    file = folder / "labels.json"
    file.write_text(json.dumps({f"{i}.png": v for i, v in enumerate(values)}))
    return file


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 1],
        [0.0, 1.0, 1.0],
        [False, True, True],
        ["0", "1", "1.0"],
        np.array([0, 1, 1], np.uint8),
        np.array([0, 1, 1], np.float16),
        np.array([0, 1, 1], object),
        torch.tensor([0, 1, 1]),
        torch.tensor([0.0, 1.0, 1.0]),
    ],
)
def test_whole_numbers_are_classes_in_whatever_type(labels: Any) -> None:
    for found in (arrays(labels), from_dataset(Pairs(list(labels)), None), from_dataset(Columns(labels), None)):
        assert found.labels.tolist() == [0, 1, 1] and found.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(1.7, "1.7"), (np.float32(0.5), "0.5"), ("1.7", "1.7"), (-0.25, "-0.25"), (NAN, "nan"), (INF, "inf"), (1e300, r"1e\+300")],
)
def test_a_number_that_is_no_class_is_named_and_never_cut(wrong: Any, says: str) -> None:
    labels, told = [0, wrong, 1], f"^The label {says} of {{}} is no class, which is a name or a whole number from 0 on: for"
    with pytest.raises(DownresError, match=told.format("photo 1")):
        arrays(labels)
    for dataset in (Pairs(labels), Columns(labels), Pairs(labels, targets=labels)):
        with pytest.raises(DownresError, match=told.format("item 1")):
            from_dataset(dataset, None)
    with pytest.raises(DownresError, match=told.format("photo 1")):  # a data set put together by hand
        Dataset(arrays([0, 1, 1]).images, labels, ("x", "y"), (), (), "")  # type: ignore[arg-type]


def test_targets_are_not_cut_before_they_are_transformed() -> None:
    swapped = {"target_transform": lambda target: 1 - target}
    assert from_dataset(Pairs([], targets=torch.tensor([0, 1, 1]), **swapped), 2).labels.tolist() == [1, 0, 0]
    with pytest.raises(DownresError, match="The label 0.75 of item 0"):
        from_dataset(Pairs([], targets=[0.25, 1.0], **swapped), 2)


def test_what_is_no_number_at_all_is_named() -> None:
    for wrong in ("cat", None, "1j"):
        with pytest.raises(DownresError, match="^Labels in Python are whole numbers from 0 on, .* of photo 1 is none: number"):
            arrays([0, wrong, 1])
    with pytest.raises(DownresError, match=r"one label an image, an array \(3, 2\) is not that: .* `task='multilabel'`"):
        from_dataset(Pairs([[0, 1], [1, 0], [1, 1]]), None)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["2.0", "0", "1.0"], ("0", "1", "2")),  # as pandas writes whole numbers beside missing ones
        (["1e0", "0", "0"], ("0", "1")),
        (["-1.0", "1", "1"], ("-1", "1")),
        (["cat", "dog", "cat"], ("cat", "dog")),
        (["v1.7", "1.7.2", "v1.7"], ("1.7.2", "v1.7")),
        (["inf", "sound", "inf"], ("inf", "sound")),
        ([True, False, True], ("False", "True")),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_names_and_whole_numbers_of_a_table(tmp_path: Path, values: list, classes: tuple, ending: str) -> None:
    found = Labels.read(table(tmp_path, values, ending))
    assert found.names(None) == classes
    plain = [str(int(float(v))) if classes[0] in ("0", "-1") else str(v) for v in values]
    assert [classes[i] for i in found.indices(classes)] == plain


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["0", "1.7", "1"], r"^The label 1\.7 of 1\.png in .*labels\.(csv|json) is no class, .* `task='regression'`"),
        (["cat", "0.5", "dog"], r"The label 0\.5 of 1\.png"),
        (["1", "-.5", "0"], r"The label -\.5 of 1\.png"),
        (["1", "2.5e-1", "0"], r"The label 2\.5e-1 of 1\.png"),
        (["1", "inf", "0"], r"The label inf of 1\.png"),
        (["1", "nan", "0"], r"has no label for 1\.png"),
        (["1", "", "0"], r"has no label for 1\.png"),
        (["1", "1e300", "0"], rf"has labels up to 1e\+300, beyond {MOST_CLASSES} classes"),
        (["1", "20261130", "0"], "has labels up to 2.03e\\+07, beyond"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_measurements_in_a_table_are_refused(tmp_path: Path, values: list, says: str, ending: str) -> None:
    with pytest.raises(DownresError, match=says):
        Labels.read(table(tmp_path, values, ending)).names(None)


def test_numbers_of_json_are_read_as_those_of_csv(tmp_path: Path) -> None:
    with pytest.raises(DownresError, match=r"The label 1\.7 of 0\.png"):
        Labels.read(table(tmp_path, [1.7, 0], "json"))
    with pytest.raises(DownresError, match=r"has no label for 1\.png"):
        Labels.read(table(tmp_path, [1, None], "json"))
    assert Labels.read(table(tmp_path, [1.0, 0], "json")).names(None) == ("0", "1")


def test_a_dataset_without_pictures_is_refused() -> None:
    with pytest.raises(DownresError, match="is empty"):
        from_dataset(SimpleNamespace(targets=[]), None)


def test_items_of_a_dataset_are_taken_once() -> None:
    calls: list[int] = []

    class Counted(Pairs):
        def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
            calls.append(index)
            return np.full((4, 4, 3), index, np.uint8), index % 2

    data = from_dataset(Counted([0] * 6, targets=[0, 1] * 3), 2)
    assert data.fingerprint() and [int(image[0, 0, 0]) for image in [*data.images, *data.images]] == 2 * [*range(6)]
    assert calls == [*range(6)]
    calls.clear()
    small = from_dataset(Counted([0] * 6, targets=[0, 1] * 3), 2, cache_gb=0.0)
    assert small.fingerprint() == data.fingerprint() and len(calls) == 6
