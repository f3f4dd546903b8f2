"""The task of a segmentation network: a class for every pixel."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...engines.engine import Quantization
from ...errors import DownresError
from ...families import Model
from ...images import visible
from ...images.preprocess import shown_size
from ...parse import as_hw, format_resolution, like, user_path
from ...probe import Answer, find_answer
from ...records import CLASSES, LOGITS, OUTSIDE, WITHIN, Budget, Candidate, Dense, Drop, Preprocessing, Record, Recovery, Result
from ...recovery.bank import CALIBRATION_IMAGES
from ...recovery.ladder import Option
from ...recovery.state import QUANTIZED, RECALIBRATED, State, Step, like_most
from ...recovery.views import Spots, Views, cut, mirror
from ...reduction import made_for, takes_any_size
from ...reductions.dense import Segmenter, check_size
from ...reports.pictures import overlay
from ..task import TOLERANCE, Question, Section, Task, log_of, of_classes
from .bank import MaskBank, chosen_of, largest, picture_classes, shapes_of
from .counted import classes_of, dense_of
from .mask_layouts import locate
from .masks import MaskDataset, MaskFolder, find_masks, mask_classes, open_masks
from .quality import SegmentationQuality, Tallies, compare_tallies, segmentation_quality, tally
from .serving import masks_alike, meaning, serving
from .show import keep_scenes, kept_scenes, scenes_html

PIXELS_ALIKE = 0.9999
"""Share of the pixels of a class map that torch and onnxruntime have to agree on: near ties may fall either way."""
IGNORED = 255
"""In masks: no class."""
LEAST_OF_A_CLASS = 64
"""Pixels of it in an image that is drawn for the class."""
MIOU_TOLERANCE = 0.05
"""Points of mIoU that another processor may differ by, for the same reason."""


@dataclass(frozen=True)
class MaskPrediction(Record):
    """One picture's classes, pixel by pixel, at the picture's own size.

    classes, shares: those that occur, the largest first, in percent of the pixels. mask: a palette PNG whose indices are the
    classes and whose colours are theirs; overlay: the picture with the colours over it.
    """

    image: str
    classes: tuple[str, ...]
    shares: tuple[float, ...]
    mask: str
    overlay: str

    def __str__(self) -> str:
        ranked = ", ".join(f"{c} {p:.1f} %" for c, p in zip(self.classes, self.shares, strict=True))
        return f"{self.image}: {ranked} of the pixels → {self.mask}, {self.overlay}"


class Segmentation(Task):
    """A class for every pixel, judged by mIoU at the size of the masks. Nothing of a picture is cut off.

    dense: the full-size answer that is counted, timed, exported and judged.
    """

    name = "segmentation"
    score = SegmentationQuality
    rungs = ("batchnorm",)
    labelled = True
    evidence_type = Tallies
    batch_size = 1
    writes = True
    tuning_images = 100  # masks say more than labels, and looking at them takes longer

    probability = False
    """Whether what it answers went through a softmax."""

    def __init__(self, model: Model | None, outputs: int, dense: Dense) -> None:
        super().__init__(model, outputs)
        self.dense, self.output_name = dense, dense.output
        self.classes: tuple[str, ...] = ()
        self.colours: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def takes(cls, answer: Answer, data: Any, question: Question) -> bool:
        if answer.size is not None:
            return True
        if isinstance(data, (MaskDataset, MaskFolder)) or question.classes is not None or _has_masks(data):
            raise DownresError(
                "Masks, a label size, another output or upsampling are for segmentation networks, this one returns one row of "
                "logits an image: give class folders and none of these, or another network."
            )
        return False

    @classmethod
    def make(cls, model: Model, answer: Answer, data: Any, question: Question) -> Self:
        if answer.size is None:
            raise DownresError("Segmentation needs a network that answers for every pixel, this one answers once an image.")
        if question.fit_head:
            raise DownresError(
                "A head is fitted for classes of whole images, this network answers for every pixel: leave `fit_head` out."
            )
        if not isinstance(data, (MaskDataset, MaskFolder, str, Path)):
            raise DownresError("A segmentation network needs a mask for every image, these data have labels: give masks.")
        data = _named(data, question.classes)
        wanted = classes_of(answer, question)
        known = data if isinstance(data, MaskDataset) else mask_classes(data, 1 if answer.outputs == 1 else wanted)
        if isinstance(data, MaskDataset) and len(data.classes) != wanted:
            raise DownresError(f"The masks have {len(data.classes)} classes, the network {wanted}: give other weights.")
        return cls.sized(model, answer, known.label_size, question)

    @classmethod
    def sized(cls, model: Model, answer: Answer, masks: tuple[int, int] | None, question: Question) -> Self:
        """The task for masks of that size, where all have one."""
        p = model.preprocessing
        if p.fit == "crop":
            p = dataclasses.replace(
                p,
                fit="stretch",
                crop_ratio=1.0,
                source=re.sub(r", crop ratio [\d.]+", "", f"{p.source}; whole pictures, stretched"),
            )
        if p.any_size and masks is not None and takes_any_size(model.module):
            p = _at_label_size(model, p, masks, answer.which)
        if p != model.preprocessing:
            model = dataclasses.replace(model, preprocessing=p)
            answer = find_answer(made_for(model.module, p.hw), (len(p.mean), *p.hw), answer.which)
        assert answer.size is not None
        if question.label_size is not None:
            size = as_hw(like(p.resolution, question.label_size))
            check_size(size, answer.size)
        else:
            wanted = masks or p.hw  # smaller than the logits: each image's are resized to its own mask
            size = wanted if wanted[0] >= answer.size[0] and wanted[1] >= answer.size[1] else answer.size
        found = cls(model, classes_of(answer, question), dense_of(size, answer, question))
        found.probability = answer.probability and answer.outputs > 1
        return found

    def describe(self) -> dict[str, Any]:
        return {"outputs": self.outputs, "dense": self.dense.to_json()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        task = cls(None, described["outputs"], Dense.from_json(described["dense"]))
        task.classes = tuple(facts.get("classes", ()))
        task.colours = tuple((r, g, b) for r, g, b in facts.get("colours", ()))
        return task

    def check(self, candidates: Sequence[Candidate]) -> None:
        for c in candidates:
            if c.ragged != "error":
                raise DownresError(
                    f"An answer to every pixel needs whole inputs, '{c}' would be cut or padded: give a resolution that the "
                    "network divides."
                )

    def bank(self, folder: Path | None, **options: Any) -> MaskBank:
        p = self.model.preprocessing
        return MaskBank(self.model.module, self.outputs, self.dense, p, self.which, folder=folder, **options)

    def serve(self, network: nn.Module) -> nn.Module:
        return Segmenter(network, self.dense, self.which)

    def counted(self, network: nn.Module) -> nn.Module:
        return self.serve(network)

    @classmethod
    def named_classes(cls, data: Any, question: Question) -> tuple[str, ...]:
        data = _named(data, question.classes)
        return data.classes if isinstance(data, MaskDataset) else mask_classes(data, None).classes

    def open(self, data: Any, question: Question, **options: Any) -> MaskDataset:
        if isinstance(data, MaskDataset):
            return data
        return open_masks(_named(data, question.classes), outputs=self.outputs, **options)

    def begin(self, data: MaskDataset, seed: int) -> None:  # type: ignore[override]
        super().begin(data, seed)
        self.classes, self.colours = data.classes, data.colours

    def fill(self, bank: MaskBank) -> None:  # type: ignore[override]
        super().fill(bank)
        bank.masks = self.data.masks

    @property
    def truth(self) -> Sequence[np.ndarray]:
        """The mask of each image."""
        return self.data.masks

    def facts(self) -> dict[str, Any]:
        data = self.data
        return {"classes": list(data.classes), "colours": [list(c) for c in data.colours], "absent": list(data.absent)}

    def evidence(self, bank: MaskBank, state: State, indices: np.ndarray, *, serving: bool = True) -> Tallies:
        return bank.tallies(state, indices, serving=serving)

    def judge(self, answers: Iterable[np.ndarray], indices: np.ndarray, preprocessing: Preprocessing) -> Tallies:
        return tally(self._maps(answers, indices, preprocessing), chosen_of(self.truth, indices), self.outputs)

    def _maps(self, answers: Iterable[np.ndarray], indices: np.ndarray, p: Preprocessing) -> Iterator[np.ndarray]:
        shapes = self.data.images.shapes
        sizes = shapes_of(self.truth)
        for i, answer in zip(indices, answers, strict=True):
            height, width = sizes[int(i)][:2]
            yield picture_classes(answer, shapes[int(i)], (height, width), self.dense, p)

    def mismatch(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the classes, a pixel of the student's own map; of one class binary cross-entropy."""
        theirs = F.interpolate(theirs, ours.shape[-2:], mode="bilinear", antialias=True)
        return of_classes(log_of(ours), log_of(theirs)) if self.probability else of_classes(ours, theirs)

    def learned(self, bank: MaskBank, views: Views, size: tuple[int, int]) -> Tensor:
        """Each mask as the network sees its picture, by nearest pixels; 255 where there is no class, or padding."""
        made = np.full((len(views), *size), IGNORED, np.int64)
        shapes = self.data.images.shapes
        for k, i in enumerate(views.images):
            mask = np.asarray(self.truth[int(i)])
            mask = mask if views.parts is None else cut(mask, views.parts[k], IGNORED)
            shape = shapes[int(i)] if views.parts is None else size
            shown = shown_size((shape[0], shape[1]), dataclasses.replace(self.model.preprocessing, resolution=size))
            rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(shown, mask.shape, strict=True))
            made[k, : shown[0], : shown[1]] = mask[rows[:, None], columns]
        return mirror(torch.from_numpy(made), views.mirrored)

    def spots(self, images: np.ndarray) -> Spots | None:
        """Pixels of each class alike, of images that have at least LEAST_OF_A_CLASS of them (Zhu et al. 2019)."""
        having: dict[int, list[int]] = {}
        for i in images:
            for k in np.flatnonzero(np.bincount(np.asarray(self.truth[int(i)]).ravel(), minlength=256) >= LEAST_OF_A_CLASS):
                having.setdefault(int(k), []).append(int(i))
        having.pop(IGNORED, None)
        classes = sorted(having)

        def spot(random: np.random.Generator) -> tuple[int, float, float]:
            wanted = classes[random.integers(len(classes))]
            image = having[wanted][random.integers(len(having[wanted]))]
            mask = np.asarray(self.truth[image])
            inside = np.flatnonzero(mask == wanted)
            y, x = np.unravel_index(inside[random.integers(len(inside))], mask.shape)
            return image, (y + 0.5) / mask.shape[0], (x + 0.5) / mask.shape[1]

        return spot if classes else None

    def loss_of(self, ours: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Cross-entropy of the logits at the size of the input, a pixel, those without a class counted as 0."""
        d = self.dense
        if d.left_out is not None:
            ours = torch.cat([ours[:, : d.left_out], ours[:, d.left_out + 1 :]], dim=1)
        ours = F.interpolate(ours, targets.shape[-2:], mode=d.interpolation, align_corners=d.align_corners)
        if d.threshold is None:
            ours = log_of(ours) if self.probability else ours
            lost = F.cross_entropy(ours, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
            return lost / targets.numel()
        known = targets != IGNORED
        ours, wanted = ours[:, 0][known], targets[known].to(ours) * (1 - smoothing) + smoothing / 2
        if d.threshold == 0.5:  # it returns probabilities
            return F.binary_cross_entropy(ours.clamp(1e-6, 1 - 1e-6), wanted, reduction="sum") / targets.numel()
        return F.binary_cross_entropy_with_logits(ours, wanted, reduction="sum") / targets.numel()

    def quality(self, evidence: Tallies) -> SegmentationQuality:
        return segmentation_quality(evidence)

    def compare(self, original: Tallies, candidates: dict[str, Tallies], budget: Budget) -> dict[str, Drop]:
        return compare_tallies(original, candidates, budget)

    def choose(self, options: Sequence[Option]) -> Option:
        """Another rung than the first is taken where it is better beyond doubt: the one-sided 95 % bound of the gain is above
        0; of several those first whose drop is within.
        """
        first, *others = options
        for other in sorted(others, key=lambda option: option.drop.verdict != WITHIN):
            gain = self.compare(other.evidence, {"it": first.evidence}, Budget(0.0))["it"]
            if gain.verdict == OUTSIDE:
                return other
        return first

    def final(
        self, bank: Any, candidate: Candidate, states: Sequence[State], recovery: Recovery, budget: Budget, rungs: Sequence[str]
    ) -> tuple[State, Recovery]:
        """After cross-fitting, BatchNorm statistics of all images where most folds wanted them."""
        if len(states) == 1:
            return states[0], recovery
        if any(s.trained for s in states):
            return super().final(bank, candidate, states, recovery, budget, rungs)
        state = like_most(bank.started(self.native_state, candidate, len(states)), states)
        recalibrated = sum(s.step(RECALIBRATED) is not None for s in states) * 2 > len(states)
        if recalibrated:
            state = state.then(Step(RECALIBRATED, len(states), CALIBRATION_IMAGES))
        if (made := state.step(QUANTIZED)) is not None and made.how != Quantization():
            assert made.how is not None
            return state, dataclasses.replace(recovery, rung="layers" if made.how.kept else "ranges")
        return state, dataclasses.replace(recovery, rung="batchnorm" if recalibrated else "none")

    def lacks(self, facts: Mapping[str, Any]) -> list[str]:
        absent = facts.get("absent")
        return [f"no proof image has {', '.join(absent)}: nothing is known of how well these are found"] if absent else []

    def made(self, budget: Budget, runtime: str, proof: str, many: str) -> dict[str, str]:
        dense, confidence = self.dense, 100 * budget.confidence
        handed = "logits" if dense.output == LOGITS else "class map, made class by class,"
        corners = ", corners aligned" if dense.align_corners else ""
        return {
            "mIoU": "Of one confusion matrix over all proof images, at the size of each mask, ignored pixels left out, "
            f"measured through {runtime}; mean over the classes that occur, with a 95 % interval by bootstrap over images. "
            f"{proof}",
            "Drop": "mIoU of the original minus mIoU of the candidate, in points; one-sided bound by paired bootstrap over "
            f"images at {confidence:g} % confidence.{many} Neighbouring frames of one drive are worth fewer than their number.",
            "Lowered only": "The original's own weights on smaller pictures: what happens without recovery.",
            "Full size": f"The {handed} at {format_resolution(dense.size)} px, upsampled {dense.interpolation}{corners}, "
            "counts and is timed.",
            "Boundary": "Boundary IoU (Cheng et al. 2021): within 2 % of the diagonal from the edges of each class.",
            "Objects": "Connected regions of one class in the masks, by their share of the image: small below 0.33 %, large "
            "from 3 % on (COCO's limits on its usual picture); mean IoU over the objects.",
            "Latency": "Median of interleaved runs after warm-up, batch 1, random input; 10th to 90th percentile beside it. "
            "Decoding and resizing of the picture are not in it, the upsampling of the answer is.",
        }

    def keep(self, store: Any, bank: MaskBank, results: Sequence[Result], told: Result | None) -> None:
        keep_scenes(store, self, [r.candidate for r in results], told.candidate if told else None, bank)

    def section(self, store: Any, run: Any, told: Result | None) -> Section:
        kept = kept_scenes(store, run)
        return Section() if kept is None else scenes_html(kept, run.original, run.results, told, run.data["licence"])

    def shape(self) -> list[Any]:
        size = self.dense.size
        return (
            ["batch", *size]
            if self.dense.output == CLASSES
            else ["batch", self.outputs if self.dense.threshold is None else 1, *size]
        )

    def parity(self, ours: Iterator[np.ndarray], theirs: Iterator[np.ndarray]) -> tuple[bool, str]:
        worst, scale, agree, total, n = 0.0, 0.0, 0, 0, 0
        for one, other in zip(ours, theirs, strict=True):
            if self.dense.output != CLASSES:
                worst, scale = max(worst, float(np.abs(one - other).max())), max(scale, float(np.abs(other).max()))
                if not (np.isfinite(one).all() and np.isfinite(other).all()):
                    return False, "NaN or infinite logits on real images"
                one, other = largest(one, self.dense), largest(other, self.dense)
            agree, total, n = agree + int((one == other).sum()), total + one.size, n + 1
        detail = f"largest difference {worst:.2g} at logits up to {scale:.3g}, " if scale else ""
        ok = worst <= TOLERANCE * max(scale, 1.0) and agree >= total * PIXELS_ALIKE
        return ok, f"{detail}same class on {100 * agree / total:.4f} % of the pixels of {n} real images"

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return "float32" if self.dense.output != CLASSES else "uint8" if self.outputs <= 255 else "int16"

    def meaning(self, preprocessing: Preprocessing) -> dict[str, Any]:
        return meaning(self.dense, preprocessing)

    def serving(self, preprocessing: Preprocessing) -> str:
        return serving(self.dense, len(self.classes), preprocessing)

    def alike(
        self, served: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]], answers: Sequence[np.ndarray]
    ) -> tuple[bool, str]:
        return masks_alike(served, predicted)

    def as_stated(self, found: SegmentationQuality, stated: SegmentationQuality) -> tuple[bool, str]:  # type: ignore[override]
        ok = found.n == stated.n and abs(found.miou - stated.miou) <= MIOU_TOLERANCE
        return ok, f"mIoU {found.miou:.2f} % on {found.n} images, stated {stated.miou:.2f} % on {stated.n}"

    def predict(
        self, answer: np.ndarray, picture: np.ndarray, image: str, preprocessing: Preprocessing, top: int, out: Path
    ) -> MaskPrediction:
        """Also writes NAME_mask.png and NAME_overlay.png."""
        mask = picture_classes(answer, picture.shape, (picture.shape[0], picture.shape[1]), self.dense, preprocessing)
        if mask.dtype != np.uint8:
            raise DownresError(
                f"A palette PNG has room for 256 classes, these are {len(self.classes)}: use the ONNX file's own output."
            )
        out.mkdir(parents=True, exist_ok=True)
        drawn = Image.fromarray(mask)
        drawn.putpalette([value for colour in self.colours for value in colour])
        files = tuple(out / f"{Path(image).stem}_{kind}.png" for kind in ("mask", "overlay"))
        drawn.save(files[0])
        Image.fromarray(overlay(visible(picture), mask, self.colours)).save(files[1])
        share = np.bincount(mask.ravel(), minlength=len(self.classes)) / mask.size
        order = [int(i) for i in np.argsort(-share, kind="stable")[:top] if share[i] > 0]
        named = tuple(self.classes[i] for i in order), tuple(100 * float(share[i]) for i in order)
        return MaskPrediction(image, *named, str(files[0]), str(files[1]))


def _named(data: Any, classes: Any) -> Any:
    """The data with the file that names the classes of their masks, if one was given."""
    if classes is None:
        return data
    if isinstance(data, (MaskDataset, MaskFolder)):
        raise DownresError("A file of classes goes with a folder of masks, these data are opened already: leave it out.")
    return find_masks(data, classes=classes)


def _has_masks(data: Any) -> bool:
    """Whether it is a folder of images and masks, which would pass for two classes of images."""
    if not isinstance(data, (str, Path)):
        return False
    try:
        return bool(locate(user_path(data), None))
    except DownresError:
        return False


def _at_label_size(model: Model, p: Preprocessing, size: tuple[int, int], which: int | str | None) -> Preprocessing:
    """For a network that nobody chose a resolution for: its labels' size, brought up to what it divides."""
    source = re.sub(r", \d+(x\d+)? px", "", p.source)  # the size that is not used
    for unit in (1, 8, 16, 32, 64):
        hw = (math.ceil(size[0] / unit) * unit, math.ceil(size[1] / unit) * unit)
        said = f"{source}; used at the labels' size" + (f", to multiples of {unit}" if hw != size else "")
        found = dataclasses.replace(p, resolution=hw, source=said, any_size=False)
        try:
            find_answer(model.module, (len(p.mean), *hw), which)
        except DownresError:
            continue
        return found
    return p
