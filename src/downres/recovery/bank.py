"""A model as every state of itself that is looked at, ready to run; what is made of the answers is the subclasses' matter."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..engines import Runtime, check_threads
from ..engines.engine import Batches, Engine, Quantization, check_calibration, engine_of, is_whole_file
from ..engines.onnxruntime import NotExported, export_onnx, resize_onnx
from ..engines.torch import TorchRuntime
from ..errors import DownresError
from ..images import Images, batches
from ..measuring.footprint import footprint
from ..parse import FP32, INT8
from ..records import Candidate, Footprint, Preprocessing
from ..reduction import made_for, reduce, takes_any_size
from .batchnorm import recalibrate_batchnorm
from .state import QUANTIZED, RECALIBRATED, State, Step
from .team import Team
from .training import Training
from .weights import Weights, with_tensors

Progress = Callable[[str, int, int], None]

CALIBRATION_IMAGES = 256
"""Training images that BatchNorm statistics are averaged over."""
RANGE_IMAGES = 128
"""Training images that the ranges of 8-bit activations are taken from."""
PROBE_IMAGES = 2
"""Of noise, in the place of those where only the time of an 8-bit file is asked for."""


class Bank:
    """The networks of a search and their runtimes, one candidate after the other.

    It exports and counts before it has images; `images` and `calibration` (for each fold the training images that
    BatchNorm may be recalibrated on) are set once the data are open. ranged: images that 8-bit activations take their ranges
    from; with cross-fitting two lists, the proof images of two folds, so that each fold has one that it does not prove on.
    What one network answers, image by image: `answers`.

    serve: makes of a reduced network what is timed and run. output_names: what that returns.
    """

    calibration_batch = 32

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        serve: Callable[[nn.Module], nn.Module],
        output_names: tuple[str, ...] = ("logits",),
        *,
        folder: Path | None = None,
        runtime: str = "onnxruntime",
        threads: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.preprocessing, self.any_size = model, preprocessing, takes_any_size(model)
        self.serve, self.output_names = serve, output_names
        self.weights = Weights(folder)
        self.images: Images | None = None
        self.calibration: list[np.ndarray] = []
        self.ranged: list[np.ndarray] = []
        self.training, self.team = Training(), Team()
        self.trained: dict[
            str, tuple[Step | None, str]
        ] = {}  # what came of a training, and what is told of it, by what was asked
        self.sensitive: dict[Candidate, list[str]] = {}  # layers by what they lose in 8 bits
        self.folder, self.runtime_name, self.threads, self.batch_size = folder, runtime, threads, batch_size
        self.progress = progress
        self.passes = 0
        self.stage = ""
        self._runtimes: dict[tuple[State, bool], Runtime] = {}
        self._engines: dict[str, Engine] = {}
        self._networks: dict[State, nn.Module] = {}
        self._exported: Path | None = None

    def served(self, state: State) -> nn.Module:
        """The network of a state as it is timed and run: what it returns are `output_names`."""
        return self.serve(self.network(state))

    def counted(self, state: State) -> nn.Module:
        """The network of a state as its cost is counted."""
        return self.network(state)

    def preprocessing_of(self, state: State) -> Preprocessing:
        return self.preprocessing.at(state.candidate.resolution, state.crop_ratio)

    def network(self, state: State) -> nn.Module:
        """The network of a state: takes the small input, returns what the original returns."""
        state = state.network
        if state not in self._networks:
            if self._is_original(state.candidate):
                network = made_for(self.model, self.preprocessing.hw)
            else:
                size = (len(self.preprocessing.mean), *self.preprocessing.hw)
                network = reduce(self.model, state.candidate, input_size=size, resize_input=False)
            for step in state.history:
                if step.done == RECALIBRATED:
                    assert step.fold is not None
                    chosen = self.calibration[step.fold][: step.images]
                    self.passes += len(chosen)
                    source = self.batches(state, chosen, self.calibration_batch)
                    with contextlib.closing(source):
                        network = recalibrate_batchnorm(network, (torch.as_tensor(b) for b in source))
                else:
                    network = with_tensors(network, self.weights.get(step.tensors))
            self._networks = {state: network}  # one at a time: candidates come one after the other
        return self._networks[state]

    def _is_original(self, candidate: Candidate) -> bool:
        """Whether the original's own network serves this candidate: its own resolution, or it takes any."""
        if candidate == Candidate(candidate.resolution):
            return self.any_size or candidate.resolution == self.preprocessing.resolution
        return False

    def engine(self, candidate: Candidate) -> Engine:
        """Where a candidate is measured and shipped. DownresError where that is not installed or has no such precision here."""
        name = candidate.runtime or self.runtime_name
        if name not in self._engines:
            self._engines[name] = engine_of(name)
        self._engines[name].refuse(candidate.precision)
        return self._engines[name]

    def timed(self, state: State) -> Runtime:
        """The state's network as it is timed: every operator on all threads. Of 8 bits without a history the ranges are those
        of noise, which changes no time.
        """
        if self._in_torch(state.candidate):
            return self.runtime(state)
        engine = self.engine(state.candidate)
        return engine.load(self.file(self._probe(state)), self.threads, precision=state.candidate.precision)

    def footprint(self, state: State, shape: tuple[int, ...]) -> Footprint | None:
        """What the file of `timed` takes; None of what runs without one."""
        if self._in_torch(state.candidate):
            return None
        engine, precision = self.engine(state.candidate), state.candidate.precision
        alone = precision in (FP32, INT8)  # the program of `Engine.alone` computes in float32 where it is not in 8 bits
        return footprint(engine, self.file(self._probe(state)), shape, check_threads(self.threads), alone=alone)

    def _probe(self, state: State) -> State:
        if state.candidate.precision == INT8 and state.step(QUANTIZED) is None:
            return state.then(Step(QUANTIZED, None, PROBE_IMAGES, how=Quantization()))
        return state

    def _in_torch(self, candidate: Candidate) -> bool:
        return self.folder is None or not self.engine(candidate).exported

    def started(self, state: State, candidate: Candidate, fold: int) -> State:
        """The state of another candidate before anything is recovered in that fold: one of 8 bits is quantized already."""
        state = state.at(candidate)
        if candidate.precision != INT8:
            return state
        images = 0 if fold or len(self.ranged) == 1 else 1
        count = min(RANGE_IMAGES, len(self.ranged[images]))
        check_calibration(count)
        return state.then(Step(QUANTIZED, images, count, how=Quantization()))

    def runtime(self, state: State, serving: bool = True) -> Runtime:
        """The state's network ready to run over images; for onnxruntime exported once to the run's folder.

        serving: whether it must be the runtime that numbers are stated for. A recalibrated network that is only tried
        on a few tuning images runs in torch, which is ready at once where an export takes seconds.
        """
        precision = state.candidate.precision
        trial = bool(state.history) and not serving and precision == FP32
        in_torch = self._in_torch(state.candidate)
        if in_torch and not state.history:
            # The crop happens before the network; and one that takes any size is the same one at every resolution.
            same = state.candidate.at(self.preprocessing.resolution) if self._is_original(state.candidate) else state.candidate
            state = State(same, 1.0)
        if (state, trial) not in self._runtimes:
            if trial:
                found: Runtime = TorchRuntime(self.served(state), self.threads)
            elif in_torch:
                device = self.engine(state.candidate).device if self.folder is not None else "cpu"
                found = TorchRuntime(self.served(state), self.threads, device=device, precision=precision)
            else:
                engine = self.engine(state.candidate)
                found = engine.load(self.file(state), self.threads, precision=precision, spread=True)
            self._runtimes[state, trial] = found
        return self._runtimes[state, trial]

    def file(self, state: State) -> Path:
        """The file of a state for its engine, in the run's folder, made once."""
        engine, precision = self.engine(state.candidate), state.candidate.precision
        if engine.text == "onnxruntime" and precision == FP32:
            return self.onnx(state.network)
        assert self.folder is not None
        file = self.folder / "onnx" / f"{state.key()}-{engine.text.replace(':', '-')}{Path(engine.file).suffix}"
        if not is_whole_file(engine, file):
            self.write(state, self.onnx(state.network), file, self.head_weight(state))
        return file

    def write(self, state: State, onnx: Path, file: Path, head: np.ndarray | None) -> None:
        """Makes the file of a state of its exported network. head: the weight of its last linear layer, which stays in
        float."""
        engine, precision = self.engine(state.candidate), state.candidate.precision
        partial = file.with_name(f"partial{file.suffix}")
        if (step := state.step(QUANTIZED)) is not None:
            assert step.how is not None
            assert self.folder is not None
            seen = f"{onnx.stem}-{state.crop_ratio!r}-{step.fold}-{step.images}-{step.how.ranges}"
            ranges = None if onnx.parent != self.folder / "onnx" else onnx.with_name(f"{seen}.json")
            engine.quantize(onnx, partial, self._seen(state, step), step.how, head, ranges)
            if step.fold is not None:
                self.passes += step.images
        else:
            assert precision != INT8, "a file of 8 bits is made of calibration images"
            engine.write(onnx, partial, precision)
        for made, named in reversed(list(zip(engine.files(partial), engine.files(file), strict=True))):
            made.replace(named)  # the first of them last: where that is there, all are

    def ship(
        self, state: State, folder: Path, serve: Callable[[nn.Module], nn.Module], name: str, stem: str = "model"
    ) -> Engine:
        """Writes the file of a state as it is shipped, with `name` as its one output, into the folder; the engine that it is
        for: what was measured in torch is shipped as ONNX.
        """
        if self._in_torch(state.candidate) and state.candidate.precision != FP32:
            raise NotExported(f"a torch network in {state.candidate.precision} is no file that downres writes")
        engine = engine_of("onnxruntime") if self._in_torch(state.candidate) else self.engine(state.candidate)
        file = (folder / stem).with_suffix(Path(engine.file).suffix)
        if not self._in_torch(state.candidate) and self.output_names == (name,):
            for kept, copied in zip(engine.files(self.file(state)), engine.files(file), strict=True):
                shutil.copyfile(kept, copied)  # the very file that was measured
            return engine
        size = (len(self.preprocessing.mean), *self.preprocessing_of(state).hw)
        with tempfile.TemporaryDirectory(prefix="downres-") as place:
            direct = engine.text == "onnxruntime" and state.candidate.precision == FP32
            exported = file if direct else Path(place) / "exported.onnx"
            if not self.taken_from(state, serve, exported, name):
                export_onnx(serve(self.network(state)), size, exported, (name,))
            if not direct:
                self.write(state, exported, file, self.head_weight(state))
        return engine

    def taken_from(self, state: State, serve: Callable[[nn.Module], nn.Module], file: Path, name: str) -> bool:
        """Whether `file` could be written, with the one output `name`, from a graph that was exported before."""
        return False

    def _seen(self, state: State, step: Step) -> Batches:
        """The images that ranges are taken from."""
        if step.fold is None:
            size = (len(self.preprocessing.mean), *self.preprocessing_of(state).hw)
            noise = np.random.default_rng(0).standard_normal((step.images, 1, *size), dtype=np.float32)
            return Batches.of(list(noise))
        chosen = self.ranged[step.fold][: step.images]
        count = -(-len(chosen) // self.batch_size)
        return Batches(lambda: map(np.asarray, self.batches(state, chosen, self.batch_size)), len(chosen), count)

    def head_weight(self, state: State) -> np.ndarray | None:
        """Weight (K, F) of the last linear layer in the file of a state, where that is known."""
        return None

    def onnx_file(self, state: State) -> Path:
        """Where `onnx` has that, or will have it. The graph depends on candidate and weights: the crop happens before it."""
        assert self.folder is not None
        same_graph = state if state.step(RECALIBRATED) else dataclasses.replace(state, crop_ratio=1.0)
        return self.folder / "onnx" / f"{same_graph.key()}.onnx"

    def onnx(self, state: State) -> Path:
        """The file of the state's network in the run's folder, exported once."""
        assert self.folder is not None
        file = self.onnx_file(state)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            size = (len(self.preprocessing.mean), *self.preprocessing_of(state).hw)
            network, partial = self.served(state), file.with_suffix(".partial")
            # A network that takes any size is exported at one, and that graph serves the others.
            any_size = self.any_size and not state.history and self._is_original(state.candidate)
            if not (any_size and self._exported and resize_onnx(self._exported, network, size, partial)):
                export_onnx(network, size, partial, self.output_names)
            partial.replace(file)
            if any_size:
                self._exported = file
        return file

    def forget(self) -> None:
        """Delete what only an unfinished run needs: features and the search's ONNX files."""
        self.release()
        if self.folder is not None:
            for name in ("features", "onnx", "training"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def count_anew(self) -> None:
        """From here on every image that is looked at counts, whatever this process has looked at before."""

    def release(self) -> None:
        """Forget runtimes and networks, keep what is known of images."""
        self._runtimes, self._networks = {}, {}

    def note(self, state: State, looked_at: int, done: int, total: int) -> None:
        """Counts images and shows how far a pass is."""
        self.passes += looked_at
        if self.progress:
            self.progress(f"{self.stage}{state.candidate}: looking at images", done, total)

    def batches(self, state: State, indices: np.ndarray, size: int) -> Generator[Tensor]:
        assert self.images is not None
        return batches(self.images, indices, self.preprocessing_of(state), size)

    def answers(self, state: State, indices: np.ndarray, *, serving: bool = True) -> Generator[tuple[np.ndarray, ...]]:
        """What the served network returns for each image, output by output, without the batch axis.

        Raises DownresError where a value is NaN or infinite: nothing may be measured on such an answer.
        """
        assert self.images is not None
        runtime, done = self.runtime(state, serving), 0
        with contextlib.closing(self.batches(state, indices, self.batch_size)) as source:
            for batch in source:
                outputs = runtime(np.asarray(batch))
                for answer in zip(*outputs, strict=True):
                    self.refuse_nan(state, int(indices[done]), *answer)
                    yield answer
                    done += 1
                self.note(state, len(batch), done, len(indices))

    def refuse_nan(self, state: State, image: int, *answer: np.ndarray) -> None:
        if not all(np.isfinite(values).all() for values in answer):
            assert self.images is not None
            raise DownresError(
                f"The model returns NaN or infinite values at {state.candidate} on real images "
                f"({self.images.names[image]}): check its weights and the preprocessing."
            )
