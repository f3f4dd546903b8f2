import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from downres.errors import DownresError
from downres.images import images as module
from downres.images.decode import Unreadable, decode
from downres.images.images import Images, Skip, cache_bytes, from_arrays, from_files

RNG = np.random.default_rng(0)


@pytest.fixture
def files(tmp_path):
    """Eleven PNG files of different sizes, the fourth empty and the last a text."""
    paths, pictures = [], []
    for i in range(11):
        path = tmp_path / f"{i}.png"
        pixels = RNG.integers(0, 256, (5 + i, 20 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        paths.append(path)
        pictures.append(pixels)
    paths[3].write_bytes(b"")
    paths[10].write_text("no picture")
    return paths, pictures


def names_of(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_files_in_order_with_the_unreadable_left_out(files, workers):
    paths, pictures = files
    images, skipped = from_files(paths, names_of(paths), workers=workers)
    assert skipped == [Skip("3.png", "empty file"), Skip("10.png", "not an image")]
    assert images.names == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png", "7.png", "8.png", "9.png"]
    assert images.checksums == Images(list(images), images.names).checksums and len(set(images.checksums)) == 9
    assert len(images) == 9
    for image, i in zip(images, (0, 1, 2, 4, 5, 6, 7, 8, 9), strict=True):
        np.testing.assert_array_equal(image, pictures[i])


def test_every_file_is_decoded_exactly_once(files, monkeypatch):
    paths, _ = files
    calls = Counter()

    def counting(path):
        calls[path] += 1
        return decode(path)

    monkeypatch.setattr(module, "decode", counting)
    images, _ = from_files(paths, names_of(paths))
    for _ in range(3):
        assert all(image.size for image in images)
    assert calls == dict.fromkeys(paths, 1)


def test_progress_counts_every_file(files):
    paths, _ = files
    seen = []
    from_files(paths, names_of(paths), progress=lambda *report: seen.append(report))
    assert seen == [("decoding", i, 11) for i in range(1, 12)]


def test_few_pictures_wait_in_memory(monkeypatch):
    lock, out = threading.Lock(), [0, 0]

    def decoding(path):
        with lock:
            out[0] += 1
            out[1] = max(out)
        return np.zeros((2, 2, 3), np.uint8)

    def slow_consumer(*_):
        time.sleep(0.001)
        with lock:
            out[0] -= 1

    monkeypatch.setattr(module, "decode", decoding)
    names = [str(i) for i in range(100)]
    from_files(names, names, progress=slow_consumer, workers=2)
    assert out[1] <= 5  # four waiting and the one being written


def test_ctrl_c_stops_before_the_rest_is_decoded(monkeypatch):
    calls = []

    def slow(path):
        calls.append(path)
        time.sleep(0.01)
        return np.zeros((2, 2, 3), np.uint8)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "decode", slow)
    with pytest.raises(KeyboardInterrupt):
        from_files(range(500), [""] * 500, progress=interrupt)
    assert len(calls) <= 8
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("downres-decode")]


def test_errors_that_are_not_about_the_file_are_raised(monkeypatch):
    def broken(path):
        raise RuntimeError

    monkeypatch.setattr(module, "decode", broken)
    with pytest.raises(RuntimeError):
        from_files(["a"], ["a"])


def test_a_file_too_large_for_the_memory_is_left_out(monkeypatch):
    def out_of_memory(path):
        if path == "b":
            raise MemoryError
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(module, "decode", out_of_memory)
    images, skipped = from_files(["a", "b", "c"], ["a", "b", "c"])
    assert len(images) == 2 and skipped == [Skip("b", "too large for the memory")]


def test_the_space_needed_is_said_before_anything_is_decoded(files, monkeypatch):
    """Eleven files of about 390 bytes decoded, two of them no pictures: by the headers about 3.76 kB."""
    paths, _ = files
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3000))

    def not_yet(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "decode", not_yet)
    for cache, has in ((10**9, "1 GB of the 3 kB"), (1000, "1 kB of the 3 kB")):
        with pytest.warns(UserWarning, match=f"11 images need about 3.7. kB decoded, .* may have {has} that are free in"):
            with pytest.raises(KeyboardInterrupt):
                from_files(paths, names_of(paths), cache=cache)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            from_files(paths, names_of(paths), cache=4000)


@pytest.mark.parametrize("cache", [None, 0])
def test_numbers_of_other_types_come_back_as_they_are(tmp_path, cache):
    """A file of an odd number of bytes before them: what follows in the cache lies at odd places."""
    values = [RNG.integers(0, 200, (3, 5, 5)).astype(dtype) for dtype in (np.uint8, np.uint16, np.float32, np.uint16)]
    for i, one in enumerate(values):
        np.save(tmp_path / f"{i}.npy", one)
    paths = [tmp_path / f"{i}.npy" for i in range(4)]
    with warnings.catch_warnings(action="ignore"):
        images, skipped = from_files(paths, names_of(paths), channels=5, cache=cache)
    assert not skipped and images.shapes == [(3, 5, 5)] * 4
    for one, found in zip(values, images, strict=True):
        assert found.dtype == one.dtype
        np.testing.assert_array_equal(found, one)


def test_nothing_readable_and_nothing_at_all(monkeypatch):
    def unreadable(path):
        raise Unreadable("truncated")

    monkeypatch.setattr(module, "decode", unreadable)
    images, skipped = from_files(["a", "b"], ["a", "b"])
    assert len(images) == 0 and len(skipped) == 2
    images, skipped = from_files([], [])
    assert len(images) == 0 and skipped == []


def test_a_full_disk_is_a_full_cache(files, monkeypatch):
    paths, pictures = files
    # A device that is always full stands for the disk.
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **options: open("/dev/full", "r+b", buffering=0))
    with pytest.warns(UserWarning, match="9 decoded images need 3.76 kB and the cache for them has 0 B: 9 of them"):
        images, _ = from_files(paths, names_of(paths))
    np.testing.assert_array_equal(images[3], pictures[4])


@pytest.mark.parametrize("cache", [0, 315, 1000, 2000])
def test_a_small_cache_gives_the_same_pictures(files, monkeypatch, cache):
    paths, _ = files
    whole, _ = from_files(paths, names_of(paths))
    with pytest.warns(UserWarning, match="of them are decoded again each time they are looked at, which costs time"):
        images, skipped = from_files(paths, names_of(paths), cache=cache)
    assert images.names == whole.names and images.checksums == whole.checksums and images.shapes == whole.shapes
    assert len(skipped) == 2
    kept, size = set(), 0
    for i, shape in enumerate(whole.shapes):
        if size + np.prod(shape) <= cache:
            kept.add(i)
            size += np.prod(shape)
    calls = Counter()
    outcome = module._decode_or_reason
    monkeypatch.setattr(module, "_decode_or_reason", lambda path, read: calls.update([path.name]) or outcome(path, read))
    for i in [*range(9), *range(9)]:
        np.testing.assert_array_equal(images[i], whole[i])
    assert calls == {whole.names[i]: 2 for i in range(9) if i not in kept} and len(images._pictures._pixels) == size <= cache


def test_the_first_to_be_kept_need_not_be_the_first(files, monkeypatch):
    paths, pictures = files
    with pytest.warns(UserWarning, match="8 of them"):
        images, _ = from_files(paths, names_of(paths), cache=14 * 11 * 3, first=[9, 3])
    assert [images.names[i] for i, file in enumerate(images._pictures.files) if file.start is not None] == ["9.png"]
    chosen = images.take([8, 0])
    assert chosen.names == ["9.png", "0.png"] and chosen.checksums == [images.checksums[8], images.checksums[0]]
    assert chosen.shapes == [(14, 11, 3), (5, 20, 3)] and len(chosen) == 2
    np.testing.assert_array_equal(chosen[0], pictures[9])
    np.testing.assert_array_equal(chosen[1], pictures[0])


def test_threads_read_pictures_outside_of_the_cache(files):
    paths, pictures = files
    with pytest.warns(UserWarning):
        images, _ = from_files(paths, names_of(paths), cache=500)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (i, images[i % 9]), range(200)))
    for i, picture in found:
        np.testing.assert_array_equal(picture, pictures[[0, 1, 2, 4, 5, 6, 7, 8, 9][i % 9]])


def test_a_file_that_changes_while_in_use(files):
    paths, _ = files
    with pytest.warns(UserWarning):
        images, _ = from_files(paths, names_of(paths), cache=0)
    Image.new("RGB", (20, 5)).save(paths[0])
    paths[1].unlink()
    with pytest.raises(DownresError, match=r"0.png changed while it was in use \(other pixels\): run again"):
        images[0]
    with pytest.raises(DownresError, match=r"1.png changed while it was in use \(no such file\): run again"):
        images[1]
    assert images[2].size


def test_how_much_is_kept(monkeypatch):
    assert cache_bytes(1.5) == 1_500_000_000 and cache_bytes(0) == 0
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1001))
    assert cache_bytes() == 500
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(DownresError, match="The cache of decoded images has 0 GB or more"):
            cache_bytes(wrong)


def test_shapes_and_parts_of_arrays():
    array = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)
    images = from_arrays(array)
    assert images.shapes == [(6, 5)] * 4
    chosen = images.take(np.array([2, 2]))
    assert chosen.names == ["photo 2", "photo 2"] and np.shares_memory(chosen[1], array)
    assert chosen.checksums == [images.checksums[2]] * 2 == images.take([2, 2]).checksums


def test_arrays_are_not_copied():
    array = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)
    images = from_arrays(array)
    assert len(images) == 4
    assert images.names == ["photo 0", "photo 1", "photo 2", "photo 3"]
    assert np.shares_memory(images[2], array) and images[2].shape == (6, 5)
    assert from_arrays(np.zeros((2, 3, 3, 3), np.uint8), ["a", "b"]).names == ["a", "b"]
    assert len(from_arrays(np.zeros((0, 3, 3), np.uint8))) == 0


@pytest.mark.parametrize("array", [np.zeros((2, 3, 3)), np.zeros((3, 3), np.uint8), np.zeros((2, 3, 32, 32), np.uint8)])
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(
        DownresError, match=r"Images are arrays \(n, height, width\) or .*: convert them, and put the channels last"
    ):
        from_arrays(array)


def test_names_must_be_as_many_as_images():
    with pytest.raises(DownresError, match="2 images need as many names, not 1"):
        Images([np.zeros((1, 1), np.uint8)] * 2, ["a"])


def test_checksums_follow_pixels_and_shape():
    array = RNG.integers(0, 256, (3, 4, 6), dtype=np.uint8)
    before = from_arrays(array).checksums
    assert len(set(before)) == 3 and from_arrays(array.copy(order="F")).checksums == before
    assert from_arrays(array.reshape(3, 6, 4)).checksums[0] != before[0]
    array[1, 2, 3] ^= 1
    after = from_arrays(array).checksums
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_checksums_of_files_come_from_the_decode_threads(files, monkeypatch):
    paths, _ = files
    threads = set()
    checksum = module._checksum

    def watched(picture):
        threads.add(threading.current_thread().name)
        return checksum(picture)

    monkeypatch.setattr(module, "_checksum", watched)
    images, _ = from_files(paths, names_of(paths))
    stack = from_arrays(np.zeros((2, 3, 3), np.uint8))
    assert len(images.checksums) == 9 and all(name.startswith("downres-decode") for name in threads)
    threads.clear()
    assert len(stack.checksums) == 2 and threads == {threading.current_thread().name}


def test_skips_go_to_json_and_back():
    assert Skip.from_json(Skip("a.jpg", "truncated").to_json()) == Skip("a.jpg", "truncated")
