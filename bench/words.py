"""Short forms for reports."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def short(dtype: object) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
