"""The task of a multi-label classifier: a yes or no for each class."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup, escape
from sklearn.linear_model import LogisticRegression

from ...errors import DownresError
from ...images import Fold
from ...images.parts import listed_names
from ...records import Budget, Drop, Preprocessing, Record, Result
from ...recovery.features import FeatureBank, Head
from ...recovery.ladder import Option, best_of
from ...recovery.views import Views
from ...reports import words
from ..evidence import Arrays
from ..table import Table, TableData, labels_beside, no_class, number_in, numbers, open_rows, read_table
from ..task import Question, Section
from ..vectors import ScoresTask, folded, one_thread, ranked_alike, stacked, standardised
from .quality import MultilabelQuality, class_precision, compare_scores, multilabel_quality, resampled_map

SEPARATORS = "|;, "
_TRUTHS = {"false": "0", "true": "1"}
"""As pandas writes them."""
SERVING = """
def answer(output, picture, name):  # every label by itself, in percent, the likeliest first
    share = SHARE
    order = np.argsort(-share, kind="stable")[:5]
    return {"classes": [MANIFEST["classes"][i] for i in order], "probabilities": (100 * share[order]).tolist()}
"""


@dataclass(frozen=True)
class MultilabelPrediction(Record):
    """One picture's classes by probability (sigmoid), percent, the likeliest first."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.image}: " + ", ".join(f"{c} {p:.1f} %" for c, p in zip(self.classes, self.probabilities, strict=True))


def targets_of(table: Table) -> tuple[tuple[str, ...], np.ndarray]:
    """(classes, bool (rows, K)): from a column of 0 and 1 for each class, or one column of names with | between them."""
    if len(table.names) > 1 or all(row[0].lower() in (*_TRUTHS, "0", "1", "0.0", "1.0") for row in table.cells):
        values = numbers(table, lambda cell: _TRUTHS.get(cell.lower(), cell))  # type: ignore[arg-type, return-value]
        wrong = np.argwhere((values != 0) & (values != 1))
        if len(wrong):
            i, j = wrong[0]
            raise DownresError(
                f"A multi-label table has 0 or 1 in each class's column, {table.path} has {table.cells[i][j]!r} under "
                f"{table.names[j]} for {table.files[i]}: correct it, or give `task='regression'`."
            )
        return table.names, values.astype(bool)
    separator = next((s for s in SEPARATORS if any(s in row[0] for row in table.cells)), "|")
    named = [[part.strip() for part in row[0].split(separator) if part.strip()] for row in table.cells]
    for file, own in zip(table.files, named, strict=True):
        for part in own:
            if (number_in(part) or 0.0) % 1:
                raise no_class(f"The label {part} of {file} in {table.path}")
            if own.count(part) > 1:
                raise DownresError(
                    f"{table.path} names {part!r} twice for {file}: name each class once, or give a column of 0 and 1 for each."
                )
    classes = tuple(sorted(set().union(*named)))
    return classes, np.array([[name in own for name in classes] for own in named])


class Multilabel(ScoresTask):
    """Any number of classes an image, judged by mean average precision. Labels: a CSV or JSON file beside the pictures.
    probability: what the network returns went through the sigmoid already.
    """

    name = "multilabel"
    score = MultilabelQuality
    strengths = (0.001, 0.003, 0.01, 0.03, 0.1)
    fitted = "logistic regression for each class, C"
    labelled, mixes = True, True

    @classmethod
    def names_in(cls, data: Any, question: Question, outputs: int | None) -> tuple[str, ...]:
        if isinstance(data, TableData):
            classes = data.names
        else:
            classes = targets_of(read_table(labels_beside(data, question.labels, "Multi-label classification")))[0]
        if outputs is not None and len(classes) != outputs:
            raise DownresError(
                f"The weights have {outputs} outputs and the labels {len(classes)} classes ({listed_names(classes)}): "
                "pass `fit_head=True` to fit a new linear head for them, or give a column for each output, in their order."
            )
        return classes

    def open(self, data: Any, question: Question, **options: Any) -> TableData:
        if isinstance(data, TableData):
            return data
        table = read_table(labels_beside(data, question.labels, "Multi-label classification"))
        classes, truth = targets_of(table)
        images, rows, folds, skipped, how = open_rows(data, table, np.zeros(len(truth), np.int64), **options)
        named = "" if self.fit_new else f"; outputs taken to be: {listed_names([f'{i} {c}' for i, c in enumerate(classes)])}"
        description = f"{len(images)} images with any of {len(classes)} classes, {how}{named}."
        return TableData(images, truth[rows].astype(float), classes, folds, tuple(skipped), description, found_in=Path(data))

    def mismatch(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if self.probability:
            return F.binary_cross_entropy(ours.clamp(1e-6, 1 - 1e-6), theirs)
        return F.binary_cross_entropy_with_logits(ours, theirs.sigmoid())

    def learned(self, bank: Any, views: Views, size: tuple[int, int]) -> torch.Tensor:
        return torch.from_numpy(self.data.targets[views.images]).float()

    def loss_of(self, ours: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        targets = targets * (1 - smoothing) + smoothing / 2
        if self.probability:
            return F.binary_cross_entropy(ours.clamp(1e-6, 1 - 1e-6), targets)
        return F.binary_cross_entropy_with_logits(ours, targets)

    def begin(self, data: TableData, seed: int) -> None:  # type: ignore[override]
        super().begin(data, seed)
        self.classes = data.names
        wrong = data.targets[(data.targets != 0) & (data.targets != 1)]
        if len(wrong):
            raise no_class(f"The target {wrong[0]:g}, where there is 0 or 1 for each class,")

    def split(self, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
        """Without a positive among them, tuning images could say nothing: then none tunes."""
        fit, tune = super().split(fold)
        return (fit, tune) if self.data.targets[tune].any() else (fold.train, tune[:0])

    def facts(self) -> dict[str, Any]:
        truth = self.data.targets[self.proof]
        absent = [name for name, any_ in zip(self.data.names, truth.any(axis=0), strict=True) if not any_]
        return {"classes": list(self.data.names), "absent": absent, "positives": [int(n) for n in truth.sum(axis=0)]}

    def judge(self, answers: Iterable[np.ndarray], indices: np.ndarray, preprocessing: Preprocessing) -> Arrays:
        return Arrays(scores=stacked(answers).astype(np.float32), truth=self.data.targets[indices] > 0)

    def quality(self, evidence: Arrays) -> MultilabelQuality:
        return multilabel_quality(evidence["scores"], evidence["truth"])

    def compare(self, original: Arrays, candidates: dict[str, Arrays], budget: Budget) -> dict[str, Drop]:
        if not candidates:
            return {}
        return compare_scores(original["scores"], {n: c["scores"] for n, c in candidates.items()}, original["truth"], budget)

    def choose(self, options: Sequence[Option]) -> Option:
        """By mAP on the tuning images; standard errors by bootstrap."""
        scores = [100 * float(np.nanmean(class_precision(o.evidence["scores"], o.evidence["truth"]))) for o in options]

        def behind(one: Arrays, best: Arrays) -> float:
            apart = resampled_map(best["scores"], best["truth"]) - resampled_map(one["scores"], one["truth"])
            spread = float(np.nanstd(apart))
            return float(np.nanmean(apart)) / spread if spread else 0.0

        return best_of(options, scores, behind)

    def why_no_head(self, bank: FeatureBank, fit: np.ndarray) -> str:
        alike = [n for n, column in zip(self.data.names, self.data.targets[fit].T, strict=True) if column.min() == column.max()]
        why = f"all training images agree on {listed_names(alike)}" if alike else ""
        return super().why_no_head(bank, fit) or why

    def fit(self, features: np.ndarray, indices: np.ndarray, strength: float) -> Head:
        inputs, mean, scale = standardised(features)
        weights, biases = [], []
        with one_thread():
            for name, column in zip(self.data.names, self.data.targets[indices].T, strict=True):
                if column.min() == column.max():
                    raise DownresError(f"No head can be fitted: all training images agree on {name}; add others.")
                model = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(inputs, column > 0)
                weights.append(model.coef_[0].astype(np.float64))
                biases.append(float(model.intercept_[0]))
        return folded(np.stack(weights), np.array(biases), mean, scale)

    def loss(self, answers: np.ndarray, indices: np.ndarray) -> float:
        """Binary cross-entropy, in nats, mean over images and classes."""
        z = answers.astype(np.float64)
        return float((np.logaddexp(0.0, z) - z * self.data.targets[indices]).mean())

    def lacks(self, facts: Mapping[str, Any]) -> list[str]:
        absent = facts.get("absent")
        return [f"no proof image has {listed_names(absent)}: these are left out of the mean"] if absent else []

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        return {
            "mAP": "Average precision of each class over all proof images (no interpolation; as scikit-learn's), mean over the "
            f"classes that occur, measured through {runtime}; 95 % interval by bootstrap over images. {proof}",
            "Drop": "mAP of the original minus mAP of the candidate, in points; one-sided bound by paired bootstrap over "
            f"images at {100 * budget.confidence:g} % confidence.{many}",
            "Lowered only": "The original's own weights on smaller images: what happens without recovery.",
        }

    def section(self, store: Any, run: Any, told: Result | None) -> Section:
        """Average precision class by class."""
        columns = [r for r in (run.original, *run.results) if r.quality is not None]
        if not columns:
            return Section()
        head = "".join(f'<th scope="col">{escape(words.label(r.candidate))}</th>' for r in columns)
        rows = []
        for k, name in enumerate(run.data["classes"]):
            found = [r.quality.ap[k] for r in columns]  # type: ignore[union-attr]
            cells = "".join(f"<td>{'–' if ap is None else words.percent(ap)}</td>" for ap in found)
            small = words.count(run.data["positives"][k], "proof image")
            rows.append(f'<tr><th scope="row">{escape(name)}<small>{small}</small></th>{cells}</tr>')
        body = (
            '<section aria-labelledby="ap"><h2 id="ap">Average precision by class</h2>'
            '<div class="scroll" role="region" tabindex="0" aria-labelledby="ap"><table><thead><tr><th scope="col">Class</th>'
            f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
        )
        return Section(body=Markup(body))

    def meaning(self, preprocessing: Preprocessing) -> dict[str, Any]:
        what = "it is" if self.probability else "its sigmoid is"
        said = (
            f"one for each of {self.outputs} labels, in the order of `classes`; {what} the label's probability; "
            "`thresholds` of it are an even chance: the search judged the order of the images and chose none"
        )
        return {
            "values": "probabilities" if self.probability else "logits",
            "meaning": said,
            "thresholds": [0.5] * self.outputs,
        }

    def serving(self, preprocessing: Preprocessing) -> str:
        share = "np.float64(output)" if self.probability else "1 / (1 + np.exp(-output.astype(np.float64)))"
        return SERVING.replace("SHARE", share)

    def alike(
        self, served: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]], answers: Sequence[np.ndarray]
    ) -> tuple[bool, str]:
        return ranked_alike(served, predicted)

    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> MultilabelPrediction:
        share = answer.astype(np.float64) if self.probability else 1 / (1 + np.exp(-answer.astype(np.float64)))
        order = np.argsort(-share, kind="stable")[:top]
        return MultilabelPrediction(image, tuple(self.classes[i] for i in order), tuple(100 * float(share[i]) for i in order))
