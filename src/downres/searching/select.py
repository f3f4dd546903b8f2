"""From measurements to a decision: gates, the cheapest candidate that is proven."""

from collections.abc import Mapping

from ..parse import FP32, format_quantity
from ..records import Budget, Candidate, Cost, Footprint, Latency, Result

MINIMIZE = ("macs", "memory", "latency", "size")


def over_budget(cost: Cost | None, latency: Latency | None, budget: Budget, footprint: Footprint | None = None) -> str:
    """Why a candidate is stopped before any image is looked at, or ''."""
    if cost and budget.max_macs and cost.macs > budget.max_macs:
        return f"{format_quantity(cost.macs)} MACs are over the {format_quantity(budget.max_macs)} allowed"
    if cost and budget.max_memory_bytes and cost.peak_activation_bytes > budget.max_memory_bytes:
        have, allowed = format_quantity(cost.peak_activation_bytes, "B"), format_quantity(budget.max_memory_bytes, "B")
        return f"{have} of peak activation memory are over the {allowed} allowed"
    if latency and budget.max_size_bytes and footprint is None:
        return "the bytes of its file are not known, as it was measured in torch"
    if footprint and budget.max_size_bytes and footprint.file_bytes > budget.max_size_bytes:
        have, allowed = format_quantity(footprint.file_bytes, "B"), format_quantity(budget.max_size_bytes, "B")
        return f"a file of {have} is over the {allowed} allowed"
    if latency and budget.max_latency_ms and latency.latency_ms > budget.max_latency_ms:
        return f"a median of {latency.latency_ms:.3g} ms is over the {budget.max_latency_ms:.3g} ms allowed"
    return ""


def slower_twin(candidate: Candidate, latencies: Mapping[str, Latency], minimize: str) -> str:
    """Why a file in float32 is not measured, or '': the first runtime computes the same numbers, up to rounding, in less time
    beyond doubt. Nothing is assumed of files in other precisions.
    """
    twin, own = latencies.get(str(candidate.network)), latencies.get(str(candidate))
    if minimize != "latency" or candidate.runtime is None or candidate.precision != FP32 or not twin or not own:
        return ""
    if not twin.ratio or not own.ratio or own.ratio[1] >= twin.ratio[0]:
        return ""
    return (
        f"computes what {candidate.network} computes in {twin.runtime}, and in more time "
        f"({own.latency_ms:.3g} and {twin.latency_ms:.3g} ms)"
    )


def is_measured_alone(candidate: Candidate) -> bool:
    """Whether it names torch beside another runtime of the run: what would ship is another candidate's file."""
    return candidate.runtime is not None and candidate.runtime.partition(":")[0] == "torch"


def expense(result: Result, minimize: str) -> tuple[float, float]:
    """What 'cheapest' sorts by: the chosen measure, MACs to break ties."""
    assert result.cost is not None
    macs = float(result.cost.macs)
    if minimize == "memory":
        return float(result.cost.peak_activation_bytes), macs
    if minimize == "latency":
        return result.latency.latency_ms if result.latency else float("inf"), macs
    if minimize == "size":
        return float(result.footprint.file_bytes) if result.footprint else float("inf"), macs
    return macs, float(result.cost.peak_activation_bytes)


def select(results: list[Result], minimize: str) -> Result | None:
    """The cheapest candidate that is proven within the allowed drop. Nothing is assumed of the curve's shape."""
    proven = [r for r in results if r.status == "measured" and not r.reason and r.proven]
    return min(proven, key=lambda r: expense(r, minimize), default=None)
