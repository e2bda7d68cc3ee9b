"""What attaching leaves on a model: hooks of ours, and attributes of its modules."""

from __future__ import annotations

import torch

from gap_triton.integration.layer_calls import carries
from gap_triton.integration.own_class import BASE


def hooks(model: torch.nn.Module) -> int:
    """Number of our hooks on ``model``, and of modules of a class of ours; transformers has hooks of its own."""
    found = [
        hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    ]
    layers = sum(carries(module) or hasattr(type(module), BASE) for module in model.modules())
    return layers + sum(getattr(hook, "func", hook).__module__.startswith("gap_triton") for hook in found)


def attributes(model: torch.nn.Module) -> dict[str, list[str]]:
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}
