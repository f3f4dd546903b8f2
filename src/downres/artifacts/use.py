"""Pictures through an artifact alone: its preprocessing and its ONNX file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DownresError
from ..images import Unreadable, decode, preprocess
from ..records import Preprocessing
from ..tasks import Task, known_task, restored
from .graph import Graph
from .manifest import read_manifest, refuse_changed


def predict(
    folder: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    threads: int | None = None,
    out: str | Path = "predictions",
    task: str | type[Task] | None = None,
    limit_s: float = 60.0,
) -> list[Any]:
    """Pictures by the artifact alone, as its task answers: a classifier's most likely classes, a segmentation network's masks.

    top: how many classes are named. out: folder for what is written, made if need be: NAME_mask.png and NAME_overlay.png.
    task: of one's own, where the artifact has one. limit_s: seconds that the graph may take for a picture.
    Returns a record an image, with `to_json`. Raises DownresError for a broken artifact, an answer that is not finite or does
    not come in time, a picture that cannot be read, or two pictures of one name.
    """
    known_task(task)
    manifest = read_manifest(folder)
    refuse_changed(Path(folder), manifest)
    own = restored(manifest["task"], manifest)
    p = Preprocessing.from_json(manifest["preprocessing"])
    if not 0 < limit_s <= 1e6:  # clocks end somewhere
        raise DownresError(f"The time limit is above 0 and at most 1000000 seconds, {limit_s} is not: give for example 60.")
    runtime = Graph(Path(folder), manifest, threads, limit_s)
    if own.writes and (twice := [name for name, n in Counter(Path(i).stem for i in images).items() if n > 1]):
        raise DownresError(f"Files are named after their pictures, {twice[0]} would be written twice: predict them apart.")

    return [answered(own, runtime, image, p, top, Path(out))[1] for image in images]


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
