"""Pictures with a class for every pixel: finding pairs of image and mask, reading masks as class indices, the data set."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ...errors import DownresError
from ...images.decode import Unreadable
from ...images.images import Images, Progress, Skip, cache_bytes, fingerprint, from_files
from ...images.parts import (
    WHOLE,
    as_found,
    divide,
    how_found,
    how_left_out,
    how_limited,
    limit_training,
    list_images,
    listed_names,
    looked_at,
    tested_images,
    without_unreadable,
)  # fmt: skip
from ...images.split import Fold
from ...parse import user_path
from .mask_files import colours_of, header_of, packed, values_of
from .mask_layouts import TITLES, Pair, Pairs, locate
from .mask_legends import IGNORE, UNKNOWN, VOC_COLOURS, Colour, Legend, legend_of, numbered, read_classes, table

__all__ = ["IGNORE", "MaskDataset", "MaskFolder", "Pair", "find_masks", "mask_classes", "open_masks"]

_CLASSES = "give classes.txt in the data folder, or `classes`"

Found = TypeVar("Found")

TRAINING_MASKS = 400
"""Images to fit on that are opened, at most in each fold: 100 tune, and of the others 256 recalibrate BatchNorm."""


@dataclass(frozen=True, eq=False)
class MaskFolder:
    """What a folder of images and masks holds, before any image is decoded.

    pairs: by part, 'train' and 'val', or 'whole' where the folder is not divided. classes: a name for each class index.
    colours: RGB, one a class, for pictures. legend: what the values in the files mean. label_size: (height, width) of
    every mask, None where they differ. licence, note (how it was divided), idle (folders of parts that are not used): for
    descriptions. levels: whether grey masks hold the grey levels of the classes' colours (0 and 255) and not their numbers.
    """

    layout: str
    root: Path
    pairs: Pairs
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    legend: Legend
    label_size: tuple[int, int] | None = None
    licence: str = ""
    note: str = ""
    idle: tuple[str, ...] = ()
    levels: bool = False

    @property
    def found_in(self) -> Path:
        """Where `check` finds it again."""
        return self.root

    def read_mask(self, path: str | os.PathLike[str]) -> np.ndarray:
        """Class indices uint8 (height, width), IGNORE where there is none.

        An RGB image is read by the colours of the classes, as is a grey one whose values are grey levels of these (see
        `levels`), and a palette image whose own colours are those of classes and contradict its indices; else indices count.
        Raises DownresError for a file that cannot be read, a value or colour that no class has, or an RGB image where no
        colours are known.
        """
        try:
            return self._read(path)
        except Unreadable as reason:
            raise DownresError(f"The mask {self._name(Path(path))} cannot be read ({reason}): replace it.") from None

    def _read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """As `read_mask`, but Unreadable where the file cannot be read."""
        values, palette = values_of(Path(path))
        if values.ndim == 3:
            return self._from_rgb(values, Path(path))
        if palette is not None and self._contradicted(values, palette, Path(path)):
            return np.array([IGNORE if c is None else c for c in self._classes_in(palette)], np.uint8)[values]
        if palette is None and self.levels:
            return self._from_rgb(np.repeat(values[..., None], 3, axis=2).astype(np.uint8), Path(path))
        if values.dtype != np.uint8:
            wrong = values[(values < 0) | (values > 255)]
            if len(wrong):
                raise self._wrong_value(int(wrong[0]), Path(path))
            values = values.astype(np.uint8)
        classes = self.legend.table[values]
        if classes.min() == UNKNOWN:
            raise self._wrong_value(int(values[classes == UNKNOWN][0]), Path(path))
        return classes.astype(np.uint8)

    def _classes_in(self, palette: np.ndarray) -> list[int | None]:
        """For each index the class that has its colour, None where there is none; 256 of them."""
        colours: list[Colour] = [(r, g, b) for r, g, b in palette.tolist()]
        found = [self.legend.rgb.get(colour) for colour in colours] + [None] * (256 - len(palette))
        if found[IGNORE] is not None and colours.count(colours[IGNORE]) > 1:
            found[IGNORE] = None  # a palette that is filled up says nothing of it
        return found

    def _contradicted(self, values: np.ndarray, palette: np.ndarray, path: Path) -> bool:
        """Whether the colours of a palette are classes, and others than the indices say. DownresError where only some are."""
        if not self.legend.rgb or values.max() > IGNORE:
            return False
        used, found = np.unique(values).tolist(), self._classes_in(palette)
        other = [v for v in used if found[v] is not None and found[v] != self.legend.table[v]]
        without = [v for v in used if found[v] is None and v != IGNORE]
        if other and without:
            of, and_of = (tuple(palette[v].tolist()) if v < len(palette) else "none" for v in (other[0], without[0]))
            raise DownresError(
                f"The palette of the mask {self._name(path)} gives the index {other[0]} the colour {of}, which is that of "
                f"another class, and the index {without[0]} the colour {and_of}, which no class has: add it to the file "
                "of classes, or name the classes without colours where indices count."
            )
        return bool(other)

    def _from_rgb(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        if not self.legend.rgb:
            raise self._unexpected_rgb(pixels, path)
        found = packed(pixels)
        colours = sorted(self.legend.rgb)
        keys = packed(np.array(colours, np.uint8))
        at = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
        unknown = keys[at] != found
        if unknown.any():
            (colour, *_) = colours_of(pixels[unknown])
            raise DownresError(
                f"The mask {self._name(path)} has the colour {colour}, which no class has, at {np.count_nonzero(unknown)} "
                "pixels: correct the mask, or add the colour to the file of classes."
            )
        return np.array([self.legend.rgb[colour] for colour in colours], np.uint8)[at]

    def _wrong_value(self, value: int, path: Path) -> DownresError:
        known = np.flatnonzero(self.legend.table[:IGNORE] != UNKNOWN)
        return DownresError(
            f"The mask {self._name(path)} has the value {value}, and the values of masks here are {known.min()} to "
            f"{known.max()}, or {IGNORE} where there is no class: correct the mask, or name all classes in classes.txt, with "
            "their colours (`road 255 255 255`) where the values are grey levels."
        )

    def _unexpected_rgb(self, pixels: np.ndarray, path: Path) -> DownresError:
        found = colours_of(pixels)
        if set(found) <= VOC_COLOURS:
            return DownresError(
                f"The mask {self._name(path)} is RGB and has the colours of Pascal VOC's palette, so a palette PNG was "
                f"saved as RGB: take the original, or {_CLASSES}, with a colour for each class."
            )
        return DownresError(
            f"The mask {self._name(path)} is RGB (colours {listed_names([str(colour) for colour in found], 4)}), and which "
            f"class a colour stands for is not known: {_CLASSES}, with a line `name R G B` for each class."
        )

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def find_masks(
    root: str | os.PathLike[str],
    *,
    layout: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
) -> MaskFolder:
    """The pairs of image and mask of a folder, checked from the headers of the files alone.

    layout: 'cityscapes', 'camvid', 'voc', 'ade20k' or 'folders'; None finds out. classes: a file (see `read_classes`) or
    the names, in the order of the indices in the masks, instead of those that the layout or a file in the root gives;
    where nothing gives any, the masks are read once for the largest index.
    Raises DownresError where there is no such layout, an image has no mask, image and mask differ in size, a part is
    empty, or masks are RGB or JPEG where class indices are expected.
    """
    root = user_path(root)
    found = locate(root, layout)
    if isinstance(classes, str | os.PathLike):
        found = found._replace(legend=read_classes(user_path(classes)), licence="")
    elif classes is not None:
        found = found._replace(legend=legend_of([(name, None) for name in classes]), licence="")
    known = found.legend or Legend((), (), table(range(IGNORE)), {})
    folder = MaskFolder(
        found.name, found.root, found.pairs, known.names, known.colours, known, None, found.licence, found.note, found.idle
    )
    folder = replace(folder, label_size=_check_headers(folder))
    if found.legend is None:
        known = _count_classes(folder)
        return replace(folder, classes=known.names, colours=known.colours, legend=known)
    if len(known.names) < 2:
        raise DownresError(
            f"A segmentation has at least 2 classes, {listed_names(known.names) or 'none'} is named alone: name the background "
            "too, as the class that the masks have there."
        )
    return _by_colour(folder) if known.rgb else folder


def mask_classes(
    source: str | os.PathLike[str] | MaskFolder,
    outputs: int | None = None,
    *,
    layout: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
) -> MaskFolder:
    """As `find_masks`, and the classes are as many as the network's `outputs`: of one output two, background and foreground.
    None accepts any number.

    Raises DownresError as `find_masks` does, or where the numbers differ.
    """
    found = source if isinstance(source, MaskFolder) else find_masks(source, layout=layout, classes=classes)
    have, names = len(found.classes), listed_names(found.classes)
    if outputs == 1 and have != 2:
        raise DownresError(
            f"The network has one output, which tells background from foreground, and the masks {have} classes ({names}): take "
            f"a network with {have} outputs, or masks of two classes."
        )
    if outputs not in (None, 1, have):
        void = f"; where its last is for pixels without a class, ignore_output={outputs - 1}" if outputs == have + 1 else ""
        raise DownresError(
            f"The network has {outputs} outputs and the masks {have} classes ({names}): "
            f"take a network with {have} outputs, or {_CLASSES}, with a line for each of {outputs} classes{void}."
        )
    return found


@dataclass(frozen=True, eq=False)
class MaskDataset:
    """Pictures with masks and how they are divided.

    masks: uint8 (H, W) class indices with IGNORE, each of its image's size. classes, colours (RGB): one for each output
    of the network. folds: one where the data is split once, k where it is cross-fitted. skipped: images left out.
    description: one sentence, for reports. label_size: (height, width) of all masks here, None where they differ.
    absent: the classes that no image to test on has.
    """

    images: Images
    masks: Images
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    folds: tuple[Fold, ...]
    skipped: tuple[Skip, ...]
    description: str
    licence: str = ""
    label_size: tuple[int, int] | None = None
    absent: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256, in hex, of names, checksums of the pixels and of the masks, classes and folds."""
        sides = [side for fold in self.folds for side in (fold.train, fold.test)]
        return fingerprint(self.images, "\0".join(self.classes).encode(errors="surrogatepass"), sides, self.masks)


def open_masks(
    source: str | os.PathLike[str] | MaskFolder,
    *,
    outputs: int | None,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    layout: str | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    cache_gb: float | None = None,
    progress: Progress | None = None,
    channels: int = 3,
    train_images: int | None = None,
) -> MaskDataset:
    """The images and masks of a folder, each decoded once.

    outputs: of the network, which the classes must match in number (one output is background and foreground); None accepts
    any. parts, val_fraction, folds, seed, cache_gb, channels: as for `open_folder`; a folder that is not divided is split at
    random, without regard to classes. layout, classes: as for `find_masks`. Images that cannot be read, or whose
    masks cannot, are left out. Of the images to fit on at most `train_images`, else TRAINING_MASKS, are decoded in each
    fold, a random sample by `seed`.
    Raises DownresError, in one sentence that says why, where the folder cannot be used.
    """
    found = mask_classes(source, outputs, layout=layout, classes=classes)
    if folds is not None and len(found.pairs) > 1:
        raise DownresError(
            f"`folds` needs data that are not divided, {found.root} has both {' and '.join(found.pairs)}: "
            "leave `folds` out, or point `data` to a folder with one set of images and masks."
        )
    whole = len(found.pairs) == 1
    used = {part: pairs for part, pairs in found.pairs.items() if whole or part in parts}
    pairs = [pair for some in used.values() for pair in some]
    files = [pair.name for pair in pairs]
    alike = np.zeros(len(files), np.int64)
    if whole:
        listed = divide(alike, parts, val_fraction, folds, seed)
    else:
        listed = as_found([part for part, some in used.items() for _ in some])
    limited = limit_training(listed, alike, train_images or TRAINING_MASKS, seed)
    needed = looked_at(limited)
    tested = np.searchsorted(needed, tested_images(limited))
    images, masks, skipped = _decode_pairs(found, [pairs[i] for i in needed], tested, cache_bytes(cache_gb), progress, channels)
    reasons = {skip.path: skip.reason for skip in skipped}
    kept = np.array([i for i in needed if files[i] not in reasons], dtype=np.int64)
    divided = without_unreadable(limited, kept, files, reasons)

    sizes = {(shape[0], shape[1]) for shape in masks.shapes}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    _check_classes(found, masks)
    absent = _absent(found.classes, masks, divided)
    sentence = f"{len(images)} images with masks of {len(found.classes)} classes ({TITLES[found.layout]} layout), "
    if whole:
        sentence += "".join(f"{part} only, " for part in found.pairs if part != WHOLE)
        sentence += _how_split(divided, len(files), folds, seed)
    else:
        sentence += how_found(divided[0], {part: Path(part) for part in found.pairs})
    sentence += how_limited(listed, limited, "random", seed)
    sentence += f"; all masks {size[0]}×{size[1]}" if size else "; masks of several sizes"
    sentence += f"; {found.note}" if found.note else ""
    sentence += f"; no image to test on has {listed_names(absent)}" if absent else ""
    sentence += f"; {len(skipped)} images left out, they or their masks are unreadable" if skipped else ""
    others = _others(found.root, used)
    sentence += how_left_out((), others, found.idle)
    return MaskDataset(
        images, masks, found.classes, found.colours, divided, (*skipped, *others), f"{sentence}.",
        found.licence, size, absent,
    )  # fmt: skip


def _decode_pairs(
    found: MaskFolder, pairs: Sequence[Pair], tested: np.ndarray, cache: int, progress: Progress | None, channels: int
) -> tuple[Images, Images, list[Skip]]:
    """(images, masks, left out): those pairs of which both can be read, in order.

    cache: bytes; a quarter is the masks', which have one byte a pixel where images have three.
    """
    names = [pair.name for pair in pairs]
    files = [pair.image for pair in pairs]
    images, skipped = from_files(files, names, progress, cache=cache * 3 // 4, first=tested, channels=channels)
    unreadable = {skip.path for skip in skipped}
    left = [i for i, name in enumerate(names) if name not in unreadable]
    masks, unread = from_files(
        [pairs[i].mask for i in left], [names[i] for i in left], progress, read=found._read, stage="reading masks",
        cache=cache // 4, first=np.flatnonzero(np.isin(left, tested)),
    )  # fmt: skip
    skipped += [Skip(skip.path, f"mask {skip.reason}") for skip in unread]
    unreadable = {skip.path for skip in unread}
    images = images.take([k for k, i in enumerate(left) if names[i] not in unreadable])
    for name, image, mask in zip(images.names, images.shapes, masks.shapes, strict=True):  # upright, as no PNG's header tells
        if image[:2] != mask:
            raise _sizes_differ(name, image[:2], mask)
    return images, masks, skipped


def _others(root: Path, parts: Pairs) -> list[Skip]:
    """What lies among the images and is none."""
    folders = [Path(os.path.commonpath([pair.image.parent for pair in pairs])) for pairs in parts.values()]
    found = [(folder.relative_to(root), skip) for folder in dict.fromkeys(folders) for skip in list_images(folder)[1]]
    return [Skip((where / skip.path).as_posix(), skip.reason) for where, skip in found]


def _absent(classes: Sequence[str], masks: Sequence[np.ndarray], folds: Sequence[Fold]) -> tuple[str, ...]:
    """The classes that no test image has; none where there are no test images."""
    tested = np.concatenate([fold.test for fold in folds])
    present = np.zeros(256, bool)
    for i in tested:
        present |= np.bincount(masks[int(i)].ravel(), minlength=256) > 0
    return tuple(name for name, there in zip(classes, present, strict=False) if not there) if len(tested) else ()


def _how_split(divided: tuple[Fold, ...], total: int, folds: int | None, seed: int) -> str:
    """How one set of `total` pairs was divided at random, and which sides of it are here."""
    if len(divided) > 1:
        return f"cross-fitted in {folds} folds (seed {seed})"
    (fold,) = divided
    if len(fold.train) and len(fold.test):
        return f"split into {len(fold.train)} to fit on and {len(fold.test)} to test on (seed {seed})"
    if len(fold.test) == total:
        return "all to test on"
    return f"those to {'fit' if len(fold.train) else 'test'} on of a split of {total} (seed {seed})"


def _check_headers(found: MaskFolder) -> tuple[int, int] | None:
    """The size (height, width) that all masks have, or None. Raises DownresError where a pair does not fit together.

    Files that cannot be read are passed over here: `open_masks` leaves them out and says so.
    """
    pairs = [pair for part in found.pairs.values() for pair in part]
    missing = [pair for pair in pairs if not pair.mask.exists()]
    if missing:
        first = missing[0]
        raise DownresError(
            f"{len(missing)} of {len(pairs)} images in {found.root} have no mask (the first is {first.name}, whose mask would "
            f"be {found._name(first.mask)}): add the masks, or remove the images."
        )
    sizes = set()
    for pair in pairs:
        image, mask = header_of(pair.image), header_of(pair.mask)
        if mask is None:
            continue
        sizes.add(mask.size)
        if mask.jpeg:
            raise DownresError(
                f"The mask {found._name(pair.mask)} is a JPEG, whose compression changes class indices: save masks as PNG."
            )
        if mask.rgb and not found.legend.rgb:
            found.read_mask(pair.mask)  # raises: names the colours that the mask has
        if image is not None and image.size != mask.size:
            raise _sizes_differ(pair.name, image.size, mask.size)
    return next(iter(sizes)) if len(sizes) == 1 else None


def _sizes_differ(name: str, image: tuple[int, ...], mask: tuple[int, ...]) -> DownresError:
    return DownresError(
        f"An image and its mask have the same size, {name} has {image[0]}×{image[1]} and its mask {mask[0]}×{mask[1]}: "
        "resize the image, or give the mask that belongs to it."
    )


def _each(folder: MaskFolder, look: Callable[[Path], Found]) -> Iterator[Found]:
    """`look` at every mask that can be read, until nobody asks for more."""

    def found(path: Path) -> Found | None:
        try:
            return look(path)
        except Unreadable:
            return None

    pool = ThreadPoolExecutor(2, thread_name_prefix="downres-masks")
    try:
        masks = [pair.mask for part in folder.pairs.values() for pair in part]
        yield from (one for one in pool.map(found, masks) if one is not None)
    finally:
        pool.shutdown(cancel_futures=True)


def _count_classes(found: MaskFolder) -> Legend:
    """Classes without names, as many as the largest index in the masks needs; reads every mask once."""
    present = np.zeros(256, bool)
    for mask in _each(found, lambda path: np.bincount(found._read(path).ravel(), minlength=256) > 0):
        present |= mask
    indices = np.flatnonzero(present[:IGNORE])
    count = 1 + int(indices[-1]) if len(indices) else 0
    if count < 2:
        raise _no_index(found)
    if len(indices) * 8 <= count:
        values = listed_names([str(i) for i in np.flatnonzero(present)])
        raise DownresError(
            f"The masks in {found.root} hold the values {values}, which look like grey levels and not like numbers of classes: "
            f"{_CLASSES}, with a line `name R G B` for each level (`road 128 128 128`), or a name for each of {count} classes."
        )
    return numbered(count)


def _no_index(found: MaskFolder) -> DownresError:
    return DownresError(
        f"The masks in {found.root} hold no index above 0 but {IGNORE}, which is ignored, and a segmentation has at "
        f"least 2 classes: number the classes from 0, or {_CLASSES}, as a file with the colours in the masks."
    )


def _check_classes(found: MaskFolder, masks: Sequence[np.ndarray]) -> None:
    """DownresError for masks that hold index 0 and ignored pixels alone: black and white, read as indices."""
    if found.legend.rgb:
        return
    ignored = False
    for mask in masks:
        present = np.bincount(mask.ravel(), minlength=256) > 0
        if present[1:IGNORE].any():
            return
        ignored |= bool(present[IGNORE])
    if ignored:
        raise _no_index(found)


def _by_colour(found: MaskFolder) -> MaskFolder:
    """The folder with its grey masks, and its palettes, looked at: are their values those of the colours that are given?"""
    rgb, indices = found.legend.rgb, found.legend.table
    grey = {r: number for (r, g, b), number in rgb.items() if r == g == b}
    other = {level for level, number in grey.items() if number != indices[level]}
    notes = []

    def levels(path: Path) -> set[int]:
        values, palette = values_of(path)
        return set(np.unique(values).tolist()) if values.ndim == 2 and palette is None else set()

    def contradicted(path: Path) -> bool:
        header = header_of(path)
        if header is None or header.palette is None:
            return False
        maybe = any(c is not None and c != number for c, number in zip(found._classes_in(header.palette), indices, strict=True))
        values, palette = values_of(path) if maybe else (None, None)
        return values is not None and palette is not None and found._contradicted(values, palette, path)

    seen: set[int] = set()
    for some in _each(found, levels) if other else ():
        seen |= some
        if not some <= grey.keys() or any(indices[level] == UNKNOWN for level in some):
            break
    if seen - {0} and seen <= grey.keys():
        found = replace(found, levels=True)
        notes.append("grey masks read by the classes' colours")
    if any(_each(found, contradicted)):
        notes.append("palettes contradict the order of the classes: masks read by their colours")
    return replace(found, note="; ".join([note for note in (found.note, *notes) if note]))
