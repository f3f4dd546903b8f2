"""Fewer tokens from block to block of a transformer: similar ones are merged, or those least attended to are fused."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..record import Record
from .technique import DECIMAL, Design, Style, Technique, count

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work

CONSTANT, DECREASING = "constant", "decreasing"
MERGE, PRUNE = "merge", "prune"


@dataclass(frozen=True)
class Merge(Record):
    """How many patch tokens to take out of a transformer's sequence, block by block. Give `r` or `keep`.

    r: tokens a block, on average over the blocks. keep: fraction of the patch tokens that is left after the last block.
    schedule: 'constant', or 'decreasing': from 2r in the first block linearly to 0 in the last (Bolya 2023, ToMe, sec. 4.1).
    by: 'merge' joins the most similar tokens (ToMe); 'prune' fuses those that the class token attends to least into one
    (Liang 2022, EViT).
    """

    r: int | None = None
    keep: float | None = None
    schedule: str = CONSTANT
    by: str = MERGE

    def __post_init__(self) -> None:
        if (self.r is None) == (self.keep is None):
            raise DownresError(
                "Give either r (tokens a block) or keep (fraction left at the end): for example r=8 or keep=0.5."
            )
        try:
            if self.r is not None:
                object.__setattr__(self, "r", count(self.r))
        except (TypeError, ValueError):
            raise DownresError(
                f"The tokens taken out a block are a whole number of at least 1, {self.r!r} is not: give for example 8."
            ) from None
        if self.keep is not None and not 0.0 < self.keep < 1.0:
            raise DownresError(
                f"The fraction of tokens kept is between 0 and 1, {self.keep} is not: give for example 0.5 (50%)."
            )
        if self.schedule not in (CONSTANT, DECREASING):
            raise DownresError(f"The schedule is {CONSTANT} or {DECREASING}, {self.schedule!r} is neither.")
        if self.by not in (MERGE, PRUNE):
            raise DownresError(f"Tokens are taken out by {MERGE} or {PRUNE}, {self.by!r} is neither.")

    def __str__(self) -> str:
        amount = f"{self.r}" if self.keep is None else _share(self.keep)
        return f"{self.by}{amount}" + (f"-{self.schedule}" if self.schedule != CONSTANT else "")

    @classmethod
    def parse(cls, text: str, by: str = MERGE) -> "Merge":
        """The inverse of `str`; the first word may be left out: `8`, `50%`, `8-decreasing`, `merge8`, `prune50%`."""
        match = re.fullmatch(rf"({MERGE}|{PRUNE})?({DECIMAL})(%)?(?:-({CONSTANT}|{DECREASING}))?", text.strip())
        if match is None or (match[3] is None and not match[2].isdigit() and float(match[2]) >= 1):
            raise DownresError(
                f"Cannot read {text!r} as tokens to {by}: give tokens a block, 8 or 8-decreasing, "
                "or what is kept at the end, 50%."
            )
        value = float(match[2]) / 100 if match[3] else float(match[2])
        how: dict[str, Any] = {"r": int(match[2])} if match[2].isdigit() and not match[3] else {"keep": value}
        return cls(**how, schedule=match[4] or CONSTANT, by=match[1] or by)


def _as_merge(value: Any) -> "Merge":
    """8 (tokens a block), 0.5 (fraction kept) or text, as a `Merge`."""
    if isinstance(value, str):
        return Merge.parse(value)
    try:
        return Merge(r=value) if not isinstance(value, bool) and hasattr(value, "__index__") else Merge(keep=float(value))
    except (TypeError, ValueError):
        raise DownresError(
            f"Cannot read {value!r} as tokens to merge: give 8 (a block), 0.5 (kept) or '8-decreasing'."
        ) from None


def _share(share: float) -> str:
    """`50%`, or the bare fraction where no short percentage reads back as the same: `0.3333333333333333`."""
    short = f"{100 * share:g}"
    return f"{short}%" if float(short) / 100 == share else repr(share)


KEPT = (0.75, 0.5, 0.25)
"""Fractions of the patch tokens that are left after the last block, of the variants tried by default."""


def removals(merge: Merge, tokens: int, blocks: int) -> tuple[int, ...]:
    """Patch tokens to take out in each block, for a sequence of `tokens` patch tokens.

    A block can merge at most half of the tokens that it has (each of one half joins one of the other), or prune all but
    two. Raises DownresError when nothing would be left, or what is to be kept cannot be reached.
    """
    if merge.r is not None:
        wanted = [merge.r] * blocks
        if merge.schedule == DECREASING and blocks > 1:
            wanted = [int(2 * merge.r - 2 * merge.r * i / (blocks - 1)) for i in range(blocks)]
        if sum(wanted) >= tokens:
            most = (tokens - 1) // blocks
            raise DownresError(
                f"{merge} would take {sum(wanted)} tokens out of {tokens} in {blocks} blocks: "
                + (f"give at most {most} a block." if most else "this image has too few tokens to take any out.")
            )
    else:
        assert merge.keep is not None
        total = tokens - max(1, round(tokens * merge.keep))
        shares = [2 * (blocks - i) - 1 for i in range(blocks)] if merge.schedule == DECREASING else [1] * blocks
        ends = [round(total * sum(shares[: i + 1]) / sum(shares)) for i in range(blocks)]
        wanted = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    left, found = tokens, []
    for r in wanted:
        r = min(r, left // 2 if merge.by == MERGE else max(0, left - 2))
        found.append(r)
        left -= r
    if merge.keep is not None and sum(found) < sum(wanted):
        limit = "merging at most halves the tokens of a block" if merge.by == MERGE else "pruning leaves two tokens"
        other = CONSTANT if merge.schedule == DECREASING else DECREASING
        raise DownresError(
            f"{merge} cannot be reached: {limit}, so of {tokens} tokens {left} would be left; "
            f"keep more, or try the {other} schedule."
        )
    return tuple(found)


class Tokens(Technique):
    """merge: tokens taken out in each block."""

    name, neutral, keyword, option = "merge", None, "merges", "--merge"
    metavar = "8,50%"
    help = "Merge tokens: 8 a block, 50% kept at the end, 8-decreasing, prune8 by attention; 'none' for no such variants."
    order, inside, sought = 50, True, "a merge"
    styles = {
        "merging": Style("#b0851a", "triangle-up"),
        "pruning": Style("#d0558f", "triangle-down"),
    }

    def normalise(self, value: Any) -> Merge | None:
        return value if value is None or isinstance(value, Merge) else _as_merge(value)

    def word(self, c: "Candidate") -> str:
        return str(c.merge)

    def read(self, word: str) -> dict[str, Any]:
        return {self.name: Merge.parse(word)} if word.startswith((MERGE, PRUNE)) else {}

    def columns(self, c: "Candidate") -> dict[str, Any]:
        return {self.name: c.merge and str(c.merge)}

    def defaults(self, design: Design) -> tuple[Merge, ...]:
        return tuple(Merge(keep=keep) for keep in KEPT) if design.sequence else ()

    def parse_option(self, text: str) -> tuple[Merge, ...]:
        return tuple(Merge.parse(part) for part in text.split(","))

    def detail(self, c: "Candidate") -> str:
        """`8 tokens merged a block`, `tokens merged to 50 %`, `tokens pruned to 50 %, most at first`."""
        return self._words(c, "tokens")

    def short(self, c: "Candidate") -> str:
        return str(c.merge)

    def how(self, c: "Candidate") -> str:
        return self._words(c, "its tokens")

    def _words(self, c: "Candidate", whose: str) -> str:
        assert c.merge is not None
        done = "merged" if c.merge.by == MERGE else "pruned"
        text = f"{c.merge.r} tokens {done} a block"
        if c.merge.keep is not None:
            text = f"{whose} {done} to {100 * c.merge.keep:.3g} %"
        return text + (", most at first" if c.merge.schedule == DECREASING else "")

    def family(self, c: "Candidate", design: Design) -> str:
        assert c.merge is not None
        return "pruning" if c.merge.by == PRUNE else "merging"

    def apply(self, work: "Work") -> None:
        """Asks of the adapter: `blocks`, `grid`, `prefix`, `merge`; to prune, a `class_token`."""
        from ..reductions.tokens import TokenState

        merge = work.candidate.merge
        assert merge is not None
        adapter = work.need_adapter("Merging tokens")
        blocks = adapter.blocks()[work.first :]
        if merge.by == PRUNE and not adapter.class_token:
            raise DownresError(
                f"Pruning goes by the attention of a class token, {type(adapter.module).__name__} has none: merge instead "
                f"({str(merge).replace(PRUNE, MERGE)})."
            )
        grid = work.pooled.size if work.pooled else adapter.grid(work.image)
        takes = removals(merge, grid[0] * grid[1], len(blocks))
        state = TokenState(takes, adapter.prefix, merge.by, work.pooled.size if work.pooled else None)
        checkpointing = getattr(adapter.module, "grad_checkpointing", False)
        adapter.merge(state, blocks)
        work.fewer_tokens = True
        left = [grid[0] * grid[1]]
        for r in takes:
            left.append(left[-1] - r)
        what, how = "token merging", "most similar tokens merged"
        if merge.by == PRUNE:
            what, how = "token pruning", "tokens least attended to fused"
        work.note(
            what,
            f"{adapter.inside(adapter.block_names()[work.first])} and on",
            f"{how}, patch tokens {' → '.join(map(str, left))}; every patch gets its token after the last block",
        )
        if checkpointing and not adapter.module.grad_checkpointing:
            work.note("gradient checkpointing", adapter.name, "turned off: a block that runs again would find other tokens")

    def has_map(self, c: "Candidate") -> bool:
        return self.is_on(c)


TOKENS = Tokens()
