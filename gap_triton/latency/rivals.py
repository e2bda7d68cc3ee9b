"""Other packages that prune, in the same run, where they are installed and can run.

None of them is needed, and none is installed with this package: one that is missing, that fails, or that drops nothing is
absent, with the reason. They choose other tokens than the oracle knows of, so their logits are held against nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kv_cache.kept_tokens import kept_tokens_of
from .subjects import Subject
from .variants import PRUNED, UNPRUNED, Variant, decoder_of, share

Prefilling = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Task:
    """What a rival is to do.

    Attributes:
        subject: The model and its inputs.
        dropped: How many rows of the prompt the pruned model's last layer lacks.
    """

    subject: Subject
    dropped: int


def _kvpress(model: Any, task: Task) -> Prefilling:
    """NVIDIA's kvpress: after each layer's attention, the share of its keys and values that we drop in the last layers.

    By the norm of the keys, which costs least of what it has. It drops text, too, and in all layers.
    """
    attention = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress
    finally:
        # The import wraps the attention of every model, for methods that mask head by head, which this one does not.
        for name, function in attention.items():
            ALL_ATTENTION_FUNCTIONS[name] = function
    press = kvpress.KnormPress(compression_ratio=task.dropped / task.subject.prompt_tokens)

    @contextmanager
    def prefilling() -> Iterator[None]:
        log = logging.getLogger("kvpress")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of models that it was not tested with, at every prefill
        try:
            with press(model):
                yield
        finally:
            log.setLevel(level)

    return prefilling


def _sparsevlm(model: Any, task: Task) -> Prefilling:
    """The package sparsevlm, which is not its authors': hooks of Qwen2.5-VL that look for attention weights."""
    import sparsevlm

    visual = task.subject.visual_tokens
    model.set_attn_implementation("eager")
    with contextlib.redirect_stdout(io.StringIO()):
        state = sparsevlm.apply_sparsevlm(model, n_vis=visual, min_keep=visual - task.dropped)

    @contextmanager
    def prefilling() -> Iterator[None]:
        sparsevlm.reset_n_vis(state, n_vis=visual)
        yield

    return prefilling


RIVALS: dict[str, Callable[[Any, Task], Prefilling]] = {"kvpress": _kvpress, "sparsevlm": _sparsevlm}


def rivals_of(subject: Subject, variants: dict[str, Variant]) -> tuple[list[Variant], dict[str, str]]:
    """Make a variant of each rival that runs, on a dynamic KV cache.

    Args:
        subject: The model and its inputs.
        variants: By name; ``"sdpa"`` and ``"pruned"`` have run.

    Returns:
        The variants, and why the others are absent, by name.
    """
    unpruned, pruned = variants[UNPRUNED], variants[PRUNED]
    kept = kept_tokens_of(pruned.cache, subject.batch)
    assert kept is not None  # `variants_of` refuses what drops nothing
    task = Task(subject, kept.stages[-1].dropped)
    made, absent = [], {}
    for name, adapt in RIVALS.items():
        try:
            variant = _variant(name, adapt, task, unpruned)
            rows = [layer.keys.shape[-2] for layer in variant.cache.layers if layer.is_initialized]
            variant.decode()
            if min(rows) < subject.prompt_tokens:
                made.append(variant)
            else:
                absent[name] = f"{_versions(name)} drops nothing of this prompt"
        except ImportError as error:
            absent[name] = f"not installed here ({error})"
        except Exception as error:  # another package's: whatever it raises must not end the run
            first = next(iter(str(error).splitlines()), "")
            absent[name] = f"{_versions(name)} fails: {type(error).__name__}: {first}"
    return made, absent


def _variant(name: str, adapt: Callable[[Any, Task], Prefilling], task: Task, unpruned: Variant) -> Variant:
    model = share(task.subject.model)
    text = decoder_of(model).config

    def make_cache() -> DynamicCache:
        return DynamicCache(config=text)

    made = Variant(name, model, unpruned.inputs, unpruned.next_ids, make_cache, adapt(model, task))
    made.prefill()
    return made


def _versions(name: str) -> str:
    try:
        version = f" {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        version = ""  # it is a folder on the path
    return f"{name}{version} with transformers {transformers.__version__}"
