"""Pytest plugin: run tests on the Triton path, in Triton's interpreter.

``test_ops_kernels.py`` loads it with ``-p`` into a process of its own, where ``TRITON_INTERPRET=1`` is set.
"""

from __future__ import annotations

from collections.abc import Iterator

import gap_kernels
import pytest
from gap_kernels.backends import triton_is_interpreted
from hypothesis import settings

from support.poison import poisoned_memory

settings.register_profile("interpreter", max_examples=30)
settings.load_profile("interpreter")


@pytest.fixture(autouse=True)
def _triton_path() -> Iterator[None]:
    """Choose the Triton path, on memory in which nothing passes for a result."""
    assert triton_is_interpreted()
    with poisoned_memory("cpu"), gap_kernels.backend("triton"):
        yield
