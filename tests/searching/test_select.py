"""The decision, on made-up measurements: gates, joint verdicts, the cheapest proven one on curves of any shape."""

import numpy as np
import pytest

from downres.measuring.statistics import paired_bound
from downres.records import OUTSIDE, TOO_FEW, WITHIN, Budget, Candidate, Cost, Drop, Latency, Result
from downres.searching.select import over_budget, select
from downres.tasks import Arrays
from downres.tasks.classification.quality import compare
from downres.tasks.classification.task import Classification


def cost(macs, memory=1):
    return Cost(macs, 10, 40, memory, (1, 3, 32, 32))


def latency(ms):
    return Latency(ms, ms, ms, 30, 1, "onnxruntime", 1, "a machine")


def result(side, macs, verdict=WITHIN, *, memory=1, ms=1.0, status="measured", reason=""):
    drop = Drop(0.1, 0.0, 0.9, 1.0, verdict, 1000, 1, 0) if verdict else None
    return Result(Candidate(side), status, reason, cost(macs, memory), latency(ms), None, None, drop)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(max_macs=99), "100 MACs are over the 99 allowed"),
        (Budget(max_memory_bytes=2000), "3 kB of peak activation memory are over the 2 kB"),
        (Budget(max_latency_ms=4.9), "a median of 5 ms is over the 4.9 ms"),
    ],
)
def test_each_ceiling_stops_and_says_which(budget, words):
    assert words in over_budget(cost(100, 3000), latency(5.0), budget)
    assert over_budget(cost(1, 1), latency(0.1), budget) == ""
    assert over_budget(None, None, budget) == ""


def test_at_the_ceiling_is_within_it():
    assert over_budget(cost(100, 3000), latency(5.0), Budget(1.0, 0.95, 100, 3000, 5.0)) == ""


def test_the_cheapest_proven_one_is_taken_on_a_curve_that_is_not_monotone():
    results = [
        result(192, 900, OUTSIDE),
        result(160, 700, WITHIN),
        result(128, 500, OUTSIDE),
        result(96, 300, WITHIN),
        result(64, 100, TOO_FEW),
    ]
    assert select(results, "macs").candidate == Candidate(96)
    assert select(results[::-1], "macs").candidate == Candidate(96)
    assert select([r for r in results if r.drop.verdict != WITHIN], "macs") is None
    assert select([], "macs") is None


def test_stopped_waiting_and_ruled_out_ones_are_never_taken():
    others = [
        result(16, 1, None, status="stopped", reason="over"),
        result(32, 2, None, status="waiting"),
        result(48, 3, WITHIN, reason="ruled out on 30 tuning images"),
    ]
    assert select(others, "macs") is None
    assert select([*others, result(64, 4)], "macs").candidate == Candidate(64)


def test_what_cheapest_means_can_be_chosen():
    results = [result(96, 1, memory=30, ms=3), result(128, 2, memory=10, ms=2), result(160, 3, memory=20, ms=1)]
    chosen = {m: select(results, m).candidate.resolution for m in ("macs", "memory", "latency")}
    assert chosen == {"macs": 96, "memory": 128, "latency": 160}


def test_macs_break_ties_of_memory():
    assert select([result(160, 9, memory=5), result(96, 3, memory=5)], "memory").candidate == Candidate(96)


def verdicts(original, candidates, budget):
    """What a classifier's task decides of bool arrays, right or wrong image by image."""
    evidence = {name: Arrays(correct=correct) for name, correct in candidates.items()}
    return Classification(None, 2).compare(Arrays(correct=original), evidence, budget)


def test_verdicts_use_holm():
    """Two that are proven each alone, but only one of them together with 19 hopeless ones."""
    n = 1000
    original = np.ones(n, bool)

    def losing(k):
        correct = original.copy()
        correct[:k] = False
        return correct

    budget = Budget(max_drop=2.0)
    just = max(k for k in range(30) if compare(original, losing(k), budget).verdict == WITHIN)
    crowd = {"best": losing(1), "just": losing(just)} | {f"hopeless {i}": losing(200) for i in range(19)}
    found = verdicts(original, crowd, budget)
    assert found["best"].verdict == WITHIN and found["just"].verdict == TOO_FEW
    assert all(d.comparisons == 21 for d in found.values())
    # Bonferroni for the smallest p-value: the bound printed is at 1 - 0.05 / 21.
    assert found["best"].upper == pytest.approx(100 * paired_bound(1, 0, n, 1 - 0.05 / 21)[1])
    # Holm, not Bonferroni: once 'best' is proven, a lone second is tested at the full level.
    pair = verdicts(original, {"best": losing(1), "just": losing(just)}, budget)
    assert pair["just"].verdict == WITHIN


def test_nothing_to_judge():
    assert verdicts(np.ones(3, bool), {}, Budget()) == {}
