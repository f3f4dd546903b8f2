"""The report: its sentence, its escaping, and the page in a real browser (phone, desktop, dark, offline)."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from downres.errors import DownresError
from downres.records import (
    OUTSIDE,
    TOO_FEW,
    WITHIN,
    Budget,
    Candidate,
    Cost,
    Drop,
    Latency,
    Preprocessing,
    Recovery,
    Result,
    Rung,
)
from downres.reports import ReportView, build_report, words, write_report
from downres.reports.page import columns
from downres.reports.pictures import AXES, SHOWN, log_ticks, pareto_front, png_data_uri, tick_texts
from downres.tasks.classification.photos import Photo, View, photos_html
from downres.tasks.classification.quality import Quality

N = 600
LICENCE = "ELPV data set, CC BY-NC-SA 4.0"
NASTY = "<script>alert('1')</script>"


def quality(top1: float, n: int = N) -> Quality:
    """A quality with its Wilson interval."""
    p, z = round(top1 / 100 * n) / n, 1.96
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    return Quality(round(p * n), n, 100 * p, 100 * (centre - half), 100 * (centre + half))


def latency(ms: float) -> Latency:
    return Latency(ms, 0.97 * ms, 1.12 * ms, 50, 1, "onnxruntime", 2, "Xeon, 2 cores", {"onnxruntime": "1.23"})


def cost(macs: float, memory: float, side: int) -> Cost:
    return Cost(int(macs), 4_652_008, 18_608_032, int(memory), (1, 3, side, side))


def result(candidate: Candidate, gmacs: float, top1: float, naive: float, upper: float, verdict: str, rung: str) -> Result:
    drop = Drop(97.0 - top1, 97.0 - top1 - 1.4, upper, 2.0, verdict, N, 14, 5, 0.95, 7, 420 if verdict == TOO_FEW else None)
    ladder = [Rung("none", naive + 0.4, 400, 1.9), Rung("crop", (naive + top1) / 2, 400, 6.1, note="crop ratio 0.95")]
    ladder += [Rung("batchnorm", top1 - 0.6, 400, 9.4, 800), Rung("head", top1 + 0.3, 400, 21.0, 1600)]
    tried = tuple(ladder[: [r.rung for r in ladder].index(rung) + 1])
    seconds = sum(r.seconds for r in tried)
    return Result(
        candidate,
        "measured",
        "",
        cost(gmacs * 1e9, gmacs * 16e6, candidate.hw[0] if candidate.hw else 300),
        latency(4 + 52 * gmacs),
        quality(naive),
        quality(top1),
        drop,
        Recovery(rung, 0.95, seconds, tried),
    )


def original() -> Result:
    return Result(Candidate(300), "measured", "", cost(0.72e9, 11.5e6, 300), latency(41.4), None, quality(97.0))


def results() -> tuple[Result, ...]:
    return (
        Result(Candidate(32), "stopped", "the feature map after the stem is 1 × 1: nothing is left to classify"),
        result(Candidate(64), 0.035, 86.2, 41.0, 13.1, OUTSIDE, "head"),
        result(Candidate(96), 0.076, 92.3, 62.0, 6.5, OUTSIDE, "head"),
        result(Candidate(112), 0.103, 95.0, 71.5, 3.4, TOO_FEW, "head"),
        result(Candidate(128), 0.135, 96.5, 79.0, 1.86, WITHIN, "head"),
        result(Candidate(160), 0.21, 96.8, 88.3, 1.4, WITHIN, "batchnorm"),
        result(Candidate(300, 0.5, "conv_stem<b>ü</b>"), 0.26, 95.8, 83.5, 2.7, TOO_FEW, "batchnorm"),
        result(Candidate(192), 0.30, 97.2, 92.7, 0.9, WITHIN, "crop"),
        result(Candidate((224, 256)), 0.47, 97.0, 95.8, 0.7, WITHIN, "crop"),
    )


def photos() -> tuple[Photo, ...]:
    """Two pictures, one grey and one coloured, at three resolutions."""
    shots = []
    for index, name in enumerate(["Zelle – ähm.png", f"{NASTY}.jpg"]):
        views = []
        for side in (300, 128, 64):
            y, x = np.mgrid[:side, :side] / side
            rgb = np.stack([x * 255, (y * 255 if index else x * 255), (255 - x * 255 if index else x * 255)], axis=-1)
            views.append(View(f"{side} px", rgb.astype(np.uint8), "defect & crack", 97.25, side > 64))
        shots.append(Photo(name, NASTY if index else "functional", tuple(views)))
    return tuple(shots)


def sample(**changes: object) -> ReportView:
    """A realistic view of one search, with awkward names."""
    fields: dict = dict(
        title="Solar cells at fewer pixels",
        model=f"EfficientNet-Lite0 {NASTY}",
        data="2,624 photographs of solar cells in 2 classes, 600 of them kept aside for the proof.",
        licence=LICENCE,
        budget=Budget(max_drop=2.0),
        original=original(),
        results=results(),
        best=Candidate(128),
        preprocessing=Preprocessing(128, 0.95),
        score=Quality,
        section=photos_html(photos(), LICENCE),
        made={
            "Top-1": "Correct images divided by all 600 proof images; Wilson interval.",
            "MACs": "Counted op by op in one forward pass; 1 MAC is one multiply and one add.",
        },
        command=f"downres search timm:efficientnet_lite0 --data 'photos {NASTY}' --max-drop 2.0 --out run/",
        created="2026-03-14",
        versions={"downres": "0.1.0", "torch": "2.13.0", "timm": "1.0.20"},
        skipped=(f"{NASTY}.png: not an image",),
        warnings=("Two images occur twice in the data.",),
    )
    return ReportView(**(fields | changes))


def demo() -> ReportView:
    """The demo's own run, from the numbers that were kept of it; without its two 8-bit files, as a phone has no room for twelve
    names.
    """
    kept = json.loads((Path(__file__).parents[2] / "benchmarks/results/demo.json").read_text())

    def of(row: dict) -> Result:
        candidate = Candidate.parse(row["candidate"])
        macs, memory = row["macs"], row["peak_activation_bytes"]
        size = (1, 3, *(candidate.hw or (300, 300)))
        drop = None
        if row["drop"] is not None:
            bounds = (row["drop"], row["drop_lower"], row["drop_upper"], kept["budget"]["max_drop"], row["verdict"], row["n"])
            drop = Drop(*bounds, row["lost"], row["won"], 0.95, 9, row["more_images"])
        timed = Latency(row["latency_ms"], row["p10_ms"], row["p90_ms"], 30, 1, row["runtime"], 2, row["hardware"])
        return Result(
            candidate, "measured", "", Cost(macs, row["params"], row["param_bytes"], memory, size), timed,
            quality(row["naive_top1"], row["n"]) if drop else None,
            Quality(row["correct"], row["n"], row["top1"], row["top1_low"], row["top1_high"]), drop,
            Recovery(row["rung"], row["crop_ratio"], 1.0),
        )  # fmt: skip

    first = of(kept["original"])
    rows = [row for row in kept["candidates"] if row["precision"] == "fp32"]
    ordered = sorted(map(of, rows), key=lambda r: -r.cost.macs)
    return ReportView(
        title="downres report", model=f"{kept['settings']['model']} ({kept['settings']['weights']})",
        data=kept["data"]["description"], licence=kept["data"]["licence"], budget=Budget(kept["budget"]["max_drop"]),
        original=first, results=tuple(ordered), best=Candidate.parse(kept["best"]["candidate"]),
        preprocessing=Preprocessing.from_json(kept["settings"]["preprocessing"]), score=Quality, made={},
        command=kept["settings"]["command"], created=kept["date"], versions={},
    )  # fmt: skip


def headline(view: ReportView) -> str:
    page = build_report(view)
    return re.sub(r"<[^>]+>", "", re.search(r"<h1>(.*?)</h1>", page)[1]).replace("\u00a0", " ")


def without_plotly(page: str) -> str:
    return page.replace(get_plotlyjs(), "")


def test_headline_says_what_is_gained_and_proven():
    assert headline(sample()) == (
        "At 128 px instead of 300 px this network needs 5.3× fewer MACs and 3.8× less time, "
        "and its accuracy drop is proven to be at most 1.86 points (allowed: 2.0) with 95 % confidence."
    )


def test_headline_names_the_stem_variant():
    stem = Candidate(300, 0.5, "conv_stem<b>ü</b>")
    text = headline(sample(best=stem))
    assert text.startswith(
        "With the activations after conv_stem&lt;b&gt;ü&lt;/b&gt; resized ×0.5 this network needs 2.8× fewer"
    )
    assert "is not proven to be within 2.0" in text


@pytest.mark.parametrize(
    ("kept", "budget", "expected"),
    [
        (slice(1, 4), Budget(2.0), "Nearest came 112 px: it lost 2.00 points, which may be up to 3.40; about 420 more images"),
        (slice(1, 3), Budget(2.0), "Even the nearest, 96 px, is proven to lose more: at least 3.30 points."),
        (slice(4, 6), Budget(2.0, max_latency_ms=3.0), "No candidate meets every limit. Nearest came 160 px"),
        (slice(0, 1), Budget(2.0), "Nothing was proven: of 1 candidate none was measured"),
        (slice(0, 0), Budget(2.0), "Nothing was proven"),
    ],
)
def test_headline_without_a_best_is_honest(kept, budget, expected):
    assert expected in headline(sample(best=None, results=results()[kept], budget=budget))


def test_unknown_best_is_an_error():
    with pytest.raises(DownresError, match="not among"):
        build_report(sample(best=Candidate(77)))


def test_names_are_escaped_everywhere():
    page = build_report(sample())
    assert NASTY not in page
    assert "<b>ü</b>" not in page
    assert "&lt;script&gt;alert" in page


def test_page_has_its_parts_and_no_outside_address():
    page = without_plotly(build_report(sample()))
    for heading in ("Accuracy against cost", "Every candidate", "What the model sees", "How every number was made"):
        assert heading in page
    assert page.count("data:image/png;base64,") == 6
    assert page.count("ELPV data set, CC BY-NC-SA 4.0") == 2
    assert "nothing is left to classify" in page
    assert "≈ 420 more images" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)


def test_numbers_are_written_one_way_and_short():
    own = Preprocessing(128, 0.95, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3)
    page = without_plotly(build_report(sample(preprocessing=own)))
    told = re.sub(r"<(script|style)>.*?</\1>|<[^>]+>", " ", page, flags=re.S)
    assert "mean 0.498, 0.498, 0.498; std 0.502, 0.502, 0.502" in told
    assert not re.search(r"\d\.\d{6}", told)
    assert words.count(2624, "image") == "2624 images" and "\u2009" not in page  # no space at which a number breaks


def test_a_network_without_tokens_is_not_told_of_any():
    assert "token" not in re.sub(r"<[^>]+>", " ", without_plotly(build_report(sample())))


def test_what_was_not_recovered_has_one_name():
    page = re.sub(r"<[^>]+>", " ", without_plotly(build_report(sample()))).lower()
    assert "lowered only" in page and "naive" not in page and "no recovery" not in page


def test_no_picture_stands_alone_in_its_row():
    for pictures in range(1, SHOWN + 3):
        across = columns(pictures)
        assert across <= 4 and (pictures < 4) <= (across == pictures) and pictures % across != 1 or pictures == 1


def test_page_without_photographs_latency_or_candidates():
    bare = Result(Candidate(300), "measured", quality=quality(97.0))
    page = without_plotly(
        build_report(
            sample(original=bare, results=results()[:1], best=None, section=photos_html((), LICENCE), skipped=(), warnings=())
        )
    )
    assert "There is no picture" in page
    assert "What the model sees" not in page


def test_write_leaves_one_whole_file(tmp_path):
    path = write_report(sample(), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_pareto_front_keeps_what_nothing_beats():
    assert pareto_front([(3, 90), (1, 80), (2, 79), (2, 85), (4, 90)]) == [(1, 80), (2, 85), (3, 90)]


def test_ticks_are_round_numbers():
    assert log_ticks(23e6, 1.1e9) == [5e7, 1e8, 2e8, 5e8, 1e9]
    assert log_ticks(3.1, 6.2) == [4, 5, 6]
    assert log_ticks(15e6, 2.6e9) == [3e7, 1e8, 3e8, 1e9]
    assert log_ticks(0.02, 3e9)[:2] == pytest.approx([0.1, 10])


def test_an_axis_has_three_to_six_ticks_that_differ_whatever_its_range():
    rng = np.random.default_rng(0)
    for low, decades in zip(10 ** rng.uniform(-1, 11, 3000), 10 ** rng.uniform(-3, 1, 3000), strict=True):
        high = low * 10**decades
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 6 and low * (1 - 1e-9) <= ticks[0] and ticks[-1] <= high * (1 + 1e-9), (low, high, ticks)
        assert math.log10(ticks[-1] / ticks[0]) > 0.3 * math.log10(high / low)  # along the axis, not in one corner
        for axis in AXES:
            assert len({*tick_texts(ticks, axis.text)}) == len(ticks)
    assert tick_texts([1.0, 1.5, 2000.0], AXES[2].text) == ["1 ms", "1.5 ms", "2000 ms"]


def test_png_is_lossless_and_grey_is_smaller():
    colour = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    grey = np.repeat(colour[..., :1], 3, axis=2)
    assert len(png_data_uri(grey)) < len(png_data_uri(colour)) / 2


# In a real browser.


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_report(sample(), tmp_path_factory.mktemp("report") / "report.html").as_uri()


@pytest.fixture
def visit(open_page, address):
    """Opens the report at a width and in a colour scheme."""
    return lambda width=1280, scheme="light": open_page(address, width, scheme)


def plot_colours(page) -> dict[str, str]:
    return page.evaluate(
        """() => ({page: getComputedStyle(document.body).backgroundColor,
                   ink: document.querySelector('#plot .ytick text').style.fill,
                   chosen: getComputedStyle(document.querySelector('#plot .labels .chosen')).fill})"""
    )


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows_and_images_load(visit, width):
    page = visit(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].map(i => i.naturalWidth)") == [300, 128, 64, 300, 128, 64]
    shown = page.evaluate("[...document.images].map(i => i.getBoundingClientRect()).map(b => `${b.width} ${b.height}`)")
    assert len(set(shown)) == 1 and float(shown[0].split()[0]) > 90
    assert page.evaluate("document.querySelector('#plot .main-svg').getBoundingClientRect().width") <= width


def test_a_table_that_goes_on_beyond_the_edge_says_so(visit):
    page = visit(390)
    table = page.locator(".scroll").first
    hint = "e => getComputedStyle(e, '::before').display"
    assert "more" in table.get_attribute("class") and table.evaluate(hint) == "block"
    table.evaluate("e => { e.scrollLeft = e.scrollWidth }")
    page.wait_for_function("e => !e.classList.contains('more')", arg=table.element_handle())
    assert visit(1280).locator(".scroll").first.evaluate(hint) == "none"


def test_plot_draws_switches_and_hovers(visit):
    page = visit()
    points = page.locator("#plot .scatterlayer .point")
    assert points.count() == 8 + 8 + 1 + 1  # lowered only, recovered, the original, the ring
    assert "MACs" in page.locator("#plot .xtitle").text_content()

    points.last.scroll_into_view_if_needed()
    chosen = points.last.bounding_box()
    page.mouse.move(chosen["x"] + chosen["width"] / 2, chosen["y"] + chosen["height"] / 2)
    tip = page.locator("#plot .hoverlayer .hovertext")
    tip.wait_for(timeout=5000)
    for text in ("128 px", "top-1 96.5 %", "135 M MACs", "at most 1.86", "4.65 M parameters", "2.16 MB", "head refit", WITHIN):
        assert text in tip.text_content().replace("\u00a0", " ")

    before = chosen["x"]
    page.get_by_label("Latency").check()
    assert "latency" in page.locator("#plot .xtitle").text_content()
    assert points.last.bounding_box()["x"] != before
    low = page.evaluate("document.getElementById('plot').layout.yaxis.range[0]")
    page.get_by_label("Zoom to recovered").check()
    assert page.evaluate("document.getElementById('plot').layout.yaxis.range[0]") > low + 20
    page.get_by_label("Lowered only").uncheck()
    assert points.count() == 8 + 1 + 1


@pytest.fixture(scope="module")
def demo_address(tmp_path_factory):
    return write_report(demo(), tmp_path_factory.mktemp("demo") / "report.html").as_uri()


@pytest.mark.parametrize("which", ["address", "demo_address"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_point_is_named_and_no_name_lies_on_another_or_on_a_point(request, open_page, collisions, which, width):
    page = open_page(request.getfixturevalue(which), width)
    view = demo() if which == "demo_address" else sample()
    names = [words.short_label(r.candidate) for r in (view.original, *view.results) if r.quality and r.candidate != view.best]
    for axis in ("MACs", "Latency"):
        page.get_by_label(axis, exact=True).check()
        for range_ in ("Everything", "Zoom to recovered"):
            page.get_by_label(range_).check()
            assert sorted(page.locator("#plot .labels text").all_text_contents()) == sorted([*names, "chosen: 128 px"])
            assert collisions(page) == []


def test_labels_never_overlap_wherever_the_points_lie(visit):
    """`placeLabels` itself, on random points that crowd more and more; judged here, not by its own functions."""
    page, rng = visit(390), np.random.default_rng(0)
    area = {"left": 40, "top": 10, "right": 380, "bottom": 360}
    placed = dropped = 0
    for many in (3, 10, 20, 40, 80):
        for spread in (150, 40, 8):
            x, y = np.clip(rng.normal(210, spread, many), 40, 380), np.clip(rng.normal(180, spread, many), 10, 360)
            points = [
                {"x": a, "y": b, "radius": 6, "width": w, "height": 15}
                for a, b, w in zip(x.tolist(), y.tolist(), rng.uniform(15, 90, many).tolist(), strict=True)
            ]
            markers = [
                {"left": a - 6, "right": a + 6, "top": b - 6, "bottom": b + 6}
                for a, b in zip(x.tolist(), y.tolist(), strict=True)
            ]
            lines = rng.uniform(10, 380, (many, 4)).tolist()
            found = page.evaluate("([p, m, l, a]) => placeLabels(p, m, l, a)", [points, markers, lines, area])
            boxes = [box for box in found if box]
            assert len(found) == many
            for i, a in enumerate(boxes):
                assert a["left"] >= 40 and a["right"] <= 380 and a["top"] >= 10 and a["bottom"] <= 360
                for b in [*boxes[i + 1 :], *markers]:
                    apart = (
                        a["right"] <= b["left"] or b["right"] <= a["left"] or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
                    )
                    assert apart, (many, spread, a, b)
            placed, dropped = placed + len(boxes), dropped + many - len(boxes)
            assert many > 20 or spread < 40 or len(boxes) == many  # a report has fewer, and they lie apart
    assert placed > 300 and dropped < placed


def test_dark_mode_repaints_the_plot_readably(visit, contrast):
    page = visit()
    light = plot_colours(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    dark = plot_colours(page)
    assert all(light[part] != dark[part] for part in light)
    for colours in (light, dark):
        assert contrast(colours["page"], colours["ink"]) > 4.5
        assert contrast(colours["page"], colours["chosen"]) > 4.5


def test_bounds_are_those_that_decide_and_rounded_away_from_the_proof():
    assert words.bound(Drop(1.2, 0.1, 2.314, 3.0, WITHIN, 100)) == "at most 2.32"
    assert words.bound(Drop(1.2, 0.1, 1.9999, 2.0, WITHIN, 100)) == "at most 2.00"
    assert words.bound(Drop(5.1, 4.206, 6.0, 2.0, OUTSIDE, 100)) == "at least 4.20"
    assert words.compared(Drop(5.1, 4.206, 6.0, 2.0, OUTSIDE, 100)) == "5.10 ≥ 4.20"
    assert words.compared(Drop(0.0012, 0.0, 0.00213, 0.003, WITHIN, 100)) == "0.00120 ≤ 0.00213"  # a regression in small units


def test_time_is_gained_only_where_the_rounds_part():
    before, after = latency(10.0), latency(8.0)
    assert words.faster(before, dataclasses.replace(after, ratio=(1.1, 1.4))) == "1.2× less time"
    # The medians say 1.2, the rounds something else.
    assert words.faster(before, dataclasses.replace(after, ratio=(1.5, 1.6))) == "1.5× less time"
    assert words.faster(before, dataclasses.replace(after, ratio=(1.05, 1.1))) == "1.1× less time"
    assert words.faster(before, dataclasses.replace(after, ratio=(0.9, 1.6))) == ""
    assert words.faster(before, dataclasses.replace(latency(12.0), ratio=(0.8, 0.9))) == "1.2× more time"
    assert words.faster(before, dataclasses.replace(latency(12.0), ratio=(0.8, 1.1))) == ""


def test_a_candidate_ruled_out_on_tuning_images_reads_so_everywhere():
    drop = Drop(5.0, 1.0, 9.0, 2.0, TOO_FEW, 40, more_images=100)
    result = Result(
        Candidate(96), "measured", "ruled out on 62 tuning images", cost(0.1e9, 1e6, 96), None, None, quality(90.0), drop
    )
    assert words.shown_verdict(result) == "ruled out" and words.verdict_key(result) == "outside"
