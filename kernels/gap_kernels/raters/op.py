"""``gap_kernels::text_raters``: registration, fake kernel and value checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import check_rows_of_both
from . import reference


@operator("text_raters")
def text_raters_op(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Run the operator; see `gap_kernels.text_raters` and ``reference.py``."""
    check_rows_of_both(embeds, visual_index, text_rows)
    if embeds.dtype != torch.float64 and use_triton(embeds):
        from . import kernel

        return kernel.text_raters(embeds, visual_index, text_rows)
    return reference.text_raters(embeds, visual_index, text_rows)


@fake("text_raters")
def _(embeds: Tensor) -> Tensor:
    return embeds.new_empty(embeds.shape[:2], dtype=torch.bool)


no_gradient("text_raters")
