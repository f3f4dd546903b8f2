"""Archives of labelled pictures to a `Dataset`: WebDataset shards, ImageNet's own tars, parquet and Arrow."""

import csv
import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DownresError
from ...images.archives import Archives, Listing, find_archives, list_archives, open_listing
from ...images.index import NO_LABEL, SEVERAL
from ...images.parts import listed_names
from ..table import no_class, number_in
from .folders import Dataset, imagenet_outputs

_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.JPEG", re.IGNORECASE)
_SOLUTION, _DEVKIT, _TRUTH, _META = (
    "LOC_val_solution.csv",
    "ILSVRC2012_devkit_t12",
    "ILSVRC2012_validation_ground_truth.txt",
    "meta.mat",
)
MOST_CLASSES = 100_000
"""That labels may name; more are captions, or keys."""


def archive_classes(archives: Archives, outputs: int | None) -> tuple[str, ...]:
    """The classes in the order of the outputs, without decoding an image; raises DownresError as `open_archives` does."""
    return _labelled(list_archives(archives), outputs)[1]


def open_archives(archives: Archives | str | os.PathLike[str], *, outputs: int | None, **options: Any) -> Dataset:
    """Pictures and labels of archives, divided by hashes of their keys; options as for `open_folder`.

    archives: a .tar, .parquet or .arrow file, several by `shards-{000..146}.tar` or `*`, or a folder of them. outputs: of the
    network, which the labels must fit; None accepts any number. Labels are whole numbers, the outputs' own, or names, which are
    taken in alphabetical order; ImageNet's (n01440764) are mapped to its 1000 outputs. A picture without a label, or with two,
    is left out and counted. Raises DownresError, in one sentence that says why, where the archives cannot be used.
    """
    found_there = archives if isinstance(archives, Archives) else find_archives(archives)
    if found_there is None:
        raise DownresError(f"{archives} holds no .tar, .parquet or .arrow files to read pictures from: name some, or a folder.")
    listing = list_archives(found_there, options.get("progress"))
    output_of, classes, order = _labelled(listing, outputs)
    found = open_listing(listing, **options)
    labels = output_of[listing.labels[found.rows]]
    nearly = ", so that classes have nearly the same shares" if "divided by" in found.how else ""
    description = f"{len(labels)} images of {len(set(labels.tolist()))} classes, {found.how}{nearly}{found.left_out}{order}."
    return Dataset(found.images, labels, classes, found.folds, found.skipped, description, tuning=found.tuning)


def _labelled(listing: Listing, outputs: int | None) -> tuple[np.ndarray, tuple[str, ...], str]:
    """(output of each of the listing's words, name of each output, how names were ordered); rows without one label are left out
    of the listing.
    """
    _imagenet_validation(listing)
    where = listing.archives.root
    before = len(listing)
    read = [None if listing.by_folder else number_in(word) for word in listing.words]
    negative = np.array([number is not None and number < 0 for number in read] + [False], bool)
    unlabelled = (listing.labels == NO_LABEL) | ((listing.labels >= 0) & negative[np.maximum(listing.labels, -1)])
    listing.without(unlabelled, "no label")
    listing.without(listing.labels == SEVERAL, "two labels")
    if not len(listing):
        if not before and not listing.counts:
            raise DownresError(f"There are no images in the {len(listing.files)} files of {where}: point `data` to others.")
        why = ", ".join(f"{reason}: {count}" for reason, count in listing.counts.most_common(3))
        raise DownresError(
            f"None of the {before} images in {where} has one label ({why}): put it beside each picture as KEY.cls, into a "
            "column called label, or use `task='agreement'`, which needs none."
        )
    words = listing.words
    used = np.unique(listing.labels)
    present = [words[i] for i in used]
    output_of = np.full(len(words), -1, np.int64)
    given = listing.classes
    order = ""
    # Folders are in alphabetical order whatever they are called, as those on a disk are, and as networks are trained.
    numbers = [None if listing.by_folder else number_in(word) for word in present]
    some = [number is not None for number in numbers]
    if any(some) and not all(some):
        raise DownresError(
            f"Labels in {where} are numbers ({listed_names([w for w, n in zip(present, some, strict=True) if n], 3)}) and "
            f"names ({listed_names([w for w, n in zip(present, some, strict=True) if not n], 3)}): number all, or name all."
        )
    if all(number is not None for number in numbers):
        for word, number in zip(present, numbers, strict=True):
            if number is None or not float(number).is_integer() or "e" in word.lower():
                raise no_class(f"The label {word} in {where}")
        values = np.array([int(number) for number in numbers if number is not None], np.int64)
        if values.max() >= MOST_CLASSES:
            raise DownresError(
                f"{where} has labels up to {values.max()}, beyond {MOST_CLASSES} classes: number them from 0, or name them."
            )
        count = len(given) or outputs or int(values.max()) + 1
        if outputs is not None and given and len(given) != outputs:
            raise _other_count(outputs, where, given)
        if values.max() >= count:
            raise DownresError(
                f"{where} has labels up to {values.max()}, "
                + (f"and names for {count} classes: correct them." if given else f"the network {count} outputs: ")
                + ("" if given else "number the classes from 0.")
            )
        output_of[used] = values
        mapped = imagenet_outputs(given, outputs) if given else None
        if mapped is not None:
            output_of[used] = np.array(mapped[0], np.int64)[values]
            return output_of, mapped[1], ""
        classes = given or tuple(str(i) for i in range(count))
    else:
        if len(present) > MOST_CLASSES:
            raise DownresError(
                f"{where} has {len(present)} different labels ({listed_names(present, 3)}): a class is one of at most "
                f"{MOST_CLASSES}; give each picture that of its class."
            )
        names = sorted(present)
        mapped = imagenet_outputs(names, outputs)
        if mapped is None:
            if outputs is not None and len(names) != outputs:
                raise _other_count(outputs, where, names)
            mapped = list(range(len(names))), tuple(names)
            if outputs is not None:
                order = "; outputs taken to be the labels in alphabetical order: "
                order += listed_names([f"{i} {name}" for i, name in enumerate(names)])
        place = dict(zip(names, mapped[0], strict=True))
        output_of[used] = [place[word] for word in present]
        classes = mapped[1]
    if len(classes) < 2:
        raise DownresError(f"A classifier needs at least 2 classes, {where} has 1 ({classes[0]}): add images of the others.")
    return output_of, classes, order


def _other_count(outputs: int, where: Path, names: Sequence[str]) -> DownresError:
    return DownresError(
        f"The weights have {outputs} outputs and {where} {len(names)} classes ({listed_names(names)}): pass `fit_head=True` to "
        f"fit a new linear head for them, or point `data` to images of {outputs} classes."
    )


def _imagenet_validation(listing: Listing) -> None:
    """Labels for ImageNet's own validation images, whose tar has none: from the file that came with it."""
    truth: dict[int, str] | None = None
    for number in np.unique(listing.file[listing.labels == NO_LABEL]):
        rows = np.flatnonzero((listing.file == number) & (listing.labels == NO_LABEL))
        index = listing.index(int(number))
        found = [_VALIDATION.fullmatch(index.name(int(i)).rpartition("/")[2]) for i in listing.at[rows]]
        if not any(found):
            continue
        if truth is None:
            truth = _truth(listing.files[number].parent, listing.archives.root)
        known = {word: i for i, word in enumerate(listing.words)}
        for row, match in zip(rows, found, strict=True):
            wnid = truth.get(int(match[1])) if match else None
            if wnid is not None:
                if wnid not in known:
                    known[wnid] = len(listing.words)
                    listing.words.append(wnid)
                listing.labels[row] = known[wnid]


def _truth(*folders: Path) -> dict[int, str]:
    """Number of the validation image to its class (n01440764), by Kaggle's file or by the devkit's, packed or not."""
    looked = dict.fromkeys(place for folder in folders for place in (folder, folder.parent))
    for folder in looked:
        try:
            if (folder / _SOLUTION).is_file():
                return _of_solution((folder / _SOLUTION).read_text())
            for place in (folder, folder / "data", folder / _DEVKIT / "data"):
                if (place / _TRUTH).is_file() and (place / _META).is_file():
                    return _of_devkit((place / _TRUTH).read_text(), (place / _META).read_bytes())
            for packed in (folder / f"{_DEVKIT}.tar.gz", folder / f"{_DEVKIT}.tar"):
                if packed.is_file():
                    with tarfile.open(packed) as tar:
                        truth, meta = (tar.extractfile(f"{_DEVKIT}/data/{name}") for name in (_TRUTH, _META))
                        if truth is not None and meta is not None:
                            return _of_devkit(truth.read().decode(), meta.read())
        except DownresError:
            raise
        except Exception as error:  # what a broken table, archive or MATLAB file raises is not limited to any list
            raise DownresError(
                f"The labels of ImageNet's validation images in {folder} cannot be read ({type(error).__name__}: {error}): "
                f"put {_SOLUTION} or {_DEVKIT}.tar.gz there anew."
            ) from None
    raise DownresError(
        f"ImageNet's validation images carry no labels, and in {folders[0]} is no file of them: put {_SOLUTION} or "
        f"{_DEVKIT}.tar.gz there ({_TRUTH} alone does not say which class has which number)."
    )


def _of_solution(text: str) -> dict[int, str]:
    """ImageId,PredictionString: ILSVRC2012_val_00048981,n03995372 85 1 499 272 …"""
    rows = csv.DictReader(io.StringIO(text))
    return {int(row["ImageId"].rpartition("_")[2]): row["PredictionString"].split()[0] for row in rows}


def _of_devkit(truth: str, meta: bytes) -> dict[int, str]:
    """The devkit numbers classes by ILSVRC2012_ID, in no order of names; its table meta.mat says which is which."""
    from scipy.io import loadmat  # slow to import, and only these data need it

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    return {i: wnid[int(line)] for i, line in enumerate(truth.split(), 1)}
