"""Which layers of a network lose most in 8 bits."""

import tempfile
from pathlib import Path

import numpy as np

from ..engines.engine import Batches, Quantization
from ..parse import FP32
from .bank import Bank
from .state import QUANTIZED, State

IMAGES = 8
GROUPS = 12
"""Layers are looked at in at most so many neighbours at a time, then one by one within the worst: a file for each is
seconds."""


def most_sensitive(bank: Bank, state: State, indices: np.ndarray) -> list[str]:
    """Names of the layers, the one first whose return to float brings the answers on some of the images `indices` nearest to
    those of the network in float.

    A layer is judged by what the whole network answers with it alone in float, not by its own error: errors that later layers
    forgive cost nothing.
    """
    if (known := bank.sensitive.get(state.candidate)) is not None:
        return known  # of another fold, whose ranges are hardly others
    step = state.step(QUANTIZED)
    assert step is not None and step.how is not None
    engine, onnx, head = bank.engine(state.candidate), bank.onnx(state.network), bank.head_weight(state)
    some = indices[:IMAGES]
    images = np.concatenate([np.asarray(batch) for batch in bank.batches(state, some, len(some))])
    names = [name for name in engine.layer_names(onnx, head) if name not in step.how.kept]
    if len(names) < 2:
        return names

    with tempfile.TemporaryDirectory(prefix="downres-") as place:
        file, how = Path(place) / f"tried{Path(engine.file).suffix}", step.how
        engine.write(onnx, file, FP32)
        exact = engine.load(file, bank.threads)(images)

        def error_with(kept: list[str]) -> float:
            tried = Quantization(how.ranges, (*how.kept, *kept))
            engine.quantize(onnx, file, Batches.of([images]), tried, head, Path(place) / "ranges.json")
            answers = engine.load(file, bank.threads)(images)
            return float(
                sum(np.square(a - b).mean() / max(np.square(a).mean(), 1e-12) for a, b in zip(exact, answers, strict=True))
            )

        groups = [list(part) for part in np.array_split(np.array(names), min(GROUPS, len(names)))]
        by_group = sorted(groups, key=error_with)
        worst, rest = by_group[0], [name for group in by_group[1:] for name in group]
        bank.sensitive[state.candidate] = sorted(map(str, worst), key=lambda name: error_with([name])) + list(map(str, rest))
        return bank.sensitive[state.candidate]
