"""Networks with attention or positions of a kind that downres does not know."""

import contextlib
import functools
import re
from collections.abc import Iterator

from torch import Tensor, nn

from ..copying import modules, named_buffers, named_parameters
from ..errors import DownresError
from ..parse import format_resolution
from ..probe import fake_run, find_stem, input_size_of
from .adapter import IMAGE, Adapter, Size


def may_be_fixed(model: nn.Module) -> bool:
    """Whether something in the model is a sign of attention or positions, which often hold one input size alone."""
    names = (name for name, _ in [*named_parameters(model), *named_buffers(model)])
    return any(_SIGN_IN_NAME.search(name) for name in names) or any(
        _SIGN_IN_CLASS.search(type(m).__name__) or not vars(m).keys().isdisjoint(IMAGE) or any(tables(m))
        for m in modules(model)
    )


def tables(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module holds itself, by whatever name, of the shape of positions: a row of channels for each of many tokens.

    (N, C), (1, N, C), (N, 1, C), (1, C, h, w) or (1, h, w, C); no weight of a layer.
    """
    if isinstance(module, _LAYERS):
        return
    for key, t in [*module._parameters.items(), *module._buffers.items()]:
        if t is None or not t.is_floating_point() or (key == "weight" and not isinstance(module, nn.Embedding)):
            continue
        sides = sum(side > 1 for side in t.shape)
        if (sides == 2 or (sides == 3 and t.ndim == 4 and t.shape[0] == 1)) and t.ndim <= 4 and t.numel() >= 64:
            yield key, t


_LAYERS = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm,
    nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip
_SIGN_IN_NAME = re.compile(r"(^|[._])(pos|rel)(_|$|\.|ition|ative)|attention_bias", re.IGNORECASE)
_SIGN_IN_CLASS = re.compile(r"Attention|Attn|MHSA|Mixer|Transformer")


class Unknown(Adapter):
    """A network with attention or positions of a kind that downres does not know: it is run, and left as it is."""

    sure = False
    why_no_sequence = "it has no plain list of blocks that downres knows"

    @functools.cached_property
    def image(self) -> Size | None:  # type: ignore[override]
        """Its size where it runs at this one, and not at twice as much."""
        channels, height, width = input_size_of(self.module)
        any_size = self._runs(channels, 2 * height, 2 * width) or not self._runs(channels, height, width)
        return None if any_size else (height, width)

    def _runs(self, *size: int) -> bool:
        try:
            fake_run(self.module, size, lambda _model, _x: contextlib.nullcontext())
        except DownresError:
            return False
        return True

    def fit(self, image: Size, patch: Size | None) -> str:
        raise DownresError(
            f"{type(self.module).__name__} runs at its own size alone, and downres does not know how to make it for "
            f"{format_resolution(image)} px: give the model made for that size, or another model."
        )

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        return find_stem(self.module, (input_size_of(self.module)[0], *image)), scale
