"""What is shipped: model.onnx, weights, the exact preprocessing, a manifest; and the checks that prove it.

A folder of model.onnx (the small input, batch free), model.safetensors (the same weights for torch), manifest.json and,
where the quality was cross-fitted, folds.safetensors (the heads that it was measured with).
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from .data import Dataset, Unreadable, batches, decode, open_data, preprocess, resize_and_crop
from .errors import DownresError
from .families import Model, load_model
from .measure.quality import count_correct
from .probe import find_head, logits_of
from .records import Candidate, Preprocessing, Record, Recovery, Result
from .reduction import made_for, reduce
from .runtimes.onnxruntime import OnnxRuntime, export_onnx
from .runtimes.torch import TorchRuntime

FORMAT = 1
PARITY_IMAGES = 32
TOLERANCE = 1e-3
"""Largest difference of logits between torch and onnxruntime, relative to the largest logit."""
PIXEL_TOLERANCE = 2
"""Largest difference, of 255 levels, between the pixels that the network gets and those of PIL's resize."""


@dataclass(frozen=True)
class Finding(Record):
    """One thing that `check` looked at. ok None: it could not be looked at here, `detail` says why."""

    what: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Prediction(Record):
    """One picture's most likely classes, with softmax probabilities in percent."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class _Logits(nn.Module):
    """A classifier that returns the bare logits, whatever the model wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits_of(self.model(x))


def export(
    folder: Path,
    network: nn.Module,
    *,
    preprocessing: Preprocessing,
    result: Result,
    original: Result,
    recovery: Recovery,
    classes: Sequence[str],
    source: dict[str, Any],
    folds: Sequence[dict[str, Any]] = (),
    fold_tensors: dict[str, np.ndarray] | None = None,
    versions: dict[str, str] | None = None,
) -> Path:
    """Write the artifact of `network` (final weights; takes the small input) to `folder`, whole or not at all.

    result: as the search measured it; recovery: how these very weights were recovered, which after cross-fitting is
    one more fit on all images. source: 'model' (how to build the network again), 'data' (how to open the proof images again).
    folds: how the stated quality was measured, fold by fold, when not with the shipped weights themselves.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = (len(preprocessing.mean), *preprocessing.hw)
    export_onnx(_Logits(network), size, partial / "model.onnx")
    save_file({k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}, partial / "model.safetensors")
    if fold_tensors:
        save_file({k: torch.from_numpy(v) for k, v in fold_tensors.items()}, partial / "folds.safetensors")
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "candidate": result.candidate.to_json(),
        "input": {"name": "input", "shape": ["batch", *size], "dtype": "float32"},
        "output": {"name": "logits", "shape": ["batch", len(classes)]},
        "preprocessing": preprocessing.to_json(),
        "classes": list(classes),
        "result": result.to_json(),
        "original": original.to_json(),
        "recovery": recovery.to_json(),
        "source": source,
        "folds": list(folds),
        "versions": versions or {},
        "sha256": {file.name: _sha256(file) for file in sorted(partial.iterdir())} | {"manifest.json": ""},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    manifest["sha256"]["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact; DownresError when there is none or it is of another format."""
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        assert manifest["format"] == FORMAT
    except FileNotFoundError:
        raise DownresError(
            f"{folder} is not a shipped model (it has no manifest.json): give the folder RUN/best of a search."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise DownresError(f"{file} is broken or of another format than {FORMAT}: export the model again.") from None
    return manifest


def predict(folder: str | Path, images: Sequence[str | Path], *, top: int = 5, threads: int | None = None) -> list[Prediction]:
    """Classes of pictures by the artifact alone: its preprocessing and its ONNX file.

    Raises DownresError for a broken artifact or a picture that cannot be read.
    """
    manifest = read_manifest(folder)
    _refuse_changed(Path(folder), manifest)
    preprocessing = Preprocessing.from_json(manifest["preprocessing"])
    runtime = OnnxRuntime(Path(folder) / "model.onnx", threads)
    found = []
    for image in images:
        try:
            pixels = decode(image)
        except Unreadable as error:
            raise DownresError(f"Cannot read {image}: {error}; give a photograph.") from None
        out = runtime(preprocess(pixels, preprocessing)[None].numpy())[0][0]
        share = np.exp(out - out.max()) / np.exp(out - out.max()).sum()
        order = np.argsort(-share, kind="stable")[:top]
        found.append(
            Prediction(str(image), tuple(manifest["classes"][i] for i in order), tuple(100 * float(share[i]) for i in order))
        )
    return found


def check(
    folder: str | Path,
    *,
    model: Model | nn.Module | str | None = None,
    data: str | Path | Dataset | None = None,
    threads: int | None = None,
) -> list[Finding]:
    """Prove an artifact: files unchanged, torch and onnxruntime equal on real images, the quality as stated.

    model: needed when the network came from a file or from Python, because the manifest never runs code by itself.
    data: where the proof images are now, when they are no longer where the search found them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    changed = _changed(folder, manifest)
    findings = [
        Finding(
            "files", not changed, f"changed: {', '.join(changed)}" if changed else f"{len(manifest['sha256'])} files as shipped"
        )
    ]
    if changed:
        return findings
    preprocessing = Preprocessing.from_json(manifest["preprocessing"])
    runtime = OnnxRuntime(folder / "model.onnx", threads)
    network, why_no_network = _network(folder, manifest, model)
    dataset, why_no_data = _dataset(manifest, data)
    if dataset is None:
        unseen = ("preprocessing = PIL", "torch = onnxruntime", "quality")
        return [*findings, *(Finding(what, None, why_no_data) for what in unseen)]
    proof = np.concatenate([fold.test for fold in dataset.folds])
    chosen = proof[:: max(1, len(proof) // PARITY_IMAGES)][:PARITY_IMAGES]
    findings.append(_pixels(dataset, chosen, preprocessing))
    if network is None:
        findings.append(Finding("torch = onnxruntime", None, why_no_network))
    else:
        findings.append(_parity(network, runtime, dataset, chosen, preprocessing, threads))
    findings.append(_quality(folder, manifest, runtime, network, dataset, preprocessing, threads))
    return findings


def _parity(
    network: nn.Module, runtime: OnnxRuntime, dataset: Dataset, chosen: np.ndarray, p: Preprocessing, threads: int | None
) -> Finding:
    """The shipped file in onnxruntime against the shipped weights in torch, on preprocessed photographs."""
    torch_side = TorchRuntime(_Logits(network), threads)
    worst = scale = 0.0
    agree = 0
    for i in chosen:
        image = preprocess(dataset.images[int(i)], p)[None].numpy()
        ours, theirs = runtime(image)[0], torch_side(image)[0]
        worst, scale = max(worst, float(np.abs(ours - theirs).max())), max(scale, float(np.abs(theirs).max()))
        agree += int(ours.argmax() == theirs.argmax())
    ok = worst <= TOLERANCE * max(scale, 1.0) and agree == len(chosen)
    detail = f"largest difference {worst:.2g} at logits up to {scale:.3g}, same class on {agree} of {len(chosen)} real images"
    return Finding("torch = onnxruntime", ok, detail)


def _pixels(dataset: Dataset, chosen: np.ndarray, p: Preprocessing) -> Finding:
    """The pixels that the network gets against PIL's own resize, box by box."""
    worst, differ, total = 0, 0, 0
    for i in chosen:
        pixels = dataset.images[int(i)]
        grey = pixels.ndim == 2 or pixels.shape[2] == 1 or len(p.mean) == 1
        picture = Image.fromarray(pixels.squeeze()).convert("L" if grey else "RGB")
        height, width = _covering(pixels.shape, p)
        resized = picture.resize((width, height), Image.Resampling[p.interpolation.upper()])
        top, left = (round((have - want) / 2) for have, want in zip((height, width), p.hw, strict=True))
        theirs = np.asarray(resized.crop((left, top, left + p.hw[1], top + p.hw[0]))).astype(int)
        ours = resize_and_crop(pixels, p).permute(1, 2, 0).numpy().astype(int)
        apart = np.abs(ours - theirs.reshape(ours.shape))
        worst, differ, total = max(worst, int(apart.max())), differ + int((apart > 0).sum()), total + apart.size
    detail = (
        f"at most {worst} of 255 levels apart, {100 * differ / total:.2g} % of the values differ, on {len(chosen)} real images"
    )
    return Finding("preprocessing = PIL", worst <= PIXEL_TOLERANCE, detail)


def _covering(shape: tuple[int, ...], p: Preprocessing) -> tuple[int, int]:
    """(height, width) that a picture is resized to before the crop, computed another way than in `data.preprocess`."""
    target = [int(side / p.crop_ratio + 1e-6) for side in p.hw]
    if target[1] * shape[0] >= target[0] * shape[1]:  # the width decides
        return max(target[0], target[1] * shape[0] // shape[1]), target[1]
    return target[0], max(target[1], target[0] * shape[1] // shape[0])


def _quality(
    folder: Path,
    manifest: dict[str, Any],
    runtime: OnnxRuntime,
    network: nn.Module | None,
    dataset: Dataset,
    p: Preprocessing,
    threads: int | None,
) -> Finding:
    """Top-1 on all proof images through onnxruntime; with cross-fitting, each fold by the weights that never saw it."""
    stated = manifest["result"]["quality"]
    labels, correct, n = dataset.labels, 0, 0
    tensors = load_file(folder / "folds.safetensors") if (folder / "folds.safetensors").exists() else {}
    for i, fold in enumerate(dataset.folds):
        one, how = runtime, p
        if manifest["folds"]:
            how = p.at(crop_ratio=manifest["folds"][i]["crop_ratio"])
            own = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{i}/")}
            if own:
                ready = _with_weights(folder, manifest, network, own, threads)
                if ready is None:
                    return Finding(
                        "quality", None, "the folds' BatchNorm statistics need the torch network: name it with --model"
                    )
                one = ready
        out = np.concatenate([one(batch.numpy())[0] for batch in batches(dataset.images, fold.test, how, 8)])
        correct += int(count_correct(out, labels[fold.test]).sum())
        n += len(fold.test)
    # Another processor may round a logit the other way: one image in a thousand is not a change of the model.
    ok = n == stated["n"] and abs(correct - stated["correct"]) <= max(1, n // 1000)
    return Finding(
        "quality",
        ok,
        f"top-1 {100 * correct / n:.2f} % ({correct}/{n}), stated {stated['top1']:.2f} % ({stated['correct']}/{stated['n']})",
    )


def _with_weights(
    folder: Path, manifest: dict[str, Any], network: nn.Module | None, own: dict[str, torch.Tensor], threads: int | None
) -> OnnxRuntime | None:
    """The shipped graph with some tensors replaced: initializers of the same name, else by exporting the torch network."""
    graph = onnx.load(folder / "model.onnx")
    by_name = {initializer.name.removeprefix("model."): initializer for initializer in graph.graph.initializer}
    if own.keys() <= by_name.keys():
        for name, tensor in own.items():
            target = by_name[name]
            target.CopyFrom(numpy_helper.from_array(tensor.numpy(), target.name))
        return OnnxRuntime(graph.SerializeToString(), threads)
    if network is None:
        return None
    import tempfile

    network = copy.deepcopy(network)  # the next fold starts from the shipped weights again
    network.load_state_dict({**network.state_dict(), **own})
    p = Preprocessing.from_json(manifest["preprocessing"])
    with tempfile.TemporaryDirectory() as place:
        file = export_onnx(_Logits(network), (len(p.mean), *p.hw), Path(place) / "fold.onnx")
        return OnnxRuntime(file.read_bytes(), threads)


def _network(folder: Path, manifest: dict[str, Any], model: Model | nn.Module | str | None) -> tuple[nn.Module | None, str]:
    """The torch network of the artifact, or None and why."""
    source = manifest["source"]["model"]
    if model is None:
        if not source["spec"].startswith(("timm:", "torchvision:", "transformers:")):
            return None, "the network is from the user's own code: name it with --model path/to/file.py:function"
        try:
            model = load_model(source["spec"], pretrained=False, num_classes=source["num_classes"])
        except DownresError as error:
            return None, f"the network cannot be made again ({str(error).rstrip('.')}): name it with --model"
    elif isinstance(model, str):
        model = load_model(model, pretrained=False)
    module = copy.deepcopy(model.module if isinstance(model, Model) else model)  # the caller's keeps its weights
    candidate = Candidate.from_json(manifest["candidate"])
    native = Preprocessing.from_json(source["preprocessing"])
    head, width, outputs = find_head(made_for(module, native.hw), (len(native.mean), *native.hw))
    if outputs != len(manifest["classes"]) and head is not None:
        module.set_submodule(head, nn.Linear(width, len(manifest["classes"])))
    module = reduce(module, candidate, input_size=(len(native.mean), *native.hw), resize_input=False)
    try:
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError:
        raise DownresError(
            f"The network given is not the one in {folder}: its weights do not fit; give the one that was searched."
        ) from None
    return module.eval(), ""


def _dataset(manifest: dict[str, Any], data: str | Path | Dataset | None) -> tuple[Dataset | None, str]:
    """The proof images, or None and why."""
    source = manifest["source"]["data"]
    if isinstance(data, Dataset):
        dataset = data
    else:
        where = str(data or source["path"])
        if not where:
            return None, "the search was given its images in Python: give them as data"
        if data is None and not where.startswith("demo:") and not Path(where).exists():
            return None, f"the images are not at {where} any more: name their folder with --data"
        outputs = None if source["fit_head"] else len(manifest["classes"])
        dataset = open_data(where, outputs, ("train", "val"), source["val_fraction"], source["folds"], source["seed"])
    if dataset.fingerprint() != source["sha256"]:
        raise DownresError(
            "The images are not those that the quality was measured on (names, pixels, labels or split differ): "
            "name the same folder with --data."
        )
    return dataset, ""


def _changed(folder: Path, manifest: dict[str, Any]) -> list[str]:
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or not _manifest_as_written(folder / "manifest.json", digests.get("manifest.json")):
        return ["manifest.json"]  # it vouches for the others
    changed = []
    for name, digest in digests.items():
        file = folder / name
        if name != "manifest.json" and (not file.is_file() or _sha256(file) != digest):
            changed.append(name if file.is_file() else f"{name} (missing)")
    return changed


def _refuse_changed(folder: Path, manifest: dict[str, Any]) -> None:
    if changed := _changed(folder, manifest):
        raise DownresError(f"{folder} is not as it was shipped (changed: {', '.join(changed)}): copy or export it again.")


def _manifest_as_written(file: Path, digest: Any) -> bool:
    """Whether the bytes of the manifest, its own digest left blank, have that digest."""
    blank = file.read_bytes().replace(f'"{digest}"'.encode(), b'""', 1)
    return hashlib.sha256(blank).hexdigest() == digest


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
