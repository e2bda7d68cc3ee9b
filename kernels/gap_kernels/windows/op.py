"""``gap_kernels::window_ranks``: registration and fake kernel."""

from __future__ import annotations

from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from . import reference


@operator("window_ranks")
def window_ranks_op(
    scores: Tensor, earlier: Tensor, height: int, width: int, count: int, windows: int
) -> Tensor:
    """Run the operator; see `gap_kernels.window_ranks` and ``reference.py``."""
    if use_triton(scores):
        from . import kernel

        return kernel.window_ranks(scores, earlier, height, width, count, windows)
    return reference.window_ranks(scores, earlier, height, width, count, windows)


@fake("window_ranks")
def _(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


no_gradient("window_ranks")
