"""The versions that are supported; others are refused at import, with what is needed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

MINIMUM = {"torch": "2.9", "triton": "3.5", "transformers": "4.57"}
# Triton publishes wheels for Linux alone; elsewhere the PyTorch reference of every operator runs.
OPTIONAL = frozenset() if sys.platform == "linux" else frozenset({"triton"})
NEWEST_TESTED = {"transformers": "5.24"}
PYTHON = ((3, 10), (3, 13))


def installed_version(package: str) -> str | None:
    """Return the version of the package that is imported under this name, None = not installed.

    Triton's builds for ROCm and XPU come in distributions of other names.
    """
    if find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return getattr(import_module(package), "__version__", None)


def check_versions() -> None:
    """Raise ImportError if Python, torch, triton or transformers is outside the supported range."""
    low, high = PYTHON
    if not low <= sys.version_info[:2] <= high:
        raise ImportError(
            f"gap-triton needs Python {low[0]}.{low[1]} to {high[0]}.{high[1]}, "
            f"found {sys.version_info[0]}.{sys.version_info[1]}"
        )
    for package, minimum in MINIMUM.items():
        installed = installed_version(package)
        if installed is None:
            if package in OPTIONAL:
                continue
            raise ImportError(
                f"gap-triton needs {package} >= {minimum}, and it is not installed: pip install '{package}>={minimum}'"
            )
        # Pre-releases and local builds of the minimum ("2.9.0a0", "2.13.0+cpu") count as that release.
        if Version(Version(installed).base_version) < Version(minimum):
            raise ImportError(
                f"gap-triton needs {package} >= {minimum}, found {installed}: pip install -U '{package}>={minimum}'"
            )


def newer_than_tested(package: str) -> str:
    """Return `` (package X is newer than Y, the newest tested)``, to be put after a refusal; empty where it is not."""
    installed, newest = version(package), NEWEST_TESTED[package]
    if Version(installed).release[: len(Version(newest).release)] <= Version(newest).release:
        return ""
    return f" ({package} {installed} is newer than {newest}, the newest tested)"
