"""SparseVLM's raters, in loops over float64."""

from __future__ import annotations

import torch
from torch import Tensor

GAP = 1e-4
"""Of a visual token's share: text within it of the mean may rate or not, as sums are rounded."""


def assert_raters(found: Tensor, embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> None:
    """Compare what `gap_kernels.text_raters` found."""
    assert found.shape == embeds.shape[:2]
    assert found.dtype == torch.bool
    for sample, rows in enumerate(embeds.detach().double()):
        text = [row for row in text_rows[sample].tolist() if row >= 0]
        visual = [row for row in visual_index[sample].tolist() if row >= 0]
        rated = set(found[sample].nonzero().flatten().tolist())
        assert rated <= set(text)
        assert bool(rated) == bool(text)
        if not text or not visual:
            assert rated == set(text)
            continue
        relevance = torch.stack([(rows[text] @ rows[row]).softmax(0) for row in visual]).sum(0)
        mean = relevance.mean()
        for row, value in zip(text, relevance, strict=True):
            if abs(value - mean) > GAP * len(visual):
                assert (row in rated) == bool(value > mean)
