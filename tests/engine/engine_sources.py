"""What the plug-in relies on is so in the sources of the vLLM that is installed, and what isn't is told."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from scripts.vllm_facts import RUNNER, Sources, imported, missing


def installed() -> Path:
    """The folder that the package is in."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]).parent


def test_all_of_it_is_so() -> None:
    assert len(set(imported())) > 30
    assert missing(installed()) == []


@pytest.mark.parametrize(
    ("module", "old", "new", "line"),
    [
        (
            "vllm.sequence",
            "class IntermediateTensors",
            "class Other",
            "vllm.sequence has no IntermediateTensors",
        ),
        (
            "vllm.multimodal.inputs",
            "keep_on_cpu",
            "stay",
            "vllm.multimodal.inputs.MultiModalFieldConfig.batched takes no keep_on_cpu",
        ),
        (
            RUNNER,
            "num_computed_tokens=req_state.num_computed_tokens,",
            "computed=1,",
            f"{RUNNER} doesn't say 'self.model.recompute_mrope_positions(",
        ),
    ],
)
def test_what_is_not_so_is_told(module: str, old: str, new: str, line: str, tmp_path: Path) -> None:
    source = Sources(installed()).path(module)
    text = source.read_text(encoding="utf-8")
    assert old in text
    copy = tmp_path / "vllm"
    shutil.copytree(
        installed() / "vllm", copy, ignore=lambda folder, names: [n for n in names if _no_source(folder, n)]
    )
    (copy / source.relative_to(installed() / "vllm")).write_text(text.replace(old, new), encoding="utf-8")
    lines = missing(tmp_path)
    assert lines
    assert any(each.startswith(line) for each in lines)


def _no_source(folder: str, name: str) -> bool:
    return not (name.endswith(".py") or Path(folder, name).is_dir())
