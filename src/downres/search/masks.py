"""What a search does with segmentation networks: quality of a candidate by its masks, and the scenes of the report."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..measure.segmentation import Tallies, segmentation_quality
from ..records import Budget, Candidate, Recovery, Rung
from ..recover.bank import State
from ..recover.masks import MaskBank, MaskReference, climb, make_reference
from .store import Store
from .task import Task

MASK_RUNGS = ("batchnorm",)
"""Of the recovery ladder: nothing may be cropped, and no head is fitted."""
SCENES, HARDEST = 3, 3
"""Images that the report shows: such as show every class, and those on which most is lost."""


def masks_measure(
    task: Task, store: Store, bank: MaskBank, budget: Budget, rungs: tuple[str, ...]
) -> Callable[[Candidate], dict[str, Any]]:
    """A function that measures one candidate on the proof images of every fold: arrays first, then the record of them."""
    made: list[MaskReference] = []

    def measure(candidate: Candidate) -> dict[str, Any]:
        native = State(candidate, task.subject.model.preprocessing.crop_ratio)
        if candidate != task.subject.native and rungs and not made:
            made.extend(make_reference(bank, task.subject.native_state, i, f, task.seed) for i, f in enumerate(task.data.folds))
            bank.release()
        naive, recovered, states, recoveries = [], [], [], []
        for i, fold in enumerate(task.data.folds):
            if candidate == task.subject.native or not rungs:
                state, recovery = native, Recovery("none", native.crop_ratio, 0.0)
            else:
                state, recovery = climb(bank, candidate, made[i], budget, rungs)
            naive.append(bank.tallies(native, fold.test))
            recovered.append(naive[-1] if state == native else bank.tallies(state, fold.test))
            states.append(state)
            recoveries.append(recovery)
        before, after = Tallies.concatenate(naive), Tallies.concatenate(recovered)
        store.put_arrays(f"predictions/{native.key()}", **after.to_arrays())
        return {
            "quality": segmentation_quality(after).to_json(),
            "naive": segmentation_quality(before).to_json(),
            "recovery": _merge(recoveries).to_json(),
            "states": [state.to_json() for state in states],
        }

    return measure


def _merge(found: list[Recovery]) -> Recovery:
    """Of the folds: the dearest rung that any needed, the time of all, mean scores over folds of one size."""
    if len(found) == 1:
        return found[0]
    names = list(dict.fromkeys(rung.rung for one in found for rung in one.tried))
    tried = []
    for name in names:
        rungs = [rung for one in found for rung in one.tried if rung.rung == name]
        scores = [rung.score for rung in rungs if rung.score is not None]
        score = float(np.mean(scores)) if scores else None
        seconds, images = sum(rung.seconds for rung in rungs), sum(rung.images for rung in rungs)
        note = "; ".join(dict.fromkeys(rung.note for rung in rungs if rung.note))
        tried.append(Rung(name, score, sum(rung.n for rung in rungs), seconds, images, note or f"mean of {len(rungs)} folds"))
    dearest = "batchnorm" if any(one.rung == "batchnorm" for one in found) else "none"
    return Recovery(dearest, found[0].crop_ratio, sum(one.seconds for one in found), tuple(tried), found[0].tuning)


def keep_scenes(store: Store, task: Task, candidates: list[Candidate], best: Candidate | None, bank: MaskBank) -> None:
    """A few proof images with the class maps of every candidate, so that a moved run can still show them.

    First those that together show every class soonest, then the hardest: on which the chosen candidate (without one, that
    nearest to a proof) loses most against the original, by the mIoU of the image alone.
    """
    data, crop = task.data, task.subject.model.preprocessing.crop_ratio
    all_of = [task.subject.native, *candidates]
    found = {c: Tallies.from_arrays(store.arrays(f"predictions/{State(c, crop).key()}")) for c in all_of}
    shown = best or all_of[-1]
    lost = image_miou(found[all_of[0]]) - image_miou(found[shown])
    order = np.argsort(np.where(np.isnan(lost), np.inf, -lost), kind="stable")
    hardest = [int(i) for i in order[:HARDEST]] if shown != all_of[0] else []
    scenes: list[int] = []
    seen = np.zeros(task.subject.outputs, bool)
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
        arrays[f"image{k}"] = np.asarray(data.images[int(task.proof[i])])
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
