"""Pictures with a class for every pixel as layers for the page: the photograph once, class maps and errors as small PNGs.

Blending is left to the browser: a class map has few colours and packs into a few kilobytes, a blended picture does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...errors import DownresError
from ...reports import pictures
from .masks import IGNORE

WIDEST = 480
"""Pixels: wider pictures are scaled down to this."""

GREY = (128, 128, 128)
"""Of pixels that are in no class."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Overlay:
    """One candidate's class map of one image: uint8 (H, W), at the label's size; miou of this image alone, in percent.

    miou is None where every pixel of the label is ignored.
    """

    label: str
    classes: np.ndarray
    miou: float | None


@dataclass(frozen=True)
class Scene:
    """One image, uint8 (H, W, 3) at the label's size, with its label, uint8 (H, W), 255 where there is no class.

    overlays: the original's first, then as many candidates as are to be shown.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    overlays: tuple[Overlay, ...]


@dataclass(frozen=True)
class Segmentation:
    """What the page of a segmentation run shows instead of photographs.

    classes, colours: name and RGB of each class, in the order of their indices. hardest: the images on which the candidate
    that the page is about loses most against the original, worst first. notes: what to know of the classes, one sentence
    each. shares: of each class the percentage of all labelled pixels, or empty.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    scenes: tuple[Scene, ...]
    hardest: tuple[Scene, ...] = ()
    notes: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Layers:
    """One class map, drawn: data URIs of the classes and, of a prediction, of its errors; wrong: percent of judged pixels."""

    label: str
    classes: str
    errors: str = ""
    miou: float | None = None
    change: float | None = None
    wrong: float | None = None


@dataclass(frozen=True)
class Drawn:
    """One scene, drawn: `height` and `width` of all its pictures in pixels; `present`, the classes that occur in them."""

    name: str
    height: int
    width: int
    photo: str
    truth: Layers
    views: tuple[Layers, ...]
    present: frozenset[int]


def draw(scene: Scene, segmentation: Segmentation) -> Drawn:
    """The layers of one scene. Raises DownresError where a class map has another size than the picture, or unknown classes."""
    height, width = scene.image.shape[:2]
    maps = [("its label", scene.truth), *((overlay.label, overlay.classes) for overlay in scene.overlays)]
    for name, classes in maps:
        _check(scene, name, classes, len(segmentation.classes))
    factor = min(1.0, WIDEST / width)
    hw = max(1, round(height * factor)), max(1, round(width * factor))
    photo = Image.fromarray(np.ascontiguousarray(scene.image)).resize(hw[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)
    truth = _nearest(scene.truth, hw)
    first = scene.overlays[0].miou if scene.overlays else None
    return Drawn(
        scene.name,
        *hw,
        pictures.jpeg_data_uri(np.asarray(photo)),
        Layers("label", _classes_uri(truth, segmentation.colours)),
        tuple(_layers(overlay, scene.truth, hw, segmentation.colours, first) for overlay in scene.overlays),
        frozenset(int(c) for _, classes in maps for c in np.unique(classes)) - {IGNORE},
    )


def _check(scene: Scene, name: str, classes: np.ndarray, count: int) -> None:
    if classes.shape != scene.image.shape[:2]:
        raise DownresError(
            f"A class map has the size of its picture, {scene.name} has {scene.image.shape[:2]} and {name} {classes.shape}: "
            "bring both to the label's size."
        )
    if (wrong := classes[(classes >= count) & (classes != IGNORE)]).size:
        raise DownresError(
            f"A class map holds the report's {count} classes, 0 to {count - 1}, and {name} of {scene.name} holds {wrong[0]}: "
            "give the names and colours of all classes."
        )


def _layers(overlay: Overlay, truth: np.ndarray, hw: tuple[int, int], colours: Sequence[Colour], first: float | None) -> Layers:
    wrong = pictures.errors(overlay.classes, truth)
    judged = int((wrong != pictures.IGNORED).sum())
    return Layers(
        overlay.label,
        _classes_uri(_nearest(overlay.classes, hw), colours),
        _errors_uri(_nearest(wrong, hw)),
        overlay.miou,
        None if overlay.miou is None or first is None else overlay.miou - first,
        100 * float((wrong == pictures.WRONG).sum()) / judged if judged else None,
    )


def _nearest(array: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """The values under the centres of fewer pixels: classes must not be averaged."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(hw, array.shape, strict=True))
    return array[np.ix_(rows, columns)]


def _stripes(hw: tuple[int, ...]) -> np.ndarray:
    """bool (height, width): slanted stripes, so that ignored pixels are known by more than a colour."""
    y, x = np.ogrid[: hw[0], : hw[1]]
    return (x + y) % 8 < 3


def _classes_uri(classes: np.ndarray, colours: Sequence[Colour]) -> str:
    free = len(colours)  # an index that no class has: the gaps between the stripes
    indices = np.where((classes == IGNORE) & ~_stripes(classes.shape), free, classes).astype(np.uint8)
    return pictures.palette_data_uri(
        indices, {**{i: (*c, 255) for i, c in enumerate(colours)}, free: (*GREY, 60), IGNORE: (*GREY, 255)}
    )


def _errors_uri(kinds: np.ndarray) -> str:
    gap = 3
    indices = np.where((kinds == pictures.IGNORED) & ~_stripes(kinds.shape), gap, kinds).astype(np.uint8)
    of = {
        pictures.RIGHT: (0, 0, 0, 0),
        pictures.WRONG: (*pictures.ERROR, 255),
        pictures.IGNORED: (*GREY, 255),
        gap: (*GREY, 60),
    }
    return pictures.palette_data_uri(indices, of)
