"""What the benchmarks share: competitors timed in turns, what else the machine did meanwhile, results as JSON."""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np

from downres.engines import available_cores
from downres.environment import versions
from downres.measuring.latency import hardware

RESULTS = Path(__file__).parent / "results"
QUIET_CORES = 0.5
"""A round is quiet when other processes kept fewer cores than this busy during each of its competitors."""


class Watch:
    """Seconds of a `with` block, and how many cores other processes kept busy meanwhile (Linux; 0 elsewhere)."""

    def __enter__(self) -> "Watch":
        self._machine, self._mine, self._start = _machine_seconds(), _own_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        others = (_machine_seconds() - self._machine) - (_own_seconds() - self._mine)
        self.others = max(0.0, others / self.seconds)


def rounds(competitors: Mapping[str, Callable[[], object]], number: int, what: str, wait: float = 0.0) -> list[dict]:
    """Calls every competitor once a round, in an order shuffled anew; waits before each for a quiet machine.

    Returns [{name: seconds, 'others': cores, 'load': 1 min}]; others: the most during any one competitor (the kernel
    counts in hundredths of a second: it says nothing for calls of a few milliseconds).
    """
    found, order, shuffle = [], list(competitors), random.Random(0).shuffle
    for i in range(number):
        wait_until_quiet(wait)
        shuffle(order)
        taken, others = {}, {}
        for name in order:
            with Watch() as watch:
                competitors[name]()
            taken[name], others[name] = watch.seconds, watch.others
        row = {name: round(taken[name], 6) for name in competitors}
        worst = round(max(others.values()), 2)
        found.append(row | {"others": worst, "load": round(os.getloadavg()[0], 2)})
        if sum(taken.values()) > 2:
            told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row.items())
            print(f"  {what}, round {i + 1}/{number}: {told}; other processes up to {worst} cores", file=sys.stderr)
    return found


def summary(found: list[dict], ours: str, theirs: str) -> dict:
    """Medians in seconds, and median, 10 % and 90 % of the ratio ours / theirs of each round."""
    ratios = [row[ours] / row[theirs] for row in found]
    p10, median, p90 = (round(float(r), 4) for r in np.percentile(ratios, (10, 50, 90)))
    return {
        "rounds": len(found),
        f"{ours}_s": round(float(np.median([row[ours] for row in found])), 6),
        f"{theirs}_s": round(float(np.median([row[theirs] for row in found])), 6),
        "ratio": median,
        "ratio_p10": p10,
        "ratio_p90": p90,
    }


def quiet(found: list[dict]) -> list[dict]:
    """The rounds that other processes hardly disturbed."""
    return [row for row in found if row["others"] < QUIET_CORES]


def wait_until_quiet(most: float, pause: float = 3.0) -> None:
    """Wait, at most that many seconds, until other processes leave the cores alone for `pause` seconds."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        with Watch() as watch:
            time.sleep(pause)
        if watch.others < QUIET_CORES:
            return
    if most:
        print(f"the machine did not become quiet within {most:.0f} s; going on", file=sys.stderr)


def save(name: str, command: str, day: str | None, content: dict, folder: Path = RESULTS) -> Path:
    """FOLDER/NAME.json, with what it was made with."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    head = {
        "date": day or date.today().isoformat(),
        "command": command,
        "hardware": hardware(),
        "threads": available_cores(),
        "versions": versions(),
        "load_at_the_end": [round(x, 2) for x in os.getloadavg()],
    }
    file.write_text(json.dumps(head | content, indent=1) + "\n")
    return file


def _machine_seconds() -> float:
    """CPU seconds that all processes have used."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq = (int(f) for f in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
