"""The embedded models: packing is exact, text and boxes survive the round trip, the shipped files load and answer."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from gap_triton.demo import scenes
from gap_triton.demo.architecture import Architecture
from gap_triton.demo.architectures import ARCHITECTURES, LLAVA, QWEN2_5_VL, find
from gap_triton.demo.grounding import (
    BoxComplete,
    answer_boxes,
    box_iou,
    boxes_from_tokens,
    evaluate,
    location_ids,
    prepare,
    prompt,
)
from gap_triton.demo.vocabulary import EOS, IMAGE_PAD, LOCATION_TOKENS, LOCATIONS, TOKENS, token_id
from training import curve
from training.build import build_model, save
from training.naming import naming_loss
from training.packing import (
    ANSWER,
    BLOCK,
    IGNORED,
    PREDICTED,
    QUESTION,
    Packed,
    pack,
    with_wrong_answers,
)
from training.schedule import PEAK_RATE, PHASES, learning_rate, phase_at
from training.train import ATTENTION, answer_logits, teacher_forced_accuracy, train


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture(scope="module")
def folder(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, saved: what does not depend on the weights is tested on it."""
    path = tmp_path_factory.mktemp("model")
    save(architecture, build_model(architecture, seed=3), path)
    return path


@pytest.fixture(scope="module")
def processor(architecture: Architecture, folder: Path):
    return architecture.load_processor(folder)


def logits_in_training(architecture: Architecture, model, packed: Packed) -> Tensor:
    with torch.no_grad():
        features = architecture.visual_features(model, packed.pixel_values)
        return answer_logits(architecture, model, packed, features)


def asked_alone(architecture: Architecture, model, packed: Packed, slot: int) -> dict[str, Tensor]:
    """Inputs of one question with its answer, as the model takes them without any help from packing."""
    start = packed.prefix + slot * BLOCK
    input_ids = torch.cat(
        [packed.input_ids[:, : packed.prefix], packed.input_ids[:, start : start + BLOCK]], 1
    )
    inputs = {"input_ids": input_ids, "pixel_values": packed.pixel_values}
    if architecture is QWEN2_5_VL:
        inputs["image_grid_thw"] = torch.tensor([[1, 16, 16]] * len(input_ids))
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (input_ids == token_id(architecture.image_token)).long()
    return inputs


def test_packed_logits_equal_those_of_questions_asked_alone(architecture: Architecture) -> None:
    model = build_model(architecture, seed=1).eval()
    # Larger weights than the initial ones, so that attention is far from uniform and a leak would show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    packed = pack(scenes.draw(2, seed=5, fewest=4), architecture)
    logits = logits_in_training(architecture, model, packed).unflatten(1, (-1, PREDICTED))
    for slot in range(scenes.MOST_OBJECTS):
        with torch.no_grad():
            expected = model(**asked_alone(architecture, model, packed, slot)).logits[:, -PREDICTED:]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits[:, slot], expected, rtol=1e-4, atol=1e-4)


def test_packed_position_ids_are_those_of_get_rope_index() -> None:
    model = build_model(QWEN2_5_VL)
    packed = pack(scenes.draw(2, seed=5, fewest=4), QWEN2_5_VL)
    for slot in range(scenes.MOST_OBJECTS):
        inputs = asked_alone(QWEN2_5_VL, model, packed, slot)
        inputs.pop("pixel_values")
        expected, _ = model.model.get_rope_index(**inputs)
        start = packed.prefix + slot * BLOCK
        own = [packed.position_ids[..., : packed.prefix], packed.position_ids[..., start : start + BLOCK]]
        assert torch.equal(torch.cat(own, -1).expand_as(expected), expected)
        assert expected[:, 0].unique(dim=1).shape[1] == expected.shape[2]  # no two tokens share all three ids


def test_training_attention_equals_sdpa(architecture: Architecture) -> None:
    model = build_model(architecture, seed=1).eval()
    packed = pack(scenes.draw(2, seed=5), architecture)
    expected = logits_in_training(architecture, model, packed)
    model.set_attn_implementation(ATTENTION)
    torch.testing.assert_close(
        logits_in_training(architecture, model, packed), expected, rtol=1e-4, atol=1e-5
    )


def test_wrong_answers_are_fed_in_turns_and_touch_nothing_else() -> None:
    packed = pack(scenes.draw(4, seed=5, fewest=4), LLAVA)
    right = packed.input_ids[:, packed.prefix :].unflatten(1, (-1, BLOCK))
    for step in (0, 1):
        mixed = with_wrong_answers(packed, step)
        assert torch.equal(mixed.labels, packed.labels)
        assert torch.equal(mixed.input_ids[:, : packed.prefix], packed.input_ids[:, : packed.prefix])
        fed = mixed.input_ids[:, packed.prefix :].unflatten(1, (-1, BLOCK))
        assert torch.equal(fed[..., :QUESTION], right[..., :QUESTION])
        wrong = (fed != right).any(2)
        assert torch.equal(wrong, (torch.arange(4)[:, None] + torch.arange(4) + step) % 2 == 0)


def test_naming_is_right_where_visual_tokens_are_the_words() -> None:
    part = scenes.draw(3, seed=5)
    embedding = torch.eye(len(TOKENS))
    # Row M of these tables, background, is never looked up by the loss.
    words = [
        torch.cat([labels + token_id(first), torch.zeros(3, 1, dtype=torch.int64)], 1).gather(
            1, part.owners.flatten(1)
        )
        for first, labels in ((scenes.COLOURS[0], part.colours), (scenes.SHAPES[0], part.shapes))
    ]
    features = embedding[words[0]] + embedding[words[1]]
    loss, right = naming_loss(features, embedding, part)
    assert right == 1.0
    assert loss < 0.01
    assert naming_loss(features.roll(1, 0), embedding, part)[1] < 0.5


def test_the_phases_go_from_words_to_one_object_to_several() -> None:
    names = [phase_at(step, 1000).name for step in range(1000)]
    assert list(dict.fromkeys(names)) == [phase.name for phase in PHASES]
    rates = [learning_rate(step, 1000) for step in range(1000)]
    begin = names.index(PHASES[1].name)
    assert rates[0] < 0.02 * PEAK_RATE
    assert rates[begin] < 0.02 * PEAK_RATE < rates[begin - 1]  # the decoder warms up too
    assert max(rates) <= PEAK_RATE
    assert rates[-1] < 1e-5 * PEAK_RATE


def test_packed_prompt_is_what_the_processor_makes(architecture: Architecture, processor) -> None:
    check_processor(architecture, processor)


def test_packed_prompt_is_what_auto_processor_makes(architecture: Architecture, folder: Path) -> None:
    if architecture is QWEN2_5_VL:
        pytest.importorskip("torchvision", reason="transformers wants it for Qwen2.5-VL's video half")
    check_processor(architecture, AutoProcessor.from_pretrained(folder))


def test_training_pixels_are_what_the_image_processor_makes(architecture: Architecture, folder: Path) -> None:
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:  # some versions of transformers want torchvision even for one image
        pytest.skip(str(error))
    part = scenes.draw(2, seed=9)
    made = image_processor([part.image(i) for i in range(2)], return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], architecture.pixel_values(part.images))
    if architecture is QWEN2_5_VL:
        assert torch.equal(made["image_grid_thw"], QWEN2_5_VL.image_grid(2))


def check_processor(architecture: Architecture, processor) -> None:
    part = scenes.draw(2, seed=9, fewest=4)
    packed = pack(part, architecture)
    for slot in range(scenes.MOST_OBJECTS):
        inputs = processor(
            images=[part.image(i) for i in range(2)],
            text=[prompt(part.question(i, slot), processor) for i in range(2)],
            return_tensors="pt",
        )
        start = packed.prefix + slot * BLOCK
        question = packed.input_ids[:, start : start + QUESTION]
        assert torch.equal(
            inputs["input_ids"], torch.cat([packed.input_ids[:, : packed.prefix], question], 1)
        )
        torch.testing.assert_close(inputs["pixel_values"], packed.pixel_values)


def test_labels_follow_the_boxes_and_leave_absent_objects_out() -> None:
    part = scenes.draw(40, seed=2)
    labels = pack(part, LLAVA).labels.unflatten(1, (-1, PREDICTED))
    assert (labels[~part.present] == IGNORED).all()
    assert torch.equal(labels[part.present][:, 0], part.shapes[part.present] + token_id(scenes.SHAPES[0]))
    assert (labels[part.present][:, 1 + ANSWER] == token_id(EOS)).all()
    answers = labels[part.present][:, 1 : 1 + ANSWER] - token_id(LOCATION_TOKENS[0])
    boxes = part.boxes[part.present] / scenes.IMAGE_SIZE
    # Half a step at each edge is the most that writing a box down may cost.
    assert (answers / (LOCATIONS - 1) - boxes).abs().max() <= 0.5 / (LOCATIONS - 1) + 1e-6
    assert box_iou(answers / (LOCATIONS - 1), boxes).min() > 0.6


def test_teacher_forced_accuracy_counts_present_objects_only() -> None:
    part = scenes.draw(20, seed=2)
    labels = pack(part, LLAVA).labels.clamp(min=0)
    perfect = torch.nn.functional.one_hot(labels, len(TOKENS)).float()
    assert teacher_forced_accuracy(perfect, part) == 1.0
    assert teacher_forced_accuracy(perfect.roll(1, 0), part) < 0.5


def test_text_survives_the_round_trip(processor) -> None:
    text = "where is the red triangle"
    for spelling in (text, f"{text}?", "Where is the RED triangle ?"):
        ids = processor.tokenizer(spelling)["input_ids"]
        assert TOKENS[ids[0]] == "<s>"
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert processor.tokenizer("where is the purple dog?")["input_ids"].count(token_id("<unk>")) == 2


def test_every_token_has_its_id(architecture: Architecture, processor) -> None:
    tokens = architecture.tokens
    assert processor.tokenizer.convert_tokens_to_ids(list(tokens)) == list(range(len(tokens)))
    assert tokens[: len(TOKENS)] == TOKENS  # the shipped LLaVA's
    assert [token_id(token) for token in tokens] == list(range(len(tokens)))
    with pytest.raises(ValueError, match=r"token is 'dog'; it must be one of <pad>, "):
        token_id("dog")


def test_boxes_survive_the_round_trip(processor) -> None:
    boxes = torch.tensor([[0.0, 0.25, 0.5, 1.0], [1 / 16, 2 / 16, 15 / 16, 1.0]])
    answers = processor.batch_decode(location_ids(boxes), skip_special_tokens=True)
    assert answers[0] == "<loc00> <loc04> <loc08> <loc16>"
    torch.testing.assert_close(boxes_from_tokens(answers), boxes)


@pytest.mark.parametrize(
    "answer", ["", "the red triangle", "<loc01> <loc02> <loc03>", "<loc01> <loc02> the <loc03> <loc04>"]
)
def test_an_answer_without_a_box_scores_nothing(answer: str) -> None:
    boxes = boxes_from_tokens([answer])
    assert boxes.isnan().all()
    assert box_iou(boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0),
        ((0, 0, 0.5, 1), (0, 0, 1, 1), 0.5),
        ((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5), 1 / 3),
        ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), 0.0),
        ((0.5, 0.5, 0.2, 0.2), (0, 0, 1, 1), 0.0),  # corners swapped: no area
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),
    ],
)
def test_box_iou(first: tuple[float, ...], second: tuple[float, ...], expected: float) -> None:
    a, b = torch.tensor([first]), torch.tensor([second])
    assert box_iou(a, b).item() == pytest.approx(expected)
    assert box_iou(b, a).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(2, 3), r"boxes has shape \[2, 3\]; the last dimension must be 4"),
        (torch.tensor([[0.0, 0.0, 96.0, 96.0]]), r"boxes spans 0\.\.96; it must lie in 0\.\.1"),
    ],
)
def test_bad_boxes_are_named(boxes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        location_ids(boxes)


def test_saved_config_names_no_attention(architecture: Architecture, folder: Path) -> None:
    for path in (folder / "config.json", architecture.folder / "config.json"):
        assert "attn" not in path.read_text()


def test_shipped_files_are_those_of_the_code(architecture: Architecture, folder: Path) -> None:
    names = {"config.json", "generation_config.json", "preprocessor_config.json"}
    names |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}

    def content(path: Path) -> dict:
        loaded = json.loads(path.read_text())
        loaded.pop("transformers_version", None)
        return loaded

    for name in names - {"config.json"}:  # what a config spells out differs between versions of transformers
        assert content(architecture.folder / name) == content(folder / name), name


def test_shipped_weights_are_small(architecture: Architecture) -> None:
    assert (architecture.folder / "model.safetensors").stat().st_size <= 8_000_000


@pytest.fixture(scope="module")
def shipped(architecture: Architecture):
    model = AutoModelForImageTextToText.from_pretrained(architecture.folder).eval()
    return model, architecture.load_processor(architecture.folder)


def test_shipped_model_points_at_things_in_an_image_of_any_size(architecture: Architecture, shipped) -> None:
    if architecture is QWEN2_5_VL:
        pytest.importorskip("torchvision", reason="transformers wants it for Qwen2.5-VL's video half")
    model, processor = shipped[0], AutoProcessor.from_pretrained(architecture.folder)
    # Qwen2.5-VL keeps the shape of an image, so the grid it was trained on is that of squares.
    size = (333, 333) if architecture is QWEN2_5_VL else (333, 201)
    part = scenes.held_out(8)
    right = 0
    for i in range(len(part)):
        image = part.image(i).resize(size, Image.Resampling.BICUBIC)
        inputs = processor(images=image, text=prompt(part.question(i), processor), return_tensors="pt")
        generated = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
        assert generated[-1] == token_id(EOS)
        answer = processor.decode(generated, skip_special_tokens=True)
        right += int(box_iou(boxes_from_tokens([answer])[0], part.target_boxes[i] / scenes.IMAGE_SIZE) >= 0.5)
    assert right >= 6


@pytest.mark.parametrize(
    ("size", "text", "message"),
    [
        (
            (96, 64),
            IMAGE_PAD,
            r"images holds a RGB image of 96 x 64 pixels; expected RGB, 64 x 64: .* resize",
        ),
        (
            (64, 64),
            "where is it",
            r"text has \[0\] times <\|image_pad\|> in its 1 prompts, for 1 images; expected",
        ),
    ],
)
def test_the_native_processor_refuses(size: tuple[int, int], text: str, message: str) -> None:
    processor = QWEN2_5_VL.load_processor(QWEN2_5_VL.folder)
    with pytest.raises(ValueError, match=message):
        processor(images=Image.new("RGB", size), text=text)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"architecture is 'qwen3_vl'; it must be one of llava, qwen2_5_vl"):
        find("qwen3_vl")
    with pytest.raises(
        ValueError, match=r"processor has the image token '<img>'; .* <image>, <\|image_pad\|>"
    ):
        prompt("where is it", SimpleNamespace(image_token="<img>"))


def test_evaluate_is_right_on_held_out_scenes_and_independent_of_the_batch_size(shipped) -> None:
    model, processor = shipped
    part, seen = scenes.held_out(48), []
    iou = evaluate(model, processor, part, batch_size=20, progress=seen.append)
    assert seen == [20, 20, 8]
    assert iou.shape == (48,)
    assert (iou >= 0.5).float().mean() >= 0.8
    torch.testing.assert_close(evaluate(model, processor, part[:7], batch_size=3), iou[:7])


def test_an_answer_ends_with_its_box(shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = shipped
    inputs = prepare(processor, scenes.held_out(12))
    lengths, real = [], model.generate

    def generate(**kwargs):
        ids = real(**kwargs)
        lengths.append(ids.shape[1] - kwargs["input_ids"].shape[1])
        return ids

    monkeypatch.setattr(model, "generate", generate)
    boxes = answer_boxes(model, processor, scenes.held_out(12))
    whole = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert lengths == [4, 5]
    expected = boxes_from_tokens(processor.batch_decode(whole, skip_special_tokens=True))
    torch.testing.assert_close(boxes, expected, rtol=0, atol=0)
    # What is no box goes on.
    location, word = token_id("<loc03>"), token_id("the")
    rows = torch.tensor([[location] * 4, [word, *[location] * 3], [location, word, location, location]])
    assert BoxComplete()(rows, None).tolist() == [True, False, False]


@torch.no_grad()
def test_where_things_are_comes_from_the_3d_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForImageTextToText.from_pretrained(QWEN2_5_VL.folder).eval()
    processor = QWEN2_5_VL.load_processor(QWEN2_5_VL.folder)
    part, threshold = scenes.held_out(32), 0.5
    right = model.model.get_rope_index

    def transposed(*args, **kwargs) -> tuple[Tensor, Tensor]:
        ids, delta = right(*args, **kwargs)
        return ids[[0, 2, 1]], delta  # text has the same id along all axes, so only the image changes

    monkeypatch.setattr(model.model, "get_rope_index", transposed)
    boxes = answer_boxes(model, processor, part)
    truth = part.target_boxes / scenes.IMAGE_SIZE
    assert (box_iou(boxes, truth) >= threshold).float().mean() < 0.3
    # Most are where the ids now say that the thing is. Not all: where it begins within a token was not transposed.
    assert (box_iou(boxes[:, [1, 0, 3, 2]], truth) >= threshold).float().mean() > 0.5


def test_evaluate_names_a_bad_batch_size(shipped) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 0; it must be at least 1"):
        evaluate(*shipped, scenes.held_out(1), batch_size=0)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    architecture: Architecture, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, architecture, steps=6, batch=2)
    train(resumed, architecture, steps=6, batch=2, stop_at=3)
    done: list[int] = []
    train(resumed, architecture, steps=6, batch=2, report=lambda step, row: done.append(step))
    assert done == [4, 5, 6]
    first, second = (
        torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (whole, resumed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "model/model.safetensors").read_bytes() == (
        resumed / "model/model.safetensors"
    ).read_bytes()
    logs = [
        [{**row, "seconds": 0} for row in curve.read(path / "training.jsonl")] for path in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_a_run_refuses_the_checkpoint_of_another(tmp_path: Path) -> None:
    train(tmp_path, steps=2, batch=1, stop_at=1)
    with pytest.raises(ValueError, match=r"output is .*'steps': 2, .*'steps': 3, .*another folder"):
        train(tmp_path, steps=3, batch=1)
    with pytest.raises(ValueError, match=r"'architecture': 'llava', .*'architecture': 'qwen2_5_vl', "):
        train(tmp_path, QWEN2_5_VL, steps=2, batch=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0, "batch": 1}, r"steps is 0; .* 1\.\.1000000"),
        ({"steps": 1, "batch": 0}, r"batch is 0; .* at least 1"),
        ({"steps": 1, "batch": 1, "seed": 3221}, r"seed is 3221; .* 0\.\.3220"),
        ({"steps": 1, "batch": 1, "stop_at": 2}, r"stop_at is 2; .* 1\.\.1"),
    ],
)
def test_bad_training_arguments_are_named(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **arguments)


def test_the_curve_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = tmp_path / "training.jsonl"
    for step in range(6):
        row = {
            "step": step,
            "stage": "locate" if step > 2 else "name",
            "loss": 3.0 / (step + 1),
            "accuracy": step / 6,
        }
        curve.append(log, row)
    curve.plot(log, tmp_path / "figures" / "training.png")
    assert Image.open(tmp_path / "figures" / "training.png").format == "PNG"
