"""Costs of a model at several resolutions: no data, no weights, no arithmetic."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..families import Model
from ..measure.cost import CONVENTION, measure_cost
from ..parse import Resolution
from ..probe import total_stride
from ..records import Candidate, Cost
from ..reductions import reduce
from .plan import plan
from .task import as_model


@dataclass(frozen=True)
class Costs:
    """The original first. Each candidate's cost is that of the network fed images of its resolution."""

    model: str
    costs: tuple[tuple[Candidate, Cost], ...]
    batch_size: int
    convention: str
    notes: tuple[str, ...]

    @property
    def original(self) -> Cost:
        return self.costs[0][1]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "convention": self.convention,
            "costs": [{**candidate.to_json(), **cost.to_json()} for candidate, cost in self.costs],
            "notes": list(self.notes),
        }


def costs(
    model: Model | nn.Module | str, resolutions: list[Resolution] | None = None, *, batch_size: int = 1, stem_scale: float = 1.0
) -> Costs:
    """Cost at the model's own resolution and at each of `resolutions` (default: from its own down), taken as given.

    Raises DownresError when the network does not run at one of them.
    """
    model = as_model(model)
    p = model.preprocessing
    stride = total_stride(model.module, p.hw, len(p.mean))
    candidates, notes = plan(p.resolution, stride, resolutions, (), do_snap=False)
    network = model.module
    if stem_scale != 1.0:
        network = reduce(network, stem_scale=stem_scale, input_size=(len(p.mean), *p.hw))
    found = [(Candidate(p.resolution), measure_cost(model.module, (batch_size, len(p.mean), *p.hw)))]
    for candidate in [Candidate(p.resolution), *candidates] if stem_scale != 1.0 else candidates:
        size = (batch_size, len(p.mean), *(candidate.hw or p.hw))
        found.append((Candidate(candidate.resolution, stem_scale), measure_cost(network, size)))
    return Costs(model.spec, tuple(found), batch_size, CONVENTION, tuple(notes))
