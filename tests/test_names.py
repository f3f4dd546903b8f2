"""Names of files, folders, classes and models as nobody would give them: shown escaped everywhere, and nothing fails."""

import json
import os
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

import downres
from downres.errors import DownresError, shown

FILES = [b"\xff\xfe.png", b"\x1b[31mred.png", b"a\nb.png", b"[bold]x[/bold].png", b"<script>.png", "\u202egnp.exe.png".encode()]
SHOWN = [r"\xff\xfe.png", r"\x1b[31mred.png", r"a\nb.png", "[bold]x[/bold].png", "<script>.png", r"\u202egnp.exe.png"]
CLASSES = [b"\xff\x1b[32mone", b"[red]two\n<b>"]
RECIPE = [
    "--mean",
    "0.5,0.5,0.5",
    "--std",
    "0.25,0.25,0.25",
    "--native-resolution",
    "48",
    "--threads",
    "1",
    "--runtime",
    "torch",
]


@pytest.mark.parametrize(("name", "escaped"), [(os.fsdecode(n), e) for n, e in zip(FILES, SHOWN, strict=True)])
def test_shown(name, escaped):
    assert shown(name) == escaped == shown(escaped)  # what was shown already stays as it is
    assert str(DownresError(f"Cannot read {name}.")) == f"Cannot read {escaped}."


def test_nothing_that_is_shown_acts():
    every = "".join(map(chr, range(0x110000)))
    kinds = {unicodedata.category(letter) for letter in shown(every)}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"} and shown("Zelle – ähm 東京 👍.png") == "Zelle – ähm 東京 👍.png"


def acts(text: str) -> list[str]:
    return [c for c in text if c != "\n" and (unicodedata.category(c) in ("Cc", "Cs") or c == "\u202e")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(root, data) with pictures of two classes; beside them what is no picture."""
    root = tmp_path_factory.mktemp("names")
    data = os.path.join(os.fsencode(root), b"da[b]ta\xfe\x1b[1m")
    rng = np.random.default_rng(0)
    for part in (b"train", b"val"):
        for label, kind in enumerate(CLASSES):
            for name in [*FILES, *(b"%d.png" % i for i in range(6))]:
                file = os.path.join(data, part, kind, name)
                os.makedirs(os.path.dirname(file), exist_ok=True)  # one of the names has a / in it
                with open(file, "wb") as handle:
                    Image.fromarray(rng.integers(0, 120, (48, 48, 3), dtype=np.uint8) + np.uint8(120 * label)).save(
                        handle, "PNG"
                    )
            for name in (b"broken\xff[link=x].png", b"notes\xff\n.txt"):
                with open(os.path.join(data, part, kind, name), "wb") as handle:
                    handle.write(b"nothing")
    return root, os.fsdecode(data)


def test_a_whole_search_of_such_names(cli, folder, tiny_file):
    root, data = folder
    network = root / os.fsdecode(b"ne\xfft[b].py")
    network.write_bytes(tiny_file.read_bytes())
    out = root / os.fsdecode(b"ru\xff[bold]\x1b[31mn\n")
    command = ["search", f"{network}:make", "--data", data, "--out", out, "--resolution", "32", "--stem-scale", "none",
               "--max-drop", "60", "--rungs", "head", "--fit-head", *RECIPE]  # fmt: skip
    done = cli(*command)
    assert done.code == 0, done.err
    assert not acts(done.out + done.err)
    assert r"ru\xff[bold]\x1b[31mn\n" in done.out and r"broken\xff[link=x].png" in done.err

    document = cli(*command, "--json")
    document.out.encode()  # strict UTF-8
    assert document.json["finished"] and any(r"broken\xff" in s["path"] for s in document.json["data"]["skipped"])
    assert cli("report", out).code == 0
    page = (out / "report.html").read_bytes().decode()
    assert not acts(re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    assert "&lt;b&gt;" in page and "<b>one" not in page and r"\xff\x1b[32mone" in page

    pictures = [os.path.join(data, "val", os.fsdecode(CLASSES[0]), os.fsdecode(name)) for name in FILES]
    done = cli("predict", out / "best", *pictures)
    assert done.code == 0 and not acts(done.out) and len(done.out.splitlines()) == len(FILES)
    assert all(name in line for name, line in zip(SHOWN, done.out.splitlines(), strict=True))
    predicted = cli("predict", out / "best", *pictures, "--json")
    predicted.out.encode()
    assert [p["image"].count(r"\xff\x1b[32mone") for p in predicted.json["predictions"]] == [0] * len(
        FILES
    )  # exact but for bytes
    done = cli("check", out / "best", "--model", f"{network}:make", "--threads", 1)
    assert done.code == 0 and done.out.count("ok ") == 5 and not acts(done.out)
    assert downres.evaluate(f"{network}:make", data, preprocessing=downres.Preprocessing(48)).n == 24


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "/no\udcff\x1b[31m[bold]"], ["check", "/no\udcff\x1b[31m[bold]"], ["cost", "timm:\udcff[bold]\x1b[31m"],
        ["cost", "/no\udcff\x1b[31m.py:make"], ["predict", "/no\udcff\n", "\x1b[31m"], ["\udcff\x1b[31m"],
        ["search", "TINY", "--data", "\udcff\x1b[31m[bold]\n", "--out", "\udcff"], ["cost", "--\udcff\x1b[31m"],
    ],
)  # fmt: skip
def test_errors_show_them(cli, tiny_file, arguments):
    done = cli(*(f"{tiny_file}:make" if word == "TINY" else word for word in arguments))
    assert done.code == 2 and not acts(done.out + done.err)
    done.err.encode()


def test_output_of_another_encoding(tiny_file):
    """A star on a terminal that knows none, and JSON all the same: one process that says both."""
    code = (
        "import sys\nfrom downres.cli import main\nbegun = list(sys.argv)\n"
        "for more in ([], ['--json']):\n"
        "    sys.argv[:] = begun + more\n"
        "    try:\n        main()\n"
        "    except SystemExit as stop:\n        assert not stop.code, stop.code\n"
        "    print('that was all')\n"
    )
    command = [sys.executable, "-c", code, "cost", f"{tiny_file}:make", "--resolution", "32", "--native-resolution", "48"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    table, document, rest = done.stdout.decode("ascii").split("that was all\n")
    assert "32" in table and json.loads(document) and not rest
