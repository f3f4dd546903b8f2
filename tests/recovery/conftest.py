"""What the tests of recovery share."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from downres import Run, load_run, search


@pytest.fixture(scope="module", autouse=True)
def set_aside() -> Iterator[None]:
    """Training looks for garbage where a batch does not fit: through a second's worth of libraries each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def searched() -> Callable[..., Run]:
    """A search of which everything but the artifact is wanted: it ends where that would be exported."""

    def progress(what: str, done: int, total: int) -> None:
        if "shipping" in what:
            raise KeyboardInterrupt

    def run(*arguments: Any, out: Any, **options: Any) -> Run:
        with pytest.raises(KeyboardInterrupt):
            search(*arguments, out=out, progress=progress, **options)
        found = load_run(out)
        assert all(r.status == "measured" for r in found.results)
        return found

    return run
