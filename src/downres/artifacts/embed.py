"""Preprocessing inside the graph: a file beside the model that takes pictures of any size as they were decoded."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..engines.engine import LEAST_OPSET
from ..errors import DownresError
from ..images.decode import MAX_PIXELS
from ..images.preprocess import cover_of, divisor, fill_of
from ..record import sha256, write_whole
from ..records import BGR, Preprocessing
from ..tasks import Task, known_task, restored
from .manifest import (
    PICTURE,
    PREPROCESSED,
    Embedded,
    embedded_in,
    read_manifest,
    refuse_changed,
    resolutions_of,
    served_by,
    write_manifest,
)
from .proof import PIXEL_TOLERANCE, embedded_apart, opened_data
from .serving import takes_numbers


def embed(
    folder: str | Path, *, data: Any = None, threads: int | None = None, task: str | type[Task] | None = None
) -> Embedded:
    """Write beside a shipped model one that has its preprocessing inside; returns what was measured of it.

    It takes the pixels of a decoded picture, uint8 (1, height, width, 3) of any height and width, red, green and blue, and
    answers as the model does. The pixels that it makes of the proof images are compared with those of the preprocessing that
    the model was measured with, and the answers with the model's; both go into the manifest, and `check` measures them again.
    data: where the proof images are now. task: of one's own, where the artifact has one. Raises DownresError where a picture of
    8-bit colours is not what the network takes, and where the pixels are not the same within PIXEL_TOLERANCE of 255 levels.
    """
    known_task(task)
    folder = Path(folder)
    manifest = read_manifest(folder)
    refuse_changed(folder, manifest)
    if len(resolutions_of(manifest)) > 1:
        raise DownresError("Preprocessing is embedded into a model of one resolution, this one has several: serve.py has it.")
    refuse_channels(Preprocessing.from_json(manifest["preprocessing"]))
    own = restored(manifest["task"], manifest)
    dataset, why = opened_data(own, folder, manifest, data)
    if dataset is None:
        raise DownresError(f"What embedding changes is measured on the proof images, and {why}.")
    return embed_with(own, folder, threads)


def embed_with(task: Task, folder: Path, threads: int | None = None) -> Embedded:
    """The same with a task that has the proof images, for an artifact that is whole."""
    manifest = read_manifest(folder)
    p = Preprocessing.from_json(manifest["preprocessing"])
    refuse_numbers(task, p)
    engine, _ = served_by(manifest)
    with tempfile.TemporaryDirectory(prefix="downres-") as place:
        made = Path(place) / embedded_in(engine)
        engine.put_in_front(front(p), folder / engine.file, made)
        found = embedded_apart(task, folder, manifest, made, threads)
        if found.largest_level > PIXEL_TOLERANCE:
            raise DownresError(
                f"The preprocessing cannot be embedded: {engine.text} makes pixels of the proof images that are up to "
                f"{found.largest_level:.3g} of 255 levels off, {PIXEL_TOLERANCE} are allowed; serve.py has it beside the model."
            )
        for file in reversed(engine.files(made)):
            write_whole(folder / file.name, file.read_bytes())
    digests = manifest.pop("sha256")
    names = [file.name for file in engine.files(made)]
    changed = {**manifest, "embedded": found.to_json()}
    write_manifest(folder, {**changed, "sha256": digests | {name: sha256(folder / name) for name in names}})
    return found


def refuse_channels(p: Preprocessing) -> None:
    """DownresError for a network that no picture in colours can serve."""
    if len(p.mean) not in (1, 3):
        raise DownresError(
            f"Preprocessing is embedded for pictures of 8-bit colours, this network takes {len(p.mean)} channels: serve.py has "
            "it beside the model."
        )


def refuse_numbers(task: Task, p: Preprocessing) -> None:
    """DownresError for a network that takes, or was measured on, other numbers than 8-bit colours."""
    refuse_channels(p)
    if takes_numbers(task, p):
        raise DownresError(
            "Preprocessing is embedded for pictures of 8-bit colours, the proof images are numbers of TIFF or .npy files: "
            "serve.py has it beside the model."
        )


class _Nodes:
    """A graph that is written as expressions: `g.Add(a, b)` adds an operator and gives the name of what it makes. Numbers and
    lists become constants, whole ones int64, others float32; arrays keep their type. outer: shares its names and constants.
    """

    def __init__(self, outer: "_Nodes | None" = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = outer.constants if outer else []
        self._count: list[int] = outer._count if outer else [0]

    def _name(self) -> str:
        self._count[0] += 1
        return f"preprocessing/{self._count[0]}"

    def __getattr__(self, operator: str) -> Any:
        def add(*given: Any, called: str = "", **attributes: Any) -> str:
            inputs = [one if isinstance(one, str) else self._constant(one) for one in given]
            name = called or self._name()
            self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
            return name

        return add

    def _constant(self, value: Any) -> str:
        array = np.asarray(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        self.constants.append(numpy_helper.from_array(array, self._name()))
        return self.constants[-1].name


def front(p: Preprocessing) -> onnx.ModelProto:
    """The preprocessing as a graph of standard operators: uint8 (1, height, width, 3) → float32 (1, channels, *p.hw).

    Sizes and offsets are computed in whole numbers, which round as `images.preprocess` does at every size; with the fit 'pad'
    in double precision as there, which OpenVINO takes for single: where a side ends half way between two pixels (at most 28 of
    25,200 sizes) it may be one more or less there. An antialiased resize is a product with the weights of its filter: of ONNX's
    own, ONNX Runtime's linear one treats borders otherwise (up to 17 of 255 levels off), and OpenVINO leaves antialiasing out.
    """
    g = _Nodes()
    size = [g.Shape(PICTURE, start=axis, end=axis + 1) for axis in (1, 2)]  # height, width
    pixels = g.Cast(PICTURE, to=TensorProto.FLOAT)
    if len(p.mean) == 1:  # ITU-R 601 as PIL has it; float32 holds these whole numbers
        weighed = g.ReduceSum(g.Mul(pixels, [19595.0, 38470.0, 7471.0]), [3], keepdims=1)
        pixels = g.Floor(g.Div(g.Add(weighed, 32768.0), 65536.0))
    pixels = g.Transpose(pixels, perm=[0, 3, 1, 2])
    fitted = _cropped(g, pixels, size, p) if p.fit == "crop" else _whole(g, pixels, size, p)
    if p.channel_order == BGR:
        fitted = g.Gather(fitted, [2, 1, 0], axis=1)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (p.mean, p.std))
    scaled = g.Div(fitted, float(divisor(np.dtype(np.uint8), p)))
    g.Div(g.Sub(scaled, mean), std, called=PREPROCESSED)
    taken = helper.make_tensor_value_info(PICTURE, TensorProto.UINT8, [1, "height", "width", 3])
    given = helper.make_tensor_value_info(PREPROCESSED, TensorProto.FLOAT, [1, len(p.mean), *p.hw])
    graph = helper.make_graph(g.nodes, "preprocessing", [taken], [given], g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", LEAST_OPSET)])


def _cropped(g: _Nodes, pixels: str, size: list[str], p: Preprocessing) -> str:
    """The centre of the picture that covers `cover_of(p)`."""
    keep, start, out, first = _centre(g, size, p)
    if p.antialias:
        down, across = (_weights(g, size[i], start[i], keep[i], out[i], first[i], p.hw[i], p) for i in (0, 1))
        return _passes(g, pixels, down, across)
    kept = g.Slice(pixels, *(g.Concat(*ends, axis=0) for ends in (start, _ends(g, start, keep))), [2, 3])
    resized = _resized(g, kept, out, p)
    return g.Slice(resized, *(g.Concat(*ends, axis=0) for ends in (first, _ends(g, first, p.hw))), [2, 3])


def _centre(g: _Nodes, size: list[str], p: Preprocessing) -> tuple[list[str], list[str], list[str], list[str]]:
    """As `images.preprocess.resize_and_crop`, each (height, width): how many pixels are kept, from which on; the size that they
    are resized to, and from where on the input is cut out of that. All are kept but of slivers.
    """
    cover = cover_of(p)
    whole = _covering(g, size, cover)
    sliver = g.Greater(whole[0], g.Div(MAX_PIXELS, whole[1]))
    keep, start = [], []
    for have, other, c, d in zip(size, size[::-1], cover, cover[::-1], strict=True):
        part = g.Add(g.Mul(2, g.Div(g.Add(g.Mul(other, c), d - 1), d)), 2)  # twice the ceiling, and 2
        keep.append(g.Where(sliver, g.Min(have, part), have))
        start.append(_half(g, g.Sub(have, keep[-1])))
    out = _covering(g, keep, cover)
    first = [_half(g, g.Sub(o, side)) for o, side in zip(out, p.hw, strict=True)]
    return keep, start, out, first


def _whole(g: _Nodes, pixels: str, size: list[str], p: Preprocessing) -> str:
    """The whole picture, stretched, or in the upper left corner and the rest filled."""
    out = _shown(g, size, p) if p.fit == "pad" else [g.Identity([side]) for side in p.hw]
    if p.antialias:
        down, across = (_weights(g, have, None, have, o, 0, side, p) for have, o, side in zip(size, out, p.hw, strict=True))
        # Where the picture gets lower and wider, its height comes first; see `images.preprocess`.
        branches = {}
        for name, lower_first in (("then_branch", True), ("else_branch", False)):
            inner = _Nodes(g)
            made = _passes(inner, pixels, down, across, lower_first)
            shape = helper.make_tensor_value_info(made, TensorProto.FLOAT, [1, len(p.mean), *p.hw])
            branches[name] = helper.make_graph(inner.nodes, name, [], [shape])
        lower_and_wider = g.And(g.Less(out[0], size[0]), g.Greater(out[1], size[1]))
        resized = g.If(g.Squeeze(lower_and_wider), **branches)
    else:
        resized = _resized(g, pixels, out, p)
    if p.fit != "pad":
        return resized
    if not p.antialias:
        ends = [g.Sub(side, o) for side, o in zip(p.hw, out, strict=True)]
        resized = g.Pad(resized, g.Concat([0] * 6, *ends, axis=0))
    rows, columns = (g.Less(np.arange(side), o) for side, o in zip(p.hw, out, strict=True))
    fill = np.array(fill_of(p, len(p.mean)), np.float32)[:, None, None]
    return g.Where(g.And(g.Unsqueeze(rows, [1]), columns), resized, fill)


def _covering(g: _Nodes, size: list[str], cover: tuple[int, int]) -> list[str]:
    """`images.preprocess.covering_size`, (height, width) both."""
    (height, width), (tall, wide) = size, cover
    by_width = g.GreaterOrEqual(g.Mul(height, wide), g.Mul(width, tall))
    return [
        g.Where(by_width, g.Max(g.Div(g.Mul(height, wide), width), tall), tall),
        g.Where(by_width, wide, g.Max(g.Div(g.Mul(width, tall), height), wide)),
    ]


def _shown(g: _Nodes, size: list[str], p: Preprocessing) -> list[str]:
    """`images.preprocess.shown_size`."""
    have = [g.Cast(side, to=TensorProto.DOUBLE) for side in size]
    scale = g.Min(*(g.Div(np.array([float(side)]), h) for side, h in zip(p.hw, have, strict=True)))
    rounded = [g.Cast(g.Round(g.Mul(h, scale)), to=TensorProto.INT64) for h in have]
    return [g.Min(g.Max(r, 1), side) for r, side in zip(rounded, p.hw, strict=True)]


def _half(g: _Nodes, whole: str) -> str:
    """Half of a whole number, rounded half to even."""
    half = g.Div(whole, 2)
    odd, half_odd = (g.Sub(n, g.Mul(g.Div(n, 2), 2)) for n in (whole, half))
    return g.Add(half, g.Mul(odd, half_odd))


def _ends(g: _Nodes, start: list[str], many: Sequence[Any]) -> list[str]:
    return [g.Add(s, n) for s, n in zip(start, many, strict=True)]


def _weights(g: _Nodes, have: str, start: str | None, keep: str, out: str, first: Any, count: int, p: Preprocessing) -> str:
    """(have, count): what each of `have` pixels counts in `count` of them from `first` on, when the `keep` of them from `start`
    on (None: all) are resized to `out`, as PIL does: the filter grows with the factor, and its sum within the picture is 1.
    Beyond `out` the last one is repeated.
    """
    x = g.Range(0, g.Squeeze(have), 1)
    x = g.Unsqueeze(x if start is None else g.Sub(x, start), [1])
    o = g.Min(g.Add(np.arange(count), first), g.Sub(out, 1))
    # In whole numbers: pixels are at x + 1/2, those to be at (o + 1/2) * keep / out.
    apart = g.Sub(g.Mul(g.Add(g.Mul(x, 2), 1), out), g.Mul(g.Add(g.Mul(o, 2), 1), keep))
    d = g.Div(g.Abs(g.Cast(apart, to=TensorProto.FLOAT)), g.Cast(g.Mul(g.Max(keep, out), 2), to=TensorProto.FLOAT))
    if p.interpolation == "bilinear":
        weights = g.Relu(g.Sub(1.0, d))
    else:  # a = -0.5
        near = g.Add(g.Mul(g.Mul(g.Sub(g.Mul(d, 1.5), 2.5), d), d), 1.0)
        far = g.Mul(g.Sub(g.Mul(g.Add(g.Mul(g.Sub(d, 5.0), d), 8.0), d), 4.0), -0.5)
        weights = g.Where(g.Less(d, 1.0), near, g.Where(g.Less(d, 2.0), far, 0.0))
    if start is not None:
        kept = g.And(g.GreaterOrEqual(x, 0), g.Less(x, keep))
        weights = g.Mul(weights, g.Cast(kept, to=TensorProto.FLOAT))
    return g.Div(weights, g.ReduceSum(weights, [0], keepdims=1))


def _passes(g: _Nodes, pixels: str, down: str, across: str, lower_first: bool = False) -> str:
    """Both passes of an antialiased resize, each rounded to 8 bits, halves up as PIL and torch do; across, and then down unless
    `lower_first`.
    """
    for axis in (0, 1) if lower_first else (1, 0):
        passed = g.MatMul(pixels, across) if axis else g.MatMul(g.Transpose(down, perm=[1, 0]), pixels)
        pixels = g.Clip(g.Floor(g.Add(passed, 0.5)), 0.0, 255.0)
    return pixels


def _resized(g: _Nodes, pixels: str, size: list[str], p: Preprocessing) -> str:
    """Without antialiasing, as OpenCV's."""
    cubic = {"cubic_coeff_a": -0.75} if p.interpolation == "bicubic" else {}
    how = {"mode": "cubic" if cubic else "linear", "coordinate_transformation_mode": "half_pixel", **cubic}
    resized = g.Resize(pixels, "", "", g.Concat([1, len(p.mean)], *size, axis=0), **how)
    return g.Clip(g.Round(resized), 0.0, 255.0)
