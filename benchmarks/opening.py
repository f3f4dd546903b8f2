"""Time, memory and disk of opening class folders of 10³ to 10⁶ training images, and of looking at all that was opened once.

    python benchmarks/opening.py --before CHECKOUT

The sets are generated: val/ holds 500 files and train/ as many as asked for, in ten classes, hard links to 24 photograph-like
JPEGs of 160×120. Each case runs in a process of its own:

before    another checkout of downres (given with --before), for comparison; not above 10⁵, where it decodes 6 GB
default   `open_folder`
small     `open_folder(cache_gb=0.1)`: most pictures do not fit and are decoded again when they are looked at

Recorded: seconds to open and to read every opened picture once afterwards, decoded files, peak resident memory above that of
the imports (which counts the touched pages of the cache, that the system may take back), and the size of the cache on disk.
Expected time: 5 minutes on two quiet cores, 13 on busy ones. Wanted, and asserted: from 10⁴ training images on, decoded files
and disk stay what they are. Time and memory still grow by the list of names.

    python benchmarks/opening.py --archives --place FOLDER

The same question of data that are in archives: 500 pictures to test on and 10³ to 10⁵ to fit on, 32×32 JPEGs of noise, no two
the same, as WebDataset shards of 1000, as parquet with groups of 100 rows, as ImageNet's own tar of tars and, to compare
with, as class folders. Each is opened twice, a process each: first without an index, then again. Recorded: CPU seconds (of all
threads, the disk's time not among them) to list what is there, to open the pictures and to the first result, the top-1 of a
tiny network on the 500; and peak resident memory above that of the imports. Expected time: 15 minutes. What is generated is
deleted. Wanted, and asserted: from 10⁴ to 10⁵ memory grows by less than 200 bytes a picture, and CPU seconds by less than half
of what their number does.
The result is put into the field "archives" of the same file.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, TESTED, SOURCES, SIZE = 10, 500, 24, (160, 120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="training images")
    options.add_argument("--before", type=Path, help="a checkout of downres to compare with")
    options.add_argument("--place", type=Path, help="where the sets are made, a disk with a million free inodes")
    options.add_argument("--date", help="for the result, default today")
    options.add_argument("--case", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options.add_argument("--archives", action="store_true", help="archives in the place of folders, up to 10⁵")
    given = options.parse_args()
    if given.case:
        print(json.dumps(opened(Path(given.case[0]), given.case[1])))
        return
    from measuring import RESULTS, Watch, save

    if given.archives:
        kept = json.loads((RESULTS / "opening.json").read_text())
        with tempfile.TemporaryDirectory() as folder:
            content = {"tested_images": TESTED, "jpeg": [32, 32], "photo_ms": photo_ms()}
            content["rows"] = archive_rows(given.sizes[:3], given.place)
            command = "python benchmarks/opening.py --archives"
            new = json.loads(save("archives", command, given.date, content, Path(folder)).read_text())
        (RESULTS / "opening.json").write_text(json.dumps(kept | {"archives": new}, indent=1) + "\n")
        write_table(new)
        return

    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.place) as folder:
            make(Path(folder), size)
            for case in ("before", "default", "small"):
                if case == "before" and (given.before is None or size > 10**5):
                    continue
                environment = dict(os.environ)
                if case == "before":
                    environment["PYTHONPATH"] = str(given.before.resolve() / "src")
                with Watch() as watch:
                    run = [sys.executable, __file__, "--case", folder, case]
                    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
                row = {"training_images": size, "case": case, **json.loads(done.stdout), "others": round(watch.others, 2)}
                rows.append(row)
                print(rows[-1], file=sys.stderr)
    for case in ("default", "small"):
        large = [row for row in rows if row["case"] == case and row["training_images"] >= 10**4]
        assert len({(row["decoded"], row["cache_mb"]) for row in large}) <= 1, "what is decoded grows with the folder"
    content = {"tested_images": TESTED, "jpeg": SIZE, "rows": rows}
    if (before := RESULTS / "opening.json").exists():  # what --archives measured stays
        content |= {"archives": json.loads(before.read_text()).get("archives")}
    file = save("opening", "python benchmarks/opening.py --before CHECKOUT", given.date, content)
    print(f"{file.relative_to(file.parents[2])} written")


def make(root: Path, size: int) -> None:
    """train/ with `size` files and val/ with TESTED, links to a few pictures that compress as photographs do."""
    rng = np.random.default_rng(0)
    (root / ".pictures").mkdir()
    for i in range(SOURCES):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 8, (SIZE[1], SIZE[0], 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(root / ".pictures" / f"{i}.jpg")
    for part, count in (("train", size), ("val", TESTED)):
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(label, count, CLASSES):
                os.link(root / ".pictures" / f"{i % SOURCES}.jpg", folder / f"{i:07d}.jpg")


def opened(folder: Path, case: str) -> dict:
    """One case, in this process."""
    from downres import open_folder
    from downres.images import images

    calls, decode = [0], images.decode

    def counted(path: str | os.PathLike[str]) -> np.ndarray:
        calls[0] += 1
        return decode(path)

    images.decode = counted
    before, start = peak_mb(), time.perf_counter()
    data = open_folder(folder, outputs=None, **({"cache_gb": 0.1} if case == "small" else {}))
    at_once, decoded = time.perf_counter() - start, calls[0]
    start = time.perf_counter()
    total = sum(int(image[0, 0, 0]) for image in data.images)
    return {
        "open_s": round(at_once, 2),
        "read_all_s": round(time.perf_counter() - start, 2),
        "images": len(data.images),
        "decoded": decoded,
        "peak_mb": round(peak_mb() - before, 1),
        "cache_mb": round(mapped_mb(), 1),
        "check": total,
    }


NAMES = {"folders": "class folders", "shards": "WebDataset shards", "parquet": "parquet", "imagenet": "ImageNet's tars"}
KINDS = ("imagenet", "shards", "parquet", "folders")
MARKS = "<!-- opening -->\n", "<!-- end of opening -->"


def archive_rows(sizes: list[int], place: Path | None) -> list[dict]:
    """Every kind of every size, opened twice; the conditions asserted."""
    rows = []
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm.data  # noqa: F401

    import downres.tasks.find  # noqa: F401

    for size in sizes:
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                make_archive(kind, Path(folder) / "data", size)
                for when in ("first", "again"):
                    # A process of its own that has imported all: what it used before is not counted, neither time nor memory.
                    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                        measured = pool.submit(archive_opened, Path(folder)).result()
                    rows.append({"training_images": size, "kind": kind, "when": when, **measured})
                    print(rows[-1], file=sys.stderr)
    check_rows(rows)
    return rows


def check_rows(rows: list[dict]) -> None:
    """What is wanted of them."""
    assert len({row["correct"] for row in rows}) == 1, "the same 500 pictures, and another top-1"
    for few, many in (
        (few, many)
        for few in rows
        for many in rows
        if (few["kind"], few["when"]) == (many["kind"], many["when"])
        and few["training_images"] == 10**4 < many["training_images"]
    ):
        more = many["training_images"] - few["training_images"]
        assert (many["peak_mb"] - few["peak_mb"]) * 1e6 < 200 * more, (few, many)
        assert many["result_s"] / few["result_s"] < 0.5 * many["training_images"] / few["training_images"], (few, many)
        assert many["decoded"] <= TESTED + 10_000, (few, many)


def photo_ms() -> float:
    """CPU milliseconds to decode, sum and keep a JPEG of 500×375 that compresses as photographs do."""
    from downres.images import from_files

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + rng.normal(0, 8, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file := Path(folder) / "photo.jpg", quality=85)
        start = cpu()
        from_files([file] * 200, [str(i) for i in range(200)])
        return round((cpu() - start) / 200 * 1000, 2)


def write_table(measured: dict) -> None:
    """The table of docs/scale.md, and what ImageNet will cost by it."""
    rows = {(row["kind"], row["when"], row["training_images"]): row for row in measured["rows"]}
    sizes = sorted({size for *_, size in rows})
    few, many = sizes[-2:]
    lines = [
        f"Tiny pictures, {measured['tested_images']} to test on and as many to fit on as the columns say: CPU seconds to list",
        "what is there (the first time, again) and to the first result, and peak memory above the imports'",
        f"([opening.py](../benchmarks/opening.py), {measured['date']}, {measured['hardware']}; blank: not measured):",
        "",
        "| data | " + " | ".join(f"{what}, {size:,}" for what in ("list s", "result s", "MB") for size in sizes) + " |",
        "|---|" + "--:|" * 3 * len(sizes),
    ]
    for kind, called in NAMES.items():
        pairs = [[row for when in ("first", "again") if (row := rows.get((kind, when, size)))] for size in sizes]
        listed = [", ".join(f"{row['list_s']:.1f}" for row in pair if kind != "folders") for pair in pairs]
        result = [", ".join(f"{row['result_s']:.1f}" for row in pair) for pair in pairs]
        memory = [f"{max(row['peak_mb'] for row in pair):.0f}" if pair else "" for pair in pairs]
        lines.append(f"| {called} | " + " | ".join([*listed, *result, *memory]) + " |")

    def slope(when: str, what: str) -> float:
        return (rows["imagenet", when, many][what] - rows["imagenet", when, few][what]) / (many - few)

    n, looked_at, ms = 1_331_167, 60_000, measured["photo_ms"]
    listed, again, bytes_each = slope("first", "list_s"), slope("again", "list_s"), slope("first", "peak_mb") * 1e6
    lines += [
        "",
        f"From {few:,} to {many:,} pictures in ImageNet's tars memory grows by {bytes_each:.0f} bytes a picture, time by",
        f"{listed * 1e6:.0f} µs the first time and {again * 1e6:.1f} µs again. **ImageNet** has {n:,} pictures: by these",
        f"figures {n * listed / 60:.1f} minutes of CPU to read its headers once, beside the disk's time to seek as often,",
        f"{n * again:.1f} seconds more at later starts, and {n * bytes_each / 1e6:.0f} MB. Its 50,000 proof images and 10,000",
        f"to fit on take {ms:.1f} ms each at 500×375: {looked_at * ms / 60_000:.0f} minutes of CPU at every start, and",
        f"{looked_at * 500 * 375 * 3 / 1e9:.0f} GB of the cache. With a smaller `--cache-gb` what does not fit is decoded",
        "at each look, of parquet with all of its group of rows. Nothing of that size was run here.",
        "",
    ]
    text = re.sub(r"(?<=\d),(?=\d{3})", " ", "\n".join(lines))
    before, _, rest = (document := Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text().partition(MARKS[0])
    document.write_text(before + MARKS[0] + text + MARKS[1] + rest.partition(MARKS[1])[2])


def wnids() -> list[str]:
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()[:CLASSES]


@functools.lru_cache(maxsize=2)
def pictures(first: int, count: int) -> list[tuple[int, bytes]]:
    """(class, JPEG) of noise, of each number another; kept for the next kind."""
    found = []
    rng = np.random.default_rng(first)
    for i in range(first, first + count):
        file = io.BytesIO()
        noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC).save(file, "jpeg", quality=85)
        found.append((i % CLASSES, file.getvalue()))
    return found


def make_archive(kind: str, root: Path, size: int) -> None:
    """train and val of one kind, CLASSES of ImageNet's classes in it."""
    root.mkdir()
    names = wnids()
    for part, first, count in (("train", TESTED, size), ("val", 0, TESTED)):
        some = ((f"{part}_{i:07d}", label, jpeg) for i, (label, jpeg) in enumerate(pictures(first, count)))
        if kind == "folders":
            for name in names:
                (root / part / name).mkdir(parents=True)
            for key, label, jpeg in some:
                (root / part / names[label] / f"{key}.jpg").write_bytes(jpeg)
        elif kind == "shards":
            for start in range(0, count, 1000):
                with tarfile.open(root / f"set-{part}-{start // 1000:05d}.tar", "w") as tar:
                    for key, label, jpeg in islice(some, 1000):
                        put(tar, f"{key}.jpg", jpeg)
                        put(tar, f"{key}.cls", names[label].encode())
        elif kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            for start in range(0, count, 10_000):
                rows = list(islice(some, 10_000))
                columns = {"image": [{"bytes": jpeg, "path": f"{key}.jpg"} for key, _, jpeg in rows]}
                columns["label"] = [names[label] for _, label, _ in rows]
                pq.write_table(pa.table(columns), root / f"{part}-{start // 10_000:05d}.parquet", row_group_size=100)
        elif part == "val":
            with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar, open(root / "LOC_val_solution.csv", "w") as truth:
                truth.write("ImageId,PredictionString\n")
                for i, (_, label, jpeg) in enumerate(some, 1):
                    put(tar, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg)
                    truth.write(f"ILSVRC2012_val_{i:08d},{names[label]} 0 0 31 31\n")
        else:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                inner = [tarfile.open(Path(folder) / f"{name}.tar", "w") for name in names]
                for key, label, jpeg in some:
                    put(inner[label], f"{names[label]}_{key}.JPEG", jpeg)
                with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
                    for one in inner:
                        one.close()
                        tar.add(one.name, Path(one.name).name)


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    told = tarfile.TarInfo(name)
    told.size = len(content)
    tar.addfile(told, io.BytesIO(content))


def archive_opened(folder: Path) -> dict:
    """One opening and a first result, in this process; the index is kept in the folder."""
    import torch
    from torch import nn

    from downres import Model, Preprocessing, evaluate
    from downres.images.archives import find_archives, list_archives
    from downres.tasks.classification.archives import open_archives
    from downres.tasks.classification.folders import open_folder

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    folder = folder / "data"
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)).eval()
    with torch.no_grad():
        module[-1].bias[CLASSES:] = -100.0  # else none of the few classes there are would ever be answered
    model = Model(module, Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3), "", "", 1000)
    before, start = peak_mb(), cpu()
    found = find_archives(folder)
    if found is not None:
        list_archives(found)
    listed = cpu() - start
    data = open_folder(folder, outputs=1000) if found is None else open_archives(found, outputs=1000)
    open_s, open_mb = cpu() - start, peak_mb() - before
    score = evaluate(model, data, runtime="torch", threads=1)
    return {
        "list_s": round(listed, 2),
        "open_s": round(open_s, 2),
        "result_s": round(cpu() - start, 2),
        "decoded": len(data.images),
        "tested": score.n,
        "correct": score.correct,
        "open_mb": round(open_mb, 1),
        "peak_mb": round(peak_mb() - before, 1),
    }


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mb() -> float:
    """The most resident memory of this process so far (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def mapped_mb() -> float:
    """Size of the files without a name that are mapped: the cache."""
    sizes = [0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("(deleted)") and tempfile.gettempdir() in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            sizes.append(end - start)
    return sum(sizes) / 1e6


if __name__ == "__main__":
    main()
