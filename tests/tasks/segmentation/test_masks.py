import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from downres.errors import DownresError
from downres.recovery.bank import CALIBRATION_IMAGES
from downres.tasks.segmentation import masks as masks_module
from downres.tasks.segmentation.mask_layouts import _camvid_part
from downres.tasks.segmentation.masks import IGNORE, find_masks, mask_classes, open_masks
from downres.tasks.segmentation.task import Segmentation

RNG = np.random.default_rng(0)
SIZE = (6, 8)
VOID = [[IGNORE] * SIZE[1]] * SIZE[0]


def save(path, array, mode=None, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(array), mode) if mode is None else Image.fromarray(np.asarray(array)).convert(mode)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)
    return path


def photo(path, size=SIZE):
    return save(path, RNG.integers(0, 256, (*size, 3), np.uint8))


def indices(classes=3, size=SIZE):
    """A random index mask in which every class occurs."""
    mask = RNG.integers(0, classes, size).astype(np.uint8)
    mask.ravel()[:classes] = range(classes)
    return mask


def folders(root, parts=("train", "val"), count=3, classes=3):
    """ROOT/PART/images and ROOT/PART/masks; returns the masks by the names of their pictures."""
    masks = {}
    for part in parts:
        for i in range(count):
            photo(root / part / "images" / f"{i}.png")
            masks[f"{part}/images/{i}.png"] = indices(classes)
            save(root / part / "masks" / f"{i}.png", masks[f"{part}/images/{i}.png"])
    return masks


def error(call, *args, **options):
    """The one sentence with which a call is refused."""
    with pytest.raises(DownresError) as caught:
        call(*args, **options)
    (sentence,) = str(caught.value).splitlines()
    return sentence


# Cityscapes


def cityscapes(root, ids, kind="labelIds", parents=("leftImg8bit", "gtFine")):
    for part, city in (("train", "ulm"), ("train", "bonn"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        photo(root / parents[0] / part / city / f"{stem}_leftImg8bit.png", ids.shape)
        save(root / parents[1] / part / city / f"{stem}_gtFine_{kind}.png", ids)
        save(root / parents[1] / part / city / f"{stem}_gtFine_color.png", np.zeros((*ids.shape, 3), np.uint8))
        save(root / parents[1] / part / city / f"{stem}_gtFine_instanceIds.png", ids.astype(np.uint16) * 1000)
    photo(root / parents[0] / "test" / "berlin" / "berlin_000000_000019_leftImg8bit.png", ids.shape)
    return root


def test_cityscapes_ids_are_those_of_the_benchmark(tmp_path):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels", reason="the benchmark's own table")
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    found = find_masks(cityscapes(tmp_path, ids))
    assert found.layout == "cityscapes" and {part: len(pairs) for part, pairs in found.pairs.items()} == {"train": 2, "val": 1}
    assert found.pairs["train"][0].name == "leftImg8bit/train/bonn/bonn_000000_000019_leftImg8bit.png"
    mask = found.read_mask(found.pairs["val"][0].mask)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask.ravel(), [labels.id2label[i].trainId for i in range(34)])
    assert found.classes == tuple(labels.trainId2label[i].name for i in range(19))
    assert found.colours == tuple(labels.trainId2label[i].color for i in range(19))
    assert found.label_size == (2, 17)


def test_cityscapes_as_its_archives_are_unpacked(tmp_path):
    parents = ("leftImg8bit_trainvaltest/leftImg8bit", "gtFine_trainvaltest/gtFine")
    found = find_masks(cityscapes(tmp_path, np.full((2, 3), 26, np.uint8), parents=parents))
    assert found.layout == "cityscapes" and found.classes[found.read_mask(found.pairs["val"][0].mask)[0, 0]] == "car"


def test_cityscapes_train_ids(tmp_path):
    ids = np.array([[*range(19), 255]], np.uint8)
    found = find_masks(cityscapes(tmp_path, ids, "labelTrainIds"))
    np.testing.assert_array_equal(found.read_mask(found.pairs["val"][0].mask), ids)


def test_cityscapes_value_that_is_no_id(tmp_path):
    root = cityscapes(tmp_path, np.array([[7, 34]], np.uint8))
    found = find_masks(root)
    assert error(found.read_mask, found.pairs["val"][0].mask) == (
        "The mask gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png has the value 34, and the values of masks here "
        "are 0 to 33, or 255 where there is no class: correct the mask, or name all classes in classes.txt, with their colours "
        "(`road 255 255 255`) where the values are grey levels."
    )


# CamVid


def test_real_camvid(shared_data):
    data = open_masks(shared_data / "camvid", outputs=11)
    (fold,) = data.folds
    assert (len(data), len(fold.train), len(fold.test)) == (468, 367, 101)
    assert data.images.names == data.masks.names and data.images.names[0] == "train/0001TP_006690.png"
    assert data.label_size == (360, 480) and data.absent == () and data.skipped == ()
    for i in (0, 367, 467):
        part, name = data.images.names[i].split("/")
        with Image.open(shared_data / "camvid" / f"{part}annot" / name) as picture:
            raw = np.array(picture)
        np.testing.assert_array_equal(data.masks[i], np.where(raw == 11, IGNORE, raw))
    counts = sum(np.bincount(mask.ravel(), minlength=256) for mask in data.masks)
    assert counts.sum() == 468 * 360 * 480 and not counts[11:IGNORE].any()
    share = dict(zip(data.classes, counts[:11] / counts[:11].sum(), strict=True))
    # Road, building and sky fill street scenes; poles, signs and people are a percent each.
    assert share["road"] > 0.2 and share["building"] > 0.2 and share["sky"] > 0.1
    assert all(0 < share[name] < 0.02 for name in ("pole", "sign", "pedestrian", "cyclist"))
    assert data.description == (
        "468 images with masks of 11 classes (CamVid layout), 367 in train to fit on and 101 in val to test on; "
        "all masks 360×480."
    )


# From label_colors.txt of the original and the grouping that SegNet's 11 classes have.
CAMVID_32 = {
    "Sky": (128, 128, 128, 0), "Bridge": (0, 128, 64, 1), "Building": (128, 0, 0, 1), "Wall": (64, 192, 0, 1),
    "Tunnel": (64, 0, 64, 1), "Archway": (192, 0, 128, 1), "Column_Pole": (192, 192, 128, 2), "TrafficCone": (0, 0, 64, 2),
    "Road": (128, 64, 128, 3), "LaneMkgsDriv": (128, 0, 192, 3), "LaneMkgsNonDriv": (192, 0, 64, 3),
    "Sidewalk": (0, 0, 192, 4), "ParkingBlock": (64, 192, 128, 4), "RoadShoulder": (128, 128, 192, 4),
    "Tree": (128, 128, 0, 5), "VegetationMisc": (192, 192, 0, 5), "SignSymbol": (192, 128, 128, 6),
    "Misc_Text": (128, 128, 64, 6), "TrafficLight": (0, 64, 64, 6), "Fence": (64, 64, 128, 7), "Car": (64, 0, 128, 8),
    "SUVPickupTruck": (64, 128, 192, 8), "Truck_Bus": (192, 128, 192, 8), "Train": (192, 64, 128, 8),
    "OtherMoving": (128, 64, 64, 8), "Pedestrian": (64, 64, 0, 9), "Child": (192, 128, 64, 9),
    "CartLuggagePram": (64, 0, 192, 9), "Animal": (64, 128, 64, 9), "Bicyclist": (0, 128, 192, 10),
    "MotorcycleScooter": (192, 0, 192, 10), "Void": (0, 0, 0, IGNORE),
}  # fmt: skip


def original_camvid(root, names, images="701_StillsRaw_full", masks="LabeledApproved_full"):
    colours = np.array([[row[:3] for row in CAMVID_32.values()]], np.uint8)
    for name in names:
        photo(root / images / f"{name}.png", colours.shape[:2])
        save(root / masks / f"{name}_L.png", colours)
    lines = [f"{r} {g} {b}\t{name}" for name, (r, g, b, _) in CAMVID_32.items()]
    (root / "label_colors.txt").write_text("\n".join([*lines, ""]))
    return root


@pytest.mark.parametrize("names", [("701_StillsRaw_full", "LabeledApproved_full"), ("images", "labels")])
def test_original_camvid_becomes_eleven_classes(tmp_path, names):
    frames = ("0001TP_006690", "0001TP_008550", "0016E5_07959", "0016E5_08190", "Seq05VD_f00000", "0006R0_f00930")
    found = find_masks(original_camvid(tmp_path, frames, *names))
    assert found.layout == "camvid" and len(found.classes) == 11
    np.testing.assert_array_equal(found.read_mask(found.pairs["val"][0].mask), [[row[3] for row in CAMVID_32.values()]])
    assert [pair.image.stem for pair in found.pairs["train"]] == ["0001TP_006690", "0006R0_f00930", "0016E5_08190"]
    assert [pair.image.stem for pair in found.pairs["val"]] == ["0016E5_07959"]
    assert "divided as SegNet does, by sequence" in open_masks(found, outputs=11).description


def test_original_camvid_is_divided_as_segnet_lists_it(tmp_path, shared_data):
    for part in ("train", "val"):
        frames = [file.stem for file in (shared_data / "camvid" / part).glob("*.png")]
        assert frames and {_camvid_part(frame) for frame in frames} == {part}


def test_original_camvid_with_lists(tmp_path):
    original_camvid(tmp_path, ("0001TP_006690", "0016E5_07959", "Seq05VD_f00000"))
    (tmp_path / "train.txt").write_text(
        "Seq05VD_f00000\n/SegNet/CamVid/train/0016E5_07959.png /SegNet/trainannot/0016E5_07959.png\n"
    )
    (tmp_path / "val.txt").write_text("0001TP_006690_L.png\n")
    found = find_masks(tmp_path)
    assert [pair.image.stem for pair in found.pairs["train"]] == ["Seq05VD_f00000", "0016E5_07959"]
    assert [pair.mask.name for pair in found.pairs["val"]] == ["0001TP_006690_L.png"]


def test_colour_that_no_class_has(tmp_path):
    original_camvid(tmp_path, ("0001TP_006690", "0016E5_07959"))
    save(tmp_path / "LabeledApproved_full" / "0016E5_07959_L.png", np.full((1, 32, 3), 26, np.uint8))
    assert error(open_masks, tmp_path, outputs=11) == (
        "The mask LabeledApproved_full/0016E5_07959_L.png has the colour (26, 26, 26), which no class has, at 32 pixels: "
        "correct the mask, or add the colour to the file of classes."
    )


# Pascal VOC


def voc_palette():
    """Pascal VOC's colour map, by the formula in its development kit."""
    palette = np.zeros((256, 3), np.uint8)
    for i in range(256):
        for j in range(8):
            for channel in range(3):
                palette[i, channel] |= ((i >> (3 * j + channel)) & 1) << (7 - j)
    return palette


def voc(root, mask, as_rgb=False):
    for name in ("2007_000032", "2007_000033", "2008_000001"):
        photo(root / "JPEGImages" / f"{name}.jpg", mask.shape)
        file = save(root / "SegmentationClass" / f"{name}.png", mask, palette=voc_palette().tobytes())
        if as_rgb:
            Image.open(file).convert("RGB").save(file)
    photo(root / "JPEGImages" / "2010_000001.jpg")  # of the detection task: no mask
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2008_000001\n")
    (lists / "val.txt").write_text("2007_000033\n")
    return root


@pytest.mark.parametrize("below", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_palette_is_read_by_index(tmp_path, below):
    mask = np.array([[*range(21), 255]], np.uint8)
    voc(tmp_path / below, mask)
    found = find_masks(tmp_path)
    assert found.layout == "voc" and [len(found.pairs[part]) for part in ("train", "val")] == [2, 1]
    assert Image.open(found.pairs["val"][0].mask).mode == "P"
    np.testing.assert_array_equal(found.read_mask(found.pairs["val"][0].mask), mask)
    assert found.classes[0] == "background" and found.classes[15] == "person" and len(found.classes) == 21
    np.testing.assert_array_equal(found.colours, voc_palette()[:21])


def test_voc_names_are_torchvisions(tmp_path):
    models = pytest.importorskip("torchvision.models.segmentation")
    found = find_masks(voc(tmp_path, np.zeros(SIZE, np.uint8)))
    names = models.FCN_ResNet50_Weights.DEFAULT.meta["categories"]
    assert found.classes == tuple(name.strip("_") for name in names)  # torchvision writes __background__


def test_palette_mask_saved_as_rgb(tmp_path):
    voc(tmp_path, np.array([[0, 15, 255]], np.uint8), as_rgb=True)
    assert error(find_masks, tmp_path) == (
        "The mask SegmentationClass/2007_000032.png is RGB and has the colours of Pascal VOC's palette, so a palette PNG was "
        "saved as RGB: take the original, or give classes.txt in the data folder, or `classes`, with a colour for each class."
    )


def test_list_of_an_image_that_is_not_there(tmp_path):
    voc(tmp_path, np.zeros(SIZE, np.uint8))
    list_file = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    list_file.write_text("2007_000033\n2009_000009\n")
    assert error(find_masks, tmp_path) == (
        f"{list_file} lists 1 images that are not in {tmp_path / 'JPEGImages'} (the first is 2009_000009): "
        "add them, or correct the list."
    )


def test_image_in_both_parts(tmp_path):
    voc(tmp_path, np.zeros(SIZE, np.uint8))
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000032\n")
    assert error(find_masks, tmp_path).startswith(
        f"1 images of {tmp_path} are listed twice (the first is JPEGImages/2007_000032.jpg)"
    )


# ADE20K


def ade20k(root):
    mask = np.arange(151, dtype=np.uint8)[None]
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        photo(root / "images" / part / f"{name}.jpg", mask.shape)
        save(root / "annotations" / part / f"{name}.png", mask)
    return root


def test_ade20k_starts_at_one(tmp_path):
    found = find_masks(ade20k(tmp_path / "ADEChallengeData2016").parent)
    assert found.layout == "ade20k" and found.classes[149] == "class 149" and len(set(found.colours)) == 150
    np.testing.assert_array_equal(found.read_mask(found.pairs["val"][0].mask), [[IGNORE, *range(150)]])
    assert len(open_masks(found, outputs=150)) == 2


def test_ade20k_names(tmp_path):
    rows = [f"{i}\t0.1\t10\t1\tname {i};other name {i}" for i in range(1, 151)]
    (ade20k(tmp_path) / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert find_masks(tmp_path).classes == tuple(f"name {i}" for i in range(1, 151))


# Any pair of folders


def test_pairs_of_folders(tmp_path):
    masks = folders(tmp_path)
    data = open_masks(tmp_path, outputs=3)
    assert data.images.names == list(masks)
    for i, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(data.masks[i], mask)
        assert data.images[i].shape == (*SIZE, 3) and data.masks[i].dtype == np.uint8
    (fold,) = data.folds
    np.testing.assert_array_equal(fold.train, [0, 1, 2])
    np.testing.assert_array_equal(fold.test, [3, 4, 5])
    assert data.classes == ("class 0", "class 1", "class 2") and len(set(data.colours)) == 3 and len(data) == 6
    assert data.description == (
        "6 images with masks of 3 classes (folders layout), 3 in train to fit on and 3 in val to test on; all masks 6×8."
    )


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{part}/JPEGImages/{i}.jpg", "{part}/Annotations/{i}.png"),
        ("images/{part}/{i}.jpg", "masks/{part}/{i}_mask.png"),
        ("imgs/{part}/city/{i}.jpg", "labels/{part}/city/{i}_label.tif"),
        ("{part}/{i}.png", "{part}_labels/{i}_L.png"),
        ("{part}ing/image/{i}.png", "{part}ing/gt/{i}_gt.png"),
    ],
)
def test_names_of_folders_and_files(tmp_path, image, mask):
    for part in ("train", "valid" if "ing" not in image else "val"):
        for i in range(2):
            photo(tmp_path / image.format(part=part, i=i).replace("valing", "validation"))
            save(tmp_path / mask.format(part=part, i=i).replace("valing", "validation"), indices())
    found = find_masks(tmp_path, layout="folders")
    assert [len(found.pairs[part]) for part in ("train", "val")] == [2, 2] and len(found.classes) == 3
    assert all(pair.mask.stem.startswith(pair.image.stem) for pairs in found.pairs.values() for pair in pairs)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{part}/images/{i}.jpg", "{part}/masks/{i}.png"),
        ("Images/{part}/{i}.jfif", "Masks/{part}/{i}.png"),
        ("{part}/{i}.png", "{part}_masks/{i}.png"),
        ("dataset/images/{part}/{i}.jpg", "dataset/masks/{part}/{i}.png"),
    ],
)
def test_parts_as_people_name_them(tmp_path, image, mask):
    for part, count in (("Training", 3), ("Testing", 2), ("VALID", 1)):
        for i in range(count):
            photo(tmp_path / image.format(part=part, i=i))
            save(tmp_path / mask.format(part=part, i=i), indices())
    (tmp_path / image.format(part="VALID", i=0)).with_name("notes.txt").write_text("about")
    data = open_masks(tmp_path, outputs=3)
    assert len(data.folds[0].train) == 3 and len(data.folds[0].test) == 1
    assert re.search(r"; 1 other files left out \(.*notes.txt: not an image\); not used: .*Testing", data.description)
    assert [skip.reason for skip in data.skipped] == ["not an image"]


def test_the_masks_of_a_part_may_be_called_otherwise(tmp_path):
    for part, other in (("train", "training"), ("val", "Validation")):
        photo(tmp_path / "images" / part / "0.png")
        save(tmp_path / "masks" / other / "0.png", indices())
    found = find_masks(tmp_path)
    assert [pair.mask.parent.name for pairs in found.pairs.values() for pair in pairs] == ["training", "Validation"]


def test_one_folder_is_split(tmp_path):
    for i in range(10):
        photo(tmp_path / "images" / f"{i}.jpg")
        save(tmp_path / "masks" / f"{i}.png", indices())
    data = open_masks(tmp_path, outputs=3, val_fraction=0.3, seed=1)
    (fold,) = data.folds
    assert (len(fold.train), len(fold.test)) == (7, 3) and sorted([*fold.train, *fold.test]) == list(range(10))
    assert "split into 7 to fit on and 3 to test on (seed 1)" in data.description
    proof = open_masks(tmp_path, outputs=3, val_fraction=0.3, seed=1, parts=("val",))
    assert proof.images.names == [data.images.names[i] for i in fold.test] and len(proof.folds[0].train) == 0
    crossed = open_masks(tmp_path, outputs=3, folds=5)
    assert sorted(np.concatenate([fold.test for fold in crossed.folds])) == list(range(10)) and len(crossed.folds) == 5
    assert "cross-fitted in 5 folds" in crossed.description
    assert "all to test on" in open_masks(tmp_path, outputs=3, folds=5, parts=("val",)).description


def test_val_alone_decodes_no_training_image(tmp_path):
    folders(tmp_path)
    data = open_masks(tmp_path, outputs=3, parts=("val",))
    assert data.images.names == [f"val/images/{i}.png" for i in range(3)]
    assert len(data.folds[0].train) == 0 and list(data.folds[0].test) == [0, 1, 2]


def test_fastai_layout_of_camvid(tmp_path):
    """images, labels with the suffix _P, codes.txt and valid.txt, as fastai's archive has them."""
    for i in range(4):
        photo(tmp_path / "images" / f"0016E5_0{i}.png")
        save(tmp_path / "labels" / f"0016E5_0{i}_P.png", indices(3))
    (tmp_path / "codes.txt").write_text("Animal\nCar\nVoid\n")
    (tmp_path / "valid.txt").write_text("0016E5_02.png\n")
    found = find_masks(tmp_path)
    assert found.classes == ("Animal", "Car")
    assert [pair.image.stem for pair in found.pairs["val"]] == ["0016E5_02"] and len(found.pairs["train"]) == 3
    assert set(np.unique(found.read_mask(found.pairs["val"][0].mask))) == {0, 1, IGNORE}


COLOURS = {"void": (0, 0, 0), "traffic light": (250, 170, 30), "road": (128, 64, 128)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "void 0 0 0\ntraffic light 250 170 30\n\nroad 128 64 128\n"),
        ("label_colors.txt", "0 0 0\tvoid\n250 170 30\ttraffic light\n128 64 128\troad\n"),
        ("classes.csv", "name, r, g, b\nvoid, 0, 0, 0\ntraffic light, 250, 170, 30\nroad, 128, 64, 128\n"),
        ("classes.json", json.dumps([{"name": name, "color": colour} for name, colour in COLOURS.items()])),
        ("classes.json", json.dumps(COLOURS)),
    ],
)
def test_files_of_classes(tmp_path, name, text):
    pixels = np.array([[COLOURS["road"], COLOURS["void"], COLOURS["traffic light"]]], np.uint8)
    for part in ("train", "val"):
        photo(tmp_path / part / "images" / "a.png", (1, 3))
        save(tmp_path / part / "masks" / "a.png", pixels)
        photo(tmp_path / part / "images" / "b.png", (1, 3))
        save(tmp_path / part / "masks" / "b.png", np.array([[2, 0, 1]], np.uint8))
    (tmp_path / name).write_text(text)
    found = find_masks(tmp_path)
    assert found.classes == ("traffic light", "road") and found.colours == (COLOURS["traffic light"], COLOURS["road"])
    for pair in found.pairs["val"]:  # the same picture by colours and by indices
        np.testing.assert_array_equal(found.read_mask(pair.mask), [[1, IGNORE, 0]])
    shutil.move(tmp_path / name, tmp_path.parent / name)
    assert find_masks(tmp_path, classes=tmp_path.parent / name).classes == found.classes


def test_rgb_lookup_is_that_of_every_pixel(tmp_path):
    colours = RNG.choice(2**24, 40, replace=False)
    palette = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in colours]
    mask = indices(40, (50, 60))
    for part in ("train", "val"):
        photo(tmp_path / part / "images" / "a.png", mask.shape)
        save(tmp_path / part / "masks" / "a.png", np.array(palette, np.uint8)[mask])
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i} {r} {g} {b}" for i, (r, g, b) in enumerate(palette)))
    found = find_masks(tmp_path)
    np.testing.assert_array_equal(found.read_mask(found.pairs["val"][0].mask), mask)


def test_names_given_by_hand(tmp_path):
    folders(tmp_path)
    assert find_masks(tmp_path, classes=["a", "b", "c", "d"]).classes == ("a", "b", "c", "d")
    (tmp_path / "classes.json").write_text('{"0": "sky", "1": "road", "2": "car"}')  # id2label of a config.json
    assert find_masks(tmp_path).classes == ("sky", "road", "car")


def test_depths_of_index_masks(tmp_path):
    """The same indices in 8 and 16 bits, 32 bits, with a palette and in one bit."""
    folders(tmp_path, classes=2)
    mask = np.array([[0, 1, 2, 255]], np.int32)
    found = find_masks(tmp_path, classes=["a", "b", "c"])
    files = [
        save(tmp_path / "8.png", mask.astype(np.uint8)),
        save(tmp_path / "16.png", mask.astype(np.uint16)),
        save(tmp_path / "32.tif", mask),
        save(tmp_path / "p.png", mask.astype(np.uint8), palette=bytes(range(256)) * 3),
        save(tmp_path / "la.png", np.stack([mask, mask * 0 + 9], 2).astype(np.uint8)),
    ]
    assert [Image.open(file).mode for file in files] == ["L", "I;16", "I", "P", "LA"]
    for file in files:
        read = found.read_mask(file)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, mask)
    one_bit = save(tmp_path / "1.png", np.array([[False, True]]))
    assert Image.open(one_bit).mode == "1"
    np.testing.assert_array_equal(found.read_mask(one_bit), [[0, 1]])


def test_grey_of_four_bits_is_not_stretched(tmp_path):
    """PIL shows 4-bit grey as multiples of 17; the file is written by hand, for PIL writes none."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    folders(tmp_path)
    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0\x01\x20")), chunk(b"IEND", b""))
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "m.png")), [[0, 17, 34, 0]])
    np.testing.assert_array_equal(find_masks(tmp_path).read_mask(tmp_path / "m.png"), [[0, 1, 2, 0]])


def test_upright_photograph_and_its_mask(tmp_path):
    """A mask is drawn on the upright picture, whose stored size is the other way round."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "val"):
        file = photo(tmp_path / part / "images" / "a.jpg", (8, 6))
        Image.open(file).save(file, exif=exif)
        save(tmp_path / part / "masks" / "a.png", indices(size=(6, 8)))
    data = open_masks(tmp_path, outputs=3)
    assert data.images[0].shape == (6, 8, 3) and data.masks[0].shape == (6, 8)


def test_sizes_that_differ_between_images(tmp_path):
    folders(tmp_path)
    photo(tmp_path / "val/images/large.png", (9, 9))
    save(tmp_path / "val/masks/large.png", indices(size=(9, 9)))
    assert find_masks(tmp_path).label_size is None
    data = open_masks(tmp_path, outputs=None)
    assert data.label_size is None and data.masks[6].shape == (9, 9) and "masks of several sizes" in data.description


def test_class_absent_from_the_proof(tmp_path):
    folders(tmp_path)
    for i in range(3):
        save(tmp_path / f"val/masks/{i}.png", np.full(SIZE, i % 2, np.uint8))
    data = open_masks(tmp_path, outputs=3)
    assert data.absent == ("class 2",) and "no image to test on has class 2" in data.description
    assert open_masks(tmp_path, outputs=3, parts=("train",)).absent == ()


def test_fingerprint(tmp_path):
    masks = folders(tmp_path)
    first = open_masks(tmp_path, outputs=3).fingerprint()
    assert open_masks(tmp_path, outputs=3).fingerprint() == first
    changed = masks["val/images/1.png"].copy()
    changed[-1, -1] = (changed[-1, -1] + 1) % 3
    save(tmp_path / "val/masks/1.png", changed)
    second = open_masks(tmp_path, outputs=3).fingerprint()
    renamed = open_masks(tmp_path, outputs=3, classes=["a", "b", "c"]).fingerprint()
    photo(tmp_path / "val/images/1.png")
    assert len({first, second, renamed, open_masks(tmp_path, outputs=3).fingerprint()}) == 4


def test_progress(tmp_path):
    folders(tmp_path)
    calls = []
    open_masks(tmp_path, outputs=3, progress=lambda *call: calls.append(call))
    assert calls == [(stage, i, 6) for stage in ("decoding", "reading masks") for i in range(1, 7)]


# Refusals


def test_of_many_training_images_only_a_sample_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(masks_module, "TRAINING_MASKS", 4)
    folders(tmp_path, count=7)
    seen = []
    data = open_masks(tmp_path, outputs=3, seed=2, progress=lambda *report: seen.append(report))
    assert seen[10] == ("decoding", 11, 11) and seen[-1] == ("reading masks", 11, 11)
    used = [data.images.names[i] for i in data.folds[0].train]
    assert len(used) == 4 and len(data.folds[0].test) == 7 and used == sorted(used)
    sentence = (
        "4 in train to fit on and 7 in val to test on; a random sample of 4 of the 7 images to fit on is used (seed 2), so"
    )
    assert sentence in data.description
    alone = open_masks(tmp_path, outputs=3, seed=2, parts=("train",))
    assert alone.images.names == used
    (tmp_path / used[1]).write_bytes(b"")
    fewer = open_masks(tmp_path, outputs=3, seed=2)
    assert [fewer.images.names[i] for i in fewer.folds[0].train] == [used[0], *used[2:]]


def test_a_sample_is_as_large_as_what_the_ladder_looks_at():
    assert Segmentation.tuning_images <= masks_module.TRAINING_MASKS // 4
    assert CALIBRATION_IMAGES <= masks_module.TRAINING_MASKS - Segmentation.tuning_images


def test_a_small_cache_changes_nothing(tmp_path):
    masks = folders(tmp_path)
    (tmp_path / "train" / "masks" / "1.png").write_bytes(b"")
    whole = open_masks(tmp_path, outputs=3)
    with pytest.warns(UserWarning, match="are decoded again each time"):
        data = open_masks(tmp_path, outputs=3, cache_gb=7e-7)
    assert data.fingerprint() == whole.fingerprint() and data.description == whole.description
    assert data.images.names == data.masks.names == [name for name in masks if name != "train/images/1.png"]
    for one, other, name in zip(data.images, whole.images, data.images.names, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(data.masks[data.masks.names.index(name)], masks[name])
    for images in (data.images, data.masks):
        assert [i for i, file in enumerate(images._pictures.files) if file.start is not None] == data.folds[0].test.tolist()


def test_unreadable_files_are_left_out(tmp_path):
    masks = folders(tmp_path)
    (tmp_path / "train/images/0.png").write_bytes(b"")
    whole = (tmp_path / "val/masks/2.png").read_bytes()
    (tmp_path / "val/masks/2.png").write_bytes(whole[:50])
    found = find_masks(tmp_path, classes=["a", "b", "c"])
    data = open_masks(found, outputs=3)
    assert [(skip.path, skip.reason) for skip in data.skipped] == [
        ("train/images/0.png", "empty file"),
        ("val/images/2.png", "mask truncated"),
    ]
    left = [name for name in masks if name not in ("train/images/0.png", "val/images/2.png")]
    assert data.images.names == data.masks.names == left
    for i, name in enumerate(left):
        np.testing.assert_array_equal(data.masks[i], masks[name])
        np.testing.assert_array_equal(data.images[i], np.array(Image.open(tmp_path / name)))
    assert list(data.folds[0].train) == [0, 1] and list(data.folds[0].test) == [2, 3]
    assert data.description.endswith("; 2 images left out, they or their masks are unreadable.")
    assert error(found.read_mask, tmp_path / "val/masks/2.png") == (
        "The mask val/masks/2.png cannot be read (truncated): replace it."
    )
    assert "(no such file)" in error(found.read_mask, tmp_path / "gone.png")
    for i in range(3):
        (tmp_path / f"val/masks/{i}.png").write_bytes(b"text")
    assert error(open_masks, found, outputs=3) == (
        "None of the 3 images to test on can be read (val/images/0.png: mask not an image): replace or remove them."
    )


def test_value_outside_the_classes(tmp_path):
    folders(tmp_path)
    mask = indices()
    mask[2, 3] = 42
    save(tmp_path / "val/masks/1.png", mask)
    sentence = (
        "The mask val/masks/1.png has the value {}, and the values of masks here are 0 to 2, or 255 where there is no class: "
        "correct the mask, or name all classes in classes.txt, with their colours (`road 255 255 255`) where the values are "
        "grey levels."
    )
    assert error(open_masks, tmp_path, outputs=3, classes=["a", "b", "c"]) == sentence.format(42)
    save(tmp_path / "val/masks/1.png", mask.astype(np.uint16) * 100)
    assert error(open_masks, tmp_path, outputs=3, classes=["a", "b", "c"]).startswith("The mask val/masks/1.png has the value ")
    save(tmp_path / "val/masks/1.png", np.full(SIZE, 300, np.uint16))
    assert error(open_masks, tmp_path, outputs=3, classes=["a", "b", "c"]) == sentence.format(300)


def test_rgb_masks_without_colours(tmp_path):
    folders(tmp_path)
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[0, 0] = (1, 2, 3)
    save(tmp_path / "val/masks/1.png", pixels)
    for options in ({}, {"classes": ["a", "b", "c"]}):
        assert error(find_masks, tmp_path, **options) == (
            "The mask val/masks/1.png is RGB (colours (0, 0, 0), (1, 2, 3)), and which class a colour stands for is not known: "
            "give classes.txt in the data folder, or `classes`, with a line `name R G B` for each class."
        )


def test_missing_masks(tmp_path):
    folders(tmp_path)
    (tmp_path / "train/masks/2.png").unlink()
    (tmp_path / "val/masks/0.png").unlink()
    assert error(find_masks, tmp_path) == (
        f"2 of 6 images in {tmp_path} have no mask (the first is train/images/2.png, whose mask would be train/masks/2.png): "
        "add the masks, or remove the images."
    )


def test_image_and_mask_of_different_sizes(tmp_path):
    folders(tmp_path)
    save(tmp_path / "val/masks/1.png", indices(size=(3, 4)))
    assert error(find_masks, tmp_path) == (
        "An image and its mask have the same size, val/images/1.png has 6×8 and its mask 3×4: "
        "resize the image, or give the mask that belongs to it."
    )


def test_jpeg_mask(tmp_path):
    folders(tmp_path)
    (tmp_path / "val/masks/1.png").unlink()
    save(tmp_path / "val/masks/1.jpg", indices())
    assert error(find_masks, tmp_path) == (
        "The mask val/masks/1.jpg is a JPEG, whose compression changes class indices: save masks as PNG."
    )


def test_masks_of_black_and_white(tmp_path):
    for part in ("train", "val"):
        photo(tmp_path / part / "images" / "a.png")
        save(tmp_path / part / "masks" / "a.png", indices(2) * 255)
    assert error(find_masks, tmp_path).startswith(f"The masks in {tmp_path} hold no index above 0 but 255, which is ignored")


TWO = "background 0 0 0\nroad 255 255 255\n"


def road_masks(root, make, text=None, count=4):
    """images/ and masks/, where `make` gets the road, bool (6, 8), as another one in each; returns these."""
    roads = [RNG.random(SIZE) < 0.4 for _ in range(count)]
    for i, road in enumerate(roads):
        photo(root / "images" / f"{i}.png")
        path = root / "masks" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        make(road).save(path)
    if text:
        (root / "classes.txt").write_text(text)
    return roads


def of_palette(road, white_first):
    picture = Image.fromarray((road ^ white_first).astype(np.uint8), "P")
    picture.putpalette([255, 255, 255, 0, 0, 0] if white_first else [0, 0, 0, 255, 255, 255])
    return picture


PICTURES = {
    "grey": lambda road: Image.fromarray(road.astype(np.uint8) * 255),
    "rgb": lambda road: Image.fromarray(road.astype(np.uint8) * 255).convert("RGB"),
    "16 bits": lambda road: Image.fromarray(road.astype(np.uint16) * 65535),
    "one bit": lambda road: Image.fromarray(road.astype(np.uint8) * 255).convert("1"),
    "grey with alpha": lambda road: Image.fromarray(road.astype(np.uint8) * 255).convert("LA"),
    "palette": lambda road: of_palette(road, False),
    "palette, other order": lambda road: of_palette(road, True),
    "palette of greys": lambda road: Image.fromarray(road.astype(np.uint8) * 255).convert("P"),
}


@pytest.mark.parametrize("text", [TWO, "road 255 255 255\nbackground 0 0 0\n", "void 0 0 0\nroad 255 255 255\nsky 1 2 3\n"])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_of_black_and_white_is_read_by_colour(tmp_path, kind, text):
    roads = road_masks(tmp_path, PICTURES[kind], text)
    data = open_masks(tmp_path, outputs=2)
    white, black = data.classes.index("road"), data.classes.index("background") if "background" in text else IGNORE
    for name, mask in zip(data.images.names, data.masks, strict=True):
        np.testing.assert_array_equal(mask, np.where(roads[int(name[7])], white, black))
    by_index = text.startswith("road")
    assert ("grey masks read by the classes' colours" in data.description) == (kind in ("grey", "16 bits", "grey with alpha"))
    contradicts = {"palette": by_index, "one bit": by_index, "palette, other order": not text.startswith("road")}
    assert ("palettes contradict the order" in data.description) == contradicts.get(kind, kind == "palette of greys")


def test_three_grey_levels_are_read_by_colour(tmp_path):
    levels = np.array([[0, 128, 255, 128]], np.uint8)
    for i in range(2):
        photo(tmp_path / "images" / f"{i}.png", (1, 4))
        save(tmp_path / "masks" / f"{i}.png", levels)
    sentence = error(find_masks, tmp_path)
    assert "hold the values 0, 128, 255, which look like grey levels" in sentence and "give classes.txt" in sentence
    (tmp_path / "classes.txt").write_text("sky 255 255 255\nroad 128 128 128\ncar 0 0 0\n")
    np.testing.assert_array_equal(open_masks(tmp_path, outputs=3).masks[0], [[2, 1, 0, 1]])


def test_indices_beside_colours_stay_indices(tmp_path):
    """Values that no grey colour has, and 255 where there is no class; a palette of other colours says nothing."""
    for i, palette in enumerate([None, bytes(range(256)) * 3, bytes(RNG.integers(10, 250, 768, np.uint8))]):
        photo(tmp_path / "images" / f"{i}.png", (1, 4))
        save(tmp_path / "masks" / f"{i}.png", np.array([[0, 1, 255, 1]], np.uint8), palette=palette)
    (tmp_path / "classes.txt").write_text(TWO)
    data = open_masks(tmp_path, outputs=2)
    assert all((mask == [[0, 1, IGNORE, 1]]).all() for mask in data.masks) and "colour" not in data.description


def test_a_palette_of_which_only_some_colours_are_known(tmp_path):
    photo(tmp_path / "images" / "0.png", (1, 3))
    save(tmp_path / "masks" / "0.png", np.array([[0, 1, 2]], np.uint8), palette=[255, 255, 255, 0, 0, 0, 9, 9, 9])
    (tmp_path / "classes.txt").write_text(TWO + "car 1 1 1\n")
    sentence = error(find_masks, tmp_path)
    assert "gives the index 0 the colour (255, 255, 255), which is that of another class, and the index 2 the" in sentence
    (tmp_path / "classes.txt").write_text(TWO + "car 9 9 9\n")  # the one advice
    np.testing.assert_array_equal(find_masks(tmp_path).read_mask(tmp_path / "masks/0.png"), [[1, 0, 2]])
    (tmp_path / "classes.txt").write_text("background\nroad\ncar\n")  # the other
    np.testing.assert_array_equal(find_masks(tmp_path).read_mask(tmp_path / "masks/0.png"), [[0, 1, 2]])


def test_black_and_white_with_names_alone_is_refused(tmp_path):
    road_masks(tmp_path, PICTURES["grey"])
    for given in (None, ["background", "road"]):
        assert "hold no index above 0 but 255" in error(open_masks, tmp_path, outputs=2, classes=given)


def test_one_class_is_refused(tmp_path):
    folders(tmp_path, classes=2)
    for given in (["road"], ["void", "road"]):
        assert error(find_masks, tmp_path, classes=given).startswith(
            "A segmentation has at least 2 classes, road is named alone"
        )


def test_one_output_is_background_and_foreground(tmp_path):
    folders(tmp_path, classes=2)
    assert len(open_masks(tmp_path, outputs=1).classes) == 2
    folders(tmp_path, classes=3)
    assert error(mask_classes, tmp_path, 1) == (
        "The network has one output, which tells background from foreground, and the masks 3 classes (class 0, class 1, "
        "class 2): take a network with 3 outputs, or masks of two classes."
    )


def test_an_output_for_void_is_named(tmp_path):
    folders(tmp_path)
    assert error(mask_classes, tmp_path, 4).endswith("; where its last is for pixels without a class, ignore_output=3.")


def test_number_of_classes(tmp_path):
    folders(tmp_path)
    for check in (mask_classes, lambda path, outputs: open_masks(path, outputs=outputs)):
        assert error(check, tmp_path, 19) == (
            "The network has 19 outputs and the masks 3 classes (class 0, class 1, class 2): take a network with 3 outputs, "
            "or give classes.txt in the data folder, or `classes`, with a line for each of 19 classes."
        )
    assert mask_classes(tmp_path, 3).label_size == SIZE


def test_folders_without_a_layout(tmp_path):
    (tmp_path / "things").mkdir()
    sentence = error(find_masks, tmp_path)
    assert sentence.startswith(
        f"{tmp_path} does not have a known layout of images and masks: point `data` to a folder that holds"
    )
    assert all(name in sentence for name in ("(cityscapes)", "(ade20k)", "(voc)", "(camvid)", "(folders)"))
    assert error(find_masks, tmp_path, layout="voc").startswith(f"{tmp_path} does not have the layout voc: ")
    assert error(find_masks, tmp_path, layout="coco") == (
        "The layouts are cityscapes, ade20k, voc, camvid, folders, 'coco' is not: name one of them or none."
    )
    assert error(find_masks, tmp_path / "gone") == (
        f"Masks need a folder and {tmp_path / 'gone'} is not there: point `data` to a folder of images and masks."
    )


def test_empty_part(tmp_path):
    folders(tmp_path)
    for file in (tmp_path / "val/images").iterdir():
        file.unlink()
    assert error(find_masks, tmp_path) == (
        f"The part val of {tmp_path} (layout folders) has no images: add them, or remove its empty folder or list."
    )


def test_folds_of_data_that_are_divided(tmp_path):
    folders(tmp_path)
    assert error(open_masks, tmp_path, outputs=3, folds=2) == (
        f"`folds` needs data that are not divided, {tmp_path} has both train and val: leave `folds` out, or point `data` to a "
        "folder with one set of images and masks."
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The file of classes {} is empty: write a class a line, `name` or `name R G B`."),
        ("a 300 0 0\n", "{} is not a list of classes: write a class a line, `name` or `name R G B`."),
        ("a 1 2 3\nb 1 2 3\n", "The class b has the colour (1, 2, 3), which another class has: give each its own."),
        ("\n".join(f"c{i}" for i in range(256)), "Masks have at most 255 classes, 256 are named: leave out or join some."),
    ],
)
def test_bad_files_of_classes(tmp_path, text, sentence):
    folders(tmp_path)
    file = tmp_path / "mine.txt"
    file.write_text(text)
    assert error(find_masks, tmp_path, classes=file) == sentence.format(file)
