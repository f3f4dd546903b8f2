"""A few proof images kept in the run, with what each candidate said of them, and how the report shows them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...images import preprocess, resize_and_crop, visible
from ...records import Candidate, Preprocessing, Result
from ...recovery.features import FeatureBank
from ...recovery.state import State
from ...reduction import token_map
from ...reports import pictures, words
from ...reports.page import render
from ..task import Section


@dataclass(frozen=True)
class View:
    """One photograph as the model sees it: uint8 (height, width, 3), resized and cropped, not normalised; percent."""

    label: str
    image: np.ndarray
    prediction: str
    confidence: float
    correct: bool


@dataclass(frozen=True)
class Photo:
    """One photograph with its true class, seen at several resolutions."""

    name: str
    truth: str
    views: tuple[View, ...]


def keep_photos(task: Any, store: Any, bank: FeatureBank, results: Sequence[Result]) -> None:
    """Six at most, chosen reproducibly; for candidates that merge tokens also which patches of each went together.

    Three that all get right, two that some candidate loses, one that the original gets wrong.
    """
    all_of = [task.native, *(r.candidate for r in results)]
    found = [store.arrays(f"predictions/{task.native_state.at(c).key()}") for c in all_of]
    shown = min(len(f["correct"]) for f in found)  # by all of them, where each was shown as many as its verdict needed
    found = [{name: values[:shown] for name, values in f.items()} for f in found]
    labels = task.labels[task.proof[:shown]]
    original_right = found[0]["correct"]
    always = np.logical_and.reduce([f["correct"] for f in found])
    rng = np.random.default_rng([task.seed, 3])
    chosen: list[int] = []
    for wanted, take in ((always, 3), (original_right & ~always, 2), (~original_right, 1)):
        pool = rng.permutation(np.flatnonzero(wanted))
        # One of each class before a second of any: six pictures of one class would say little.
        seen: Counter[int] = Counter()
        turns = []
        for i in pool:
            turns.append(seen[labels[i]])
            seen[labels[i]] += 1
        chosen += pool[np.argsort(turns, kind="stable")][:take].tolist()
    arrays: dict[str, np.ndarray] = {
        "names": np.array([task.data.images.names[task.proof[i]] for i in chosen]),
        "truth": labels[chosen],
        "classes": np.array(task.data.classes),
        "candidates": np.array([str(c) for c in all_of]),
        "predicted": np.stack([f["predicted"][chosen] for f in found]),
        "confidence": np.stack([f["confidence"][chosen] for f in found]),
        "correct": np.stack([f["correct"][chosen] for f in found]),
    }
    for k, i in enumerate(chosen):
        arrays[f"image{k}"] = np.asarray(task.data.images[int(task.proof[i])])
    for i, candidate in enumerate(all_of):
        # Where pixels are cut off or padded, a map would not lie on the picture.
        if any(t.has_map(candidate) for t in candidate.techniques) and candidate.ragged == "error":
            state = State(candidate, store.get(f"quality/{candidate}")["recovery"]["crop_ratio"])
            pixels = [preprocess(task.data.images[int(task.proof[k])], bank.preprocessing_of(state)) for k in chosen]
            arrays[f"map{i}"] = token_map(bank.network(state), torch.stack(pixels)).numpy().astype(np.int32)
    store.put_arrays("photos", **arrays)


def photos_section(store: Any, run: Any) -> Section:
    """The photographs as each candidate sees them."""
    if not store.has_arrays("photos"):
        return Section()
    kept = store.arrays("photos")
    return photos_html(kept_photos(kept, run), run.data["licence"], any(name.startswith("map") for name in kept))


def photos_html(photos: Sequence[Photo], licence: str, merged: bool = False) -> Section:
    """merged: whether some are seen as a network with merged tokens has them."""
    if not photos:
        return Section()
    return Section(body=render(Path(__file__).parent, "photos.html.j2", photos=photos, licence=licence, merged=merged))


def kept_photos(kept: dict[str, np.ndarray], run: Any) -> tuple[Photo, ...]:
    native = Preprocessing.from_json(run.settings["preprocessing"])
    crops = {str(r.candidate): r.recovery.crop_ratio for r in run.results if r.recovery is not None}
    # What else shrinks inside the network sees the same pixels as the original: input variants and merged tokens tell it all.
    columns = [(i, Candidate.parse(str(name))) for i, name in enumerate(kept["candidates"])]
    chosen = run.best and run.best.candidate
    columns = pictures.shown([(i, c) for i, c in columns if c.is_input_only or f"map{i}" in kept], chosen)
    classes = [str(c) for c in kept["classes"]]
    photos = []
    for k, name in enumerate(kept["names"]):
        views = []
        for i, candidate in columns:
            p = native.at(candidate.resolution, crops.get(str(candidate), native.crop_ratio))
            seen = visible(resize_and_crop(kept[f"image{k}"], p).permute(1, 2, 0).numpy())
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
