"""Which candidates to try: resolutions snapped to the network's stride, input and stem variants."""

from ..errors import DownresError
from ..parse import Resolution, as_hw, as_resolution, format_resolution
from ..records import Candidate

STEM_SCALES = (0.75, 0.5)
"""Factors of the 'after the embedding' variants, at the original's input resolution."""


def snap(resolution: Resolution, stride: int) -> Resolution:
    """The resolution with both sides at the nearest multiple of `stride`: off it, feature maps get ragged edges."""
    height, width = as_hw(resolution)
    if min(height, width) < stride:
        raise DownresError(
            f"The resolution {format_resolution(resolution)} is below the network's total stride of {stride}: "
            f"nothing would be left of the feature map; start at {stride} or above."
        )
    return as_resolution((round(height / stride) * stride, round(width / stride) * stride))


def default_resolutions(native: Resolution, stride: int) -> list[Resolution]:
    """Multiples of the stride (at least 16) from nine tenths of the original down to a fifth, thinned to at most eight."""
    height, width = as_hw(native)
    step = stride if stride >= 16 else stride * -(-16 // stride)
    short = min(height, width)
    sides = [s for s in range((short - 1) // step * step, 0, -step) if max(short / 5, 2 * stride) <= s <= 0.9 * short]
    while len(sides) > 8:
        # Every second one, the smallest kept: costs fall with the square, so a geometric feel is enough.
        sides = sides[::-2][::-1]
    return list(dict.fromkeys(snap((round(height * s / short), round(width * s / short)), stride) for s in sides))


def plan(
    native: Resolution, stride: int, resolutions: list[Resolution] | None, stem_scales: tuple[float, ...], do_snap: bool = True
) -> tuple[list[Candidate], list[str]]:
    """(candidates, notes): the input variants from large to small, then the stem variants at the native resolution."""
    notes = []
    if resolutions is None:
        chosen = default_resolutions(native, stride)
    elif not do_snap:
        chosen = resolutions
        for r in chosen:
            snap(r, stride)  # only for its error
        ragged = [format_resolution(r) for r in chosen if any(side % stride for side in as_hw(r))]
        if ragged:
            notes.append(
                f"not multiples of the network's stride {stride}, so its feature maps have ragged edges: {', '.join(ragged)}"
            )
    else:
        chosen = []
        for r in resolutions:
            # The original's own resolution is a reference point: it stays as it is.
            snapped = r if r == native else snap(r, stride)
            if snapped != r:
                notes.append(
                    f"{format_resolution(r)} px snapped to {format_resolution(snapped)}, "
                    f"a multiple of the network's stride {stride}"
                )
            chosen.append(snapped)
    candidates = [Candidate(r) for r in chosen] + [Candidate(native, scale) for scale in stem_scales]
    return [c for c in dict.fromkeys(candidates) if c != Candidate(native)], notes
