"""Text to values and back: resolutions, sizes with units. Pure functions, no torch."""

import math
import os
import re
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any

from .errors import DownresError

MAX_RESOLUTION = 8192
"""Largest side accepted, in pixels: above it a typing error is likelier than a wish."""

Resolution = int | tuple[int, int]
"""The short side, the aspect ratio kept, or (height, width), in pixels. A square pair is no number: of a street scene 64 is
64x128, and (64, 64) a square.
"""


def as_hw(resolution: Resolution) -> tuple[int, int]:
    """(height, width) in pixels of a resolution given either way, of one number a square; DownresError for what is none."""
    try:
        sides = tuple(map(index, resolution)) if isinstance(resolution, (tuple, list)) else (index(resolution),) * 2
        height, width = sides
    except (TypeError, ValueError):
        raise DownresError(
            f"A resolution is a whole number of pixels or (height, width), {resolution!r} is neither: give 160 or (192, 384)."
        ) from None
    return height, width


def as_resolution(given: Resolution | list[int]) -> Resolution:
    """One number as one, a pair as a pair, of Python's own integers; DownresError for anything else."""
    height, width = as_hw(given)  # type: ignore[arg-type]
    return (height, width) if isinstance(given, (tuple, list)) else height


def short_form(size: Resolution) -> Resolution:
    """Of a size, in which nothing is left to be kept: one number for a square, else (height, width)."""
    height, width = as_hw(size)
    return height if height == width else (height, width)


def like(native: Resolution, resolution: Resolution) -> Resolution:
    """The size that a resolution means for a network used at the size `native`: of one number, the short side, the other one
    follows the aspect ratio; in short form where the network is used on squares, so that 160 and (160, 160) are the same.
    """
    (height, width), resolution = as_hw(native), as_resolution(resolution)
    if not isinstance(resolution, int):
        return short_form(resolution) if height == width else resolution
    if height == width:
        return resolution
    short = min(height, width)
    return round(height * resolution / short), round(width * resolution / short)


def format_resolution(size: Resolution) -> str:
    """Of a size: `160`, `192x384`."""
    height, width = as_hw(size)
    return str(height) if height == width else f"{height}x{width}"


def name_of(resolution: Resolution) -> str:
    """As `parse_resolutions` reads it: `160`, `160x160`, `192x384`."""
    return str(resolution) if isinstance(resolution, int) else f"{resolution[0]}x{resolution[1]}"


def check_resolution(resolution: Resolution) -> Resolution:
    """The resolution as it is given, or an error when a side is not in 1…MAX_RESOLUTION."""
    resolution = as_resolution(resolution)
    for side in as_hw(resolution):
        if not 1 <= side <= MAX_RESOLUTION:
            raise DownresError(
                f"A resolution is between 1 and {MAX_RESOLUTION} pixels, {side} is not: "
                "give for example 96:256:32, 96,128,160 or 192x384."
            )
    return resolution


def parse_resolutions(text: str) -> list[Resolution]:
    """`96:256:32` (both ends included), `96,128,160`, `192x384`, or a mixture with commas. The default step is 32.

    Returns the distinct resolutions in the order given. Raises DownresError for anything else.
    """
    found: list[Resolution] = []
    for part in text.split(","):
        part = re.sub(r"\s*([:x×])\s*", r"\1", part.strip())  # spaces around a sign, not "64 96" for 6496
        if match := re.fullmatch(r"(-?\d{1,9}):(-?\d{1,9})(?::(-?\d{1,9}))?", part):
            first, last = int(match[1]), int(match[2])
            step = abs(int(match[3] or 32))
            for side in (first, last):
                check_resolution(side)
            if step == 0:
                raise DownresError(f"The step of a resolution range must not be 0: {part!r}. Give for example 96:256:32.")
            low, high = sorted((first, last))
            sides = list(range(low, high + 1, step)) if first <= last else list(range(high, low - 1, -step))
            found += sides
        elif match := re.fullmatch(r"(-?\d{1,9})[x×](-?\d{1,9})", part):
            found.append(check_resolution((int(match[1]), int(match[2]))))
        elif re.fullmatch(r"-?\d{1,9}", part):
            found.append(check_resolution(int(part)))
        else:
            raise DownresError(
                f"Cannot read the resolution {part!r}: give a range 96:256:32, a list 96,128,160 or a height x width 192x384."
            )
    return list(dict.fromkeys(found))


def integers(text: str, option: str) -> list[int]:
    """`20,24`; option: whose text it is, for the error."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DownresError(
            f"Cannot read {text!r} for {option}: give whole numbers with commas between them, for example 20,24."
        ) from None


def floats(text: str, option: str) -> list[float]:
    """`0.5,0.75`, all finite; option: whose text it is, for the error."""
    try:
        found = [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
        return found
    except ValueError:
        raise DownresError(
            f"Cannot read {text!r} for {option}: give numbers with commas between them, for example 0.5,0.5,0.5."
        ) from None


def fraction(text: str, option: str) -> float:
    """`0.5`, `1/255`; option: whose text it is, for the error."""
    try:
        above, _, below = text.partition("/")
        found = float(above) / float(below or 1)
        if not math.isfinite(found):
            raise ValueError
        return found
    except (ValueError, ZeroDivisionError):
        raise DownresError(f"Cannot read {text!r} for {option}: give a number or a fraction, for example 1/255.") from None


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path with `~` made a home folder; DownresError where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DownresError(
            f"There is no home folder of {Path(path).parts[0]}: write the path out, or ./{path} for a folder of that name."
        ) from None


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a name stands for several files: shards-{000..146}.tar, data/*.parquet."""
    return any(mark in str(path) for mark in "*?[{")


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether data are at that place, as far as their name alone tells: of a name for several files who opens them says it."""
    return user_path(path).exists() or is_pattern(path)


def refuse_missing(data: Any) -> None:
    """DownresError where `data` names a folder that is not there: said before a model is loaded, which may take a while."""
    if isinstance(data, (str, os.PathLike)) and ":" not in str(data) and not is_there(data):
        raise DownresError(f"There is no folder {user_path(data)}: point `data` to a folder of images.")


_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_quantity(text: str | int | float, what: str) -> int:
    """`500M`, `4.1G`, `20MB`, `20MiB`, `1e9` → a whole number. K, M, G, T are powers of 1000; Ki, Mi, Gi of 1024."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*(?:([kKMGT])(i?))?\s*(?:[bB]|MACs?)?\s*", str(text))
    try:
        if match is None:
            raise ValueError
        prefix = (match[2] or "").upper()
        scale = 1024 ** " KMGT".index(prefix or " ") if match[3] else _UNITS[prefix]
        value = round(float(match[1]) * scale)
    except (ValueError, OverflowError):
        raise DownresError(f"Cannot read {text!r} as {what}: give a number with a unit, for example 500M or 20MB.") from None
    if value <= 0:
        raise DownresError(f"{what[:1].upper()}{what[1:]} must be above 0, {text!r} is not.")
    return value


def format_quantity(value: float, unit: str = "", digits: int = 3) -> str:
    """4089184256 → `4.09 G`; so many significant digits, powers of 1000."""
    prefixes = ["", "k", "M", "G", "T"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    text = f"{value:.0f}" if abs(value) >= 999.5 or float(value).is_integer() else f"{value:.{digits}g}"
    return f"{text} {prefixes[0]}{unit}".rstrip()


FP32, BF16, FP16, INT8 = "fp32", "bf16", "fp16", "int8"
PRECISIONS = (FP32, BF16, FP16, INT8)
"""What a file computes in."""
RUNTIMES = ("onnxruntime", "openvino", "torch")
"""Names of engines; `onnxruntime:cuda` names the device too."""
_RUNTIME = re.compile(rf"({'|'.join(RUNTIMES)})(?::([a-z]\w*))?")


def is_runtime(text: Any) -> bool:
    return isinstance(text, str) and _RUNTIME.fullmatch(text) is not None


def check_runtime(name: Any) -> str:
    """The name itself; DownresError for one that no engine has."""
    if not is_runtime(name):
        raise DownresError(
            f"Unknown runtime {name!r}: choose from {', '.join(RUNTIMES)}, with a device after a colon where it is not "
            "the CPU (onnxruntime:cuda)."
        )
    return str(name).removesuffix(":cpu")


def check_runtimes(given: str | Iterable[Any]) -> tuple[str, ...]:
    """Several names, or a text of them with commas between, each once; DownresError for none, and one that no engine has."""
    words = [word.strip() for word in given.split(",") if word.strip()] if isinstance(given, str) else given
    if not (names := tuple(dict.fromkeys(map(check_runtime, words)))):
        raise DownresError(f"Name a runtime: {', '.join(RUNTIMES)}.")
    return names
