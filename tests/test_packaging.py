"""What is installed: the wheel holds every file of the source, templates and all, and the sdist builds the same wheel."""

import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist), built in this process and without the network."""
    pytest.importorskip("hatchling", reason="packages are built by hatchling, of the extra test")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    place = str(tmp_path_factory.mktemp("dist"))
    builders = WheelBuilder(str(ROOT)), SdistBuilder(str(ROOT))
    return tuple(Path(next(builder.build(directory=place, versions=["standard"]))) for builder in builders)


def test_the_wheel_is_the_source_and_how_it_starts(built):
    source = ROOT / "src"
    ours = {f.relative_to(source).as_posix() for f in (source / "downres").rglob("*") if f.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    with zipfile.ZipFile(built[0]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert inside == ours
        about = {name.rpartition("/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
        for name in ours:
            assert wheel.read(name) == (source / name).read_bytes(), name
    assert {"downres/reports/template.html.j2", "downres/reports/watch.html", "downres/reports/labels.js"} < inside
    assert "downres = downres.cli:main" in about["entry_points.txt"] and "Apache" in about["LICENSE"]


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = Path(next(WheelBuilder(str(unpacked)).build(directory=str(tmp_path / "dist"), versions=["standard"])))
    with zipfile.ZipFile(built[0]) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist() and len(first.namelist()) > 100
        for name in first.namelist():
            assert first.read(name) == second.read(name), name
    assert {"pyproject.toml", "README.md", "Makefile", "mkdocs.yml"} <= {f.name for f in unpacked.iterdir()}
    assert (unpacked / "tests" / "conftest.py").exists() and (unpacked / "docs" / "notebooks" / "minute.ipynb").exists()
