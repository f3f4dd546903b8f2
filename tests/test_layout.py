"""Imports run one way: a layer knows only what is below it."""

import ast
import subprocess
import sys
from pathlib import Path

import downres

SOURCE = Path(downres.__file__).parent
LAYERS = (
    ("errors", "environment", "lazy"),
    ("parse", "copying", "notebook"),
    ("record",),
    ("techniques",),
    ("records",),
    ("axes",),
    ("engines", "fakes", "macs"),
    ("probe",),
    ("reductions", "images"),
    ("models",),
    ("families",),
    ("reduction",),
    ("measuring",),
    ("recovery",),
    ("reports",),
    ("tasks",),
    ("artifacts",),
    ("searching",),
    ("paper",),
    ("cli", "__init__"),
    ("__main__",),
)
HEAVY = ("onnx", "onnxruntime", "sklearn", "scipy", "plotly", "jinja2", "transformers", "segmentation_models_pytorch")
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
        assert not uses or file.parent.name == "families", (file, uses)


KNOWN_CIRCLES: list[set[str]] = []


def module_graph(source: Path) -> dict[str, set[str]]:
    """Of every module of downres, the modules that it imports anywhere, at its top or in functions; not for type checkers."""
    names = {}
    for file in source.rglob("*.py"):
        parts = ("downres", *file.relative_to(source).with_suffix("").parts)
        names[".".join(parts[:-1] if file.stem == "__init__" else parts)] = file
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
        graph[name] = set()
        tree = ast.parse(file.read_text())
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                # `from . import x` imports the module x where there is one; else the name is one of the package's own.
                inside = {alias.name: f"{module}.{alias.name}" for alias in node.names}
                targets = [full if full in names else module for full in inside.values()]
            else:
                continue
            graph[name] |= {target for target in targets if target in names}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module, and modules that import themselves."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), list(graph[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reach[start] = seen
    found: list[set[str]] = []
    for name in graph:
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({name} | {other for other in reach[name] if name in reach[other]})
    return found


def test_no_modules_import_each_other() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}) == [{"b", "c"}, {"e"}]
    assert [circle for circle in circles(module_graph(SOURCE)) if circle not in KNOWN_CIRCLES] == []


def test_costs_import_nothing_that_runs_fits_or_draws() -> None:
    """Seconds of every `downres cost`; torch and timm bring the rest of what it imports."""
    code = (
        f"import sys; from downres import costs; from downres.reports import words; print(*sys.modules.keys() & {set(HEAVY)})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
