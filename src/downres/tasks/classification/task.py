"""The task of a classifier: one class an image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import DownresError
from ...images import Fold, split_once
from ...images.archives import find_archives
from ...probe import Answer
from ...records import Budget, Drop, Preprocessing, Record, Result
from ...recovery.features import FeatureBank, Head
from ...recovery.ladder import GLANCE
from ...recovery.views import Views
from ..evidence import Arrays
from ..task import TOLERANCE, Question, Section, log_of, of_classes, told_apart
from ..vectors import ScoresTask, ranked_alike, stacked
from .archives import archive_classes, open_archives
from .elpv import CLASSES, DEMO_DATA, open_elpv
from .folders import Dataset, class_names, open_folder
from .head import STRENGTHS, fit_head, log_loss, why_not
from .labels import Labels, from_dataset, is_dataset, names_of, no_data, open_labelled
from .photos import keep_photos, photos_section
from .quality import Quality, compare_all, count_correct, quality

LEAST = 1e-45
"""The smallest number above 0 that float32 holds: the logarithm of 0 is none."""
SERVING = """
def answer(output, picture, name):  # the likeliest classes, in percent
    SHARE
    order = np.argsort(-share, kind="stable")[:5]
    return {"classes": [MANIFEST["classes"][i] for i in order], "probabilities": (100 * share[order]).tolist()}
"""


@dataclass(frozen=True)
class Prediction(Record):
    """One picture's most likely classes, with softmax probabilities in percent."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        ranked = ", ".join(f"{c} {p:.1f} %" for c, p in zip(self.classes, self.probabilities, strict=True))
        return f"{self.image}: {ranked}"


class Classification(ScoresTask):
    """One class an image, judged by top-1. A network with one logit tells two classes apart, by its sigmoid: the second is that
    above one half. probability: what it returns went through the sigmoid already, or of several outputs through a softmax.
    """

    name = "classification"
    score = Quality
    glance = GLANCE
    strengths = STRENGTHS
    fitted = "logistic regression, C"
    labelled, mixes = True, True
    sequential = True

    @property
    def ways(self) -> int:
        """How many classes the network tells apart."""
        return max(2, self.outputs)

    def logits(self, answers: np.ndarray) -> np.ndarray:
        """(n, K) of what the network returns: of a single logit, or a probability, two whose softmax is its sigmoid; of
        probabilities of several classes their logarithms.
        """
        if answers.shape[1] > 1:
            return np.log(np.maximum(answers.astype(np.float64), LEAST)) if self.probability else answers
        single = answers.astype(np.float64)
        if self.probability:
            single = np.log(np.clip(single, 1e-12, 1)) - np.log(np.clip(1 - single, 1e-12, 1))
        return np.concatenate([np.zeros_like(single), single], axis=1)

    @classmethod
    def takes(cls, answer: Answer, data: Any, question: Question) -> bool:
        return answer.size is None

    @classmethod
    def names_in(cls, data: Any, question: Question, outputs: int | None) -> tuple[str, ...]:
        outputs = outputs and max(2, outputs)
        if isinstance(data, Dataset):
            return data.classes
        if is_dataset(data):
            return names_of(data, outputs)
        if question.labels is not None:
            return Labels.read(question.labels).names(outputs)
        if not isinstance(data, (str, Path)):
            raise no_data(data)
        if (archives := find_archives(data)) is not None:
            return archive_classes(archives, outputs)
        return CLASSES if str(data) == DEMO_DATA else class_names(data, outputs)

    @classmethod
    def named_classes(cls, data: Any, question: Question) -> tuple[str, ...]:
        return cls.names_in(data, question, None)

    def open(self, data: Any, question: Question, **options: Any) -> Dataset:
        outputs = None if self.fit_new else self.ways
        if isinstance(data, Dataset):
            return data
        if is_dataset(data):
            return from_dataset(data, outputs, **options)
        if question.labels is not None:
            return open_labelled(data, Labels.read(question.labels), outputs, **options)
        if str(data) == DEMO_DATA:
            return open_elpv(options.get("folds") or 5, options.get("seed", 0))
        if (archives := find_archives(data)) is not None:
            return open_archives(archives, outputs=outputs, **options)
        return open_folder(data, outputs=outputs, **options)

    def begin(self, data: Dataset, seed: int) -> None:  # type: ignore[override]
        super().begin(data, seed)
        self.classes = data.classes
        if int(data.labels.max()) >= self.ways:
            raise DownresError(
                f"The data have labels up to {int(data.labels.max())}, the model has {self.outputs} outputs: "
                "use fit_head to fit a new head, or other weights."
            )

    @property
    def labels(self) -> np.ndarray:
        return self.data.labels

    def split(self, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
        """Stratified, at most `tuning_images` over all folds together; both sides have every class.

        Tuning images come in random order: the first few of them are a sample.
        """
        most = max(1, self.tuning_images // len(self.data.folds))
        if (told := told_apart(self.data, fold, most)) is not None:
            return told
        n = len(fold.train)
        if n < 4:
            return fold.train, np.zeros(0, np.int64)
        split = split_once(self.labels[fold.train], min(0.25, most / n), self.seed)
        return fold.train[split.train], np.random.default_rng([self.seed, 1]).permutation(fold.train[split.test])

    def facts(self) -> dict[str, Any]:
        majority = 100 * float(np.bincount(self.labels[self.proof]).max() / len(self.proof))
        return {"classes": list(self.data.classes), "majority_top1": majority}

    def judge(self, answers: Iterable[np.ndarray], indices: np.ndarray, preprocessing: Preprocessing) -> Arrays:
        out, truth = self.logits(stacked(answers)), self.labels[indices]
        arrays = Arrays(
            correct=count_correct(out, truth), predicted=out.argmax(1).astype(np.int32), confidence=_confidence(out)
        )
        if self.outputs > 5:
            arrays["correct5"] = count_correct(out, truth, 5)
        return arrays

    def quality(self, evidence: Arrays) -> Quality:
        return quality(evidence["correct"], evidence.get("correct5"))

    def compare(self, original: Arrays, candidates: dict[str, Arrays], budget: Budget) -> dict[str, Drop]:
        if not candidates:
            return {}
        return compare_all(original["correct"], {name: one["correct"] for name, one in candidates.items()}, budget)

    def points(self, evidence: Arrays) -> np.ndarray:
        return evidence["correct"]

    def changed(self, original: Arrays, one: Arrays) -> np.ndarray:
        return original["predicted"] != one["predicted"]

    def mismatch(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if self.probability and self.outputs > 1:
            return of_classes(log_of(ours), log_of(theirs))
        if self.probability:
            return F.binary_cross_entropy(ours.clamp(1e-6, 1 - 1e-6), theirs)
        return of_classes(ours, theirs)

    def learned(self, bank: Any, views: Views, size: tuple[int, int]) -> torch.Tensor:
        labels = torch.from_numpy(self.labels[views.images])
        return labels[:, None].float() if self.outputs == 1 else F.one_hot(labels, self.outputs).float()

    def loss_of(self, ours: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        if self.outputs > 1:
            return F.cross_entropy(log_of(ours) if self.probability else ours, targets, label_smoothing=smoothing)
        targets = targets * (1 - smoothing) + smoothing / 2
        if self.probability:
            return F.binary_cross_entropy(ours.clamp(1e-6, 1 - 1e-6), targets)
        return F.binary_cross_entropy_with_logits(ours, targets)

    def why_no_head(self, bank: FeatureBank, fit: np.ndarray) -> str:
        return super().why_no_head(bank, fit) or why_not(self.labels[fit], self.ways)

    def fit(self, features: np.ndarray, indices: np.ndarray, strength: float) -> Head:
        head = fit_head(features, self.labels[indices], self.ways, strength)
        # With one logit the head is the difference of two.
        return head if self.outputs > 1 else Head(head.weight[1:] - head.weight[:1], head.bias[1:] - head.bias[:1])

    def loss(self, answers: np.ndarray, indices: np.ndarray) -> float:
        return log_loss(self.logits(answers), self.labels[indices])

    def warnings(self, original: Quality, facts: Mapping[str, Any]) -> list[str]:  # type: ignore[override]
        if original.top1_low > facts["majority_top1"]:
            return []
        return [
            "the original is not shown to be better than always answering the commonest class "
            f"({facts['majority_top1']:.1f} %): a drop measured against it means little"
        ]

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        return {
            "Top-1": f"Correct images / all proof images, measured through {runtime}; in brackets the two-sided 95 % "
            f"Wilson interval. {proof}",
            "Drop": "Top-1 of the original minus top-1 of the candidate, in percentage points, on the same images (paired); "
            f"the bound is one-sided, by Tango's score test, at {100 * budget.confidence:g} % confidence.{many}",
            "Lowered only": "The original's own weights and head on smaller images, at its own crop ratio: "
            "what happens without recovery.",
        }

    def keep(self, store: Any, bank: FeatureBank, results: Sequence[Result], told: Result | None) -> None:
        keep_photos(self, store, bank, results)

    def section(self, store: Any, run: Any, told: Result | None) -> Section:
        return photos_section(store, run)

    def parity(self, ours: Iterator[np.ndarray], theirs: Iterator[np.ndarray]) -> tuple[bool, str]:
        worst, scale, agree, total = 0.0, 0.0, 0, 0
        for one, other in zip(ours, theirs, strict=True):
            if not (np.isfinite(one).all() and np.isfinite(other).all()):
                return False, "NaN or infinite logits on real images"
            worst, scale = max(worst, float(np.abs(one - other).max())), max(scale, float(np.abs(other).max()))
            same = self.logits(one[None]).argmax() == self.logits(other[None]).argmax()
            agree, total = agree + int(same), total + 1
        detail = f"largest difference {worst:.2g} at logits up to {scale:.3g}, " if scale else ""
        ok = worst <= TOLERANCE * max(scale, 1.0) and agree == total
        return ok, f"{detail}same class on {agree} of {total} real images"

    def meaning(self, preprocessing: Preprocessing) -> dict[str, Any]:
        if self.outputs > 1:
            values = "probabilities" if self.probability else "logits"
            said = f"one for each of {self.outputs} classes, in the order of `classes`"
            said += "" if self.probability else "; softmax makes probabilities"
        else:
            values = "probability" if self.probability else "logit"
            said = "of the second of `classes`" + ("" if self.probability else ": its sigmoid is the probability")
            said += "; the rest is that of the first"
        return {"values": values, "meaning": said}

    def serving(self, preprocessing: Preprocessing) -> str:
        if self.outputs > 1:
            share = "share = " + ("np.float64(output)" if self.probability else "np.exp(output - output.max())")
            share += "\n    share = share / share.sum()"
        else:
            second = "output[0]" if self.probability else "1 / (1 + np.exp(-np.float64(output[0])))"
            share = f"second = {second}\n    share = np.array([1 - second, second])"
        return SERVING.replace("SHARE", share)

    def alike(
        self, served: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]], answers: Sequence[np.ndarray]
    ) -> tuple[bool, str]:
        return ranked_alike(served, predicted)

    def as_stated(self, found: Quality, stated: Quality) -> tuple[bool, str]:  # type: ignore[override]
        n = found.n
        # Another processor may round a logit the other way: one image in a thousand is not a change of the model.
        ok = n == stated.n and abs(found.correct - stated.correct) <= max(1, n // 1000)
        said = f"top-1 {found.top1:.2f} % ({found.correct}/{n}), stated {stated.top1:.2f} % ({stated.correct}/{stated.n})"
        return ok, said

    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> Prediction:
        answer = self.logits(answer[None])[0]
        share = np.exp(answer - answer.max()) / np.exp(answer - answer.max()).sum()
        order = np.argsort(-share, kind="stable")[:top]
        return Prediction(image, tuple(self.classes[i] for i in order), tuple(100 * float(share[i]) for i in order))


def _confidence(out: np.ndarray) -> np.ndarray:
    """Softmax probability of the prediction, in percent, float32 (n,)."""
    shifted = np.exp(out - out.max(1, keepdims=True))
    return (100 * shifted.max(1) / shifted.sum(1)).astype(np.float32)
