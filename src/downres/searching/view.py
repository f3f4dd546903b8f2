"""A run as its report: which sentences and numbers the page shows; the task adds its own part."""

import dataclasses
from pathlib import Path

from ..artifacts import read_manifest
from ..measuring.cost import CONVENTION
from ..measuring.sequential import looks
from ..parse import INT8
from ..records import Preprocessing
from ..recovery.bank import RANGE_IMAGES
from ..reports import ReportView, words
from ..reports import write_report as write_page
from .results import Run, load_run, readable
from .select import expense
from .store import ROUNDS, Store


def write_report(run: Run | str | Path) -> Path:
    """Write `report.html` into a run's folder, finished or not, and return its path.

    Raises DownresError when the folder is not a run.
    """
    run = run if isinstance(run, Run) else load_run(run)
    return write_page(view_of(run), run.folder / "report.html")


def view_of(run: Run) -> ReportView:
    """Everything on the page, from what the run's folder holds: the images themselves need not be there."""
    with readable(run.folder):
        return _view_of(run, Store.read(run.folder))


def _view_of(run: Run, store: Store) -> ReportView:
    started = store.get("started") or {"when": "", "versions": {}}
    settings = run.settings
    native = Preprocessing.from_json(settings["preprocessing"])
    counted = [r for r in run.results if r.cost is not None]
    ordered = sorted(counted, key=lambda r: expense(r, "macs"), reverse=True) + [r for r in run.results if r.cost is None]
    shipped = run.best
    preprocessing = native
    if run.artifact is not None:
        preprocessing = Preprocessing.from_json(read_manifest(run.artifact)["preprocessing"])
    model = settings["model"] or "a module given in Python"
    best = next((r for r in ordered if shipped is not None and r.candidate == shipped.candidate), None)
    return ReportView(
        title="downres report",
        model=f"{model} ({settings['weights']})" if settings["weights"] else model,
        data=run.data["description"],
        licence=run.data["licence"],
        budget=run.budget,
        original=run.original,
        results=tuple(ordered),
        best=shipped.candidate if shipped is not None else None,
        preprocessing=preprocessing,
        score=run.task.score,
        section=run.task.section(store, dataclasses.replace(run, results=tuple(ordered)), best or words.nearest(ordered)),
        made=_made(run, store),
        command=settings["command"],
        created=started["when"],
        versions=started["versions"],
        skipped=tuple(f"{s['path']}: {s['reason']}" for s in run.data["skipped"]),
        warnings=run.notes,
    )


def _made(run: Run, store: Store) -> dict[str, str]:
    """How every number was made, one sentence each."""
    folds = run.data["fold_count"]
    compared = max((r.drop.comparisons for r in run.results if r.drop), default=1)
    proof = (
        f"Every image is a proof image once: in each of {folds} folds, heads are fitted on the other folds "
        "and judged on this one."
        if folds > 1
        else "Fitted and chosen on training images (a part of them, the tuning images, decides crop ratio and rung), "
        "judged on the validation images, which nothing was chosen on."
    )
    rounds = store.get(ROUNDS)
    if rounds:
        proof += (
            f" They are looked at in rounds, after {', '.join(map(str, looks(1000)[:3]))}, … images in an order that the seed "
            "draws, each candidate until its verdict: once one is proven, dearer ones are not needed."
        )
    many = (
        f" The error allowed is spent over all looks (Kim and DeMets' power family) and in each over all {compared} "
        "candidates (Holm), so that neither looking early nor picking the cheapest makes a wrong proof likelier."
        if rounds
        else f" {compared} candidates were judged on the same images; Holm's procedure makes their bounds hold together, "
        "so that picking the cheapest proven one is honest."
        if compared > 1 and run.budget.max_flips is None
        else f" Drop and other answers of {compared} candidates are each judged at Bonferroni's level."
        if compared > 1
        else ""
    )
    runtimes = dict.fromkeys([run.settings["runtime"], *(r.candidate.runtime for r in run.results if r.candidate.runtime)])
    own = run.task.made(run.budget, " or ".join(runtimes), proof, many)
    rest = {
        "MACs and memory": CONVENTION,
        "Latency": f"Median of interleaved runs after warm-up, batch {run.settings.get('latency_batch', 1)}, random input; "
        "10th to 90th percentile beside it. Resizing and decoding of the image are not in it.",
        "Recovery": "Rungs are tried from cheap to dear on tuning images, until the drop there is shown to be within "
        "the allowed one; otherwise the best rung is taken. Seconds are wall-clock time for all folds together.",
    }
    if any(r.candidate.precision == INT8 for r in run.results):
        rest["8 bits"] = (
            f"Post-training quantization of the exported network, convolutions and linear layers, weights per channel, at the "
            f"candidate's own resolution, ranges from at most {RANGE_IMAGES} training images"
            f"{' (with folds: unlabelled images of another fold)' if folds > 1 else ''}; the last linear layer stays in float. "
            "What is judged is that file in its own runtime. MACs and peak activations are those of the network in float; "
            "before images are looked at, its ranges are those of noise, which changes no time."
        )
    if any(r.footprint and r.footprint.peak_rss_bytes for r in run.results):
        rest["Memory of the file"] = (
            "Peak resident memory of a fresh process with nothing but NumPy and the runtime that loads the file and answers "
            "once."
        )
    return own | {name: text for name, text in rest.items() if name not in own}
