"""MODEL as `transformers:…`: folders, configurations, model types and the hub, with no network; and their preprocessing."""

import ast
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SegformerForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

import downres
from downres.errors import DownresError
from downres.families import load_model
from downres.families import transformers as family
from downres.families.find import find_adapter
from downres.images.preprocess import preprocess
from downres.records import Preprocessing

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
ASSUMED = "assumed: ImageNet's mean and std, crop ratio 0.875; 32 px by the configuration"


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**TINY)).eval()


@pytest.fixture
def folder(vit, tmp_path):
    vit.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def same(module, other):
    return module.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(v, other.state_dict()[k]) for k, v in module.state_dict().items()
    )


def fails(says, *args, **how):
    with pytest.raises(DownresError, match=says) as caught:
        load_model(*args, **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- where a model comes from -------------------------------------------------------------------------------------


def test_folder(vit, folder, monkeypatch):
    model = load_model(f"transformers:{folder}")
    assert same(model.module, vit) and not model.module.training and isinstance(model.module, ViTForImageClassification)
    assert (model.weights, model.num_classes) == ("the pretrained weights", None)
    assert model.preprocessing == Preprocessing(32, 0.875, source=ASSUMED)
    monkeypatch.chdir(folder.parent)
    relative = load_model("transformers:net")
    assert relative.spec == model.spec == f"transformers:{folder.resolve()}"
    assert relative.fingerprint() == model.fingerprint()
    for how in ({}, {"num_classes": 5}):  # what an artifact does before it loads its own weights
        again = load_model(model.spec, pretrained=False, **how)
        assert not same(again.module, vit) and again.module.state_dict().keys() == vit.state_dict().keys()
        again.module.load_state_dict(vit.state_dict())


def test_names_that_older_versions_stored(vit, folder):
    """What save_pretrained writes is not what the module says: only the library knows how the two belong together."""
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() != vit.state_dict().keys()
    assert same(load_model(f"transformers:{folder}/config.json", folder / "model.safetensors").module, vit)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_bring_their_number_of_classes(tmp_path, folder, wrapped):
    torch.manual_seed(1)
    trained = ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 7})).eval()
    file = tmp_path / "w.pth"
    torch.save({"model": trained.state_dict()} if wrapped else trained.state_dict(), file)
    for how in ({}, {"num_classes": 3}):
        model = load_model(f"transformers:{folder}", file, **how)
        assert same(model.module, trained) and model.num_classes == 7 and model.weights == "w.pth, matched by name"


def test_another_number_of_classes(vit, folder):
    model = load_model(f"transformers:{folder}", num_classes=3)
    assert model.module.classifier.out_features == model.num_classes == 3
    assert model.weights == "the pretrained weights, no head among them: drawn anew, to be fitted"
    assert torch.equal(model.module.vit.layernorm.weight, vit.vit.layernorm.weight)
    assert load_model(f"transformers:{folder}", num_classes=3, pretrained=False).module.config.num_labels == 3


def test_an_encoder_without_head(tmp_path):
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(**TINY)).eval()
    encoder.save_pretrained(tmp_path)
    model = load_model(f"transformers:{tmp_path}")
    assert model.weights.endswith("no head among them: drawn anew, to be fitted")
    ours = model.module.vit.state_dict()
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in ours.items())


def test_half_precision_is_loaded_in_float32(vit, tmp_path):
    vit.half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    for how in ({}, {"pretrained": False}):
        assert {p.dtype for p in load_model(f"transformers:{tmp_path}", **how).module.parameters()} == {torch.float32}
    loaded = load_model(f"transformers:{tmp_path}").module
    assert same(loaded, vit.float())


def test_configuration_alone(folder):
    file = folder / "config.json"
    model = load_model(f"transformers:{file}", pretrained=False)
    assert model.weights == "as the module came" and model.module.config.num_labels == 5
    assert model.spec == f"transformers:{file.resolve()}"
    fails("config.json is a configuration without weights: give a folder that has both, or a file", f"transformers:{file}")


def test_model_type():
    model = load_model("transformers:segformer", pretrained=False, num_classes=7)
    assert isinstance(model.module, SegformerForImageClassification) and model.spec == "transformers:segformer"
    assert model.module.classifier.out_features == 7 and model.preprocessing.resolution == 224
    fails("transformers:segformer is a configuration without weights", "transformers:segformer")


def test_hub(monkeypatch, vit):
    """A repository's name goes to from_pretrained, with code of the repository's own refused."""
    asked = []

    def configuration(name, **how):
        asked.append((name, how))
        return ViTConfig(**TINY)

    def weights(name, **how):
        asked.append((name, how))
        return vit, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(AutoConfig, "from_pretrained", configuration)
    monkeypatch.setattr(ViTForImageClassification, "from_pretrained", weights)
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lambda *a, **k: 1 / 0)
    model = load_model("transformers:org/net-1.0_x")
    assert model.module is vit and model.spec == "transformers:org/net-1.0_x"
    assert [name for name, _ in asked] == ["org/net-1.0_x"] * 2
    assert asked[0][1]["trust_remote_code"] is False and "trust_remote_code" not in asked[1][1]


@pytest.mark.parametrize(
    "error", [OSError("We couldn't connect to the hub\nand 40 more lines"), RuntimeError(), ValueError("x" * 4000)]
)
def test_no_network(monkeypatch, error):
    def no(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", no)
    says = r"^The configuration of transformers:org/net could not be fetched, and there is no such folder \(.*\): give a folder"
    fails(says, "transformers:org/net")
    fails(says, "transformers:org/net", pretrained=False)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: ViTConfig(**TINY))
    monkeypatch.setattr(ViTForImageClassification, "from_pretrained", no)
    fails(
        r"^The pretrained weights of transformers:org/net could not be fetched \(.*\): give a file with `weights`\.$",
        "transformers:org/net",
    )


def test_no_code_of_a_folder_is_run(folder, tmp_path):
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    edit(folder / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForImageClassification": "own.M"})
    assert isinstance(load_model(f"transformers:{folder}").module, ViTForImageClassification)
    edit(folder / "config.json", model_type="own")
    fails(r"The configuration of transformers:.* cannot be read \(.*\): correct its config.json", f"transformers:{folder}")
    assert not (tmp_path / "ran").exists()


# --- what cannot be loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("vti", "transformers has no classifier or segmentation network 'vti', and there is no such folder: did you mean vit"),
        ("segfromer", "did you mean segformer"),
        ("bert", "transformers has no classifier or segmentation network 'bert'"),
        ("zzzzz", "give a folder with config.json, a hub name org/name, or for example vit"),
        (
            "/no/such/folder",
            "transformers has no classifier or segmentation network '/no/such/folder', and there is no such folder",
        ),
    ],
)
def test_unknown_names(spec, says):
    for pretrained in (True, False):
        fails(says, f"transformers:{spec}", pretrained=pretrained)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{bad", r"cannot be read \(It looks like the config file .*\): correct its config.json"),
        ("{}", r"cannot be read \(Unrecognized model .*\): correct"),
        ('{"model_type": "vit", "hidden_size": "wide"}', r"cannot be read \(.*'hidden_size'.*\): correct"),
        (
            '{"model_type": "bert"}',
            "transformers has no classifier or segmentation network 'bert', in the configuration of .*: did you mean",
        ),
        (
            '{"model_type": "siglip_vision_model"}',
            "has no classifier or segmentation network 'siglip_vision_model'.*did you mean siglip",
        ),
    ],
)
def test_broken_configurations(folder, text, says):
    (folder / "config.json").write_text(text)
    fails(says, f"transformers:{folder}")
    fails(says, f"transformers:{folder / 'config.json'}", pretrained=False)
    (folder / "config.json").unlink()
    fails("The folder .*net has no config.json: give one that save_pretrained", f"transformers:{folder}")


def test_broken_weights(folder, vit):
    file = folder / "model.safetensors"
    file.write_bytes(b"nonsense")
    fails("model.safetensors is not a readable checkpoint", f"transformers:{folder}")
    file.unlink()
    fails(r"The weights of transformers:.* cannot be loaded \(.*\): save them again", f"transformers:{folder}")
    torch.save(vit.state_dict(), folder / "pytorch_model.bin")
    assert same(load_model(f"transformers:{folder}").module, vit)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Runs()}))
    fails("could run code that is stored in it, so it was refused", f"transformers:{folder}")
    assert not Runs.ran


class Runs:
    ran = False

    def __reduce__(self):
        return setattr, (Runs, "ran", True)


def test_weights_of_another_network(folder, tmp_path):
    file = tmp_path / "w.safetensors"
    spec = f"transformers:{folder}"
    for config, says in (
        (
            {"num_hidden_layers": 3},
            r"another network than .* \(vit.layers.2.\S+ in the file has no place in it\): check",
        ),
        ({"num_hidden_layers": 1}, r"another network than .* \(vit.layers.1.\S+ is not in the file\): check"),
        (
            {"hidden_size": 32},
            r"The weights have shape \(.*\) at \S+, the network \(.*\): the file belongs to another size",
        ),
    ):
        save_file(ViTForImageClassification(ViTConfig(**{**TINY, **config})).state_dict(), file)
        fails(says, spec, file)
    save_file(torch.nn.Conv2d(3, 3, 3).state_dict(), file)
    fails(r"another network than .*is not in the file", spec, file)
    # A decoder for another task is left out, a text tower would be too.
    save_file(ViTForMaskedImageModeling(ViTConfig(**TINY, encoder_stride=8)).state_dict(), file)
    assert load_model(spec, file).weights.endswith("no head among them: drawn anew, to be fitted")


def test_without_the_library(monkeypatch):
    monkeypatch.delitem(sys.modules, "downres.families.transformers")
    monkeypatch.delattr(downres.families, "transformers")
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    fails(r"transformers:vit needs the library transformers .*: pip install 'downres\[transformers\]'\.$", "transformers:vit")


def test_an_old_version_of_the_library(monkeypatch):
    import transformers

    for name in ("transformers", "transformers_vit"):
        monkeypatch.delitem(sys.modules, f"downres.families.{name}")
        monkeypatch.delattr(downres.families, name)
    monkeypatch.setattr(transformers, "__version__", "5.15.1")
    fails(r"needs the library transformers \(5.15.1 is installed, 5.21 is needed\): pip install", "transformers:vit")
    # Something else may need the old one: models of other libraries go on as if it were not there.
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert find_adapter(model) is None


def test_the_library_is_imported_only_when_asked_for():
    source = Path(downres.__file__).parent
    for file in source.rglob("*.py"):
        if file.name.startswith("transformers"):
            continue
        for node in ast.parse(file.read_text()).body:  # the top level alone: inside functions it is the plan
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any(part.startswith("transformers") for name in names for part in name.split(".")), file


# --- preprocessing ------------------------------------------------------------------------------------------------

SAID = "transformers image processor"
SQUASHED = "resized without keeping the aspect ratio there, by the short side here"
HALF = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (  # as the oldest files have it
            {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 32, "resample": 2, **HALF},
            Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, f"{SAID} ({SQUASHED})"),
        ),
        (
            {
                "image_processor_type": "BitImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": 36},
                "do_center_crop": True,
            }
            | {"crop_size": {"height": 32, "width": 32}, "resample": 3, **IMAGENET},
            Preprocessing(32, 32 / 36, "bicubic", source=SAID),
        ),
        (  # of another size than the network, which decides
            {
                "image_processor_type": "BitImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": 256},
                "do_center_crop": True,
            }
            | {"crop_size": {"height": 224, "width": 224}, "resample": 1, **IMAGENET},
            Preprocessing(
                32,
                0.875,
                "bicubic",
                source=f"{SAID} (size 224 not followed: the network takes 32; filter 1 not followed: bicubic)",
            ),
        ),
        (  # scaled to -1…1 without normalising
            {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False, "resample": 2}
            | {"do_rescale": True, "rescale_factor": 1 / 127.5},
            Preprocessing(32, 1.0, "bilinear", (0.0,) * 3, (1.0,) * 3, SAID, scale=1 / 127.5),
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.8, "resample": 3}
            | IMAGENET,
            Preprocessing(32, 0.8, "bicubic", source=SAID),
        ),
        (  # from 384 on without a crop
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.8, "resample": 3}
            | IMAGENET,
            Preprocessing(
                32,
                1.0,
                "bicubic",
                source=f"{SAID} (not cropped there, to the centre square here; size 384 not followed: the network takes 32)",
            ),
        ),
    ],
)
def test_image_processors(folder, stored, expected):
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    found = load_model(f"transformers:{folder}", pretrained=False).preprocessing
    assert found == expected
    assert load_model(f"transformers:{folder / 'config.json'}", pretrained=False).preprocessing == expected


def test_networks_of_any_size_follow_the_image_processor(tmp_path):
    """DINOv2: 518 px in its configuration, 224 in its image processor. ConvNeXt: none in its configuration to speak of."""
    dino = {k: v for k, v in TINY.items() if k != "intermediate_size"}
    Dinov2ForImageClassification(Dinov2Config(**{**dino, "image_size": 64})).save_pretrained(tmp_path / "d")
    ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(tmp_path / "c")
    stored = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 48}, "do_center_crop": True, "resample": 3}
    stored |= {"crop_size": {"height": 40, "width": 40}, **IMAGENET}
    for name in "dc":
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(stored))
        found = load_model(f"transformers:{tmp_path / name}").preprocessing
        assert (found.resolution, found.crop_ratio) == (40, 40 / 48)
    (tmp_path / "d" / "preprocessor_config.json").unlink()
    assert load_model(f"transformers:{tmp_path / 'd'}").preprocessing.resolution == 64


@pytest.mark.parametrize(
    "more",
    [
        {"image_processor_type": "BitImageProcessor", "do_rescale": True, **IMAGENET},
        {"image_processor_type": "BitImageProcessor", "do_rescale": False, "do_normalize": False},
        {"image_processor_type": "BitImageProcessor", "do_rescale": False, "do_normalize": True}
        | {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]},
        {"image_processor_type": "MobileViTImageProcessor", "do_rescale": True, "do_flip_channel_order": True},
        {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True, "rescale_factor": 1 / 127.5, **IMAGENET},
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": False, **IMAGENET},
    ],
    ids=["usual", "as they are", "0 to 255", "BGR", "EfficientNet with its offset", "EfficientNet without its top"],
)
def test_preprocessed_pixels_are_those_of_the_image_processor(folder, more):
    stored = {"do_resize": True, "size": {"shortest_edge": 36}, "resample": 3, **more}
    stored |= {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    picture = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"][0]
    p = load_model(f"transformers:{folder}").preprocessing
    ours = preprocess(picture, p)
    assert ours.shape == theirs.shape == (3, 32, 32)
    assert (ours - theirs).abs().max() <= 2.01 * p.scale / min(p.std)  # two levels
    assert theirs.float().std() > 20 * p.scale / max(p.std)  # which are little


def test_grey_images(tmp_path):
    ViTForImageClassification(ViTConfig(**TINY, num_channels=1)).save_pretrained(tmp_path)
    found = load_model(f"transformers:{tmp_path}").preprocessing
    assert (found.mean, found.std, found.resolution) == ((0.5,), (0.5,), 32)


def test_broken_image_processor(folder):
    (folder / "preprocessor_config.json").write_text("{bad")
    fails(r"The image processor in .*net cannot be read \(.*\): correct its preprocessor_config.json", f"transformers:{folder}")


def test_names():
    assert {"vit", "deit", "dinov2", "swin", "segformer", "siglip", "beit"} <= set(family.names())
    assert family.is_local(".") and not family.is_local("vit") and not family.is_local("no/such")
