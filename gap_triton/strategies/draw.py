"""Random scores that a sample has whatever else is in its batch."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes


def draw(seed: int, stage: int, tokens: int) -> torch.Tensor:
    """Return [tokens] float32 in [0, 1) on the CPU: the scores of a sample's first, second, ... visual token.

    The generator makes one number after the other, so the draw for fewer tokens is the beginning of that for more. One draw
    serves all samples of a batch, and each gets the same scores as alone.

    Args:
        seed: `GapConfig.seed`.
        stage: Number of the stage that draws, 0 for the first.
        tokens: Number of visual tokens of the sample with the most.
    """
    # Real numbers also while operators are traced: a graph would draw anew at each replay.
    with _disable_current_modes():
        generator = torch.Generator().manual_seed(seed + stage)
        drawn = torch.rand(tokens, generator=generator, dtype=torch.float32).numpy()
    return torch.from_numpy(drawn)
