"""Training on labels at a candidate's own pixels: FixRes, which begins with the head (Touvron et al. 2019, arXiv 1906.06423),
and fine-tuning.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from .bank import Bank
from .state import FINETUNED, FIXRES
from .trainer import Lesson
from .training import Training
from .views import Views

HEAD_FIRST = 1 / 3
"""Of the epochs, in which FixRes trains the head and the last normalisation alone."""
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Finetuning(Lesson):
    """All weights trained on labels, from the state's own. size: (height, width) of the network's input."""

    rung: ClassVar = "finetune"
    done: ClassVar = FINETUNED
    doing: ClassVar = "fine-tuning"

    def __init__(self, task: Any, bank: Bank, size: tuple[int, int], how: Training) -> None:
        super().__init__(task)
        self.bank, self.size, self.smoothing = bank, size, how.label_smoothing
        mixes = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, how.mixup), (v2.CutMix, how.cutmix)) if alpha > 0]
        self.mix = v2.RandomChoice(mixes) if mixes and task.mixes else None

    def asked(self) -> Any:
        return list(self.size)

    @property
    def moves(self) -> bool:
        return bool(self.task.mixes)

    def targets(self, views: Views) -> Tensor:
        found: Tensor = self.task.learned(self.bank, views, self.size)
        return found

    def mixed(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.mix is None or len(x) < 2:
            return x, targets
        mixed: tuple[Tensor, Tensor] = self.mix(x, targets)
        return mixed

    def loss(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.task.loss_of(self.task.matched(network, x), targets, self.smoothing)
        return found

    def told(self) -> str:
        return "with labels"


class FixRes(Finetuning):
    """First the head and the last normalisation, which fit a network to another apparent size of things, then everything."""

    rung: ClassVar = "fixres"
    done: ClassVar = FIXRES
    doing: ClassVar = "FixRes fine-tuning"

    def begin(self, network: nn.Module) -> None:
        x = torch.zeros(2, len(self.bank.preprocessing.mean), *self.size)
        self.first = last_layers(network, lambda: self.task.matched(network.eval(), x))

    def frozen(self, network: nn.Module, part: float) -> Sequence[nn.Parameter]:
        if part >= HEAD_FIRST:
            return ()
        own = {id(p) for module in self.first for p in module.parameters(recurse=False)}
        return [p for p in network.parameters() if id(p) not in own]

    def told(self) -> str:
        return "with labels, head and last normalisation first"


def last_layers(network: nn.Module, answer: Any) -> list[nn.Module]:
    """Of what an answer depends on, the last module with a matrix or kernel of weights and the last normalisation with weights,
    in the order in which they run. answer: calls the network. Nothing where it cannot be seen.
    """
    ran: list[nn.Module] = []
    own = [m for m in nn.Module.modules(network) if next(m.parameters(recurse=False), None) is not None]
    hooks = [m.register_forward_pre_hook(lambda module, _: ran.append(module)) for m in own]
    try:
        with torch.enable_grad():
            answer().float().sum().backward()
    except Exception:  # whatever it fails with: the first step says so
        return own
    finally:
        for hook in hooks:
            hook.remove()
    ran = [m for m in ran if any(p.grad is not None for p in m.parameters(recurse=False))]
    for parameter in network.parameters():
        parameter.grad = None
    heads = [m for m in ran if not isinstance(m, NORMS) and any(p.ndim > 1 for p in m.parameters(recurse=False))]
    return heads[-1:] + [m for m in ran if isinstance(m, NORMS)][-1:]
