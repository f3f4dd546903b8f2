"""Tensors that were put in place of a network's own, kept under the digest of what is in them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import nn

from ..copying import copied

Tensors = Mapping[str, np.ndarray]
"""Name in the network's state dict → values."""


class Weights:
    """`put` tensors, `get` them back by the key that it returned; in the folder's `weights/`, or in memory without one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / "weights"
        self._known: dict[str, dict[str, np.ndarray]] = {}

    def put(self, tensors: Tensors) -> str:
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(f"{name}\0{tensors[name].dtype}\0{tensors[name].shape}\0".encode())
            digest.update(np.ascontiguousarray(tensors[name]).tobytes())
        key = digest.hexdigest()[:32]
        self._known[key] = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        if self.folder is not None and not (file := self.folder / f"{key}.safetensors").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(save(self._known[key]))  # whose errors of a full disk are the system's own
            partial.replace(file)
        return key

    def get(self, key: str) -> dict[str, np.ndarray]:
        if key not in self._known:
            assert self.folder is not None
            self._known[key] = load_file(self.folder / f"{key}.safetensors")
        return self._known[key]


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
