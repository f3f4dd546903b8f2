"""Multi-label classification: average precision against scikit-learn, the layouts of labels, and the whole way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from downres import DownresError, check, curve, predict, recover, search
from downres.measuring.paired import resamples
from downres.tasks.multilabel.quality import average_precision, class_precision, multilabel_quality, resampled_map
from downres.tasks.multilabel.task import targets_of
from downres.tasks.table import read_table

from ..conftest import Colours, model_of, write_csv


def test_average_precision_is_that_of_scikit_learn_ties_included() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth = rng.random(60) < 0.3
        scores = rng.integers(0, 8, 60).astype(np.float32)  # many ties
        assert average_precision(scores, truth)[0] == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_a_resample_is_the_precision_of_the_images_drawn() -> None:
    rng = np.random.default_rng(2)
    truth, scores = rng.random(25) < 0.4, rng.normal(size=25)
    times = next(resamples(25, 6))
    found = average_precision(scores, truth, times)
    for one, drawn in zip(found, times.astype(int), strict=True):
        assert one == pytest.approx(average_precision_score(np.repeat(truth, drawn), np.repeat(scores, drawn)), abs=1e-12)


def test_a_class_that_no_image_has_is_left_out() -> None:
    truth = np.array([[1, 0], [0, 0], [1, 0]], bool)
    scores = np.array([[0.9, 0.1], [0.1, 0.5], [0.8, 0.2]])
    found = multilabel_quality(scores, truth)
    assert found.map == 100.0 and found.ap == (100.0, None)
    assert np.isnan(class_precision(scores, truth)[1])
    with pytest.raises(DownresError, match="none of these has any"):
        multilabel_quality(scores, np.zeros_like(truth))


def test_the_interval_holds_the_value() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random((80, 3)) < 0.4
    scores = truth + rng.normal(0, 1.0, truth.shape)
    found = multilabel_quality(scores, truth)
    assert found.map_low < found.map < found.map_high and found.map_high - found.map_low < 40
    assert resampled_map(scores, truth).std() > 0


def test_labels_as_columns_names_and_json(tmp_path: Path) -> None:
    columns = write_csv(tmp_path / "a.csv", ["file", "red", "blue"], [["0.png", 1, 0], ["1.png", 1, 1]])
    named = write_csv(tmp_path / "b.csv", ["image", "labels"], [["0.png", "red"], ["1.png", "red|blue"], ["2.png", ""]])
    (tmp_path / "c.json").write_text(json.dumps({"0.png": ["red"], "1.png": ["red", "blue"]}))
    assert targets_of(read_table(columns))[0] == ("red", "blue")
    classes, truth = targets_of(read_table(named))
    assert classes == ("blue", "red") and truth.tolist() == [[False, True], [True, True], [False, False]]
    assert targets_of(read_table(tmp_path / "c.json"))[1].tolist() == [[False, True], [True, True]]
    wrong = write_csv(tmp_path / "d.csv", ["file", "red", "blue"], [["0.png", 1, 0.5]])
    with pytest.raises(DownresError, match="0 or 1 in each class's column"):
        targets_of(read_table(wrong))


def test_truths_as_pandas_writes_them(tmp_path: Path) -> None:
    columns = write_csv(tmp_path / "a.csv", ["file", "red", "blue"], [["0.png", True, False], ["1.png", "true", 1.0]])
    assert targets_of(read_table(columns))[1].tolist() == [[True, False], [True, True]]
    one = write_csv(tmp_path / "b.csv", ["file", "red"], [["0.png", True], ["1.png", False]])
    assert targets_of(read_table(one))[0] == ("red",) and targets_of(read_table(one))[1].tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["1.7", "0"], r"The label 1\.7 of 0\.png in .* is no class, .* `task='regression'`"),
        (["red|0.5", "red"], r"The label 0\.5 of 0\.png"),
        ([[0, 1, 1], [1, 0, 0]], "names '1' twice for 0.png: name each class once, or give a column of 0 and 1 for each"),
    ],
)
def test_numbers_that_are_no_names_are_refused(tmp_path: Path, values: list, says: str) -> None:
    (tmp_path / "l.json").write_text(json.dumps({f"{i}.png": value for i, value in enumerate(values)}))
    with pytest.raises(DownresError, match=says):
        targets_of(read_table(tmp_path / "l.json"))


def labels(folder: Path, colours: np.ndarray, path: Path, columns: int = 3) -> str:
    rows = [[f"{i:02d}.png", *(colour > 0.5).astype(int)[:columns]] for i, colour in enumerate(colours)]
    return str(write_csv(path, ["file", "red", "green", "blue"][: columns + 1], rows))


def test_the_whole_way(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    file = labels(folder, colours, tmp_path / "labels.csv")
    run = search(
        model_of(Colours()), folder, task="multilabel", labels=file, resolutions=[16, 8], stem_scales=(), snap=False,
        max_drop=5.0, threads=1, out=tmp_path / "run",
    )  # fmt: skip
    assert run.task.name == "multilabel" and run.original.quality.map > 99  # the colour is what the label was made of
    truth, scores = (colours > 0.5)[:, 0], colours[:, 0]
    assert average_precision_score(truth, scores) == 1.0
    assert run.best is not None and run.best.candidate.resolution == 8
    assert [f.ok for f in check(tmp_path / "run" / "best")] == [True, True, None, True, True]  # a module given in Python
    (found,) = predict(tmp_path / "run" / "best", [folder / "00.png"], top=2)
    assert len(found.classes) == 2 and found.probabilities[0] >= found.probabilities[1]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Average precision by class" in page and "mAP" in page
    row = run.to_json()["candidates"][0]
    assert {"map", "map_low", "ap", "naive_map", "drop_upper"} <= row.keys()


def test_a_head_is_fitted_for_the_labels(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    file = labels(folder, colours, tmp_path / "labels.csv", 2)
    run = search(
        model_of(Colours(7)), folder, task="multilabel", labels=file, fit_head=True, resolutions=[16], stem_scales=(),
        snap=False, max_drop=10.0, runtime="torch", threads=1, out=tmp_path / "run",
    )  # fmt: skip
    assert run.original.quality.map > 95 and len(run.original.quality.ap) == 2


def test_outputs_that_are_not_the_columns_are_refused(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    with pytest.raises(DownresError, match="`fit_head=True`"):
        curve(model_of(Colours(5)), folder, [16], task="multilabel", labels=labels(folder, colours, tmp_path / "l.csv"))
    with pytest.raises(DownresError, match="name it with `labels="):
        curve(model_of(Colours()), folder, [16], task="multilabel")


def test_labels_are_learned(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """From a network that answers at random."""
    folder, colours = painted
    module = Colours(2)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.head.weight)
    _, _, recovery = recover(
        model_of(module), folder, resolution=16, task="multilabel", labels=labels(folder, colours, tmp_path / "l.csv", 2),
        rungs=("finetune",), max_drop=0.0, epochs=40, learning_rate=0.05, training_batch=20, mixup=0.1, threads=1,
    )  # fmt: skip
    none, trained = recovery.tried
    assert trained.rung == "finetune" and trained.score > max(90, none.score)
