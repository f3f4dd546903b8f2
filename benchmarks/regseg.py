"""RegSeg beside the authors' implementation: the same numbers, and how fast.

    git clone https://github.com/RolandGao/RegSeg
    python benchmarks/regseg.py --reference RegSeg

The authors' code is imported from that checkout and runs as it is, but for its timing helpers, which need a GPU. Both networks
hold the same weights, BatchNorm parameters and statistics drawn at random.

same   logits in eval and in train mode, gradients of a cross-entropy with respect to all parameters, and the running
       statistics after it, at several sizes, in float32 and float64: largest difference as a share of the largest value of
       each tensor. float64 is asserted.
speed  one image in float32, in turns; ratio = downres / theirs.

Expected time: about 2 minutes on two quiet cores. Recorded: see README.md.
"""

import argparse
import importlib
import subprocess
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import rounds, save, summary
from torch import Tensor, nn

from downres.models.regseg import DESIGNS, regseg

SIZES = ((64, 128), (97, 131), (180, 240), (256, 512))
TIMED = {(180, 240): 12, (360, 480): 6}
"""Rounds by size of the image."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--reference", type=Path, required=True, help="checkout of https://github.com/RolandGao/RegSeg")
    options.add_argument("--rounds", type=float, default=1.0, help="factor on the number of timed rounds")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--note", help="kept in the result: what else the machine did")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()
    if not (given.reference / "model.py").is_file():
        options.error(
            f"{given.reference} is no checkout of the authors' code: git clone https://github.com/RolandGao/RegSeg, and give "
            "its folder with --reference."
        )
    torch.set_num_threads(given.threads)
    theirs = authors(given.reference)
    content = {
        "reference": "https://github.com/RolandGao/RegSeg " + commit(given.reference),
        **({"note": given.note} if given.note else {}),
        "threads_used": given.threads,
        "same": {name: same(theirs, name) for name in DESIGNS},
        "speed": {name: speed(theirs, name, given.rounds) for name in DESIGNS},
    }
    command = "python benchmarks/regseg.py --reference RegSeg" + f" --rounds {given.rounds:g}" * (given.rounds != 1)
    file = save("regseg", command, given.date, content)
    print(f"{file.relative_to(file.parents[2])} written")


def authors(checkout: Path) -> type[nn.Module]:
    """Their class; `benchmark`, which it imports, times networks on a GPU."""
    stub = types.ModuleType("benchmark")
    stub.benchmark_eval = stub.benchmark_train = stub.benchmark_memory = None  # type: ignore[attr-defined]
    sys.modules["benchmark"] = stub
    sys.path.insert(0, str(checkout))
    return importlib.import_module("model").RegSeg


def commit(checkout: Path) -> str:
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "(no git checkout)"


def pair(theirs: type[nn.Module], name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours with the same random weights."""
    torch.manual_seed(0)
    reference = theirs(name, 19)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = regseg(name, 19)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference.to(dtype), ours.to(dtype)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def same(theirs: type[nn.Module], name: str) -> list[dict]:
    rows = []
    for dtype in (torch.float32, torch.float64):
        for size in SIZES:
            pairs = pair(theirs, name, dtype)
            x, labels = torch.randn(2, 3, *size, dtype=dtype), torch.randint(0, 19, (2, *size))
            with torch.no_grad():
                evaluated = apart(*(net.eval()(x) for net in pairs))
            trained = [net.train()(x) for net in pairs]
            for logits in trained:
                F.cross_entropy(logits, labels).backward()
            reference, ours = (dict(net.named_parameters()) for net in pairs)
            gradients = max(apart(p.grad, ours[key].grad) for key, p in reference.items())  # type: ignore[arg-type]
            states = [net.state_dict() for net in pairs]
            statistics = max(apart(value, states[1][key]) for key, value in states[0].items() if "running" in key)
            row = {
                "type": str(dtype).removeprefix("torch."),
                "size": f"{size[0]}x{size[1]}",
                "eval": evaluated,
                "train": apart(*(logits.detach() for logits in trained)),
                "gradients": gradients,
                "statistics": statistics,
            }
            print(name, row)
            worst = max(row[key] for key in ("eval", "train", "gradients", "statistics"))
            if dtype == torch.float64 and not worst <= 1e-9:
                raise AssertionError(f"{name} differs from the authors' network: {row}")
            rows.append(row)
    return rows


@torch.no_grad()
def speed(theirs: type[nn.Module], name: str, factor: float) -> list[dict]:
    rows = []
    reference, ours = (net.eval() for net in pair(theirs, name, torch.float32))
    for size, number in TIMED.items():
        x = torch.randn(1, 3, *size)
        competitors = {"downres": lambda x=x: ours(x), "theirs": lambda x=x: reference(x)}
        rounds(competitors, 2, "warm-up")
        found = rounds(competitors, max(1, round(number * factor)), f"{name} at {size[0]}x{size[1]}")
        rows.append({"size": f"{size[0]}x{size[1]}", **summary(found, "downres", "theirs"), "all": found})
        print(name, {key: value for key, value in rows[-1].items() if key != "all"})
    return rows


if __name__ == "__main__":
    main()
