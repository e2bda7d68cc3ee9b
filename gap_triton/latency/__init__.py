"""What pruning costs and saves on this machine, for ``gap-triton bench``.

Four variants of one model run in turn in one process, on shared weights: ``sdpa`` without pruning, ``attached``, which
keeps everything, ``pruned``, and ``oracle``, which is handed the surviving rows and knows nothing of hooks. `graphs` adds
CUDA graphs of three of them, and `rivals` other packages.
"""

from .counting import Counts, count
from .measure import Measurement, measure
from .oracle import Oracle
from .subjects import SHAPES, Subject, random_subject
from .variants import Variant, variants_of

__all__ = [
    "SHAPES",
    "Counts",
    "Measurement",
    "Oracle",
    "Subject",
    "Variant",
    "count",
    "measure",
    "random_subject",
    "variants_of",
]
