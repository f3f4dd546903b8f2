"""Which of a network's outputs is judged, and what a single logit says."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import downres
from downres import DownresError, Preprocessing
from downres.records import Dense
from downres.reductions.dense import Segmenter

RNG = np.random.default_rng(0)
SIDE = 16
P = Preprocessing(SIDE, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3, fit="stretch")


def network(make, answer, *, outputs=2, head=False):
    """A network whose only layer tells bright from dark exactly: logits (dark, bright, …), and what `answer` makes of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = make(3, outputs)

        def forward(self, x: Tensor):
            return answer(self.c(x.mean((2, 3)) if head else x))

    net = Net().eval()
    nn.init.zeros_(net.c.weight)
    nn.init.zeros_(net.c.bias)
    row = outputs > 1
    net.c.weight.data[int(row)] = 1 / 3
    net.c.bias.data[0] = 0.4937 if row else -0.4937  # no pixel is just there
    return net


def maps(answer, outputs=2):
    return network(lambda i, o: nn.Conv2d(i, o, 1), answer, outputs=outputs)


def rows(answer, outputs=2):
    return network(nn.Linear, answer, outputs=outputs, head=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures in black and white, and masks that are right in 5 of 6 pixels; the IoU of each class by hand."""
    root = tmp_path_factory.mktemp("scenes")
    counts = np.zeros((2, 2), int)
    for i in range(12):
        bright = RNG.random((SIDE, SIDE)) < 0.4
        truth = bright ^ (RNG.random((SIDE, SIDE)) < 1 / 6)
        for folder, array in (("images", bright * np.uint8(255)), ("masks", truth.astype(np.uint8))):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{i:02}.png")
        np.add.at(counts, (truth.astype(int), bright.astype(int)), 1)
    iou = [100 * counts[k, k] / (counts[k].sum() + counts[:, k].sum() - counts[k, k]) for k in range(2)]
    return root, iou


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """dark/ and light/ with pictures of one shade; one in four is in the wrong folder."""
    root = tmp_path_factory.mktemp("photos")
    for k, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for i in range(16):
            shade = RNG.integers(150, 250) if k ^ (i % 4 == 0) else RNG.integers(5, 100)
            Image.new("RGB", (SIDE, SIDE), (int(shade),) * 3).save(root / name / f"{i:02}.png")
    return root


def evaluated(net, data, **options):
    return downres.evaluate(net, data, preprocessing=P, val_fraction=1.0, **options)


def wrong(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits) + torch.arange(logits.shape[1] - 1, -1, -1).reshape(-1, *[1] * (logits.ndim - 2))


SAME = {
    "auxiliary, main": (lambda y: [wrong(y), y], 1),
    "main, auxiliary": (lambda y: [y, wrong(y)], 0),
    "a tuple": (lambda y: (y, wrong(y)), 0),
    "a smaller auxiliary": (lambda y: (wrong(y)[..., ::2, ::2], y), 1),
    "names": (lambda y: {"edge": wrong(y), "seg": y}, "seg"),
}


@pytest.mark.parametrize("kind", SAME)
def test_of_several_outputs_that_fit_one_is_asked_for(scenes, kind):
    root, iou = scenes
    answer, right = SAME[kind]
    with pytest.raises(
        DownresError, match=r"returns several outputs \(.*which of them is judged cannot be known; name one, outp"
    ):
        evaluated(maps(answer), root)
    assert evaluated(maps(answer), root, output_index=right).iou == pytest.approx(iou)
    assert evaluated(maps(answer), root, output_index=str(right)).iou == pytest.approx(iou)  # as a command line has it
    assert evaluated(maps(answer), root, output_index="edge" if kind == "names" else 1 - right).iou[1] == 0
    with pytest.raises(DownresError, match="There is no output 7 of the shape of logits: the network's outputs have"):
        evaluated(maps(answer), root, output_index=7)


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: [torch.cat([y, y, y], 1), y],
        lambda y: [y, torch.cat([y, y], 1)],
        lambda y: {"seg": y, "edge": y[:, :1]},
        lambda y: (y.mean((2, 3)), y),
        lambda y: (y, y.mean((2, 3))),
        lambda y: {"out": y, "aux": wrong(y)},  # torchvision's own names
    ],
)
def test_the_one_output_that_fits_is_taken(scenes, answer):
    root, iou = scenes
    assert evaluated(maps(answer), root).iou == pytest.approx(iou)


def test_no_output_that_fits(scenes):
    with pytest.raises(
        DownresError, match="returns several outputs .*and none of them fits the data: The network has 4 outputs"
    ):
        evaluated(maps(lambda y: [torch.cat([y, y], 1), torch.cat([y, y, y], 1)]), scenes[0])


def test_a_classifier_of_two_heads(photos):
    answer = lambda y: (wrong(y), y)  # noqa: E731
    with pytest.raises(DownresError, match=r"\(0: 2 numbers, 1: 2 numbers\), and which of them is judged cannot be known"):
        evaluated(rows(answer), photos)
    assert evaluated(rows(answer), photos, output_index=1).top1 == 75
    assert evaluated(rows(answer), photos, output_index=0).top1 == 50
    assert evaluated(rows(lambda y: (torch.cat([y, y, y], 1), y)), photos).top1 == 75
    assert evaluated(rows(lambda y: {"kind": y}), photos).top1 == 75
    with pytest.raises(DownresError, match="which of them is judged cannot be known"):
        evaluated(rows(answer), photos, task="agreement", compare="classes")


SINGLE = {"logit": lambda y: y, "probability": torch.sigmoid, "named": lambda y: {"out": torch.sigmoid(y)}}


@pytest.mark.parametrize("output", ["logits", "classes"])
@pytest.mark.parametrize("kind", SINGLE)
def test_a_single_map_is_background_and_foreground(scenes, kind, output):
    root, iou = scenes
    found = evaluated(maps(SINGLE[kind], outputs=1), root, output=output)
    assert found.iou == pytest.approx(iou) and found.miou < 100


def test_a_sigmoid_before_the_upsampling_is_seen(scenes):
    root, iou = scenes
    net = maps(lambda y: nn.functional.interpolate(torch.sigmoid(y), scale_factor=2.0, mode="bilinear"), outputs=1)
    assert evaluated(net, root, label_size=2 * SIDE).pixel_accuracy > 70


@pytest.mark.parametrize("kind", SINGLE)
def test_a_single_number_is_a_class_or_the_other(photos, kind):
    net = rows(lambda y: SINGLE[kind](y), outputs=1)
    assert evaluated(net, photos).top1 == 75
    same = evaluated(net, photos, task="agreement", compare="classes")
    assert same.agreement == 100 and same.n == 32
    three = photos.parent / "three"
    for name in "abc":
        (three / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(three / name / "0.png")
    with pytest.raises(DownresError, match=r"3 class folders \(a, b, c\)"):
        evaluated(net, three)


def test_an_output_for_void_is_left_out(scenes):
    root, iou = scenes
    net = maps(lambda y: torch.cat([y[:, :1], y[:, :1] * 0 + 9, y[:, 1:]], 1))  # void would always win
    with pytest.raises(DownresError, match="3 outputs and the masks 2 classes .*pixels without a class, ignore_output=2"):
        evaluated(net, root)
    assert evaluated(net, root, ignore_output=1).iou == pytest.approx(iou)
    for index in (-1, 3):
        with pytest.raises(DownresError, match=f"one of the network's 3 and .*, {index} is not: give ignore_output=2"):
            evaluated(net, root, ignore_output=index)
    with pytest.raises(DownresError, match="two are left beside it"):
        evaluated(maps(lambda y: y), root, ignore_output=1)


def test_void_is_left_out_for_a_classifier(photos):
    with pytest.raises(DownresError, match="Only a segmentation network has an output for void"):
        evaluated(rows(lambda y: y), photos, ignore_output=1)


def test_class_maps_of_one_logit_and_without_void():
    x = torch.randn(2, 3, 5, 5)
    one = Segmenter(nn.Identity(), Dense((10, 10), "classes", threshold=0.0))(x[:, :1])
    big = nn.functional.interpolate(x[:, :1], size=(10, 10), mode="bilinear")
    assert one.dtype == torch.uint8 and torch.equal(one, (big[:, 0] > 0).to(torch.uint8))
    three = Segmenter(nn.Identity(), Dense((10, 10), left_out=1))(x)
    assert three.shape == (2, 2, 10, 10)
    torch.testing.assert_close(three, nn.functional.interpolate(x[:, [0, 2]], size=(10, 10), mode="bilinear"))


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (maps(lambda y: [wrong(y), y]), {"output_index": 1}),
        (maps(torch.sigmoid, outputs=1), {}),
        (maps(lambda y: torch.cat([y, y[:, :1] * 0 + 9], 1)), {"ignore_output": 2}),
    ],
)
def test_what_is_shipped_for_masks(scenes, tmp_path, net, options):
    root, _ = scenes
    _shipped(net, root, tmp_path, 60, **options)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (rows(lambda y: (wrong(y), y)), {"output_index": 1}),
        (rows(torch.sigmoid, outputs=1), {}),
        (rows(lambda y: y, outputs=1), {}),
    ],
)
def test_what_is_shipped_for_classes(photos, tmp_path, net, options):
    _shipped(net, photos, tmp_path, 60, **options)
    (prediction,) = downres.predict(tmp_path / "run/best", [photos / "light/01.png"])
    assert prediction.classes[0] == "light" and 50 < prediction.probabilities[0] < 100


def _shipped(net, data, tmp_path, max_drop, **options):
    run = downres.search(
        net, data, preprocessing=P, resolutions=[SIDE // 2], stem_scales=(), max_drop=max_drop, folds=2, snap=False, threads=1,
        runtime="torch", out=tmp_path / "run", **options,
    )  # fmt: skip
    assert run.best is not None
    assert [str(f.detail) for f in downres.check(tmp_path / "run/best", model=net) if not f.ok] == []
