import numpy as np
import pytest

from downres.errors import DownresError
from downres.measure.quality import compare, compare_all, count_correct, quality
from downres.measure.statistics import paired_bound
from downres.records import OUTSIDE, TOO_FEW, WITHIN, Budget


def right(n: int, wrong: range = range(0)) -> np.ndarray:
    """Bool (n,), False at the places `wrong`."""
    return ~np.isin(np.arange(n), wrong)


def test_ties_go_to_the_lowest_class_as_in_argmax():
    logits = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    assert count_correct(logits, np.array([0, 1, 1])).tolist() == [True, False, True]
    rng = np.random.default_rng(0)
    coarse, labels = rng.integers(0, 3, (500, 10)).astype(np.float32), rng.integers(0, 10, 500)
    assert (count_correct(coarse, labels) == (coarse.argmax(axis=1) == labels)).all()
    first5 = np.argsort(-coarse, axis=1, kind="stable")[:, :5]
    assert (count_correct(coarse, labels, k=5) == (first5 == labels[:, None]).any(axis=1)).all()


def test_a_constant_output_is_right_only_for_the_first_classes():
    logits, labels = np.zeros((10, 10)), np.arange(10)
    assert count_correct(logits, labels).sum() == 1
    assert count_correct(logits, labels, k=5).sum() == 5


def test_nan_is_an_error_that_counts_the_images():
    logits = np.zeros((4, 3))
    logits[1, 2] = logits[3, 0] = np.nan
    with pytest.raises(DownresError, match="The model returns NaN for 2 of 4 images"):
        count_correct(logits, np.zeros(4, dtype=int))


@pytest.mark.parametrize("label", [-1, 3, 0.5, np.nan])
def test_a_label_that_is_no_class_is_an_error(label):
    with pytest.raises(DownresError, match="from 0 to 2 .* is not"):
        count_correct(np.zeros((2, 3)), np.array([0, label]))


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 4, 1)])
def test_logits_of_another_shape_are_an_error(shape):
    with pytest.raises(DownresError, match="one row of logits"):
        count_correct(np.zeros(shape), np.zeros(2, dtype=int))


def test_quality_is_in_percent():
    q = quality(right(2624, range(391)), right(2624, range(24)))
    assert (q.correct, q.n, q.correct5) == (2233, 2624, 2600)
    assert q.top1 == pytest.approx(85.099, abs=1e-3)
    assert q.top5 == pytest.approx(99.085, abs=1e-3)
    assert q.top1_low < q.top1 < q.top1_high
    assert (q.top1_low, q.top1_high) == pytest.approx((83.69, 86.41), abs=0.02)


def test_quality_needs_an_image():
    with pytest.raises(DownresError, match="at least one"):
        quality(right(0))


def test_a_drop_is_in_points_and_counts_the_discordant_images():
    original, candidate = right(1000, range(100, 120)), right(1000, range(110, 145))
    drop = compare(original, candidate, Budget(max_drop=3.0))
    assert (drop.lost, drop.won, drop.n) == (25, 10, 1000)
    assert drop.drop == pytest.approx(1.5)
    assert (drop.lower, drop.upper) == pytest.approx(tuple(100 * b for b in paired_bound(25, 10, 1000, 0.95)))
    assert (drop.verdict, drop.confidence, drop.comparisons, drop.more_images) == (WITHIN, 0.95, 1, None)


def test_verdicts():
    original = right(1000)
    drops = {lost: compare(original, right(1000, range(lost)), Budget(max_drop=1.0)) for lost in (0, 7, 10, 12, 40)}
    assert {lost: d.verdict for lost, d in drops.items()} == {0: WITHIN, 7: TOO_FEW, 10: TOO_FEW, 12: TOO_FEW, 40: OUTSIDE}
    assert drops[7].more_images is not None and drops[7].more_images > 0
    assert drops[10].more_images is None and drops[12].more_images is None and drops[40].more_images is None
    assert drops[40].lower > 1.0


def test_no_drop_allowed_can_be_proven_only_by_a_gain():
    worse, better = right(500, range(40)), right(500)
    assert compare(worse, better, Budget(max_drop=0.0)).verdict == WITHIN
    assert compare(better, better, Budget(max_drop=0.0)).verdict == TOO_FEW


def test_two_candidates_pay_for_each_other_and_bounds_are_at_holms_levels():
    original = right(1000)
    drops = compare_all(original, {"good": right(1000, range(1)), "bad": right(1000, range(9))}, Budget(max_drop=1.0))
    assert drops["good"].upper == pytest.approx(100 * paired_bound(1, 0, 1000, 0.975)[1])
    assert drops["bad"].upper == pytest.approx(100 * paired_bound(9, 0, 1000, 0.95)[1])
    assert drops["bad"].lower == pytest.approx(100 * paired_bound(9, 0, 1000, 0.975)[0])
    assert [d.verdict for d in drops.values()] == [WITHIN, TOO_FEW]
    assert all(d.comparisons == 2 and d.confidence == 0.95 for d in drops.values())


def test_verdict_follows_from_the_printed_bounds():
    rng = np.random.default_rng(3)
    verdicts = set()
    for _ in range(200):
        n, count = int(rng.integers(1, 800)), int(rng.integers(1, 6))
        original = rng.random(n) < 0.9
        candidates = {str(i): original ^ (rng.random(n) < rng.choice([0.0, 0.02, 0.2])) for i in range(count)}
        for drop in compare_all(original, candidates, Budget(max_drop=float(rng.choice([0.0, 1.0, 3.3, 5.0])))).values():
            assert (drop.verdict == WITHIN) == (drop.upper < drop.allowed)
            assert (drop.verdict == OUTSIDE) == (drop.lower > drop.allowed)
            assert drop.lower <= drop.drop <= drop.upper
            verdicts.add(drop.verdict)
    assert verdicts == {WITHIN, OUTSIDE, TOO_FEW}


def test_different_images_are_an_error():
    with pytest.raises(DownresError, match="same images.*10.*9"):
        compare(right(10), right(9), Budget())
    assert compare_all(right(10), {}, Budget()) == {}
