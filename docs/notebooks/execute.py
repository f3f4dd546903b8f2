"""Runs notebooks in order, each in a fresh folder: `python execute.py FILE …` writes JSON, a list of outputs a cell.

An output is {"html": …}, {"png": base64} or {"text": …}. A cell that fails ends it, with the cell.
"""

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.interactiveshell import InteractiveShell


def outputs(file: Path) -> list[list[dict[str, str]]]:
    """What each cell shows, of words nothing."""
    shell, before, found = InteractiveShell(colors="nocolor"), Path.cwd(), []
    shell.display_formatter.active_types = shell.display_formatter.format_types  # as in a notebook, not as in a terminal
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        os.chdir(folder)
        try:
            for cell in json.loads(file.read_text("utf-8"))["cells"]:
                found.append(_shown(shell, "".join(cell["source"])) if cell["cell_type"] == "code" else [])
        finally:
            os.chdir(before)
    return found


def _shown(shell: InteractiveShell, source: str) -> list[dict[str, str]]:
    """What is printed, and then the value of the last line; warnings are not shown."""
    values: list[dict[str, Any]] = []
    shell.display_trap.hook = CapturingDisplayHook(shell, values)
    printed, warned = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(warned):
        ended = shell.run_cell(source)
    if not ended.success:
        sys.exit(f"{source}\n\n{printed.getvalue()}{warned.getvalue()}")
    return [{"text": text} for text in [printed.getvalue()] if text] + [_richest(one["data"]) for one in values]


def _richest(data: dict[str, Any]) -> dict[str, str]:
    for name, kind in (("html", "text/html"), ("png", "image/png")):
        if kind in data:
            value = data[kind]
            return {name: value if isinstance(value, str) else base64.b64encode(value).decode()}
    return {"text": data["text/plain"]}


if __name__ == "__main__":
    json.dump([outputs(Path(name).resolve()) for name in sys.argv[1:]], sys.stdout)
