"""The networks of segmentation_models_pytorch, whose encoder is a convnet or a transformer of the library's own."""

from segmentation_models_pytorch.base import SegmentationModel
from torch import nn

from ..probe import find_stem
from .adapter import Adapter, Size, as_pair
from .unknown import Unknown, may_be_fixed


def adapter(name: str, module: nn.Module) -> Adapter | None:
    return Divided(name, module) if isinstance(module, SegmentationModel) else None


class Divided(Unknown):
    """Most of its networks take only sides that their total stride divides, and refuse others while they run."""

    gives_way = True
    why_no_sequence = "its encoder hands out maps of several sizes"

    @property
    def image(self) -> Size | None:  # type: ignore[override]
        return super().image if may_be_fixed(self.module.encoder) else None

    @property
    def unit(self) -> Size:
        return as_pair(self.module.encoder.output_stride if self.module.requires_divisible_input_shape else 1)

    def fit_behind_embedding(self, image: Size, scale: float) -> tuple[str, float]:
        """Decoders add maps of neighbouring strides: the map that follows must divide as the image does."""
        name = find_stem(self.module, (self.module.encoder.out_channels[0], *image))
        stride = as_pair(self.module.get_submodule(name).stride)
        rows, step = image[0] // stride[0], max(1, self.unit[0] // stride[0])
        return self.inside(name), max(1, round(rows * scale / step)) * step / rows
