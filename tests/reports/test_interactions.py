"""Alone and together: which lines there are, and their arithmetic."""

import dataclasses

import pytest

from downres.records import WITHIN, Candidate, Cost, Drop, Footprint, Latency, Result
from downres.reports.interactions import interactions, parts_of

NATIVE = Candidate(224)


def result(text, ms, bytes_, drop=None):
    candidate = Candidate.parse(text)
    latency = Latency(ms, ms, ms, 30, 1, "onnxruntime", 1, "a processor")
    told = None if drop is None else Drop(drop, drop - 1, drop + 1, 5.0, WITHIN, 400)
    cost = Cost(10, 10, 40, 100, (1, 3, 224, 224))
    return Result(candidate, "measured", "", cost, latency, drop=told, footprint=Footprint(bytes_, 2 * bytes_))


ORIGINAL = result("224", 12.0, 1000)
RESULTS = [
    result("160", 6.0, 1000, 0.5), result("224 int8", 4.0, 250, 0.25), result("160 int8", 3.0, 250, 1.0),
    result("224 merge8", 8.0, 1000, 0.0), result("160 merge8 int8", 2.5, 250, 1.5), result("128 int8", 2.0, 250, 3.0),
]  # fmt: skip


def test_what_is_multiplied_and_what_is_measured():
    found = interactions(ORIGINAL, RESULTS)
    assert [str(one.candidate) for one in found] == ["160 merge8 int8", "160 int8"]  # 128 alone was not measured
    both = found[1]
    assert [part.name for part in both.lines] == ["160 px", "int8", "gains multiplied, drops added", "together, measured"]
    assert [part.speed for part in both.lines] == [2.0, 3.0, 6.0, 4.0]
    assert [part.size for part in both.lines] == [1.0, 4.0, 4.0, 4.0] == [part.memory for part in both.lines]
    assert [part.drop for part in both.lines] == [0.5, 0.25, 0.75, 1.0]
    assert both.sentence == ("Less time: 160 px alone 2.00×, int8 alone 3.00×; multiplied 6.00×, measured together 4.00×.")
    assert found[0].expected.speed == pytest.approx(12 / 6 * 12 / 4 * 12 / 8)
    assert interactions(ORIGINAL, RESULTS, RESULTS[2])[0].candidate == RESULTS[2].candidate  # the chosen one first


def test_what_was_not_measured_is_left_out():
    bare = [dataclasses.replace(r, footprint=None) for r in RESULTS]
    both = interactions(ORIGINAL, bare)[1]
    assert both.measured.size is None and both.expected.memory is None and both.measured.speed == 4.0
    assert interactions(ORIGINAL, [dataclasses.replace(r, latency=None) for r in RESULTS]) == []


def test_parts():
    assert parts_of(Candidate.parse("160 merge8 int8 openvino"), NATIVE) == [
        Candidate.parse(text) for text in ("160", "224 merge8", "224 int8", "224 openvino")
    ]
    assert parts_of(Candidate.parse("224 int8"), NATIVE) == [Candidate.parse("224 int8")]
