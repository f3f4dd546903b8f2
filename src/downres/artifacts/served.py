"""serve.py, run as whoever has nothing but the folder runs it, against `predict`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..environment import versions
from ..errors import DownresError, first_line
from ..records import Preprocessing
from ..tasks import Task
from .graph import Graph
from .manifest import SERVE, resolutions_of, served_by
from .serving import output_of, program, steps, takes_numbers
from .use import answered

IMAGES = 8
LIMIT_S = 300.0


def served_alike(task: Task, folder: Path, manifest: dict[str, Any], graph: Graph, p: Preprocessing) -> tuple[bool | None, str]:
    """Whether serve.py answers as `predict` does on some of the proof images, and in words. It is run only where it is, to the
    byte, what downres would write for this manifest; of another version of downres, or an older artifact, None.
    """
    if not (folder / SERVE).is_file():
        return None, f"there is no {SERVE}: the model was exported before there was one"
    numbers = takes_numbers(task, p)
    described = manifest.get("steps") == steps(p, numbers) and manifest["output"] == output_of(task, p)
    several = len(resolutions_of(manifest)) > 1
    written = program(task, p, numbers, *served_by(manifest), several=several)
    if (folder / SERVE).read_bytes() != written.encode() or not described:
        theirs, ours = manifest.get("versions", {}).get("downres"), versions()["downres"]
        which = "what the manifest says of serving is" if described is False else f"{SERVE} is"
        other = f" ({theirs} wrote it, this is {ours})" if theirs != ours else ""
        return (None if other else False), f"{which} not the one that downres writes{other}: it was not run"
    chosen = task.proof[:: max(1, len(task.proof) // IMAGES)][:IMAGES]
    with tempfile.TemporaryDirectory(prefix="downres-") as place:
        files = [_written(task.data.images[int(i)], Path(place) / str(k)) for k, i in enumerate(chosen)]
        try:
            both = [answered(task, graph, file, p, 5, Path(place) / "predicted") for file in files]
        except DownresError as error:
            return None, f"predict does not answer: {error}"
        height, width = p.hw
        served, why = _served(folder, files, ["--resolution", f"{height}x{width}"] if several else [])
        if served is None:
            return False, why
        predicted = [record.to_json() for _, record in both]
        return task.alike(served, predicted, [answer for answer, _ in both])


def _written(pixels: np.ndarray, stem: Path) -> Path:
    """A picture as a file that has all of it: PNG, or .npy where that has not the type or the channels."""
    pixels = pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels
    if pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2] in (3, 4)):
        Image.fromarray(pixels).save(file := stem.with_suffix(".png"))
    else:
        np.save(file := stem.with_suffix(".npy"), pixels)
    return file


def _served(folder: Path, files: list[Path], how: list[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """What serve.py prints of the pictures, or None and why; it runs where they are, without what lies beside it as modules."""
    command = [sys.executable, "-P", str((folder / SERVE).resolve()), *how, *map(str, files)]
    try:
        done = subprocess.run(command, cwd=files[0].parent, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer in {LIMIT_S:g} s"
    try:
        lines = [json.loads(line) for line in done.stdout.splitlines()]
    except ValueError:
        lines = []
    if done.returncode or [line.get("image") for line in lines] != [str(file) for file in files]:
        return None, f"it failed: {first_line(RuntimeError(done.stderr.strip().rpartition(chr(10))[2] or done.stdout))[:200]}"
    return lines, ""
