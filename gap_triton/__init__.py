"""Visual token pruning for vision-language models that keeps every survivor's own position id.

Importing this package registers ``attn_implementation="gap_triton"`` with transformers.
"""

from ._requirements import check_versions

check_versions()

from .config import RECOMMENDED, GapConfig, Stage  # noqa: E402
from .integration.attach import (  # noqa: E402
    attach,
    configure,
    detach,
    follow_attention_name,
    last_selection,
    let_calls_keep_their_configuration,
    let_generate_count_generated_tokens,
    let_generate_take_visual_mask,
    pruning,
    refuse_continuous_batching,
)
from .integration.attention import register  # noqa: E402
from .integration.prepare import prepare  # noqa: E402
from .integration.static_cache import static_cache  # noqa: E402
from .kv_cache.cache_methods import follow_cache_methods  # noqa: E402
from .selection import Selection  # noqa: E402
from .visual_prompt import VisualPrompt  # noqa: E402

register()
follow_attention_name()
follow_cache_methods()
let_generate_take_visual_mask()
let_calls_keep_their_configuration()
refuse_continuous_batching()
let_generate_count_generated_tokens()

__version__ = "0.1.0"

__all__ = [
    "RECOMMENDED",
    "GapConfig",
    "Selection",
    "Stage",
    "VisualPrompt",
    "attach",
    "configure",
    "detach",
    "last_selection",
    "prepare",
    "pruning",
    "static_cache",
]
