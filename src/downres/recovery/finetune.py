"""Training on labels at a candidate's own pixels: FixRes, which begins with the head (Touvron et al. 2019, arXiv 1906.06423),
and fine-tuning.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torchvision.transforms import v2

from .bank import Bank
from .state import FINETUNED, FIXRES
from .training import Training
from .views import Views

HEAD_FIRST = 1 / 3
"""Of the epochs, in which FixRes trains the head and the last normalisation alone."""
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Labelled(Protocol):
    """What is asked of a task; see `tasks.Task`."""

    mixes: ClassVar[bool]

    def matched(self, network: nn.Module, x: Tensor) -> Tensor: ...
    def learned(self, bank: Any, views: Views, size: tuple[int, int]) -> Tensor: ...
    def loss_of(self, ours: Tensor, targets: Tensor, smoothing: float) -> Tensor: ...


class Finetuning:
    """All weights trained on labels, from the state's own."""

    rung: ClassVar = "finetune"
    done: ClassVar = FINETUNED
    doing: ClassVar = "fine-tuning"
    original: ClassVar = None

    def __init__(self, task: Labelled, bank: Bank, size: tuple[int, int], how: Training) -> None:
        self.task, self.bank, self.size, self.smoothing = task, bank, size, how.label_smoothing
        mixes = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, how.mixup), (v2.CutMix, how.cutmix)) if alpha > 0]
        self.mix = v2.RandomChoice(mixes) if mixes and task.mixes else None

    def asked(self) -> Any:
        return list(self.size)

    def begin(self, network: nn.Module) -> None:
        pass

    def end(self, network: nn.Module) -> None:
        pass

    def frozen(self, network: nn.Module, part: float) -> Sequence[nn.Parameter]:
        return ()

    def targets(self, views: Views) -> Tensor:
        return self.task.learned(self.bank, views, self.size)

    def mixed(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.mix is None or len(x) < 2:
            return x, targets
        mixed: tuple[Tensor, Tensor] = self.mix(x, targets)
        return mixed

    def loss(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss_of(self.task.matched(network, x), targets, self.smoothing)

    def looked(self, epochs: Sequence[Views]) -> int:
        return 0

    def told(self) -> str:
        return "with labels"


class FixRes(Finetuning):
    """First the head and the last normalisation, which fit a network to another apparent size of things, then everything."""

    rung: ClassVar = "fixres"
    done: ClassVar = FIXRES
    doing: ClassVar = "FixRes fine-tuning"

    def frozen(self, network: nn.Module, part: float) -> Sequence[nn.Parameter]:
        if part >= HEAD_FIRST:
            return ()
        own = {id(p) for module in last_layers(network) for p in module.parameters(recurse=False)}
        return [p for p in network.parameters() if id(p) not in own]

    def told(self) -> str:
        return "with labels, head and last normalisation first"


def last_layers(network: nn.Module) -> list[nn.Module]:
    """The last module with a matrix or kernel of weights, by the order of modules, and the last normalisation with weights."""
    own = [m for m in nn.Module.modules(network) if next(m.parameters(recurse=False), None) is not None]
    heads = [m for m in own if not isinstance(m, _NORMS) and any(p.ndim > 1 for p in m.parameters(recurse=False))]
    return heads[-1:] + [m for m in own if isinstance(m, _NORMS)][-1:]
