"""What whoever serves a model has to know, said in its manifest; and `serve.py`, a program that serves with that alone."""

from typing import Any

import numpy as np

from ..engines.engine import Engine
from ..images.preprocess import cover_of, covering_size, divisor, fill_of, shown_size
from ..parse import FP32
from ..records import BGR, RGB, Preprocessing
from ..tasks import Task

MOST_LINES = 60
EXAMPLE = (480, 640)
"""(height, width) of the picture that the manifest follows from step to step."""


def takes_numbers(task: Task, p: Preprocessing) -> bool:
    """Whether the network gets numbers as they are in a file (TIFF, .npy), or colours with transparency: no 8-bit colours."""
    return len(p.mean) not in (1, 3) or task.data.images[int(task.proof[0])].dtype != np.uint8


def steps(p: Preprocessing, numbers: bool = False) -> dict[str, Any]:
    """From a file to the network's input, in the order in which it is done: every number, and every rule in words.

    numbers: see `takes_numbers`.
    """
    how = f"{p.interpolation}, with antialiasing" if p.antialias else f"{p.interpolation}, without antialiasing"
    passes = (
        "as Pillow's Image.resize: the filter grows with the factor; first along the width, then along the height, each pass "
        "rounded to 8 bits"
        if p.antialias
        else "as OpenCV's resize: of each pixel's centre the nearest "
        f"{'2 by 2' if p.interpolation == 'bilinear' else '4 by 4 (a = -0.75)'} pixels alone; rounded to 8 bits, half to even"
    )
    resized = _resized(EXAMPLE, p)
    offset = [max(0, round((have - want) / 2)) for have, want in zip(resized, p.hw, strict=True)]
    return {
        "decode": _NUMBERS
        if numbers
        else {
            "colours": "L" if len(p.mean) == 1 else "RGB",
            "exif_orientation": True,
            "rule": "the first picture of the file, turned upright as its EXIF orientation says; 8 bits a channel, of 16-bit "
            "grey (v * 255 + 32767) // 65535; palettes and CMYK become RGB, grey is repeated, alpha is dropped and not blended"
            + ("; colours become grey by ITU-R 601 before anything else" if len(p.mean) == 1 else ""),
        },
        "resize": {
            "fit": p.fit,
            "to": list(cover_of(p) if p.fit == "crop" else p.hw),
            "filter": p.interpolation,
            "antialias": p.antialias,
            "rule": f"{how}, {passes}; {_FITTED[p.fit]}",
        },
        **_fitted(p, numbers),
        "normalise": {
            "channels": len(p.mean) if numbers else "L" if len(p.mean) == 1 else p.channel_order.upper(),
            "divide_by": {t: divisor(np.dtype(t), p) for t in ("uint8", "uint16", "float32")} if numbers else 1 / p.scale,
            "mean": list(p.mean),
            "std": list(p.std),
            "rule": "(pixel / divide_by - mean) / std in float32, mean and std in the order of channels; then height, width, "
            "channels become channels, height, width",
        },
        "example": {
            "picture": list(EXAMPLE),
            "resized": list(resized),
            **({"cropped_at": offset} if p.fit == "crop" else {}),
        },
    }


_NUMBERS = {
    "colours": None,
    "exif_orientation": True,
    "rule": "numbers as they are in a TIFF or an .npy file, uint8, uint16 or float32 (height, width, channels), each resized "
    "by itself, 8 bits rounded and others not; of other files 8-bit colours, with four channels those with transparency",
}


def _fitted(p: Preprocessing, numbers: bool) -> dict[str, Any]:
    """What is done to a resized picture whose size is not that of the input."""
    if p.fit == "crop":
        rule = "top = round((height - size[0]) / 2), left = round((width - size[1]) / 2), half to even"
        return {"crop": {"size": list(p.hw), "rule": rule}}
    if p.fit == "pad":
        rule = "at the right and the bottom, with a value for each channel of `decode`"
        if numbers:
            return {"pad": {"size": list(p.hw), "rule": "at the right and the bottom, with mean * divide_by of each channel"}}
        return {"pad": {"size": list(p.hw), "fill": fill_of(p, len(p.mean)), "rule": rule}}
    return {}


def output_of(task: Task, p: Preprocessing) -> dict[str, Any]:
    """What the graph returns: a name, a shape, a type, and what it means."""
    return {"name": task.output_name, "shape": task.shape(), "dtype": task.dtype, **task.meaning(p)}


def proof_of(task: Task) -> dict[str, Any]:
    """Which images the quality was measured on."""
    images, proof = task.data.images, task.proof
    return {
        "checksum": "zlib.crc32(pixels.tobytes(), zlib.crc32(repr(pixels.shape).encode())) of the decoded picture, an array "
        "uint8 (height, width, 3) or, given so, (height, width)",
        "images": [[images.names[i], f"{images.checksums[i]:08x}"] for i in proof],
    }


def _resized(picture: tuple[int, int], p: Preprocessing) -> tuple[int, int]:
    if p.fit != "crop":
        return shown_size(picture, p)
    width, height = covering_size(picture[::-1], cover_of(p)[::-1])
    return height, width


_FITTED = {
    "crop": "to the smallest size with the picture's aspect ratio that covers `to` (height, width): where to[1] * height >= "
    "to[0] * width the width is to[1] and the height max(to[0], floor(to[1] * height / width)), else the height is to[0] and "
    "the width max(to[1], floor(to[0] * width / height))",
    "stretch": "to `to` (height, width), whatever the picture's aspect ratio",
    "pad": "with scale = min(to[0] / height, to[1] / width) to min(to[0], max(1, round(height * scale))) by "
    "min(to[1], max(1, round(width * scale))), half to even",
}


def program(
    task: Task,
    p: Preprocessing,
    numbers: bool = False,
    engine: Engine | None = None,
    precision: str = FP32,
    *,
    several: bool = False,
) -> str:
    """The text of serve.py: under 60 lines (of numbers 70), of what is needed; it reads its values from the manifest.

    numbers: see `takes_numbers`. engine: that of the graph, None: onnxruntime's on the CPU. several: of a model for several
    resolutions, of ONNX Runtime: 25 lines more.
    """
    answer, channels = task.serving(p).strip(), len(p.mean)
    cubic = "bicubic(" in answer or (not p.antialias and p.interpolation == "bicubic")
    before, resized = _RESIZED["antialias" if p.antialias else p.interpolation]
    fit, order = _FIT[p.fit], _ORDER[p.channel_order]
    if numbers:
        before, resized = "", _RESIZED_NUMBERS["antialias" if p.antialias else p.interpolation]
        opened = _OPENED_NUMBERS.replace("COLOURS", {1: "L", 4: "RGBA"}.get(channels, "RGB"))
        if p.fit == "pad":
            fit = fit.replace("fitted(picture)", "fitted(picture, fill)").replace('tuple(STEPS["pad"]["fill"])', _LEVEL)
            levels, each = (
                "    levels = (mean * divide_by)ORDER\n",
                "fitted(plane, fill) for plane, fill in zip(planes, levels)",
            )
        else:
            levels, each = "", "fitted(plane) for plane in planes"
        taken = _INPUT_NUMBERS.replace("    LEVELS\n", levels).replace("EACH", each).replace("ORDER", order)
        run = _RUN.replace("picture = opened", "planes, kind = opened")
        run = run.replace("network_input(picture)", "network_input(planes, kind)")
        run = run.replace("answer(output[0], picture,", "answer(output[0], planes[0],")
    else:
        opened = _OPENED.replace('convert("RGB")', 'convert("RGB").convert("L")' if channels == 1 else 'convert("RGB")')
        taken = _INPUT.replace("PIXELS", "np.float32(fitted(picture))" + ("[..., None]" if channels == 1 else order))
        run = _RUN
    fitted = fit.replace("    BEFORE\n", before).replace("RESIZED", resized)
    parts = [opened, *([_BICUBIC] if cubic else []), fitted, taken, answer, run]
    head = _HEAD
    if engine is not None and (name := engine.provider(precision)):
        if engine.name == "openvino":
            head, run = _in_openvino(_HEAD, run, *name)
        else:
            run = run.replace("CPUExecutionProvider", name[0])
    if several:
        head = head.replace("import json\n", "import argparse\nimport json\n").replace(
            "import sys\n", "import sys\nimport time\n"
        )
        head = head.replace("photo.jpg …`", "[--resolution N | --max-latency-ms MS] photo.jpg …`")
        loop = run[run.index("for name in ") :].replace("sys.argv[1:]", "given.images")
        run = _SEVERAL.replace("PROVIDER", _provider(run)) + loop
    parts[-1] = run
    text = head + "".join(f"\n{part.strip()}\n" for part in parts)
    return text if text.count("\n") < MOST_LINES else text.replace("\n\ndef", "\ndef").replace("\n\nsession", "\nsession")


def _in_openvino(head: str, run: str, device: str, hint: str) -> tuple[str, str]:
    """The same with OpenVINO in the place of ONNX Runtime; hint: what computes where it is not in 8 bits."""
    head = head.replace("model.onnx", "model.xml").replace("and onnxruntime;", "and openvino;")
    run = run.replace("session.run(None, {MANIFEST", "session({MANIFEST").replace("\n    print", ".values()\n    print")
    lines = [
        _OPENVINO.replace("DEVICE", device).replace('"HINT"', f'"{hint}"') if line.startswith("session = ") else line
        for line in run.split("\n")
    ]
    return head.replace("import onnxruntime", "import openvino"), "\n".join(lines)


def _provider(run: str) -> str:
    return run.partition('providers=["')[2].partition('"')[0]


_OPENVINO = 'session = openvino.Core().compile_model(HERE / "model.xml", "DEVICE", {"INFERENCE_PRECISION_HINT": "HINT"})'
_ORDER = {RGB: "", BGR: "[..., ::-1]"}
_HEAD = '''"""`python serve.py photo.jpg …` prints what model.onnx answers, a line of JSON for each picture.
Written by downres. Needs Pillow, NumPy and onnxruntime; all numbers are those of manifest.json, which explains them."""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
STEPS, OUTPUT = MANIFEST["steps"], MANIFEST["output"]
'''
_OPENED = """
def opened(name):  # upright, 8 bits a channel, nothing transparent
    given = Image.open(name)
    assert given.format != "TIFF" or given.tag_v2.get(258, (1,))[0] <= 8, f"{name} holds numbers, this model takes colours"
    picture = ImageOps.exif_transpose(given)
    if picture.mode[0] in "IF":  # 16 bits: `convert` would make nearly all of it white
        picture = Image.fromarray(((np.asarray(picture).astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
    return picture.convert("RGB")
"""
_OPENED_NUMBERS = """
def opened(name):  # a plane for each channel in its own numbers, and their type
    if name.lower().endswith((".tif", ".tiff")):
        import tifffile
        values = tifffile.imread(name)
    elif name.lower().endswith(".npy"):
        values = np.load(name)
    else:
        values = np.asarray(ImageOps.exif_transpose(Image.open(name)).convert("COLOURS"))
    channels = STEPS["normalise"]["channels"]
    first = values.ndim == 3 and values.shape[2] != channels
    values = np.moveaxis(values, 0, 2) if first else np.atleast_3d(values)
    assert values.shape[2] == channels or (values.shape[2], channels) == (1, 3), f"{name} has other channels"
    planes = np.moveaxis(values if values.dtype == np.uint8 else np.float32(values), 2, 0)
    return [*map(Image.fromarray, planes)], values.dtype.name if values.dtype.kind == "u" else "float32"
"""
_BICUBIC = """
def bicubic(plane, size, corners=False):  # (h, w) to (height, width), without antialiasing, a = -0.75
    for have, want in zip(plane.shape, size):
        at = np.arange(want) * (have - 1) / max(want - 1, 1) if corners else (np.arange(want) + 0.5) * have / want - 0.5
        near = np.floor(at)[:, None] + np.arange(-1, 3)
        d = abs(at[:, None] - near)
        weights = np.where(d <= 1, (1.25 * d - 2.25) * d * d + 1, -0.75 * (((d - 5) * d + 8) * d - 4))
        plane = np.einsum("ok,okx->xo", weights, plane[near.clip(0, have - 1).astype(int)])
    return plane
"""
"""PIL's is another one where there is no antialiasing."""
_MERGED = "Image.merge(picture.mode, [Image.fromarray(np.rint(plane).clip(0, 255).astype(np.uint8)) for plane in planes])"
_RESIZED = {
    "antialias": ("", 'picture.resize(size, Image.Resampling[STEPS["resize"]["filter"].upper()])'),
    "bilinear": (
        "    box, planes = (0, 0, *picture.size), picture.split()\n"
        '    planes = [plane.convert("F").transform(size, Image.EXTENT, box, Image.BILINEAR) for plane in planes]\n',
        _MERGED,
    ),
    "bicubic": ("    planes = [bicubic(np.float32(plane), size[::-1]) for plane in picture.split()]\n", _MERGED),
}
"""(A line before, the resized picture)."""
_RESIZED_NUMBERS = {
    "antialias": _RESIZED["antialias"][1],
    "bilinear": 'picture.convert("F").transform(size, Image.EXTENT, (0, 0, *picture.size), Image.BILINEAR)',
    "bicubic": "Image.fromarray(np.float32(bicubic(np.float32(picture), size[::-1])))",
}
_LEVEL = "float(fill) if picture.mode[0] == 'F' else round(fill)"
_FIT = {
    "crop": """
def fitted(picture):  # it covers STEPS["resize"]["to"], and its centre is what counts
    (tall, wide), (height, width) = STEPS["resize"]["to"], STEPS["crop"]["size"]
    size = wide, max(tall, wide * picture.height // picture.width)
    if wide * picture.height < tall * picture.width:
        size = max(wide, tall * picture.width // picture.height), tall
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    BEFORE
    picture = RESIZED
    return picture.crop((left, top, left + width, top + height))
""",
    "stretch": """
def fitted(picture):  # the whole of it, whatever its aspect ratio
    size = tuple(STEPS["resize"]["to"][::-1])
    BEFORE
    return RESIZED
""",
    "pad": """
def shown(picture):  # (height, width) of the input that the picture fills
    scale = min(STEPS["resize"]["to"] / np.array(picture.size[::-1]))
    return [min(to, max(1, round(side * scale))) for to, side in zip(STEPS["resize"]["to"], picture.size[::-1])]

def fitted(picture):  # the whole of it with its aspect ratio, the rest filled
    size = shown(picture)[::-1]
    whole = Image.new(picture.mode, STEPS["pad"]["size"][::-1], tuple(STEPS["pad"]["fill"]))
    BEFORE
    whole.paste(RESIZED)
    return whole
""",
}
_INPUT = """
def network_input(picture):  # float32 (1, channels, height, width)
    divide_by, mean, std = (np.float32(STEPS["normalise"][name]) for name in ("divide_by", "mean", "std"))
    return np.ascontiguousarray(((PIXELS / divide_by - mean) / std).transpose(2, 0, 1)[None])
"""
_INPUT_NUMBERS = """
def network_input(planes, kind):  # float32 (1, channels, height, width)
    divide_by = np.float32(STEPS["normalise"]["divide_by"][kind])
    mean, std = (np.float32(STEPS["normalise"][name]) for name in ("mean", "std"))
    LEVELS
    pixels = np.stack([EACH], -1)ORDER
    return np.ascontiguousarray(((pixels / divide_by - mean) / std).transpose(2, 0, 1)[None])
"""
_RUN = """
session = onnxruntime.InferenceSession((HERE / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
for name in sys.argv[1:]:
    picture = opened(name)
    (output,) = session.run(None, {MANIFEST["input"]["name"]: network_input(picture)})
    print(json.dumps({"image": name, **answer(output[0], picture, name)}, allow_nan=False))
"""
_SEVERAL = """
def milliseconds(session, shape):  # of one pass here and now: the median of 15, after 3 that are not counted
    seen, noise = [], np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    for _ in range(18):
        start = time.perf_counter()
        session.run(None, {MANIFEST["input"]["name"]: noise})
        seen.append(1000 * (time.perf_counter() - start))
    return np.median(seen[3:])

options = argparse.ArgumentParser()
options.add_argument("--resolution", help="of the input in pixels; default: the largest")
options.add_argument("--max-latency-ms", type=float, help="the largest that takes no longer here")
options.add_argument("images", nargs="*")
given, session = options.parse_args(), None
for MANIFEST in [{**MANIFEST, **part} for part in ({"stem": "model"}, *MANIFEST["resolutions"])]:  # the most pixels first
    shape = 1, *MANIFEST["input"]["shape"][1:]
    if given.resolution in (None, f"{shape[2]}x{shape[3]}", str(shape[2]) if shape[2] == shape[3] else None):
        file = str(HERE / f"{MANIFEST['stem']}.onnx")  # beside weights.bin
        session = onnxruntime.InferenceSession(file, providers=["PROVIDER"])
        if given.max_latency_ms is None or milliseconds(session, shape) <= given.max_latency_ms:
            break
else:
    sys.exit("the model has no such resolution" if session is None else "no resolution is that fast here")
STEPS, OUTPUT = MANIFEST["steps"], MANIFEST["output"]
"""
