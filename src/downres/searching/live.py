"""A run as it goes: the search says in its folder where it is, and a page on this machine redraws as measurements come."""

import contextlib
import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DownresError, first_line, shown
from ..record import plain, read_json, write_json, write_whole
from ..reports import words
from ..reports.report import build_report
from ..tasks import Task, known_task
from .prepare import Progress
from .results import Run, load_run
from .view import view_of

STATUS = "status.json"
"""Of a run that goes on: what it does now. Nothing is read of it but by who watches."""
EVERY_S = 1.0
"""Between two notes of where it is."""
SILENT_S = 300.0
"""Without a note for so long it is likelier stopped than at a long step."""
PAGE = Path(__file__).parents[1] / "reports" / "watch.html"
LOCAL = ("127.0.0.1", "localhost")


@contextlib.contextmanager
def told(folder: Path, also: Progress | None) -> Iterator[Progress]:
    """Progress that is noted in the run's folder, too; once the run has ended in any way, the note goes."""
    file, last, lock = folder / STATUS, [0.0], threading.Lock()

    def progress(what: str, done: int, total: int) -> None:
        now = time.time()
        if now - last[0] >= EVERY_S and lock.acquire(blocking=False):
            try:
                last[0] = now
                with contextlib.suppress(OSError):  # a full disk is the run's to tell, not the note's
                    write_whole(file, write_json({"what": what, "done": done, "total": total, "at": now}).encode())
            finally:
                lock.release()
        if also is not None:
            also(what, done, total)

    try:
        yield progress
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


class Watch:
    """The page of a run on this machine: `address`, `serve` until it is closed or interrupted. Reads the folder alone."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self._lock = folder, threading.Lock()
        self._seen: tuple[Any, ...] | None = None
        self._serving = False
        self._run: Run | None = None
        self._page, self._error, self._times = b"", "", list[tuple[float, int]]()
        watch = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                watch._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        try:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            why = first_line(error)
            raise DownresError(f"No page can be served on port {port} ({why}): give another `port`, 0 for any free.") from None
        self._server.daemon_threads = True

    @cached_property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def serve(self) -> None:
        """Answers until `close`, from another thread, or Ctrl-C."""
        self._serving = True
        self._server.serve_forever(poll_interval=0.2)

    def end_with(self, process: int) -> None:
        """Closes the page once that process, which started this one, is gone."""

        def waiting() -> None:
            while os.getppid() == process:
                time.sleep(1)
            self.close()

        threading.Thread(target=waiting, daemon=True).start()

    def close(self) -> None:
        if self._serving:
            self._server.shutdown()
        self._server.server_close()

    def state(self) -> dict[str, Any]:
        """What the page shows of the run: plain JSON values."""
        with self._lock:
            now = self._note()
            self._look(bool(now and "latency" in now["what"]))
            run = self._run
            if run is None:
                return {"error": self._error, "now": now, "version": 0}
            rows = [
                {
                    "candidate": words.label(r.candidate),
                    "status": "proven" if r.proven else r.status,
                    "verdict": words.shown_verdict(r) if r.drop else "",
                    "reason": r.reason,
                    "drop": words.compared(r.drop) if r.drop else "",
                }
                for r in run.results
            ]
            done = sum(r.status != "waiting" for r in run.results)
            return plain(
                {
                    "error": self._error,
                    "title": run.settings["model"] or "a module given in Python",
                    "data": run.data["description"],
                    "finished": run.finished,
                    "verdict": words.verdict(run.original, run.results, run.best, run.budget, run.task.score),
                    "done": done,
                    "of": len(run.results),
                    "left_s": self._left(done, len(run.results), run.finished),
                    "rows": rows,
                    "now": now,
                    "version": hash(self._seen) & 0xFFFFFFFF,
                }
            )

    def _note(self) -> dict[str, Any] | None:
        """What the run said last of where it is."""
        try:
            said = read_json(self.folder / STATUS, 2**16)
            what, done, total, at = shown(str(said["what"])), int(said["done"]), int(said["total"]), float(said["at"])
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            return None
        ago = max(0.0, time.time() - at)
        return {"what": what, "done": done, "total": total, "seconds_ago": ago, "silent": ago > SILENT_S}

    def _look(self, busy: bool) -> None:
        """Reads the run again where something was measured since; busy: not while it times, which reading would disturb."""
        files = [self.folder / name for name in ("run.json", "measurements.jsonl", "best/manifest.json")]
        seen = tuple((s.st_size, s.st_mtime_ns) if (s := _stat(file)) else None for file in files)
        if seen == self._seen or (busy and self._run is not None):
            return
        try:
            self._run = load_run(self.folder)
            self._page, self._error, self._seen = build_report(view_of(self._run)).encode(), "", seen
        except (DownresError, OSError) as error:  # not begun, written to in this moment, or away: it is asked again
            self._error = str(error)

    def _left(self, done: int, of: int, finished: bool) -> float | None:
        """Seconds, as candidates were done since the page was opened; None where none was yet."""
        if not self._times or self._times[-1][1] != done:
            self._times.append((time.monotonic(), done))
        (began, first), (last, now) = self._times[0], self._times[-1]
        if finished or now == first:
            return 0.0 if finished else None
        return max(0.0, (of - now) * (last - began) / (now - first) - (time.monotonic() - last))

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(ConnectionError):  # a tab that was closed
            self._answer_to(request)

    def _answer_to(self, request: http.server.BaseHTTPRequestHandler) -> None:
        # A page of elsewhere that got its name to point here must not read what is measured.
        if request.headers.get("Host", "").rpartition(":")[0] not in LOCAL:
            request.send_error(403, "only this machine is answered")
            return
        path = request.path.partition("?")[0]
        if path == "/":
            content, kind = PAGE.read_bytes(), "text/html"
        elif path == "/state.json":
            content, kind = json.dumps(self.state(), allow_nan=False).encode(), "application/json"
        elif path == "/report.html" and self._page:
            content, kind = self._page, "text/html"
        else:
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("Content-Type", f"{kind}; charset=utf-8")
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Cache-Control", "no-store")
        request.end_headers()
        request.wfile.write(content)


def _stat(file: Path) -> Any:
    try:
        return file.stat()
    except OSError:
        return None


def watch(run: str | Path, *, port: int = 0, task: str | type[Task] | None = None) -> Watch:
    """A page at `.address`, for this machine alone, that redraws as a run's measurements come: what it does now, what was
    decided and why, the picture, and how long it may take; `.serve()` answers until Ctrl-C or `.close()`.

    run: its folder, which need not be there yet; the search may run on another machine that writes to it. port: 0 takes any
    that is free. task: of one's own, where the run has one. Raises DownresError where the port is taken.
    """
    known_task(task)
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 2**16:
        raise DownresError(f"A port is a whole number from 0 to 65535, {port!r} is not: 0 takes any that is free.")
    return Watch(Path(run), port)
