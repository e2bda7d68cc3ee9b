"""``--model gap_triton --model_args base=llava_hf,method=nuwa,budget=64,pretrained=...``: a model of lmms-eval, pruned."""

from __future__ import annotations

import functools
import inspect
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.utils import simple_parse_args_string
from transformers import AutoConfig

import gap_triton

from .. import GapConfig
from ..demo.architectures import LLAVA
from ..environment import default_device
from ..evaluation.boxes import BY_MODEL_TYPE, find_format
from .answers import Asked, remember

AXES = tuple(
    field.name for field in fields(GapConfig) if field.name != "then"
)  # stages are no value of an argument
OURS = ("base", "method", "budget", "format", *AXES)
# The model of lmms-eval for a type of transformers; others are named by base=.
BASES = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
}
EMBEDDED = "embedded"
# The embedded model has no chat template; lmms-eval's simple models put the image's token into the text themselves.
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


class Pruned(lmms):
    """Builds a model of lmms-eval, attaches to it, and gives it back in its own place; has no instances."""

    is_simple = False
    simple = False  # whether the base is to be lmms-eval's simple model where it has two

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """Return the model that ``base`` names, pruned.

        Args:
            arg_string: ``--model_args``: ``base`` (found by the type of the checkpoint where it is left out); ``method`` and
                ``budget``, or fields of `GapConfig`; ``format``, of `gap_triton.evaluation.boxes`; the rest is the base's.
            additional_config: Batch size and device, from lmms-eval.

        Raises:
            SystemExit: It can't be built or pruned. Lmms-eval goes on after any other exception, and ends with status 0.
        """
        with ending_the_run():
            arguments = simple_parse_args_string(arg_string)
            ours = {name: arguments.pop(name) for name in OURS if name in arguments}
            told = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return build({**arguments, **told}, ours, cls.simple)


class SimplePruned(Pruned):
    """The same for tasks of lmms-eval's simple kind, ``--force_simple``."""

    is_simple = True
    simple = True


def build(arguments: dict[str, Any], ours: dict[str, Any], simple: bool) -> lmms:
    """Return a model of lmms-eval, pruned.

    Args:
        arguments: Of the model of lmms-eval.
        ours: Those of `OURS`.
        simple: Whether to take its simple model where it has two.

    Raises:
        ValueError: No base is known for the checkpoint, or the model can't be pruned so.
    """
    if "pretrained" not in arguments:
        raise ValueError("pretrained is missing: expected pretrained=FOLDER_OR_HUB_ID among --model_args")
    embedded = arguments["pretrained"] == EMBEDDED
    if embedded:
        arguments["pretrained"] = str(LLAVA.folder)
    model_type = AutoConfig.from_pretrained(
        arguments["pretrained"], trust_remote_code=arguments.get("trust_remote_code", False)
    ).model_type
    base = ours.pop("base", None) or BASES.get(model_type)
    if base is None:
        raise ValueError(
            f"model_type={model_type!r}: no model of lmms-eval is known for it; name it, as in base=llava_hf"
        )
    name = ours.pop("format", None) or (EMBEDDED if embedded else None)
    config_of(ours, None)  # what is wrong for any model is refused before one is loaded
    model_class = get_model(base, force_simple=simple)
    lm = model_class(**with_device(model_class, arguments))
    config = config_of(ours, lm.model)
    gap_triton.attach(lm.model, config)
    end_the_run_on_errors(lm.model)
    processor: Any = getattr(lm, "processor", None) or getattr(lm, "_image_processor", None)
    if embedded:
        processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    if name is not None or model_type in BY_MODEL_TYPE:
        remember(Asked(find_format(name, model_type), getattr(processor, "image_processor", None)))
    print(f"gap_triton: {base} of lmms-eval, pruned with {config}", flush=True)
    return lm


def config_of(ours: dict[str, Any], model: Any) -> GapConfig:
    """Return what to prune, from ``method`` and ``budget``, or from fields of `GapConfig`.

    Raises:
        ValueError: They do not go together, or with the model.
    """
    method, budget = ours.get("method"), ours.get("budget")
    axes = {name: value for name, value in ours.items() if name in AXES}
    if method is None:
        if budget is not None:
            axes = {"keep": budget, **axes}
        return GapConfig(**axes)
    wrong = [name for name in axes if name not in ("ids", "seed")]
    if wrong:
        raise ValueError(f"{wrong[0]} is part of method={method}: leave it out, or method")
    options = {} if budget is None else {"budget": budget}
    return replace(GapConfig.preset(method, model=model, **options), **axes)


def with_device(model_class: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with a device, and with a device map where lmms-eval's own default is refused.

    Its ``device_map=""`` is refused by transformers 5; among several processes it is what makes lmms-eval give each its own
    GPU, so there it stays.
    """
    arguments = {"device": str(default_device()), **arguments}
    known = inspect.signature(model_class).parameters
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and "device_map" in known and known["device_map"].default == "":
        arguments.setdefault("device_map", arguments["device"])
    return arguments


@contextmanager
def ending_the_run() -> Iterator[None]:
    """Turn any exception inside into the end of the process, with status 1."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ValueError):  # a refusal says all that there is to say
            traceback.print_exc()
        raise SystemExit(f"gap_triton: {error}") from error


def end_the_run_on_errors(model: Any) -> None:
    """Let no error of ``generate`` become an answer.

    Lmms-eval's llava_hf catches every exception and answers "", which would read as an accuracy of 0.
    """
    generate = model.generate

    @functools.wraps(generate)
    def loud(*args: Any, **kwargs: Any) -> Any:
        with ending_the_run():
            return generate(*args, **kwargs)

    model.generate = loud
