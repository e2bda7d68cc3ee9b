"""Tests share what is in `support`, never each other, and whatever names the file of a test names one that is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from scripts import compat
from support.imports import imported

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests").rglob("*.py"))
TESTS = {path.stem for path in FILES if path.stem.startswith("test_")}
# Outside of the tests, what speaks of them; the changelog speaks of what was there at its time.
SPEAKING = (
    "*.md",
    "Makefile",
    "pyproject.toml",
    "*.yml",
    "bench/**/*.*",
    "docs/**/*.*",
    "gap_triton/**/*.py",
    "kernels/**/*.py",
)
PATH = re.compile(r"(?<![\w/])tests/[\w/]+(?:\.py|/)")


def test_no_file_imports_a_test() -> None:
    assert len(FILES) > len(TESTS) > 50
    imports = {
        path.relative_to(ROOT).as_posix(): imported(path.read_text(encoding="utf-8")) & TESTS
        for path in FILES
    }
    assert not {path: names for path, names in imports.items() if names}


def test_an_import_of_a_test_is_seen() -> None:
    for source in (
        "import test_layout",
        "from test_layout import ROOT",
        "from . import test_layout as layout",
        "def late():\n    import decoder.test_layout",
    ):
        assert imported(source) & TESTS == {"test_layout"}, source


def test_names_of_test_files_are_unique() -> None:
    """Pytest imports them by their names alone."""
    counts = Counter(path.stem for path in FILES if path.stem.startswith("test_"))
    assert not [name for name, count in counts.items() if count > 1]


def test_paths_of_tests_lead_somewhere() -> None:
    documents = {path for pattern in SPEAKING for path in ROOT.glob(pattern) if path.name != "CHANGELOG.md"}
    named = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (*documents, *FILES)
        if path.suffix in (".md", ".py", ".toml", ".yml", "")
        if path.is_file()
        for name in PATH.findall(path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert not [(document, name) for document, name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", compat.COMBINATIONS)
def test_combinations_run_files_that_are_there(name: str) -> None:
    tests = compat.COMBINATIONS[name].tests
    assert tests
    assert not [test for test in tests if not (ROOT / test).is_file()]
