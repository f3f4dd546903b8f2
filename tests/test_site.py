"""The site of the documentation: built strictly, every link in it leads somewhere, and nothing is fetched from anywhere."""

import logging
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the site is built by mkdocs-material, of the extra docs")
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
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
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
