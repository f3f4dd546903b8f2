import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from downres.images import arrays
from downres.images.decode import MAX_PIXELS, Unreadable, decode
from downres.images.images import from_files

decoding = sys.modules["downres.images.decode"]  # the package has the function by this name

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)


def saved(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_formats_give_the_pixels_back(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    pixels = decode(saved(tmp_path, Image.fromarray(COLOURS), f"a.{ending}", **options))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, COLOURS)


def test_the_content_and_not_the_ending_says_the_format(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS), "a.jpg", format="PNG")
    np.testing.assert_array_equal(decode(path), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_exif_orientation_gives_the_upright_picture(tmp_path, orientation, ending):
    undo = {  # how the camera's sensor saw an upright picture, for each EXIF orientation
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255  # one bright corner, in whole JPEG blocks
    upright[:16, 16:32, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    options = {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    pixels = decode(saved(tmp_path, stored, f"a.{ending}", exif=exif, **options))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= 3


def test_broken_exif_does_not_lose_the_picture(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS), "a.jpg", exif=b"Exif\0\0not a TIFF header")
    assert decode(path).shape == COLOURS.shape


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, monkeypatch):
    levels = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    pixels = decode(saved(tmp_path, Image.fromarray(levels)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 1, 128, 255, 255])
    assert pixels.shape == (1, 7, 3) and (pixels == pixels[:, :, :1]).all()
    monkeypatch.setattr(decoding, "_STRIP", 100)  # many strips, the last one short
    wide = RNG.integers(0, 65536, (37, 30)).astype(np.uint16)
    expected = np.round(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(wide)), 1), expected)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory through /proc")
def test_wide_pictures_take_a_small_multiple_of_their_pixels(tmp_path):
    """49 megapixels of 16-bit grey, decoded for three channels: 98 MB as stored and 49 as 8 bits, not 147 more, not int64."""
    path = saved(tmp_path, Image.fromarray(np.zeros((7000, 7000), np.uint16)))
    code = f"""
import re
from downres.images.decode import decode
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
before = peak()
assert decode({str(path)!r}).shape == (7000, 7000, 3)
print(peak() - before)
"""
    taken = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 49 < taken < 250


def test_16_bit_tiff_is_not_scaled(tmp_path):
    wide = RNG.integers(0, 65536, (9, 5)).astype(np.uint16)
    for channels in (1, 3):
        pixels = decode(saved(tmp_path, Image.fromarray(wide), "a.tif"), channels)
        assert pixels.dtype == np.uint16
        np.testing.assert_array_equal(pixels, wide)


TIFFS = {
    "channels last": ((20, 30, 5), {"photometric": "minisblack", "planarconfig": "contig"}),
    "channels first": ((5, 20, 30), {"photometric": "minisblack", "planarconfig": "separate"}),
    "pages": ((5, 20, 30), {"photometric": "minisblack"}),
    "compressed": ((20, 30, 5), {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"}),
    "tiles": ((20, 30, 5), {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16)}),
}


@pytest.mark.parametrize("how", TIFFS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_of_many_channels(tmp_path, how, dtype):
    tifffile = pytest.importorskip("tifffile")
    shape, options = TIFFS[how]
    values = RNG.integers(0, 200, shape).astype(dtype) * (300 if dtype == np.uint16 else 1)
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    found = decode(tmp_path / "a.tif", 5)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.moveaxis(values, 0, 2) if shape[0] == 5 else values)
    if how == "channels last":
        with pytest.raises(Unreadable, match="^5 channels, the network takes 3$"):
            decode(tmp_path / "a.tif")


def test_tiff_of_16_bit_colours_keeps_them_all(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for channels in (3, 4):
        values = RNG.integers(0, 65536, (9, 8, channels)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
        np.testing.assert_array_equal(decode(tmp_path / "a.tif", channels), values)
    values = RNG.integers(0, 65536, (9, 8, 6)).astype(np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)]
    )
    np.testing.assert_array_equal(decode(tmp_path / "a.tif", 6), np.rot90(values, -1))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_cut_tiff_of_many_channels_is_no_picture_of_zeros(tmp_path, compression):
    tifffile = pytest.importorskip("tifffile")
    values = RNG.integers(1, 200, (40, 30, 5)).astype(np.uint16)
    options = {"photometric": "minisblack", "planarconfig": "contig", "rowsperstrip": 4, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    whole = (tmp_path / "a.tif").read_bytes()
    np.testing.assert_array_equal(decode(tmp_path / "a.tif", 5), values)
    for length in range(9, len(whole) - 1, len(whole) // 40):
        (tmp_path / "a.tif").write_bytes(whole[:length])
        with pytest.raises(Unreadable, match="^(broken|truncated|not an image|cannot be read)$"):
            decode(tmp_path / "a.tif", 5)
    at = whole.index(struct.pack("<H", 257))  # the tag of the height, made nothing
    (tmp_path / "a.tif").write_bytes(whole[: at + 8] + bytes(4) + whole[at + 12 :])
    with pytest.raises(Unreadable):
        decode(tmp_path / "a.tif", 5)


def test_tiff_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 6), np.uint8), photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(Unreadable, match=r"pip install 'downres\[tiff\]'"):
        decode(tmp_path / "a.tif", 6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, ">u2"])
@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((6, 7, 5), 5, lambda a: a),
        ((5, 6, 7), 5, lambda a: a.transpose(1, 2, 0)),
        ((6, 7), 1, lambda a: a),
        ((6, 7), 3, lambda a: a),
        ((1, 6, 7), 1, lambda a: a[0]),
        ((6, 7, 1), 3, lambda a: a[:, :, 0]),
    ],
)
def test_arrays_of_numpy(tmp_path, dtype, shape, channels, expected):
    values = RNG.integers(0, 200, shape).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    found = decode(tmp_path / "a.npy", channels)
    assert found.dtype.name in ("uint8", "uint16", "float32") and found.dtype.kind == values.dtype.kind
    np.testing.assert_array_equal(found, expected(values))


def test_arrays_that_are_no_pictures(tmp_path):
    path = tmp_path / "a.npy"

    def fails(reason, values, channels=3):
        np.save(path, values, allow_pickle=True)
        with pytest.raises(Unreadable, match=reason):
            decode(path, channels)

    fails(r"an array \(5, 9, 5\), height and width first or last", np.zeros((5, 9, 5), np.uint8), 5)
    fails("^5 channels, the network takes 13$", np.zeros((8, 9, 5), np.uint8), 13)
    fails("^1 channel, the network takes 4$", np.zeros((8, 9), np.uint8), 4)
    fails("^object pixels", np.array([[{}]], dtype=object))
    fails("^int32 pixels, neither uint8, uint16 nor floats", np.zeros((4, 4), np.int32))
    fails("NaN or infinite", np.full((4, 4), np.nan))
    fails("no picture", np.zeros(4, np.uint8))
    fails("no picture", np.zeros((0, 4), np.uint8))
    np.save(path, np.zeros((40, 40, 3), np.uint8))
    whole = path.read_bytes()
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(Unreadable, match="^(broken|truncated|not an image)$"):
            decode(path)
    path.write_bytes(whole.replace(b"(40, 40, 3), }         ", b"(99999, 999999, 9999), }", 1))
    with pytest.raises(Unreadable, match="million values, more than are read"):
        decode(path)


def test_one_and_four_channels(tmp_path):
    """A network of one channel gets grey as it is, one of four only what has transparency."""
    grey = COLOURS[:, :, 0]
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(grey)), 1), grey)
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(COLOURS)), 1), COLOURS)
    faint = np.dstack([COLOURS, grey])
    for ending in ("png", "tif"):
        path = saved(tmp_path, Image.fromarray(faint, "RGBA"), f"a.{ending}")
        np.testing.assert_array_equal(decode(path, 4), faint)
        np.testing.assert_array_equal(decode(path), COLOURS)
    two = decode(saved(tmp_path, Image.fromarray(np.dstack([grey, grey]), "LA")), 4)
    np.testing.assert_array_equal(two, np.dstack([grey] * 4))
    for picture, has in ((COLOURS, "3 channels"), (grey, "1 channel")):
        with pytest.raises(Unreadable, match=f"^{has}, the network takes 4$"):
            decode(saved(tmp_path, Image.fromarray(picture)), 4)
    with pytest.raises(Unreadable, match="^4 channels, the network takes 13$"):
        decode(saved(tmp_path, Image.fromarray(faint, "RGBA")), 13)


def test_32_bit_integers_are_16_bit_levels_or_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 65535]], np.int32)), "a.tif")
    np.testing.assert_array_equal(decode(path)[0, :, 0], [0, 255])
    path = saved(tmp_path, Image.fromarray(np.array([[0, 65536]], np.int32)), "b.tif")
    with pytest.raises(Unreadable, match="32-bit pixels outside 0 to 65535"):
        decode(path)


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.zeros((3, 3), np.float32)), "a.tif")
    with pytest.raises(Unreadable, match="floating-point"):
        decode(path)


def test_grey_one_bit_and_alpha(tmp_path):
    grey = COLOURS[:, :, 0]
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(grey)))[:, :, 1], grey)
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(decode(saved(tmp_path, bits))[:, :, 2], np.array(bits.convert("L")))
    faint = np.dstack([COLOURS, grey])
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(faint, "RGBA"))), COLOURS)
    np.testing.assert_array_equal(decode(saved(tmp_path, Image.fromarray(np.dstack([grey, grey]), "LA")))[:, :, 0], grey)


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path):
    palette = Image.fromarray(COLOURS).quantize(16)
    path = saved(tmp_path, palette, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(path), np.array(palette.convert("RGB")))


def test_cmyk(tmp_path):
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    pixels = decode(saved(tmp_path, inks, "a.jpg", quality=100))
    assert pixels.shape == (16, 16, 3)
    assert pixels[:, :, 0].min() > 250 and pixels[:, :, 1:].max() < 5


@pytest.mark.parametrize(("side", "reason"), [(10_000, "100.0 megapixels, more than 89"), (14_000, "far more than 89")])
def test_huge_pictures_are_refused_from_the_header(tmp_path, monkeypatch, side, reason):
    path = saved(tmp_path, Image.new("1", (side, side)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unreadable, match=reason):
            decode(path)
    assert side * side > MAX_PIXELS


def test_truncated_files(tmp_path):
    noise = Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    for ending in ("jpg", "png"):
        path = saved(tmp_path, noise, f"a.{ending}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(Unreadable, match="truncated"):
            decode(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_no_cut_of_a_file_raises_anything_but_unreadable(tmp_path, ending):
    path = saved(tmp_path, Image.fromarray(COLOURS), f"a.{ending}")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            assert decode(path).shape == COLOURS.shape  # only padding was cut
        except Unreadable as error:
            assert 0 < len(str(error)) < 60


def chunk(kind, data, length=None):
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HUGE = 2**31 - 1
PNG = b"\x89PNG\r\n\x1a\n"
LYING = {
    "chunk.png": PNG
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(200)), HUGE),
    "text.png": PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + chunk(b"iCCP", b"a" * 99, HUGE),
    "size.png": PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", HUGE, HUGE, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b""),
    "size.gif": b"GIF89a" + struct.pack("<HHBBBBHHHHB", 65535, 65535, 0, 0, 0, 0x2C, 0, 0, 65535, 65535, 0),
    "size.jpg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65535, 65535, 3) + bytes(9) + b"\xff\xda\0\x0c" + bytes(99),
    "size.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", HUGE, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0),
    "size.webp": b"RIFF" + struct.pack("<I", HUGE) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6 + bytes(20),
    "size.ppm": b"P6 2000000000 2000000000 255\n" + bytes(99),
    "strip.tif": b"II*\0\x08\0\0\0"
    + struct.pack("<H", 8)
    + b"".join(
        struct.pack("<HHII", tag, kind, 1, value)
        for tag, kind, value in (
            (256, 4, 9000), (257, 4, 9000), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 9000), (279, 4, HUGE)
        )
    )
    + bytes(4),
}  # fmt: skip


@pytest.mark.parametrize("name", LYING)
def test_a_lying_header_takes_no_memory(tmp_path, name):
    """Lengths and sizes far beyond the file take less memory than a large picture needs."""
    (tmp_path / name).write_bytes(LYING[name])
    tracemalloc.start()
    try:
        for channels in (1, 3):
            with contextlib.suppress(Unreadable) if name == "chunk.png" else pytest.raises(Unreadable):
                decode(tmp_path / name, channels)  # the pixels of that chunk are all there
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


def test_no_more_is_read_than_there_is(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    with decoding._Bounded(path) as file:
        assert file.read(10) == bytes(range(10)) and file.read(2**40) == bytes(range(10, 100)) and file.read(5) == b""
        file.seek(95)
        assert file.read() == bytes(range(95, 100))


def test_a_picture_too_large_for_the_memory(tmp_path, monkeypatch):
    def full(self):
        raise MemoryError

    path = saved(tmp_path, Image.fromarray(COLOURS))
    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    with pytest.raises(Unreadable, match="^too large for the memory$"):
        decode(path)


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture, whatever its name says\n" * 10)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    for name, reason in {
        "empty.jpg": "empty file",
        "text.jpg": "not an image",
        "folder.jpg": "a folder",
        "pipe.jpg": "not a regular file",
        "dangling.jpg": "no such file",
        "nowhere.jpg": "no such file",
    }.items():
        with pytest.raises(Unreadable, match=f"^{reason}$"):
            decode(tmp_path / name)


def test_formats_that_start_other_programs_are_not_opened(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS), "a.jpg", format="EPS")
    with pytest.raises(Unreadable, match="not an image"):
        decode(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_permission_denied(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS))
    path.chmod(0)
    with pytest.raises(Unreadable, match="permission denied"):
        decode(path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_no_file_stays_open(tmp_path):
    good = saved(tmp_path, Image.fromarray(COLOURS))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff" + b"nonsense" * 20)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        decode(good)
        with pytest.raises(Unreadable):
            decode(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_decoding_in_threads_leaves_the_warning_filters_alone(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS))
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(path) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_headers_of_arrays_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Python 3.11's parser, which NumPy reads them with, raises SystemError now and then where two threads are in it."""
    inside, most, real = 0, 0, arrays._values

    def watched(file):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        found = real(file)
        inside -= 1
        return found

    monkeypatch.setattr(arrays, "_values", watched)
    files = [tmp_path / f"{i}.npy" for i in range(8)]
    for file in files:
        np.save(file, np.zeros((6, 5, 7), np.uint16))
    found, skipped = from_files(files, [file.name for file in files], workers=4, channels=7)
    assert len(found) == 8 and not skipped and most == 1
