# mypy: disable-error-code="no-untyped-def"
"""Score, select and gather in one launch.

What several launches would do one after another is done by programs with different roles, told apart by their number:

1. LSE (only where the log-sum-exp isn't given): ``row_lse_tile``, one row tile over one split of the keys;
2. one of two, as ``stores_logits`` says:
   MEAN, for few rows: ``stored_mean_tile``, the scores of one tile of visual tokens from the logits that LSE stored;
   MASS: ``visual_mass_tile``, one key head at one tile of visual tokens. The program that finishes a tile last adds up
   its heads, ``mean_tile``;
   the one that finishes a sample's tiles last selects, ``select_survivors``;
3. GATHER: ``copy_rows``, a few rows of the result.

A MEAN program waits for all LSE programs of its sample, a MASS program for those of its key head, and a GATHER program
for the selection of its sample. All waiting is for programs of lower number, so nothing waits for ever as long as those run.
Programs draw their numbers from a counter, as tickets, in the order in which they start: that is right for any grid on any
part of a device. A cooperative launch, in which all programs run at once, would save that draw, but what fits at once can't
be known: under CUDA's MPS and in a green context a process has fewer multiprocessors than the device says.

A finished part is announced by an atomic addition with release semantics to a counter, after a barrier behind which the
stores of all threads lie; others read the counter with acquire semantics, and pass a barrier before they load. Every
hand-over is of this form:

- LSE to MEAN or MASS: statistics and logits are stored, then the part is added; those who wait read the counter until all
  parts are in it. Additions to one counter follow one another, each a release and an acquire, so whoever sees the last
  of them sees what was stored before any of them;
- MASS to the mean, and scores to the selection: whoever adds last to the counter has acquired what the others released;
- selection to GATHER: the rows' index is stored, then the flag is set.

What another program has stored is loaded past the multiprocessor's own cache, ``.cg``, and never before the waiting: no
waiting is in a loop whose loads the compiler may move ahead. The keys of the selection are stored and read by one program.
A counter that others read again and again has a line of memory to itself, so that other additions don't wait for them.
The last GATHER program of a sample sets its counters back to zero, for the next launch: all other programs of the sample
have made their last addition by then, and nobody waits any more, as whoever waited has added since. Only counters are
added to atomically, never a sum: results have a fixed order of summation, and agree bit for bit.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backends import triton_is_interpreted
from ..handover import announce, wait
from ..importance.kernel import (
    block_sizes,
    mean_tile,
    row_lse_tile,
    split_of,
    stages_of,
    stored_mean_tile,
    stored_options,
    stores_logits,
    visual_mass_tile,
)
from ..launch import cdiv, launch, next_power_of_2
from .coverage import STRIDE_SHARE, Covering
from .kernel import (
    COPY_BYTES,
    FILL_BLOCK,
    Spread,
    copy_rows,
    copy_tiles,
    new_outputs,
    select_survivors,
    with_whole_rows,
)
from .workspace import counters

MAX_ROWS = 8192
"""Longest prompt that is selected from inside the launch, half of it for float32, and by stride, which selects twice: its
keys stay in the registers of one program, as long as there are any left. Above, the few warps that suit the other roles
would read them again and again."""
PROGRAMS_PER_MULTIPROCESSOR = 2
"""That run at the same time on every GPU: 2 x 8 warps x 32 threads x 128 registers are the 65,536 that there are."""
MAX_WAVES = 4
"""Of programs in one launch; a guess until it is measured, see ``is_likely_faster``."""
ENOUGH_COPIES = 512
MAX_ROWS_PER_COPY = 8
RESET_BLOCK = 1024
SHARE, OF_SHARES = tl.constexpr(STRIDE_SHARE.numerator), tl.constexpr(STRIDE_SHARE.denominator)
LINE = tl.constexpr(32)
"""Counters in a line of memory, 128 bytes: what one transaction of the second-level cache reads or adds to."""


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(
    do_not_specialize=[
        "mask_stride_b", "mask_stride_s", "ids_stride_a", "ids_stride_b", "ids_stride_q",
        "batch", "num_query", "num_keys", "num_rows", "num_visual", "split_keys", "splits", "keep", "length",
        "partial_size", "weights_size", "parts", "tiles", "copies", "of_sample", "first_score", "first_copy",
        "neighbours_stride_b", "order_stride_b", "per_region",
    ]
)  # fmt: skip
def prune_kernel(
    query,
    key,
    visual_index,
    rows,
    mask,
    lse,
    hidden,
    cos,
    sin,
    ids,
    counts,
    neighbours,
    order,
    workspace,
    counter,
    scores,
    index,
    hidden_out,
    cos_out,
    sin_out,
    ids_out,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    hidden_stride_b,
    hidden_stride_q,
    cos_stride_b,
    cos_stride_q,
    sin_stride_b,
    sin_stride_q,
    channels,
    rotary,
    mask_stride_b,
    mask_stride_s,
    ids_stride_a,
    ids_stride_b,
    ids_stride_q,
    batch,
    num_query,
    num_keys,
    num_rows,
    num_visual,
    split_keys,
    splits,
    keep,
    length,
    partial_size,
    weights_size,
    parts,
    tiles,
    copies,
    of_sample,
    first_score,
    first_copy,
    neighbours_stride_b,
    order_stride_b,
    per_region,
    scale_log2,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SELECT: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_RESET: tl.constexpr,
    AXES: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    STORED: tl.constexpr,
    COVERAGE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TICKET: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Prune a batch; see the module for the roles, and ``prune_tokens`` below for shapes.

    ``counter`` holds a line for the grid: numbers drawn, samples finished. Then ``of_sample`` for each sample: a line for
    the parts of the log-sum-exp, of each key head or of all (STORED); a line for the selection; and together, as nobody
    waits for them, heads by tile, finished tiles, and finished GATHER programs.
    """
    AWAITED: tl.constexpr = 0 if lse is not None else (1 if STORED else KEY_HEADS)  # counters of LSE programs
    program = tl.atomic_add(counter, 1, sem="relaxed", scope="gpu") if TICKET else tl.program_id(0)
    # Statistics of the rows, logits or mass of the heads, keys of the selection, and what else it needs, 4 bytes each.
    partial_sum = workspace + partial_size
    weights = partial_sum + partial_size
    keys = (weights + weights_size).to(tl.pointer_type(tl.int32), bitcast=True)

    if program < first_score:
        if lse is None:  # the condition is known to the compiler: there is nothing to be compiled otherwise
            batch_head = program // parts
            part = program % parts
            row_lse_tile(
                query, key, rows, mask, workspace, partial_sum, weights if STORED else None,
                batch_head.to(tl.int64), part // splits, part % splits,
                query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
                mask_stride_b, mask_stride_s, num_query, num_keys, num_rows, split_keys, splits, scale_log2,
                KEY_HEADS, GROUP, D, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST, True,
            )  # fmt: skip
            head = 0 if STORED else batch_head % KEY_HEADS
            announce(counter + LINE + batch_head // KEY_HEADS * of_sample + head * LINE)
    elif program < first_copy:
        part = program - first_score
        HEADS: tl.constexpr = 1 if STORED else KEY_HEADS
        # Heads of one tile follow one another, so that a tile's sum is taken while other tiles are still in work.
        sample = part // (HEADS * tiles)
        tile = part // HEADS % tiles
        head = part % HEADS
        of_heads = counter + LINE + sample * of_sample
        selected = of_heads + AWAITED * LINE
        of_tiles = selected + LINE
        scored = True
        if STORED:
            stored_mean_tile(
                weights, visual_index, rows, workspace, partial_sum, scores, sample.to(tl.int64), tile,
                num_query, num_keys, num_rows, num_visual, splits, of_heads, KEY_HEADS * parts,
                KEY_HEADS * GROUP, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_SPLITS,
            )  # fmt: skip
        else:
            visual_mass_tile(
                query, key, visual_index, rows, mask, lse, workspace, partial_sum, weights,
                (sample * KEY_HEADS + head).to(tl.int64), tile,
                query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
                mask_stride_b, mask_stride_s, num_query, num_keys, num_rows, num_visual, splits, scale_log2,
                None, 0, 0, 0, None if lse is not None else of_heads + head * LINE, parts,
                KEY_HEADS, GROUP, D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_SPLITS, UPCAST, True, False, 0, 16,
            )  # fmt: skip
            scored = announce(of_tiles + tile) == KEY_HEADS - 1
            if scored:
                mean_tile(
                    weights, rows, scores, sample.to(tl.int64), tile, num_query, num_rows, num_visual,
                    KEY_HEADS, KEY_HEADS * GROUP, BLOCK_N, False,
                )  # fmt: skip
        if scored:  # noqa: SIM102, the compiler must not see the condition below otherwise
            if announce(of_tiles + tiles) == tiles - 1:
                row_mask = mask
                if mask is not None:
                    row_mask = mask + (num_keys - num_query) * mask_stride_s
                select_survivors(
                    scores, visual_index, counts, row_mask, neighbours, order, keys, keys + batch * num_query, index,
                    sample.to(tl.int64), keep, num_visual, num_query, length, mask_stride_b, mask_stride_s,
                    neighbours_stride_b, order_stride_b, per_region, SHARE, OF_SHARES, COVERAGE, NEIGHBOURS,
                    BLOCK_SELECT, BLOCK_FILL, True,
                )  # fmt: skip
                announce(selected)
    else:
        part = program - first_copy
        sample = part // copies
        of_heads = counter + LINE + sample * of_sample
        selected = of_heads + AWAITED * LINE
        wait(selected, 1)
        copy_rows(
            hidden, cos, sin, ids, index, hidden_out, cos_out, sin_out, ids_out,
            sample.to(tl.int64), part % copies * ROWS_PER_PROGRAM, batch.to(tl.int64),
            hidden_stride_b, hidden_stride_q, cos_stride_b, cos_stride_q, sin_stride_b, sin_stride_q,
            channels, rotary, ids_stride_a, ids_stride_b, ids_stride_q, length,
            AXES, ROWS_PER_PROGRAM, BLOCK_COPY, COPIES, BLOCK_ROTARY,
        )  # fmt: skip
        if announce(selected + LINE + tiles + 1) == copies - 1:
            for start in range(0, of_sample, BLOCK_RESET):
                place = start + tl.arange(0, BLOCK_RESET)
                tl.store(of_heads + place, tl.zeros((BLOCK_RESET,), tl.int32), mask=place < of_sample)
            if TICKET:  # noqa: SIM102, the compiler must not see the condition below otherwise
                if announce(counter + 1) == batch - 1:
                    tl.store(counter, 0)
                    tl.store(counter + 1, 0)


def applies(query: Tensor, length: int, coverage: str = "topk") -> bool:
    """Return whether one launch can prune this: a GPU with the memory model that the roles rely on, or the interpreter."""
    longest = MAX_ROWS if query.element_size() == 2 and coverage != "stride" else MAX_ROWS // 2
    if query.shape[2] > longest or query.shape[0] == 0 or length == 0:
        return False
    if not query.is_cuda:
        return True  # the interpreter runs programs in the order of their numbers, so none ever waits
    return torch.version.hip is None and _properties(query.device).major >= 8


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


class Plan(NamedTuple):
    """How a launch divides the work, as follows from sizes alone."""

    split_keys: int
    splits: int
    parts: int
    """LSE programs of a key head."""
    stored: bool
    """Whether LSE programs store their logits: MEAN programs come behind them, else MASS programs."""
    tiles: int
    """MEAN programs of a sample, or MASS programs of a key head."""
    copies: int
    """GATHER programs of a sample."""
    of_sample: int
    """Counters of a sample, a multiple of ``LINE``."""
    first_score: int
    first_copy: int
    programs: int
    options: dict[str, int]
    """What the compiler is told."""
    constants: dict[str, int]


@functools.lru_cache(maxsize=1024)
def plan(
    batch: int,
    query_heads: int,
    key_heads: int,
    head_dim: int,
    num_query: int,
    num_keys: int,
    num_rows: int,
    num_visual: int,
    length: int,
    channels: int,
    rotary: int,
    axes: int,
    dtype: torch.dtype,
    copied_dtype: torch.dtype,
    lse_given: bool,
    device_class: str,
) -> Plan:
    """Divide the work; the same sizes come again and again, and host time counts."""
    group = query_heads // key_heads
    chosen = tiles.prune(head_dim, group * num_rows, dtype, device_class)
    row_tiles = 0 if lse_given else cdiv(group * num_rows, chosen.rows)
    split_keys = splits = 0
    if row_tiles:
        split_keys, splits = split_of(num_keys, batch * key_heads * row_tiles, chosen.columns)
    copy = copy_tiles(channels, rotary, copied_dtype.itemsize, chosen.warps)
    # As many as a program has registers for.
    most = max(1, COPY_BYTES * 32 * chosen.warps // (copy["BLOCK_COPY"] * copied_dtype.itemsize))
    rows_per_program = min(next_power_of_2(cdiv(batch * length, ENOUGH_COPIES)), MAX_ROWS_PER_COPY, most)
    parts = row_tiles * splits
    stored = not lse_given and stores_logits(group * num_rows, num_keys, num_visual, head_dim, dtype)
    of_mean = stored_options(query_heads * num_rows, splits)
    score_tiles = max(cdiv(num_visual, of_mean["BLOCK_TOKENS"] if stored else chosen.columns), 1)
    copies = cdiv(length, rows_per_program)
    line = LINE.value
    awaited = 0 if lse_given else 1 if stored else key_heads
    of_sample = (awaited + 1) * line + cdiv(score_tiles + 2, line) * line
    first_score = batch * key_heads * parts
    first_copy = first_score + batch * (1 if stored else key_heads) * score_tiles
    constants = {
        "KEY_HEADS": key_heads, "GROUP": group, "D": head_dim, **block_sizes(chosen, head_dim),
        "BLOCK_SPLITS": next_power_of_2(max(splits, 1)), **of_mean,
        "BLOCK_SELECT": max(next_power_of_2(num_query), 128),
        "BLOCK_FILL": FILL_BLOCK, **copy, "BLOCK_RESET": RESET_BLOCK,
        "AXES": axes, "ROWS_PER_PROGRAM": rows_per_program, "STORED": stored,
    }  # fmt: skip
    return Plan(
        split_keys,
        splits,
        parts,
        stored,
        score_tiles,
        copies,
        of_sample,
        first_score,
        first_copy,
        first_copy + batch * copies,
        chosen._replace(stages=stages_of(chosen, head_dim, dtype, stored)).options(),
        constants,
    )


def plan_of(
    query: Tensor,
    key: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    rows: Tensor | None,
    lse: Tensor | None,
    length: int,
) -> Plan:
    """Divide the work of a call of ``prune_tokens``."""
    batch, query_heads, num_query, head_dim = query.shape
    return plan(
        batch, query_heads, key.shape[1], head_dim, num_query, key.shape[2], 1 if rows is None else rows.shape[1],
        visual_index.shape[1], length, hidden_states.shape[2], cos.shape[2],
        position_ids.shape[0] if position_ids.dim() == 3 else 1, query.dtype, hidden_states.dtype, lse is not None,
        tiles.architecture(query.device),
    )  # fmt: skip


def programs_at_once(device: torch.device) -> int:
    """Return how many programs run at the same time on the whole of a CUDA device."""
    return PROGRAMS_PER_MULTIPROCESSOR * _properties(device).multi_processor_count


def is_likely_faster(programs: int, device: torch.device) -> bool:
    """Return whether one launch of so many programs should take less time than several; not measured yet.

    A hand-over inside of a launch takes about as long as the boundary between two in a CUDA graph, and outside of a graph
    each launch saved is host time saved. But every role takes what the largest one needs, so that a multiprocessor has two
    programs of one launch where it has three or more of a kernel of its own, and the roles behind a long line start late. By
    a model of latencies (H200), one launch is on a level with several at 2.5 waves of programs, and loses at 9.
    """
    return device.type != "cuda" or programs <= MAX_WAVES * programs_at_once(device)


def prune_tokens(
    query: Tensor,
    key: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    keep: int,
    counts: Tensor | None,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    length: int,
    coverage: str = "topk",
    neighbours: Tensor | None = None,
    per_region: int = 0,
    order: Tensor | None = None,
    *,
    work: Plan | None = None,
    ticket: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments and result as in ``reference.py``, for any dtype but float64.

    ``work`` is what ``plan_of`` returns for these arguments, if that is known already. Without ``ticket`` the launch is
    cooperative if the grid fits the whole of the device; for whoever knows that all of it is theirs, and wants to measure.
    """
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    num_rows, num_visual = 1 if rows is None else rows.shape[1], visual_index.shape[1]
    device = query.device
    if work is None:
        work = plan_of(query, key, hidden_states, cos, position_ids, visual_index, rows, lse, length)
    ticket = ticket or (device.type == "cuda" and work.programs > programs_at_once(device))
    query, key = with_whole_rows(query), with_whole_rows(key)
    inputs = with_whole_rows(hidden_states), with_whole_rows(cos), with_whole_rows(sin)
    ids = position_ids if position_ids.dim() == 3 else position_ids[None]
    mask = None if attention_mask is None else attention_mask.view(torch.uint8)

    partial_size = batch * query_heads * num_rows * work.splits
    weights_size = batch * (query_heads * num_rows * num_keys if work.stored else key_heads * num_visual)
    spread = Spread.of(Covering(coverage, neighbours, per_region, order))
    workspace = 2 * partial_size + weights_size + batch * num_query
    workspace += batch * spread.spare_columns(mask, num_visual, num_query)
    outputs = new_outputs(hidden_states, cos, sin, position_ids, length)
    scores = torch.empty((batch, num_visual), dtype=torch.float32, device=device)
    index = torch.empty((batch, length), dtype=torch.int64, device=device)
    launch(
        prune_kernel,
        (work.programs,),
        (
            query, key, visual_index.contiguous(), None if rows is None else rows.contiguous(), mask,
            None if lse is None else lse.float().contiguous(), *inputs, ids,
            None if counts is None else counts.contiguous(), spread.neighbours, spread.order,
            torch.empty(workspace, dtype=torch.float32, device=device),
            counters(device, LINE.value + batch * work.of_sample),
            scores, index, *outputs,
        ),
        (
            *query.stride()[:3], *key.stride()[:3], *(stride for x in inputs for stride in x.stride()[:2]),
            hidden_states.shape[2], cos.shape[2],
        ),
        (
            *((0, 0) if mask is None else mask.stride()), *ids.stride(),
            batch, num_query, num_keys, num_rows, num_visual, work.split_keys, work.splits, keep, length,
            partial_size, weights_size, work.parts, work.tiles, work.copies, work.of_sample, work.first_score,
            work.first_copy, *spread.sizes,
        ),
        ((head_dim**-0.5 if scale is None else scale) * math.log2(math.e),),
        work.constants | spread.constants | {"TICKET": ticket, "UPCAST": triton_is_interpreted()},
        **work.options,
        launch_cooperative_grid=not ticket,
    )  # fmt: skip
    return *outputs, index, scores
