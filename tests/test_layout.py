"""Imports run one way: a layer knows only what is below it."""

import ast
from pathlib import Path

import downres

SOURCE = Path(downres.__file__).parent
LAYERS = (
    ("errors", "environment"),
    ("parse",),
    ("record",),
    ("techniques",),
    ("records",),
    ("axes",),
    ("runtimes",),
    ("probe",),
    ("reductions", "data"),
    ("models",),
    ("families",),
    ("reduction",),
    ("measure",),
    ("recover",),
    ("report",),
    ("artifact",),
    ("search",),
    ("demo",),
    ("cli", "__init__"),
)
# A technique is told in one file, from its word to how it changes a network: what that takes is imported when it is done.
LATE = {"techniques": {"probe", "reductions", "models"}}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(file: Path) -> set[str]:
    """Top-level modules of downres that a file imports, relatively or not, wherever in the file.

    Of a package in `LATE` without what it may import inside a function, and what it imports for types alone.
    """
    package = ("downres", *file.relative_to(SOURCE).parts[:-1])
    found = set()
    late = LATE.get(file.relative_to(SOURCE).parts[0], set())
    tree = ast.parse(file.read_text())
    typing = [node for node in tree.body if late and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in typing]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [*base, *(node.module or "").split(".")] if node.module else [*base]
            paths = [names] if node.module else [[*names, alias.name] for alias in node.names]
            names_found = {path[1] for path in paths if len(path) > 1 and path[0] == "downres"}
            found |= names_found if node.col_offset == 0 else names_found - late
    return found


def test_every_module_has_a_layer() -> None:
    assert {
        p.stem if p.is_file() else p.name for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    } == set(LEVEL)


def test_imports_run_downwards() -> None:
    wrong = []
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        wrong += [
            f"{file.relative_to(SOURCE)} imports {other}"
            for other in imported(file)
            if other != own and LEVEL[other] >= LEVEL[own]
        ]
    assert not wrong


def test_only_families_name_the_model_libraries() -> None:
    for file in SOURCE.rglob("*.py"):
        roots = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                roots.add(node.module)
        uses = {r for r in roots if r.startswith("timm.models") or r.startswith("torchvision.models") or r == "timm"}
        assert not uses or file.parent.name in ("families", "data"), (file, uses)
