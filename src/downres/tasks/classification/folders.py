"""Class folders, or arrays, to a `Dataset`: pictures, labels as indices into the network's outputs, and folds."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DownresError
from ...images.decode import EXTENSIONS
from ...images.images import Images, Progress, Skip, cache_bytes, fingerprint, from_files
from ...images.parts import (
    TRAINING_IMAGES,
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
    parts_among,
    subfolders,
    tested_images,
    unwrapped,
    without_unreadable,
)  # fmt: skip
from ...images.split import Fold
from ...parse import user_path
from ..table import no_class

_WNID = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled pictures and how they are divided.

    labels: int64 (n,), indices into the network's outputs. classes: a name for each output. folds: one where the data
    is split once, k where it is cross-fitted. skipped: files left out. description: one sentence, for reports. tuning: bool
    (n,), the images that tune wherever they are to fit on; None: drawn by the seed.
    """

    images: Images
    labels: np.ndarray
    classes: tuple[str, ...]
    folds: tuple[Fold, ...]
    skipped: tuple[Skip, ...]
    description: str
    licence: str = ""
    tuning: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", whole(self.labels, lambda i: self.images.names[i]))

    def fingerprint(self) -> str:
        """SHA-256, in hex, of names, checksums of the pixels, labels, classes and folds."""
        sides = [side for fold in self.folds for side in (fold.train, fold.test)]
        return fingerprint(self.images, "\0".join(self.classes).encode(errors="surrogatepass"), [self.labels, *sides])


def whole(labels: Any, name: Callable[[int], str]) -> np.ndarray:
    """Labels as int64 (n,): integers, truth values, and numbers without a fraction in whatever type; name: of the picture i.

    Raises DownresError that names the first that is no whole number.
    """
    given = np.asarray(labels)
    if given.ndim != 1:
        raise DownresError(
            f"A classifier has one label an image, an array {given.shape} is not that: give one for each, or for several "
            "`task='multilabel'` and a file of them beside a folder of the pictures."
        )
    if given.dtype.kind in "iub":
        return given.astype(np.int64)
    for i, value in enumerate(given.tolist()):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise DownresError(
                f"Labels in Python are whole numbers from 0 on, {str(value)[:40]!r} of {name(i)} is none: number the classes."
            ) from None
        if not number.is_integer() or abs(number) > 2**53:
            raise no_class(f"The label {number:g} of {name(i)}")
    return given.astype(np.float64).astype(np.int64)


def from_arrays(
    images: Images,
    labels: np.ndarray,
    classes: Sequence[str],
    folds: Sequence[Fold],
    description: str,
    licence: str = "",
) -> Dataset:
    """A data set of pictures that are in memory. Raises DownresError where labels, images and classes do not agree."""
    labels = whole(labels, lambda i: images.names[i])
    if labels.shape != (len(images),):
        raise DownresError(f"{len(images)} images need as many labels, not an array {labels.shape}: give one for each image.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise DownresError(
            f"Labels of {len(classes)} classes are 0 to {len(classes) - 1}, {labels.min()} to {labels.max()} are not: "
            "number the classes from 0."
        )
    return Dataset(images, labels, tuple(classes), tuple(folds), (), description, licence)


def open_folder(
    path: str | os.PathLike[str],
    *,
    outputs: int | None,
    parts: Sequence[str] = ("train", "val"),
    val_fraction: float = 0.5,
    folds: int | None = None,
    seed: int = 0,
    cache_gb: float | None = None,
    progress: Progress | None = None,
    channels: int = 3,
    train_images: int | None = None,
) -> Dataset:
    """The pictures of DIR/train/CLASS/* and DIR/val/CLASS/*, or of DIR/CLASS/*, each decoded once.

    Parts may have the names that people give them (Training, test_set, VALID, dev; see `parts_among`), and a folder around all
    is seen through. What is left out is in `skipped` and counted in the description, as are folders that are not used.

    All images to test on are opened, and of those to fit on at most `train_images` in a fold, else TRAINING_IMAGES, a
    stratified sample by `seed`: of the others nothing but the name is looked at.

    outputs: of the network, which the class folders must match; None accepts any number. ImageNet's folder names
    (n01440764) are mapped to the 1000 outputs, any subset of them. parts: what is needed; ("val",) decodes no training
    image and leaves fold.train empty. One folder of classes, or only one of train and val, is split with `val_fraction`
    and `seed`, or into `folds` folds, before unreadable files are left out, so that the split is the same for all
    `parts`. With parts ("val",) and a val_fraction of 1, or folds, every image in it is a test image.
    cache_gb: of decoded pixels kept on disk at most; what does not fit is decoded again when it is looked at. None: half of
    what is free where temporary files go. channels: of the network, see `downres.images.decode`.
    Raises DownresError, in one sentence that says why, where the folder cannot be used.
    """
    root = user_path(path)
    sources, idle = _sources(root)
    called = {part: source.relative_to(root) for part, source in sources.items()}
    if folds is not None and len(sources) > 1:
        raise DownresError(
            f"`folds` needs one folder of classes, {root} has both {' and '.join(map(str, called.values()))}: "
            "leave `folds` out, or point `data` to one of the two."
        )
    names = _class_folders(sources)
    output_of, classes = _map_classes(names, outputs)
    file_names: list[str] = []
    others: list[Skip] = []  # files that are no images, or of no class
    groups = []  # (part, class) of each run of files, and how many they are
    for part, source in sources.items():
        if len(sources) == 1 or part in parts:
            others += [
                Skip((called[part] / file).as_posix(), "in no class folder") for file in list_images(source, deep=False)[0]
            ]
            for label, name in enumerate(names):
                inside, left_out = _images_of(source / name)
                prefix = (called[part] / name).as_posix()
                file_names += [f"{prefix}/{file}" for file in inside]
                others += [Skip(f"{prefix}/{skip.path}", skip.reason) for skip in left_out]
                groups.append((part, label, len(inside)))
    counts = [count for _, _, count in groups]
    labels = np.repeat([output_of[label] for _, label, _ in groups], counts).astype(np.int64)
    if len(sources) > 1:
        listed = as_found(np.repeat([part for part, _, _ in groups], counts))
    else:
        listed = divide(labels, parts, val_fraction, folds, seed)
    limited = limit_training(listed, labels, train_images or TRAINING_IMAGES, seed)
    needed = looked_at(limited)
    tested = np.searchsorted(needed, tested_images(limited))
    opened = [file_names[i] for i in needed]
    images, skipped = from_files(
        [root / name for name in opened], opened, progress, cache=cache_bytes(cache_gb), first=tested, channels=channels
    )  # fmt: skip
    reasons = {skip.path: skip.reason for skip in skipped}
    group_of = np.repeat(np.arange(len(groups)), counts)
    unused = np.setdiff1d(looked_at(listed), needed)
    _check_readable(file_names, np.delete(np.arange(len(file_names)), unused), group_of, names, reasons)
    kept = np.array([i for i in needed if file_names[i] not in reasons], dtype=np.int64)
    divided = without_unreadable(limited, kept, file_names, reasons)

    count = f"{len(kept)} images of {len(names)} classes"
    if len(sources) > 1:
        how = how_found(divided[0], called)
    else:
        ((part, source),) = called.items()
        count += f", {source} only" if part != WHOLE else " in one folder" + ("" if source == Path() else f", {source}")
        how = _how_divided(divided, len(listed[0].test) == len(labels), len(labels), folds, seed)
    how += how_limited(listed, limited, "stratified", seed)
    numbered = ""
    if outputs is not None and classes == tuple(names):  # not mapped by name: a wrong order can only be seen by the reader
        numbered = "; outputs taken to be the class folders in alphabetical order: "
        numbered += listed_names([f"{i} {name}" for i, name in enumerate(names)])
    description = f"{count}, {how}{how_left_out(skipped, others, idle)}{numbered}."
    return Dataset(images, labels[kept], classes, divided, (*skipped, *others), description)


def class_names(path: str | os.PathLike[str], outputs: int | None = None) -> tuple[str, ...]:
    """The names of the class folders, in order, without decoding an image; raises DownresError as `open_folder` does.

    outputs: of the network, which the class folders must match; None accepts any number.
    """
    sources, _ = _sources(user_path(path))
    names = _class_folders(sources)
    _map_classes(names, outputs)
    for source in sources.values():
        for name in names:
            _images_of(source / name, most=1)
    return tuple(names)


def _sources(root: Path) -> tuple[dict[str, Path], list[str]]:
    """(the folders that hold class folders: train, val or both, or else one as WHOLE; names of folders beside them)."""
    if not root.exists():
        raise DownresError(
            f"There is no folder {root}: point `data` to a folder that holds one folder of images for each class."
        )
    if not root.is_dir():
        raise DownresError(
            f"{root} is a file and `data` needs a folder: give one that holds one folder of images for each class."
        )
    root = unwrapped(root)
    folders = subfolders(root)
    found = {}
    for part, names in parts_among(folders).items():
        # Without class folders in it, `train` may be a class (of vehicles) and `test` unlabelled pictures.
        name = next((name for name in names if subfolders(root / name)), None)
        if name is not None:
            found[part] = root / name
    if found:
        idle = [name for name in folders if root / name not in found.values()]
        _check_beside(root, found, idle)
        return {part: unwrapped(folder, in_part=True) for part, folder in found.items()}, idle
    if not folders:
        if list_images(root, deep=False, most=1)[0]:
            raise DownresError(
                f"The images in {root} are in no class folders: put those of each class into a folder named after it."
            )
        raise DownresError(f"{root} holds no class folders and no images: point `data` to one folder of images for each class.")
    parts = [name for names in parts_among(folders).values() for name in names]
    if len(parts) > 1 or parts == folders:
        more = f", in {listed_names(parts[1:])} likewise" if parts[1:] else ""
        raise DownresError(
            f"{root / parts[0]} holds no class folders: put the images of each class into a folder named after it{more}, or "
            "rename what is a class and not a part."
        )
    return {WHOLE: root}, []


def _check_beside(root: Path, found: dict[str, Path], idle: list[str]) -> None:
    """DownresError where `train` with folders in it stands among class folders: it may be a part, or one of them."""
    parts = [name for names in parts_among(subfolders(root)).values() for name in names]
    classes = [name for name in idle if name not in parts and list_images(root / name, most=1)[0]]
    if len(found) == 1 and classes:
        (part,) = found.values()
        raise DownresError(
            f"{part} holds folders, as a part does, and stands beside folders of images ({listed_names(classes)}), as a class "
            f"does: give {part} alone as the data, or rename it where it is a class."
        )


def _class_folders(sources: dict[str, Path]) -> list[str]:
    """The sorted names of the class folders, the same ones in every source."""
    names, *others = (subfolders(source) for source in sources.values())
    for other in others:
        if names != other:
            differences = [
                f"only in {source.name}: {listed_names(sorted(set(mine) - set(theirs)))}"
                for source, mine, theirs in zip(sources.values(), (names, other), (other, names), strict=True)
                if set(mine) - set(theirs)
            ]
            raise DownresError(
                f"{' and '.join(s.name for s in sources.values())} need the same class folders and differ "
                f"({'; '.join(differences)}): add or remove those."
            )
    if len(names) < 2:
        (first, *_) = sources.values()
        raise DownresError(f"A classifier needs at least 2 class folders, {first} has 1 ({names[0]}): add the other classes.")
    return names


def _map_classes(names: list[str], outputs: int | None) -> tuple[list[int], tuple[str, ...]]:
    """(output index of each class folder, name of each output)."""
    imagenet = imagenet_outputs(names, outputs, "class folders")
    if imagenet is not None:
        return imagenet
    if outputs is not None and len(names) != outputs:
        raise DownresError(
            f"The weights have {outputs} outputs and the data {len(names)} class folders ({listed_names(names)}): "
            f"pass `fit_head=True` to fit a new linear head for them, or point `data` to a folder with {outputs} class folders."
        )
    return list(range(len(names))), tuple(names)


def imagenet_outputs(
    names: Sequence[str], outputs: int | None, what: str = "labels"
) -> tuple[list[int], tuple[str, ...]] | None:
    """(output index of each name, name of each output) where the names are ImageNet's (n01440764) and the outputs 1000; else
    None. what: the names are, for what is said of those that are unknown.
    """
    if outputs != _IMAGENET_CLASSES or not all(_WNID.fullmatch(name) for name in names):
        return None
    from timm.data import ImageNetInfo  # slow to import, and only these data need it

    imagenet = ImageNetInfo("imagenet-1k")
    index = {wnid: i for i, wnid in enumerate(imagenet.label_names())}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise DownresError(
            f"These {what} are not among ImageNet's {_IMAGENET_CLASSES} classes: {listed_names(unknown)}; "
            "remove them, or give weights whose outputs they are."
        )
    return [index[name] for name in names], tuple(imagenet.label_descriptions())


def _check_readable(
    files: Sequence[str], considered: np.ndarray, group_of: np.ndarray, classes: Sequence[str], reasons: dict[str, str]
) -> None:
    """Raise DownresError when all `considered` files of a class in a part are among `reasons`, why they cannot be read.

    group_of: int (files,), part · len(classes) + class.
    """
    if not reasons:
        return
    unreadable = np.array([files[i] in reasons for i in considered])
    groups = group_of[considered]
    lost = np.flatnonzero(~np.isin(groups, groups[~unreadable]))
    if len(lost):
        first = considered[lost[0]]
        raise DownresError(
            f"None of the images of class {classes[group_of[first] % len(classes)]} can be read "
            f"({files[first]}: {reasons[files[first]]}): replace them, or remove the folder."
        )


def _how_divided(divided: tuple[Fold, ...], whole: bool, total: int, folds: int | None, seed: int) -> str:
    """How one set of `total` files was divided, and which sides of it are here; `whole` where it was not divided."""
    if len(divided) > 1:
        return f"cross-fitted in {folds} folds (stratified, seed {seed})"
    (fold,) = divided
    if whole:
        return "all to test on"
    if len(fold.train) and len(fold.test):
        return f"split into {len(fold.train)} to fit on and {len(fold.test)} to test on (stratified, seed {seed})"
    return f"those to {'fit' if len(fold.train) else 'test'} on of a stratified split of {total} (seed {seed})"


def _images_of(folder: Path, most: int | None = None) -> tuple[list[str], list[Skip]]:
    """`list_images` of a class folder; at least one, or DownresError."""
    found, left_out = list_images(folder, most=most)
    if not found:
        but = f", but {len(left_out)} other files ({left_out[0].path}: {left_out[0].reason})" if left_out else ""
        raise DownresError(
            f"The class folder {folder} holds no images ({', '.join(EXTENSIONS)}){but}: add some, or remove the folder."
        )
    return found, left_out
