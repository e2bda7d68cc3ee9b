"""Selection of tokens one after another, each by what it adds to those that are chosen already."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..validation import ShapeChecker, split_count, width_of
from .op import check_greedy, greedy_indices_op

__all__ = ["greedy_indices"]


def greedy_indices(
    features: Tensor,
    k: int | Tensor,
    rule: Literal["max_min", "determinant", "coverage_gain"],
    *,
    scores: Tensor | None = None,
    exponent: float = 1.0,
    mask: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Return the indices of ``k`` tokens that are chosen one after another, in ascending index order.

    With s the cosine of two rows of ``features``, w the score of a token to the power of ``exponent`` (1 without scores)
    and S the tokens chosen so far, the next is the one with the largest

    - ``"max_min"``: ``min over j in S of 1 - s(i, j)``, as DivPrune (arXiv 2503.02175, Algorithm 1). The first is, as in
      its released code, the token that is farthest from its nearest other;
    - ``"determinant"``: ``det L(S + i) / det L(S)`` with ``L(i, j) = w(i) s(i, j) w(j)``: the greedy MAP of a DPP
      (Chen et al., arXiv 1709.05135, Algorithm 1), as CDPruner (arXiv 2506.10967, section 3.3), where w is the
      relevance to the text;
    - ``"coverage_gain"``: ``w(i) * sum over j of max(0, s(i, j) - c(j))``, where ``c(j)`` is the largest cosine of j to a
      token in S, at least 0: SCOPE (arXiv 2510.24214), where w is the attention of the CLS token. Its code has an
      ``exponent`` of 1.

    As rounding differs from device to device, values within 1e-5 of the largest, relative to it, count as equal, and go to
    the lower index; and as 0 count distances and terms of the sum up to 1e-6 and, by determinant, what is left of a token
    of which at most 1e-5 isn't spanned by S. Where all is 0, the lowest indices are chosen.

    A token with NaN or infinity among its features (or a sum of squares that float32 can't hold), or with NaN as its score,
    comes after all others, by index, and counts nowhere before. One of zeros has cosine 0 to everything, itself included.

    Memory grows with N, not with its square: ``docs/operators.md`` says by how much.

    Args:
        features: [B, N, C] float32, float16, bfloat16 or float64, normalised here; any strides. B, N and C may be 0.
        k: How many to choose, >= 0: an int, or an int64 tensor [B] with a count per sample. More than there are means
            all.
        rule: One of the above.
        scores: [B, N] float32 or None. Below 0 they count as 0, above 2^100 as that. None with "max_min".
        exponent: Finite, >= 0.
        mask: [B, N] bool, True = a real token; others are never chosen and never used. None: all are.
        length: Columns of the result; default ``min(k, N)``, or that of the largest ``k`` of the batch, which takes
            one read from the device. Give it under ``torch.compile`` or CUDA graphs if ``k`` is a tensor. More than
            needed means more filler.

    Returns:
        [B, length] int64. A row with fewer than ``length`` indices is filled with -1 on the left.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or is out of range. The values of a ``k`` tensor
            are checked on the CPU only; elsewhere counts beyond ``min(N, length)`` choose that many.
    """
    shapes = ShapeChecker()
    check_greedy(shapes, features, scores, mask, rule, exponent)
    count, counts = split_count("k", k, shapes)
    num_tokens = features.shape[1]
    count = min(count, num_tokens)
    largest = width_of("k", count, counts, length)
    length = min(largest, num_tokens) if length is None else length
    return greedy_indices_op(features, scores, mask, rule, exponent, count, counts, length)
