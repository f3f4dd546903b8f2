"""RegSeg by name: `exp48_decoder26,width=0.5,depth=0.5,group_width=8,num_classes=11`."""

import itertools
import re

from torch import Tensor, nn

from ..errors import DownresError
from ..models.regseg import DESIGNS, regseg
from ..records import Preprocessing
from .options import split_options

_OPTIONS = {"width": float, "depth": float, "group_width": int, "num_classes": int}
_STEM = "stem.conv.weight"
_DEPTHS = (1.0, 0.5, 0.75, 0.25, 1.5, 2.0, 3.0, 4.0)


def create(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    """Weights are drawn anew. num_classes: None for that in the name, else that of Cityscapes, 19."""
    design, options = split_options(name, _OPTIONS)
    if num_classes is not None:
        options["num_classes"] = num_classes
    module = regseg(design, **options)  # type: ignore[arg-type]
    if pretrained:
        raise DownresError(
            f"The published weights of regseg:{name} are not fetched: give the checkpoint with `weights`, in Python "
            "pretrained=False for weights drawn anew."
        )
    return module


def preprocessing(model: nn.Module, name: str) -> Preprocessing:
    source = "Gao 2021: whole pictures, ImageNet's mean and std, 1024x2048 px"
    return Preprocessing((1024, 2048), source=source, fit="stretch", any_size=True)


def explain(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises DownresError, with the name to give, where the tensors are of a RegSeg of another width, depth or group width."""
    prefix = next((key.removesuffix(_STEM) for key in tensors if key.endswith(_STEM)), "")
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    try:
        name = _name(tensors)
    except (KeyError, IndexError):  # of no RegSeg
        return
    if name is not None:
        raise DownresError(f"The weights are of another RegSeg, {_difference(module.state_dict(), tensors)}: give {name}.")


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    for key in (*theirs, *ours):
        if key not in ours or key not in theirs:
            return f"{key} is not in {'this network' if key in theirs else 'the file'}"
        for what, there, here in zip(("channels", "channels a group"), theirs[key].shape, ours[key].shape, strict=False):
            if there != here:
                return f"{key} has {there} {what}, this network {here}"
    raise AssertionError("the tensors fit")


def _name(tensors: dict[str, Tensor]) -> str | None:
    """`regseg:NAME,…` of the network that has tensors of these shapes."""

    def shape(key: str) -> tuple[int, ...]:
        return tuple(tensors[f"{key}.weight"].shape)

    def blocks(stage: str) -> int:
        return sum(re.fullmatch(rf"body\.{stage}\.(\d+\.)?conv1\.weight", key) is not None for key in tensors)

    fine, coarse, mixed = (shape(f"decoder.{part}.conv")[0] for part in ("head4", "head8", "conv4"))
    last = shape("decoder.head16.conv")[1]
    channels = (shape("decoder.head4.conv")[1], shape("decoder.head8.conv")[1], shape("body.stage16.0.conv3")[0], last)
    stem, group_width = shape("stem.conv")[0], shape("body.stage8.0.conv2")[1]
    theirs = stem, channels, group_width, (blocks("stage4"), blocks("stage8")), blocks("stage16") - 1, (fine, coarse), mixed
    for name, design in DESIGNS.items():
        # Of the widths that round to this stem its own first, then those of the fewest digits.
        near = [width / 1000 for width in range(1, 4001) if round(design.stem * width / 1000) == stem]
        near.sort(key=lambda width: (width != stem / design.stem, len(str(width)), width))
        for depth, width in itertools.product(_DEPTHS, near):
            for groups in (None, group_width):
                d = design if (width, depth, groups) == (1.0, 1.0, None) else design.scaled(width, depth, groups)
                if (d.stem, d.channels, d.group_width, d.blocks, len(d.dilations), d.heads, d.mixed) == theirs:
                    options = {"width": width, "depth": depth, "group_width": groups}
                    given = "".join(f",{key}={value:g}" for key, value in options.items() if value not in (1.0, None))
                    return f"regseg:{name}{given}"
    return None
