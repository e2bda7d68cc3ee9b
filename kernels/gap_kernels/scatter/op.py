"""``gap_kernels::scatter_rows``: registration, gradient and value checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, gradient, operator
from ..validation import check_distinct, check_range
from . import reference


@operator("scatter_rows")
def scatter_rows_op(
    values: Tensor, index: Tensor, num_rows: int, among: Tensor | None, base: Tensor | None
) -> Tensor:
    """Run the operator; see `gap_kernels.scatter_rows` and ``reference.py``."""
    if values.is_cpu:
        _check_places(index, num_rows, among)
    if use_triton(values):
        from . import kernel

        return kernel.scatter_rows(values, index, num_rows, among, base)
    return reference.scatter_rows(values, index, num_rows, among, base)


@fake("scatter_rows")
def _(values: Tensor, num_rows: int) -> Tensor:
    return values.new_empty((values.shape[0], num_rows, values.shape[2]))


def _check_places(index: Tensor, num_rows: int, among: Tensor | None) -> None:
    """Check what can only be checked by reading, on the CPU."""
    count = num_rows if among is None else among.shape[1]
    check_range("index", index, -1, count - 1)
    check_distinct("index", index, count)
    if among is not None:
        check_range("among", among, -1, num_rows - 1)
        check_distinct("among", reference.places_of(index, among), num_rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, _, among, base = inputs
    ctx.has_base = base is not None
    ctx.save_for_backward(reference.places_of(index, among))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, Tensor | None]:
    """Send each vector's gradient back to where it comes from."""
    (place,) = ctx.saved_tensors
    real, source = (place >= 0)[..., None], place.clamp(min=0)[..., None]
    if not grad.shape[1]:
        of_values = grad.new_zeros(*place.shape, grad.shape[2])
    else:
        of_values = torch.where(real, grad.gather(1, source.expand(-1, -1, grad.shape[2])), 0)
    if not ctx.has_base:
        return of_values, None, None, None, None
    put = torch.zeros(grad.shape[0], grad.shape[1] + 1, dtype=torch.bool, device=grad.device)
    put = put.scatter(1, torch.where(place < 0, grad.shape[1], place), True)[:, :-1]
    return of_values, None, None, None, grad.masked_fill(put[..., None], 0)


gradient("scatter_rows", _backward, _save)
