"""The task of a network that answers with numbers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from ...errors import DownresError
from ...images.parts import listed_names
from ...measuring.paired import percentiles, resampled_mean
from ...records import Budget, Preprocessing, Record, Score
from ...recovery.features import Head
from ...recovery.views import Views
from ..evidence import Arrays
from ..table import TableData, labels_beside, numbers, open_rows, read_table
from ..task import Question
from ..vectors import VectorTask, folded, one_thread, stacked, standardised

SERVING = """
def answer(output, picture, name):  # numbers by their names, as they are
    return {"names": MANIFEST["classes"], "values": output.tolist()}
"""


@dataclass(frozen=True)
class RegressionQuality(Score):
    """Of n images: mae, the mean absolute error in the label's own unit (of several columns the mean over them), with a
    two-sided 95 % interval by bootstrap over images; r2, the coefficient of determination, mean over the columns; mae_by:
    column by column.
    """

    mae: float
    mae_low: float
    mae_high: float
    n: int
    r2: float | None = None
    mae_by: tuple[float, ...] = ()
    label_unit: str = ""

    metric = "mean absolute error"
    noun = "mean absolute error"
    title = "Mean absolute error"
    lower_is_better = True

    @property
    def score(self) -> float:
        return self.mae

    @property
    def interval(self) -> tuple[float, float]:
        return self.mae_low, self.mae_high

    @property
    def unit(self) -> str:
        return self.label_unit or "units of the label"

    def text(self, value: float) -> str:
        return f"{value:.4g}" + (f"\u00a0{self.label_unit}" if self.label_unit else "")

    def beside(self) -> dict[str, str]:
        return {} if self.r2 is None else {"R²": f"{self.r2:.3f}"}


@dataclass(frozen=True)
class RegressionPrediction(Record):
    """One picture's numbers, by column."""

    image: str
    names: tuple[str, ...]
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.image}: " + ", ".join(f"{n} {v:.6g}" for n, v in zip(self.names, self.values, strict=True))


def r_squared(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """The coefficient of determination, mean over the columns of (n, K); None where a column does not vary."""
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    if len(truth) < 2 or not (spread > 0).all():
        return None
    return float((1 - ((truth - predicted) ** 2).sum(axis=0) / spread).mean())


class Regression(VectorTask):
    """One or more numbers an image, judged by mean absolute error; the allowed drop is in the label's own unit.

    Labels: a CSV or JSON file beside the pictures; a heading such as `height [mm]` names the unit.
    """

    name = "regression"
    score = RegressionQuality
    strengths = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    fitted = "ridge regression, alpha"
    labelled, mixes, mirrors = True, True, False

    @classmethod
    def names_in(cls, data: Any, question: Question, outputs: int | None) -> tuple[str, ...]:
        if isinstance(data, TableData):
            names = data.names
        else:
            table = read_table(labels_beside(data, question.labels, "Regression"))
            numbers(table)
            names = table.names
        units = {_unit(name) for name in names}
        if len(units) > 1:
            raise DownresError(
                f"The mean of errors in {listed_names(sorted(u or 'no unit' for u in units))} means nothing: "
                "give labels of one unit."
            )
        if outputs is not None and len(names) != outputs:
            raise DownresError(
                f"The network has {outputs} outputs and the labels {len(names)} columns ({listed_names(names)}): "
                "pass `fit_head=True` to fit a new linear head for them, or give a column for each output, in their order."
            )
        return names

    def open(self, data: Any, question: Question, **options: Any) -> TableData:
        if isinstance(data, TableData):
            return data
        table = read_table(labels_beside(data, question.labels, "Regression"))
        values = numbers(table)
        images, rows, folds, skipped, how = open_rows(data, table, np.zeros(len(values), np.int64), **options)
        description = f"{len(images)} images with {listed_names(table.names)}, {how}."
        return TableData(images, values[rows], table.names, folds, tuple(skipped), description, found_in=Path(data))

    def learned(self, bank: Any, views: Views, size: tuple[int, int]) -> torch.Tensor:
        return torch.from_numpy(self.data.targets[views.images]).float()

    def loss_of(self, ours: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        """What it is judged by; of numbers nothing is smoothed."""
        return F.l1_loss(ours, targets)

    def begin(self, data: TableData, seed: int) -> None:  # type: ignore[override]
        super().begin(data, seed)
        self.classes = data.names

    def facts(self) -> dict[str, Any]:
        truth = self.data.targets[self.proof]
        middle = float(np.abs(truth - np.median(truth, axis=0)).mean())
        return {"classes": list(self.data.names), "median_mae": middle}

    def check_budget(self, budget: Budget) -> None:
        """Any number, in the label's own unit."""

    def judge(self, answers: Iterable[np.ndarray], indices: np.ndarray, preprocessing: Preprocessing) -> Arrays:
        return Arrays(predicted=stacked(answers).astype(np.float64), truth=self.data.targets[indices])

    def quality(self, evidence: Arrays) -> RegressionQuality:
        wrong = np.abs(evidence["predicted"] - evidence["truth"])
        each = wrong.mean(axis=1)
        low, high = percentiles(resampled_mean(each), len(each))
        return RegressionQuality(
            float(each.mean()), low, high, len(each), r_squared(evidence["predicted"], evidence["truth"]),
            tuple(float(v) for v in wrong.mean(axis=0)), _unit(self.classes[0]) if self.classes else "",
        )  # fmt: skip

    def points(self, evidence: Arrays) -> np.ndarray:
        return -np.abs(evidence["predicted"] - evidence["truth"]).mean(axis=1)

    def fit(self, features: np.ndarray, indices: np.ndarray, strength: float) -> Head:
        inputs, mean, scale = standardised(features)
        truth = self.data.targets[indices]
        with one_thread():
            model = Ridge(alpha=strength).fit(inputs.astype(np.float64), truth)
        return folded(model.coef_.reshape(truth.shape[1], -1), np.asarray(model.intercept_).reshape(-1), mean, scale)

    def loss(self, answers: np.ndarray, indices: np.ndarray) -> float:
        """Mean absolute error."""
        return float(np.abs(answers - self.data.targets[indices]).mean())

    def warnings(self, original: Score, facts: Mapping[str, Any]) -> list[str]:
        if original.interval[1] < facts["median_mae"]:
            return []
        return [
            "the original is not shown to be better than always answering the median "
            f"({original.text(facts['median_mae'])} off on average): a drop measured against it means little"
        ]

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        return {
            "Mean absolute error": f"Over all proof images, measured through {runtime}; 95 % interval by "
            f"bootstrap over images. {proof}",
            "Drop": "Mean absolute error of the candidate minus that of the original, in the label's own unit; one-sided bound "
            f"by paired bootstrap over images at {100 * budget.confidence:g} % confidence.{many}",
            "Lowered only": "The original's own weights on smaller images: what happens without recovery.",
        }

    def meaning(self, preprocessing: Preprocessing) -> dict[str, Any]:
        unit = _unit(self.classes[0]) if self.classes else ""
        said = (
            f"the numbers themselves, in the order of `classes` and in {unit or 'the unit of the labels'}: nothing is to be "
            "multiplied or added"
        )
        return {"values": "numbers", "meaning": said, "unit": unit, "multiply_by": 1.0, "add": 0.0}

    def serving(self, preprocessing: Preprocessing) -> str:
        return SERVING

    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> RegressionPrediction:
        return RegressionPrediction(image, self.classes, tuple(float(v) for v in answer))


def _unit(name: str) -> str:
    """`height [mm]` or `height (mm)` → `mm`."""
    match = re.search(r"[\[(]([^\])]+)[\])]\s*$", name)
    return match[1].strip() if match else ""
