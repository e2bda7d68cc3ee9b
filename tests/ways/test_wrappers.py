"""Models inside wrappers that run fine: every public function looks through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.comparison import TOLERANCE, error, same
from support.hooks import hooks
from support.lone import lone, merged
from support.prompts import make_prompt
from support.tiny import IMAGE, LAYERS, build, generate
from torch import nn

import gap_triton
from gap_triton import GapConfig

CONFIG = GapConfig(keep=0.4, layer=1)


class Adapters(nn.Module):
    """Laid out as PEFT does it: `base_model` is a tuner, whose `model` is the model of transformers."""

    class Tuner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.model(*args, **kwargs)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = self.Tuner(model)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: object, **kwargs: object) -> object:
        return self.base_model.model.generate(*args, **kwargs)


class Policy(nn.Module):
    """A module of one's own that holds a model and more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.act, self.vlm = nn.Linear(2, 2), model

    def forward(self, **kwargs: object) -> object:
        return self.vlm(**kwargs)


def peft(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("peft")
    return library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["q_proj"])).eval()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "like PEFT": Adapters,
    "PEFT": peft,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "twice": lambda model: nn.DataParallel(Adapters(model)),
    "policy": Policy,
}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """A module that `torch.compile` wrapped runs as it is: what is compiled is tested in test_ways_compile.py."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_public_function_looks_through(wrapper: str) -> None:
    inputs = make_prompt("llava", "left-padded")
    plain = build("llava", "sdpa")
    with torch.no_grad():
        dense = plain(**inputs).logits
        gap_triton.attach(plain, CONFIG)
        pruned = plain(**inputs).logits
        kept = gap_triton.last_selection(plain)
        everything = GapConfig(keep=1.0)

        model = build("llava", "sdpa")
        wrapped = WRAPPERS[wrapper](model)
        gap_triton.attach(wrapped, CONFIG)
        assert torch.equal(wrapped(**inputs).logits, pruned)
        assert torch.equal(gap_triton.last_selection(wrapped).index, kept.index)
        gap_triton.configure(wrapped, everything)
        assert torch.equal(wrapped(**inputs).logits, dense)
        with gap_triton.pruning(wrapped, CONFIG) as same_model:
            assert same_model is wrapped
            assert torch.equal(wrapped(**inputs).logits, pruned)
        assert torch.equal(wrapped(**inputs).logits, dense)
        gap_triton.configure(wrapped, CONFIG)
        assert torch.equal(wrapped(**inputs).logits, pruned)
        cache = gap_triton.static_cache(wrapped, 70)
        assert cache.layers[0].max_cache_len == 70
        assert GapConfig.preset("fastv", budget=8, model=wrapped) == GapConfig.preset(
            "fastv", budget=8, layers=LAYERS
        )
        gap_triton.detach(wrapped)
        assert hooks(model) == 0
        assert torch.equal(wrapped(**inputs).logits, dense)


@pytest.mark.parametrize("wrapper", ["like PEFT", "PEFT", "torch.compile"])
def test_generate_through_a_wrapper(wrapper: str) -> None:
    inputs = make_prompt("llava", "left-padded")
    plain, model = build("llava", "gap_triton"), build("llava", "gap_triton")
    gap_triton.configure(plain, CONFIG)
    wrapped = WRAPPERS[wrapper](model)
    gap_triton.configure(wrapped, CONFIG)
    found, expected = generate(wrapped, inputs), generate(plain, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert error(found, expected) <= TOLERANCE  # PEFT adds zeros, and rounds once more


def test_a_wrapped_decoder_alone() -> None:
    model = build("llava", "sdpa")
    inputs = make_prompt("llava", "left-padded")
    mask = inputs["input_ids"] == IMAGE
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    wrapped = Policy(model.model.language_model)
    gap_triton.attach(wrapped, CONFIG)
    with torch.no_grad():
        wrapped(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], visual_mask=mask)
    assert gap_triton.last_selection(wrapped).visual_index.shape == (2, 15)


def test_layers_that_are_wrapped_one_by_one() -> None:
    """As compiling layer by layer and checkpointing do it; before pruning is attached, or afterwards."""
    inputs = make_prompt("llava", "left-padded")
    plain = build("llava", "gap_triton")
    gap_triton.configure(plain, CONFIG)
    expected = generate(plain, inputs)
    for attached_first in (False, True):
        model = build("llava", "sdpa")
        if attached_first:
            gap_triton.attach(model, CONFIG)
        layers = model.model.language_model.layers
        for index in range(1, LAYERS):
            layers[index] = (
                torch.compile(layers[index], backend="eager") if index % 2 else Adapters.Tuner(layers[index])
            )
        if not attached_first:
            gap_triton.attach(model, CONFIG)
        assert same(generate(model, inputs), expected)
        gap_triton.detach(model)
        assert hooks(model) == 0


@pytest.mark.parametrize(
    "function", [gap_triton.attach, gap_triton.last_selection, lambda m: gap_triton.configure(m, CONFIG)]
)
def test_a_wrapper_around_several_models(function: Callable[[nn.Module], object]) -> None:
    both = nn.ModuleList([build("llava", "sdpa"), build("llava_next", "sdpa")])
    message = (
        "model=ModuleList: expected a transformers PreTrainedModel, or a wrapper around one, and it holds several: "
        "LlavaForConditionalGeneration, LlavaNextForConditionalGeneration"
    )
    with pytest.raises(ValueError, match=message):
        function(both)


def test_detach_of_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="model=str: expected a transformers PreTrainedModel"):
        gap_triton.detach("llava")


def replica(model: nn.Module) -> nn.Module:
    """A copy of ``model`` as DataParallel makes one for each GPU: other modules, the same hooks."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copied in copies.items():
        for name, child in module.named_children():
            setattr(copied, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.detach())
    return copies[model]


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_replicas_of_data_parallel(name: str) -> None:
    inputs = make_prompt("llava", "left-padded")
    model = build("llava", "sdpa")
    if name == "llama":
        model, inputs = lone(), merged("llama", inputs)
    for config in (CONFIG, GapConfig(keep=0.4, layer=-1, score="random")):
        gap_triton.attach(model, config)
        with torch.no_grad():
            expected = model(**inputs).logits  # first: transformers puts hooks of its own on what runs
            assert torch.equal(replica(model)(**inputs).logits, expected)
            assert gap_triton.last_selection(model).visual_index.shape == (2, 15)
