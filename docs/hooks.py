"""Pages of the site that live elsewhere in the repository, notebooks with what they show, and what pages link to there."""

import functools
import html
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
PAGES = ("benchmarks/README.md", "recipes/README.md", "recipes/figure5.md")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
_FRAME = re.compile(r'srcdoc="([^"]*)"')


def on_files(files: Files, config: Any) -> Files:
    """The pages of benchmarks and recipes, the notebooks, and every file that a page links to."""
    for page in PAGES:
        files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
    texts = {file.src_uri: Path(file.abs_src_path).read_text("utf-8") for file in files if file.src_uri.endswith(".md")}
    for source, text in texts.items():
        for link in _LINK.findall(text):
            target = (_source(source).parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT) and target.suffix not in (".md", ".ipynb"):
                place = _place(target)
                if place not in files.src_uris:
                    base = str(target)[: -len(place)]
                    files.append(File(place, base, config.site_dir, config.use_directory_urls))
    notebooks = sorted(NOTEBOOKS.glob("*.ipynb"))
    shown = _outputs(tuple(notebooks), tuple(file.read_text("utf-8") for file in notebooks))
    for file, outputs in zip(notebooks, shown, strict=True):
        text, frames = _notebook(file, outputs)
        files.append(File.generated(config, f"notebooks/{file.stem}.md", content=text))
        for name, frame in frames.items():
            files.append(File.generated(config, f"notebooks/{name}", content=frame))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are on the site: what is in docs/ is at its top, the rest of the repository beside it."""
    source = _source(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        target = (source.parent / found[1]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[0]
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        place = _place(target)
        return f"]({up}{place.removesuffix('.ipynb') + '.md' if place.endswith('.ipynb') else place}"

    return _LINK.sub(moved, markdown)


def _source(place: str) -> Path:
    """Of a page, by where it is on the site; `_place` is the way back."""
    return ROOT / place if place in PAGES else ROOT / "docs" / place


def _place(target: Path) -> str:
    inside = target.relative_to(ROOT)
    return str(inside.relative_to("docs") if inside.is_relative_to("docs") else inside)


@functools.cache
def _outputs(notebooks: tuple[Path, ...], texts: tuple[str, ...]) -> list[list[list[dict[str, str]]]]:
    """Of each cell of each notebook, as `execute.py` writes them: in a process of its own, once as long as no text changes."""
    if importlib.util.find_spec("IPython") is None:
        raise SystemExit("The site shows what notebooks show, for which they are run: pip install 'downres[docs]'.")
    command = [sys.executable, str(NOTEBOOKS / "execute.py"), *map(str, notebooks)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"A notebook does not run:\n{done.stderr}")
    return json.loads(done.stdout)


def _notebook(file: Path, outputs: list[list[dict[str, str]]]) -> tuple[str, dict[str, str]]:
    """The page, and by name the whole pages that it shows in frames: each is some megabytes, loaded when it is scrolled to."""
    parts, frames = [], {}

    def framed(found: re.Match[str]) -> str:
        name = f"{file.stem}-{len(frames) + 1}.html"
        frames[name] = html.unescape(found[1])
        return f'src="{name}"'

    for cell, shown in zip(json.loads(file.read_text("utf-8"))["cells"], outputs, strict=True):
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in shown:
            if "html" in output:
                parts.append(f"<div>{_FRAME.sub(framed, output['html'])}</div>")
            elif "png" in output:
                parts.append(f'<p><img src="data:image/png;base64,{output["png"]}" alt="What the cell above shows"></p>')
            else:
                parts.append(f"```text\n{output['text'].rstrip()}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n\n")
    itself = f'<p><a href="{file.name}" download>The notebook itself</a></p>'
    return f"{title}\n\n{itself}\n\n{rest}\n", frames
