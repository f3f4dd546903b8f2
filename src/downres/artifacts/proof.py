"""Proving an artifact: its files, its pixels, its graph against torch, its quality."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from ..copying import copied
from ..engines import Runtime
from ..engines.onnxruntime import export_onnx
from ..engines.torch import TorchRuntime
from ..errors import DownresError, first_line
from ..families import Model, load_model
from ..images import Images, batches, preprocess, resize_and_crop
from ..images.archives import matched
from ..images.preprocess import divisor, shown_size
from ..parse import INT8, is_pattern, name_of
from ..probe import find_answer
from ..record import read_json
from ..records import Candidate, Preprocessing, Record
from ..reduction import made_for, reduce
from ..tasks import Data, Question, Task, known_task, restored
from ..tasks.dealt import can_deal, dealt, first
from .graph import Graph
from .manifest import (
    EMBEDDED,
    MOST_BYTES,
    PICTURE,
    PREPROCESSED,
    PROOF,
    Embedded,
    FoldPart,
    Port,
    at_resolution,
    changed_files,
    embedded_in,
    read_manifest,
    resolutions_of,
    served_by,
    served_of,
)
from .served import served_alike
from .serving import proof_of

PARITY_IMAGES = 32
LIMIT_S = 60.0
"""Seconds that a graph may take for one picture: one that never ends is no proof."""
PIXEL_TOLERANCE = 2
"""Largest difference, of 255 levels, between the pixels that the network gets and those of PIL's resize."""


INSIDE = "preprocessing inside"


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
    data: Any = None,
    threads: int | None = None,
    task: str | type[Task] | None = None,
) -> list[Finding]:
    """Prove an artifact: files unchanged, torch and its runtime equal on real images (of fewer bits as far apart as when it was
    shipped), the quality as stated.

    model: needed when the network came from a file or from Python, because the manifest never runs code by itself.
    data: where the proof images are now, when they are no longer where the search found them. task: of one's own, where the
    artifact has one. A graph that takes longer than LIMIT_S for a picture is stopped with a DownresError.
    """
    known_task(task)
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
    sizes = resolutions_of(manifest)
    try:
        own = restored(manifest["task"], manifest)
        _, why_no_data = opened_data(own, folder, manifest, data)
        for size in sizes:
            found = _looked_at(own, folder, at_resolution(manifest, size), model, why_no_data, threads)
            at = f"{name_of(size)} px: " if len(sizes) > 1 else ""
            findings += [dataclasses.replace(one, what=at + one.what) for one in found]
        return findings
    except (TypeError, ValueError, LookupError, EOFError, SafetensorError, BadZipFile) as error:
        why = first_line(error)[:100]
        raise DownresError(f"The files in {folder} do not fit their manifest ({why}): export the model again.") from error


def _looked_at(
    own: Task,
    folder: Path,
    manifest: dict[str, Any],
    model: Model | nn.Module | str | None,
    why_no_data: str,
    threads: int | None,
) -> list[Finding]:
    """All but the files, at the resolution that the manifest is of. why_no_data: '' where the task has its images."""
    preprocessing = Preprocessing.from_json(manifest["preprocessing"])
    runtime = Graph(folder, manifest, threads, LIMIT_S, spread=True)
    served = served_of(manifest)
    equal = f"torch = {served.name}" if served.distance is None else f"torch and {served.name} {served.precision}"
    network, why_no_network = _network(folder, manifest, model)
    if why_no_data:
        inside = (INSIDE,) if manifest.get("embedded") else ()
        unseen = ("preprocessing = PIL", equal, "quality", *inside, "serve.py = predict")
        return [*(Finding(what, None, why_no_data) for what in unseen)]
    chosen = parity_images(own)
    findings = [_pixels(own.data, chosen, preprocessing)]
    if network is None:
        findings.append(Finding(equal, None, why_no_network))
    elif served.distance is None:
        findings.append(Finding(equal, *_parity(own, network, runtime, chosen, preprocessing, threads)))
    else:
        found = distance(own, network, runtime, chosen, preprocessing, threads)
        said = f"answers {found:.2g} apart, {served.distance:.2g} when it was shipped, on {len(chosen)} real images"
        findings.append(Finding(equal, abs(found - served.distance) <= 0.1 * served.distance + 1e-3, said))
    findings.append(_quality(own, folder, manifest, runtime, network, preprocessing, threads))
    if manifest.get("embedded"):
        findings.append(_as_embedded(own, folder, manifest, threads))
    findings.append(Finding("serve.py = predict", *served_alike(own, folder, manifest, runtime, preprocessing)))
    return findings


def _parity(
    task: Task, network: nn.Module, runtime: Runtime, chosen: np.ndarray, p: Preprocessing, threads: int | None
) -> tuple[bool, str]:
    """The shipped file in its runtime against the shipped weights in torch, on preprocessed photographs."""
    torch_side = TorchRuntime(task.serve(network), threads)
    return task.parity(*(_answers(one, task.data.images, chosen, p) for one in (runtime, torch_side)))


def distance(
    task: Task, network: nn.Module, runtime: Runtime, chosen: np.ndarray, p: Preprocessing, threads: int | None = None
) -> float:
    """How far a file of fewer bits answers from its network in float, as a part of what that answers: of numbers the root of
    the mean square, of class maps the share of pixels.
    """
    both = (_answers(one, task.data.images, chosen, p) for one in (runtime, TorchRuntime(task.serve(network), threads)))
    return _distance(zip(*both, strict=True))


def _distance(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of answers from those that they should be."""
    apart = whole = 0.0
    for ours, theirs in pairs:
        if ours.dtype.kind == "f":
            apart, whole = apart + float(np.square(ours - theirs).sum()), whole + float(np.square(theirs).sum())
        else:
            apart, whole = apart + float((ours != theirs).sum()), whole + ours.size
    return float(np.sqrt(apart / max(whole, 1e-12))) if ours.dtype.kind == "f" else apart / whole


def embedded_apart(task: Task, folder: Path, manifest: dict[str, Any], file: Path, threads: int | None = None) -> Embedded:
    """What a file with its preprocessing inside changes, on some of the proof images: of the pixels that it makes, and of the
    answers of the model in the folder.
    """
    p, (engine, precision) = Preprocessing.from_json(manifest["preprocessing"]), served_by(manifest)
    taken = Port(PICTURE, (1, "height", "width", 3), "uint8")
    chosen = parity_images(task)
    model = Graph(folder, manifest, threads, LIMIT_S)
    whole = Graph(file.parent, manifest, threads, LIMIT_S, stem=EMBEDDED, taken=taken)
    levels = np.array(p.std, np.float64)[:, None, None] * divisor(np.dtype(np.uint8), p)
    pictures = [as_colours(task.data.images[int(i)]) for i in chosen]

    def through(one: Runtime, *, decoded: bool) -> Iterator[np.ndarray]:
        for picture in pictures:
            yield one(picture[None] if decoded else preprocess(picture, p)[None].numpy())[0][0]

    with tempfile.TemporaryDirectory(prefix="downres-") as place:
        engine.up_to(file, PREPROCESSED, pixels := Path(place) / file.name)
        inside = engine.load(pixels, threads, LIMIT_S, precision=precision)
        both = zip(through(inside, decoded=True), (preprocess(one, p).numpy() for one in pictures), strict=True)
        # Thousandths of a level are rounding after the resize.
        apart = [(np.abs(ours.astype(np.float64) - theirs) * levels).round(3) for ours, theirs in both]
    changed = None
    if type(task).changed is not Task.changed:
        answers = through(model, decoded=False), through(whole, decoded=True)
        changed = task.changed(*(task.judge(one, chosen, p) for one in answers))
    return Embedded(
        file.name,
        taken,
        max(float(one.max()) for one in apart),
        float(np.mean([one.mean() for one in apart])),
        _distance(zip(through(whole, decoded=True), through(model, decoded=False), strict=True)),
        None if changed is None else float(changed.mean()),
        len(chosen),
    )


def as_colours(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), grey repeated, as `decode` gives it to a network of three channels."""
    planes = picture.reshape(*picture.shape[:2], -1)
    return np.ascontiguousarray(np.broadcast_to(planes, (*planes.shape[:2], 3)))


def _as_embedded(task: Task, folder: Path, manifest: dict[str, Any], threads: int | None) -> Finding:
    """Whether the file with its preprocessing inside is as near as it was when it was written."""
    stated = Embedded.from_json(manifest["embedded"])
    found = embedded_apart(task, folder, manifest, folder / embedded_in(served_by(manifest)[0]), threads)
    # Another processor may round a pixel or an answer the other way.
    alike = (
        abs(found.largest_level - stated.largest_level) <= 1.01
        and abs(found.mean_level - stated.mean_level) <= 0.2 * stated.mean_level + 0.01
        and abs(found.distance - stated.distance) <= 0.2 * stated.distance + 1e-3
        and abs((found.other_answers or 0.0) - (stated.other_answers or 0.0)) <= 1.01 / found.images
        and (found.other_answers is None, found.images) == (stated.other_answers is None, stated.images)
        and (found.file, found.input) == (stated.file, stated.input)
    )
    return Finding(INSIDE, alike, f"{found}" if alike else f"{found}; stated: {stated}")


def parity_images(task: Task) -> np.ndarray:
    """Some of the proof images."""
    proof = task.proof
    return proof[:: max(1, len(proof) // PARITY_IMAGES)][:PARITY_IMAGES]


def _answers(runtime: Runtime, images: Images, indices: np.ndarray, p: Preprocessing) -> Iterator[np.ndarray]:
    for i in indices:
        yield runtime(preprocess(images[int(i)], p)[None].numpy())[0][0]


def _pixels(dataset: Data, chosen: np.ndarray, p: Preprocessing) -> Finding:
    """The pixels that the network gets against PIL's own resize, box by box."""
    if not p.antialias and p.interpolation != "bilinear":
        return Finding("preprocessing = PIL", None, f"PIL has no {p.interpolation} resize without antialiasing")
    worst, differ, total = 0, 0, 0
    for i in chosen:
        pixels = dataset.images[int(i)]
        if len(p.mean) == 1 and pixels.shape[2:] == (3,):
            pixels = np.array(Image.fromarray(pixels).convert("L"))
        height, width = _covering(pixels.shape, p) if p.fit == "crop" else shown_size((pixels.shape[0], pixels.shape[1]), p)
        planes = pixels.reshape(*pixels.shape[:2], -1)
        resized = np.dstack([_by_pil(planes[:, :, i], (width, height), p) for i in range(planes.shape[2])])
        shown = (min(height, p.hw[0]), min(width, p.hw[1]))  # without what is filled up
        top, left = (round((have - want) / 2) for have, want in zip((height, width), shown, strict=True))
        theirs = resized[top : top + shown[0], left : left + shown[1]]
        ours = resize_and_crop(pixels, p)[:, : shown[0], : shown[1]].permute(1, 2, 0).numpy().astype(float)
        levels = 1 if pixels.dtype == np.uint8 else 255 / max(float(np.abs(pixels).max()), 1e-12)
        apart = np.abs(ours - theirs) * levels
        worst, differ, total = max(worst, round(apart.max())), differ + int((apart > 0.5).sum()), total + apart.size
    detail = (
        f"at most {worst} of 255 levels apart, {100 * differ / total:.2g} % of the values differ, on {len(chosen)} real images"
    )
    return Finding("preprocessing = PIL", worst <= PIXEL_TOLERANCE, detail)


def _by_pil(plane: np.ndarray, size: tuple[int, int], p: Preprocessing) -> np.ndarray:
    """One channel (H, W) at size (width, height), as floats."""
    picture = Image.fromarray(np.ascontiguousarray(plane if plane.dtype == np.uint8 else plane.astype(np.float32)))
    how = Image.Resampling[p.interpolation.upper()]
    if p.antialias:
        return np.asarray(picture.resize(size, how)).astype(float)
    # Single pixels of the box that the whole picture is.
    return np.asarray(picture.transform(size, Image.Transform.EXTENT, (0, 0, *picture.size), how)).astype(float)


def _covering(shape: tuple[int, ...], p: Preprocessing) -> tuple[int, int]:
    """(height, width) that a picture is resized to before the crop, computed another way than in `images.preprocess`."""
    target = [int(side / p.crop_ratio + 1e-6) for side in p.hw]
    if target[1] * shape[0] >= target[0] * shape[1]:  # the width decides
        return max(target[0], target[1] * shape[0] // shape[1]), target[1]
    return target[0], max(target[1], target[0] * shape[1] // shape[0])


def _quality(
    task: Task,
    folder: Path,
    manifest: dict[str, Any],
    runtime: Runtime,
    network: nn.Module | None,
    p: Preprocessing,
    threads: int | None,
) -> Finding:
    """On all proof images through onnxruntime; with cross-fitting, each fold by the weights that never saw it."""
    parts = []
    tensors = load((folder / "folds.safetensors").read_bytes()) if (folder / "folds.safetensors").exists() else {}
    for i, fold in enumerate(task.data.folds):
        one: Runtime = runtime
        how = p
        if manifest["folds"]:
            part = FoldPart.from_json(manifest["folds"][i])
            how = p.at(crop_ratio=part.crop_ratio)
            if part.stem != "model":
                one = Graph(folder, manifest, threads, LIMIT_S, spread=True, stem=part.stem)
            own = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{i}/")}
            if own:
                ready = _with_weights(task, folder, manifest, network, own, threads, part.stem)
                if ready is None:
                    return Finding("quality", None, "the weights of the folds need the torch network: name it with `model`")
                one = ready
        parts.append(judged(task, one, fold.test, how))
    found = task.quality(task.evidence_type.concatenate(parts))
    return Finding("quality", *task.as_stated(found, task.score.from_json(manifest["result"]["quality"])))


def judged(task: Task, runtime: Runtime, indices: np.ndarray, p: Preprocessing) -> Any:
    """Evidence of a shipped graph on those images, in batches as large as the task's are."""
    with contextlib.closing(batches(task.data.images, indices, p, task.batch_size)) as source:
        answers = (answer for batch in source for answer in runtime(batch.numpy())[0])
        return task.judge(answers, indices, p)


def _with_weights(
    task: Task,
    folder: Path,
    manifest: dict[str, Any],
    network: nn.Module | None,
    own: dict[str, torch.Tensor],
    threads: int | None,
    stem: str,
) -> Runtime | None:
    """The graph with some tensors replaced: those of the same name in it, else by exporting the torch network."""
    engine, precision = served_by(manifest)
    with tempfile.TemporaryDirectory(prefix="downres-") as place:
        file = Path(place) / f"fold{Path(engine.file).suffix}"
        kept = (folder / stem).with_suffix(file.suffix)
        if not engine.with_tensors(kept, {name: tensor.numpy() for name, tensor in own.items()}, file):
            if network is None or precision == INT8:
                return None
            network = copied(network)  # the next fold starts from the shipped weights again
            network.load_state_dict({**network.state_dict(), **own})
            p = Preprocessing.from_json(manifest["preprocessing"])
            exported = export_onnx(task.serve(network), (len(p.mean), *p.hw), Path(place) / "exported.onnx")
            engine.write(exported, file, precision)
        return engine.load(file, threads, LIMIT_S, precision=precision, spread=True)


def _network(folder: Path, manifest: dict[str, Any], model: Model | nn.Module | str | None) -> tuple[nn.Module | None, str]:
    """The torch network of the artifact, or None and why."""
    source = manifest["source"].get("model")
    if source is None:
        return None, "the manifest does not say where the network came from: it was exported without that"
    if model is None:
        if not source["spec"] or ".py:" in source["spec"]:
            return None, "the network is from the user's own code: name it with `model='path/to/file.py:function'`"
        try:
            model = load_model(source["spec"], pretrained=False, num_classes=source["num_classes"])
        except DownresError as error:
            return None, f"the network cannot be made again ({str(error).rstrip('.')}): name it with `model`"
    elif isinstance(model, str):
        model = load_model(model, pretrained=False)
    module = copied(model.module if isinstance(model, Model) else model)  # the caller's keeps its weights
    candidate = Candidate.from_json(manifest["candidate"])
    native = Preprocessing.from_json(source["preprocessing"])
    which = manifest["task"].get("output_index")
    answer = find_answer(made_for(module, native.hw), (len(native.mean), *native.hw), which)
    if answer.outputs != source["outputs"] and answer.head is not None:
        module.set_submodule(answer.head, nn.Linear(answer.width, source["outputs"]))
    module = reduce(module, candidate.network, input_size=(len(native.mean), *native.hw), resize_input=False)
    weights = load((folder / "model.safetensors").read_bytes())
    if (stem := manifest.get("stem", "model")) != "model":  # which has the tensors of that name, but those of its own
        weights |= load((folder / f"{stem}.safetensors").read_bytes())
    try:
        module.load_state_dict(weights)
    except (RuntimeError, SafetensorError):
        raise DownresError(
            f"The network given is not the one in {folder}: its weights do not fit; give the one that was searched."
        ) from None
    return nn.Module.eval(module), ""


def opened_data(task: Task, folder: Path, manifest: dict[str, Any], data: Any) -> tuple[Data | None, str]:
    """The proof images, or None and why; the task has them then."""
    source = manifest["source"].get("data")
    if source is None:
        return None, "the manifest does not say where the images came from: it was exported without that"
    where = data if data is not None else source["path"]
    if not where and isinstance(where, str):
        return None, "the search was given its images in Python: give them as data"
    if data is None and not where.startswith("demo:") and not (Path(where).exists() or (is_pattern(where) and matched(where))):
        return None, f"the images are not at {where} any more: name their folder with `data`"
    how = {name: source[name] for name in ("val_fraction", "folds", "seed")}
    how |= {name: source[name] for name in ("train_images",) if name in source}  # where somebody chose
    if (channels := len(manifest["preprocessing"]["mean"])) != 3:
        how["channels"] = channels
    question = Question.from_json(source["question"])
    for name in ("labels", "classes"):  # a file that was beside the images has moved with them
        if (file := getattr(question, name)) and not Path(file).exists():
            moved = Path(where) / Path(file).name
            if not moved.exists():
                return (
                    None,
                    f"the file {file} is not there any more: put it beside the images and name their folder with `data`",
                )
            question = dataclasses.replace(question, **{name: str(moved)})  # type: ignore[arg-type]
    in_rounds = source.get("proof")
    opened = task.open(where, question, **how)
    if in_rounds and not can_deal(opened):
        raise DownresError("The images are divided into folds, those that the quality was measured on were not: name the same.")
    task.begin(dealt(opened, source["seed"]) if in_rounds else opened, source["seed"])
    if task.data.fingerprint() != source["sha256"]:
        raise DownresError(
            "The images are not those that the quality was measured on (names, pixels, labels or split differ): "
            "name the same folder with `data`."
        )
    if in_rounds:
        task.begin(first(task.data, in_rounds), source["seed"])
    if (listed := folder / PROOF).exists() and read_json(listed, MOST_BYTES) != proof_of(task):
        raise DownresError(f"{listed} does not list the images that the quality was measured on: export the model again.")
    if (kept := folder / "targets.npz").exists():
        with np.load(kept, allow_pickle=False) as targets:
            task.judge_by({name: targets[name] for name in targets.files})
    return task.data, ""
