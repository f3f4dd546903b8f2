"""What the tests of searches share."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from downres import Run, load_run, search
from downres.engines.onnxruntime import export_onnx

OPTIONS = {
    "fit_head": True,
    "max_drop": 30.0,
    "resolutions": [32, 16],
    "stem_scales": (0.5,),
    "runtime": "torch",
    "threads": 1,
}


def run_search(model: Any, data: Any, out: Path, **options: Any) -> Run:
    """A search with these options where no others are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        return search(model, data, out=out, **{**OPTIONS, **options})


def measured(model: Any, data: Any, out: Path, **options: Any) -> Run:
    """A search of which everything but the artifact is wanted: it ends where that would be exported."""

    def progress(what: str, done: int, total: int) -> None:
        if "shipping" in what:
            raise KeyboardInterrupt

    try:
        run_search(model, data, out, progress=progress, **options)
    except KeyboardInterrupt:
        pass
    run = load_run(out)
    assert all(r.status == "measured" for r in run.results)
    return run


def already_exported(file: Path) -> Callable[..., Path]:
    """What stands for an export where the network that ships has been exported before: the file of then. With its features, as
    a search looks at it, it is exported.
    """

    def export(model: Any, size: Any, path: Path, names: Any = ("logits",)) -> Path:
        return Path(shutil.copy(file, path)) if tuple(names) == ("logits",) else export_onnx(model, size, path, names)

    return export
