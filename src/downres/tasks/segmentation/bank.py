"""Predicted masks of every image under every state of a segmentation network, as counts; and what wins some of it back."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...images import Images
from ...images.preprocess import shown_size
from ...records import Dense, Preprocessing
from ...recovery.bank import Bank, State
from ...reductions.dense import Segmenter
from .quality import Tallies, Truths, tally


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
        found = (cut if same else F.interpolate(cut[None, None].float(), size=size, mode="nearest-exact")[0, 0]).numpy()
    else:
        options = {} if same else {"mode": dense.interpolation, "align_corners": dense.align_corners}
        whole = cut if same else F.interpolate(cut[None], size=size, **options)[0]  # type: ignore[arg-type]
        found = largest(whole.numpy(), dense)
    return found.astype(answer.dtype if answer.ndim == 2 else np.uint8 if len(answer) <= 255 else np.int16)


def largest(logits: np.ndarray, dense: Dense) -> np.ndarray:
    """(K, H, W) → (H, W), the class of the largest logit; of a single one 1 where it is above the threshold."""
    return logits.argmax(0) if dense.threshold is None else (logits[0] > dense.threshold).astype(np.int64)


def picture_classes(
    answer: np.ndarray, picture: Sequence[int], size: tuple[int, int], dense: Dense, p: Preprocessing
) -> np.ndarray:
    """`classes_at` of a picture of the shape (H, W, …) that `p` made the network's input of: what it padded is left out."""
    shown = shown_size((picture[0], picture[1]), p)
    return classes_at(answer, size, dense, (shown[0] / p.hw[0], shown[1] / p.hw[1]))


def shapes_of(masks: Sequence[np.ndarray]) -> Sequence[tuple[int, ...]]:
    """The shape of each mask, without decoding one where it is known."""
    return masks.shapes if hasattr(masks, "shapes") else [mask.shape for mask in masks]


def chosen_of(masks: Sequence[np.ndarray], indices: np.ndarray) -> Sequence[np.ndarray]:
    """Those masks, each taken when it is looked at."""
    return masks.take(indices) if isinstance(masks, Images) else [masks[int(i)] for i in indices]


class MaskBank(Bank):
    """`tallies(state, indices)`: one pass over the images for each state that is looked at. `masks` come with the images.

    outputs: number of classes. dense: the full-size answer that is timed, exported and judged. which: of several outputs.
    """

    calibration_batch = 8

    def __init__(
        self,
        model: nn.Module,
        outputs: int,
        dense: Dense,
        preprocessing: Preprocessing,
        which: int | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model, preprocessing, lambda network: Segmenter(network, dense, which), (dense.output,),
            **{"batch_size": 1, **options},
        )  # fmt: skip
        self.outputs, self.dense = outputs, dense
        self.masks: Sequence[np.ndarray] = ()
        self._truths: dict[bytes, Truths] = {}
        self._tallies: dict[tuple[State, bytes], Tallies] = {}

    def release(self) -> None:
        super().release()
        self._tallies = {}

    def tallies(self, state: State, indices: np.ndarray, *, serving: bool = True) -> Tallies:
        """Of the images `indices`, in that order."""
        images = indices.tobytes()
        if images not in self._truths:
            self._truths[images] = Truths(chosen_of(self.masks, indices), self.outputs)
        if (state, images) not in self._tallies:
            with contextlib.closing(self.class_maps(state, indices, serving=serving)) as maps:
                self._tallies[state, images] = tally(maps, self._truths[images], self.outputs)
        return self._tallies[state, images]

    def class_maps(self, state: State, indices: np.ndarray, *, serving: bool = True) -> Generator[np.ndarray]:
        """The predicted class map of each image, at the size of its mask."""
        assert self.images is not None
        p, shapes = self.preprocessing_of(state), self.images.shapes
        sizes = shapes_of(self.masks)
        with contextlib.closing(self.answers(state, indices, serving=serving)) as answers:
            for i, (answer,) in zip(indices, answers, strict=True):
                height, width = sizes[int(i)][:2]
                yield picture_classes(answer, shapes[int(i)], (height, width), self.dense, p)

    def refuse_nan(self, state: State, image: int, *answer: np.ndarray) -> None:
        # A class map has no NaN: its largest number says that there was one.
        numbers = [np.where(a == np.iinfo(a.dtype).max, np.nan, 0.0) if a.dtype.kind in "iu" else a for a in answer]
        super().refuse_nan(state, image, *numbers)
