"""The site of the documentation: built strictly, every link in it leads somewhere, and nothing is fetched from anywhere."""

import json
import logging
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the site is built by mkdocs-material, of the extra docs")
    pytest.importorskip("IPython", reason="the site has what its notebooks show, which IPython runs, of the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    logging.getLogger("mkdocs").handlers.clear()
    return folder


def test_every_page_of_the_documentation_is_in_it(site):
    built = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= built
    assert "benchmarks/index" in built or "benchmarks/README" in built


def test_links_and_pictures_lead_somewhere(site):
    lost, seen = [], 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        text = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.S)  # Plotly's own code, in frames of notebooks
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            address, _, anchor = unescape(target).partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            seen += 1
            file = (page.parent / unquote(address)).resolve() if address else page
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (anchor and file.suffix == ".html" and f'id="{unquote(anchor)}"' not in file.read_text()):
                lost.append(f"{page.relative_to(site)}: {target}")
    assert not lost and seen > 100


def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"', page.read_text())
        fetched += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(https?:[^"]+)"', page.read_text())
        assert not fetched, page


def test_notebooks_ran_and_show_what_they_tell(site):
    """The hook runs every cell of every notebook, and the site is not built where one fails."""
    files = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert len(files) >= 3
    for file in files:
        page = file.stem
        shown = (site / "notebooks" / f"{page}.html").read_text()
        frames = re.findall(r'<iframe[^>]+src="([^"]+)"', shown)
        assert frames and all("Plotly.react" in (site / "notebooks" / name).read_text() for name in frames), page
        assert "<table>" in shown and f'href="{file.name}"' in shown
        assert json.loads((site / "notebooks" / file.name).read_text()) == json.loads(file.read_text())
    told = (site / "notebooks" / "photographs.html").read_text()
    assert told.count("DIFFERS") == 1 and told.count("as stated") > 5 and "proven" in told  # each word once in the cell itself
    assert "tokens left of 196" in (site / "notebooks" / "vit.html").read_text()


def test_notebooks_are_kept_without_what_they_show():
    for file in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        document = json.loads(file.read_text())
        assert document["nbformat"] == 4 and len({cell["id"] for cell in document["cells"]}) == len(document["cells"])
        assert document["cells"][0]["source"][0].startswith("# ")
        for cell in document["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, file.name


def test_a_notebook_that_fails_ends_with_its_cell(tmp_path):
    pytest.importorskip("IPython", reason="IPython runs notebooks, of the extra docs")
    cells = [{"cell_type": "markdown", "source": ["# a"]}, {"cell_type": "code", "source": ["1 + 1\n", "1 / 0"]}]
    file = tmp_path / "bad.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    run = [sys.executable, str(ROOT / "docs" / "notebooks" / "execute.py"), str(file)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "ZeroDivisionError" in done.stderr and "1 + 1" in done.stderr
