"""Searches here, and on a Ray cluster on this machine: three nodes that measure, of which one is killed at work, and one that
times. test_ray.py runs it as a script.

Arguments: FILE with the network, DATA, OUT, and a file for what was seen, JSON.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

WORKS = b"ray::work"
"""What Ray calls a process at a piece of a search."""


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def at_work(raylet: int) -> bool:
    return any(Path(f"/proc/{child}/cmdline").read_bytes().startswith(WORKS) for child in children(raylet))


class Killer:
    """Kills, once candidates are measured, the first of some nodes that is at work."""

    def __init__(self, nodes) -> None:
        self.raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        self.killed: list[int] = []
        self._thread: threading.Thread | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith("candidates") and self._thread is None:
            self._thread = threading.Thread(target=self._kill, daemon=True)
            self._thread.start()

    def _kill(self) -> None:
        while not self.killed:
            for raylet in self.raylets:
                try:
                    if at_work(raylet):
                        os.kill(raylet, signal.SIGKILL)
                        self.killed.append(raylet)
                        return
                except OSError:  # a process that has just ended
                    continue
            time.sleep(0.01)


HOW = {"fit_head": True, "max_drop": 30.0, "resolutions": [40, 32, 24, 16], "stem_scales": (), "runtime": "torch", "threads": 1}
SEARCHES = {"split": {}, "rounds": {"sequential": True}, "folds": {"folds": 2}}


def searched(file: str, data: str, out: Path, progress=None, made_by="make", **how) -> None:
    """As far as the choice: a search ends where its model would be exported."""
    from downres import Preprocessing, load_model, search

    def until(what: str, done: int, total: int) -> None:
        if "shipping" in what:
            raise KeyboardInterrupt
        if progress is not None:
            progress(what, done, total)

    model = load_model(f"{file}:{made_by}")
    model = dataclasses.replace(model, preprocessing=Preprocessing(48, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")  # that torch is not what is shipped
        search(model, data, out=out, progress=until, **{**HOW, **how})


def refusal(file: str, data: str, out: Path, **how) -> str:
    from downres import DownresError

    try:
        searched(file, data, out, **how)
    except DownresError as error:
        return str(error)
    return ""


def main(file: str, data: str, out: str, seen: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # else other work on this machine starves them
    for name, how in SEARCHES.items():
        searched(file, data, Path(out) / "alone" / name, **how)

    import ray
    from ray.cluster_utils import Cluster

    quick = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 0, "health_check_failure_threshold": 4}
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True, connect=False, head_node_args={**node, "include_dashboard": False, "_system_config": quick}
    )
    try:
        killer = Killer([cluster.add_node(**node), cluster.add_node(**node)])
        cluster.add_node(num_cpus=0, object_store_memory=node["object_store_memory"], resources={"edge": 1})
        cluster.wait_for_nodes()
        told: set[str] = set()

        def progress(what: str, done: int, total: int) -> None:
            told.add(what)
            killer(what, done, total)

        there = {"ray": cluster.address}
        searched(file, data, Path(out) / "cluster" / "split", progress, **there)
        searched(file, data, Path(out) / "cluster" / "rounds", **there, **SEARCHES["rounds"])
        searched(file, data, Path(out) / "cluster" / "folds", **there, **SEARCHES["folds"], latency_node="edge")
        refused = {
            "node": refusal(file, data, Path(out) / "no" / "node", **there, latency_node="moon"),
            "nan": refusal(file, data, Path(out) / "no" / "nan", **there, made_by="nan", fit_head=False),
        }
        ray.init(cluster.address, logging_level="ERROR")
        left = sum(node["Alive"] for node in ray.nodes())
        ray.shutdown()
        found = {"killed": len(killer.killed), "left": left, "told": sorted(told), "refused": refused}
        Path(seen).write_text(json.dumps(found))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
