"""Queries and keys as they are before rotary embedding, for ``score="unrotated"``, and what it does to equal ones."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from gap_kernels import unrotate

from ..config import GapConfig
from ..introspect import calls_interface
from .rotary_pairs import has_one_angle, pairs_of, rotate, takes_heads

# Names under which modeling files keep the function that rotates queries and keys.
ROTATIONS = ("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb")
HAS_COS_AND_SIN = "position_embeddings is not None"
# Scores that need the rotation.
BY_ROTATION = ("unrotated", "raters_corrected")


def unrotated(
    module: Any, text: Any, rotary: Any, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn ``query`` [B, Hq, S, D] and ``key`` [B, Hkv, S, D] of the attention ``module`` back, by its own rotation.

    Which channels it turns, and by what, is found by running it (`rotary_pairs`): then one operator does it. Where that
    can't be said in pairs, its own function does it: a rotation by an angle is undone by one with the negative sine.

    Args:
        module: The attention.
        text: The decoder that it belongs to.
        rotary: What the layer was given: cos and sin.
        query: [B, Hq, S, D].
        key: [B, Hkv, S, D].

    Raises:
        ValueError: The model has no such function, or rotates by something else than one cos and sin for all heads.
    """
    cos, sin = cos_and_sin(module, rotary, query, "unrotated")
    stretched = not _is_known_not_to_stretch(text)
    pairs = None
    if query.dtype == key.dtype and cos.dtype == sin.dtype:
        rotation, sections = rotation_with(module)
        pairs = pairs_of(rotation, sections, query.shape[3], cos)
    if pairs is not None:
        return unrotate(query, key, cos, sin, pairs, rescale=stretched)
    if stretched:
        # Some embeddings scale cos and sin (YaRN): so they would in the other direction, too.
        stretch = (cos.float().square() + sin.float().square())[..., :1, :1].flatten()[0]
        cos, sin = ((each.float() / stretch).to(each.dtype) for each in (cos, sin))
    return rotate_by(module, query, key, cos, -sin)


def rotated_ones(module: Any, rotary: Any, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return equal queries and keys, vectors of ones, as RoPE turns them in each row (SparseVLM+, section 4.2 of its code).

    Args:
        module: The attention.
        rotary: Its cos and sin.
        query: [B, H, S, D], for shape, dtype and device.

    Returns:
        Queries and keys, [B, 1, S, D] float32 each.

    Raises:
        ValueError: The model has no such function, or rotates by something else than one cos and sin for all heads.
    """
    ones = torch.ones_like(query[:, :1], dtype=torch.float32)
    cos, sin = cos_and_sin(module, rotary, query, "raters_corrected")
    return rotate_by(module, ones, ones, cos.float(), sin.float())


def _is_known_not_to_stretch(text: Any) -> bool:
    """Return whether the embeddings of the decoder say that they leave cos and sin as they are: nothing to measure then."""
    scalings = [getattr(child, "attention_scaling", None) for child in text.children()]
    known = [scaling for scaling in scalings if scaling is not None]
    return bool(known) and all(isinstance(scaling, (int, float)) and scaling == 1 for scaling in known)


def rotation_of(attention: Any) -> Any | None:
    """Return the function by which ``attention`` rotates all queries and keys; None if it has none under a known name.

    It takes queries and keys, or one of them at a time, then cos and sin.
    """
    functions = vars(inspect.getmodule(type(attention)))
    rotate = next((functions[name] for name in ROTATIONS if name in functions), None)
    if rotate is None or not _always_rotates(type(attention)):
        return None
    parameters = list(inspect.signature(rotate).parameters)
    return rotate if ["cos", "sin"] in (parameters[1:3], parameters[2:4]) else None


# By class of attention. Filled when a configuration is checked: source code can't be read while a graph is captured.
_known_to_rotate: dict[type, bool] = {}


def _always_rotates(kind: Any) -> bool:
    """Return whether attentions of class ``kind`` rotate whenever they get cos and sin, by the code of ``forward``."""
    if kind not in _known_to_rotate:
        try:
            code = inspect.getsource(inspect.unwrap(kind.forward))
            _known_to_rotate[kind] = _rotates(ast.parse(textwrap.dedent(code)))
        except (OSError, SyntaxError):
            _known_to_rotate[kind] = False
    return _known_to_rotate[kind]


def _rotates(node: ast.AST) -> bool:
    """Return whether ``node`` calls a rotation that no condition but that on cos and sin stands before."""
    if isinstance(node, ast.If) and ast.unparse(node.test) != HAS_COS_AND_SIN:
        return False
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ROTATIONS:
        return True
    return any(map(_rotates, ast.iter_child_nodes(node)))


def cos_and_sin(
    module: Any, rotary: Any, query: torch.Tensor, score: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rows of ``query`` [B, H, S, D], as the layer got them in ``rotary``.

    Raises:
        ValueError: The attention ``module`` has no known rotation, or ``rotary`` is something else.
    """
    if rotation_of(module) is None or not isinstance(rotary, tuple) or len(rotary) != 2:
        raise _no_rotation(module, score)
    cos, sin = (x.to(query.device)[..., : query.shape[2], :] for x in rotary)
    return cos, sin


def rotate_by(
    module: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys [B, H, S, D] by the function of the attention ``module``, which has one."""
    rotation, sections = rotation_with(module)
    return rotate(rotation, sections, query, key, cos, sin)


def rotation_with(module: Any) -> tuple[Any, tuple[int, ...] | None]:
    """Return the function by which the attention ``module`` rotates, and how many channels of each axis it is told."""
    function: Any = rotation_of(module)
    if "mrope_section" not in inspect.signature(function).parameters:
        return function, None
    parameters = getattr(module, "rope_scaling", None) or module.config.rope_parameters
    return function, tuple(parameters["mrope_section"])


def refuse_unrotated(config: GapConfig, text: Any) -> None:
    """Raise ValueError if a stage needs the rotation of a layer of the decoder ``text`` undone, which can't be."""
    for stage in config.stages:
        if stage.score not in BY_ROTATION:
            continue
        attention = next(module for module in text.layers[stage.layer].modules() if calls_interface(module))
        if rotation_of(attention) is None:
            raise _no_rotation(attention, stage.score)
        rotary, head_dim = _tried_rotary(text), getattr(attention, "head_dim", None)
        if rotary is None or head_dim is None:
            continue
        rotation, sections = rotation_with(attention)
        if not takes_heads(rotation, sections, head_dim, *rotary):
            raise _no_rotation(attention, stage.score)
        if stage.score == "unrotated" and not has_one_angle(rotation, sections, head_dim, *rotary):
            raise ValueError(
                f"score='unrotated': {type(text).__name__} turns the two channels of a pair by ids of different axes, "
                "which no rotation undoes; use score='last_token'"
            )


def _tried_rotary(text: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return cos and sin of one row whose ids differ from axis to axis, on the CPU; None where they can't be had so."""
    parameters = (
        getattr(text.config, "rope_parameters", None) or getattr(text.config, "rope_scaling", None) or {}
    )
    axes = len(parameters.get("mrope_section") or ())
    try:
        ids = torch.arange(1, max(axes, 1) + 1, device=text.rotary_emb.inv_freq.device)
        ids = ids.view(-1, 1, 1) if axes else ids.view(1, 1)
        cos, sin = text.rotary_emb(torch.zeros(1, 1, 1, device=ids.device, dtype=torch.float32), ids)
        return cos.cpu(), sin.cpu()
    except (
        Exception
    ):  # several embeddings, other arguments, no values: then nothing is known before the prompt comes
        return None


def _no_rotation(attention: Any, score: str) -> ValueError:
    other = {"raters_corrected": "raters"}.get(score, "last_token")
    return ValueError(
        f"score={score!r}: {type(attention).__name__} does not rotate all queries and keys by {' or '.join(ROTATIONS)} with "
        f"one cos and sin, so its rotation can't be undone; use score={other!r}"
    )
