"""Errors speak of Python's arguments; the command line puts its options in their place."""

import ast
from pathlib import Path

import pytest
from torch import nn
from torch.utils.data import DataLoader

import downres
from downres import DownresError
from downres.cli import as_options

SOURCE = Path(downres.__file__).parent


def sentences() -> list[str]:
    """All that the library may say: the texts of its code without names of options that techniques and commands declare."""
    found = []
    for file in SOURCE.rglob("*.py"):
        if file.name == "cli.py":
            continue
        tree = ast.parse(file.read_text())
        docs = {
            ast.get_docstring(n, clean=False)
            for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
        }
        found += [
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value not in docs
        ]
    return found


def test_no_sentence_of_the_library_has_an_option() -> None:
    known = as_options(" ".join(f"`{name}`" for name in ("data", "fit_head", "label_size", "out", "weights"))).split()
    assert known == ["--data", "--fit-head", "--label-size", "--out", "--weights"]
    flags = ("--data", "--fit-head", "--folds", "--label", "--out", "--weights", "--task", "--compare", "--model", "--runtime")
    wrong = [s for s in sentences() if any(flag in s for flag in flags) and " " in s and "var(--" not in s]
    assert not wrong


@pytest.mark.parametrize(
    "said, shown",
    [
        ("pass `fit_head=True` or leave `folds` out.", "pass --fit-head or leave --folds out."),
        ("give `task='regression'`", "give --task regression"),
        ("name it with `labels='FILE.csv'`", "name it with --labels FILE.csv"),
        ("give resolutions with `resolutions`, `merges`", "give resolutions with --resolution, --merge"),
        ("call `reduce` or `nobody=3`", "call `reduce` or `nobody=3`"),
        ("out=… and data", "out=… and data"),
    ],
)
def test_arguments_become_options(said, shown) -> None:
    assert as_options(said) == shown


def test_each_speaks_its_own_words(cli, tmp_path) -> None:
    with pytest.raises(DownresError, match="There is no folder .*: point `data` to"):
        downres.evaluate(classifier(), tmp_path / "no")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))\n"
    )
    done = cli("curve", f"{tmp_path}/net.py:net", "--data", tmp_path / "no", "--resolution", "32")
    assert done.code == 2 and "point --data to" in done.err.replace("\n", " ") and "`" not in done.err


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


PAIRS = [(None, 0)]


@pytest.mark.parametrize("task", [None, "classification", "agreement", "multilabel", "regression"])
@pytest.mark.parametrize(
    "data",
    [DataLoader(PAIRS), [{"image": None, "label": 0}], {"image": []}, None, 3, [], iter(PAIRS), b"photos", {1}, DataLoader],
)
def test_data_of_another_kind_are_refused_in_a_sentence(data, task) -> None:
    options = {"compare": "classes"} if task == "agreement" else {}
    with pytest.raises(DownresError, match=r"^[^\n]+: [^\n]*(give|one of)[^\n]+\.$"):
        downres.evaluate(classifier(), data, task=task, **options)
    if isinstance(data, DataLoader):
        with pytest.raises(DownresError, match="DataLoader .* give its dataset"):
            downres.evaluate(nn.Conv2d(3, 2, 3), data)
