"""Packaging of gap-triton: two import packages, ``gap_kernels`` (torch and Triton) and ``gap_triton`` (transformers)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "gap_triton" / "__init__.py").read_text(encoding="utf-8")
)[1]

KERNEL_PACKAGES = find_packages("kernels")
INTEGRATION_PACKAGES = find_packages(".", include=["gap_triton", "gap_triton.*"])

DEMO = ["matplotlib>=3.8", "pillow>=10.0"]
TEST = ["pytest>=8.0", "pytest-benchmark>=4.0", "hypothesis>=6.100", "accelerate>=1.1"]

setup(
    name="gap-triton",
    version=VERSION,
    description="Visual token pruning for vision-language models that keeps every survivor's own position id.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # `kernels/` is a plain folder, never a package: a top-level module of that name would shadow
    # Hugging Face's `kernels`.
    packages=KERNEL_PACKAGES + INTEGRATION_PACKAGES,
    package_dir={"gap_kernels": "kernels/gap_kernels", "gap_triton": "gap_triton"},
    package_data={
        "gap_kernels": ["py.typed"],
        "gap_triton": ["py.typed", "demo/model/*", "demo/model_mrope/*"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
        "transformers>=4.57",
        "numpy>=1.26",
        "packaging>=23.0",
        "rich>=13.0",
        "typer>=0.19",
    ],
    extras_require={
        "flash": ["flash-attn>=2.6"],
        "demo": DEMO,
        "bench": ["pytest>=8.0", "pytest-benchmark>=4.0"],
        "test": DEMO + TEST,
        "dev": DEMO + TEST + ["mypy>=1.14", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["gap-triton = gap_triton.cli:app"]},
)
