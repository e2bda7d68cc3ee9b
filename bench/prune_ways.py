"""The two ways in which ``prune_tokens`` runs on kernels, each asked for by name: one launch, or several."""

from __future__ import annotations

import gap_kernels
import numpy
import torch
import triton
from gap_kernels.backends import triton_is_interpreted
from gap_kernels.prune import one_launch
from gap_kernels.prune.op import prune_in_several_launches
from torch import Tensor

from bench.operators import Result
from bench.outcome import NotAvailable
from bench.shapes import Inputs


def require_kernels(device: torch.device) -> None:
    """Raise `NotAvailable` where no kernel can run: on a CPU without Triton's interpreter, or with one that can't loop."""
    if device.type == "cuda":
        return
    if not triton_is_interpreted():
        raise NotAvailable("kernels on a CPU need Triton's interpreter, TRITON_INTERPRET=1")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and numpy.__version__ >= "2.4":
        raise NotAvailable(
            "the interpreter of Triton before 3.7 can't loop to a scalar with numpy 2.4 or later"
        )


def where_kernels_ran(device: torch.device) -> str:
    """What a report says beside results of kernels."""
    return "kernels on the GPU" if device.type == "cuda" else "kernels in Triton's interpreter, on a CPU"


def in_one_launch(x: Inputs, rows: Tensor | None = None, ticket: bool = True) -> Result:
    """Everything in one launch, whatever the size.

    Args:
        x: The prompt.
        rows: Scoring rows, None = the last.
        ticket: Whether programs draw their numbers; False asks for a cooperative launch, where the grid fits.
    """
    return one_launch.prune_tokens(
        x.query,
        x.key,
        x.hidden_states,
        x.cos,
        x.sin,
        x.position_ids,
        x.visual_index,
        x.keep,
        None,
        rows,
        None,
        None,
        None,
        x.length,
        ticket=ticket,
    )


def in_several_launches(x: Inputs, rows: Tensor | None = None) -> Result:
    """Scoring, selection and gather by an operator each."""
    with gap_kernels.backend("triton"):
        return prune_in_several_launches(
            x.query, x.key, x.hidden_states, x.cos, x.sin, x.position_ids, x.visual_index, x.keep, None, rows, None, None,
            None, x.length,
        )  # fmt: skip
