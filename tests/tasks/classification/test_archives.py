"""Shards, ImageNet's own tars, parquet and Arrow: found, divided by hashes, read in place, refused in a sentence."""

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import IterableDataset

import downres
from downres import DownresError, check, evaluate, search
from downres.images import archives, decode, tars
from downres.images.archives import find_archives, matched
from downres.images.index import index_of
from downres.images.split import digest, drawn
from downres.searching.doctor import _some_pictures
from downres.tasks.agreement.photos import open_photos
from downres.tasks.classification import folders
from downres.tasks.classification.archives import open_archives
from downres.tasks.classification.task import Classification

from ..conftest import Colours, model_of

WNIDS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices are kept here, not with the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(i: int, label: int = 0) -> bytes:
    """A picture whose brightest channel is its label, no two the same."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 150, (20, 24, 3))
    pixels[:, :, label] += 80
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            told = tarfile.TarInfo(name)
            told.size = len(content)
            tar.addfile(told, io.BytesIO(content))
    return path


def sample(i: int, how: str = "cls", key: str | None = None) -> list[tuple[str, bytes]]:
    label, key = int(i) % 3, key or f"s{i:04d}"
    beside = {"cls": str(label).encode(), "json": json.dumps({"label": label, "caption": "a, b"}).encode(), "": b""}[how]
    return [(f"{key}.png", png(i, label)), *([(f"{key}.{how}", beside)] if how else [])]


def shards(folder: Path, order: Any, size: int = 10, name: str = "shard-{:03d}.tar", how: str = "cls") -> Path:
    """Shards of `size` samples each, in that order."""
    numbers = list(order)
    for start in range(0, len(numbers), size):
        members = [member for i in numbers[start : start + size] for member in sample(i, how)]
        write_tar(folder / name.format(start // size), members)
    return folder


def opened(data: Any, outputs: int | None = 3, **options: Any) -> folders.Dataset:
    found = find_archives(data)
    assert found is not None
    return open_archives(found, outputs=outputs, **options)


def sides(data: Any) -> dict[str, tuple[str, ...]]:
    """The names that are proof, tune and are fitted on."""
    (fold,) = data.folds
    names = np.array(data.images.names)
    tuning = data.tuning[fold.train]
    return {
        "proof": tuple(names[fold.test]),
        "tune": tuple(names[fold.train[tuning]]),
        "fit": tuple(names[fold.train[~tuning]]),
    }


# Division


def test_drawn_numbers_are_uniform_and_pinned() -> None:
    digests = np.array([digest(f"key {i}") for i in range(20_000)], np.uint64)
    one, other, again = drawn(digests, 0, 0), drawn(digests, 1, 0), drawn(digests, 0, 1)
    for numbers in (one, other, again):
        assert 0 <= numbers.min() and numbers.max() < 1
        counts = np.histogram(numbers, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square of 19 degrees: one in a thousand is above 43.8
    for pair in ((one, other), (one, again)):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.03
    # The same on every machine, for ever: another number would move images out of the proof of shipped models.
    assert digest("key 0") == 0x963118729AFD60EA
    assert drawn(digests[:2], 7, 0).tolist() == [0.8142947659123992, 0.9416766698579595]


def test_the_division_depends_on_neither_order_nor_number_of_shards(tmp_path: Path) -> None:
    straight = opened(shards(tmp_path / "a", range(60)))
    mixed = opened(shards(tmp_path / "b", np.random.default_rng(1).permutation(60), size=7, how="json"))
    assert straight.fingerprint() == mixed.fingerprint()
    assert sides(straight) == sides(mixed) and all(sides(straight).values())
    assert sides(opened(tmp_path / "a", seed=1)) != sides(straight)
    assert straight.labels.tolist() == [int(name[1:5]) % 3 for name in straight.images.names]
    assert "by the hash of each one's key and the seed (0), so that classes have nearly the same shares" in straight.description


def test_images_that_are_added_move_no_other(tmp_path: Path) -> None:
    before, after = sides(opened(shards(tmp_path / "a", range(50)))), sides(opened(shards(tmp_path / "b", range(80))))
    for name, names in before.items():
        assert set(names) <= set(after[name])


def test_fit_and_tune_are_as_the_hash_tells_in_every_task(tmp_path: Path) -> None:
    data = opened(shards(tmp_path, range(60)))
    task = Classification(None, 3)
    task.begin(data, 0)
    fit, tune = task.split(data.folds[0])
    assert tuple(data.images.names[i] for i in tune) == sides(data)["tune"]
    assert sorted([*fit, *tune]) == data.folds[0].train.tolist()
    photos = open_photos(tmp_path)
    assert sides(photos) == sides(data)
    assert "labels not looked at" in photos.description


def test_a_fold_each_and_all_to_test_on(tmp_path: Path) -> None:
    shards(tmp_path, range(40))
    folded = opened(tmp_path, folds=3)
    tests = [fold.test for fold in folded.folds]
    assert sorted(np.concatenate(tests)) == list(range(40))
    assert all(not set(fold.test) & set(fold.train) for fold in folded.folds)
    (whole,) = opened(tmp_path, parts=("val",), val_fraction=1.0).folds
    assert len(whole.test) == 40 and not len(whole.train)
    with pytest.raises(DownresError, match=r"from 2 to the number of images, 40, and 41 is not"):
        opened(tmp_path, folds=41)
    with pytest.raises(DownresError, match=r"between 0 and 1, 1\.0 is not"):
        opened(tmp_path, val_fraction=1.0)


def test_of_very_many_those_of_the_lowest_numbers_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path, range(120))
    all_of_them = sides(opened(tmp_path))
    for name, most in {"PROOF_IMAGES": 20, "TRAINING_IMAGES": 16, "TUNING_IMAGES": 4}.items():
        monkeypatch.setattr(archives, name, most)
    data = opened(tmp_path)
    some = sides(data)
    assert {name: len(names) for name, names in some.items()} == {"proof": 20, "tune": 4, "fit": 12}
    assert all(set(names) < set(all_of_them[name]) for name, names in some.items())
    assert len(data.images) == 36
    n = len(all_of_them["proof"])
    assert f"16 of {120 - n} to fit on and 20 of {n} to test on" in data.description
    assert len(opened(tmp_path, train_images=10**9).folds[0].train) == 120 - n  # who trains from scratch takes all
    named = sides(opened(tmp_path, train_images=24))
    assert {name: len(names) for name, names in named.items()} == {"proof": 20, "tune": 6, "fit": 18}


def test_what_shows_the_same_is_on_one_side(tmp_path: Path) -> None:
    shards(tmp_path, range(30))
    before = sides(opened(tmp_path))
    copied, own = int(before["proof"][0][1:5]), int(before["fit"][0][1:5])
    keys = (f"copy{i}" for i in range(100))
    to_fit = next(k for k in keys if drawn(np.array([digest(k)], np.uint64), 0, 0)[0] >= 0.5)
    write_tar(tmp_path / "more.tar", [*sample(copied, key=to_fit), *sample(own, key=to_fit + "x")])
    data = opened(tmp_path)
    assert f"{to_fit}.png" not in sides(data)["fit"] + sides(data)["tune"] + sides(data)["proof"]
    assert before["proof"][0] in sides(data)["proof"]
    assert "1 with the pixels of an image to test on are not fitted on" in data.description


# What `data` names


def test_files_by_folder_name_pattern_and_part(tmp_path: Path) -> None:
    folder = shards(tmp_path / "up" / "w", range(30))
    whole = opened(folder).fingerprint()
    for name in (
        folder / "*.tar",
        folder / "shard-{000..002}.tar",
        f"{folder}/shard-00[0-2].tar",
        folder.parent,
    ):
        assert opened(name).fingerprint() == whole
    assert len(opened(folder / "shard-{000,002}.tar").labels) == 20
    assert len(opened(folder / "shard-001.tar").labels) == 10
    assert matched(f"{folder}/shard-{{0..2}}.tar") == []
    with pytest.raises(DownresError, match="No file is called"):
        find_archives(folder / "other-{000..002}.tar")
    with pytest.raises(DownresError, match="more than a million files"):
        find_archives(tmp_path / "{0..99999999}.tar")
    assert find_archives("demo:elpv") is None and find_archives(tmp_path / "nothing") is None and find_archives(3) is None


@pytest.mark.parametrize(
    "train, val",
    [
        ("set-train-{:03d}.tar", "set-validation-{:03d}.tar"),
        ("train/set-{:03d}.tar", "val/set-{:03d}.tar"),
        ("train/train-{:03d}.tar", "test/test-{:03d}.tar"),
    ],
)
def test_parts_are_told_by_names(tmp_path: Path, train: str, val: str) -> None:
    shards(tmp_path, range(20), name=train)
    shards(tmp_path, range(20, 30), name=val)
    data = opened(tmp_path)
    assert set(sides(data)["proof"]) == {f"s{i:04d}.png" for i in range(20, 30)}
    assert len(data.folds[0].train) == 20
    with pytest.raises(DownresError, match="leave `folds` out"):
        opened(tmp_path, folds=2)


def test_a_folder_of_pictures_is_one_whatever_lies_beside(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for i in range(2):
            (tmp_path / f"class{label}" / f"{i}.png").write_bytes(png(4 * label + i))
    write_tar(tmp_path / "photos.tar", sample(1))
    assert find_archives(tmp_path) is None
    assert len(folders.open_folder(tmp_path, outputs=None).labels) == 4


def test_class_folders_in_a_tar_and_parts_in_it(tmp_path: Path) -> None:
    flat = write_tar(tmp_path / "flat.tar", [(f"photos/{'abc'[i % 3]}/{i}.png", png(i, i % 3)) for i in range(30)])
    data = opened(flat)
    assert data.classes == ("a", "b", "c") and len(data.labels) == 30
    assert "alphabetical order: 0 a, 1 b, 2 c" in data.description
    members = [(f"{'train' if i < 20 else 'val'}/{'abc'[i % 3]}/{i}.png", png(i, i % 3)) for i in range(30)]
    (fold,) = opened(write_tar(tmp_path / "parts.tar", members)).folds
    assert (len(fold.train), len(fold.test)) == (20, 10)


def test_from_python_by_name_and_in_doctor(tmp_path: Path) -> None:
    shards(tmp_path / "w", range(60))
    assert downres.open_archives(tmp_path / "w", outputs=3).fingerprint() == opened(tmp_path / "w").fingerprint()
    with pytest.raises(DownresError, match="holds no .tar, .parquet or .arrow files"):
        downres.open_archives(tmp_path / "nothing", outputs=3)
    some = _some_pictures(tmp_path / "w")
    assert len(some) == 32 and len({decode(one).tobytes() for one in some}) == 32


# The index


def test_a_tar_is_scanned_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shards(tmp_path / "w", range(10)) / "shard-000.tar"
    found = index_of(file, tars.scan)
    assert [found.name(i) for i in (0, 9)] == ["s0000.png", "s0009.png"]
    (kept,) = (cache / "downres" / "index").iterdir()
    monkeypatch.setattr(tars, "_read", lambda *_: pytest.fail("scanned again"))
    again = index_of(file, tars.scan)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kept.write_bytes(kept.read_bytes()[:100])
    assert index_of(file, tars.scan).name(9) == "s0009.png"
    os.utime(file, (1, 1))
    shards(tmp_path / "w", range(20, 30))
    assert index_of(file, tars.scan).name(0) == "s0020.png"


def test_nothing_is_unpacked_and_a_way_out_is_a_name(tmp_path: Path) -> None:
    names = ["../../out.png", "/etc/out.png", "a/../b.png"]
    found = tars.scan(write_tar(tmp_path / "w" / "x.tar", [(name, png(i)) for i, name in enumerate(names)]))
    assert [found.name(i) for i in range(3)] == ["out.png", "etc/out.png", "b.png"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["w", "x.tar"]


# Hostile


def counts(path: Path) -> dict[str, int]:
    return dict(tars.scan(path).counts)


def test_what_is_no_sample_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [member for i in range(20) for member in sample(i)]
    members += [
        *sample(30, how=""),
        ("two.cls", b"1 2"), ("two.png", png(31)),
        ("apart.png", png(32)), ("apart.cls", b"1"), ("apart.json", b'{"label": 2}'),
        ("none.cls", b"-1"), ("none.png", png(33)),
        ("alone.cls", b"1"),
        ("notes.md", b"#"), ("._s.png", b"x"),
        ("pair.left.png", png(34)), ("pair.right.png", png(35)), ("pair.cls", b"0"),
        ("broken.png", b"no picture"), ("broken.cls", b"1"), ("empty.png", b""), ("empty.cls", b"1"),
        ("again.png", png(36)), ("again.png", png(37)), ("again.cls", b"1"),
    ]  # fmt: skip
    data = opened(write_tar(tmp_path / "x.tar", members))
    assert len(data.labels) == 21
    reasons = {skip.path.partition(": ")[2]: skip.reason for skip in data.skipped}
    assert reasons == {
        "s0030.png": "no label", "two.png": "two labels", "apart.png": "two labels", "none.png": "no label",
        "alone": "a label without an image", "notes.md": "no image", "pair": "several images under one key",
        "broken.png": "not an image", "empty.png": "empty file", "again.png": "the same name again",
    }  # fmt: skip
    assert "2 unreadable left out" in data.description and "8 others left out" in data.description


def test_links_and_devices_are_no_pictures(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample(1))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            told = tarfile.TarInfo(name)
            told.type, told.linkname = kind, "/etc/passwd"
            tar.addfile(told)
    assert counts(path) == {"a link, or another thing that is no file": 3}


def test_truncated_broken_and_appended_tars_say_so(tmp_path: Path) -> None:
    whole = shards(tmp_path / "w", range(6)) / "shard-000.tar"
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last, end = tar.getmembers()[-2], tar.offset
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: last.offset_data + 10])
    assert len(tars.scan(cut).digests) == 5 and counts(cut)["truncated"] >= 1
    cut.write_bytes(content[: last.offset])
    assert list(counts(cut)) == ["the end of the archive is missing: it may be truncated"]
    cut.write_bytes(content[: last.offset] + b"\1" * 512 + content[last.offset + 512 :])
    assert list(counts(cut)) == ["broken, what follows is lost"]
    cut.write_bytes(content + content)
    assert list(counts(cut)) == ["more behind its end: another archive was appended"]
    cut.write_bytes(content[:end] + b"\0" * 1024)
    assert counts(cut) == {}


@pytest.mark.parametrize("seed", range(40))
def test_a_tar_with_flipped_bytes_ends(tmp_path: Path, seed: int) -> None:
    content = bytearray((shards(tmp_path, range(4)) / "shard-000.tar").read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(content), 40):
        content[at] = rng.integers(256)
    start = 512 * rng.integers(0, 20)
    content[start + 124 : start + 136] = b"\xff" + rng.bytes(11)  # a negative size
    (tmp_path / "shard-000.tar").write_bytes(content)
    try:
        found = tars.scan(tmp_path / "shard-000.tar")
    except DownresError:
        return
    assert (found.length >= 0).all() and (found.start >= 0).all()


def test_what_has_no_random_access_is_refused(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a" / "x.tar", sample(1)).read_bytes()
    for name in ("x.tar.gz", "x.tgz"):
        (tmp_path / "gz").mkdir(exist_ok=True)
        (tmp_path / "gz" / name).write_bytes(gzip.compress(plain))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.tar").write_bytes(gzip.compress(plain))
    for data in (tmp_path / "gz", tmp_path / "gz" / "x.tgz", tmp_path / "gz" / "*.tar.gz"):
        with pytest.raises(DownresError, match="no picture in it can be read without all before it"):
            find_archives(data)
    with pytest.raises(DownresError, match="compressed by gzip"):
        opened(tmp_path / "b")
    for content in (b"", b"text\n" * 500):
        (tmp_path / "b" / "x.tar").write_bytes(content)
        with pytest.raises(DownresError, match=r"x\.tar is no tar"):
            opened(tmp_path / "b")


@pytest.mark.parametrize(
    "labels, outputs, said",
    [
        (["0", "1", "7"], 3, "labels up to 7, the network 3 outputs"),
        (["0.5", "1", "2"], 3, r"The label 0\.5 .* is no class"),
        (["cat", "dog", "cat"], 3, r"3 outputs and .* 2 classes \(cat, dog\)"),
        (["cat", "cat", "cat"], None, r"at least 2 classes, .* has 1 \(cat\)"),
        (["0", "1", "999999999"], None, "beyond 100000 classes"),
        (["-1", "", "-1"], 3, r"None of the 3 images .* has one label \(no label: 3\)"),
    ],
)
def test_labels_that_are_no_classes_of_the_network(tmp_path: Path, labels: list[str], outputs: int | None, said: str) -> None:
    members = [
        (f"{i}.{kind}", png(i) if kind == "png" else v.encode()) for i, v in enumerate(labels) for kind in ("png", "cls")
    ]
    with pytest.raises(DownresError, match=said):
        opened(write_tar(tmp_path / "x.tar", members), outputs)


def test_empty_shards_one_key_and_one_side(tmp_path: Path) -> None:
    shards(tmp_path / "w", range(30))
    before = opened(tmp_path / "w").fingerprint()
    write_tar(tmp_path / "w" / "empty.tar", [])
    assert opened(tmp_path / "w").fingerprint() == before
    with pytest.raises(DownresError, match="There are no images in the 1 files"):
        opened(write_tar(tmp_path / "e" / "empty.tar", []))
    for i in range(3):
        write_tar(tmp_path / "same" / f"{i}.tar", sample(i, key="0"))
    with pytest.raises(DownresError, match="by the hashes of their 1 keys"):
        opened(tmp_path / "same")


def test_numbers_from_zero_in_every_shard_are_groups(tmp_path: Path) -> None:
    for i in range(3):
        members = [member for k in range(20) for member in sample(20 * i + k, key=f"{k:03d}")]
        write_tar(tmp_path / f"{i}.tar", members)
    data = opened(tmp_path)
    assert len(data.labels) == 60
    assert not set(sides(data)["proof"]) & set(sides(data)["fit"])


class Stream:
    def __iter__(self) -> Any:
        return iter(())


class Pipeline(IterableDataset):
    """As WebDataset's: it may say its length, and has PyTorch's __getitem__, which is none."""

    __iter__ = Stream.__iter__

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("stream", [Stream(), Pipeline()])
def test_a_stream_is_refused_with_what_to_give(stream: Any) -> None:
    with pytest.raises(DownresError, match=r"A \w+ gives its items one after the other.*without streaming"):
        evaluate(model_of(Colours(), outputs=3), stream)


# ImageNet's own


def imagenet(folder: Path) -> Path:
    """Its train.tar of 3 classes' tars, and its val.tar."""
    for _ in range(1):
        members = []
        for label, wnid in enumerate(WNIDS):
            names = [(f"{wnid}_{i}.JPEG", png(100 * label + i, label)) for i in range(8)]
            inner = write_tar(folder / "inner.tar", names)
            members.append((f"{wnid}.tar", inner.read_bytes()))
            inner.unlink()
        write_tar(folder / "ILSVRC2012_img_train.tar", members)
        names = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", png(500 + i, i % 3)) for i in range(9)]
        write_tar(folder / "ILSVRC2012_img_val.tar", names)
    write_tar(folder / "ILSVRC2012_img_test_v10102019.tar", [("test/ILSVRC2012_test_00000001.JPEG", png(900))])
    return folder


def devkit() -> tuple[bytes, bytes]:
    """(ground truth, meta.mat) whose numbers are in no order of names, with a class of classes among them."""
    from scipy.io import savemat

    kinds = np.dtype([("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)])
    rows = [(1, WNIDS[2], "c", 0), (2, WNIDS[0], "a", 0), (3, WNIDS[1], "b", 0), (4, "n00000001", "all", 3)]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, kinds).reshape(-1, 1)})
    number = {0: 2, 1: 3, 2: 1}
    return "\n".join(str(number[i % 3]) for i in range(9)).encode(), file.getvalue()


@pytest.mark.parametrize("how", ["solution", "packed", "unpacked", "beside"])
def test_imagenet_in_its_own_tars(tmp_path: Path, how: str) -> None:
    folder = imagenet(tmp_path / "imagenet")
    with pytest.raises(DownresError, match=r"carry no labels.*put LOC_val_solution\.csv"):
        opened(folder, 1000)
    truth, meta = devkit()
    inside = [("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)]
    inside.append(("ILSVRC2012_devkit_t12/data/meta.mat", meta))
    if how == "solution":
        rows = [f"ILSVRC2012_val_{i + 1:08d},{WNIDS[i % 3]} 1 2 3 4 {WNIDS[0]} 1 2 3 4" for i in range(9)]
        (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    elif how == "packed":
        packed = write_tar(folder / "x.tar", inside)
        (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(packed.read_bytes()))
        packed.unlink()
    else:
        for name, content in inside:
            file = folder / (name if how == "unpacked" else Path(name).name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    data = opened(folder, 1000)
    (fold,) = data.folds
    assert (len(fold.train), len(fold.test)) == (24, 9)
    assert len(data.classes) == 1000 and data.classes[0].startswith("tench")
    for name, label, picture in zip(data.images.names, data.labels, data.images, strict=True):
        assert picture.mean((0, 1)).argmax() == label, name
    assert "n01440764/n01440764_0.JPEG" in data.images.names
    assert "24 in ILSVRC-img-train to fit on and 9 in ILSVRC-img-val to test on" in data.description
    assert "not used: ILSVRC2012_img_test_v10102019.tar" in data.description
    proof_alone = opened(folder / "ILSVRC2012_img_val.tar", 1000, parts=("val",), val_fraction=1.0)
    assert len(proof_alone.labels) == 9


# Columns


def table(folder: Path, numbers: Any, features: bool = True, path: bool = True) -> Any:
    pa = pytest.importorskip("pyarrow")
    rows = [{"bytes": png(i, i % 3), "path": f"{i:04d}.png" if path else None} for i in numbers]
    columns = {
        "image": pa.array(rows),
        "label": pa.array([i % 3 for i in numbers], pa.int64()),
        "note": pa.array(["x"] * len(rows)),
    }
    names = {"names": ["red", "green", "blue"], "_type": "ClassLabel"}
    told = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    folder.mkdir(parents=True, exist_ok=True)
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(told)} if features else None)


def parquet(folder: Path, numbers: Any, size: int = 25, group: int = 4, name: str = "data-{:05d}.parquet", **how: Any) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    numbers = list(numbers)
    for start in range(0, len(numbers), size):
        pq.write_table(
            table(folder, numbers[start : start + size], **how), folder / name.format(start // size), row_group_size=group
        )
    return folder


@pytest.mark.parametrize("path", [True, False], ids=["path", "content"])
def test_parquet(tmp_path: Path, path: bool) -> None:
    one = opened(parquet(tmp_path / "a", range(50), path=path))
    other = opened(parquet(tmp_path / "b", range(49, -1, -1), size=9, group=3, path=path))
    assert one.classes == ("red", "green", "blue") and sides(one) == sides(other) and one.fingerprint() == other.fingerprint()
    for label, picture in zip(one.labels, one.images, strict=True):
        assert picture.mean((0, 1)).argmax() == label
    with pytest.raises(DownresError, match=r"5 outputs and .* 3 classes \(red, green, blue\)"):
        opened(tmp_path / "a", 5)
    small = opened(tmp_path / "a", cache_gb=0.0)
    assert all(np.array_equal(a, b) for a, b in zip(small.images, one.images, strict=True))


def test_parquet_parts_as_the_hub_names_them(tmp_path: Path) -> None:
    parquet(tmp_path / "data", range(20), name="train-{:05d}-of-00001.parquet")
    parquet(tmp_path / "data", range(20, 30), name="validation-{:05d}-of-00001.parquet")
    parquet(tmp_path / "data", range(30, 40), name="test-{:05d}-of-00001.parquet")
    data = opened(tmp_path)
    assert set(sides(data)["proof"]) == {f"{i:04d}.png" for i in range(20, 30)}
    assert "not used: test-00000-of-00001.parquet" in data.description


def test_parquet_without_features_and_what_is_none(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert opened(parquet(tmp_path / "a", range(20), features=False)).classes == ("0", "1", "2")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DownresError, match=r"x\.parquet cannot be read"):
        opened(tmp_path / "b")
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "b" / "x.parquet")
    with pytest.raises(DownresError, match="has no column of pictures among label"):
        opened(tmp_path / "b")
    rows = [{"bytes": png(i, i % 3) if i else None, "path": f"{i}.png"} for i in range(20)]
    labels = [None if i == 1 else [i % 3] if i == 2 else [0, 1] if i == 3 else [i % 3] for i in range(20)]
    pq.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "b" / "x.parquet")
    data = opened(tmp_path / "b")
    assert {skip.path.partition(": ")[2]: skip.reason for skip in data.skipped} == {
        "0.png": "the row has a path in the place of the picture", "1.png": "no label", "3.png": "two labels",
    }  # fmt: skip
    assert len(data.labels) == 17


def test_a_saved_dataset_of_one_part_and_of_several(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")

    def save(folder: Path, numbers: range) -> None:
        found = table(folder, numbers)
        with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, found.schema) as out:
            out.write_table(found, max_chunksize=7)
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))

    save(tmp_path / "one", range(30))
    assert sides(opened(tmp_path / "one")) == sides(opened(parquet(tmp_path / "p", range(30))))
    save(tmp_path / "several" / "train", range(20))
    save(tmp_path / "several" / "test", range(20, 30))
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(opened(tmp_path / "several").folds[0].test) == 10
    state = tmp_path / "one" / "state.json"
    for name in ("../p/data-00000.parquet", "/etc/passwd", 3):
        state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DownresError, match="looks like a saved dataset and cannot be read"):
            find_archives(tmp_path / "one")


def test_without_pyarrow_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DownresError, match=r"pip install 'downres\[datasets\]'"):
        opened(tmp_path)


# Through the whole


def test_searched_shipped_and_proven_again_from_shards_in_another_order(tmp_path: Path) -> None:
    shards(tmp_path / "w", range(40))
    model = model_of(Colours(), outputs=3)
    data = f"{tmp_path}/w/shard-{{000..003}}.tar"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        run = search(
            model, data, max_drop=60.0, resolutions=[16], out=tmp_path / "run", runtime="torch", recover="none", threads=1
        )
    assert run.artifact is not None
    source = json.loads((run.artifact / "manifest.json").read_text())["source"]["data"]
    assert source["path"].endswith("shard-{000..003}.tar")
    shutil.rmtree(tmp_path / "w")
    shards(tmp_path / "w", range(39, -1, -1), size=20, how="json")
    findings = {finding.what: finding.ok for finding in check(run.artifact, model=model, data=tmp_path / "w", threads=1)}
    assert findings["quality"] and findings["serve.py = predict"] is not False
    shards(tmp_path / "w", range(1, 41), size=20)
    with pytest.raises(DownresError, match="not those that the quality was measured on"):
        check(run.artifact, model=model, data=tmp_path / "w", threads=1)


def test_evaluated_on_all_without_fitting(tmp_path: Path) -> None:
    shards(tmp_path, range(30))
    found = evaluate(model_of(Colours(), outputs=3), tmp_path, runtime="torch", threads=1)
    assert (found.n, found.correct) == (30, 30)  # type: ignore[attr-defined]


# What strangers' archives look like


def in_tar(path: Path, folders_of: Any, each: int = 6) -> Path:
    """A tar with so many pictures in each of some folders, named by the numbers that they show."""
    members = [(f"{folder}/{i * each + k}.png", png(i * each + k)) for i, folder in enumerate(folders_of) for k in range(each)]
    return write_tar(path, members)


def test_parts_below_a_wrapper_are_parts(tmp_path: Path) -> None:
    inner = tmp_path / "wrap" / "imagenet"
    shards(inner / "train", range(24))
    shards(inner / "val", range(24, 48))
    for place in (tmp_path / "wrap", inner):
        (fold,) = opened(place).folds
        assert (len(fold.train), len(fold.test)) == (24, 24)


@pytest.mark.parametrize("train, val", [("train", "test"), ("seg_train", "seg_test"), ("photos/Training", "photos/Validation")])
def test_a_tar_is_read_as_the_same_folders_are(tmp_path: Path, train: str, val: str) -> None:
    """Parts as people call them, then the class, whatever is below it; names in alphabetical order, numbers too."""
    names = ["10", "2", "cat"]
    members = [
        (f"{part}/{name}/images/{p}{i}{k}.png", png(40 * p + 8 * i + k))
        for p, part in enumerate((train, val))
        for i, name in enumerate(names)
        for k in range(4)
    ]
    for name, content in members:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    there = folders.open_folder(tmp_path / "folder", outputs=3)
    data = opened(write_tar(tmp_path / "t.tar", members))
    assert data.classes == there.classes == ("10", "2", "cat")
    for one in (data, there):
        (fold,) = one.folds
        assert (len(fold.train), len(fold.test)) == (12, 12)
        assert np.bincount(one.labels[fold.train]).tolist() == [4, 4, 4]
    numbered = opened(in_tar(tmp_path / "n.tar", map(str, range(11))), outputs=11)
    assert numbered.classes[2] == "10" and "2 10" in numbered.description


def test_other_parts_and_stray_pictures_are_left_out(tmp_path: Path) -> None:
    tar = in_tar(tmp_path / "t.tar", ["train/a", "train/b", "val/a", "val/b", "test/a", "test/b"])
    data = opened(tar, outputs=2)
    assert len(data.labels) == 24 and "in a part that is not used: 12" in data.description
    names = ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png", "__MACOSX/a/1.png", "b/.ipynb_checkpoints/3.png"]
    stray = write_tar(tmp_path / "s.tar", [(name, png(i)) for i, name in enumerate(names)])
    found = opened(stray, outputs=2, parts=("val",), val_fraction=1.0)
    assert len(found.labels) == 4 and found.classes == ("a", "b") and "no label: 1" in found.description


def test_a_tar_that_was_replaced_with_its_time_kept_is_scanned_again(tmp_path: Path) -> None:
    tar, other = tmp_path / "t.tar", tmp_path / "other"
    write_tar(tar, [one for i in range(9) for one in [(f"{i}.png", png(i)), (f"{i}.cls", str(i % 3).encode())]])
    write_tar(other, [one for i in range(9) for one in [(f"{i}.png", png(i)), (f"{i}.cls", str((i + 1) % 3).encode())]])
    before = dict(zip(opened(tar).images.names, opened(tar).labels.tolist(), strict=True))
    status = os.stat(tar)
    assert os.stat(other).st_size == status.st_size
    tar.write_bytes(other.read_bytes())
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = dict(zip(opened(tar).images.names, opened(tar).labels.tolist(), strict=True))
    assert after == {name: (label + 1) % 3 for name, label in before.items()}


def test_files_that_a_pattern_names_and_are_not_there(tmp_path: Path) -> None:
    shards(tmp_path, range(20))
    with pytest.raises(DownresError, match=r"names 8 that are not there \(shard-002.tar, shard-003.tar"):
        find_archives(tmp_path / "shard-{000..009}.tar")
    with pytest.raises(DownresError, match="names 1 that are not there"):
        find_archives(f"{tmp_path}/{{shard,other}}-*.tar")


def test_masks_beside_pictures_are_no_pictures(tmp_path: Path) -> None:
    members = [(f"{i}.{ending}", content) for i in range(12) for ending, content in (
        ("jpg", png(i)), ("seg.png", png(50 + i)), ("cls", str(i % 3).encode())
    )]  # fmt: skip
    data = opened(write_tar(tmp_path / "t.tar", members))
    assert len(data.labels) == 12 and all(name.endswith(".jpg") for name in data.images.names)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["-1.0"] * 3 + ["0.0", "1.0"] * 3, None),
        (["0 1"] * 6, "has one label .two labels: 6"),
        (["cat", "dog", "0", "1"] * 3, r"are numbers \(0, 1\) and names \(cat, dog\)"),
        (["\ufeff0", "\ufeff1"] * 5, None),
    ],
)
def test_labels_as_strangers_write_them(tmp_path: Path, labels: list[str], said: str | None) -> None:
    members = [one for i, label in enumerate(labels) for one in [(f"{i}.png", png(i)), (f"{i}.cls", label.encode())]]
    tar = write_tar(tmp_path / "t.tar", members)
    if said is not None:
        with pytest.raises(DownresError, match=said):
            opened(tar, outputs=None)
        return
    data = opened(tar, outputs=2)
    assert data.classes == ("0", "1") and set(data.labels.tolist()) == {0, 1}


def test_json_labels_that_are_null_and_seeds(tmp_path: Path) -> None:
    members = [one for i in range(9) for one in [
        (f"{i}.png", png(i)), (f"{i}.json", json.dumps({"label": None, "target": i % 3}).encode())
    ]]  # fmt: skip
    tar = write_tar(tmp_path / "t.tar", members)
    assert len(opened(tar).labels) == 9
    for seed in (-1, 2**70):
        with pytest.raises(DownresError, match="The seed is a whole number"):
            opened(tar, seed=seed)


def test_a_column_that_is_the_class_is_no_key(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet is read by downres[datasets]")
    import pyarrow.parquet as pq

    rows = {"image": [{"bytes": png(i)} for i in range(60)], "label": [i % 3 for i in range(60)]}
    for name in ("name", "id"):
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.table({**rows, name: [f"c{i % 3}" for i in range(60)]}), folder / "a.parquet")
        (fold,) = opened(folder).folds
        assert 15 < len(fold.test) < 45
        data = opened(folder)
        assert set(data.labels[data.folds[0].test].tolist()) == {0, 1, 2}
