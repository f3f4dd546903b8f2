"""What the tests of recovery share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def set_aside() -> Iterator[None]:
    """Training looks for garbage where a batch does not fit: through a second's worth of libraries each time."""
    gc.freeze()
    yield
    gc.unfreeze()
