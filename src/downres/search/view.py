"""A run as its report: which sentences, photographs and numbers the page shows."""

from pathlib import Path

import numpy as np

from ..artifact import read_manifest
from ..data import resize_and_crop
from ..measure.cost import CONVENTION
from ..parse import format_resolution
from ..records import LOGITS, Candidate, Dense, Preprocessing
from ..report import Overlay, Photo, ReportView, Scene, Segmentation, View, pictures, words
from ..report import write_report as write_page
from .results import Run, load_run
from .select import expense
from .store import Store

SHOWN = 6
"""Resolutions at most beside each photograph."""


def write_report(run: Run | str | Path) -> Path:
    """Write `report.html` into a run's folder, finished or not, and return its path.

    Raises DownresError when the folder is not a run.
    """
    run = run if isinstance(run, Run) else load_run(run)
    return write_page(view_of(run), run.folder / "report.html")


def view_of(run: Run) -> ReportView:
    """Everything on the page, from what the run's folder holds: the images themselves need not be there."""
    store = Store.read(run.folder)
    started = store.get("started") or {"when": "", "versions": {}}
    settings = run.settings
    native = Preprocessing.from_json(settings["preprocessing"])
    counted = [r for r in run.results if r.cost is not None]
    ordered = sorted(counted, key=lambda r: expense(r, "macs"), reverse=True) + [r for r in run.results if r.cost is None]
    shipped = run.best
    preprocessing = native
    if run.artifact is not None:
        preprocessing = Preprocessing.from_json(read_manifest(run.artifact)["preprocessing"])
    model = settings["model"] or "a module given in Python"
    return ReportView(
        title="downres report",
        model=f"{model} ({settings['weights']})" if settings["weights"] else model,
        data=run.data["description"],
        licence=run.data["licence"],
        budget=run.budget,
        original=run.original,
        results=tuple(ordered),
        best=shipped.candidate if shipped is not None else None,
        preprocessing=preprocessing,
        photos=() if settings["dense"] else _photos(store, native, run),
        segmentation=_segmentation(store, run) if settings["dense"] else None,
        made=_made(run),
        command=settings["command"],
        created=started["when"],
        versions=started["versions"],
        skipped=tuple(f"{s['path']}: {s['reason']}" for s in run.data["skipped"]),
        warnings=run.notes,
    )


def _photos(store: Store, native: Preprocessing, run: Run) -> tuple[Photo, ...]:
    if store.get("photos") is None:
        return ()
    kept = store.arrays("photos")
    crops = {str(r.candidate): r.recovery.crop_ratio for r in run.results if r.recovery is not None}
    # What else shrinks inside the network sees the same pixels as the original: input variants and merged tokens tell it all.
    columns = [(i, Candidate.parse(str(name))) for i, name in enumerate(kept["candidates"])]
    columns = _shown([(i, c) for i, c in columns if c.is_input_only or f"map{i}" in kept], run)
    classes = [str(c) for c in kept["classes"]]
    photos = []
    for k, name in enumerate(kept["names"]):
        views = []
        for i, candidate in columns:
            p = native.at(candidate.resolution, crops.get(str(candidate), native.crop_ratio))
            seen = resize_and_crop(kept[f"image{k}"], p).permute(1, 2, 0).numpy()
            seen = np.ascontiguousarray(np.broadcast_to(seen, (*seen.shape[:2], 3)))
            if f"map{i}" in kept:
                seen = pictures.mosaic(seen, kept[f"map{i}"][k])
            views.append(
                View(
                    label=words.label(candidate),
                    image=seen,
                    prediction=classes[int(kept["predicted"][i, k])],
                    confidence=float(kept["confidence"][i, k]),
                    correct=bool(kept["correct"][i, k]),
                )
            )
        photos.append(Photo(str(name), classes[int(kept["truth"][k])], tuple(views)))
    return tuple(photos)


def _shown(columns: list[tuple[int, Candidate]], run: Run) -> list[tuple[int, Candidate]]:
    """As many as fit beside a picture: the ends and the chosen one always, the rest evenly."""
    if len(columns) <= SHOWN:
        return columns
    wanted = {0, len(columns) - 1, *(i for i, (_, c) in enumerate(columns) if run.best and c == run.best.candidate)}
    evenly = np.linspace(0, len(columns) - 1, SHOWN).round().astype(int).tolist()
    wanted |= set([i for i in evenly if i not in wanted][: SHOWN - len(wanted)])
    return [columns[i] for i in sorted(wanted)]


def _segmentation(store: Store, run: Run) -> Segmentation | None:
    if store.get("photos") is None:
        return None
    kept = store.arrays("photos")
    columns = _shown([(j, Candidate.parse(str(name))) for j, name in enumerate(kept["candidates"])], run)
    scenes: list[Scene] = []
    for k, name in enumerate(kept["names"]):
        scores = [float(kept["miou"][j, k]) for j, _ in columns]
        overlays = tuple(
            Overlay(words.label(c), kept[f"map{j}_{k}"], None if np.isnan(score) else score)
            for (j, c), score in zip(columns, scores, strict=True)
        )
        picture = np.ascontiguousarray(np.broadcast_to(kept[f"image{k}"], (*kept[f"image{k}"].shape[:2], 3)))
        scenes.append(Scene(str(name), picture, kept[f"truth{k}"], overlays))
    hardest = kept["hardest"]
    truth = kept["truth"].sum()
    return Segmentation(
        classes=tuple(run.data["classes"]),
        colours=tuple((r, g, b) for r, g, b in run.data["colours"]),
        scenes=tuple(scene for scene, hard in zip(scenes, hardest, strict=True) if not hard),
        hardest=tuple(scene for scene, hard in zip(scenes, hardest, strict=True) if hard),
        notes=tuple(f"No proof image has {name}." for name in run.data["absent"]),
        shares=tuple(float(100 * pixels / truth) for pixels in kept["truth"]),
    )


def _made(run: Run) -> dict[str, str]:
    """How every number was made, one sentence each."""
    settings, budget = run.settings, run.budget
    folds = run.data["fold_count"]
    compared = max((r.drop.comparisons for r in run.results if r.drop), default=1)
    proof = (
        f"Every image is a proof image once: in each of {folds} folds, heads are fitted on the other folds "
        "and judged on this one."
        if folds > 1
        else "Fitted and chosen on training images (a part of them, the tuning images, decides crop ratio and rung), "
        "judged on the validation images, which nothing was chosen on."
    )
    many = (
        f" {compared} candidates were judged on the same images; Holm's procedure makes their bounds hold together, "
        "so that picking the cheapest proven one is honest."
        if compared > 1
        else ""
    )
    runtime = settings["runtime"]
    if settings["dense"]:
        return {**_made_of_masks(run, proof, many), "MACs and memory": CONVENTION}
    return {
        "Top-1": f"Correct images / all proof images, measured through {runtime}; in brackets the two-sided 95 % "
        f"Wilson interval. {proof}",
        "Drop": "Top-1 of the original minus top-1 of the candidate, in percentage points, on the same images (paired); "
        f"the bound is one-sided, by Tango's score test, at {100 * budget.confidence:g} % confidence.{many}",
        "Lowered only": "The original's own weights and head on smaller images, at its own crop ratio: "
        "what happens without recovery.",
        "MACs and memory": CONVENTION,
        "Latency": "Median of interleaved runs after warm-up, batch 1, random input; 10th to 90th percentile beside it. "
        "Resizing and decoding of the image are not in it.",
        "Recovery": "Rungs are tried from cheap to dear on tuning images, until the drop there is shown to be within "
        "the allowed one; otherwise the best rung is taken. Seconds are wall-clock time for all folds together.",
    }


def _made_of_masks(run: Run, proof: str, many: str) -> dict[str, str]:
    """The sentences that differ for segmentation."""
    dense = Dense.from_json(run.settings["dense"])
    size, confidence = format_resolution(dense.size), 100 * run.budget.confidence
    handed = "logits" if dense.output == LOGITS else "class map, made class by class,"
    corners = ", corners aligned" if dense.align_corners else ""
    return {
        "mIoU": "Of one confusion matrix over all proof images, at the size of each mask, ignored pixels left out, measured "
        f"through {run.settings['runtime']}; mean over the classes that occur, with a 95 % interval by bootstrap over images. "
        f"{proof}",
        "Drop": "mIoU of the original minus mIoU of the candidate, in points; one-sided bound by paired bootstrap over images "
        f"at {confidence:g} % confidence.{many} Neighbouring frames of one drive are worth fewer than their number.",
        "Lowered only": "The original's own weights on smaller pictures: what happens without recovery.",
        "Full size": f"The {handed} at {size} px, upsampled {dense.interpolation}{corners}, counts and is timed.",
        "Boundary": "Boundary IoU (Cheng et al. 2021): within 2 % of the diagonal from the edges of each class.",
        "Objects": "Connected regions of one class in the masks, by their share of the image: small below 0.33 %, large from "
        "3 % on (COCO's limits on its usual picture); mean IoU over the objects.",
        "Latency": "Median of interleaved runs after warm-up, batch 1, random input; 10th to 90th percentile beside it. "
        "Decoding and resizing of the picture are not in it, the upsampling of the answer is.",
    }
