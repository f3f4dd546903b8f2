"""Tensors that were put in place of a network's own, kept under the digest of what is in them."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from ..copying import copied
from ..errors import DownresError
from ..record import write_whole
from .state import State

Tensors = Mapping[str, np.ndarray]
"""Name in the network's state dict → values."""


class Weights:
    """`put` tensors, `get` them back by the key that it returned; in the folder's `weights/`, or in memory without one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / "weights"
        self._known: dict[str, dict[str, np.ndarray]] = {}

    def put(self, tensors: Tensors) -> str:
        key = _key(tensors)
        if not self.has(key):
            self._known[key] = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / f"{key}.safetensors", save(self._known[key]))
        return key

    def keep(self, keys: Collection[str]) -> None:
        """Delete all others."""
        self._known = {key: tensors for key, tensors in self._known.items() if key in keys}
        for file in self.folder.glob("*.safetensors") if self.folder is not None and self.folder.is_dir() else ():
            if file.stem not in keys:
                file.unlink()

    def has(self, key: str) -> bool:
        """Whether they are there as they were put."""
        if key not in self._known and self.folder is not None and (file := self.folder / f"{key}.safetensors").is_file():
            try:
                found = load(file.read_bytes())
            except (SafetensorError, ValueError, KeyError, TypeError):
                return False
            if _key(found) == key:
                self._known[key] = found
        return key in self._known

    def of(self, *states: State | None) -> dict[str, dict[str, np.ndarray]]:
        """All that the states' steps put in place, by their keys."""
        return {s.tensors: self.get(s.tensors) for state in states if state for s in state.history if s.tensors}

    def get(self, key: str) -> dict[str, np.ndarray]:
        """Raises DownresError for what is missing or damaged."""
        if not self.has(key):
            raise DownresError(f"The tensors {key} in {self.folder} are missing or damaged: search again in another folder.")
        return self._known[key]


def _key(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tensors[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()[:32]


def with_tensors(network: nn.Module, tensors: Tensors) -> nn.Module:
    """A copy of the network with these tensors in place of its own, or where it had none (the bias of a bare linear layer)."""
    network = copied(network)
    for name, value in tensors.items():
        where, _, leaf = name.rpartition(".")
        owner, tensor = network.get_submodule(where), torch.from_numpy(np.array(value))
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner.register_parameter(leaf, nn.Parameter(tensor))
    return network
