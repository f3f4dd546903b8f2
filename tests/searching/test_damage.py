"""Run folders that were damaged, emptied, cut or left half: the same answer again, or one sentence; and looking early."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from downres import Budget, load_model, load_run, write_report
from downres.errors import DownresError
from downres.record import write_whole
from downres.recovery import bank as bank_module
from downres.recovery.features import FeatureBank
from downres.searching.store import Store
from downres.tasks.classification.quality import compare_all

from .conftest import already_exported
from .conftest import run_search as run_any

run_search = partial(run_any, stem_scales=())


@pytest.fixture(scope="module")
def finished(tiny_file, tiny_preprocessing, cells, tmp_path_factory):
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    return run_search(model, cells.dataset(), tmp_path_factory.mktemp("whole") / "run"), model


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0].folder, tmp_path / "run")


def answers(run):
    """All that a run says, without wall-clock times."""
    rows = [
        {k: v for k, v in r.row().items() if not k.endswith(("_ms", "_per_s", "ratio_low", "ratio_high", "rss_bytes"))}
        for r in (run.original, *run.results)
    ]
    return rows, run.best and run.best.candidate


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2]),
    "noise": lambda file: file.write_bytes(np.random.default_rng(0).bytes(200)),
}


def kinds(folder):
    """Of files that differ in their candidate alone the first."""
    return list({re.sub(r"^(predictions|weights)/.*", r"\1", name): name for name in reversed(files(folder))}.values())


@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_of_a_run_damaged(finished, folder, cells, tmp_path, monkeypatch, how):
    """Looking at it gives a page or a sentence; the same search goes on to the same answer, or says a sentence."""
    run, model = finished
    monkeypatch.setattr(bank_module, "export_onnx", already_exported(run.artifact / "model.onnx"))
    for name in files(folder) if how == "deleted" else kinds(folder):
        damaged = shutil.copytree(folder, tmp_path / "damaged")
        DAMAGES[how](damaged / name)
        try:
            write_report(damaged)
        except DownresError as error:
            assert "\n" not in str(error), name
        try:
            again = run_search(model, cells.dataset(), damaged)
        except DownresError as error:
            assert name == "run.json" and "\n" not in str(error), (name, error)
        else:
            assert answers(again) == answers(run) and again.finished, name
            assert not list(damaged.rglob("*.partial"))
        shutil.rmtree(damaged)


def test_damaged_answers_are_measured_again_and_nothing_else(finished, folder, cells):
    run, model = finished
    name = next((folder / "predictions").glob("16-*"))
    name.write_bytes(b"")
    between = load_run(folder)
    assert not between.finished and between.best is None and between.results[1].status == "waiting"
    assert "lost" in between.results[1].reason and "unfinished: 1 of 2" in between.notes[-1]
    before = (folder / "measurements.jsonl").read_bytes()
    again = run_search(model, cells.dataset(), folder)
    assert answers(again) == answers(run)
    added = (folder / "measurements.jsonl").read_bytes().removeprefix(before)
    assert [json.loads(line)["key"] for line in added.splitlines()] == ["quality/16"]


def test_the_command_line_says_no_interruption(finished, folder, cli):
    for name in (folder / "predictions").iterdir():
        name.write_bytes(b"")
    done = cli("report", folder, "--json")
    assert done.code == 0 and "Interrupted" not in done.err
    assert "not finished: 0 of 2" in (folder / "report.html").read_text()


def test_a_finished_run_is_not_appended_to(finished, folder, cells):
    run, model = finished
    before = (folder / "measurements.jsonl").read_bytes()
    assert answers(run_search(model, cells.dataset(), folder)) == answers(run)
    assert (folder / "measurements.jsonl").read_bytes() == before


def test_any_field_of_the_settings_changed_is_read_or_refused_in_a_sentence(folder, damage, read_once):
    file = folder / "run.json"
    settings, refused = json.loads(file.read_text()), 0
    for at in [p for p in damage.paths(settings) if p]:
        for value in (..., None, "x", -1, [], {"a": 1}):
            file.write_text(json.dumps(damage.changed(settings, at, value)))
            try:
                load_run(folder).to_json()
            except DownresError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 200


def test_any_field_of_the_measurements_changed_is_read_or_refused_in_a_sentence(folder, damage, read_once):
    """With a right checksum, as whoever edits the file by hand may write one."""
    store = Store.read(folder)
    log = (folder / "measurements.jsonl").read_bytes()
    for key in [k for k in store._values if not k.startswith("arrays/")]:
        value = store.get(key)
        for at in [p for p in damage.paths(value) if len(p) < 3]:
            for wrong in (..., None, "x", -1, [], {"a": 1}):
                store.put(key, (wrong if wrong is not ... else 3) if not at else damage.changed(value, at, wrong))
                try:
                    load_run(folder).to_json()
                except DownresError as error:
                    assert "\n" not in str(error)
                (folder / "measurements.jsonl").write_bytes(log)


def test_a_resumed_run_counts_images_as_one_that_nobody_interrupted(finished, cells, tmp_path):
    run, model = finished
    seen = 0

    def stop(what, done, total):
        nonlocal seen
        seen += "16: looking" in what
        if seen == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(model, cells.dataset(), tmp_path / "r", progress=stop)
    again = run_search(model, cells.dataset(), tmp_path / "r")

    def images(found):
        return [[(rung.rung, rung.n, rung.images) for rung in r.recovery.tried] for r in found.results]

    assert images(again) == images(run)


def test_a_manifest_written_by_a_resumed_run_says_the_same(tiny_file, tiny_preprocessing, cells, tmp_path):
    """After cross-fitting the shipped network is fitted once more: it took as many images whoever stopped when."""
    model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
    said = []
    for _ in range(2):  # the second goes on after a stop just before it ships
        run = run_search(model, cells.dataset(folds=2), tmp_path / "r", resolutions=[32], max_drop=60.0)
        recovery = json.loads((run.artifact / "manifest.json").read_text())["recovery"]
        said.append([(rung["rung"], rung["n"], rung["images"]) for rung in recovery["tried"]])
        shutil.rmtree(run.artifact)
    assert said[0] == said[1] and said[0][0][2] > 0


# --- looking early ---


def test_an_unfinished_run_proves_nothing(finished, cells, tmp_path, monkeypatch):
    run, model = finished
    features = FeatureBank.features

    def stop(bank, state, *args, **options):
        if state.candidate.resolution == 16:
            raise KeyboardInterrupt
        return features(bank, state, *args, **options)

    monkeypatch.setattr(FeatureBank, "features", stop)
    with pytest.raises(KeyboardInterrupt):
        run_search(model, cells.dataset(), tmp_path / "r", max_drop=60.0)
    early = load_run(tmp_path / "r")
    assert [r.status for r in early.results] == ["measured", "waiting"]
    assert early.best is None and not early.finished and early.results[1].reason.startswith("waiting")
    # One is measured and two are planned: its bounds are those of Bonferroni over two, not of one alone.
    drop = early.results[0].drop
    store = Store.read(early.folder)
    names = [next((early.folder / "predictions").glob(f"{side}-*")).stem for side in (48, 32)]
    correct = [store.arrays(f"predictions/{name}")["correct"] for name in names]
    level = compare_all(correct[0], {"it": correct[1]}, Budget(60.0, confidence=0.975))["it"]
    alone = compare_all(correct[0], {"it": correct[1]}, Budget(60.0))["it"]
    assert (drop.lower, drop.upper) == (level.lower, level.upper) and drop.upper > alone.upper
    assert drop.comparisons == 2 and drop.confidence == 0.95
    page = write_report(early).read_text()
    assert "This run is not finished: 1 of 2 candidates are done" in page and "waiting: not measured yet" in page
    assert "is proven to be" not in page and "this network needs" not in page


# --- files without half a state ---


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr("downres.record.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", b"three")
    assert (tmp_path / "a").read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_killed_while_writing_leaves_nothing_beside_it(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom downres import record\n"
        "record.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "record.write_whole(Path(sys.argv[1]), b'x' * 1000)"
    )
    (tmp_path / "report.html").write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "report.html")])
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and (tmp_path / "report.html").read_text() == "old"
