"""Class folders, or arrays, to a `Dataset`: pictures, labels as indices into the network's outputs, and folds."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DownresError
from ...images.decode import EXTENSIONS
from ...images.images import Images, Progress, Skip, from_files
from ...images.parts import (
    PARTS,
    WHOLE,
    File,
    as_found,
    divide,
    how_found,
    is_hidden,
    is_image,
    listed_names,
    subfolders,
    without_unreadable,
)
from ...images.split import Fold

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
        digest = hashlib.sha256()
        for name, checksum in zip(self.images.names, self.images.checksums, strict=True):
            digest.update(f"{name}\0{checksum}\n".encode(errors="surrogateescape"))
        digest.update("\0".join(self.classes).encode())
        for indices in (self.labels, *(side for fold in self.folds for side in (fold.train, fold.test))):
            digest.update(f"\n{len(indices)}\n".encode() + indices.astype("<i8").tobytes())
        return digest.hexdigest()


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
    progress: Progress | None = None,
) -> Dataset:
    """The pictures of DIR/train/CLASS/* and DIR/val/CLASS/*, or of DIR/CLASS/*, each decoded once.

    outputs: of the network, which the class folders must match; None accepts any number. ImageNet's folder names
    (n01440764) are mapped to the 1000 outputs, any subset of them. parts: what is needed; ("val",) decodes no training
    image and leaves fold.train empty. One folder of classes, or only one of train and val, is split with `val_fraction`
    and `seed`, or into `folds` folds, before unreadable files are left out, so that the split is the same for all
    `parts`. With parts ("val",) and a val_fraction of 1, or folds, every image in it is a test image.
    Raises DownresError, in one sentence that says why, where the folder cannot be used.
    """
    root = Path(path).expanduser()
    sources = _sources(root)
    if folds is not None and len(sources) > 1:
        raise DownresError(
            f"--folds needs one folder of classes, {root} has both {' and '.join(s.name for s in sources.values())}: "
            "leave --folds out, or point --data to one of the two."
        )
    names = _class_folders(sources)
    output_of, classes = _map_classes(names, outputs)
    files = [
        File(part, label, file, file.relative_to(root).as_posix())
        for part, source in sources.items()
        if len(sources) == 1 or part in parts
        for label, name in enumerate(names)
        for file in sorted(_image_files(source / name))
    ]
    labels = np.array([output_of[file.label] for file in files], dtype=np.int64)
    if len(sources) > 1:
        listed = as_found([file.part for file in files])
    else:
        listed = divide(labels, parts, val_fraction, folds, seed)
    needed = np.unique(np.concatenate([side for fold in listed for side in (fold.train, fold.test)]))
    images, skipped = from_files([files[i].path for i in needed], [files[i].name for i in needed], progress)
    reasons = {skip.path: skip.reason for skip in skipped}
    _check_readable(files, reasons)
    kept = np.array([i for i in needed if files[i].name not in reasons], dtype=np.int64)
    divided = without_unreadable(listed, kept, files, reasons)

    count = f"{len(kept)} images of {len(names)} classes"
    if len(sources) > 1:
        how = how_found(divided[0], sources)
    else:
        (source,) = sources.values()
        count += " in one folder" if source == root else f", {source.name} only"
        how = _how_divided(divided, len(listed[0].test) == len(files), len(files), folds, seed)
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
    sources = _sources(Path(path).expanduser())
    names = _class_folders(sources)
    _map_classes(names, outputs)
    for source in sources.values():
        for name in names:
            next(_image_files(source / name))
    return tuple(names)


def _sources(root: Path) -> dict[str, Path]:
    """The folders that hold class folders: train, val or both, or else the root itself as WHOLE."""
    if not root.exists():
        raise DownresError(
            f"There is no folder {root}: point --data to a folder that holds one folder of images for each class."
        )
    if not root.is_dir():
        raise DownresError(
            f"{root} is a file and --data needs a folder: give one that holds one folder of images for each class."
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
        raise DownresError(f"{root} holds no class folders and no images: point --data to one folder of images for each class.")
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
            f"pass --fit-head to fit a new linear head for them, or point --data to a folder with {outputs} class folders."
        )
    return list(range(len(names))), tuple(names)


def _check_readable(files: Sequence[File], reasons: dict[str, str]) -> None:
    """Raise DownresError when all files of a class in a part are among `reasons`, by name, why they cannot be read."""
    readable = {(file.part, file.label) for file in files if file.name not in reasons}
    for file in files:
        if (file.part, file.label) not in readable:
            raise DownresError(
                f"None of the images of class {file.path.parent.name} can be read ({file.name}: {reasons[file.name]}): "
                "replace them, or remove the folder."
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


def _image_files(folder: Path) -> Iterator[Path]:
    """The image files in a class folder and the folders in it, in no order; at least one, or DownresError."""
    empty = True
    for path in folder.rglob("*"):
        if is_image(path) and not is_hidden(path.relative_to(folder)):
            empty = False
            yield path
    if empty:
        raise DownresError(
            f"The class folder {folder} holds no images ({', '.join(EXTENSIONS)}): add some, or remove the folder."
        )
