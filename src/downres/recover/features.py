"""Features of every image under every state of a classifier that is looked at: computed once, kept, resumed."""

import contextlib
import copy
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DownresError
from ..probe import logits_of
from ..records import Preprocessing
from .bank import Bank, State
from .head import Head


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


class FeatureBank(Bank):
    """`features(state, indices)` → (len(indices), F): computes what is missing, remembers all of it.

    With a folder the features live in memory-mapped files there, filled chunk by chunk, so that an interrupted
    run goes on where it was. Without a known head the "features" are the logits themselves.
    """

    def __init__(self, model: nn.Module, head: str | None, width: int, preprocessing: Preprocessing, **options: Any) -> None:
        super().__init__(model, preprocessing, **options)
        self.head, self.width = head, width
        self.output_names = ("logits",) if head is None else ("logits", "features")
        self._stores: dict[State, tuple[np.ndarray, np.ndarray]] = {}

    def served(self, state: State) -> nn.Module:
        return Classifier(self.network(state), self.head)

    def forget(self) -> None:
        super().forget()
        self._stores = {}

    def features(self, state: State, indices: np.ndarray, *, serving: bool = True) -> np.ndarray:
        assert self.images is not None
        store, known = self._store(state)
        todo = indices[~known[indices]]
        if len(todo):
            runtime, done = self.runtime(state, serving), 0
            source = self.batches(state, todo, self.batch_size)
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
                    self.note(state, len(out), done, len(todo))
        return np.asarray(store[indices])

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
