"""A few proof images kept in the run, with what each candidate said of them, so that a moved run can still show them."""

from collections import Counter

import numpy as np
import torch

from ..data import preprocess
from ..records import Candidate
from ..recover.bank import State
from ..recover.features import FeatureBank
from ..reduction import token_map
from .store import Store
from .task import Task


def keep_photos(store: Store, task: Task, candidates: list[Candidate], bank: FeatureBank) -> None:
    """Six at most, chosen reproducibly; for candidates that merge tokens also which patches of each went together.

    Three that all get right, two that some candidate loses, one that the original gets wrong.
    """
    crop = task.subject.model.preprocessing.crop_ratio
    all_of = [task.subject.native, *candidates]
    found = [store.arrays(f"predictions/{State(c, crop).key()}") for c in all_of]
    labels = task.labels[task.proof]
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
