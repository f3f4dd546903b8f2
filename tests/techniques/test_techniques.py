"""Every technique of the package: its word reads back, and nobody else speaks of it."""

import ast
from pathlib import Path

import pytest

import downres
from downres import Axes, Candidate, Merge
from downres.axes import default_axes
from downres.techniques import Design, techniques

SOURCE = Path(downres.__file__).parent

VALUES = {
    "resolution": [{"resolution": 128}, {"resolution": (192, 384)}, {"resolution": 220, "ragged": "pad"}, {"ragged": "floor"}],
    "stem_scale": [{"stem_scale": 0.5}, {"stem_scale": 1 / 3, "stem": "layer1.0"}],
    "patch_size": [{"patch_size": 28}],
    "merge": [{"merge": Merge(8)}, {"merge": Merge(keep=0.5, by="prune")}, {"merge": Merge(4, schedule="decreasing")}],
    "depth": [{"depth": 8}],
    "width": [{"width": 0.67}, {"width": 2.0}],
    "pruning": [{"pruning": 0.5}, {"pruning": 0.667}],
    "precision": [{"precision": "int8"}, {"precision": "bf16"}],
    "runtime": [{"runtime": "openvino"}, {"runtime": "onnxruntime:cuda"}],
}


def test_every_technique_has_values_here():
    assert [t.name for t in techniques()] == list(VALUES)


@pytest.mark.parametrize(("name", "values"), [(name, v) for name, some in VALUES.items() for v in some])
def test_words_read_back(name, values):
    technique = next(t for t in techniques() if t.name == name)
    candidate = Candidate.of(**values)
    assert technique.is_on(candidate) and candidate.techniques == (technique,)
    found = {}
    for word in technique.word(candidate).replace("as is", "as_is").split():
        found |= technique.read(word)
        assert not any(other.read(word) for other in techniques() if other is not technique)
    assert Candidate.of(**found) == candidate == Candidate.parse(str(candidate))
    assert candidate.without(technique) == Candidate() and not technique.is_on(Candidate())
    assert technique.check({n: candidate.get(n) for n in technique.fields}) == {n: candidate.get(n) for n in technique.fields}


@pytest.mark.parametrize("design", [Design(224, 32), Design(224, 16, patch=16, sequence=True), Design((360, 480), 16)])
def test_defaults_are_values(design):
    axes = default_axes(design, Axes())
    for technique in techniques():
        for value in axes.given(technique):
            candidate = Candidate.of(**technique.variant(value))
            assert technique.is_on(candidate) and technique.family(candidate, design) in technique.styles


def test_help_and_options_are_told():
    for technique in techniques():
        assert technique.help and (technique.option.startswith("--") and technique.metavar or technique.name == "runtime")
        assert technique.keyword in Axes.__dataclass_fields__


NAMES = {"merge", "merges", "Merge", "MERGE", "PRUNE", "patch_size", "patch_sizes", "stem_scale", "stem_scales"}
OTHERS = {"families", "models", "reductions", "techniques", "data", "images"}
"""What speaks of networks, tensors and pictures, whose own words these are; and what this is about."""
PUBLIC = {"Candidate", "Axes", "search", "curve", "costs", "reduce"}
"""Typed fields and keywords, written out for an editor."""
CANDIDATES = {"c", "candidate", "variant", "chosen"}


def spoken(file: Path) -> list[str]:
    """Names of a technique's values in a file, as identifiers or as whole texts, but for the typed public ones.

    Stem, depth and width are also words for other things: of these alone what a candidate is asked.
    """
    tree = ast.parse(file.read_text())
    left_out: set[ast.AST] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in PUBLIC:
            left_out |= set(ast.walk(node))
        elif isinstance(node, ast.ImportFrom | ast.If) or (isinstance(node, ast.Assign) and "__init__" in file.name):
            left_out |= set(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        said = {
            ast.Attribute: lambda n: n.attr,
            ast.Name: lambda n: n.id,
            ast.keyword: lambda n: n.arg,
            ast.arg: lambda n: n.arg,
            ast.Constant: lambda n: n.value,
        }.get(type(node), lambda n: None)(node)
        own = isinstance(said, str) and said in NAMES
        if isinstance(node, ast.Attribute) and node.attr in ("stem", "depth", "width"):
            own = isinstance(node.value, ast.Name) and node.value.id in CANDIDATES
        if own and node not in left_out:
            found.append(said)
    return found


def test_nobody_else_speaks_of_a_technique():
    files = [file for file in SOURCE.rglob("*.py") if file.relative_to(SOURCE).parts[0] not in OTHERS]
    assert {str(file.relative_to(SOURCE)): found for file in files if (found := spoken(file))} == {}
