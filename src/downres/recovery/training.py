"""How a rung trains."""

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..errors import DownresError
from ..records import Record

OPTIMIZERS = ("adamw", "sgd", "lamb")
SCHEDULES = ("cosine", "poly")
COLOURS = ("", "randaugment", "trivialaugment")
TRACKERS = ("", "tensorboard", "mlflow", "wandb")


@dataclass(frozen=True)
class Training(Record):
    """How a training rung trains: by `optimizer`, warmed up and then lowered along a cosine or a polynomial of power 0.9.

    epochs: passes over the training images, as many as `max_minutes` allow. training_batch: images a step; where they do not
    fit into the memory they are looked at in parts. learning_rate: the highest, of SGD (momentum 0.9) and LAMB give their own.
    warmup: part of all steps. clip: of the gradient's norm. ema: decay of an average of the weights, which is what is kept;
    0: none. bf16: compute in bfloat16 as far as autocast does. batchnorm: take statistics from every batch on the way; False
    keeps those that are there, from which a network that is trained already is not thrown off by a few images.

    What images are shown as: mirrored at random (mirror; of a regression never); crop_scale: a part of at least so much of the
    area instead of the whole (1; a random resized crop); zoom_low, zoom_high: instead of the whole a window of the network's
    size of a picture whose short side is brought to between so many times the network's, by chance, filled with the mean where
    the picture is smaller (1 and 1: none; large scale jitter); uniform: the part of an epoch's images that are drawn for a
    class, each as often as the others, whose window shows a pixel of it (class-uniform sampling, of masks alone); augment: what
    'randaugment' or 'trivialaugment' does to colours, of which the original of a distillation sees nothing; moves: and its
    shifts, shears and turns, where a label is of the whole image; erasing: the probability that a part is erased; repeats: how
    often in a batch each image is (repeated augmentation). Of labels alone: label_smoothing, and mixup and cutmix (their alpha,
    0: none), of labels that are numbers an image. Of distillation alone: features, the weight of how far what the last layer
    gets is from what the original's gets (one minus their cosine) beside the answers. log: 'tensorboard', 'mlflow' or 'wandb'.
    """

    epochs: int = 20
    training_batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    clip: float = 1.0
    max_minutes: float | None = None
    optimizer: str = "adamw"
    schedule: str = "cosine"
    ema: float = 0.0
    bf16: bool = False
    batchnorm: bool = False
    mirror: bool = True
    crop_scale: float = 1.0
    zoom_low: float = 1.0
    zoom_high: float = 1.0
    uniform: float = 0.0
    augment: str = ""
    moves: bool = False
    erasing: float = 0.0
    repeats: int = 1
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    features: float = 0.0
    log: str = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, wanted = getattr(self, f.name), (int, float) if isinstance(f.default, float | None) else type(f.default)
            if isinstance(value, bool) != isinstance(f.default, bool) or not isinstance(value, wanted):  # type: ignore[arg-type]
                if value is not None or f.default is not None:
                    raise DownresError(
                        f"`{f.name}` is {_KINDS[type(f.default)]}, {value!r} is not: leave it out for the default."
                    )
        for name in ("epochs", "training_batch", "repeats"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
                raise DownresError(f"`{name}` is a whole number from 1 to 100000, {value!r} is not: give for example 20.")
        if self.training_batch % self.repeats:
            raise DownresError(
                f"A batch of {self.training_batch} images cannot have each {self.repeats} times: give a `training_batch` that "
                "`repeats` divides."
            )
        for name in ("learning_rate", "clip", "max_minutes", "crop_scale", "zoom_low", "zoom_high"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DownresError(f"`{name}` is a number above 0, {value!r} is not: leave it out for the default.")
        for name in ("weight_decay", "mixup", "cutmix", "features"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise DownresError(f"`{name}` is a number from 0 on, {value!r} is not: give for example 0.01.")
        for name in ("warmup", "crop_scale", "uniform", "erasing", "label_smoothing"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise DownresError(f"`{name}` is a part from 0 to 1, {value!r} is not: give for example 0.1.")
        if self.zoom_low > self.zoom_high:
            raise DownresError(
                f"`zoom_low` is at most `zoom_high`, {self.zoom_low:g} is above {self.zoom_high:g}: exchange them."
            )
        if self.crop_scale < 1 and self.zoomed:
            raise DownresError("A part of an image is shown by `crop_scale` or by `zoom_low` and `zoom_high`: leave one out.")
        if self.moves and not self.augment:
            raise DownresError("`moves` are those of `augment`, which is not given: give 'randaugment' or 'trivialaugment'.")
        if not 0 <= self.ema < 1:
            raise DownresError(f"`ema` is a decay from 0 to below 1, {self.ema!r} is not: give for example 0.999.")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("augment", COLOURS), ("log", TRACKERS)):
            value = getattr(self, name)
            if value not in known:
                raise DownresError(f"`{name}` is one of {', '.join(k for k in known if k)}, {value!r} is not.")
        if self.log and importlib.util.find_spec(self.log) is None:
            raise DownresError(
                f"Training is logged to {self.log}, which is not installed: pip install {self.log}, or leave `log`."
            )

    def to_json(self) -> dict[str, Any]:
        """Younger fields only where they say something: what was kept before there were any stays what is asked for."""
        values = super().to_json()
        younger = {f.name: f.default for f in dataclasses.fields(self) if f.name in _YOUNGER}
        return {name: value for name, value in values.items() if name not in younger or value != younger[name]}

    @property
    def zoomed(self) -> bool:
        return (self.zoom_low, self.zoom_high) != (1, 1) or self.uniform > 0

    @classmethod
    def parse(cls, texts: Sequence[str], **given: Any) -> Self:
        """By fields, and by text: 'mixup=0.2', 'bf16=true'. DownresError for what is no field, or no value of one."""
        own: dict[str, Any] = {f.name: float if f.default is None else type(f.default) for f in dataclasses.fields(cls)}
        for text in texts:
            name, _, value = text.partition("=")
            name = name.strip().replace("-", "_")
            if name not in own or not value:
                raise DownresError(f"How to train is NAME=VALUE with a name of {', '.join(own)}; {text!r} is not.")
            try:
                given[name] = _TRUTHS[value.lower()] if own[name] is bool else own[name](value)
            except (ValueError, KeyError):
                raise DownresError(f"`{name}` is {_KINDS[own[name]]}, {value!r} is not.") from None
        return cls(**given)


_YOUNGER = ("zoom_low", "zoom_high", "uniform", "moves", "features")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "a number"}
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class TrainingFailed(DownresError):
    """A training that came to nothing; why in words."""
