"""Classes of masks: names, colours and what the values in files mean, for the known data sets and from files."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DownresError

IGNORE = 255
"""Pixels without a class: left out of every count and every loss."""
UNKNOWN = -1
"""In a `Legend`: a value that no mask may have."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Legend:
    """The classes and what the values in mask files mean.

    names, colours (RGB): one a class. table: int16 (256,), the class of each index in a file, IGNORE, or UNKNOWN where
    no file may have it. rgb: the same for the colours of RGB masks; empty where only indices are known.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    table: np.ndarray
    rgb: dict[Colour, int]


def table(classes: Iterable[int]) -> np.ndarray:
    """int16 (256,): the class of the values 0, 1, 2, …; 255 is IGNORE and the others UNKNOWN."""
    known = np.array(list(classes), np.int16)
    values = np.full(256, UNKNOWN, np.int16)
    values[: len(known)] = known
    values[IGNORE] = IGNORE
    return values


def voc_colour(index: int) -> Colour:
    """The colour that Pascal VOC gives a class: the bits of the index, from the lowest, go to the highest of R, G and B."""
    rgb = [0, 0, 0]
    for bit in range(8):
        rgb[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return rgb[0], rgb[1], rgb[2]


def legend_of(entries: Sequence[tuple[str, Colour | None]]) -> Legend:
    """Classes from names, with or without colours, in the order of their indices; those named void have none."""
    if len(entries) > IGNORE:
        raise DownresError(f"Masks have at most {IGNORE} classes, {len(entries)} are named: leave out or join some.")
    ignored = [name.strip().lower() in _IGNORED for name, _ in entries]
    numbers = np.where(ignored, IGNORE, np.cumsum(np.logical_not(ignored)) - 1).tolist()
    rgb: dict[Colour, int] = {}
    for (name, colour), number in zip(entries, numbers, strict=True):
        if colour is not None and rgb.setdefault(colour, number) != number:
            raise DownresError(f"The class {name} has the colour {colour}, which another class has: give each its own.")
    kept = [entry for entry, left_out in zip(entries, ignored, strict=True) if not left_out]
    colours = tuple(colour or voc_colour(i + 1) for i, (_, colour) in enumerate(kept))
    if any(colour is None for _, colour in kept):  # with some colours only, RGB masks would come out as a guess
        rgb = {}
    return Legend(tuple(name for name, _ in kept), colours, table(numbers), rgb)


def numbered(count: int) -> Legend:
    """Classes of which only the number is known."""
    return legend_of([(f"class {i}", None) for i in range(count)])


_IGNORED = ("void", "ignore", "ignored", "unlabeled", "unlabelled")

_CITYSCAPES: dict[int, tuple[str, Colour]] = {
    7: ("road", (128, 64, 128)), 8: ("sidewalk", (244, 35, 232)), 11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)), 13: ("fence", (190, 153, 153)), 17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)), 20: ("traffic sign", (220, 220, 0)), 21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)), 23: ("sky", (70, 130, 180)), 24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)), 26: ("car", (0, 0, 142)), 27: ("truck", (0, 0, 70)), 28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)), 32: ("motorcycle", (0, 0, 230)), 33: ("bicycle", (119, 11, 32)),
}  # fmt: skip
"""The 19 classes of the benchmark (Cordts et al. 2016) by label id; the other ids of 0 to 33 are not evaluated."""
_CITYSCAPES_IDS = 34

_CAMVID: dict[str, tuple[Colour, tuple[Colour, ...]]] = {
    "sky": ((128, 128, 128), ()),
    "building": ((128, 0, 0), ((0, 128, 64), (64, 192, 0), (64, 0, 64), (192, 0, 128))),  # bridge, wall, tunnel, archway
    "pole": ((192, 192, 128), ((0, 0, 64),)),  # traffic cone
    "road": ((128, 64, 128), ((128, 0, 192), (192, 0, 64))),  # lane markings, for driving and not
    "pavement": ((60, 40, 222), ((0, 0, 192), (64, 192, 128), (128, 128, 192))),  # sidewalk, parking block, shoulder
    "tree": ((128, 128, 0), ((192, 192, 0),)),  # other vegetation
    "sign": ((192, 128, 128), ((128, 128, 64), (0, 64, 64))),  # text, traffic light
    "fence": ((64, 64, 128), ()),
    "car": ((64, 0, 128), ((64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64))),  # SUV, truck, train, other
    "pedestrian": ((64, 64, 0), ((192, 128, 64), (64, 0, 192), (64, 128, 64))),  # child, cart or pram, animal
    "cyclist": ((0, 128, 192), ((192, 0, 192),)),  # motorcycle
}
"""SegNet's 11 classes (Badrinarayanan et al. 2017): its colour and those of the original 32 that it takes in.

(60, 40, 222) is SegNet's own colour for pavement, the original has (0, 0, 192). Void is (0, 0, 0), or the index 11.
"""

_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_COLOURS = frozenset(voc_colour(i) for i in (*range(len(_VOC)), IGNORE))
"""Of a mask of Pascal VOC that was converted to RGB."""
ADE20K_CLASSES = 150


def cityscapes_legend(ids: bool) -> Legend:
    names, colours = zip(*_CITYSCAPES.values(), strict=True)
    numbers = {label: i for i, label in enumerate(_CITYSCAPES)}
    values = [numbers.get(label, IGNORE) for label in range(_CITYSCAPES_IDS)] if ids else range(len(names))
    return Legend(names, colours, table(values), {})


def camvid_legend() -> Legend:
    rgb = {colour: i for i, (own, more) in enumerate(_CAMVID.values()) for colour in (own, *more)} | {(0, 0, 0): IGNORE}
    return Legend(tuple(_CAMVID), tuple(own for own, _ in _CAMVID.values()), table([*range(len(_CAMVID)), IGNORE]), rgb)


def voc_legend() -> Legend:
    return Legend(_VOC, tuple(voc_colour(i) for i in range(len(_VOC))), table(range(len(_VOC))), {})


def ade20k_legend(names: Sequence[str]) -> Legend:
    colours = tuple(voc_colour(i + 1) for i in range(ADE20K_CLASSES))
    return Legend(tuple(names), colours, table([IGNORE, *range(ADE20K_CLASSES)]), {})


def read_classes(file: Path) -> Legend:
    """Classes from a text file, one a line: `name`, `name R G B` or `R G B name`, also with commas; or from JSON.

    JSON: a list of names or of {"name": …, "color": [R, G, B]}, or an object of indices to names or names to colours.
    """
    if not file.is_file():
        raise DownresError(f"The file of classes {file} is not there: give a text file with a class a line.")
    try:
        entries = (
            _json_classes(json.loads(file.read_text(encoding="utf-8-sig")))
            if file.suffix == ".json"
            else _text_classes(lines_of(file))
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # also text that is not UTF-8 and not JSON
        raise DownresError(f"{file} is not a list of classes: write a class a line, `name` or `name R G B`.") from None
    if not entries:
        raise DownresError(f"The file of classes {file} is empty: write a class a line, `name` or `name R G B`.")
    return legend_of(entries)


_RGB = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
_RGB_FIRST, _RGB_LAST = re.compile(rf"{_RGB}[\s,;]+(\S.*)"), re.compile(rf"(.*?\S)[\s,;]+{_RGB}")
_HEADER = re.compile(r"(class|name|label)\w*[\s,;]+(r|red)[\s,;]+(g|green)[\s,;]+(b|blue)", re.IGNORECASE)


def _text_classes(lines: Sequence[str]) -> list[tuple[str, Colour | None]]:
    entries: list[tuple[str, Colour | None]] = []
    for line in lines:
        if _HEADER.fullmatch(line) or (not entries and line.lower() in ("name", "class")):
            continue
        if match := _RGB_FIRST.fullmatch(line):
            entries.append((match[4].strip(), _colour(match.groups()[:3])))
        elif match := _RGB_LAST.fullmatch(line):
            entries.append((match[1].strip(" ,;\t"), _colour(match.groups()[1:])))
        else:
            entries.append((line.strip(" ,;\t"), None))
    return entries


def _json_classes(data: object) -> list[tuple[str, Colour | None]]:
    if isinstance(data, dict) and all(isinstance(value, str) for value in data.values()):  # transformers' id2label
        return [(data[str(i)], None) for i in range(len(data))]
    if isinstance(data, dict):
        return [(name, _colour(colour)) for name, colour in data.items()]
    if not isinstance(data, list):
        raise TypeError
    entries: list[tuple[str, Colour | None]] = []
    for entry in data:
        if isinstance(entry, str):
            entries.append((entry, None))
        else:
            colour = next((entry[key] for key in ("color", "colour", "rgb") if entry.get(key) is not None), None)
            entries.append((str(entry["name"]), None if colour is None else _colour(colour)))
    return entries


def _colour(values: Iterable[str | int]) -> Colour:
    red, green, blue = (int(value) for value in values)
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise ValueError
    return red, green, blue


def lines_of(file: Path) -> list[str]:
    """The lines of a text file that are not empty, without the byte-order mark that spreadsheets write."""
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
