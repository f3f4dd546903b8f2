"""A search on a Ray cluster: the numbers and the choice of one machine, though a node dies; and what is refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from downres import Budget, Candidate, DownresError, Measuring, Question, load_run, search
from downres.cli import _arguments
from downres.environment import versions
from downres.images import Images
from downres.images.chunks import Chunk, Chunked, Division
from downres.measuring.latency import hardware
from downres.recovery.training import Training
from downres.searching import pieces
from downres.searching.prepare import prepare_task
from downres.searching.store import Store

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with downres[ray]")
SCRIPT = Path(__file__).with_name("on_three_nodes.py")
LONGEST_S = 600
"""Of wall clock, on a machine that does other things too; of CPU it is less than a minute."""


def descendants(process: int) -> list[int]:
    found = [process]
    for one in found:
        for file in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, file.read_text().split())
    return found[1:]


@pytest.fixture(scope="module")
def clustered(cells, tiny_file, tmp_path_factory):
    """(folder with the runs `alone` and on a `cluster`, what was seen); whatever happens, no process is left."""
    root = tmp_path_factory.mktemp("ray")
    data, seen = cells.write(root / "data", ("",)), root / "seen.json"
    command = [sys.executable, str(SCRIPT), str(tiny_file), str(data), str(root), str(seen)]
    with open(root / "said.txt", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        started = descendants(process.pid)
        for number in (process.pid, *started):
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, (root / "said.txt").read_text()[-4000:]
    return root, json.loads(seen.read_text())


def numbers(folder: Path) -> dict:
    """All that a run has measured but for times, by its keys."""

    def untimed(value):
        if isinstance(value, dict):
            return {key: untimed(v) for key, v in value.items() if key != "seconds"}
        return [untimed(v) for v in value] if isinstance(value, list) else value

    store = Store.read(folder)
    left_out = ("started", "latency", "footprint", "unexported", "hardware", "finished")
    return {key: untimed(value) for key, value in store._values.items() if key.partition("/")[0] not in left_out}


@needs_ray
@pytest.mark.parametrize("name", ["split", "rounds", "folds"])
def test_numbers_and_choice_are_those_of_one_machine_to_the_digit(clustered, name):
    root, _ = clustered
    alone, there = (numbers(root / where / name) for where in ("alone", "cluster"))
    assert len([key for key in alone if key.startswith("quality/")]) >= 2
    assert there == alone
    one, other = (load_run(root / where / name) for where in ("alone", "cluster"))
    assert other.best is not None and str(other.best.candidate) == str(one.best.candidate)
    assert [r.drop for r in other.results] == [r.drop for r in one.results]
    assert not any("kinds of processors" in note for note in other.notes)


@needs_ray
def test_a_node_died_at_work_and_the_search_went_on(clustered):
    _, seen = clustered
    assert seen["killed"] == 1 and seen["left"] == 3
    assert "candidates on 4 nodes" in seen["told"]


@needs_ray
def test_what_cannot_be_is_said_in_the_sentence_of_one_machine(clustered):
    _, seen = clustered
    assert "has no node 'moon'" in seen["refused"]["node"]
    assert "The model returns NaN for 20 of 20 images" in seen["refused"]["nan"]


def test_pictures_in_chunks_are_the_same_pictures():
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (5 + i, 4, 3), np.uint8) for i in range(7)]
    pictures[2], pictures[4] = pictures[2][..., 0].astype(np.uint16), pictures[4][..., 0].astype(np.float32)[::-1]
    images = Images(pictures, [f"photo {i}" for i in range(7)])
    order = np.array([3, 1, 6, 0, 2, 5, 4])
    places = np.argsort(order)
    division, fetched = Division(places, 3), []

    def fetch(chunk):
        fetched.append(chunk)
        return Chunk.of([images[int(i)] for i in division.inside(chunk)])

    there = Images(Chunked(division, images.shapes, fetch), images.names, images.checksums)
    assert division.chunks(np.array([3, 6])) == [0] and division.chunks(np.array([4, 1])) == [0, 2]
    assert np.array_equal(there[1], pictures[1]) and fetched == [0]
    for i, picture in enumerate(pictures):
        assert there[i].dtype == picture.dtype and np.array_equal(there[i], picture)
    some = there.take([6, 2])
    assert some.shapes == [pictures[6].shape, pictures[2].shape]
    assert np.array_equal(some[1], pictures[2]) and len(some) == 2
    assert Division.of(images, order).chunks(np.arange(7)) == [0]  # of a few bytes each


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latency_node": "edge"}, "name that with `ray`"),
        ({"ray": "local", "latency_node": "edge", "joint": 2}, "leave `latency_node` out, or `joint`"),
        ({"ray": "ray://host:10001"}, "run it on a node"),
        ({"out": "s3://bucket/run"}, "is an address: mount it"),
    ],
)
def test_what_a_cluster_is_not_for(tiny, cells, tmp_path, options, said):
    with pytest.raises(DownresError, match=said):
        search(tiny, cells.dataset(), fit_head=True, resolutions=[32], **{"out": tmp_path / "run", **options})


def test_without_ray_it_says_how_to_get_it(tiny, cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DownresError, match=r"pip install 'downres\[ray\]'"):
        search(tiny, cells.dataset(), fit_head=True, resolutions=[32], out=tmp_path / "run", ray="local")


def test_processes_of_accelerate_are_not_a_cluster(tiny, cells, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DownresError, match="start the search with `ray` as it is"):
        search(tiny, cells.dataset(), fit_head=True, resolutions=[32], out=tmp_path / "run", ray="local", training=Training())


def test_the_option_may_stand_alone():
    assert _arguments(["search", "--ray", "timm:x", "--data", "d"]) == ["search", "--ray", "local", "timm:x", "--data", "d"]
    assert _arguments(["search", "--ray"]) == ["search", "--ray", "local"]
    for address in ("auto", "local", "10.0.0.1:6379", "[::1]:6379", "head-node.lan:6379", "ray://head:10001"):
        assert _arguments(["--ray", address, "--json"]) == ["--ray", address, "--json"]
    assert _arguments(["--ray=auto", "x"]) == ["--ray=auto", "x"]


def test_an_address_without_its_port_is_asked_for(cli):
    done = cli("search", "--ray", "head-node", "timm:resnet18", "--data", "photos")
    assert done.code == 2 and "behind --ray is HOST:PORT, auto or local" in done.err
    assert "--ray" not in cli("search", "timm:resnet18", "photos", "--data", "photos").err


def test_what_is_timed_on_another_node_is_told_to_the_search(tiny, cells, tmp_path):
    task = prepare_task(tiny, cells.dataset(), Question(fit_head=True))
    bank = task.bank(tmp_path, runtime="torch", threads=1)
    settings, small = {"latency_batch": 1, "minimize": "macs"}, Candidate(32)
    how = {"budget": Budget(), "measuring": Measuring(runtime="torch", threads=1)}
    found, _ = pieces._gate(task, bank, settings, {}, [task.native, small], **how)
    assert set(found["latency"]) == {"48", "32"} and found["unexported"] == {}
    assert found["latency"]["32"]["hardware"] == hardware()
    found, _ = pieces._again(task, bank, settings, {}, task.native_state.at(small))
    assert set(found) == {"latency/32"} and found["latency/32"]["ratio"]


def test_a_node_with_another_version_is_not_measured_on():
    kit = pieces.Kit("", [], {}, Training(), 1, 1, {**versions(), "torch": "0.1", "else": "2"})
    done = pieces.work(kit, [], {}, "measured", {})
    assert done.value is None and "else missing, the search torch 0.1, else 2: install the same on all nodes" in done.unfit
