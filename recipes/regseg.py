"""RegSeg trained from scratch on street scenes, after Gao 2021 (arXiv 2111.09957) and Morlier et al. 2025 (sec. IV-B).

    python recipes/regseg.py --data ../shared/data/camvid --size 360x480 --epochs 45 --bf16 --ema 0.998 --out runs/regseg
    python recipes/regseg.py --data /data/cityscapes --size 1024x2048 --crop 1024x1024 --epochs 1000 --workers 8 --out runs/cs
    REGSEG_RUN=runs/regseg downres search recipes/regseg.py:trained --data ../shared/data/camvid

Random scale (0.4 to 1.56 of the size), crop, flip, class-uniform sampling of half of each epoch, reduced RandAugment, SGD with
a poly schedule and warm-up, an exponential moving average of the weights if wanted. `--size` is the resolution that the network
is trained for: pictures of the data are brought to it (times the random scale) and so are their masks. Any other network that
returns logits is trained in the same way with `--model` (see camvid_smp.py).

After every epoch everything is saved: the same command goes on from there, and on a CPU ends with the very same weights as
one that was never interrupted. What is written: model.safetensors (the weights after the last epoch, averaged with --ema) and
training.json (every option, hours, device, versions).

Expected time: 45 epochs of CamVid's 367 images at 360×480 take 25 minutes on one core of an AMD EPYC with bfloat16 (--bf16),
at 180×240 seven. Expected result: about 56 mIoU on its 101 validation images at 360×480, 50 at 180×240 (README.md),
with poles and signs not learnt yet. On Cityscapes 1000 epochs should give the paper's 78; that was not run here.
"""

import argparse
import json
import os
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as v2

from downres import DownresError, load_model
from downres.environment import versions
from downres.images.decode import Unreadable, decode
from downres.models.regseg import regseg
from downres.probe import logits_of
from downres.reductions.dense import upsample
from downres.tasks.segmentation.masks import IGNORE, MaskFolder, Pair, find_masks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALES = (0.4, 1.56)
"""Of the random resize, relative to the size: 400 to 1600 for 1024 px in the papers."""
CROP = 0.8
"""Side of the crop relative to the size, unless given."""
SMALLEST = 64
"""Pixels that a class needs in an image for the image to be sampled for it."""


class Crops(Dataset):
    """Sample i of epoch e is a function of (seed, e, i) alone: no order of workers and no interruption changes it."""

    def __init__(
        self, found: MaskFolder, size: tuple[int, int], crop: tuple[int, int], uniform: float, seed: int,
        mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD,
    ) -> None:  # fmt: skip
        self.pairs, self.found = found.pairs["train"], found
        self.size, self.crop, self.uniform, self.seed, self.epoch = size, crop, uniform, seed, 0
        self.mean, self.std = mean, std
        # Decoded once where that fits into memory, as CamVid does; Cityscapes is read again every epoch.
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.keep = len(self.pairs) <= 1000
        counts = np.stack([np.bincount(self._mask(i).ravel(), minlength=256) for i in range(len(self.pairs))])
        self.having = [np.flatnonzero(counts[:, k] >= SMALLEST) for k in range(len(found.classes))]

    def _mask(self, i: int) -> np.ndarray:
        return self._load(i)[1] if self.keep else self.found.read_mask(self.pairs[i].mask)

    def _load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i in self.kept:
            return self.kept[i]
        pair: Pair = self.pairs[i]
        try:
            loaded = decode(pair.image), self.found.read_mask(pair.mask)
        except Unreadable as reason:
            raise DownresError(f"The image {pair.name} cannot be read ({reason}): replace it.") from None
        if self.keep:
            self.kept[i] = loaded
        return loaded

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, i])
        wanted = None
        if i < self.uniform * len(self):  # the order is shuffled by the sampler
            present = [k for k, images in enumerate(self.having) if len(images)]
            wanted = present[rng.integers(len(present))]
            index = int(rng.choice(self.having[wanted]))
        else:
            index = int(rng.integers(len(self)))
        image, mask = self._load(index)
        image, mask = self._window(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None], wanted, rng)
        if rng.random() < 0.5:
            image, mask = v2.horizontal_flip(image), v2.horizontal_flip(mask)
        image, mask = randaugment_reduced(image, mask, rng, self.mean)
        pixels = v2.normalize(v2.to_dtype(image, torch.float32, scale=True), list(self.mean), list(self.std))
        return pixels, mask[0].long()

    def _window(self, image: Tensor, mask: Tensor, wanted: int | None, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A crop of the randomly scaled picture, cut before it is resized: only what is kept gets resampled."""
        have = image.shape[-2:]
        scale = rng.uniform(*SCALES)
        scaled = [max(1, round(side * scale)) for side in self.size]
        shown = [min(c, s) for c, s in zip(self.crop, scaled, strict=True)]
        source = [max(1, min(h, round(c * h / s))) for c, h, s in zip(shown, have, scaled, strict=True)]
        if wanted is None:
            corner = [int(rng.integers(h - s + 1)) for h, s in zip(have, source, strict=True)]
        else:  # a random pixel of the class lies at a random place in the crop
            inside = np.flatnonzero(mask[0].numpy() == wanted)
            pixel = np.unravel_index(inside[rng.integers(len(inside))], have)
            corner = [int(np.clip(p - rng.integers(s), 0, h - s)) for p, h, s in zip(pixel, have, source, strict=True)]
        image = v2.resized_crop(image, *corner, *source, shown, v2.InterpolationMode.BILINEAR, antialias=True)
        mask = v2.resized_crop(mask, *corner, *source, shown, v2.InterpolationMode.NEAREST_EXACT)
        rest = [c - s for c, s in zip(self.crop, shown, strict=True)]
        top, left = (int(rng.integers(r + 1)) for r in rest)
        border = [left, top, rest[1] - left, rest[0] - top]
        return v2.pad(image, border, fill=_grey(self.mean)), v2.pad(mask, border, fill=IGNORE)


def _grey(mean: tuple[float, ...]) -> list[float]:
    """Of pixels that the picture does not have: zero for the network."""
    return [round(255 * m) for m in mean]


def randaugment_reduced(
    image: Tensor, mask: Tensor, rng: np.random.Generator, mean: tuple[float, ...] = MEAN, magnitude: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Two of the seven operations that Gao 2021 keeps of RandAugment (Cubuk 2020), at a fifth of their strength."""
    for op in rng.choice(7, 2, replace=False):
        sign = 1 if rng.random() < 0.5 else -1
        factor = 1 + sign * 0.9 * magnitude
        if op == 0:
            image = v2.autocontrast(image)
        elif op == 1:
            image = v2.equalize(image)
        elif op == 2:
            angle = sign * 30 * magnitude
            image = v2.rotate(image, angle, v2.InterpolationMode.BILINEAR, fill=_grey(mean))
            mask = v2.rotate(mask, angle, v2.InterpolationMode.NEAREST, fill=IGNORE)
        else:
            adjust = (v2.adjust_saturation, v2.adjust_contrast, v2.adjust_brightness, v2.adjust_sharpness)[op - 3]
            image = adjust(image, factor)
    return image, mask


def train(options: argparse.Namespace) -> Path:
    """Train, or go on training; returns the file of the final weights."""
    out = Path(options.out)
    final, checkpoint, about = out / "model.safetensors", out / "checkpoint.pth", out / "training.json"
    found = find_masks(options.data)
    if "train" not in found.pairs:
        raise DownresError(f"{options.data} has no part to train on: divide it into the parts train and val.")
    options.crop = options.crop or tuple(max(16, round(side * CROP / 16) * 16) for side in options.size)
    asked = _recorded(options, found)
    if final.exists():
        _check_same(asked, json.loads(about.read_text()), out)
        return final
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, mean, std = _network(options, len(found.classes))
    crops = Crops(found, options.size, options.crop, options.class_uniform, options.seed, mean, std)
    model = model.to(device, memory_format=torch.channels_last).train()
    steps = len(crops) // options.batch_size
    if not steps:
        raise DownresError(f"A batch of {options.batch_size} needs as many images, there are {len(crops)}: lower --batch-size.")
    optimizer = torch.optim.SGD(_groups(model, options.weight_decay), options.lr, momentum=0.9)
    warmup = min(options.warmup_steps, options.epochs * steps // 10)
    schedule = PolyLRScheduler(
        optimizer, options.epochs * steps, 0.9, warmup_t=warmup, warmup_lr_init=0.1 * options.lr, t_in_epochs=False
    )
    average = ModelEmaV3(model, options.ema, use_warmup=True) if options.ema else None
    out.mkdir(parents=True, exist_ok=True)
    begun, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        _check_same(asked, state["options"], out)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.module.load_state_dict(state["average"])
        begun, seconds = state["epoch"], state["seconds"]
    for epoch in range(begun, options.epochs):
        start, total = time.perf_counter(), 0.0
        crops.epoch = epoch
        torch.manual_seed(options.seed + 1000 * (epoch + 1))  # dropout, of networks that have it
        order = np.random.default_rng([options.seed, epoch]).permutation(len(crops))[: steps * options.batch_size].tolist()
        loader = DataLoader(crops, options.batch_size, sampler=order, num_workers=options.workers, drop_last=True)
        for step, (pixels, masks) in enumerate(loader, epoch * steps):
            schedule.step_update(step)
            pixels = pixels.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                logits = upsample(logits_of(model(pixels)), options.crop)
            loss = nn.functional.cross_entropy(logits.float(), masks.to(device), ignore_index=IGNORE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update(model, step=step)
            total += loss.item()
        seconds += time.perf_counter() - start
        state = {
            "options": asked, "epoch": epoch + 1, "seconds": seconds, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "average": None if average is None else average.module.state_dict(),
        }  # fmt: skip
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, checkpoint)
        print(f"epoch {epoch + 1} of {options.epochs}: loss {total / steps:.3f}, {seconds / 60:.1f} minutes", flush=True)
    kept = model if average is None else average.module
    weights = {k: v.detach().cpu().contiguous() for k, v in kept.state_dict().items()}
    partial = final.with_suffix(".partial")
    save_file(weights, partial)
    about.write_text(json.dumps({
        **asked, "mean": list(mean), "std": list(std), "steps": options.epochs * steps, "hours": seconds / 3600,
        "threads": torch.get_num_threads(), "device": str(device), "date": date.today().isoformat(), "versions": versions(),
    }, indent=1) + "\n")  # fmt: skip
    os.replace(partial, final)
    checkpoint.unlink()
    return final


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """BatchNorm's parameters are not decayed, as in Gao 2021."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    return [
        {"params": [p for p in model.parameters() if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]


def _network(options: argparse.Namespace, classes: int) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """What is trained, with the mean and the standard deviation that its inputs are normalised with."""
    if options.model is None:
        return regseg(options.name, classes, width=options.width, depth=options.depth), MEAN, STD
    loaded = load_model(options.model, options.weights, pretrained=False, num_classes=classes)
    with torch.no_grad():
        has = logits_of(loaded.module(torch.zeros(1, len(loaded.preprocessing.mean), *options.crop))).shape[1]
    if has != classes:
        raise DownresError(f"{options.model} has {has} classes and {options.data} has {classes}: give a network for {classes}.")
    return loaded.module.requires_grad_(True), loaded.preprocessing.mean, loaded.preprocessing.std


def _recorded(options: argparse.Namespace, found: MaskFolder) -> dict:
    """What decides the weights: a run goes on only where all of it is as it was."""
    kept = {k: v for k, v in vars(options).items() if k not in ("out", "data", "workers")}
    kept |= {"images": len(found.pairs["train"]), "classes": len(found.classes)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def _check_same(asked: dict, made: dict, out: Path) -> None:
    other = [f"{name} {made[name]}, not {value}" for name, value in asked.items() if name in made and made[name] != value]
    if other:
        raise DownresError(
            f"{out} was trained with other options ({'; '.join(other)}): give another --out, or the same options."
        )


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def load_run(run: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The network of a finished run, with the preprocessing that it was trained for in its `pretrained_cfg`.

    model: the network that was trained, where the run's own name for it (`--model`, a path) may not lead to it from here.
    """
    about = json.loads((Path(run) / "training.json").read_text())
    weights = load_file(Path(run) / "model.safetensors")
    if model is not None:
        pass
    elif about.get("model"):
        model = load_model(about["model"], pretrained=False, num_classes=about["classes"]).module
    else:
        model = regseg(about["name"], len(weights["decoder.classifier.bias"]), width=about["width"], depth=about["depth"])
    model.load_state_dict(weights)
    model.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, *about["size"]), "crop_pct": 1.0, "interpolation": "bilinear",
        "mean": tuple(about.get("mean", MEAN)), "std": tuple(about.get("std", STD)),
    }  # fmt: skip
    return model.eval()


def trained() -> nn.Module:
    """The network of the run that the environment variable REGSEG_RUN names, for the commands of downres."""
    if "REGSEG_RUN" not in os.environ:
        raise DownresError("REGSEG_RUN names no run: set it to the folder that recipes/regseg.py wrote with --out.")
    return load_run(os.environ["REGSEG_RUN"])


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--data", required=True, help="folder of images and masks, as for downres search")
    known.add_argument("--out", required=True, help="folder of the run")
    known.add_argument("--name", default="exp48_decoder26")
    known.add_argument("--width", type=float, default=1.0)
    known.add_argument("--depth", type=float, default=1.0)
    known.add_argument("--model", help="another network than a RegSeg, as for downres search: it is trained from what it is")
    known.add_argument("--weights", help="of --model, to begin with; a network of a library else begins with random ones")
    known.add_argument("--size", type=_size, required=True, metavar="HxW", help="resolution to train for")
    known.add_argument("--crop", type=_size, metavar="HxW", help=f"default: {CROP:g} of the size, in multiples of 16")
    known.add_argument("--epochs", type=int, required=True)
    known.add_argument("--batch-size", type=int, default=8)
    known.add_argument("--lr", type=float, default=0.05)
    known.add_argument("--weight-decay", type=float, default=1e-4)
    known.add_argument("--warmup-steps", type=int, default=3000, help="at most a tenth of all steps")
    known.add_argument("--class-uniform", type=float, default=0.5, help="part of the samples that are drawn class by class")
    known.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="average of the weights, for example 0.999")
    known.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    known.add_argument("--seed", type=int, default=0)
    known.add_argument("--workers", type=int, default=0)
    return known


if __name__ == "__main__":
    try:
        print(train(parser().parse_args()))
    except DownresError as error:
        sys.exit(str(error))
