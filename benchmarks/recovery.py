"""What each rung of the ladder wins back, at an equal training budget: lowered only, recalibrated, head refitted, FixRes,
distilled without labels, fine-tuned with labels.

    python benchmarks/recovery.py catdog --photos ../shared/data     EfficientNet-Lite0, 700 photographs of cats and dogs
    python benchmarks/recovery.py cells                              the same network, 2624 solar cells
    python benchmarks/recovery.py camvid --photos ../shared/data     a RegSeg of `--weights`, street scenes, mIoU

Each seed divides the photographs anew, half to be fitted on and half for the proof; the original is that with a head fitted for
the data (camvid: as it was trained). Every rung starts from the original's weights at the small resolution and each training
has the same epochs on the same images. Rows are appended to benchmarks/results/recovery.json as they come; what is there is not
run again. `drop` is paired, in points, over the proof images of one seed; `drop_low` and `drop_high` are one-sided 95 % bounds.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, save

import downres
from downres import Budget, Candidate, Training
from downres.images import split_once
from downres.recovery.ladder import lesson_of
from downres.recovery.state import RECALIBRATED, Step
from downres.recovery.trainer import trained
from downres.searching.demo import demo_model
from downres.searching.prepare import Measuring, open_data, prepare_task
from downres.tasks import Question
from downres.tasks.classification.elpv import open_elpv

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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=sorted(SIZES))
    options.add_argument("--photos", type=Path, help="the folder with catdog and camvid")
    options.add_argument("--weights", type=Path, help="of camvid's RegSeg")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--learning-rate", type=float, default=3e-4)
    given = options.parse_args()
    how = Training(epochs=given.epochs, learning_rate=given.learning_rate)
    if given.part == "camvid":
        model = downres.load_model("regseg:camvid", weights=given.weights)
    else:
        model = demo_model()
        if given.part == "catdog":
            model = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, resolution=224))
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {"rows": []}
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
            save("recovery", command, None, {"training": kept["training"], "rows": kept["rows"]})
            told = f"{row['score']:.2f} ({row['drop']:+.2f} lost), {row['seconds']} s"
            print(f"{row['part']} seed {seed}, {row['resolution']} {row['rung']}: {told}", flush=True)


if __name__ == "__main__":
    main()
