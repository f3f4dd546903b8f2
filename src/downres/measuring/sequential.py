"""A proof in rounds: each candidate is shown only as many images as its verdict needs.

Group-sequential testing. After 64, 96, 144, … images, and after all, each candidate that is undecided is tested; the error that
is allowed is spent over these looks by the power family, alpha t^1.5 up to the part t of all images (Kim and DeMets 1987,
Biometrika 74:149-154), so that most is left for the last ones. Within a look Holm's procedure is
that over all candidates that were planned, those proven at an earlier look counting as rejected (Maurer and Bretz 2013,
Statistics in Biopharmaceutical Research 5:311-320). A first wrong proof at a look is then at most as likely as what is spent
there, whatever was seen before, by the union bound over the true hypotheses; over all looks that is the error allowed. So the
test of one look must hold at its level on few images as well: Tango's score test of right and wrong does, its exact error was
nowhere above the nominal one; a bootstrap does not, as 64 images know nothing of what is rarer.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import OUTSIDE, TOO_FEW, WITHIN, Budget, Drop

FIRST = 64
"""Images of the first look."""
GROWTH = 1.5
"""From one look to the next."""
POWER = 1.5

Compare = Callable[[Any, dict[str, Any], Budget], dict[str, Drop]]
"""`Task.compare`."""


@dataclass(frozen=True)
class Verdict:
    """What came of a candidate. images: that it was shown; drop: None where it was not needed, dearer_than says what made it
    so, or where it failed.
    """

    images: int
    drop: Drop | None
    dearer_than: str = ""
    failed: str = ""


class Unshown(Exception):
    """A candidate that cannot be shown images; why in words."""


def looks(n: int) -> list[int]:
    """After how many of n images candidates are tested."""
    found: list[int] = []
    count = float(FIRST)
    while count * GROWTH**0.5 < n:
        found.append(round(count))
        count *= GROWTH
    return [*found, n]


def spent(counts: Sequence[int], alpha: float) -> list[float]:
    """The error that each look may make; their sum is alpha."""
    parts = [(count / counts[-1]) ** POWER for count in counts]
    return [alpha * (now - before) for before, now in zip([0.0, *parts], parts, strict=False)]


def prove(
    names: Sequence[str],
    n: int,
    budget: Budget,
    original: Callable[[int], Any],
    shown: Callable[[str, int], Any],
    compare: Compare,
    ends: Collection[str] | None = None,
    ahead: Callable[[Sequence[str], int], None] | None = None,
) -> dict[str, Verdict]:
    """A verdict on each candidate, all of which hold together at the budget's confidence.

    names: from the cheapest to the dearest. n: images there are. original, shown: evidence of the original, of a candidate, on
    the first so many of them; Unshown is taken for a verdict. Once one of `ends` (None: any) is proven within, dearer ones that
    are undecided are not needed. ahead: told before each look who may be shown how many images.
    """
    found: dict[str, Verdict] = {}
    final = set(names if ends is None else ends)
    alive, proven = list(names), 0
    counts = looks(n)
    levels = spent(counts, 1.0 - budget.confidence)
    for seen, count, level in zip([0, *counts[:-1]], counts, levels, strict=True):
        if ahead is not None:
            ahead(alive, count)
        before = original(count)
        evidence: dict[str, Any] = {}
        known: dict[tuple[str, int], Drop] = {}  # a bootstrap of many images takes seconds

        def tested(
            name: str, comparisons: int, level: float = level, before: Any = before, of: Any = evidence, known: Any = known
        ) -> Drop:
            if (name, comparisons) not in known:
                at = dataclasses.replace(budget, confidence=1.0 - level / comparisons)
                drop = compare(before, {name: of[name]}, at)[name]
                known[name, comparisons] = dataclasses.replace(drop, confidence=budget.confidence, comparisons=len(names))
            found: Drop = known[name, comparisons]
            return found

        for name in [*alive]:
            try:
                evidence[name] = shown(name, count)
            except Unshown as error:
                found[name] = Verdict(0, None, failed=str(error))
                continue
            drop = tested(name, len(names) - proven)
            if drop.verdict == WITHIN:
                found[name], proven = Verdict(count, drop), proven + 1
                if name in final:
                    break  # what is dearer is not needed
        more = True
        while more:  # Holm: each proof leaves more error to the others
            more = False
            for name in [one for one in alive if one in evidence and one not in found]:
                drop = tested(name, len(names) - proven)
                if drop.verdict == WITHIN:
                    found[name], proven, more = Verdict(count, drop), proven + 1, True
        cheapest = next((name for name in names if name in final and name in found and _is_within(found[name])), None)
        for name in [one for one in alive if one not in found]:
            if cheapest is not None and names.index(name) > names.index(cheapest):
                found[name] = Verdict(count if name in evidence else seen, None, cheapest)
                continue
            drop = tested(name, len(names))
            if drop.verdict == OUTSIDE:
                found[name] = Verdict(count, drop)
            elif count == n:  # the upper bound is that of Holm's level, the lower one, as ever, Bonferroni's
                upper = tested(name, len(names) - proven)
                found[name] = Verdict(count, dataclasses.replace(upper, lower=drop.lower, verdict=TOO_FEW))
        alive = [name for name in alive if name not in found]
        if not alive:
            break
    return found


def _is_within(verdict: Verdict) -> bool:
    return verdict.drop is not None and verdict.drop.verdict == WITHIN
