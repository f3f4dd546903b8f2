"""A few proof images kept in the run with the class maps of every candidate, and how the report shows them."""

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DownresError, shown
from ...images import visible
from ...records import Candidate, Result
from ...recovery.state import State
from ...reports import pictures, words
from ...reports.page import render
from ..task import Section
from .bank import MaskBank
from .class_picture import MOST, class_figures
from .classes import class_table, who_loses
from .quality import Tallies
from .scenes import Overlay, Scene, Segmentation, draw

SCENES, HARDEST = 3, 3
"""Images that the report shows: such as show every class, and those on which most is lost."""


def keep_scenes(store: Any, task: Any, candidates: list[Candidate], best: Candidate | None, bank: MaskBank) -> None:
    """A few proof images with the class maps of every candidate, so that a moved run can still show them.

    First those that together show every class soonest, then the hardest: on which the chosen candidate (without one, that
    nearest to a proof) loses most against the original, by the mIoU of the image alone.
    """
    data, native = task.data, task.native_state
    all_of = [task.native, *candidates]
    found = {c: Tallies.from_arrays(store.arrays(f"predictions/{native.at(c).key()}")) for c in all_of}
    common = np.arange(min(map(len, found.values())))  # of rounds, which show each as many as its verdict needs
    found = {c: tallies.select(common) for c, tallies in found.items()}
    shown = best or all_of[-1]
    lost = image_miou(found[all_of[0]]) - image_miou(found[shown])
    order = np.argsort(np.where(np.isnan(lost), np.inf, -lost), kind="stable")
    hardest = [int(i) for i in order[:HARDEST]] if shown != all_of[0] else []
    scenes: list[int] = []
    seen = np.zeros(task.outputs, bool)
    present = found[all_of[0]].truth > 0
    pool = np.random.default_rng([task.seed, 3]).permutation(np.setdiff1d(np.arange(len(present)), hardest))
    while len(scenes) < min(SCENES, len(pool)):
        new = (present & ~seen)[pool].sum(1)
        new[np.isin(pool, scenes)] = -1
        scenes.append(int(pool[new.argmax()]))
        seen |= present[scenes[-1]]
    chosen = [*scenes, *hardest]
    arrays: dict[str, np.ndarray] = {
        "names": np.array([data.images.names[task.proof[i]] for i in chosen]),
        "hardest": np.array([False] * len(scenes) + [True] * len(hardest)),
        "candidates": np.array([str(c) for c in all_of]),
        "truth": found[all_of[0]].truth.sum(0),
        "miou": np.stack([image_miou(found[c])[chosen] for c in all_of]),
    }
    fold_of = np.concatenate([np.full(len(fold.test), i) for i, fold in enumerate(data.folds)])
    for k, i in enumerate(chosen):
        arrays[f"image{k}"] = visible(data.images[int(task.proof[i])])
        arrays[f"truth{k}"] = np.asarray(bank.masks[int(task.proof[i])])
    for j, candidate in enumerate(all_of):
        states = [State.from_json(s) for s in store.get(f"quality/{candidate}")["states"]]
        for k, i in enumerate(chosen):
            (arrays[f"map{j}_{k}"],) = bank.class_maps(states[fold_of[i]], task.proof[i : i + 1])
        bank.release()
    store.put_arrays("photos", **arrays)


def image_miou(tallies: Tallies) -> np.ndarray:
    """The mIoU of each image alone, percent (n,): another measure than that over all images, good for finding images."""
    union = tallies.predicted + tallies.truth - tallies.hits
    there = tallies.truth > 0
    iou = np.where(there, tallies.hits / np.maximum(union, 1), np.nan)
    with np.errstate(invalid="ignore"):
        return np.where(there.any(1), 100 * np.nansum(iou, 1) / np.maximum(there.sum(1), 1), np.nan)


def kept_scenes(store: Any, run: Any) -> Segmentation | None:
    """What was kept, as many candidates as fit beside a picture."""
    if not store.has_arrays("photos"):
        return None
    kept = store.arrays("photos")
    chosen = run.best and run.best.candidate
    columns = pictures.shown([(j, Candidate.parse(str(name))) for j, name in enumerate(kept["candidates"])], chosen)
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


def scenes_html(s: Segmentation, original: Result, results: tuple[Result, ...], shown: Result | None, licence: str) -> Section:
    """The table and picture of classes, and the scenes, as a part of the page."""
    if len(s.colours) != len(s.classes):
        raise DownresError(
            f"Every class has a name and a colour, there are {len(s.classes)} names and {len(s.colours)} colours."
        )
    table = class_table(original, results, s.classes, s.shares, shown)
    scenes, hardest = ([draw(scene, s) for scene in group] for group in (s.scenes, s.hardest))
    masks = {
        "table": table,
        "who_loses": who_loses(table) if table else "",
        "figures": class_figures(table, s.colours) if table else {},
        "galleries": {"scenes": scenes, "hardest": hardest},
        "colours": s.colours,
        "classes": s.classes,
        "notes": s.notes,
        "names": _colour_names(s),
        "error": pictures.ERROR,
        "most": MOST,
    }
    drawn = any(r.quality for r in results) and bool(original.quality) and original.cost is not None
    parts = {
        part: render(
            Path(__file__).parent, "segmentation.html.j2", part=part, masks=masks, shown=shown, licence=licence, figures=drawn
        )
        for part in ("style", "body", "script")
    }
    return Section(**parts)


def _colour_names(segmentation: Segmentation) -> dict[str, str]:
    """`128,64,128` → `road`: what the page reads off a pixel; classes of one colour are named together."""
    names: dict[str, list[str]] = {}
    for name, colour in zip(segmentation.classes, segmentation.colours, strict=True):
        names.setdefault(",".join(map(str, colour)), []).append(shown(name))
    return {colour: " or ".join(found) for colour, found in names.items()}
