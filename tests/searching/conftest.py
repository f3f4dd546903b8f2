"""What the tests of searches share."""

import warnings
from pathlib import Path
from typing import Any

from downres import Run, search

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
