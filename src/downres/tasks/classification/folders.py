"""Class folders, or arrays, to a `Dataset`: pictures, labels as indices into the network's outputs, and folds."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DownresError
from ...images.decode import EXTENSIONS
from ...images.images import Images, Progress, Skip, cache_bytes, fingerprint, from_files
from ...images.parts import (
    PARTS,
    TRAINING_IMAGES,
    WHOLE,
    as_found,
    divide,
    how_found,
    how_limited,
    is_image,
    limit_training,
    listed_names,
    looked_at,
    subfolders,
    tested_images,
    without_unreadable,
)  # fmt: skip
from ...images.split import Fold
from ...parse import user_path

_WNID = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled pictures and how they are divided.

    labels: int64 (n,), indices into the network's outputs. classes: a name for each output. folds: one where the data
    is split once, k where it is cross-fitted. skipped: files left out. description: one sentence, for reports.
    """

    images: Images
    labels: np.ndarray
    classes: tuple[str, ...]
    folds: tuple[Fold, ...]
    skipped: tuple[Skip, ...]
    description: str
    licence: str = ""

    def fingerprint(self) -> str:
        """SHA-256, in hex, of names, checksums of the pixels, labels, classes and folds."""
        sides = [side for fold in self.folds for side in (fold.train, fold.test)]
        return fingerprint(self.images, "\0".join(self.classes).encode(), [self.labels, *sides])


def from_arrays(
    images: Images,
    labels: np.ndarray,
    classes: Sequence[str],
    folds: Sequence[Fold],
    description: str,
    licence: str = "",
) -> Dataset:
    """A data set of pictures that are in memory. Raises DownresError where labels, images and classes do not agree."""
    labels = np.asarray(labels, dtype=np.int64)
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
) -> Dataset:
    """The pictures of DIR/train/CLASS/* and DIR/val/CLASS/*, or of DIR/CLASS/*, each decoded once.

    All images to test on are opened, and of those to fit on at most TRAINING_IMAGES in a fold, a stratified sample by
    `seed`: of the others nothing but the name is looked at.

    outputs: of the network, which the class folders must match; None accepts any number. ImageNet's folder names
    (n01440764) are mapped to the 1000 outputs, any subset of them. parts: what is needed; ("val",) decodes no training
    image and leaves fold.train empty. One folder of classes, or only one of train and val, is split with `val_fraction`
    and `seed`, or into `folds` folds, before unreadable files are left out, so that the split is the same for all
    `parts`. With parts ("val",) and a val_fraction of 1, or folds, every image in it is a test image.
    cache_gb: of decoded pixels kept on disk at most; what does not fit is decoded again when it is looked at. None: half of
    what is free where temporary files go.
    Raises DownresError, in one sentence that says why, where the folder cannot be used.
    """
    root = user_path(path)
    sources = _sources(root)
    if folds is not None and len(sources) > 1:
        raise DownresError(
            f"`folds` needs one folder of classes, {root} has both {' and '.join(s.name for s in sources.values())}: "
            "leave `folds` out, or point `data` to one of the two."
        )
    names = _class_folders(sources)
    output_of, classes = _map_classes(names, outputs)
    file_names: list[str] = []
    groups = []  # (part, class) of each run of files, and how many they are
    for part, source in sources.items():
        if len(sources) == 1 or part in parts:
            for label, name in enumerate(names):
                inside = _image_names(source / name)
                prefix = (source / name).relative_to(root).as_posix()
                file_names += [f"{prefix}/{file}" for file in inside]
                groups.append((part, label, len(inside)))
    counts = [count for _, _, count in groups]
    labels = np.repeat([output_of[label] for _, label, _ in groups], counts).astype(np.int64)
    if len(sources) > 1:
        listed = as_found(np.repeat([part for part, _, _ in groups], counts))
    else:
        listed = divide(labels, parts, val_fraction, folds, seed)
    limited = limit_training(listed, labels, TRAINING_IMAGES, seed)
    needed = looked_at(limited)
    tested = np.searchsorted(needed, tested_images(limited))
    opened = [file_names[i] for i in needed]
    images, skipped = from_files(
        [root / name for name in opened], opened, progress, cache=cache_bytes(cache_gb), first=tested
    )  # fmt: skip
    reasons = {skip.path: skip.reason for skip in skipped}
    group_of = np.repeat(np.arange(len(groups)), counts)
    unused = np.setdiff1d(looked_at(listed), needed)
    _check_readable(file_names, np.delete(np.arange(len(file_names)), unused), group_of, names, reasons)
    kept = np.array([i for i in needed if file_names[i] not in reasons], dtype=np.int64)
    divided = without_unreadable(limited, kept, file_names, reasons)

    count = f"{len(kept)} images of {len(names)} classes"
    if len(sources) > 1:
        how = how_found(divided[0], sources)
    else:
        (source,) = sources.values()
        count += " in one folder" if source == root else f", {source.name} only"
        how = _how_divided(divided, len(listed[0].test) == len(labels), len(labels), folds, seed)
    how += how_limited(listed, limited, "stratified", seed)
    left_out = f"; {len(skipped)} unreadable files left out" if skipped else ""
    numbered = ""
    if outputs is not None and classes == tuple(names):  # not mapped by name: a wrong order can only be seen by the reader
        numbered = "; outputs taken to be the class folders in alphabetical order: "
        numbered += listed_names([f"{i} {name}" for i, name in enumerate(names)])
    return Dataset(images, labels[kept], classes, divided, tuple(skipped), f"{count}, {how}{left_out}{numbered}.")


def class_names(path: str | os.PathLike[str], outputs: int | None = None) -> tuple[str, ...]:
    """The names of the class folders, in order, without decoding an image; raises DownresError as `open_folder` does.

    outputs: of the network, which the class folders must match; None accepts any number.
    """
    sources = _sources(user_path(path))
    names = _class_folders(sources)
    _map_classes(names, outputs)
    for source in sources.values():
        for name in names:
            _image_names(source / name, most=1)
    return tuple(names)


def _sources(root: Path) -> dict[str, Path]:
    """The folders that hold class folders: train, val or both, or else the root itself as WHOLE."""
    if not root.exists():
        raise DownresError(
            f"There is no folder {root}: point `data` to a folder that holds one folder of images for each class."
        )
    if not root.is_dir():
        raise DownresError(
            f"{root} is a file and `data` needs a folder: give one that holds one folder of images for each class."
        )
    folders = subfolders(root)
    found = {}
    for part, candidates in PARTS.items():
        # Without class folders in it, `train` may be a class (of vehicles) and `test` unlabelled pictures.
        name = next((name for name in candidates if name in folders and subfolders(root / name)), None)
        if name is not None:
            found[part] = root / name
    if found:
        return found
    if not folders and any(is_image(entry) for entry in root.iterdir()):
        raise DownresError(
            f"The images in {root} are in no class folders: put those of each class into a folder named after it."
        )
    if not folders:
        raise DownresError(f"{root} holds no class folders and no images: point `data` to one folder of images for each class.")
    if set(folders) <= {name for candidates in PARTS.values() for name in candidates}:
        raise DownresError(
            f"{root / folders[0]} holds no class folders: put the images of each class into a folder named after it."
        )
    return {WHOLE: root}


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
    if outputs == _IMAGENET_CLASSES and all(_WNID.fullmatch(name) for name in names):
        from timm.data import ImageNetInfo  # slow to import, and only these data need it

        imagenet = ImageNetInfo("imagenet-1k")
        index = {wnid: i for i, wnid in enumerate(imagenet.label_names())}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise DownresError(
                f"These class folders are not among ImageNet's {_IMAGENET_CLASSES} classes: {listed_names(unknown)}; "
                "remove them, or give weights whose outputs they are."
            )
        return [index[name] for name in names], tuple(imagenet.label_descriptions())
    if outputs is not None and len(names) != outputs:
        raise DownresError(
            f"The weights have {outputs} outputs and the data {len(names)} class folders ({listed_names(names)}): "
            f"pass `fit_head=True` to fit a new linear head for them, or point `data` to a folder with {outputs} class folders."
        )
    return list(range(len(names))), tuple(names)


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


def _image_names(folder: Path, most: int | None = None) -> list[str]:
    """The image files in a class folder and the folders in it, relative to it, sorted; at least one, or DownresError.

    most: stop after so many, whichever they are. No file is asked for more than its name, however many there are.
    """
    found: list[str] = []
    folders = [""]
    while folders and (most is None or len(found) < most):
        inside = folders.pop()
        try:
            entries = os.scandir(folder / inside)
        except PermissionError:
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS):
                    found.append(inside + entry.name)
                    if len(found) == most:
                        break
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inside}{entry.name}/")
    if not found:
        raise DownresError(
            f"The class folder {folder} holds no images ({', '.join(EXTENSIONS)}): add some, or remove the folder."
        )
    # Folder by folder, as paths are sorted: 'a/1.png' before 'a b/1.png'.
    return sorted(found, key=lambda name: name.split("/")) if any("/" in name for name in found) else sorted(found)
