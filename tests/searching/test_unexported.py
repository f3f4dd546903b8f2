"""Searches of networks that cannot be written as ONNX, wholly or at some sizes: they go on, and say so."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from downres import check, load_model, load_run, recover, search
from downres.engines.onnxruntime import NotExported, export_onnx
from downres.records import Candidate
from downres.recovery import bank as bank_module

WHY = "ONNX has no operator for aten::sort"
OPTIONS = {"stem_scales": (), "rungs": (), "max_drop": 95.0, "threads": 1}


@pytest.fixture
def blocked(monkeypatch) -> set[int]:
    """Sides in pixels at which no network can be exported; what networks really lack is in tests/engines."""
    sides: set[int] = set()

    def export(network, size, path, names=("logits",)):
        if size[1] in sides:
            raise NotExported(WHY)
        return export_onnx(network, size, path, names)

    monkeypatch.setattr(bank_module, "export_onnx", export)
    monkeypatch.setattr(bank_module, "resize_onnx", lambda *_: False)
    return sides


@pytest.fixture(scope="module")
def photos(cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 photographs in class folders, half of them to prove on."""
    root = tmp_path_factory.mktemp("photos")
    for i, label in enumerate(cells.labels[:48]):
        folder = root / ("val" if i % 2 else "train") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cells.pictures[i]).save(folder / f"{i}.png")
    return root


@pytest.fixture
def go(tiny_file, tiny_preprocessing, photos):
    """A search of the tiny network, at 48 px."""

    def searched(out, *resolutions, **options):
        model = dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)
        return search(model, photos, resolutions=resolutions, out=out, **{**OPTIONS, **options})

    return searched


def test_an_original_that_cannot_be_exported_is_searched_in_torch(go, blocked, tiny_file, tmp_path):
    blocked.add(48)
    run = go(tmp_path / "run", 28)
    assert [r.latency.runtime for r in (run.original, *run.results)] == ["torch"] * 2
    assert sum(WHY in note for note in run.notes) == 1 and run.settings["runtime"] == "torch"
    assert "measured through torch" in (run.folder / "report.html").read_text()
    assert str(run.best.candidate) == "28"  # whose graph is there all the same
    assert [f.ok for f in check(run.artifact, model=f"{tiny_file}:make")] == [True] * 5


def test_who_asks_for_onnxruntime_gets_it_or_the_reason(go, blocked, tmp_path):
    blocked.add(48)
    says = f"^The model could not be exported to ONNX: {WHY}; `runtime='torch'` measures without"
    with pytest.raises(NotExported, match=says):
        go(tmp_path / "asked", 28, runtime="onnxruntime")
    blocked |= {16}
    run = go(tmp_path / "run", 16)
    with pytest.raises(NotExported, match=says):
        go(run.folder, 16, runtime="onnxruntime")


def test_what_cannot_be_exported_is_not_shipped_and_how_to_make_it_is_said(go, blocked, photos, tiny, tmp_path):
    blocked |= {48, 16}
    run = go(tmp_path / "run", 16)
    assert run.finished and str(run.best.candidate) == "16" and run.artifact is None
    first, last = (note for note in run.notes if WHY in note)
    assert first.startswith("all is measured in torch") and last.startswith("no model is shipped, as 16 could not be")
    assert "downres.recover(model, data, Candidate.parse('16'))" in last
    assert recover(tiny, photos, Candidate.parse("16"), rungs=(), threads=1)[1].hw == (16, 16)
    log = (run.folder / "measurements.jsonl").read_bytes()
    again = go(run.folder, 16)
    assert again.notes == run.notes and again.best.drop == run.best.drop and load_run(run.folder).settings == run.settings
    assert (run.folder / "measurements.jsonl").read_bytes() == log and not (run.folder / "best.partial").exists()


def test_a_candidate_that_cannot_be_exported_stops_and_the_others_go_on(go, blocked, tmp_path):
    blocked.add(24)
    run = go(tmp_path / "run", 24, 16, max_drop=0.0)  # nothing to ship, which takes another export
    assert [(str(r.candidate), r.status) for r in run.results] == [("24", "stopped"), ("16", "measured")]
    assert run.results[0].reason == f"could not be exported to ONNX: {WHY}" and run.results[0].cost is not None
    assert run.original.latency.runtime == run.results[1].latency.runtime == "onnxruntime"
    assert run.finished and not any(WHY in note for note in run.notes)


def test_a_lost_record_of_it_is_made_again(go, blocked, tmp_path):
    """Whichever line of the log is damaged: the runtime of all, or why one stopped."""
    blocked |= {48, 16}
    run = go(tmp_path / "run", 28, 16)
    for key in ("in_torch", "unexported", "latency", "unshipped"):
        log = run.folder / "measurements.jsonl"
        log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if f'"key": "{key}"' not in line))
        again = go(run.folder, 28, 16)
        assert [r.status for r in again.results] == [r.status for r in run.results] and again.settings == run.settings
        assert again.best.candidate == run.best.candidate and again.finished
