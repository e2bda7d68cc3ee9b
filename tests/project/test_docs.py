"""What the documents say is what was measured, and the packages are laid out as promised."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import transformers
from scripts import compat
from support import model_types
from support.imports import imported

import gap_triton

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["README.md", "docs/layers.md", "docs/methods.md", "docs/kernels.md", "docs/serving.md"]
)
def test_tables_are_the_measured_ones(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert script("tables").with_tables(text, (ROOT / name).parent) == text


def test_the_table_of_versions_is_what_was_recorded() -> None:
    text = compat.DOCUMENT.read_text(encoding="utf-8")
    known = json.loads(compat.RESULTS.read_text(encoding="utf-8"))
    assert compat.with_table(text, known) == text
    assert {"newest", "transformers-4.57"} <= set(known) <= set(compat.COMBINATIONS)
    assert all(row["passed"] for row in known.values())


@pytest.mark.skipif(
    not transformers.__version__.startswith(model_types.NEWEST),
    reason=f"the table was made with transformers {model_types.NEWEST}",
)
def test_the_table_of_models_is_what_the_tests_establish() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert script("models").with_table(text) == text
    assert len(model_types.EXACT) >= 50


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
)
def test_links_between_documents_lead_somewhere(path: str) -> None:
    document = ROOT / path
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{path} links to {target}"


def test_python_in_the_readme_parses_and_names_what_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "gap_triton"
            ):
                assert hasattr(gap_triton, node.attr)
            if isinstance(node, ast.ImportFrom) and node.module == "gap_kernels":
                module = importlib.import_module("gap_kernels")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_kernels_is_a_plain_folder() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_do_not_know_the_integration() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        names = imported(path.read_text(encoding="utf-8"))
        assert not names & {"gap_triton", "transformers"}, path


def test_what_the_text_says_of_methods_is_what_was_measured() -> None:
    methods, coverage = (
        json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("methods", "coverage")
    )
    text = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    for results, pairs in ((methods, 78), (coverage, 48)):
        by_ids = [each for each in results["comparisons"] if each["against_ids"] == "compacted"]
        assert len(by_ids) == pairs
        assert all(each["low"] > 0 for each in by_ids)
    assert "no interval of the 78 differences holds 0" in text
    compacted = sorted(row["accuracy"] for row in methods["rows"] if row["ids"] == "compacted")
    assert compacted[-1] == pytest.approx(0.168, abs=5e-4)
    assert compacted[-2] == pytest.approx(0.041, abs=5e-4)
    for model, said in (("qwen2_5_vl", "+0.096 (+0.053 to +0.138)"), ("llava", "+0.006 (-0.045 to +0.057)")):
        (nuwa,) = (
            each
            for each in methods["comparisons"]
            if (each["model"], each["method"], each["keep"], each["against"]) == (model, "nuwa", 0.125, "cls")
            and each["against_ids"] == "kept"
        )
        assert f"{nuwa['value']:+.3f} ({nuwa['low']:+.3f} to {nuwa['high']:+.3f})" == said
        assert said in text
