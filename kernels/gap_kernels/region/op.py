"""``gap_kernels::topk_per_region``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, operator
from ..validation import ShapeChecker, check_range, describe, describe_number, is_int
from . import reference

MAX_NEIGHBOURS = 8
"""What the kernel's loop over the neighbours of an entry is unrolled to at most: those of 3 x 3 regions."""


@operator("topk_per_region")
def topk_per_region_op(
    scores: Tensor, neighbours: Tensor, per_region: int, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Run the operator; see `gap_kernels.topk_per_region` and ``reference.py``."""
    if scores.is_cpu:
        _check_values(neighbours, scores.shape[1], counts, length)
    if use_triton(scores):
        from . import kernel

        return kernel.topk_per_region(scores, neighbours, per_region, k, counts, length)
    return reference.topk_per_region(scores, neighbours, per_region, k, counts, length)


@fake("topk_per_region")
def _(scores: Tensor, length: int) -> Tensor:
    return scores.new_empty((scores.shape[0], length), dtype=torch.int64)


def _check_values(neighbours: Tensor, num_entries: int, counts: Tensor | None, length: int) -> None:
    """Check what only CPU tensors are checked for."""
    check_neighbour_values(neighbours, num_entries)
    if counts is None or not counts.numel():
        return
    if int(counts.min()) < 0:
        raise ValueError(f"k: expected counts >= 0, got {int(counts.min())}")
    largest = min(int(counts.max()), num_entries)
    if largest > length:
        raise ValueError(f"length: expected at least the largest min(k, N), {largest}, got {length}")


def check_neighbour_values(neighbours: Tensor, num_entries: int) -> None:
    """Check the neighbours of entries, on the CPU.

    Raises:
        ValueError: If one is out of range, repeated, or the entry itself.
    """
    check_range("neighbours", neighbours, -1, num_entries - 1)
    entry = torch.arange(num_entries)[:, None]
    if bool((found := neighbours == entry).any()):
        raise ValueError(
            f"neighbours: expected the others of a region, got entry {_entry(found)} beside itself"
        )
    ordered = neighbours.sort(-1).values
    if bool((found := (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError(f"neighbours: expected distinct entries, got one twice beside entry {_entry(found)}")


def _entry(found: Tensor) -> int:
    """Return the first entry of [B, N, R] bool that has a True."""
    return int(found.any(-1).nonzero()[0, 1])


def check_region(shapes: ShapeChecker, scores: Tensor, neighbours: Tensor, per_region: int | None) -> None:
    """Check the arguments of `gap_kernels.topk_per_region` that ``topk_indices`` doesn't have.

    Raises:
        ValueError: If one has another shape, dtype or device than documented, or is out of range.
    """
    shapes.check("scores", scores, "B N", (torch.float32,))
    check_neighbours(shapes, neighbours)
    check_per_region(per_region)


def check_neighbours(shapes: ShapeChecker, neighbours: Tensor, dims: str = "N R") -> None:
    """Check the neighbours of entries, whose number is known as the first of ``dims``, as is ``B``.

    Raises:
        ValueError: If they have another shape, dtype or device than documented.
    """
    shapes.check_shared("neighbours", neighbours, dims, (torch.int32,))
    most = neighbours.shape[2]
    if most > MAX_NEIGHBOURS:
        raise ValueError(f"neighbours: expected R = 0..{MAX_NEIGHBOURS} of an entry, got {most}")


def check_per_region(per_region: object) -> None:
    """Check the number of candidates of a region.

    Raises:
        ValueError: If it is neither an int >= 1 nor None.
    """
    if per_region is None:
        return
    if not is_int(per_region):
        raise ValueError(f"per_region: expected an int or None, got {describe(per_region)}")
    if per_region < 1:
        raise ValueError(f"per_region: expected at least 1, got {describe_number(per_region)}")


def candidates_of(per_region: int | None, neighbours: Tensor) -> int:
    """Return ``per_region`` as the operators take it: 0 = as many as are needed, and at most the entries of a region."""
    return 0 if per_region is None else min(per_region, neighbours.shape[2] + 1)
