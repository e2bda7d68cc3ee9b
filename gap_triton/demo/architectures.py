"""The architectures of which a trained model ships with the package."""

from __future__ import annotations

from .architecture import Architecture
from .llava import Llava
from .qwen2_5_vl import Qwen25VL

LLAVA, QWEN2_5_VL = Llava(), Qwen25VL()
ARCHITECTURES: dict[str, Architecture] = {one.name: one for one in (LLAVA, QWEN2_5_VL)}


def find(name: str) -> Architecture:
    """Return the architecture of that name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture is {name!r}; it must be one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
