"""Published pruning methods by name, each a point in the space that `GapConfig` spans.

A method is one module here, with one function ``configure(...)`` that returns its configuration. All keep every
survivor's own position id, whatever the method's released code does: ``dataclasses.replace(config, ids="compacted")``
gives what most of them do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..attachment import encoder_of
from ..config import GapConfig, Score
from ..integration.stages import fitted
from ..integration.supported_models import find_parts
from ..plain import shown
from ..vision_tower import find_tower
from ..vision_tower.finding import packs
from . import (
    cdpruner,
    cls,
    dart,
    divprune,
    fastervlm,
    fastv,
    feather,
    hiprune,
    nuwa,
    prumerge,
    prumerge_plus,
    pyramiddrop,
    random,
    scope,
    sparsevlm,
    sparsevlm_plus,
    spatial,
    swiftvlm,
    text,
    trim,
    visionzip,
    vispruner,
    vscan,
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
    "sparsevlm+": sparsevlm_plus.configure,
    "visionzip": visionzip.configure,
    "feather": feather.configure,
    "divprune": divprune.configure,
    "cdpruner": cdpruner.configure,
    "scope": scope.configure,
    "fastervlm": fastervlm.configure,
    "swiftvlm": swiftvlm.configure,
    "dart": dart.configure,
    "vispruner": vispruner.configure,
    "hiprune": hiprune.configure,
    "vscan": vscan.configure,
}


def preset(name: str, *, model: Any = None, **options: Any) -> GapConfig:
    """Return the configuration of a published method.

    Args:
        name: One of `PRESETS`: ``"prumerge"``, ``"prumerge+"``, ``"trim"``, ``"cls"``, ``"text"``, ``"random"`` and
            ``"spatial"`` (the methods of the GAP paper), ``"nuwa"``, ``"fastv"``, ``"pyramiddrop"``, ``"sparsevlm"``,
            ``"sparsevlm+"``, ``"visionzip"``, ``"feather"``, ``"divprune"``, ``"cdpruner"``, ``"scope"``, ``"fastervlm"``,
            ``"swiftvlm"``, ``"dart"``, ``"vispruner"``, ``"hiprune"``, ``"vscan"``.
        model: The model that it is for, which gives ``layers``, ``tiles``, and ``score`` where its vision encoder has no CLS
            token. Stages in its decoder move to layers at which it can be pruned, and a warning says so.
        **options: ``budget``, how many visual tokens survive, a share (float) or a count (int), in the sense that the
            method's docstring states; ``layers``, the number of decoder layers, for methods that drop inside the decoder,
            whose published layers are those of 32; ``score="received"``, for methods that rank by the CLS token, where the
            vision encoder has none; ``tiles``, for ``"nuwa"``, whether the model cuts images into tiles.

    Raises:
        ValueError: There is no such method, or it takes no such option, or the option is out of range; or ``model`` can't be
            pruned where the method prunes, and then the message names methods that it can be pruned by.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {shown(name)}: expected one of {', '.join(map(repr, PRESETS))}")
    known = inspect.signature(PRESETS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"preset {name!r} takes no {option!r}: it takes {', '.join(map(repr, known))}")
    if model is not None:
        from_model = {"layers": _layers_of, "score": _score_of, "tiles": _tiles_of}
        options = {option: from_model[option](model) for option in known if option in from_model} | options
    config = PRESETS[name](**options)
    return config if model is None else fitted(config, find_parts(model))


def _layers_of(model: Any) -> int:
    return len(find_parts(model).text.layers)


def _tiles_of(model: Any) -> bool:
    return packs(find_parts(model).owner)


def _score_of(model: Any) -> Score:
    try:
        return "cls" if find_tower(encoder_of(find_parts(model).owner)).has_cls else "received"
    except ValueError:
        return "cls"  # refused with its reason when the model is configured
