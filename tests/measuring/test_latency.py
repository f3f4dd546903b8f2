"""Order, counting and record fields; no time is asserted."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from downres.errors import DownresError
from downres.measuring import latency as latency_module
from downres.measuring.latency import hardware, interleaved, measure_latency, random_batch
from downres.records import Latency


class Fake:
    """A runtime that only writes down that it was called."""

    name, versions, threads = "fake", {"fake": "1"}, 3

    def __init__(self, label, calls):
        self.label, self.calls = label, calls

    def __call__(self, batch):
        self.calls.append((self.label, len(batch)))
        return (batch,)


def run(labels="abc", **kwargs):
    calls = []
    inputs = {label: np.zeros((i + 1, 3, 2, 2), np.float32) for i, label in enumerate(labels)}
    found = interleaved({label: Fake(label, calls) for label in labels}, inputs, **kwargs)
    return found, [label for label, _ in calls], calls


def test_candidates_take_turns_in_a_shuffled_order():
    _, order, calls = run(runs=20, warmup=2)
    assert order[:6] == list("aabbcc")
    rounds = [tuple(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert len(rounds) == 20 and all(sorted(r) == list("abc") for r in rounds)
    assert len(set(rounds)) > 2
    assert set(calls) == {("a", 1), ("b", 2), ("c", 3)}  # each with its own batch
    assert run(runs=20, warmup=2)[1] == order  # the seed is fixed
    assert run(runs=20, warmup=2, seed=1)[1] != order


def test_record_fields():
    found, _, _ = run("ab", runs=7, warmup=0)
    assert list(found) == ["a", "b"]
    latency = found["b"]
    assert (latency.runs, latency.batch_size, latency.runtime, latency.threads) == (7, 2, "fake", 3)
    assert 0 <= latency.p10_ms <= latency.latency_ms <= latency.p90_ms
    assert latency.hardware == hardware() and "core" in latency.hardware
    assert set(latency.versions) == {"python", "numpy", "fake"}
    assert Latency.from_json(latency.to_json()) == latency


def test_progress_is_told():
    told = []
    run("ab", runs=3, warmup=0, progress=lambda *values: told.append(values))
    assert told == [("latency", done, 6) for done in range(1, 7)]


def test_no_candidates_is_no_work():
    assert interleaved({}, {}) == {}


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_one_model(runtime):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    latency = measure_latency(net, (3, 16, 24), runtime=runtime, batch_size=2, threads=1, runs=3, warmup=1)
    assert (latency.runtime, latency.batch_size, latency.threads, latency.runs) == (runtime, 2, 1, 3)
    assert runtime in latency.versions and "python" in latency.versions
    assert net.training and latency.latency_ms > 0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"runtime": "tensorrt"}, "onnxruntime, torch"),
        ({"batch_size": 0}, "at least one image"),
        ({"input_size": (224, 224)}, "input size"),
        ({"threads": 0, "runtime": "torch"}, "thread"),
        ({"runs": 0, "runtime": "torch"}, "at least one run"),
    ],
)
def test_errors(kwargs, words):
    with pytest.raises(DownresError, match=words):
        measure_latency(nn.Identity(), **{"input_size": (3, 8, 8), **kwargs})


def test_random_batch():
    batch = random_batch((2, 3, 4, 5))
    assert batch.shape == (2, 3, 4, 5) and batch.dtype == np.float32
    assert np.array_equal(batch, random_batch((2, 3, 4, 5))) and torch.from_numpy(batch).std() > 0.5


def test_the_first_is_what_the_others_are_compared_with_round_by_round(monkeypatch):
    """A clock of our own: b takes half of a's time in every round, however loaded the machine; c is now faster, now slower."""
    now, load = [0.0], np.random.default_rng(0)
    spent = {"a": lambda: 2.0, "b": lambda: 1.0, "c": lambda: load.choice([1.0, 4.0])}

    class Clocked(Fake):
        def __call__(self, batch):
            now[0] += spent[self.label]()
            return (batch,)

    monkeypatch.setattr(latency_module.time, "perf_counter", lambda: now[0])
    found = interleaved({k: Clocked(k, []) for k in "abc"}, dict.fromkeys("abc", np.zeros((1, 3, 2, 2))), runs=40, warmup=0)
    assert found["a"].ratio == (1.0, 1.0) and not found["a"].faster
    assert found["b"].ratio == (2.0, 2.0) and found["b"].faster and not found["b"].slower
    low, high = found["c"].ratio
    assert low == 0.5 and high == 2.0 and not found["c"].faster and not found["c"].slower
    assert interleaved({"a": Clocked("a", [])}, {"a": np.zeros((1, 3, 2, 2))}, runs=9)["a"].ratio is None


def test_a_disturbed_machine_is_told():
    calm = Latency(10.0, 9.0, 12.0, 30, 1, "torch", 1, "here")
    assert not calm.disturbed and dataclasses.replace(calm, p90_ms=25.0).disturbed
