"""The results of the recipes as pictures and as the table of README.md.

    python recipes/pictures.py --data ../shared/data/catdog

Writes results/vit_catdog.png (accuracy against MACs), the table between the two marks of README.md, and, where the photographs
are, vit_tokens.png here (which patches were merged). Needs the package playwright and chromium; takes half a minute.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from PIL import Image, ImageDraw, ImageFont
from vit_catdog import CANDIDATES, RESULTS

import downres
from downres.images.preprocess import preprocess, resize_and_crop
from downres.parse import format_quantity
from downres.reports import words

README = Path(__file__).parent / "README.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->"
COLOURS = dict(zip(CANDIDATES, ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed"), strict=True))
PLACES = dict(zip(CANDIDATES, ("top left", "bottom right", "top center", "bottom center", "top center"), strict=True))
PHOTOGRAPHS = ("val/cat/cat.1051.jpg", "val/dog/dog.1108.jpg")
SHOWN = ("merge4", "merge8", "merge12", "prune12")
INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data/catdog"), help="for the picture of merged patches")
    given = options.parse_args()
    measured = json.loads((RESULTS / "vit_catdog.json").read_text())
    save_png(accuracy_against_macs(measured), RESULTS / "vit_catdog.png")
    before, _, rest = README.read_text().partition(MARKS[0])
    README.write_text(before + MARKS[0] + table(measured) + MARKS[1] + rest.partition(MARKS[1])[2])
    if given.data.is_dir():
        # Into the present folder: the photographs are not part of downres.
        merged_patches([given.data / name for name in PHOTOGRAPHS]).save("vit_tokens.png", optimize=True)


def table(measured: dict) -> str:
    """The candidates in Markdown, technique by technique; the bound of the drop rounded up."""
    lines = [
        "| | | MACs | peak activations | latency | lowered only | recovered | by | drop, at most | |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|---|",
    ]
    for row in [measured["original"], *measured["candidates"]]:
        original = row is measured["original"]
        chosen = "**" if row["candidate"] == measured["best"] else ""
        cells = [
            row.get("technique", "original"),
            chosen + words.label(downres.Candidate.parse(row["candidate"])) + chosen,
            format_quantity(row["macs"]),
            format_quantity(row["peak_activation_bytes"], "B"),
            f"{words.digits(row['latency_ms'])} ms",
            "" if original else f"{row['naive_top1']:.1f} %",
            f"{row['top1']:.1f} %",
            "" if original or row["rung"] == "none" else words.RUNGS[row["rung"]],
            "" if original else f"{words.points(row['drop'])}, {words.points(math.ceil(row['drop_upper'] * 100 - 1e-9) / 100)}",
            "" if original else row["verdict"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short(row: dict) -> str:
    """`168`, `p16`, `merge8`, `merge12↓`, `×0.5@blocks.3`: beside a point."""
    word = row["candidate"].split()[-1]
    return word.replace("patch", "p").replace("stem", "").replace("-decreasing", "↓")


def accuracy_against_macs(measured: dict) -> go.Figure:
    """One colour a technique: recovered filled and joined, lowered only hollow; the original as a band and a star."""
    original, figure = measured["original"], go.Figure()
    figure.add_hrect(y0=original["top1_low"], y1=original["top1_high"], fillcolor="#f3f4f6", line_width=0, layer="below")
    for name, colour in COLOURS.items():
        rows = sorted((r for r in measured["candidates"] if r["technique"] == name), key=lambda r: r["macs"])
        x = [r["macs"] / 1e9 for r in rows]
        lost = {"symbol": "circle-open", "size": 8, "line": {"width": 1.5}, "color": colour}
        figure.add_scatter(x=x, y=[r["naive_top1"] for r in rows], mode="markers", marker=lost, showlegend=False)
        # A line joins what differs by degree; pooling also differs by place.
        mode = "markers" if name == "pooled tokens" or len(rows) == 1 else "lines+markers"
        figure.add_scatter(
            x=x, y=[r["top1"] for r in rows], mode=f"{mode}+text", name=name, text=[short(r) for r in rows],
            textposition=["top center" if r["candidate"] == "196" else PLACES[name] for r in rows],
            textfont={"color": colour, "size": 12}, line={"color": colour, "width": 2}, marker={"size": 10},
        )  # fmt: skip
        for xs, row in zip(x, rows, strict=True):
            figure.add_shape(
                type="line", x0=xs, x1=xs, y0=row["naive_top1"], y1=row["top1"], layer="below",
                line={"color": colour, "width": 1, "dash": "dot"},
            )  # fmt: skip
    star = {"symbol": "star", "size": 16, "color": INK}
    figure.add_scatter(
        x=[original["macs"] / 1e9], y=[original["top1"]], mode="markers+text", marker=star, text=["original"],
        textposition="top center", showlegend=False,
    )  # fmt: skip
    axis = {"gridcolor": GRID, "zeroline": False, "ticks": "outside", "tickcolor": GRID}
    figure.update_xaxes(**axis, title="GMACs per photograph", rangemode="tozero")
    figure.update_yaxes(**axis, title={"text": "top-1 accuracy on 200 photographs", "standoff": 14}, ticksuffix=" %")
    figure.update_layout(
        template="none", width=1000, height=640, margin={"l": 80, "r": 20, "t": 60, "b": 60},
        font={"family": "system-ui, Arial, sans-serif", "size": 14, "color": INK},
        title={"text": "ViT-S/14, cats and dogs. Filled: recovered, hollow: lowered only", "x": 0.01, "font_size": 16},
        legend={"x": 0.99, "xanchor": "right", "y": 0.02, "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.85)"},
    )  # fmt: skip
    return figure


def save_png(figure: go.Figure, file: Path) -> None:
    """A plotly figure as a picture at twice its size, drawn by chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        page = browser.new_page(viewport={"width": figure.layout.width, "height": figure.layout.height}, device_scale_factor=2)
        page.set_default_timeout(300_000)  # ms: a busy machine takes its time over plotly's megabytes
        page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
        page.locator(".js-plotly-plot").screenshot(path=file)
        browser.close()
    Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(file, optimize=True)


def merged_patches(photographs: list[Path]) -> Image.Image:
    """Each photograph as the network sees it, then with its tokens after the last block outlined."""
    model = downres.load_model(f"{Path(__file__).parent / 'vit_catdog.py'}:encoder")
    p, reduced = model.preprocessing, [downres.reduce(model.module, merge=how) for how in SHOWN]
    side, patch, gap, head = p.hw[0], 14, 8, 26
    width = (side + gap) * (1 + len(SHOWN)) - gap
    sheet = Image.new("RGB", (width, head + (side + gap) * len(photographs) - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, file in enumerate(photographs):
        picture = np.asarray(Image.open(file).convert("RGB"))
        seen = resize_and_crop(picture, p).permute(1, 2, 0).numpy()
        pictures = [(seen, "256 patches")]
        for small, how in zip(reduced, SHOWN, strict=True):
            tokens = downres.token_map(small, preprocess(picture, p)[None])[0].numpy()
            pictures.append((painted(seen, tokens, patch), f"{how}: {len(np.unique(tokens))}"))
        for column, (pixels, text) in enumerate(pictures):
            sheet.paste(Image.fromarray(pixels), (column * (side + gap), head + row * (side + gap)))
            if row == 0:
                draw.text((column * (side + gap), 4), text, INK, font)
    return sheet


def painted(pixels: np.ndarray, tokens: np.ndarray, patch: int) -> np.ndarray:
    """pixels (H, W, 3) uint8 with white lines between tokens (rows, columns); those of several patches in their mean colour."""
    _, which, patches = np.unique(tokens, return_inverse=True, return_counts=True)
    which = np.kron(which.reshape(tokens.shape), np.ones((patch, patch), int))
    means = [np.bincount(which.ravel(), pixels[..., c].ravel()) / (patches * patch**2) for c in range(3)]
    out = np.where((patches > 1)[which][..., None], np.stack(means, axis=-1)[which].round(), pixels).astype(np.uint8)
    edge = np.zeros(which.shape, bool)
    edge[1:] |= which[:-1] != which[1:]
    edge[:, 1:] |= which[:, :-1] != which[:, 1:]
    out[edge] = 255
    return out


if __name__ == "__main__":
    main()
