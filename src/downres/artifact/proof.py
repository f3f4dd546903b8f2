"""Proving an artifact: its files, its pixels, its graph against torch, its quality."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ..data import Dataset, MaskDataset, batches, find_masks, open_data, open_masks, preprocess, resize_and_crop
from ..data.preprocess import shown_size
from ..errors import DownresError
from ..families import Model, load_model
from ..measure.quality import count_correct
from ..measure.segmentation import Tallies, segmentation_quality, tally
from ..probe import find_answer
from ..records import CLASSES, Candidate, Dense, Preprocessing, Record
from ..recover.masks import picture_classes
from ..reduction import made_for, reduce
from ..runtimes.onnxruntime import OnnxRuntime, export_onnx
from ..runtimes.torch import TorchRuntime
from .manifest import changed_files, read_manifest
from .write import answering

PARITY_IMAGES = 32
TOLERANCE = 1e-3
"""Largest difference of logits between torch and onnxruntime, relative to the largest logit."""
PIXELS_ALIKE = 0.9999
"""Share of the pixels of a class map that torch and onnxruntime have to agree on: near ties may fall either way."""
MIOU_TOLERANCE = 0.05
"""Points of mIoU that another processor may differ by, for the same reason."""
PIXEL_TOLERANCE = 2
"""Largest difference, of 255 levels, between the pixels that the network gets and those of PIL's resize."""


@dataclass(frozen=True)
class Finding(Record):
    """One thing that `check` looked at. ok None: it could not be looked at here, `detail` says why."""

    what: str
    ok: bool | None
    detail: str


def check(
    folder: str | Path,
    *,
    model: Model | nn.Module | str | None = None,
    data: str | Path | Dataset | MaskDataset | None = None,
    threads: int | None = None,
) -> list[Finding]:
    """Prove an artifact: files unchanged, torch and onnxruntime equal on real images, the quality as stated.

    model: needed when the network came from a file or from Python, because the manifest never runs code by itself.
    data: where the proof images are now, when they are no longer where the search found them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    changed = changed_files(folder, manifest)
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
        findings.append(_parity(network, manifest, runtime, dataset, chosen, preprocessing, threads))
    findings.append(_quality(folder, manifest, runtime, network, dataset, preprocessing, threads))
    return findings


def _parity(
    network: nn.Module,
    manifest: dict[str, Any],
    runtime: OnnxRuntime,
    dataset: Dataset | MaskDataset,
    chosen: np.ndarray,
    p: Preprocessing,
    threads: int | None,
) -> Finding:
    """The shipped file in onnxruntime against the shipped weights in torch, on preprocessed photographs."""
    dense = manifest["dense"] and Dense.from_json(manifest["dense"])
    torch_side = TorchRuntime(answering(network, dense), threads)
    worst, scale, agree, total = 0.0, 0.0, 0, 0
    for i in chosen:
        image = preprocess(dataset.images[int(i)], p)[None].numpy()
        ours, theirs = runtime(image)[0][0], torch_side(image)[0][0]
        if dense is None or dense.output != CLASSES:
            worst, scale = max(worst, float(np.abs(ours - theirs).max())), max(scale, float(np.abs(theirs).max()))
            if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
                return Finding("torch = onnxruntime", False, "NaN or infinite logits on real images")
            ours, theirs = ours.argmax(0), theirs.argmax(0)
        agree, total = agree + int((ours == theirs).sum()), total + ours.size
    ok = worst <= TOLERANCE * max(scale, 1.0) and agree >= total * (1.0 if dense is None else PIXELS_ALIKE)
    detail = f"largest difference {worst:.2g} at logits up to {scale:.3g}, " if scale else ""
    if dense is None:
        detail += f"same class on {agree} of {total} real images"
    else:
        detail += f"same class on {100 * agree / total:.4f} % of the pixels of {len(chosen)} real images"
    return Finding("torch = onnxruntime", ok, detail)


def _pixels(dataset: Dataset | MaskDataset, chosen: np.ndarray, p: Preprocessing) -> Finding:
    """The pixels that the network gets against PIL's own resize, box by box."""
    worst, differ, total = 0, 0, 0
    for i in chosen:
        pixels = dataset.images[int(i)]
        grey = pixels.ndim == 2 or pixels.shape[2] == 1 or len(p.mean) == 1
        picture = Image.fromarray(pixels.squeeze()).convert("L" if grey else "RGB")
        height, width = _covering(pixels.shape, p) if p.fit == "crop" else shown_size((pixels.shape[0], pixels.shape[1]), p)
        resized = picture.resize((width, height), Image.Resampling[p.interpolation.upper()])
        shown = (min(height, p.hw[0]), min(width, p.hw[1]))  # without what is filled up
        top, left = (round((have - want) / 2) for have, want in zip((height, width), shown, strict=True))
        theirs = np.asarray(resized.crop((left, top, left + shown[1], top + shown[0]))).astype(int)
        ours = resize_and_crop(pixels, p)[:, : shown[0], : shown[1]].permute(1, 2, 0).numpy().astype(int)
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
    dataset: Dataset | MaskDataset,
    p: Preprocessing,
    threads: int | None,
) -> Finding:
    """On all proof images through onnxruntime; with cross-fitting, each fold by the weights that never saw it."""
    correct, parts = 0, []
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
        if isinstance(dataset, MaskDataset):
            masks = dataset.masks.take(fold.test)
            parts.append(tally(_class_maps(one, manifest, dataset, fold.test, how), masks, len(dataset.classes)))
        else:
            out = np.concatenate([one(batch.numpy())[0] for batch in batches(dataset.images, fold.test, how, 8)])
            correct += int(count_correct(out, dataset.labels[fold.test]).sum())
    stated, n = manifest["result"]["quality"], sum(len(fold.test) for fold in dataset.folds)
    if parts:
        found = segmentation_quality(Tallies.concatenate(parts))
        ok = n == stated["n"] and abs(found.miou - stated["miou"]) <= MIOU_TOLERANCE
        said = f"mIoU {found.miou:.2f} % on {n} images, stated {stated['miou']:.2f} % on {stated['n']}"
        return Finding("quality", ok, said)
    # Another processor may round a logit the other way: one image in a thousand is not a change of the model.
    ok = n == stated["n"] and abs(correct - stated["correct"]) <= max(1, n // 1000)
    return Finding(
        "quality",
        ok,
        f"top-1 {100 * correct / n:.2f} % ({correct}/{n}), stated {stated['top1']:.2f} % ({stated['correct']}/{stated['n']})",
    )


def _class_maps(
    runtime: OnnxRuntime, manifest: dict[str, Any], dataset: MaskDataset, indices: np.ndarray, p: Preprocessing
) -> Iterator[np.ndarray]:
    dense = Dense.from_json(manifest["dense"])
    shapes, sizes = dataset.images.shapes, dataset.masks.shapes
    for i, batch in zip(indices, batches(dataset.images, indices, p, 1), strict=True):
        height, width = sizes[i][:2]
        yield picture_classes(runtime(batch.numpy())[0][0], shapes[i], (height, width), dense, p)


def _with_weights(
    folder: Path, manifest: dict[str, Any], network: nn.Module | None, own: dict[str, torch.Tensor], threads: int | None
) -> OnnxRuntime | None:
    """The shipped graph with some tensors replaced: initializers of the same name, else by exporting the torch network."""
    graph = onnx.load(folder / "model.onnx")
    by_name = {re.sub(r"^(model|network)\.", "", initializer.name): initializer for initializer in graph.graph.initializer}
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
        dense = manifest["dense"] and Dense.from_json(manifest["dense"])
        file = export_onnx(answering(network, dense), (len(p.mean), *p.hw), Path(place) / "fold.onnx")
        return OnnxRuntime(file.read_bytes(), threads)


def _network(folder: Path, manifest: dict[str, Any], model: Model | nn.Module | str | None) -> tuple[nn.Module | None, str]:
    """The torch network of the artifact, or None and why."""
    source = manifest["source"]["model"]
    if model is None:
        if not source["spec"] or ".py:" in source["spec"]:
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
    answer = find_answer(made_for(module, native.hw), (len(native.mean), *native.hw))
    if answer.outputs != len(manifest["classes"]) and answer.head is not None:
        module.set_submodule(answer.head, nn.Linear(answer.width, len(manifest["classes"])))
    module = reduce(module, candidate, input_size=(len(native.mean), *native.hw), resize_input=False)
    try:
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError:
        raise DownresError(
            f"The network given is not the one in {folder}: its weights do not fit; give the one that was searched."
        ) from None
    return module.eval(), ""


def _dataset(
    manifest: dict[str, Any], data: str | Path | Dataset | MaskDataset | None
) -> tuple[Dataset | MaskDataset | None, str]:
    """The proof images, or None and why."""
    source = manifest["source"]["data"]
    dataset: Dataset | MaskDataset
    if isinstance(data, (Dataset, MaskDataset)):
        dataset = data
    else:
        where = str(data or source["path"])
        if not where:
            return None, "the search was given its images in Python: give them as data"
        if data is None and not where.startswith("demo:") and not Path(where).exists():
            return None, f"the images are not at {where} any more: name their folder with --data"
        outputs = None if source["fit_head"] else len(manifest["classes"])
        how = {name: source[name] for name in ("val_fraction", "folds", "seed")}
        if manifest["dense"] is None:
            dataset = open_data(where, outputs, **how)
        else:
            classes = source["classes_file"]
            if classes is not None and not Path(classes).is_file():
                classes = manifest["classes"]  # enough for masks of indices; what comes out otherwise is refused below
            dataset = open_masks(find_masks(where, classes=classes), outputs=outputs, **how)
    if dataset.fingerprint() != source["sha256"]:
        raise DownresError(
            "The images are not those that the quality was measured on (names, pixels, labels or split differ): "
            "name the same folder with --data."
        )
    return dataset, ""
