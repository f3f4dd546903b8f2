import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from downres.errors import DownresError
from downres.images import Fold
from downres.images import images as images_module
from downres.images.images import from_arrays as images_from_arrays
from downres.tasks import Question
from downres.tasks.classification import folders as folders_module
from downres.tasks.classification.elpv import DEMO_DATA, open_elpv
from downres.tasks.classification.folders import Dataset, class_names, from_arrays, open_folder
from downres.tasks.classification.task import Classification


def make(root, tree):
    """Small pictures: {'train/cat': 3} makes train/cat/0.png to 2.png, each of another colour."""
    for folder, count in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (6, 5), (i, len(folder), 7)).save(root / folder / f"{i}.png")
    return root


CAT_AND_DOG = "; outputs taken to be the class folders in alphabetical order: 0 cat, 1 dog"
TRAIN_AND_VAL = {"train/cat": 4, "train/dog": 3, "val/cat": 2, "val/dog": 1}


def data_classes(source):
    """The classes of what a command names as its data."""
    return Classification.names_in(source, Question(), None)


def decoded_names(monkeypatch):
    """The paths that are decoded from now on."""
    calls = Counter()
    decode = images_module.decode

    def counting(path):
        calls[path] += 1
        return decode(path)

    monkeypatch.setattr(images_module, "decode", counting)
    return calls


def test_train_and_val(tmp_path, monkeypatch):
    calls = decoded_names(monkeypatch)
    data = open_folder(make(tmp_path, TRAIN_AND_VAL), outputs=2)
    assert set(calls.values()) == {1} and len(calls) == 10
    assert data.classes == ("cat", "dog")
    assert data.images.names[:5] == [
        "train/cat/0.png",
        "train/cat/1.png",
        "train/cat/2.png",
        "train/cat/3.png",
        "train/dog/0.png",
    ]
    np.testing.assert_array_equal(data.labels, [0, 0, 0, 0, 1, 1, 1, 0, 0, 1])
    (fold,) = data.folds
    np.testing.assert_array_equal(fold.train, range(7))
    np.testing.assert_array_equal(fold.test, [7, 8, 9])
    assert data.labels.dtype == fold.train.dtype == fold.test.dtype == np.int64
    assert data.description == f"10 images of 2 classes, 7 in train to fit on and 3 in val to test on{CAT_AND_DOG}."


def test_val_alone_decodes_no_training_image(tmp_path, monkeypatch):
    calls = decoded_names(monkeypatch)
    data = open_folder(make(tmp_path, TRAIN_AND_VAL), outputs=2, parts=("val",))
    assert {path.parts[-3] for path in calls} == {"val"}
    (fold,) = data.folds
    assert len(fold.train) == 0 and fold.train.dtype == np.int64
    np.testing.assert_array_equal(fold.test, [0, 1, 2])
    assert data.description == f"3 images of 2 classes, 3 in val to test on{CAT_AND_DOG}."


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_val(tmp_path, name):
    data = open_folder(make(tmp_path, {"train/a": 1, "train/b": 1, f"{name}/a": 1, f"{name}/b": 1}), outputs=2)
    assert data.images.names[-1] == f"{name}/b/0.png"
    assert f"2 in {name} to test on" in data.description


def test_val_comes_before_test(tmp_path):
    tree = {f"{part}/{name}": 1 for part in ("train", "val", "test") for name in "ab"}
    data = open_folder(make(tmp_path, tree), outputs=2)
    assert [name.split("/")[0] for name in data.images.names] == ["train", "train", "val", "val"]


def test_one_folder_is_split_reproducibly(tmp_path):
    make(tmp_path, {"cat": 6, "dog": 8})
    data, again = (open_folder(tmp_path, outputs=None, val_fraction=0.25, seed=5) for _ in range(2))
    (fold,) = data.folds
    assert len(fold.train) == 10 and len(fold.test) == 4
    np.testing.assert_array_equal(fold.test, again.folds[0].test)
    assert data.description == (
        "14 images of 2 classes in one folder, split into 10 to fit on and 4 to test on (stratified, seed 5)."
    )


def test_one_folder_in_cross_folds(tmp_path):
    data = open_folder(make(tmp_path, {"cat": 6, "dog": 6}), outputs=None, folds=3)
    assert [len(fold.test) for fold in data.folds] == [4, 4, 4]
    assert data.description == "12 images of 2 classes in one folder, cross-fitted in 3 folds (stratified, seed 0)."


@pytest.mark.parametrize("part", ["train", "val"])
def test_only_one_part_is_split(tmp_path, part):
    data = open_folder(make(tmp_path, {f"{part}/cat": 4, f"{part}/dog": 4}), outputs=2)
    assert len(data.folds[0].train) == len(data.folds[0].test) == 4
    assert data.description.startswith(f"8 images of 2 classes, {part} only, split into 4")


def names_on(data, side):
    return [data.images.names[i] for fold in data.folds for i in getattr(fold, side)]


@pytest.mark.parametrize("broken", [(), ("cat/1.png", "cat/2.png", "dog/0.png", "dog/5.png")])
@pytest.mark.parametrize("prefix", ["", "train/", "val/"])
def test_one_side_of_a_split_is_that_of_the_whole_split(tmp_path, monkeypatch, prefix, broken):
    make(tmp_path, {f"{prefix}cat": 6, f"{prefix}dog": 8})
    intact = open_folder(tmp_path, outputs=None, val_fraction=0.4, seed=3)
    for name in broken:
        (tmp_path / prefix / name).write_bytes(b"")
    both = open_folder(tmp_path, outputs=None, val_fraction=0.4, seed=3)
    for part, side, other in (("val", "test", "train"), ("train", "train", "test")):
        calls = decoded_names(monkeypatch)
        data = open_folder(tmp_path, outputs=None, val_fraction=0.4, seed=3, parts=(part,))
        assert {path.relative_to(tmp_path).as_posix() for path in calls} == set(names_on(intact, side))
        assert names_on(data, side) == names_on(both, side) == data.images.names
        assert names_on(data, other) == [] and getattr(data.folds[0], other).dtype == np.int64
        assert set(names_on(both, side)) == set(names_on(intact, side)) - {prefix + name for name in broken}
        np.testing.assert_array_equal(data.labels, ["dog" in name for name in data.images.names])
    assert len(both.images) == 14 - len(broken)


def test_one_side_is_described_as_such(tmp_path):
    make(tmp_path, {"cat": 6, "dog": 8})
    data = open_folder(tmp_path, outputs=2, val_fraction=0.25, seed=5, parts=("val",))
    assert data.description == (
        f"4 images of 2 classes in one folder, those to test on of a stratified split of 14 (seed 5){CAT_AND_DOG}."
    )


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"folds": 3}])
@pytest.mark.parametrize("prefix", ["", "train/", "val/"])
def test_every_image_is_a_test_image(tmp_path, prefix, options):
    make(tmp_path, {f"{prefix}cat": 2, f"{prefix}dog": 3})
    (tmp_path / prefix / "dog/1.png").write_bytes(b"")
    data = open_folder(tmp_path, outputs=None, parts=("val",), **options)
    (fold,) = data.folds
    assert len(fold.train) == 0
    np.testing.assert_array_equal(fold.test, range(4))
    assert data.description.endswith(", all to test on; 1 unreadable files left out.")


def test_cross_folds_are_those_of_the_listed_files(tmp_path):
    make(tmp_path, {"cat": 6, "dog": 6})
    intact = open_folder(tmp_path, outputs=2, folds=3)
    (tmp_path / "cat/2.png").write_bytes(b"")
    data = open_folder(tmp_path, outputs=2, folds=3)
    for fold, before in zip(data.folds, intact.folds, strict=True):
        for side in ("train", "test"):
            expected = [intact.images.names[i] for i in getattr(before, side)]
            assert [data.images.names[i] for i in getattr(fold, side)] == [n for n in expected if n != "cat/2.png"]


def test_a_side_without_readable_images(tmp_path):
    make(tmp_path, {"cat": 3, "dog": 3})
    for name in names_on(open_folder(tmp_path, outputs=2), "test"):
        (tmp_path / name).write_bytes(b"")
    for parts in (("train", "val"), ("val",)):
        with pytest.raises(DownresError, match=r"None of the 3 images to test on can be read \(.*png: empty file\): replace"):
            open_folder(tmp_path, outputs=2, parts=parts)
    assert len(open_folder(tmp_path, outputs=2, parts=("train",)).images) == 3


def test_class_names_are_listed_and_nothing_is_decoded(tmp_path, monkeypatch):
    calls = decoded_names(monkeypatch)
    assert class_names(make(tmp_path / "a", TRAIN_AND_VAL)) == ("cat", "dog")
    assert data_classes(make(tmp_path / "b", {"x": 1, "10": 1, "2": 1})) == ("10", "2", "x")
    assert not calls
    with pytest.raises(DownresError, match="There is no folder .*nowhere: point `data`"):
        data_classes(tmp_path / "nowhere")


def test_classes_of_the_demo_set():
    assert data_classes(DEMO_DATA) == ("intact", "defective")
    pytest.importorskip("elpv_dataset")
    assert open_elpv().classes == data_classes(DEMO_DATA)


def test_outputs_are_named_only_where_they_are_taken_in_order(tmp_path):
    make(tmp_path / "a", {str(i): 1 for i in range(11)})
    data = open_folder(tmp_path / "a", outputs=11)
    assert data.description.endswith("in alphabetical order: 0 0, 1 1, 2 10, 3 2, 4 3 and 6 more.")
    assert "outputs" not in open_folder(tmp_path / "a", outputs=None).description
    make(tmp_path / "b", {"n01443537": 1, "n15075141": 1})
    assert "outputs" not in open_folder(tmp_path / "b", outputs=1000).description


def test_a_class_named_train_is_a_class(tmp_path):
    data = open_folder(make(tmp_path, {"bus": 2, "car": 2, "train": 2}), outputs=3)
    assert data.classes == ("bus", "car", "train")


def test_hidden_and_other_files_are_ignored(tmp_path):
    make(tmp_path, {"cat": 2, "dog": 2, ".cache": 1, "cat/.thumbs": 1})
    (tmp_path / "readme.txt").write_text("about")
    (tmp_path / "cat" / "notes.md").write_text("about")
    (tmp_path / "cat" / "._0.png").write_bytes(b"a Mac's shadow file")
    (tmp_path / "dog" / "1.png").rename(tmp_path / "dog" / "1.PNG")
    data = open_folder(tmp_path, outputs=2)
    assert data.images.names == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.PNG"]


def test_images_in_folders_of_a_class_folder_belong_to_it(tmp_path):
    data = open_folder(make(tmp_path, {"cat/images": 2, "dog/images": 1}), outputs=2)
    np.testing.assert_array_equal(data.labels, [0, 0, 1])


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    make(tmp_path, TRAIN_AND_VAL)
    (tmp_path / "train/cat/1.png").write_bytes(b"")
    (tmp_path / "val/cat/0.png").write_text("text")
    data = open_folder(tmp_path, outputs=2)
    assert [(skip.path, skip.reason) for skip in data.skipped] == [
        ("train/cat/1.png", "empty file"),
        ("val/cat/0.png", "not an image"),
    ]
    np.testing.assert_array_equal(data.labels, [0, 0, 0, 1, 1, 1, 0, 1])
    np.testing.assert_array_equal(data.folds[0].test, [6, 7])
    assert data.description.endswith(f"2 in val to test on; 2 unreadable files left out{CAT_AND_DOG}.")


def link(root, tree):
    """As `make`, of many files: all are links to one picture."""
    root.mkdir(exist_ok=True)
    Image.new("RGB", (6, 5), (1, 2, 3)).save(root / ".one.png")
    for folder, count in tree.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            os.link(root / ".one.png", root / folder / f"{i:05d}.png")
    return root


def test_of_many_training_images_only_a_sample_is_opened(tmp_path, monkeypatch):
    assert folders_module.TRAINING_IMAGES == 10_000
    monkeypatch.setattr(folders_module, "TRAINING_IMAGES", 1000)
    calls = decoded_names(monkeypatch)
    link(tmp_path, {"train/cat": 1600, "train/dog": 300, "val/cat": 60, "val/dog": 40})
    data = open_folder(tmp_path, outputs=2, seed=3)
    assert len(calls) == 1100 and set(calls.values()) == {1}
    (fold,) = data.folds
    assert len(data.images) == 1100 and len(fold.train) == 1000 and len(fold.test) == 100
    assert np.bincount(data.labels[fold.train]).tolist() == [842, 158]
    assert data.description == (
        "1100 images of 2 classes, 1000 in train to fit on and 100 in val to test on; a stratified sample of 1000 of the "
        f"1900 images to fit on is used (seed 3), so that time, memory and disk do not grow with their number{CAT_AND_DOG}."
    )
    alone = open_folder(tmp_path, outputs=2, seed=3, parts=("train",))
    assert alone.images.names == [data.images.names[i] for i in fold.train]
    assert "sample" not in open_folder(tmp_path, outputs=2, parts=("val",)).description


def test_what_is_not_in_the_sample_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(folders_module, "TRAINING_IMAGES", 8)
    make(tmp_path, {"train/cat": 10, "train/dog": 10, "val/cat": 2, "val/dog": 2})
    data = open_folder(tmp_path, outputs=2)
    used = [data.images.names[i] for i in data.folds[0].train]
    assert len(used) == 8 and [sum(name.startswith(f"train/{c}") for name in used) for c in ("cat", "dog")] == [4, 4]
    others = sorted({f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(10)} - set(used))
    for name in others:
        (tmp_path / name).write_bytes(b"")
    again = open_folder(tmp_path, outputs=2)
    assert again.fingerprint() == data.fingerprint() and again.skipped == ()
    (tmp_path / used[0]).write_bytes(b"")  # in the sample it is: the sample stays, without it
    fewer = open_folder(tmp_path, outputs=2)
    assert [skip.path for skip in fewer.skipped] == [used[0]] and len(fewer.folds[0].train) == 7
    assert "7 in train to fit on" in fewer.description and "a stratified sample of 8 of the 20 images" in fewer.description
    for name in used[:4]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DownresError, match=r"None of the images of class cat can be read \(train/cat/.*: empty file\): repl"):
        open_folder(tmp_path, outputs=2)


def test_each_fold_fits_on_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(folders_module, "TRAINING_IMAGES", 6)
    make(tmp_path, {"cat": 6, "dog": 6})
    data = open_folder(tmp_path, outputs=None, folds=3)
    assert [(len(fold.train), len(fold.test)) for fold in data.folds] == [(6, 4)] * 3 and len(data.images) == 12
    assert all(not set(fold.train) & set(fold.test) for fold in data.folds)
    assert "; in each fold a stratified sample of 6 of the 8 images to fit on is used (seed 0), so that" in data.description


def test_a_small_cache_changes_nothing(tmp_path):
    make(tmp_path, {"cat": 6, "dog": 8})
    whole = open_folder(tmp_path, outputs=2)
    with pytest.warns(UserWarning, match="14 decoded images need 1.26 kB and the cache for them has 700 B: 7 of them"):
        data = open_folder(tmp_path, outputs=2, cache_gb=7e-7)
    assert data.fingerprint() == whole.fingerprint() and data.description == whole.description
    for one, other in zip(data.images, whole.images, strict=True):
        np.testing.assert_array_equal(one, other)
    cached = [i for i, file in enumerate(data.images._pictures.files) if file.start is not None]
    assert cached == data.folds[0].test.tolist()  # these every candidate is shown


def test_files_are_listed_as_paths_are_sorted(tmp_path):
    make(tmp_path, {"cat": 2, "cat/b": 1, "cat/b c": 1, "cat/B": 1, "cat/.hidden": 1, "dog": 1, "dog/x.png": 1})
    data = open_folder(tmp_path, outputs=2, parts=("val",), val_fraction=1.0)
    listed = sorted(path for path in tmp_path.rglob("*.png") if ".hidden" not in path.parts and path != tmp_path)
    skipped = {skip.path: skip.reason for skip in data.skipped}
    assert skipped == {"dog/x.png": "a folder"}
    assert data.images.names == [name for p in listed if (name := p.relative_to(tmp_path).as_posix()) not in skipped]
    assert len(data.images) == 7


def test_progress_is_passed_on(tmp_path):
    seen = []
    open_folder(make(tmp_path, {"a": 1, "b": 2}), outputs=None, progress=lambda *report: seen.append(report))
    assert seen[-1] == ("decoding", 3, 3)


def test_any_number_of_classes_without_outputs(tmp_path):
    assert open_folder(make(tmp_path, {"a": 1, "b": 1, "c": 1}), outputs=None).classes == ("a", "b", "c")


def test_imagenet_folders_map_to_the_outputs(tmp_path):
    tree = {"n01443537": 1, "n15075141": 1}  # goldfish is output 1, toilet tissue output 999
    data = open_folder(make(tmp_path, tree), outputs=1000)
    np.testing.assert_array_equal(data.labels, [1, 999])
    assert len(data.classes) == 1000 and data.classes[1].startswith("goldfish") and "toilet" in data.classes[999]
    assert open_folder(tmp_path, outputs=2).classes == ("n01443537", "n15075141")
    make(tmp_path, {"n00000001": 1})
    with pytest.raises(DownresError, match="not among ImageNet's 1000 classes: n00000001; remove"):
        open_folder(tmp_path, outputs=1000)


def test_imagenet500_is_every_second_class(shared_data):
    folder = shared_data / "imagenet500"
    if not folder.is_dir():
        pytest.skip("imagenet500 is not in ../shared/data")
    data = open_folder(folder, outputs=1000, parts=("val",), val_fraction=1.0)
    np.testing.assert_array_equal(data.labels, np.arange(0, 1000, 2))
    np.testing.assert_array_equal(data.folds[0].test, np.arange(500))
    assert data.skipped == ()
    assert data.classes[0].startswith("tench")


def test_catdog(shared_data):
    if not (shared_data / "catdog").is_dir():
        pytest.skip("catdog is not in ../shared/data")
    data = open_folder(shared_data / "catdog", outputs=2)
    assert (len(data.folds[0].train), len(data.folds[0].test)) == (700, 200)
    np.testing.assert_array_equal(np.bincount(data.labels[data.folds[0].test]), [100, 100])


@pytest.mark.parametrize(
    ("tree", "options", "sentence"),
    [
        (
            {"cat": 1, "dog": 1},
            {"outputs": 1000},
            r"The weights have 1000 outputs and the data 2 class folders \(cat, dog\): pass",
        ),
        ({str(i): 1 for i in range(7)}, {"outputs": 2}, r"7 class folders \(0, 1, 2, 3, 4 and 2 more\): pass `fit_head=True`"),
        ({"cat": 1, "dog": 0}, {"outputs": 2}, r"The class folder .*dog holds no images \(.jpg, "),
        ({"cat": 1}, {"outputs": 1}, r"at least 2 class folders, .* has 1 \(cat\): add"),
        ({}, {"outputs": 2}, "holds no class folders and no images: point `data`"),
        ({".": 2}, {"outputs": 2}, "are in no class folders: put those of each class"),
        ({"train": 2, "val": 1}, {"outputs": 2}, ".*train holds no class folders: put the images"),
        (TRAIN_AND_VAL, {"outputs": 2, "folds": 5}, "`folds` needs one folder of classes, .* has both train and val: leave"),
        (
            {"train/cat": 1, "train/dog": 1, "test/dog": 1, "test/cow": 1},
            {"outputs": 2, "parts": ("val",)},
            r"train and test need the same class folders and differ \(only in train: cat; only in test: cow\): add",
        ),
        ({"train/cat": 1, "train/dog": 1, "val/dog": 1}, {"outputs": 2}, r"differ \(only in train: cat\): add"),
        ({"cat": 2, "dog": 2}, {"outputs": 2, "folds": 9}, "from 2 to the number of images, 4, and 9 is not"),
        ({"cat": 2, "dog": 2}, {"outputs": 2, "val_fraction": 1.0}, "between 0 and 1, 1.0 is not"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, tree, options, sentence):
    make(tmp_path, tree)
    with pytest.raises(DownresError, match=sentence) as error:
        open_folder(tmp_path, **options)
    assert "\n" not in str(error.value)
    if "holds no" in sentence or "differ" in sentence or "at least 2" in sentence or "in no class" in sentence:
        with pytest.raises(DownresError, match=sentence):
            class_names(tmp_path)


def test_no_folder_and_a_file(tmp_path):
    with pytest.raises(DownresError, match="There is no folder .*nowhere: point `data`"):
        open_folder(tmp_path / "nowhere", outputs=2)
    (tmp_path / "file.zip").touch()
    with pytest.raises(DownresError, match="file.zip is a file and `data` needs a folder: give"):
        open_folder(tmp_path / "file.zip", outputs=2)


def test_a_class_that_cannot_be_read(tmp_path):
    make(tmp_path, TRAIN_AND_VAL)
    (tmp_path / "val/dog/0.png").write_bytes(b"")
    with pytest.raises(DownresError, match=r"None of the images of class dog can be read \(val/dog/0.png: empty file\): repl"):
        open_folder(tmp_path, outputs=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed(tmp_path):
    make(tmp_path, {"cat": 1, "dog": 1}).chmod(0)
    try:
        with pytest.raises(DownresError, match="Cannot list the folder"):
            open_folder(tmp_path, outputs=2)
    finally:
        tmp_path.chmod(0o755)


def small(labels=(0, 1, 1), names=("a", "b", "c"), fold=((0,), (1, 2)), classes=("x", "y")) -> Dataset:
    images = images_from_arrays(np.zeros((3, 4, 4), np.uint8), names)
    return from_arrays(images, np.array(labels), classes, [Fold(*(np.array(side) for side in fold))], "Three squares.", "CC0")


def test_arrays():
    data = small()
    assert data.licence == "CC0" and data.description == "Three squares." and data.skipped == ()
    assert data.labels.dtype == np.int64 and len(data.images) == 3


def test_arrays_that_do_not_agree():
    with pytest.raises(DownresError, match=r"3 images need as many labels, not an array \(2,\)"):
        small(labels=(0, 1))
    with pytest.raises(DownresError, match="Labels of 2 classes are 0 to 1, 0 to 2 are not"):
        small(labels=(0, 1, 2))


def test_fingerprints_follow_names_labels_classes_and_folds():
    same = [small().fingerprint() for _ in range(2)]
    others = [
        small(labels=(0, 1, 0)).fingerprint(),
        small(names=("a", "b", "d")).fingerprint(),
        small(fold=((0, 1), (2,))).fingerprint(),
        small(classes=("x", "z")).fingerprint(),
    ]
    assert same[0] == same[1] and len(same[0]) == 64
    assert len({same[0], *others}) == 5


def test_fingerprints_follow_pixels(tmp_path):
    make(tmp_path, {"cat": 2, "dog": 2})
    before = open_folder(tmp_path, outputs=2).fingerprint()
    assert open_folder(tmp_path, outputs=2).fingerprint() == before
    Image.new("RGB", (6, 5), (9, 3, 7)).save(tmp_path / "cat" / "0.png")  # another colour
    assert open_folder(tmp_path, outputs=2).fingerprint() != before


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("TRAIN", "VALID"),
        ("train", "dev"),
        ("Train", "eval"),
        ("trainset", "testset"),
        ("train-images", "test-images"),
        ("TrainData", "ValidationData"),
        ("seg_train", "seg_test"),
        ("data/training", "data/validation"),  # a wrapping folder
        ("a/b/train/train", "a/b/test/test"),
    ],
)
def test_parts_as_people_name_them(tmp_path, train, val):
    make(tmp_path, {f"{part}/{c}": n for part, n in ((train, 3), (val, 2)) for c in ("cat", "dog")})
    make(tmp_path, {"__MACOSX/cat": 1, f"{train}/__MACOSX": 1, f"{train}/@eaDir": 1})
    data = open_folder(tmp_path, outputs=2)
    assert data.classes == class_names(tmp_path) == ("cat", "dog")
    assert {name.rsplit("/", 2)[0] for name in names_on(data, "train")} == {train} and len(data.folds[0].train) == 6
    assert {name.rsplit("/", 2)[0] for name in names_on(data, "test")} == {val} and len(data.folds[0].test) == 4
    assert f"6 in {train} to fit on and 4 in {val} to test on" in data.description and "not used" not in data.description


def test_a_part_that_is_not_used_is_named(tmp_path):
    tree = {f"{part}/{name}": 1 for part in ("Train", "val", "Test") for name in "ab"}
    data = open_folder(make(tmp_path, {**tree, "unlabelled": 2}), outputs=2)
    assert "1 in val" not in data.description and data.description.count("; not used: Test, unlabelled") == 1
    # Pictures without classes are no part to prove on
    data = open_folder(make(tmp_path / "flat", {"train/a": 2, "train/b": 2, "test": 3}), outputs=2)
    assert "4 images of 2 classes, train only, split into 2" in data.description and "; not used: test" in data.description


def test_a_wrapped_folder_of_classes(tmp_path):
    data = open_folder(make(tmp_path, {"archive/images/cat": 2, "archive/images/dog": 2}), outputs=2)
    assert data.classes == ("cat", "dog") and data.images.names[0] == "archive/images/cat/0.png"
    assert "in one folder, archive/images, split" in data.description


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"Training": 2, "Testing": 2}, "Training holds no class folders: put the images .*, in Testing likewise, or rename"),
        (
            {"train": 2, "test": 2, "cat": 2},
            "train holds no class folders: put .*, in test likewise, or rename what is a class",
        ),
        ({"seg_train": 2, "seg_pred": 1, "seg_test": 2}, "seg_train holds no class folders"),
        ({"bus": 2, "train/steam": 2, "train/electric": 2}, r"train holds folders, .* beside folders of images \(bus\)"),
    ],
)
def test_names_of_parts_that_would_be_classes_are_refused(tmp_path, tree, sentence):
    make(tmp_path, tree)
    for opens in (lambda: open_folder(tmp_path, outputs=None), lambda: class_names(tmp_path)):
        with pytest.raises(DownresError, match=sentence):
            opens()


def test_names_that_only_look_like_parts_are_classes(tmp_path):
    data = open_folder(make(tmp_path, {"test_tube": 1, "train_station": 1, "validation": 1, "трейн": 1}), outputs=None)
    assert len(data.classes) == 4


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".pgm", ".avif", "", ".jpg_large", ".001", ".JFIF"])
def test_other_endings_are_read(tmp_path, ending):
    make(tmp_path, {"cat": 2, "dog": 2})
    kind = {".pgm": "PPM", ".avif": "AVIF"}.get(ending, "JPEG")
    for name in ("cat", "dog"):
        Image.new("RGB", (6, 5), (9, 9, 9)).save(tmp_path / name / f"other{ending}", format=kind)
    data = open_folder(tmp_path, outputs=2)
    assert len(data.images) == 6 and data.skipped == () and "left out" not in data.description
    assert f"dog/other{ending}" in data.images.names


def test_what_is_no_image_is_counted_and_named(tmp_path):
    make(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "cat/notes.txt").write_text("about")
    (tmp_path / "cat/new.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "dog/gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "dog/pipe")
    (tmp_path / "dog/none").touch()
    Image.new("RGB", (6, 5)).save(tmp_path / "stray.png")
    data = open_folder(tmp_path, outputs=2)
    assert {skip.path: skip.reason for skip in data.skipped} == {
        "cat/notes.txt": "not an image",
        "cat/new.heic": "not an image",
        "dog/gone": "no such file",
        "dog/pipe": "not a regular file",
        "dog/none": "empty file",
        "stray.png": "in no class folder",
    }
    assert len(data.images) == 4
    assert "; 6 other files left out (stray.png: in no class folder, cat/new.heic: not an image, cat/notes.txt: not an im" in (
        data.description
    )


def test_folders_behind_links_are_looked_into_once(tmp_path):
    make(tmp_path / "elsewhere", {"more": 3})
    root = make(tmp_path / "data", {"cat": 2, "dog/b": 2})
    (root / "cat/linked").symlink_to(tmp_path / "elsewhere/more")
    (root / "dog/b/back").symlink_to(root / "dog")  # a circle
    data = open_folder(root, outputs=2)
    assert [n for n in data.images.names if n.startswith("cat")] == [
        "cat/0.png",
        "cat/1.png",
        *(f"cat/linked/{i}.png" for i in range(3)),
    ]
    assert [n for n in data.images.names if n.startswith("dog")] == ["dog/b/0.png", "dog/b/1.png"]
