"""Regression: errors by arithmetic, the unit of the label, and the whole way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from downres import DownresError, check, curve, predict, recover, search
from downres.records import OUTSIDE
from downres.tasks.regression.task import r_squared

from ..conftest import Colours, model_of, write_csv


def test_r_squared_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 3))
    predicted = truth + rng.normal(0, 0.4, truth.shape)
    assert r_squared(predicted, truth) == pytest.approx(r2_score(truth, predicted), abs=1e-12)
    assert r_squared(predicted, np.ones_like(truth)) is None


def reading_red() -> Colours:
    """Answers the red of a picture on 0 to 100: the input is (x - 0.5) / 0.5."""
    network = Colours(1)
    with torch.no_grad():
        network.head.weight[0, 0], network.head.bias[0] = 50.0, 50.0
    return network


def labels(colours: np.ndarray, path: Path, add: float = 0.0) -> str:
    rows = [[f"{i:02d}.png", f"{100 * colour[0] + add:.3f}"] for i, colour in enumerate(colours)]
    return str(write_csv(path, ["file", "red [%]"], rows))


def test_the_error_is_that_of_the_labels(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    near = curve(
        model_of(reading_red()), folder, [16], task="regression", labels=labels(colours, tmp_path / "a.csv"), snap=False
    )
    far = curve(
        model_of(reading_red()), folder, [16], task="regression", labels=labels(colours, tmp_path / "b.csv", 7.0), snap=False
    )
    with pytest.raises(DownresError, match=r"The label .* of 00\.png .* is no class, .* give `task='regression'`"):
        curve(model_of(reading_red()), folder, [16], labels=str(tmp_path / "a.csv"))  # what that advice gives stands above
    assert near.original.quality.mae < 1.0 and near.original.quality.n == 80
    assert far.original.quality.mae == pytest.approx(7.0, abs=1.0)
    assert near.original.quality.r2 > 0.99 and near.original.quality.unit == "%"
    assert near.results[0].drop.drop == pytest.approx(near.results[0].quality.mae - near.original.quality.mae)


def test_the_whole_way(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    run = search(
        model_of(reading_red()), folder, task="regression", labels=labels(colours, tmp_path / "labels.csv"),
        resolutions=[16, 8], stem_scales=(), snap=False, max_drop=150.0, threads=1, out=tmp_path / "run",
    )  # fmt: skip
    assert run.best is not None and run.best.candidate.resolution == 8  # 150 of the label's unit is more than can be lost
    assert [f.ok for f in check(tmp_path / "run" / "best")] == [True, True, None, True, True]
    (found,) = predict(tmp_path / "run" / "best", [folder / "00.png"])
    assert found.names == ("red [%]",) and found.values[0] == pytest.approx(100 * colours[0, 0], abs=3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "Mean absolute error" in page and "Down and to the left is better" in page and "points" not in run.original.quality.unit
    )


def test_an_error_that_grows_is_proven_outside(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """A drop is what the error grows by: a network that answers worse loses, and is not called better."""
    folder, colours = painted
    network = reading_red()
    network.stem.weight.data[0, 0] = 1 / 9  # an average over 3×3: at 1×1 pixels, padding takes eight ninths away
    run = curve(
        model_of(network), folder, [2], task="regression", labels=labels(colours, tmp_path / "l.csv"), max_drop=1.0, snap=False
    )
    (result,) = run.results
    assert result.quality.mae > run.original.quality.mae and result.drop.drop > 0 and result.drop.verdict == OUTSIDE


def test_labels_that_are_no_numbers_and_mixed_units_are_refused(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = painted
    words = write_csv(tmp_path / "w.csv", ["file", "size"], [["00.png", "large"]])
    with pytest.raises(DownresError, match="no finite number"):
        curve(model_of(Colours(1)), folder, [16], task="regression", labels=str(words))
    mixed = write_csv(tmp_path / "m.csv", ["file", "a [mm]", "b [kg]"], [["00.png", 1, 2]])
    with pytest.raises(DownresError, match="means nothing"):
        curve(model_of(Colours(2)), folder, [16], task="regression", labels=str(mixed))


def test_a_head_is_fitted_by_ridge_regression(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    run = search(
        model_of(Colours(4)), folder, task="regression", labels=labels(colours, tmp_path / "l.csv"), fit_head=True,
        resolutions=[16], stem_scales=(), snap=False, max_drop=5.0, runtime="torch", threads=1, out=tmp_path / "run",
    )  # fmt: skip
    assert run.original.quality.mae < 5.0


def test_numbers_are_learned(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """From a network that answers 0."""
    folder, colours = painted
    module = Colours(1)
    torch.nn.init.zeros_(module.head.weight)
    _, _, recovery = recover(
        model_of(module), folder, resolution=16, task="regression", labels=labels(colours, tmp_path / "l.csv"),
        rungs=("finetune",), max_drop=0.0, epochs=60, learning_rate=1.0, weight_decay=0.0, threads=1,
    )  # fmt: skip
    none, *trained = recovery.tried
    assert [rung.rung for rung in trained] == ["finetune"] and trained[-1].score < 0.3 * none.score
