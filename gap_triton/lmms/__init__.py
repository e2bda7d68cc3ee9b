"""Plug-in for lmms-eval: ``--model gap_triton``, any of its models pruned, and RefCOCO tasks in a model's own format.

Lmms-eval finds it by the entry point ``lmms_eval.models`` and calls `manifests` as it is imported. Importing
`gap_triton` is enough for ``--model llava_hf --model_args attn_implementation=gap_triton`` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"  # for --include_path


def manifests() -> Any:
    """Return how lmms-eval is to find the model."""
    from lmms_eval.models.registry_v2 import ModelManifest  # lmms-eval calls this while it is imported itself

    return ModelManifest(
        model_id="gap_triton",
        # One class for each kind of tasks; both give a model of lmms-eval, which says itself of what kind it is.
        simple_class_path="gap_triton.lmms.model.SimplePruned",
        chat_class_path="gap_triton.lmms.model.Pruned",
    )
