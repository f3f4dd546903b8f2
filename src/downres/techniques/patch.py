"""Larger patches: the image is looked at in fewer pieces."""

import re
from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..parse import Resolution, as_hw, format_resolution, integers, like
from .technique import Design, Style, Technique, whole

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work

FACTORS = (1.25, 1.5, 2.0)
"""Larger patches, as factors of the original's; past about 1.25 they need more than a new head."""


class Patch(Technique):
    """patch_size: side of the patches in pixels; the patch kernel is resized."""

    name, neutral, keyword, option = "patch_size", None, "patch_sizes", "--patch-size"
    metavar, help = "20,24", "Patches of these sides, in pixels; 'none' for no such variants."
    order, refits, sought = 20, True, "a patch_size"
    styles = {"patch size": Style("#3f86d1", "diamond")}

    def normalise(self, value: Any) -> int | None:
        return whole(value, "A patch size is a whole number of pixels above 0", "20")

    def word(self, c: "Candidate") -> str:
        return f"patch{c.patch_size}"

    def read(self, word: str) -> dict[str, Any]:
        match = re.fullmatch(r"patch(\d+)", word)
        return {self.name: int(match[1])} if match else {}

    def defaults(self, design: Design) -> tuple[int, ...]:
        if design.patch is None or not design.sequence:
            return ()
        sides = (round(design.patch * factor) for factor in FACTORS)
        return tuple(s for s in sides if s <= min(as_hw(design.native)) // 2)

    def place(self, c: "Candidate", design: Design, whole: bool, notes: list[str]) -> tuple[Resolution, tuple[int, int]]:
        """The same image, as nearly as whole patches allow."""
        resolution, patch = design.native, c.patch_size
        assert patch is not None
        height, width = as_hw(resolution)
        if patch > min(height, width):
            raise DownresError(
                f"A patch of {patch} px is larger than the image of {format_resolution(resolution)} px: give a smaller patch."
            )
        if (height % patch or width % patch) and whole:
            resolution = like(resolution, (height // patch * patch, width // patch * patch))
            notes.append(f"patches of {patch} px look at {format_resolution(resolution)} px, a multiple of them")
        return resolution, (patch, patch)

    def parse_option(self, text: str) -> tuple[int, ...]:
        return tuple(integers(text, self.option))

    def detail(self, c: "Candidate") -> str:
        return f"patches of {c.patch_size} px"

    def short(self, c: "Candidate") -> str:
        return f"p{c.patch_size}"

    def family(self, c: "Candidate", design: Design) -> str:
        return "patch size"

    def prepare(self, work: "Work") -> None:
        """Asks of the adapter: `patch`. `Adapter.fit` takes the new side together with the image's, see `resolution.py`."""
        side = work.candidate.patch_size
        assert side is not None
        adapter = work.need_adapter("Another patch size")
        if adapter.patch is None:
            raise DownresError(
                f"The patch size of {type(adapter.module).__name__} cannot change: downres knows no patch embedding in it "
                "that can be resampled; lower its resolution instead."
            )
        if side > min(work.target):
            raise DownresError(
                f"A patch of {side} px is larger than the image of {format_resolution(work.target)} px: "
                "give a smaller patch or a higher resolution."
            )
        work.patch = (side, side)


PATCH = Patch()
