"""Which candidates are tried: snapping and its notes, defaults, what is refused."""

import pytest

from downres.axes import Axes, default_axes
from downres.errors import DownresError
from downres.records import Candidate, Merge
from downres.searching.plan import plan
from downres.techniques import Design
from downres.techniques.resolution import default_resolutions, snap
from downres.techniques.stem import SCALES as STEM_SCALES
from downres.techniques.tokens import KEPT


@pytest.mark.parametrize(
    ("given", "stride", "snapped"),
    [
        (128, 32, 128), (100, 32, 96), (120, 32, 128), (33, 32, 32), (224, 16, 224), ((100, 250), 32, (96, 256)), (7, 1, 7),
        (176, 32, 192), (208, 32, 224), (240, 32, 256), (175, 32, 160), (5, 3, 6), ((64, 70), 32, (64, 64)),
    ],
)  # fmt: skip
def test_snapping_goes_to_the_nearest_multiple_and_of_two_to_the_larger(given, stride, snapped):
    assert snap(given, stride) == snapped


@pytest.mark.parametrize("given", [31, 7, (16, 224), (224, 16)])
def test_below_the_stride_nothing_would_be_left(given):
    with pytest.raises(DownresError, match="below the network's total stride of 32"):
        snap(given, 32)
    for snapped in (True, False):
        with pytest.raises(DownresError, match="start at 32 or above"):
            plan(Design(224, 32), Axes(tuple([128, given]), snap=snapped))


def test_what_is_named_is_tried_as_it_is_named():
    """176, 208 and 240 lie halfway between two multiples of 32; the ragged ones are told, once."""
    named = [176, 208, 240, 100, 128, (96, 130)]
    candidates, notes = plan(Design(256, 32), Axes(tuple(named), candidates=["97 stem×0.5", "64", "176 stem×0.5"]))
    assert [str(c) for c in candidates] == [
        "176", "208", "240", "100", "128", "96x130", "97 stem×0.5", "64", "176 stem×0.5",
    ]  # fmt: skip
    assert notes == [
        "not multiples of the network's stride 32, so its feature maps have ragged edges: 176, 208, 240, 100, 96x130, 97"
    ]
    assert plan(Design(224, 32), Axes(tuple([96, 128])))[1] == []


def test_only_who_asks_for_it_has_them_snapped_and_every_one_is_noted():
    candidates, notes = plan(Design(224, 32), Axes(tuple([100, 128, 200, 208]), snap=True))
    assert candidates == [Candidate(96), Candidate(128), Candidate(192)]  # 208 is the original's 224
    assert "100 px snapped to 96" in notes[0] and "200 px snapped to 192" in notes[1] and "208 px snapped to 224" in notes[2]
    candidates, notes = plan(Design(224, 32), Axes(tuple([97, 96, 100]), snap=True))
    assert candidates == [Candidate(96)] and len(notes) == 2


def test_a_side_that_only_follows_goes_to_the_stride_where_the_one_named_is_on_it():
    """Of 360x480, 320 would be 320x426.7, which a network in steps of 32 cannot take; of 180 nothing is on the stride."""
    candidates, notes = plan(Design((360, 480), 32), Axes((320, 180, (180, 200))))
    assert [c.hw for c in candidates] == [(320, 416), (180, 240), (180, 200)]
    assert len(notes) == 1 and notes[0].endswith(": 180x240, 180x200")
    assert plan(Design((320, 427), 32), Axes((320,))) == ([], [])  # the original itself


def test_a_pair_is_height_and_width_and_what_means_the_same_is_tried_once():
    """One number is the short side, a square pair a square; of a network used on squares they are the same."""
    same = Axes((160, (160, 160)), candidates=["160x160", Candidate((160, 160)), "160", "160x160 stem×0.5", "160 stem×0.5"])
    assert [str(c) for c in plan(Design(224, 32), same)[0]] == ["160", "160 stem×0.5"]
    lines = Design((32, 128), 16)
    axes = Axes((64, (64, 64), (64, 256)), candidates=["64x64", "64x256 stem×0.5", "64 stem×0.5"])
    assert [str(c) for c in plan(lines, axes)[0]] == ["64x256", "64x64", "64x256 stem×0.5"]
    assert plan(Design(224, 32), Axes(((224, 224),)))[0] == []  # the original itself


def test_the_original_is_left_alone_even_off_the_stride():
    candidates, notes = plan(Design(300, 32), Axes(tuple([300, 128])))
    assert candidates == [Candidate(128)] and notes == []  # it is measured as the original anyway


@pytest.mark.parametrize(
    ("native", "stride", "expected"),
    [
        (300, 32, [256, 224, 192, 160, 128, 96, 64]),
        (224, 32, [192, 160, 128, 96, 64]),
        (224, 16, [176, 144, 112, 80, 48]),  # ten would be too many: every second
        (48, 4, [32, 16]),
        ((224, 448), 32, [(192, 384), (160, 320), (128, 256), (96, 192), (64, 128)]),
    ],
)
def test_default_resolutions(native, stride, expected):
    assert default_resolutions(native, stride) == expected


@pytest.mark.parametrize("native", [64, 96, 224, 299, 300, 384, 518, 1024, (480, 640), (640, 480)])
@pytest.mark.parametrize("stride", [4, 8, 14, 16, 32])
def test_defaults_are_at_most_eight_smaller_multiples(native, stride):
    found = default_resolutions(native, stride)
    assert len(found) <= 8 and len(set(found)) == len(found)
    sides = native if isinstance(native, tuple) else (native, native)
    for resolution in found:
        h, w = resolution if isinstance(resolution, tuple) else (resolution, resolution)
        assert h % stride == 0 and w % stride == 0 and h < sides[0] and w < sides[1]
        assert abs(h / w - sides[0] / sides[1]) < stride / min(h, w)


def test_stem_variants_come_last_at_the_native_resolution():
    candidates, _ = plan(Design(224, 32), Axes((128,), STEM_SCALES))
    assert candidates == [Candidate(128), Candidate(224, 0.75), Candidate(224, 0.5)]
    assert plan(Design(224, 32), Axes((), (1.0,)))[0] == []  # a factor of 1 changes nothing: it is the original


VIT = Design(224, 16, patch=16, sequence=True)


def test_a_transformer_is_tried_along_every_axis_by_default():
    axes = default_axes(VIT, Axes())
    candidates, notes = plan(VIT, axes)
    texts = [str(c) for c in candidates]
    # 1.25, 1.5 and 2 times 16 px; patches look at the multiple of them that is nearest to 224 px
    assert [t for t in texts if "patch" in t] == ["220 patch20", "216 patch24", "224 patch32"]
    assert [t for t in texts if "merge" in t] == ["224 merge75%", "224 merge50%", "224 merge25%"]
    assert [t for t in texts if "stem" in t] == ["224 stem×0.75", "224 stem×0.5"]
    assert texts[:5] == [str(r) for r in default_resolutions(224, 16)]
    assert len(notes) == 2 and "patches of 20 px look at 220 px" in notes[0] and "216" in notes[1]
    assert all(c.resolution is not None for c in candidates)


def test_a_convnet_has_neither_patches_nor_tokens_by_default():
    axes = default_axes(Design(224, 32), Axes())
    assert axes.patch_sizes == () and axes.merges == () and axes.stem_scales == STEM_SCALES


def test_what_the_caller_chose_is_kept_and_an_empty_axis_left_out():
    axes = default_axes(VIT, Axes([128], (), [28], [8, 0.5, "4-decreasing"]))
    candidates, _ = plan(VIT, axes)
    assert [str(c) for c in candidates] == ["128", "224 patch28", "224 merge8", "224 merge50%", "224 merge4-decreasing"]
    assert default_axes(VIT, Axes(merges=())).merges == () and len(KEPT) == len(default_axes(VIT, Axes()).merges)


def test_candidates_given_whole_are_taken_as_they_are():
    axes = Axes((), (), (), (), ["168 merge4", Candidate(merge=Merge(keep=0.5)), "100"])  # patches refuse 168 and 100 later
    candidates, notes = plan(VIT, axes)
    assert [str(c) for c in candidates] == ["168 merge4", "224 merge50%", "100"] and notes == []


def test_ragged_goes_to_those_that_need_it_only():
    axes = Axes([96, 100], (), [20, 28], (), ragged="pad")
    candidates, _ = plan(VIT, axes)
    assert [str(c) for c in candidates] == ["96", "100 pad", "224 pad patch20", "224 patch28"]


@pytest.mark.parametrize("wrong", [{"stem_scales": (2.0,)}, {"patch_sizes": (0,)}, {"merges": ("8x",)}, {"candidates": ("x",)}])
def test_bad_axes_are_refused_before_anything_is_opened(wrong):
    with pytest.raises(DownresError):
        Axes(**wrong)


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(DownresError, match="A patch of 90 px is larger than the image of 48 px: give a smaller patch"):
        plan(Design(48, 8, patch=8, sequence=True), Axes((), (), [90], ()))


def test_who_says_how_to_treat_ragged_sizes_gets_them():
    axes = Axes([100], (), [24], (), ragged="pad", snap=True)  # which would leave nothing to pad
    candidates, _ = plan(VIT, axes)
    assert [str(c) for c in candidates] == ["100 pad", "224 pad patch24"]
    with pytest.raises(DownresError, match="'sideways' is none of them"):
        Axes([96], ragged="sideways")


def test_ragged_is_what_the_network_divides_by_not_its_total_stride():
    swin = Design(224, 32, patch=4, unit=(4, 4))
    candidates, _ = plan(swin, Axes([208, 210], (), (), (), ragged="floor"))
    assert [str(c) for c in candidates] == ["208", "210 floor"]


def test_the_short_side_counts_in_axes_and_in_candidates():
    axes = Axes([240, (90, 480)], candidates=["180", "360 stem×0.5"])
    candidates, notes = plan(Design((360, 480), 16), axes)
    assert [c.hw for c in candidates] == [(240, 320), (90, 480), (180, 240), (360, 480)]
    assert candidates[-1].stem_scale == 0.5 and len(notes) == 1 and "90x480, 180x240" in notes[0]
