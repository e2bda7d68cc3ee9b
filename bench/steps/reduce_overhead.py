"""``prune_tokens`` inside ``torch.compile(mode="reduce-overhead")``, which replays CUDA graphs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gap_kernels
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench import cuda, exact, operators
from bench.outcome import Found, StepFailed
from bench.shapes import make_inputs
from bench.steps.settings import Settings

CALLS = 6
"""The first runs as it is, the second is recorded, the others are replays; inputs change on the way."""


@torch.no_grad()
def run_compiled(settings: Settings) -> Iterator[Found]:
    """Call it on changing inputs, among other work whose memory the graphs reuse."""
    on_gpu = cuda.is_cuda(settings.device)
    sets = [make_inputs(settings.small, settings.dtype, settings.device, seed) for seed in (0, 1)]

    def call(
        query: Tensor, key: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, ids: Tensor, visual: Tensor
    ) -> tuple[Tensor, ...]:
        pruned = gap_kernels.prune_tokens(
            query, key, hidden * 1, cos, sin, ids, visual, sets[0].keep, length=sets[0].length
        )
        return tuple(tensor * 1 for tensor in pruned)

    # Without a GPU the mode has no graphs to make, and compiling for the CPU would only take time.
    options: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {"backend": "aot_eager"}
    counters.clear()
    fast = torch.compile(call, fullgraph=True, **options)
    for number in range(CALLS):
        x = sets[number % len(sets)]
        torch.compiler.cudagraph_mark_step_begin()
        arguments = (x.query, x.key, x.hidden_states, x.cos, x.sin, x.position_ids, x.visual_index)
        wrong = int(exact.differing(fast(*arguments), operators.prune_tokens(x)))
        yield {"call": number, "wrong": wrong, **options}
        if wrong:
            raise StepFailed(f"call {number}: {wrong} elements differ from the eager call")
    skipped = counters["inductor"]["cudagraph_skips"]
    yield {"cudagraph_skips": skipped}
    if on_gpu and skipped:
        raise StepFailed(f"no CUDA graph was made: skipped {skipped} times")
