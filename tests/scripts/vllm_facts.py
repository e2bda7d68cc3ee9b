"""Check in the sources of a vLLM what the plug-in relies on: ``python vllm_facts.py FOLDER``, which has the package in it.

It runs nothing of vLLM, so it also tells of versions that can't be installed here. What it can't see is what code does.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUG_IN = ROOT / "gap_triton" / "vllm"
MODELS = "vllm.model_executor.models"
RUNNER = "vllm.v1.worker.gpu_model_runner"

# Methods that the plug-in replaces, or calls by these names of arguments.
ENCODE = ("embed_multimodal", "kwargs")
NUMBER = ("get_mrope_input_positions", "input_tokens", "mm_features")
DECODE = ("forward", "input_ids", "positions", "intermediate_tensors", "inputs_embeds")
PROCESS = (
    ("apply", "inputs"),
    ("get_dummy_inputs",),
    ("_get_mm_hashes", "inputs"),
    ("_apply_hf_processor_main", "mm_items", "hf_kwargs"),
    ("_get_mm_fields_config", "hf_inputs", "hf_processor_mm_kwargs"),
    ("_get_prompt_updates", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
)
LLAVAS = {
    "llava": ("LlavaForConditionalGeneration", "LlavaMultiModalProcessor"),
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaNextMultiModalProcessor"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionMultiModalProcessor"),
}
QWENS = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLMultiModalProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLMultiModalProcessor"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLMultiModalProcessor"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3VLMultiModalProcessor"),
}
PACK = ("_merge_image_patch_embeddings", "image_size", "patch_embeddings", "strategy")
ATTENTION = "vllm.model_executor.layers.attention.mm_encoder_attention.MMEncoderAttention"
METHODS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *(
        (f"{MODELS}.{module}.{model}", method)
        for module, (model, _) in (LLAVAS | QWENS).items()
        for method in (ENCODE, DECODE)
    ),
    *((f"{MODELS}.{module}.{model}", NUMBER) for module, (model, _) in QWENS.items()),
    *(
        (f"{MODELS}.{module}.{processor}", method)
        for module, (_, processor) in (LLAVAS | QWENS).items()
        for method in PROCESS
    ),
    (f"{MODELS}.llava_next.LlavaNextForConditionalGeneration", PACK),
    (f"{MODELS}.llava_onevision.LlavaOnevisionForConditionalGeneration", (*PACK, "image_newline")),
    (f"{MODELS}.llava.LlavaProcessingInfo", ("get_max_image_tokens",)),
    (f"{MODELS}.llava_onevision.LlavaOnevisionProcessingInfo", ("get_supported_mm_limits",)),
    (
        f"{MODELS}.llava_onevision.LlavaOnevisionProcessingInfo",
        ("validate_num_items", "modality", "num_items"),
    ),
    (f"{MODELS}.config.VerifyAndUpdateConfig", ("verify_and_update_config", "vllm_config")),
    (f"{MODELS}.config.VerifyAndUpdateConfig", ("verify_and_update_model_config", "model_config")),
    (f"{MODELS}.registry._ModelRegistry", ("register_model", "model_arch", "model_cls")),
    ("vllm.multimodal.inputs.MultiModalFieldConfig", ("batched", "modality", "keep_on_cpu")),
    ("vllm.multimodal.inputs.PlaceholderRange", ("get_embeds_indices_in_range",)),
    *(
        (ATTENTION, (f"forward_{device}", "query", "key", "value", "cu_seqlens"))
        for device in ("cpu", "cuda", "native")
    ),
    ("vllm.config.multimodal.MultiModalConfig", ("is_multimodal_pruning_enabled",)),
)

# What code that the plug-in fits into says, without regard to white space.
SAYS: dict[str, tuple[str, ...]] = {
    RUNNER: (
        # The runner asks after each gathering, by these names, and writes into its own tensor.
        "if self.is_multimodal_pruning_enabled and self.uses_mrope:",
        "self.model.recompute_mrope_positions( input_ids=req_state.prompt_token_ids, "
        "multimodal_embeddings=mm_embeds_req, mrope_positions=req_state.mrope_positions, "
        "num_computed_tokens=req_state.num_computed_tokens, )",
        "req_state.mrope_positions.copy_(new_mrope_positions)",
        "supports_multimodal_pruning(self.get_model()) and mm_config is not None and "
        "mm_config.is_multimodal_pruning_enabled()",
        "encoder_output[curr_embeds_start:curr_embeds_end]",
    ),
    "vllm.v1.core.encoder_cache_manager": ("scheduler_config.max_num_encoder_input_tokens",),
    "vllm.v1.core.sched.scheduler": ("self.max_num_encoder_input_tokens",),
    "vllm.config.vllm": ("envs.VLLM_USE_V2_MODEL_RUNNER", "def use_v2_model_runner"),
    "vllm.transformers_utils.config": ('"mrope_section"',),
    ATTENTION.rpartition(".")[0]: ("self.num_heads", "self.num_kv_heads", "self.scale"),
    f"{MODELS}.clip": ("attn_cls=MMEncoderAttention", "self.attn = attn_cls(", "self.vision_model = "),
    f"{MODELS}.siglip": ("attn_cls=MMEncoderAttention", "self.attn = attn_cls(", "self.vision_model = "),
    f"{MODELS}.qwen2_vl": ("self.attn = MMEncoderAttention(", "self.norm1(x)", "self.ln_q(x)"),
    f"{MODELS}.qwen2_5_vl": (
        "hidden_states[window_index, :, :]",
        "if layer_num in self.fullatt_block_indexes:",
        "self.norm1(x)",
        "self.ln_q(x)",
    ),
    f"{MODELS}.qwen3_vl": (
        "self.attn = Qwen2_5_VisionAttention(",
        "self.norm1(x)",
        "self.norm(x)",
        "PromptUpdateDetails.select_token_id(",
    ),
    "vllm.multimodal.processing.processor": ("class PromptUpdateDetails: ", "is_embed: Callable"),
    # What refusals look at.
    "vllm.config.multimodal": ("mm_encoder_tp_mode:", "video_pruning_rate:", "enable_mm_embeds:"),
    "vllm.config.compilation": ("cudagraph_mm_encoder:", "compile_mm_encoder:"),
    "vllm.config.model": ("enable_prompt_embeds:", "def architecture("),
    "vllm.config.parallel": (
        "data_parallel_size:",
        "prefill_context_parallel_size:",
        "decode_context_parallel_size:",
    ),
}


class Sources:
    """The Python sources below ``folder``, which are read and not run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = cache(self._tree)

    def path(self, module: str) -> Path:
        """Where ``module`` is, or would be."""
        path = self.folder.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return ast.parse(path.read_text(encoding="utf-8")) if path.exists() else None

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines ``name`` of ``module``, and its definition; None where there is none."""
        tree = self.tree(module)
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return module, node
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    origin = self._origin(module, node)
                    if (alias.asname or alias.name) == name:
                        return self.find(origin, alias.name)
                    if alias.name == "*" and (found := self.find(origin, name)) is not None:
                        return found
        return self._lazy(module, tree, name)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        up = node.level - (self.path(module).name == "__init__.py")
        return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])

    def _lazy(self, module: str, tree: ast.Module, name: str) -> tuple[str, ast.AST] | None:
        """Names that a package imports when they are asked for: ``"LLM": ".entrypoints.llm:LLM"``."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = re.fullmatch(r"\.([\w.]+):" + name, node.value)
                if match:
                    return self.find(f"{module}.{match[1]}", name)
        return None

    def method(self, module: str, owner: str, name: str) -> ast.FunctionDef | None:
        """Method ``name`` of a class or of what it inherits from."""
        found = self.find(module, owner)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        where, class_ = found
        for node in class_.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        for base in class_.bases:
            parent = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(parent, ast.Name):
                inherited = self.method(where, parent.id, name)
                if inherited is not None:
                    return inherited
        return None


def imported() -> Iterator[tuple[str, str]]:
    """What the plug-in imports of vLLM: module and name."""
    for path in sorted(PLUG_IN.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("vllm"):
                yield from ((node.module or "", alias.name) for alias in node.names)


def missing(folder: Path) -> list[str]:
    """Return a line for each thing that the plug-in relies on and that isn't so in the vLLM in ``folder``."""
    sources, found = Sources(folder), []
    for module, name in sorted(set(imported())):
        if sources.find(module, name) is None:
            found.append(f"{module} has no {name}")
    for path, (name, *parameters) in METHODS:
        module, _, owner = path.rpartition(".")
        method = sources.method(module, owner, name)
        if method is None:
            found.append(f"{path} has no method {name}")
            continue
        rest = [each.arg for each in (method.args.vararg, method.args.kwarg) if each is not None]
        known = [each.arg for each in (*method.args.args, *method.args.kwonlyargs)] + rest
        found += [f"{path}.{name} takes no {each}" for each in parameters if each not in known]
    for module, sentences in SAYS.items():
        file = sources.path(module)
        text = " ".join(file.read_text(encoding="utf-8").split()) if file.exists() else ""
        found += [
            f"{module} doesn't say {each!r}" for each in sentences if " ".join(each.split()) not in text
        ]
    return found


if __name__ == "__main__":
    lines = missing(Path(sys.argv[1]))
    print("\n".join(lines) or "all of it is so")
    sys.exit(bool(lines))
