"""Networks of four libraries, reduced to about 0.57 of their side, and looked at from outside.

    python benchmarks/coverage.py

One network of every file of timm's models (the smallest that is registered there) and of other kinds in it, every builder of
torchvision, every architecture of segmentation-models-pytorch with a small encoder, and every class of transformers that
answers to one image.
Weights are random; what is constant (layer scale, heads of zeros, biases) gets some noise, so that nothing is hidden by a zero.

A network *works* when the reduced one, given images of the original's size, returns the same tree of tensors of the same
shapes and types, finite where the original's are, different for different images; counts fewer MACs; leaves the original as
it was; gives the same numbers from its deepcopy; and, exported to ONNX, gives in ONNX Runtime what torch gives (within 1e-3 of
the largest value of a tensor). It is *refused* when `reduce` raises a DownresError, whose sentence is kept. A network *works in
torch* where ONNX or ONNX Runtime does not take the original either; the sentence is kept. Everything else is a *fault*, also a
run that takes too long or too much memory.

Each network has a process of its own. Rows are appended to a file of JSON lines as they are found, and a run that is started
again goes on from there. Expected time: about two hours on one core. Expected result: no fault.
"""

import argparse
import copy
import importlib
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, save
from torch import Tensor, nn

import downres
from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.families.find import find_adapter
from downres.parse import format_resolution
from downres.probe import input_size_of, required_inputs
from downres.reduction import is_flexible

SCALE = 0.57
TOLERANCE = 1e-3
"""Of the largest value of a tensor, between torch and ONNX Runtime."""
MOST_SECONDS, MOST_BYTES = 600, 14 * 2**30
WORKS, IN_TORCH, REFUSED, FAULT = "works", "works in torch", "refused", "fault"
NOT_BUILT, NOT_YET = "not built", "not run yet"
RESULTS_OF = (WORKS, IN_TORCH, REFUSED, FAULT, NOT_BUILT, NOT_YET)
"""What its library does not build here (a package that it needs is missing, a configuration without a default), and what gives
or asks for something else than images here (`Nothing`), says nothing."""
ENCODERS = {"Segformer": "mit_b0", "DPT": "tu-vit_tiny_patch16_224"}
"""Of the architectures of smp that are made for another encoder than a convnet."""
HUGE = 150_000_000
"""Parameters above which a network of transformers gets fewer layers."""


class Unsound(Exception):
    """What is wrong with a reduced network, in words."""


class Nothing(Exception):
    """A network that returns no tensor in this configuration, or asks for more than an image: there is nothing to compare."""


# Which networks there are, and how each is built.


def timm_names() -> Iterator[str]:
    """Of each of timm's files the network with the fewest parameters, leaving out the `test_` ones."""
    import timm
    from timm.models._registry import _module_to_models

    for names in (sorted(_module_to_models[file]) for file in sorted(_module_to_models)):
        sizes = {}
        for name in names:
            if not name.startswith("test_"):
                with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                    try:
                        sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
                    except Exception:  # those that compute with the numbers of what they build
                        continue
        if sizes:
            yield f"timm:{min(sizes, key=sizes.__getitem__)}"
        else:
            yield f"timm:{names[0]}"
    yield from (f"timm:{name}" for name in KINDS)


KINDS = (
    "bat_resnext26ts", "botnet26t_256", "lambda_resnet26t", "coatnet_pico_rw_224", "maxxvit_rmlp_nano_rw_256", "mixer_s32_224",
    "resmlp_12_224", "gmixer_24_224", "mobilevitv2_050", "repvgg_a0", "resnet50_clip", "vit_base_patch16_siglip_224",
    "vit_small_patch16_18x2_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224", "flexivit_small", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224",
    "mobilenetv4_conv_small", "caformer_s18", "convformer_s18", "twins_pcpvt_small", "beitv2_base_patch16_224",
    "vit_pe_core_tiny_patch16_384", "vit_base_mci_224",
)  # fmt: skip
"""Networks of timm of another kind than the smallest of their file."""


def torchvision_names() -> Iterator[str]:
    from torchvision import models

    yield from (f"torchvision:{name}" for name in models.list_models())


def smp_names() -> Iterator[str]:
    import segmentation_models_pytorch as smp

    for kind in smp.MODEL_ARCHITECTURES_MAPPING.values():
        yield f"smp:{kind.__name__}/{ENCODERS.get(kind.__name__, 'resnet18')}"


def transformers_names() -> Iterator[str]:
    """Classes, each with the model type whose configuration it is built from."""
    from transformers.models.auto import modeling_auto as auto

    for what in (
        "IMAGE_CLASSIFICATION",
        "SEMANTIC_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "BACKBONE",
        "IMAGE_TO_IMAGE",
        "UNIVERSAL_SEGMENTATION",
    ):
        suffix = "_MAPPING_NAMES"
        mapping = getattr(auto, f"MODEL_FOR_{what}{suffix}")
        for kind, classes in mapping.items():
            for name in [classes] if isinstance(classes, str) else classes:
                yield f"transformers:{kind}/{name}"


LIBRARIES: dict[str, Callable[[], Iterator[str]]] = {
    "timm": timm_names,
    "torchvision": torchvision_names,
    "smp": smp_names,
    "transformers": transformers_names,
}


def build(name: str) -> nn.Module:
    """`timm:NAME`, `torchvision:NAME`, `smp:ARCHITECTURE/ENCODER`, `transformers:TYPE/CLASS`, with random weights."""
    library, _, name = name.partition(":")
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        if library == "timm":
            import timm

            module = timm.create_model(name)
        elif library == "torchvision":
            from torchvision import models

            given: dict[str, Any] = {"weights": None}
            if "weights_backbone" in _parameters(models.get_model_builder(name)):
                given["weights_backbone"] = None
            if name in ("inception_v3", "googlenet"):
                given["init_weights"] = False  # takes minutes
            module = models.get_model(name, **given)
        elif library == "smp":
            import segmentation_models_pytorch as smp

            module = smp.create_model(*name.split("/"), encoder_weights=None, classes=5)
        else:
            module = _of_transformers(*name.split("/"))
    module = module.eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point() and p.numel() > 1 and p.min() == p.max():
                p.add_(0.05 * torch.randn_like(p))
    _calibrate(module)
    return module


def _calibrate(module: nn.Module) -> None:
    """Statistics of BatchNorm from two images of noise: without, most deep networks vanish or overflow at random weights."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = {m: (m.momentum, m.running_mean.clone(), m.running_var.clone()) for m in norms if m.running_mean is not None}
    for norm in before:
        norm.momentum = 1.0
        norm.train()
    try:
        with torch.no_grad():
            module(torch.rand(2, *input_size_of(module)))
    except Exception:  # video and the like: as they were
        for norm, (_, mean, var) in before.items():
            norm.running_mean, norm.running_var = mean, var
    for norm, (momentum, *_) in before.items():
        norm.momentum = momentum
        norm.eval()


def _parameters(function: Any) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def _of_transformers(kind: str, name: str) -> nn.Module:
    import transformers

    made: Any = getattr(transformers, name)
    config: Any = transformers.AutoConfig.for_model(kind)
    config = made.config_class() if not isinstance(config, made.config_class) else config
    with torch.device("meta"):
        size = sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
    if size > HUGE:
        for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig))):
            if isinstance(getattr(part, "num_hidden_layers", None), int):
                part.num_hidden_layers = min(4, part.num_hidden_layers)
    return made(config)


# What is looked at.


def check(model: nn.Module, export: bool = True) -> dict[str, Any]:
    """Reduces a network and looks at the result; what was found. Raises DownresError where it is refused, else Unsound."""
    channels, *native = input_size_of(model)
    adapter = find_adapter(model)
    height, width = (adapter.image if adapter is not None else None) or native
    unit = (32, 32) if adapter is None or is_flexible(adapter) else adapter.unit
    sides = [_smaller(side, step) for side, step in zip((height, width), unit, strict=True)]
    target = sides[0] if sides[0] == sides[1] else tuple(sides)
    size = (channels, height, width)
    row: dict[str, Any] = {"native": format_resolution((height, width)), "resolution": format_resolution(target)}
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            whole = leaves(model(images))
        except Exception as error:
            downres.reduce(model, resolution=target)
            if len(asked := required_inputs(model)) > 1:
                raise Nothing(f"it asks for {', '.join(p.name for p in asked)}, of which an image alone is given") from error
            raise Unsound(f"it does not run on images ({str(error)[:200]}), and reduce does not say so") from error
        if not whole:
            raise Nothing("without more configuration it returns no tensor")
        reduced = downres.reduce(model, resolution=target)
        small = leaves(reduced(images))
        _same_tree(whole, small)
        _finite(whole, small)
        row["macs"] = downres.measure_cost(model, size).macs
        row["reduced_macs"] = downres.measure_cost(reduced, size).macs
        if row["reduced_macs"] >= row["macs"]:
            raise Unsound(f"{row['reduced_macs']} MACs are not fewer than the {row['macs']} of the original")
        again = leaves(copy.deepcopy(reduced)(images))
        if again.keys() != small.keys() or not all(_equal(again[k], small[k]) for k in small):
            raise Unsound("its deepcopy gives other numbers")
        if hasattr(model, "downres"):
            raise Unsound("the original says that it was reduced")
        now = model.state_dict()
        if now.keys() != before.keys() or not all(_equal(now[k], before[k]) for k in before):
            raise Unsound("the original's tensors have changed")
        if _tells_apart(whole) and not _tells_apart(small):
            raise Unsound("two images give one and the same answer")
        if export:
            row |= _exported(model, reduced, images, small)
    return row


def _smaller(side: int, step: int) -> int:
    found = max(1, round(SCALE * side / step)) * step
    return found if found < side else max(step, side - step)


def leaves(output: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors in what a network returns, by where they are: a walk of its own, not downres's."""
    if isinstance(output, Tensor):
        return {path: output}
    if isinstance(output, dict):
        items = list(output.items())
    elif isinstance(output, (list, tuple)):
        items = list(enumerate(output))
    else:
        items = list(vars(output).items()) if hasattr(output, "__dict__") else []
    return {key: tensor for name, item in items for key, tensor in leaves(item, f"{path}.{name}").items()}


def _same_tree(whole: dict[str, Tensor], small: dict[str, Tensor]) -> None:
    shapes = [{k: (tuple(t.shape), str(t.dtype)) for k, t in found.items()} for found in (whole, small)]
    if shapes[0] != shapes[1]:
        raise Unsound(f"it returns {shapes[1]}, the original {shapes[0]}"[:600])


def _finite(whole: dict[str, Tensor], small: dict[str, Tensor]) -> None:
    for key, tensor in small.items():
        if whole[key].isfinite().all() and not tensor.isfinite().all():
            raise Unsound(f"{key or 'the answer'} is not finite")


def _tells_apart(answers: dict[str, Tensor]) -> bool:
    return any(not _equal(t[0], t[1]) for t in answers.values() if t.ndim and len(t) == 2)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


class _Leaves(nn.Module):
    """Returns the tensors alone, in their order, as a graph does; those without a row for each image are left out."""

    def __init__(self, network: nn.Module, keys: list[str]) -> None:
        super().__init__()
        self.network, self.keys = network, keys

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = leaves(self.network(x))
        return tuple(found[key] for key in self.keys)


def _exported(model: nn.Module, reduced: nn.Module, images: Tensor, answers: dict[str, Tensor]) -> dict[str, Any]:
    keys = [key for key, t in answers.items() if t.ndim and len(t) == len(images)]
    expected = [answers[key] for key in keys]
    found, sentence = _run_exported(_Leaves(reduced, keys), images, len(keys))
    if found is None:
        whole, of_original = _run_exported(_Leaves(model, keys), images, len(keys))
        if whole is not None:
            raise Unsound(f"the original is exported, the reduced one is not: {sentence}")
        return {"sentence": sentence, "of_original": of_original}
    worst = max(_distance(a, b.numpy()) for a, b in zip(found, expected, strict=True))
    if not worst <= TOLERANCE:
        whole, _ = _run_exported(_Leaves(model, keys), images, len(keys))
        native = [t.numpy() for t in _Leaves(model, keys)(images)]
        same = whole is not None and max(map(_distance, whole, native)) <= TOLERANCE
        raise Unsound(f"ONNX Runtime differs by {worst:.1e} of the largest value{' (not of the original)' if same else ''}")
    return {"onnx_difference": float(f"{worst:.1e}")}


def _run_exported(model: nn.Module, images: Tensor, outputs: int) -> tuple[list[np.ndarray] | None, str]:
    names = [f"output{i}" for i in range(outputs)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = export_onnx(model, tuple(images.shape[1:]), Path(folder) / "model.onnx", names)
            return list(OnnxRuntime(file, threads=1)(images.numpy())), ""
        except downres.DownresError as error:
            return None, str(error)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    a, b = np.nan_to_num(a.astype(np.float64)), np.nan_to_num(b.astype(np.float64))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) if a.size else 0.0


# A process for each, rows in a file.


def row_of(name: str, export: bool) -> dict[str, Any]:
    """What became of one network: its result, and the sentence or the fault."""
    row: dict[str, Any] = {"network": name, "exported": export}
    try:
        model = build(name)
    except Exception as error:
        return row | {"result": NOT_BUILT, "sentence": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    try:
        row |= check(model, export)
        return row | {"result": IN_TORCH if "sentence" in row else WORKS}
    except downres.DownresError as error:
        return row | {"result": REFUSED, "sentence": str(error)}
    except Nothing as error:
        return row | {"result": NOT_BUILT, "sentence": str(error)}
    except Unsound as error:
        return row | {"result": FAULT, "sentence": str(error)}
    except Exception as error:
        last = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
        return row | {"result": FAULT, "sentence": f"{type(error).__name__}: {str(error)[:300]} ({' '.join(last)})"}


def _child(name: str, export: bool, file: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    Path(file).write_text(json.dumps(row_of(name, export)))


def in_a_process(name: str, export: bool) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(name, export, str(file)))
        process.start()
        process.join(MOST_SECONDS)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        if file.is_file() and not late:
            row = json.loads(file.read_text())
        else:
            what = f"took more than {MOST_SECONDS} s" if late else f"its process ended with {process.exitcode}"
            row = {"network": name, "exported": export, "result": FAULT, "sentence": what}
    return row | {"seconds": round(time.monotonic() - start, 1)}


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """The last row of each network: of the lines in that file, else of the result that is kept."""
    kept = RESULTS / "coverage.json"
    if file.is_file():
        rows = map(json.loads, file.read_text().splitlines())
    else:
        rows = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    return {row["network"]: row for row in rows if row["result"] != NOT_YET}


def counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By library: how many networks there are, and how many of each result; of those that work, how many were exported."""
    found = {}
    for library in LIBRARIES:
        own = [row for row in rows if row["network"].startswith(f"{library}:")]
        results = [row["result"] for row in own]
        found[library] = {"networks": len(own)} | {r: results.count(r) for r in RESULTS_OF}
        found[library]["exported"] = sum("onnx_difference" in row for row in own)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=Path, default=Path("coverage.jsonl"), help="where rows are kept, and read again")
    options.add_argument("--only", default="", help="a regular expression: the networks to run, also those that have a row")
    options.add_argument("--no-export", action="store_true", help="leave ONNX out: several times as quick")
    options.add_argument("--list", action="store_true", help="ask the libraries anew which networks there are (minutes)")
    options.add_argument("--most", type=int, help="so many networks, then end")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()
    torch.set_num_threads(1)
    for library in ("timm", "torchvision", "segmentation_models_pytorch", "transformers", "downres.families.transformers_vit"):
        importlib.import_module(library)  # once, not in each process
    kept = RESULTS / "coverage.json"
    if kept.is_file() and not given.list:
        names = [row["network"] for row in json.loads(kept.read_text())["rows"]]
    else:
        names = list(dict.fromkeys(name for named in LIBRARIES.values() for name in named()))

    known, export = read_rows(given.rows), not given.no_export
    if not given.rows.is_file():
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    if given.only:
        wanted = [name for name in names if re.search(given.only, name)] or [given.only]
    else:
        wanted = [name for name in names if name not in known or (export and not known[name]["exported"])]
    for name in wanted[: given.most]:
        row = in_a_process(name, export)
        with given.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:60s} {row['result']:14s} {row['seconds']:6.1f} s  {row.get('sentence', '')}", flush=True)

    known = read_rows(given.rows)
    rows = [known.get(name, {"network": name, "result": NOT_YET}) for name in names]
    for library, found in counts(rows).items():
        print(library, ", ".join(f"{number} {result}" for result, number in found.items()), file=sys.stderr)
    command = "python benchmarks/coverage.py" + ("" if export else " --no-export")
    content = {"scale": SCALE, "tolerance": TOLERANCE, "counts": counts(rows), "rows": rows}
    print(f"{save('coverage', command, given.date, content)} written")


if __name__ == "__main__":
    main()
