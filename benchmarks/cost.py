"""Exactness and speed of `downres.measure_cost` over models of timm, torchvision and transformers, each as it is and reduced.

    python benchmarks/cost.py
    python benchmarks/cost.py --table       # print results/cost.json as the tables of README.md

For every row, on real execution: MACs of `measure_cost` against those counted by hooks with hand formulas (equal, exactly),
and its peak activation memory against the allocations of PyTorch's CPU allocator (within 2 %), with attention fused and not
where there is attention; see independent.py for both. Beside it what torchinfo, fvcore, ptflops and calflops say, and times.
At the end 100 candidates each of a ViT-S/16 and a ResNet-50. Random weights; no network.
Expected time: about 10 minutes on two quiet cores (less with --models and --no-hundred).
Expected result: no row fails; the exit status says so.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from independent import allocated, count
from measuring import RESULTS, Watch, save
from torch import nn

import downres
from downres import Candidate, DownresError, costs, measure_cost

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers  # noqa: E402

TOLERANCE = 0.02
"""Of the peak, against the allocator."""


@dataclass(frozen=True)
class Entry:
    """A model. name: in its library; kwargs: for timm and torchvision, or of the transformers configuration.

    size: pixels that it is built for; reductions: candidates in their text form.
    """

    library: str
    name: str
    size: int = 224
    reductions: tuple[str, ...] = ()
    attention: bool = False
    kwargs: tuple[tuple[str, Any], ...] = ()

    def create(self, fused: bool = True) -> nn.Module:
        torch.manual_seed(0)
        kwargs = dict(self.kwargs)
        if self.library == "timm":
            timm.layers.set_fused_attn(fused)
            try:
                return timm.create_model(self.name, **kwargs).eval()
            finally:
                timm.layers.set_fused_attn(True)
        if self.library == "torchvision":
            return torchvision.models.get_model(self.name, weights=None, **kwargs).eval()
        kind = getattr(transformers, self.name)
        config = kind.config_class(**kwargs)
        if not self.attention:
            return kind._from_config(config).eval()
        return kind._from_config(config, attn_implementation="sdpa" if fused else "eager").eval()


@contextlib.contextmanager
def attention(entry: Entry, fused: bool) -> Iterator[None]:
    """torchvision's ViT knows no such option: fused is plain attention, not fused the fast path of nn.MultiheadAttention."""
    torch.backends.mha.set_fastpath_enabled(not fused or entry.library != "torchvision")
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


CONVNET = ("160", "{0} stem×0.5")
VIT = ("160", "224 patch28", "224 merge8", "224 merge50%-decreasing", "224 prune8", "224 stem×0.5", "160 stem×0.5 merge2")
VIT14 = ("168", "224 patch28", "224 merge8", "224 prune8", "224 stem×0.5")
WINDOWS = ("{1}", "{0} patch8", "{0} merge8", "{0} stem×0.5")
OTHER = ("{1}", "{0} stem×0.5")


def _entries() -> list[Entry]:
    def several(library: str, names: str, reductions: tuple[str, ...], attention: bool = False, size: int = 224) -> list[Entry]:
        smaller = {224: 160, 256: 128}.get(size, size // 2)
        texts = tuple(text.format(size, smaller) for text in reductions)
        return [Entry(library, name, size, texts, attention) for name in names.split()]

    def of(library: str, name: str, reductions: tuple[str, ...], **kwargs: Any) -> Entry:
        size = kwargs.pop("size", 224)
        smaller = {224: 160, 256: 128}.get(size, size // 2)
        texts = tuple(text.format(size, smaller) for text in reductions)
        return Entry(library, name, size, texts, kwargs.pop("attention", True), tuple(kwargs.items()))

    tiny = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    dino = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 224, "patch_size": 14}
    atto = {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]}
    return [
        # convnets
        *several(
            "timm",
            "resnet18 resnet50 seresnet50 resnest14d res2net50_26w_4s regnetx_004 regnety_004 densenet121 vgg11 "
            "efficientnet_b0 tf_efficientnet_lite0 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small ghostnet_100 "
            "convnext_atto convnextv2_atto inception_next_tiny hrnet_w18_small dla34 eca_nfnet_l0 repvgg_a0 mobileone_s0 "
            "fastvit_t8 starnet_s1",
            CONVNET,
        ),
        *several("torchvision", "resnet50 mobilenet_v3_large efficientnet_b0 convnext_tiny regnet_y_400mf googlenet", CONVNET),
        of("transformers", "ResNetForImageClassification", CONVNET, attention=False),
        of("transformers", "ConvNextForImageClassification", CONVNET, attention=False, **atto),
        # transformers with a plain sequence of tokens
        *several(
            "timm",
            "vit_tiny_patch16_224 vit_small_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 "
            "deit3_small_patch16_224 vit_relpos_small_patch16_224",
            VIT,
            True,
        ),
        of("timm", "vit_base_patch16_224", ("160", "224 merge8")),
        of("timm", "vit_small_patch14_reg4_dinov2", VIT14, img_size=224),
        of("timm", "vit_small_patch16_dinov3", VIT, img_size=224),
        of("timm", "eva02_tiny_patch14_224", VIT14),
        of("timm", "beit_base_patch16_224", ("160", "224 merge8")),
        of("timm", "vit_small_r26_s32_224", ("160", "224 merge2", "224 stem×0.5")),
        of("torchvision", "vit_b_16", ("160", "224 patch28", "224 merge8", "224 stem×0.5")),
        of("transformers", "ViTForImageClassification", VIT, **tiny),
        of("transformers", "DeiTForImageClassification", VIT, **tiny),
        of("transformers", "Dinov2ForImageClassification", VIT14, **dino),
        of("transformers", "Dinov2WithRegistersForImageClassification", VIT14, **dino),
        of("transformers", "DINOv3ViTModel", VIT, num_register_tokens=4, **tiny),
        of("transformers", "SiglipVisionModel", VIT, **tiny),
        of("transformers", "BeitForImageClassification", VIT, use_relative_position_bias=True, **tiny),
        # windows, pyramids, hybrids
        *several("timm", "swin_tiny_patch4_window7_224", WINDOWS, True),
        *several("timm", "swinv2_tiny_window8_256", WINDOWS, True, 256),
        *several("timm", "maxvit_nano_rw_256 mobilevit_xxs mobilevitv2_050", OTHER, True, 256),
        *several(
            "timm",
            "coatnet_nano_rw_224 pvt_v2_b0 twins_svt_small levit_128s xcit_nano_12_p16_224 cait_xxs24_224 pit_ti_224 "
            "poolformer_s12 hiera_tiny_224 edgenext_xx_small efficientformer_l1 davit_tiny mvitv2_tiny tiny_vit_5m_224 "
            "gcvit_xxtiny focalnet_tiny_srf mixer_s32_224 sequencer2d_s",
            OTHER,
            True,
        ),
        of("torchvision", "swin_t", WINDOWS, attention=False),
        of("torchvision", "swin_v2_t", OTHER, attention=False, size=256),
        of("torchvision", "maxvit_t", OTHER, attention=False),
        of("transformers", "SwinForImageClassification", WINDOWS),
        of("transformers", "SegformerForSemanticSegmentation", OTHER),
        of("transformers", "MobileViTForImageClassification", OTHER, attention=False, size=256),
    ]


# --- one row ------------------------------------------------------------------------------------------------------


def row(model: nn.Module, size: tuple[int, ...]) -> dict[str, Any]:
    """Ours and the independent counts at (channels, height, width)."""
    with Watch() as ours:
        cost = measure_cost(model, size)
    with Watch() as real:
        counted = count(model, (1, *size))
        seen = allocated(model, (1, *size), counted.reads)
    error = cost.peak_activation_bytes / seen.peak - 1
    return {
        "size": list(size),
        "macs": cost.macs,
        "macs_by_hooks": counted.macs,
        "by_kind": dict(sorted(counted.by_kind.items())),
        "peak_bytes": cost.peak_activation_bytes,
        "allocator_bytes": seen.peak,
        "allocator_bytes_with_scratch": seen.with_scratch,
        "peak_error_percent": round(100 * error, 3),
        "ok": cost.macs == counted.macs and abs(error) <= TOLERANCE,
        "measure_s": round(ours.seconds, 4),
        "two_real_passes_s": round(real.seconds, 4),
    }


def rows_of(entry: Entry) -> list[dict[str, Any]]:
    found = []
    for fused in (True, False) if entry.attention else (None,):
        with attention(entry, fused is not False):
            model = entry.create(fused is not False)
            head = {"library": entry.library, "model": entry.name}
            head |= {} if fused is None else {"attention": "fused" if fused else "not fused"}
            plain = head | {"candidate": "as is"} | row(model, (3, entry.size, entry.size))
            if fused is not False:
                plain["tools"] = in_child(tools, model, (3, entry.size, entry.size))
                plain["tools"]["errors_percent"] = _errors(plain)
            found.append(plain)
            for text in entry.reductions:
                found.append(head | {"candidate": text} | reduced_row(entry, model, text, False))
            if fused is not False:  # the first of them is a resolution
                inside = f"{entry.reductions[0]}, resize inside"
                found.append(head | {"candidate": inside} | reduced_row(entry, model, entry.reductions[0], True))
    return found


def reduced_row(entry: Entry, model: nn.Module, text: str, resize_input: bool) -> dict[str, Any]:
    """resize_input: whether the reduced network resizes its input itself, from the original's size."""
    candidate, native = Candidate.parse(text), (entry.size, entry.size)
    try:
        reduced = downres.reduce(model, candidate, input_size=(3, *native), resize_input=resize_input)
        return row(reduced, (3, *(native if resize_input else candidate.hw or native)))
    except DownresError as error:
        return {"does_not_apply": str(error)}


def kind_of(text: str) -> str:
    """What a candidate changes."""
    if text.endswith("inside"):
        return "resolution, resize inside"
    words = {"stem": "resampling after the embedding", "patch": "larger patches", "merge": "merging", "prune": "pruning"}
    kinds = [kind for word, kind in words.items() if word in text]
    return "as is" if text == "as is" else " and ".join(kinds) or "resolution"


# --- other tools --------------------------------------------------------------------------------------------------


def tools(model: nn.Module, size: tuple[int, ...]) -> dict[str, Any]:
    """MACs and seconds of each tool; what went wrong where it did. torchinfo also has a memory figure."""
    import calflops
    import fvcore.nn
    import ptflops
    import torchinfo

    x = torch.zeros(1, *size)

    def by_torchinfo() -> tuple[int, dict]:
        found = torchinfo.summary(copy.deepcopy(model), (1, *size), verbose=0, device="cpu")
        return found.total_mult_adds, {"forward_bytes": found.total_output_bytes}

    def by_fvcore() -> tuple[int, dict]:
        analysis = fvcore.nn.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.total()), {}

    def by_ptflops() -> tuple[int, dict]:
        options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
        return int(ptflops.get_model_complexity_info(copy.deepcopy(model), size, **options)[0]), {}

    def by_calflops() -> tuple[int, dict]:
        options = {"print_results": False, "print_detailed": False, "output_as_string": False}
        return int(calflops.calculate_flops(_Hidden(copy.deepcopy(model)), input_shape=(1, *size), **options)[1]), {}

    found: dict[str, Any] = {}
    for name, tool in {"torchinfo": by_torchinfo, "fvcore": by_fvcore, "ptflops": by_ptflops, "calflops": by_calflops}.items():
        start = time.perf_counter()
        try:
            with torch.no_grad():
                macs, more = tool()
            found[name] = {"macs": macs, **more, "seconds": round(time.perf_counter() - start, 4)}
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    return found


class _Hidden(nn.Module):
    """calflops refuses a model whose class comes from transformers unless it is given text: one level down it does not see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


def _errors(found: dict[str, Any]) -> dict[str, float]:
    return {
        name: round(100 * (tool["macs"] / found["macs_by_hooks"] - 1), 3)
        for name, tool in found["tools"].items()
        if "macs" in tool
    }


def in_child(function: Callable[..., dict], *args: Any) -> dict[str, Any]:
    """In a process of its own: ptflops and calflops replace functions of torch, and leave them so when they fail."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe()

    def work() -> None:
        warnings.simplefilter("ignore")
        logging.disable()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            there.send(function(*args))

    process = context.Process(target=work)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": "the process ended"}
    finally:
        process.join()


# --- a hundred candidates -----------------------------------------------------------------------------------------


def hundred() -> list[dict[str, Any]]:
    """Seconds for 100 candidates of one model: ours all of them, the other tools ten (they get the reduced networks made)."""
    merges = [f"224 {how}{r}" for how in ("merge", "prune") for r in range(1, 17)]
    merges += [f"224 merge{r}-decreasing" for r in range(1, 13)] + [f"224 merge{k}%" for k in range(20, 96, 4)]
    vit = [str(side) for side in range(48, 448, 16)] + [f"224 patch{p}" for p in (8, 14, 28, 32)] + merges
    vit += [f"224 stem×{s / 14:.4f}" for s in range(6, 14)]
    resnet = [str(side) for side in range(64, 448, 4)] + [f"224 stem×{s}" for s in (0.4, 0.5, 0.6, 0.8)]
    found = []
    for name, texts in {"vit_small_patch16_224": vit, "resnet50": resnet}.items():
        model = timm.create_model(name).eval()
        assert len(texts) == 100, len(texts)
        candidates = [Candidate.parse(text) for text in texts]
        with Watch() as ours:
            result = costs(model, (), candidates=candidates)
        assert len(result.rows) >= 100
        some = candidates[::10]
        networks = [downres.reduce(model, candidate, resize_input=False) for candidate in some]
        pairs = [(n, (3, *c.hw)) for n, c in zip(networks, some, strict=True) if c.hw]
        theirs = in_child(lambda pairs=pairs: _seconds([tools(n, size) for n, size in pairs]))
        found.append(
            {
                "model": name,
                "candidates": len(texts),
                "ours_s": round(ours.seconds, 2),
                "other_processes_cores": round(ours.others, 2),
                "others_s_per_100": {tool: round(10 * s, 1) for tool, s in theirs.items()},
            }
        )
        print(found[-1], flush=True)
    return found


def _seconds(runs: list[dict]) -> dict[str, float]:
    return {tool: sum(run[tool].get("seconds", 0.0) for run in runs) for tool in runs[0]}


# --- tables -------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """README's three tables."""
    by_model: dict[tuple[str, str], list[dict]] = {}
    for r in result["rows"]:
        by_model.setdefault((r["library"], r["model"]), []).append(r)
    lines = [
        "| Model | px | GMAC | Rows | MACs equal | Peak MB, fused / not | Worst peak error | "
        "torchinfo | fvcore | ptflops | calflops | s: ours | theirs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (library, model), rows in by_model.items():
        measured = [r for r in rows if "macs" in r]
        plain = [r for r in measured if r["candidate"] == "as is"]
        first = plain[0]
        worst = max((r["peak_error_percent"] for r in measured), key=abs)
        peaks = " / ".join(f"{r['peak_bytes'] / 1e6:.2f}" for r in plain)
        equal = sum(r["macs"] == r["macs_by_hooks"] for r in measured)
        errors = first["tools"]["errors_percent"]
        theirs = [f"{errors[t]:+.1f} %" if t in errors else "fails" for t in ("torchinfo", "fvcore", "ptflops", "calflops")]
        seconds = [first["tools"][t].get("seconds") for t in ("torchinfo", "fvcore", "ptflops", "calflops")]
        times = " / ".join("–" if s is None else f"{s:.1f}" for s in seconds)
        short = model.replace("ForImageClassification", "").replace("ForSemanticSegmentation", "")
        lines.append(
            f"| {library} {short} | {first['size'][-1]} | {first['macs'] / 1e9:.3f} | {len(measured)} | {equal} | "
            f"{peaks} | {worst:+.2f} % | {' | '.join(theirs)} | {first['measure_s']:.2f} | {times} |"
        )
    lines += [
        "",
        "| Reduction | Rows | Models | MACs equal | Worst peak error | Does not apply to |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(kind_of(r["candidate"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if kind_of(r["candidate"]) == kind]
        measured = [r for r in rows if "macs" in r]
        models = {(r["library"], r["model"]) for r in measured}
        without = {(r["library"], r["model"]) for r in rows} - models
        worst = max((r["peak_error_percent"] for r in measured), key=abs)
        equal = sum(r["macs"] == r["macs_by_hooks"] for r in measured)
        lines.append(f"| {kind} | {len(measured)} | {len(models)} | {equal} | {worst:+.2f} % | {len(without) or ''} |")
    lines += ["", "| 100 candidates of | downres | torchinfo | fvcore | ptflops | calflops |", "|---|---|---|---|---|---|"]
    for h in result.get("hundred", []):
        others = " | ".join(f"{h['others_s_per_100'][t]:.0f} s" for t in ("torchinfo", "fvcore", "ptflops", "calflops"))
        lines.append(f"| {h['model']} | {h['ours_s']:.1f} s | {others} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", help="only those with this in their name; nothing is saved")
    options.add_argument("--no-hundred", action="store_true", help="leave the 100 candidates out")
    options.add_argument("--table", action="store_true", help="print the tables of the saved results")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()
    if given.table:
        print(tables(json.loads((RESULTS / "cost.json").read_text())))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measure_cost(nn.Conv2d(3, 3, 1), (3, 8, 8))  # imports that the first call makes
    found = []
    with Watch() as whole:
        for entry in _entries():
            if given.models and given.models not in entry.name:
                continue
            for r in rows_of(entry):
                found.append(r)
                print(_line(r), flush=True)
        candidates = [] if given.no_hundred else hundred()
    bad = [r for r in found if not r.get("ok", True)]
    measured = [r for r in found if "ok" in r]
    print(f"{len(measured)} rows of {len({(r['library'], r['model']) for r in found})} models, {len(bad)} fail")
    print(f"{whole.seconds:.0f} s, other processes {whole.others:.2f} cores")
    if not given.models:
        names = ("transformers", "torchinfo", "fvcore", "ptflops", "calflops")
        content = {
            "other_versions": {name: importlib.metadata.version(name) for name in names},
            "threads_used": 1,
            "seconds": round(whole.seconds),
            "other_processes_cores": round(whole.others, 2),
            "convention": downres.CONVENTION,
            "models": len({(r["library"], r["model"]) for r in found}),
            "measured_rows": len(measured),
            "rows_with_equal_macs": sum(r["macs"] == r["macs_by_hooks"] for r in measured),
            "worst_peak_error_percent": max((abs(r["peak_error_percent"]) for r in measured), default=None),
            "hundred": candidates,
            "rows": found,
        }
        file = save("cost", "python benchmarks/cost.py", given.date, content)
        print(f"{file.relative_to(file.parents[2])} written")
    sys.exit(bool(bad))


def _line(r: dict[str, Any]) -> str:
    head = f"{r['library']}:{r['model']:34s} {r.get('attention', ''):9s} {r['candidate']:24s}"
    if "does_not_apply" in r:
        return f"{head} does not apply: {r['does_not_apply']}"
    verdict = "" if r["ok"] else "   FAILS"
    return (
        f"{head} {r['macs'] / 1e6:10.2f} M, hooks {r['macs_by_hooks'] - r['macs']:+d}; peak {r['peak_bytes'] / 1e6:8.3f} MB, "
        f"allocator {r['peak_error_percent']:+.2f} %; {r['measure_s']:.2f} s, real {r['two_real_passes_s']:.2f} s{verdict}"
    )


if __name__ == "__main__":
    main()
