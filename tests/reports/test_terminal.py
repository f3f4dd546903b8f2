"""The tables of a terminal: nothing measured is cut or left out, however wide it is."""

import dataclasses
import io

import pytest
from rich.console import Console

from downres.records import WITHIN, Candidate, Cost, Drop, Flips, Latency, Recovery, Result
from downres.reports import report, tables, terminal
from downres.reports.words import flips_bound, flips_told
from downres.tasks.classification.quality import Quality

REASON = "a median of 41 ms is over the 20 ms allowed"
RESULTS = (
    Result(
        Candidate(300), "measured", "", Cost(728_000_000, 1, 4, 23_900_000, (1, 3, 300, 300)),
        Latency(4.53, 4.4, 4.7, 9, 1, "torch", 1, "here"), None, Quality(853, 1000, 85.3, 83.0, 87.4),
    ),
    Result(
        Candidate.parse("160 stem×0.75@blocks.3 merge8-decreasing"), "measured", "",
        Cost(125_000_000, 1, 4, 4_370_000, (1, 3, 160, 160)),
        Latency(1.26, 1.2, 1.3, 9, 1, "torch", 1, "here"), Quality(328, 1000, 32.8, 30.0, 35.8),
        Quality(848, 1000, 84.8, 82.4, 86.9), Drop(0.5, -1.1, 1.98, 2.0, WITHIN, 1000), Recovery("batchnorm", 1.0, 3.0),
    ),
    Result(Candidate(64), "stopped", REASON, Cost(31_300_000, 1, 4, 1_110_000, (1, 3, 64, 64)),
           Latency(41, 1, 2, 9, 1, "", 1, "")),
)  # fmt: skip
NUMBERS = ("728 M", "23.9 MB", "4.53 ms", "85.3", "125 M", "4.37 MB", "1.26 ms", "32.8", "84.8", "82.4–86.9", "0.50 ≤ 1.98",
           "31.3 M", "1.11 MB", "41.0 ms")  # fmt: skip
WORDS = ("the original", "proven within", "BatchNorm recalibration", REASON, "blocks.3", "8 tokens merged a block")


def printed(width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(terminal.told(tables.candidates(RESULTS[0], RESULTS[1:], Candidate(300)), width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [*range(60, 201, 7), 80, 10_000])
def test_everything_measured_is_there_at_every_width(width):
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    for number in NUMBERS:
        assert number in text.replace("\u00a0", " "), number
    for words in WORDS:  # which go on in the next line, within their column
        assert all(word in text for word in words.split()), words
    assert "…" not in text


def test_one_table_where_the_width_holds_it():
    assert len(printed(10_000).splitlines()) == 1 + len(RESULTS)
    assert printed(80).count("candidate") > 1


def test_names_are_no_markup_and_move_no_cursor():
    rows = [{"family": "[bold]x[/bold]", "MACs": "\x1b[31mred\n"}]
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(terminal.stacked(rows, ("family",), 80))
    assert "[bold]x[/bold]" in console.file.getvalue() and r"\x1b[31mred\n" in console.file.getvalue()


def test_a_bound_on_other_answers_is_rounded_up_everywhere():
    flips = Flips(273, 143, 130, 2624, 11.41)
    assert flips_bound(flips) == "11.5" and "≤ 11.5," in flips_told(flips)
    tiles = report._tiles(RESULTS[0], dataclasses.replace(RESULTS[1], flips=flips), files=True)
    assert [tile.note for tile in tiles if "at most 11.5\u00a0%" in tile.note]
