"""What the decoder is given for a prompt: noted, or replaced."""

from __future__ import annotations

import torch

from .oracle import core_of


def embeds_of_prompt(model: torch.nn.Module, seen: list[torch.Tensor]):
    """A hook behind all others that notes what the decoder is given for the prompt."""

    def note(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["inputs_embeds"])

    return core_of(model)[1].register_forward_pre_hook(note, with_kwargs=True)


def with_embeds(model: torch.nn.Module, *embeds: torch.Tensor):
    """A hook that gives the decoder ``embeds``, one for each prompt that comes."""
    coming = iter(embeds)

    def give(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            return args, {**kwargs, "inputs_embeds": next(coming)}
        return None

    return core_of(model)[1].register_forward_pre_hook(give, with_kwargs=True)
