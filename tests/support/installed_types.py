"""Tiny models of the types that the installed transformers has; a test of another type is skipped."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from . import families, model_types

STATES = (model_types.RECURRENT, model_types.CONVOLUTION)
STATES_IN_CACHE = hasattr(transformers.cache_utils, "LinearAttentionLayer")


def build_or_skip(
    model_type: str, attn_implementation: str | dict[str, str] | None = None
) -> transformers.PreTrainedModel:
    """A tiny model, or the reason why this machine or this transformers has none."""
    if model_type not in families.TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    since = model_types.NOT_PLAIN_SINCE.get(model_type, "0")
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"transformers {transformers.__version__} has another {model_type} than {since}")
    if not STATES_IN_CACHE and model_types.NOT_PLAIN.get(model_type) in STATES:
        pytest.skip(
            f"transformers {transformers.__version__} keeps states of {model_type} in a cache of its own"
        )
    try:
        return families.build(model_type, attn_implementation)
    except Exception as problem:
        if Version(transformers.__version__) >= Version(model_types.NEWEST):
            raise
        pytest.skip(f"transformers {transformers.__version__} can't build a tiny {model_type}: {problem!r}")
