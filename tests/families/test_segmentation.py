"""Segmentation networks by name: what is built, preprocessing, number of classes, and one sentence where it cannot be."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn
from transformers import (
    AutoImageProcessor,
    DPTConfig,
    DPTForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

import downres.families
from downres.errors import DownresError
from downres.families import load_model, with_preprocessing
from downres.families import smp as smp_family
from downres.families.find import find_adapter
from downres.images.preprocess import preprocess
from downres.models.regseg import RegSeg, regseg
from downres.records import Preprocessing
from downres.reduction import divided_by, reduce, takes_any_size

TINY = {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 1, 2], "decoder_hidden_size": 8}
UNTRAINED = {"pretrained": False}


def fails(says, *args, **kwargs):
    with pytest.raises(DownresError, match=says) as caught:
        load_model(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 420
    return str(caught.value)


def answer(model, size=(64, 96)):
    with torch.no_grad():
        return model.eval()(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)))


def segformer(classes=5, **how):
    config = SegformerConfig(**TINY, **how)
    config.num_labels = classes
    return SegformerForSemanticSegmentation(config).eval()


# --- RegSeg -------------------------------------------------------------------------------------------------------


def test_regseg():
    model = load_model("regseg:exp48_decoder26", **UNTRAINED)
    assert isinstance(model.module, RegSeg) and not model.module.training
    assert (model.spec, model.weights, model.num_classes) == ("regseg:exp48_decoder26", "as the module came", None)
    p = model.preprocessing
    assert (p.hw, p.fit, p.crop_ratio, p.interpolation) == ((1024, 2048), "stretch", 1.0, "bilinear")
    assert (p.mean, p.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert model.module.num_classes == 19
    assert model.fingerprint() == model.fingerprint() != load_model("regseg:exp48_decoder26", **UNTRAINED).fingerprint()


def test_regseg_with_options():
    spec = "regseg:exp53_decoder29,width=0.5,depth=0.5,group_width=8,num_classes=11"
    found, expected = load_model(spec, **UNTRAINED).module, regseg("exp53_decoder29", 11, width=0.5, depth=0.5, group_width=8)
    assert found.design == expected.design and found.num_classes == 11
    assert load_model("regseg:exp48_decoder26,num_classes=11", num_classes=3, **UNTRAINED).module.num_classes == 3
    assert load_model("regseg:exp48_decoder26, width = 0.5", **UNTRAINED).module.design.stem == 16


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exp48", "There is no RegSeg 'exp48': choose exp48_decoder26 or exp53_decoder29"),
        ("exp48_decoder26,widht=0.5", "are width, depth, group_width, num_classes, 'widht' is none: did you mean width"),
        ("exp48_decoder26,x=1", "'x' is none: give width=…, depth=…"),
        (
            "exp48_decoder26,width",
            "The option width of exp48_decoder26 is a number up to 16, '' is not",
        ),
        ("exp48_decoder26,width=wide", "'wide' is not: give for example width=0.5"),
        (
            "exp48_decoder26,group_width=0.5",
            "group_width of exp48_decoder26 is a whole number up to 1000000, '0.5' is not",
        ),
        ("exp48_decoder26,width=0.5,width=1", "'width' was given twice"),
        ("exp48_decoder26,width=-1", "Width and depth are factors above 0"),
        ("exp48_decoder26,num_classes=0", "A network has at least one class, 0 is too few"),
        ("", "Cannot read the model 'regseg:'"),
    ],
)
def test_regseg_that_is_none(name, says):
    fails(says, f"regseg:{name}", **UNTRAINED)
    fails(says, f"regseg:{name}")


def test_regseg_has_no_weights_to_be_fetched():
    fails("weights of regseg:exp48_decoder26 are not fetched: give the checkpoint with `weights`", "regseg:exp48_decoder26")


def test_a_checkpoint_brings_its_number_of_classes(tmp_path):
    """Also under "model", as the authors' training saves it, and from a parallel training."""
    torch.manual_seed(0)
    trained = regseg("exp48_decoder26", 7, width=0.25).eval()
    spec = "regseg:exp48_decoder26,width=0.25"
    for name, saved in (
        ("plain", trained.state_dict()),
        ("theirs", {"model": trained.state_dict(), "epoch": 3, "best_mIU": 0.5}),
        ("parallel", {"model": {f"module.{key}": value for key, value in trained.state_dict().items()}}),
    ):
        torch.save(saved, tmp_path / f"{name}.pth")
        model = load_model(spec, tmp_path / f"{name}.pth")
        assert model.num_classes == 7 and model.weights.startswith(f"{name}.pth, matched by name")
        assert torch.equal(answer(model.module), answer(trained))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"width": 0.5}, "stem.conv.weight has 16 channels, this network 32: give regseg:exp48_decoder26,width=0.5."),
        ({"width": 0.25}, "stem.conv.weight has 8 channels, this network 32: give regseg:exp48_decoder26,width=0.25."),
        ({"width": 0.375}, "has 12 channels, this network 32: give regseg:exp48_decoder26,width=0.375."),
        ({"width": 1 / 3}, "has 11 channels, this network 32: give regseg:exp48_decoder26,width=0.333."),
        ({"group_width": 8}, "conv2.weight has 8 channels a group, this network 16: give .*26,group_width=8."),
        ({"width": 0.5, "group_width": 16}, "has 16 channels, this network 32: give .*26,width=0.5,group_width=16."),
        ({"depth": 0.5}, "body.stage16.8.conv1.weight has 320 channels, this network 256: give .*26,depth=0.5."),
        ({"name": "exp53_decoder29", "width": 0.5}, "has 16 channels, .*: give regseg:exp53_decoder29,width=0.5."),
        ({"name": "exp53_decoder29"}, "give regseg:exp53_decoder29."),
    ],
    ids=str,
)
def test_weights_of_another_regseg_say_which(tmp_path, how, says):
    """The name that the error gives loads the file."""
    trained = regseg(num_classes=11, **how)
    torch.save({"model": trained.state_dict()}, tmp_path / "w.pth")
    text = fails(f"The weights are of another RegSeg, .*{says}$", "regseg:exp48_decoder26", tmp_path / "w.pth")
    model = load_model(text.rpartition("give ")[2][:-1], tmp_path / "w.pth")
    assert model.num_classes == 11 and model.module.state_dict().keys() == trained.state_dict().keys()


def test_weights_of_no_regseg(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    fails("The weights are for another network: .*check the model's name", "regseg:exp48_decoder26", tmp_path / "w.pth")


# --- torchvision --------------------------------------------------------------------------------------------------


def test_torchvision():
    model = load_model("torchvision:lraspp_mobilenet_v3_large", **UNTRAINED)
    assert isinstance(model.module, torchvision.models.segmentation.LRASPP)
    assert answer(model.module)["out"].shape == (1, 21, 64, 96)
    p = model.preprocessing
    assert (p.resolution, p.fit, p.crop_ratio, p.interpolation) == (520, "pad", 1.0, "bilinear")
    assert p.source == "torchvision weight transforms (520 px are the short side there, the longer one here)"
    theirs = torchvision.models.get_model_weights("lraspp_mobilenet_v3_large").DEFAULT.transforms()
    assert (list(p.mean), list(p.std), [p.resolution]) == (theirs.mean, theirs.std, theirs.resize_size)


def test_torchvision_pixels_are_those_of_its_transform():
    """Where the picture is square its short side is the longer one too."""
    p = load_model("torchvision:lraspp_mobilenet_v3_large", **UNTRAINED).preprocessing
    picture = torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = torchvision.models.get_model_weights("lraspp_mobilenet_v3_large").DEFAULT.transforms()(picture)
    assert (preprocess(picture.permute(1, 2, 0).numpy(), p) - theirs).abs().max() <= 2 / 255 / 0.224


@pytest.mark.parametrize("auxiliary", [False, True])
def test_torchvision_weights(tmp_path, auxiliary):
    """Auxiliary classifiers, which the published weights have too, are for training alone."""
    torch.manual_seed(0)
    build = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    trained = build(weights=None, weights_backbone=None, num_classes=6, aux_loss=auxiliary)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = load_model("torchvision:deeplabv3_mobilenet_v3_large", tmp_path / "w.pth")
    assert model.num_classes == 6
    assert torch.equal(answer(model.module)["out"], answer(trained)["out"]) and list(answer(model.module)) == ["out"]


def test_torchvision_pretrained(monkeypatch):
    torch.manual_seed(0)
    theirs = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict()
    asked = []
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda url, *a, **k: asked.append(url) or theirs)
    model = load_model("torchvision:lraspp_mobilenet_v3_large")
    assert all(torch.equal(value, theirs[key]) for key, value in model.module.state_dict().items())
    assert len(asked) == 1 and "lraspp" in asked[0]  # not those of its backbone too


def test_torchvision_names():
    fails(
        "torchvision has no model 'lraspp_mobilenetv3': did you mean lraspp_mobilenet_v3_large",
        "torchvision:lraspp_mobilenetv3",
    )


# --- segmentation_models_pytorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Unet/resnet18", smp.Unet),
        ("unet/resnet18,num_classes=4", smp.Unet),
        ("FPN/mobilenet_v2", smp.FPN),
        ("DeepLabV3Plus/mobilenet_v2", smp.DeepLabV3Plus),
        ("Segformer/mit_b0", smp.Segformer),
        ("UPerNet/tu-convnext_atto", smp.UPerNet),
    ],
)
def test_smp(name, kind):
    with torch.device("cpu" if "mit" in name else "meta"):
        model = load_model(f"smp:{name}", num_classes=None if "," in name else 4, **UNTRAINED)
    assert type(model.module) is kind and model.spec == f"smp:{name}" and not model.module.training
    device = next(model.module.parameters()).device
    assert model.module(torch.zeros(1, 3, 64, 96, device=device)).shape == (1, 4, 64, 96)
    p = model.preprocessing
    assert (p.hw, p.fit, p.crop_ratio) == ((512, 512), "pad", 1.0)
    assert takes_any_size(model.module)


def test_smp_preprocessing_is_that_of_the_encoder(monkeypatch, tmp_path):
    net = nn.Conv2d(3, 1, 1)
    found = smp_family.preprocessing(net, "FPN/tu-vit_tiny_patch16_224.augreg_in21k")
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (
        found.source == "segmentation_models_pytorch, of the encoder tu-vit_tiny_patch16_224.augreg_in21k (512x512 px assumed)"
    )
    stored = {"input_space": "BGR", "input_range": [0, 255], "mean": [102.0, 115.26, 127.5], "std": [1.0, 255.0, 51.0]}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(smp_family, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "config.json"))
    found = smp_family.preprocessing(net, "FPN/resnet18")
    assert (found.channel_order, found.scale, found.mean) == ("bgr", 1.0, (102.0, 115.26, 127.5))
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    theirs = smp.encoders.preprocess_input(picture, **stored)
    np.testing.assert_allclose(preprocess(picture, found).permute(1, 2, 0), theirs, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(smp_family, "try_to_load_from_cache", lambda *a, **k: None)
    assumed = smp_family.preprocessing(net, "FPN/resnet18")
    said = "assumed: ImageNet's mean and std, 512x512 px"
    assert assumed == Preprocessing(512, source=said, fit="pad", any_size=True)


def test_smp_weights(tmp_path):
    torch.manual_seed(0)
    trained = smp.FPN("mobilenet_v2", encoder_weights=None, classes=6).eval()
    torch.save({"state_dict": {f"model.{key}": value for key, value in trained.state_dict().items()}}, tmp_path / "w.pth")
    model = load_model("smp:FPN/mobilenet_v2", tmp_path / "w.pth")
    assert model.num_classes == 6 and torch.equal(answer(model.module), answer(trained))
    fails("The weights are for another network", "smp:Unet/mobilenet_v2", tmp_path / "w.pth")


def test_smp_pretrained(monkeypatch):
    asked, real = [], smp.create_model
    monkeypatch.setattr(smp, "create_model", lambda a, e, w, **how: asked.append((a, e, w, how)) or real(a, e, None, **how))
    model = load_model("smp:FPN/mobilenet_v2", num_classes=3)
    assert asked[-1] == ("FPN", "mobilenet_v2", "imagenet", {"classes": 3})
    assert model.weights == "the library's pretrained weights in the encoder, the decoder drawn anew"
    load_model("smp:FPN/tu-resnet10t")
    assert asked[-1][:3] == ("FPN", "tu-resnet10t", True)


def test_smp_without_network(monkeypatch):
    def no(*args, **kwargs):
        raise OSError("No route to host\nand 40 more lines")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", no)
    fails(
        r"^The pretrained weights of smp:FPN/mobilenet_v2 could not be fetched \(No route to host\): give a file",
        "smp:FPN/mobilenet_v2",
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "Unet",
            "smp has no model 'Unet': give ARCHITECTURE/ENCODER, of Unet, UnetPlusPlus, .*, for example smp:Unet/resnet34",
        ),
        ("Unit/resnet34", "smp has no architecture 'Unit': give ARCHITECTURE/ENCODER, of Unet"),
        ("Unet/resnet35", "smp has no encoder 'resnet35': did you mean resnet"),
        ("Unet/tu-convnext_tny", "smp has no encoder 'tu-convnext_tny': did you mean tu-convnext_tiny"),
        ("Unet/zzzzzzz", "smp has no encoder 'zzzzzzz': give for example smp:Unet/resnet34"),
        ("Unet/resnet18,classes=3", "The options of Unet/resnet18 are num_classes, 'classes' is none"),
        ("DPT/resnet18", r"smp:DPT/resnet18 cannot be built \(.*\): give another encoder"),
    ],
)
def test_smp_that_is_none(name, says):
    fails(says, f"smp:{name}", **UNTRAINED)


def test_without_smp(monkeypatch):
    monkeypatch.delitem(sys.modules, "downres.families.smp")
    monkeypatch.delattr(downres.families, "smp")
    for name in [n for n in sys.modules if n.partition(".")[0] == "segmentation_models_pytorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    fails(
        r"smp:Unet/resnet34 needs the library segmentation_models_pytorch .*: pip install 'downres\[smp\]'\.$",
        "smp:Unet/resnet34",
    )
    monkeypatch.delitem(sys.modules, "segmentation_models_pytorch")
    assert find_adapter(nn.Conv2d(3, 4, 3)) is None


def test_smp_networks_get_sides_that_they_divide():
    """One side given, the aspect ratio kept: both in multiples of the total stride, which these networks insist on."""
    net = smp.FPN("mobilenet_v2", encoder_weights=None, classes=4).eval()
    assert divided_by(net, (128, 128)) == (32, 32) and find_adapter(net).unit == (32, 32)
    small = reduce(net, resolution=64)
    for size in ((97, 131), (64, 200), (300, 300)):
        assert answer(small, size).shape == (1, 4, *size)
    with pytest.raises(
        DownresError, match=r"FPN cannot be made for '96x100' \(it fails with: Wrong input shape .* divisible by 32"
    ):
        reduce(net, resolution=(96, 100))
    # Behind the stem too: 64·0.7 = 44.8 of 64 rows would become 45, which the decoder cannot add up.
    scaled = reduce(net, stem_scale=0.7, input_size=(3, 128, 128))
    assert answer(scaled, (128, 128)).shape == (1, 4, 128, 128)
    assert "×0.75" in str(scaled.downres.changes[0])
    with pytest.raises(DownresError, match="The tokens of FPN can be neither merged nor pooled"):
        reduce(net, merge=8)


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    segformer().save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def test_transformers_folder(folder):
    """`architectures` in its configuration says what it is: the same model type has a classifier."""
    model = load_model(f"transformers:{folder}")
    torch.manual_seed(0)
    assert isinstance(model.module, SegformerForSemanticSegmentation)
    assert torch.equal(answer(model.module).logits, answer(segformer()).logits)
    assert model.weights == "the pretrained weights"
    assert (model.preprocessing.fit, model.preprocessing.crop_ratio) == ("stretch", 1.0)
    assert model.preprocessing.source.startswith("assumed: ImageNet's mean and std, stretched; 512 px")


def test_transformers_class_name():
    model = load_model("transformers:SegformerForSemanticSegmentation", num_classes=7, **UNTRAINED)
    assert isinstance(model.module, SegformerForSemanticSegmentation) and model.module.config.num_labels == 7
    assert isinstance(load_model("transformers:segformer", **UNTRAINED).module, SegformerForImageClassification)
    fails(
        "SegformerForSemanticSegmentation is a configuration without weights", "transformers:SegformerForSemanticSegmentation"
    )
    fails("no classifier or segmentation network 'SegformerForSemantics', .*did you mean", "transformers:SegformerForSemantics")
    fails(
        r"The network of transformers:BeitForSemanticSegmentation cannot be built \(.*\): give a folder",
        "transformers:BeitForSemanticSegmentation",
        **UNTRAINED,
    )


@pytest.mark.parametrize("classes", [5, 9])
def test_transformers_weights_bring_their_number_of_classes(folder, tmp_path, classes):
    trained = segformer(classes)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = load_model(f"transformers:{folder}", tmp_path / "w.pth")
    assert model.num_classes == classes and torch.equal(answer(model.module).logits, answer(trained).logits)
    assert "drawn anew" not in model.weights


def test_dpt_weights_bring_their_number_of_classes(tmp_path):
    """Its classifier has no such name, and its auxiliary head may be missing."""
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    DPTForSemanticSegmentation(config).save_pretrained(tmp_path / "net")
    config.num_labels = 9
    trained = DPTForSemanticSegmentation(config)
    weights = {key: value for key, value in trained.state_dict().items() if not key.startswith("auxiliary_head")}
    torch.save(weights, tmp_path / "w.pth")
    model = load_model(f"transformers:{tmp_path / 'net'}", tmp_path / "w.pth")
    assert model.num_classes == 9 and "drawn anew" not in model.weights
    assert torch.equal(answer(model.module, (64, 64)).logits, answer(trained, (64, 64)).logits)
    assert model.preprocessing.hw == (64, 64)


SEGFORMER = {"image_processor_type": "SegformerImageProcessor", "do_resize": True, "size": {"height": 512, "width": 1024}}
SEGFORMER |= {"resample": 2, "do_rescale": True, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}


@pytest.mark.parametrize(
    ("stored", "resolution", "notes"),
    [
        (SEGFORMER, (512, 1024), ""),
        (SEGFORMER | {"do_reduce_labels": True}, (512, 1024), "do_reduce_labels: its class 0 is .*"),
        (SEGFORMER | {"size": {"shortest_edge": 300}}, 300, "the aspect ratio kept there, stretched to 300 px here"),
        (SEGFORMER | {"do_resize": False}, 512, "not resized there, to 512 px here"),
        (
            SEGFORMER | {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 288}}
            | {"do_center_crop": True, "crop_size": {"height": 256, "width": 256}, "do_flip_channel_order": False},
            256,
            "the centre cropped there, the whole stretched here",
        ),
    ],
)  # fmt: skip
def test_image_processors(folder, stored, resolution, notes):
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    found = load_model(f"transformers:{folder}", **UNTRAINED).preprocessing
    assert (found.resolution, found.fit, found.crop_ratio, found.interpolation) == (resolution, "stretch", 1.0, "bilinear")
    assert re.fullmatch("transformers image processor" + (rf" \({notes}\)" if notes else ""), found.source)
    if stored["image_processor_type"].startswith("Segformer"):
        assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.2,) * 3)


def test_pixels_are_those_of_the_image_processor(folder):
    stored = SEGFORMER | {"size": {"height": 64, "width": 96}, "rescale_factor": 1 / 127.5}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    picture = torch.randint(0, 256, (150, 131, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    theirs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"][0]
    ours = preprocess(picture, load_model(f"transformers:{folder}").preprocessing)
    assert ours.shape == theirs.shape == (3, 64, 96)
    assert (ours - theirs).abs().max() <= 2 / 127.5 / 0.2 + 1e-5  # two levels


# --- what the user gives ------------------------------------------------------------------------------------------


def test_fit_given():
    model = load_model("regseg:exp48_decoder26", **UNTRAINED)
    given = with_preprocessing(model, resolution=(360, 480), fit="pad").preprocessing
    assert (given.hw, given.fit) == ((360, 480), "pad") and given.source.endswith("; resolution, fit given")
    with pytest.raises(DownresError, match="A picture is fitted by crop, stretch, pad; 'squash' is none of them"):
        with_preprocessing(model, fit="squash")
    assert with_preprocessing(SimpleNamespace(), fit=None) is not None
