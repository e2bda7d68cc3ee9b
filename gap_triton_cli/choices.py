"""What options may be, as the help says it; the same as in `gap_triton`, which is too slow to import for that."""

from __future__ import annotations

from typing import Literal

Score = Literal[
    "last_token",
    "text",
    "raters",
    "raters_corrected",
    "unrotated",
    "key_norm",
    "cls",
    "received",
    "text_similarity",
    "random",
    "spatial",
]
Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOrSaved = Literal["float32", "bfloat16", "float16", "auto"]
Ids = Literal["kept", "compacted", "permuted", "reordered", "stretched"]
Split = Literal["development", "choice", "report", "sealed"]

# The defaults of `GapConfig`.
KEEP = 0.5
LAYER = 2
SCORE: Score = "text"

# The embedded models.
ARCHITECTURES = ("llava", "qwen2_5_vl")

# Data sets of `gap-triton eval --dataset`.
SYNTHETIC, VQA = "synthetic", "vqa"
Dataset = Literal["refcoco", "refcoco+", "refcocog", "vqa", "synthetic"]
