"""downres killed, starved and fed what is damaged: how many of each kind were tried, how many survived, and how.

    python benchmarks/faults.py                      every kind, about 25 minutes on one core
    python benchmarks/faults.py images artifacts     some kinds; the figures of the others stay

It goes on where it was stopped (`--work`); `--afresh` begins anew. Linux alone: it forks.

kills        SIGKILL before every change that a search makes in its folder, and at random times; then the same command again
disk         a disk that is full from such a change on, a small disk (root alone), a limit on the size of files; then again
folders      every file of a finished run emptied, cut, flipped, replaced by a folder, a pipe, a circle, something endless;
             every field of run.json and of the measurements deleted or retyped; then report, search, check, predict
images       valid files of every format mutated, decoded in children of bounded memory and time
commands     random options with hostile values for every command
artifacts    manifests, weights and graphs that lie, with right digests; then check, predict
checkpoints  odd ones that must load, hostile ones that must not, and mutated ones

What survives is decided by rules that stand here and in faulty.py and ask downres nothing: the exit code, no traceback, one
sentence, within the time; after a kill, a full disk or damage the very numbers and files of a run that nobody disturbed;
of a checkpoint the very weights, or none; and no file that code hidden in one would have made.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # damaged documents are made as the suite makes them

import hostile
import numpy as np
from damage import changed, paths
from faulty import Ended, Fault, at_change, command, disk_is_full, document, forked, judged, killed, untimed
from measuring import RESULTS, save
from PIL import Image

NETWORK = '''
"""A network of random filters, small enough to be searched in a second."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def make():
    torch.manual_seed(0)
    return Net().eval()
'''
HOW = "--native-resolution 48 --crop-ratio 1 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --threads 1".split()
TRIED = "--resolution 32,16 --stem-scale none --runtime torch --fit-head --max-drop 60".split()
ANSWERS = 2
TIME = 180.0
"""Seconds that nothing may take: ten times what a search takes on a busy machine."""
Attempt = Callable[[], "str | Counter[str]"]
"""One attack: how it was survived, or how many were and how; raises Fault where it was not."""


class Arena:
    """The folder where it all happens: pictures, a network, a finished run of each kind of search, what they answered."""

    def __init__(self, folder: Path, part: float, photos: Path | None) -> None:
        self.folder, self.part, self.photos = folder.resolve(), part, photos
        self.network, self.picture = self.folder / "net.py", self.folder / "data/val/lying/000.png"
        self.marker, self.here = self.folder / "marker", self.folder / "here"
        folder.mkdir(parents=True, exist_ok=True)
        self.here.mkdir(exist_ok=True)
        os.chdir(self.here)
        self.network.write_text(NETWORK)
        if not self.picture.exists():
            draw(self.folder / "data")
        self.searches = ("split", "folds") if part > 0.05 else ("split",)
        self.expected: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.changes: dict[str, int] = {}

    def ready(self) -> "Arena":
        """With a finished run of each kind of search that nobody disturbed, which stays for the next time."""
        known = self.folder / "undisturbed.json"
        if known.exists():
            vars(self).update(json.loads(known.read_text()))
        set_up()
        if lacking := [name for name in self.searches if name not in self.expected]:
            for name in lacking:
                self._searched(name)
            self.predicted = self._predicted()
            kept = {name: getattr(self, name) for name in ("expected", "seconds", "changes", "predicted")}
            known.write_text(json.dumps(kept))
        self.page = cells_of(self.base() / "report.html")
        return self

    def _searched(self, name: str) -> None:
        run = self.fresh(f"base-{name}")

        def counted() -> None:
            changes = at_change(run, 10**9, killed)
            try:
                command(*self.search(run, name), "--json")()
            finally:
                (self.folder / "changes").write_text(str(changes()))

        ended = forked(counted, 2 * TIME)
        judged(ended, (0,))
        self.expected[name] = self.told(run, ended)
        self.seconds[name], self.changes[name] = ended.seconds, int((self.folder / "changes").read_text())
        assert self.expected[name]["said"]["best"], "nothing was proven: there would be nothing to lose"

    def _predicted(self) -> Any:
        ended = forked(command("predict", self.base() / "best", self.picture, "--json"), TIME)
        judged(ended, (0,))
        return document(ended)

    def many(self, n: int) -> int:
        """How many of the n that are meant, in a small version."""
        return min(n, max(1, round(n * self.part)))

    def some(self, these: list[Any], n: int, seed: int = 0) -> list[Any]:
        """At most n of them, spread by chance, in their order."""
        chosen = sorted(random.Random(seed).sample(range(len(these)), min(len(these), self.many(n))))
        return [these[i] for i in chosen]

    def base(self, name: str = "split") -> Path:
        return self.folder / f"base-{name}"

    def fresh(self, name: str) -> Path:
        """A place where nothing is."""
        place = self.folder / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        return place

    def copy(self, source: Path, name: str) -> Path:
        return shutil.copytree(source, self.fresh(name))

    def search(self, out: Path, name: str = "split") -> list[Any]:
        data, folds = {"split": (self.folder / "data", []), "folds": (self.folder / "data/val", ["--folds", "2"])}[name]
        return ["search", f"{self.network}:make", "--data", data, "--out", out, *HOW, *TRIED, *folds]

    def told(self, run: Path, ended: Ended) -> dict[str, Any]:
        """All that a finished search says and leaves, without times and the names of its folder."""
        said = untimed(document(ended))
        for key in ("run", "artifact"):
            said.pop(key)
        said["settings"].pop("command")
        said["notes"] = [note for note in said["notes"] if "while latency was measured" not in note]
        log = [json.loads(line) for line in (run / "measurements.jsonl").read_bytes().splitlines() if line]
        kept = {one["key"]: untimed(one["value"]) for one in log if one["key"] not in ("latency", "started")}
        manifest = json.loads((run / "best/manifest.json").read_bytes())
        digests = manifest.pop("sha256")
        shipped = {k: untimed(v) for k, v in manifest.items() if k not in ("created", "source")}
        files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() or p.is_symlink())
        kept = {k: v for k, v in kept.items() if not k.startswith("arrays/")} | {"digests": digests["model.safetensors"]}
        return {"said": said, "kept": kept, "shipped": shipped, "files": files}

    def resumed(self, run: Path, name: str = "split", codes: tuple[int, ...] = (0,)) -> str:
        """The same command again: nothing may differ from the run that nobody disturbed."""
        ended = forked(command(*self.search(run, name), "--json"), TIME)
        if (how := judged(ended, codes)) != "answered":
            return how
        found, expected = self.told(run, ended), self.expected[name]
        for part in ("said", "kept", "shipped", "files"):
            if found[part] != expected[part]:
                raise Fault(f"other {part} after going on: {difference(found[part], expected[part])}")
        return "the same answer"


def set_up() -> None:
    """What every child would have to import, and to read, this process has: most of what a search takes otherwise."""
    for name in ("searching.run", "searching.curve", "searching.single", "searching.ship", "artifacts.proof", "reports.report"):
        importlib.import_module(f"downres.{name}")
    import torch

    with contextlib.redirect_stdout(io.StringIO()):  # an export reads all operators
        torch.onnx.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), dynamo=True, verbose=False)


def draw(folder: Path) -> None:
    """Noisy stripes, lying or standing: two classes that random filters tell apart."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(40):
            wave = np.sin(np.arange(48) / 1.5 + rng.uniform(0, 6)) * 60
            stripes = wave[:, None] if i % 2 == 0 else wave[None, :]
            picture = np.clip(128 + stripes + rng.normal(0, 40, (48, 48)), 0, 255).astype(np.uint8)
            file = folder / part / ("lying", "standing")[i % 2] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).convert("RGB").save(file)


def difference(found: Any, expected: Any, at: str = "") -> str:
    """The first place where two documents differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                return difference(found.get(key), expected.get(key), f"{at}/{key}")
    if isinstance(found, list) and isinstance(expected, list):
        more, less = [x for x in found if x not in expected], [x for x in expected if x not in found]
        if len(found) != len(expected):
            return f"{at}: +{more[:3]} -{less[:3]}"
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a != b:
                return difference(a, b, f"{at}/{i}")
    return f"{at}: {str(found)[:100]} and not {str(expected)[:100]}"


# --- kills and full disks ---


def kills(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    arena.ready()
    for name in arena.searches:
        points = range(1, arena.changes[name] + 1)
        for point in arena.some(list(points), 1000 if name == "split" else 25):
            yield f"{name} at change {point} of {points[-1]}", lambda name=name, point=point: kill(arena, name, point, None)
        chance = random.Random(name)
        for i in range(arena.many(25)):
            after = chance.uniform(0, arena.seconds[name])
            yield f"{name} at random {i}", lambda name=name, after=after: kill(arena, name, 0, after)


def kill(arena: Arena, name: str, point: int, after: float | None) -> str:
    run = arena.fresh("killed")

    def search() -> None:
        if point:
            at_change(run, point, killed)
        command(*arena.search(run, name))()

    ended = forked(search, TIME if after is None else after)
    if not (ended.late if after is not None else ended.code == -signal.SIGKILL) and ended.code != 0:
        raise Fault(f"exit {ended.code} instead of a kill: {ended.err[-200:]}")
    if after is not None and (run / "run.json").exists():  # whoever looks in between gets a page or a sentence
        judged(forked(command("report", run), TIME))
    return arena.resumed(run, name)


def disk(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    arena.ready()
    for name in arena.searches:
        for point in arena.some(list(range(1, arena.changes[name] + 1)), share(name, 15), 1):
            yield f"{name}, full from change {point} on", lambda name=name, point=point: full(arena, name, at=point)
        sizes = [round(4 * 1.18**i) for i in range(42)]  # 4 kB to 4 MB
        for size in arena.some(sizes, share(name, 9), 2):
            yield f"{name}, no file above {size} kB", lambda name=name, size=size: full(arena, name, limit=size << 10)
        if mounted(arena.fresh("disk"), 1000):
            unmount(arena.folder / "disk")
            for size in arena.some([round(4 * 1.2**i) for i in range(40)], share(name, 15), 3):
                yield f"{name}, {size} kB of disk", lambda name=name, size=size: full(arena, name, size=size)


def share(name: str, n: int) -> int:
    return n if name == "split" else n // 3


def full(arena: Arena, name: str, at: int = 0, limit: int = 0, size: int = 0) -> str:
    run = arena.fresh("full")
    if size:
        place = arena.fresh("disk")
        if not mounted(place, size):
            raise Fault("the small disk could not be made")
        run = place / "run"

    def search() -> None:
        if at:
            at_change(run, at, disk_is_full)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        command(*arena.search(run, name))()

    try:
        ended = forked(search, TIME)
        how = judged(ended)
        if how == "refused" and "full" not in ended.err:
            raise Fault(f"said something else: {ended.err.strip().splitlines()[-1]}")
        if size:
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        return f"{'in a sentence' if how == 'refused' else 'not reached'}, then {arena.resumed(run, name)}"
    finally:
        if size:
            unmount(place)


def mounted(place: Path, kilobytes: int) -> bool:
    place.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    return os.geteuid() == 0 and not subprocess.run(made, capture_output=True).returncode


def unmount(place: Path) -> None:
    subprocess.run(["umount", str(place)], check=True)


# --- damaged run folders ---


def flipped(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 3, 10])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def instead(make: Callable[[Path], Any]) -> Callable[[Path, random.Random], None]:
    def replace(file: Path, _: random.Random) -> None:
        file.unlink()
        make(file)

    return replace


DAMAGES: dict[str, Callable[[Path, random.Random], Any]] = {
    "emptied": lambda file, _: file.write_bytes(b""),
    **{f"cut {i}": cut for i in range(2)},
    **{f"flipped {i}": flipped for i in range(3)},
    "zeros": lambda file, _: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": instead(lambda file: None),
    "a folder": instead(Path.mkdir),
    "a full folder": instead(lambda file: (file.mkdir(), (file / "x").write_text("x"))),
    "a pipe": instead(os.mkfifo),
    "a circle": instead(lambda file: file.symlink_to(file)),
    "endless": instead(lambda file: file.symlink_to("/dev/zero")),
    "elsewhere": instead(lambda file: file.symlink_to("/nowhere/else")),
}


def folders(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    arena.ready()
    for name in arena.searches:
        base = arena.base(name)
        files = [p.relative_to(base).as_posix() for p in sorted(base.rglob("*")) if p.is_file() and p.stat().st_size]
        asks = [(f, how, what) for f in files for how in DAMAGES for what in commands_for(f)]
        for file, how, what in arena.some(asks, 200 if name == "split" else 60):
            yield f"{name}/{file} {how}: {what}", lambda a=(name, file, how, what): damaged(arena, *a)
    settings = json.loads((arena.base() / "run.json").read_text())
    wrong: list[Any] = [..., None, "x", -1, 1e308, 10**30, [], {"a": 1}, True]
    fields = [(at, value) for at in paths(settings) if at for value in wrong]
    for at, value in arena.some(fields, 60, 4):
        for what in ("report", "search"):
            yield f"run.json {at} {value}: {what}", lambda a=(at, value, what): retyped(arena, *a)
    log = [json.loads(line) for line in (arena.base() / "measurements.jsonl").read_text().splitlines()]
    entries = [(i, at, value) for i, entry in enumerate(log) for at in paths(entry["value"]) if at for value in wrong]
    for i, at, value in arena.some(entries, 60, 5):
        for what in ("report", "search"):
            yield f"measurement {log[i]['key']} {at} {value}: {what}", lambda a=(i, at, value, what): remeasured(arena, *a)


def commands_for(file: str) -> tuple[str, ...]:
    return ("report", "search", "check", "predict") if file.startswith("best/") else ("report", "search")


def damaged(arena: Arena, name: str, file: str, how: str, what: str) -> str:
    run = arena.copy(arena.base(name), "damaged")
    DAMAGES[how](run / file, random.Random(f"{file} {how}"))
    if what == "search":
        return f"{what}: {arena.resumed(run, name, (0, 2))}"
    if what == "report":
        answer = judged(forked(command("report", run), TIME))
        if answer == "answered" and name == "split":
            same_page(run, arena.page)
        return f"{what}: {answer}"
    if what == "check":
        ended = forked(command("check", run / "best", "--model", f"{arena.network}:make", "--json"), TIME)
        answer = judged(ended, (0, 1, 2))
        if ended.code == 0 and not document(ended)["ok"] or ended.code == 1 and document(ended)["ok"]:
            raise Fault("its exit code and its words differ")
        unseen = (
            (run / "best" / Path(file).name).read_bytes() if how.startswith(("flipped", "cut", "zeros", "emptied")) else b""
        )
        if ended.code == 0 and unseen != (arena.base(name) / file).read_bytes():
            raise Fault("found nothing wrong")
        return f"{what}: {answer if ended.code != 1 else 'WRONG said'}"
    ended = forked(command("predict", run / "best", arena.picture, "--json"), TIME)
    answer = judged(ended)
    if answer == "answered" and name == "split" and document(ended) != arena.predicted:
        raise Fault("another answer")
    return f"{what}: {answer}"


def retyped(arena: Arena, at: tuple[Any, ...], value: Any, what: str) -> str:
    run = arena.copy(arena.base(), "damaged")
    settings = changed(json.loads((run / "run.json").read_text()), at, value)
    (run / "run.json").write_text(json.dumps(settings))
    if what == "search":
        ended = forked(command(*arena.search(run), "--json"), TIME)
        answer = judged(ended)
        if answer == "answered" and untimed(document(ended))["candidates"] != arena.expected["split"]["said"]["candidates"]:
            raise Fault("other numbers")
        return f"{what}: {answer}"
    return f"{what}: {judged(forked(command('report', run), TIME))}"


def remeasured(arena: Arena, i: int, at: tuple[Any, ...], value: Any, what: str) -> str:
    """Without a right checksum it is as if it had never been measured; with one there is an answer or a sentence."""
    run = arena.copy(arena.base(), "damaged")
    lines = [json.loads(line) for line in (run / "measurements.jsonl").read_text().splitlines()]
    lines[i]["value"] = changed(lines[i]["value"], at, value)
    (run / "measurements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if what == "search":
        return f"{what}: {arena.resumed(run, codes=(0, 2))}"
    answer = judged(forked(command("report", run), TIME))
    if answer == "answered":
        same_page(run, arena.page)
    import zlib

    crc = zlib.crc32(json.dumps([lines[i]["key"], lines[i]["value"]], sort_keys=True).encode())
    lines[i]["crc"] = crc
    (run / "measurements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{what}: {answer}, forged: {judged(forked(command('report', run), TIME))}"


def cells_of(page: Path) -> set[str]:
    """What stands in the cells of the tables of a page."""
    found = re.findall(r"<td[^>]*>(.*?)</td>", page.read_text(), re.S)
    return {re.sub(r"<[^>]*>|\s+", " ", cell).strip() for cell in found}


def same_page(run: Path, expected: set[str]) -> None:
    """No cell may hold another number than on the page of the whole run, unless it is a bound of a run that says it is not
    finished, and more cautious: the candidates that are not measured yet count against all (Holm's correction).
    """
    found = cells_of(run / "report.html")
    unfinished = any(cell.startswith("waiting") for cell in found)
    whole = dict(sorted((drop, float(bound)) for drop, bound in map(bound_of, expected) if drop))  # of a drop the widest
    for cell in found - expected:
        drop, bound = bound_of(cell)
        if unfinished and drop in whole and float(bound) >= whole[drop]:
            continue
        if re.search(r"\d", cell) and not re.search(r"waiting|lost|missing", cell):
            raise Fault(f"the page says {cell[:100]!r}, which it did not")


def bound_of(cell: str) -> tuple[str, str]:
    """('22.50', '34.90') of '22.50 at most 34.90'; empty ones of another cell."""
    found = re.fullmatch(r"(\S+) at most ([\d.]+)", cell)
    return (found[1], found[2]) if found else ("", "")


# --- images ---


def images(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    seeds = hostile.pictures()
    photos = sorted(p for p in arena.photos.rglob("*") if p.is_file() and p.stat().st_size < 200_000) if arena.photos else []
    seeds |= {f"photograph {p.name}": p.read_bytes() for p in random.Random(0).sample(photos, min(len(photos), 12))}
    size, names = 100, list(seeds)
    importlib.import_module("downres.images")  # which every child has then
    for first in range(0, arena.many(12_000), size):
        yield f"images {first} to {first + size - 1}", lambda first=first: decoded(seeds, names, range(first, first + size))


def decoded(seeds: dict[str, bytes], names: list[str], numbers: range) -> "Counter[str]":
    """Each decoded twice in a child of 2 GB and 20 s; one that takes the child with it is a fault."""

    def look() -> None:
        from downres.images import Unreadable, decode

        file = Path("/proc/self/fd") / str(os.memfd_create("image"))
        for i in numbers:
            chance = random.Random(i)
            how, content = hostile.mutated(seeds[names[i % len(names)]], seeds[chance.choice(names)], chance)
            file.write_bytes(content)
            print(f"\n{i} {names[i % len(names)]} {how}", end=": ", flush=True)
            signal.alarm(20)
            try:
                pixels = decode(file)
                right = is_picture(pixels, content) and np.array_equal(pixels, decode(file))
                print("a picture" if right else "no picture or not twice the same", end="")
            except Unreadable as reason:
                print(f"unreadable, {re.sub('[0-9.]+', 'N', str(reason))}", end="")

    ended = forked(look, 20.0 * len(numbers), memory=2 << 30)
    found: Counter[str] = Counter()
    for line in ended.out.split("\n")[1:]:
        name, _, how = line.partition(": ")
        if how != "a picture" and not how.startswith("unreadable, "):
            raise Fault(f"{name}: {how or ended.err[-300:] or ended.code}")
        found[how] += 1
    if ended.code or sum(found.values()) != len(numbers):
        raise Fault(f"exit {ended.code}: {ended.err[-300:]}")
    return found


def is_picture(pixels: np.ndarray, content: bytes) -> bool:
    """8 bits in three channels; of the two formats that hold numbers, also one channel, 16 bits or finite floats."""
    if content.startswith((b"\x93NUMPY", b"II", b"MM")):
        numbers = pixels.dtype in (np.uint8, np.uint16, np.float32) and bool(np.isfinite(pixels).all())
        return numbers and pixels.size > 0 and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3))
    return pixels.dtype == np.uint8 and pixels.size > 0 and pixels.ndim == 3 and pixels.shape[2] == 3


# --- command lines ---


def command_lines(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    arena.ready()
    import typer

    from downres.cli import app

    known = {
        name: [(max(p.opts, key=len), bool(getattr(p, "is_flag", False))) for p in c.params if p.opts[0].startswith("-")]
        for name, c in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    for i in range(arena.many(1200)):
        arguments = command_line(arena, known, random.Random(i))
        yield f"{i} {' '.join(map(str, arguments))[:300]!r}", lambda arguments=arguments: typed(arena, arguments)


def command_line(arena: Arena, known: dict[str, list[tuple[str, bool]]], chance: random.Random) -> list[str]:
    folder, file = arena.folder / "data", arena.picture
    values = [
        "nan", "inf", "-inf", "-1", "0", "1e308", "1e-320", "10000000000", "0.001", "2", "7", "16", "", " ", "x" * 5000,
        "9" * 400, "é☃", "\u202egnp.x", "\x1b[31mred\x1b[0m", "a\nb", "[red]x[/red]", "%s%n{0}", "\udcff\udcfe", "~nouser/x",
        arena.here / "none/x", folder, file, file / "x", "/dev/null", "/dev/zero", "/dev/full", "--json", "32x32",
        "0x10", "16,", ",", "96:32:0", "none", "true", "null", "1,2,3", "0.5,0.5,0.5", f"$(touch {arena.marker})", "../..", ".",
        "file:///etc/passwd", "http://", "16 merge4", "16 stem×0.5", "patch" + "9" * 50, "0.5", "torch", "segmentation",
        "agreement", "regression", "multilabel", arena.network, f"{arena.network}:make", f"{arena.network}:Net", "crop,head",
    ]  # fmt: skip
    models = [
        f"{arena.network}:nothing", arena.network, "timm:", "timm:nothing", "torchvision:", "torchvision:nothing",
        f"transformers:{folder}", "smp:", "smp:Unet", "smp:Unet/nothing", "regseg:", "regseg:exp48_decoder26,width=1e30", ":",
        f"{folder}:make", "regseg:exp48_decoder26,depth=nan", f"{arena.network}:torch", *map(str, values),
    ]  # fmt: skip
    odd = chance.random() < 0.3  # else the arguments are right and only options are hostile

    def one(right: object, others: list[Any]) -> str:
        return str(chance.choice(others) if odd and chance.random() < 0.6 else right)

    name = chance.choice(["search", "search", "curve", "curve", "cost", "cost", "report", "check", "predict", "demo"])
    run = arena.base(chance.choice(arena.searches))
    network, data = f"{arena.network}:make", folder
    given = {
        "search": lambda: [one(network, models), "--data", one(data, values), *HOW, "--resolution", "16"],
        "curve": lambda: [one(network, models), "--data", one(data, values), *HOW, "--resolution", "16"],
        "cost": lambda: [one(network, models), "--native-resolution", "48"],
        "report": lambda: [one(arena.folder / "copied", values)],
        "check": lambda: [one(run / "best", values), "--model", one(network, models)],
        "predict": lambda: [one(run / "best", values), *(one(file, values) for _ in range(chance.randint(1, 3)))],
        "demo": lambda: ["--threads", chance.choice(["0", "nan", "-1", "1e9"])],  # one that may begin takes minutes
    }[name]()
    options: list[str] = []
    for _ in range(chance.choice([0, 1, 1, 1, 2, 2, 3, 5])):
        option, flag = chance.choice(known[name])
        options += [option] if flag else [option, str(chance.choice(values))]
    if "--out" not in options and name in ("search", "predict"):
        options += ["--out", str(arena.folder / "typed")]
    if chance.random() < 0.05:
        options.append(chance.choice(["--nonsense", "-x", "--", "extra", "--resolution", "-"]))
    if chance.random() < 0.5:
        options.append("--json")
    words = [name, *options, *given] if name == "demo" else [name, *given, *options]
    return [word for word in words if chance.random() > 0.01] if odd else words


def typed(arena: Arena, arguments: list[str]) -> str:
    arena.fresh("typed")
    if "report" in arguments[:1]:
        arena.copy(arena.base(), "copied")
    if (arena.here).exists():
        shutil.rmtree(arena.here)
    arena.here.mkdir()
    os.chdir(arena.here)
    ended = forked(command(*arguments), TIME, memory=8 << 30)
    how = judged(ended, (0, 1, 2) if arguments[:1] == ["check"] else (0, 2))
    if how == "answered" and "--json" in arguments and "--help" not in arguments and not {"--", "--version"} & {*arguments}:
        if any(arguments[i - 1].startswith("--") and a == "--json" for i, a in enumerate(arguments) if i):
            return how  # it may have been taken for a value
        document(ended)
    if arena.marker.exists():
        raise Fault("something in it was run")
    return f"{arguments[0] if arguments else 'nothing'}: {how}"


# --- artifacts ---


def artifacts(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    arena.ready()
    manifest = json.loads((arena.base() / "best/manifest.json").read_text())
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    wrong: list[Any] = [..., None, "x", "", -1, 0, 1e308, 10**30, [], {}, {"a": 1}, [[1]], True, "../../x", "\x1b[31m", deep]
    fields = [(at, value) for at in paths(manifest) if at and at[0] not in ("sha256", "versions") for value in wrong]
    for at, value in arena.some(fields, 150, 6):
        for what in ("predict", "check"):
            name = f"{'/'.join(map(str, at))} {str(value)[:20]}: {what}"
            yield name, lambda a=(at, value, what): forged_manifest(arena, *a)
    for name, content, fits in graphs_of(arena):
        for what in ("predict", "check"):
            yield f"graph {name}: {what}", lambda a=(content, fits, what): forged_graph(arena, *a)
    files = [
        p.name for p in sorted((arena.base(arena.searches[-1]) / "best").iterdir()) if p.is_file() and p.name != "manifest.json"
    ]
    chance = random.Random(7)
    for i in range(arena.many(40)):
        file = chance.choice(files)
        yield f"{file} mutated {i}", lambda a=(file, i): forged_file(arena, *a)
    for name in ("../secret", "/etc/hostname", "a/b", "..", ".", "", "model.onnx/", "\0", "x" * 5000, "\udcff"):
        yield f"a file called {name[:20]!r}", lambda name=name: forged_name(arena, name)
    for content in (
        b"",
        b"{",
        b"[" * 300_000,
        b"{" * 300_000,
        b'{"a":' * 100_000,
        b"3",
        b"null",
        b"1e999",
        b"NaN",
        b"9" * 10_000,
    ):
        yield f"manifest {content[:5]!r}", lambda content=content: other_manifest(arena, lambda f: f.write_bytes(content))
    for how in ("a folder", "a pipe", "a circle", "endless", "elsewhere", "deleted"):
        yield f"manifest {how}", lambda how=how: other_manifest(arena, lambda f: DAMAGES[how](f, random.Random(0)), False)


def graphs_of(arena: Arena) -> list[tuple[str, bytes, bool | None]]:
    return arena.some(list(hostile.graphs((3, 16, 16), ANSWERS)), 1000)


def sign(folder: Path, manifest: Any) -> None:
    """As whoever forges an artifact would: all digests are right."""
    digests = manifest.get("sha256") if isinstance(manifest, dict) else None
    if isinstance(digests, dict):
        for name in [*digests]:
            with contextlib.suppress(OSError, ValueError):
                digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digests["manifest.json"] = ""
        digests["manifest.json"] = hashlib.sha256(json.dumps(manifest, indent=1).encode() + b"\n").hexdigest()
    (folder / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode() + b"\n")


def asked(arena: Arena, folder: Path, what: str) -> Ended:
    if what == "predict":
        return forked(command("predict", folder, arena.picture, "--json", "--limit-s", 3), TIME, memory=8 << 30)
    return forked(command("check", folder, "--model", f"{arena.network}:make", "--json"), TIME, memory=8 << 30)


def forged_manifest(arena: Arena, at: tuple[Any, ...], value: Any, what: str) -> str:
    folder = arena.copy(arena.base() / "best", "forged")
    sign(folder, changed(json.loads((folder / "manifest.json").read_text()), at, value))
    return f"{what}: {said(asked(arena, folder, what))}"


def said(ended: Ended) -> str:
    how = judged(ended, (0, 1, 2))
    if how == "answered":
        document(ended)
    return "WRONG said" if ended.code == 1 else how


def forged_graph(arena: Arena, content: bytes, fits: bool | None, what: str) -> str:
    folder = arena.copy(arena.base() / "best", "forged")
    (folder / "model.onnx").write_bytes(content)
    sign(folder, json.loads((folder / "manifest.json").read_text()))
    ended = asked(arena, folder, what)
    how = said(ended)
    if fits is False and ended.code == 0:
        raise Fault("it was used")
    if fits and what == "predict":
        highest = document(ended)["predictions"][0]["probabilities"][0]
        wanted = 100 / (1 + np.exp(-1.0))  # of the logits 0 and 1
        if abs(highest - wanted) > 0.01:
            raise Fault(f"{highest} % and not {wanted}")
    return f"{what}: {how}"


def forged_file(arena: Arena, name: str, i: int) -> str:
    folder = arena.copy(arena.base(arena.searches[-1]) / "best", "forged")
    _, content = hostile.mutated((folder / name).read_bytes(), (folder / "model.onnx").read_bytes(), random.Random(i))
    (folder / name).write_bytes(content)
    sign(folder, json.loads((folder / "manifest.json").read_text()))
    return f"check: {said(asked(arena, folder, 'check'))}"


def forged_name(arena: Arena, name: str) -> str:
    folder = arena.copy(arena.base() / "best", "forged")
    (folder.parent / "secret").write_text("mine")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(b"mine").hexdigest()
    sign(folder, manifest)
    for what in ("predict", "check"):
        if asked(arena, folder, what).code == 0:
            raise Fault(f"{what} took it")
        how = said(asked(arena, folder, what))
    return how


def other_manifest(arena: Arena, make: Callable[[Path], Any], kept: bool = True) -> str:
    folder = arena.copy(arena.base() / "best", "forged")
    if kept:
        (folder / "manifest.json").unlink()
    make(folder / "manifest.json")
    for what in ("check", "predict"):
        if said(asked(arena, folder, what)) != "refused":
            raise Fault("it was taken")
    return "refused"


# --- checkpoints ---


def checkpoints(arena: Arena) -> Iterator[tuple[str, Attempt]]:
    spec = importlib.util.spec_from_file_location("net", arena.network)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    importlib.import_module("downres.families.load")  # which every child has then
    torch.manual_seed(1)
    weights = {name: torch.rand_like(v) if v.is_floating_point() else v for name, v in module.make().state_dict().items()}
    made = list(hostile.checkpoints(weights, arena.marker, random.Random(0), 400))
    for name, file, right, write in made if arena.part == 1 else arena.some(made, 1000):
        yield name, lambda a=(weights, file, right, write): loaded(arena, *a)


def loaded(arena: Arena, weights: dict[str, Any], name: str, right: bool | None, write: Callable[[Path], Any]) -> str:
    file = arena.fresh("loaded") / name
    file.parent.mkdir()
    write(file)

    def load() -> None:
        import torch

        from downres import DownresError, load_model

        try:
            state = load_model(f"{arena.network}:make", file).module.state_dict()
        except DownresError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        print("the same" if all(torch.equal(state[k], v) for k, v in weights.items()) else "other weights")

    ended = forked(load, TIME, memory=4 << 30)
    how = judged(ended)
    if arena.marker.exists():
        arena.marker.unlink()
        raise Fault("code in it was run")
    if right is not None and ended.out.strip() != ("the same" if right else ""):
        raise Fault(f"{ended.out.strip() or ended.err.strip()} where {'the weights' if right else 'a refusal'} would be right")
    if ended.out.strip() == "other weights" and name.endswith(".pth") and right is None:
        raise Fault("other weights, though the file has checksums")
    return how if how == "refused" else f"loaded, {ended.out.strip()}"


KINDS: dict[str, Callable[[Arena], Iterator[tuple[str, Attempt]]]] = {
    "images": images, "checkpoints": checkpoints, "artifacts": artifacts, "folders": folders, "commands": command_lines,
    "kills": kills, "disk": disk,
}  # fmt: skip


def attacked(arena: Arena, kind: str, most: int) -> dict[str, Any]:
    """The figures of one kind, of which at most so many are tried (0: all). What survived before, says its log, is kept."""
    log = arena.folder / f"{kind}.jsonl"
    done: dict[str, Any] = {}
    if log.exists():
        done = {one["name"]: one for one in map(json.loads, log.read_text().splitlines())}
    tried, how, faults = 0, Counter[str](), []
    attempts: Iterator[tuple[str, Attempt]] | list[tuple[str, Attempt]] = KINDS[kind](arena)
    if most:
        attempts = list(attempts)
        attempts = random.Random(kind).sample(attempts, min(most, len(attempts)))
    for name, attempt in attempts:
        if (one := done.get(name)) is None or one["fault"]:
            one = {"name": name, "how": {}, "fault": ""}
            try:
                found = attempt()
                one["how"] = dict(found) if isinstance(found, Counter) else {found: 1}
            except Fault as fault:
                one["fault"] = str(fault)
                print(f"{kind}: {name[:200]}: {fault}", file=sys.stderr, flush=True)
            with log.open("a") as file:
                file.write(json.dumps(one) + "\n")
        how.update(one["how"])
        tried += sum(one["how"].values()) + bool(one["fault"])
        if one["fault"]:
            faults.append({"name": name, "why": one["fault"]})
    survived = tried - len(faults)
    return {
        "date": date.today().isoformat(),
        "tried": tried,
        "survived": survived,
        "how": dict(how.most_common()),
        "faults": faults,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="some kinds; default: all")
    options.add_argument("--work", type=Path, default=Path("faults-work"), help="folder where it happens and goes on")
    options.add_argument("--afresh", action="store_true", help="forget what was tried")
    options.add_argument("--part", type=float, default=1.0, help="of the attacks of each kind, for a quick look")
    options.add_argument("--most", type=int, default=0, help="attacks of each kind, chosen by chance (default: all)")
    options.add_argument("--photos", type=Path, help="folder of photographs, a dozen of which are mutated too")
    options.add_argument("--figures", type=Path, default=RESULTS / "faults.json", help="where they are written")
    given = options.parse_args()
    kinds, figures = given.kinds or list(KINDS), given.figures.resolve()
    photos = given.photos.resolve() if given.photos else None
    warnings.simplefilter("ignore")  # of tensors of old kinds, which are made on purpose
    import downres.cli  # every child has it

    assert downres.cli
    if given.afresh:
        shutil.rmtree(given.work, ignore_errors=True)
    arena = Arena(given.work, given.part, photos)
    found = json.loads(figures.read_text())["kinds"] if figures.exists() else {}
    for kind in kinds:
        found[kind] = attacked(arena, kind, given.most)
        found = {kind: found[kind] for kind in KINDS if kind in found}
        written = save(figures.stem, "python benchmarks/faults.py", None, {"kinds": found}, figures.parent)
    print(f"{'kind':12} {'tried':>7} {'survived':>9}  how")
    for kind, one in found.items():
        ways = ", ".join(f"{n} {how}" for how, n in list(one["how"].items())[:4])
        print(f"{kind:12} {one['tried']:7} {one['survived']:9}  {ways}")
    print(written)
    sys.exit(any(found[kind]["faults"] for kind in kinds))


if __name__ == "__main__":
    main()
