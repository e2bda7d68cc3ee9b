"""What a pruned decoder returns, put back to the rows of its input, with zeros at the dropped ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gap_kernels import scatter_rows

from ..state import DecoderRun, Prefill

# Fields of a decoder's output whose shape does not depend on the tokens of this forward.
NOT_BY_TOKEN = ("cache", "past_key_values", "attentions", "rope_deltas")


def refuse_router_logits(run: DecoderRun, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the decoder is to return its router's logits of every token."""
    name = "output_router_logits"
    if kwargs.get(name, getattr(run.attachment.text.config, name, False)):
        raise ValueError(
            f"{name}=True: later layers route fewer tokens than this prompt has, and a load-balancing loss over all of them "
            f"is not defined. Set it to False, in the call and in the config of the text model, or use keep=1.0"
        )


def restore_rows(run: DecoderRun, prefill: Prefill, output: Any) -> Any:
    """Return a decoder's output with all hidden states in the rows of its input.

    Args:
        run: The run of the decoder.
        prefill: Its prompt, all stages of which have dropped.
        output: A tuple or a `ModelOutput`, hidden states of the last layer first, [B, L, C].

    Raises:
        ValueError: Something else in it has one entry for each token that is left.
    """
    last = output[0]
    full = _restore(prefill, last, prefill.done)
    layers = len(run.attachment.text.layers)

    def restored(value: Any) -> Any:
        if not isinstance(value, (tuple, list)) or len(value) != layers + 1:
            return value
        states = [_hidden_states_before(prefill, index, entry) for index, entry in enumerate(value)]
        # The last entry is the last hidden state, after the final norm.
        return (*states[:-1], full if value[-1] is last else states[-1])

    if isinstance(output, tuple):
        return (full, *map(restored, output[1:]))
    for name, value in output.items():
        if name == "hidden_states":
            output[name] = restored(value)
        elif name != "last_hidden_state" and name not in NOT_BY_TOKEN:
            _refuse_short_output(run, prefill, name, value)
    output["last_hidden_state"] = full
    return output


def _hidden_states_before(prefill: Prefill, index: int, entry: torch.Tensor | None) -> torch.Tensor | None:
    """The hidden states that enter layer ``index``, as the layer before it put them out."""
    if entry is None:  # not asked for
        return None
    if index == 0:
        return entry if prefill.embeds is None else prefill.embeds
    return _restore(prefill, entry, sum(drop.first_later < index for drop in prefill.drops))


def _restore(prefill: Prefill, short: torch.Tensor, stages: int) -> torch.Tensor:
    """``short`` [B, L, C], what is left after the first ``stages`` stages, as [B, Q, C]."""
    if not stages:
        return short
    queries = prefill.prompt.visual.shape[1]
    survivors = prefill.survivors[stages - 1]
    return scatter_rows(short, survivors.order.to(short.device), queries)


def _refuse_short_output(run: DecoderRun, prefill: Prefill, name: str, value: Any) -> None:
    batch = run.rows.batch
    lengths = {drop.length for drop in prefill.drops} - {run.rows.queries}
    for tensor in _tensors_in(value):
        by_token = tensor.dim() >= 2 and tensor.shape[0] == batch and tensor.shape[1] in lengths
        if by_token or tensor.shape[:1] in [(batch * length,) for length in lengths]:
            raise ValueError(
                f"{name}: later layers return it for fewer tokens than this prompt has, and what belongs to which is not "
                "known: do without it, or use keep=1.0"
            )


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors_in(each)
