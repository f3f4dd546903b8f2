"""Fewer pixels: the input is resized, and a network of fixed size is made for it."""

import re
from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..parse import (
    Resolution,
    as_hw,
    as_resolution,
    check_resolution,
    format_resolution,
    like,
    name_of,
    parse_resolutions,
)
from .technique import Design, Style, Technique

if TYPE_CHECKING:
    from ..families.adapter import Adapter, Size
    from ..records import Candidate
    from ..reduction import Work

RAGGED = ("error", "floor", "pad")
"""What to do where the patches do not divide the input; see `Candidate.ragged`."""


class InputResolution(Technique):
    """resolution: of the input, in pixels; ragged: what is done with a side that patches do not divide."""

    name, neutral, keyword, option = "resolution", None, "resolutions", "--resolution"
    metavar, help = "SPEC", "96:256:32, 96,128,160 or HxW; default: from the model's own down."
    order, always, refits, sought = 30, True, True, "a resolution"
    styles = {"resolution": Style("#1a8f86", "circle")}

    @property
    def fields(self) -> dict[str, Any]:
        return {"resolution": None, "ragged": "error"}

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        resolution, ragged = values["resolution"], values["ragged"]
        if resolution is not None:
            resolution = check_resolution(resolution)
        if ragged not in RAGGED:
            raise DownresError(
                f"A side that patches do not divide is handled by {', '.join(RAGGED)}; {ragged!r} is none of them."
            )
        return {"resolution": resolution, "ragged": ragged}

    def word(self, c: "Candidate") -> str:
        """`as is`, `128`, `128x128`, `192x384`, `220 pad`."""
        text = "as is" if c.resolution is None else name_of(c.resolution)
        return text if c.ragged == "error" else f"{text} {c.ragged}"

    def read(self, word: str) -> dict[str, Any]:
        """Of a word without blanks: `as_is`, `128`, `192x384`, `pad`."""
        if match := re.fullmatch(r"(\d+)(?:x(\d+))?", word):
            return {"resolution": (int(match[1]), int(match[2])) if match[2] else int(match[1])}
        return {"resolution": None} if word == "as_is" else {"ragged": word} if word in RAGGED else {}

    def columns(self, c: "Candidate") -> dict[str, Any]:
        return {self.name: list(c.resolution) if isinstance(c.resolution, tuple) else c.resolution}

    def defaults(self, design: Design) -> tuple[Resolution, ...]:
        return tuple(default_resolutions(design.native, design.stride))

    def chosen(self, values: tuple[Resolution, ...], design: Design, do_snap: bool, notes: list[str]) -> list[Resolution]:
        """The resolutions to try, as they are named; do_snap: at the nearest multiples of the network's stride, with a note."""
        found = []
        for named in map(as_resolution, values):
            size = placed(named, design)
            snapped = snap(size, design.stride)  # without `do_snap` only for its error
            if do_snap and size not in (snapped, design.native):
                stride = f"a multiple of the network's stride {design.stride}"
                notes.append(f"{name_of(size)} px snapped to {name_of(snapped)}, {stride}")
                size = snapped
            found.append(size)
        return found

    def ragged_notes(self, candidates: list["Candidate"], design: Design) -> list[str]:
        """What is said of those whose input the network's stride does not divide, though what it must divide does."""

        def divides(c: "Candidate", *by: int) -> bool:
            return not any(side % unit for side, unit in zip(as_hw(c.resolution or design.native), by, strict=True))

        stride, unit = design.stride, design.divided_by
        # With patches, what their unit does not divide is refused, cut or padded, and with other patches the stride differs.
        whole = [c for c in candidates if not any(t.refits and not t.always for t in c.techniques)]
        found = [c for c in whole if not divides(c, stride, stride) and (design.patch is None or divides(c, *unit))]
        names = dict.fromkeys(name_of(c.resolution) for c in found if c.resolution not in (None, design.native))
        if not names:
            return []
        return [f"not multiples of the network's stride {stride}, so its feature maps have ragged edges: {', '.join(names)}"]

    def parse_option(self, text: str) -> tuple[Resolution, ...]:
        return tuple(parse_resolutions(text))

    def detail(self, c: "Candidate") -> str:
        """Beside the size, which opens every label."""
        return {"error": "", "floor": "the rest cut off", "pad": "padded"}[c.ragged]

    def apply(self, work: "Work") -> None:
        """Asks of the adapter: `image`, `patch`, `unit`, `resamples_itself`, and `fit(image, patch)`, where `patch` is another
        side that `patch.py` has chosen, or None. `work.image` is then the size in pixels that the network sees.
        """
        from ..reductions.resize import FitInput, ResizeInput

        c, adapter, target, patch = work.candidate, work.adapter, work.target, work.patch
        flexible = adapter is None or (patch is None and work.is_flexible)
        unit = patch or (work.divided_by(target) if c.ragged != "error" or not flexible else (1, 1))
        # A grid of tokens that merging or pooling counts on is of one size, and so is what a network of fixed size takes.
        one_grid = not flexible and adapter is not None and (adapter.resamples_itself or not c.is_input_only)
        exact = one_grid or (not flexible and adapter is not None and adapter.image is not None)
        if c.resolution is not None and work.resize_input:
            size: Resolution = target if exact else c.resolution  # others keep the aspect ratio of what comes
            step = adapter.unit if adapter is not None and not exact else (1, 1)
            work.small.register_forward_pre_hook(ResizeInput(size, work.interpolation, step), with_kwargs=True)
            side = "short side" if isinstance(size, int) else "height x width"
            work.note("input resize", "", f"{side} {name_of(size)} px, {work.interpolation}, antialiased")
        work.image = _fit_input(work, target, unit, exact)
        if work.one_grid and work.image == target and adapter is not None and adapter.image is None:
            work.small.register_forward_pre_hook(FitInput((1, 1), False, target), with_kwargs=True)
        if adapter is None or flexible or work.fit_later:
            return
        image = work.image
        new_size = image != adapter.image if adapter.image is not None else adapter.resamples_itself and work.changes_anything
        if new_size or (patch is not None and patch != adapter.patch):
            before = _geometry(adapter)
            how = adapter.fit(image, patch)
            work.note("input size", adapter.name, f"{before} → {_geometry(adapter)}, {how}")


def _fit_input(work: "Work", target: "Size", unit: "Size", exact: bool) -> "Size":
    """The size that whole units make of `target`, with the hook that cuts or pads to it."""
    from ..reductions.resize import FitInput, fitted

    ragged = work.candidate.ragged
    pad = ragged == "pad"
    size = fitted(target, unit, pad)
    if size == target and (exact or ragged == "error"):
        return target
    if ragged == "error":
        raise DownresError(
            f"{format_resolution(target)} px is not a multiple of {format_resolution(unit)}, which the network divides its "
            "input by: give a multiple, or choose ragged='floor' (cut the rest off) or 'pad' (zeros)."
        )
    if min(size) == 0:
        raise DownresError(
            f"Nothing is left of {format_resolution(target)} px in steps of {format_resolution(unit)}: "
            "pad, or give more pixels."
        )
    work.small.register_forward_pre_hook(FitInput(unit, pad, target if exact else None), with_kwargs=True)
    if size == target:  # only other sizes than this are ragged
        return target
    how = "padded with zeros at the right and bottom" if pad else "cut at the right and bottom"
    work.note("ragged input", "", f"{format_resolution(target)} px {how} to {format_resolution(size)}")
    return size


def _geometry(adapter: "Adapter") -> str:
    words = [f"{format_resolution(adapter.image)} px"] if adapter.image else []
    words += [f"patches of {format_resolution(adapter.patch)} px"] if adapter.patch else []
    return " in ".join(words)


def snap(resolution: Resolution, stride: int) -> Resolution:
    """The resolution with both sides at the nearest multiple of `stride`: off it, feature maps get ragged edges."""
    height, width = as_hw(resolution)
    if min(height, width) < stride:
        raise DownresError(
            f"The resolution {format_resolution(resolution)} is below the network's total stride of {stride}: "
            f"nothing would be left of the feature map; start at {stride} or above."
        )
    snapped = _nearest(height, stride), _nearest(width, stride)
    return snapped[0] if isinstance(resolution, int) else snapped


def placed(resolution: Resolution, design: Design) -> Resolution:
    """`like`, but that the side that only follows goes to the nearest multiple of the stride where the one named is one: of
    360x480 and a stride of 32, 320 is 320x416 and not 320x427.
    """
    size = like(design.native, resolution)
    if not isinstance(resolution, int) or isinstance(size, int) or size == design.native or resolution % design.stride:
        return size
    height, width = (_nearest(side, design.stride) for side in size)
    return height, width


def _nearest(side: int, stride: int) -> int:
    """The nearest multiple, of two the larger."""
    return (2 * side + stride) // (2 * stride) * stride


def default_resolutions(native: Resolution, stride: int) -> list[Resolution]:
    """Multiples of the stride (at least 14) from nine tenths of the original down to a fifth, thinned to at most eight."""
    height, width = as_hw(native)
    step = stride if stride >= 14 else stride * -(-16 // stride)
    short = min(height, width)
    sides = [s for s in range((short - 1) // step * step, 0, -step) if max(short / 5, 2 * stride) <= s <= 0.9 * short]
    while len(sides) > 8:
        # Every second one, the smallest kept: costs fall with the square, so a geometric feel is enough.
        sides = sides[::-2][::-1]
    sizes = (snap((round(height * s / short), round(width * s / short)), stride) for s in sides)
    return list(dict.fromkeys(like(native, size) for size in sizes))


RESOLUTION = InputResolution()
