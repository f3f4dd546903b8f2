"""Layouts of images and masks: where the files of the known data sets, and of any pair of folders, lie."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import DownresError
from ...images.parts import PARTS, WHOLE, list_images, parts_among, subfolders, unwrapped
from .mask_legends import (
    ADE20K_CLASSES,
    Legend,
    ade20k_legend,
    camvid_legend,
    cityscapes_legend,
    lines_of,
    read_classes,
    voc_legend,
)


class Pair(NamedTuple):
    """One picture and its mask; name: the picture's path inside the data folder."""

    image: Path
    mask: Path
    name: str


Pairs = dict[str, tuple[Pair, ...]]
"""By part: 'train' and 'val', one of them, or 'whole' where the data are not divided."""


class Layout(NamedTuple):
    """What was found. legend: None where nothing but the masks says how many classes there are. note: how it was divided.
    idle: folders of parts that are not used. root: the folder, or what is wrapped in it.
    """

    name: str
    pairs: Pairs
    legend: Legend | None
    licence: str = ""
    note: str = ""
    idle: tuple[str, ...] = ()
    root: Path = Path()


def _cityscapes(root: Path, asked: bool) -> Layout | None:
    images, masks = (
        _first(root / kind, root / f"{kind}_trainvaltest" / kind, root / f"{kind}_trainvaltest")
        for kind in ("leftImg8bit", "gtFine")
    )
    if images is None or masks is None:
        return None
    parts = [part for part in ("train", "val") if (images / part).is_dir()]  # the labels of `test` are not public
    ids = any(next((masks / part).glob("*/*_gtFine_labelIds.png"), None) for part in parts)
    ending = f"_gtFine_label{'' if ids else 'Train'}Ids.png"
    pairs = {
        part: tuple(
            _pair(root, image, masks / part / image.parent.name / (image.name.removesuffix("_leftImg8bit.png") + ending))
            for image in sorted((images / part).glob("*/*_leftImg8bit.png"))
        )
        for part in parts
    }
    return Layout("cityscapes", pairs, cityscapes_legend(ids), "Cityscapes licence: not for commercial use.")


def _ade20k(root: Path, asked: bool) -> Layout | None:
    base = _first(*(folder / "annotations" / "training" for folder in (root, root / "ADEChallengeData2016")))
    if base is None:
        return None
    base = base.parent.parent
    images, masks = base / "images", base / "annotations"
    if not asked and not any(file.stem.startswith("ADE_") for file in (images / "training").glob("*")):
        return None
    pairs = {
        part: _match(root, images / name, masks / name)
        for part, name in (("train", "training"), ("val", "validation"))
        if (images / name).is_dir()
    }
    info = base / "objectInfo150.txt"  # tab-separated, with a header; the names are the last column
    names = [f"class {i}" for i in range(ADE20K_CLASSES)]
    if info.is_file():
        rows = [line.split("\t")[-1] for line in lines_of(info)[1:]]
        if len(rows) == ADE20K_CLASSES:
            names = [re.split("[,;]", row)[0].strip() for row in rows]
    return Layout("ade20k", pairs, ade20k_legend(names), "ADE20K terms: images for non-commercial research and education only.")


def _voc(root: Path, asked: bool) -> Layout | None:
    bases = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012", *sorted(root.glob("VOCdevkit/VOC20*"), reverse=True))
    masks = _first(*(base / "SegmentationClass" for base in bases if (base / "JPEGImages").is_dir()))
    if masks is None:
        return None
    images, lists = masks.parent / "JPEGImages", masks.parent / "ImageSets" / "Segmentation"
    names = {part: lists / f"{part}.txt" for part in ("train", "val")}
    if not any(file.is_file() for file in names.values()):
        names = {WHOLE: lists / "trainval.txt"}
    if not asked and not any(file.is_file() for file in names.values()):
        return None  # any other pair of folders, by the same names
    pairs = {part: _from_list(root, file, images, masks) for part, file in names.items() if file.is_file()}
    return Layout("voc", pairs, voc_legend(), "Images under Flickr's terms of use.")


_CAMVID_FRAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)")
_CAMVID_LICENCE = "CamVid terms: for research."
_CAMVID_NOTE = (
    "divided as SegNet does, by sequence: 0016E5 from frame 7959 to 8159 is val, Seq05VD and 0001TP from 8550 are test and "
    "left out, the rest is train"
)


def _camvid_part(stem: str) -> str:
    """The part of a frame in SegNet's lists, which follow the sequences of Brostow et al. (2009)."""
    match = _CAMVID_FRAME.match(stem)
    sequence, frame = (match[1], int(match[2])) if match else ("", 0)
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame >= 8550):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= frame <= 8159 else "train"


def _camvid(root: Path, asked: bool) -> Layout | None:
    annotated = {name.removesuffix("annot"): root / name for name in subfolders(root) if name.endswith("annot")}
    parts = {part: annotated[names[0]] for part, names in parts_among(annotated).items()}
    if parts and (asked or _class_file(root, _CLASS_FILES[:3]) is None):
        pairs = {part: _match(root, root / masks.name.removesuffix("annot"), masks) for part, masks in parts.items()}
        return Layout("camvid", pairs, camvid_legend(), _CAMVID_LICENCE)
    images = _first(root / "701_StillsRaw_full", root / "images")
    masks = _first(root / "LabeledApproved_full", root / "labels")
    if images is None or masks is None:
        return None
    if not asked and not any(_CAMVID_FRAME.match(file.name) and file.stem.endswith("_L") for file in masks.glob("*.png")):
        return None
    listed = _lists(root, images, masks)
    if listed:
        return Layout("camvid", listed, camvid_legend(), _CAMVID_LICENCE)
    everything = _match(root, images, masks)
    divided = {part: tuple(pair for pair in everything if _camvid_part(pair.image.stem) == part) for part in ("train", "val")}
    return Layout("camvid", divided, camvid_legend(), _CAMVID_LICENCE, _CAMVID_NOTE)


_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "inputs", "input")
_MASKS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot", "labelids", "gt", "gts",
    "segmentationclass", "targets", "target",
)  # fmt: skip
_SUFFIXES = ("", "_mask", "_label", "_labels", "_gt", "_seg", "_L", "_P", "_labelIds", "-mask", "-label", "-gt")
"""Between a picture's name and its mask's."""


def _folders(root: Path, asked: bool) -> Layout | None:
    images, masks = _named(root, _IMAGES), _named(root, _MASKS)
    own = parts_among(subfolders(root))
    theirs, others = (parts_among(subfolders(folder)) if folder else {} for folder in (images, masks))
    pairs: Pairs = {}
    used: set[Path] = set()
    for part in PARTS:
        sides: list[tuple[Path | None, Path | None]] = []
        for name in own.get(part, ()):
            sides.append((_named(root / name, _IMAGES), _named(root / name, _MASKS)))  # PART/images and PART/masks
            beside = [f"{name.lower()}{link}{mask}" for link in ("", "_", "-") for mask in _MASKS]
            sides.append((root / name, _named(root, beside)))  # PART and PART_masks
        for name in theirs.get(part, ()):  # images/PART and masks/PART, which may call it another name
            same = others.get(part, []) if len(theirs[part]) == 1 else [name]
            sides.append((_named(images, (name.lower(),)), _named(masks, [n.lower() for n in (name, *same[:1])])))
        found = next(((image, mask) for image, mask in sides if image is not None and mask is not None), None)
        if found is not None:
            pairs[part] = _match(root, *found)
            used |= {folder for side in found for folder in (side, side.parent)}
    if not pairs and images is not None and masks is not None:
        pairs = _lists(root, images, masks) or {WHOLE: _match(root, images, masks)}
        return Layout("folders", pairs, None)
    there = [root / name for names in own.values() for name in names]
    there += [images / name for names in theirs.values() for name in names] if images else []
    idle = tuple(folder.relative_to(root).as_posix() for folder in there if folder not in used)
    return Layout("folders", pairs, None, idle=idle) if pairs else None


LAYOUTS: dict[str, Callable[[Path, bool], Layout | None]] = {
    "cityscapes": _cityscapes,
    "ade20k": _ade20k,
    "voc": _voc,
    "camvid": _camvid,
    "folders": _folders,
}
TITLES = {"cityscapes": "Cityscapes", "ade20k": "ADE20K", "voc": "Pascal VOC", "camvid": "CamVid", "folders": "folders"}
_EXPECTED = (
    "leftImg8bit and gtFine (cityscapes), images/training and annotations/training (ade20k), JPEGImages, SegmentationClass "
    "and ImageSets/Segmentation (voc), train and trainannot or 701_StillsRaw_full and LabeledApproved_full (camvid), or "
    "train/images and train/masks, images/train and masks/train, or images and masks (folders)"
)


def locate(root: Path, layout: str | None) -> Layout:
    """The layout of a folder, found or as named, with its pairs, whose masks need not be there.

    classes.txt, classes.csv or classes.json in the folder replaces the classes that a known data set has.
    Raises DownresError where the folder has no known layout, a part has no images, or two parts share one.
    """
    if layout is not None and layout not in LAYOUTS:
        raise DownresError(f"The layouts are {', '.join(LAYOUTS)}, {layout!r} is not: name one of them or none.")
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        raise DownresError(f"Masks need a folder and {root} {what}: point `data` to a folder of images and masks.")
    candidates = (
        (folder, find(folder, layout is not None))
        for folder in dict.fromkeys((root, unwrapped(root)))
        for name, find in LAYOUTS.items()
        if layout in (None, name)
    )
    found = next((layout._replace(root=folder) for folder, layout in candidates if layout is not None and layout.pairs), None)
    if found is None:
        kind = f"the layout {layout}" if layout else "a known layout of images and masks"
        raise DownresError(f"{root} does not have {kind}: point `data` to a folder that holds {_EXPECTED}.")
    for part, pairs in found.pairs.items():
        if not pairs:
            raise DownresError(
                f"The part {part} of {root} (layout {found.name}) has no images: add them, or remove its empty folder or list."
            )
    names = [pair.name for pairs in found.pairs.values() for pair in pairs]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DownresError(
            f"{len(twice)} images of {root} are listed twice (the first is {twice[0]}), and none may be fitted on and "
            "tested on: list each once, in train or in val."
        )
    files = _CLASS_FILES if found.name == "folders" else _CLASS_FILES[:3]
    own = _class_file(found.root, files) or _class_file(root, files)
    return found if own is None else found._replace(legend=own, licence="")


_CLASS_FILES = ("classes.txt", "classes.csv", "classes.json", "class_dict.csv", "label_colors.txt", "codes.txt")
"""The first three are the user's own; the others come with copies of CamVid and its like."""


def _class_file(folder: Path, names: Sequence[str]) -> Legend | None:
    return next((read_classes(folder / name) for name in names if (folder / name).is_file()), None)


def _first(*folders: Path) -> Path | None:
    return next((folder for folder in folders if folder.is_dir()), None)


def _named(folder: Path | None, names: Sequence[str]) -> Path | None:
    """The folder inside that has the first of these names, in upper or lower case."""
    if folder is None or not folder.is_dir():
        return None
    inside = {entry.name.lower(): Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()}
    return next((inside[name] for name in names if name in inside), None)


def _pair(root: Path, image: Path, mask: Path) -> Pair:
    return Pair(image, mask, image.relative_to(root).as_posix())


def _match(root: Path, images: Path, masks: Path, wanted: Sequence[Path] | None = None) -> tuple[Pair, ...]:
    """Each image, or those `wanted`, with the mask of the same name, or of that name and a suffix, in the same subfolder."""
    if wanted is None:
        wanted = _image_files(images)
    # Of two files of one name the PNG is the mask: the other may be a preview.
    by_stem = {file.relative_to(masks).with_suffix(""): file for file in sorted(_image_files(masks), key=_png_last)}

    def mask_of(image: Path) -> Path:
        stem = image.relative_to(images).with_suffix("")
        candidates = (stem.with_name(stem.name + suffix) for suffix in _SUFFIXES)
        return next((by_stem[name] for name in candidates if name in by_stem), masks / f"{stem}.png")

    return tuple(_pair(root, image, mask_of(image)) for image in wanted)


def _png_last(file: Path) -> bool:
    return file.suffix.lower() == ".png"


def _image_files(folder: Path) -> list[Path]:
    return [folder / name for name in list_images(folder)[0]]


def _lists(root: Path, images: Path, masks: Path) -> Pairs:
    """The parts that train.txt and val.txt in the root name, one picture a line; {} where there are none."""
    files = {entry.stem: entry for entry in root.iterdir() if entry.suffix.lower() == ".txt"}
    lists = {part: files[names[0]] for part, names in parts_among(files).items()}
    listed = {part: _from_list(root, file, images, masks) for part, file in lists.items()}
    if list(listed) == ["val"]:  # fastai's valid.txt: all others are for training
        tested = {pair.image for pair in listed["val"]}
        return {"train": _match(root, images, masks, [i for i in _image_files(images) if i not in tested])} | listed
    return listed


def _from_list(root: Path, file: Path, images: Path, masks: Path) -> tuple[Pair, ...]:
    """The pairs that a list names: on each line a picture, with or without folder and ending, and perhaps its mask."""
    known: dict[str, Path | None] = {}
    for image in _image_files(images):
        path = image.relative_to(images)
        for key in {path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem}:
            known[key] = None if key in known else image  # None: of several folders, so it names none of them

    def image_of(line: str) -> Path | None:
        for path in (Path(line), Path(line.split()[0])):
            keys = (path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem, path.stem.removesuffix("_L"))
            if found := next((known[key] for key in keys if known.get(key)), None):
                return found
        return None

    lines = lines_of(file)
    wanted = [image_of(line) for line in lines]
    missing = [line for line, image in zip(lines, wanted, strict=True) if image is None]
    if missing:
        raise DownresError(
            f"{file} lists {len(missing)} images that are not in {images} (the first is {missing[0]}): "
            "add them, or correct the list."
        )
    return _match(root, images, masks, [image for image in wanted if image is not None])
