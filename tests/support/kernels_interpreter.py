"""Pytest plugin: run tests on the Triton path, in Triton's interpreter.

``test_ops_kernels.py`` loads it with ``-p`` into a process of its own, where ``TRITON_INTERPRET=1`` is set.
"""

from __future__ import annotations

from collections.abc import Iterator

import gap_kernels
import pytest
import torch
from gap_kernels.backends import triton_is_interpreted
from hypothesis import settings

settings.register_profile("interpreter", max_examples=30)
settings.load_profile("interpreter")


@pytest.fixture(autouse=True)
def _triton_path() -> Iterator[None]:
    """Choose the Triton path, and fill what ``torch.empty`` returns with NaN (integers: the largest).

    An output element that no kernel writes can't pass for a result then.
    """
    assert triton_is_interpreted()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    with gap_kernels.backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
