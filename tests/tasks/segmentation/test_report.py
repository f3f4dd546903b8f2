"""The report of a segmentation run: its numbers against the records, its pictures pixel by pixel, and the page in a browser."""

import base64
import dataclasses
import io
import re
from dataclasses import dataclass
from html import unescape

import numpy as np
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from downres.errors import DownresError
from downres.records import TOO_FEW, WITHIN, Budget, Candidate, Cost, Drop, Latency, Preprocessing, Recovery, Result, Rung
from downres.reports import ReportView, build_report, pictures, words, write_report
from downres.reports.report import chosen_of
from downres.tasks.segmentation.class_picture import class_figures, readable
from downres.tasks.segmentation.classes import class_table, who_loses
from downres.tasks.segmentation.masks import IGNORE, find_masks
from downres.tasks.segmentation.quality import SegmentationQuality, Tallies, compare_tallies, segmentation_quality, tally
from downres.tasks.segmentation.scenes import Overlay, Scene, Segmentation, draw
from downres.tasks.segmentation.show import scenes_html

NASTY = "<script>alert('1')</script>"
CLASSES = ("sky", "road", "wall", "pole", NASTY, "unicorn")
COLOURS = ((70, 130, 180), (128, 64, 128), (102, 102, 156), (153, 153, 153), (220, 20, 60), (0, 0, 70))
FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class MaskView(ReportView):
    """A view whose section is still to be made of its masks."""

    segmentation: Segmentation | None = None


def made(view: MaskView) -> ReportView:
    """The view with its section, as a search makes it."""
    assert view.segmentation is not None
    shown = chosen_of(view) or words.nearest(view.results)
    section = scenes_html(view.segmentation, view.original, view.results, shown, view.licence)
    return dataclasses.replace(view, section=section)


def street(seed: int, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its label: sky, road and a wall, and on them thin poles and small people; a frame that is ignored."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[60:] = 1
    mask[30:60, 20 : 60 + 5 * seed] = 2
    for x in rng.choice(np.arange(8, width - 8, 6), 5, replace=False):
        mask[20:70, x : x + 2] = 3
    for x in rng.choice(np.arange(8, width - 8, 7), 6, replace=False):
        mask[64:69, x : x + 3] = 4
    mask[:4] = mask[:, :3] = IGNORE
    noise = rng.normal(0, 8, (height, width, 3))
    image = np.clip(pictures.colour_map(mask, COLOURS) + noise, 0, 255).astype(np.uint8)
    return image, mask


def seen_small(mask: np.ndarray, factor: int) -> np.ndarray:
    """What is left of a label at 1/factor: the class that fills most of each cell. Thin things go first."""
    of = np.where(mask == IGNORE, 0, mask)
    shares = np.stack([of == c for c in range(len(CLASSES))]).astype(float)
    cells = shares.reshape(len(CLASSES), of.shape[0] // factor, factor, of.shape[1] // factor, factor).mean((2, 4))
    return cells.argmax(0).repeat(factor, 0).repeat(factor, 1).astype(np.uint8)


def answer(mask: np.ndarray, factor: int) -> np.ndarray:
    """The original errs too: a pole's first pixels are taken for wall."""
    said = seen_small(mask, factor)
    said[20:26][said[20:26] == 3] = 2
    return said


def cost(factor: int) -> Cost:
    return Cost(1_600_000_000 // factor**2, 860_000, 3_440_000, 20_000_000 // factor**2 + 8_000_000, (1, 3, 96, 128))


def latency(ms: float) -> Latency:
    return Latency(ms, 0.97 * ms, 1.1 * ms, 50, 1, "torch", 1, "Xeon, 1 core")


def one_miou(tallies: Tallies, image: int) -> float:
    hits, union = tallies.hits[image], tallies.predicted[image] + tallies.truth[image] - tallies.hits[image]
    return float(100 * np.mean(hits[union > 0] / union[union > 0]))


@pytest.fixture(scope="module")
def view() -> MaskView:
    """12 street scenes, judged by the library itself at four resolutions; a fifth candidate was stopped."""
    pairs = [street(seed) for seed in range(12)]
    masks = [mask for _, mask in pairs]
    said = {f: [answer(mask, f) for mask in masks] for f in FACTORS}
    tallies = {f: tally(said[f], masks, len(CLASSES)) for f in FACTORS}
    quality = {f: segmentation_quality(tallies[f]) for f in FACTORS}
    budget = Budget(20.0)
    drops = compare_tallies(tallies[1], {str(f): tallies[f] for f in FACTORS[1:]}, budget)
    candidates = {f: Candidate((96 // f, 128 // f)) for f in FACTORS}
    ladder = Recovery("none", 1.0, 3.0, (Rung("none", 61.25, 12, 3.0),))
    results = [
        Result(candidates[f], "measured", "", cost(f), latency(90 / f), quality[f], quality[f], drops[str(f)], ladder)
        for f in FACTORS[1:]
    ]
    stopped = Result(Candidate((6, 8)), "stopped", "nothing is left of the picture", cost(16))
    scenes = tuple(
        Scene(
            f"drive/{k}.png",
            *pairs[k],
            tuple(Overlay(words.label(candidates[f]), said[f][k], one_miou(tallies[f], k)) for f in FACTORS),
        )
        for k in range(4)
    )
    labelled = np.bincount(np.concatenate([m[m != IGNORE] for m in masks]), minlength=len(CLASSES))
    return MaskView(
        title="Streets at fewer pixels",
        model="RegSeg",
        data="12 street scenes in 6 classes.",
        licence="drawn",
        budget=budget,
        original=Result(candidates[1], "measured", "", cost(1), latency(90.0), None, quality[1]),
        results=(*results, stopped),
        best=candidates[2],
        preprocessing=Preprocessing((48, 64), fit="stretch"),
        score=SegmentationQuality,
        made={"mIoU": "Summed over all images."},
        command="downres search …",
        created="2026-11-22",
        versions={"downres": "0.1.0"},
        segmentation=Segmentation(
            CLASSES, COLOURS, scenes[:3], (scenes[3],), ("No image shows a unicorn.",),
            tuple(float(s) for s in 100 * labelled / labelled.sum()),
        ),
    )  # fmt: skip


def changed(view: MaskView, **changes) -> MaskView:
    """The view with another `segmentation`."""
    assert view.segmentation is not None
    return dataclasses.replace(view, segmentation=dataclasses.replace(view.segmentation, **changes))


def plain(html: str) -> str:
    """The text alone, with ordinary single spaces."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html))).strip()


def page_of(view: MaskView) -> str:
    return build_report(made(view)).replace(get_plotlyjs(), "")


def cells_of(page: str) -> dict[str, list[list[str]]]:
    """The class table: name of the row → for each column the number and, beside it, the change."""
    table = re.search(r'<table class="classes-table">(.*?)</table>', page, re.S)[1]
    rows = {}
    for row in re.findall(r'<tr><th scope="row">(.*?)</tr>', table, re.S):
        head, body = row.split("</th>", 1)
        name = unescape(re.sub(r"<i .*?</i>|<small>.*?</small>", "", head))
        rows[name] = [plain(cell).replace("%", "").split() for cell in re.findall(r"<td.*?>(.*?)</td>", body, re.S)]
    return rows


# Words.


def test_headline_and_budget_speak_of_miou(view):
    page = page_of(view)
    drop = view.results[0].drop
    assert drop.verdict == WITHIN
    assert plain(re.search(r"<h1>(.*?)</h1>", page)[1]) == (
        "At 48 × 64 px instead of 96 × 128 px this network needs 4.0× fewer MACs and 2.0× less time, "
        f"and its drop in mIoU is proven to be at most {np.ceil(100 * drop.upper) / 100:.2f} points (allowed: 20.0) "
        "with 95 % confidence."
    )
    assert "20.0 points of mIoU with 95 % confidence" in page
    assert "mIoU against cost" in page and "How the mIoU came back" in page
    text = plain(re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S))
    assert not re.search(r"top-1|top-5|crop ratio", text, re.I)
    assert not re.search(r"(?<!pixel )accuracy", text, re.I)


def test_headline_without_a_best_speaks_of_miou(view):
    few = Drop(3.0, 1.0, 6.0, 2.0, TOO_FEW, 12, more_images=40)
    near = dataclasses.replace(view.results[0], drop=few)
    left = dataclasses.replace(view, results=(near,), best=None, budget=Budget(2.0))
    assert "it lost 3.00 points, which may be up to 6.00; about 40 more images" in plain(page_of(left))
    slow = dataclasses.replace(view, best=None, budget=Budget(20.0, max_latency_ms=1.0))
    assert "its drop in mIoU is proven to be at most" in page_of(slow)


def test_miou_tile_has_its_relatives(view):
    tile = plain(re.search(r"<li>\s*<h3>mIoU</h3>(.*?)</li>", page_of(view), re.S)[1]).replace("\u00a0", " ")
    before, after = view.original.quality, view.results[0].quality
    assert tile.startswith(f"{after.miou:.1f} % from {before.miou:.1f} %")
    assert f"pixel accuracy {after.pixel_accuracy:.1f} %, was {before.pixel_accuracy:.1f} %" in tile
    assert f"boundary mIoU {after.boundary_miou:.1f} %, was {before.boundary_miou:.1f} %" in tile


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        ("crop", "Short side resized (bilinear, antialiased), centre cropped to 48x64 px, crop ratio 1"),
        ("stretch", "The whole picture resized (bilinear, antialiased) to 48x64 px"),
        ("pad", "with its aspect ratio to fit 48x64 px, the rest at the right and bottom filled with the mean"),
    ],
)
def test_preprocessing_in_words(fit, said):
    assert said in words.fitting(Preprocessing((48, 64), fit=fit))


def test_changes_have_signs():
    assert [words.signed(v) for v in (1.234, -0.5, 0.0, -0.001)] == ["+1.23", "−0.50", "0.00", "0.00"]


# The table.


def test_table_shows_the_records(view):
    rows = cells_of(page_of(view))
    qualities = [view.original.quality, *(r.quality for r in view.results if r.quality)]
    expected = {name: [q.iou[i] for q in qualities] for i, name in enumerate(CLASSES)}
    expected |= {"mIoU": [q.miou for q in qualities], "pixel accuracy": [q.pixel_accuracy for q in qualities]}
    expected |= {"boundary mIoU": [q.boundary_miou for q in qualities]}
    expected |= {f"{size} objects": [q.object_iou[size] for q in qualities] for size in ("small", "medium", "large")}
    assert rows.keys() == expected.keys()
    assert expected.pop("unicorn") == [None] * 4 and rows["unicorn"] == [["–"]] * 4
    for name, values in expected.items():
        assert [float(cell[0]) for cell in rows[name]] == [pytest.approx(v, abs=0.0501) for v in values]
        assert [float(c[1].replace("−", "-")) for c in rows[name][1:]] == [
            pytest.approx(v - values[0], abs=0.00501) for v in values[1:]
        ]


def test_classes_are_sorted_by_what_the_shown_candidate_loses(view):
    for best in (view.results[0], view.results[2]):
        page = page_of(dataclasses.replace(view, best=best.candidate))
        losses = dict(zip(CLASSES, zip(best.quality.iou, view.original.quality.iou, strict=True), strict=True))
        order = [name for name in cells_of(page) if name in CLASSES]
        assert order[-1] == "unicorn"
        changes = [losses[name][0] - losses[name][1] for name in order[:-1]]
        assert changes == sorted(changes) and changes[0] < changes[-1]
        assert f"Classes, by loss at {words.label(best.candidate)}" in page


def test_rows_say_how_many_and_how_much(view):
    page = plain(page_of(view))
    for size, number in view.original.quality.objects.items():
        assert f"{size} objects {number} object" in page
    assert "unicorn in no label and no answer" in page
    assert "No image shows a unicorn." in page


def quality(iou: tuple[float | None, ...], sizes: tuple[float | None, ...]) -> SegmentationQuality:
    known = [v for v in iou if v is not None]
    return SegmentationQuality(
        sum(known) / len(known), 0.0, 100.0, 90.0, 5, iou, 40.0, iou,
        dict(zip(("small", "medium", "large"), sizes, strict=True)), {"small": 9, "medium": 0, "large": 2},
    )  # fmt: skip


def test_sentence_tells_shares_of_objects_and_losses_of_classes():
    original = Result(Candidate(64), "measured", cost=cost(1), quality=quality((80.0, 50.0, 20.0, None), (40.0, None, 90.0)))
    small = Result(Candidate(32), "measured", cost=cost(2), quality=quality((79.0, 20.0, 25.0, 0.0), (10.0, None, 81.0)))
    table = class_table(original, [small], ("a", "b", "c", "d"))
    assert who_loses(table).replace("\u00a0", " ") == (
        "Of the IoU that they have in the original, at 32 px there is left: of small objects 25 %, of large objects 90 %. "
        "Of the classes b (−30.00), a (−1.00) lose most."
    )
    assert [line.name for line in table.classes] == ["b", "a", "c", "d"]
    assert table.classes[3].changes == (None, None)  # only one of the two has it
    assert table.share(-30.0) == 1.0 and table.share(-15.0) == 0.5
    assert table.share(None) == 0.0


def test_tenths_of_a_point_have_little_colour():
    same = Result(Candidate(64), "measured", cost=cost(1), quality=quality((80.0,), (40.0, None, 90.0)))
    table = class_table(same, [dataclasses.replace(same, quality=quality((79.9,), (40.0, None, 90.0)))], ("a",))
    assert table.share(-0.1) == pytest.approx(0.02)


# The pictures.


def test_colours_and_blending_are_arithmetic():
    classes = np.array([[0, 1], [2, IGNORE]], np.uint8)
    colours = [(10, 20, 30), (200, 0, 100)]
    assert pictures.colour_map(classes, colours).tolist() == [[[10, 20, 30], [200, 0, 100]], [[0, 0, 0], [0, 0, 0]]]
    image = np.full((2, 2, 3), 100, np.uint8)
    blended = pictures.overlay(image, classes, colours, alpha=0.25)
    assert blended.dtype == np.uint8
    assert blended[0].tolist() == [[78, 80, 82], [125, 75, 100]]  # 0.75·100 + 0.25·colour: 77.5 rounds to even, 82.5 too
    assert blended[1, 1].tolist() == [100, 100, 100]
    assert (pictures.overlay(image, classes, colours, alpha=0.0) == image).all()


def test_errors_leave_ignored_pixels_out():
    truth = np.array([[0, 1, IGNORE]], np.uint8)
    found = pictures.errors(np.array([[0, 2, 2]], np.uint8), truth)
    assert found.tolist() == [[pictures.RIGHT, pictures.WRONG, pictures.IGNORED]]


def decoded(uri: str, mode: str = "RGBA") -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        return np.asarray(image.convert("RGBA").convert(mode))


def test_layers_are_the_maps(view):
    scene = view.segmentation.scenes[0]
    drawn = draw(scene, view.segmentation)
    assert (drawn.height, drawn.width) == scene.truth.shape
    assert drawn.present == set(range(5))
    assert np.abs(decoded(drawn.photo, "RGB").astype(int) - scene.image).mean() < 12
    truth = decoded(drawn.truth.classes)
    judged = scene.truth != IGNORE
    assert (truth[judged][:, :3] == pictures.colour_map(scene.truth, COLOURS)[judged]).all()
    assert (truth[judged][:, 3] == 255).all()
    assert len(np.unique(truth[~judged], axis=0)) == 2  # stripes and the gaps between them
    for layers, overlay in zip(drawn.views, scene.overlays, strict=True):
        classes, errors = decoded(layers.classes), decoded(layers.errors)
        assert (classes[..., :3] == pictures.colour_map(overlay.classes, COLOURS)).all()
        wrong = judged & (overlay.classes != scene.truth)
        assert (errors[wrong] == (*pictures.ERROR, 255)).all()
        assert (errors[judged & ~wrong][:, 3] == 0).all() and (errors[~judged][:, 3] > 0).all()
        assert layers.wrong == pytest.approx(100 * wrong.sum() / judged.sum())
        assert layers.change == pytest.approx(overlay.miou - scene.overlays[0].miou)


def test_large_scenes_are_scaled_down_without_new_classes(view):
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([0, 4], np.uint8), (500, 1000))
    scene = Scene("large", np.zeros((500, 1000, 3), np.uint8), truth, (Overlay("x", truth, 100.0),))
    drawn = draw(scene, view.segmentation)
    assert (drawn.height, drawn.width) == (240, 480)
    shown = decoded(drawn.views[0].classes, "RGB")
    assert shown.shape == (240, 480, 3)
    assert {tuple(c) for c in shown.reshape(-1, 3).tolist()} == {COLOURS[0], COLOURS[4]}
    assert (decoded(drawn.views[0].errors)[..., 3] == 0).all()


def test_all_255_classes_fit_beside_the_ignored_pixels(view):
    many = dataclasses.replace(view.segmentation, classes=("c",) * 255, colours=tuple((i, 0, 0) for i in range(255)))
    truth = np.full((16, 16), 254, np.uint8)
    truth[:8] = IGNORE
    drawn = draw(Scene("many", np.zeros((16, 16, 3), np.uint8), truth, ()), many)
    found = decoded(drawn.truth.classes)
    assert (found[8:] == (254, 0, 0, 255)).all()
    assert (found[:8, :, :3] == 128).all() and (found[:8, :, 3] > 0).all()


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (np.zeros((10, 10), np.uint8), "has the size of its picture"),
        (np.full((96, 128), 6, np.uint8), "holds the report's 6 classes, 0 to 5, and 48 × 64 px of drive/0.png holds 6"),
    ],
)
def test_maps_that_do_not_fit_are_one_sentence(view, classes, said):
    scene = dataclasses.replace(view.segmentation.scenes[0], overlays=(Overlay("48 × 64 px", classes, None),))
    with pytest.raises(DownresError, match=re.escape(said)):
        build_report(made(changed(view, scenes=(scene,))))


def test_names_and_colours_of_another_number_are_one_sentence(view):
    with pytest.raises(DownresError, match="a name and a colour, there are 6 names and 5 colours"):
        build_report(made(changed(view, colours=COLOURS[:5])))
    with pytest.raises(DownresError, match="5 are named and 6 were measured"):
        build_report(made(changed(view, classes=CLASSES[:5], colours=COLOURS[:5], scenes=(), hardest=())))


# The picture of classes.


def test_figures_hold_the_records(view):
    table = class_table(view.original, view.results, CLASSES)
    figures = class_figures(table, COLOURS)
    assert list(figures) == [f"{group}-{scale}" for group in ("sizes", "classes") for scale in ("iou", "kept", "change")]
    qualities = [view.original.quality, *(r.quality for r in view.results if r.quality)]
    macs = [view.original.cost.macs, *(r.cost.macs for r in view.results if r.quality)]
    for i, name in enumerate(CLASSES[:4]):
        (marks,) = [t for t in figures["classes-iou"]["data"] if t["name"] == name and t["mode"] == "markers"]
        pairs = sorted(zip(macs, [q.iou[i] for q in qualities], strict=True))
        assert list(zip(marks["x"], marks["y"], strict=True)) == [(m, pytest.approx(v)) for m, v in pairs]
        (marks,) = [t for t in figures["classes-change"]["data"] if t["name"] == name and t["mode"] == "markers"]
        assert marks["y"] == [pytest.approx(v - qualities[0].iou[i]) for _, v in pairs]
    (marks,) = [t for t in figures["sizes-kept"]["data"] if t["name"] == "small objects" and t["mode"] == "markers"]
    small = [q.object_iou["small"] for q in qualities]
    assert marks["y"] == [pytest.approx(100 * v / small[0]) for v in small[::-1]]
    assert not [t for t in figures["classes-iou"]["data"] if t["name"] == "unicorn"]
    assert NASTY not in str([t.get("hovertext") for t in figures["classes-iou"]["data"]])


def test_of_many_classes_the_picture_has_those_that_lose_most(view):
    names = tuple(f"class {i}" for i in range(30))
    whole = Result(Candidate(64), "measured", cost=cost(1), quality=quality((90.0,) * 30, (40.0, None, 90.0)))
    iou = tuple(float(v) for v in np.random.default_rng(2).permutation(30))
    small = Result(Candidate(32), "measured", cost=cost(2), quality=quality(iou, (10.0, None, 81.0)))
    colours = tuple((8 * i, 100, 100) for i in range(30))
    segmentation = Segmentation(names, colours, ())
    figures = class_figures(class_table(whole, [small], names), colours)
    assert {t["name"] for t in figures["classes-iou"]["data"]} == {names[i] for i in np.argsort(iou)[:20]} | {"mIoU"}
    page = page_of(dataclasses.replace(view, original=whole, results=(small,), best=None, segmentation=segmentation))
    assert "Of the 30 classes the picture has the 20 that lose most." in page


@pytest.mark.parametrize("colour", [*COLOURS, (0, 0, 0), (255, 255, 255), (255, 255, 0), (64, 0, 128), (192, 192, 128)])
def test_line_colours_stand_out_on_both_pages(contrast, colour):
    assert contrast(readable(colour), "rgb(252, 251, 248)") >= 3.0
    assert contrast(readable(colour), "rgb(20, 22, 26)") >= 3.0


# The page.


def test_page_has_its_parts_and_escapes_names(view):
    awkward = changed(view, notes=(NASTY,), scenes=(dataclasses.replace(view.segmentation.scenes[0], name=NASTY),))
    page = page_of(awkward)
    for heading in ("IoU by size of object and by class", "What the network says of each pixel", "Hardest images"):
        assert heading in page
    assert NASTY not in page and "&lt;script&gt;alert" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert set(re.findall(r"url\((\w+:\w+/\w+)", page)) == {"data:image/jpeg"}
    assert "What the model sees" not in page


def test_page_without_scenes_or_candidates(view):
    bare = changed(dataclasses.replace(view, results=view.results[-1:], best=None), scenes=(), hardest=(), shares=())
    page = page_of(bare)
    assert "What the network says" not in page and "Hardest images" not in page
    rows = cells_of(page)
    assert [len(row) for row in rows.values()] == [1] * 12
    assert 'id="classplot"' not in page


def test_page_of_an_unmeasured_original(view):
    unmeasured = dataclasses.replace(view, original=dataclasses.replace(view.original, quality=None), results=(), best=None)
    assert '<table class="classes-table">' not in page_of(unmeasured)


def test_scene_that_is_ignored_altogether(view):
    scene = view.segmentation.scenes[0]
    nothing = tuple(dataclasses.replace(o, miou=None) for o in scene.overlays)
    page = page_of(changed(view, scenes=(Scene("dark", scene.image, np.full_like(scene.truth, IGNORE), nothing),), hardest=()))
    assert page.count("nothing to judge here") == 4


def test_page_of_camvid_stays_small(view, shared_data, tmp_path):
    folder = find_masks(shared_data / "camvid")
    scenes = []
    for pair in folder.pairs["val"][::20][:6]:
        with Image.open(pair.image) as picture:
            image = np.array(picture.convert("RGB"))
        truth = folder.read_mask(pair.mask)
        maps = []
        for factor in (1, 2, 3, 4, 6, 8):
            small = Image.fromarray(truth).resize((480 // factor, 360 // factor), Image.Resampling.NEAREST)
            said = np.array(small.resize((480, 360), Image.Resampling.NEAREST))
            maps.append(Overlay(f"1/{factor}", np.where(said == IGNORE, 0, said).astype(np.uint8), 50.0))
        scenes.append(Scene(pair.name, image, truth, tuple(maps)))
    drawn = [
        draw(scene, dataclasses.replace(view.segmentation, classes=folder.classes, colours=folder.colours)) for scene in scenes
    ]
    for one, scene in zip(drawn, scenes, strict=True):
        assert one.views[0].wrong == 0.0
        assert np.abs(decoded(one.photo, "RGB").astype(int) - scene.image).mean() < 6
    size = sum(
        len(one.photo) + len(one.truth.classes) + sum(len(v.classes) + len(v.errors) for v in one.views) for one in drawn
    )
    assert size < 5e6  # beside plotly's own 5 MB


@pytest.fixture(scope="module")
def address(view, tmp_path_factory):
    return write_report(made(view), tmp_path_factory.mktemp("report") / "report.html").as_uri()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows_and_layers_lie_on_their_picture(open_page, address, width):
    page = open_page(address, width)
    page.wait_for_selector("#classplot .scatterlayer .point")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#classplot .main-svg').getBoundingClientRect().width") <= width
    assert set(page.evaluate("[...document.images].map(i => `${i.naturalWidth} ${i.naturalHeight}`)")) == {"128 96"}
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.stack')].map(s => [s, ...s.querySelectorAll('img')].map(e => {
            const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height].map(Math.round).join() }))"""
    )
    assert len(boxes) == 4 * 6
    assert all(len(set(box)) == 1 for box in boxes)
    width_of, height_of = map(int, boxes[0][0].split(",")[2:])
    assert width_of > 200 and abs(width_of / height_of - 128 / 96) < 0.02


def test_picture_of_classes_switches_and_hovers(open_page, address, view, collisions):
    page = open_page(address)
    points = page.locator("#classplot .scatterlayer .point")
    points.first.wait_for()
    assert points.count() == 4 * 4  # three sizes and mIoU at four resolutions
    page.locator("[name=group][value=classes]").check(force=True)
    assert points.count() == 6 * 4  # five classes that there are and mIoU
    names = page.locator("#classplot .labels text").all_text_contents()
    assert sorted(names) == sorted(["sky", "road", "wall", "pole", NASTY, "mIoU"])
    assert collisions(page, "#classplot") == []
    title = page.locator("#classplot .ytitle")
    page.locator("[name=scale][value=change]").check(force=True)
    assert "points" in title.text_content()
    page.locator("[name=scale][value=iou]").check(force=True)
    assert title.text_content() == "IoU, %"
    page.evaluate("document.getElementById('classplot').scrollIntoView({ block: 'center' })")
    pole = page.evaluate(
        """() => { const p = document.getElementById('classplot'), {xaxis, yaxis} = p._fullLayout;
            const t = p.data.find(t => t.name === 'pole' && t.mode === 'markers'), b = p.getBoundingClientRect();
            return [b.left + xaxis._offset + xaxis.d2p(t.x[0]), b.top + yaxis._offset + yaxis.d2p(t.y[0])] }"""
    )
    page.mouse.move(*pole)
    tip = page.locator("#classplot .hoverlayer .hovertext").first
    tip.wait_for(timeout=5000)
    said = tip.text_content().replace("\u00a0", " ")
    for text in ("12 × 16 px", f"IoU {view.results[2].quality.iou[3]:.1f} %", "25 M MACs"):
        assert text in said


def test_layers_switch_and_the_pointer_reads_classes(open_page, address, view):
    page = open_page(address)

    def opacity(kind: str) -> set[str]:
        return set(page.evaluate(f"[...document.querySelectorAll('.judged .{kind}')].map(e => getComputedStyle(e).opacity)"))

    assert (opacity("classes"), opacity("errors")) == ({"0.6"}, {"0"})
    page.locator("[name=layer][value=alone]").check(force=True)
    assert (opacity("classes"), opacity("errors")) == ({"1"}, {"0"})
    page.locator("[name=layer][value=errors]").check(force=True)
    assert (opacity("classes"), opacity("errors")) == ({"0"}, {"1"})

    scene = view.segmentation.scenes[0]
    tip = page.locator("#tip")
    assert tip.is_hidden()
    stack = page.locator(".scene").first.locator(".judged").last
    stack.scroll_into_view_if_needed()
    box = stack.bounding_box()
    said = scene.overlays[-1].classes
    wrong = np.argwhere((said != scene.truth) & (scene.truth != IGNORE))[0]
    right = np.argwhere(said == scene.truth)[0]
    ignored = np.argwhere(scene.truth == IGNORE)[0]

    def pointed(at: np.ndarray) -> str:
        y, x = (at + 0.5) / scene.truth.shape
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        return tip.text_content()

    assert pointed(wrong) == f"{CLASSES[said[tuple(wrong)]]}, wrong (label: {CLASSES[scene.truth[tuple(wrong)]]})"
    assert pointed(right) == f"{CLASSES[said[tuple(right)]]}, right"
    assert pointed(ignored) == f"{CLASSES[said[tuple(ignored)]]}, not judged"
    page.mouse.move(box["x"], box["y"] + box["height"] + 60)
    assert tip.is_hidden()


def test_numbers_are_readable_in_light_and_dark(open_page, address, contrast):
    for scheme in ("light", "dark"):
        page = open_page(address, scheme=scheme)
        page.wait_for_selector("#classplot .labels text")
        colours = page.evaluate(
            """() => { const flat = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
                const page = getComputedStyle(document.body).backgroundColor;
                return [...document.querySelectorAll('.heat, .heat small')].map(e => {
                    const under = [page, getComputedStyle(e.closest('.heat')).backgroundColor];
                    for (const c of under) { flat.fillStyle = c; flat.fillRect(0, 0, 1, 1) }
                    return [getComputedStyle(e).color, `rgb(${[...flat.getImageData(0, 0, 1, 1).data].slice(0, 3)})`] }) }"""
        )
        assert len(colours) > 50
        assert min(contrast(*pair) for pair in colours) > 4.5
        name = page.evaluate("getComputedStyle(document.querySelector('#classplot .labels text')).fill")
        assert contrast(name, page.evaluate("getComputedStyle(document.body).backgroundColor")) > 4.5
