"""Pages of the site that live elsewhere in the repository, and what pages link to there."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("benchmarks/README.md", "recipes/README.md", "recipes/figure5.md")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """The pages of benchmarks and recipes, and every file that a page links to."""
    for page in PAGES:
        files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        source = Path(page.abs_src_path or "")
        for link in _LINK.findall(source.read_text("utf-8")):
            target = (source.parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT) and target.suffix != ".md":
                place = _place(target)
                if place not in files.src_uris:
                    base = str(target)[: -len(place)]
                    files.append(File(place, base, config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are on the site: what is in docs/ is at its top, the rest of the repository beside it."""
    source = Path(page.file.abs_src_path)

    def moved(found: re.Match[str]) -> str:
        target = (source.parent / found[1]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[0]
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"]({up}{_place(target)}"

    return _LINK.sub(moved, markdown)


def _place(target: Path) -> str:
    inside = target.relative_to(ROOT)
    return str(inside.relative_to("docs") if inside.is_relative_to("docs") else inside)
