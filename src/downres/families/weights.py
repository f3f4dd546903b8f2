"""Checkpoints of many makers into a module: safe loading, wrappers and prefixes removed, one clear sentence on a mismatch."""

import argparse
import hashlib
import pickle
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from ..copying import modules
from ..errors import DownresError, shown

_WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "model_ema", "state_dict_ema", "net", "network",
    "module", "teacher", "student", "ema", "params_ema", "params", "weights",
)  # fmt: skip
"""What savers put a state dict under; of several, the first is taken: of DINO's pair the teacher, which is what is used."""
_COMPILED = "_orig_mod."
"""Of torch.compile, wherever in a network it was called."""
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch", "downres")
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,  # timm's training script saves its arguments so
    *(np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"}),
    *((one, f"numpy.{core}.multiarray.{one.__name__}") for one in (_SCALAR, _ARRAY) for core in ("core", "_core")),  # type: ignore[union-attr]
]
"""What may stand in a checkpoint beside tensors: it holds values, and runs nothing."""


MOST_LEVELS = 10
"""Of dictionaries in dictionaries, in a checkpoint."""


class Tensors(dict[str, Tensor]):
    """The tensors of a checkpoint by name.

    sets: all the sets that it holds, by what they are under; this one is the first. loop: the name under which one of its
    dictionaries holds itself, '' where none does.
    """

    sets: dict[str, "Tensors"]
    loop: str = ""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth`/`.pt`/`.bin` read with `weights_only=True`.

    Wrapping dictionaries (`state_dict`, `model`, …) are opened. Raises DownresError when the file is missing,
    broken, holds no tensors, or would have to run code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise DownresError(f"There is no weights file {path}: give a .safetensors or .pth file to `weights`.")
    try:
        if path.suffix == ".safetensors":
            # It takes names in UTF-8 alone.
            return load_file(path) if shown(path) == str(path) else load(path.read_bytes())
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if _is_damaged(path):  # asked last: what is refused for another reason is told that
                raise ValueError
    except MemoryError:
        raise DownresError(f"{path} needs more memory than there is: save the state dict alone.") from None
    except Exception as error:  # broken files fail in many ways, inside torch's unpickler and safetensors
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or _is_bare_pickle(path)):
            raise DownresError(
                f"Loading {path} could run code that is stored in it, so it was refused: save the state dict alone "
                "(torch.save(model.state_dict(), …) or safetensors) and give that file."
            ) from None
        raise DownresError(
            f"{path} is not a readable checkpoint: give a .safetensors file or a state dict saved by torch."
        ) from None
    loops: list[str] = []
    sets = _sets(loaded, loops) if isinstance(loaded, dict) else {}
    if not sets and loops:
        raise _endless(str(path), loops[0])
    if not sets:
        raise DownresError(f"{path} holds no tensors by name: give a state dict (torch.save(model.state_dict(), …)).")
    first = next((name for name in ("", *_WRAPPERS) if name in sets), min(sets))
    sets[first].sets, sets[first].loop = sets, "".join(loops[:1])
    return sets[first]


def _endless(what: str, name: str) -> DownresError:
    return DownresError(
        f"{what} holds itself under {name!r}, and nowhere the tensors of this network: save the state dict alone "
        "(torch.save(model.state_dict(), …))."
    )


def _sets(loaded: dict, loops: list[str], above: tuple[int, ...] = ()) -> dict[str, Tensors]:
    """The sets of tensors in a checkpoint, by the name that they are under; '' where they lie in the open.

    loops: gets the names under which a dictionary holds itself, or one that it is in.
    """
    sets: dict[str, Tensors] = {}
    above = (*above, id(loaded))
    for name, inner in loaded.items():
        if isinstance(inner, dict) and id(inner) in above:
            loops.append(str(name))
        elif isinstance(inner, dict) and isinstance(name, str) and not _of_training(name):
            deeper = _sets(inner, loops, above) if len(above) < MOST_LEVELS else {}
            if found := next((deeper[n] for n in ("", *_WRAPPERS) if n in deeper), next(iter(deeper.values()), None)):
                sets[name] = found
    if not sets.keys() & set(_WRAPPERS):
        own = Tensors({name: value for name, value in loaded.items() if isinstance(value, Tensor) and isinstance(name, str)})
        return {"": own} if own else sets
    return sets


def _of_training(name: str) -> bool:
    return any(word in name.lower() for word in ("optim", "sched", "scaler", "rng", "callback", "loop"))


def _is_damaged(path: Path) -> bool:
    """Whether what is in a zip file, as torch saves, has other checksums than it says: torch itself does not compare them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is not None


def _is_bare_pickle(path: Path) -> bool:
    """Whether the file starts as Python's own pickles do, which torch's safe reader does not know."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" and start[1:] <= bytes([pickle.HIGHEST_PROTOCOL])


def match(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under the model's own names, and how they were matched. Shapes are not compared here.

    By name after whatever prefix they share is removed; else, when both sides hold equally many tensors (the
    `num_batches_tracked` counters left out) of the same kinds and shapes in the same order, by order. Of several sets in a
    checkpoint the one that fits; of several that fit the first of those that savers name, which is said.
    """
    sets = getattr(tensors, "sets", {"": tensors})
    found, failed = {}, None
    for name in sorted(sets, key=lambda name: _WRAPPERS.index(name) if name in _WRAPPERS else len(_WRAPPERS)):
        try:
            found[name] = _match(model, sets[name])
        except DownresError as error:
            failed = failed or error
    if not found:
        assert failed is not None
        loop, wanted = getattr(tensors, "loop", ""), model.state_dict()
        if loop and not any(_prefixes(wanted, own) for own in sets.values()):
            raise _endless("The weights file", loop)
        raise failed
    taken, *others = found
    if others and taken not in _WRAPPERS:
        raise DownresError(
            f"The weights file holds this network {len(found)} times, as {' and '.join(map(repr, found))}: "
            "save the one that is meant alone."
        )
    kept, how = found[taken]
    return kept, f"{how}, its {taken!r} and not its {' or '.join(map(repr, others))}" if others else how


def _match(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """`match` of one set."""
    wanted = model.state_dict()
    needed = _needed(model, wanted)
    plain = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    prefixes = _prefixes(wanted, plain)
    whole = [prefix for prefix in prefixes if all(prefix + name in plain for name in needed)]
    if whole and not ("" in whole or _alike(plain, whole, needed)):
        raise DownresError(
            f"The weights file holds this network {len(whole)} times, under {' and '.join(map(repr, sorted(whole)))}: "
            "save the one that is meant alone."
        )
    if whole:
        prefix = "" if "" in whole else whole[0]
        renamed = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
        if more := _of_a_larger_network(wanted, renamed):
            raise DownresError(
                f"The weights are for a larger network of this kind: {len(more)} of the file's tensors have no place in it"
                f" (first: {more[0]}): check the model's name and that the file belongs to it."
            )
        kept = {k: v for k, v in renamed.items() if k in wanted}
        own = len([k for k in _in_order(wanted) if k not in kept])
        made = f", {own} buffers as the network makes them" if own else ""
        removed = prefix + _COMPILED * any(_COMPILED in name for name in tensors)
        return kept, "by name" + (f", prefix {removed!r} removed" if removed else "") + made
    ours, theirs = _in_order(wanted), _in_order(tensors)
    pairs = dict(zip(ours, theirs, strict=False)) if len(ours) == len(theirs) else {}
    if pairs and all(wanted[a].shape == tensors[b].shape and _kind(a) == _kind(b) for a, b in pairs.items()):
        return {a: tensors[b] for a, b in pairs.items()}, f"by order: names differ, all {len(ours)} shapes agree"
    raise _unmatched(wanted, needed, plain, prefixes)


def _prefixes(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """What stands before the network's own names in a file, the commonest first: '', `module.`, `module.model.encoder.`, …"""
    counted: Counter[str] = Counter()
    for name in found:
        parts = name.split(".")
        for i in range(min(len(parts), 20)):
            if ".".join(parts[i:]) in wanted:
                counted["".join(part + "." for part in parts[:i])] += 1
    return [prefix for prefix, _ in counted.most_common()]


def _alike(found: dict[str, Tensor], prefixes: list[str], names: list[str]) -> bool:
    first, *others = prefixes
    return all(torch.equal(found[first + name], found[other + name]) for other in others for name in names)


def _unmatched(wanted: dict[str, Tensor], needed: list[str], found: dict[str, Tensor], prefixes: list[str]) -> DownresError:
    """Why no match was found: some are missing of a file that otherwise fits, or it is for another network."""
    prefix = prefixes[0] if prefixes else ""
    missing = sorted(name for name in needed if prefix + name not in found)
    there = [name for name in needed if prefix + name in found]
    if len(there) >= 0.9 * len(needed) and all(found[prefix + name].shape == wanted[name].shape for name in there):
        return DownresError(
            f"The weights file lacks {len(missing)} of the network's {len(needed)} tensors (first: {missing[0]}), the others "
            "fit: give a file of the whole network, its last layer included."
        )
    extra = sorted(name for name in _in_order(found) if name.removeprefix(prefix) not in wanted)
    return DownresError(
        f"The weights are for another network: {len(missing)} of its {len(_in_order(wanted))} tensors are not in the file"
        f" (first: {missing[0] if missing else needed[0]}), {len(extra)} in the file are not in it"
        f"{f' (first: {extra[0]})' if extra else ''}: check the model's name and that the file belongs to it."
    )


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Load the tensors into `model` (in place) and say how they were matched.

    Raises DownresError for a shape that differs, and for numbers that are not what a network in floating point computes with.
    """
    matched, how = match(model, tensors)
    wanted = model.state_dict()
    matched = {name: _dense(name, tensor, wanted[name]) for name, tensor in matched.items()}
    model.load_state_dict({**wanted, **matched})
    return how


def _dense(name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """A tensor of a file as the network needs it."""
    if tensor.is_nested or tensor.shape != wanted.shape:
        shape = "no shape of its own" if tensor.is_nested else f"shape {tuple(tensor.shape)}"
        raise DownresError(
            f"The weights have {shape} at {name}, the network {tuple(wanted.shape)}: "
            "the file belongs to another width or number of classes."
        )
    whole = not tensor.is_quantized and not tensor.is_floating_point() and not tensor.is_complex()
    kinds = {
        "are quantized": tensor.is_quantized,
        "have no values (they are on the meta device)": tensor.is_meta,
        "are complex numbers": tensor.is_complex(),
        f"are whole numbers ({str(tensor.dtype).removeprefix('torch.')})": whole and wanted.is_floating_point(),
    }
    if what := next((words for words, true in kinds.items() if true), ""):
        raise DownresError(f"The weights {what} at {name}: give the file of the network in floating point, as it was trained.")
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors for a library that matches them itself, wrappings of training taken off. Raises as `load_weights`."""
    plain = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return {name: value if value.dtype in _WHOLE else _dense(name, value, value) for name, value in plain.items()}


_WHOLE = (torch.int64, torch.int32, torch.bool)  # indices and counters


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


def _needed(model: nn.Module, wanted: dict[str, Tensor]) -> list[str]:
    """The names that a file must have: parameters and running statistics. Other buffers the network makes by itself."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    needed = [name for name in _in_order(wanted) if name in parameters or "running_" in name]
    return needed or _in_order(wanted)
