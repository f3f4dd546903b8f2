"""What whoever serves a segmentation network does with its answer: in words, as a function of serve.py, and proven."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...records import CLASSES, Dense, Preprocessing

SERVED_PIXELS = 0.99
"""Share of the pixels whose class serve.py and `predict` have to agree on: resized by PIL or torchvision, some pixels of the
input differ by 1 or 2 of 255 levels, and near the edges of things classes are close."""
PALETTE = 256
"""Classes that a palette PNG has room for."""


def meaning(dense: Dense, p: Preprocessing) -> dict[str, Any]:
    """See `Task.meaning`."""
    if dense.output == CLASSES:
        said = "the class of every pixel, an index of `classes`; brought to the picture's size by the nearest pixels"
    elif dense.threshold is None:
        said = "for every pixel a logit for each of `classes`, the largest wins"
    else:
        said = "for every pixel one logit: the second of `classes` where it is above `threshold`, else the first"
    if dense.output != CLASSES:
        said += "; logits are brought to the picture's size by `upsampling`, without antialiasing, before that"
    if p.fit == "pad":
        said += (
            "; first the padding is cut off: max(1, round(side * filled / input)) of each side stay, where filled is what the "
            "picture fills of the input's"
        )
    how = {"upsampling": dense.interpolation, "align_corners": dense.align_corners, "threshold": dense.threshold}
    return {"values": dense.output, "meaning": said, **(how if dense.output != CLASSES else {"upsampling": "nearest"})}


def serving(dense: Dense, classes: int, p: Preprocessing) -> str:
    """See `Task.serving`."""
    lines = ["def answer(output, picture, name):  # the commonest classes in percent of the pixels; all of them in a PNG"]
    if p.fit == "pad":
        lines += [
            'part = np.divide(shown(picture), STEPS["pad"]["size"]) * output.shape[-2:]  # the rest is padding',
            "output = output[..., : max(1, round(part[0])), : max(1, round(part[1]))]",
        ]
    if dense.output == CLASSES:
        lines += ["mask = np.asarray(Image.fromarray(output.astype(np.int32)).resize(picture.size, Image.NEAREST))"]
    else:
        lines += _UPSAMPLED["corners" if dense.align_corners and dense.interpolation == "bilinear" else dense.interpolation]
        lines += [
            "mask = np.argmax(planes, 0)" if dense.threshold is None else 'mask = np.uint8(planes[0] > OUTPUT["threshold"])'
        ]
    kind, coloured = "uint16", []
    if classes <= PALETTE:
        kind, coloured = "uint8", ['drawn.putpalette(sum(MANIFEST["colours"], []))']
    lines += [
        f'drawn, file = Image.fromarray(mask.astype(np.{kind})), Path("predictions", f"{{Path(name).stem}}_mask.png")',
        *coloured,
        "file.parent.mkdir(exist_ok=True)",
        "drawn.save(file)",
        'share = 100 * np.bincount(mask.ravel(), minlength=len(MANIFEST["classes"])) / mask.size',
        'order = [i for i in np.argsort(-share, kind="stable")[:5] if share[i] > 0]',
        'return {"classes": [MANIFEST["classes"][i] for i in order], "shares": share[order].tolist(), "mask": str(file)}',
    ]
    return "\n    ".join(lines)


_EACH = "planes = [np.asarray(Image.fromarray(p).transform(picture.size, Image.EXTENT, where, Image.BILINEAR)) for p in output]"
_UPSAMPLED = {
    "bilinear": ["where = 0, 0, output.shape[-1], output.shape[-2]", _EACH],
    "corners": [
        "x, y = ((have - 1) / max(want - 1, 1) for have, want in zip(output.shape[:-3:-1], picture.size))",
        "where = (1 - x) / 2, (1 - y) / 2, (1 - x) / 2 + x * picture.width, (1 - y) / 2 + y * picture.height",
        _EACH,
    ],
    "bicubic": ['planes = [bicubic(p, picture.size[::-1], OUTPUT["align_corners"]) for p in output]'],
}


def masks_alike(served: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """See `Task.alike`: pixel by pixel of what both have drawn."""
    same = total = 0
    for one, other in zip(served, predicted, strict=True):
        # serve.py names its file from where it runs, which is where the pictures are.
        ours, theirs = (np.asarray(Image.open(Path(one["image"]).parent / said["mask"])) for said in (one, other))
        if ours.shape != theirs.shape:
            return False, f"a mask of {ours.shape} where predict draws one of {theirs.shape}"
        same, total = same + int((ours == theirs).sum()), total + ours.size
    return same >= SERVED_PIXELS * total, f"same class on {100 * same / total:.4f} % of the pixels of {len(served)} real images"
