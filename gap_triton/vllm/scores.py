"""What layers of a vision tower say of the tokens, while an encoder runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..vision_tower.scoring import cls_scores, key_rows, received_scores

FEATURES = "features"
"""What enters the projector, among the needs."""
STATES = "similarity"
"""The mean hidden state of several layers, among the needs."""
KINDS = ("received", "cls", "key_norm", "keys")


class TowerScores:
    """Scores by the attention of one layer, or of several, their mean hidden state, and what enters the projector.

    Args:
        attentions: Modules whose arguments are query, key and value: [B, S, H * D] or [B, S, H, D], after RoPE where the
            tower has it; and ``cu_seqlens`` where several images are in one sequence. By what begins the names of their
            scores: ``""`` is the scoring layer, ``"middle_"`` and ``"early_"`` come before it.
        leading: Rows before each image that don't become tokens, the CLS token first.
        ranks: Over how many processes the heads are split.
        total: Adds up a tensor over these processes, so that all choose alike.
        whole: Puts the channels of these processes one behind the other: [..., E] becomes [..., ranks * E].
        projector: Maps the tower's features one by one; None = no module does.
        norms: Modules that get the hidden states [S, ..., E] whose mean counts: vLLM calls layers past their hooks.
    """

    def __init__(
        self,
        attentions: Mapping[str, nn.Module],
        leading: int,
        ranks: int,
        total: Callable[[Tensor], Tensor],
        whole: Callable[[Tensor], Tensor],
        projector: nn.Module | None = None,
        norms: Sequence[nn.Module] = (),
    ) -> None:
        self._leading, self._ranks, self._total, self._whole = leading, ranks, total, whole
        self._of_features = slice(leading, None)
        self._needs: frozenset[str] = frozenset()
        self._scores: dict[str, Tensor] = {}
        for prefix, attention in attentions.items():
            attention.register_forward_pre_hook(partial(self._before_attention, prefix), with_kwargs=True)
        if projector is not None:
            projector.register_forward_pre_hook(self._before_projector)
        self._count = len(norms)
        for norm in norms:
            norm.register_forward_pre_hook(self._before_norm)

    @contextmanager
    def record(self, needs: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """Record ``needs`` of what runs inside: fields of `TowerOutput`, which are rows of the tower's patches here.

        Yields:
            Rows by name, [P, ...], once a layer has run; of ``"features"`` only where there is a projector.
        """
        self._needs, self._scores = frozenset(needs), {}
        try:
            yield self._scores
        finally:
            self._needs, self._scores = frozenset(), {}

    def _before_attention(
        self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        kinds = {kind for kind in KINDS if prefix + kind in self._needs}
        if not kinds:
            return
        query, key = (
            args[place] if place < len(args) else kwargs[name] for place, name in enumerate(("query", "key"))
        )
        layer: Any = module
        query, key = _heads_first(query, layer.num_heads), _heads_first(key, layer.num_kv_heads)
        if "received" in kinds:
            bounds = kwargs.get("cu_seqlens")
            bounds = None if bounds is None else bounds.int()
            self._scores[prefix + "received"] = self._mean(
                received_scores(query, key, self._of_features, layer.scale, bounds)
            )
        if "cls" in kinds:
            batch, tokens = query.shape[0], query.shape[2]
            index = torch.arange(self._leading, tokens, device=query.device).expand(batch, -1).contiguous()
            row = index.new_zeros(batch, 1)
            self._scores[prefix + "cls"] = self._mean(cls_scores(query, key, index, row, layer.scale))
        if "keys" in kinds:
            keys = key_rows(key, self._of_features)
            # Communication reads memory as it lies: rows of a part of query, key and value would be those of all three.
            self._scores[prefix + "keys"] = keys if self._ranks == 1 else self._whole(keys.contiguous())
        if "key_norm" in kinds:
            norm = key_rows(key, self._of_features).float().norm(dim=-1)
            self._scores[prefix + "key_norm"] = (
                norm if self._ranks == 1 else self._total(norm.square()).sqrt()
            )

    def _before_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if STATES not in self._needs:
            return
        # A new tensor: a layer may write into what it gets.
        state = args[0].flatten(0, -2).float() / self._count
        self._scores[STATES] = state + self._scores[STATES] if STATES in self._scores else state

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if FEATURES in self._needs:
            earlier = [self._scores[FEATURES]] if FEATURES in self._scores else []  # a call for each image
            self._scores[FEATURES] = torch.cat([*earlier, args[0].flatten(0, -2)])

    def _mean(self, score: Tensor) -> Tensor:
        return score if self._ranks == 1 else self._total(score) / self._ranks


def _heads_first(rows: Tensor, heads: int) -> Tensor:
    """[B, H, S, D] of [B, S, H * D] or [B, S, H, D]."""
    return (rows.unflatten(-1, (heads, -1)) if rows.dim() == 3 else rows).transpose(1, 2)
