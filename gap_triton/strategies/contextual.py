"""VisionZip's merge (arXiv 2412.04467): what isn't dominant is gathered in a few contextual tokens."""

from __future__ import annotations

import torch
from gap_kernels import merge_nearest, topk_indices
from gap_kernels.precision import without_autocast
from gap_kernels.validation import (
    ShapeChecker,
    check_range,
    describe,
    is_int,
    is_readable,
    split_count,
    width_of,
)
from torch import Tensor

from .merged import Merged, assemble, check_merge
from .rows import gather_rows, members


def contextual_count(keep: int | Tensor) -> int | Tensor:
    """Return how many of ``keep`` tokens are contextual: VisionZip's 10 of 64, 20 of 128, 30 of 192.

    Args:
        keep: An int, or int64 of any shape.

    Returns:
        ``round(keep * 10 / 64)``, halves rounded up, at least 1 but never more than ``keep``.

    Raises:
        ValueError: If ``keep`` is neither, or negative; the values of a tensor are checked on the CPU only.
    """
    if isinstance(keep, Tensor):
        ShapeChecker().check("keep", keep, " ".join(f"n{i}" for i in range(keep.dim())), (torch.int64,))
        if is_readable(keep):
            check_range("keep", keep, 0, torch.iinfo(torch.int64).max)
        # By parts: ten times a large number has no place in int64.
        count = keep // 64 * 10 + (keep % 64 * 10 + 32) // 64
        return torch.minimum(count.clamp(min=1), keep)
    if not is_int(keep) or keep < 0:
        raise ValueError(f"keep: expected an int >= 0 or an int64 tensor, got {describe(keep)}")
    return min(max((keep * 10 + 32) // 64, 1), keep)


@without_autocast
def contextual(
    features: Tensor, keys: Tensor, kept: Tensor, count: int | Tensor, *, length: int | None = None
) -> Merged:
    """Gather the tokens that aren't dominant in ``count`` contextual tokens.

    Every ``R // count``-th of the R tokens that are left, from the first on, is a target. Each other one goes to the target
    whose key has the largest cosine to its own, and a contextual token is its target's features plus the mean of the
    features of those that went to it. It keeps its target's row.

    The paper describes an average over target and assigned tokens; the released code, which the published numbers come from,
    adds the two, and we follow it. Two more differences. The code keeps CLS as the first of the dominant tokens: it
    has no place in the grid, so it is left out, and one more patch is dominant instead. The code compares keys averaged over
    heads; here ``keys`` are what the caller gives, usually all heads together.

    Args:
        features: [G, N, C] float32, float16, bfloat16 or float64.
        keys: [G, N, E], any of those dtypes.
        kept: [G, K] int64, the dominant tokens, distinct; -1 = filler. To end with ``keep`` tokens, choose the best
            ``keep - contextual_count(keep)``.
        count: Contextual tokens, an int or [G] int64.
        length: Columns for them; default ``count``, or the largest, which takes one read from the device.

    Returns:
        K + length tokens, computed in float32 (float64 for float64). Where fewer than ``count`` tokens are left, as many
        as there are. A target that nothing goes to keeps its features, so with ``keep = N`` nothing changes. Equal
        cosines go to the lower row. NaN cosines are the smallest, so a token whose key holds NaN goes to the first target.
        NaN or infinity in ``features`` spoils its channel in all contextual tokens of its grid, as in any matrix product.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or a count is negative; on the CPU also
            for rows out of range or repeated, and for a ``length`` less than a row's contextual tokens.
    """
    check_merge(features, {"kept": kept}, keys=keys)
    shapes = ShapeChecker()
    shapes.check("features", features, "B N C", (features.dtype,))
    number, numbers = split_count("count", count, shapes)
    if numbers is not None and is_readable(numbers):
        check_range("count", numbers, 0, torch.iinfo(torch.int64).max)
    length = width_of("count", number, numbers, length)
    rest = ~members(kept, features.shape[1])
    is_target = _every_nth(rest, torch.as_tensor(count, device=features.device))
    # 1 for targets, 0 for others: exact top-k finds their rows in order.
    targets = topk_indices(is_target.float(), is_target.sum(1), length=length)
    added = merge_nearest(features, keys, targets, excluded=kept)
    return assemble(kept, gather_rows(features, kept), targets, added)


def _every_nth(rest: Tensor, count: Tensor) -> Tensor:
    """Return ``count``, [] or [G] int64, of the True entries of ``rest``, [G, N] bool, at equal distances from the first."""
    number = rest.cumsum(1) - 1
    count = count.expand(rest.shape[0])[:, None]
    stride = (rest.sum(1, keepdim=True) // count.clamp(min=1)).clamp(min=1)
    return rest & (number % stride == 0) & (number // stride < count)
