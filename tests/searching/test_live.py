"""A run as it goes: what it notes of itself, what the page says, and the page in a browser."""

import dataclasses
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from downres import load_model, search, watch
from downres.errors import DownresError
from downres.searching import live
from downres.searching.live import STATUS, told
from downres.tasks.classification.task import Classification

HOW = {"fit_head": True, "max_drop": 40.0, "resolutions": [40, 32], "stem_scales": (), "threads": 1, "recover": "none"}


@pytest.fixture(scope="module")
def model(tiny_file, tiny_preprocessing):
    return dataclasses.replace(load_model(f"{tiny_file}:make"), preprocessing=tiny_preprocessing)


@pytest.fixture(scope="module")
def folder(cells, tmp_path_factory):
    return cells.write(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def stopped_run(model, folder, tmp_path_factory):
    """A run that was stopped before its last candidate."""
    real, out = Classification.evidence, tmp_path_factory.mktemp("stopped") / "run"

    def stopped(self, bank, state, indices, **how):
        if state.candidate.resolution == 32:
            raise KeyboardInterrupt
        return real(self, bank, state, indices, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classification, "evidence", stopped)
        search(model, str(folder), out=out, **HOW)
    return out


@pytest.fixture
def begun(stopped_run, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.fixture
def served():
    """Serves the page of a run while the test goes on."""
    pages = []

    def serve(run):
        page = watch(run)
        pages.append(page)
        threading.Thread(target=page.serve, daemon=True).start()
        return page

    yield serve
    for page in pages:
        page.close()


def asked(page, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", int(page.address.rstrip("/").rpartition(":")[2]), timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_where_it_is_stands_in_the_folder_while_it_goes(tmp_path, monkeypatch):
    seen = []
    with told(tmp_path, lambda *said: seen.append(said)) as progress:
        progress("looking", 1, 4)
        said = json.loads((tmp_path / STATUS).read_text())
        assert (said["what"], said["done"], said["total"]) == ("looking", 1, 4) and abs(said["at"] - time.time()) < 60
        progress("looking", 2, 4)  # within a second: not noted again
        assert json.loads((tmp_path / STATUS).read_text())["done"] == 1
        monkeypatch.setattr(live, "EVERY_S", 0.0)
        progress("looking", 3, 4)
        assert json.loads((tmp_path / STATUS).read_text())["done"] == 3
    assert seen == [("looking", 1, 4), ("looking", 2, 4), ("looking", 3, 4)] and not (tmp_path / STATUS).exists()


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live, "write_whole", full)
    with told(tmp_path, None) as progress:
        progress("looking", 1, 4)


def test_every_state_of_a_run(begun, model, folder, tmp_path):
    nothing = watch(tmp_path / "none").state()
    assert nothing["version"] == 0 and "is not a run of downres" in nothing["error"]

    page = watch(begun)
    state = page.state()
    assert (state["finished"], state["done"], state["of"], state["now"], state["left_s"]) == (False, 1, 2, None, None)
    assert [row["status"] for row in state["rows"]][1] == "waiting" and "not finished" in state["verdict"]
    (begun / STATUS).write_text(json.dumps({"what": "32: looking at images", "done": 8, "total": 80, "at": time.time() - 400}))
    now = page.state()["now"]
    assert (now["what"], now["done"], now["total"], now["silent"]) == ("32: looking at images", 8, 80, True)
    assert now["seconds_ago"] > 390
    texts = ["", "[]", '{"what": 1}', '{"what": "x", "done": "y", "total": 1, "at": 0}']
    texts += ['{"what": "x", "done": 1e999, "total": 2, "at": 0}']
    for broken in texts:
        (begun / STATUS).write_text(broken)
        assert page.state()["now"] is None

    version = state["version"]
    assert page.state()["version"] == version
    search(model, str(folder), out=begun, **HOW)
    state = page.state()
    assert state["finished"] and state["done"] == state["of"] == 2 and state["version"] != version and state["left_s"] == 0
    assert {row["status"] for row in state["rows"]} <= {"proven", "measured"} and "not finished" not in state["verdict"]
    assert not (begun / STATUS).exists()


def test_it_is_not_read_again_while_it_times(begun, monkeypatch):
    page = watch(begun)
    page.state()
    with open(begun / "measurements.jsonl", "a") as log:
        log.write("\n")
    (begun / STATUS).write_text(json.dumps({"what": "latency", "done": 8, "total": 80, "at": time.time()}))
    with monkeypatch.context() as patch:
        patch.setattr(live, "load_run", lambda folder: pytest.fail("read"))
        page.state()
    (begun / STATUS).unlink()
    for error in (DownresError("read."), OSError("read.")):  # a shared folder that goes away
        monkeypatch.setattr(live, "load_run", lambda folder, error=error: (_ for _ in ()).throw(error))
        assert page.state()["error"] == "read."


def test_only_this_machine_is_answered(begun, served):
    page = served(begun)
    assert page.address.startswith("http://127.0.0.1:")
    assert asked(page, "/")[0] == 200 and b"downres watch" in asked(page, "/")[1]
    assert asked(page, "/report.html")[0] == 404  # nobody has asked how it is
    status, body = asked(page, "/state.json")
    assert status == 200 and json.loads(body)["of"] == 2
    status, body = asked(page, "/report.html?17")
    assert status == 200 and b"<title>downres report</title>" in body
    assert asked(page, "/run.json")[0] == asked(page, "/../run.json")[0] == 404
    assert asked(page, "/state.json", "evil.example:80")[0] == 403


@pytest.mark.parametrize("port", [-1, 65536, True, "80"])
def test_no_port(port, tmp_path):
    with pytest.raises(DownresError, match="from 0 to 65535"):
        watch(tmp_path, port=port)


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(DownresError, match="No page can be served on port .*: give another `port`"):
            watch(tmp_path, port=other.getsockname()[1])


def test_the_command_ends_with_ctrl_c(begun, started):
    process = started(
        [sys.executable, "-m", "downres", "watch", begun], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = process.stdout.readline()
    address = said.partition(" at ")[2].split()[0]
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    connection.request("GET", "/state.json")
    assert json.loads(connection.getresponse().read())["of"] == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (0, 130)
    assert "Traceback" not in process.stderr.read()


def test_the_page_of_a_search_ends_with_it(begun, monkeypatch):
    page = watch(begun)
    serving = threading.Thread(target=page.serve)
    serving.start()
    parents = iter([7, 7])
    monkeypatch.setattr(live.os, "getppid", lambda: next(parents, 1))
    page.end_with(7)
    serving.join(20)
    assert not serving.is_alive()


def test_its_state_as_json(begun, cli):
    document = cli("watch", begun, "--json").json
    assert (document["done"], document["of"], document["finished"]) == (1, 2, False)


def test_a_task_of_ones_own_is_named(tmp_path):
    with pytest.raises(DownresError, match="There is no task 'mine'"):
        watch(tmp_path, task="mine")


def test_a_live_search_serves_its_page(model, folder, tmp_path, cli, tiny_file, monkeypatch):
    """The page's process is asked while the search goes on, and gone when it has ended."""
    pages = []
    real = subprocess.Popen

    def seen(command, *arguments, **options):
        process = real(command, *arguments, **options)
        if "watch" in command:
            pages.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", seen)
    done = cli(
        "search", f"{tiny_file}:make", "--data", folder, "--native-resolution", "48", "--mean", "0.5,0.5,0.5", "--std",
        "0.25,0.25,0.25", "--fit-head", "--resolution", "32", "--max-drop", "40", "--threads", "1", "--recover", "none",
        "--out", tmp_path / "run", "--live",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(pages) == 1 and pages[0].poll() is not None


def test_the_page_redraws_in_a_browser(begun, served, browser, model, folder):
    page = served(begun)
    (begun / STATUS).write_text(json.dumps({"what": "32: looking at images", "done": 20, "total": 80, "at": time.time()}))
    context, troubles = browser.new_context(viewport={"width": 1280, "height": 900}), []
    try:
        tab = context.new_page()
        tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: troubles.append(str(e)))
        tab.goto(page.address)
        tab.wait_for_selector("li.waiting")
        assert "32: looking at images" in tab.inner_text("#what") and "1 of 2 candidates are done" in tab.inner_text("#when")
        assert tab.locator("li").count() == 2 and tab.title().startswith("1/2")
        tab.frame_locator("#report").locator("h1").wait_for()
        search(model, str(folder), out=begun, **HOW)
        tab.locator("#what", has_text="Finished.").wait_for(timeout=30_000)
        assert tab.locator("li.waiting").count() == 0 and tab.title().startswith("2/2")
        tab.frame_locator("#report").locator("#plot .scatterlayer .point").first.wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        context.close()
    assert troubles == []
