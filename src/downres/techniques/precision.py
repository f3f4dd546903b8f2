"""Fewer bits: the file that runs computes in another type of numbers."""

from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..parse import BF16, FP16, FP32, INT8, PRECISIONS
from .technique import Technique

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work

_SAID = {BF16: "bfloat16", FP16: "half precision", INT8: "8-bit integers"}


class Precision(Technique):
    """precision: of weights and activations where the runtime has them so; int8 is post-training quantization, calibrated on
    training images at the candidate's resolution.
    """

    name, neutral, keyword, option = "precision", FP32, "precisions", "--precision"
    metavar, help = "fp32,int8", "Types of numbers, each tried with every other candidate: fp32, bf16, fp16, int8."
    in_file, crosses = True, True

    def normalise(self, value: Any) -> str:
        if value not in PRECISIONS:
            raise DownresError(f"A precision is one of {', '.join(PRECISIONS)}; {value!r} is none of them.")
        return str(value)

    def word(self, c: "Candidate") -> str:
        return c.precision

    def read(self, word: str) -> dict[str, Any]:
        return {self.name: word} if word in PRECISIONS else {}

    def parse_option(self, text: str) -> tuple[str, ...]:
        return tuple(self.normalise(word.strip()) for word in text.split(",") if word.strip())

    def how(self, c: "Candidate") -> str:
        return _SAID[c.precision]

    def prepare(self, work: "Work") -> None:
        raise DownresError(
            f"`reduce` makes a network of float32, {work.candidate.precision} is how a runtime's file computes: "
            "search with `precisions`, or leave it out here."
        )


PRECISION = Precision()
