"""Model scaling, to compare with: fewer blocks (depth) and fewer channels (width). Another network, to be trained."""

import re
from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..parse import Resolution, integers
from .technique import Design, Factor, Style, Technique, whole

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work


class Scaling(Technique):
    """What depth and width have in common. Both together make one network."""

    order, measurable = 10, False

    def place(self, c: "Candidate", design: Design, whole: bool, notes: list[str]) -> tuple[Resolution, tuple[int, int]]:
        return design.native, (1, 1)  # nothing of it is cut or padded

    def how(self, c: "Candidate") -> str:
        return ""

    def prepare(self, work: "Work") -> None:
        """Asks of the adapter: `scale(depth, width)`, a new transformer of the same design."""
        from ..models.regseg import RegSeg

        c = work.candidate
        if self is WIDTH and DEPTH.is_on(c):
            return  # done
        if isinstance(work.small, RegSeg):
            if c.depth is not None:
                raise DownresError(
                    "The depth of a RegSeg is a factor on its blocks and no number of them: name it in the model, "
                    "regseg:exp48_decoder26,depth=0.5."
                )
            design = work.small.design.scaled(c.width)
            work.small = RegSeg(work.small.num_classes, design).train(work.small.training)
            work.note(
                "model scaling", "", f"channels ×{c.width:g}, {design.group_width} a group; weights drawn anew, to be trained"
            )
            return
        adapter = work.need_adapter("Scaling depth and width")
        work.replace(adapter.name, adapter.scale(c.depth, c.width))
        what = ([f"{c.depth} blocks"] if c.depth else []) + ([f"channels ×{c.width:g}"] if c.width != 1.0 else [])
        work.note("model scaling", adapter.name, f"{', '.join(what)}; weights drawn anew, to be trained")


class Depth(Scaling):
    """depth: number of blocks."""

    name, neutral, keyword, option = "depth", None, "depths", "--depth"
    metavar, help = "10,8,6", "Numbers of blocks: model scaling."
    styles = {"depth": Style("#c2552d", "square")}  # it and width run side by side

    def normalise(self, value: Any) -> int | None:
        return whole(value, "A depth is a whole number of blocks above 0", "8")

    def word(self, c: "Candidate") -> str:
        return f"depth{c.depth}"

    def read(self, word: str) -> dict[str, Any]:
        match = re.fullmatch(r"depth(\d+)", word)
        return {self.name: int(match[1])} if match else {}

    def parse_option(self, text: str) -> tuple[int, ...]:
        return tuple(integers(text, self.option))

    def detail(self, c: "Candidate") -> str:
        return f"{c.depth} blocks"

    def short(self, c: "Candidate") -> str:
        return f"depth {c.depth}"

    def mark(self, c: "Candidate") -> str:
        return f"{c.depth} blocks"


class Width(Scaling, Factor):
    """width: factor on the channels."""

    prefix = "width"
    name, neutral, keyword, option = "width", 1.0, "widths", "--width"
    metavar, help = "0.5,0.67", "Factors on the channels: model scaling."
    styles = {"width": Style("#9a6fd0", "pentagon")}

    def normalise(self, value: Any) -> float:
        if not 0.0 < value <= 4.0:
            raise DownresError(f"A width is a factor above 0 and at most 4, {value} is not: give for example 0.5.")
        return value

    def detail(self, c: "Candidate") -> str:
        return f"width ×{c.width:g}"

    def short(self, c: "Candidate") -> str:
        return f"width ×{c.width:g}"


DEPTH, WIDTH = Depth(), Width()
