"""Refuses unsupported versions at import, in a sentence that says what is needed."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

MINIMUM = {"torch": "2.9", "triton": "3.5", "transformers": "4.57"}
# Triton publishes wheels for Linux alone; elsewhere the PyTorch reference of every operator runs.
OPTIONAL = frozenset() if sys.platform == "linux" else frozenset({"triton"})
NEWEST_TESTED = {"transformers": "5.24"}
PYTHON = ((3, 10), (3, 13))


def check_versions() -> None:
    """Raise ImportError if Python, torch, triton or transformers is outside the supported range."""
    low, high = PYTHON
    if not low <= sys.version_info[:2] <= high:
        raise ImportError(
            f"gap-triton needs Python {low[0]}.{low[1]} to {high[0]}.{high[1]}, "
            f"found {sys.version_info[0]}.{sys.version_info[1]}"
        )
    for package, minimum in MINIMUM.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            if package in OPTIONAL:
                continue
            raise ImportError(
                f"gap-triton needs {package} >= {minimum}, and it is not installed: pip install '{package}>={minimum}'"
            ) from None
        # Pre-releases and local builds of the minimum ("2.9.0a0", "2.13.0+cpu") count as that release.
        if Version(Version(found).base_version) < Version(minimum):
            raise ImportError(
                f"gap-triton needs {package} >= {minimum}, found {found}: pip install -U '{package}>={minimum}'"
            )


def newer_than_tested(package: str) -> str:
    """`` (package X is newer than Y, the newest tested)``, to be put behind a refusal; empty where it is not."""
    found, newest = version(package), NEWEST_TESTED[package]
    if Version(found).release[: len(Version(newest).release)] <= Version(newest).release:
        return ""
    return f" ({package} {found} is newer than {newest}, the newest tested)"
