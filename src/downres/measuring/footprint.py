"""What a file that runs takes: bytes on disk, and resident memory where nothing else is loaded."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..engines.engine import Engine
from ..records import Footprint

LIMIT_S = 120.0


def footprint(engine: Engine, file: Path, shape: Sequence[int], threads: int, *, alone: bool = True) -> Footprint:
    """Of a file of that engine, answering once to a batch of that shape (b, c, h, w). The memory is that of a process of its
    own, as Linux reports it (VmHWM; `ru_maxrss` would be that of whoever started it): libraries, weights and activations; None
    where no such process can run.
    alone: whether there is one that computes as this file is meant to.
    """
    size = sum(one.stat().st_size for one in engine.files(file))
    if not alone or not engine.alone or engine.device != "cpu" or sys.platform != "linux":
        return Footprint(size)
    command = [sys.executable, "-c", engine.alone, str(file.resolve()), str(threads), *map(str, shape)]
    try:
        # Without closing what is inherited the process is spawned, and not forked from one with the threads of many runtimes.
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True, close_fds=False)
        before, after = (1024 * int(number) for number in done.stdout.split()[-2:])
    except (subprocess.SubprocessError, ValueError, OSError):
        return Footprint(size)
    return Footprint(size, after, before)
