"""Agreement: no labels; classes, embeddings and class maps of the original are the truth."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from downres import DownresError, Run, check, curve, predict, search
from downres.tasks.agreement.task import overlap, unit

from ..conftest import Colours, model_of


class Embedding(Colours):
    """No linear layer at the end: features and no classes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.stem(x))).flatten(1) * 1.0


class Pixels(nn.Module):
    """Which channel is largest, pixel by pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_classes_by_arithmetic(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, colours = painted
    found = curve(model_of(Colours(), outputs=3), folder, [16, 8], task="agreement", snap=False)
    assert found.original.quality.agreement == 100.0 and found.original.quality.n == 80
    for result in found.results:
        d = result.drop
        assert d.won == 0 and d.drop == pytest.approx(100 - result.quality.agreement) and d.lost == 80 - result.quality.same


@pytest.fixture(scope="module")
def classes(painted: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search for the original's classes."""
    folder, _ = painted
    return search(
        model_of(Colours(), outputs=3), folder, task="agreement", resolutions=[16], stem_scales=(), snap=False, max_drop=20.0,
        threads=1, out=tmp_path_factory.mktemp("classes") / "run",
    )  # fmt: skip


def test_the_whole_way_with_classes(painted: tuple[Path, np.ndarray], classes: Run) -> None:
    folder, _ = painted
    assert classes.best is not None and classes.artifact is not None and classes.task.name == "agreement"
    assert [f.ok for f in check(classes.artifact)] == [True, True, None, True, True]
    (found,) = predict(classes.artifact, [folder / "00.png"])
    assert found.classes[0].startswith("class ")
    assert "Agreement" in (classes.folder / "report.html").read_text()


def test_embeddings_by_cosine_and_neighbours(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = painted
    run = search(
        model_of(Embedding()), folder, task="agreement", resolutions=[16], stem_scales=(), snap=False, max_drop=5.0, threads=1,
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.original.quality.cosine == pytest.approx(100.0, abs=1e-4) and run.original.quality.neighbours == 100.0
    assert 0 < run.results[0].quality.neighbours <= 100 and run.best is not None
    assert [f.ok for f in check(tmp_path / "run" / "best")] == [True, True, None, True, True]
    (found,) = predict(tmp_path / "run" / "best", [folder / "00.png"])
    assert len(found.embedding) == 3


def test_masks_against_the_originals(painted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = painted
    run = search(
        model_of(Pixels()), folder, task="agreement", resolutions=[16], stem_scales=(), snap=False, max_drop=60.0, threads=1,
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.original.quality.miou == 100.0 and run.results[0].quality.miou < 100.0
    assert run.best is not None
    assert [f.ok for f in check(tmp_path / "run" / "best")] == [True, True, None, True, True]


def test_a_broken_artifact_is_noticed(classes: Run, tmp_path: Path) -> None:
    """The original's answers travel with the artifact: another truth, and the quality is not as stated."""
    from downres.artifacts import proof

    assert classes.artifact is not None
    spoilt = shutil.copytree(classes.artifact, tmp_path / "best")
    kept = np.load(spoilt / "targets.npz")["classes"]
    np.savez_compressed(spoilt / "targets.npz", classes=(kept + 1) % 3)
    assert [f.what for f in check(spoilt) if f.ok is False] == ["files"]
    unchecked = pytest.MonkeyPatch()
    unchecked.setattr(proof, "changed_files", lambda *_: [])
    try:
        assert [f.what for f in check(spoilt) if f.ok is False] == ["quality"]
    finally:
        unchecked.undo()


def test_numbers_that_may_be_either_are_asked_about(painted: tuple[Path, np.ndarray]) -> None:
    folder, _ = painted
    with pytest.raises(DownresError, match="`compare='classes'` or `compare='embeddings'`"):
        curve(model_of(Colours()), folder, [16], task="agreement", snap=False)
    found = curve(model_of(Colours()), folder, [16], task="agreement", compare="embeddings", snap=False)
    assert found.original.quality.metric == "cosine similarity"


def test_overlap_of_neighbours_by_hand() -> None:
    rng = np.random.default_rng(0)
    one = unit(rng.normal(size=(30, 5)).astype(np.float32))
    assert overlap(one, one).tolist() == [1.0] * 30
    other = unit(rng.normal(size=(30, 5)).astype(np.float32))
    near = [{j for j in np.argsort(-(v @ v[i]))[:11] if j != i} for v in (one, other) for i in range(30)]
    by_hand = [len(near[i] & near[30 + i]) / 10 for i in range(30)]
    assert overlap(one, other) == pytest.approx(np.array(by_hand))
    assert np.isnan(overlap(one[:5], other[:5])).all()
