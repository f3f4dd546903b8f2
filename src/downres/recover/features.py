"""Features of every image under every state of the network that is looked at: computed once, kept, resumed."""

import contextlib
import copy
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Images, batches
from ..errors import DownresError
from ..probe import logits_of
from ..records import Candidate, Preprocessing, Record
from ..reduction import made_for, reduce, takes_any_size
from ..runtimes.onnxruntime import OnnxRuntime, export_onnx
from ..runtimes.torch import TorchRuntime
from .batchnorm import recalibrate_batchnorm
from .head import Head

Progress = Callable[[str, int, int], None]

CALIBRATION_IMAGES = 256
"""Training images that BatchNorm statistics are averaged over."""


@dataclass(frozen=True)
class State(Record):
    """One backbone and the pixels it gets: what features depend on.

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


class Classifier(nn.Module):
    """Any classifier as one that returns (logits,) or, with the name of its head, (logits, features)."""

    def __init__(self, model: nn.Module, head: str | None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.outputs = None
        if head is not None:
            linear = self.model.get_submodule(head)
            assert isinstance(linear, nn.Linear)
            self.outputs = linear.out_features
            self.model.set_submodule(head, _Tap(linear))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = logits_of(self.model(x))
        return (out,) if self.outputs is None else (out[:, : self.outputs], out[:, self.outputs :])


class _Tap(nn.Module):
    """A linear layer that also hands on its input, so that one pass gives logits and features."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self.linear(features), features], dim=-1)


class FeatureBank:
    """`features(state, indices)` → (len(indices), F): computes what is missing, remembers all of it.

    It exports and counts before it has images; `images` and `calibration` (for each fold the training images that
    BatchNorm may be recalibrated on) are set once the data are open.
    With a folder the features live in memory-mapped files there, filled chunk by chunk, so that an interrupted
    run goes on where it was. Without a known head the "features" are the logits themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | None,
        width: int,
        preprocessing: Preprocessing,
        *,
        folder: Path | None = None,
        runtime: str = "onnxruntime",
        threads: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.head, self.width = model, head, width
        self.preprocessing, self.any_size = preprocessing, takes_any_size(model)
        self.images: Images | None = None
        self.calibration: list[np.ndarray] = []
        self.folder, self.runtime_name, self.threads, self.batch_size = folder, runtime, threads, batch_size
        self.progress = progress
        self.passes = 0
        self.stage = ""
        self._stores: dict[State, tuple[np.ndarray, np.ndarray]] = {}
        self._runtimes: dict[tuple[State, bool], OnnxRuntime | TorchRuntime] = {}
        self._networks: dict[State, nn.Module] = {}

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
                source = self._batches(state, chosen, 32)
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
                ready: OnnxRuntime | TorchRuntime = TorchRuntime(Classifier(self.network(state), self.head), self.threads)
            else:
                # The graph depends on the candidate and the statistics: the crop happens before it.
                same_graph = state if state.calibration is not None else dataclasses.replace(state, crop_ratio=1.0)
                file = self.folder / "onnx" / f"{same_graph.key()}.onnx"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    names = ("logits",) if self.head is None else ("logits", "features")
                    size = (len(self.preprocessing.mean), *self.preprocessing_of(state).hw)
                    partial = file.with_suffix(".partial")
                    export_onnx(Classifier(self.network(state), self.head), size, partial, names)
                    partial.replace(file)
                ready = OnnxRuntime(file, self.threads)
            self._runtimes[state, trial] = ready
        return self._runtimes[state, trial]

    def forget(self) -> None:
        """Delete what only an unfinished run needs: features and the search's ONNX files."""
        self.release()
        self._stores = {}
        if self.folder is not None:
            for name in ("features", "onnx"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def release(self) -> None:
        """Forget runtimes and networks, keep the features."""
        self._runtimes, self._networks = {}, {}

    def features(self, state: State, indices: np.ndarray, *, serving: bool = True) -> np.ndarray:
        assert self.images is not None
        store, known = self._store(state)
        todo = indices[~known[indices]]
        if len(todo):
            runtime, done = self.runtime(state, serving), 0
            source = self._batches(state, todo, self.batch_size)
            with contextlib.closing(source):
                for batch in source:
                    out = runtime(np.asarray(batch))[-1]
                    if not np.isfinite(out).all():
                        raise DownresError(
                            f"The model returns NaN or infinite values at {state.candidate} on real images "
                            f"({self.images.names[todo[done]]} or near it): check its weights and the preprocessing."
                        )
                    chunk = todo[done : done + len(out)]
                    store[chunk] = out
                    known[chunk] = True
                    done += len(out)
                    self.passes += len(out)
                    if self.progress:
                        self.progress(f"{self.stage}{state.candidate}: looking at images", done, len(todo))
        return np.asarray(store[indices])

    def _batches(self, state: State, indices: np.ndarray, size: int):  # type: ignore[no-untyped-def]
        assert self.images is not None
        return batches(self.images, indices, self.preprocessing_of(state), size)

    def _store(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """(features (n, F) float32, which of them are known (n,) bool)."""
        assert self.images is not None
        if state not in self._stores:
            n = len(self.images)
            self._stores[state] = (
                self._array(state, "features", (n, self.width), np.float32),
                self._array(state, "known", (n,), np.bool_),
            )
        return self._stores[state]

    def _array(self, state: State, what: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        if self.folder is None or state.calibration is not None:
            return np.zeros(shape, dtype)  # recalibrated networks see few images: not worth a file
        (self.folder / "features").mkdir(parents=True, exist_ok=True)
        file = self.folder / "features" / f"{state.key()}.{what}.npy"
        if not file.exists():
            partial = file.with_suffix(".partial")
            np.lib.format.open_memmap(partial, "w+", dtype, shape)  # zeros, sparse on disk until written
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash where a mapping is written to
                with open(partial, "r+b") as handle:
                    os.posix_fallocate(handle.fileno(), 0, partial.stat().st_size)
            partial.replace(file)
        return np.lib.format.open_memmap(file, "r+")


def logits(features: np.ndarray, head: Head | None) -> np.ndarray:
    """(n, F) → (n, K); without a head the features are the logits."""
    return features if head is None else head(features)
