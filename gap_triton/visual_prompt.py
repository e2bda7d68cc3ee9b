"""What a prompt holds: which rows are visual, on the device, and how many there are, on the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .memo import Memo


class PromptCounts(NamedTuple):
    """Numbers by sample, known on the host, from which the plan of a prefill follows."""

    visual: tuple[int, ...]
    """Visual tokens."""
    real: tuple[int, ...]
    """Rows that are no padding."""
    text: tuple[int, ...]
    """Text rows of the prompt after the last visual token."""
    ends_in_image: tuple[int, ...]
    """1 where the last row of the prompt is a visual token."""
    last_is_real: tuple[int, ...]
    """1 where the last row of the forward is no padding."""

    def repeated(self, times: int) -> PromptCounts:
        """Return the counts of a batch that has every sample ``times`` times in a row."""
        return PromptCounts(*(tuple(value for value in row for _ in range(times)) for row in self))


@dataclass(eq=False)
class VisualRows(Memo):
    """Where the visual tokens of a forward are, as the caller gave it.

    Attributes:
        tokens: [B, Q] int64 token ids, or bool, True at visual tokens.
        placeholders: The ids that are visual tokens; empty for a mask.
    """

    tokens: torch.Tensor
    placeholders: tuple[int, ...] = ()

    @property
    def mask(self) -> torch.Tensor:
        """[B, Q] bool, True at visual tokens."""
        mask: torch.Tensor = self.compute_once("mask", self._make_mask)
        return mask

    def _make_mask(self) -> torch.Tensor:
        if self.tokens.dtype == torch.bool:
            return self.tokens
        masks = [self.tokens == token for token in self.placeholders]
        if not masks:
            return torch.zeros_like(self.tokens, dtype=torch.bool)
        return functools.reduce(torch.bitwise_or, masks)


@dataclass(frozen=True, eq=False)
class VisualPrompt:
    """What `gap_triton.prepare` has read of a prompt, for the host to plan its prefill by.

    Attributes:
        visual: [B, T] bool, the visual tokens.
        real: [B, T] bool, False at padding.
        counts: What the prompt holds.
        sizes: The arguments that say how large the images are, such as ``image_grid_thw``, as nested lists.
    """

    visual: np.ndarray
    real: np.ndarray
    counts: PromptCounts
    sizes: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return self.visual.shape[0], self.visual.shape[1]

    def __repr__(self) -> str:
        return f"VisualPrompt(shape={list(self.shape)}, visual tokens={list(self.counts.visual)})"

    def counts_of(self, batch: int, queries: int, past: int, drafts: int) -> tuple[PromptCounts, int]:
        """Return what a forward's rows hold, and how many of the last are drafts.

        Args:
            batch: Its samples: B, or a multiple where `generate` has repeated each.
            queries: Q, its rows.
            past: Tokens in the cache before them.
            drafts: How many last rows may be drafts, or what `generate` without a KV cache has written; they are none where
                a visual token is among them.

        Raises:
            ValueError: These are other rows than those of the prompt that was prepared.
        """
        samples, width = self.shape
        first = 0 if width in (queries, queries - drafts) else past
        if batch % samples or width not in (first + queries, first + queries - drafts):
            raise ValueError(
                f"visual_prompt was prepared for {samples} prompts of {width} tokens, and this forward has {batch} of "
                f"{first + queries}: call gap_triton.prepare on these inputs, and feed the prompt in one forward"
            )
        if (width, first, drafts) == (queries, 0, 0):
            return self.counts.repeated(batch // samples), 0
        added = ((0, 0), (0, first + queries - width))
        visual = np.pad(self.visual, added)[:, first:]
        real = np.pad(self.real, added, constant_values=True)[:, first:]
        if drafts >= queries or visual[:, queries - drafts :].any():
            drafts = 0
        return count_rows(visual, real, drafts).repeated(batch // samples), drafts


def count_rows(visual: np.ndarray, real: np.ndarray, drafts: int = 0) -> PromptCounts:
    """Count the rows of a prompt on the host, as `gap_kernels.read_prompt` does on the device.

    Args:
        visual: [B, Q] bool.
        real: [B, Q] bool.
        drafts: How many last rows of all samples are answer.
    """
    queries = visual.shape[1]
    prompt = queries - drafts
    visual = visual & real
    row = np.arange(queries)
    last_visual = np.where(visual, row, -1).max(axis=1, keepdims=True)
    text = real & ~visual & (row > last_visual) & (row < prompt)
    in_image = visual[:, -1] | visual[:, prompt - 1]
    columns: Sequence[Any] = (visual.sum(1), real.sum(1), text.sum(1), in_image, real[:, -1])
    return PromptCounts(*(tuple(map(int, column)) for column in columns))
