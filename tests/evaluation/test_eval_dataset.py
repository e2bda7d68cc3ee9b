"""``gap-triton eval --dataset``: the demo's numbers from files of RefCOCO, runs that were stopped, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from support.command_line import cli

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.demo import table
from gap_triton.demo.architectures import ARCHITECTURES
from gap_triton.demo.grounding import evaluate
from gap_triton.demo.report import can_draw
from gap_triton.demo.run import load_embedded_model
from gap_triton.demo.scenes import held_out
from gap_triton.evaluation import costs
from gap_triton.evaluation import run as whole
from gap_triton.evaluation.asking import Asker
from gap_triton.evaluation.boxes import FORMATS
from gap_triton.evaluation.cases import lines_of as lines_of_cases
from gap_triton.evaluation.question import Question
from gap_triton.evaluation.records import Record
from gap_triton.evaluation.refcoco import HUB, open_rgb, read_refcoco
from gap_triton.evaluation.reported import REPORTED, reported_for
from gap_triton.evaluation.summary import notes_of, row_of
from gap_triton.evaluation.synthetic import write_refcoco
from gap_triton.evaluation.vqa import read_vqa
from gap_triton.evaluation.ways import UNPRUNED, Way, ways_of
from gap_triton_cli import choices
from gap_triton_cli.loading import EMBEDDED

SYNTHETIC = ("eval", "--dataset", "synthetic", "--model", "embedded", "--layer", "1", "--budget", "0.5")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a single round on one question, and no picture: most tests look at neither."""
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "QUESTIONS", 1)
    monkeypatch.setattr(whole, "can_draw", lambda console, *names: False)


def said(result) -> str:
    return " ".join(result.output.replace("│", " ").split())


def run(output: Path, *options: str):
    result = cli(*SYNTHETIC, "--output", str(output), *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def answers_of(output: Path) -> dict[tuple[str, str], dict]:
    return {(line["way"], line["id"]): line for line in lines_of(output) if "answer" in line}


# --------------------------------------------------------------------------------------------- the same as the demo
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_numbers_are_the_demos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    count = 40
    if name == "embedded":
        monkeypatch.setattr(whole, "can_draw", can_draw)
    result = run(tmp_path, "--model", name, "--limit", str(count), "--batch-size", "16")
    results = json.loads((tmp_path / "results.json").read_text())
    model, processor = load_embedded_model(CPU, EMBEDDED[name].name)
    configs = [GapConfig(keep=1.0, layer=0), *(GapConfig(0.5, 1, ids=ids) for ids in ("kept", "compacted"))]
    by_way: dict[str, list[float]] = {}
    for line in answers_of(tmp_path).values():
        by_way.setdefault(line["way"], []).append(line["iou"])
    for row, config, ious in zip(results["rows"], configs, by_way.values(), strict=True):
        gap_triton.configure(model, config)
        expected = evaluate(model, processor, held_out(count))
        assert ious == pytest.approx(expected.tolist(), abs=1e-6)
        assert row["accuracy"] == int((expected >= 0.5).sum()) / count
        assert row["mean_iou"] == pytest.approx(float(expected.mean()), abs=1e-6)
        assert row["questions"] == count
    unpruned, kept, compacted = results["rows"]
    assert unpruned["accuracy"] > 0.9
    assert kept["accuracy"] > compacted["accuracy"] + 0.4
    (gain,) = (each for each in results["comparisons"] if each["against"] == compacted["way"])
    assert gain["way"] == kept["way"]
    assert gain["value"] == pytest.approx(kept["accuracy"] - compacted["accuracy"])
    assert gain["low"] < gain["value"] < gain["high"]
    assert "kept (GAP)" in result.output
    if name == "embedded":
        with Image.open(tmp_path / "cases.png") as picture:
            assert min(picture.size) > 400
    text = (tmp_path / "results.md").read_text()
    assert f"| text, layer 1 | 50% | kept | {kept['accuracy']:.3f} (" in text


def test_costs_and_tokens_are_the_demos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "PREFILL_ROUNDS", 1)
    model, processor = load_embedded_model(CPU)
    two = GapConfig(0.5, -1, "random", then=(Stage(0.125, 3, "last_token"),))
    configs = [GapConfig(keep=1.0, layer=0), GapConfig(0.25, 1, "text"), two, GapConfig(10, -1, "cls")]
    ways = [Way(str(i), "", None, config) for i, config in enumerate(configs)]
    asker = Asker(model, processor, FORMATS["embedded"], embedded=ARCHITECTURES["llava"])
    questions = read_refcoco("refcoco", "val", write_refcoco(tmp_path, 3))
    expected = table.prefill_cost(model, processor, held_out(3), configs)
    found = costs.measure_costs(asker, questions, ways, lambda done: None)
    assert [cost.kv_bytes for cost in found] == [cost.kv_bytes for cost in expected]
    assert found[0].ttft_ratio == 1.0
    for way, cost in zip(ways, expected, strict=True):
        gap_triton.configure(model, way.config)
        for answer in asker.ask(questions, way.config):
            assert answer.visual_tokens == 64
            assert answer.kept_tokens == pytest.approx(cost.tokens_mean)


def test_a_batch_from_which_nothing_is_dropped_counts_all_tokens(tmp_path: Path) -> None:
    model, processor = load_embedded_model(CPU)
    asker = Asker(model, processor, FORMATS["embedded"], embedded=ARCHITECTURES["llava"])
    questions = read_refcoco("refcoco", "val", write_refcoco(tmp_path, 2))
    for keep, kept in ((8, 8 / 3 + 64 * 2 / 3), (1000, 64)):
        config = GapConfig(keep, 3)
        gap_triton.configure(model, config)
        assert [each.kept_tokens for each in asker.ask(questions, config)] == pytest.approx([kept] * 2)


# --------------------------------------------------------------------------------------------- stopped and gone on
@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the model was asked, by their ids."""
    found: list[str] = []
    ask = Asker.ask

    def count(self, questions, config):
        found.extend(question.id for question in questions)
        return ask(self, questions, config)

    monkeypatch.setattr(Asker, "ask", count)
    return found


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, broken = tmp_path / "at_once", tmp_path / "broken"
    options = ("--limit", "6", "--batch-size", "2")
    run(at_once, *options)
    assert len(asked) == 18
    asked.clear()
    ask = Asker.ask

    def stop(self, questions, config):
        if len(asked) == 8:
            raise KeyboardInterrupt
        return ask(self, questions, config)

    with monkeypatch.context() as patched:
        patched.setattr(Asker, "ask", stop)
        result = cli(*SYNTHETIC, "--output", str(broken), *options)
    assert result.exit_code == 130
    assert "the same command goes on from there" in said(result)
    assert not (broken / "results.json").exists()
    path = broken / "answers.jsonl"
    path.write_text(
        path.read_text() + '{"way": "text, layer 1, 50%, ids kept", "id": "2/'
    )  # cut in the middle

    asked.clear()
    run(broken, *options)
    assert len(asked) == 18 - 8
    assert lines_of(broken) == lines_of(at_once)
    asked.clear()
    first = json.loads((broken / "results.json").read_text())["rows"][1]["accuracy"]
    run(broken, *options)
    assert not asked
    assert json.loads((broken / "results.json").read_text())["rows"][1]["accuracy"] == first


def test_more_questions_and_another_method_go_into_the_same_file(tmp_path: Path, asked: list[str]) -> None:
    run(tmp_path, "--limit", "2", "--ids", "kept")
    run(tmp_path, "--limit", "4", "--ids", "kept")
    assert len(asked) == 8
    asked.clear()
    result = cli(
        *SYNTHETIC[:5], "--method", "cls", "--budget", "8", "--limit", "4", "--output", str(tmp_path)
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(asked) == 2 * 4  # unpruned is there
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["way"] for row in rows] == [
        *("unpruned", "cls, 8 tokens, ids kept", "cls, 8 tokens, ids compacted")
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--max-new-tokens", "5"],
            "has answers with max_new_tokens 64, and now it is 5: choose another folder",
        ),
        (["--question", "find {}"], "has answers with question 'where is {}', and now it is 'find {}'"),
        (["--model", "embedded-mrope"], "has answers with model 'embedded', and now it is 'embedded-mrope'"),
        (["--split", "test"], "has answers with split 'val', and now it is 'test'"),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path: Path, options: list[str], sentence: str) -> None:
    file = tmp_path / "answers.jsonl"
    settings = {
        **{"data": "synthetic", "split": "val", "folder": None, "model": "embedded", "revision": None},
        **{"format": "embedded", "question": "where is {}", "dtype": "float32", "max_new_tokens": 64},
    }
    file.write_text(json.dumps({"settings": settings}) + "\n")
    before = file.read_text()
    result = cli(*SYNTHETIC, "--output", str(tmp_path), "--limit", "2", *options)
    assert result.exit_code == 2
    assert sentence in said(result)
    assert file.read_text() == before


def test_a_method_that_prunes_otherwise_now_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "--limit", "2")
    file = tmp_path / "answers.jsonl"
    file.write_text(file.read_text().replace('"keep": 0.5', '"keep": 0.25'))
    result = cli(*SYNTHETIC, "--output", str(tmp_path), "--limit", "2")
    assert result.exit_code == 2
    assert "with the configuration" in said(result)
    file.write_text("no answers\n")
    assert "is no file of answers" in said(cli(*SYNTHETIC, "--output", str(tmp_path), "--limit", "2"))


def test_a_batch_that_does_not_fit_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Asker.ask

    def fill(self, questions, config):
        if len(questions) > 1 and config.keep != 1.0:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return ask(self, questions, config)

    monkeypatch.setattr(Asker, "ask", fill)
    options = ("--output", str(tmp_path), "--limit", "2", "--ids", "kept")
    result = cli(*SYNTHETIC, *options)
    assert result.exit_code == 2
    assert "batch_size=8: text, layer 1, 50%, ids kept does not fit into the memory" in said(result)
    assert len(answers_of(tmp_path)) == 2
    assert cli(*SYNTHETIC, *options, "--batch-size", "1").exit_code == 0


# --------------------------------------------------------------------------------------------- other data, other models
def test_a_model_trained_on_padded_images_sees_them() -> None:
    image = Image.effect_noise((90, 40), 64).convert("RGB")
    model, processor = load_embedded_model(CPU)
    asker = Asker(model, processor, FORMATS["llava"])
    batch = asker.prepare([Question("", "it", lambda: image, box=(1, 2, 3, 4))])
    square = Image.new("RGB", (90, 90), (127, 127, 127))  # the mean of this processor
    square.paste(image, (0, 25))
    expected = processor(images=[square], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.inputs["pixel_values"], expected)
    assert (batch.views[0].width, batch.views[0].height) == (90, 40)


def test_a_photo_is_turned_as_its_camera_was_for_words_alone(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(tmp_path / "1.jpg", exif=exif)
    assert open_rgb(tmp_path / "1.jpg").size == (8, 4)
    (tmp_path / "questions.jsonl").write_text('{"image": "1.jpg", "question": "What?", "answer": "a"}')
    assert read_vqa(tmp_path)[0].load().size == (4, 8)


def test_questions_in_words_are_right_by_their_words(tmp_path: Path) -> None:
    scenes = held_out(3)
    for i in range(3):
        scenes.image(i).save(tmp_path / f"{i}.png")
    model, processor = load_embedded_model(CPU)
    gap_triton.configure(model, UNPRUNED.config)
    asker = Asker(model, processor, FORMATS["embedded"], embedded=ARCHITECTURES["llava"])
    words = [
        answer.text
        for answer in asker.ask(
            [Question("", scenes.question(i), lambda i=i: scenes.image(i), answers=("",)) for i in range(3)],
            UNPRUNED.config,
        )
    ]
    lines = [
        {"image": f"{i}.png", "question": scenes.question(i), "answer": words[i] if i else "nothing"}
        for i in range(3)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--dataset", "vqa", "--data", str(tmp_path), "--model", "embedded", "--output", str(tmp_path))
    result = cli("eval", *options, "--budget", "0.5", "--ids", "kept")
    assert result.exit_code == 0, (result.output, result.exception)
    unpruned = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert unpruned["accuracy"] == pytest.approx(2 / 3)
    assert (unpruned["mean_iou"], unpruned["failures"]) == (None, 0)


class Processor:
    """Of no model: what `Asker` asks of one for a prompt."""

    image_token = "<image>"
    chat_template: str | None = None

    def apply_chat_template(self, messages: list, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return json.dumps([part.get("text", part["type"]) for part in messages[0]["content"]])


def test_a_prompt_is_what_the_model_was_trained_on() -> None:
    box = Question("", "the {red} car", Image.new, box=(0, 0, 1, 1))
    words = Question("", "What is it?", Image.new, answers=("a car",))
    asker = Asker(None, Processor(), FORMATS["paligemma"])
    assert asker.prompt(box) == "<image>detect the {red} car"
    Processor.chat_template = "any"
    asker = Asker(None, Processor(), FORMATS["llava"])
    image, text = json.loads(asker.prompt(box))
    assert image == "image"
    assert text == (
        "Please provide the bounding box coordinate of the region this sentence describes: the {red} car"
    )
    assert json.loads(asker.prompt(words))[1] == (
        "What is it?\nAnswer the question using a single word or phrase."
    )


def test_figures_of_papers_stand_where_they_belong() -> None:
    ways = ways_of(None, ["nuwa"], [64], ids=("kept", "compacted"))
    known = reported_for("refcoco", "test", "llava")
    record = Record("", "1", "", True, False, None, None, 576, 64.0)
    cost = costs.Cost(1.0, 1.0, 1)
    rows = [row_of(way, [record], cost, known) for way in ways]
    assert [row.reported for row in rows] == [58.30, 29.43, None]
    assert all("Nüwa" in note for note in notes_of(rows, known))
    assert len(notes_of(rows, known)) == len(known) - 2
    assert {each.accuracy for each in reported_for("refcoco", "val", "llava")} == {56.14, 15.34, 51.42}
    assert not reported_for("refcoco", "test", "qwen2_5_vl")
    assert len(REPORTED) == 3 + 16


def test_the_recipe_of_the_document_runs(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    recipe, other = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "shikra_asker" in other  # the decoder tests run it
    write_refcoco(tmp_path, 2)
    names = {"path": ARCHITECTURES["llava"].folder, "data": tmp_path, "output": tmp_path / "output"}
    exec(compile(recipe, "docs/evaluation.md", "exec"), names)
    # It is asked as a LLaVA-1.5 here, and answers in its own way.
    assert [row.failures for row in names["rows"]] == [2] * 5
    tokens = [row.kept_tokens for row in names["rows"]]
    assert (tokens[0], tokens[-1]) == (64.0, 16.0)


def test_cases_are_the_largest_losses_and_gains() -> None:
    ious = {"unpruned": [0.9, 0.8, 0.9, 0.1, 0.9, 0.9], "permuted": [0.1, 0.8, 0.5, 0.9, 0.9, 0.0]}
    ious["compacted"] = [0.0, 0.0, 0.5, 0.1, 0.2, 0.0]
    ways = [UNPRUNED, *ways_of(None, [None], [0.5], ids=("permuted", "compacted"), layer=1)[1:]]
    questions = [
        Question(str(i), f"thing {i}", lambda: Image.new("RGB", (9, 9)), box=(0, 0, 9, 9)) for i in range(6)
    ]
    records = [
        [
            Record("", str(i), "", iou >= 0.5, not iou, (0, 0, 9, 9 * iou), iou, 4, 2.0)
            for i, iou in enumerate(of_way)
        ]
        for of_way in ious.values()
    ]
    (worst_heading, worst), (best_heading, best) = lines_of_cases(questions, ways, records)
    assert "loss of IoU against unpruned" in worst_heading
    assert "gain of IoU against ids compacted" in best_heading
    assert [case.text for case in worst] == ["thing 5", "thing 0", "thing 2", "thing 1"]
    assert [case.text for case in best] == ["thing 1", "thing 3", "thing 4", "thing 0"]
    assert list(worst[0].boxes) == ["unpruned", "ids compacted", "ids permuted", "true box"]
    assert worst[0].words == "unpruned: IoU 0.90\nids compacted: no box\nids permuted: no box"


def test_the_help_names_what_there_is() -> None:
    text = said(cli("eval", "--help"))
    assert all(name in text for name in FORMATS if name != "embedded")
    assert get_args(choices.Dataset) == (*HUB, choices.VQA, choices.SYNTHETIC)


# --------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "x"], "--data belongs to a data set; leave it out, or name one with --dataset"),
        (["--format", "llava"], "--format belongs to a data set"),
        (["--limit", "3"], "--limit belongs to a data set"),
        (
            ["--dataset", "refcoco", "--coverage"],
            "--coverage does not go with --dataset: it measures the embedded",
        ),
        (
            ["--dataset", "refcoco", "--layers", "1"],
            "--layers does not go with --dataset: use --layer",
        ),
        (
            ["--dataset", "refcoco", "--samples", "1"],
            "--samples does not go with --dataset: use --limit",
        ),
        (["--dataset", "coco"], "'coco' is not one of 'refcoco'"),
        (
            ["--dataset", "refcoco", "--split", "train"],
            "split 'train' of refcoco: expected one of val, test",
        ),
        (
            ["--dataset", "refcoco", "--data", "nowhere"],
            "no refcoco val in 'nowhere': expected val-*.parquet",
        ),
        (
            ["--dataset", "refcocog"],
            "hf download lmms-lab-encoder/RefCOCOg --repo-type dataset --local-dir data/refcocog",
        ),
        (
            ["--dataset", "refcoco", "--method", "nuva"],
            "--methods 'nuva': expected all, or of prumerge",
        ),
        (
            ["--dataset", "refcoco", "--method", "nuwa", "--layer", "1"],
            "--layer is part of a method",
        ),
        (
            ["--dataset", "refcoco", "--method", "feather", "--budget", "16"],
            "feather: budget=16: expected a share",
        ),
        (["--dataset", "refcoco", "--budget", "1.0"], "--budgets 1.0 drops nothing"),
        (["--dataset", "refcoco", "--ids", "shifted"], "GapConfig.ids='shifted'"),
        (["--dataset", "refcoco"], "--model is missing: with --dataset it is a folder or a hub id"),
        (
            ["--dataset", "synthetic", "--model", "embedded", "--data", "x"],
            "--data does not go with --dataset synth",
        ),
        (
            ["--dataset", "synthetic", "--model", "embedded", "--limit", "1", "--format", "qwen2.5-vl"],
            "LlavaProcessor tells no patch size",
        ),
        (
            ["--dataset", "vqa", "--question", "{}"],
            "--question does not go with --dataset vqa",
        ),
        (
            ["--dataset", "vqa", "--data", "nowhere"],
            "no questions in 'nowhere': expected questions.jsonl there",
        ),
        (
            ["--dataset", "synthetic", "--model", "no/model", "--limit", "1"],
            "model 'no/model' can't be loaded",
        ),
        (
            ["--dataset", "synthetic", "--model", "embedded", "--limit", "1", "--question", "where?"],
            "question 'where?': expected a place for the expression, {}",
        ),
        (
            ["--dataset", "synthetic", "--model", "embedded", "--limit", "1", "--layer", "5"],
            "this model's decoder has 6 layers; expected -1 to 4",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    needs_a_model = "--dataset" in options and "--model" not in (*options, sentence.split()[0])
    result = cli("eval", *options, *(("--model", "x") if needs_a_model else ()))
    assert result.exit_code == 2, (result.output, result.exception)
    assert sentence in said(result)
    assert "Traceback" not in result.output
