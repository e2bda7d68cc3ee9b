"""Whole models with random weights: time to the first token, time per token after it, memory, host waits.

Pruned against unpruned against the oracle, which is the same model without hooks that is handed the shorter prompt. The
logits of prompt and answer are held against the oracle's before anything is timed.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

import gap_triton
from bench import cuda, timing
from bench.models import DECODERS, TINY_DECODERS, Decoder, Prompt, build, make_prompt, sharing_weights
from bench.oracle import Oracle, cache_argument, relative_error
from bench.outcome import Found, StepFailed
from bench.steps.settings import Settings

LAYER = 2
KEEPS = (0.5, 0.25)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
"""Relative error of logits: the same products of the same rows in another order at most, rounded in every layer."""

PREFILL_S, DECODE_S = 2.0, 2.0
"""Seconds for all ways together, on a GPU."""


class Whole:
    """A model that is called as users call it, pruned or not."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        self.cache = cache_argument(model)

    def prefill(self, prompt: Prompt, **extra: Any) -> tuple[Tensor, Any]:
        """Logits [1, 1, N] of the last row, and the cache."""
        cache = transformers.DynamicCache(config=self.model.config.get_text_config())
        result = self.model(
            inputs_embeds=prompt.embeds,
            position_ids=prompt.position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache: cache},
            **extra,
        )
        return result.logits, cache

    def decode(self, token: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [1, 1, N] behind a token."""
        result = self.model(input_ids=token, position_ids=position_ids, use_cache=True, **{self.cache: cache})
        return result.logits


@torch.inference_mode()
def run_models(settings: Settings) -> Iterator[Found]:
    """Run every decoder with every number of visual tokens."""
    wrong: list[str] = []
    for kind in DECODERS if cuda.is_cuda(settings.device) else TINY_DECODERS:
        model = build(kind, settings.device, settings.dtype)
        yield {
            "model": kind.name,
            "sizes": kind.sizes,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for visual in settings.visual_tokens:
            for keep in KEEPS:
                yield from _run(kind, model, visual, keep, settings, wrong)
                gc.collect()  # caches of gigabytes, before the next
        del model
        gc.collect()
        cuda.release(settings.device)
    if wrong:
        raise StepFailed("; ".join(wrong))


def _run(
    kind: Decoder,
    model: transformers.PreTrainedModel,
    visual: int,
    keep: float,
    settings: Settings,
    wrong: list[str],
) -> Iterator[Found]:
    """One number of visual tokens and one share of them: check first, then time."""
    prompt = make_prompt(kind, model, visual, settings.answer)
    dense, oracle = Whole(sharing_weights(model)), Oracle(model, LAYER)
    pruned = Whole(sharing_weights(model))
    gap_triton.attach(pruned.model, gap_triton.GapConfig(keep=keep, layer=LAYER))
    masked = functools.partial(pruned.prefill, prompt, visual_mask=prompt.visual_mask)
    logits, cache = masked()
    selection = gap_triton.last_selection(pruned.model)
    assert selection is not None
    index = selection.index  # no filler: there is one sample
    where = {"model": kind.name, "visual": visual, "keep": keep, "mode": "eager"}

    best, caches = oracle.prefill(prompt, index)
    errors = [relative_error(logits, best)]
    for number, token in enumerate(prompt.answer.unbind(1)):
        token, ids = token[:, None], prompt.ids_behind(number)
        answered = pruned.decode(token, ids, cache), oracle.decode(token, ids, caches)
        errors.append(relative_error(*answered))
    yield {
        **where,
        "rows": index.shape[1],
        "error": max(errors),
        "tolerance": TOLERANCE[settings.dtype],
    }
    if not max(errors) <= TOLERANCE[settings.dtype]:  # NaN fails, too
        wrong.append(f"{kind.name}, {visual} visual tokens, keep {keep}: logits are off by {max(errors):.2g}")
        return

    ways: dict[str, Callable[[], tuple[Tensor, Any]]] = {
        "unpruned": functools.partial(dense.prefill, prompt),
        "pruned": masked,
        "oracle": functools.partial(oracle.prefill, prompt, index),
    }
    factor = 1.0 if cuda.is_cuda(settings.device) else 0.05
    times = timing.in_turn(
        {way: [prefill] for way, prefill in ways.items()}, settings.device, PREFILL_S * factor
    )
    yield from _timings("prefill", where, times)
    steps = {
        "unpruned": _steps(dense.decode, prompt, ways["unpruned"]),
        "pruned": _steps(pruned.decode, prompt, masked),
        "oracle": _steps(oracle.decode, prompt, ways["oracle"]),
    }
    times = timing.in_turn({way: [step] for way, step in steps.items()}, settings.device, DECODE_S * factor)
    yield from _timings("decode, per token", where, times)
    for way, prefill in ways.items():
        yield {**where, "way": way, **_memory(prefill, settings.device)}
    for way, call in (*ways.items(), *((f"{way}, decode", step) for way, step in steps.items())):
        yield {**where, "way": way, **_host_waits(call, settings.device)}


def _steps(
    decode: Callable[[Tensor, Tensor, Any], Tensor], prompt: Prompt, prefill: Callable[[], tuple[Tensor, Any]]
) -> Callable[[], None]:
    """A function that feeds the next token to a cache which grows from call to call."""
    _, cache = prefill()
    number = 0

    def step() -> None:
        nonlocal number
        token = prompt.answer[:, number % prompt.answer.shape[1]][:, None]
        decode(token, prompt.ids_behind(number), cache)
        number += 1

    return step


def _timings(what: str, where: Found, times: dict[str, list[float]]) -> Iterator[Found]:
    for way, values in times.items():
        quantiles = timing.quantiles(values)
        yield {
            "timing": {
                **where,
                "what": what,
                "way": way,
                "median_us": quantiles.median,
                "p20_us": quantiles.p20,
                "p80_us": quantiles.p80,
                "rounds": len(values),
            }
        }


def _memory(prefill: Callable[[], tuple[Tensor, Any]], device: torch.device) -> Found:
    """Bytes of the cache that a prefill leaves; on a GPU also the most that it took beside the weights."""
    peak: Found = {"peak_bytes": "not measured, the CPU does not say"}
    if cuda.is_cuda(device):
        cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    _, caches = prefill()
    if cuda.is_cuda(device):
        cuda.synchronize(device)
        peak = {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    layers = [layer for cache in (caches if isinstance(caches, list) else [caches]) for layer in cache.layers]
    return {"kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers), **peak}


def _host_waits(call: Callable[[], object], device: torch.device) -> Found:
    """How often the host waits for the device in a call, as PyTorch's own check sees it."""
    if not cuda.is_cuda(device):
        return {"host_waits": "not measured, a CPU has no stream"}
    cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"host_waits": sum("synchronizing CUDA operation" in str(each.message) for each in seen)}
