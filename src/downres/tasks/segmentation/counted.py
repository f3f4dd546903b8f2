"""What costs need to know of a segmentation network: its answer at full size is part of what is counted."""

from collections.abc import Callable

from torch import nn

from ...errors import DownresError
from ...families import Model
from ...parse import as_hw, like
from ...probe import Answer
from ...records import Dense
from ...reductions.dense import Segmenter, check_size
from ..question import Question, refuse_mask_options


def counted(model: Model, answer: Answer, question: Question) -> Callable[[nn.Module], nn.Module]:
    """What makes of a network the one whose costs are counted; it changes nothing but networks that answer for every pixel."""
    if answer.size is not None:
        p = model.preprocessing
        size = p.hw if question.label_size is None else as_hw(like(p.resolution, question.label_size))
        check_size(size, answer.size)
        dense = dense_of(size, answer, question)
        return lambda network: Segmenter(network, dense, answer.which)
    refuse_mask_options(question)
    return lambda network: network


def dense_of(size: tuple[int, int], answer: Answer, question: Question) -> Dense:
    """What is done with the logits. DownresError for an output to be left out that there is none of."""
    left_out = question.ignore_output
    if left_out is not None and not (0 <= left_out < answer.outputs and answer.outputs > 2):
        raise DownresError(
            f"The output for void is one of the network's {answer.outputs} and two are left beside it, {left_out} is not: give "
            f"ignore_output={answer.outputs - 1} or leave it out."
        )
    threshold = None if answer.outputs > 1 else 0.5 if answer.probability else 0.0
    return Dense(size, question.output, question.upsampling, answer.align_corners, left_out, threshold)


def classes_of(answer: Answer, question: Question) -> int:
    """How many classes a segmentation network tells apart: with one output two, background and foreground."""
    return 2 if answer.outputs == 1 else answer.outputs - (question.ignore_output is not None)
