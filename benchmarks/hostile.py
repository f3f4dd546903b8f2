"""What `faults.py` feeds to downres: pictures, checkpoints and graphs that are damaged, odd, or made to do harm."""

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import TensorProto, helper
from PIL import Image


def pictures(side: int = 40) -> dict[str, bytes]:
    """Whole files of every format that is read, in the ways that each is written, by name."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 255, side)[:, None, None] * np.linspace(0.2, 1, side)[None, :, None] * np.array([1, 0.6, 0.3])
    colour = Image.fromarray(np.clip(smooth + rng.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8))
    grey, palette, alpha = colour.convert("L"), colour.convert("P"), colour.convert("RGBA")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = 6
    frames = {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}
    ways: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (colour, "JPEG", {}), "jpeg progressive": (colour, "JPEG", {"progressive": True}),
        "jpeg grey": (grey, "JPEG", {}), "jpeg cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "jpeg turned": (colour, "JPEG", {"exif": exif}), "jpeg restarts": (colour, "JPEG", {"restart_marker_blocks": 1}),
        "png": (colour, "PNG", {}), "png 16 bits": (deep, "PNG", {}), "png palette": (palette, "PNG", {"transparency": 3}),
        "png alpha": (alpha, "PNG", {}), "png 1 bit": (grey.convert("1"), "PNG", {}), "png moving": (colour, "PNG", frames),
        "webp": (colour, "WEBP", {}), "webp exact": (alpha, "WEBP", {"lossless": True}),
        "webp moving": (colour, "WEBP", frames),
        "gif": (palette, "GIF", {}), "gif moving": (palette, "GIF", frames),
        "bmp": (colour, "BMP", {}), "bmp palette": (palette, "BMP", {}),
        "ppm": (colour, "PPM", {}), "pgm": (grey, "PPM", {}), "pgm 16 bits": (deep, "PPM", {}),
        "pbm": (grey.convert("1"), "PPM", {}),
        "avif": (colour, "AVIF", {}), "avif turned": (colour, "AVIF", {"exif": exif}),
        **{
            f"tiff {how}": (colour, "TIFF", {"compression": how})
            for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        },
        "tiff 16 bits": (deep, "TIFF", {}), "tiff fax": (grey.convert("1"), "TIFF", {"compression": "group4"}),
        "tiff float": (grey.convert("F"), "TIFF", {}),
    }  # fmt: skip
    made = {}
    for name, (image, kind, how) in ways.items():
        content = io.BytesIO()
        try:
            image.save(content, kind, **how)
        except (KeyError, OSError):  # this build of PIL does not write it
            continue
        made[name] = content.getvalue()
    values = np.asarray(colour)
    for name, array in {"npy": values, "npy grey": np.asarray(deep), "npy floats": values.transpose(2, 0, 1) / 255}.items():
        content = io.BytesIO()
        np.save(content, array)
        made[name] = content.getvalue()
    with contextlib.suppress(ImportError):  # the one writer of 16-bit colours, which not everyone has
        import tifffile

        for name, how in {"tiff 16-bit colours": {}, "tiff in planes": {"planarconfig": "separate"}}.items():
            content = io.BytesIO()
            planes = values.astype(np.uint16) * 257 if not how else values.transpose(2, 0, 1).astype(np.uint16) * 257
            tifffile.imwrite(content, planes, photometric="rgb", **how)
            made[name] = content.getvalue()
    made["ppm in letters"] = b"P3 2 2 255 " + b"9 8 7 6 5 4 3 2 1 0 255 128"
    return made


def mutated(content: bytes, other: bytes, chance: random.Random) -> tuple[str, bytes]:
    """(how, another file): flips, cuts, edits of the header, numbers put to their extremes, chunks moved, doubled, spliced."""
    data = bytearray(content)
    how = chance.choice(["flips", "header", "cut", "number", "splice", "double", "removed", "filled", "tail", "swapped"])
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    if how == "flips":
        for _ in range(chance.choice([1, 1, 2, 5, 20, 100])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "header":
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(min(64, len(data)))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
    elif how == "cut":
        del data[a:]
    elif how == "number":
        size = chance.choice([1, 2, 4, 8])
        at = chance.randrange(max(1, min(len(data) - size, chance.choice([100, len(data)]))))
        value = chance.choice(
            [0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 65536 % 2 ** (8 * size)]
        )
        data[at : at + size] = value.to_bytes(size, chance.choice(["big", "little"]))
    elif how == "splice":
        data[a:] = other[chance.randrange(len(other)) :]
    elif how == "double":
        data[b:b] = data[a:b] * chance.randint(1, 3)
    elif how == "removed":
        del data[a : min(b, a + 64)]
    elif how == "filled":
        data[a:b] = bytes([chance.choice([0, 255, 0x41])]) * (b - a)
    elif how == "tail":
        data += other
    else:
        data = data[a:b] + data[:a] + data[b:]
    return how, bytes(data)


class Payload:
    """A file appears where this is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def checkpoints(
    weights: dict[str, torch.Tensor], marker: Path, chance: random.Random, cuts: int
) -> Iterator[tuple[str, str, bool | None, Callable[[Path], Any]]]:
    """(name, file name, is it these weights, writes the file); None: they may come out otherwise or not at all."""

    def saved(content: Any, **how: Any) -> Callable[[Path], Any]:
        return lambda file: torch.save(content, file, **how)

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + name: value for name, value in weights.items()}

    first = next(name for name in weights if weights[name].ndim > 1)
    itself: dict[Any, Any] = {}
    itself["state_dict"] = itself
    nested: dict[str, Any] = dict(weights)
    for _ in range(200):
        nested = {"model": nested}
    quantized = torch.quantize_per_tensor(weights[first].flatten(1), 0.1, 0, torch.qint8)
    right: dict[str, Any] = {
        "bare": weights, "wrapped": {"state_dict": weights}, "ordered": collections.OrderedDict(weights),
        "prefix": {"state_dict": under("module.model._orig_mod.")}, "ema": {"ema": weights, "epoch": 3},
        "arguments": {"model": weights, "args": argparse.Namespace(lr=0.1)}, "numpy": {"model": weights, "best": np.float64(1)},
        "odd keys": {**weights, 0: torch.zeros(1), None: 3, (1, 2): "x"},
        "sparse": {**weights, first: weights[first].to_sparse()},
        "optimizer": {"state_dict": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(10)}}}},
        "strided": {k: v.flip(0).flip(0).t().contiguous().t() if v.ndim == 2 else v for k, v in weights.items()},
        "parameters": {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in weights.items()},
        "itself beside": {"state_dict": weights, "x": itself},
    }  # fmt: skip
    refused: dict[str, Any] = {
        "itself": itself, "a list": list(weights.values()), "a tensor": weights[first], "nothing": {}, "text": "weights",
        "quantized": {**weights, first: quantized}, "meta": {**weights, first: weights[first].to("meta")},
        "complex": {**weights, first: weights[first].to(torch.complex64)}, "whole": {**weights, first: weights[first].int()},
        "boolean": {**weights, first: weights[first] > 0}, "other keys": {f"{i}": torch.zeros(3) for i in range(99)},
        "one lacking": {k: v for k, v in weights.items() if k != first}, "wrong shape": {**weights, first: torch.zeros(2, 2)},
        "no side": {**weights, first: torch.zeros(())}, "empty": {**weights, first: torch.zeros(0, 3)},
        "none": {**weights, first: None}, "text in it": {**weights, first: "x"},
        "expanded": {**weights, first: torch.zeros(1).expand(10**6, 10**6)},
        "many sides": {**weights, first: torch.zeros((1,) * 60)},
    }  # fmt: skip
    for name, content in right.items():
        yield name, "w.pth", None if "sparse" in name else True, saved(content)
        yield f"{name}, old", "w.pth", None if "sparse" in name else True, saved(content, _use_new_zipfile_serialization=False)
    for name, content in refused.items():
        yield name, "w.pth", False, saved(content)
    yield "nested", "w.pth", None, saved(nested)
    for place in ("alone", "inside", "as a key"):
        payload = Payload(marker)
        told: Any = {"alone": payload, "inside": {"state_dict": weights, "x": payload}, "as a key": {**weights, "x": [payload]}}
        for old in (False, True):
            yield f"code {place} {old}", "w.pth", False, saved(told[place], _use_new_zipfile_serialization=not old)
        for protocol in range(6):
            content = pickle.dumps(told[place], protocol=protocol)
            yield f"code {place}, pickle {protocol}", "w.pth", False, _writes(content)
    for name, code in {
        "memo": b"\x80\x02" + b"q\x01" * 10, "deep": b"(" * 100_000 + b".", "long": b"\x80\x02\x8a\xff" + b"1" * 255 + b".",
        "huge": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x", "stop": b".", "lists": b"\x80\x02" + b"]" * 100_000 + b".",
        "bomb": b"\x80\x02]q\x00" + b"".join(b"(h%ch%ce" % (0, 0) for _ in range(20)) + b".",
    }.items():  # fmt: skip
        yield f"pickle {name}", "w.pth", False, _writes(code)
        yield f"zipped {name}", "w.pth", False, _zipped({"w/data.pkl": code, "w/version": b"3\n"})
    yield "zip bomb", "w.pth", False, _zipped({"w/data.pkl": b"\0" * (64 << 20), "w/version": b"3\n"})
    yield "many names", "w.pth", False, _zipped({f"w/{i}": b"" for i in range(20_000)})
    yield "escaping names", "w.pth", False, _zipped({"../../w/data.pkl": b".", "/etc/x": b"y"})
    yield "other zip", "w.pth", False, _zipped({"word/document.xml": b"<x/>"})
    yield "a folder", "w.pth", False, lambda file: file.mkdir()
    yield "a pipe", "w.pth", False, lambda file: os.mkfifo(file)
    yield "a circle", "w.pth", False, lambda file: file.symlink_to(file)
    yield "endless", "w.pth", False, lambda file: file.symlink_to("/dev/zero")
    plain = {name: value.contiguous().clone() for name, value in weights.items()}
    yield "safetensors", "w.safetensors", True, lambda file: safetensors.torch.save_file(plain, file)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    whole = {"w.pth": buffer.getvalue(), "w.safetensors": safetensors.torch.save(plain)}
    for name, header in {
        "beyond": {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}},
        "overlapping": {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")},
        "negative": {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        "unknown type": {"a": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}},
        "backwards": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        "overflowing": {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 8]}},
        "no object": [1, 2],
    }.items():
        text = json.dumps(header).encode()
        yield f"lies: {name}", "w.safetensors", False, _writes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    yield "lies: long header", "w.safetensors", False, _writes(struct.pack("<Q", 2**60) + b"{}")
    yield "lies: deep header", "w.safetensors", False, _writes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    for i in range(cuts):
        ending = chance.choice(list(whole))
        how, content = mutated(whole[ending], whole["w.pth"], chance)
        yield f"{ending} {how} {i}", ending, None, _writes(content)  # a mutated .pth is these weights or refused: see `loaded`


def _writes(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


def _zipped(files: dict[str, bytes]) -> Callable[[Path], Any]:
    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    return write


def graphs(shape: tuple[int, int, int], answers: int) -> Iterator[tuple[str, bytes, bool | None]]:
    """(name, ONNX file, is it fit to be used; None: perhaps) for networks of (batch, *shape) → (batch, answers)."""
    whole = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *shape])
    axes = {"axes": [1, 2, 3], "keepdims": 0}

    def model(nodes: list[Any], given: list[Any], taken: tuple[Any, ...] = (whole,), tensors: list[Any] | None = None) -> bytes:
        graph = helper.make_graph(nodes, "g", list(taken), given, tensors or [])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        return made.SerializeToString()  # type: ignore[no-any-return]

    def logits(values: list[float], name: str = "logits") -> tuple[list[Any], list[Any]]:
        nodes = [
            helper.make_node("ReduceMean", ["input"], ["mean"], **axes),
            helper.make_node("Unsqueeze", ["mean", "one"], ["column"]),
            helper.make_node("Mul", ["column", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "values"], [name]),
        ]
        tensors = [
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
            helper.make_tensor("values", TensorProto.FLOAT, [1, len(values)], values),
        ]
        return nodes, tensors

    def value(name: str = "logits", kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, None)

    good = [float(i) for i in range(answers)]
    nodes, tensors = logits(good)
    yield "right", model(nodes, [value()], tensors=tensors), True
    for name, values in {
        "nan": [*good[1:], float("nan")], "infinite": [*good[1:], float("inf")], "one more": [*good, 1.0], "one less": good[1:],
    }.items():  # fmt: skip
        other, more = logits(values)
        yield name, model(other, [value()], tensors=more), False
    extra = helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch"])
    small = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", shape[0], 8, 8])
    flat = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "n"])
    number = helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", *shape])
    text = helper.make_tensor_value_info("input", TensorProto.STRING, ["batch", *shape])
    renamed = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *shape])
    yield "two inputs", model(nodes, [value()], (whole, extra), tensors), False
    yield "a smaller input", model(nodes, [value()], (small,), tensors), False
    yield "a flat input", model(nodes, [value()], (flat,), tensors), False
    yield "whole numbers in", model(nodes, [value()], (number,), tensors), False
    yield "text in", model(nodes, [value()], (text,), tensors), False
    constant = helper.make_node(
        "Constant", [], ["logits"], value=helper.make_tensor("v", TensorProto.FLOAT, [1, answers], good)
    )
    yield "no input", model([constant], [value()], ()), False
    yield "another input", model([helper.make_node("Identity", ["image"], ["logits"])], [value()], (renamed,)), False
    yield "no output", model(nodes, [], tensors=tensors), False
    two = [*nodes, helper.make_node("Identity", ["logits"], ["other"])]
    yield "two outputs", model(two, [value(), value("other")], tensors=tensors), False
    yield "another output", model(two, [value("other")], tensors=tensors), False
    words = [nodes[0], helper.make_node("Cast", ["mean"], ["logits"], to=TensorProto.STRING)]
    yield "text out", model(words, [value(kind=TensorProto.STRING)]), False
    row = [nodes[0], helper.make_node("Identity", ["mean"], ["logits"])]
    yield "a row out", model(row, [value()]), False
    sequence = helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, None)
    yield "a sequence out", model([helper.make_node("SequenceConstruct", ["input"], ["logits"])], [sequence]), False
    unknown = helper.make_node("Nonsense", ["input"], ["logits"], domain="nowhere")
    yield "an unknown operator", model([unknown], [value()]), False
    outside = helper.make_tensor("values", TensorProto.FLOAT, [1, answers], good)
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    for key, told in (("location", "../../../../etc/passwd"), ("offset", "0"), ("length", "8")):
        entry = outside.external_data.add()
        entry.key, entry.value = key, told
    yield "weights outside", model(nodes, [value()], tensors=[*tensors[:2], outside]), False
    huge = [helper.make_node("ConstantOfShape", ["size"], ["big"]), *nodes]
    size = helper.make_tensor("size", TensorProto.INT64, [2], [2**31, 2**31])
    huge[-1] = helper.make_node("Sum", ["nothing", "values", "big"], ["logits"])
    yield "endless memory", model(huge, [value()], tensors=[*tensors, size]), False
    infos = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, None)]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])], "body",
        [helper.make_tensor_value_info(*info) for info in infos],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    loop = helper.make_node("Loop", ["", "true", "input"], ["looped"], body=body)
    mean = helper.make_node("ReduceMean", ["looped"], ["mean"], **axes)
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    yield "never ends", model([loop, mean, *nodes[1:]], [value()], tensors=[*tensors, true]), False
    alone = helper.make_node("Loop", ["", "true", "values"], ["looped"], body=body)
    ends = helper.make_node("Add", ["nothing", "looped"], ["logits"])
    yield "never ends, without an input", model([alone, *nodes[:3], ends], [value()], tensors=[*tensors, true]), False
    yield "empty", b"", False
    yield "no graph", onnx.ModelProto().SerializeToString(), False
    yield "text", b"This is no graph.", False
    content, chance = model(nodes, [value()], tensors=tensors), random.Random(0)
    for i in range(60):
        how, changed = mutated(content, content, chance)
        yield f"{how} {i}", changed, None
