import dataclasses
import gc
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from downres.errors import DownresError
from downres.images import batches, decode, preprocess, resize_and_crop, visible
from downres.images.images import Images, from_arrays
from downres.images.preprocess import shown_size
from downres.records import Preprocessing

RNG = np.random.default_rng(0)
SHAPES = [(333, 500), (500, 333), (256, 256), (97, 41), (375, 376), (224, 300), (1, 1), (3, 200)]
NOISE = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
PIL_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SETTINGS = [
    Preprocessing(224, 0.875),
    Preprocessing(224, 1.0, "bicubic"),
    Preprocessing(97, 0.9, "bicubic"),
    Preprocessing(128, 224 / 256),
    Preprocessing(64, 0.95),
]


def short_side_by_pil(image, p):
    """PIL's resize of the short side and centre crop, written without torchvision."""
    side = p.hw[0]
    short = int(side / p.crop_ratio + 1e-6)
    height, width = image.shape[:2]
    if height <= width:
        size = (int(short * width / height), short)
    else:
        size = (short, int(short * height / width))
    resized = np.array(Image.fromarray(image).resize(size, PIL_MODES[p.interpolation]))
    top, left = round((resized.shape[0] - side) / 2), round((resized.shape[1] - side) / 2)
    return resized[top : top + side, left : left + side]


def close_to_pil(ours, image, p):
    """At most 2 of 255 levels apart; few values at all where the CPU has the vector kernels, 1 level where it has not."""
    apart = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - short_side_by_pil(image, p).astype(int))
    assert apart.max() <= 2 and apart.mean() < 0.25


def photographs(shared_data):
    return [decode(path) for path in sorted((shared_data / "catdog" / "val" / "cat").iterdir())[:12]]


@pytest.mark.parametrize("p", SETTINGS, ids=str)
def test_agrees_with_pil_within_2_levels_on_noise(p):
    for image in NOISE:
        ours = resize_and_crop(image, p)
        assert ours.dtype == torch.uint8 and ours.shape == (3, *p.hw)
        close_to_pil(ours, image, p)


@pytest.mark.parametrize("p", SETTINGS, ids=str)
def test_agrees_with_pil_within_2_levels_on_photographs(shared_data, p):
    for image in photographs(shared_data):
        close_to_pil(resize_and_crop(image, p), image, p)


@pytest.mark.parametrize("p", SETTINGS, ids=str)
def test_agrees_with_the_evaluation_transforms_of_torchvision_and_timm(p):
    mode = transforms.InterpolationMode(p.interpolation)
    normalise = [transforms.ToTensor(), transforms.Normalize(p.mean, p.std)]
    short = int(p.hw[0] / p.crop_ratio + 1e-6)
    torchvisions = transforms.Compose([transforms.Resize(short, mode), transforms.CenterCrop(p.hw), *normalise])
    timms = create_transform(
        p.hw[0], is_training=False, interpolation=p.interpolation, mean=p.mean, std=p.std, crop_pct=p.crop_ratio
    )
    level = 2.01 / 255 / min(p.std)  # they resize with PIL
    for image in NOISE:
        ours, picture = preprocess(image, p), Image.fromarray(image)
        torch.testing.assert_close(ours, torchvisions(picture), rtol=0, atol=level)
        # timm resizes to floor(r / crop_ratio) without our 1e-6; where that is another size, there is nothing to compare.
        if int(p.hw[0] / p.crop_ratio) == short:
            torch.testing.assert_close(ours, timms(picture), rtol=0, atol=level)


WHOLE = [Preprocessing((96, 128), fit=fit, interpolation=how) for fit in ("stretch", "pad") for how in ("bilinear", "bicubic")]


@pytest.mark.parametrize("p", WHOLE, ids=str)
@pytest.mark.parametrize("image", NOISE, ids=lambda image: f"{image.shape[0]}x{image.shape[1]}")
def test_whole_pictures_agree_with_pil(p, image):
    """Stretched to the input, or inside it with the aspect ratio and the mean at right and bottom."""
    height, width = p.hw
    if p.fit == "pad":
        scale = min(p.hw[0] / image.shape[0], p.hw[1] / image.shape[1])
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        assert height == p.hw[0] or width == p.hw[1]
    assert shown_size(image.shape[:2], p) == (height, width)
    ours = resize_and_crop(image, p).permute(1, 2, 0).numpy().astype(int)
    theirs = np.array(Image.fromarray(image).resize((width, height), PIL_MODES[p.interpolation])).astype(int)
    assert ours.shape == (96, 128, 3) and np.abs(ours[:height, :width] - theirs).max() <= 2
    rest = np.concatenate([ours[height:].reshape(-1, 3), ours[:, width:].reshape(-1, 3)])
    assert (rest == [124, 116, 104]).all()  # 255 times ImageNet's mean
    assert len(rest) > 0 or (height, width) == p.hw
    normalised = preprocess(image, p)[:, height:]
    assert normalised.abs().max() < 0.01 if normalised.numel() else True


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_whole_pictures_keep_every_place(fit):
    """A picture whose colours are its own coordinates: every pixel comes from the same share of height and width."""
    for size in ((48, 64), (30, 90), (200, 70)):
        rows, columns = ((np.arange(n) + 0.5) / n for n in size)
        picture = np.zeros((*size, 3), np.uint8)
        picture[..., 0], picture[..., 1] = np.round(255 * rows)[:, None], np.round(255 * columns)[None]
        p = Preprocessing((96, 128), mean=(0.0,) * 3, std=(1.0,) * 3, fit=fit)
        height, width = shown_size(size, p)
        seen = preprocess(picture, p)[:, :height, :width].numpy()
        edge = 0.5 / min(size) + 2 / 255  # at its border a picture is continued, not extrapolated
        assert np.abs(seen[0] - ((np.arange(height) + 0.5) / height)[:, None]).max() < edge
        assert np.abs(seen[1] - ((np.arange(width) + 0.5) / width)[None]).max() < edge


def test_padding_of_grey_and_slivers():
    p = Preprocessing((8, 16), mean=(0.25,), std=(0.5,), fit="pad")
    grey = resize_and_crop(np.full((8, 8, 3), 200, np.uint8), p)
    assert grey.shape == (1, 8, 16) and (grey[0, :, :8] == 200).all() and (grey[0, :, 8:] == 64).all()
    colour = Preprocessing((8, 16), mean=(0.2, 0.4, 0.6), std=(0.5,) * 3, fit="pad")
    one = resize_and_crop(np.full((8, 8), 200, np.uint8), colour)  # is expanded only after resizing
    assert one.shape == (1, 8, 16) and (one[0, :, 8:] == 102).all()
    for size in ((1, 4000), (4000, 1), (1, 1)):
        height, width = shown_size(size, p)
        assert 1 <= height <= 8 and 1 <= width <= 16 and (height == 8 or width == 16)
        assert resize_and_crop(np.full((*size, 3), 9, np.uint8), p).shape == (1, 8, 16)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("image", NOISE, ids=lambda image: f"{image.shape[0]}x{image.shape[1]}")
def test_without_antialiasing(image, fit):
    """As OpenCV's resize: torch's float64 one but for rounding, and PIL's reading of single pixels within a level."""
    for how in ("bilinear", "bicubic"):
        p = Preprocessing((96, 128), fit=fit, interpolation=how, antialias=False)
        height, width = shown_size(image.shape[:2], p)
        if fit == "crop":
            scale = max(96 / image.shape[0], 128 / image.shape[1])
            height, width = (max(int(s * scale + 1e-9), least) for s, least in zip(image.shape[:2], p.hw, strict=True))
        exact = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        exact = torch.nn.functional.interpolate(exact, (height, width), mode=how)[0].clamp(0, 255).permute(1, 2, 0).numpy()
        top, left = round((height - min(96, height)) / 2), round((width - min(128, width)) / 2)
        ours = resize_and_crop(image, p).permute(1, 2, 0).numpy().astype(int)
        here = ours[: min(96, height), : min(128, width)]
        box = slice(top, top + here.shape[0]), slice(left, left + here.shape[1])
        assert np.abs(here - exact[box]).max() < 0.51
        if how == "bilinear":
            extent = (0, 0, image.shape[1], image.shape[0])
            pils = Image.fromarray(image).transform((width, height), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
            assert np.abs(here - np.array(pils).astype(int)[box]).max() <= 1
    if min(image.shape[:2]) > 300:  # made smaller: filtered it is another picture
        assert np.abs(ours - resize_and_crop(image, Preprocessing((96, 128), fit=fit)).permute(1, 2, 0).numpy()).max() > 50


def test_blue_green_red_on_0_to_255():
    """What OpenCV and Caffe hand their networks: (pixels - mean) / std, both of blue, green and red."""
    caffe = {"mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395), "channel_order": "bgr", "scale": 1.0}
    p = Preprocessing((30, 40), fit="stretch", **caffe)
    picture = NOISE[0][:30, :40]
    expected = (picture[:, :, ::-1].astype(np.float64) - p.mean) / p.std
    np.testing.assert_allclose(preprocess(picture, p).permute(1, 2, 0), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(resize_and_crop(picture, p).permute(1, 2, 0), picture)  # as it is seen
    grey = preprocess(picture[:, :, 0], p).permute(1, 2, 0)
    np.testing.assert_allclose(grey, (picture[:, :, :1] - np.array(p.mean)) / p.std, rtol=1e-5, atol=1e-5)


def test_padding_is_the_mean_in_every_order_and_scale():
    for scale in (1.0, 1 / 255, 1 / 127.5):
        mean = tuple(scale * level for level in (10.0, 120.0, 250.0))
        p = Preprocessing((8, 16), mean=mean, std=(scale,) * 3, fit="pad", channel_order="bgr", scale=scale)
        assert (resize_and_crop(NOISE[2], p)[:, :, 8:] == torch.tensor([250, 120, 10])[:, None, None]).all()
        assert preprocess(NOISE[2], p)[:, :, 8:].abs().max() < 1e-4
    below = Preprocessing((8, 16), mean=(-0.5, 0.5, 1.2), std=(1.0,) * 3, fit="pad")
    assert resize_and_crop(NOISE[2], below)[:, 0, 15].tolist() == [0, 128, 255]


def test_ratios_just_below_a_whole_size_round_up_to_it():
    # 224 / 0.7 is 320 in arithmetic; a crop ratio that went through JSON with fewer digits must not give 319.
    image = RNG.integers(0, 256, (320, 320, 3), dtype=np.uint8)
    for ratio in (0.7, 0.7 + 1e-10):
        np.testing.assert_array_equal(resize_and_crop(image, Preprocessing(224, ratio)).permute(1, 2, 0), image[48:272, 48:272])


def test_no_resize_where_the_size_fits():
    image = NOISE[2]
    p = Preprocessing(256)
    np.testing.assert_array_equal(resize_and_crop(image, p).permute(1, 2, 0), image)


@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_non_square_targets_cover_and_keep_the_aspect_ratio(ratio):
    p = Preprocessing((96, 192), ratio)
    cover = [int(96 / ratio + 1e-6), int(192 / ratio + 1e-6)]
    for shape in [(480, 360), (360, 480), (100, 400), (480, 960)]:
        image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
        scale = max(cover[0] / shape[0], cover[1] / shape[1])
        size = [max(int(side * scale + 1e-9), least) for side, least in zip(shape, cover, strict=True)]
        resized = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        top, left = round((size[0] - 96) / 2), round((size[1] - 192) / 2)
        ours = resize_and_crop(image, p).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - resized[top : top + 96, left : left + 192]).max() <= 2


@pytest.mark.parametrize("shape", [(100, 1), (1, 100), (7, 3), (5, 400)])
def test_slivers_in_any_memory_layout_agree_with_pil(shape):
    p = Preprocessing(64, 1.0, "bicubic")
    for image in (RNG.integers(0, 256, shape, dtype=np.uint8), RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)):
        turned = image.swapaxes(0, 1).copy().swapaxes(0, 1)
        for same in (image, turned):
            apart = np.abs(
                resize_and_crop(same, p).permute(1, 2, 0).numpy().squeeze().astype(int) - short_side_by_pil(image, p)
            )
            assert apart.max() <= 2


def test_one_pixel_fills_the_input():
    pixels = resize_and_crop(np.array([[[10, 20, 30]]], np.uint8), Preprocessing(32, 0.875))
    assert pixels.shape == (3, 32, 32)
    assert all((plane == value).all() for plane, value in zip(pixels, (10, 20, 30), strict=True))


@pytest.mark.parametrize("standing", [False, True])
def test_slivers_do_not_take_gigabytes(standing):
    sliver = np.zeros((1, 100_000), np.uint8)
    sliver[:, 49_000:51_000] = 255
    pixels = resize_and_crop(sliver.T if standing else sliver, Preprocessing(224, 0.875))  # uncut: 5.6 GB
    assert pixels.shape == (1, 224, 224)
    assert (pixels == 255).all()  # from the middle


def test_grey_is_expanded_and_equals_grey_repeated_before():
    p = Preprocessing(64, 0.875)
    grey = NOISE[0][:, :, 0]
    repeated = preprocess(np.repeat(grey[:, :, None], 3, axis=2), p)
    torch.testing.assert_close(preprocess(grey, p), repeated, rtol=0, atol=0)
    torch.testing.assert_close(preprocess(grey[:, :, None], p), repeated, rtol=0, atol=0)
    assert resize_and_crop(grey, p).shape == (1, 64, 64)


def test_networks_of_one_channel():
    p = Preprocessing(32, mean=(0.5,), std=(0.25,))
    assert preprocess(NOISE[0][:, :, 0], p).shape == (1, 32, 32)
    greys = [np.array(Image.fromarray(image).convert("L")) for image in NOISE]
    expected = torch.stack([preprocess(grey, p) for grey in greys])
    torch.testing.assert_close(torch.stack([preprocess(image, p) for image in NOISE]), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(list(batches(mixed_images(), range(8), p, 3))), expected, rtol=0, atol=0)
    repeated = np.repeat(greys[0][:, :, None], 3, axis=2)  # how a grey file is decoded
    torch.testing.assert_close(preprocess(repeated, p), expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_many_channels_of_every_type(dtype, antialias):
    """Each channel is resized as PIL does it alone and brought to 0…1 by the range of its type; floats are left as they are."""
    largest = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    picture = (RNG.random((40, 52, 6)) * largest).astype(dtype)
    mean, std = tuple(np.linspace(0.1, 0.9, 6)), tuple(np.linspace(0.2, 0.6, 6))
    p = Preprocessing((20, 26), mean=mean, std=std, fit="stretch", antialias=antialias)
    found = preprocess(picture, p)
    for i in range(6):
        plane = Image.fromarray(picture[:, :, i].astype(np.float32))
        if antialias:
            plane = plane.resize((26, 20), Image.Resampling.BILINEAR)
        else:
            plane = plane.transform((26, 20), Image.Transform.EXTENT, (0, 0, 52, 40), Image.Resampling.BILINEAR)
        expected = (np.asarray(plane) / largest - mean[i]) / std[i]
        assert np.abs(found[i].numpy() - expected).max() < (1.1 / 255 if dtype == np.uint8 else 1e-4) / std[i]
    raw = dataclasses.replace(p, scale=2.0, mean=(10.0,) * 6, std=(1.0,) * 6)  # what is in the file, times two
    numbers = resize_and_crop(picture, raw).numpy().astype(np.float64)
    np.testing.assert_allclose(preprocess(picture, raw), 2 * numbers - 10, rtol=1e-5, atol=1e-4)
    padded = preprocess(picture, dataclasses.replace(p, resolution=(20, 40), fit="pad"))
    assert padded[:, :, 26:].abs().max() < (0.5 / 255 / 0.2 if dtype == np.uint8 else 1e-5)


def test_what_people_see_of_numbers():
    colours = NOISE[0]
    np.testing.assert_array_equal(visible(colours), colours)
    np.testing.assert_array_equal(visible(np.dstack([colours, colours])), colours)
    np.testing.assert_array_equal(visible(colours[:, :, :2]), np.dstack([colours[:, :, 0]] * 3))
    ramp = np.linspace(1000, 3000, 101 * 101).reshape(101, 101).astype(np.uint16)
    seen = visible(ramp)
    assert seen.dtype == np.uint8 and seen.shape == (101, 101, 3) and (seen[0, 0] == 0).all() and (seen[-1, -1] == 255).all()
    assert (visible(np.full((4, 4), 7.0, np.float32)) == 0).all()


def test_channels_that_cannot_serve_the_network():
    for picture in (NOISE[0][:, :, 0], np.zeros((9, 9, 13), np.uint16)):
        with pytest.raises(DownresError, match="The network takes 4 channels and an image has (1|13): give mean and std"):
            preprocess(picture, Preprocessing(32, mean=(0.5,) * 4, std=(0.25,) * 4))
    with pytest.raises(DownresError, match="The network takes 4 channels and an image has 3: give mean and std"):
        preprocess(NOISE[0], Preprocessing(32, mean=(0.5,) * 4, std=(0.25,) * 4))


def test_read_only_pictures_give_no_warning_and_are_not_changed():
    image = NOISE[0].copy()
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = resize_and_crop(image, Preprocessing(333, 1.0))
    pixels.zero_()
    np.testing.assert_array_equal(image, NOISE[0])


def test_normalisation_is_in_float32_as_written():
    p = Preprocessing(16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = resize_and_crop(NOISE[0], p)
    expected = (pixels.float() / 255 - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
    result = preprocess(NOISE[0], p)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def mixed_images():
    return Images(NOISE, [str(shape) for shape in SHAPES])


def preprocess_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("downres-preprocess")]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_equal_preprocess_in_the_order_asked_for(workers, batch_size):
    p = Preprocessing(48, 0.875, "bicubic")
    indices = np.array([5, 0, 0, 7, 3, 2, 1])
    found = list(batches(mixed_images(), indices, p, batch_size, workers))
    assert [len(batch) for batch in found] == [len(part) for part in np.split(indices, range(batch_size, 7, batch_size))]
    torch.testing.assert_close(torch.cat(found), torch.stack([preprocess(NOISE[i], p) for i in indices]), rtol=0, atol=0)
    assert not preprocess_threads()


def test_no_indices_no_batches():
    assert list(batches(mixed_images(), [], Preprocessing(32), 4)) == []


def test_a_batch_stays_as_it_was_while_the_next_is_prepared():
    p = Preprocessing(32)
    first, second, *_ = batches(mixed_images(), range(8), p, 2)
    torch.testing.assert_close(first[0], preprocess(NOISE[0], p), rtol=0, atol=0)
    torch.testing.assert_close(second[0], preprocess(NOISE[2], p), rtol=0, atol=0)


def test_the_next_batch_is_prepared_while_the_consumer_works():
    class Watched(Images):
        asked: list[int] = []

        def __getitem__(self, index):
            self.asked.append(index)
            return super().__getitem__(index)

    images = Watched(NOISE, [""] * len(NOISE))
    iterator = batches(images, range(8), Preprocessing(32), 2)
    next(iterator)
    deadline = time.perf_counter() + 5
    while len(images.asked) < 4 and time.perf_counter() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(images.asked) == [0, 1, 2, 3]  # the next batch, and no more
    iterator.close()


@pytest.mark.parametrize("stop", ["close", "drop", "break"])
def test_stopping_early_leaves_no_thread(stop):
    iterator = batches(mixed_images(), list(range(8)) * 20, Preprocessing(64), 4)
    next(iterator)
    assert preprocess_threads()
    if stop == "close":
        iterator.close()
    elif stop == "break":
        for _ in iterator:
            break
    del iterator
    gc.collect()
    assert not preprocess_threads()


def test_what_goes_wrong_in_the_background_is_raised():
    iterator = batches(mixed_images(), [0, 1, 99], Preprocessing(32), 2)
    assert len(next(iterator)) == 2
    with pytest.raises(IndexError):
        next(iterator)
    assert not preprocess_threads()


def test_batch_size_must_be_positive():
    with pytest.raises(DownresError, match="A batch has at least 1 image, 0 is not"):
        next(batches(mixed_images(), [0], Preprocessing(32), 0))


def test_arrays_of_grey_pictures():
    stack = from_arrays(RNG.integers(0, 256, (5, 30, 30), dtype=np.uint8))
    (batch,) = batches(stack, range(5), Preprocessing(15), 8)
    assert batch.shape == (5, 3, 15, 15)
