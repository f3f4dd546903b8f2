"""The folder of a run: every measurement is in it the moment it exists, so a run can be stopped, moved and resumed."""

import datetime
import fcntl
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..environment import versions
from ..errors import DownresError
from ..record import plain, read_json, settled, sha256, sweep, write_json, write_whole

FORMAT = 4
"""Of run.json and measurements.jsonl; a run of another format is refused."""


IN_TORCH, UNEXPORTED, UNSHIPPED, STOPPED, UNNEEDED = "in_torch", "unexported", "unshipped", "stopped", "unneeded"
"""Measurements that say why ONNX is not there: of the original, so that all is measured in torch; of each candidate that was
stopped for it, by name; of the one that was chosen. Before a candidate's name: STOPPED says why it could not be measured,
UNNEEDED why it need not be.
"""
ROUNDS, COMPARED = "rounds", "compared"
"""The measurements that say whether the proof is looked at in rounds, and which candidates are compared in it."""
KINDS = "hardware"
"""The measurement that says what kinds of processors of a cluster measured, where there are several."""
MOST_BYTES = 2**28
"""Of run.json; a larger one is none of ours."""


class Store:
    """`settings` (run.json), keyed JSON measurements (measurements.jsonl, append only) and arrays (*.npz).

    What was damaged since it was written is as if it had never been measured: every line carries its checksum, and the
    digest of every array file is a measurement of its own, written once the file is safely on the disk.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._values: dict[str, Any] = {}
        self._lock: Any = None
        self._log = self.folder / "measurements.jsonl"
        try:
            self.settings: dict[str, Any] = read_json(self.folder / "run.json", MOST_BYTES)
            if not isinstance(self.settings, dict) or self.settings.get("format") != FORMAT:
                raise ValueError
        except FileNotFoundError:
            self.settings = {}
        except (OSError, ValueError):
            raise DownresError(
                f"{self.folder} is not a run that this version can read (its run.json is broken or older): "
                "give another folder with `out`."
            ) from None
        if self._log.is_file():
            for line in self._log.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    if entry["crc"] == _crc(entry["key"], entry["value"]):
                        self._values[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line cut off by a hard stop, or damaged: its measurement is made again

    @classmethod
    def read(cls, folder: str | Path) -> "Store":
        """An existing run, to look at. Raises DownresError when there is none."""
        if not (Path(folder) / "run.json").is_file():
            raise DownresError(
                f"{folder} is not a run of downres (it has no run.json): give the folder that search wrote with `out`."
            )
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path, settings: dict[str, Any]) -> "Store":
        """A run to write to: new, or one with the same settings that goes on. One process at a time."""
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise DownresError(f"{path} is a file: give a folder with `out`.")
        others = [p for p in path.iterdir() if p.name != ".lock" and p.suffix != ".partial"] if path.is_dir() else []
        if others and not (path / "run.json").exists():
            raise DownresError(f"{path} holds other files and no run: give a new or empty folder with `out`.")
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise DownresError(
                f"Another downres is writing to {path}: wait for it, or give another folder with `out`."
            ) from None
        try:
            sweep(path)
            store = cls(path)  # read under the lock: another process may just have finished
            store._lock = lock
            settings = json.loads(write_json(settings))
            if store.settings:
                # The command is only shown: the same question may be typed in many ways.
                _refuse_other(path, store.settings, {k: v for k, v in settings.items() if k != "command"})
            else:
                store.settings = settings
                write_whole(path / "run.json", write_json(settings, indent=1).encode())
            if store._log.is_file():
                # A cut-off last line would swallow the next entry.
                content = store._log.read_bytes()
                if content and not content.endswith(b"\n"):
                    write_whole(store._log, content[: content.rfind(b"\n") + 1])
        except BaseException:
            lock.close()
            raise
        return store

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self) -> None:
        """Notes when this run was started, and by which versions, once."""
        if self.get("started") is None:
            when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.put("started", {"when": when, "versions": versions()})

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def put(self, key: str, value: Any) -> Any:
        """Store a measurement for good before it is used."""
        value = json.loads(write_json(plain(value)))
        line = write_json({"key": key, "value": value, "crc": _crc(key, value)})
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(line + "\n")
            log.flush()
            os.fsync(log.fileno())
        self._values[key] = value
        return value

    def same(self, key: str, value: dict[str, Any], identity: str) -> None:
        """Store what the run's measurements depend on; DownresError when the run has another `identity` in it."""
        value = json.loads(write_json(plain(value)))
        if self.get(key) is None:
            self.put(key, value)
        else:
            _refuse_other(self.folder, self.get(key), {identity: value[identity]}, f"{key} ")

    def put_arrays(self, name: str, **arrays: np.ndarray) -> None:
        file = self.folder / f"{name}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        with open(partial, "wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
        settled(partial)
        partial.replace(file)
        settled(file.parent)
        if self.get(f"arrays/{name}") != (digest := sha256(file)):
            self.put(f"arrays/{name}", digest)

    def has_arrays(self, name: str) -> bool:
        """Whether they are there as they were put."""
        file = self.folder / f"{name}.npz"
        return file.is_file() and sha256(file) == self.get(f"arrays/{name}")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Raises DownresError for what is missing or damaged."""
        file = self.folder / f"{name}.npz"
        if self.has_arrays(name):
            try:
                with np.load(file, allow_pickle=False) as loaded:
                    return {k: loaded[k] for k in loaded.files}
            except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile):
                pass
        raise DownresError(f"{file} is missing or damaged: the command that searched measures it again.")


def _crc(key: str, value: Any) -> int:
    return zlib.crc32(json.dumps([key, value], sort_keys=True).encode())


def _refuse_other(folder: Path, stored: dict[str, Any], now: dict[str, Any], what: str = "") -> None:
    other = [k for k in now if now[k] != stored.get(k)]
    if other:
        k = other[0]
        if isinstance(stored.get(k), dict) and isinstance(now[k], dict):  # name what differs in it, and not all of it
            return _refuse_other(folder, stored[k], now[k], f"{what}{k} ")
        raise DownresError(
            f"{folder} holds a run with another {what}{k} ({_short(stored.get(k))}, now {_short(now[k])}): "
            "give another folder with `out`, or delete that one."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
