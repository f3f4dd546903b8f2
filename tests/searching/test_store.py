"""A run's folder: append only, resumed, torn lines, other settings, one writer."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from downres.errors import DownresError
from downres.searching.store import FORMAT, Store

SETTINGS = {"format": FORMAT, "model": "m", "budget": {"max_drop": 1.0}, "seed": 0, "command": "c"}


@pytest.fixture
def store(tmp_path):
    opened = Store.open(tmp_path / "run", SETTINGS)
    yield opened
    opened.close()


def test_what_is_put_is_there_after_reopening(store):
    assert store.put("cost/128", {"macs": 7, "size": (1, 2)}) == {"macs": 7, "size": [1, 2]}
    assert store.get("cost/128") == {"macs": 7, "size": [1, 2]} and store.get("other") is None
    store.close()
    again = Store.open(store.folder, SETTINGS)
    assert again.get("cost/128") == {"macs": 7, "size": [1, 2]}
    again.close()


def test_the_log_only_grows(store):
    log = store.folder / "measurements.jsonl"
    before = b""
    for i in range(5):
        store.put(f"key{i % 2}", i)
        now = log.read_bytes()
        assert now.startswith(before) and now.count(b"\n") == i + 1
        before = now
    assert store.get("key0") == 4 == Store.read(store.folder).get("key0")  # the last one counts


@pytest.mark.parametrize("torn", [b'{"key": "b", "val', b"{", b'{"key"', b"\n", b'{"key": "b"}', b"3"])
def test_a_last_line_cut_off_by_a_hard_stop_costs_only_itself(store, torn):
    store.put("a", 1)
    store.close()
    log = store.folder / "measurements.jsonl"
    log.write_bytes(log.read_bytes() + torn)
    assert Store.read(store.folder).get("a") == 1
    again = Store.open(store.folder, SETTINGS)
    assert again.get("a") == 1 and again.get("b") is None
    again.put("b", 2)
    again.close()
    assert Store.read(store.folder).get("b") == 2


def test_a_line_cut_inside_a_character_is_tolerated(store):
    store.put("a", 1)
    store.close()
    log = store.folder / "measurements.jsonl"
    log.write_bytes(log.read_bytes() + '{"key": "×'.encode()[:-1])
    again = Store.open(store.folder, SETTINGS)
    assert again.get("a") == 1
    again.close()


@pytest.mark.parametrize(("key", "value"), [("model", "other"), ("seed", 1), ("budget", {"max_drop": 2.0})])
def test_other_settings_are_refused_by_name(store, key, value):
    store.close()
    with pytest.raises(DownresError, match=f"another {key} .*`out`"):
        Store.open(store.folder, {**SETTINGS, key: value})
    assert Store.read(store.folder).settings == SETTINGS


def test_a_command_typed_in_another_way_is_the_same_run(store):
    store.close()
    Store.open(store.folder, {**SETTINGS, "command": "downres search  --x"}).close()


def test_another_process_locks_this_one_out(store):
    store.close()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(store.folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(DownresError, match="Another downres is writing"):
            Store.open(store.folder, SETTINGS)
        other.communicate("\n")
    Store.open(store.folder, SETTINGS).close()  # whoever ends, however, leaves it open


def test_what_a_killed_writer_was_about_to_rename_goes_and_that_of_one_at_work_stays(store):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.close()
    names = {f".run.json.{ended.pid}.7.partial": False, f"weights/.a.{os.getpid()}.7.partial": False}
    names |= {f".report.html.{os.getppid()}.7.partial": True, ".mine.partial": True}
    (store.folder / "weights").mkdir()
    for name in names:
        (store.folder / name).touch()
    Store.open(store.folder, SETTINGS).close()
    assert {name: (store.folder / name).exists() for name in names} == names


def test_a_second_writer_in_the_same_process_is_locked_out_too(store):
    with pytest.raises(DownresError, match="Another downres"):
        Store.open(store.folder, SETTINGS)


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DownresError, match="holds other files and no run"):
        Store.open(tmp_path, SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownresError, match="is a file"):
        Store.open(tmp_path / "file", SETTINGS)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"x"', '{"format": 0}'])
def test_a_broken_run_json_is_said(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DownresError, match="run.json is broken"):
        Store.read(tmp_path)


def test_reading_what_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DownresError, match="is not a run of downres"):
            Store.read(folder)


def test_reading_neither_locks_nor_writes(store):
    before = sorted(p.name for p in store.folder.iterdir())
    Store.read(store.folder)
    assert sorted(p.name for p in store.folder.iterdir()) == before


def test_arrays_come_back_whole_or_not_at_all(store, monkeypatch):
    store.put_arrays("deep/x", a=np.arange(3), b=np.array(["×"]))
    assert store.arrays("deep/x")["a"].tolist() == [0, 1, 2] and store.arrays("deep/x")["b"][0] == "×"

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError):
        store.put_arrays("deep/x", a=np.arange(9))
    assert store.arrays("deep/x")["a"].tolist() == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_measurement_that_could_not_be_written_is_not_kept(store):
    store._log = Path("/dev/full")
    with pytest.raises(OSError) as caught:
        store.put("a", 1)
    assert caught.value.errno == errno.ENOSPC and store.get("a") is None


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:70] + b"\x77" + file.read_bytes()[71:]),
    "replaced": lambda file: np.savez(file, a=np.arange(4)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_lost_or_damaged_arrays_are_never_served(store, how):
    store.put_arrays("deep/x", a=np.arange(3))
    assert store.has_arrays("deep/x")
    DAMAGES[how](store.folder / "deep/x.npz")
    for one in (store, Store.read(store.folder)):
        assert not one.has_arrays("deep/x")
        with pytest.raises(DownresError, match="x.npz is missing or damaged: .* measures it again"):
            one.arrays("deep/x")


def test_the_data_are_on_the_disk_before_the_record_that_names_them(store, monkeypatch):
    """Every array file is synced, put in place, its folder synced, and only then named in the log."""
    done, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(("replace", b.name)), replace(a, b)))
    store.put_arrays("deep/x", a=np.arange(3))
    assert done == [("sync", "x.npz.partial"), ("replace", "x.npz"), ("sync", "deep"), ("sync", "measurements.jsonl")]


def test_a_damaged_line_is_measured_again_and_no_other_number_served(store):
    store.put("a", {"macs": 123456})
    store.put("b", {"macs": 7})
    log = store.folder / "measurements.jsonl"
    log.write_bytes(log.read_bytes().replace(b"123456", b"123457"))
    again = Store.read(store.folder)
    assert again.get("a") is None and again.get("b") == {"macs": 7}


def test_what_is_written_is_strict_json(store):
    assert store.put("a", {"upper": float("inf"), "n": 3}) == {"upper": None, "n": 3}
    assert Store.read(store.folder).get("a") == {"upper": None, "n": 3}


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": NaN}', "9" * 5000, b"\xff\xfe"])
def test_a_hostile_run_json_is_said(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DownresError, match="run.json is broken"):
        Store.read(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_a_run_json_that_is_no_file_is_said_at_once(tmp_path, kind):
    file = tmp_path / "run.json"
    {"pipe": lambda: os.mkfifo(file), "endless": lambda: file.symlink_to("/dev/zero"), "folder": file.mkdir}[kind]()
    with pytest.raises(DownresError, match="is not a run"):
        Store.read(tmp_path)
    with pytest.raises(DownresError, match="run.json is broken"):
        Store.open(tmp_path, SETTINGS)
