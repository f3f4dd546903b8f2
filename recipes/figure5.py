"""Figure 5 of the paper from the cost model: MACs and memory of ViT-S when the model, and when the sequence is scaled.

    python recipes/figure5.py

Writes results/figure5.json and .png, and the tables of figure5.md. Counts only: no data, no weights, seconds. The picture
needs the package playwright and chromium.
"""

import json
import shutil
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

import downres
from downres.environment import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL, PATCH = "timm:vit_small_patch16_224", 16
SIZES = (128, 176, 192, 208, 224, 240)
"""Images in pixels: 64, 121, 144, 169, 196 and 225 patch tokens, the authors' sequence lengths."""
DEPTHS = (14, 10, 8, 6, 3)
WIDTHS = (1.17, 0.83, 0.67, 0.5, 0.33)
"""7, 5, 4, 3 and 2 heads of 64 channels where the original has 6."""


def main() -> None:
    found = downres.costs(MODEL, SIZES, depths=DEPTHS, widths=WIDTHS)
    document = {
        "date": date.today().isoformat(),
        "command": "python recipes/figure5.py",
        "versions": {name: version for name, version in versions().items() if name in ("python", "downres", "torch", "timm")},
        **found.to_json(),
        "at_equal_macs": at_equal_macs(found.rows),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "figure5.json").write_text(json.dumps(document, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        screenshot(found.write_picture(Path(folder) / "figure5.html"), RESULTS / "figure5.png")
    text = HERE / "figure5.md"
    for name, table in (("families", families(document)), ("equal", equal(document))):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.read_text().partition(start)
        text.write_text(before + start + table + end + rest.partition(end)[2])


def tokens(size: int) -> int:
    """Patch tokens of a square image; the class token comes on top."""
    return (size // PATCH) ** 2


def at_equal_macs(rows: tuple) -> list[dict]:
    """For each sequence length, what model scaling needs at its MACs: linear between the depths and widths counted."""
    line, compared = {family: along(rows, family) for family in ("depth", "width")}, []
    for row in (row for row in rows if row.family == "resolution"):
        macs, one = row.cost.macs, {"tokens": tokens(row.candidate.hw[0]), "macs": row.cost.macs}
        one["sequence"] = {"peak_activation_bytes": row.cost.peak_activation_bytes, "param_bytes": row.cost.param_bytes}
        for family, points in line.items():
            one[family] = {
                key: round(float(np.interp(macs, points["macs"], points[key])), 3 if key == "scale" else None) for key in points
            }
            del one[family]["macs"]
        compared.append(one)
    return compared


def along(rows: tuple, family: str) -> dict[str, list[float]]:
    """A family of model scaling with the original, by rising MACs; scale: number of blocks, or factor on the channels."""
    points = sorted((r for r in rows if r.family in (family, "original")), key=lambda r: r.cost.macs)
    own = {"depth": lambda r: r.candidate.depth or 12, "width": lambda r: round(6 * r.candidate.width) / 6}[family]
    return {
        "macs": [r.cost.macs for r in points],
        "scale": [own(r) for r in points],
        "peak_activation_bytes": [r.cost.peak_activation_bytes for r in points],
        "param_bytes": [r.cost.param_bytes for r in points],
    }


def families(document: dict) -> str:
    """Every candidate in Markdown."""
    lines = ["| | | GMACs | GFLOPs | peak activations | parameters |", "|---|---|--:|--:|--:|--:|"]
    for row in document["costs"]:
        what = {
            "depth": f"{row['depth']} blocks",
            "width": f"{round(6 * row['width'])} heads, {64 * round(6 * row['width'])} channels",
        }.get(row["family"], f"{tokens(row['resolution'])} tokens ({row['resolution']} px)")
        counts = f"{row['macs'] / 1e9:.3f} | {2 * row['macs'] / 1e9:.3f}"
        memory = f"{row['peak_activation_bytes'] / 1e6:.2f} MB | {row['param_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {row['family'].replace('resolution', 'sequence')} | {what} | {counts} | {memory} |")
    return "\n".join(lines) + "\n"


def equal(document: dict) -> str:
    """The comparison at equal MACs in Markdown."""
    lines = [
        "| tokens | GMACs | peak, sequence | peak, width | peak, depth | sequence saves, of width | of depth |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in document["at_equal_macs"]:
        peaks = {how: one[how]["peak_activation_bytes"] for how in ("sequence", "width", "depth")}
        saved = [f"{100 * (1 - peaks['sequence'] / peaks[how]):.0f} %".replace("-", "−") for how in ("width", "depth")]
        scales = f"{one['width']['scale']:.2f}×", f"{one['depth']['scale']:.1f} blocks"
        cells = [
            f"{one['tokens']}", f"{one['macs'] / 1e9:.3f}", f"{peaks['sequence'] / 1e6:.2f} MB",
            f"{peaks['width'] / 1e6:.2f} MB ({scales[0]})", f"{peaks['depth'] / 1e6:.2f} MB ({scales[1]})", *saved,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def screenshot(page_file: Path, picture: Path) -> None:
    """The two panels of the page at twice their size, as chromium draws them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        page = browser.new_page(viewport={"width": 1160, "height": 800}, device_scale_factor=2, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("#parameters .scatterlayer .point")
        page.locator("#plots").screenshot(path=picture)
        browser.close()
    Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
