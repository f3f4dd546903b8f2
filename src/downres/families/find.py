"""Which adapter knows a network. A library is asked only where it is imported: before that no network of it can exist."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..copying import children, modules, named_modules
from .adapter import Adapter
from .unknown import Unknown, may_be_fixed


def find_adapter(model: nn.Module) -> Adapter | None:
    """The first transformer in `model` (itself, or anywhere inside a user's own module) that a family knows.

    None for a convnet, at no cost.
    """
    found = next(library_transformers(model), None)
    if found is not None or not may_be_fixed(model):
        return found
    from . import own

    return own.find(model) or Unknown("", model)


def library_transformers(model: nn.Module) -> Iterator[Adapter]:
    """All transformers of a library in `model`; parts of one of them are not looked at."""
    families = _families()
    parts: set[nn.Module] = set()
    for name, module in named_modules(model):
        found = None if module in parts else next(filter(None, (family.adapter(name, module) for family in families)), None)
        if found is None or (found.gives_way and any(any(library_transformers(part)) for part in children(module))):
            continue
        parts.update(modules(module))
        yield found


def _families() -> list[Any]:
    """What knows the networks of the libraries that are imported, the likeliest first. Importing one takes seconds."""
    found: list[Any] = []
    if "timm" in sys.modules:
        from . import timm

        found.append(timm)
    if "torchvision.models" in sys.modules:
        from . import torchvision

        found.append(torchvision)
    if "transformers.modeling_utils" in sys.modules:
        with contextlib.suppress(ImportError):  # an old version that something else needs
            from . import transformers_vit

            found.append(transformers_vit)
    if "segmentation_models_pytorch" in sys.modules:
        from . import smp_networks

        found.append(smp_networks)
    return found
