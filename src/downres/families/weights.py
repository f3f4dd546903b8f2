"""Checkpoints of many makers into a module: safe loading, wrappers and prefixes removed, one clear sentence on a mismatch."""

import hashlib
import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..copying import modules
from ..errors import DownresError

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "model_ema", "state_dict_ema", "net", "network")
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch", "downres")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth`/`.pt`/`.bin` read with `weights_only=True`.

    Wrapping dictionaries (`state_dict`, `model`, …) are opened. Raises DownresError when the file is missing,
    broken, holds no tensors, or would have to run code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise DownresError(f"There is no weights file {path}: give a .safetensors or .pth file to --weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files fail in many ways, inside torch's unpickler and safetensors
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or _is_bare_pickle(path)):
            raise DownresError(
                f"Loading {path} could run code that is stored in it, so it was refused: save the state dict alone "
                "(torch.save(model.state_dict(), …) or safetensors) and give that file."
            ) from None
        raise DownresError(
            f"{path} is not a readable checkpoint: give a .safetensors file or a state dict saved by torch."
        ) from None
    while isinstance(loaded, dict):
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), dict)), None)
        if inner is None:
            break
        loaded = inner
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise DownresError(f"{path} holds no tensors by name: give a state dict (torch.save(model.state_dict(), …)).")
    return tensors


def _is_bare_pickle(path: Path) -> bool:
    """Whether the file starts as Python's own pickles do, which torch's safe reader does not know."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" and start[1:] <= bytes([pickle.HIGHEST_PROTOCOL])


def match(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under the model's own names, and how they were matched. Shapes are not compared here.

    By name after common prefixes are removed; else, when both sides hold equally many tensors (the
    `num_batches_tracked` counters left out) of the same kinds and shapes in the same order, by order.
    """
    wanted = model.state_dict()
    for prefix in ("", *_PREFIXES):
        renamed = {k.removeprefix(prefix): v for k, v in tensors.items()}
        if prefix and any(k.startswith(prefix) for k in tensors):
            # Two wrappings at once (`module.model.`) are common enough to look through.
            for second in _PREFIXES:
                again = {k.removeprefix(second): v for k, v in renamed.items()}
                if len(again.keys() & wanted.keys()) > len(renamed.keys() & wanted.keys()):
                    renamed = again
        if _essential(wanted) <= renamed.keys():
            if more := _of_a_larger_network(wanted, renamed):
                raise DownresError(
                    f"The weights are for a larger network of this kind: {len(more)} of the file's tensors have no place in it"
                    f" (first: {more[0]}): check the model's name and that the file belongs to it."
                )
            kept = {k: v for k, v in renamed.items() if k in wanted}
            return kept, f"by name{f', prefix {prefix!r} removed' if prefix else ''}"
    ours, theirs = _in_order(wanted), _in_order(tensors)
    pairs = dict(zip(ours, theirs, strict=False)) if len(ours) == len(theirs) else {}
    if pairs and all(wanted[a].shape == tensors[b].shape and _kind(a) == _kind(b) for a, b in pairs.items()):
        return {a: tensors[b] for a, b in pairs.items()}, f"by order: names differ, all {len(ours)} shapes agree"
    missing = sorted(_essential(wanted) - tensors.keys())
    extra = sorted(_essential(tensors) - wanted.keys())
    raise DownresError(
        f"The weights are for another network: {len(missing)} of its {len(ours)} tensors are not in the file"
        f" (first: {missing[0] if missing else ours[0]}), {len(extra)} in the file are not in it"
        f"{f' (first: {extra[0]})' if extra else ''}: check the model's name and that the file belongs to it."
    )


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Load the tensors into `model` (in place) and say how they were matched; a shape that differs is an error."""
    matched, how = match(model, tensors)
    wanted = model.state_dict()
    for name, tensor in matched.items():
        if tensor.shape != wanted[name].shape:
            raise DownresError(
                f"The weights have shape {tuple(tensor.shape)} at {name}, the network {tuple(wanted[name].shape)}: "
                "the file belongs to another width or number of classes."
            )
    model.load_state_dict({**wanted, **matched})
    return how


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the structure, the user's own forward code, and names, shapes and values of the state dict.

    The structure is the module's `repr` (strides, activations, …); of classes outside the model libraries, whose code
    their versions tell, the compiled `forward` counts too.
    """
    digest = hashlib.sha256(repr(model).encode())
    for module in modules(model):
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and type(module).__module__.partition(".")[0] not in _LIBRARIES:
            constants = [c for c in code.co_consts if not hasattr(c, "co_code")]  # nested code would print its address
            digest.update(code.co_code + repr((code.co_names, constants)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _of_a_larger_network(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Weights in the file that belong to a part the network has, and are not in it: `layer1.2.…` of a deeper ResNet.

    Others may be there: heads for training alone, losses, counters, buffers of older versions.
    """
    parts = {k.partition(".")[0] for k in wanted}
    numbered = any(part.isdigit() for part in parts)
    extra = [k for k in found if k not in wanted and _kind(k) == "weight"]
    return [k for k in extra if (top := k.partition(".")[0]) in parts or (numbered and top.isdigit())]


def _kind(name: str) -> str:
    """`weight`, `bias`, `running_mean`, …: four tensors of a BatchNorm have one shape, and files may sort them by name."""
    return name.rpartition(".")[2]


def _in_order(tensors: dict[str, Tensor]) -> list[str]:
    """Names in their stored order, without the counters that some savers leave out."""
    return [k for k in tensors if not k.endswith("num_batches_tracked")]


def _essential(tensors: dict[str, Tensor]) -> set[str]:
    return set(_in_order(tensors))
