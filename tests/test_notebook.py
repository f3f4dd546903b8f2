"""What results show of themselves in a notebook, and as a DataFrame."""

import dataclasses
import html
import re
import sys

import pytest

from downres import Candidate, DownresError, costs, curve, load_run, reduce
from downres.notebook import fields, frame_of, table
from downres.records import Cost


def texts(document):
    return [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<t[dh].*?</t[dh]>", document)]


def test_a_record_is_its_fields():
    shown = Cost(4_089_284_608, 25_557_032, 4, 8, (1, 3, 224, 224), {"aten.relu_": 49})._repr_html_()
    assert "4\u202f089\u202f284\u202f608" in shown and "1, 3, 224, 224" in shown and "aten.relu_" in shown


def test_what_was_reduced_is_a_table_of_changes(tiny):
    reduced = reduce(tiny.module, resolution=32, input_size=(3, 48, 48))
    shown = texts(reduced.downres._repr_html_())
    for change in reduced.downres.changes:
        assert set(map(str, change.to_json().values())) <= set(shown) | {"None", ""}


def test_names_from_outside_are_no_html():
    assert "<b>" not in fields({"<b>x</b>": "<b>y</b>"}) and "<b>" not in table([{"<b>": "<b>"}])
    assert "\x1b" not in table([{"name": "\x1b[31m"}])


def test_columns_without_a_word_are_left_out_and_no_rows_are_nothing():
    assert texts(table([{"a": 1, "b": None}, {"a": 2, "b": ""}])) == ["a", "1", "2"]
    assert table([]) == ""
    assert texts(table([{"a": 1, "c": {}}, {"a": 2, "b": "late"}])) == ["a", "b", "1", "", "2", "late"]


@pytest.fixture(scope="module")
def counted(tiny_file):
    return costs(f"{tiny_file}:make", [160, 96])


def test_costs_are_a_table_and_the_picture(counted):
    shown = counted._repr_html_()
    assert shown.count("<tr>") == 1 + len(counted.rows)
    assert "srcdoc=" in shown and "<script" not in shown.replace(html.escape("<script"), "")  # scripts run in the frame alone


def test_they_draw_in_a_browser(counted, tiny, cells, tmp_path, browser):
    found = curve(tiny, cells.write(tmp_path / "data", ("val",)), [32, 24])
    for shown, least in ((counted, len(counted.rows)), (found, 1 + len(found.results))):
        file = tmp_path / "notebook.html"
        file.write_text(f"<!doctype html><meta charset=utf-8><title>cell</title>{shown._repr_html_()}")
        page = browser.new_page(viewport={"width": 1000, "height": 1200})
        try:
            page.goto(file.as_uri())
            points = page.frame_locator("iframe").locator(".scatterlayer .point")
            points.first.wait_for()
            assert points.count() >= least
            assert page.locator("table").first.is_visible()
        finally:
            page.close()


def test_frames_have_the_numbers_of_json(counted):
    pytest.importorskip("pandas", reason="to_pandas is for who has pandas")
    frame = counted.to_pandas()
    assert list(frame["macs"]) == [row.cost.macs for row in counted.rows]
    assert list(frame["resolution"]) == [row.candidate.resolution for row in counted.rows]


def test_a_curve(tiny, cells, tmp_path):
    found = curve(tiny, cells.write(tmp_path / "data", ("val",)), [32])
    shown = found._repr_html_()
    assert f"{found.results[0].quality.score:.1f}" in shown and "32 px" in shown
    assert "srcdoc=" in shown and "<script" not in shown.replace(html.escape("<script"), "")
    stopped = dataclasses.replace(found.results[0], status="stopped", quality=None, drop=None)
    assert "srcdoc=" not in dataclasses.replace(found, results=(stopped,))._repr_html_()  # no picture of nothing
    pytest.importorskip("pandas", reason="to_pandas is for who has pandas")
    frame = found.to_pandas()
    assert list(frame["top1"]) == [found.original.quality.score, found.results[0].quality.score]


def test_a_run_is_its_verdict_table_and_report(shipped):
    finished_run = load_run(shipped[0].parent)
    shown = finished_run._repr_html_()
    assert "proven" in shown and "srcdoc=" in shown
    best = dataclasses.replace(finished_run, best=None)._repr_html_()
    assert "★" in shown and "★" not in best.partition("<iframe")[0]
    pytest.importorskip("pandas", reason="to_pandas is for who has pandas")
    assert len(finished_run.to_pandas()) == 1 + len(finished_run.results)


def test_without_pandas_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DownresError, match="pip install 'downres"):
        frame_of([Candidate(96).to_json()])
