import numpy as np
import pytest

from downres.errors import DownresError
from downres.parse import (
    as_hw,
    as_resolution,
    check_resolution,
    format_quantity,
    format_resolution,
    like,
    name_of,
    parse_quantity,
    parse_resolutions,
    short_form,
)

GOOD = {
    "96:256:32": [96, 128, 160, 192, 224, 256],
    "96:192": [96, 128, 160, 192],
    "256:96:64": [256, 192, 128],
    "256:96:-64": [256, 192, 128],
    "96:100:32": [96],
    "96,128,160": [96, 128, 160],
    " 96 , 128 ": [96, 128],
    "192x384": [(192, 384)],
    "192×384": [(192, 384)],
    "192 x 384, 96 : 160 : 64": [(192, 384), 96, 160],
    "96x96": [(96, 96)],
    "128,96:160:32,192x384,128x128": [128, 96, 160, (192, 384), (128, 128)],
    "1": [1],
    "8192": [8192],
}


@pytest.mark.parametrize("text", GOOD)
def test_resolutions(text):
    assert parse_resolutions(text) == GOOD[text]


def test_resolutions_back_and_forth():
    for resolution in (1, 96, (96, 96), (192, 384), (384, 192), 8192):
        assert parse_resolutions(name_of(resolution)) == [resolution]
    assert format_resolution((96, 96)) == format_resolution(96) == "96"  # of a size there is no more to say


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Cannot read the resolution ''"),
        ("96,", "Cannot read the resolution ''"),
        ("big", "Cannot read the resolution 'big'"),
        ("96px", "Cannot read the resolution '96px'"),
        ("64 96", "Cannot read the resolution '64 96'"),  # and not 6496
        ("96.5", "Cannot read the resolution '96.5'"),
        ("1:2:3:4", "Cannot read the resolution '1:2:3:4'"),
        ("96x128x3", "Cannot read the resolution '96x128x3'"),
        ("96:256:0", "step of a resolution range must not be 0: '96:256:0'"),
        ("0", "between 1 and 8192 pixels, 0 is not"),
        ("-96", "between 1 and 8192 pixels, -96 is not"),
        ("96x9000", "between 1 and 8192 pixels, 9000 is not"),
        ("96:9000:32", "between 1 and 8192 pixels, 9000 is not"),
        ("0:96:32", "between 1 and 8192 pixels, 0 is not"),
    ],
)
def test_bad_resolutions(text, says):
    with pytest.raises(DownresError, match=says) as caught:
        parse_resolutions(text)
    assert (
        "give for example" in str(caught.value) or "give a range 96:256:32" in str(caught.value) or "Give" in str(caught.value)
    )


def test_as_hw():
    assert as_hw(96) == (96, 96) and as_hw((1, 2)) == (1, 2) and as_hw([3, 4]) == (3, 4)
    assert as_hw(np.int64(96)) == (96, 96) and type(as_hw(np.int64(96))[0]) is int
    assert as_resolution([96, 96]) == (96, 96) and as_resolution((1, 2)) == (1, 2) and as_resolution(np.int64(7)) == 7
    assert check_resolution((160, 160)) == (160, 160) and short_form((160, 160)) == short_form(160) == 160
    for wrong in (96.0, (96.5, 128), "96", (96,), (1, 2, 3), None, ("96", "128")):
        with pytest.raises(DownresError, match=r"whole number of pixels or \(height, width\), .* is neither: give 160"):
            as_hw(wrong)


@pytest.mark.parametrize(
    ("native", "given", "meant"),
    [
        ((360, 480), 240, (240, 320)),
        ((480, 360), 240, (320, 240)),
        ((1024, 2048), 512, (512, 1024)),
        ((360, 480), 100, (100, 133)),
        ((360, 480), (90, 480), (90, 480)),
        ((360, 480), (240, 240), (240, 240)),  # a pair is a pair
        ((32, 128), np.int64(64), (64, 256)),
        (224, 112, 112),
        (224, (112, 224), (112, 224)),
        (224, (112, 112), 112),  # of squares both ways to say it are one
        ((224, 224), [112, 112], 112),
    ],
)
def test_one_number_is_the_short_side_of_what_is_not_square(native, given, meant):
    assert like(native, given) == meant


QUANTITIES = {
    "500M": 500_000_000,
    "4.1G": 4_100_000_000,  # 4.1 * 1e9 is just below it
    "4.1 GMACs": 4_100_000_000,
    "20MB": 20_000_000,
    "20 MB": 20_000_000,
    "20MiB": 20 * 2**20,
    "1.5GiB": 3 * 2**29,
    "2Ti": 2**41,
    "1e9": 10**9,
    "2.5e-1M": 250_000,
    "64k": 64_000,
    "64K": 64_000,
    "64KiB": 65_536,
    "12345": 12_345,
    "7B": 7,
    "3T": 3 * 10**12,
    " 1M ": 10**6,
    12: 12,
    1e6: 10**6,
}


@pytest.mark.parametrize("text", QUANTITIES)
def test_quantities(text):
    value = parse_quantity(text, "max_macs")
    assert value == QUANTITIES[text] and type(value) is int


@pytest.mark.parametrize(
    "text", ["", "M", "lots", "1.2.3M", ".", "-5M", "5X", "5i", "5iB", "1e", "1e400", "500m", "1,000", "nan", "inf"]
)
def test_bad_quantities(text):
    with pytest.raises(DownresError, match="Cannot read .* as the memory: give a number with a unit, for example 500M or 20MB"):
        parse_quantity(text, "the memory")


def test_quantities_above_zero():
    with pytest.raises(DownresError, match="Max_macs must be above 0, '0' is not"):
        parse_quantity("0", "max_macs")


def test_format_quantity():
    assert format_quantity(4_089_184_256) == "4.09 G"
    assert format_quantity(4_089_184_256, "MACs") == "4.09 GMACs"
    assert format_quantity(0) == "0" and format_quantity(999) == "999" and format_quantity(12, "B") == "12 B"
    assert format_quantity(1000) == "1 k" and format_quantity(999_400) == "999 k" and format_quantity(999_600) == "1 M"
    assert format_quantity(0.1234) == "0.123" and format_quantity(-2_500_000) == "-2.5 M"
    assert format_quantity(2e15) == "2000 T"
    for value in (1, 37, 12_300, 4.56e6, 7.89e9, 1.23e12):
        assert parse_quantity(format_quantity(value), "it") == value
