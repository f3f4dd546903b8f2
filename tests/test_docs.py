"""The documents say what the program does: examples run, commands exist, the reference is what `--help` prints.

`python tests/test_docs.py` writes docs/reference.md anew.
"""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import downres

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("demo", "search", "switchable", "curve", "cost", "paper", "doctor", "report", "watch", "check", "embed", "predict")


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.M | re.S)


HELP = """
import sys
from downres.cli import main

for command in sys.argv[1:]:
    sys.argv = ["downres", command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    print(chr(12))
"""


def helps() -> dict[str, str]:
    """What each `downres COMMAND --help` prints at a fixed width, in one process."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, env=environment, check=True)
    pages = done.stdout.split(chr(12))[: len(COMMANDS)]
    return {name: "\n".join(map(str.rstrip, page.strip().splitlines())) for name, page in zip(COMMANDS, pages, strict=True)}


def reference() -> str:
    """docs/reference.md as it should be."""
    parts = ["# Reference", "", "Written by `python tests/test_docs.py`.", "", "## Commands", ""]
    for command, printed in helps().items():
        parts += [f"### downres {command}", "", "```", printed, "```", ""]
    parts += ["## Python", "", "| name | what |", "|---|---|"]
    for name in downres.__all__:
        value = getattr(downres, name)
        said = value if isinstance(value, str) else inspect.getdoc(value) or ""
        parts.append(f"| `{name}` | {first_sentence(said).replace('|', '/')} |")
    return "\n".join(parts) + "\n"


def first_sentence(text: str) -> str:
    """Of the first paragraph, to its full stop."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`'(])", paragraph)[0]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_python_examples_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = blocks(file, "python")
    if not examples:
        return
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in examples:
        exec(compile(example, file.name, "exec"), names)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_commands_and_options_in_examples_exist(file: Path) -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for example in blocks(file, "sh"):
        for line in example.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "downres":
                continue
            section = re.search(rf"^### downres {re.escape(words[1])}\n(.*?)(?=^##)", text, re.M | re.S)
            assert section, line
            for word in words[2:]:
                if word.startswith("--"):
                    assert f"{word.split('=')[0]} " in section[1] or f"{word}\n" in section[1], (word, line)


def test_make_targets_in_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for example in blocks(ROOT / "README.md", "sh") for word in re.findall(r"^make ([a-z]+)", example, re.M)}
    assert {"demo", "test"} <= named <= targets


def test_reference_is_what_the_program_says() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference()


def test_every_name_is_told_in_a_whole_sentence() -> None:
    """None is cut at a colon or a semicolon, and what a public function returns is public too."""
    for name in downres.__all__:
        value = getattr(downres, name)
        sentence = first_sentence(value if isinstance(value, str) else inspect.getdoc(value) or "")
        assert re.search(r"\w.*\.$", sentence), (name, sentence)
        if inspect.isfunction(value):
            returned = re.findall(r"\b[A-Z]\w+", str(inspect.signature(value).return_annotation).rpartition(".")[2])
            assert {*returned} <= {*downres.__all__, "Any", "Module", "Path", "RegSeg", "Tensor"}, name


def test_links_in_documents_lead_somewhere() -> None:
    for file in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
            if not target.startswith("http"):
                assert (file.parent / target).exists(), (file.name, target)


if __name__ == "__main__":
    (ROOT / "docs" / "reference.md").write_text(reference())
