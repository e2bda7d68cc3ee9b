"""What is installed and what is in the sdist, and that packages can be missing or be there twice."""

from __future__ import annotations

import configparser
import email
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import gap_kernels
import pytest
import torch
from gap_kernels.library import NAMESPACE
from packaging.requirements import Requirement

import gap_triton
from gap_triton import _requirements
from gap_triton.demo.architectures import ARCHITECTURES
from gap_triton.environment import installed_versions

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("autoload", "bench", "docs", "gap_triton", "gap_triton_cli", "kernels", "tests", "training")
FILES = (
    *(
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "SECURITY.md",
    ),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py"),
)
MADE = shutil.ignore_patterns("__pycache__", "*.egg-info", "gpu-check-cpu-*", ".*")  # not by hand


def python(code: str, *options: str, **where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **where,
    )


# --------------------------------------------------------------------------------------------- sdist and wheel
@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source, to build in."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=MADE)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    return copy


BUILD = """
from setuptools import build_meta
print(build_meta.build_{kind}({folder!r}))
"""


def build(kind: str, checkout: Path, folder: Path) -> Path:
    """Build without pip and without a network."""
    ended = python(BUILD.format(kind=kind, folder=str(folder)), cwd=checkout)
    assert ended.returncode == 0, ended.stderr
    return folder / ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", checkout, folder)) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the unpacked sdist, as pip does."""
    return zipfile.ZipFile(build("wheel", sdist, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel.read(name).decode())


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_has_every_source_file(checkout: Path, sdist: Path) -> None:
    made_by_setuptools = {"PKG-INFO", "setup.cfg"}
    found, expected = (
        {name for name in files_of(folder) if ".egg-info/" not in name} for folder in (sdist, checkout)
    )
    assert found - made_by_setuptools == expected


def test_the_wheel_has_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"{folder}/{name}"
        for folder, parent in (
            ("gap_triton", ROOT),
            ("gap_triton_cli", ROOT),
            ("gap_kernels", ROOT / "kernels"),
        )
        for name in files_of(parent / folder)
        if "__pycache__" not in name
    }
    assert found == expected
    for architecture in ARCHITECTURES.values():
        weights = (architecture.folder / "model.safetensors").relative_to(
            Path(gap_triton.__file__).parent.parent
        )
        assert weights.as_posix() in found


def test_the_command_and_the_plug_in_are_installed(wheel: zipfile.ZipFile) -> None:
    (name,) = (each for each in wheel.namelist() if each.endswith("entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"gap-triton": "gap_triton_cli:app"}
    assert dict(entries["vllm.general_plugins"]) == {"gap_triton": "gap_triton.vllm.register:register"}
    assert dict(entries["lmms_eval.models"]) == {"gap_triton": "gap_triton.lmms:manifests"}
    assert (
        "torch.backends" not in entries
    )  # that touches every process with torch; `autoload/` is who wants it


def test_what_the_metadata_says(metadata: Message) -> None:
    assert metadata["Name"] == "gap-triton"
    assert metadata["Version"] == gap_triton.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert {"triton", "transformers"} <= set(metadata["Keywords"].split(","))
    assert metadata.get_all("Project-URL") is None  # there is none to give
    classifiers = metadata.get_all("Classifier")
    low, high = _requirements.PYTHON
    for minor in range(low[1], high[1] + 1):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert f"Programming Language :: Python :: 3.{high[1] + 1}" not in classifiers


def test_requirements_are_those_that_are_checked_at_import(metadata: Message) -> None:
    needed = {each.name: each for each in map(Requirement, metadata.get_all("Requires-Dist", []))}
    for package, minimum in _requirements.MINIMUM.items():
        assert str(needed[package].specifier) == f">={minimum}"
    always = {name for name, each in needed.items() if each.marker is None or "extra" not in str(each.marker)}
    assert {"torch", "triton", "transformers", "pillow", "rich", "typer", "numpy", "packaging"} == always


def test_no_extra_that_make_installs_brings_torchvision(metadata: Message) -> None:
    # The index has it for CUDA alone, which fails beside a CPU torch.
    for extra in ("demo", "eval", "test", "bench", "dev"):
        for each in map(Requirement, metadata.get_all("Requires-Dist", [])):
            if each.marker is not None and each.marker.evaluate({"extra": extra}):
                assert each.name != "torchvision"
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {
        "demo",
        "eval",
        "lmms",
        "torchvision",
        "flash",
        "hub",
        "vllm",
        "bench",
        "docs",
        "test",
        "dev",
    }


def test_the_readme_can_be_read_on_an_index(metadata: Message) -> None:
    text = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"]\(([^)]*)\)", text)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[([^]]*)]", readme)
    assert pictures
    for words in pictures:
        assert f"*Picture in the repository: {words}.*" in text
    assert "docs/methods.md has the numbers" in " ".join(text.split())
    assert len(text) > 0.9 * len(readme)


# --------------------------------------------------------------------------------------------- packages that are missing
@pytest.mark.parametrize(
    ("package", "missing", "sentence"),
    [
        ("gap_kernels", "torch", "gap_kernels needs torch, and it is not installed: pip install torch"),
        (
            "gap_triton",
            "torch",
            "gap-triton needs torch >= 2.9, and it is not installed: pip install 'torch>=2.9'",
        ),
        (
            "gap_triton",
            "triton",
            "gap-triton needs triton >= 3.5, and it is not installed: pip install 'triton>=3.5'",
        ),
        (
            "gap_triton",
            "transformers",
            "gap-triton needs transformers >= 4.57, and it is not installed: pip install 'transformers>=4.57'",
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is needed on Linux alone")
def test_import_says_what_is_missing(package: str, missing: str, sentence: str) -> None:
    paths = [str(ROOT / "kernels"), str(ROOT)]
    ended = python(f"import sys; sys.path[:0] = {paths}; sys.modules[{missing!r}] = None; import {package}")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"ImportError: {sentence}"


def test_a_build_of_triton_in_a_distribution_of_another_name_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "triton":  # as where pytorch-triton-rocm brings the module
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    triton = pytest.importorskip("triton")
    monkeypatch.setattr(_requirements, "version", version)
    _requirements.check_versions()
    assert installed_versions()["triton"] == triton.__version__
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(ImportError, match=r"gap-triton needs triton >= 3.5, found 3.4.0: pip install -U"):
        _requirements.check_versions()


def test_a_folder_that_is_called_triton_is_not_triton(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "folder_without_code").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("folder_without_code") is not None
    assert _requirements.installed_version("folder_without_code") is None


# --------------------------------------------------------------------------------------------- a package that is there twice
TWICE = """
import importlib.util, sys, types
import gap_kernels, torch

def load(name):
    path = gap_kernels.__path__[0]
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py", submodule_search_locations=[path])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

scores = torch.tensor([[0.1, 0.9, 0.5]])
expected = gap_kernels.topk_indices(scores, 2)
sys.modules["of"] = sys.modules["of.another"] = types.ModuleType("of")
for name, namespace in (("gap_kernels_0a1b", "gap_kernels_0a1b"), ("of.another.gap_kernels", "of_another_gap_kernels")):
    copy = load(name)
    assert copy.topk_indices is not gap_kernels.topk_indices
    compiled = torch.compile(lambda s: copy.topk_indices(s, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(copy.topk_indices(scores, 2), expected)
    assert torch.equal(compiled(scores), expected)
    assert hasattr(getattr(torch.ops, namespace), "topk_indices")
assert torch.equal(gap_kernels.topk_indices(scores, 2), expected)
"""


def test_two_copies_of_gap_kernels_in_one_process() -> None:
    ended = python(f"import sys; sys.path.insert(0, {str(ROOT / 'kernels')!r})\n{TWICE}")
    assert ended.returncode == 0, ended.stderr


def test_the_namespace_of_operators_is_the_name_of_the_package() -> None:
    assert NAMESPACE == gap_kernels.__name__ == "gap_kernels"
    assert torch.ops.gap_kernels.topk_indices is not None
