"""The manifest of an artifact: what it says, and whether the files beside it are those that it was written with."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engines.engine import Engine, Layers, engine_of
from ..errors import DownresError, first_line
from ..parse import FP32, Resolution, like, name_of
from ..record import Misfit, read_json, sha256, write_json, write_whole
from ..records import Candidate, Cost, Drop, Latency, Preprocessing, Record, Recovery
from ..recovery.state import State
from ..tasks import Question

FORMAT = 3
MOST_BYTES = 2**28
"""Of a manifest; a larger one is none of ours."""
SERVE, PROOF = "serve.py", "proof.json"
"""Beside the model: what serves it without downres, and the names and checksums of the images that it was proven on."""
WEIGHTS = "weights.bin"
"""What graphs of several resolutions share."""
EMBEDDED, PICTURE, PREPROCESSED = "model_uint8", "image", "preprocessing/input"
"""Of the file that has its preprocessing inside: its name without the ending, its input, and what the model gets in there."""


@dataclass(frozen=True)
class Port(Record):
    """What goes into the graph or comes out of it; a side is a number of values, or the name of one that is free. dtype: as
    NumPy has it, '' where an older manifest does not say.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = ""


@dataclass(frozen=True)
class Outcome(Record):
    """What a search found of the shipped candidate, or of the original; `quality` is read by the task."""

    candidate: Candidate
    quality: dict[str, Any] | None = None
    cost: Cost | None = None
    latency: Latency | None = None
    drop: Drop | None = None
    recovery: Recovery | None = None


@dataclass(frozen=True)
class Served(Record):
    """What the graph runs in. layers: of 8 bits, see `engines.engine.Layers`; distance: between its answers and those of the
    torch network on real images, as a part of the latter, when it was shipped; None where both are equal but for rounding.
    """

    name: str
    precision: str = FP32
    file_bytes: int | None = None
    layers: Layers | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Embedded(Record):
    """The file that has its preprocessing inside, and how far it is from the preprocessing that the model was measured with.

    largest_level, mean_level: between what the model gets from both, in levels of 255 a pixel. distance: between the answers,
    see `artifacts.proof.distance`. other_answers: share of the images with another answer, None where the task has none that is
    the same or not.
    """

    file: str
    input: Port
    largest_level: float
    mean_level: float
    distance: float
    other_answers: float | None
    images: int

    def __post_init__(self) -> None:
        if Path(self.file).stem != EMBEDDED or self.file != Path(self.file).name:
            raise DownresError(f"The file with its preprocessing inside is {EMBEDDED}, {self.file[:40]!r} is not.")

    def __str__(self) -> str:
        other = "" if self.other_answers is None else f", another answer to {100 * self.other_answers:.2g} %"
        return (
            f"pixels at most {self.largest_level:.2g} of 255 levels apart, {self.mean_level:.2g} on average; answers "
            f"{self.distance:.2g} apart{other}; on {self.images} real images"
        )


@dataclass(frozen=True)
class ModelSource(Record):
    """How to build the network again that the shipped one was made of. changed: what was done to it, in words and in order;
    model.safetensors holds what came of it.
    """

    spec: str
    outputs: int
    preprocessing: Preprocessing
    weights: str = ""
    num_classes: int | None = None
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSource(Record):
    """How to open the proof images again; sha256: that of names, pixels, labels and split. proof: how many of them it was
    proven on, in an order drawn from the seed, where that was in rounds.
    """

    path: str
    val_fraction: float
    seed: int
    question: Question
    sha256: str
    folds: int | None = None
    proof: int | None = None


@dataclass(frozen=True)
class Source(Record):
    """Where an artifact came from."""

    model: ModelSource | None = None
    data: DataSource | None = None


@dataclass(frozen=True)
class FoldPart(Record):
    """How the quality of one fold was measured. stem: name of its graph's file, without the ending."""

    crop_ratio: float
    recalibrated: bool = False
    stem: str = "model"


@dataclass(frozen=True)
class Part(Record):
    """What is other at one more resolution of the same weights. stem: name of its graph's file, without the ending; tensors of
    its own are in a file of that name, too. What stands here stands in the place of the manifest's own, see `at_resolution`.
    """

    stem: str
    candidate: Candidate
    input: Port
    output: Port
    steps: dict[str, Any]
    preprocessing: Preprocessing
    state: State
    result: Outcome

    def __post_init__(self) -> None:
        if self.stem != part_stem(self.candidate):
            raise DownresError(f"The file of {self.candidate} is {part_stem(self.candidate)}, {self.stem[:40]!r} is not.")


def part_stem(candidate: Candidate) -> str:
    """Name of the graph's file of one more resolution, without the ending."""
    assert candidate.resolution is not None
    return f"model-{name_of(candidate.resolution)}"


@dataclass(frozen=True)
class Manifest(Record):
    """All that is read of a manifest, with its types: whoever holds one need not ask again. Others may stand in it."""

    format: int
    candidate: Candidate
    input: Port
    output: Port
    task: dict[str, Any]
    preprocessing: Preprocessing
    state: State
    result: Outcome
    original: Outcome
    recovery: Recovery
    source: Source
    sha256: dict[str, str]
    runtime: Served = Served("onnxruntime")
    embedded: Embedded | None = None
    folds: tuple[FoldPart, ...] = ()
    resolutions: tuple[Part, ...] = ()
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact; DownresError when there is none, or it is not as `export` writes them."""
    file = Path(folder) / "manifest.json"
    try:
        manifest = read_json(file, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DownresError(
            f"{folder} is not a shipped model (it has no manifest.json): give the folder RUN/best of a search."
        ) from None
    except (OSError, ValueError) as error:
        raise DownresError(
            f"{file} is broken or of another format than {FORMAT} ({first_line(error)[:100]}): export the model again."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DownresError(f"{file} is broken or of another format than {FORMAT}: export the model again.")
    try:
        Manifest.from_json(manifest)
    except Misfit as misfit:
        raise DownresError(f"{file} is broken ({misfit.path} {misfit.why}): export the model again.") from None
    except DownresError as error:
        raise DownresError(f"{file} is broken ({str(error).rstrip('.')}): export the model again.") from None
    return manifest


def resolutions_of(manifest: dict[str, Any]) -> list[Resolution]:
    """All that the model may be used at, the manifest's own first."""
    read = Manifest.from_json(manifest)
    both = [(read.candidate, read.preprocessing), *((part.candidate, part.preprocessing) for part in read.resolutions)]
    return [candidate.resolution or p.resolution for candidate, p in both]


def at_resolution(manifest: dict[str, Any], resolution: Resolution | None) -> dict[str, Any]:
    """The manifest of the model as it is used at one of its resolutions, None: the one that it says first; `stem` names its
    graph. DownresError for another resolution.
    """
    known = resolutions_of(manifest)
    which = 0
    if resolution is not None:
        read = Manifest.from_json(manifest)
        sizes = [p.hw for p in (read.preprocessing, *(part.preprocessing for part in read.resolutions))]
        origin = read.source.model.preprocessing if read.source.model else read.preprocessing
        asked = origin.at(like(origin.resolution, resolution)).hw
        if asked not in sizes:
            have = ", ".join(map(name_of, known))
            raise DownresError(f"The model runs at {have} px, {name_of(resolution)} is none of these: name one of them.")
        which = sizes.index(asked)
    return {**manifest, **({"stem": "model"} if which == 0 else manifest["resolutions"][which - 1])}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes it with its own digest in it, which is that of the text in which it is blank."""
    manifest["sha256"]["manifest.json"] = ""
    text = write_json(manifest, indent=1) + "\n"
    manifest["sha256"]["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    write_whole(folder / "manifest.json", (write_json(manifest, indent=1) + "\n").encode())


def changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The names of files that are not as they were shipped; the manifest vouches for the others."""
    digests = manifest["sha256"]
    if not _manifest_as_written(folder / "manifest.json", digests.get("manifest.json")):
        return ["manifest.json"]
    changed = [f"{name} (missing)" for name in needed(manifest) if name not in digests]
    for name, digest in digests.items():
        if name in ("", "..") or name != Path(name).name:  # `..` and folders: nothing outside is opened
            changed.append(f"{name!r} (no name of a file in it)")
        elif name != "manifest.json" and (not (file := folder / name).is_file() or sha256(file) != digest):
            changed.append(name if file.is_file() else f"{name} (missing)")
    return changed


def served_of(manifest: dict[str, Any]) -> Served:
    """What is shipped, also of an older manifest, which says nothing of it."""
    return Manifest.from_json(manifest).runtime


def served_by(manifest: dict[str, Any]) -> tuple[Engine, str]:
    """(the engine, the precision) of what is shipped. DownresError where that engine is not here."""
    served = served_of(manifest)
    return engine_of(served.name), served.precision


def needed(manifest: dict[str, Any]) -> list[str]:
    """What every artifact of its runtime has, and every one that says that its preprocessing is embedded."""
    engine, _ = served_by(manifest)
    named = [Path(engine.file), *([embedded_in(engine)] if manifest.get("embedded") else [])]
    stems = [part.stem for part in Manifest.from_json(manifest).resolutions]
    named += [Path(engine.file).with_stem(stem) for stem in stems]
    of_torch = [f"{stem}.safetensors" for stem in ("model", *stems)]
    return [*(file.name for one in named for file in engine.files(one)), *of_torch, *([WEIGHTS] if stems else [])]


def embedded_in(engine: Engine) -> Path:
    """Name of the file that has its preprocessing inside."""
    return Path(engine.file).with_stem(EMBEDDED)


def is_whole(folder: Path) -> bool:
    """Whether there is an artifact, every file as it was shipped."""
    try:
        return not changed_files(folder, read_manifest(folder))
    except DownresError:
        return False


def refuse_changed(folder: Path, manifest: dict[str, Any]) -> None:
    if changed := changed_files(folder, manifest):
        raise DownresError(f"{folder} is not as it was shipped (changed: {', '.join(changed)}): copy or export it again.")


def _manifest_as_written(file: Path, digest: Any) -> bool:
    """Whether the bytes of the manifest, its own digest left blank, have that digest."""
    blank = file.read_bytes().replace(f'"{digest}"'.encode(), b'""', 1)
    return hashlib.sha256(blank).hexdigest() == digest
