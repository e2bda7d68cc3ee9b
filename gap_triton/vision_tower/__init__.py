"""The vision tower: which module it is, and hooks that record what it computes. It knows nothing of pruning."""

from .finding import Tower, find_tower
from .hooks import TowerRecorder, check_needs, encoder_outputs, install, record_sizes
from .recording import Encoded, Need, Needs, TowerOutput

__all__ = [
    "Encoded",
    "Need",
    "Needs",
    "Tower",
    "TowerOutput",
    "TowerRecorder",
    "check_needs",
    "encoder_outputs",
    "find_tower",
    "install",
    "record_sizes",
]
