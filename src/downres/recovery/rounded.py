"""Quantization-aware training: distillation of a network whose weights and activations are rounded to 8 bits as it answers
(Jacob et al. 2018, arXiv 1712.05877). The file is made of the weights that come out by the engine's own quantizer.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .distill import Distillation
from .state import ROUNDED

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OBSERVED = 0.05
"""How fast the range of an activation follows its batches."""


class _Weight(nn.Module):
    """A weight rounded to 8 bits, symmetric, a scale for each output channel, as ONNX Runtime's and OpenVINO's files have it.

    A BatchNorm behind it, folded into the file, multiplies a channel and its scale alike: the rounding is the same.
    """

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class _Activation:
    """What comes into a layer rounded to 8 bits, one scale, by a range that follows the training."""

    def __init__(self, module: nn.Module) -> None:
        module.register_buffer("rounded_range", torch.full((2,), torch.nan))

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if args:
            return (self._rounded(module, args[0]), *args[1:]), kwargs
        (name, x), *others = kwargs.items()
        return (), {name: self._rounded(module, x), **dict(others)}

    def _rounded(self, module: nn.Module, x: Tensor) -> Tensor:
        known = module.rounded_range
        assert isinstance(known, Tensor)
        if module.training or known.isnan().any():
            now = torch.stack([x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)]).to(known)
            known.copy_(now if known.isnan().any() else known + _OBSERVED * (now - known))
        low, high = known[0], known[1]
        scale = ((high - low) / 255).clamp(min=1e-12)
        zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, 255)


class Rounding(Distillation):
    """No labels: the student answers through the rounding of its file as the original does without. A head that stays in float
    in the file stays so here.
    """

    rung: ClassVar = "qat"
    done: ClassVar = ROUNDED
    doing: ClassVar = "quantization-aware training"

    def begin(self, network: nn.Module) -> None:
        super().begin(network)
        name = getattr(self.bank, "head", None)
        head = None if name is None else network.get_submodule(name)
        for module in [m for m in nn.Module.modules(network) if isinstance(m, _LAYERS) and m is not head]:
            if isinstance(module.weight, nn.Parameter) and not parametrize.is_parametrized(module):
                module.register_forward_pre_hook(_Activation(module), with_kwargs=True)
                parametrize.register_parametrization(module, "weight", _Weight())

    def end(self, network: nn.Module) -> None:
        for module in nn.Module.modules(network):
            if isinstance(module, _LAYERS) and "rounded_range" in module._buffers:
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                del module._buffers["rounded_range"]
                for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Activation)]:
                    del module._forward_pre_hooks[key]

    def told(self) -> str:
        return "rounded to 8 bits, without labels"
