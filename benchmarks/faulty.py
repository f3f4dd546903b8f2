"""What `faults.py` stands on: processes that may die, what they left judged by rules of its own, and the point of a fault."""

import errno
import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Fault(Exception):
    """What did not survive, and why."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit code, of a killed one minus the signal; late: it was stopped after its time."""

    code: int
    out: str
    err: str
    seconds: float
    late: bool


def forked(what: Callable[[], Any], seconds: float = 60.0, memory: int = 0) -> Ended:
    """`what()` in a child of this process, which shares what is imported here and nothing else.

    memory: bytes of address space that the child may take beside what it starts with; 0: as many as there are.
    """
    files = [os.memfd_create(name) for name in ("out", "err")]
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(what, files, memory)
    descriptor = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    late = not waiting.poll(seconds * 1000)
    if late:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(descriptor)
    texts = []
    for file in files:
        with open(file, "rb") as handle:
            handle.seek(0)
            texts.append(handle.read().decode(errors="replace"))
    return Ended(code, *texts, time.monotonic() - start, late)


def _child(what: Callable[[], Any], files: list[int], memory: int) -> None:
    code = 1
    try:
        os.setsid()
        for file, target in zip(files, (1, 2), strict=True):
            os.dup2(file, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if memory:
            have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (have + memory,) * 2)
        what()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*arguments: object) -> Callable[[], None]:
    """`downres ARGUMENTS`, to be run in a child."""

    def run() -> None:
        from downres.cli import main

        sys.argv = ["downres", *map(str, arguments)]
        os.environ["COLUMNS"] = "2000"  # a line on the screen is a line that was said
        main()

    return run


SAID = re.compile(r"(Note|Skipped) .*|Note: .*|… \d+ images skipped.*|.* \(\d+\)|")
"""What stands on standard error beside the sentence of an error: notes, files left out, how far it is."""


def judged(ended: Ended, codes: tuple[int, ...] = (0, 2)) -> str:
    """'answered', or 'refused' in one sentence; raises Fault for every other end."""
    told = ended.err.strip().splitlines()
    if ended.late:
        raise Fault(f"no end within {ended.seconds:.0f} s")
    if "Traceback" in ended.err + ended.out:
        raise Fault(f"traceback: {told[-1][:200] if told else ''}")
    if ended.code not in codes:
        raise Fault(f"exit {ended.code}: {told[-1][:200] if told else 'nothing said'}")
    if ended.code != 2:
        return "answered"
    sentence = [line for line in told if not SAID.fullmatch(line)]
    if len(sentence) != 1 or not re.search(r"[.?!]$", sentence[0]) or ended.out.strip():
        raise Fault(f"no single sentence: {' | '.join(sentence)[:300]} {ended.out[:50]!r}")
    if re.search(r"\x1b|Errno|<class|object at 0x|Error\(", sentence[0]):
        raise Fault(f"no words for people: {sentence[0][:200]}")
    return "refused"


def document(ended: Ended) -> Any:
    """What `--json` printed; raises Fault where that is no strict JSON."""
    try:
        return json.loads(ended.out, parse_constant=_no_number)
    except ValueError as error:
        raise Fault(f"no JSON: {error}") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


TIMED = ("seconds", "latency", "ratio", "ratio_low", "ratio_high", "footprint", "interactions")


def untimed(value: Any) -> Any:
    """A document without what a clock measured."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not k.endswith(("_ms", "_per_s", "rss_bytes")) and k not in TIMED}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def at_change(folder: Path, number: int, act: Callable[[], None]) -> Callable[[], int]:
    """Calls `act` in this process at change `number` (from 1 on) of what is in a folder, and at all that follow.

    It is looked at before a file in it is opened to be written, renamed, linked, removed, a folder made or removed, and before
    `fsync` (Python announces them to audit hooks, whatever code makes them): every other content than last time is a change,
    a state that a kill may leave. Returns what tells how many there have been.
    """
    count, inside, place, last = 0, False, str(folder.resolve()), None

    def reached() -> None:
        nonlocal count, inside, last
        if inside:
            return
        inside = True
        try:
            state = _state(place)
            count += state != last
            last = state
            if count >= number:
                act()
        finally:
            inside = False

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if changes and any(os.path.abspath(p).startswith(place) for p in given[:2] if isinstance(p, (str, os.PathLike))):
            reached()

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(place):
            reached()
        fsync(descriptor)

    os.fsync = synced
    sys.addaudithook(hook)
    return lambda: count


def _state(place: str) -> list[tuple[Any, ...]]:
    """Every file and folder there, with what changes when it is written to."""
    found = []
    for folder, _, files in os.walk(place):
        found += [(folder, name, (told := os.lstat(f"{folder}/{name}")).st_size, told.st_mtime_ns) for name in files]
        found.append((folder,))
    return sorted(found)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
