"""What tasks share whose networks answer with one vector an image: features kept, and a linear head that can be fitted anew."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from threadpoolctl import ThreadpoolController
from torch import nn

from ..copying import copied
from ..errors import DownresError
from ..families import Model
from ..probe import Answer
from ..recovery.features import FeatureBank, Head
from ..recovery.state import REFITTED, State
from .evidence import Arrays
from .question import refuse_mask_options
from .task import SERVED_ALIKE, Question, Task


@cache
def _pools() -> ThreadpoolController:
    """The libraries for linear algebra: looking for them among all that a process has loaded takes as long as a small fit."""
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """In which a head is fitted: the order of sums, so the answer, does not depend on the machine's load."""
    return _pools().limit(limits=1)


class VectorTask(Task):
    """One vector an image.

    head: dotted name of the final linear layer or None; width: its inputs (without a head the number of outputs).
    fit_new: the head is a place to be filled, to be fitted on the training images first. strengths: of a head's regularisation,
    tried on tuning images; fitted: how a head is fitted, in words.
    """

    rungs: ClassVar[tuple[str, ...]] = ("crop", "batchnorm", "head")
    strengths: ClassVar[tuple[float, ...]] = ()
    fitted: ClassVar[str] = ""

    def __init__(
        self, model: Model | None, outputs: int, head: str | None = None, width: int = 0, fit_new: bool = False
    ) -> None:
        super().__init__(model, outputs)
        self.head, self.width, self.fit_new = head, width, fit_new
        self.classes: tuple[str, ...] = ()

    @classmethod
    def make(cls, model: Model, answer: Answer, data: Any, question: Question) -> Self:
        cls.refuse_masks(answer, question)
        return cls.with_head(model, answer, question.fit_head, lambda outputs: len(cls.names_in(data, question, outputs)))

    @classmethod
    @abstractmethod
    def names_in(cls, data: Any, question: Question, outputs: int | None) -> tuple[str, ...]:
        """A name for each output, as the data have it, checked against the network's outputs; decodes no image."""

    @classmethod
    def with_head(cls, model: Model, answer: Answer, fit_new: bool, count: Callable[[int | None], int]) -> Self:
        """The task, its head found or replaced by one for as many outputs as `count(None)` says; else `count` checks them."""
        head, width, outputs = answer.head, answer.width, answer.outputs
        if not fit_new:
            count(outputs)
            return cls(model, outputs, head, width, False)
        if head is None:
            raise DownresError(
                "No head can be fitted: the output of this model does not come from a linear layer; "
                "give a model that has one, or weights for these classes."
            )
        outputs = count(None)
        module = copied(model.module)
        linear = nn.Linear(width, outputs)
        nn.init.zeros_(linear.weight)  # a place to be filled; random numbers would make every run another one
        nn.init.zeros_(linear.bias)
        module.set_submodule(head, linear)
        weights = f"{model.weights}; head fitted anew on the training images"
        return cls(Model(module, model.preprocessing, model.spec, weights, outputs), outputs, head, width, True)

    @classmethod
    def refuse_masks(cls, answer: Answer, question: Question) -> None:
        """DownresError for options, or a network, that are of answers to every pixel."""
        if answer.size is not None:
            raise DownresError(
                f"{cls.name.capitalize()} needs one answer an image, this network answers for every pixel: "
                "give masks, or another network."
            )
        refuse_mask_options(question)

    def describe(self) -> dict[str, Any]:
        return {"outputs": self.outputs, "fit_head": self.fit_new}

    @classmethod
    def restore(cls, described: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        task = cls(None, described["outputs"], fit_new=described["fit_head"])
        task.classes = tuple(facts.get("classes", ()))
        return task

    def bank(self, folder: Path | None, **options: Any) -> FeatureBank:
        p = self.model.preprocessing
        return FeatureBank(self.model.module, self.head, self.width, p, self.which, folder=folder, **options)

    def evidence(self, bank: FeatureBank, state: State, indices: np.ndarray, *, serving: bool = True) -> Any:
        return self.judge(bank.logits(state, indices, serving=serving), indices, bank.preprocessing_of(state))

    def why_no_head(self, bank: FeatureBank, fit: np.ndarray) -> str:
        return "" if bank.head else "the model's output does not come from a linear layer"

    def refit(self, bank: FeatureBank, state: State, index: int, fit: np.ndarray, tune: np.ndarray) -> tuple[State, State, str]:
        """Its strength is chosen on tuning images, by the loss: on a few hundred images scores differ by luck alone."""
        train = np.concatenate([fit, tune])
        features = bank.features(state.without(REFITTED), train)
        inner, held = features[: len(fit)], features[len(fit) :]
        trials = []
        for strength in self.strengths if len(tune) else (self.strengths[len(self.strengths) // 2],):
            head = self.fit(inner, fit, strength)
            trials.append((self.loss(head(held), tune) if len(tune) else 0.0, strength, head))
        _, strength, start = min(trials, key=lambda trial: trial[:2])
        whole = self.fit(features, train, strength)
        states = bank.refitted(state, start, index, len(fit)), bank.refitted(state, whole, index, len(train))
        return *states, f"{self.fitted}={strength:g}"

    def fit(self, features: np.ndarray, indices: np.ndarray, strength: float) -> Head:
        """A head for the features (n, F) of the images `indices`."""
        raise NotImplementedError

    def loss(self, answers: np.ndarray, indices: np.ndarray) -> float:
        """How wrong the answers (n, K) are: what a head's fit, or a training, minimises."""
        raise NotImplementedError


class ScoresTask(VectorTask):
    """One whose network scores classes. probability: what it returns are probabilities already, see `Answer`."""

    probability = False

    @classmethod
    def make(cls, model: Model, answer: Answer, data: Any, question: Question) -> Self:
        task = super().make(model, answer, data, question)
        task.probability = answer.probability
        return task

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **({"probability": True} if self.probability else {})}

    @classmethod
    def restore(cls, described: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        task = super().restore(described, facts)
        task.probability = described.get("probability", False)
        return task


def stacked(answers: Any) -> np.ndarray:
    """(n, K), from one array or from a row for each image."""
    return answers if isinstance(answers, np.ndarray) else np.stack(list(answers))


def ranked_alike(served: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """`Task.alike` of classes with probabilities in percent, the likeliest first; where only one side names a class, it has at
    most the smallest probability of the other. As near as demanded they have the same first, but for ties.
    """
    worst, same = 0.0, 0
    for pair in zip(served, predicted, strict=True):
        ours, theirs = (dict(zip(one["classes"], one["probabilities"], strict=True)) for one in pair)
        for name in ours.keys() | theirs.keys():
            worst = max(worst, abs(ours.get(name, min(ours.values())) - theirs.get(name, min(theirs.values()))))
        same += next(iter(ours)) == next(iter(theirs))
    said = f"same first class on {same} of {len(served)} real images, probabilities at most {worst:.2g} points apart"
    return worst <= 100 * SERVED_ALIKE, said


def standardised(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features with mean 0 and deviation 1, float32; the mean; the scale), in float64: the sums run over many images."""
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    # A dead channel carries nothing, and must not be blown up; float32 cannot tell changes of a ten-millionth.
    scale[scale < 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0
    return ((features - mean) / scale).astype(np.float32), mean, scale


def folded(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Head:
    """A head on standardised features as one on the features themselves."""
    weight = weight / scale
    return Head(weight.astype(np.float32), (bias - weight @ mean).astype(np.float32))


__all__ = ["Arrays", "VectorTask", "folded", "ranked_alike", "stacked", "standardised"]
