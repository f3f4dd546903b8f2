"""Pictures through an artifact alone: its preprocessing and its ONNX file."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DownresError
from ..images import Unreadable, decode, preprocess
from ..measuring.latency import random_batch, rounds
from ..parse import Resolution, name_of
from ..records import Preprocessing
from ..tasks import Task, known_task, restored
from .graph import Graph
from .manifest import at_resolution, read_manifest, refuse_changed, resolutions_of

TIMED = 15
"""Passes of which the median tells how long one takes."""


def predict(
    folder: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    threads: int | None = None,
    out: str | Path = "predictions",
    task: str | type[Task] | None = None,
    limit_s: float = 60.0,
    resolution: Resolution | None = None,
    max_latency_ms: float | None = None,
) -> list[Any]:
    """Pictures by the artifact alone, as its task answers: a classifier's most likely classes, a segmentation network's masks.

    top: how many classes are named. out: folder for what is written, made if need be: NAME_mask.png and NAME_overlay.png.
    task: of one's own, where the artifact has one. limit_s: seconds that the graph may take for a picture. resolution: of a
    model for several that at which it is used, None: the largest; or max_latency_ms: the largest that takes no longer for one
    pass, timed here and now on noise, which a warning tells.
    Returns a record an image, with `to_json`. Raises DownresError for a broken artifact, an answer that is not finite or does
    not come in time, a picture that cannot be read, or two pictures of one name.
    """
    known_task(task)
    manifest = read_manifest(folder)
    refuse_changed(Path(folder), manifest)
    own = restored(manifest["task"], manifest)
    if not 0 < limit_s <= 1e6:  # clocks end somewhere
        raise DownresError(f"The time limit is above 0 and at most 1000000 seconds, {limit_s} is not: give for example 60.")
    if max_latency_ms is None:
        manifest = at_resolution(manifest, resolution)
        runtime = Graph(Path(folder), manifest, threads, limit_s)
    elif resolution is not None:
        raise DownresError("Name either a resolution or milliseconds, which choose one: not both.")
    else:
        manifest, runtime = _in_time(Path(folder), manifest, max_latency_ms, threads, limit_s)
    p = Preprocessing.from_json(manifest["preprocessing"])
    if own.writes and (twice := [name for name, n in Counter(Path(i).stem for i in images).items() if n > 1]):
        raise DownresError(f"Files are named after their pictures, {twice[0]} would be written twice: predict them apart.")

    return [answered(own, runtime, image, p, top, Path(out))[1] for image in images]


def _in_time(
    folder: Path, manifest: dict[str, Any], most_ms: float, threads: int | None, limit_s: float
) -> tuple[dict[str, Any], Graph]:
    """The manifest and the graph of the largest resolution that takes at most so long here."""
    if isinstance(most_ms, bool) or not isinstance(most_ms, (int, float)) or not 0 < most_ms < math.inf:
        raise DownresError(f"The latency allowed is a number of milliseconds above 0, {most_ms!r} is not: give for example 20.")
    for size in resolutions_of(manifest):
        at = at_resolution(manifest, size)
        graph = Graph(folder, at, threads, limit_s)
        batch = random_batch((1, *map(int, graph.taken.shape[1:])))
        taken = 1000 * float(np.median(rounds({"it": graph}, {"it": batch}, runs=TIMED, warmup=3)["it"]))
        if taken <= most_ms:
            warnings.warn(f"at {name_of(size)} px, {taken:.3g} ms a pass on this machine now", stacklevel=3)
            return at, graph
    raise DownresError(
        f"At its smallest resolution, {name_of(size)} px, the model takes {taken:.3g} ms a pass here, {most_ms:g} are allowed: "
        "allow more, or search for a smaller one."
    )


def answered(task: Task, graph: Graph, image: str | Path, p: Preprocessing, top: int, out: Path) -> tuple[np.ndarray, Any]:
    """(what the graph answers to a picture, without the batch axis; what the task makes of it, a record)"""
    try:
        pixels = decode(image, len(p.mean))
    except Unreadable as error:
        raise DownresError(f"Cannot read {image}: {error}; give a photograph.") from None
    (found,) = graph(preprocess(pixels, p)[None].numpy())
    try:
        return found[0], task.predict(found[0], pixels, str(image), p, top, out)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DownresError(
            f"What {graph.file.parent} answers does not fit its manifest ({type(error).__name__}: {error}): "
            "export the model again."
        ) from error
