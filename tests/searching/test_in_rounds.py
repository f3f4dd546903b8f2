"""A search whose proof is looked at in rounds: numbers by hand, interruptions, its artifact, and what it is not for."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from downres import check, load_model, load_run, search, write_report
from downres.errors import DownresError
from downres.measuring.sequential import looks
from downres.records import OUTSIDE, TOO_FEW, WITHIN, Candidate
from downres.searching import in_rounds
from downres.searching.store import Store
from downres.tasks.classification.task import Classification
from downres.tasks.dealt import dealt

SIZES = [40, 32, 16]
HOW = {"fit_head": True, "max_drop": 12.0, "resolutions": SIZES, "stem_scales": (), "threads": 1, "recover": "none"}


@pytest.fixture(scope="module")
def model(tiny_file, tiny_preprocessing):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)


@pytest.fixture(scope="module")
def folder(cells, tmp_path_factory):
    """20 photographs to fit on and 140 for the proof."""
    root = tmp_path_factory.mktemp("cells")
    half = dataclasses.replace(cells, pictures=cells.pictures[:20], labels=cells.labels[:20])
    rest = dataclasses.replace(cells, pictures=cells.pictures[20:], labels=cells.labels[20:])
    half.write(root, ("train",))
    return rest.write(root, ("val",))


@pytest.fixture(scope="module")
def run(model, folder, tmp_path_factory):
    return search(model, str(folder), sequential=True, out=tmp_path_factory.mktemp("rounds") / "run", **HOW)


def right(store, task_native, candidate):
    return store.arrays(in_rounds.predictions_of(task_native.at(candidate)))["correct"]


def native_of(model):
    task = Classification(model, 2, None, 16, True)
    return task.native_state


def test_each_drop_is_that_of_the_first_images_by_hand(run, model):
    store, native = Store.read(run.folder), native_of(model)
    original = right(store, native, Candidate(48))
    assert run.original.quality.n == len(original) <= 140
    assert run.original.quality.score == pytest.approx(100 * original.mean())
    measured = [r for r in run.results if r.status == "measured"]
    assert measured and {r.quality.n for r in measured} <= set(looks(140))
    for r in measured:
        answers = right(store, native, r.candidate)[: r.quality.n]
        assert r.quality.score == pytest.approx(100 * answers.mean())
        before = original[: r.quality.n]
        assert (r.drop.lost, r.drop.won) == (int((before & ~answers).sum()), int((answers & ~before).sum()))
        assert r.drop.n == r.quality.n and r.drop.comparisons == 3 and r.naive is None
        assert r.quality.n == 140 or r.drop.verdict != TOO_FEW
    assert run.best.drop.verdict == WITHIN
    cheaper = [r for r in run.results if r.cost.macs < run.best.cost.macs]
    assert all(r.drop.verdict != WITHIN for r in cheaper if r.drop)
    for r in run.results:
        if r.cost.macs > run.best.cost.macs and r.status != "measured":
            assert f"{run.best.candidate} is proven and cheaper" in r.reason


def test_no_more_images_are_looked_at_than_the_verdicts_tell(run, model):
    """140 for each of four networks would be 560."""
    store, native = Store.read(run.folder), native_of(model)
    for r in (run.original, *run.results):
        name = in_rounds.predictions_of(native.at(r.candidate))
        shown = len(store.arrays(name)["correct"]) if store.has_arrays(name) else 0
        asked = int(r.reason.partition("after ")[2].partition(" ")[0] or 0) if r.reason else r.quality.n
        assert shown == asked, r


def test_the_order_is_drawn_from_the_seed(cells):
    data = cells.dataset()
    one, again, other = (dealt(data, seed).folds[0].test for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert sorted(one) == sorted(other) == sorted(data.folds[0].test)


def test_the_artifact_is_proven_on_the_images_that_it_was_shown(run, folder, tiny_file):
    manifest = json.loads((run.artifact / "manifest.json").read_text())
    assert manifest["source"]["data"]["proof"] == run.best.quality.n
    assert len(json.loads((run.artifact / "proof.json").read_text())["images"]) == run.best.quality.n
    findings = check(run.artifact, model=f"{tiny_file}:make", data=str(folder), threads=1)
    assert all(finding.ok for finding in findings), findings
    assert f"/{run.best.quality.n})" in next(f.detail for f in findings if f.what == "quality")


def test_the_page_says_how_many(run):
    page = write_report(run.folder).read_text()
    assert "in rounds, after 64, 96, 144, …" in page and "Kim and DeMets" in page
    for r in run.results:
        if r.quality and r.quality.n != run.original.quality.n:
            assert f"on {r.quality.n} images" in page
    if run.best.quality.n != run.original.quality.n:  # the key number is of the same images, too
        before = run.best.quality.score + run.best.drop.drop
        assert f"from {before:.1f}" in page and f", both on {run.best.quality.n} images" in page


def test_a_finished_run_is_read_and_one_that_was_killed_comes_to_the_same(run, model, folder, tmp_path, monkeypatch):
    asked = []
    real = Classification.evidence

    def counted(self, bank, state, indices, **how):
        asked.append((str(state.candidate), int(np.isin(indices, self.proof).sum())))
        return real(self, bank, state, indices, **how)

    monkeypatch.setattr(Classification, "evidence", counted)
    again = search(model, str(folder), sequential=True, out=run.folder, **HOW)
    assert asked == [] and again.results == run.results

    out = tmp_path / "run"
    stop = 3

    def killed(self, bank, state, indices, **how):
        if len(asked) == stop:
            raise KeyboardInterrupt
        return counted(self, bank, state, indices, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classification, "evidence", killed)
        search(model, str(folder), sequential=True, out=out, **HOW)
    before = load_run(out)
    assert not before.finished and any(r.status == "waiting" for r in before.results)
    assert "not finished" in repr(before)
    seen = [*asked]
    asked.clear()
    found = search(model, str(folder), out=out, **HOW)  # as it was begun
    for one, other in zip((found.original, *found.results), (run.original, *run.results), strict=True):
        assert (one.status, one.reason, one.quality, one.drop) == (other.status, other.reason, other.quality, other.drop)
    shown = {r.candidate: r.quality.n for r in (run.original, *run.results) if r.quality}
    for candidate, count in shown.items():  # nobody twice
        assert sum(n for name, n in (*seen, *asked) if name == str(candidate)) <= count


def test_lost_answers_are_looked_at_again(run, model, folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run.folder, out)
    for file in (out / "predictions").iterdir():
        file.unlink()
    found = search(model, str(folder), out=out, **HOW)
    assert [r.drop for r in found.results] == [r.drop for r in run.results]


@pytest.mark.parametrize(
    "options, why",
    [
        ({"folds": 2}, "needs one set of proof images"),
        ({"max_flips": 5.0}, "leave `max_flips` out"),
        ({"joint": 2}, "not of combinations"),
    ],
)
def test_what_it_is_not_for(model, cells, folder, tmp_path, options, why):
    data = str(folder / "val") if "folds" in options else str(folder)
    with pytest.raises(DownresError, match=why):
        search(model, data, sequential=True, out=tmp_path / "run", **{**HOW, **options})


def test_it_is_chosen_for_many_images_and_a_run_stays_what_it_is(run, model, folder, tmp_path, monkeypatch):
    with pytest.raises(DownresError, match="proven in rounds: give another folder"):
        search(model, str(folder), sequential=False, out=run.folder, **HOW)
    monkeypatch.setattr(in_rounds, "MANY", 140)
    assert Store.read(search(model, str(folder), out=tmp_path / "many", **HOW).folder).get("rounds") is True
    monkeypatch.setattr(in_rounds, "MANY", 141)
    few = search(model, str(folder), out=tmp_path / "few", **HOW)
    assert Store.read(few.folder).get("rounds") is False and all(r.quality.n == 140 for r in few.results)
    assert search(model, str(folder), out=tmp_path / "few", **HOW).results == few.results
    with pytest.raises(DownresError, match="proven on all images"):
        search(model, str(folder), sequential=True, out=tmp_path / "few", **HOW)


def test_what_tuning_images_rule_out_is_never_shown_proof_images(model, cells, tmp_path, monkeypatch):
    real, asked = in_rounds.climb, []

    def climbed(task, bank, candidate, *more):
        state, recovery = real(task, bank, candidate, *more)
        if candidate.resolution == 16:
            recovery = dataclasses.replace(recovery, tuning=dataclasses.replace(recovery.tuning, verdict=OUTSIDE, lower=12.34))
        return state, recovery

    seen = Classification.evidence

    def counted(self, bank, state, indices, **how):
        asked.append((state.candidate.resolution, int(np.isin(indices, self.proof).sum())))
        return seen(self, bank, state, indices, **how)

    monkeypatch.setattr(in_rounds, "climb", climbed)
    monkeypatch.setattr(Classification, "evidence", counted)
    how = {**HOW, "recover": "refit", "resolutions": [40, 16]}
    found = search(model, cells.dataset(), sequential=True, out=tmp_path / "run", **how)
    (ruled,) = [r for r in found.results if r.candidate.resolution == 16]
    assert ruled.reason == "ruled out on 20 tuning images (drop at least 12.3 points)" and ruled.quality is None
    assert sum(n for resolution, n in asked if resolution == 16) == 0
    (other,) = [r for r in found.results if r.candidate.resolution == 40]
    assert other.drop.comparisons == 1 and other.recovery.tried


def test_what_a_bootstrap_judges_is_not_for_it(segmenter, scenes, tmp_path, monkeypatch):
    """Few images know nothing of rare classes."""
    monkeypatch.setattr(in_rounds, "MANY", 1)
    how = {"threads": 1, "max_drop": 30.0, "recover": "none", "resolutions": [(36, 48)], "stem_scales": ()}
    with pytest.raises(DownresError, match="few images say nothing of what is rare in a mIoU"):
        search(segmenter(), str(scenes), sequential=True, out=tmp_path / "asked", **how)
    found = search(segmenter(), str(scenes), out=tmp_path / "run", **how)
    assert Store.read(found.folder).get("rounds") is False and found.results[0].quality.n == 16


def test_a_file_that_fails_on_proof_images_is_stopped_alone(model, cells, tmp_path, monkeypatch):
    """And counts among the candidates all the same, also when the run goes on."""
    real = Classification.evidence

    def failing(self, bank, state, indices, **how):
        if state.candidate.precision == "int8" and np.isin(indices, self.proof).all():
            raise DownresError("This file cannot run.")
        return real(self, bank, state, indices, **how)

    monkeypatch.setattr(Classification, "evidence", failing)
    how = {**HOW, "resolutions": (), "candidates": ("16 int8", "40"), "minimize": "macs"}
    found = search(model, cells.dataset(), sequential=True, out=tmp_path / "run", **how)
    (failed,) = [r for r in found.results if r.reason == "This file cannot run"]
    assert failed.status == "stopped" and str(failed.candidate) == "16 int8"
    judged = [r for r in found.results if r.drop]
    assert judged and {r.drop.comparisons for r in judged} == {len(found.results)}
    for file in (tmp_path / "run" / "predictions").iterdir():
        file.unlink()
    again = search(model, cells.dataset(), out=tmp_path / "run", **how)
    assert [r.drop for r in again.results] == [r.drop for r in found.results]


def test_what_cannot_ship_ends_nothing(model, folder, tmp_path, monkeypatch):
    """In torch a network is measured and no file is shipped: that it is proven makes no other unneeded."""
    from downres.searching import select

    real = select.expense
    monkeypatch.setattr(
        in_rounds, "expense", lambda r, minimize: (0.0, 0.0) if r.candidate.runtime == "torch" else real(r, minimize)
    )
    how = {**HOW, "resolutions": [40], "runtime": ("onnxruntime", "torch"), "minimize": "macs"}
    found = search(model, str(folder), sequential=True, out=tmp_path / "run", **how)
    assert not any("torch is proven" in r.reason for r in found.results)
    assert found.best is not None and found.best.candidate.runtime is None and found.artifact is not None
