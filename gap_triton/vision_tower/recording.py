"""What is recorded of one run of a vision encoder, by the hooks on it and by its scoring layer.

An encoder runs inside ``get_image_features``, or ``get_video_features``, of the module that receives ``input_ids``: in its
forward, or before it in ``generate()``. The current recording is a context variable. So nothing of a forward is stored on a
module, and threads can share a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..host import to_device
from .finding import ALTERNATIVE, Tower, last_third
from .scoring import cls_scores, key_rows, received_scores

Need = Literal[
    "cls",
    "received",
    "key_norm",
    "keys",
    "similarity",
    "features",
    "middle_cls",
    "middle_received",
    "early_cls",
    "early_received",
]
Needs = frozenset[Need]
FROM_ATTENTION: Needs = frozenset({"cls", "received", "key_norm", "keys"})
FROM_EARLIER: dict[Need, tuple[str, Literal["cls", "received"]]] = {
    "middle_cls": ("middle", "cls"),
    "middle_received": ("middle", "received"),
    "early_cls": ("early", "cls"),
    "early_received": ("early", "received"),
}
"""Scores of a layer before the scoring one: which, of `EARLIER`, and what."""

current_recording: ContextVar[Recording | None] = ContextVar("gap_triton_recording", default=None)


@dataclass(frozen=True)
class TowerOutput:
    """What was recorded of F feature rows of a vision tower.

    The rows of all images come one after the other, then those of all videos, in the order in which the model puts them into
    the prompt: without a CLS token, in raster order, and one row for the patches that become one visual token. What is not
    needed is None.

    Attributes:
        cls: [F] float32, attention of the CLS row, mean over heads; of several patches, their mean.
        received: [F] float32, attention received, mean over rows and heads; of several patches, their mean.
        key_norm: [F] float32, L2 norm of the scoring layer's keys, all heads together; of several patches, their mean.
        keys: [F, E], those keys; of several patches, their mean.
        similarity: [F, E] float32, mean of the hidden states that the last third of the tower's layers puts out, and of the
            one that enters it (24 layers: states 16 to 24); of several patches, their mean.
        features: [F, C], what enters the projector.
        middle_cls: `cls` of the layer at 3/8 of the depth.
        middle_received: `received` of that layer.
        early_cls: `cls` of the layer at 1/4 of the depth.
        early_received: `received` of that layer.
        projector: Maps features to the width of the decoder; None where there is none that does so token by token.
    """

    cls: Tensor | None = None
    received: Tensor | None = None
    key_norm: Tensor | None = None
    keys: Tensor | None = None
    similarity: Tensor | None = None
    features: Tensor | None = None
    middle_cls: Tensor | None = None
    middle_received: Tensor | None = None
    early_cls: Tensor | None = None
    early_received: Tensor | None = None
    projector: nn.Module | None = None

    @property
    def rows(self) -> dict[Need, Tensor]:
        """What was recorded, by name."""
        every: dict[Need, Tensor | None] = {need: getattr(self, need) for need in get_args(Need)}
        return {need: rows for need, rows in every.items() if rows is not None}

    @property
    def tokens(self) -> int:
        """F."""
        return next(map(len, self.rows.values()), 0)

    def project(self, rows: Tensor) -> Tensor:
        """Map features [..., C], such as means of several, to what the decoder would get, [..., C'].

        Raises:
            ValueError: The model has no projector that maps one token at a time.
        """
        if self.projector is None:
            raise ValueError("this model has no projector that maps the features of one token at a time")
        return self.projector(rows)

    @staticmethod
    def concatenate(outputs: Iterable[TowerOutput]) -> TowerOutput:
        """Return the rows of several runs, one after the other; all must hold the same fields."""
        outputs = list(outputs)
        if len(outputs) == 1:
            return outputs[0]
        every = [output.rows for output in outputs]
        joined: dict[str, Tensor] = {need: torch.cat([rows[need] for rows in every]) for need in every[0]}
        return TowerOutput(**joined, projector=outputs[0].projector)


@dataclass(frozen=True)
class Encoded:
    """One run of the encoder.

    Attributes:
        arguments: Those of ``get_image_features`` or ``get_video_features``, by name; of pixels their shape only.
        needs: What was recorded.
        tokens: Number of visual tokens that it made.
        output: The recorded rows.
    """

    arguments: dict[str, Any]
    needs: Needs
    tokens: int
    output: TowerOutput


class Recording:
    """Records one run of the encoder.

    Args:
        tower: The tower that runs.
        needs: What to record.
    """

    def __init__(self, tower: Tower, needs: Needs):
        self.tower, self.needs = tower, needs
        self._parts: dict[Need, list[Tensor]] = {need: [] for need in needs}
        self._states = 0
        self._real: Tensor | None = None  # [B, S] bool, False where an image has fewer patches than others
        # The last mask, and what was read from it.
        self._padding_of: tuple[Tensor, Tensor | None] | None = None
        self._sequences_of: tuple[Tensor, Tensor | None] | None = None

    def record_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None
    ) -> None:
        """Score by the attention of ``module`` if it is that of a layer that scores. Query and key are not kept.

        Args:
            module: The attention layer that calls.
            query: [B, H, S, D], after RoPE where the tower has it.
            key: [B, Hkv, S, D], likewise.
            mask: None, or [B, 1, S, S], bool or additive.
            scale: Factor of the scores, None = ``D ** -0.5``.

        Raises:
            ValueError: Heads are missing, or the mask hides tokens in another way than images in one sequence do.
        """
        query, key = query.detach(), key.detach()
        for need, (place, kind) in FROM_EARLIER.items():
            if need in self.needs and module is self.tower.earlier[place]:
                self._check_heads(query)
                self._parts[need].append(self._score(kind, query, key, mask, scale))
        if module is not self.tower.attention:
            return
        if self.needs & (FROM_ATTENTION | {"similarity"}):
            self._real = self._real_of(mask, query.shape[0])
        if not self.needs & FROM_ATTENTION:
            return
        self._check_heads(query)
        kinds: tuple[Literal["cls", "received"], ...] = ("cls", "received")
        for kind in kinds:
            if kind in self.needs:
                self._parts[kind].append(self._score(kind, query, key, mask, scale))
        if self.needs & {"key_norm", "keys"}:
            if self._real is not None:
                rows = key.transpose(1, 2)[self._real].flatten(1)  # [P, Hkv * D]
            else:
                rows = key_rows(key, self.tower.of_features(key.shape[2]))
            if "key_norm" in self.needs:
                self._parts["key_norm"].append(rows.float().norm(dim=-1))
            if "keys" in self.needs:
                self._parts["keys"].append(rows)

    def _score(
        self,
        kind: Literal["cls", "received"],
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """[B * S] float32, the attention of the CLS row, or what each token receives; without patches that are padding."""
        batch, _, tokens, _ = query.shape
        real = self._real_of(mask, batch)
        if real is not None and kind == "received":
            # Patches of an image see each other, and no others: all images as one sequence.
            query, key = (each.transpose(1, 2)[real].transpose(0, 1)[None] for each in (query, key))
            ends = torch.nn.functional.pad(real.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
            return received_scores(query, key, slice(None), scale, ends)
        if real is not None:
            raise ValueError(f"{_HIDDEN}: use score='received'")
        bounds = self._bounds_of(mask)
        if kind == "received":
            return received_scores(query, key, self.tower.of_features(tokens), scale, bounds)
        if bounds is not None:
            raise ValueError(f"{_HIDDEN}: use score='received'")
        index, row = self.tower.constants.get(
            ("cls", batch, tokens, query.device),
            query.device,
            lambda: self._cls_index(batch, tokens, query.device),
        )
        return cls_scores(query, key, index, row, scale)

    def _real_of(self, mask: Tensor | None, batch: int) -> Tensor | None:
        """As `_padding`; one read for all layers and scores that have the same mask."""
        if mask is None:
            return None
        if self._padding_of is None or self._padding_of[0] is not mask:
            self._padding_of = mask, _padding(mask, batch)
        return self._padding_of[1]

    def _bounds_of(self, mask: Tensor | None) -> Tensor | None:
        """As `_sequences`, None for a single one; once for all layers and scores that have the same mask."""
        if mask is None:
            return None
        if self._sequences_of is None or self._sequences_of[0] is not mask:
            bounds = _sequences(mask)
            self._sequences_of = mask, None if len(bounds) == 2 else bounds
        return self._sequences_of[1]

    def _cls_index(self, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[B, S] int64, the tokens that become features, and [B, 1] int64, the CLS row."""
        index = torch.arange(tokens)[self.tower.of_features(tokens)].expand(batch, -1).contiguous()
        row = tokens - 1 if self.tower.trailing else 0
        return to_device(index, device), torch.full((batch, 1), row, dtype=torch.int64, device=device)

    def record_hidden_states(self, hidden_states: Tensor) -> None:
        """Add the output of one of the tower's last layers, [B, S, E] or [S, E]."""
        state, parts = hidden_states.detach(), self._parts["similarity"]
        if self._states < 2:  # the first one is the model's own
            parts[:] = [parts[0].float() + state if parts else state]
        else:
            parts[0] += state
        self._states += 1

    def record_features(self, features: Tensor) -> None:
        """Record what enters the projector, [..., C]."""
        self._parts["features"].append(features.detach().flatten(0, -2))

    def output(self, arguments: dict[str, Any], tokens: int | None) -> TowerOutput:
        """Return what was recorded, one row per feature.

        Args:
            arguments: Those of the encoder, by name.
            tokens: F, None where the model adds rows of its own to the features, or leaves some out.

        Raises:
            ValueError: Something that is needed was not recorded, or the patches are not those of the features.
        """
        collected: dict[str, Tensor] = {}
        for need, parts in self._parts.items():
            if not parts:
                self._refuse_if_replaced()
                raise ValueError(
                    f"{type(self.tower.module).__name__} ran without reporting {need!r} of its scoring layer, "
                    f"{type(self.tower.attention).__name__}: its implementation of attention must be 'gap_triton' meanwhile"
                )
            if need == "similarity":
                self._check_states()
                parts = [self._mean_state(parts[0])]
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            collected[need] = rows if need == "features" else self.tower.to_features(rows, arguments, tokens)
            if tokens is not None and collected[need].shape[0] != tokens:
                raise ValueError(
                    f"{type(self.tower.owner).__name__} made {tokens} features of {collected[need].shape[0]} rows of "
                    f"{need!r}, so its visual tokens can't be told apart by what the vision tower says: {ALTERNATIVE}"
                )
        return TowerOutput(**collected, projector=self.tower.projector)

    def _mean_state(self, total: Tensor) -> Tensor:
        """[F, E] float32 of the sum of the hidden states, [B, S, E] or [S, E]."""
        mean = total.float() / self._states
        if self._real is not None:
            return mean[self._real]
        return mean[:, self.tower.of_features(mean.shape[1])].flatten(0, 1) if mean.dim() == 3 else mean

    def _refuse_if_replaced(self) -> None:
        if not self.tower.is_current():
            raise ValueError(
                f"the vision tower of {type(self.tower.owner).__name__}, or a part of it, was replaced after the model was "
                "configured: call gap_triton.configure(model, config) again"
            )

    def _check_states(self) -> None:
        expected = len(last_third(self.tower.layers))
        if self._states != expected:
            self._refuse_if_replaced()
            raise ValueError(
                f"{type(self.tower.module).__name__} ran {self._states // expected} times for one call of its encoder, "
                f"which is not supported: {ALTERNATIVE}"
            )

    def _check_heads(self, query: Tensor) -> None:
        config = self.tower.module.config
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        if isinstance(heads, int) and query.shape[1] != heads:
            raise ValueError(
                f"the vision tower's scoring layer holds {query.shape[1]} of {heads} attention heads: scores of a tower "
                f"that is split over devices are not supported; leave it whole, or {ALTERNATIVE}"
            )


_HIDDEN = "the vision tower's scoring layer hides some patches from others"


def _padding(mask: Tensor, batch: int) -> Tensor | None:
    """[B, S] bool, the patches of each image that ``mask`` [B or 1, 1, Q, S] shows to all rows, where it hides the others.

    None where it hides nothing, or in another way.
    """
    allowed = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    real = allowed[:, :1]
    hides_columns = (allowed == real).all() & ~real.all()
    return real[:, 0].expand(batch, -1) if bool(hides_columns) else None


def _sequences(mask: Tensor) -> Tensor:
    """The bounds of the sequences that ``mask`` [B or 1, 1, S, S] separates, as cumulative lengths; int32, [0, S] if one.

    Raises:
        ValueError: It hides tokens in another way, or has several sequences in a batch.
    """
    allowed = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    sequence = (~allowed[0].diagonal(1)).cumsum(0)
    sequence = torch.nn.functional.pad(sequence, (1, 0))  # [S], number of each token's sequence
    if not torch.equal(allowed, (sequence[:, None] == sequence).expand_as(allowed)) or (
        len(allowed) > 1 and bool(sequence[-1] > 0)
    ):
        raise ValueError(
            f"{_HIDDEN}, as padding does, which scores by its attention don't take: {ALTERNATIVE}"
        )
    return torch.nn.functional.pad(sequence.bincount().cumsum(0), (1, 0)).to(torch.int32)
