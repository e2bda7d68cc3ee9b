"""Decoders alone, and merged ``inputs_embeds``: the caller names the visual tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from support.comparison import TOLERANCE, error
from support.hooks import attributes, hooks
from support.lone import DECODERS, LoneOracle, lone, merged, without
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle
from support.prompts import make_prompt
from support.tiny import EOS, IMAGE, LAYERS, build, generate, pixels

import gap_triton
from gap_triton import GapConfig

CONFIG = GapConfig(keep=0.4, layer=1)


def attached(name: str = "llama", config: GapConfig = CONFIG) -> transformers.PreTrainedModel:
    model = lone(name)
    gap_triton.attach(model, config)
    return model


def expected(name: str, inputs: dict[str, torch.Tensor], config: GapConfig = CONFIG, **options: object):
    reference = build(f"llava/{name}", {"text_config": ORACLE})
    with MaskingOracle(reference, config.layer, config.keep, config.score) as oracle:
        output = generate(reference, inputs, **options)
    assert oracle.dropped.any()
    return output


def agree(pruned, oracle, prompt: int) -> None:
    # From inputs_embeds, generate returns the new tokens only.
    assert torch.equal(pruned.sequences, oracle.sequences[:, prompt:])
    assert error(pruned, oracle) <= TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 2])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_alone_equals_the_oracle(name: str, layer: int) -> None:
    inputs, config = make_prompt("llava", "left-padded"), GapConfig(keep=0.4, layer=layer)
    pruned = generate(attached(name, config), merged(name, inputs))
    agree(pruned, expected(name, inputs, config), inputs["input_ids"].shape[1])


@pytest.mark.parametrize("batch", ["right-padded", "ragged-images", "one-without-image", "ends-in-image"])
@pytest.mark.parametrize("score", ["last_token", "text"])
def test_batches(batch: str, score: str) -> None:
    inputs, config = make_prompt("llava", batch), GapConfig(keep=0.4, layer=1, score=score)
    pruned = generate(attached("llama", config), merged("llama", inputs))
    agree(pruned, expected("llama", inputs, config), inputs["input_ids"].shape[1])


@pytest.mark.parametrize("name", DECODERS)
def test_keep_everything_is_sdpa_bit_for_bit(name: str) -> None:
    inputs = merged(name, make_prompt("llava", "left-padded"))
    dense = generate(lone(name), without(inputs, "visual_mask"))
    pruned = generate(attached(name, GapConfig(keep=1.0, layer=1)), inputs)
    assert torch.equal(pruned.sequences, dense.sequences)
    assert error(pruned, dense) == 0.0


def test_by_name() -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    model = lone("llama", "gap_triton")
    gap_triton.configure(model, CONFIG)
    assert error(generate(model, inputs), generate(attached(), inputs)) == 0.0
    model.set_attn_implementation("sdpa")
    assert attributes(model) == attributes(lone())
    assert hooks(model) == 0
    model.set_attn_implementation("gap_triton")
    assert hooks(model) > 0


def test_the_stack_by_itself() -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    model, stack = attached(), lone().model
    gap_triton.attach(stack, CONFIG)
    with torch.no_grad():
        states = stack(**inputs).last_hidden_state
        logits = model(**inputs).logits
    assert torch.equal(model.lm_head(states), logits)


def test_detach_leaves_nothing() -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    model = attached()
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert attributes(model) == attributes(lone())
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['visual_mask'\]"):
        generate(model, inputs)


def test_generate_still_refuses_what_it_does_not_know() -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['visual_masc'\]"):
        generate(attached(), inputs, visual_masc=inputs["visual_mask"])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_is_independent(duplicate) -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    model = attached()
    twin = duplicate(model)
    gap_triton.configure(twin, GapConfig(keep=1.0, layer=1))
    dense = generate(lone(), without(inputs, "visual_mask"))
    assert error(generate(twin, inputs), dense) == 0.0
    assert error(generate(model, inputs), dense) > 1e-2


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["beams", "static"],
)
def test_ways_to_generate(options: dict[str, object]) -> None:
    inputs = make_prompt("llava", "left-padded")
    pruned = generate(attached(), merged("llama", inputs), **options)
    oracle_options = without(options, "cache_implementation")
    oracle = expected("llama", inputs, **oracle_options)
    assert torch.equal(pruned.sequences, oracle.sequences[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("whole", [True, False], ids=["whole-conversation", "new-rows"])
def test_several_turns_on_one_cache(whole: bool) -> None:
    """`generate` takes the embeddings of the whole conversation, and the mask of all of it or of its new rows."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat([torch.full((2, 36), IMAGE), torch.randint(5, 140, (2, 7), generator=generator)], dim=1)
    turn = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **pixels("llava", [None] * 2, generator),
    }
    model, reference = attached(), lone("llama", ORACLE)
    oracle = LoneOracle(reference, CONFIG.layer, CONFIG.keep, torch.empty(0))
    outputs = []
    for candidate in (model, reference):
        cache = transformers.DynamicCache(config=model.config)
        inputs = merged("llama", make_prompt("llava", "left-padded"))
        oracle.named = inputs["visual_mask"]
        with oracle:
            first = generate(candidate, own(candidate, inputs), tokens=4, past_key_values=cache)
            answer, second = first.sequences, merged("llama", turn)
            second["inputs_embeds"] = torch.cat(
                [
                    inputs["inputs_embeds"],
                    model.get_input_embeddings()(answer).detach(),
                    second["inputs_embeds"],
                ],
                1,
            )
            second["attention_mask"] = torch.cat(
                [inputs["attention_mask"], torch.ones_like(answer), second["attention_mask"]], 1
            )
            no_image = torch.zeros_like(answer, dtype=torch.bool)
            oracle.named = torch.cat([inputs["visual_mask"], no_image, second["visual_mask"]], 1)
            # The last token of the answer has not been through the model yet: it is the first of the new rows.
            second["visual_mask"] = oracle.named[:, 0 if whole else cache.get_seq_length() :]
            outputs.append(
                (first, generate(candidate, own(candidate, second), tokens=4, past_key_values=cache))
            )
    for pruned, masked in zip(*outputs, strict=True):
        assert torch.equal(pruned.sequences, masked.sequences)
        assert error(pruned, masked) <= TOLERANCE
    assert int(oracle.dropped.sum(1)[0]) == 2 * 21


def own(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``inputs`` without the mask for a model that is not attached."""
    return inputs if hooks(model) else without(inputs, "visual_mask")


def test_merged_embeddings_of_a_vision_language_model() -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava/llama", "gap_triton")
    gap_triton.configure(model, CONFIG)
    pruned = generate(model, merged("llama", inputs))
    agree(pruned, expected("llama", inputs), inputs["input_ids"].shape[1])


def test_a_mask_beside_ids_may_spare_placeholders() -> None:
    """Rows that it leaves out are not dropped: here those of the first image of a sample."""
    inputs = make_prompt("llava", "ragged-images")
    mask = inputs["input_ids"] == IMAGE
    first = mask & (mask.cumsum(1) <= 36)
    mask = mask & ~(first & (mask.sum(1, keepdim=True) > 36))
    model = build("llava/llama", "gap_triton")
    gap_triton.configure(model, CONFIG)
    with torch.no_grad():
        model(**inputs, visual_mask=mask)
    kept = gap_triton.last_selection(model).index
    for sample in range(2):
        rows = set(kept[sample].tolist())
        assert {
            i for i, spared in enumerate((~mask & (inputs["attention_mask"] == 1))[sample]) if spared
        } <= rows
        assert len(rows & set(mask[sample].nonzero()[:, 0].tolist())) == -(-2 * int(mask[sample].sum()) // 5)


def test_ids_of_a_decoder_alone() -> None:
    """A model with discrete visual tokens has no placeholder; the mask alone tells."""
    inputs = make_prompt("llava", "left-padded")
    mask = inputs["input_ids"] == IMAGE
    model = attached()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        by_ids = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], visual_mask=mask).logits
        by_embeds = model(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], visual_mask=mask
        ).logits
    assert torch.equal(by_ids, by_embeds)
    assert gap_triton.last_selection(model).visual_index.shape == (2, 15)


def test_a_prompt_without_a_mask_is_dense_and_says_so(warnings: pytest.LogCaptureFixture) -> None:
    inputs = without(merged("llama", make_prompt("llava", "left-padded")), "visual_mask")
    assert error(generate(attached(), inputs), generate(lone(), inputs)) == 0.0
    assert (
        warnings.text.count("LlamaModel got a prompt and no visual_mask, so gap_triton prunes nothing") == 1
    )


def test_an_empty_mask_is_dense_and_says_nothing(warnings: pytest.LogCaptureFixture) -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    dense = generate(lone(), without(inputs, "visual_mask"))
    inputs["visual_mask"] = torch.zeros_like(inputs["visual_mask"])
    assert error(generate(attached(), inputs), dense) == 0.0
    assert "visual_mask" not in warnings.text


def test_training_mode_takes_the_mask_and_is_dense() -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    dense = lone().train()(**without(inputs, "visual_mask")).logits
    assert torch.equal(attached().train()(**inputs).logits, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.long(), r"visual_mask is a tensor of torch.int64: expected a bool tensor"),
        (lambda m: m.tolist(), r"visual_mask is list: expected a bool tensor"),
        (
            lambda m: m[:, 1:],
            r"visual_mask has shape \[2, \d+\]: expected one entry per row .* \[2, \d+\]\. ",
        ),
        (lambda m: m[:1], r"visual_mask has shape \[1, \d+\]"),
        (lambda m: m[0], r"visual_mask has shape \[\d+\]"),
        (lambda m: m.to("meta"), r"visual_mask is on meta and the input on cpu: expected the same device"),
    ],
    ids=["dtype", "type", "rows", "batch", "dimensions", "device"],
)
def test_bad_masks(change, message: str) -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    inputs["visual_mask"] = change(inputs["visual_mask"])
    with pytest.raises(ValueError, match=message), torch.no_grad():
        attached()(**inputs)


def test_a_mask_that_disagrees_with_the_ids() -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava/llama", "gap_triton")
    mask = (inputs["input_ids"] == IMAGE).roll(
        1, dims=1
    )  # one row too far: it names the word after the image
    row = int(mask[0].nonzero()[-1])
    with pytest.raises(
        ValueError,
        match=rf"names 2 rows that hold no image placeholder in input_ids, the first at \[0, {row}\]",
    ):
        generate(model, inputs, visual_mask=mask)


def test_drafts_of_assisted_decoding() -> None:
    """The mask covers the prompt; the first forward also holds drafts, and later ones hold nothing else."""
    model = attached()
    prompt = without(make_prompt("llava", "left-padded"), "pixel_values")
    inputs = {name: tensor[-1:] for name, tensor in prompt.items()}
    inputs["visual_mask"] = inputs["input_ids"] == IMAGE
    greedy = generate(model, inputs, eos_token_id=EOS)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    assisted = generate(model, inputs, eos_token_id=EOS, **lookup)
    assert gap_triton.last_selection(model).visual_index.shape[1] < int(inputs["visual_mask"].sum())
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert error(assisted, greedy) <= TOLERANCE


def test_rows_other_than_the_prompts() -> None:
    inputs = make_prompt("llava", "left-padded")
    inputs = without(inputs, "pixel_values") | {"visual_mask": inputs["input_ids"] == IMAGE}
    with pytest.raises(ValueError, match=r"Chunked prefill feeds other rows"):
        generate(attached(), inputs, prefill_chunk_size=16)


def test_attach_to_the_whole_after_its_decoder() -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava/llama")
    gap_triton.attach(model.model.language_model, GapConfig(keep=1.0))
    gap_triton.attach(model, CONFIG)
    agree(generate(model, inputs), expected("llama", inputs), 0)
    # The other way round it is one attachment, the whole's.
    gap_triton.attach(model.model.language_model, GapConfig(keep=1.0))
    assert error(generate(model, inputs), generate(build("llava/llama"), inputs)) == 0.0
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert model.config.text_config._attn_implementation == "sdpa"
