"""``gap_kernels::text_cosine``: registration, fake kernel and value checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import check_rows_of_both
from . import reference


@operator("text_cosine")
def text_cosine_op(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Run the operator; see `gap_kernels.text_cosine` and ``reference.py``."""
    check_rows_of_both(embeds, visual_index, text_rows)
    if embeds.dtype != torch.float64 and use_triton(embeds):
        from . import kernel

        return kernel.text_cosine(embeds, visual_index, text_rows)
    return reference.text_cosine(embeds, visual_index, text_rows)


@fake("text_cosine")
def _(embeds: Tensor, visual_index: Tensor) -> Tensor:
    return embeds.new_empty(visual_index.shape, dtype=torch.float32)


no_gradient("text_cosine")
