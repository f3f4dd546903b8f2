"""mIoU and its relatives from class maps, and the verdict on the drop between two models on the same images. No torch here.

Counts are summed over the whole data set before any division, as in Cityscapes' evaluation; a mean of per-image mIoU is
another number. Ignored pixels (255 in the mask) are cut out of mask and prediction alike before anything is counted: they
belong to no class, to no boundary's inside and to no object. Percent and percentage points.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...errors import DownresError
from ...measuring.paired import RESAMPLES, bootstrap_drops, resamples
from ...measuring.statistics import bootstrap_bound
from ...records import Budget, Drop, Score
from .masks import IGNORE

BAND = 0.02
"""Width of the boundary band as a share of the image's diagonal (Cheng et al. 2021)."""

SPECK, SMALL, LARGE = 4**2 / (640 * 480), 32**2 / (640 * 480), 96**2 / (640 * 480)
"""Sizes of objects as shares of the image's area, so that a smaller picture of the same scene has the same small objects.

COCO's limits of 32² and 96² pixels on its usual 640×480 picture: small is below 0.33 %, large from 3 % on. Components below
4² pixels there (0.005 %) are no objects but crumbs of drawing and resizing a mask; in CamVid they are a third of all.
"""

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class SegmentationQuality(Score):
    """Of n masks, in percent, at their own size, ignored pixels left out; None where there is nothing to divide by.

    miou: mean of `iou` over the classes that truth or prediction has, with a two-sided 95 % interval by bootstrap over images.
    iou, boundary_iou: class by class; boundary IoU after Cheng et al. 2021. object_iou: mean over the connected components of
    the ground truth, by size ('small', 'medium', 'large', see `Tallies`); objects: how many there are of each.
    """

    miou: float
    miou_low: float
    miou_high: float
    pixel_accuracy: float
    n: int
    iou: tuple[float | None, ...]
    boundary_miou: float | None = None
    boundary_iou: tuple[float | None, ...] = ()
    object_iou: dict[str, float | None] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)

    metric = "mIoU"
    noun = "mIoU"
    title = "mIoU"

    @property
    def score(self) -> float:
        return self.miou

    @property
    def interval(self) -> tuple[float, float]:
        return self.miou_low, self.miou_high

    def beside(self) -> dict[str, str]:
        small = self.object_iou.get("small")
        return {} if small is None else {"small objects": self.text(small)}

    def against(self, before: "SegmentationQuality") -> str:
        """Also pixel accuracy and boundary mIoU, where both networks have them."""
        found = [
            ("pixel accuracy", self.pixel_accuracy, before.pixel_accuracy),
            ("boundary mIoU", self.boundary_miou, before.boundary_miou),
        ]
        return "; ".join(f"{n} {self.text(a)}, was {self.text(b)}" for n, a, b in found if a is not None and b is not None)


@dataclass(frozen=True, eq=False)
class Tallies:
    """What mIoU and the rest are computed from, image by image: n images, K classes, m and o as many rows as there are.

    hits, predicted, truth: int64 (n, K), pixels of the class: in both, in the prediction, in the mask.
    boundary_hits, boundary_predicted, boundary_truth: the same within the boundary bands.
    object_image, object_class, object_area: int64 (o,), one entry an object of the ground truth, area in pixels.
    object_iou: float64 (o,), of that object. image_area: int64 (n,), pixels of the image, ignored ones too.
    cells: int64 (m, 4), the confusion matrices' entries above zero: image, true class, predicted class, pixels. Sparse,
        because 2,000 dense matrices of 150 classes would be 360 MB.
    """

    hits: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray
    boundary_hits: np.ndarray
    boundary_predicted: np.ndarray
    boundary_truth: np.ndarray
    object_image: np.ndarray
    object_class: np.ndarray
    object_area: np.ndarray
    object_iou: np.ndarray
    image_area: np.ndarray
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def classes(self) -> int:
        return int(self.hits.shape[1])

    @property
    def confusion(self) -> np.ndarray:
        """int64 (K, K) over all images: rows the truth, columns the prediction."""
        matrix = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(matrix, (self.cells[:, 1], self.cells[:, 2]), self.cells[:, 3])
        return matrix

    def to_arrays(self) -> dict[str, np.ndarray]:
        """For `numpy.savez`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})

    def select(self, images: np.ndarray) -> "Tallies":
        """Those images, in that order, repeated where named twice: int indices or bool (n,)."""
        images = np.asarray(images)
        images = np.flatnonzero(images) if images.dtype == bool else images.astype(np.int64)
        objects, object_image = _rows_of(self.object_image, images)
        rows, row_image = _rows_of(self.cells[:, 0], images)
        arrays = {name: array[objects if name.startswith("object_") else images]
                  for name, array in self.to_arrays().items() if name != "cells"}  # fmt: skip
        cells = np.column_stack([row_image, self.cells[rows, 1:]])
        return Tallies(**{**arrays, "object_image": object_image, "cells": cells})

    @classmethod
    def concatenate(cls, parts: Sequence["Tallies"]) -> "Tallies":
        """The images of all parts, one after the other; at least one part, all of the same classes."""
        if len({part.classes for part in parts}) != 1:
            raise DownresError(
                "Tallies are joined from at least one part and over the same classes, not from parts of "
                f"{[part.classes for part in parts]} classes: tally all with the same number of classes."
            )
        dicts = [part.to_arrays() for part in parts]
        arrays = {name: np.concatenate([arrays[name] for arrays in dicts]) for name in dicts[0]}
        first = np.cumsum([0] + [len(part) for part in parts])[:-1]
        arrays["object_image"] += np.repeat(first, [len(part.object_image) for part in parts])
        arrays["cells"][:, 0] += np.repeat(first, [len(part.cells) for part in parts])
        return cls(**arrays)


def _rows_of(owner: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, position): the rows of each image in turn, and which of `images` each is for; `owner` (rows,) ascends."""
    start, stop = np.searchsorted(owner, images), np.searchsorted(owner, images, side="right")
    count = stop - start
    position = np.repeat(np.arange(len(images)), count)
    return np.arange(len(position)) - np.repeat(np.cumsum(count) - count, count) + start[position], position


class Truth(NamedTuple):
    """A mask and what depends on it alone.

    mask: uint8 (H, W). band: bool (H, W), the boundary band of each class. objects: int32 (H, W), the object of each pixel,
    -1 where there is none; object_class, object_area: int64, of each object. truth, boundary: int64 (K,), pixels.
    """

    mask: np.ndarray
    band: np.ndarray
    objects: np.ndarray
    object_class: np.ndarray
    object_area: np.ndarray
    truth: np.ndarray
    boundary: np.ndarray


class Truths:
    """The masks of a data set, checked, with band and objects found once for all models that are tallied on them.

    masks: uint8 (H, W) each, read anew at every use. What was found is kept compressed, 16 kB for a mask of 360×480 and 80 kB
    for one of 1024×2048, unless `keep` is false. Raises DownresError for a mask with a value that is neither a class nor 255.
    """

    def __init__(self, masks: Sequence[np.ndarray], classes: int, keep: bool = True) -> None:
        if not 1 <= classes <= IGNORE:
            raise DownresError(f"A mask holds 1 to {IGNORE} classes, {classes} cannot be: {IGNORE} itself means ignored.")
        self.masks, self.classes, self._keep = masks, classes, keep
        self._kept: dict[int, tuple[bytes, bytes]] = {}

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, image: int) -> Truth:
        mask = np.asarray(self.masks[image])
        if image in self._kept:
            bits, numbers = (zlib.decompress(kept) for kept in self._kept[image])
            mask = mask.astype(np.uint8, copy=False)
            band = np.unpackbits(np.frombuffer(bits, np.uint8), count=mask.size).astype(bool).reshape(mask.shape)
            objects = np.frombuffer(numbers, np.int32).reshape(mask.shape)
        else:
            mask = _mask(mask, self.classes, image)
            band, objects = _band(mask), _objects(mask)
            if self._keep:
                self._kept[image] = zlib.compress(np.packbits(band).tobytes(), 1), zlib.compress(objects.tobytes(), 1)
        inside = objects >= 0
        number = objects[inside]
        area = np.bincount(number)
        object_class = np.zeros_like(area)
        object_class[number] = mask[inside]
        return Truth(mask, band, objects, object_class, area, self._count(mask), self._count(mask[band]))

    def _count(self, labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels.ravel(), minlength=IGNORE + 1)[: self.classes]


def tally(predictions: Iterable[np.ndarray], masks: Sequence[np.ndarray] | Truths, classes: int) -> Tallies:
    """Counts of every image; see `Tallies`.

    predictions: class indices, integer (H, W) each, in the order of the masks and at their size. masks: class indices, 255
    where there is none, or `Truths` of them where more than one model is tallied.
    Raises DownresError for a prediction of another size, or with a value that is no class, and as `Truths` does.
    """
    truths = masks if isinstance(masks, Truths) else Truths(masks, classes, keep=False)
    if truths.classes != classes:
        raise DownresError(f"The masks were read with {truths.classes} classes and not {classes}: give both the same number.")
    images: list[Tallies] = []
    for prediction in predictions:
        if len(images) == len(truths):
            raise DownresError(f"Every prediction needs its mask, there are {len(truths)} masks and more predictions.")
        images.append(_tally_one(np.asarray(prediction), truths[len(images)], classes, len(images)))
    if len(images) < len(truths) or not images:
        raise DownresError(f"Every mask needs one prediction, there are {len(truths)} masks and {len(images)} predictions.")
    return Tallies.concatenate(images)


def _tally_one(prediction: np.ndarray, truth: Truth, classes: int, image: int) -> Tallies:
    mask = truth.mask
    if prediction.shape != mask.shape:
        raise DownresError(
            f"A prediction has the size of its mask, image {image} has {_size(mask)} and its prediction {_size(prediction)}: "
            "bring the logits to the mask's size before taking the largest."
        )
    labels = np.where(mask == IGNORE, np.uint8(IGNORE), _prediction(prediction, classes, image))
    right = labels == mask
    pairs = np.bincount((mask.astype(np.intp) << 8 | labels).ravel(), minlength=1 << 16).reshape(256, 256)
    confusion = pairs[:classes, :classes]
    true_class, predicted_class = np.nonzero(confusion)
    band = _band(labels)

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(labels[chosen], minlength=IGNORE + 1)[None, :classes]

    return Tallies(
        hits=np.diagonal(confusion)[None],
        predicted=confusion.sum(axis=0)[None],
        truth=truth.truth[None],
        boundary_hits=count(right & band & truth.band),
        boundary_predicted=count(band),
        boundary_truth=truth.boundary[None],
        object_image=np.zeros(len(truth.object_area), dtype=np.int64),
        object_class=truth.object_class,
        object_area=truth.object_area,
        object_iou=_object_iou(labels, right, truth),
        image_area=np.array([mask.size]),
        cells=np.column_stack([np.zeros_like(true_class), true_class, predicted_class, confusion[true_class, predicted_class]]),
    )


def _size(array: np.ndarray) -> str:
    return "×".join(map(str, array.shape))


def _mask(mask: np.ndarray, classes: int, image: int) -> np.ndarray:
    """uint8 (H, W), checked."""
    if mask.ndim != 2 or mask.dtype.kind not in "iu" or not mask.size:
        raise DownresError(
            f"A mask is one class index a pixel, integers (height, width), that of image {image} is {_size(mask)} of "
            f"{mask.dtype}: read it as indices and not as colours."
        )
    wrong = ((mask < 0) | (mask >= classes)) & (mask != IGNORE)
    if wrong.any():
        raise DownresError(
            f"A mask holds class indices from 0 to {classes - 1}, and {IGNORE} where there is no class; that of image {image} "
            f"holds {mask[wrong][0]}: map that value to a class or to {IGNORE}, or correct the number of classes."
        )
    return mask.astype(np.uint8, copy=False)


def _prediction(prediction: np.ndarray, classes: int, image: int) -> np.ndarray:
    """uint8 (H, W), checked."""
    if prediction.dtype.kind not in "iu":
        raise DownresError(
            f"A prediction is one class index a pixel, that of image {image} is of {prediction.dtype}: "
            "take the index of the largest logit at every pixel."
        )
    wrong = (prediction < 0) | (prediction >= classes)
    if wrong.any():
        raise DownresError(
            f"A model of {classes} classes predicts class indices from 0 to {classes - 1}, that for image {image} holds "
            f"{prediction[wrong][0]}: give model and masks the same classes."
        )
    return prediction.astype(np.uint8, copy=False)


def _band(labels: np.ndarray) -> np.ndarray:
    """Which pixels are within the boundary band of their own class: bool (H, W), for labels uint8 (H, W).

    The pixels that an erosion of their class by a (2d+1)² square takes away, d being 2 % of the diagonal (Cheng et al. 2021,
    Boundary IoU, CVPR, arXiv 2103.16562). The picture's border counts as boundary, as in the authors' code, and so do
    ignored pixels. A class stays where its square holds one value alone, so that two filters serve all classes.
    """
    width = max(1, round(BAND * float(np.hypot(*labels.shape))))
    low = high = labels
    for axis in (0, 1):
        low = minimum_filter1d(low, 2 * width + 1, axis=axis, mode="constant", cval=IGNORE)
        high = maximum_filter1d(high, 2 * width + 1, axis=axis, mode="constant", cval=IGNORE)
    return low != high


def _components(labels: np.ndarray) -> np.ndarray:
    """Connected components of equal values, also across corners (8-connected, so that a slanted pole is one): int32 (H, W).

    The nodes of the graph are the runs along the rows, for all classes at once; runs that touch are joined.
    """
    starts = np.ones(labels.shape, dtype=bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run = np.cumsum(starts, dtype=np.int32).reshape(labels.shape) - 1
    below = labels[1:] == labels[:-1]
    first = below.copy()
    first[:, 1:] &= ~below[:, :-1] | starts[1:, 1:]  # one edge where two runs begin to touch, not one a pixel
    down = (labels[:-1, :-1] == labels[1:, 1:]) & ~below[:, :-1] & ~below[:, 1:]
    up = (labels[:-1, 1:] == labels[1:, :-1]) & ~below[:, :-1] & ~below[:, 1:]
    one = np.concatenate([run[:-1][first], run[:-1, :-1][down], run[:-1, 1:][up]])
    other = np.concatenate([run[1:][first], run[1:, 1:][down], run[1:, :-1][up]])
    runs = int(run[-1, -1]) + 1
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(runs, runs))
    return connected_components(graph, directed=False)[1][run]


def _objects(mask: np.ndarray) -> np.ndarray:
    """The connected components of all classes from `SPECK` on, numbered from 0; -1 elsewhere: int32 (H, W)."""
    component = _components(mask)
    area = np.bincount(component[mask != IGNORE], minlength=int(component.max()) + 1)
    large = area >= max(1.0, SPECK * mask.size)
    return np.where(large, np.cumsum(large) - 1, -1).astype(np.int32)[component]


def _object_iou(labels: np.ndarray, right: np.ndarray, truth: Truth) -> np.ndarray:
    """IoU of every object with the predicted components of its class that overlap it: float64 (objects,).

    Pixels of those components that are true pixels of the class are no error of this object, so they count only within it:
    |P ∩ object| / |object ∪ (P minus the other pixels of the class)|, the sIoU of Chan et al. 2021 (SegmentMeIfYouCan,
    arXiv 2104.14812), here for every class.
    """
    component = _components(labels)
    size = int(component.max()) + 1
    wrong = np.bincount(component[~right], minlength=size)  # ignored pixels are right: in both maps they are IGNORE
    inside = right & (truth.objects >= 0)
    number = truth.objects[inside]
    inter = np.bincount(number, minlength=len(truth.object_area))
    pairs = np.unique(number.astype(np.int64) * size + component[inside])
    outside = np.zeros(len(truth.object_area), dtype=np.int64)
    np.add.at(outside, pairs // size, wrong[pairs % size])
    return inter / (truth.object_area + outside)


def segmentation_quality(tallies: Tallies, seed: int = 0) -> SegmentationQuality:
    """All numbers of one model on n images; the interval by bootstrap over images (`statistics.bootstrap_bound`).

    With fewer than `statistics.FEWEST_IMAGES` images the interval is 0 to 100: they cannot tell.
    Raises DownresError where every pixel is ignored.
    """
    _check_some_pixel(tallies)
    iou = _class_iou(tallies.hits, tallies.predicted, tallies.truth)
    boundary = _class_iou(tallies.boundary_hits, tallies.boundary_predicted, tallies.boundary_truth)
    miou = _miou(tallies)
    (resampled,) = _resampled_miou([tallies], seed)
    low, high = bootstrap_bound(resampled, miou, int(_informative(tallies).sum()), 0.025)
    share = tallies.object_area / tallies.image_area[tallies.object_image]
    size = np.digitize(share, [SMALL, LARGE])
    by_size = {name: tallies.object_iou[size == i] for i, name in enumerate(SIZES)}
    return SegmentationQuality(
        miou=miou,
        miou_low=max(0.0, low),
        miou_high=min(100.0, high),
        pixel_accuracy=float(100 * tallies.hits.sum() / tallies.truth.sum()),
        n=len(tallies),
        iou=_percent(iou),
        boundary_miou=float(100 * np.nanmean(boundary)),
        boundary_iou=_percent(boundary),
        object_iou={name: float(100 * values.mean()) if len(values) else None for name, values in by_size.items()},
        objects={name: len(values) for name, values in by_size.items()},
    )


def compare_tallies(original: Tallies, candidates: Mapping[str, Tallies], budget: Budget, seed: int = 0) -> dict[str, Drop]:
    """The drop in mIoU of each candidate, with verdicts that hold together at `budget.confidence`.

    The paired bootstrap: each resample of the images is the same for all models, and the drop is taken within it. The
    corrections are those of `quality.compare_all`: proven within by Holm's procedure, `upper` at the level at which Holm
    tested the candidate, so the verdict is upper < allowed; proven outside by Bonferroni, so the verdict is lower > allowed.
    Images are taken as drawn one by one: neighbouring frames of one drive are worth fewer than their number.
    Raises DownresError where the tallies are not of the same masks, or every pixel is ignored.
    """
    _check_some_pixel(original)
    for name, candidate in candidates.items():
        _check_same_masks(original, candidate, name)
    if not candidates:
        return {}
    first, *others = _resampled_miou([original, *candidates.values()], seed)
    observed = _miou(original)
    drops = {name: observed - _miou(candidate) for name, candidate in candidates.items()}
    samples = {name: first - other for name, other in zip(candidates, others, strict=True)}
    return bootstrap_drops(drops, samples, len(original), budget, int(_informative(original).sum()), 100.0)


def _iou(hits: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Fractions; NaN for a class that is in neither truth nor prediction, so that the mean leaves it out."""
    return np.divide(hits, union, out=np.full(np.shape(hits), np.nan), where=union > 0)


def _percent(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(100 * value) for value in values)


def _class_iou(hits: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fractions (K,) over all images, from counts (n, K) each."""
    return _iou(hits.sum(axis=0), (predicted + truth - hits).sum(axis=0))


def _miou(tallies: Tallies) -> float:
    """Percent."""
    return float(100 * np.nanmean(_class_iou(tallies.hits, tallies.predicted, tallies.truth)))


def _informative(tallies: Tallies) -> np.ndarray:
    """Which images have a pixel that is not ignored; a resample of the others alone would have no mIoU."""
    return tallies.truth.sum(axis=1) > 0


def _resampled_miou(models: Sequence[Tallies], seed: int) -> list[np.ndarray]:
    """mIoU in percent of each model on the same resamples of the images, float64 (RESAMPLES,) each.

    How often each image was drawn, times the tallies: a matrix product in chunks of about 32 MB. All numbers in it are
    whole and below 2^53, so that float64 is exact and no order of summation matters.
    """
    images = np.flatnonzero(_informative(models[0]))
    n = len(images)
    tables = []
    for model in models:
        hits = model.hits[images]
        tables.append((hits.astype(float), (model.predicted[images] + model.truth[images] - hits).astype(float)))
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for times in resamples(n, RESAMPLES, seed):
        for part, (hits, union) in zip(parts, tables, strict=True):
            part.append(100 * np.nanmean(_iou(times @ hits, times @ union), axis=1))
    return [np.concatenate(part) for part in parts]


def _check_some_pixel(tallies: Tallies) -> None:
    if not tallies.truth.any():
        raise DownresError(
            f"mIoU needs pixels with a class, in all {len(tallies)} masks every pixel is ignored (255): "
            "check how the masks' values are mapped to classes."
        )


def _check_same_masks(original: Tallies, candidate: Tallies, name: str) -> None:
    if original.truth.shape != candidate.truth.shape:
        raise DownresError(
            f"A drop is measured on the same images and classes, the original has {len(original)} images of "
            f"{original.classes} classes and {name} {len(candidate)} of {candidate.classes}: tally both on the same masks."
        )
    different = np.flatnonzero((original.truth != candidate.truth).any(axis=1))
    if len(different):
        raise DownresError(
            f"A drop is measured on the same images, {name} was tallied on another mask at image {different[0]} than the "
            "original: tally both on the same masks in the same order."
        )
