"""Pictures through an artifact alone: its preprocessing and its ONNX file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import Unreadable, decode, preprocess
from ..errors import DownresError
from ..records import Dense, Preprocessing, Record
from ..recover.masks import picture_classes
from ..report.pictures import overlay
from ..runtimes.onnxruntime import OnnxRuntime
from .manifest import read_manifest, refuse_changed


@dataclass(frozen=True)
class Prediction(Record):
    """One picture's most likely classes, with softmax probabilities in percent."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


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


def predict(
    folder: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    threads: int | None = None,
    out: str | Path = "predictions",
) -> list[Prediction] | list[MaskPrediction]:
    """Pictures by the artifact alone: their most likely classes, or of a segmentation network their masks.

    top: how many classes are named. out: folder for masks and overlays, NAME_mask.png and NAME_overlay.png, made if need be.
    Raises DownresError for a broken artifact, a picture that cannot be read, or two pictures of one name.
    """
    manifest = read_manifest(folder)
    refuse_changed(Path(folder), manifest)
    preprocessing = Preprocessing.from_json(manifest["preprocessing"])
    runtime = OnnxRuntime(Path(folder) / "model.onnx", threads)

    def answer(image: str | Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            pixels = decode(image)
        except Unreadable as error:
            raise DownresError(f"Cannot read {image}: {error}; give a photograph.") from None
        return pixels, runtime(preprocess(pixels, preprocessing)[None].numpy())[0][0]

    if manifest["dense"] is None:
        return [_ranked(str(image), answer(image)[1], manifest["classes"], top) for image in images]
    dense, place = Dense.from_json(manifest["dense"]), Path(out)
    names = [Path(image).stem for image in images]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DownresError(f"Masks are named after their pictures, {twice[0]} would be written twice: predict them apart.")
    place.mkdir(parents=True, exist_ok=True)
    found = []
    for image, name in zip(images, names, strict=True):
        pixels, out_map = answer(image)
        mask = picture_classes(out_map, pixels.shape, (pixels.shape[0], pixels.shape[1]), dense, preprocessing)
        found.append(_written(str(image), name, pixels, mask, manifest, place, top))
    return found


def _ranked(image: str, out: np.ndarray, classes: Sequence[str], top: int) -> Prediction:
    share = np.exp(out - out.max()) / np.exp(out - out.max()).sum()
    order = np.argsort(-share, kind="stable")[:top]
    return Prediction(image, tuple(classes[i] for i in order), tuple(100 * float(share[i]) for i in order))


def _written(
    image: str, name: str, pixels: np.ndarray, mask: np.ndarray, manifest: dict[str, Any], place: Path, top: int
) -> MaskPrediction:
    if mask.dtype != np.uint8:
        raise DownresError(
            f"A palette PNG has room for 256 classes, these are {len(manifest['classes'])}: use the ONNX file's own output."
        )
    colours = [tuple(colour) for colour in manifest["colours"]]
    picture = Image.fromarray(mask)
    picture.putpalette([value for colour in colours for value in colour])
    files = place / f"{name}_mask.png", place / f"{name}_overlay.png"
    picture.save(files[0])
    Image.fromarray(overlay(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), mask, colours)).save(files[1])
    share = np.bincount(mask.ravel(), minlength=len(manifest["classes"])) / mask.size
    order = [int(i) for i in np.argsort(-share, kind="stable")[:top] if share[i] > 0]
    named = tuple(manifest["classes"][i] for i in order), tuple(100 * float(share[i]) for i in order)
    return MaskPrediction(image, *named, str(files[0]), str(files[1]))
