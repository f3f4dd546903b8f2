"""Fewer channels of a trained network: structured pruning, whole channels taken out with all that depends on them."""

from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from .technique import Factor, Style

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work


class Pruning(Factor):
    """pruning: so much of the network's MACs is left; 1: all. The channels of least norm go, in every layer the same part, and
    what remains has the original's weights: the ladder wins back what that costs.
    """

    prefix = "channels"
    name, neutral, keyword, option = "pruning", 1.0, "prunings", "--pruning"
    metavar, help = "0.7,0.5", "Structured pruning: take channels out until so much of the MACs is left."
    order, seldom = 12, True
    styles = {"pruning": Style("#b0417a", "star")}

    def normalise(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
            raise DownresError(
                f"Pruning leaves a part of the MACs above 0 and at most 1, {value!r} is not: give for example 0.5."
            )
        return float(value)

    def detail(self, c: "Candidate") -> str:
        return f"channels pruned to ×{c.pruning:g} MACs"

    def short(self, c: "Candidate") -> str:
        return f"pruned ×{c.pruning:g}"

    def prepare(self, work: "Work") -> None:
        from ..reductions.pruning import pruned

        c = work.candidate
        network, told = pruned(work.small, c.pruning, work.native)
        work.replace("", network)
        work.note("structured pruning", "", told)


PRUNING = Pruning()
