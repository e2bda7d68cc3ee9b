"""Switching on and off: by name, by dict, later, explicitly, scoped; and nothing left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.comparison import error, same
from support.hooks import attributes, hooks
from support.prompts import make_prompt
from support.tiny import CLASSES, build, generate
from transformers import AutoModelForImageTextToText

import gap_triton
from gap_triton import GapConfig

CONFIG = GapConfig(keep=0.4, layer=1)
MODELS = sorted(CLASSES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints on disk, saved from models that know nothing of pruning."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name in MODELS:
        paths[name] = str(folder / name)
        build(name, "sdpa").save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[object, object]]:
    """Logits without and with pruning, of each model."""
    results = {}
    for name in MODELS:
        inputs = make_prompt(name, "left-padded")
        dense = generate(build(name, "sdpa"), inputs)
        model = build(name, "sdpa")
        gap_triton.attach(model, CONFIG)
        results[name] = dense, generate(model, inputs)
        assert error(*results[name]) > 1e-2
    return results


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "implementation",
    ["gap_triton", {"text_config": "gap_triton", "vision_config": "sdpa"}],
    ids=["string", "dict"],
)
def test_from_pretrained(
    name: str, implementation: str | dict[str, str], saved: dict[str, str], expected: dict
) -> None:
    dense, pruned = expected[name]
    inputs = make_prompt(name, "left-padded")
    model = AutoModelForImageTextToText.from_pretrained(saved[name], attn_implementation=implementation)
    gap_triton.configure(model, CONFIG)
    assert same(generate(model, inputs), pruned)
    model.set_attn_implementation("sdpa")
    assert same(generate(model, inputs), dense)
    assert hooks(model) == 0
    model.set_attn_implementation(implementation)
    gap_triton.configure(model, CONFIG)
    assert same(generate(model, inputs), pruned)


def test_name_alone_prunes_with_the_default_configuration(saved: dict[str, str]) -> None:
    inputs = make_prompt("llava", "left-padded")
    model = AutoModelForImageTextToText.from_pretrained(saved["llava"], attn_implementation="gap_triton")
    by_name = generate(model, inputs)
    explicit = build("llava", "sdpa")
    gap_triton.attach(explicit, GapConfig())
    assert same(by_name, generate(explicit, inputs))
    selection = gap_triton.last_selection(model)
    assert selection is not None
    assert selection.visual_index.shape == (2, 18)


@pytest.mark.parametrize("name", MODELS)
def test_load_plain_then_set(name: str, saved: dict[str, str], expected: dict) -> None:
    dense, pruned = expected[name]
    inputs = make_prompt(name, "left-padded")
    model = AutoModelForImageTextToText.from_pretrained(saved[name])
    assert hooks(model) == 0
    assert same(generate(model, inputs), dense)
    model.set_attn_implementation({"text_config": "gap_triton"})
    gap_triton.configure(model, CONFIG)
    assert same(generate(model, inputs), pruned)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attach_and_detach_leave_nothing(implementation: str) -> None:
    model = build("llava", implementation)
    inputs = make_prompt("llava", "left-padded")
    dense = generate(model, inputs)
    before = attributes(model)
    gap_triton.attach(model, CONFIG)
    assert hooks(model) > 0
    pruned = generate(model, inputs)
    assert error(pruned, dense) > 1e-2
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert attributes(model) == before
    assert model.config.text_config._attn_implementation == implementation
    assert same(generate(model, inputs), dense)
    gap_triton.detach(model)  # a second time does nothing


def test_detach_of_a_model_loaded_by_name_leaves_dense_attention() -> None:
    plain = build("llava", "sdpa")
    inputs = make_prompt("llava", "left-padded")
    model = build("llava", "gap_triton")
    assert hooks(model) > 0
    assert hooks(plain) == 0
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert attributes(model) == attributes(plain)
    assert same(generate(model, inputs), generate(plain, inputs))


def test_switching_the_text_model_alone() -> None:
    model = build("llava", "gap_triton")
    inputs = make_prompt("llava", "left-padded")
    model.model.language_model.set_attn_implementation("sdpa")
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="does not run under"):
        gap_triton.configure(model, CONFIG)
    gap_triton.attach(model, CONFIG)
    generate(model, inputs, tokens=1)
    assert gap_triton.last_selection(model) is not None
    gap_triton.detach(model)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_name_given_after_attach_stays() -> None:
    model = build("llava", "sdpa")
    gap_triton.attach(model, CONFIG)
    model.set_attn_implementation("gap_triton")
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert model.config._attn_implementation == "gap_triton"
    assert model.config.text_config._attn_implementation == "gap_triton"


def test_switching_away_leaves_nothing() -> None:
    model = build("llava", "gap_triton")
    model.set_attn_implementation("sdpa")
    assert hooks(model) == 0
    assert attributes(model) == attributes(build("llava", "sdpa"))


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_the_configuration_comes_back_with_the_name(part: str) -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava", "gap_triton")
    default = generate(model, inputs)
    gap_triton.configure(model, CONFIG)
    pruned = generate(model, inputs)
    assert error(pruned, default) > 1e-2
    switched = model if part == "model" else model.model.language_model
    switched.set_attn_implementation("sdpa")
    assert hooks(model) == 0
    model.set_attn_implementation("gap_triton")
    assert same(generate(model, inputs), pruned)
    gap_triton.attach(
        model, GapConfig()
    )  # a configuration that is given is taken, and the one before forgotten
    switched.set_attn_implementation("sdpa")
    model.set_attn_implementation("gap_triton")
    assert same(generate(model, inputs), default)


def test_a_model_that_is_detached_forgets_its_configuration() -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava", "gap_triton")
    default = generate(model, inputs)
    gap_triton.configure(model, CONFIG)
    model.set_attn_implementation("sdpa")
    gap_triton.detach(model)
    model.set_attn_implementation("gap_triton")
    assert same(generate(model, inputs), default)
    with gap_triton.pruning(model, CONFIG):
        pass
    gap_triton.detach(model)
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("gap_triton")
    assert same(generate(model, inputs), default)


def test_pruning_is_scoped() -> None:
    model = build("llava", "sdpa")
    inputs = make_prompt("llava", "left-padded")
    dense = generate(model, inputs)
    with gap_triton.pruning(model, CONFIG) as same_model:
        assert same_model is model
        assert error(generate(model, inputs), dense) > 1e-2
        with gap_triton.pruning(model, GapConfig(keep=1.0)):
            assert same(generate(model, inputs), dense)
        assert error(generate(model, inputs), dense) > 1e-2
    assert hooks(model) == 0
    assert same(generate(model, inputs), dense)
    with pytest.raises(KeyError), gap_triton.pruning(model, CONFIG):
        raise KeyError
    assert hooks(model) == 0


def test_save_pretrained_writes_nothing_of_ours(tmp_path, saved: dict[str, str]) -> None:
    configs = {}
    for name in ("gap_triton", "sdpa"):
        model = AutoModelForImageTextToText.from_pretrained(saved["llava"], attn_implementation=name)
        generate(model, make_prompt("llava", "left-padded"))
        model.save_pretrained(tmp_path / name)
        configs[name] = {file.name: file.read_text() for file in (tmp_path / name).glob("*.json")}
    assert configs["gap_triton"] == configs["sdpa"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_is_independent(duplicate) -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava", "gap_triton")
    gap_triton.configure(model, CONFIG)
    twin = duplicate(
        model
    )  # before the first forward: transformers then adds a hook of its own that can't be pickled
    pruned = generate(model, inputs)
    assert same(generate(twin, inputs), pruned)
    gap_triton.detach(twin)
    assert hooks(twin) == 0
    assert hooks(model) > 0
    assert same(generate(model, inputs), pruned)


def test_training_mode_is_dense_and_says_so(warnings: pytest.LogCaptureFixture) -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava", "gap_triton").train()
    dense = build("llava", "sdpa").train()
    assert torch.equal(model(**inputs).logits, dense(**inputs).logits)
    assert "prunes at inference only" in warnings.text


def test_an_unattached_decoder_under_the_name_says_that_it_is_dense(
    warnings: pytest.LogCaptureFixture,
) -> None:
    model = build("llava", "gap_triton")
    gap_triton.detach(model)
    model(torch.tensor([[1, 5, 6]]))
    assert "no pruning attached" in warnings.text


def test_model_configured_before_it_is_attached() -> None:
    with pytest.raises(
        ValueError, match=r'does not run under "gap_triton": load it with attn_implementation'
    ):
        gap_triton.configure(build("llava", "sdpa"), CONFIG)
