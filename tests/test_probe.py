"""Heads, logits and input sizes of real networks."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn

from downres.errors import DownresError
from downres.probe import find_head, input_size_of, logits_of


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
    "after the head": (lambda: Wrapped(lambda out, aux, features: out.softmax(1)), SMALL, (None, 4, 4)),
    "no linear layer": (lambda: Wrapped(lambda out, aux, features: features), SMALL, (None, 6, 6)),
    "the model itself": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2), ("1", 12, 2)),
}


@pytest.mark.parametrize("name", HEADS)
def test_find_head(name):
    torch.manual_seed(0)
    make, size, expected = HEADS[name]
    model = make().train()
    keys, hooks = list(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    assert find_head(model, size) == expected
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


def test_find_head_says_what_is_wrong():
    maps = nn.Conv2d(3, 8, 3)
    with pytest.raises(DownresError, match=r"^A classifier returns logits .*, this model returns \(1, 8, 62, 62\): give"):
        find_head(maps, SMALL)
    with pytest.raises(DownresError, match="^A classifier returns logits .*, this model returns dict: give"):
        find_head(Wrapped(lambda out, aux, features: {"boxes": out}), SMALL)
    with pytest.raises(DownresError, match="does not run on an input of 1x1x64x64"):
        find_head(maps, (1, 64, 64))


def test_logits_of():
    logits, other = torch.rand(2, 5), torch.rand(2, 9)
    named = type("Named", (dict,), {"logits": logits})()
    for output in (logits, {"logits": logits, "a": other}, {"out": logits}, (logits, other), [logits], named):
        assert logits_of(output) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    for output in (torch.rand(5), torch.rand(2, 5, 3, 3), {}, {"a": logits}, (), [], None, "text", (None, logits)):
        with pytest.raises(DownresError, match=r"logits of shape \(batch, classes\), this model returns .*: give another"):
            logits_of(output)


def test_input_size_of():
    assert input_size_of(timm.create_model("resnet18")) == (3, 224, 224)
    assert input_size_of(timm.create_model("test_vit")) == (3, 160, 160)
    assert input_size_of(torchvision.models.squeezenet1_1()) == (3, 224, 224)
    net = nn.Conv2d(3, 4, 3)
    for config in ({"input_size": (1, 28, 30)}, {"input_size": [1, 28, 30]}):
        net.pretrained_cfg = config
        assert input_size_of(net) == (1, 28, 30)
    for config in ({}, {"input_size": None}, None):
        net.pretrained_cfg = config
        assert input_size_of(net) == (3, 224, 224)
