"""Whole models under ``torch.compile`` and in CUDA graphs, where these work; where they don't, it is said.

``generate()`` with a static cache is the way to decode as one graph. Prefills are of a prompt that was prepared: otherwise
the host would read what it holds, at which a compiled one breaks and none can be captured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

import gap_triton
from bench import cuda, timing
from bench.models import LLAMA, TINY_DECODERS, Prompt, build, make_prompt, sharing_weights
from bench.outcome import Found, StepFailed
from bench.steps.end_to_end import LAYER, PREFILL_S, Whole
from bench.steps.settings import Settings
from bench.words import first_line

KEEP = 0.25
LAYERS = 8
"""Of the model: compiling takes time for each of them."""

REPEATS = 5


@torch.no_grad()  # as in generate(): what compiles the graphs may not take tensors of inference mode
def run_compiled_models(settings: Settings) -> Iterator[Found]:
    """Decode by a compiled ``generate()``, then compiled prefills, then CUDA graphs of prefills, which may fail."""
    on_gpu = cuda.is_cuda(settings.device)
    kind = LLAMA.of(f"{LAYERS} layers", num_hidden_layers=LAYERS) if on_gpu else TINY_DECODERS[0]
    model = build(kind, settings.device, settings.dtype)
    prompt = make_prompt(kind, model, settings.visual_tokens[0], settings.answer)
    dense, pruned = Whole(sharing_weights(model)), Whole(sharing_weights(model))
    gap_triton.attach(pruned.model, gap_triton.GapConfig(keep=KEEP, layer=LAYER))
    where = {"model": kind.name, "visual": settings.visual_tokens[0], "keep": KEEP}
    ways: dict[str, tuple[Whole, dict[str, Any]]] = {
        "unpruned": (dense, {}),
        "pruned": (pruned, {"visual_mask": prompt.visual_mask}),
    }
    prepared = gap_triton.prepare(pruned.model, {"visual_mask": prompt.visual_mask.cpu()})
    prefills: dict[str, tuple[Whole, dict[str, Any]]] = {
        "unpruned": ways["unpruned"],
        "pruned": (pruned, {**ways["pruned"][1], "visual_prompt": prepared["visual_prompt"]}),
    }
    wrong = []
    for way, (whole, extra) in ways.items():
        try:
            yield {**where, "way": way, **_generate(whole, prompt, extra, settings)}
        except (
            Exception
        ) as error:  # this is documented to work; what comes after has something to say all the same
            wrong.append(f"{way}, generate() compiled: {first_line(error)}")
    for way, (whole, extra) in prefills.items():
        yield {**where, "way": way, "what": "prefill", "mode": "compiled", **_compiled_prefill(
            whole, prompt, extra, settings
        )}  # fmt: skip
    for way, (whole, extra) in prefills.items():
        yield {**where, "way": way, "what": "prefill", "mode": "CUDA graph", **_captured_prefill(
            whole, prompt, extra, settings
        )}  # fmt: skip
    if wrong:
        raise StepFailed("; ".join(wrong))


def _options(device: torch.device) -> dict[str, Any]:
    """Of ``torch.compile``. Without a GPU there are no graphs to make, and compiling for the CPU would only take time."""
    return {"mode": "reduce-overhead"} if cuda.is_cuda(device) else {"backend": "aot_eager"}


def _generate(whole: Whole, prompt: Prompt, extra: dict[str, Any], settings: Settings) -> Found:
    """Microseconds per token behind the first, eager with a dynamic cache and compiled with a static one."""
    config = transformers.CompileConfig(fullgraph=True, **{"mode": None, **_options(settings.device)})
    config._compile_all_devices = True  # generate() compiles on accelerators only, unless told so
    length = prompt.embeds.shape[1] + settings.answer

    # One cache for all: graphs hold on to where its buffers are.
    cache = (
        gap_triton.static_cache(whole.model, length)
        if extra
        else transformers.StaticCache(config=whole.model.config, max_cache_len=length)
    )

    def generate(tokens: int, compiled: bool) -> torch.Tensor:
        cache.reset()
        options = {"compile_config": config, whole.cache: cache} if compiled else {}
        sequences: torch.Tensor = whole.model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=torch.ones_like(prompt.visual_mask, dtype=torch.int64),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            **options,
            **extra,
        )
        return sequences

    found: Found = {"what": "decode, per token, by generate()"}
    written = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        written[name] = generate(settings.answer, compiled)  # compiles
        seconds = {
            tokens: min(
                _seconds(functools.partial(generate, tokens, compiled), settings.device)
                for _ in range(REPEATS)
            )
            for tokens in (1, settings.answer)
        }
        found[f"{name}_us"] = (seconds[settings.answer] - seconds[1]) * 1e6 / (settings.answer - 1)
    # Logits of random weights are nearly tied, so in bfloat16 another order of summation may choose another token.
    found["same_tokens"] = float((written["eager"] == written["compiled"]).double().mean())
    return found


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    cuda.synchronize(device)
    return time.perf_counter() - begin


def _compiled_prefill(whole: Whole, prompt: Prompt, extra: dict[str, Any], settings: Settings) -> Found:
    # Without CUDA graphs: a prefill fills the device anyway, and these would hold on to its memory.
    compiler = {} if cuda.is_cuda(settings.device) else _options(settings.device)
    try:
        torch._dynamo.reset()
        compiled = Whole(whole.model)
        compiled.model = torch.compile(whole.model, **compiler)
        call = functools.partial(compiled.prefill, prompt, **extra)
        times = timing.eager([call], settings.device, PREFILL_S / 4)
        return {"median_us": timing.quantiles(times).median}
    except Exception as error:
        return {"does_not_work": first_line(error)}


def _captured_prefill(whole: Whole, prompt: Prompt, extra: dict[str, Any], settings: Settings) -> Found:
    try:
        call = functools.partial(whole.prefill, prompt, **extra)
        return {"median_us": timing.quantiles(timing.graph([call], settings.device, PREFILL_S / 4)).median}
    except Exception as error:
        return {"does_not_work": first_line(error)}
