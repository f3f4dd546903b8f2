"""The task without labels: how often, or how nearly, the reduced network answers as the original does."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import DownresError
from ...families import Model
from ...images import Fold
from ...measuring.paired import percentiles, resampled_mean
from ...measuring.statistics import wilson
from ...probe import Answer
from ...records import Budget, Drop, Preprocessing, Record, Result, Score
from ...recovery.features import FeatureBank
from ..classification.quality import compare_all
from ..classification.task import Classification, Prediction
from ..evidence import Arrays
from ..segmentation.bank import MaskBank
from ..segmentation.mask_legends import voc_colour
from ..segmentation.quality import SegmentationQuality
from ..segmentation.task import Segmentation
from ..task import Question, Section, Task
from ..vectors import VectorTask, stacked
from .photos import Photos, open_photos

KINDS_OF_ANSWER = ("classes", "embeddings", "masks")
NEIGHBOURS = 10
SERVING = """
def answer(output, picture, name):  # to be compared by cosine
    return {"embedding": output.tolist()}
"""


@dataclass(frozen=True)
class AgreementQuality(Score):
    """On how many of n images the class is the original's, in percent, with a two-sided 95 % Wilson interval."""

    same: int
    n: int
    agreement: float
    agreement_low: float
    agreement_high: float

    metric = "agreement"
    noun = "agreement"
    title = "Agreement with the original"

    @property
    def score(self) -> float:
        return self.agreement

    @property
    def interval(self) -> tuple[float, float]:
        return self.agreement_low, self.agreement_high


@dataclass(frozen=True)
class EmbeddingQuality(Score):
    """How near n embeddings are to the original's. cosine: mean cosine similarity, in percent, with a 95 % interval by
    bootstrap over images; neighbours: of the ten nearest other images by cosine the same share, mean, in percent.
    """

    cosine: float
    cosine_low: float
    cosine_high: float
    n: int
    neighbours: float | None = None

    metric = "cosine similarity"
    noun = "cosine similarity"
    title = "Cosine similarity with the original"

    @property
    def score(self) -> float:
        return self.cosine

    @property
    def interval(self) -> tuple[float, float]:
        return self.cosine_low, self.cosine_high

    def text(self, value: float) -> str:
        return f"{value:.2f}\u00a0%"

    def beside(self) -> dict[str, str]:
        return {} if self.neighbours is None else {"same neighbours": f"{self.neighbours:.1f}\u00a0%"}


@dataclass(frozen=True)
class MaskAgreementQuality(SegmentationQuality):
    """mIoU and what goes with it, the original's class maps taken for the truth."""

    metric = "mIoU against the original"
    noun = "mIoU against the original"
    title = "mIoU against the original"


@dataclass(frozen=True)
class EmbeddingPrediction(Record):
    """One picture's embedding."""

    image: str
    embedding: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.image}: {len(self.embedding)} numbers, the first {', '.join(f'{v:.4g}' for v in self.embedding[:4])}, …"


class Agreement(Task):
    """The original's own answers as the truth: a folder of photographs is enough. What is compared, the network tells, or
    `Question.compare`: the class, the class map, or an embedding.
    """

    name = "agreement"

    @classmethod
    def make(cls, model: Model, answer: Answer, data: Any, question: Question) -> Task:  # type: ignore[override]
        if question.fit_head:
            raise DownresError("A head is fitted on labels, agreement has none: leave `fit_head` out.")
        of = question.compare or cls.told(model, answer)
        if of not in KINDS_OF_ANSWER:
            raise DownresError(f"Agreement is of {', '.join(KINDS_OF_ANSWER)}, {of!r} is none of them.")
        if (of == "masks") != (answer.size is not None):
            raise DownresError(
                f"Agreement of {of} needs another network: this one answers "
                f"{'once an image' if of == 'masks' else 'for every pixel'}."
            )
        if not isinstance(data, (str, Path, Photos)):
            raise DownresError("Agreement needs photographs alone: give the name of their folder.")
        if of == "masks":
            return OfMasks.sized(model, answer, None, question)
        kind = OfClasses if of == "classes" else OfEmbeddings
        kind.refuse_masks(answer, question)
        found = kind(model, answer.outputs, answer.head, answer.width)
        if isinstance(found, OfClasses):
            found.probability = answer.probability
        return found

    @staticmethod
    def told(model: Model, answer: Answer) -> str:
        """What the network's answers are, where that can be known; DownresError where it cannot."""
        if answer.size is not None:
            return "masks"
        if answer.head is None and not model.num_classes:
            return "embeddings"
        if model.num_classes == answer.outputs:
            return "classes"
        raise DownresError(
            f"Whether the {answer.outputs} numbers that this network returns are classes or an embedding cannot be told: "
            "say it with `compare='classes'` or `compare='embeddings'`."
        )

    @classmethod
    def restore(cls, described: Mapping[str, Any], facts: Mapping[str, Any]) -> Task:  # type: ignore[override]
        kinds: dict[str, Any] = {"classes": OfClasses, "embeddings": OfEmbeddings, "masks": OfMasks}
        return kinds[described["of"]].restore(described, facts)

    # Never made: `make` and `restore` give one of the three below.
    def open(self, data: Any, question: Question, **options: Any) -> Any:
        raise NotImplementedError

    judge = quality = compare = predict = open  # type: ignore[assignment]


class OfClasses(Classification, register=False):
    """The share of images with the original's class, by Tango's score test."""

    name = "agreement"
    score = AgreementQuality  # type: ignore[assignment]
    rungs = ("crop", "batchnorm")
    labelled, mixes = False, False

    def open(self, data: Any, question: Question, **options: Any) -> Photos:  # type: ignore[override]
        return data if isinstance(data, Photos) else open_photos(data, **options)

    def begin(self, data: Photos, seed: int) -> None:  # type: ignore[override]
        Task.begin(self, data, seed)
        self.classes = tuple(f"class {i}" for i in range(self.ways))
        self._labels = np.zeros(len(data.images), np.int64)

    @property
    def labels(self) -> np.ndarray:
        """The original's answers, on the images that are tuned or proven on."""
        return self._labels

    def split(self, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
        fit, tune = Task.split(self, fold)
        return fit, np.random.default_rng([self.seed, 1]).permutation(tune)  # the first few are a sample

    def fill(self, bank: FeatureBank) -> None:  # type: ignore[override]
        super().fill(bank)
        needed = looked_at(self)
        self._labels[needed] = self.logits(bank.logits(self.native_state, needed)).argmax(1)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "of": "classes"}

    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def targets(self) -> dict[str, np.ndarray]:
        return {"classes": self._labels[self.proof]}

    def judge_by(self, targets: Mapping[str, np.ndarray]) -> None:
        self._labels[self.proof] = targets["classes"]

    def quality(self, evidence: Arrays) -> AgreementQuality:  # type: ignore[override]
        n, same = len(evidence), int(evidence["correct"].sum())
        low, high = wilson(same, n)
        return AgreementQuality(same, n, 100 * same / n, 100 * low, 100 * high)

    def compare(self, original: Arrays, candidates: dict[str, Arrays], budget: Budget) -> dict[str, Drop]:
        return compare_all(original["correct"], {n: c["correct"] for n, c in candidates.items()}, budget) if candidates else {}

    def warnings(self, original: Score, facts: Mapping[str, Any]) -> list[str]:  # type: ignore[override]
        return []

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        return {
            "Agreement": "Images on which the class is the original's at its own resolution / all proof images, measured "
            f"through {runtime}; 95 % Wilson interval. No label was looked at: of right and wrong it says nothing. {proof}",
            "Drop": f"100 % minus the agreement; one-sided bound by Tango's score test at {100 * budget.confidence:g} % "
            f"confidence.{many}",
            "Lowered only": "The original's own weights on smaller images: what happens without recovery.",
        }

    def keep(self, store: Any, bank: FeatureBank, results: Sequence[Result], told: Result | None) -> None:
        """Nothing: there is no right and wrong to show."""

    def section(self, store: Any, run: Any, told: Result | None) -> Section:
        return Section()

    def as_stated(self, found: AgreementQuality, stated: AgreementQuality) -> tuple[bool, str]:  # type: ignore[override]
        ok = found.n == stated.n and abs(found.same - stated.same) <= max(1, found.n // 1000)
        return ok, f"agreement {found.agreement:.2f} % ({found.same}/{found.n}), stated {stated.agreement:.2f} %"

    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> Prediction:
        return super().predict(answer, picture, image, preprocessing, min(top, self.ways), out)


class OfEmbeddings(VectorTask, register=False):
    """Mean cosine similarity to the original's embedding, and the overlap of nearest neighbours."""

    name = "agreement"
    score = EmbeddingQuality
    rungs = ("crop", "batchnorm")
    output_name = "embedding"

    def mismatch(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return 1 - F.cosine_similarity(ours, theirs, dim=1).mean()

    @classmethod
    def names_in(cls, data: Any, question: Question, outputs: int | None) -> tuple[str, ...]:
        return ()

    def open(self, data: Any, question: Question, **options: Any) -> Photos:
        return data if isinstance(data, Photos) else open_photos(data, **options)

    def begin(self, data: Photos, seed: int) -> None:  # type: ignore[override]
        super().begin(data, seed)
        self._originals = np.zeros((len(data.images), self.outputs), np.float32)

    def fill(self, bank: FeatureBank) -> None:  # type: ignore[override]
        super().fill(bank)
        needed = looked_at(self)
        self._originals[needed] = bank.logits(self.native_state, needed)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "of": "embeddings"}

    def targets(self) -> dict[str, np.ndarray]:
        return {"embeddings": self._originals[self.proof]}

    def judge_by(self, targets: Mapping[str, np.ndarray]) -> None:
        self._originals[self.proof] = targets["embeddings"]

    def judge(self, answers: Iterable[np.ndarray], indices: np.ndarray, preprocessing: Preprocessing) -> Arrays:
        ours, theirs = unit(stacked(answers)), unit(self._originals[indices])
        return Arrays(cosine=(ours * theirs).sum(axis=1).astype(np.float64), neighbours=overlap(ours, theirs))

    def quality(self, evidence: Arrays) -> EmbeddingQuality:
        cosine, shared = 100 * evidence["cosine"], evidence["neighbours"]
        low, high = percentiles(resampled_mean(cosine), len(cosine))
        return EmbeddingQuality(
            float(cosine.mean()), low, high, len(cosine), None if np.isnan(shared).any() else 100 * float(shared.mean())
        )

    def points(self, evidence: Arrays) -> np.ndarray:
        return 100 * evidence["cosine"]

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        return {
            "Cosine similarity": "Between the candidate's embedding and the original's at its own resolution, 100 % the same "
            f"direction, mean over all proof images, measured through {runtime}; 95 % interval by bootstrap. {proof}",
            "Same neighbours": f"Of the {NEIGHBOURS} nearest other proof images by cosine, the share that is the original's.",
            "Drop": "100 % minus the similarity; one-sided bound by bootstrap at "
            f"{100 * budget.confidence:g} % confidence.{many}",
            "Lowered only": "The original's own weights on smaller images: what happens without recovery.",
        }

    def meaning(self, preprocessing: Preprocessing) -> dict[str, Any]:
        said = f"{self.outputs} numbers that say what is in the picture; pictures are compared by the cosine between theirs"
        return {"values": "embedding", "meaning": said}

    def serving(self, preprocessing: Preprocessing) -> str:
        return SERVING

    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> EmbeddingPrediction:
        return EmbeddingPrediction(image, tuple(float(v) for v in answer))


class OfMasks(Segmentation, register=False):
    """mIoU against the original's own class maps."""

    name = "agreement"
    score = MaskAgreementQuality
    labelled = False

    def open(self, data: Any, question: Question, **options: Any) -> Photos:  # type: ignore[override]
        return data if isinstance(data, Photos) else open_photos(data, **options)

    def begin(self, data: Photos, seed: int) -> None:  # type: ignore[override]
        Task.begin(self, data, seed)
        self.classes = tuple(f"class {i}" for i in range(self.outputs))
        self.colours = tuple(voc_colour(i + 1) for i in range(self.outputs))
        self._maps_of = _Maps([(shape[0], shape[1]) for shape in data.images.shapes])

    @property
    def truth(self) -> Sequence[np.ndarray]:
        return self._maps_of

    def fill(self, bank: MaskBank) -> None:  # type: ignore[override]
        Task.fill(self, bank)
        bank.masks = self._maps_of
        needed = looked_at(self)
        for i, found in zip(needed, bank.class_maps(self.native_state, needed), strict=True):
            self._maps_of.put(int(i), found)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "of": "masks"}

    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "colours": [list(c) for c in self.colours], "absent": []}

    def targets(self) -> dict[str, np.ndarray]:
        return {f"map{k}": self._maps_of[int(i)] for k, i in enumerate(self.proof)}

    def judge_by(self, targets: Mapping[str, np.ndarray]) -> None:
        for k, i in enumerate(self.proof):
            self._maps_of.put(int(i), targets[f"map{k}"])

    def quality(self, evidence: Any) -> MaskAgreementQuality:
        return MaskAgreementQuality.from_json(super().quality(evidence).to_json())

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        found = super().made(budget, runtime, proof, many)
        own = "Against the original's class maps at its own resolution, no label was looked at. "
        return {"mIoU against the original": own + found.pop("mIoU"), **found}

    @classmethod
    def restore(cls, described: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        return super().restore(described, facts)


class _Maps(Sequence[np.ndarray]):
    """Class maps of the original, at the size of each picture, kept compressed; before one is put in, a place of its size."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self.shapes = shapes
        self._packed: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: Any) -> np.ndarray:  # type: ignore[override]  # one at a time: no slices
        size = self.shapes[int(index)]
        packed = self._packed.get(int(index))
        if packed is None:
            return np.zeros(size, np.uint8)
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(size)

    def put(self, index: int, found: np.ndarray) -> None:
        if found.dtype != np.uint8:
            raise DownresError("Agreement of class maps knows up to 255 classes, this network has more: give labels.")
        self._packed[index] = zlib.compress(np.ascontiguousarray(found).tobytes(), 1)


def looked_at(task: Task) -> np.ndarray:
    """The images whose answers decide something: to prove on and to tune on."""
    tuned = [task.split(fold)[1] for fold in (*task.data.folds, task.everything())]
    return np.unique(np.concatenate([task.proof, *tuned]))


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, F) of length 1, float32; a vector of zeros stays one."""
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(length, 1e-30)).astype(np.float32)


def overlap(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of each image's nearest others the share that both sets of unit vectors agree on, (n,); NaN with too few images."""
    n, k = len(ours), NEIGHBOURS
    if n <= k:
        return np.full(n, np.nan)
    shared = np.empty(n)
    for start in range(0, n, 1024):
        rows = np.arange(start, min(start + 1024, n))
        near = []
        for vectors in (ours, theirs):
            similar = vectors[rows] @ vectors.T
            similar[np.arange(len(rows)), rows] = -np.inf
            near.append(np.argpartition(-similar, k, axis=1)[:, :k])
        shared[rows] = [len(np.intersect1d(a, b)) / k for a, b in zip(*near, strict=True)]
    return shared
