import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from downres.errors import DownresError
from downres.measuring.statistics import bootstrap_p, holm
from downres.records import OUTSIDE, TOO_FEW, WITHIN, Budget
from downres.tasks.segmentation.quality import (
    LARGE,
    SMALL,
    SPECK,
    Tallies,
    Truths,
    compare_tallies,
    segmentation_quality,
    tally,
)

COUNTS = ("hits", "predicted", "truth", "boundary_hits", "boundary_predicted", "boundary_truth")


def blobs(seed: int, shape: tuple[int, int], classes: int, ignored: float = 0.1) -> np.ndarray:
    """A random mask of regions some pixels wide; ignored: about that share is 255."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(classes, *shape)), (0, 2, 2))
    mask = noise.argmax(axis=0).astype(np.uint8)
    void = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    mask[void > np.quantile(void, 1 - ignored)] = 255
    return mask


def shifted(mask: np.ndarray, by: tuple[int, int] = (2, 3), fill: int = 1) -> np.ndarray:
    """A prediction: the mask moved, and a class where that has none."""
    prediction = np.roll(mask, by, (0, 1))
    prediction[prediction == 255] = fill
    return prediction


@pytest.fixture(scope="module")
def streets(shared_data: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Real masks of CamVid, 11 classes at 360×480, and predictions made of them: moved, and coarser by 4."""
    masks, predictions = [], []
    for file in sorted((shared_data / "camvid" / "valannot").glob("*.png"))[::8]:
        with Image.open(file) as picture:
            mask = np.array(picture)
        mask[mask == 11] = 255
        masks.append(mask)
        predictions.append(shifted(mask[::4, ::4].repeat(4, axis=0).repeat(4, axis=1)))
    if not masks:
        pytest.skip("CamVid is not among the shared data")
    return masks, predictions


def many(seed: int, images: int, classes: int = 4, worse: float = 0.1) -> tuple[Tallies, Tallies]:
    """Tallies of two models on the same small masks; the second is wrong at about `worse` more of the pixels."""
    rng = np.random.default_rng(seed)
    masks = [blobs(int(rng.integers(1 << 30)), (24, 32), classes) for _ in range(images)]

    def spoiled(mask: np.ndarray, share: float) -> np.ndarray:
        wrong = rng.random(mask.shape) < share * rng.exponential()
        return np.where(wrong | (mask == 255), rng.integers(0, classes, mask.shape), mask)

    good = [spoiled(mask, 0.1) for mask in masks]
    bad = [np.where(rng.random(mask.shape) < worse, spoiled(mask, 1.0), p) for mask, p in zip(masks, good, strict=True)]
    truths = Truths(masks, classes)
    return tally(good, truths, classes), tally(bad, truths, classes)


def assert_same(one: Tallies, other: Tallies) -> None:
    for name, array in one.to_arrays().items():
        assert np.array_equal(array, other.to_arrays()[name]), name
        assert array.dtype == (np.float64 if name == "object_iou" else np.int64), name


def test_by_hand():
    mask = np.array([[0, 0, 0, 1], [0, 0, 1, 255], [2, 2, 2, 255]], dtype=np.uint8)
    prediction = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 2, 2, 2]])
    tallies = tally([prediction], [mask], 4)
    assert tallies.hits.tolist() == [[4, 2, 2, 0]]
    assert tallies.predicted.tolist() == [[5, 3, 2, 0]]
    assert tallies.truth.tolist() == [[5, 2, 3, 0]]
    assert tallies.confusion.tolist() == [[4, 1, 0, 0], [0, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    quality = segmentation_quality(tallies)
    assert quality.iou[:3] == pytest.approx((100 * 4 / 6, 100 * 2 / 3, 100 * 2 / 3))
    assert quality.iou[3] is None and quality.boundary_iou[3] is None
    assert quality.miou == pytest.approx(100 * 2 / 3)
    assert quality.pixel_accuracy == pytest.approx(80.0)
    assert quality.n == 1
    # all pixels are within 1 of a border, so the boundary's numbers are those of the whole
    assert quality.boundary_iou[:3] == quality.iou[:3] and quality.boundary_miou == quality.miou


def test_images_are_summed_before_they_are_divided():
    masks = [np.array([[0, 0, 0, 1]], np.uint8), np.array([[1, 1, 1, 1]], np.uint8)]
    quality = segmentation_quality(tally([np.zeros((1, 4), int), np.ones((1, 4), int)], masks, 2))
    assert quality.iou == pytest.approx((75.0, 80.0))  # the means of the images' own would be 75 and 50
    assert quality.miou == pytest.approx(77.5)


def test_a_class_that_is_only_predicted_has_iou_0_and_one_that_is_nowhere_has_none():
    mask = np.zeros((4, 4), np.uint8)
    prediction = mask.copy()
    prediction[0, 0] = 1
    quality = segmentation_quality(tally([prediction], [mask], 3))
    assert quality.iou == (pytest.approx(100 * 15 / 16), 0.0, None)
    assert quality.miou == pytest.approx(100 * 15 / 32)


@pytest.mark.parametrize("where", ["random", "camvid"])
def test_class_iou_is_that_of_cityscapesscripts(where, tmp_path, request):
    evaluation = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="Cityscapes' own evaluation is not installed"
    )
    from cityscapesscripts.helpers.labels import labels, trainId2label

    if where == "camvid":
        masks, predictions = request.getfixturevalue("streets")
    else:
        masks = [blobs(i, (60, 90), 17) for i in range(5)]  # classes 17 and 18 are nowhere in the truth
        predictions = [shifted(m, (i, 2)) for i, m in enumerate(masks)]
        predictions[0][:3] = 17  # and 17 is predicted
    ids = np.zeros(256, np.uint8)
    ids[:19] = [trainId2label[k].id for k in range(19)]
    ids[255] = next(label.id for label in labels if label.name == "parking")
    files: dict[str, list[str]] = {"truth": [], "prediction": []}
    for i, pair in enumerate(zip(masks, predictions, strict=True)):
        for kind, array in zip(files, pair, strict=True):
            files[kind].append(str(tmp_path / f"{kind}_{i}.png"))
            Image.fromarray(ids[array]).save(files[kind][-1])
    args = copy.copy(evaluation.args)
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    theirs = evaluation.evaluateImgLists(files["prediction"], files["truth"], args)

    tallies = tally(predictions, masks, 19)
    quality = segmentation_quality(tallies)
    for k, iou in enumerate(quality.iou):
        expected = theirs["classScores"][trainId2label[k].name]
        assert (iou is None) if np.isnan(expected) else iou == 100 * expected
    assert sum(iou is None for iou in quality.iou) == (8 if where == "camvid" else 1)
    assert quality.miou == pytest.approx(100 * theirs["averageScoreClasses"], rel=1e-13)
    assert np.array_equal(tallies.confusion, np.array(theirs["confMatrix"])[np.ix_(ids[:19], ids[:19])])


@pytest.mark.parametrize("where", ["random", "camvid"])
def test_the_same_as_torchmetrics_where_that_is_right(where, request):
    metrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    torch = pytest.importorskip("torch")
    from torchmetrics.segmentation import MeanIoU

    if where == "camvid":
        masks, predictions = request.getfixturevalue("streets")
    else:
        masks = [blobs(i, (60, 90), 11) for i in range(4)]
        predictions = [shifted(m, (i, 2)) for i, m in enumerate(masks)]
    truth, given = (torch.from_numpy(np.stack(arrays)).long() for arrays in (masks, predictions))
    quality = segmentation_quality(tally(predictions, masks, 11))
    each = metrics.JaccardIndex("multiclass", num_classes=11, ignore_index=255, average="none")(given, truth)
    assert quality.iou == pytest.approx(tuple(100 * each.double().numpy()), rel=1e-5)
    accuracy = metrics.Accuracy("multiclass", num_classes=11, ignore_index=255, average="micro")(given, truth)
    assert quality.pixel_accuracy == pytest.approx(100 * accuracy.item(), rel=1e-5)
    # its Jaccard index of a class that is nowhere is 0 and not undefined, but its mean leaves the class out
    more = segmentation_quality(tally(predictions, masks, 12))
    assert more.iou[11] is None
    mean = metrics.JaccardIndex("multiclass", num_classes=12, ignore_index=255, average="macro")(given, truth)
    assert more.miou == pytest.approx(100 * mean.item(), rel=1e-5)
    # its MeanIoU is another metric: no pixel can be ignored, and it averages over images, in which sense it is right for one
    whole = [np.where(mask == 255, 0, mask).astype(np.uint8) for mask in masks]
    by_image = MeanIoU(11, input_format="index", per_class=True)
    for one, mask, prediction in zip(torch.from_numpy(np.stack(whole)).long(), whole, given, strict=True):
        by_image.reset()
        by_image.update(prediction[None], one[None])
        own = segmentation_quality(tally([prediction.numpy()], [mask], 11))
        theirs = [100 * v for v in by_image.compute().tolist()]
        assert [theirs[k] for k in range(11) if own.iou[k] is not None] == pytest.approx(
            [v for v in own.iou if v is not None], rel=1e-5
        )


def naive_boundary(labels: np.ndarray, k: int, width: int) -> np.ndarray:
    """The region of one class less its erosion, everything outside the picture being background."""
    square = np.ones((3, 3), bool)
    region = labels == k
    return region & ~ndimage.binary_erosion(region, square, iterations=width, border_value=0)


@pytest.mark.parametrize("where", ["small", "wide", "camvid"])
def test_boundary_iou_is_that_of_an_erosion_class_by_class(where, request):
    if where == "camvid":
        masks, predictions = (arrays[:2] for arrays in request.getfixturevalue("streets"))
    else:
        masks = [blobs(i, {"small": (20, 11), "wide": (40, 260)}[where], 11) for i in range(4)]
        predictions = [shifted(m) for m in masks]
    width = {"small": 1, "wide": 5, "camvid": 12}[where]  # 2 % of 22.8, 263.1 and 600 pixels, at least 1
    tallies = tally(predictions, masks, 11)
    for i, (mask, prediction) in enumerate(zip(masks, predictions, strict=True)):
        cut = np.where(mask == 255, 255, prediction)
        for k in range(11):
            true, found = naive_boundary(mask, k, width), naive_boundary(cut, k, width)
            assert tallies.boundary_truth[i, k] == true.sum()
            assert tallies.boundary_predicted[i, k] == found.sum()
            assert tallies.boundary_hits[i, k] == (true & found).sum()


def test_the_pictures_border_is_boundary():
    tallies = tally([np.zeros((100, 100), int)], [np.zeros((100, 100), np.uint8)], 1)
    assert tallies.boundary_truth.tolist() == [[100**2 - 94**2]]  # 2 % of 141.4 is 3


def test_boundary_iou_sees_what_iou_hardly_does():
    mask = np.zeros((200, 200), np.uint8)
    mask[50:150, 50:150] = 1
    prediction = np.zeros_like(mask)
    prediction[53:147, 53:147] = 1
    quality = segmentation_quality(tally([prediction], [mask], 2))
    assert quality.iou[1] == pytest.approx(100 * 94**2 / 100**2)
    # 2 % of 282.8 is 6: a frame from 100 to 88 against one from 94 to 82
    assert quality.boundary_iou[1] == pytest.approx(100 * (94**2 - 88**2) / (100**2 - 82**2))


def naive_objects(mask: np.ndarray, prediction: np.ndarray, classes: int) -> dict[tuple[int, int, int], float]:
    """IoU by (class, area, first pixel) of every object, from one labelling a class and sets of pixels."""
    found = {}
    prediction = np.where(mask == 255, 255, prediction)
    for k in range(classes):
        true, count = ndimage.label(mask == k, np.ones((3, 3)))
        parts, _ = ndimage.label(prediction == k, np.ones((3, 3)))
        for number in range(1, count + 1):
            own = true == number
            touching = np.isin(parts, np.setdiff1d(parts[own], 0))
            counted = touching & ~((mask == k) & ~own)
            iou = (own & touching).sum() / (own | counted).sum()
            if own.sum() >= SPECK * mask.size:
                found[k, int(own.sum()), int(np.flatnonzero(own)[0])] = iou
    return found


@pytest.mark.parametrize("where", ["blobs", "noise", "camvid"])
def test_object_iou_is_that_of_components_found_class_by_class(where, request):
    if where == "camvid":
        mask, prediction = (arrays[3] for arrays in request.getfixturevalue("streets"))
    elif where == "blobs":
        mask = blobs(1, (80, 100), 5)
        prediction = shifted(mask)
    else:  # many crossings of diagonals
        rng = np.random.default_rng(0)
        mask, prediction = (rng.integers(0, 3, (60, 50)).astype(np.uint8) for _ in range(2))
        mask[rng.random(mask.shape) < 0.2] = 255
    tallies = tally([prediction], [mask], 11)
    naive = naive_objects(mask, prediction, 11)
    ours = zip(tallies.object_class, tallies.object_area, tallies.object_iou, strict=True)
    assert sorted((int(k), int(area), iou) for k, area, iou in ours) == sorted(
        (k, area, v) for (k, area, _), v in naive.items()
    )
    assert 0 < tallies.object_iou.mean() < 1


def test_object_iou_by_hand():
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 5:15] = 1  # found, with 20 pixels too many
    mask[5:15, 25:35] = 1  # found together with the next by one component over a gap of 10 by 5
    mask[5:15, 40:50] = 1
    mask[25:30, 5:15] = 1  # not found
    mask[25:30, 40:50] = 1  # covered by the wrong class
    prediction = np.zeros_like(mask)
    prediction[5:15, 5:17] = 1
    prediction[5:15, 25:50] = 1
    prediction[25:30, 40:50] = 2
    prediction[35:38, 20:23] = 1  # touches nothing, so it is nobody's error here
    tallies = tally([prediction], [mask], 3)
    ours = sorted(tallies.object_iou[tallies.object_class == 1])
    assert ours == pytest.approx([0.0, 0.0, 100 / 150, 100 / 150, 100 / 120])
    assert sorted(tallies.object_area[tallies.object_class == 1]) == [50, 50, 100, 100, 100]


def test_objects_touch_across_corners():
    mask = np.zeros((30, 30), np.uint8)
    mask[np.arange(30), np.arange(30)] = 1
    tallies = tally([mask], [mask], 2)
    assert sorted(zip(tallies.object_class, tallies.object_area, strict=True)) == [(0, 870), (1, 30)]


def test_sizes_are_shares_of_the_picture():
    mask = np.zeros((480, 640), np.uint8)
    edges = {"crumb": (3, 5), "small": (31, 33), "medium": (32, 32), "nearly large": (95, 97), "large": (96, 96)}
    for i, (height, width) in enumerate(edges.values()):
        mask[10 : 10 + height, 110 * i + 5 : 110 * i + 5 + width] = 1
    for scale in (1, 2):
        picture = mask.repeat(scale, 0).repeat(scale, 1)
        quality = segmentation_quality(tally([picture], [picture], 2))
        assert quality.objects == {"small": 1, "medium": 2, "large": 2}  # the second large one is the background
        assert quality.object_iou == {"small": 100.0, "medium": 100.0, "large": 100.0}
    assert (SPECK * 307200, SMALL * 307200, LARGE * 307200) == (16, 1024, 9216)


def test_no_object_of_a_size_is_none():
    quality = segmentation_quality(tally([np.zeros((9, 9), int)], [np.zeros((9, 9), np.uint8)], 1))
    assert quality.object_iou == {"small": None, "medium": None, "large": 100.0}
    assert quality.objects == {"small": 0, "medium": 0, "large": 1}


def test_a_perfect_prediction_has_100_everywhere(streets):
    masks, _ = streets
    quality = segmentation_quality(tally([np.where(m == 255, 7, m) for m in masks], masks, 11))
    assert quality.miou == quality.miou_low == quality.miou_high == quality.pixel_accuracy == quality.boundary_miou == 100.0
    assert set(quality.iou) == set(quality.boundary_iou) == set(quality.object_iou.values()) == {100.0}


def test_small_objects_die_first(streets):
    masks, _ = streets
    found = [segmentation_quality(tally([m[::f, ::f].repeat(f, 0).repeat(f, 1) % 255 for m in masks], masks, 11)).object_iou
             for f in (2, 4, 8)]  # fmt: skip
    for size in ("small", "medium", "large"):
        assert found[0][size] > found[1][size] > found[2][size]
    for ious in found:
        assert ious["small"] < ious["medium"] < ious["large"]


def test_what_is_predicted_on_ignored_pixels_does_not_matter():
    masks = [blobs(i, (40, 50), 5, ignored=0.3) for i in range(3)]
    predictions = [shifted(m) for m in masks]
    rng = np.random.default_rng(0)
    other = [np.where(m == 255, rng.integers(0, 5, m.shape), p) for m, p in zip(masks, predictions, strict=True)]
    assert any((a != b).any() for a, b in zip(predictions, other, strict=True))
    assert_same(tally(predictions, masks, 5), tally(other, masks, 5))


def test_an_image_without_a_class_changes_nothing():
    good, bad = many(0, 15)
    nothing = tally([np.zeros((9, 9), int)], [np.full((9, 9), 255, np.uint8)], 4)
    assert len(nothing.object_iou) == 0
    more, fewer = (Tallies.concatenate([t, nothing]) for t in (good, bad))
    one, two = segmentation_quality(good), segmentation_quality(more)
    assert (one.miou, one.miou_low, one.miou_high, one.n + 1) == (two.miou, two.miou_low, two.miou_high, two.n)
    budget = Budget(max_drop=5.0)
    drops = [compare_tallies(o, {"": c}, budget)[""] for o, c in ((good, bad), (more, fewer))]
    assert (drops[0].drop, drops[0].upper) == (drops[1].drop, drops[1].upper)


def test_mirrored_and_renamed():
    masks = [blobs(i, (40, 52), 5) for i in range(3)]
    predictions = [shifted(m) for m in masks]
    tallies = tally(predictions, masks, 5)
    mirrored = tally([p[:, ::-1] for p in predictions], [m[:, ::-1] for m in masks], 5)
    names = np.r_[[3, 0, 4, 1, 2], np.zeros(250, int), 255].astype(np.uint8)
    renamed = tally([names[p] for p in predictions], [names[m] for m in masks], 5)
    for name in COUNTS:
        assert np.array_equal(getattr(tallies, name), getattr(mirrored, name))
        assert np.array_equal(getattr(tallies, name), getattr(renamed, name)[:, names[:5]])
    assert sorted(tallies.object_iou) == sorted(mirrored.object_iou) == sorted(renamed.object_iou)
    assert np.array_equal(tallies.confusion, renamed.confusion[np.ix_(names[:5], names[:5])])


def test_the_tallies_agree_with_each_other(streets):
    masks, predictions = streets
    tallies = tally(predictions, masks, 11)
    assert np.array_equal(tallies.confusion.sum(axis=0), tallies.predicted.sum(axis=0))
    assert np.array_equal(tallies.confusion.sum(axis=1), tallies.truth.sum(axis=0))
    assert np.array_equal(np.diagonal(tallies.confusion), tallies.hits.sum(axis=0))
    assert tallies.truth.sum() == sum((m != 255).sum() for m in masks)
    assert (tallies.image_area == 360 * 480).all()


def test_truths_find_what_was_found_before():
    masks = [blobs(i, (40, 52), 5) for i in range(3)]
    truths = Truths([m.astype(np.int64) for m in masks], 5)
    for make in (shifted, lambda m: shifted(m, (5, 1), 0)):
        predictions = [make(m) for m in masks]
        assert_same(tally(predictions, truths, 5), tally(iter(predictions), masks, 5))
    first, again = truths[1], truths[1]
    assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(first, again, strict=True))
    assert len(truths) == 3


def test_select_and_join_are_as_tallied_so(tmp_path):
    masks = [blobs(i, (30 + i, 40), 4) for i in range(6)]
    masks[2][:] = 255  # no object and no cell
    predictions = [shifted(m) for m in masks]
    tallies = tally(predictions, masks, 4)
    for chosen in ([0, 1, 2, 3, 4, 5], [4, 2, 2, 5, 4], [3]):
        again = tally([predictions[i] for i in chosen], [masks[i] for i in chosen], 4)
        assert_same(tallies.select(np.array(chosen)), again)
        assert_same(Tallies.concatenate([tallies.select(np.array([i])) for i in chosen]), again)
    assert_same(tallies.select(np.arange(6) % 2 == 0), tallies.select(np.array([0, 2, 4])))
    assert len(tallies.select(np.zeros(6, bool))) == 0 and tallies.classes == 4
    np.savez(tmp_path / "tallies.npz", **tallies.to_arrays())
    with np.load(tmp_path / "tallies.npz") as arrays:
        assert_same(Tallies.from_arrays(arrays), tallies)


def test_the_interval_is_scipys_percentile_bootstrap_at_the_widened_level():
    tallies, _ = many(3, 20)

    def miou(images, axis=-1):
        hits, union = (t[images].sum(axis=-2) for t in (tallies.hits, tallies.predicted + tallies.truth))
        return 100 * (hits / (union - hits)).mean(axis=-1)

    # 97.5 % widened for 20 images: the normal share below -t √(n / (n-1))
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 19) * np.sqrt(20 / 19))
    theirs = stats.bootstrap((np.arange(20),), miou, n_resamples=20_000, batch=1000, confidence_level=1 - 2 * tail,
                             method="percentile", vectorized=True, rng=np.random.default_rng(1))  # fmt: skip
    quality = segmentation_quality(tallies)
    interval = theirs.confidence_interval
    width = interval.high - interval.low
    assert quality.miou == pytest.approx(miou(np.arange(20)))
    assert quality.miou_low == pytest.approx(interval.low, abs=0.05 * width)
    assert quality.miou_high == pytest.approx(interval.high, abs=0.05 * width)
    assert segmentation_quality(tallies, seed=1) != quality == segmentation_quality(tallies)


def test_few_images_tell_nothing():
    good, bad = many(5, 10)
    nine, worse = good.select(np.arange(9)), bad.select(np.arange(9))
    quality = segmentation_quality(nine)
    assert (quality.miou_low, quality.miou_high) == (0.0, 100.0)
    quality = segmentation_quality(good)
    assert 0 < quality.miou_low < quality.miou < quality.miou_high < 100
    drop = compare_tallies(nine, {"": worse}, Budget(max_drop=50.0))[""]
    assert (drop.lower, drop.upper, drop.verdict, drop.more_images) == (-100.0, 100.0, TOO_FEW, 1)
    assert compare_tallies(good, {"": bad}, Budget(max_drop=50.0))[""].verdict == WITHIN


def test_a_drop_is_the_difference_of_the_two_mious():
    good, bad = many(1, 30)
    drop = compare_tallies(good, {"": bad}, Budget(max_drop=30.0))[""]
    assert drop.drop == segmentation_quality(good).miou - segmentation_quality(bad).miou > 1
    assert (drop.lost, drop.won, drop.n, drop.comparisons, drop.confidence) == (None, None, 30, 1, 0.95)
    assert drop.lower < drop.drop < drop.upper
    back = compare_tallies(bad, {"": good}, Budget(max_drop=30.0))[""]
    assert (back.drop, back.lower, back.upper) == pytest.approx((-drop.drop, -drop.upper, -drop.lower))
    # the images are paired: the bounds are much nearer than the two intervals would let one think
    one, other = segmentation_quality(good), segmentation_quality(bad)
    assert drop.upper - drop.drop < 0.7 * ((one.miou_high - one.miou) + (other.miou - other.miou_low))


def test_a_model_has_no_drop_against_itself():
    good, _ = many(1, 12)
    drop = compare_tallies(good, {"": good}, Budget(max_drop=0.5))[""]
    assert (drop.drop, drop.lower, drop.upper, drop.verdict) == (0.0, 0.0, 0.0, WITHIN)
    assert compare_tallies(good, {"": good}, Budget(max_drop=0.0))[""].verdict == TOO_FEW
    assert compare_tallies(good, {}, Budget()) == {}


def test_verdicts_and_how_many_more():
    good, bad = many(2, 60)
    exact = compare_tallies(good, {"": bad}, Budget(max_drop=5.0))[""]
    half = exact.upper - exact.drop
    verdicts = {}
    for margin in (exact.lower - 0.01, exact.drop - 0.01, exact.drop + half / 2, exact.upper, exact.upper + 0.01):
        record = compare_tallies(good, {"": bad}, Budget(max_drop=margin))[""]
        verdicts[record.verdict] = verdicts.get(record.verdict, 0) + 1
        assert (record.drop, record.lower, record.upper) == (exact.drop, exact.lower, exact.upper)
        if margin == exact.drop + half / 2:  # half the distance: four times the images
            assert record.more_images == pytest.approx(3 * 60, abs=1)
        elif margin == exact.upper:
            assert record.more_images == 1
        else:
            assert record.more_images is None
    assert verdicts == {OUTSIDE: 1, TOO_FEW: 3, WITHIN: 1}


def test_holm_over_the_candidates():
    good, _ = many(4, 40)
    candidates = {f"{worse}": many(4, 40, worse=worse)[1] for worse in (0.0, 0.02, 0.05, 0.1, 0.3)}
    assert all(np.array_equal(c.truth, good.truth) for c in candidates.values())
    seen = set()
    for margin in (0.5, 1.5, 2.5, 3.5, 5.0, 10.0):
        budget = Budget(max_drop=margin)
        drops = compare_tallies(good, candidates, budget)
        alone = {name: compare_tallies(good, {name: c}, budget)[name] for name, c in candidates.items()}
        for name, drop in drops.items():
            assert (drop.verdict == WITHIN) == (drop.upper < margin)
            assert (drop.verdict == OUTSIDE) == (drop.lower > margin)
            assert drop.drop == alone[name].drop and drop.upper >= alone[name].upper and drop.lower <= alone[name].lower
            corrected = compare_tallies(good, {name: candidates[name]}, Budget(max_drop=margin, confidence=0.99))[name]
            assert drop.comparisons == 5 and drop.lower == corrected.lower  # Bonferroni: 5 % over five candidates
            seen.add(drop.verdict)
    assert seen == {WITHIN, TOO_FEW, OUTSIDE}


def test_verdicts_are_holms_decisions():
    from downres.tasks.segmentation import quality as segmentation

    good, _ = many(4, 40)
    candidates = {f"{worse}": many(4, 40, worse=worse)[1] for worse in (0.02, 0.04, 0.05, 0.07)}
    first, *others = segmentation._resampled_miou([good, *candidates.values()], 0)
    for margin in np.linspace(0.5, 6, 12):
        drops = compare_tallies(good, candidates, Budget(max_drop=float(margin)))
        p = [bootstrap_p(first - o, d.drop, 40, float(margin)) for o, d in zip(others, drops.values(), strict=True)]
        assert [d.verdict == WITHIN for d in drops.values()] == [test.rejected for test in holm(p, 1 - 0.95)]


def test_the_upper_bound_is_below_the_true_drop_as_seldom_as_promised():
    """Images drawn with replacement from 200, whose own drop is then the true one; few images, on purpose."""
    good, bad = many(7, 200)
    truth = compare_tallies(good, {"": bad}, Budget())[""].drop
    rng = np.random.default_rng(0)
    trials, above, below = 200, 0, 0
    for trial in range(trials):
        images = rng.integers(200, size=15)
        drop = compare_tallies(good.select(images), {"": bad.select(images)}, Budget(), seed=trial)[""]
        above += drop.upper < truth
        below += drop.lower > truth
    # 5 % promised each; of 200 trials with 5 %, more than 20 is a chance of 0.1 %, and 0 one of 0.004 %
    assert 0 < above <= 20 and 0 < below <= 20


@pytest.mark.parametrize(
    ("prediction", "mask", "message"),
    [
        (np.zeros((4, 5), int), np.zeros((5, 4), np.uint8), "image 1 has 5×4 and its prediction 4×5: bring the logits"),
        (np.zeros((4, 4), int), np.full((4, 4), 3, np.uint8), "0 to 2, and 255 where .* image 1 holds 3: map that value"),
        (np.zeros((4, 4), int), np.full((4, 4), -1), "image 1 holds -1"),
        (np.zeros((4, 4), int), np.zeros((4, 4, 3), np.uint8), "4×4×3 of uint8: read it as indices"),
        (np.zeros((4, 4), int), np.zeros((4, 4), bool), "4×4 of bool"),
        (np.full((4, 4), 255), np.zeros((4, 4), np.uint8), "0 to 2, that for image 1 holds 255"),
        (np.full((4, 4), -1), np.zeros((4, 4), np.uint8), "image 1 holds -1"),
        (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.uint8), "image 1 is of float32: take the index"),
        (np.zeros((3, 4, 4), np.float32), np.zeros((4, 4), np.uint8), "its prediction 3×4×4"),
    ],
)
def test_bad_input_is_named(prediction, mask, message):
    fine = np.zeros((4, 4), np.uint8)
    with pytest.raises(DownresError, match=message) as error:
        tally([fine, prediction], [fine, mask], 3)
    assert str(error.value).count(". ") == 0


def test_as_many_predictions_as_masks():
    one = np.zeros((4, 4), np.uint8)
    for predictions, masks in (([one], [one, one]), ([one, one], [one]), ([], [])):
        with pytest.raises(DownresError, match="needs"):
            tally(predictions, masks, 2)


def test_all_pixels_ignored():
    nothing = tally([np.zeros((4, 4), int)], [np.full((4, 4), 255, np.uint8)], 2)
    with pytest.raises(DownresError, match="all 1 masks every pixel is ignored"):
        segmentation_quality(nothing)
    with pytest.raises(DownresError, match="every pixel is ignored"):
        compare_tallies(nothing, {"": nothing}, Budget())


def test_only_the_same_images_can_be_compared():
    good, bad = many(0, 12)
    with pytest.raises(DownresError, match="original has 12 images of 4 classes and small 11 of 4: tally both"):
        compare_tallies(good, {"fine": bad, "small": bad.select(np.arange(11))}, Budget())
    with pytest.raises(DownresError, match="turned was tallied on another mask at image 0"):
        compare_tallies(good, {"turned": bad.select(np.arange(12)[::-1])}, Budget())


def test_the_number_of_classes_is_checked():
    mask = np.zeros((4, 4), np.uint8)
    for classes in (0, 256):
        with pytest.raises(DownresError, match=f"{classes} cannot be"):
            Truths([mask], classes)
    with pytest.raises(DownresError, match="read with 3 classes and not 4"):
        tally([mask], Truths([mask], 3), 4)
    with pytest.raises(DownresError, match=r"\[2, 3\] classes"):
        Tallies.concatenate([tally([mask], [mask], k) for k in (2, 3)])
    assert tally([np.full((4, 4), 254)], [np.full((4, 4), 254, np.uint8)], 255).hits[0, 254] == 16
