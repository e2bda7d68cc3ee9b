"""A prepared prefill of the decoder has no step that the host must wait for: it can be traced, compiled and captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from support.methods import BY_TOWER, COMPOSED, preset
from support.tiny import TEXT, seed_weights
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import gap_triton
from gap_triton import GapConfig
from gap_triton.presets import PRESETS

GRID = [6, 6]
BATCH, FIRST, VISUAL, TOKENS = 2, 4, 36, 47
TOWER = "ranks by its vision encoder, which a decoder alone has none of"
GENERATOR = "torch.compile can't trace a random generator"
# Why not, where it can't. Strict: what can be after all must leave its list.
NOT_TRACED = {
    **dict.fromkeys(BY_TOWER, TOWER),
    **dict.fromkeys(
        ("key norm of the tower", "received, by region", "distinct, merged", "tile by tile"), TOWER
    ),
}
NOT_COMPILED = {
    **dict.fromkeys(BY_TOWER, TOWER),
    **dict.fromkeys(
        ("key norm of the tower", "received, by region", "distinct, merged", "tile by tile"), TOWER
    ),
    "random in the decoder": GENERATOR,
}
# These run what `pyramiddrop`, `cls` and others of these lists run.
LIKE_OTHERS = (
    "swiftvlm",
    "fastervlm",
    "unlike each other, twice",
    "of what is left",
    "tile by tile",
    "mostly spread",
)
NAMES = [
    *(name for name in (*PRESETS, *COMPOSED) if name not in LIKE_OTHERS),
    *("default", "compacted", "permuted", "stretched"),
]
OTHERS = {
    "default": GapConfig(0.25),
    "compacted": GapConfig(0.4, 1, ids="compacted"),
    "permuted": GapConfig(0.4, 1, ids="permuted"),
    "stretched": GapConfig(0.4, 1, ids="stretched"),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def config_of(name: str) -> GapConfig:
    if name in OTHERS:
        return OTHERS[name]
    return COMPOSED[name] if name in COMPOSED else preset(name, TEXT["num_hidden_layers"], cls=True)


class Decoder:
    """A decoder alone, with a prompt that was prepared."""

    def __init__(self) -> None:
        config = transformers.LlamaConfig(**TEXT)
        self.model = seed_weights(
            transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        )
        self.visual = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        self.visual[:, FIRST : FIRST + VISUAL] = True
        self.prompt = gap_triton.prepare(self.model, {"visual_mask": self.visual})["visual_prompt"]

    def embeds(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(BATCH, TOKENS, TEXT["hidden_size"], generator=generator)


Prefill = Callable[[torch.Tensor, torch.Tensor], Any]


def attached(name: str, prepared: bool = True) -> tuple[Decoder, Prefill]:
    """A decoder that prunes; and its prefill, of embeddings and a mask: logits, and the keys of every layer."""
    decoder = Decoder()
    model, prompt = decoder.model, decoder.prompt if prepared else None
    gap_triton.attach(model, config_of(name))

    def prefill(embeds: torch.Tensor, visual: torch.Tensor) -> Any:
        output = model(
            inputs_embeds=embeds,
            visual_mask=visual,
            visual_prompt=prompt,
            visual_grid=GRID,
            logits_to_keep=1,
            use_cache=True,
        )
        return output.logits, [layer.keys for layer in output.past_key_values.layers]

    return decoder, prefill


def expect_failure(request: pytest.FixtureRequest, reasons: dict[str, str], name: str) -> None:
    if name in reasons:
        request.applymarker(pytest.mark.xfail(strict=True, reason=reasons[name]))


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found[0], expected[0])
    for left, right in zip(found[1], expected[1], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prepared_prefill_is_traced_without_values(name: str, request: pytest.FixtureRequest) -> None:
    """Tensors without values raise an error at any step that depends on one. The trace serves other images, too."""
    expect_failure(request, NOT_TRACED, name)
    decoder, prefill = attached(name)
    trace = make_fx(prefill, tracing_mode="fake", _allow_non_fake_inputs=True)
    traced = trace(decoder.embeds(1), decoder.visual)
    for seed in (1, 2):
        embeds = decoder.embeds(seed)
        assert_same(traced(embeds, decoder.visual), prefill(embeds, decoder.visual))


@torch.no_grad()
def test_a_prompt_that_was_not_prepared_is_read() -> None:
    decoder, prefill = attached("default", prepared=False)
    trace = make_fx(prefill, tracing_mode="fake", _allow_non_fake_inputs=True)
    with pytest.raises(Exception, match=r"data-dependent|_local_scalar_dense"):
        trace(decoder.embeds(1), decoder.visual)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prepared_prefill_compiles_to_one_graph(name: str, request: pytest.FixtureRequest) -> None:
    expect_failure(request, NOT_COMPILED, name)
    (decoder, prefill), graphs = attached(name), []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(prefill, fullgraph=True, backend=backend)
    images = [decoder.embeds(seed) for seed in (1, 2)]
    # A first prefill as it comes: a hook of the head that has seen that it is not needed takes itself off.
    expected = [prefill(embeds, decoder.visual) for embeds in images]
    for embeds, one in zip(images, expected, strict=True):
        assert_same(compiled(embeds, decoder.visual), one)
    assert len(graphs) == 1
