"""One of the paper's experiments: what it costs, what has been trained and looked at, and training and looking at the rest."""

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..artifacts.proof import judged
from ..engines.engine import Batches, Quantization, engine_of
from ..engines.onnx_int8 import quantize_linear
from ..engines.onnxruntime import export_onnx
from ..engines.torch import TorchRuntime
from ..environment import versions
from ..errors import DownresError
from ..families import Model
from ..families.scratch import INTERPOLATIONS, at_grid, scratch
from ..images import batches, visible
from ..images.preprocess import preprocess
from ..measuring.cost import count
from ..measuring.latency import hardware
from ..parse import INT8, user_path
from ..probe import FakeCopy
from ..record import plain, read_json, write_json, write_whole
from ..records import Cost, Dense, Preprocessing, Score
from ..recovery.bank import RANGE_IMAGES
from ..recovery.finetune import Finetuning
from ..recovery.state import State, Step
from ..recovery.team import Job, Team
from ..recovery.trainer import trained
from ..recovery.training import Training
from ..recovery.weights import Weights, with_tensors
from ..reductions.dense import Segmenter
from ..searching.prepare import Measuring, Progress, gather, open_data, prepare_task
from ..tasks import Question, Task
from ..tasks.find import known_task
from .experiments import DYNAMIC, FULL, Entry, Experiment, Look, experiment, scaled, seen_as

MEMORY_BATCH = 8
"""Images at once of which the paper states memory."""
MOST_BYTES = 2**28
MOST_IMAGES = 10**9
"""To train on: all."""


@dataclass(frozen=True)
class Seen:
    """What was seen of an entry's network of one seed, look by look, and what its training took; None where it was interrupted,
    as nobody knows then.
    """

    seed: int
    hours: float | None
    looks: dict[Look, Score]


@dataclass(frozen=True)
class Line:
    """An entry: cost of one image, and memory of `MEMORY_BATCH` at once, as it is looked at first; cost of one image at the
    experiment's other sizes; networks trained of it.
    """

    entry: Entry
    cost: Cost
    memory: int
    at: dict[int, Cost]
    seen: tuple[Seen, ...]

    def quality(self, look: Look | None = None) -> list[float]:
        """Scores of the seeds at a look, its own by default."""
        look = look or self.entry.look
        return [one.looks[look].score for one in self.seen if look in one.looks]


@dataclass(frozen=True)
class Reproduction:
    """What is known of an experiment here. scale: of all sizes in pixels; classes: that the networks tell apart; data: of the
    images that were looked at, '' where none were.
    """

    experiment: Experiment
    lines: tuple[Line, ...]
    scale: float
    classes: int
    data: str
    folder: Path | None

    def to_json(self) -> dict[str, Any]:
        return plain(
            {
                "experiment": self.experiment.name,
                "title": self.experiment.title,
                "known": self.experiment.known,
                "scale": self.scale,
                "classes": self.classes,
                "data": self.data,
                "lines": [
                    {
                        **line.entry.to_json(),
                        "cost": line.cost.to_json(),
                        "peak_activation_bytes_at_batch_8": line.memory,
                        "cost_at": {str(side): cost.to_json() for side, cost in line.at.items()},
                        "seen": [
                            {
                                "seed": one.seed,
                                "training_hours": one.hours,
                                "looks": [{**look.to_json(), **score.to_json()} for look, score in one.looks.items()],
                            }
                            for one in line.seen
                        ],
                    }
                    for line in self.lines
                ],
            }
        )


def reproduce(
    name: str,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    only: str = "*",
    seeds: Sequence[int] = (0,),
    scale: float = 1.0,
    grid: bool = True,
    train: Sequence[str] = (),
    question: Question = Question(),
    measuring: Measuring = Measuring(runtime="torch"),
    progress: Progress | None = None,
    **flat: Any,
) -> Reproduction:
    """An experiment of the paper: without `data` what its networks cost and what `out` has of it, with `data` the rest of it
    trained and looked at.

    out: a folder for all experiments; whatever is done is in it, and the same call goes on where it was. only: entries whose
    names match, '*patch 16' for example. seeds: networks an entry. scale: of every size in pixels, patches included, for a
    smaller machine. grid: look at every size that the paper looks at, not only at an entry's own. train: another way to train
    than the paper's, NAME=VALUE of `Training`. In several processes (`torchrun … -m downres paper …`) all train, the first
    looks. question, measuring, and their fields flat: as `search` has them.
    Raises DownresError for a name or entries that there are not, and for a folder that has them of other data or trainings.
    """
    groups = gather({"question": question, "measuring": measuring}, flat)
    question, measuring = groups["question"], groups["measuring"]
    e = experiment(name)
    if not 0 < scale <= 4:
        raise DownresError(f"The scale of sizes is above 0 and at most 4, {scale:g} is not: give for example 0.25.")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise DownresError("Seeds are different numbers, at least one: give for example 0,1,2.")
    entries = [entry for entry in e.entries if fnmatch.fnmatch(entry.name, only)]
    if not entries:
        some = ", ".join(entry.name for entry in e.entries[:4])
        raise DownresError(f"No entry of {e.name} matches {only!r}: it has {some}, …")
    if data is not None and out is None:
        raise DownresError("A training needs a folder to be kept in: give `out`.")
    if data is not None and not e.images:
        raise DownresError(f"{e.name} is about costs alone, nothing of it is trained: leave `data` out.")
    folder = None if out is None else user_path(out)
    kind = known_task(e.task)
    assert kind is not None
    classes, aspect, told = e.classes, e.aspect, ""
    if data is not None:
        classes = len(kind.named_classes(data, question))
    elif folder is not None and (kept := _read(folder / e.name / "data.json", "classes", "aspect", "data", "scale")):
        if scale not in (1.0, kept["scale"]):
            raise DownresError(f"{folder} has {e.name} at a scale of {kept['scale']:g}, not {scale:g}: leave `scale` out.")
        classes, aspect, told, scale = kept["classes"], kept["aspect"], kept["data"], kept["scale"]
    if measuring.train_images is None:
        measuring = dataclasses.replace(measuring, train_images=MOST_IMAGES)
    run = _Run(e, folder, scale, classes, aspect, measuring, question, progress)
    if data is not None:
        told = run.go(data, entries, seeds, _training(e, train), grid)
    lines: list[Line] = []
    if not Team().first:  # it has trained along, the first says what came of it
        return Reproduction(e, (), scale, classes, told, folder)
    for i, entry in enumerate(entries):
        lines.append(run.line(entry, kind))
        if progress:
            progress("counting", i + 1, len(entries))
    return Reproduction(e, tuple(lines), scale, classes, told, folder)


def _training(e: Experiment, texts: Sequence[str]) -> Training:
    return Training.parse(texts, **{f.name: getattr(e.training, f.name) for f in dataclasses.fields(Training)})


class _Run:
    def __init__(
        self,
        e: Experiment,
        folder: Path | None,
        scale: float,
        classes: int,
        aspect: float,
        measuring: Measuring,
        question: Question,
        progress: Progress | None,
    ) -> None:
        self.e, self.folder, self.scale, self.classes = e, folder, scale, classes
        self.measuring, self.question, self.progress = measuring, question, progress
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.aspect, self.data = aspect, None
        self.made: tuple[Any, ...] = ()
        self.counted: dict[tuple[int, ...], Cost] = {}

    def place(self, entry: Entry, seed: int, of: str = "") -> Path:
        assert self.folder is not None
        return self.folder / (of or self.e.name) / slug(entry.name) / f"seed{seed}"

    def network(self, entry: Entry, seed: int) -> nn.Module:
        return scratch(entry.network, self.classes, seed, **entry.options(self.scale))

    def seen_as(self, entry: Entry, look: Look) -> Preprocessing:
        return seen_as(look, self.e, entry.scale(self.scale), self.aspect)

    # Training

    def go(self, data: Any, entries: Sequence[Entry], seeds: Sequence[int], how: Training, grid: bool) -> str:
        """Trains and looks at what is not there yet; what the data are, in words."""
        team = Team()
        for seed in seeds:
            for entry in entries:
                task = self.opened(entry, seed, data)
                self.same(task)
                step = self.step(entry, seed, task, how, team)
                if team.first:
                    assert step is not None
                    self.look(entry, seed, step, [entry.look, *(self.e.looks(entry) if grid else ())])
        assert self.data is not None
        return str(self.data.description)

    def opened(self, entry: Entry, seed: int, data: Any) -> Task:
        """The task of an entry's untrained network at the size that it is trained at."""
        side = scaled(entry.trained, entry.scale(self.scale))
        p = Preprocessing(side, 1.0, fit="stretch" if self.e.whole else "crop")
        model = Model(self.network(entry, seed), p, num_classes=self.classes)
        task = prepare_task(model, self.data or data, self.question, self.e.task)
        open_data(task, self.data or data, self.measuring, self.question, progress=self.progress)
        if self.data is None:
            height, width = task.data.images.shapes[0][:2]
            self.data, self.aspect = task.data, width / height
        return task

    def same(self, task: Task) -> None:
        """The folder's data are these, at this scale."""
        assert self.folder is not None
        file = self.folder / self.e.name / "data.json"
        now = {"sha256": task.data.fingerprint(), "scale": self.scale, "classes": self.classes, "aspect": self.aspect}
        if self.e.of:
            trained_on = _read(self.folder / self.e.of / "data.json", *now)
            if trained_on is None:
                raise DownresError(f"Nothing of {self.e.of} is trained in {self.folder}: run {self.e.of} there first.")
            if any(trained_on[name] != now[name] for name in now):
                raise DownresError(
                    f"{self.e.of} in {self.folder} was trained on other images than these, divided otherwise, or at another "
                    "scale: give its own."
                )
        if (kept := _read(file, *now)) is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, write_json({**now, "data": task.data.description}).encode())
        elif other := [name for name in now if kept.get(name) != now[name]]:
            what = "other images" if "sha256" in other else f"{other[0]} {kept[other[0]]}"
            raise DownresError(f"{file.parent} has this experiment with {what}: give another folder.")

    def step(self, entry: Entry, seed: int, task: Task, how: Training, team: Team) -> Step | None:
        """What training did to the entry's weights, done now where it is not known; in other processes than the first nothing
        is returned.
        """
        if self.e.of:
            return self.step_of(entry, seed)
        place = self.place(entry, seed)
        side = scaled(entry.trained, entry.scale(self.scale))
        made = {"network": entry.network, "made": entry.options(self.scale), "side": side}
        asked = {**made, "scale": self.scale, "training": how.to_json(), "seed": seed}
        known = _read(place / "training.json", *_TRAINED)
        if known is not None and known["asked"] != plain(asked):
            raise DownresError(
                f"{place} was trained otherwise: the same command goes on there, another one needs another folder."
            )
        bank = task.bank(place if team.first else None, progress=self.progress, **self.measuring.options())
        bank.training, bank.team, bank.stage = how, team, f"{entry.name}, seed {seed}: "
        task.fill(bank)
        state, images = task.native_state, task.data.folds[0].train

        def taught(job: Job | None = None) -> tuple[State, str]:
            lesson = Finetuning(task, bank, bank.preprocessing_of(state).hw, how)
            return trained(bank, state, 0, images, how, lesson, seed)

        if not team.first:
            team.help(lambda job: _ignored(taught(job)))
            return None
        with team.leading(entry.name):
            if known is not None and bank.weights.has(known["step"]["tensors"]):
                return Step.from_json(known["step"])
            if len(images) < 2:
                raise DownresError("There are no training images: give a folder with train/ and val/, or a `val_fraction`.")
            whole, begun = not any((place / "training").glob("*.pt")), time.perf_counter()
            found, told = taught()
            hours = (time.perf_counter() - begun) / 3600 if whole else None
        step = found.trained
        assert step is not None
        about = {"asked": asked, "step": step.to_json(), "told": told, "hours": hours}
        about |= {"hardware": hardware(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "training.json", write_json(plain(about)).encode())
        return step

    def step_of(self, entry: Entry, seed: int) -> Step:
        """That of the experiment whose networks are looked at here."""
        known = _read(self.place(entry, seed, self.e.of) / "training.json", *_TRAINED)
        if known is None:
            raise DownresError(f"{entry.name} with seed {seed} is not trained in {self.folder}: run {self.e.of} there first.")
        return Step.from_json(known["step"])

    # Looking

    def look(self, entry: Entry, seed: int, step: Step, looks: Sequence[Look]) -> None:
        place = self.place(entry, seed)
        known, todo = _looks(place, step), list(dict.fromkeys(looks))
        tensors = Weights(self.place(entry, seed, self.e.of)).get(step.tensors)
        network = with_tensors(self.network(entry, seed), tensors).eval()
        for i, look in enumerate(todo):
            if self.progress:
                self.progress(f"{entry.name}, seed {seed}: looking at {look}", i, len(todo))
            if (key := write_json(look.to_json())) not in known:
                known[key] = self.looked(entry, network, look, place).to_json()
                place.mkdir(parents=True, exist_ok=True)
                kept = {"tensors": step.tensors, "looks": known, "hardware": hardware(), "versions": versions()}
                write_whole(place / "looks.json", write_json(plain(kept)).encode())
        if self.progress:
            self.progress(f"{entry.name}, seed {seed}: looked at", len(todo), len(todo))

    def looked(self, entry: Entry, network: nn.Module, look: Look, place: Path | None = None) -> Score:
        """How good the network is at a look, on all proof images. place: where a picture of an answer is kept."""
        question = self.question
        if entry.network == "vit":
            side = scaled(look.side, entry.scale(self.scale))
            given = {k: v for k, v in entry.options(self.scale).items() if k != "side"}
            mode = look.mode if look.mode in INTERPOLATIONS else "bicubic"
            network = at_grid(network, side, mode, **given)  # type: ignore[arg-type]
        elif look.mode:
            question = dataclasses.replace(question, upsampling=look.mode)
        model = Model(network, self.seen_as(entry, look), num_classes=self.classes)
        task = prepare_task(model, self.data, question, self.e.task)
        open_data(task, self.data, self.measuring, question)
        p, served = task.model.preprocessing, task.serve(task.model.module)
        with contextlib.ExitStack() as stack:
            if look.precision == INT8:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="downres-")))
                runtime: Any = _in_8_bits(task, served, folder, p, self.measuring.threads, look.mode == DYNAMIC)
            else:
                runtime = TorchRuntime(served, self.measuring.threads, device=self.device)
            found: Score = task.quality(judged(task, runtime, task.proof, p))
            if task.writes and place is not None:  # one picture's answer, for the figure
                picture = task.data.images[int(task.proof[0])]
                answer = runtime(preprocess(picture, p)[None].numpy())[0][0]
                task.predict(answer, picture, f"{slug(str(look))}.png", p, 1, place / "answers")
                Image.fromarray(visible(picture)).save(place / "answers" / "picture.png")
        return found

    # What is known

    def line(self, entry: Entry, kind: type[Task]) -> Line:
        memory = self.cost(entry, entry.look, MEMORY_BATCH).peak_activation_bytes
        seen = tuple(self.kept(entry, kind)) if self.folder is not None else ()
        sides = set(self.e.sides)
        if "side" not in entry.made:  # it takes any size
            sides |= {look.side for one in seen for look in one.looks}
        at = {side: self.cost(entry, Look(side), 1) for side in sorted(sides)}
        return Line(entry, self.cost(entry, entry.look, 1), memory, at, seen)

    def cost(self, entry: Entry, look: Look, batch: int) -> Cost:
        """Of so many images; where they are looked at whole the logits are brought to the full size, if they are smaller."""
        options = entry.options(self.scale)
        full = None
        if self.e.whole:
            height = scaled(max(FULL, look.side), entry.scale(self.scale))
            full = height, max(1, round(height * self.aspect))
        if (made := (entry.network, write_json(options), full)) != self.made:  # that of the entry before, at another size
            with torch.device("meta"):  # of weights only shapes count
                network = scratch(entry.network, self.classes, 0, **options)
            network = nn.Module.eval(network.to_empty(device="cpu"))
            if full is not None:
                network = Segmenter(network, Dense(full))
            self.made, self.copy, self.counted = made, FakeCopy(network), {}
        size = (batch, 3, *self.seen_as(entry, look).hw)
        if size not in self.counted:
            self.counted[size] = count(self.copy, size)
        return self.counted[size]

    def kept(self, entry: Entry, kind: type[Task]) -> Iterator[Seen]:
        place = self.place(entry, 0).parent
        for seed in sorted(int(p.name[4:]) for p in place.glob("seed*") if re.fullmatch(r"seed\d+", p.name)):
            about = _read(self.place(entry, seed, self.e.of) / "training.json", *_TRAINED)
            if about is None:
                continue
            step = Step.from_json(about["step"])
            looks = {_look(key): kind.score.from_json(score) for key, score in _looks(place / f"seed{seed}", step).items()}
            yield Seen(seed, about["hours"], looks)


def _in_8_bits(
    task: Task, served: nn.Module, folder: Path, p: Preprocessing, threads: int | None, dynamic: bool = False
) -> Any:
    """The network's 8-bit file in onnxruntime, its ranges from training images as they are looked at; dynamic: linear layers
    alone, ranges from each image.
    """
    engine, size = engine_of("onnxruntime"), (len(p.mean), *p.hw)
    export_onnx(served, size, folder / "float.onnx", (task.output_name,))
    if dynamic:
        quantize_linear(folder / "float.onnx", folder / "int8.onnx")
        return engine.load(folder / "int8.onnx", threads, precision=INT8, spread=True)
    chosen = np.random.default_rng([task.seed, 3]).permutation(task.data.folds[0].train)[:RANGE_IMAGES]  # of all classes
    batch = task.batch_size
    seen = Batches(lambda: map(np.asarray, batches(task.data.images, chosen, p, batch)), len(chosen), -(-len(chosen) // batch))
    engine.quantize(folder / "float.onnx", folder / "int8.onnx", seen, Quantization(), None)
    return engine.load(folder / "int8.onnx", threads, precision=INT8, spread=True)


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)


def _ignored(value: Any) -> None:
    """Of a process that only helps."""


_TRAINED = ("asked", "step", "hours")
"""What a finished training's file has."""


def _read(file: Path, *names: str) -> Any:
    """A JSON object with those names, None where there is no file."""
    try:
        found = read_json(file, MOST_BYTES)
        if not isinstance(found, dict) or not set(names) <= found.keys():
            raise ValueError(f"it has not {', '.join(names)}")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise DownresError(f"{file} cannot be read ({error}): delete it to do anew what is in it.") from None


def _looks(place: Path, step: Step) -> dict[str, Any]:
    """By the look as JSON; of other weights nothing."""
    kept = _read(place / "looks.json", "looks", "tensors")
    return dict(kept["looks"]) if kept is not None and kept["tensors"] == step.tensors else {}


def _look(text: str) -> Look:
    return Look.from_json(json.loads(text))
