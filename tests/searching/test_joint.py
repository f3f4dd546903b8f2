"""All axes together: combinations, Optuna's choice on tuning images, and a run that goes on with more."""

import dataclasses
import functools
import itertools
import json
import shutil

import pytest

from downres import Axes, Candidate, curve, load_model, load_run, search
from downres.errors import DownresError
from downres.records import WITHIN
from downres.searching import joint, run
from downres.searching.joint import Sampler, Trial, front
from downres.searching.plan import plan
from downres.searching.select import slower_twin
from downres.techniques import Design

OPTIONS = {"max_drop": 60.0, "threads": 1, "fit_head": True, "minimize": "macs", "runtime": "torch"}  # no export, which is slow
pytestmark = pytest.mark.filterwarnings("ignore:runtime .torch. measures in torch")
POOL = {"resolutions": [40, 32, 24, 16], "stem_scales": [0.5, 0.75]}


@pytest.fixture(scope="module")
def loaded(tiny_file, tiny_preprocessing):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)


def test_every_value_with_every_other():
    axes = Axes([128, 96], [0.5], (), [4, 8], precisions="fp32,int8", joint=50)
    found, _ = plan(Design(160, 32), axes)
    words = itertools.product(("160", "128", "96"), ("", " stem×0.5"), ("", " merge4", " merge8"), ("", " int8"))
    assert sorted(map(str, found)) == sorted({"".join(one) for one in words} - {"160"})
    along, _ = plan(Design(160, 32), dataclasses.replace(axes, joint=None))
    assert set(along) < set(found)


def test_patches_go_to_the_nearest_multiple_at_every_resolution():
    """Of 224 px 20 divides 220, of 96 px 80; one of 100 px is larger than 96 px and is left out there."""
    found, _ = plan(Design(224, 16, 16, True), Axes([96], (), [20, 100], joint=50))
    assert [str(c) for c in found] == ["220 patch20", "200 patch100", "96", "80 patch20"]


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "7"])
def test_how_many_is_a_whole_number(wrong):
    with pytest.raises(DownresError, match="`joint` is how many combinations to try at most, a whole number above 0"):
        Axes(joint=wrong)


def test_nobody_on_the_front_is_beaten():
    """Against a plain comparison of all pairs, with ties, failures and what is outside beyond doubt."""
    values = [(3, 0), (2, 1), (2, 1), (2, 2), (1, 5), (4, 0), (0.5, 9)]
    trials = {Candidate(i + 1): Trial(float(e), float(d), d > 5, 10) for i, (e, d) in enumerate(values)}
    trials[Candidate(99)] = Trial(failed="did not run")
    assert [c.resolution for c in front(trials)] == [1, 2, 3, 5]
    assert front({c: dataclasses.replace(t, outside=True) for c, t in trials.items() if not t.failed})[-1] == Candidate(7)


def test_the_sampler_asks_for_each_once_and_the_same_again():
    pool, _ = plan(Design(160, 32), Axes([128, 96, 64], [0.5, 0.75], precisions="fp32,int8", joint=50))

    def asked():
        sampler, found = Sampler(pool, 3), []
        while (one := sampler.ask()) is not None:
            found.append(one)
            sampler.tell(one, Trial(float(one.resolution), 1.0) if len(found) % 5 else Trial(failed="did not run"))
        return found

    first = asked()
    assert sorted(map(str, first)) == sorted(map(str, pool)) and asked() == first


def test_the_sampler_learns():
    """Half of the space loses everything: of what is asked for after the first ten, more are of the other half."""
    sizes = [64 + 8 * i for i in range(30)]
    pool, _ = plan(Design(512, 8), Axes(sizes, [0.5, 0.75], precisions="fp32,int8", joint=50))
    sampler, found = Sampler(pool, 0), []
    for _ in range(50):
        found.append(one := sampler.ask())
        bad = one.precision == "int8"
        sampler.tell(one, Trial(float(one.resolution) + 1000 * bad, 50.0 * bad + one.resolution / 100))
    assert sum(c.precision == "fp32" for c in found[10:]) >= 25 > 0.5 * 40


@pytest.fixture(scope="module")
def few(loaded, cells, tmp_path_factory):
    """5 of 14 combinations."""
    return search(loaded, cells.dataset(), out=tmp_path_factory.mktemp("joint") / "run", joint=5, **POOL, **OPTIONS)


def trials(run):
    lines = (run.folder / "measurements.jsonl").read_text().splitlines()
    return {one["key"][6:]: one["value"] for one in map(json.loads, lines) if one["key"].startswith("trial/")}


def test_only_what_no_other_beats_is_proven(few):
    tried = trials(few)
    assert len(tried) == 5 and len(few.settings["candidates"]) == 14 and few.finished
    chosen = front({Candidate.parse(name): Trial.from_json(t) for name, t in tried.items()})
    assert sorted(str(r.candidate) for r in few.results) == sorted(map(str, chosen))
    assert all(r.status == "measured" for r in few.results)
    assert few.best.drop.verdict == WITHIN and few.best.drop.comparisons == len(chosen)
    images = next(iter(tried.values()))["images"]
    assert any(f"of 14 combinations 5 were tried on {images} tuning images, chosen by Optuna" in note for note in few.notes)
    for r in few.results:
        assert tried[str(r.candidate)]["expense"] == r.cost.macs
        assert tried[str(r.candidate)]["drop"] == pytest.approx(r.recovery.tuning.drop)


def test_a_run_goes_on_with_more_and_is_corrected_for_all(few, loaded, cells, monkeypatch):
    """What was tried is not tried again; the proof that was seen before is paid for."""
    before, asked = trials(few), []
    real = joint._trial
    monkeypatch.setattr(joint, "_trial", lambda *a: asked.append(str(a[4])) or real(*a))
    more = search(loaded, cells.dataset(), out=few.folder, joint=8, **POOL, **OPTIONS)
    assert len(asked) == 3 and not set(asked) & set(before) and set(trials(more)) == {*before, *asked}
    assert more.finished and more.best.drop.comparisons == 14
    assert any("proofs were seen before this choice" in note for note in more.notes)
    manifest = json.loads((more.artifact / "manifest.json").read_text())
    assert Candidate.from_json(manifest["candidate"]) == more.best.candidate
    again = search(loaded, cells.dataset(), out=few.folder, joint=8, **POOL, **OPTIONS)
    assert again.to_json() == more.to_json() == load_run(few.folder).to_json() and len(asked) == 3


SEVEN = {"resolutions": [32, 24, 16], "stem_scales": [0.5], **OPTIONS, "rungs": ()}


@pytest.fixture(scope="module")
def first_of(loaded, cells, tmp_path_factory):
    """The folder of a run of so many of 7 combinations, made once."""

    @functools.cache
    def made(joint):
        return search(loaded, cells.dataset(), out=tmp_path_factory.mktemp("first") / "run", joint=joint, **SEVEN).folder

    return made


@pytest.mark.parametrize(("first", "then"), [(7, 2), (7, 3), (2, 7), (3, 2)])
def test_another_number_is_another_choice(loaded, cells, tmp_path, first_of, first, then):
    """Fewer or all, from all or fewer: whoever has seen proofs pays for all combinations, and what ships is what is chosen."""
    folder = shutil.copytree(first_of(first), tmp_path / "run")
    run = search(loaded, cells.dataset(), out=folder, joint=then, **SEVEN)
    assert run.finished and {r.drop.comparisons for r in run.results} == {7}
    assert len(run.results) == 7 if then == 7 else len(run.results) <= then
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert Candidate.from_json(manifest["candidate"]) == run.best.candidate
    assert manifest["result"]["drop"] == run.best.drop.to_json()


def test_what_is_over_a_ceiling_stands_in_nobodys_way(loaded, cells, tmp_path):
    """The float network is better by every measure but its bytes."""
    options = {**OPTIONS, "runtime": None, "resolutions": [32], "stem_scales": (), "precisions": "fp32,int8"}
    found = search(loaded, cells.dataset(), out=tmp_path, joint=2, max_size_bytes=16_000, **options)
    tried = trials(found)
    assert len(tried) == 2 and all("over the 16" in t["failed"] or t["images"] for t in tried.values())
    assert [r.candidate.precision for r in found.results] == ["int8"] * len(found.results) and found.results
    assert any("could not be tried" in note for note in found.notes) == any(t["failed"] for t in tried.values())


def test_where_nothing_can_be_tried_the_reason_is_said(loaded, cells, tmp_path):
    with pytest.raises(DownresError, match="None of the 2 combinations that were tried can be measured: the bytes of its file"):
        search(loaded, cells.dataset(), out=tmp_path, joint=2, **POOL, **{**OPTIONS, "minimize": "size"})


def test_a_curve_measures_all_or_none(loaded, cells):
    with pytest.raises(DownresError, match="A curve measures all 14 combinations, joint=3 are allowed"):
        curve(loaded, cells.dataset(), joint=3, **POOL)


def test_an_interrupted_choice_goes_on(loaded, cells, tmp_path, monkeypatch):
    asked, real = [], joint._trial

    def stopped(*a):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(str(a[4]))
        return real(*a)

    monkeypatch.setattr(joint, "_trial", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(loaded, cells.dataset(), out=tmp_path / "run", joint=5, **POOL, **OPTIONS)
    half = load_run(tmp_path / "run")
    assert not half.finished and half.best is None and any(note.startswith("unfinished") for note in half.notes)
    monkeypatch.setattr(joint, "_trial", lambda *a: asked.append(str(a[4])) or real(*a))
    done = search(loaded, cells.dataset(), out=tmp_path / "run", joint=5, **POOL, **OPTIONS)
    assert len(asked) == len(set(asked)) == 5 and set(trials(done)) == set(asked)


def test_as_many_as_there_are_need_no_choice(loaded, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "choose", None)
    found = search(loaded, cells.dataset(), out=tmp_path, joint=3, resolutions=[32], stem_scales=[0.5], **OPTIONS)
    assert [str(r.candidate) for r in found.results] == ["48 stem×0.5", "32", "32 stem×0.5"]


def test_proofs_of_other_folds_are_paid_for(loaded, cells, tmp_path):
    """With cross-fitting the tuning images of one fold are proof images of another."""
    options = {**OPTIONS, "folds": 2}
    found = search(loaded, cells.dataset(folds=2), out=tmp_path, joint=2, resolutions=[32, 24], stem_scales=[0.5], **options)
    assert {r.drop.comparisons for r in found.results} == {5}
    assert any("tuning images of another" in note for note in found.notes)


def test_by_time_and_by_bytes(loaded, cells, tmp_path):
    """8-bit files are tried like others; what is minimised is what is measured of the file."""
    for minimize in ("latency", "size"):
        options = {**OPTIONS, "runtime": None, "minimize": minimize, "resolutions": [32], "precisions": "fp32,int8"}
        found = search(loaded, cells.dataset(), out=tmp_path / minimize, joint=2, stem_scales=(), **options)
        by_name = trials(found)
        assert len(by_name) == 2 and all(r.status == "measured" for r in found.results)
        if minimize == "size":
            assert all(by_name[str(r.candidate)]["expense"] == r.footprint.file_bytes for r in found.results)


def test_optuna_is_named_where_it_is_missing(loaded, cells, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(DownresError, match=r"pip install 'downres\[optuna\]', or allow as many as there are, joint=14"):
        search(loaded, cells.dataset(), out=tmp_path, joint=2, **POOL, **OPTIONS)


def test_the_same_numbers_in_more_time_are_not_measured():
    """In float32, beyond doubt, of the first runtime: never of another precision or of what noise may explain."""
    from downres.records import Latency

    def timed(ms, ratio, runtime):
        return Latency(ms, ms, ms, 30, 1, runtime, 1, "a processor", ratio=ratio)

    slow, fast = timed(8.0, (1.1, 1.3), "openvino"), timed(5.0, (1.9, 2.1), "onnxruntime")
    latencies = {"32": fast, "32 openvino": slow, "32 int8 openvino": slow, "48 openvino": slow}
    said = slower_twin(Candidate.parse("32 openvino"), latencies, "latency")
    assert said == "computes what 32 computes in onnxruntime, and in more time (8 and 5 ms)"
    assert slower_twin(Candidate.parse("32 openvino"), latencies, "macs") == ""
    for other in ("32 int8 openvino", "32", "48 openvino"):
        assert slower_twin(Candidate.parse(other), latencies, "latency") == ""
    doubtful = {"32": timed(5.0, (1.2, 2.1), "onnxruntime"), "32 openvino": slow}
    assert slower_twin(Candidate.parse("32 openvino"), doubtful, "latency") == ""
