"""The layout of a kernel of the hub; `make hub-kernel` loads it by the library `kernels` besides."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import gap_kernels
import hub_kernel
import torch


def test_the_layout_holds_the_package_and_its_metadata(tmp_path: Path) -> None:
    variant = hub_kernel.build(tmp_path, version=3)
    assert variant == tmp_path / "build" / "torch-universal"
    source = Path(gap_kernels.__file__).parent
    copied, original = (
        {path.relative_to(folder) for path in folder.rglob("*.py")} for folder in (variant, source)
    )
    assert copied == original
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"].isidentifier()
    assert metadata["name"].replace("-", "_") == "gap_kernels"
    assert (metadata["version"], metadata["backend"], metadata["python-depends"]) == (3, {"type": "cuda"}, [])
    assert "version=3" in (tmp_path / "README.md").read_text()


def test_a_build_replaces_an_earlier_one_and_its_id_follows_the_code(tmp_path: Path) -> None:
    variant = hub_kernel.build(tmp_path, version=1)
    first = (variant / "metadata.json").read_text()
    (variant / "left_over.py").touch()
    assert (hub_kernel.build(tmp_path, version=1) / "metadata.json").read_text() == first
    assert not (variant / "left_over.py").exists()
    before = hub_kernel.digest(variant)
    (variant / "validation.py").write_text("# another\n")
    assert hub_kernel.digest(variant) != before


def test_it_is_loaded_beside_the_package(tmp_path: Path, monkeypatch) -> None:
    variant = hub_kernel.build(tmp_path, version=1)
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")  # as `kernels` does
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    assert torch.equal(module.topk_indices(scores, 2), gap_kernels.topk_indices(scores, 2))
    assert hasattr(getattr(torch.ops, name), "topk_indices")
