"""What the documents say is what was measured, and the packages are laid out as promised."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import transformers
import yaml
from PIL import Image
from scripts import compat
from support import command_line, model_types
from support.command_line import cli
from support.imports import imported

import gap_triton
from gap_triton.config import Coverage, Ids, Merge, Score

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


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{name}.md" for name in ("quick-start", "choosing", "operators"))]
)
def test_python_in_a_document_parses_and_names_what_exists(path: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)
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


def test_options_in_a_document_are_those_of_the_command() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    commands = re.findall(r"gap-triton (run|eval|bench|methods|info) ([^`\n#]*)", text)
    assert len(commands) > 10
    helps = {name: command_line.said(cli(name, "--help")) for name, _ in commands}
    for name, options in commands:
        for option in re.findall(r"--[a-z-]+", options):
            assert option in helps[name], f"gap-triton {name} has no {option}"


def test_the_python_of_the_readme_runs() -> None:
    """As written, but for the model, which is the embedded one, and the device."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    for written, used in (
        ("llava-hf/llava-1.5-7b-hf", str(Path(gap_triton.__file__).parent / "demo" / "model")),
        ("cuda", "cpu"),
    ):
        assert f'"{written}"' in block
        block = block.replace(f'"{written}"', repr(used))
    names = {"image": Image.new("RGB", (64, 64), "red")}
    exec(block, names)
    selection = gap_triton.last_selection(names["model"])  # type: ignore[arg-type]
    assert selection is not None
    assert selection.visual_index.shape == (1, 16)


def test_targets_in_a_document_are_in_the_makefile() -> None:
    documents = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    targets = re.findall(r"^([a-z-]+)%?:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test", "gpu-check"} <= named
    unknown = [
        name
        for name in named
        if not any(name == each or (each.endswith("-") and name.startswith(each)) for each in targets)
    ]
    assert unknown == []


def test_the_table_of_the_configuration_has_every_field_and_value() -> None:
    text = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", text, re.MULTILINE))
    fields = {each.name for each in dataclasses.fields(gap_triton.GapConfig)}
    assert fields <= set(rows)
    for field, values in (("score", Score), ("coverage", Coverage), ("merge", Merge), ("ids", Ids)):
        assert not [value for value in get_args(values) if f'"{value}"' not in rows[field]], field


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_every_document_has_its_place_in_the_site() -> None:
    """And every place its document: lines for `serving.md` and `evaluation.md` wait in mkdocs.yml as comments."""

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]  # type: ignore[attr-defined]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.name for path in ROOT.glob("docs/*.md"))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[fastv.py](../gap_triton/presets/fastv.py)", "`gap_triton/presets/fastv.py`"),
        ("[README](../README.md#limits)", "README (`README.md`)"),
        ("[latency](latency.md#x)", "[latency](latency.md#x)"),
        ("[a](https://b.c/../d)", "[a](https://b.c/../d)"),
    ],
)
def test_links_out_of_the_site_become_words(link: str, expected: str) -> None:
    assert script("mkdocs_hooks").on_page_markdown(f"See {link}.", page=None) == f"See {expected}."


def strings_of_the_code() -> str:
    """All texts of the packages, as they are shown: what is filled in is an ellipsis."""

    def shown(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(shown(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    return "\n".join(
        shown(node)
        for package in ("gap_triton", "gap_triton_cli")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    )


def test_messages_that_are_explained_are_in_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(messages) == text.count("\n### ") > 15
    code = strings_of_the_code()
    missing = [
        (message, part) for message in messages for part in message.split("…") if part.strip() not in code
    ]
    assert not missing


def test_what_the_text_says_of_keep_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "demo.json").read_text(encoding="utf-8"))["rows"]
    kept = [row for row in rows if row["ids"] == "kept" and row["keep"] < 1]
    unpruned = next(row for row in rows if row["keep"] == 1)
    text = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
    accuracies = [f"{row['accuracy']:.3f}" for row in kept]
    assert (
        f"accuracy goes from {unpruned['accuracy']:.3f} to {accuracies[0]} at 50%, {accuracies[1]} at 25% and "
        f"{accuracies[2]} at 12.5%"
    ) in text
    times = [f"{row['prefill_ratio']:.2f}" for row in kept]
    assert f"prefill time to {times[0]}, {times[1]} and {times[2]} of that without pruning" in text


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gap_triton.__version__
    assert citation["references"][0]["title"] in " ".join(
        (ROOT / "docs" / "citation.md").read_text(encoding="utf-8").split()
    )


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
    for results, pairs in ((methods, 138), (coverage, 48)):
        by_ids = [each for each in results["comparisons"] if each["against_ids"] == "compacted"]
        assert len(by_ids) == pairs
        assert all(each["low"] > 0 for each in by_ids)
    assert "no interval of the 138 differences holds 0" in text
    compacted = sorted(row["accuracy"] for row in methods["rows"] if row["ids"] == "compacted")
    assert compacted[-1] == pytest.approx(0.056, abs=5e-4)
    against_top_k: dict[str, list[bool]] = {}
    for each in methods["comparisons"]:
        if (each["against"], each["against_ids"]) == ("cls", "kept"):
            against_top_k.setdefault(each["method"], []).append(each["low"] > 0)
    assert {name for name, better in against_top_k.items() if all(better)} == {"cdpruner", "trim", "text"}
    for model, said in (("qwen2_5_vl", "+0.055 (+0.035 to +0.075)"), ("llava", "+0.031 (+0.007 to +0.055)")):
        (nuwa,) = (
            each
            for each in methods["comparisons"]
            if (each["model"], each["method"], each["keep"], each["against"]) == (model, "nuwa", 0.125, "cls")
            and each["against_ids"] == "kept"
        )
        assert f"{nuwa['value']:+.3f} ({nuwa['low']:+.3f} to {nuwa['high']:+.3f})" == said
        assert said in text
