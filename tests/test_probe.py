"""Heads, logits and input sizes of real networks."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn

from downres.copying import copied
from downres.errors import DownresError
from downres.probe import Answer, find_answer, input_size_of, logits_of


class Wrapped(nn.Module):
    """A small classifier that returns its logits in some wrapping."""

    def __init__(self, wrap, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.aux = nn.Linear(6, classes)
        self.out = nn.Linear(6, classes)
        self.wrap = wrap

    def forward(self, x):
        features = self.body(x)
        return self.wrap(self.out(features), self.aux(features), features)


SMALL = (3, 64, 64)
HEADS = {
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=7), SMALL, ("fc", 512, 7)),
    "timm mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=7), SMALL, ("classifier", 1024, 7)),
    "timm convnext": (lambda: timm.create_model("convnext_atto", num_classes=7), SMALL, ("head.fc", 320, 7)),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), (3, 224, 224), ("head", 192, 1000)),
    "timm without a head": (lambda: timm.create_model("resnet18", num_classes=0), SMALL, (None, 512, 512)),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=7), SMALL, ("fc", 512, 7)),
    "torchvision mobilenet": (lambda: torchvision.models.mobilenet_v3_small(), SMALL, ("classifier.3", 1024, 1000)),
    "torchvision squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=7), SMALL, (None, 7, 7)),
    "tensor": (lambda: Wrapped(lambda out, aux, features: out), SMALL, ("out", 6, 4)),
    "dictionary": (lambda: Wrapped(lambda out, aux, features: {"features": features, "logits": out}), SMALL, ("out", 6, 4)),
    "attribute": (lambda: Wrapped(lambda out, aux, features: SimpleNamespace(logits=out)), SMALL, ("out", 6, 4)),
    "tuple": (lambda: Wrapped(lambda out, aux, features: (out, aux)), SMALL, ("out", 6, 4)),
    "two heads": (lambda: Wrapped(lambda out, aux, features: (out + aux) / 2), SMALL, (None, 4, 4)),
    "after the head": (lambda: Wrapped(lambda out, aux, features: out.softmax(1)), SMALL, (None, 4, 4, None, False, True)),
    "no linear layer": (lambda: Wrapped(lambda out, aux, features: features), SMALL, (None, 6, 6)),
    "the model itself": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2), ("1", 12, 2)),
}


@pytest.mark.parametrize("name", HEADS)
def test_find_answer_of_classifiers(name):
    torch.manual_seed(0)
    make, size, expected = HEADS[name]
    model = make().train()
    keys, hooks = list(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    assert find_answer(model, size) == Answer(*expected)
    assert list(model.state_dict()) == keys and sum(len(m._forward_hooks) for m in model.modules()) == hooks and model.training
    if expected[0] is None:
        return
    # The logits are that layer's: its input times its weight.
    model.eval()
    seen = {}
    model.get_submodule(expected[0]).register_forward_hook(lambda m, i, o: seen.update(x=i[0], m=m))
    with torch.no_grad():
        out = logits_of(model(torch.randn(2, *size)))
        assert seen["x"].shape == (2, expected[1]) and out.shape == (2, expected[2])
        torch.testing.assert_close(out, seen["x"] @ seen["m"].weight.T + seen["m"].bias)


class Dense(nn.Module):
    """A small segmentation network of stride 4 that returns its logits in some wrapping."""

    def __init__(self, wrap=lambda out, aux: out, align_corners=None, mode="bilinear", classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, classes, 3, 2, 1))
        self.aux, self.wrap, self.mode, self.align_corners = nn.Conv2d(classes, 9, 1), wrap, mode, align_corners

    def forward(self, x):
        out = self.body(x)
        if self.align_corners is not None:
            out = nn.functional.interpolate(out, x.shape[-2:], mode=self.mode, align_corners=self.align_corners)
        return self.wrap(out, self.aux(out))


DENSE = {
    "tensor": (Dense(), Answer(None, 5, 5, (16, 24))),
    "dictionary": (Dense(lambda out, aux: {"aux": aux, "out": out}), Answer(None, 5, 5, (16, 24))),
    "attribute": (Dense(lambda out, aux: SimpleNamespace(logits=out, states=aux)), Answer(None, 5, 5, (16, 24))),
    "tuple": (Dense(lambda out, aux: (out, aux)), Answer(None, 5, 5, (16, 24))),
    "its own upsampling": (Dense(align_corners=False), Answer(None, 5, 5, (64, 96))),
    "with aligned corners": (Dense(align_corners=True), Answer(None, 5, 5, (64, 96), True)),
    "bicubic with aligned corners": (Dense(align_corners=True, mode="bicubic"), Answer(None, 5, 5, (64, 96), True)),
}


@pytest.mark.parametrize("name", DENSE)
def test_find_answer_of_segmentation_networks(name):
    model, expected = DENSE[name]
    assert find_answer(model.train(), (3, 64, 96)) == expected
    assert model.training and not model._forward_hooks


def test_the_last_upsampling_decides_the_corners():
    class Twice(Dense):
        def forward(self, x):
            half = nn.functional.interpolate(super().forward(x), scale_factor=2, mode="bilinear", align_corners=True)
            return nn.functional.interpolate(half, x.shape[-2:], mode="bilinear", align_corners=False)

    assert find_answer(Twice(), (3, 64, 96)).align_corners is False


def test_a_network_of_torchvision_answers_for_every_pixel():
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    assert find_answer(model, (3, 64, 96)) == Answer(None, 7, 7, (64, 96), False)


def test_find_answer_says_what_is_wrong():
    volume = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Unflatten(1, (2, 4)))
    with pytest.raises(DownresError, match=r"^A classifier returns logits .*, this model returns \(1, 2, 4, 62, 62\): give"):
        find_answer(volume, SMALL)
    with pytest.raises(DownresError, match="^A classifier returns logits .*, this model returns dict: give"):
        find_answer(Wrapped(lambda out, aux, features: {"boxes": out}), SMALL)
    with pytest.raises(DownresError, match="does not run on an input of 1x1x64x64"):
        find_answer(Dense(), (1, 64, 64))


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3, 4)])
def test_logits_of(shape):
    logits, other = torch.rand(shape), torch.rand(2, 9)
    named = type("Named", (dict,), {"logits": logits})()
    for output in (logits, {"logits": logits, "a": other}, {"out": logits}, (logits, other), [logits], named):
        assert logits_of(output) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits


def test_what_holds_no_logits():
    logits = torch.rand(2, 5)
    for output in (torch.rand(5), torch.rand(2, 5, 3), {}, {"a": logits}, (), [], None, "text", (None, logits)):
        with pytest.raises(DownresError, match=r"logits of shape \(batch, classes\), .* this model returns .*: give another"):
            logits_of(output)


def test_input_size_of():
    assert input_size_of(timm.create_model("resnet18")) == (3, 224, 224)
    assert input_size_of(timm.create_model("test_vit")) == (3, 160, 160)
    assert input_size_of(torchvision.models.squeezenet1_1()) == (3, 224, 224)
    net = nn.Conv2d(1, 4, 3)
    for config in ({"input_size": (1, 28, 30)}, {"input_size": [1, 28, 30]}):
        net.pretrained_cfg = config
        assert input_size_of(net) == (1, 28, 30)
    for config in ({}, {"input_size": None}, None, {"input_size": (3, 224, 224)}):
        net.pretrained_cfg = config
        assert input_size_of(net) == (1, 224, 224)  # the first convolution knows


class OwnCopy(nn.Module):
    def __deepcopy__(self, memo):
        return OwnCopy()


def test_a_copy_by_hand_is_deepcopys():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MultiheadAttention(4, 2))
    model = nn.ModuleDict({"a": inner, "b": inner, "own": OwnCopy()})
    model.options, model.loop, model.sizes = {"x": [1, {2}, (3, [4])]}, [model], {7, 8}
    made = copied(model)
    assert made["a"] is made["b"] and made["a"] is not inner and made.loop[0] is made
    assert made.options == model.options and made.options["x"][2][1] is not model.options["x"][2][1]
    assert made.sizes == model.sizes and made.sizes is not model.sizes
    assert made["own"] is not model["own"] and str(made) == str(model) and made.training
    assert all(torch.equal(a, b) and a is not b for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert made.state_dict().keys() == model.state_dict().keys()
    assert vars(made["a"][0]).keys() == vars(inner[0]).keys()
