"""Records to JSON and back, text forms, and what they refuse."""

import contextlib
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from downres import records
from downres.errors import DownresError
from downres.records import (
    Budget,
    Candidate,
    Change,
    Cost,
    Dense,
    Drop,
    Flips,
    Footprint,
    Latency,
    Merge,
    Preprocessing,
    Record,
    Recovery,
    Result,
    Rung,
    Score,
    TrainingCost,
)
from downres.tasks.classification.quality import Quality
from downres.tasks.classification.task import Classification
from downres.tasks.segmentation.quality import SegmentationQuality
from downres.tasks.segmentation.task import Segmentation

DROP = Drop(0.5, -0.25, 1.25, 2.0, records.WITHIN, 400, 12, 10, 0.95, 3, None)
MASKS = SegmentationQuality(
    60.5, 57.25, 63.0, 88.5, 101, (91.0, 30.0, None), 41.5, (51.0, 32.0, None), {"small": 20.5, "large": None}, {"small": 7}
)
EXAMPLES = [
    Candidate(),
    Candidate(128),
    Candidate((192, 384), 0.5, "layer1"),
    Candidate(220, 1.0, None, 20, Merge(keep=0.5, schedule="decreasing"), "pad", 8, 0.5),
    Merge(8),
    Merge(keep=0.25, by="prune"),
    Budget(),
    Budget(2.5, 0.9, 10**9, 2 * 10**7, 12.5),
    Candidate(128, precision="int8", runtime="openvino"),
    Footprint(5_200_211, 61_000_000, 47_000_000),
    Flips(12, 7, 4, 400, 4.9, 5.0, records.WITHIN),
    Change("input resize", "", "short side 96 px"),
    Cost(4_089_184_256, 25_557_032, 102_228_128, 10_400_000, (1, 3, 224, 224), {"aten.foo": 3}),
    Latency(12.5, 12.0, 13.25, 30, 1, "onnxruntime", 2, "a processor", {"torch": "2.13"}),
    Quality(352, 400, 88.0, 84.4, 90.8, 390, 97.5),
    Quality(3, 4, 75.0, 30.0, 95.0),
    DROP,
    MASKS,
    SegmentationQuality(60.5, 0.0, 100.0, 88.5, 3, (91.0, 30.0)),
    Drop(0.5, -0.25, 1.25, 2.0, records.TOO_FEW, 101, more_images=50),
    Dense((360, 480)),
    Dense((1024, 2048), "classes", "bicubic", True),
    Preprocessing((360, 480), fit="stretch"),
    Preprocessing((192, 384), fit="pad"),
    Preprocessing(96, mean=(103.5, 116.0, 123.7), std=(1.0,) * 3, channel_order="bgr", scale=1.0, antialias=False),
    Result(Candidate((240, 320)), "measured", naive=MASKS, quality=MASKS, drop=DROP),
    Preprocessing(224, 0.875),
    TrainingCost(9, 8, 4, 4, 8, "adamw", (2, 3, 8, 8), {"aten.add": 3}),
    Preprocessing((192, 384), 1.0, "bicubic", (0.5,), (0.25,), "given"),
    Rung("head", 83.5, 120, 2.5, 500, "logistic regression, C=0.01"),
    Recovery("head", 0.875, 3.5, (Rung("none", 60.0, 120, 0.5), Rung("head", 83.5, 120, 2.5)), DROP),
    Result(Candidate(64), "stopped", "over max_macs"),
    Result(
        Candidate((192, 384), 0.5),
        "measured",
        "",
        Cost(1, 2, 3, 4, (1, 3, 8, 8)),
        Latency(1.0, 0.5, 1.5, 10, 1, "torch", 1, "cpu"),
        Quality(1, 2, 50.0, 9.5, 90.5),
        Quality(2, 2, 100.0, 34.2, 100.0),
        DROP,
        Recovery("crop", 1.0, 0.5, (Rung("crop", None, 0, 0.0),)),
    ),
]


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda r: type(r).__name__)
def test_json_round_trip(record):
    values = json.loads(json.dumps(record.to_json(), allow_nan=False))
    back = type(record).from_json(values)
    assert back == record and type(back) is type(record)
    for field in dataclasses.fields(record):
        assert type(getattr(back, field.name)) is type(getattr(record, field.name)), field.name
    assert back.to_json() == values
    # A later version may add fields; what this one does not know is left out.
    assert type(record).from_json({**values, "of a later version": 1}) == record


def test_every_record_has_an_example():
    kinds = {v for v in vars(records).values() if isinstance(v, type) and issubclass(v, Record)} - {Record, Score}
    assert kinds | {Quality, SegmentationQuality} == {type(example) for example in EXAMPLES}


def test_nested_records_come_back_as_records():
    result = Result.from_json(json.loads(json.dumps(EXAMPLES[-1].to_json())))
    assert result.candidate.resolution == (192, 384)
    assert isinstance(result.recovery.tried, tuple) and isinstance(result.recovery.tried[0], Rung)
    assert result.cost.input_size == (1, 3, 8, 8)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXAMPLES[0].resolution = 3


def test_row():
    row = EXAMPLES[-1].row()
    assert json.loads(json.dumps(row)) == row
    assert (row["candidate"], row["resolution"], row["stem_scale"]) == ("192x384 stem×0.5", [192, 384], 0.5)
    assert (row["macs"], row["naive_top1"], row["top1"], row["drop_upper"], row["rung"]) == (1, 50.0, 100.0, 1.25, "crop")
    stopped = EXAMPLES[-2].row(Quality)
    assert stopped["macs"] is None and stopped["top1"] is None and stopped["reason"] == "over max_macs"
    assert stopped.keys() == row.keys()


def test_row_of_masks():
    result = next(e for e in EXAMPLES if isinstance(e, Result) and isinstance(e.quality, SegmentationQuality))
    row = result.row()
    assert json.loads(json.dumps(row)) == row
    assert (row["naive_miou"], row["miou"], row["miou_low"], row["n"]) == (60.5, 60.5, 57.25, 101)
    assert row["iou"] == [91.0, 30.0, None] and row["object_iou"] == {"small": 20.5, "large": None}
    assert not row.keys() & {"top1", "naive_top1", "correct", "lost", "won"}


def test_qualities_speak_of_their_metric():
    assert (MASKS.metric, MASKS.score, MASKS.interval) == ("mIoU", 60.5, (57.25, 63.0))
    quality = Quality(352, 400, 88.0, 84.4, 90.8)
    assert (quality.metric, quality.score, quality.interval) == ("top-1", 88.0, (84.4, 90.8))


def test_either_quality_comes_back_from_json():
    for quality in (MASKS, Quality(352, 400, 88.0, 84.4, 90.8)):
        result = Result(Candidate(64), "measured", quality=quality, naive=quality)
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_dense():
    assert Dense([360, 480]).size == (360, 480) and Dense(96).size == (96, 96)  # always height and width
    with pytest.raises(DownresError, match="logits or classes, 'colours' is neither"):
        Dense((4, 4), "colours")
    with pytest.raises(DownresError, match="bilinear or bicubic interpolation, 'nearest' is neither"):
        Dense((4, 4), interpolation="nearest")
    with pytest.raises(DownresError, match="between 1 and"):
        Dense((0, 4))


def test_candidate_text_round_trip():
    resolutions = [None, 1, 128, 8192, (192, 384), (384, 192)]
    scales = [1.0, 0.5, 0.75, 1 / 3, 2 / 3, 0.1 + 0.2, 1e-05, 0.9999999]
    stems = [None, "conv1", "layer1.0.conv2", "features.0.0"]
    texts = {}
    for candidate in itertools.starmap(Candidate, itertools.product(resolutions, scales, stems)):
        assert Candidate.parse(str(candidate)) == candidate
        assert texts.setdefault(str(candidate), candidate) == candidate  # one text, one candidate
    rng = np.random.default_rng(0)
    for _ in range(300):
        candidate = Candidate(tuple(rng.integers(1, 8193, 2)), float(rng.random()) or 0.5)
        assert Candidate.parse(str(candidate)) == candidate


def test_candidate_text():
    assert str(Candidate(128)) == "128"
    assert str(Candidate((192, 384))) == "192x384"
    assert str(Candidate((160, 160))) == "160x160" and Candidate.parse("160x160") == Candidate((160, 160)) != Candidate(160)
    assert Candidate((160, 160)).to_json()["resolution"] == [160, 160]
    assert Candidate.from_json(Candidate((160, 160)).to_json()) == Candidate((160, 160))
    assert str(Candidate(300, 0.5)) == "300 stem×0.5"
    assert str(Candidate(None, 0.5, "layer1")) == "as is stem×0.5@layer1"
    assert str(Candidate()) == "as is"
    assert Candidate.parse("300 stem*0.5@layer1") == Candidate(300, 0.5, "layer1")
    assert Candidate.parse(" 128 ") == Candidate(128)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "big",
        "128x",
        "x128",
        "1x2x3",
        "128 stem",
        "128 stem×",
        "128 stem×half",
        "128 stem×1.2.3",
        "128 stem×.",
        "-5",
        "12.5",
    ],
)
def test_candidate_text_that_cannot_be_read(text):
    with pytest.raises(DownresError, match="Cannot read the candidate .*: give for example '128', '192x384'"):
        Candidate.parse(text)


def test_candidate():
    assert Candidate(128).hw == (128, 128) and Candidate((192, 384)).hw == (192, 384) and Candidate().hw is None
    assert Candidate(np.int64(128)) == Candidate(128) and type(Candidate(np.int64(128)).resolution) is int
    assert Candidate([192, 384]) == Candidate((192, 384)) and hash(Candidate([192, 384])) == hash(Candidate((192, 384)))
    assert Candidate(128, 1.0, "conv1") == Candidate(128)  # nothing is resampled there
    for wrong in (0, -3, 9000, (96, 0)):
        with pytest.raises(DownresError, match="between 1 and 8192 pixels"):
            Candidate(wrong)
    for wrong in (96.5, "96", (1, 2, 3)):
        with pytest.raises(DownresError, match="is neither: give 160 or"):
            Candidate(wrong)
    for wrong in (0.0, -0.5, 1.01, math.nan, math.inf):
        with pytest.raises(DownresError, match="above 0 and at most 1, .* is not: give for example 0.5"):
            Candidate(128, wrong)
    with pytest.raises(DownresError, match="at most 1, 7.0 is not"):
        Candidate.parse("128 stem×7")
    with pytest.raises(DownresError, match="9999 is not"):
        Candidate.parse("9999")


def test_budget():
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(DownresError, match="is a number from 0 on"):
            Budget(wrong)
    for task in (Classification(None, 10), Segmentation(None, 10, Dense(4))):
        with pytest.raises(DownresError, match="percentage points from 0 to below 100"):
            task.check_budget(Budget(100.0))
    for wrong in (0.5, 1.0, 95, math.nan):
        with pytest.raises(DownresError, match="between 0.5 and 1, .* is not: 0.95 is usual"):
            Budget(confidence=wrong)
    for name in ("max_macs", "max_memory_bytes", "max_latency_ms"):
        with pytest.raises(DownresError, match=f"{name} must be above 0 and finite, 0 is not"):
            Budget(**{name: 0})
    assert Budget(0.0).max_drop == 0.0


def test_preprocessing():
    p = Preprocessing((96, 96))
    assert p.resolution == 96 and p.hw == (96, 96)
    assert p.at(128) == Preprocessing(128) and p.at((64, 128), 0.5) == Preprocessing((64, 128), 0.5)
    assert p.at() == p
    with pytest.raises(DownresError, match="bilinear or bicubic, 'nearest' is neither"):
        Preprocessing(96, interpolation="nearest")
    for wrong in (0.0, 1e-320, 0.001, 0.099, 1.1, math.inf, math.nan):
        with pytest.raises(DownresError, match="from 0.1 to 1, .* is not: give for example 0.875"):
            Preprocessing(96, wrong)
    for mean, std in (((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((), ())):
        with pytest.raises(DownresError, match="one value a channel"):
            Preprocessing(96, mean=mean, std=std)
    with pytest.raises(DownresError, match="crop, stretch, pad; 'squeeze' is none"):
        Preprocessing(96, fit="squeeze")
    with pytest.raises(DownresError, match="rgb or bgr, 'gbr' is neither"):
        Preprocessing(96, channel_order="gbr")
    with pytest.raises(DownresError, match="bgr is an order of three channels, mean and std are of 1"):
        Preprocessing(96, mean=(0.5,), std=(0.5,), channel_order="bgr")
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DownresError, match="multiplied by a number above 0, .* is not: give 1/255 or"):
            Preprocessing(96, scale=scale)
    with pytest.raises(DownresError, match="antialias is True or False, 'no' is neither"):
        Preprocessing(96, antialias="no")
    with pytest.raises(DownresError, match="A mean of 123.7 is above every pixel, which are 0 to 1 with this `scale`"):
        Preprocessing(96, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    assert Preprocessing(96).fit == "crop" and Preprocessing(96, fit="pad").at(48).fit == "pad"


def test_change():
    assert str(Change("input resize", "", "96 px")) == "input resize at the input: 96 px"
    assert str(Change("activation resample", "conv1", "×0.5")) == "activation resample at conv1: ×0.5"


@pytest.mark.parametrize("keep", [0.5, 0.333, 1 / 3, 1e-6, 0.07, 0.123456789, 1 - 1e-9])
@pytest.mark.parametrize("width", [1.0, 0.67, 1 / 3, 1e-5])
def test_any_candidate_reads_back_from_its_text(keep, width):
    candidate = Candidate(220, 0.7, "blocks.3", 20, Merge(keep=keep, by="prune"), "floor", 8, width)
    assert Candidate.parse(str(candidate)) == candidate


def test_numbers_of_other_kinds_are_numbers():
    assert Candidate(merge=np.int64(8)) == Candidate(merge=8) and type(Candidate(merge=np.int64(8)).merge.r) is int
    assert Candidate(merge=np.float32(0.5)).merge.keep == 0.5 and type(Candidate(patch_size=np.int32(20)).patch_size) is int
    for wrong in ({"depth": True}, {"patch_size": True}, {"merge": True}, {"merge": 2.5}, {"merge": [1]}, {"merge": "8.5"}):
        with pytest.raises(DownresError):
            Candidate(**wrong)


def test_infinite_bounds_are_null_with_a_reason_and_come_back():
    drop = Drop(0.5, -math.inf, math.inf, 2.0, records.TOO_FEW, 7, more_images=3)
    text = json.dumps(drop.to_json(), allow_nan=False)
    values = json.loads(text)
    assert values["lower"] is None and values["upper"] is None
    assert values["unbounded"] == "7 images are too few for a bound at this confidence"
    assert Drop.from_json(values) == drop
    row = Result(Candidate(64), "measured", drop=drop).row()
    assert row["unbounded"] == values["unbounded"] and Result(Candidate(64), "measured", drop=DROP).row()["unbounded"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_infinite(value):
    for wrong in (
        lambda: Budget(max_latency_ms=value), lambda: Budget(max_macs=value), lambda: Budget(max_memory_bytes=value),
        lambda: Budget(max_drop=value), lambda: Budget(confidence=value), lambda: Preprocessing(64, crop_ratio=value),
        lambda: Preprocessing(64, mean=(value, 0.5, 0.5)), lambda: Preprocessing(64, std=(0.5, value, 0.5)),
        lambda: Candidate(64, value), lambda: Candidate(width=value), lambda: Merge(keep=value), lambda: Merge(value),
    ):  # fmt: skip
        with pytest.raises(DownresError):
            wrong()


MISFITS = [
    ({"macs": "x"}, "macs must be a whole number, 'x' is not"),
    ({"macs": 1.5}, "macs must be a whole number, 1.5 is not"),
    ({"macs": True}, "macs must be a whole number, True is not"),
    ({"macs": None}, "macs must be a whole number, None is not"),
    ({"input_size": 3}, "input_size must be a list, 3 is not"),
    ({"input_size": [1, "a"]}, "input_size.1 must be a whole number"),
    ({"uncounted": [1]}, "uncounted must be an object with names, a list of 1 is not"),
    ({"uncounted": {"a": "b"}}, "uncounted.a must be a whole number"),
]


@pytest.mark.parametrize(("change", "words"), MISFITS)
def test_fields_of_other_types_are_refused_by_name(change, words):
    values = Cost(1, 2, 3, 4, (1, 3, 8, 8)).to_json()
    with pytest.raises(DownresError, match=words):
        Cost.from_json({**values, **change})
    with pytest.raises(DownresError, match=f"cost.{words}"):
        Result.from_json({**Result(Candidate(64), "measured").to_json(), "cost": {**values, **change}})


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda r: type(r).__name__)
def test_any_field_of_any_kind_is_read_or_refused_in_a_sentence(record):
    """Whatever stands in a file: a record or a DownresError, nothing else."""
    values = json.loads(json.dumps(record.to_json()))
    for name in values:
        for wrong in (None, "x", "", 3, -1, 1e300, 10**400, True, [], [[]], {}, {"a": 1}, [1, 2, 3], math.nan):
            try:
                type(record).from_json({**values, name: wrong})
            except DownresError:
                continue
        with contextlib.suppress(DownresError):
            type(record).from_json({k: v for k, v in values.items() if k != name})
    for wrong in (None, 3, "x", []):
        with pytest.raises(DownresError):
            type(record).from_json(wrong)
