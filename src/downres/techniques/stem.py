"""Fewer activations: resample after the embedding, a feature map or the grid of a sequence of tokens."""

import re
from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..parse import floats, format_resolution
from .technique import DECIMAL, Design, Style, Technique, number

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work

SCALES = (0.75, 0.5)
"""Factors of the 'after the embedding' variants, at the original's input resolution."""


class Stem(Technique):
    """stem_scale: factor on height and width of the activations after the module `stem`, None: after the embedding."""

    name, neutral, keyword, option = "stem_scale", 1.0, "stem_scales", "--stem-scale"
    metavar, help = "0.75,0.5", "Resample after the embedding by these factors; 'none' for no such variants."
    order, inside, sought = 40, True, "a stem_scale below 1"
    styles = {
        "pooling": Style("#6b8e23", "hexagon"),
        "stem": Style("#6b8e23", "hexagon"),
    }

    @property
    def fields(self) -> dict[str, Any]:
        return {"stem_scale": 1.0, "stem": None}

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        scale = values["stem_scale"]
        if not 0.0 < scale <= 1.0:
            raise DownresError(f"A stem scale is above 0 and at most 1, {scale} is not: give for example 0.5.")
        # Where nothing is resampled it is the same candidate wherever that would have been.
        return values if scale != 1.0 else {"stem_scale": scale, "stem": None}

    def word(self, c: "Candidate") -> str:
        return f"stem×{number(c.stem_scale)}" + (f"@{c.stem}" if c.stem else "")

    def read(self, word: str) -> dict[str, Any]:
        match = re.fullmatch(rf"stem[×*]({DECIMAL})(?:@(.+))?", word)
        return {"stem_scale": float(match[1]), "stem": match[2]} if match else {}

    def defaults(self, design: Design) -> tuple[float, ...]:
        return SCALES

    def parse_option(self, text: str) -> tuple[float, ...]:
        return tuple(floats(text, self.option))

    def detail(self, c: "Candidate") -> str:
        return f"×{c.stem_scale:g} after {c.stem}" if c.stem else f"stem ×{c.stem_scale:g}"

    def short(self, c: "Candidate") -> str:
        return f"×{c.stem_scale:g}"

    def how(self, c: "Candidate") -> str:
        return f"the activations after {c.stem or 'its stem'} resized ×{c.stem_scale:g}"

    def family(self, c: "Candidate", design: Design) -> str:
        return "pooling" if design.sequence else "stem"

    def prepare(self, work: "Work") -> None:
        adapter = work.adapter
        work.one_grid = adapter is not None and bool(adapter.block_names())
        # `fit_behind_embedding` does it in one step: tables are resampled once.
        work.fit_later = not work.one_grid and work.candidate.stem is None and work.patch is None
        work.instead = "name another module with stem=…"

    def apply(self, work: "Work") -> None:
        """Asks of the adapter: of a sequence `blocks`, `grid`, `prefix` and `after_pooling`, else `fit_behind_embedding`."""
        from ..probe import find_stem
        from ..reductions.resize import ResampleOutput
        from ..reductions.tokens import PoolTokens

        c, adapter = work.candidate, work.adapter
        names = adapter.block_names() if adapter else []
        where = None if c.stem is None or adapter is None else c.stem.removeprefix(adapter.inside(""))
        if adapter is None or not names or not (where is None or where in names):
            name, scale = c.stem, c.stem_scale
            work.resampled_at = name
            if adapter is not None and name is None:
                name, scale = adapter.fit_behind_embedding(work.image, scale)
            elif adapter is not None:
                adapter.sure = False  # what follows that module was made for its whole map
            name = name or find_stem(work.small, work.native)
            work.named(name).register_forward_hook(ResampleOutput(name, scale, work.interpolation))
            work.note("activation resample", name, f"height and width ×{scale:.3g}, {work.interpolation}, antialiased")
            return
        work.first = 0 if where is None else names.index(where) + 1
        blocks = adapter.blocks()
        if work.first == len(blocks):
            raise DownresError(f"{c.stem} is the last block: nothing would be saved; name an earlier one with stem=….")
        grid = adapter.grid(work.image)
        pooled = PoolTokens(grid, c.stem_scale, adapter.prefix, work.interpolation)
        work.pooled, work.fewer_tokens = pooled, True
        blocks[work.first].register_forward_pre_hook(pooled, with_kwargs=True)
        adapter.after_pooling(blocks[work.first :], pooled.size)
        at = c.stem or f"{adapter.inside(names[0])} (its input)"
        sizes = f"{format_resolution(grid)} → {format_resolution(pooled.size)} patch tokens"
        work.note("token pooling", at, f"{sizes}, {work.interpolation}, antialiased; upsampled after the last block")

    def finish(self, work: "Work") -> None:
        from ..reductions.tokens import UnpoolTokens

        if work.pooled is not None:
            assert work.adapter is not None
            work.adapter.blocks()[-1].register_forward_hook(UnpoolTokens(work.pooled))


STEM = Stem()
