"""What is asked of the data, as one group of options."""

from dataclasses import dataclass

from ..errors import DownresError
from ..parse import Resolution
from ..records import LOGITS, Record


@dataclass(frozen=True)
class Question(Record):
    """What is asked of the data, where the network and the folder alone do not say.

    task: name of the task; None finds it from what the network answers. labels: a CSV or JSON file of labels beside a folder
    of images. classes: a file with the names and colours of the masks' classes. fit_head: replace the final linear layer by
    one fitted for the data's classes. label_size: (height, width), or the short side, that a segmentation network's logits are
    brought to; None: that of the masks. output: what it hands out there, 'logits' or 'classes'; upsampling: 'bilinear' or
    'bicubic'.
    output_index: index or name of the output that is judged, of a network that returns several; None where only one fits the
    data. ignore_output: index of an output of a segmentation network for pixels without a class, which is left out.
    compare: what agreement is of, 'classes', 'embeddings' or 'masks'; None where the network tells.
    """

    task: str | None = None
    labels: str | None = None
    classes: str | None = None
    fit_head: bool = False
    label_size: Resolution | None = None
    output: str = LOGITS
    upsampling: str = "bilinear"
    compare: str | None = None
    output_index: int | str | None = None
    ignore_output: int | None = None


def refuse_mask_options(question: Question) -> None:
    """DownresError for options that are of answers to every pixel, which a network does not give."""
    if question.ignore_output is not None:
        raise DownresError("Only a segmentation network has an output for void, this one is none: leave `ignore_output` out.")
    if question.label_size is not None:
        raise DownresError("Only the answers of segmentation networks have a size, this one is none: leave `label_size` out.")
    if question.output != LOGITS or question.upsampling != "bilinear":
        raise DownresError(
            "Only the answers of segmentation networks are upsampled, this one is none: leave `output` and `upsampling` out."
        )
