"""Features of every image under every state that is looked at, of networks that answer with one vector an image: computed
once, kept, resumed.
"""

import contextlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..copying import copied
from ..engines.onnxruntime import alone_onnx
from ..errors import DownresError
from ..families.weights import fingerprint
from ..probe import logits_of
from ..records import Preprocessing
from .bank import Bank
from .state import RECALIBRATED, REFITTED, State, Step


class Classifier(nn.Module):
    """Any classifier as one that returns (logits,) or, with the name of its head, (logits, features); which: of several
    outputs.
    """

    def __init__(self, model: nn.Module, head: str | None, which: int | str | None = None) -> None:
        super().__init__()
        self.model, self.which = copied(model), which
        self.outputs = None
        if head is not None:
            linear = self.model.get_submodule(head)
            assert isinstance(linear, nn.Linear)
            self.outputs = linear.out_features
            self.model.set_submodule(head, _Tap(linear))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = logits_of(self.model(x), self.which)
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

    With a folder the features live in memory-mapped files there, one a state, filled row by row, so that an interrupted
    run goes on where it was. A row counts as known only if its own checksum says that it is whole, and of this very
    network, state and image: a file that was lost, replaced or damaged is computed again. Without a known head the
    "features" are the logits themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | None,
        width: int,
        preprocessing: Preprocessing,
        which: int | str | None = None,
        **options: Any,
    ) -> None:
        names = ("logits",) if head is None else ("logits", "features")
        super().__init__(model, preprocessing, lambda network: Classifier(network, head, which), names, **options)
        self.head, self.width, self.which = head, width, which
        self._own = None if head is None else head_of(model, head)
        self._stores: dict[State, _Rows] = {}

    @cached_property
    def _made_with(self) -> str:
        """What the features of a state depend on beside it and the image."""
        return f"{fingerprint(self.model)} {self.preprocessing} {self.runtime_name} {self.head} {self.which}"

    def forget(self) -> None:
        super().forget()
        self._stores = {}

    def count_anew(self) -> None:
        for rows in self._stores.values():
            rows.counted[:] = False

    def logits(self, state: State, indices: np.ndarray, *, serving: bool = True) -> np.ndarray:
        """(len(indices), K): the state's head on the features of its backbone, which a head's refit leaves as they are."""
        found = self.features(state.without(REFITTED), indices, serving=serving)
        head = self.head_of(state)
        return found if head is None else head(found)

    def head_of(self, state: State) -> Head | None:
        """The head of a state: the one fitted last, or the model's own; None where the output comes from no linear layer."""
        for step in reversed(state.history):
            tensors = self.weights.get(step.tensors) if step.tensors and self.head is not None else {}
            if (weight := tensors.get(f"{self.head}.weight")) is not None:
                return Head(weight, tensors.get(f"{self.head}.bias", np.zeros(len(weight), np.float32)))
        return self._own

    def refitted(self, state: State, head: Head, fold: int, images: int) -> State:
        """The state with another head, whose tensors are kept."""
        assert self.head is not None
        tensors = {f"{self.head}.weight": head.weight, f"{self.head}.bias": head.bias}
        return state.without(REFITTED).then(Step(REFITTED, fold, images, self.weights.put(tensors)))

    def head_weight(self, state: State) -> np.ndarray | None:
        return None if (found := self.head_of(state)) is None else found.weight

    def taken_from(self, state: State, serve: Callable[[nn.Module], nn.Module], file: Path, name: str) -> bool:
        """The graph with features, without them and with the state's head."""
        head, known = self.head_of(state), state.network.without(REFITTED)
        if head is None or self._in_torch(state.candidate) or not self.onnx_file(known).is_file():
            return False
        size = (len(self.preprocessing.mean), *self.preprocessing_of(state).hw)
        network = serve(self.network(state))
        return alone_onnx(self.onnx_file(known), network, size, file, name, head.weight, head.bias)

    def features(self, state: State, indices: np.ndarray, *, serving: bool = True) -> np.ndarray:
        assert self.images is not None
        rows = self._rows(state)
        todo = indices[~rows.known[indices]]
        # A resumed run counts as one that nobody interrupted: what it finds in the folder was looked at for it, too.
        found = indices[rows.known[indices] & ~rows.counted[indices]]
        self.passes += len(found)
        rows.counted[found] = True
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
                    rows.put(todo[done : done + len(out)], out)
                    done += len(out)
                    self.note(state, len(out), done, len(todo))
            rows.settle()
        return np.ascontiguousarray(rows.values[indices])

    def _rows(self, state: State) -> "_Rows":
        assert self.images is not None
        if state not in self._stores:
            shape = (len(self.images), self.width)
            if self.folder is None or state.step(RECALIBRATED):  # such networks see few images: not worth a file
                self._stores[state] = _Rows(np.zeros(shape[0], _row(self.width)), None)
            else:
                told = f"{self._made_with} {state.to_json()}"
                seeds = [
                    zlib.crc32(f"{told} {name} {checksum}".encode(errors="surrogatepass"))
                    for name, checksum in zip(self.images.names, self.images.checksums, strict=True)
                ]
                file = self.folder / "features" / f"{state.key()}.npy"
                self._stores[state] = _Rows(_mapped(file, shape[0], _row(self.width)), np.array(seeds, np.uint32))
        return self._stores[state]


class _Rows:
    """Features of one state, a row an image. known: which rows are there; counted: which were paid for in this process.

    seeds: what the checksum of each row starts with; None where the rows are not kept.
    """

    def __init__(self, rows: np.ndarray, seeds: np.ndarray | None) -> None:
        self.rows, self.seeds, self.values = rows, seeds, rows["values"]
        self.known, self.counted = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        if seeds is not None:
            for i in np.flatnonzero(rows["written"]):
                self.known[i] = rows["crc"][i] == self._crc(i)

    def put(self, indices: np.ndarray, values: np.ndarray) -> None:
        self.values[indices] = values
        if self.seeds is not None:
            self.rows["crc"][indices] = [self._crc(i) for i in indices]
            self.rows["written"][indices] = True
        self.known[indices] = self.counted[indices] = True

    def settle(self) -> None:
        """Onto the disk, where they are kept."""
        if isinstance(self.rows, np.memmap):
            self.rows.flush()

    def _crc(self, i: Any) -> int:
        assert self.seeds is not None
        return zlib.crc32(self.values[i].tobytes(), int(self.seeds[i]))


def _row(width: int) -> np.dtype:
    return np.dtype([("written", np.bool_), ("crc", np.uint32), ("values", np.float32, (width,))], align=True)


def _mapped(file: Path, n: int, row: np.dtype) -> np.ndarray:
    """The array in that file, of zeros where there is no such array in it."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        if file.is_file():
            kept = np.lib.format.open_memmap(file, "r+")
            if kept.dtype == row and kept.shape == (n,):
                return kept
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    np.lib.format.open_memmap(partial, "w+", row, (n,))  # zeros, sparse on disk until written
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash where a mapping is written to
        with open(partial, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, partial.stat().st_size)
    partial.replace(file)
    return np.lib.format.open_memmap(file, "r+")
