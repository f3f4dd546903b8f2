"""Overhead of `downres.reduce` against the same model fed hand-resized images.

    python benchmarks/reduce.py

Compared: `reduce(model, resolution=160)(images)` and `model(F.interpolate(images, (160, 160), antialias=True))`, for
224 x 224 images, in torch on the CPU, eager and (resnet18) compiled. Both resize in the same process, in turns.
Expected time: about 2 minutes on two cores (--no-compile leaves torch.compile out).
Expected result: identical outputs (asserted, bit for bit) and a ratio of 1.00 within noise.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from measuring import Watch, rounds, save, summary, wait_until_quiet
from torch import Tensor, nn

import downres

MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm:resnet18": lambda: timm.create_model("resnet18"),
    "timm:tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "torchvision:mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(),
}
COMPILED = ("timm:resnet18",)
NATIVE, RESOLUTION = 224, 160


class ByHand(nn.Module):
    """What a user writes without downres. A module, so that torch.compile gets the same chance on both sides."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True, align_corners=False)
        return self.model(small)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--no-compile", action="store_true", help="eager only")
    options.add_argument("--wait", type=float, default=0.0, help="seconds to wait at most for a quiet machine")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()

    results = []
    for name, create in MODELS.items():
        torch.manual_seed(0)
        model = create().eval()
        for mode in ("eager", "compiled") if name in COMPILED and not given.no_compile else ("eager",):
            for batch_size in (1, 8):
                results.append(compare(name, model, mode, batch_size, given.rounds, given.wait))
    command = "python benchmarks/reduce.py" + " --no-compile" * given.no_compile
    file = save("reduce", command, given.date, {"native": NATIVE, "resolution": RESOLUTION, "results": results})
    print(f"{file.relative_to(file.parents[2])} written")


def compare(name: str, model: nn.Module, mode: str, batch_size: int, number: int, wait: float) -> dict:
    reduced, by_hand = downres.reduce(model, resolution=RESOLUTION), ByHand(model)
    if mode == "compiled":
        torch.compiler.reset()
        reduced, by_hand = torch.compile(reduced), torch.compile(by_hand)
    images = torch.randn(batch_size, 3, NATIVE, NATIVE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for _ in range(5):  # warm-up
            ours, theirs = reduced(images), by_hand(images)
        assert torch.equal(ours, theirs), f"{name} {mode}: reduce and resizing by hand give different outputs"
        wait_until_quiet(wait)
        competitors = {"reduce": lambda: reduced(images), "by_hand": lambda: by_hand(images)}
        with Watch() as watch:
            found = rounds(competitors, number, name)
    all_rounds = summary(found, "reduce", "by_hand")
    row = {
        "model": name,
        "mode": mode,
        "batch_size": batch_size,
        "outputs": "identical",
        **all_rounds,
        "load": found[-1]["load"],
        "others": round(watch.others, 2),
        "raw_s": {side: [r[side] for r in found] for side in competitors},
    }
    print(
        f"{name:32s} {mode:8s} batch {batch_size}: {1000 * row['reduce_s']:7.2f} ms against {1000 * row['by_hand_s']:7.2f} ms, "
        f"ratio {row['ratio']:.3f} ({row['ratio_p10']:.3f} to {row['ratio_p90']:.3f}), other processes {row['others']} cores",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
