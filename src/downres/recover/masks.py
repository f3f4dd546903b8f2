"""Predicted masks of every image under every state of a segmentation network, as counts; and what wins some of it back."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import Fold, Images
from ..data.preprocess import shown_size
from ..errors import DownresError
from ..measure.segmentation import Tallies, Truths, compare_tallies, segmentation_quality, tally
from ..records import OUTSIDE, WITHIN, Budget, Candidate, Dense, Drop, Preprocessing, Recovery, Rung
from ..reductions.dense import Segmenter
from .bank import Bank, State
from .batchnorm import has_batchnorm

TUNING_MASKS = 100
"""Tuning images at most: masks say more than labels, and looking at them takes longer."""


def classes_at(answer: np.ndarray, size: tuple[int, int], dense: Dense, part: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """The class map, uint8 (or int16) (height, width), of one image at the size of its own mask.

    answer: what a `Segmenter` of that `dense` gives for the image, (K, H, W) or (H, W). part: of its height and width that
    the picture fills; the rest is padding. Logits are resized to `size` before the largest is taken; a class map, which is
    all that there is, by its nearest pixels.
    """
    rows, columns = (max(1, round(side * p)) for side, p in zip(dense.size, part, strict=True))
    cut = torch.from_numpy(np.ascontiguousarray(answer[..., :rows, :columns]))
    same = tuple(cut.shape[-2:]) == tuple(size)
    if answer.ndim == 2:
        found = cut if same else F.interpolate(cut[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    else:
        options = {} if same else {"mode": dense.interpolation, "align_corners": dense.align_corners}
        found = (cut if same else F.interpolate(cut[None], size=size, **options)[0]).argmax(0)  # type: ignore[arg-type]
    return found.numpy().astype(answer.dtype if answer.ndim == 2 else np.uint8 if len(answer) <= 255 else np.int16)


def picture_classes(
    answer: np.ndarray, picture: Sequence[int], size: tuple[int, int], dense: Dense, p: Preprocessing
) -> np.ndarray:
    """`classes_at` of a picture of the shape (H, W, …) that `p` made the network's input of: what it padded is left out."""
    shown = shown_size((picture[0], picture[1]), p)
    return classes_at(answer, size, dense, (shown[0] / p.hw[0], shown[1] / p.hw[1]))


class MaskBank(Bank):
    """`tallies(state, indices)`: one pass over the images for each state that is looked at. `masks` come with the images.

    outputs: number of classes. dense: the full-size answer that is timed, exported and judged.
    """

    calibration_batch = 8

    def __init__(self, model: nn.Module, outputs: int, dense: Dense, preprocessing: Preprocessing, **options: Any) -> None:
        super().__init__(model, preprocessing, **{"batch_size": 1, **options})
        self.outputs, self.dense = outputs, dense
        self.output_names = (dense.output,)
        self.masks: Sequence[np.ndarray] = ()
        self._truths: dict[bytes, Truths] = {}
        self._tallies: dict[tuple[State, bytes], Tallies] = {}

    def served(self, state: State) -> nn.Module:
        return Segmenter(self.network(state), self.dense)

    def counted(self, state: State) -> nn.Module:
        return self.served(state)

    def release(self) -> None:
        super().release()
        self._tallies = {}

    def tallies(self, state: State, indices: np.ndarray, *, serving: bool = True) -> Tallies:
        """Of the images `indices`, in that order."""
        images = indices.tobytes()
        if images not in self._truths:
            chosen = self.masks.take(indices) if isinstance(self.masks, Images) else [self.masks[int(i)] for i in indices]
            self._truths[images] = Truths(chosen, self.outputs)
        if (state, images) not in self._tallies:
            with contextlib.closing(self.class_maps(state, indices, serving=serving)) as maps:
                self._tallies[state, images] = tally(maps, self._truths[images], self.outputs)
        return self._tallies[state, images]

    def class_maps(self, state: State, indices: np.ndarray, *, serving: bool = True) -> Generator[np.ndarray]:
        """The predicted class map of each image, at the size of its mask."""
        assert self.images is not None
        runtime, p, done = self.runtime(state, serving), self.preprocessing_of(state), 0
        shapes = self.images.shapes
        sizes = self.masks.shapes if isinstance(self.masks, Images) else [mask.shape for mask in self.masks]
        with contextlib.closing(self.batches(state, indices, self.batch_size)) as source:
            for batch in source:
                (answers,) = runtime(np.asarray(batch))
                for answer in answers:
                    i = int(indices[done])
                    nowhere = answer == np.iinfo(answer.dtype).max if answer.ndim == 2 else ~np.isfinite(answer)
                    if nowhere.any():
                        raise DownresError(
                            f"The model returns NaN or infinite values at {state.candidate} on real images "
                            f"({self.images.names[i]}): check its weights and the preprocessing."
                        )
                    height, width = sizes[i][:2]
                    yield picture_classes(answer, shapes[i], (height, width), self.dense, p)
                    done += 1
                self.note(state, len(answers), done, len(indices))


@dataclass(frozen=True)
class MaskReference:
    """The original in one fold: training images that may be tuned on, and its counts on them (None without any)."""

    index: int
    fold: Fold
    tune: np.ndarray
    tallies: Tallies | None


def split_tuning(fold: Fold, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, tune): about a quarter of the training images tune, at most TUNING_MASKS, drawn at random, in ascending order."""
    n = len(fold.train)
    if n < 4:
        return fold.train, np.zeros(0, np.int64)
    shuffled = np.random.default_rng([seed, 1]).permutation(fold.train)
    count = min(TUNING_MASKS, n // 4)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def make_reference(bank: MaskBank, native: State, index: int, fold: Fold, seed: int) -> MaskReference:
    _, tune = split_tuning(fold, seed)
    return MaskReference(index, fold, tune, bank.tallies(native, tune) if len(tune) else None)


def climb(
    bank: MaskBank, candidate: Candidate, reference: MaskReference, budget: Budget, rungs: tuple[str, ...]
) -> tuple[State, Recovery]:
    """The ladder of a segmentation network has one rung: BatchNorm recalibration, on training images alone.

    It is climbed where the drop on the tuning images is not shown to be within the budget, and taken where it is better there
    beyond doubt: the bootstrap's one-sided 95 % bound of the paired gain is above 0.
    """
    native = State(candidate, bank.preprocessing.crop_ratio)
    if reference.tallies is None or not rungs:
        why = "no recovery was asked for" if not rungs else "fewer than 4 training images: nothing can be recovered"
        return native, Recovery("none", native.crop_ratio, 0.0, (Rung("none", None, 0, 0.0, 0, why),))
    tried: list[Rung] = []

    def attempt(rung: str, state: State) -> tuple[Tallies, Drop]:
        assert reference.tallies is not None
        since, passes = time.perf_counter(), bank.passes
        found = bank.tallies(state, reference.tune, serving=False)
        drop = compare_tallies(reference.tallies, {"it": found}, budget)["it"]
        score = segmentation_quality(found).miou
        tried.append(Rung(rung, score, len(found), time.perf_counter() - since, bank.passes - passes))
        return found, drop

    before, tuning = attempt("none", native)
    chosen, name = native, "none"
    if tuning.verdict != WITHIN and "batchnorm" in rungs:
        if not has_batchnorm(bank.model):
            why = "nothing to recalibrate: the network has no BatchNorm statistics"
            tried.append(Rung("batchnorm", None, 0, 0.0, 0, why))
        else:
            state = dataclasses.replace(native, calibration=reference.index)
            after, drop = attempt("batchnorm", state)
            gain = compare_tallies(after, {"it": before}, Budget(0.0))["it"]
            if gain.verdict == OUTSIDE:
                chosen, name, tuning = state, "batchnorm", drop
    seconds = sum(rung.seconds for rung in tried)
    return chosen, Recovery(name, chosen.crop_ratio, seconds, tuple(tried), tuning)
