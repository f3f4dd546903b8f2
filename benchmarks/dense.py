"""The full-size answer of a segmentation network: all logits at once against class by class; and mIoU against a hand loop.

    python benchmarks/dense.py --data ../shared/data/camvid

RegSeg with random weights. First: 512×1024 in, 19 classes at 1024×2048 out, in torch and onnxruntime: as logits, as logits
whose argmax is then taken (what a user would write), and as a class map made class by class; equality, peak memory by
`measure_cost` and by the allocator, time. Then, if there are images: mIoU at three resolutions by `downres.curve` and by a loop
over a DataLoader with torchvision's transforms and torchmetrics; equal numbers, time.
Expected time: 6 minutes on two cores. Results: results/dense.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms import v2

import downres
from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.engines.torch import TorchRuntime
from downres.tasks.segmentation.masks import IGNORE, find_masks

SIZE, INPUT, CLASSES = (1024, 2048), (512, 1024), 19
RESOLUTIONS = (120, 180, 240)


def answers(rounds: int) -> dict:
    """Time and memory of the three ways, in both runtimes."""
    torch.manual_seed(0)
    network = downres.regseg(num_classes=CLASSES).eval()
    x = np.random.default_rng(0).standard_normal((1, 3, *INPUT)).astype(np.float32)
    served = {name: downres.Segmenter(network, downres.Dense(SIZE, output=name)) for name in ("logits", "classes")}
    calls: dict[str, Callable[[], np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, module in served.items():
            graph = OnnxRuntime(export_onnx(module, (3, *INPUT), Path(place) / f"{name}.onnx", (name,)).read_bytes())
            for where, runtime in (("torch", TorchRuntime(module)), ("onnxruntime", graph)):
                calls[f"{where} {name}"] = lambda runtime=runtime: runtime(x)[0]
    for where in ("torch", "onnxruntime"):
        logits = calls[f"{where} logits"]
        calls[f"{where} logits, argmax"] = lambda logits=logits: torch.from_numpy(logits()).argmax(1).numpy()
        apart = int((calls[f"{where} logits, argmax"]() != calls[f"{where} classes"]()).sum())
        assert apart == 0, f"{where}: {apart} pixels differ"
    found = measuring.rounds(calls, rounds, "full-size answer")
    peaks = {name: downres.measure_cost(module, (3, *INPUT)).peak_activation_bytes for name, module in served.items()}
    return {
        "network": f"RegSeg exp48_decoder26, {CLASSES} classes, random weights, {INPUT} in, {SIZE} out, batch 1",
        "equal": "class map by class = argmax of the logits in every pixel, in torch and in onnxruntime (asserted)",
        "peak_activation_bytes": peaks,
        "allocator_peak_bytes": {name: _allocated(module, torch.from_numpy(x)) for name, module in served.items()},
        "median_seconds": {name: statistics.median(row[name] for row in found) for name in calls},
        "rounds": found,
    }


def _allocated(module: nn.Module, x: torch.Tensor) -> int:
    """Peak of the CPU allocator during one pass, from the profiler's record of every allocation."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        module(x)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = [e for e in json.loads(Path(file.name).read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    start = totals[0] - events[0]["args"]["Bytes"]
    return max(totals) - start + x.numel() * x.element_size()


class Pairs(torch.utils.data.Dataset):
    """What a user would write: read with PIL, resized with torchvision."""

    def __init__(self, pairs, size: tuple[int, int], read) -> None:  # type: ignore[no-untyped-def]
        self.pairs, self.read = pairs, read
        self.transform = v2.Compose([
            v2.ToImage(), v2.Resize(size, antialias=True), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        return self.transform(Image.open(self.pairs[i].image).convert("RGB")), torch.from_numpy(self.read(self.pairs[i].mask))


def by_hand(network: nn.Module, folder, sizes: list[tuple[int, int]]) -> list[float]:  # type: ignore[no-untyped-def]
    """mIoU in percent at each size, as the documentation of torchmetrics would have it."""
    found = []
    for size in sizes:
        metric = MulticlassJaccardIndex(len(folder.classes), ignore_index=IGNORE)
        loader = torch.utils.data.DataLoader(Pairs(folder.pairs["val"], size, folder.read_mask), batch_size=4)
        with torch.inference_mode():
            for pixels, masks in loader:
                logits = F.interpolate(network(pixels), size=masks.shape[-2:], mode="bilinear", align_corners=False)
                metric.update(logits.argmax(1), masks)
        found.append(100 * float(metric.compute()))
    return found


def quality(data: Path, rounds: int) -> dict:
    folder = find_masks(data)
    torch.manual_seed(0)
    network = downres.regseg(num_classes=len(folder.classes), width=0.5).eval()
    native = folder.label_size
    assert native is not None
    sizes = [native, *((r, round(r * native[1] / native[0])) for r in RESOLUTIONS)]
    preprocessing = downres.Preprocessing(native, 1.0, fit="stretch")

    def ours() -> list[float]:
        curve = downres.curve(network, data, sizes[1:], snap=False, preprocessing=preprocessing)
        return [result.quality.score for result in (curve.original, *curve.results)]  # type: ignore[union-attr]

    hand = by_hand(network, folder, sizes)
    apart = max(abs(a - b) for a, b in zip(ours(), hand, strict=True))
    assert apart < 0.1, f"{apart} points apart"  # torchvision resizes PIL pictures with PIL, a tensor otherwise by a level
    found = measuring.rounds({"curve": ours, "by hand": lambda: by_hand(network, folder, sizes)}, rounds, "mIoU")
    ratio = statistics.median(row["by hand"] / row["curve"] for row in found)
    return {
        "what": f"RegSeg at half its width on {len(folder.pairs['val'])} images at {sizes}; mIoU, and what downres adds to it",
        "largest_difference_points": apart,
        "by_hand_over_curve": ratio,
        "rounds": found,
    }


def main() -> None:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--data", type=Path, help="a folder of images and masks")
    known.add_argument("--rounds", type=int, default=10)
    options = known.parse_args()
    result = {"answer": answers(options.rounds)}
    if options.data is not None:
        result["quality"] = quality(options.data, max(3, options.rounds // 3))
    print(measuring.save("dense", "python " + " ".join(sys.argv), None, result), file=sys.stderr)


if __name__ == "__main__":
    main()
