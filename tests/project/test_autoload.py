"""The distribution of its own that makes the attention name known without an import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gap_triton.demo.architectures import LLAVA

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with the distribution in it, built without pip and without a network."""
    source = tmp_path_factory.mktemp("autoload") / "source"
    shutil.copytree(ROOT / "autoload", source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    code = "from setuptools import build_meta\nprint(build_meta.build_wheel('..'))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    folder = source.parent / "installed"
    zipfile.ZipFile(source.parent / ended.stdout.splitlines()[-1]).extractall(folder)
    return folder


def python(code: str, *paths: Path, **environment: str) -> str:
    """What a program prints; warnings among it."""
    path = os.pathsep.join(map(str, (*paths, ROOT / "kernels", ROOT)))
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


LOAD = f"""
{{imports}}
import sys, transformers.modeling_utils
model = {{name}}.from_pretrained({str(LLAVA.folder)!r}, attn_implementation="gap_triton")
sys.modules["gap_triton"].configure(model, sys.modules["gap_triton"].GapConfig(keep=0.5, layer=1))
assert "autoload" not in type(transformers.modeling_utils.__loader__).__module__
print("loaded")
"""


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("from transformers import AutoModelForImageTextToText", "AutoModelForImageTextToText"),
        # Torch comes in the middle of `modeling_utils`.
        (
            "from transformers import PreTrainedModel\nfrom transformers import LlavaForConditionalGeneration",
            "LlavaForConditionalGeneration",
        ),
    ],
)
def test_the_name_is_known_without_an_import(installed: Path, imports: str, name: str) -> None:
    assert "loaded" in python(LOAD.format(imports=imports, name=name), installed)


def test_nothing_is_imported_before_transformers(installed: Path) -> None:
    code = "import sys, torch\nprint(sorted({'transformers', 'gap_triton', 'gap_triton_autoload'} & {*sys.modules}))"
    assert python(code, installed).splitlines()[-1] == "['gap_triton_autoload']"


BROKEN = """
import sys
sys.modules["gap_triton"] = None
from transformers import LlavaForConditionalGeneration
print("goes on")
"""


def test_a_gap_triton_that_is_broken_is_a_warning(installed: Path) -> None:
    said = python(BROKEN, installed)
    assert "gap-triton-autoload: gap_triton can't be imported: ModuleNotFoundError" in said
    assert "goes on" in said
