"""The shipped graph: the one that the manifest describes, run within a time limit."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DownresError
from .manifest import Port, served_by


class Graph:
    """The graph of an artifact, in its own runtime; call it as a `Runtime`. spread: see `OnnxRuntime`. stem: of its file's
    name, None: as the manifest says of its resolution. taken: what goes in, None: what the manifest says of the model.

    Raises DownresError where its inputs or outputs are not those of the manifest, where a run fails or takes longer than
    `limit_s` seconds an image, and for an answer of another shape, or with NaN or infinity in it: of a class map, which has
    neither, the largest number that its type holds says so.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        threads: int | None = None,
        limit_s: float | None = None,
        *,
        spread: bool = False,
        stem: str | None = None,
        taken: Port | None = None,
    ) -> None:
        engine, precision = served_by(manifest)
        self.file = (folder / (stem or manifest.get("stem", "model"))).with_suffix(Path(engine.file).suffix)
        self.taken, self.given = taken or Port.from_json(manifest["input"]), Port.from_json(manifest["output"])
        self._runtime = engine.load(self.file, threads, limit_s, precision=precision, spread=spread)
        self.name, self.versions, self.threads = self._runtime.name, self._runtime.versions, self._runtime.threads
        found = self._runtime.inputs
        if len(found) != 1 or found[0][0] != self.taken.name or not _fits(found[0][1], self.taken.shape):
            told = ", ".join(f"{name} {shape}" for name, shape in found) or "none"
            raise self._other(f"it takes {told}, not {self.taken.name} {list(self.taken.shape)}")
        if (names := self._runtime.outputs) != [self.given.name]:
            raise self._other(f"it gives {', '.join(names) or 'nothing'}, not {self.given.name}")

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """(b, c, h, w) float32, or what else it takes → the one output in a tuple."""
        (answer,) = self._runtime(batch)
        wanted = ("batch", *self.given.shape[1:])
        if not isinstance(answer, np.ndarray) or not _fits(answer.shape, (len(batch), *wanted[1:])):
            raise self._other(f"it answers {getattr(answer, 'shape', type(answer).__name__)}, not {list(wanted)}")
        if answer.dtype.kind not in "fiu" or self.given.dtype not in ("", answer.dtype.name):
            raise self._other(f"it answers {answer.dtype}, not {self.given.dtype or 'numbers'}")
        if not (np.isfinite(answer) if answer.dtype.kind == "f" else answer < np.iinfo(answer.dtype).max).all():
            raise DownresError(f"{self.file} answers NaN or infinite values: search and export the model again.")
        return (answer,)

    def _other(self, why: str) -> DownresError:
        return DownresError(f"{self.file} is not the graph that its manifest describes ({why}): export the model again.")


def _fits(found: Any, wanted: tuple[int | str, ...]) -> bool:
    """Whether a shape is the one wanted, whose named sides may be any."""
    return len(found) == len(wanted) and all(isinstance(w, str) or f == w for f, w in zip(found, wanted, strict=True))
