"""What an object computes when it is first asked for, and remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Memo:
    """An object that remembers what it has computed.

    `functools.cached_property` holds a lock in Python 3.11 and before, which ``torch.compile`` can't trace.

    Attributes:
        memo: What it has computed, by name.
    """

    memo: dict[Any, Any] = field(default_factory=dict, init=False)

    def compute_once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the value of ``make()``, computed when it is first asked for."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]
