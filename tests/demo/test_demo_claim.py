"""The demo's main claim, on a small held-out subset: keeping position ids restores most of what pruning destroys."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch
from PIL import Image
from rich.console import Console
from support.command_line import cli
from transformers import AutoModelForImageTextToText

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architectures import ARCHITECTURES
from gap_triton.demo.grounding import evaluate, prepare
from gap_triton.demo.run import IDS, LAYER, SCORE, demo_configs, load_embedded_model, run_demo
from gap_triton.demo.scenes import held_out
from gap_triton.demo.table import Row

SCENES = 96
KEYS = (
    *("model", "method", "keep", "ids", "config", "tokens_kept", "tokens_mean"),
    *("accuracy", "accuracy_low", "accuracy_high", "mean_iou", "prefill_ratio", "kv_bytes"),
)


def test_keeping_ids_beats_renumbering_by_a_wide_margin() -> None:
    model, processor = load_embedded_model(torch.device("cpu"))
    scenes = held_out(SCENES)
    accuracy = {}
    for name, config in {
        "unpruned": GapConfig(keep=1.0),
        **{ids: GapConfig(keep=0.5, layer=LAYER, score=SCORE, ids=ids) for ids in IDS},
    }.items():
        gap_triton.configure(model, config)
        accuracy[name] = float((evaluate(model, processor, scenes) >= 0.5).float().mean())
    assert accuracy["unpruned"] >= 0.95
    assert accuracy["kept"] >= 3 * accuracy["compacted"]
    assert accuracy["kept"] >= 3 * accuracy["permuted"]
    assert accuracy["kept"] >= 0.75


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keep_everything_is_the_plain_model(name: str) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(ARCHITECTURES[name].folder)
    pruned, processor = load_embedded_model(torch.device("cpu"), name)
    gap_triton.configure(pruned, GapConfig(keep=1.0))
    inputs = prepare(processor, held_out(2))
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, pruned(**inputs).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruning_keeps_some_of_the_answers(name: str) -> None:
    model, processor = load_embedded_model(torch.device("cpu"), name)
    gap_triton.configure(model, GapConfig(keep=0.5, layer=LAYER, score=SCORE))
    accuracy = float((evaluate(model, processor, held_out(SCENES)) >= 0.5).float().mean())
    assert 0.4 <= accuracy < 0.97  # 0.90 and 0.56 on 512 scenes; 0.99 without pruning


def test_demo_writes_table_pictures_and_json(tmp_path) -> None:
    console = Console(record=True, width=80)
    rows = run_demo(tmp_path, samples=8, console=console)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [tuple(row) for row in results["rows"]] == [KEYS] * 10
    assert [Row(**row) for row in results["rows"]] == rows
    assert results["versions"]["torch"] == version("torch")
    assert "CPU" in results["device"] or torch.cuda.is_available()
    assert rows[0].method == "no pruning"
    assert [(row.keep, row.ids) for row in rows[1:]] == [(c.keep, c.ids) for c in demo_configs()]
    assert [row.tokens_kept for row in rows[::3]] == [64, 32, 16, 8]
    assert all(row.kv_bytes < rows[0].kv_bytes for row in rows[1:])
    assert all(row.accuracy_low <= row.accuracy <= row.accuracy_high for row in rows)
    for name in ("overlay.png", "accuracy.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    printed = console.export_text()
    assert "kept (GAP)" in printed
    assert "results.json" in printed


# --------------------------------------------------------------------------------------------- the command line
def test_run_on_an_image_file(tmp_path) -> None:
    image, overlay = tmp_path / "scene.png", tmp_path / "overlay.png"
    scene = held_out(1)
    scene.image(0).resize((331, 257)).save(image)
    arguments = ["run", "--model", "embedded", "--image", str(image), "--prompt", scene.question(0)]
    result = cli(*arguments, "--layer", "1", "--keep", "0.25", "--overlay", str(overlay))
    assert result.exit_code == 0, result.output
    assert "<loc" in result.output
    assert "kept 16 of 64 visual tokens after layer 1, ids kept" in result.output
    with Image.open(overlay) as picture:
        assert min(picture.size) > 200
    result = cli(*arguments, "--keep", "0.25", "--method", "nuwa", "--overlay", str(overlay))
    assert result.exit_code == 0, result.output
    assert "kept 23 of 64 visual tokens before the decoder, 9 after layer 2, ids kept" in result.output
    result = cli(*arguments, "--keep", "1.0")
    assert "nothing dropped" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "half"], "'half': expected a share such as 0.25 or a count such as 64"),
        (["--keep", "0"], "GapConfig.keep=0: an int counts"),
        (["--layer", "-1"], "GapConfig.score='text' with layer=-1"),
        (["--ids", "shifted"], "shifted"),
        (["--method", "nuva"], "preset 'nuva': expected one of 'prumerge'"),
        (["--method", "nuwa", "--layer", "1"], "--layer is part of a method: leave it out, or --method"),
        (["--layer", "5"], "this model's decoder has 6 layers; expected -1 to 4"),
    ],
)
def test_run_refuses(tmp_path, options: list[str], message: str) -> None:
    image = tmp_path / "scene.png"
    held_out(1).image(0).save(image)
    result = cli("run", "--model", "embedded", "--image", str(image), "--prompt", "where?", *options)
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).split()).replace("│ ", "").replace(
        " │", ""
    )


def test_info() -> None:
    result = cli("info")
    assert result.exit_code == 0
    for word in ("torch", "transformers", "triton", "flash-attn", "dense attention"):
        assert word in result.output
    found = json.loads(cli("info", "--json").output)
    assert found["versions"]["torch"] == version("torch")
