"""A model as every state of itself that is looked at, ready to run; what is made of the answers is the subclasses' matter."""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Images, batches
from ..records import Candidate, Preprocessing, Record
from ..reduction import made_for, reduce, takes_any_size
from ..runtimes.onnxruntime import OnnxRuntime, export_onnx
from ..runtimes.torch import TorchRuntime
from .batchnorm import recalibrate_batchnorm

Progress = Callable[[str, int, int], None]

CALIBRATION_IMAGES = 256
"""Training images that BatchNorm statistics are averaged over."""


@dataclass(frozen=True)
class State(Record):
    """One backbone and the pixels it gets: what its answers depend on.

    calibration: the fold on whose training images BatchNorm was recalibrated, None for the original statistics;
    calibration_images: how many of them.
    """

    candidate: Candidate
    crop_ratio: float
    calibration: int | None = None
    calibration_images: int = CALIBRATION_IMAGES

    def key(self) -> str:
        """A file name: readable, and unique by a hash of everything in it."""
        digest = hashlib.sha256(repr(self.to_json()).encode()).hexdigest()[:8]
        return f"{str(self.candidate).replace(' ', '_').replace('×', '')}-{digest}".replace("/", "_")


class Bank:
    """The networks of a search and their runtimes, one candidate after the other.

    It exports and counts before it has images; `images` and `calibration` (for each fold the training images that
    BatchNorm may be recalibrated on) are set once the data are open.
    """

    output_names: tuple[str, ...] = ("logits",)
    calibration_batch = 32

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        *,
        folder: Path | None = None,
        runtime: str = "onnxruntime",
        threads: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.preprocessing, self.any_size = model, preprocessing, takes_any_size(model)
        self.images: Images | None = None
        self.calibration: list[np.ndarray] = []
        self.folder, self.runtime_name, self.threads, self.batch_size = folder, runtime, threads, batch_size
        self.progress = progress
        self.passes = 0
        self.stage = ""
        self._runtimes: dict[tuple[State, bool], OnnxRuntime | TorchRuntime] = {}
        self._networks: dict[State, nn.Module] = {}

    def served(self, state: State) -> nn.Module:
        """The network of a state as it is timed and run: what it returns are `output_names`."""
        raise NotImplementedError

    def counted(self, state: State) -> nn.Module:
        """The network of a state as its cost is counted."""
        return self.network(state)

    def preprocessing_of(self, state: State) -> Preprocessing:
        return self.preprocessing.at(state.candidate.resolution, state.crop_ratio)

    def network(self, state: State) -> nn.Module:
        """The network of a state with its original head: takes the small input, returns what the original returns."""
        if state not in self._networks:
            if self._is_original(state.candidate):
                network = made_for(self.model, self.preprocessing.hw)
            else:
                size = (len(self.preprocessing.mean), *self.preprocessing.hw)
                network = reduce(self.model, state.candidate, input_size=size, resize_input=False)
            if state.calibration is not None:
                chosen = self.calibration[state.calibration][: state.calibration_images]
                self.passes += len(chosen)
                source = self.batches(state, chosen, self.calibration_batch)
                with contextlib.closing(source):
                    network = recalibrate_batchnorm(network, (torch.as_tensor(b) for b in source))
            self._networks = {state: network}  # one at a time: candidates come one after the other
        return self._networks[state]

    def _is_original(self, candidate: Candidate) -> bool:
        """Whether the original's own network serves this candidate: its own resolution, or it takes any."""
        if candidate == Candidate(candidate.resolution):
            return self.any_size or candidate.resolution == self.preprocessing.resolution
        return False

    def runtime(self, state: State, serving: bool = True) -> OnnxRuntime | TorchRuntime:
        """The state's network ready to run; for onnxruntime exported once to the run's folder.

        serving: whether it must be the runtime that numbers are stated for. A recalibrated network that is only tried
        on a few tuning images runs in torch, which is ready at once where an export takes seconds.
        """
        trial = state.calibration is not None and not serving
        if self.runtime_name == "torch" and state.calibration is None:
            # The crop happens before the network; and one that takes any size is the same one at every resolution.
            same = state.candidate.at(self.preprocessing.resolution) if self._is_original(state.candidate) else state.candidate
            state = State(same, 1.0)
        if (state, trial) not in self._runtimes:
            if self.runtime_name == "torch" or self.folder is None or trial:
                ready: OnnxRuntime | TorchRuntime = TorchRuntime(self.served(state), self.threads)
            else:
                # The graph depends on the candidate and the statistics: the crop happens before it.
                same_graph = state if state.calibration is not None else dataclasses.replace(state, crop_ratio=1.0)
                file = self.folder / "onnx" / f"{same_graph.key()}.onnx"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    size = (len(self.preprocessing.mean), *self.preprocessing_of(state).hw)
                    partial = file.with_suffix(".partial")
                    export_onnx(self.served(state), size, partial, self.output_names)
                    partial.replace(file)
                ready = OnnxRuntime(file, self.threads)
            self._runtimes[state, trial] = ready
        return self._runtimes[state, trial]

    def forget(self) -> None:
        """Delete what only an unfinished run needs: features and the search's ONNX files."""
        self.release()
        if self.folder is not None:
            for name in ("features", "onnx"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

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
