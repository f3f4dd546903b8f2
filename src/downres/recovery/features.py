"""Features of every image under every state that is looked at, of networks that answer with one vector an image: computed
once, kept, resumed.
"""

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..copying import copied
from ..errors import DownresError
from ..probe import logits_of
from ..records import Preprocessing
from .bank import Bank
from .state import REFITTED, State, Step


class Classifier(nn.Module):
    """Any classifier as one that returns (logits,) or, with the name of its head, (logits, features)."""

    def __init__(self, model: nn.Module, head: str | None) -> None:
        super().__init__()
        self.model = copied(model)
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


@dataclass(frozen=True)
class Head:
    """A linear layer: logits = features @ weight.T + bias; weight (K, F), bias (K,), float32."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, F) → (n, K)."""
        return features @ self.weight.T + self.bias


def head_of(model: nn.Module, name: str) -> Head:
    """The linear layer of that name, as numbers."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().numpy().astype(np.float32)
    bias = np.zeros(len(weight), np.float32) if linear.bias is None else linear.bias.detach().numpy().astype(np.float32)
    return Head(weight, bias)


class FeatureBank(Bank):
    """`features(state, indices)` → (len(indices), F): computes what is missing, remembers all of it.

    With a folder the features live in memory-mapped files there, filled chunk by chunk, so that an interrupted
    run goes on where it was. Without a known head the "features" are the logits themselves.
    """

    def __init__(self, model: nn.Module, head: str | None, width: int, preprocessing: Preprocessing, **options: Any) -> None:
        names = ("logits",) if head is None else ("logits", "features")
        super().__init__(model, preprocessing, lambda network: Classifier(network, head), names, **options)
        self.head, self.width = head, width
        self._own = None if head is None else head_of(model, head)
        self._stores: dict[State, tuple[np.ndarray, np.ndarray]] = {}

    def forget(self) -> None:
        super().forget()
        self._stores = {}

    def logits(self, state: State, indices: np.ndarray, *, serving: bool = True) -> np.ndarray:
        """(len(indices), K): the state's head on the features of its backbone, which a head's refit leaves as they are."""
        found = self.features(state.without(REFITTED), indices, serving=serving)
        head = self.head_of(state)
        return found if head is None else head(found)

    def head_of(self, state: State) -> Head | None:
        """The head of a state: the one fitted last, or the model's own; None where the output comes from no linear layer."""
        step = state.step(REFITTED)
        if step is None or self.head is None:
            return self._own
        tensors = self.weights.get(step.tensors)
        return Head(tensors[f"{self.head}.weight"], tensors[f"{self.head}.bias"])

    def refitted(self, state: State, head: Head, fold: int, images: int) -> State:
        """The state with another head, whose tensors are kept."""
        assert self.head is not None
        tensors = {f"{self.head}.weight": head.weight, f"{self.head}.bias": head.bias}
        return state.without(REFITTED).then(Step(REFITTED, fold, images, self.weights.put(tensors)))

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
        if self.folder is None or state.history:
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
