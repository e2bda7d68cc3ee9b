"""The conventions of CONTRIBUTING.md that a machine can check, in the docstrings and imports of the packages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "gap_triton": ROOT / "gap_triton",
    "gap_triton_cli": ROOT / "gap_triton_cli",
    "gap_kernels": ROOT / "kernels" / "gap_kernels",
    "training": ROOT / "training",
}
DTYPE = r"(?:float16|bfloat16|float32|float64|int32|int64|uint8|bool)"
DTYPE_FIRST = re.compile(rf"\b{DTYPE} `*\[")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
ENTRY = re.compile(r" {4}\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*: (\S+)")


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of whatever has one, indented as its first line is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "name", "module"), docstring


def begins_well(text: str) -> bool:
    """Whether it begins with a capital, a number, a value, a shape, or a dtype in the place of one."""
    return not text[0].islower() or re.match(rf"{DTYPE}\b", text) is not None


def faults_in_sections(docstring: str) -> Iterator[str]:
    """Entries of Args and the like that begin with a small letter."""
    section, entries = None, 0
    for line in docstring.splitlines():
        if match := SECTION.fullmatch(line):
            section, entries = match[1], 0
        elif line and not line.startswith(" "):
            section = None
        elif section in ("Returns", "Yields") and line.strip():
            if not entries and not begins_well(line.strip()):
                yield line.strip()
            entries += 1
        elif section and (match := ENTRY.match(line)) and not begins_well(match[1]):
            yield line.strip()


def faults_of(docstring: str) -> list[str]:
    """What in a docstring is against the conventions."""
    summary = " ".join(docstring.split("\n\n")[0].split())
    faults = list(faults_in_sections(docstring))
    if not begins_well(summary):
        faults.append(f"begins with a small letter: {summary}")
    if not summary.rstrip('"`)').endswith((".", ":", "...")):
        faults.append(f"has no full stop: {summary}")
    faults += [f"dtype before shape: {match[0]}" for match in DTYPE_FIRST.finditer(docstring)]
    faults += [f"role: {match[0]}" for match in ROLE.finditer(docstring)]
    return faults


@pytest.mark.parametrize("package", FOLDERS)
def test_docstrings_follow_the_conventions(package: str) -> None:
    read = {
        path: list(docstrings(path.read_text(encoding="utf-8"))) for path in FOLDERS[package].rglob("*.py")
    }
    assert sum(map(len, read.values())) > 10
    assert not [
        f"{path.relative_to(ROOT)}, {name}: {fault}"
        for path, found in read.items()
        for name, docstring in found
        for fault in faults_of(docstring)
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        "compute the mask.",
        "Compute the mask",
        "Compute int64 [B, L] rows.",
        "Compute bool ``[B, L]``.",
        "Compute what :func:`mask` does.",
        "Compute.\n\nArgs:\n    mask: the mask.",
        "Compute.\n\nReturns:\n    the mask.",
        "Compute.\n\nRaises:\n    ValueError: if there is none.",
    ],
)
def test_what_is_against_them_is_found(docstring: str) -> None:
    assert len(faults_of(docstring)) == 1


def test_what_follows_them_is_no_fault() -> None:
    docstring = """Compute the mask of [B, L] int64 rows, such as ``"a"``.

    Args:
        rows: [B, L] int64.
        more: bool or int.

    Returns:
        ``rows``, or float32 of no dimension.
    """
    assert not faults_of(ast.literal_eval(f"'''{docstring}'''").replace("\n    ", "\n"))


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_inside_a_package_are_relative(package: str) -> None:
    absolute = [
        f"{path.relative_to(ROOT)}: from {node.module}"
        for path in FOLDERS[package].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and (node.module or "").split(".")[0] == package
    ]
    assert not absolute
