import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import xlogy
from scipy.stats import multinomial, norm
from scipy.stats import t as student_t

from downres.errors import DownresError
from downres.measuring.statistics import (
    bootstrap_bound,
    bootstrap_p,
    holm,
    inferiority_p,
    more_images,
    more_images_to,
    noninferiority_p,
    paired_bound,
    wilson,
)

TABLES = [
    (0, 0, 40),
    (1, 0, 44),
    (0, 3, 40),
    (3, 0, 40),
    (5, 5, 40),
    (12, 2, 50),
    (2, 12, 50),
    (20, 20, 40),
    (30, 10, 40),
    (40, 0, 40),
    (0, 40, 40),
    (165, 160, 2624),
    (0, 1, 1),
]


def reference_score(lost: int, won: int, n: int, drop: float) -> float:
    """The score statistic with the nuisance found by maximising the multinomial likelihood numerically."""

    def minus_log_likelihood(q: float) -> float:
        return -(xlogy(lost, q + drop) + xlogy(won, q) + xlogy(n - lost - won, 1 - 2 * q - drop))

    low, high = max(0.0, -drop), (1 - drop) / 2
    q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    q = min((low, q, high), key=minus_log_likelihood)
    return (lost - won - n * drop) / math.sqrt(n * (2 * q + drop - drop**2))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("drop", [-0.6, -0.05, 0.003, 0.01, 0.2, 0.9])
def test_p_values_match_a_numeric_maximum_likelihood(table, drop):
    score = reference_score(*table, drop)
    assert noninferiority_p(*table, drop) == pytest.approx(norm.cdf(score), abs=1e-6)
    assert inferiority_p(*table, drop) == pytest.approx(norm.sf(score), abs=1e-6)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.995])
def test_bounds_match_a_numeric_inversion(table, confidence):
    lost, won, n = table
    z, edge = norm.ppf(confidence), 1 - 1e-9
    lower, upper = paired_bound(lost, won, n, confidence)
    if lost < n:
        root = brentq(lambda d: reference_score(*table, d) + z, max((lost - won) / n - 1e-9, -edge), edge)
        assert upper == pytest.approx(root, abs=1e-6)
    else:
        assert upper == 1.0
    if won < n:
        root = brentq(lambda d: reference_score(*table, d) - z, -edge, min((lost - won) / n + 1e-9, edge))
        assert lower == pytest.approx(root, abs=1e-6)
    else:
        assert lower == -1.0


def test_published_examples():
    # Tango (1998), soft contact lenses, 43/0/1/0 of 44, margin 0.1: Z = 1.709, p = 0.044.
    assert noninferiority_p(1, 0, 44, 0.1) == pytest.approx(0.044, abs=5e-4)
    # Fagerland, Lydersen and Laake, paired 2x2 tables, data of Bentur et al. (2009), 1/1/7/12 of 21: Tango (-0.517, -0.026).
    assert paired_bound(1, 7, 21, 0.975) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_no_discordant_image_by_hand():
    z = norm.ppf(0.95)
    assert paired_bound(0, 0, 100, 0.95) == pytest.approx((-(z**2) / (100 + z**2), z**2 / (100 + z**2)))
    assert noninferiority_p(0, 0, 100, 0.0) == 0.5


def test_large_table_is_close_to_the_wald_bound_by_hand():
    # 2624 images: d = 5/2624 = 0.0019055, variance = (325/2624 - d^2)/2624, upper = d + 1.6449 sqrt(variance) = 0.013225.
    lower, upper = paired_bound(165, 160, 2624, 0.95)
    assert upper == pytest.approx(0.013225, abs=1e-4)
    assert lower == pytest.approx(0.0019055 - 0.0113193, abs=1e-4)


@pytest.mark.parametrize("table", TABLES)
def test_bounds_are_in_range_ordered_mirrored_and_widen_with_confidence(table):
    lost, won, n = table
    estimate = (lost - won) / n
    widths = []
    for confidence in (0.6, 0.9, 0.95, 0.99, 0.9999):
        lower, upper = paired_bound(lost, won, n, confidence)
        assert -1 <= lower <= estimate <= upper <= 1
        assert paired_bound(won, lost, n, confidence) == (-upper, -lower)
        widths.append((upper, -lower))
    assert widths == sorted(widths)


def test_bound_and_p_value_agree_everywhere():
    margins = (0.0, 0.01, 0.05, 0.1, 0.3)
    for n in (1, 7, 25):
        for lost in range(n + 1):
            for won in range(n + 1 - lost):
                lower, upper = paired_bound(lost, won, n, 0.95)
                for margin in (*margins, upper, float(np.nextafter(upper, 2)), lower):
                    if margin <= 1:
                        assert (upper < margin) == (noninferiority_p(lost, won, n, margin) < 1 - 0.95)
                        assert (lower > margin) == (inferiority_p(lost, won, n, margin) < 1 - 0.95)


@pytest.mark.parametrize(("n", "p_lost", "p_won"), [(60, 0.1, 0.05), (60, 0.2, 0.2), (80, 0.06, 0.05), (80, 0.3, 0.1)])
def test_exact_coverage_of_the_upper_bound_on_small_sets(n, p_lost, p_won):
    lost, won = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    possible = lost + won <= n
    lost, won = lost[possible], won[possible]
    weights = multinomial.pmf(np.stack([lost, won, n - lost - won], 1), n, [p_lost, p_won, 1 - p_lost - p_won])
    likely = weights > 1e-9
    covered = [
        paired_bound(int(b), int(c), n, 0.95)[1] >= p_lost - p_won for b, c in zip(lost[likely], won[likely], strict=True)
    ]
    assert float(weights[likely] @ np.array(covered)) >= 0.94


@pytest.mark.parametrize(
    ("n", "p_lost", "p_won"), [(624, 0.03, 0.02), (624, 0.01, 0.0), (2624, 0.07, 0.06), (10000, 0.02, 0.01)]
)
def test_simulated_coverage_on_larger_sets(n, p_lost, p_won):
    rng = np.random.default_rng(5)
    tables, times = np.unique(rng.multinomial(n, [p_lost, p_won, 1 - p_lost - p_won], 4000)[:, :2], axis=0, return_counts=True)
    covered = [paired_bound(int(b), int(c), n, 0.95)[1] >= p_lost - p_won for b, c in tables]
    assert float(times @ np.array(covered)) / 4000 >= 0.94


@pytest.mark.parametrize(("lost", "won", "n"), [(165, 160, 2624), (6, 4, 624), (0, 0, 50), (30, 31, 1000)])
def test_more_images_at_the_same_rates_are_just_enough(lost, won, n):
    margin = 0.01
    more = more_images(lost, won, n, margin, 0.95)
    assert more is not None

    def p_with(extra: int) -> float:
        grown = (n + extra) / n  # the expected counts, not rounded to whole images
        return noninferiority_p(lost * grown, won * grown, n + extra, margin)  # type: ignore[arg-type]

    assert p_with(more) < 1 - 0.95 <= p_with(more - 1)


def test_more_images_prove_it_with_whole_images_too():
    more = more_images(30, 31, 1000, 0.01, 0.95)
    assert more is not None
    times = (1000 + more) / 1000
    assert noninferiority_p(round(30 * times), round(31 * times), 1000 + more, 0.01) == pytest.approx(0.05, abs=0.01)


def test_more_images_near_the_usual_approximation():
    d, psi = 5 / 2624, 325 / 2624
    usual = norm.ppf(0.95) ** 2 * (psi - d**2) / (0.01 - d) ** 2 - 2624
    assert more_images(165, 160, 2624, 0.01, 0.95) == pytest.approx(usual, rel=0.05)


def test_no_number_of_images_helps_when_the_drop_is_not_below_the_margin():
    assert more_images(10, 0, 1000, 0.01, 0.95) is None
    assert more_images(20, 0, 1000, 0.01, 0.95) is None
    assert more_images(0, 0, 1000, 0.0, 0.95) is None


def test_more_images_is_at_least_one():
    assert more_images(0, 50, 50, 0.01, 0.95) == 1


def test_holm_by_hand():
    # 0.01 < 0.05/4 rejected, 0.014 < 0.05/3 rejected, 0.04 > 0.05/2 stops; 0.045 < 0.05 comes too late.
    tested = holm([0.045, 0.01, 0.04, 0.014], 0.05)
    assert [t.rejected for t in tested] == [False, True, False, True]
    assert [t.level for t in tested] == pytest.approx([0.05 / 2, 0.05 / 4, 0.05 / 2, 0.05 / 3])
    assert holm([0.05], 0.05) == ((0.05, False),)
    assert holm([0.049], 0.05) == ((0.05, True),)
    assert [t.rejected for t in holm([0.02, 0.02], 0.05)] == [True, True]
    assert [t.level for t in holm([0.03, 0.03], 0.05)] == [0.025, 0.025]
    assert holm([], 0.05) == ()


def test_family_wise_error_with_correlated_candidates_at_the_margin():
    rng = np.random.default_rng(11)
    runs, n, candidates, p_lost, p_won = 2000, 300, 4, 0.12, 0.06
    false_proofs = 0
    for _ in range(runs):
        shared = rng.standard_normal((n, 1))
        place = norm.cdf(math.sqrt(0.7) * shared + math.sqrt(0.3) * rng.standard_normal((n, candidates)))
        lost, won = (place < p_lost).sum(axis=0), (place > 1 - p_won).sum(axis=0)
        p = [noninferiority_p(int(b), int(c), n, p_lost - p_won) for b, c in zip(lost, won, strict=True)]
        false_proofs += any(t.rejected for t in holm(p, 0.05))
    assert false_proofs / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_wilson_by_hand():
    # z = 1.959964: (0 .. z²/(n+z²)) at 0 of 10; (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) at 81 of 263.
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-6)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), method 3
    assert wilson(2233, 2624) == pytest.approx((0.83688, 0.86420), abs=2e-4)


@pytest.mark.parametrize("call", [lambda: wilson(1, 0), lambda: wilson(5, 4), lambda: wilson(-1, 4)])
def test_wilson_rejects_impossible_counts(call):
    with pytest.raises(DownresError, match="at least one"):
        call()


@pytest.mark.parametrize("table", [(0, 0, 0), (-1, 0, 10), (6, 5, 10)])
def test_impossible_tables_are_errors(table):
    with pytest.raises(DownresError, match="cannot be"):
        paired_bound(*table, 0.95)
    with pytest.raises(DownresError, match="cannot be"):
        noninferiority_p(*table, 0.01)


def test_confidence_out_of_range_is_an_error():
    for confidence in (0.5, 1.0, 95):
        with pytest.raises(DownresError, match="confidence"):
            paired_bound(1, 1, 10, confidence)


def resampled_means(values: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    return values[np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))].mean(axis=1)


@pytest.mark.parametrize("n", [10, 40])
def test_bootstrap_bounds_of_a_mean_of_normal_values_are_those_of_the_t_interval(n):
    values = norm.ppf((np.arange(n) + 0.5) / n)  # normal quantiles: no luck of the draw
    resampled = resampled_means(values, 200_000)
    lower, upper = bootstrap_bound(resampled, values.mean(), n, 0.05)
    expected = student_t.interval(0.9, n - 1, values.mean(), values.std(ddof=1) / math.sqrt(n))
    assert (lower, upper) == pytest.approx(expected, abs=0.02 * (expected[1] - expected[0]))


def test_bootstrap_bounds_invert_the_bootstrap_p_value():
    rng = np.random.default_rng(1)
    for resamples, n, alpha in [(99, 10, 0.05), (1000, 12, 0.01), (1000, 100, 0.05), (500, 100, 0.001)]:
        resampled = np.round(rng.normal(size=resamples), 1)  # with ties
        lower, upper = bootstrap_bound(resampled, 0.0, n, alpha)
        for margin in [*np.unique(resampled), *(np.unique(resampled) + 0.05), upper, np.nextafter(upper, math.inf)]:
            assert (bootstrap_p(resampled, 0.0, n, float(margin)) < alpha) == (upper < margin)
            assert (bootstrap_p(-resampled, 0.0, n, -float(margin)) < alpha) == (lower > margin)


def test_a_bootstrap_proves_nothing_that_it_cannot_see():
    resampled = resampled_means(np.linspace(-1, 1, 10), 1000)
    assert bootstrap_bound(resampled, 0.0, 9, 0.05) == (-math.inf, math.inf)
    assert bootstrap_p(resampled, 0.0, 9, 100.0) == 1.0
    assert bootstrap_bound(resampled, 0.0, 10, 0.0001) == (-math.inf, math.inf)  # 1,000 resamples hold no 1 in 10,000
    assert bootstrap_p(resampled, 0.0, 10, 100.0) > 0.0001
    # what was observed at or above the margin is never proven below it, whatever the resamples say
    assert bootstrap_p(resampled, 2.0, 50, 2.0) == 1.0
    assert bootstrap_bound(resampled, 2.0, 50, 0.05)[1] == 2.0


def test_a_bootstrap_p_value_without_widening_is_the_share_of_resamples():
    resampled = np.arange(999.0)
    assert bootstrap_p(resampled, 0.0, 10**9, 989.5) == pytest.approx(10 / 1000, rel=1e-6)


def test_more_images_for_a_bootstrap_follow_the_square_root_law():
    resampled = resampled_means(norm.ppf((np.arange(50) + 0.5) / 50), 20_000)
    upper = bootstrap_bound(resampled, 0.0, 50, 0.05)[1]
    assert more_images_to(resampled, 0.0, 50, upper / 3, 0.05) == pytest.approx(8 * 50, abs=1)
    assert more_images_to(resampled, 0.0, 50, 0.0, 0.05) is None
    assert more_images_to(resampled, 0.0, 4, 100.0, 0.05) == 6  # at least FEWEST_IMAGES in all
    # no bound at this level: as for a normal distribution with the resamples' spread
    needed = 50 * (norm.ppf(1 - 1e-9) * resampled.std() / 0.1) ** 2
    assert more_images_to(resampled, 0.0, 50, 0.1, 1e-9) == math.floor(needed) + 1 - 50
