"""The vision tower: which module it is, and hooks that record what it computes. Knows nothing of pruning."""

from .finding import Tower, find_tower
from .hooks import TowerWatch, check_needs, encoded_ahead, install, note_sizes
from .recording import Need, Needs, TowerOutput

__all__ = [
    "Need",
    "Needs",
    "Tower",
    "TowerOutput",
    "TowerWatch",
    "check_needs",
    "encoded_ahead",
    "find_tower",
    "install",
    "note_sizes",
]
