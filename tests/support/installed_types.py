"""Tiny models of the types that the installed transformers has; a test of another type is skipped."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from . import families, model_types


def build_or_skip(
    model_type: str, attn_implementation: str | dict[str, str] | None = None
) -> transformers.PreTrainedModel:
    """A tiny model, or the reason why this machine or this transformers has none."""
    if model_type not in families.TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    try:
        return families.build(model_type, attn_implementation)
    except Exception as problem:
        if Version(transformers.__version__) >= Version(model_types.NEWEST):
            raise
        pytest.skip(f"transformers {transformers.__version__} can't build a tiny {model_type}: {problem!r}")
