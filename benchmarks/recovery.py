"""What each rung of the ladder wins back, at an equal training budget: lowered only, recalibrated, head refitted, FixRes,
distilled without labels, fine-tuned with labels.

    python benchmarks/recovery.py catdog --photos ../shared/data     EfficientNet-Lite0, 700 photographs of cats and dogs
    python benchmarks/recovery.py cells                              the same network, 2624 solar cells
    python benchmarks/recovery.py camvid --photos ../shared/data     a RegSeg of `--weights`, street scenes, mIoU
    python benchmarks/recovery.py several --photos ../shared/data    one network for three sizes against one for each
    python benchmarks/recovery.py table                              what is there, into docs/recovery.md and its picture

Each seed divides the photographs anew, half to be fitted on and half for the proof; the original is that with a head fitted for
the data (camvid: as it was trained). Every rung starts from the original's weights at the small resolution and each training
has the same epochs on the same images. Rows are appended to benchmarks/results/recovery.json as they come; what is there is
not run again. `drop` is paired, in points, over the proof images of one seed; `drop_low` and `drop_high` are one-sided 95 %
bounds. `several`, of the cats and dogs: distilled at 128, 96 and 64 px, one network for each, and one for all three that is
trained for three times as many epochs, so that both have looked at as many images; `behind` is paired, the score of one for
each minus that of one for all.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import plotly.graph_objects as go
from measuring import RESULTS, save
from plotly.subplots import make_subplots

import downres
from downres import Budget, Candidate, Training
from downres.images import split_once
from downres.recovery.ladder import lesson_of
from downres.recovery.state import RECALIBRATED, Step
from downres.recovery.switching import Switching, tensors_of
from downres.recovery.trainer import trained
from downres.searching.demo import demo_model
from downres.searching.prepare import Measuring, open_data, prepare_task
from downres.tasks import Question
from downres.tasks.classification.elpv import open_elpv

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "recovery.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->"
SAID = {
    "catdog": "EfficientNet-Lite0 at 224 px, cats and dogs", "cells": "EfficientNet-Lite0 at 300 px, solar cells",
    "camvid": "RegSeg, CamVid",
}  # fmt: skip
WORDS = {
    "none": "lowered only", "batchnorm": "recalibrated", "head": "head refitted", "fixres": "FixRes",
    "distill": "distilled, no labels", "finetune": "fine-tuned",
}  # fmt: skip
COLOURS = ("#6b7280", "#9ca3af", "#2563eb", "#d97706", "#059669", "#db2777")
FILE = RESULTS / "recovery.json"
RUNGS = ("none", "batchnorm", "head", "fixres", "distill", "finetune")
SIZES = {"catdog": (128, 96, 64), "cells": (128, 64), "camvid": ((240, 320), (180, 240), (120, 160))}


def rows_of(part: str, data: Any, model: Any, fit_head: bool, seed: int, sizes: Any, how: Training, known: set) -> Any:
    """A row for each resolution and rung of one seed, those in `known` left out."""
    question, measuring = Question(fit_head=fit_head), Measuring(runtime="torch", seed=seed, val_fraction=0.5)
    task = prepare_task(model, data, question)
    open_data(task, data, measuring, question)
    with tempfile.TemporaryDirectory() as place:
        bank = task.bank(Path(place), runtime="torch")
        task.fill(bank)
        bank.training = how
        reference = task.reference(bank, 0, task.data.folds[0], RUNGS)
        proof = task.data.folds[0].test
        original = task.evidence(bank, reference.state, proof)
        for size in sizes:
            for rung in RUNGS:
                if (part, seed, str(Candidate(size)), rung) in known:
                    continue
                start = reference.start.at(Candidate(size))
                began, seen = time.perf_counter(), bank.passes
                note = ""
                if rung == "none":
                    state = reference.state.at(Candidate(size))
                elif rung == "batchnorm":
                    state = reference.state.at(Candidate(size)).then(Step(RECALIBRATED, 0, 256))
                elif rung == "head":
                    if task.why_no_head(bank, reference.fit):
                        continue
                    _, state, note = task.refit(bank, start, 0, reference.fit, reference.tune)
                else:
                    lesson = lesson_of(rung, task, bank, start, reference.start, reference.fit)
                    state, note = trained(bank, start, 0, reference.fit, how, lesson, seed)
                seconds, images = time.perf_counter() - began, bank.passes - seen
                evidence = task.evidence(bank, state, proof)
                drop = task.compare(original, {"it": evidence}, Budget(1.0))["it"]
                yield {
                    "part": part, "seed": seed, "resolution": str(Candidate(size)), "rung": rung,
                    "score": task.quality(evidence).score, "original": task.quality(original).score, "drop": drop.drop,
                    "drop_low": drop.lower, "drop_high": drop.upper, "proof": len(proof), "fit": len(reference.fit),
                    "seconds": round(seconds, 1), "images": images, "note": note,
                }  # fmt: skip
                bank.release()


def several_rows(data: Any, model: Any, seed: int, sizes: Any, how: Training) -> Any:
    """A row for each resolution: one network for all of them beside one trained for it alone."""
    question, measuring = Question(fit_head=True), Measuring(runtime="torch", seed=seed, val_fraction=0.5)
    task = prepare_task(model, data, question)
    open_data(task, data, measuring, question)
    with tempfile.TemporaryDirectory() as place:
        bank = task.bank(Path(place), runtime="torch")
        task.fill(bank)
        reference = task.reference(bank, 0, task.data.folds[0], RUNGS)
        proof, fit = task.data.folds[0].test, reference.fit
        original = task.evidence(bank, reference.state, proof)
        starts = [reference.start.at(Candidate(size)) for size in sizes]
        began = time.perf_counter()
        lesson = Switching(task, bank, starts[0], starts[1:], reference.start, fit, own_heads=False)
        longer = dataclasses.replace(how, epochs=how.epochs * len(sizes))
        state, _ = trained(bank, starts[0], 0, fit, longer, lesson, seed)
        together_s, all_tensors = time.perf_counter() - began, bank.weights.get(state.trained.tensors)
        for i, start in enumerate(starts):
            began = time.perf_counter()
            alone, _ = trained(bank, start, 0, fit, how, lesson_of("distill", task, bank, start, reference.start, fit), seed)
            alone_s = time.perf_counter() - began
            step = dataclasses.replace(state.trained, tensors=bank.weights.put(tensors_of(all_tensors, i)))
            together = dataclasses.replace(start, history=(step,))
            one, other = (task.evidence(bank, s, proof) for s in (alone, together))
            behind = task.compare(one, {"it": other}, Budget(1.0))["it"]
            lost = {name: task.compare(original, {"it": e}, Budget(1.0))["it"] for name, e in (("alone", one), ("all", other))}
            yield {
                "seed": seed, "resolution": str(start.candidate), "original": task.quality(original).score,
                "alone": task.quality(one).score, "together": task.quality(other).score,
                "alone_drop": lost["alone"].drop, "together_drop": lost["all"].drop,
                "behind": behind.drop, "behind_low": behind.lower, "behind_high": behind.upper, "proof": len(proof),
                "fit": len(fit), "alone_s": round(alone_s, 1), "together_s": round(together_s, 1),
            }  # fmt: skip
            bank.release()


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each part, resolution and rung: means over seeds of which every rung is there, least and most of the drop."""
    wanted: dict[str, set[str]] = {}
    there: dict[tuple[str, str, int], set[str]] = {}
    for row in rows:
        wanted.setdefault(row["part"], set()).add(row["rung"])
        there.setdefault((row["part"], row["resolution"], row["seed"]), set()).add(row["rung"])
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if there[row["part"], row["resolution"], row["seed"]] < wanted[row["part"]]:
            continue  # the others of that division are not there yet
        groups.setdefault((row["part"], row["resolution"], row["rung"]), []).append(row)
    return [
        {
            "part": part, "resolution": size, "rung": rung, "seeds": len(own), "score": mean(r["score"] for r in own),
            "drop": mean(r["drop"] for r in own), "low": min(r["drop"] for r in own), "high": max(r["drop"] for r in own),
            "seconds": mean(r["seconds"] for r in own), "original": mean(r["original"] for r in own),
        }
        for (part, size, rung), own in groups.items()
    ]  # fmt: skip


def table(rows: list[dict[str, Any]], training: dict[str, dict[str, Any]]) -> str:
    """A table for each part in Markdown: rungs across, resolutions down; the best of each in bold."""
    found, parts = summarised(rows), list(dict.fromkeys(row["part"] for row in rows))
    lines = []
    for part in parts:
        own = [row for row in found if row["part"] == part]
        rungs = [rung for rung in RUNGS if any(row["rung"] == rung for row in own)]
        how, one = training[part], next(row for row in rows if row["part"] == part)
        fewest, most = min(row["seeds"] for row in own), max(row["seeds"] for row in own)
        seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
        lines += [
            f"**{SAID[part]}**: {one['fit']} images to fit on, {one['proof']} for the proof, {seeds} divisions; "
            f"each training {how['epochs']} epochs. Points lost against the original, mean, and least to most over the "
            "divisions.",
            "",
            "| px | " + " | ".join(WORDS[rung] for rung in rungs) + " |",
            "|--:|" + "--:|" * len(rungs),
        ]
        for size in dict.fromkeys(row["resolution"] for row in own):
            cells = {row["rung"]: row for row in own if row["resolution"] == size}
            least = min(row["drop"] for row in cells.values())
            shown = []
            for rung in rungs:
                if (row := cells.get(rung)) is None:
                    shown.append("")
                    continue
                mark = "**" if row["drop"] == least else ""
                shown.append(f"{mark}{row['drop']:.1f}{mark} ({row['low']:.1f}…{row['high']:.1f})")
            lines.append(f"| {size} | " + " | ".join(shown) + " |")
        times = {rung: mean(row["seconds"] for row in own if row["rung"] == rung) for rung in rungs}
        lines += ["| mean s | " + " | ".join(f"{times[rung]:.0f}" for rung in rungs) + " |", ""]
    return "\n".join(lines) + "\n"


def several_table(rows: list[dict[str, Any]]) -> str:
    """One network for all sizes beside one for each."""
    if not rows:
        return ""
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"**One network for three resolutions, or one for each** (cats and dogs as above, {seeds} "
        f"division{'s' * (seeds > 1)}; as many images looked at by both; points lost against the original, and how far one for "
        "all is behind, paired, with one-sided 95 % bounds over the proof images).",
        "",
        "| px | one for each | one for all | behind |",
        "|--:|--:|--:|--:|",
    ]
    for size in dict.fromkeys(row["resolution"] for row in rows):
        own = [row for row in rows if row["resolution"] == size]
        alone, together, behind = (mean(row[name] for row in own) for name in ("alone_drop", "together_drop", "behind"))
        low, high = min(row["behind_low"] for row in own), max(row["behind_high"] for row in own)
        lines.append(f"| {size} | {alone:.1f} | {together:.1f} | {behind:+.1f} ({low:+.1f}…{high:+.1f}) |")
    return "\n".join([*lines, ""]) + "\n"


def picture(rows: list[dict[str, Any]]) -> go.Figure:
    """Points lost against resolution, a line a rung, a panel a part."""
    found, parts = summarised(rows), list(dict.fromkeys(row["part"] for row in rows))
    figure = make_subplots(1, len(parts), subplot_titles=[SAID[part] for part in parts])
    for k, part in enumerate(parts, 1):
        for rung, colour in zip(RUNGS, COLOURS, strict=True):
            own = [row for row in found if (row["part"], row["rung"]) == (part, rung)]
            if not own or rung == "batchnorm":  # far below: it would flatten the others
                continue
            figure.add_scatter(
                x=[row["resolution"] for row in own], y=[row["drop"] for row in own], name=WORDS[rung], legendgroup=rung,
                showlegend=k == 1, mode="lines+markers", line={"color": colour},
                error_y={
                    "type": "data", "symmetric": False, "array": [row["high"] - row["drop"] for row in own],
                    "arrayminus": [row["drop"] - row["low"] for row in own], "thickness": 1,
                },
                row=1, col=k,
            )  # fmt: skip
        figure.update_xaxes(title="pixels", type="category", row=1, col=k)
    figure.update_yaxes(title="points lost", autorange="reversed", gridcolor="#e5e7eb")
    return figure.update_layout(width=1100, height=420, template="plotly_white", font={"size": 14}, margin={"t": 50, "b": 60})


def write_document() -> None:
    kept = json.loads(FILE.read_text())
    before, _, rest = DOCUMENT.read_text().partition(MARKS[0])
    told = f"{kept['date']}, {kept['hardware']}, {kept['threads']} cores, other work beside it: seconds are no benchmark.\n\n"
    shown = "![Points lost against resolution, rung by rung](recovery.png)\n\n"
    text = table(kept["rows"], kept["training"]) + several_table(kept.get("several", []))
    DOCUMENT.write_text(before + MARKS[0] + shown + text + told + MARKS[1] + rest.partition(MARKS[1])[2])
    sys.path.append(str(DOCUMENT.parents[1] / "recipes"))
    from pictures import save_png

    save_png(picture(kept["rows"]), DOCUMENT.with_suffix(".png"))


def content(kept: dict[str, Any]) -> dict[str, Any]:
    return {name: kept[name] for name in ("training", "rows", "several") if name in kept}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=[*sorted(SIZES), "several", "table"])
    options.add_argument("--photos", type=Path, help="the folder with catdog and camvid")
    options.add_argument("--weights", type=Path, help="of camvid's RegSeg")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--learning-rate", type=float, default=3e-4)
    given = options.parse_args()
    if given.part == "table":
        write_document()
        return
    how = Training(epochs=given.epochs, learning_rate=given.learning_rate)
    if given.part == "camvid":
        model = downres.load_model("regseg:camvid", weights=given.weights)
    else:
        model = demo_model()
        if given.part in ("catdog", "several"):
            model = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, resolution=224))
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {"rows": []}
    if given.part == "several":
        found = kept.setdefault("several", [])
        for seed in range(given.seeds):
            if any(row["seed"] == seed for row in found):
                continue
            for row in several_rows(str(given.photos / "catdog/train"), model, seed, SIZES["catdog"], how):
                found.append(row)
                print(row, flush=True)
            save("recovery", "python benchmarks/recovery.py several --photos DIR", None, content(kept))
        return
    known = {(r["part"], r["seed"], r["resolution"], r["rung"]) for r in kept["rows"]}
    for seed in range(given.seeds):
        if given.part == "cells":
            cells = open_elpv()
            data: Any = dataclasses.replace(cells, folds=(split_once(cells.labels, 0.5, seed),))
        else:
            data = str(given.photos / ("camvid" if given.part == "camvid" else "catdog/train"))
        for row in rows_of(given.part, data, model, given.part != "camvid", seed, SIZES[given.part], how, known):
            kept["rows"].append(row)
            kept.setdefault("training", {})[given.part] = how.to_json()
            command = " ".join(["python benchmarks/recovery.py", given.part, *(["--photos DIR"] if given.photos else [])])
            save("recovery", command, None, content(kept))
            told = f"{row['score']:.2f} ({row['drop']:+.2f} lost), {row['seconds']} s"
            print(f"{row['part']} seed {seed}, {row['resolution']} {row['rung']}: {told}", flush=True)


if __name__ == "__main__":
    main()
