"""Which candidates to try: one family for each way to look at fewer pixels or tokens, sizes snapped to the network."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DownresError
from ..parse import Resolution, as_hw, as_resolution, format_resolution
from ..records import Candidate, Merge

STEM_SCALES = (0.75, 0.5)
"""Factors of the 'after the embedding' variants, at the original's input resolution."""
PATCH_FACTORS = (1.25, 1.5, 2.0)
"""Larger patches, as factors of the original's; past about 1.25 they need more than a new head."""
KEPT = (0.75, 0.5, 0.25)
"""Fractions of the patch tokens that are left after the last block, of the merging variants."""


@dataclass(frozen=True)
class Axes:
    """What to try, each along its own axis; None takes the default of the network, () leaves the axis out.

    resolutions: of the input. stem_scales: resample after the embedding. patch_sizes: in pixels. merges: `Merge`, or
    what it is made of (8, 0.5, '8-decreasing'). candidates: as they are, in any combination, also as text.
    ragged: what patches do where they do not divide the input: 'error', 'floor' (cut) or 'pad'. snap: take resolutions to
    multiples of the network's stride.
    """

    resolutions: tuple[Resolution, ...] | None = None
    stem_scales: tuple[float, ...] | None = None
    patch_sizes: tuple[int, ...] | None = None
    merges: tuple[Merge | int | float | str, ...] | None = None
    candidates: tuple[Candidate, ...] = ()
    ragged: str = "error"
    snap: bool = True

    def __post_init__(self) -> None:
        for name in ("resolutions", "stem_scales", "patch_sizes", "merges"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        read = tuple(Candidate.parse(c) if isinstance(c, str) else c for c in self.candidates)
        object.__setattr__(self, "candidates", read)
        Candidate(ragged=self.ragged)  # these two only for their errors, before anything is opened
        self.free()

    def free(self) -> list[Candidate]:
        """The variants that have no resolution of their own yet."""
        return [
            *(Candidate(stem_scale=scale) for scale in self.stem_scales or ()),
            *(Candidate(patch_size=size) for size in self.patch_sizes or ()),
            *(Candidate(merge=merge) for merge in self.merges or ()),  # type: ignore[arg-type]
        ]


def make_axes(
    resolutions: Sequence[Resolution] | None = None,
    stem_scales: Sequence[float] | None = None,
    patch_sizes: Sequence[int] | None = None,
    merges: Sequence[Merge | int | float | str] | None = None,
    candidates: Sequence[Candidate | str] = (),
    ragged: str = "error",
) -> Axes:
    """Axes from what a caller gives: sequences of any kind, candidates also as text."""

    def fixed(values: Sequence | None) -> tuple | None:
        return None if values is None else tuple(values)

    read = tuple(Candidate.parse(c) if isinstance(c, str) else c for c in candidates)
    return Axes(fixed(resolutions), fixed(stem_scales), fixed(patch_sizes), fixed(merges), read, ragged)


@dataclass(frozen=True)
class Design:
    """What the plan needs to know of a network: its resolution, total stride, patch side, and whether it has a sequence.

    unit: what height and width are divided by, None: the total stride.
    """

    native: Resolution
    stride: int
    patch: int | None = None
    sequence: bool = False
    unit: tuple[int, int] | None = None


def snap(resolution: Resolution, stride: int) -> Resolution:
    """The resolution with both sides at the nearest multiple of `stride`: off it, feature maps get ragged edges."""
    height, width = as_hw(resolution)
    if min(height, width) < stride:
        raise DownresError(
            f"The resolution {format_resolution(resolution)} is below the network's total stride of {stride}: "
            f"nothing would be left of the feature map; start at {stride} or above."
        )
    return as_resolution((round(height / stride) * stride, round(width / stride) * stride))


def like(native: Resolution, resolution: Resolution) -> Resolution:
    """The resolution; one number, for a network that is not used on squares, as the short side with its aspect ratio kept."""
    if isinstance(native, int) or not isinstance(resolution, int):
        return resolution
    short = min(native)
    return as_resolution((round(native[0] * resolution / short), round(native[1] * resolution / short)))


def default_resolutions(native: Resolution, stride: int) -> list[Resolution]:
    """Multiples of the stride (at least 14) from nine tenths of the original down to a fifth, thinned to at most eight."""
    height, width = as_hw(native)
    step = stride if stride >= 14 else stride * -(-16 // stride)
    short = min(height, width)
    sides = [s for s in range((short - 1) // step * step, 0, -step) if max(short / 5, 2 * stride) <= s <= 0.9 * short]
    while len(sides) > 8:
        # Every second one, the smallest kept: costs fall with the square, so a geometric feel is enough.
        sides = sides[::-2][::-1]
    return list(dict.fromkeys(snap((round(height * s / short), round(width * s / short)), stride) for s in sides))


def default_axes(design: Design, axes: Axes) -> Axes:
    """The axes with the network's defaults where the caller has not chosen."""
    patches: tuple[int, ...] = ()
    if design.patch is not None and design.sequence:
        sides = (round(design.patch * factor) for factor in PATCH_FACTORS)
        patches = tuple(s for s in sides if s <= min(as_hw(design.native)) // 2)
    defaults: dict[str, Any] = {
        "resolutions": tuple(default_resolutions(design.native, design.stride)),
        "stem_scales": STEM_SCALES,
        "patch_sizes": patches,
        "merges": tuple(Merge(keep=keep) for keep in KEPT) if design.sequence else (),
    }
    return dataclasses.replace(axes, **{name: value for name, value in defaults.items() if getattr(axes, name) is None})


def plan(design: Design, axes: Axes, do_snap: bool = True) -> tuple[list[Candidate], list[str]]:
    """(candidates, notes): input variants from large to small, then the others at the native resolution, then those given."""
    notes: list[str] = []
    do_snap = do_snap and axes.ragged == "error"  # who says how to treat ragged sizes wants them
    unit = design.unit or (design.stride, design.stride)
    candidates = [Candidate(r, ragged=_ragged(axes, r, unit)) for r in _resolutions(design, axes, do_snap, notes)]
    for variant in axes.free():
        resolution = design.native
        if (patch := variant.patch_size) is not None:
            height, width = as_hw(resolution)
            if patch > min(height, width):
                raise DownresError(
                    f"A patch of {patch} px is larger than the image of {format_resolution(resolution)} px: "
                    "give a smaller patch."
                )
            if (height % patch or width % patch) and do_snap:
                # The same image, as nearly as whole patches allow.
                resolution = as_resolution((height // patch * patch, width // patch * patch))
                notes.append(f"patches of {patch} px look at {format_resolution(resolution)} px, a multiple of them")
        ragged = _ragged(axes, resolution, unit if patch is None else (patch, patch))
        candidates.append(dataclasses.replace(variant, resolution=resolution, ragged=ragged))
    # What is given whole is taken as it is; without a resolution it is meant at the original's.
    candidates += [c.at(design.native if c.resolution is None else like(design.native, c.resolution)) for c in axes.candidates]
    return [c for c in dict.fromkeys(candidates) if c != Candidate(design.native)], notes


def check_trained(candidates: list[Candidate]) -> None:
    """DownresError for a candidate whose weights would be drawn anew: there is no accuracy of it to measure yet."""
    for c in candidates:
        if c.depth is not None or c.width != 1.0:
            raise DownresError(
                f"{c} is another network that has to be trained first, here accuracy of a trained one is measured: "
                "count its cost with downres cost."
            )


def _ragged(axes: Axes, resolution: Resolution, unit: tuple[int, int]) -> str:
    return axes.ragged if any(side % u for side, u in zip(as_hw(resolution), unit, strict=True)) else "error"


def _resolutions(design: Design, axes: Axes, do_snap: bool, notes: list[str]) -> list[Resolution]:
    chosen, stride = [like(design.native, r) for r in axes.resolutions or ()], design.stride
    if not do_snap:
        for r in chosen:
            snap(r, stride)  # only for its error
        ragged = [format_resolution(r) for r in chosen if any(side % stride for side in as_hw(r))]
        if ragged:
            notes.append(
                f"not multiples of the network's stride {stride}, so its feature maps have ragged edges: {', '.join(ragged)}"
            )
        return chosen
    found = []
    for r in chosen:
        # The original's own resolution is a reference point: it stays as it is.
        snapped = r if r == design.native else snap(r, stride)
        if snapped != r:
            notes.append(
                f"{format_resolution(r)} px snapped to {format_resolution(snapped)}, "
                f"a multiple of the network's stride {stride}"
            )
        found.append(snapped)
    return found
