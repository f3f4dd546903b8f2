"""Families of costs: their numbers by hand formulas, their rows by what was asked for, their picture, the paper's figure 5."""

import itertools
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from plotly.offline import get_plotlyjs
from torch import Tensor, nn

from downres import Candidate, DownresError, costs, load_model, measure_cost, reduce

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {"img_size": 64, "patch_size": 8, "num_classes": 5}


def vit_macs(patches: int, side: int, channels: int, blocks: int, classes: int, prefix: int = 1) -> int:
    """Multiply-accumulates of a ViT with an MLP of four times its channels, by hand."""
    t, d = patches + prefix, channels
    return 3 * side**2 * d * patches + blocks * (12 * t * d**2 + 2 * t**2 * d) + d * classes


def vit_peak(patches: int, channels: int, prefix: int = 1) -> int:
    """Bytes at GELU: first block's input, own input, sum after attention, its norm, hidden tokens before and after."""
    return 4 * (1 + 1 + 1 + 1 + 4 + 4) * (patches + prefix) * channels


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", depth=4, **SMALL)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    return model


@pytest.fixture(scope="module")
def found(vit):
    return costs(
        vit, [32, 48, (64, 32)], stem_scales=[0.5], patch_sizes=[16, 12], merges=[4, "prune4", 0.5], depths=[2, 6, 4],
        widths=[0.67, 1.33], candidates=["48 merge2 depth3", "depth2", "as is", Candidate(40, ragged="floor")],
    )  # fmt: skip


class Remembering(nn.Module):
    """A convnet that keeps what it made for one size until another comes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.same = self.conv  # one layer under two names
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu_()
        if self.grid is None or self.grid.shape != x.shape[-2:]:
            self.grid = torch.ones(x.shape[-2:]).cumsum(0)
        return self.head((x * self.grid).mean((2, 3)))


class BySize(nn.Module):
    """Pads between 50 and 60 px, and goes on once for every 8 px: other operators at other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if 50 < x.shape[-1] < 60:
            x = F.pad(x, (4, 4, 4, 4))
        x = y = self.stem(x)
        for _ in range(x.shape[-1] // 4):
            x = self.again(x).relu_()
        x = F.interpolate(F.adaptive_avg_pool2d(x, 2), size=y.shape[-2:], mode="bilinear") + y
        return self.head(x.mean((2, 3)))


def test_operators_that_depend_on_the_size_are_counted_at_each():
    def macs(side):
        side = (side + 8 * (50 < side < 60)) // 2
        return side**2 * 8 * (27 + side // 4 * 72 + 4) + 8 * 5

    sides = [72, 64, 60, 56, 52, 48, 40, 32]
    assert [row.cost.macs for row in costs(BySize(), sides).rows[1:]] == [macs(side) for side in sides]


@pytest.mark.parametrize("merges", [(), (2, 0.5)])
@pytest.mark.parametrize("kind", ["remembering", "mobilenetv3_small_050", "vit"])
def test_one_hollow_network_counted_at_many_sizes_is_a_fresh_one_at_each(kind, merges, vit):
    if merges and kind != "vit":
        pytest.skip("no tokens to merge")
    model = vit if kind == "vit" else Remembering() if kind == "remembering" else timm.create_model(kind, num_classes=5)
    rows = costs(model, [40, 48, 56, (64, 32), 72, 48], merges=merges).rows
    native = rows[0].candidate.hw
    for row in rows[1:]:
        fresh = reduce(model, row.candidate, input_size=(3, *native), resize_input=False)
        assert row.cost == measure_cost(fresh, (3, *row.candidate.hw)), row.candidate


def test_a_drop_in_that_needs_more_memory_than_the_original_is_told():
    """Three channels in and two out: the original holds its image and its map, a drop-in what the resize holds."""

    class Thin(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pretrained_cfg = nn.Conv2d(3, 2, 3, 1, 1), {"input_size": (3, 64, 80)}

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    for batch in (1, 5):
        rows, notes = (found := costs(Thin(), [48, (16, 20)], batch_size=batch)).rows, found.notes
        assert rows[0].cost.peak_activation_bytes == batch * 4 * 5 * 64 * 80
        whole = [batch * 4 * 3 * (64 * 80 + 64 * w + h * w) for h, w in ((48, 60), (16, 20))]
        for row, peak in zip(rows[1:], whole, strict=True):
            drop_in = reduce(Thin(), row.candidate, input_size=(3, 64, 80))
            assert measure_cost(drop_in, (batch, 3, 64, 80)).peak_activation_bytes == peak
        (note,) = notes
        assert f"48x60 px {whole[0] / 1000:.3g} kB" in note and "16x20" not in note and "resize_input=False" in note
    assert not costs(timm.create_model("resnet10t"), [128]).notes


def test_rows_are_in_their_families(found):
    rows = [(row.family, str(row.candidate)) for row in found.rows]
    assert rows == [
        ("original", "64"),
        ("resolution", "32"),
        ("resolution", "48"),
        ("resolution", "64x32"),
        ("pooling", "64 stem×0.5"),
        ("patch size", "64 patch16"),
        ("patch size", "60 patch12"),
        ("merging", "64 merge4"),
        ("pruning", "64 prune4"),
        ("merging", "64 merge50%"),
        ("depth", "64 depth2"),
        ("depth", "64 depth6"),
        ("depth", "64 depth4"),
        ("width", "64 width×0.67"),
        ("width", "64 width×1.33"),
        ("given", "48 merge2 depth3"),
        ("given", "40 floor"),
    ]
    assert found.notes == ("patches of 12 px look at 60 px, a multiple of them",)


@pytest.mark.parametrize(
    ("candidate", "patches", "side", "channels", "blocks"),
    [
        ("64", 64, 8, 192, 4),
        ("32", 16, 8, 192, 4),
        ("64x32", 32, 8, 192, 4),
        ("40 floor", 25, 8, 192, 4),
        ("64 patch16", 16, 16, 192, 4),
        ("60 patch12", 25, 12, 192, 4),
        ("64 depth2", 64, 8, 192, 2),
        ("64 depth6", 64, 8, 192, 6),
        ("64 width×0.67", 64, 8, 128, 4),
        ("64 width×1.33", 64, 8, 256, 4),
    ],
)
def test_macs_and_peak_by_hand(found, candidate, patches, side, channels, blocks):
    row = next(row for row in found.rows if str(row.candidate) == candidate)
    assert row.cost.macs == vit_macs(patches, side, channels, blocks, 5)
    assert row.cost.peak_activation_bytes == vit_peak(patches, channels)


def test_merging_by_hand(found):
    """Attention on what comes in, the similarity of one half of the patches with the other, the MLP on what is left."""
    patches, channels, macs = 64, 192, 3 * 8 * 8 * 192 * 64 + 192 * 5
    for _ in range(4):
        macs += 4 * (patches + 1) * channels**2 + 2 * (patches + 1) ** 2 * channels
        macs += (patches + 1) // 2 * (patches // 2) * channels // 3  # keys are averaged over the 3 heads
        patches -= 4
        macs += 8 * (patches + 1) * channels**2
    row = next(row for row in found.rows if str(row.candidate) == "64 merge4")
    assert row.cost.macs == macs
    assert row.cost.params == found.original.params


def test_every_row_is_what_the_reduced_network_costs(vit, found):
    for row in found.rows:
        small = reduce(vit, row.candidate, input_size=(3, 64, 64), resize_input=False)
        assert row.cost == measure_cost(small, (1, 3, *row.candidate.hw)), row


def test_json_has_a_family_in_every_row(found):
    document = json.loads(json.dumps(found.to_json()))
    assert [row["family"] for row in document["costs"]] == [row.family for row in found.rows]
    assert [Candidate.from_json(row) for row in document["costs"]] == [row.candidate for row in found.rows]
    assert [row["macs"] for row in document["costs"]] == [row.cost.macs for row in found.rows]


def test_batches_multiply_what_images_cost(vit):
    one, three = (costs(vit, [32], widths=[0.67], batch_size=n).rows for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert b.cost.macs == 3 * a.cost.macs and b.cost.peak_activation_bytes == 3 * a.cost.peak_activation_bytes
        assert b.cost.params == a.cost.params and b.cost.input_size[0] == 3


def test_nothing_asked_for_is_the_resolutions_from_its_own_down(vit):
    assert {row.family for row in costs(vit).rows} == {"original", "resolution"}
    assert [str(row.candidate) for row in costs(vit, ()).rows] == ["64"]


def test_convnets_have_no_patches_but_a_stem():
    model = load_model("timm:resnet18", pretrained=False)
    found = costs(model, [160, 192], stem_scales=[0.5])
    assert [row.family for row in found.rows] == ["original", "resolution", "resolution", "stem"]
    for row in found.rows:
        small = reduce(model.module, row.candidate, resize_input=False)
        assert row.cost == measure_cost(small, (1, 3, *row.candidate.hw))
    for given in ({"depths": [3]}, {"widths": [0.5]}, {"merges": [8]}, {"patch_sizes": [32]}):
        with pytest.raises(DownresError, match="needs a vision transformer"):
            costs(model, (), **given)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"depths": [0]}, "whole number of blocks above 0"),
        ({"widths": [0.55]}, "give 0.6667"),
        ({"patch_sizes": [72]}, "72"),
        ({"resolutions": [36]}, "not a multiple of 8"),
        ({"resolutions": [4]}, "start at 8 or above"),
        ({"candidates": ["48 merge2 deep6"]}, "deep6"),
        ({"merges": [2.5]}, "between 0 and 1"),
    ],
)
def test_bad_input_gets_its_sentence(vit, given, what):
    with pytest.raises(DownresError, match=re.escape(what)):
        costs(vit, **{"resolutions": (), **given})


class Tied(nn.Module):
    """Shares one matrix twice, and looks at its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("gate", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        for _ in range(3 if self.gate.item() > 0 else 1):
            x = self.second(self.first(x))
        return x


def test_what_the_weights_decide_is_decided_by_the_weights():
    found = costs(Tied(), [128], stem_scales=[0.5])
    for row, side in zip(found.rows, (224, 128, 224), strict=True):
        assert row.cost.params == 3 * 16 * 8 + 8 + 64 + 8 + 8
        resized = 0 if row.family != "stem" else row.cost.macs - found.original.macs
        assert row.cost.macs == 3 * 16 * 8 * (side // 4) ** 2 + 6 * 64 + resized
    assert found.rows[2].cost.macs > found.original.macs  # the resize of the 8 channels is counted


def test_the_users_model_is_left_alone(vit):
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in vit.state_dict(keep_vars=True).items()}
    costs(vit, [32], depths=[2], widths=[0.67], patch_sizes=[16], merges=[2])
    assert {name: (t.data_ptr(), t._version) for name, t in vit.state_dict(keep_vars=True).items()} == before
    assert not hasattr(vit, "downres")


# The picture.


def traces(page: str) -> dict[str, dict[str, dict]]:
    """Panel → family → trace, as the page holds them."""
    figures = json.loads(re.search(r"\bconst figures = (.*);$", page, re.M)[1])
    return {key: {trace["name"]: trace for trace in figure["data"]} for key, figure in figures.items()}


def test_picture_shows_the_numbers_of_the_rows(found, tmp_path):
    file = found.write_picture(tmp_path / "new" / "families.html")
    page = file.read_text()
    rest = page.replace(get_plotlyjs(), "")
    assert not re.search(r"(src|href)=\"?(?!data:)[a-z]*:?//|https?://", rest)
    drawn = traces(rest)
    assert set(drawn) == {"activations", "parameters"}
    for key, bytes_of in (("activations", "peak_activation_bytes"), ("parameters", "param_bytes")):
        assert set(drawn[key]) == {row.family for row in found.rows}
        for family, trace in drawn[key].items():
            rows = [row for row in found.rows if row.family == family]
            rows += [found.rows[0]] * (family not in ("original", "given"))
            assert sorted(zip(trace["x"], trace["y"], strict=True)) == sorted(
                (row.cost.macs, getattr(row.cost, bytes_of)) for row in rows
            )
            assert trace["x"] == sorted(trace["x"])
    star = drawn["activations"]["original"]
    assert star["marker"]["symbol"] == "star" and "the original" in star["hovertext"][0]
    depth = drawn["activations"]["depth"]
    share = f"{100 * vit_macs(64, 8, 192, 6, 5) / found.original.macs:.3g} % of the original"
    assert any("6 blocks" in text and share in text for text in depth["hovertext"])
    for row in found.rows:
        assert f"<td>{row.family}</td>" in rest


def test_parameters_are_drawn_only_where_they_change(vit, tmp_path):
    page = costs(vit, [32], merges=[4]).write_picture(tmp_path / "families.html").read_text()
    assert set(traces(page)) == {"activations"}


@pytest.mark.parametrize("width", [360, 1280])
def test_picture_in_a_browser(found, tmp_path, browser, width):
    file, troubles = found.write_picture(tmp_path / "families.html"), []
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: troubles.append(str(e)))
    page.goto(file.as_uri())
    page.wait_for_selector("#parameters .scatterlayer .point")
    assert page.locator("#activations .legendtext").all_text_contents()[-1] == "original"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    star = page.locator("#activations .scatterlayer .point").last
    star.scroll_into_view_if_needed()
    star.hover(force=True)
    page.locator("#activations .hoverlayer .hovertext").wait_for(timeout=5000)
    context.close()
    assert troubles == []


# The paper's figure 5, as it is in the repository.


@pytest.fixture(scope="module")
def figure5() -> dict:
    return json.loads((RECIPES / "results" / "figure5.json").read_text())


def test_figure5_holds_exactly_by_hand(figure5):
    assert [row["resolution"] for row in figure5["costs"] if row["family"] == "resolution"] == [128, 176, 192, 208, 240]
    assert {row["family"] for row in figure5["costs"]} == {"original", "resolution", "depth", "width"}
    for row in figure5["costs"]:
        patches, channels = (row["resolution"] // 16) ** 2, 64 * round(6 * row["width"])
        assert row["macs"] == vit_macs(patches, 16, channels, row["depth"] or 12, 1000)
        assert row["peak_activation_bytes"] == vit_peak(patches, channels)


def test_figure5_compares_at_equal_macs(figure5):
    first, at = figure5["costs"][0], {one["tokens"]: one for one in figure5["at_equal_macs"]}
    assert list(at) == [64, 121, 144, 169, 225]
    per_block = vit_macs(196, 16, 384, 1, 0) - vit_macs(196, 16, 384, 0, 0)
    for tokens, one in at.items():
        assert one["macs"] == vit_macs(tokens, 16, 384, 12, 1000)
        assert one["depth"]["peak_activation_bytes"] == first["peak_activation_bytes"]
        blocks = (one["macs"] - vit_macs(196, 16, 384, 0, 1000)) / per_block
        assert one["depth"]["scale"] == pytest.approx(blocks, abs=1e-3)
        # MACs grow faster than the width, so the true curve lies above the line between two widths, by a little.
        exact = next(d for d in itertools.count(64) if vit_macs(196, 16, d, 12, 1000) >= one["macs"])
        assert 0 <= vit_peak(196, exact) - one["width"]["peak_activation_bytes"] < 0.04 * first["peak_activation_bytes"]
        saves = one["sequence"]["peak_activation_bytes"] < one["width"]["peak_activation_bytes"]
        assert saves == (tokens < 196)


def test_figure5_says_what_was_counted(figure5):
    text = (RECIPES / "figure5.md").read_text()
    for row in figure5["costs"]:
        counts, peak = f"{row['macs'] / 1e9:.3f} | {2 * row['macs'] / 1e9:.3f}", row["peak_activation_bytes"]
        assert f"| {counts} | {peak / 1e6:.2f} MB |" in text
    for one in figure5["at_equal_macs"]:
        peaks = [one[how]["peak_activation_bytes"] for how in ("sequence", "width", "depth")]
        saved = [100 * (1 - peaks[0] / peak) for peak in peaks[1:]]
        words = " | ".join(f"{percent:.0f} %".replace("-", "−") for percent in saved)
        assert re.search(rf"^\| {one['tokens']} \| .*\| {words} \|$", text, re.M)


# --- segmentation networks: the answer at full size counts ---


class Quarter(nn.Module):
    """Two classes at a quarter of the input: 3×3 convolutions of stride 2 from 3 to 4 and from 4 to 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 2, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)}


def quarter_macs(side: int) -> int:
    return side**2 // 4 * 4 * 27 + side**2 // 16 * 2 * 36


def test_upsampling_and_full_size_logits_by_hand():
    found = costs(Quarter(), [112], stem_scales=[0.5], label_size=448)
    logits = 2 * 448**2
    original, half, stem = (row.cost for row in found.rows)
    assert original.macs == quarter_macs(224) + 4 * logits
    assert original.peak_activation_bytes == 4 * (logits + 2 * 56**2)
    assert half.macs == quarter_macs(112) + 4 * logits and half.peak_activation_bytes == 4 * (logits + 2 * 28**2)
    assert stem.peak_activation_bytes == 4 * (logits + 2 * 28**2)
    own = costs(Quarter(), [112])  # without a size that of its input
    assert own.original.macs == quarter_macs(224) + 4 * 2 * 224**2
    assert own.rows[1].cost.macs == quarter_macs(112) + 4 * 2 * 224**2  # the same labels
    bicubic = costs(Quarter(), [112], label_size=448, upsampling="bicubic")
    assert bicubic.original.macs == quarter_macs(224) + 16 * logits


def test_batches_multiply_the_upsampling():
    one, four = (costs(Quarter(), [112], label_size=448, batch_size=n).rows[1].cost for n in (1, 4))
    assert four.macs == 4 * one.macs and four.peak_activation_bytes == 4 * one.peak_activation_bytes


def test_class_maps_never_hold_all_logits():
    class Many(Quarter):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).repeat(1, 10, 1, 1)

    logits, maps = (costs(Many(), [112], label_size=448, output=output).rows[1].cost for output in ("logits", "classes"))
    assert logits.macs == maps.macs
    assert logits.peak_activation_bytes == 4 * (20 * 448**2 + 20 * 28**2)
    # Two float maps, an index and what compares them: about as much as four classes instead of twenty.
    assert 2 * 4 * 448**2 < maps.peak_activation_bytes < 5 * 4 * 448**2


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"label_size": 32}, "32x32 is below the 56x56"),
        ({"output": "colours"}, "logits or classes"),
        ({"upsampling": "nearest"}, "bilinear or bicubic"),
    ],
)
def test_bad_answers_get_their_sentence(given, what):
    with pytest.raises(DownresError, match=what):
        costs(Quarter(), [112], **given)


def test_a_classifier_has_no_label_size(vit):
    with pytest.raises(DownresError, match="this one is none: leave `label_size` out"):
        costs(vit, [32], label_size=64)
