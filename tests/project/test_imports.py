"""The floor plan of `gap_triton`: which file imports which, and how long a function may be."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = next(parent for parent in Path(__file__).parents if (parent / "gap_triton").is_dir())
PACKAGE = "gap_triton"

# From top to bottom: none imports what stands above it. A folder is a room, and so is a file beside the folders; "" is the
# package itself.
ROOMS = (
    "__main__",
    "lmms",
    "evaluation",
    "vllm",
    "latency",
    "demo",
    "published",
    "models",
    "",
    "presets",
    "integration",
    "prefill",
    "later_layers",
    "vision",
    "calls",
    "state",
    "attachment",
    "vision_tower",
    "kv_cache",
    "selection",
    "config",
    "strategies",
    "introspect",
    "arguments",
    "environment",
    "constants",
    "host",
    "plain",
    "visual_prompt",
    "memo",
    "clock",
    "_requirements",
)

# Imports inside of a function, or for types alone, which may close a circle.
LAZY = {
    ("config", "presets"): "GapConfig.preset gives a preset by its name, and presets are made of GapConfig",
    ("demo.evaluation", "demo.charts"): "charts need matplotlib, which is optional",
    ("demo.run", "demo.pictures"): "pictures need matplotlib, which is optional",
    ("evaluation.run", "evaluation.cases"): "pictures need matplotlib, which is optional",
}

LINES = 60  # of a function, its docstring included


class Import(NamedTuple):
    """One file importing another, by their names below the package."""

    importer: str
    imported: str
    lazy: bool


def files(package: Path) -> dict[str, Path]:
    """The files of a package by their names below it, "" for its ``__init__``."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(name: str) -> str:
    """The folder of a file; the file itself where it stands beside the folders."""
    path = FILES[name]
    folder = ".".join(path.parent.relative_to(ROOT / PACKAGE).parts)
    return folder or name


def imported_names(tree: ast.AST, importer: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Whatever ``tree`` imports, by its full name, and whether only inside of a function or for types."""
    parents = [PACKAGE, *importer.split(".")] if importer else [PACKAGE]
    if not is_package:
        parents = parents[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inside = lazy or for_types or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = parents[: len(parents) + 1 - child.level] if child.level else []
                base = [*base, *(child.module.split(".") if child.module else [])]
                yield from ((".".join([*base, alias.name]), inside) for alias in child.names)
            yield from visit(child, inside)

    yield from visit(tree, False)


def imports(importer: str, path: Path) -> Iterator[Import]:
    """What the file ``path`` imports of `gap_triton`."""
    for name, lazy in imported_names(ast.parse(path.read_text()), importer, path.name == "__init__.py"):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            below = name.removeprefix(PACKAGE).removeprefix(".")
            imported = below if below in FILES else below.rpartition(".")[0]
            assert imported in FILES, f"{importer} imports {name}"
            if imported != importer:
                yield Import(importer, imported, lazy)


FILES = files(ROOT / PACKAGE)
IMPORTS = [each for name, path in FILES.items() for each in imports(name, path)]
AT_ONCE = [each for each in IMPORTS if (each.importer, each.imported) not in LAZY]


def test_the_lazy_imports_are_those_with_a_reason() -> None:
    assert {(each.importer, each.imported) for each in IMPORTS if each.lazy} == set(LAZY)
    assert all(each.lazy for each in IMPORTS if (each.importer, each.imported) in LAZY)


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for each in AT_ONCE:
        graph.setdefault(each.importer, set()).add(each.imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in FILES} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


def test_no_room_imports_a_higher_one() -> None:
    floor = {room: number for number, room in enumerate(ROOMS)}
    upwards = [
        f"{each.importer} -> {each.imported}"
        for each in AT_ONCE
        if floor[room_of(each.importer)] > floor[room_of(each.imported)]
    ]
    assert not upwards


def test_the_operators_import_nothing_of_the_integration() -> None:
    allowed = {"gap_kernels", "torch", "triton", "__future__", *sys.stdlib_module_names}
    for name, path in files(ROOT / "kernels" / "gap_kernels").items():
        tops = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            node.module.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
        }
        assert tops <= allowed, f"{name} imports {tops - allowed}"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of its lines, docstring included."""
    return function.end_lineno - function.lineno + 1  # type: ignore[operator]


def test_vllm_is_imported_where_it_is_installed_alone() -> None:
    """Only the plug-in imports it, nothing but the plug-in imports the plug-in, and half of the plug-in needs no vLLM."""
    outside = {name for name in FILES if room_of(name) != "vllm"}
    needing = {
        name
        for name, path in FILES.items()
        for imported, _ in imported_names(ast.parse(path.read_text()), name, path.name == "__init__.py")
        if imported.split(".")[0] == "vllm"
    }
    assert not needing & outside
    assert not [each for each in IMPORTS if each.importer in outside and room_of(each.imported) == "vllm"]
    free = {
        f"vllm.{name}" for name in ("choose", "layouts", "options", "plan", "positions", "refusals", "scores")
    }
    assert not needing & {"vllm", *free}
    assert not [each for each in IMPORTS if each.importer in free and each.imported in needing]


def test_no_function_is_long() -> None:
    long = {
        f"{name}.{node.name}": lines_of(node)
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and lines_of(node) > LINES
    }
    assert not long
