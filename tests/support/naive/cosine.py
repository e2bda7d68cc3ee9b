"""The cosine to the text, in loops over float64."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Of a cosine whose embeddings are rounded to float32."""


def assert_cosines(found: Tensor, embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> None:
    """Compare what `gap_kernels.text_cosine` found."""
    assert found.shape == visual_index.shape
    assert found.dtype == torch.float32
    for sample, rows in enumerate(embeds.detach().double()):
        text = rows[[row for row in text_rows[sample].tolist() if row >= 0]]
        mean = text.mean(0) if len(text) else rows.new_zeros(rows.shape[1])
        for score, row in zip(found[sample].tolist(), visual_index[sample].tolist(), strict=True):
            vector = rows[row] if row >= 0 else torch.zeros_like(mean)
            length = float(vector.norm() * mean.norm())
            expected = float(vector @ mean) / length if length else 0.0
            assert abs(score - expected) <= TOLERANCE
