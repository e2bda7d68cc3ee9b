"""What is prompt and what is answer: an answer never ranks the tokens that it was written from, however it is fed."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from support.comparison import TOLERANCE, error
from support.lone import lone, merged
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle
from support.stages import dropped_by
from support.tiny import IMAGE, PAD, generate
from support.ways import MODELS, MROPE, V5, build, make

import gap_triton
from gap_triton import GapConfig, Stage

ANSWER = 4
CONFIGS = {
    "text": GapConfig(0.4, 1),
    "last token": GapConfig(0.4, 1, "last_token"),
    "raters": GapConfig(0.4, 1, "raters"),
    "unrotated": GapConfig(0.4, 1, "unrotated"),
    "by region": GapConfig(0.4, 1, "text", "region"),
    "text similarity": GapConfig(0.4, -1, "text_similarity"),
    "stages": GapConfig(0.7, -1, "text_similarity", then=(Stage(0.5, 0), Stage(0.2, 2, "last_token"))),
    "compacted": GapConfig(0.4, 1, ids="compacted"),
}

# generate() of Qwen2.5-VL numbers the first token behind an image otherwise than forward does, pruned or not.
CASES = [
    *((name, config, "ragged-images") for name in MODELS for config in CONFIGS),
    *(("llava", config, "ends-in-image") for config in CONFIGS),
    *((MROPE, config, "left-padded") for config in ("text", "text similarity", "stages", "compacted")),
]


def prepared(name: str, config: GapConfig):
    model = build(name, "gap_triton")
    gap_triton.configure(model, config)
    return model


def with_answer(
    inputs: dict[str, torch.Tensor], rows: list[list[int]], labels: list[list[int]], padding: str = "left"
) -> dict[str, torch.Tensor]:
    """``inputs`` with other token ids, of different length by sample, and labels next to them."""
    width = max(map(len, rows))

    def padded(row: list[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(row))
        return gap + row if padding == "left" else row + gap

    ids = torch.tensor([padded(row, PAD) for row in rows])
    new = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([padded(row, -100) for row in labels]),
    }
    if "mm_token_type_ids" in inputs:
        new["mm_token_type_ids"] = (ids == IMAGE).int()
    return new


def real_tokens(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def written(model, inputs: dict[str, torch.Tensor]):
    """What the model writes with a KV cache: tokens [B, C], logits [B, C, vocabulary], kept rows."""
    output = generate(model, inputs, tokens=ANSWER)
    answer = output.sequences[:, inputs["input_ids"].shape[1] :]
    return answer, torch.stack(output.logits, 1), gap_triton.last_selection(model).visual_index


@pytest.mark.parametrize(("name", "config", "batch"), CASES)
def test_labels_say_where_the_answer_begins(name: str, config: str, batch: str) -> None:
    """Answers of different length: each sample's logits and the loss are those of generate()."""
    model, inputs = prepared(name, CONFIGS[config]), make(name, batch)
    answer, logits, _ = written(model, inputs)
    padding = "left" if batch == "left-padded" or config == "stages" else "right"
    prompts = real_tokens(inputs)
    answers = [row[:length].tolist() for row, length in zip(answer, (ANSWER, 2), strict=True)]
    full = with_answer(
        inputs,
        [prompt + words for prompt, words in zip(prompts, answers, strict=True)],
        [[-100] * len(prompt) + words for prompt, words in zip(prompts, answers, strict=True)],
        padding,
    )
    with torch.no_grad():
        output = model(**full)
    losses = []
    for b, words in enumerate(answers):
        end = int(full["attention_mask"][b].nonzero()[-1]) + 1
        found = output.logits[b, end - len(words) - 1 : end - 1]
        assert float((found - logits[b, : len(words)]).abs().max()) <= TOLERANCE
        losses.append(torch.nn.functional.cross_entropy(found, torch.tensor(words), reduction="sum"))
    loss = sum(losses) / sum(map(len, answers))
    assert float((output.loss - loss).abs()) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "batch"), [("llava", "left-padded"), ("llava", "ends-in-image"), (MROPE, "even")]
)
def test_logits_to_keep_in_every_form(name: str, batch: str) -> None:
    """Rows behind the first one whose logits are asked for are answer."""
    model, inputs = prepared(name, CONFIGS["text"]), make(name, batch)
    answer, logits, kept = written(model, inputs)
    prompts = [row.tolist() for row in inputs["input_ids"]]
    rows = [prompt + words.tolist() for prompt, words in zip(prompts, answer, strict=True)]
    full = with_answer(inputs, rows, rows)
    full["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, ANSWER), value=1)
    del full["labels"]
    queries = full["input_ids"].shape[1]
    tail = torch.arange(queries - ANSWER - 1, queries)
    forms = {"int": ANSWER + 1, "rows": tail, "from the end": tail - queries}
    if Version(transformers.__version__) >= Version("5.24"):
        forms |= {"rows by sample": tail.expand(2, -1)}
        mask = torch.zeros(2, queries, dtype=torch.bool)
        mask[:, tail] = True
        forms |= {"mask by sample": mask}
    for form, value in forms.items():
        with torch.no_grad():
            found = model(**full, logits_to_keep=value).logits.view(2, ANSWER + 1, -1)
        assert torch.equal(gap_triton.last_selection(model).visual_index, kept), form
        assert float((found[:, :-1] - logits).abs().max()) <= TOLERANCE, form


@pytest.mark.parametrize(
    ("name", "config", "batch"), [*CASES, *((name, "compacted", "right-padded") for name in MODELS)]
)
def test_without_a_cache_generate_writes_what_it_writes_with_one(name: str, config: str, batch: str) -> None:
    model, inputs = prepared(name, CONFIGS[config]), make(name, batch)
    cached = generate(model, inputs, tokens=3)
    again = generate(model, inputs, tokens=3, use_cache=False)
    assert torch.equal(again.sequences, cached.sequences)
    assert error(again, cached) <= TOLERANCE


def test_without_a_cache_and_with_a_visual_mask() -> None:
    model = lone("llama")
    gap_triton.attach(model, CONFIGS["text"])
    inputs = merged("llama", make("llava", "left-padded"))
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        rows = torch.cdist(inputs["inputs_embeds"].flatten(0, 1), table).argmin(-1)
    ids = {
        "input_ids": rows.view(inputs["inputs_embeds"].shape[:2]),
        **{key: inputs[key] for key in ("attention_mask", "visual_mask")},
    }
    cached = generate(model, ids, tokens=4)
    again = generate(model, ids, tokens=4, use_cache=False)
    assert torch.equal(again.sequences, cached.sequences)
    assert error(again, cached) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ usual labels
def usual_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All text of the prompt, as collators make them, but for what is predicted from padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = torch.where(mask & (ids != IMAGE), ids, -100)
    first = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return torch.where(first, -100, labels)


@pytest.mark.parametrize("keep", [0.1, 0.4, 0.95])
@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_usual_labels(name: str, batch: str, keep: float) -> None:
    """All that follows the image is answer, and the image's last row asks: as for a prompt that ends in its image."""
    config = GapConfig(keep, 1)
    model, inputs = prepared(name, config), make(name, batch)
    labels = usual_labels(inputs)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    selection = gap_triton.last_selection(model)
    # Each sample's prompt by itself.
    for b in range(2):
        end = int((inputs["input_ids"][b] == IMAGE).nonzero()[-1]) + 1
        alone = {
            key: value[b : b + 1, :end]
            for key, value in inputs.items()
            if key in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        images = len(inputs["pixel_values"]) // 2
        alone["pixel_values"] = inputs["pixel_values"][b * images : (b + 1) * images]
        if name == MROPE:
            alone["image_grid_thw"] = inputs["image_grid_thw"][b : b + 1]
        with torch.no_grad():
            model(**alone)
        expected = gap_triton.last_selection(model).visual_index[0].tolist()
        assert [row for row in selection.visual_index[b].tolist() if row >= 0] == expected
    # The loss of the oracle that is told what was kept.
    gone = dropped_by(selection, inputs["input_ids"] == IMAGE)
    reference = build(name, {"text_config": ORACLE})
    with MaskingOracle(reference, 1, 1.0, chosen=gone), torch.no_grad():
        loss = reference(**inputs, labels=labels).loss
    assert float((output.loss - loss).abs()) <= TOLERANCE
    assert gone.any(1).all()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_labels_that_are_refused_are_so_whatever_survives(keep: float) -> None:
    """Within an image, behind one that is not the last, and behind padding."""
    model = prepared("llava", GapConfig(keep, 1))
    inputs = make("llava", "ragged-images")
    images = (inputs["input_ids"][1] == IMAGE).nonzero()[:, 0].tolist()
    behind = next(row + 1 for row in images if row + 1 not in images)
    with torch.no_grad():
        for sample, row in ((1, images[5]), (1, behind), (0, int(inputs["attention_mask"][0].argmax()))):
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[sample, row] = 7
            with pytest.raises(
                ValueError, match=rf"labels\[{sample}, {row}\] is to be predicted from row {row - 1}, .*-100"
            ):
                model(**inputs, labels=labels)
        labels[0, row] = -100
        labels[1, images[-1] + 1] = 7  # the last image's last row stays
        assert bool(model(**inputs, labels=labels).loss.isfinite())


def test_another_ignored_label() -> None:
    """Labels are targets by the loss's own rule."""
    model, inputs = prepared("llava", CONFIGS["text"]), make("llava", "even")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        kept = gap_triton.last_selection(model).index
        output = model(**inputs, labels=torch.where(labels == -100, 3, labels), ignore_index=3)
    assert torch.equal(gap_triton.last_selection(model).index, kept)
    assert torch.equal(output.loss, expected.loss)


def test_labels_in_a_later_turn() -> None:
    """The answer to a second image on one cache."""
    if not V5:
        pytest.skip("this transformers does not encode the image of a later turn")
    model = prepared("llava", CONFIGS["text"])
    first, second = make("llava", "single"), make("llava", "single-ends-in-image", seed=3)
    ids = torch.cat([second["input_ids"][:, 1:], torch.tensor([[7, 8, 9, 10, 11]])], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    kept = []
    for rows, options in ((ids[:, :-2], {}), (ids, {"labels": labels})):
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**first, past_key_values=cache)
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
            pixels = second["pixel_values"]
            output = model(input_ids=rows, pixel_values=pixels, past_key_values=cache, **options)
        kept.append((gap_triton.last_selection(model).visual_index, output.logits))
    (alone, logits), (behind, longer) = kept
    assert torch.equal(alone, behind)
    assert float((logits - longer[:, :-2]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("batch", ["left-padded", "ragged-images"])
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_on_the_cache_of_its_prompt(name: str, batch: str) -> None:
    """Its labels say that the prompt is complete."""
    model, inputs = prepared(name, CONFIGS["text"]), make(name, batch)
    answer, logits, _ = written(model, inputs)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ANSWER), value=1)
    with torch.no_grad():
        first = model(**inputs, past_key_values=cache).logits[:, -1:]
        block = {"input_ids": answer, "attention_mask": mask, "past_key_values": cache}
        if name == MROPE:
            ids = (mask.cumsum(1) - 1)[:, -ANSWER:] + model.model.rope_deltas
            block["position_ids"] = ids.expand(3, -1, -1)
        with pytest.raises(ValueError, match="chosen by a prompt that was not complete"):
            model(**block)
        rest = model(**block, labels=answer).logits[:, :-1]
    assert float((torch.cat([first, rest], 1) - logits).abs().max()) <= TOLERANCE


def test_beams_without_a_cache() -> None:
    model, inputs = prepared("llava", CONFIGS["text"]), make("llava", "left-padded")
    cached, again = (generate(model, inputs, tokens=3, num_beams=2, use_cache=use) for use in (True, False))
    assert torch.equal(again.sequences, cached.sequences)
    assert error(again, cached) <= TOLERANCE


def test_labels_on_a_static_cache() -> None:
    """Which hands the scoring layer a buffer that is longer than the prompt."""
    model, inputs = prepared("llava", CONFIGS["text"]), make("llava", "left-padded")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    outputs = []
    for cache in (None, gap_triton.static_cache(model, max_cache_len=90)):
        with torch.no_grad():
            outputs.append(model(**inputs, labels=labels, past_key_values=cache).loss)
    assert float((outputs[0] - outputs[1]).abs()) <= TOLERANCE
