"""One set of weights for several resolutions: a resolution-switchable network (Wang et al. 2020, arXiv 2007.09587).

Each resolution keeps normalisations of its own, whose statistics and scales are what another apparent size of things shifts;
everything else is one tensor for all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..copying import copied
from .bank import Bank
from .distill import Distillation
from .finetune import NORMS, last_layers
from .state import SWITCHED, State


class Switching(Distillation):
    """The state's weights at several resolutions at once, a resolution a batch in turn, each taught by the original at its own
    resolution, without labels.

    others: the states beside the one that is trained, all of one network. own_heads: the last layer is private, too.
    """

    alike: ClassVar = False
    rung: ClassVar = "distill"
    done: ClassVar = SWITCHED
    doing: ClassVar = "distilling at several resolutions"

    def __init__(
        self, task: Any, bank: Bank, state: State, others: Sequence[State], teacher: State, images: np.ndarray, own_heads: bool
    ) -> None:
        super().__init__(task, bank, state, teacher, images)
        self.states, self.own_heads = (state, *others), own_heads

    def asked(self) -> Any:
        return [super().asked(), [state.to_json() for state in self.states], self.own_heads]

    def shown(self, state: State) -> Sequence[State]:
        return self.states

    def student(self, bank: Bank, state: State) -> nn.Module:
        made = Several()
        for one in self.states:
            network = copied(bank.network(one))
            for parameter in network.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            hw = bank.preprocessing_of(one).hw
            made.add(hw, network, self._private(network, hw))
        return made

    def _private(self, network: nn.Module, hw: tuple[int, int]) -> set[str]:
        """Names of modules whose weights are each resolution's own."""
        own: list[nn.Module] = [module for module in nn.Module.modules(network) if isinstance(module, NORMS)]
        if self.own_heads:
            x = torch.zeros(2, len(self.bank.preprocessing.mean), *hw)
            own += last_layers(network, lambda: self.task.matched(nn.Module.eval(network), x))
        chosen = {id(module) for module in own}
        return {name for name, module in network.named_modules() if id(module) in chosen}

    def told(self) -> str:
        sizes = ", ".join(str(state.candidate) for state in self.states)
        return f"{sizes} in turn, without labels"


class Several(nn.Module):
    """Networks by the size of what they take, (height, width): x (B, C, H, W) → what that one answers. What is not private is
    one tensor in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        self.sizes: list[tuple[int, int]] = []

    def add(self, hw: tuple[int, int], network: nn.Module, private: set[str]) -> None:
        """Ties its weights to those of the first, but for private modules' and those of another shape."""
        if len(self.networks):
            first = dict(self.networks[0].named_parameters(remove_duplicate=False))
            for name, parameter in [*network.named_parameters(remove_duplicate=False)]:
                where, _, leaf = name.rpartition(".")
                if where not in private and name in first and first[name].shape == parameter.shape:
                    network.get_submodule(where)._parameters[leaf] = first[name]
        self.networks.append(network)
        self.sizes.append(hw)

    def forward(self, x: Tensor) -> Any:
        return self.networks[self.sizes.index((x.shape[-2], x.shape[-1]))](x)

    def train(self, mode: bool = True) -> "Several":
        super().train(mode)
        for network in self.networks:
            network.training = False  # what a network itself does only there, such as auxiliary answers, nobody asks for
        return self


def tensors_of(trained: Mapping[str, np.ndarray], which: int) -> dict[str, np.ndarray]:
    """Of a `Several`'s tensors those of one of its networks."""
    prefix = f"networks.{which}."
    return {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
