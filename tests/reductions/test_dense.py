"""Logits at full size: equal to doing it by hand, of the shape that the original gives, and in how much memory."""

import copy
import dataclasses
import warnings
from collections import namedtuple

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map
from torchvision.models import segmentation
from transformers import (
    ConvNextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from downres.errors import DownresError
from downres.measuring.cost import measure_cost
from downres.models.regseg import regseg
from downres.probe import logits_of
from downres.records import Dense
from downres.reduction import reduce
from downres.reductions.dense import Segmenter, class_map, full_size, upsample

CLASSES = 5
Pair = namedtuple("Pair", "logits aux")


class UNet(nn.Module):
    """A user's own, with skip connections; `answer` says in what the logits are returned."""

    def __init__(self, answer=lambda logits, aux, features: logits, align_corners=False):
        super().__init__()
        self.answer, self.align_corners = answer, align_corners
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down2, self.down4 = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.up2, self.up1 = nn.Conv2d(28, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head, self.aux = nn.Conv2d(8, CLASSES, 1), nn.Conv2d(16, CLASSES, 1)

    def forward(self, image, scale=1.0):
        x1 = self.first(image).relu()
        x2 = self.down2(x1).relu()
        x4 = self.down4(x2).relu()
        x2 = self.up2(torch.cat([self.grown(x4, x2), x2], 1)).relu()
        x1 = self.up1(torch.cat([self.grown(x2, x1), x1], 1)).relu()
        return self.answer(self.head(x1) * scale, self.aux(x4), x4)

    def grown(self, x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def segformer():
    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    config.num_labels = CLASSES
    return SegformerForSemanticSegmentation(config)


def upernet():
    backbone = ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False)
    config.num_labels = CLASSES
    return UperNetForSemanticSegmentation(config)


def torchvision(build, **how):
    return build(weights=None, weights_backbone=None, num_classes=CLASSES, **how)


NETWORKS = {
    "RegSeg": lambda: regseg("exp48_decoder26", CLASSES, width=0.25, depth=0.5),
    "LR-ASPP": lambda: torchvision(segmentation.lraspp_mobilenet_v3_large),
    "SegFormer": segformer,
    "UperNet": upernet,
    "smp DeepLabV3+": lambda: smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=CLASSES),
    "own": UNet,
    "own, tuple": lambda: UNet(lambda logits, aux, features: (logits, [aux])),
    "own, named tuple": lambda: UNet(lambda logits, aux, features: Pair(logits, aux)),
    "own, dict": lambda: UNet(lambda logits, aux, features: {"out": logits, "aux": {"deep": aux}}),
}
SIZES = ((96, 96), (64, 128), (97, 131), (41, 200))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def picture(size, batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def shape(x):
    return tuple(x.shape) if isinstance(x, torch.Tensor) else x


def near(found, expected):
    """Rounding apart: kernels differ with the number of channels."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def sizes_of(model):
    unit = 32 if isinstance(model, smp.base.SegmentationModel) else 1  # the library refuses others itself
    return [size for size in SIZES if size[0] % unit == size[1] % unit == 0]


# --- upsample and class_map ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", [1, 3, 19, 150])
def test_class_map_is_the_argmax_of_the_upsampled_logits(interpolation, align_corners, classes):
    drawn, batch = torch.Generator().manual_seed(classes), 2 if classes < 100 else 1
    for size in ((48, 96), (37, 53), (12, 24), (13, 150)):
        random = torch.randn(batch, classes, 12, 24, generator=drawn)
        tied = torch.randint(0, 3, (batch, classes, 12, 24), generator=drawn).float()  # the first of equal ones wins
        nhwc = random.contiguous(memory_format=torch.channels_last)
        for logits in (random, tied, nhwc, random.double(), random.half(), tied.bfloat16(), random[:, :, ::2, 1::2]):
            whole = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
            expected = whole
            if whole.shape[-2:] != size:
                expected = F.interpolate(whole, size=size, mode=interpolation, align_corners=align_corners)
            plain = upsample(logits, size, interpolation, align_corners)
            torch.testing.assert_close(plain.to(expected), expected, rtol=0, atol=3e-5)
            found = class_map(logits, size, interpolation, align_corners)
            assert found.dtype == torch.uint8 and torch.equal(found.long(), plain.argmax(1))
            # F.interpolate on all classes at once may differ in the last bits, which matters between classes as close as that.
            highest = expected.double().topk(min(2, classes), dim=1).values
            clear = highest[:, 0] - highest[:, -1] > 1e-4 if classes > 1 else torch.ones_like(found, dtype=torch.bool)
            assert torch.equal(found[clear].long(), expected.argmax(1)[clear])


def test_more_classes_than_a_byte_holds():
    logits = torch.arange(300.0).view(1, 300, 1, 1) + torch.randn(1, 300, 4, 4)
    found = class_map(logits, (9, 7))
    assert found.dtype == torch.int16
    assert torch.equal(found.long(), upsample(logits, (9, 7)).argmax(1)) and found.max() > 255


def test_equal_logits_are_the_first_class():
    assert not class_map(torch.ones(1, 7, 4, 4), (16, 16)).any()
    assert (class_map(torch.tensor([0.0, 1, 1, 0]).view(1, 4, 1, 1), (8, 8)) == 1).all()


def test_half_precision_keeps_close_classes_apart():
    """1000 and 1000.5 are neighbours in half precision: between them there is nothing that interpolation could give."""
    logits = torch.tensor([[1000.0, 1000.0], [1000.5, 999.5]]).view(1, 2, 1, 2).half()
    expected = F.interpolate(logits.double(), size=(1, 64), mode="bilinear").argmax(1)
    assert torch.equal(class_map(logits, (1, 64)).long(), expected) and upsample(logits, (1, 64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "stride"),
    [
        (nn.Conv2d(3, 2, 3, 4, 1), 4),
        (nn.Conv2d(3, 2, 7, 4, 3), 4),
        (nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)), 4),
        (nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(5))), 32),
        (nn.Conv2d(3, 2, 3, padding=1), 1),
    ],
)
def test_full_size_follows_padded_networks(module, stride):
    for height, width in ((64, 96), (97, 131), (65, 33), (224, 225)):
        assert full_size((height, width), (stride, stride)) == tuple(module(torch.zeros(1, 3, height, width)).shape[-2:])


# --- reduce -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"resolution": 64},
        {"resolution": (64, 128)},
        {"resolution": 160},
        {"stem_scale": 0.5, "input_size": (3, 64, 128)},
        {"resolution": 64, "stem_scale": 0.5},
    ],
    ids=str,
)
def test_same_type_and_shapes_as_the_original(network, how):
    before = copy.deepcopy(network.state_dict())
    small = copy.deepcopy(reduce(network, **how))
    assert small.state_dict().keys() == before.keys()
    sizes = sizes_of(network) if "resolution" in how else [(64, 128)]
    for size in sizes:
        x = picture(size, 2)
        found, wanted = run(small, x), run(network, x)
        assert tree_map(shape, found) == tree_map(shape, wanted) and type(found) is type(wanted)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not network._forward_pre_hooks and not network._forward_hooks
    assert [c.kind for c in small.downres.changes][-1] == "logits upsample"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equal_to_doing_it_by_hand(network, interpolation):
    aligned = isinstance(network, smp.DeepLabV3Plus)
    small = reduce(network, resolution=(64, 96), output_interpolation=interpolation)
    for size in sizes_of(network):
        x = picture(size)
        wanted = logits_of(run(network, x)).shape[-2:]
        logits = logits_of(run(network, F.interpolate(x, size=(64, 96), mode="bilinear", antialias=True)))
        by_hand = F.interpolate(logits, size=wanted, mode=interpolation, align_corners=aligned)
        near(logits_of(run(small, x)), by_hand)


def test_auxiliary_logits_and_features_follow():
    torch.manual_seed(0)
    net = UNet(lambda logits, aux, features: {"logits": logits, "aux": [aux], "features": features, "loss": None}).eval()
    x = picture((97, 131))
    found = run(reduce(net, resolution=(48, 64)), x)
    by_hand = run(net, F.interpolate(x, size=(48, 64), mode="bilinear", antialias=True))
    near(found["logits"], F.interpolate(by_hand["logits"], size=(97, 131), mode="bilinear"))
    near(found["aux"][0], F.interpolate(by_hand["aux"][0], size=(25, 33), mode="bilinear"))  # stride 4
    near(found["features"], F.interpolate(by_hand["features"], size=(25, 33), mode="bilinear"))
    assert found["loss"] is None


def test_auxiliary_logits_of_torchvision():
    torch.manual_seed(0)
    net, x = torchvision(segmentation.deeplabv3_mobilenet_v3_large, aux_loss=True).eval(), picture((97, 131))
    found = run(reduce(net, resolution=(48, 64)), x)
    by_hand = run(net, F.interpolate(x, size=(48, 64), mode="bilinear", antialias=True))
    assert type(found) is type(by_hand) and list(found) == ["out", "aux"]
    for key, logits in found.items():
        near(logits, F.interpolate(by_hand[key], size=(97, 131), mode="bilinear"))


def test_hidden_states_are_no_logits():
    """transformers returns more where it is asked to; 4-D tensors among it stay as they are."""
    torch.manual_seed(0)
    net = segformer().eval()
    x = picture((96, 128))
    found = run(reduce(net, resolution=(48, 64)), x, output_hidden_states=True)
    by_hand = run(net, F.interpolate(x, size=(48, 64), mode="bilinear", antialias=True), output_hidden_states=True)
    assert found.logits.shape == (1, CLASSES, 24, 32)
    for a, b in zip(found.hidden_states, by_hand.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_a_dataclass_with_logits():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        score: float = 0.5

    torch.manual_seed(0)
    net = UNet(lambda logits, aux, features: Output(logits)).eval()
    found = run(reduce(net, resolution=32), picture((64, 96)))
    assert isinstance(found, Output) and found.logits.shape == (1, CLASSES, 64, 96) and found.score == 0.5


def test_keywords():
    torch.manual_seed(0)
    net, x = UNet().eval(), picture((80, 120))
    small = reduce(net, resolution=(40, 60))
    assert torch.equal(run(small, image=x, scale=2.0), run(small, x, 2.0))
    assert torch.equal(run(small, scale=2.0, image=x), 2 * run(small, x))
    transformer = segformer().eval()
    small = reduce(transformer, resolution=(40, 60))
    assert torch.equal(run(small, pixel_values=x).logits, run(small, x).logits)
    assert torch.equal(run(small, pixel_values=x, return_dict=False)[0], run(small, x).logits)


def test_gradients_reach_the_input():
    torch.manual_seed(0)
    small, x = reduce(UNet(), resolution=(24, 24)), picture((48, 48)).requires_grad_()
    F.cross_entropy(small(x), torch.zeros(1, 48, 48, dtype=torch.long)).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for n, p in small.named_parameters() if not n.startswith("aux"))


# --- maps of every type, in answers of every kind -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    mask: object
    score: float = 0.5


class Plain:
    """A class of the user's own, which holds itself."""

    def __init__(self, masks):
        self.masks, self.me = masks, self


class Many(list):
    pass


def fixed(logits):
    return F.adaptive_avg_pool2d(logits, 8)


ANSWERS = {
    "classes": lambda y, x: y.argmax(1),
    "classes, one channel": lambda y, x: y.argmax(1, keepdim=True),
    "bytes, channels last": lambda y, x: y.argmax(1)[..., None].to(torch.uint8),
    "a mask": lambda y, x: y[:, :1] > 0,
    "probability and mask": lambda y, x: (y[:, :1].sigmoid(), y[:, :1] > 0),
    "depth": lambda y, x: y[:, 0],
    "channels last": lambda y, x: y.permute(0, 2, 3, 1),
    "logits and a fixed map": lambda y, x: (y, fixed(y)),
    "a fixed map and logits": lambda y, x: {"small": fixed(y), "out": y},
    "a fixed map first": lambda y, x: (fixed(y), y),
    "a fixed map alone": lambda y, x: fixed(y),
    "channels last and a fixed one": lambda y, x: [y.permute(0, 2, 3, 1), fixed(y).permute(0, 2, 3, 1)],
    "tiles": lambda y, x: y.unflatten(1, (1, CLASSES)),
    "slots": lambda y, x: Slots(y),
    "a record that holds itself": lambda y, x: Plain(y.argmax(1)),
    "torch.max": lambda y, x: y.max(1),
    "nested": lambda y, x: Pair(y, {"deep": [y.argmax(1, keepdim=True), (y[:, 0], None, "text", 1, 2.5, torch.tensor(3))]}),
    "a list of another class": lambda y, x: Many([y, y[:, 0]]),
    "an array": lambda y, x: {"map": y.argmax(1).numpy(), "strides": [8, 16]},
}


def leaves(answer):
    """What is in an answer, in order, by looking at each kind as a user would."""
    if isinstance(answer, (Slots, Plain)):
        answer = [answer.mask, answer.score] if isinstance(answer, Slots) else [answer.masks]
    if isinstance(answer, dict):
        answer = list(answer.values())
    return [leaf for part in answer for leaf in leaves(part)] if isinstance(answer, (list, tuple)) else [answer]


@pytest.mark.parametrize("how", [{"resolution": (32, 48)}, {"stem_scale": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ANSWERS)
def test_every_map_gets_its_size_and_keeps_its_type(kind, how):
    torch.manual_seed(0)
    answer = ANSWERS[kind]

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, CLASSES, 1)

        def forward(self, x):
            features = self.down(x).relu()
            return answer(F.interpolate(self.head(features), size=x.shape[-2:], mode="bilinear"), x)

    net, x = Small().eval(), picture((64, 96), 2)
    small = reduce(net, input_size=(3, 64, 96), **how)
    wanted, found = run(net, x), run(small, x)
    assert type(found) is type(wanted)
    if "resolution" in how:
        inside = leaves(run(net, F.interpolate(x, size=(32, 48), mode="bilinear", antialias=True)))
    else:
        inside = [None] * len(leaves(wanted))
    for mine, theirs, before in zip(leaves(found), leaves(wanted), inside, strict=True):
        assert type(mine) is type(theirs)
        if not hasattr(theirs, "shape"):
            assert mine == theirs
            continue
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if before is None:
            continue
        mine, before = torch.as_tensor(mine), torch.as_tensor(before)
        if mine.shape == before.shape:
            assert torch.equal(mine, before)
        elif mine.is_floating_point():
            last = mine.shape[-1] == CLASSES
            planes = before.movedim(-1, 1) if last else before[:, None] if before.ndim == 3 else before
            tiles = planes.reshape(2, -1, 32, 48)
            grown = F.interpolate(tiles, size=(64, 96), mode="bilinear").reshape(*planes.shape[:-2], 64, 96)
            near(mine, grown.movedim(1, -1) if last else grown.reshape(mine.shape))
        else:  # every value is that of the cell it falls into
            axis = 1 if mine.shape[-1] == 96 and mine.ndim == 3 or mine.shape[-1] == 1 else 2
            assert torch.equal(mine, before.repeat_interleave(2, axis).repeat_interleave(2, axis + 1))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda y, x: y.argmax(1).tolist(), r"returns as '0\.0' \(96,\) and, reduced to '32x48', \(48,\)"),
        (lambda y, x: [{"boxes": x.new_zeros(0, 4), "scores": x.new_zeros(0)}], "'0.boxes' of what it finds in pixels"),
        (
            lambda y, x: [{"boxes": x.new_zeros(1, 4)}],  # one thing in one image
            "'0.boxes' of what it finds in pixels of what it sees: give resize_input",
        ),
        (
            lambda y, x: [{"boxes": x.new_zeros(7, 4)}],
            "'0.boxes' of what it finds in pixels of what it sees: give resize_input",
        ),
        (lambda y, x: y.flatten(2).transpose(1, 2), r"\(1, 6144, 5\) and, reduced to '32x48', \(1, 1536, 5\), which is no map"),
        (lambda y, x: {"flow": y[:, :2]}, "'flow' .* holds lengths in pixels of what it sees"),
    ],
)
def test_what_cannot_be_brought_back_is_refused(answer, says):
    net = nn.Conv2d(3, CLASSES, 1)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return answer(self.net(x), x)

    with pytest.raises(DownresError, match=says):
        reduce(Whole().eval(), resolution=(32, 48), input_size=(3, 64, 96))


@pytest.mark.parametrize(
    ("part", "takes", "channels", "refused"),
    [
        ("flow_head", 3, 2, True), ("predict_flow", 6, 2, True), ("disparity", 3, 1, True),
        ("flow_head", 3, 5, False), ("overflow", 3, 2, False),
        ("flow_make", None, 2, False),  # of one image: SFNet's, whose maps are logits
    ],
)  # fmt: skip
def test_displacements_without_a_name_are_known_by_the_part_that_computes_them(part, takes, channels, refused):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(part, nn.Conv2d(takes or 3, channels, 1))

        def give(self, x):
            return [self.get_submodule(part)(x)]

    class Pair(Whole):
        def forward(self, left, right):
            return self.give(left + right)

    class One(Whole):
        def forward(self, x):
            return self.give(x)

    net, size = (Pair if takes == 3 else One)().eval(), (takes or 3, 64, 96)
    if refused:
        with pytest.raises(DownresError, match="holds lengths in pixels of what it sees: give resize_input=False"):
            reduce(net, resolution=(32, 48), input_size=size)
    else:
        small = reduce(net, resolution=(32, 48), input_size=size)
        given = [torch.rand(1, *size)] * (2 if takes == 3 else 1)
        assert small(*given)[0].shape == (1, channels, 64, 96)


def test_boxes_that_follow_no_size_are_kept():
    """As DETR gives them: a row for each query of each image, as shares of the image."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 40, 3, 2)

        def forward(self, x):
            return {"pred_boxes": self.net(x).mean((2, 3)).unflatten(1, (10, 4)).sigmoid()}

    assert run(reduce(Queries().eval(), resolution=32), picture((64, 64)))["pred_boxes"].shape == (1, 10, 4)


# --- align_corners and the size of the answer ---------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("given", [None, False, True])
def test_align_corners_as_the_network_does_it(inside, given):
    torch.manual_seed(0)
    net, x = UNet(align_corners=inside).eval(), picture((72, 100))
    small = reduce(net, resolution=(36, 52), align_corners=given)
    aligned = inside if given is None else given
    logits = run(net, F.interpolate(x, size=(36, 52), mode="bilinear", antialias=True))
    near(run(small, x), F.interpolate(logits, size=(72, 100), mode="bilinear", align_corners=aligned))
    assert str(small.downres.changes[-1]).endswith(f"align_corners={aligned}")


def test_output_size():
    torch.manual_seed(0)
    net, x = segformer().eval(), picture((96, 160))
    quarter = run(reduce(net, resolution=(48, 80)), x).logits
    assert quarter.shape[-2:] == (24, 40)
    inside = run(net, F.interpolate(x, size=(48, 80), mode="bilinear", antialias=True)).logits
    for asked, size in (("input", (96, 160)), ((90, 150), (90, 150)), ((12, 20), (12, 20))):
        found = run(reduce(net, resolution=(48, 80), output_size=asked), x).logits
        near(found, F.interpolate(inside, size=size, mode="bilinear"))
    with pytest.raises(DownresError, match="10x20 is below the 12x20 that the network gives: name the labels' own size"):
        run(reduce(net, resolution=(48, 80), output_size=(10, 20)), x)
    # Nothing but the answer changes, and that is a change.
    with warnings.catch_warnings(action="error"):
        full = reduce(net, output_size="input")
    near(run(full, x).logits, F.interpolate(run(net, x).logits, size=(96, 160), mode="bilinear"))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"output_size": "label"}, "The size of logits is 'input' or .height, width., 'label' is neither"),
        (
            {"output_interpolation": "nearest"},
            "Logits are upsampled by bilinear or bicubic interpolation, 'nearest' is neither",
        ),
    ],
)
def test_answers_that_there_are_not(how, says):
    with pytest.raises(DownresError, match=says):
        reduce(UNet(), resolution=32, **how)


def test_classifiers_get_no_hook():
    net = timm.create_model("resnet10t", num_classes=4).eval()
    small = reduce(net, resolution=64)
    assert len(small._forward_hooks) == 0 and len(small._forward_pre_hooks) == 1
    with pytest.raises(
        DownresError, match="Only logits for every pixel .* have a size, ResNet returns none: leave output_size"
    ):
        reduce(net, resolution=64, output_size=(64, 64))


def test_neither_cut_nor_padded():
    with pytest.raises(DownresError, match="An answer to every pixel needs an input that is neither cut nor padded"):
        reduce(UNet().eval(), resolution=50, ragged="floor")


# --- graphs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RegSeg", "own"])
def test_compiled_and_exported(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = regseg("exp48_decoder26", CLASSES, width=0.25, depth=0.1) if name == "RegSeg" else NETWORKS[name]()
    small, x = reduce(network.eval(), resolution=(32, 64), stem_scale=0.5), picture((64, 128))
    expected = run(small, x)
    compiled = run(torch.compile(small, fullgraph=True, backend="eager"), x)
    with torch.no_grad():
        exported = torch.export.export(small, (x,)).module()(x)
    assert tree_map(shape, expected) == tree_map(shape, compiled) == tree_map(shape, exported)
    assert torch.equal(logits_of(expected), logits_of(compiled)) and torch.equal(logits_of(expected), logits_of(exported))


# --- Segmenter ----------------------------------------------------------------------------------------------------


def test_segmenter(network):
    x = picture((64, 96))
    logits = logits_of(run(network, x))
    aligned = isinstance(network, smp.DeepLabV3Plus)
    expected = F.interpolate(logits, size=(120, 200), mode="bicubic", align_corners=aligned)
    whole = Segmenter(network, Dense((120, 200), "logits", "bicubic", aligned)).eval()
    classes = Segmenter(network, Dense((120, 200), "classes", "bicubic", aligned)).eval()
    near(run(whole, x), expected)
    assert torch.equal(run(classes, x).long(), run(whole, x).argmax(1))


def test_segmenter_compiled():
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = NETWORKS["own"]().eval(), picture((64, 96))
    for output in ("logits", "classes"):
        segmenter = Segmenter(net, Dense((100, 150), output)).eval()
        assert torch.equal(run(torch.compile(segmenter, fullgraph=True, backend="eager"), x), run(segmenter, x))


def test_segmenter_of_what_cannot_be():
    with pytest.raises(DownresError, match=r"returns logits \(batch, classes, height, width\), this one returns \(1, 4\)"):
        run(Segmenter(timm.create_model("resnet10t", num_classes=4).eval(), Dense((64, 64))), picture((64, 64)))
    with pytest.raises(DownresError, match="64x95 is below the 64x96 that the network gives"):
        run(Segmenter(UNet(), Dense((64, 95))), picture((64, 96)))


def live_bytes(model, x):
    """The most that PyTorch's allocator holds at a time during a real pass, the input included."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(x)
    live = peak = x.nbytes
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_with_and_without_all_logits():
    """19 classes at 1024x2048 in float32 are 159 MB: the plain road holds them, the class map never more than a few planes."""

    class Stub(nn.Module):  # logits at 1/8 of the labels, of next to no memory themselves
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 19, 1)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    net, x, size = Stub().eval(), picture((128, 256)), (1024, 2048)
    plane = 4 * 1024 * 2048
    assert 19 * plane == 159_383_552
    whole, classes = (Segmenter(net, Dense(size, output)).eval() for output in ("logits", "classes"))
    plain = measure_cost(whole, (3, 128, 256)).peak_activation_bytes
    assert plain == 19 * plane + 19 * 4 * 128 * 256  # the small logits are there until all are upsampled
    assert live_bytes(whole, x) == pytest.approx(plain, rel=0.01)
    frugal = measure_cost(classes, (3, 128, 256)).peak_activation_bytes
    assert live_bytes(classes, x) == pytest.approx(frugal, rel=0.05)
    assert frugal < 4 * plane < plain / 4
    # Each value costs its four taps on either road.
    assert measure_cost(classes, (3, 128, 256)).macs == measure_cost(whole, (3, 128, 256)).macs
