import os
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from downres.images.decode import MAX_PIXELS, Unreadable, decode

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


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, ending):
    levels = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    pixels = decode(saved(tmp_path, Image.fromarray(levels), f"a.{ending}"))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 1, 128, 255, 255])
    assert pixels.shape == (1, 7, 3) and (pixels == pixels[:, :, :1]).all()


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
