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
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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
    given = options.parse_args()
    if given.case:
        print(json.dumps(opened(Path(given.case[0]), given.case[1])))
        return
    from measuring import Watch, save

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
