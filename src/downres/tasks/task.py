"""The one door: what a search, a report and an artifact know of what a network is for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import DownresError
from ..families import Model
from ..images import Fold, Images, Skip
from ..measuring.paired import bootstrap_drops, resampled_mean
from ..probe import Answer, logits_of
from ..records import Budget, Candidate, Drop, Preprocessing, Recovery, Result, Score
from ..recovery.bank import Bank
from ..recovery.crop import crop_options
from ..recovery.ladder import Option, Reference, best_of, climb, standard_errors
from ..recovery.state import State
from ..recovery.views import Spots, Views
from ..reports.page import Section
from .evidence import Arrays, Evidence
from .question import Question

Progress = Callable[[str, int, int], None]

SERVED_ALIKE = 0.01
"""Largest difference of numbers between serve.py and `predict`, of the largest of them: the resizes of PIL and torchvision,
which is six times as fast, differ by 1 or 2 of 255 levels in a few pixels of a thousand."""
SERVING = """
def answer(output, picture, name):  # the bare numbers
    return {"output": output.tolist()}
"""
TOLERANCE = 1e-3
"""Largest difference of answers between torch and onnxruntime, relative to the largest of them."""


class Data(Protocol):
    """Pictures, what is asked of each, and how they are divided. `description`: one sentence, for reports."""

    @property
    def images(self) -> Images: ...
    @property
    def folds(self) -> tuple[Fold, ...]: ...
    @property
    def skipped(self) -> tuple[Skip, ...]: ...
    @property
    def description(self) -> str: ...
    @property
    def licence(self) -> str: ...

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that a measurement depends on: pictures, targets and folds."""
        ...


def told_apart(data: Any, fold: Fold, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(fit, tune) where the data themselves say which images tune, as archives do by a hash of each key; else None. Their order
    is that of another hash: the first few that tune are a sample, and after `most` of them the rest is left alone.
    """
    if (tuning := getattr(data, "tuning", None)) is None:
        return None
    tunes = tuning[fold.train]
    if tunes.all():  # of two or three images
        return fold.train, fold.train[:0]
    return fold.train[~tunes], fold.train[tunes][:most]


KINDS: dict[str, type["Task"]] = {}
"""Every task by its name, downres' own and those that users define."""


class Task(ABC):
    """What a network is for: how the data are opened, what is kept of its answers, how good they are, what is shown of them.

    A subclass has at least a `name`, a `score` (a `Score` record), and the methods `make`, `open`, `judge`, `points`,
    `quality` and `predict`; docs/tasks.md has a whole one. One object serves one model; `open` gives it data.

    rungs: of the recovery ladder, those that make sense. glance: images that a recalibration is first tried on, 0 for none.
    labelled: whether its targets can be learned, see `learned`; mixes: whether these can be mixed with one another, (B, K);
    mirrors: whether a mirrored image has the same. sequential: whether `compare` keeps its promise on the first few of many
    images, so that a proof may be looked at in rounds: a test of right and wrong does, a bootstrap does not, as it knows
    nothing of what is rare; nor may the evidence of an image depend on the others then.
    evidence_type: what `judge` returns. writes: whether `predict` writes files named after the pictures.
    """

    name: ClassVar[str] = ""
    score: ClassVar[type[Score]] = Score
    rungs: ClassVar[tuple[str, ...]] = ("crop", "batchnorm")
    glance: int = 0
    evidence_type: ClassVar[Any] = Arrays
    tuning_images: ClassVar[int] = 1000
    output_name: str = "logits"
    batch_size: ClassVar[int] = 8
    writes: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    mirrors: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    def __init_subclass__(cls, register: bool = True, **options: Any) -> None:
        super().__init_subclass__(**options)
        if register and "name" in vars(cls):
            KINDS[cls.name] = cls

    def __init__(self, model: Model | None, outputs: int) -> None:
        self._model, self.outputs = model, outputs
        self.which: int | str | None = None  # of several outputs, see `Answer`
        self.fit_new = False
        self.seed = 0
        self._data: Any = None

    # Of the model, before any data are opened

    @classmethod
    def takes(cls, answer: Answer, data: Any, question: Question) -> bool:
        """Whether this is the task of a network that answers so, when nobody names one."""
        return False

    @classmethod
    @abstractmethod
    def make(cls, model: Model, answer: Answer, data: Any, question: Question) -> Self:
        """The task of a model; of the data only folders and headers are looked at. DownresError where they do not fit."""

    @classmethod
    def named_classes(cls, data: Any, question: Question) -> tuple[str, ...]:
        """Names of what a new network for these data has to tell apart; of the data only folders and headers are looked at."""
        raise DownresError(f"A new network is made for classes, {cls.name} has none: give a network.")

    @property
    def model(self) -> Model:
        assert self._model is not None
        return self._model

    @property
    def native(self) -> Candidate:
        """The original as a candidate: its own resolution, nothing else."""
        return Candidate(self.model.preprocessing.resolution)

    @property
    def native_state(self) -> State:
        return State(self.native, self.model.preprocessing.crop_ratio)

    @property
    def channels(self) -> int:
        return len(self.model.preprocessing.mean)

    def describe(self) -> dict[str, Any]:
        """What `restore` needs to make the task again without its model: plain JSON values."""
        return {"outputs": self.outputs}

    def described(self) -> dict[str, Any]:
        """What a run and an artifact keep of the task."""
        chosen = {} if self.which is None else {"output_index": self.which}
        return {"name": self.name, **self.describe(), **chosen}

    @classmethod
    def restore(cls, described: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        """The task of a run or an artifact, without model and data; `facts` are those of its data."""
        task = cls(None, described["outputs"])
        return task

    def check_budget(self, budget: Budget) -> None:
        """DownresError for an allowed drop that makes no sense for this task's score: here percentage points."""
        if budget.max_drop >= 100.0:
            raise DownresError(f"The allowed drop is in percentage points from 0 to below 100, {budget.max_drop} is not.")

    def refuse_flips(self, budget: Budget) -> None:
        """DownresError for a ceiling on other answers where an answer is no single thing."""
        if budget.max_flips is not None and type(self).changed is Task.changed:
            raise DownresError(
                f"`max_flips` counts answers that become others, a {self.name} network has no single answer: leave it out."
            )

    def check(self, candidates: Sequence[Candidate]) -> None:  # noqa: B027  (a task need not have any to refuse)
        """DownresError for a candidate whose quality cannot be measured as it is."""

    def bank(self, folder: Path | None, **options: Any) -> Bank:
        """A bank without images yet: it can export and count; `fill` gives it images."""
        return Bank(self.model.module, self.model.preprocessing, self.serve, (self.output_name,), folder=folder, **options)

    def serve(self, network: nn.Module) -> nn.Module:
        """The network as it is timed, exported and shipped; its first output is what `judge` gets."""
        return Logits(network, self.which)

    def counted(self, network: nn.Module) -> nn.Module:
        """The network as its costs are counted."""
        return network

    # Of the data

    @abstractmethod
    def open(self, data: Any, question: Question, **options: Any) -> Data:
        """The data opened: options are folds, val_fraction, parts, seed and progress, see `open_folder`."""

    def begin(self, data: Data, seed: int) -> None:
        """From here on the task has data."""
        self._data, self.seed = data, seed
        if len(data.images) == 0 or len(self.proof) == 0:
            raise DownresError(
                "There are no images left to measure quality on: check the folder and the list of skipped images."
            )

    @property
    def data(self) -> Any:
        assert self._data is not None
        return self._data

    @property
    def proof(self) -> np.ndarray:
        """Indices of all proof images in a fixed order: the test images of all folds."""
        return np.concatenate([fold.test for fold in self.data.folds])

    def everything(self) -> Fold:
        """The fold whose ladder makes the shipped model: all training images (with cross folds: every image)."""
        train = np.unique(np.concatenate([fold.train for fold in self.data.folds]))
        return Fold(train, np.zeros(0, np.int64))

    def split(self, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
        """(fit, tune): about a quarter of the training images tune, at most `tuning_images`, drawn at random."""
        if (told := told_apart(self._data, fold, self.tuning_images)) is not None:
            return told
        n = len(fold.train)
        if n < 4:
            return fold.train, np.zeros(0, np.int64)
        shuffled = np.random.default_rng([self.seed, 1]).permutation(fold.train)
        count = min(self.tuning_images, n // 4)
        return np.sort(shuffled[count:]), np.sort(shuffled[:count])

    def fill(self, bank: Bank) -> None:
        """Give the bank the images, for each fold (and for everything) those that BatchNorm may be recalibrated on, and those
        that 8-bit activations take their ranges from.
        """
        bank.images = self.data.images
        fitting = [self.split(fold)[0] for fold in (*self.data.folds, self.everything())]
        bank.calibration = [np.random.default_rng([self.seed, 2]).permutation(indices) for indices in fitting]
        ranged = fitting[:1] if len(self.data.folds) == 1 else [fold.test for fold in self.data.folds[:2]]
        bank.ranged = [np.random.default_rng([self.seed, 3]).permutation(indices) for indices in ranged]

    def facts(self) -> dict[str, Any]:
        """What a report and an artifact say of the data that only this task knows: plain JSON values."""
        return {}

    # Evidence, quality, verdict

    def evidence(self, bank: Any, state: State, indices: np.ndarray, *, serving: bool = True) -> Any:
        """What the network in that state does on those images."""
        answers = (answer[0] for answer in bank.answers(state, indices, serving=serving))
        return self.judge(answers, indices, bank.preprocessing_of(state))

    @abstractmethod
    def judge(self, answers: Iterable[np.ndarray], indices: np.ndarray, preprocessing: Preprocessing) -> Evidence:
        """Evidence from what the served network answers for each image, (K, …) without the batch axis, and from the targets."""

    @abstractmethod
    def quality(self, evidence: Any) -> Score:
        """How good that is, with an interval."""

    def compare(self, original: Any, candidates: dict[str, Any], budget: Budget) -> dict[str, Drop]:
        """The drop of each candidate against the original on the same images, with verdicts that hold together: here what the
        mean of `points` falls by, by paired bootstrap over the images.

        All candidates are judged on the same images and the cheapest success is picked: that many looks would make some
        success by luck likely. Holm's step-down procedure (`measuring.statistics.holm`) pays for it.
        """
        apart = {name: self.points(original) - self.points(one) for name, one in candidates.items()}
        drops = {name: float(values.mean()) for name, values in apart.items()}
        samples = {name: resampled_mean(values) for name, values in apart.items()}
        return bootstrap_drops(drops, samples, len(original), budget) if apart else {}

    def targets(self) -> dict[str, np.ndarray]:
        """What the proof images were judged by, where it is not in the data themselves: goes into the artifact."""
        return {}

    def judge_by(self, targets: Mapping[str, np.ndarray]) -> None:  # noqa: B027
        """The inverse of `targets`, for the data that the task has."""

    def points(self, evidence: Any) -> np.ndarray:
        """A number an image, larger is better, float (n,): what drops are means of, and what the ladder compares rungs by."""
        raise NotImplementedError

    def changed(self, original: Any, one: Any) -> np.ndarray | None:
        """Which images get another answer than the original's, bool (n,); None where an answer is no single thing. Of those
        that do, `points` say whether a right answer became a wrong one.
        """
        return None

    # Recovery

    def matched(self, network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What training compares of a network's answer to images x (B, C, H, W), with its gradients: (B, K) or (B, K, h, w)."""
        return logits_of(network(x), self.which)

    def mismatch(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """How far answers are from the original's to the same images, mean over images: the loss that distillation minimises.
        As it is here their squared distance; the optimizer does not depend on its scale.
        """
        return F.mse_loss(ours, theirs)

    def learned(self, bank: Any, views: Views, size: tuple[int, int]) -> torch.Tensor:
        """The targets of views as training has them, (B, K) float or (B, *size) of classes: of a task that is `labelled`."""
        raise NotImplementedError

    def spots(self, images: np.ndarray) -> Spots | None:
        """What draws places of a class that is drawn before, of those images; None where there are no places."""
        return None

    def loss_of(self, ours: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        """How wrong answers (B, …) are, mean over images: the loss that training on labels minimises. smoothing: of classes."""
        return F.mse_loss(ours, targets)

    def reference(self, bank: Any, index: int, fold: Fold, rungs: Sequence[str]) -> Reference:
        """The original in fold `index`."""
        if not rungs and not self.fit_new:
            # Nothing to climb: the training images need not even be looked at.
            fold = Fold(np.zeros(0, np.int64), fold.test)
        fit, tune = self.split(fold)
        start = state = self.native_state
        if self.fit_new:
            start, state, _ = self.refit(bank, state, index, fit, tune)
        return Reference(index, fold, fit, tune, start, state, self.evidence(bank, start, tune) if len(tune) else None)

    def crops(self, native: float) -> Sequence[float]:
        """Other crop ratios to try."""
        return crop_options(native)[1:]

    def why_no_head(self, bank: Any, fit: np.ndarray) -> str:
        """Why no head can be fitted anew, '' when it can."""
        return f"no head is fitted for {self.name}"

    def refit(self, bank: Any, state: State, index: int, fit: np.ndarray, tune: np.ndarray) -> tuple[State, State, str]:
        """(state with a head fitted without the tuning images, with one fitted on all training images, how)."""
        raise NotImplementedError

    def choose(self, options: Sequence[Option]) -> Option:
        """Of the rungs tried the one to serve."""
        scores = [float(self.points(option.evidence).sum()) for option in options]
        return best_of(options, scores, lambda one, best: standard_errors(self.points(one), self.points(best)))

    def final(
        self, bank: Any, candidate: Candidate, states: Sequence[State], recovery: Recovery, budget: Budget, rungs: Sequence[str]
    ) -> tuple[State, Recovery]:
        """What is shipped: after a single split the very network that was proven, after cross-fitting one more climb."""
        if len(states) == 1:
            return states[0], recovery
        reference = self.reference(bank, len(states), self.everything(), rungs)
        return climb(self, bank, candidate, reference, budget, rungs)

    # Words, pictures, and the shipped file

    def lacks(self, facts: Mapping[str, Any]) -> list[str]:
        """What the data do not have, a phrase each."""
        return []

    def warnings(self, original: Score, facts: Mapping[str, Any]) -> list[str]:
        """What to know before relying on the numbers, a phrase each."""
        return self.lacks(facts)

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        """Label → sentence: how the numbers of this task were made. proof: which images; many: for several candidates."""
        return {
            self.score.title or self.score.metric: f"Measured through {runtime}. {proof}",
            "Drop": f"{self.score.metric} of the original minus that of the candidate on the same images; the bound is "
            f"one-sided, at {100 * budget.confidence:g} % confidence.{many}",
        }

    def keep(self, store: Any, bank: Any, results: Sequence[Result], told: Result | None) -> None:  # noqa: B027
        """Put what `section` shows into the run's folder, so that a moved run can still show it. told: the page's candidate."""

    def section(self, store: Any, run: Any, told: Result | None) -> Section:
        """This task's own part of the report."""
        return Section()

    def shape(self) -> list[Any]:
        """Of the shipped graph's output, the batch first."""
        return ["batch", self.outputs]

    def parity(self, ours: Iterator[np.ndarray], theirs: Iterator[np.ndarray]) -> tuple[bool, str]:
        """Whether onnxruntime and torch answer alike on real images, and how nearly."""
        worst, scale, n = 0.0, 0.0, 0
        for one, other in zip(ours, theirs, strict=True):
            if not (np.isfinite(one).all() and np.isfinite(other).all()):
                return False, f"NaN or infinite {self.output_name} on real images"
            worst, scale = max(worst, float(np.abs(one - other).max())), max(scale, float(np.abs(other).max()))
            n += 1
        alike = worst <= TOLERANCE * scale
        return alike, f"largest difference {worst:.2g} at {self.output_name} up to {scale:.3g}, on {n} real images"

    # Whoever serves the file has PIL, NumPy and a runtime

    dtype: str = "float32"

    def meaning(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """What the shipped graph's output is, for the manifest: `values` in a word, `meaning` in a sentence, whatever `serving`
        reads of it as MANIFEST["output"]; plain JSON values.
        """
        return {"values": self.output_name, "meaning": f"what the network answers to one picture, for the task {self.name}"}

    def serving(self, preprocessing: Preprocessing) -> str:
        """Source of `answer(output, picture, name)`, a function of serve.py: the answer to one picture as a dictionary of JSON
        values, best under the names that the record of `predict` has. output: of the graph, without the batch axis; picture: a
        PIL image, upright; name: of its file. It may read MANIFEST, and use np and Image.
        """
        return SERVING

    def alike(
        self, served: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]], answers: Sequence[np.ndarray]
    ) -> tuple[bool, str]:
        """Whether what serve.py prints is what `predict` says, image by image, and how nearly: here value by value under names
        that both have; `output` is compared with the graph's answers.
        """
        expected = [{"output": a.tolist(), **p} for a, p in zip(answers, predicted, strict=True)]
        names = [name for name in served[0] if name in expected[0] and name != "image"]
        apart = [nearness([one.get(name) for one in served], [one[name] for one in expected]) for name in names]
        worst = max(apart, default=np.inf)
        apart_by = f"at most {100 * worst:.2g} % of the largest number apart" if worst < np.inf else "not the same"
        said = f"{', '.join(names) or 'nothing that predict says'} {apart_by}"
        return worst <= SERVED_ALIKE, f"{said}, on {len(served)} real images"

    def as_stated(self, found: Score, stated: Score) -> tuple[bool, str]:
        """Whether a quality measured again is what the manifest says, and both in words."""
        ok = found.images == stated.images and abs(found.score - stated.score) <= 0.001 * abs(stated.score)
        metric = self.score.metric
        return ok, f"{metric} {found.score:.4g} on {found.images} images, stated {stated.score:.4g} on {stated.images}"

    @abstractmethod
    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> Any:
        """One picture's answer in words: a record with `to_json`. out: folder for files that it writes."""


def nearness(ours: Any, theirs: Any) -> float:
    """By how much the numbers in two JSON values differ, of the largest in the second; infinite where anything else does."""

    def apart(a: Any, b: Any) -> float:
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            return abs(a - b)
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return max((apart(a[name], b[name]) for name in a), default=0.0)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return max(map(apart, a, b), default=0.0)
        return 0.0 if a == b else np.inf

    def largest(a: Any) -> float:
        inside = a.values() if isinstance(a, dict) else a if isinstance(a, (list, tuple)) else ()
        return abs(a) if isinstance(a, (int, float)) else max(map(largest, inside), default=0.0)

    return apart(ours, theirs) / max(largest(theirs), 1e-12)


def of_classes(ours: torch.Tensor, theirs: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """Kullback-Leibler divergence between classes by their logits (B, K, …), softened by the temperature (Hinton et al. 2015);
    of one logit the binary cross-entropy.
    """
    if ours.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(ours, theirs.sigmoid())
    soft, target = (F.log_softmax(one / temperature, 1) for one in (ours, theirs))
    return F.kl_div(soft, target, reduction="none", log_target=True).sum(1).mean() * temperature**2


def log_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Logits of probabilities whose softmax they are, where none is 0."""
    return probabilities.float().clamp_min(1e-12).log()


class Logits(nn.Module):
    """A network that returns the bare logits, whatever the model wraps them in; which: of several outputs."""

    def __init__(self, model: nn.Module, which: int | str | None = None) -> None:
        super().__init__()
        self.model, self.which = model, which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model(x), self.which)
