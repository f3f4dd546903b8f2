"""What costs need to know of a segmentation network: its answer at full size is part of what is counted."""

from collections.abc import Callable

from torch import nn

from ...errors import DownresError
from ...families import Model
from ...parse import as_hw
from ...probe import Answer
from ...records import LOGITS, Dense
from ...reductions.dense import Segmenter, check_size
from ..question import Question


def counted(model: Model, answer: Answer, question: Question) -> Callable[[nn.Module], nn.Module]:
    """What makes of a network the one whose costs are counted; it changes nothing but networks that answer for every pixel."""
    if answer.size is not None:
        size = model.preprocessing.hw if question.label_size is None else as_hw(question.label_size)
        check_size(size, answer.size)
        dense = Dense(size, question.output, question.upsampling, answer.align_corners)
        return lambda network: Segmenter(network, dense)
    refuse_options(question)
    return lambda network: network


def refuse_options(question: Question) -> None:
    """DownresError for options that are of answers to every pixel."""
    if question.label_size is not None:
        raise DownresError("Only a segmentation network's answer has a size, this one is none: leave `label_size` out.")
    if question.output != LOGITS or question.upsampling != "bilinear":
        raise DownresError(
            "Only a segmentation network's answer is upsampled, this one is none: leave `output` and `upsampling` out."
        )
