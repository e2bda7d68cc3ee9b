"""Whether vLLM's model runner asks a model for the ids of what it encoded.

The runner asks models that prune, and it takes that from the rate at which *videos* are pruned, where ``0`` means "no". A
rate above 0 would prune videos. So the question is answered on the configuration of this one engine.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.platforms import current_platform


def let_the_runner_ask(vllm_config: VllmConfig) -> None:
    """Make the runner of this engine ask; to be called while the runner loads its model, before it has looked."""
    config: Any = vllm_config.model_config.multimodal_config
    object.__setattr__(config, "is_multimodal_pruning_enabled", _yes)
    if current_platform.is_cpu():
        _let_the_cpu_runner_look()


def _yes() -> bool:
    return True


def _let_the_cpu_runner_look() -> None:
    """Compute what ``CPUModelRunner.load_model`` leaves out of ``GPUModelRunner.load_model``, whose place it takes."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # imports what only a CPU build has

    def is_enabled(runner: Any) -> bool:
        model, config = getattr(runner, "model", None), runner.model_config.multimodal_config
        return (
            config is not None
            and model is not None
            and supports_multimodal_pruning(model)
            and config.is_multimodal_pruning_enabled()
        )

    def ignore(runner: Any, value: bool) -> None:
        """Its ``__init__`` says False, before there is a model."""

    CPUModelRunner.is_multimodal_pruning_enabled = property(is_enabled, ignore)
