"""Published pruning methods by name, each a point in the space that `GapConfig` spans.

A method is one module here, with one function ``configure(...)`` that returns its configuration. All keep every
survivor's own position id, whatever the method's released code does: ``dataclasses.replace(config, ids="compacted")``
gives what most of them do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..config import GapConfig
from . import (
    cls,
    fastv,
    feather,
    nuwa,
    prumerge,
    prumerge_plus,
    pyramiddrop,
    random,
    sparsevlm,
    spatial,
    text,
    trim,
    visionzip,
)

PRESETS: dict[str, Callable[..., GapConfig]] = {
    "prumerge": prumerge.configure,
    "prumerge+": prumerge_plus.configure,
    "trim": trim.configure,
    "cls": cls.configure,
    "text": text.configure,
    "random": random.configure,
    "spatial": spatial.configure,
    "nuwa": nuwa.configure,
    "fastv": fastv.configure,
    "pyramiddrop": pyramiddrop.configure,
    "sparsevlm": sparsevlm.configure,
    "visionzip": visionzip.configure,
    "feather": feather.configure,
}


def preset(name: str, **options: Any) -> GapConfig:
    """The configuration of a published method.

    Args:
        name: One of `PRESETS`: ``"prumerge"``, ``"prumerge+"``, ``"trim"``, ``"cls"``, ``"text"``, ``"random"`` and
            ``"spatial"`` (the methods of the GAP paper), ``"nuwa"``, ``"fastv"``, ``"pyramiddrop"``, ``"sparsevlm"``,
            ``"visionzip"``, ``"feather"``.
        **options: ``budget``, how many visual tokens survive, a share (float) or a count (int), in the sense that the
            method's docstring states; ``layers``, the number of decoder layers, for methods that drop inside the
            decoder, whose published layers are those of 32; ``score="received"``, for methods that rank by the CLS
            token, where the vision encoder has none.

    Raises:
        ValueError: There is no such method, or it takes no such option, or the option is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(map(repr, PRESETS))}")
    known = inspect.signature(PRESETS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"preset {name!r} takes no {option!r}: it takes {', '.join(map(repr, known))}")
    return PRESETS[name](**options)
