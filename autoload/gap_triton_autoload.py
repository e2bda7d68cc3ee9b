"""Makes ``attn_implementation="gap_triton"`` known in programs that do not import `gap_triton`.

`import torch` calls `follow_transformers` through the entry point ``torch.backends``, in every process where this is
installed. So it does as little as it can: it imports nothing until transformers is there.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULE = "transformers.modeling_utils"  # behind it, attention implementations can be registered
MODEL = re.compile(r"transformers\.models\.\w+\.modeling_\w+")  # no model is built before one of these


def follow_transformers() -> None:
    """Import `gap_triton` where transformers can load models, else look again behind the next of its files that matter."""
    module = sys.modules.get(MODULE)
    # Torch may be imported by that very module, which is there then, and not ready.
    if module is None or getattr(module.__spec__, "_initializing", False):
        sys.meta_path.insert(0, Behind())
    else:
        register()


def register() -> None:
    """Import `gap_triton`, which registers the name; the program goes on without it where that fails."""
    try:
        import gap_triton  # noqa: F401
    except Exception as error:
        warnings.warn(
            f"gap-triton-autoload: gap_triton can't be imported: {type(error).__name__}: {error}",
            stacklevel=2,
        )


class Behind(MetaPathFinder):
    """Finds a module once, as it would be found without this, and calls `follow_transformers` behind its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find `MODULE` or a file of a model, nothing else."""
        if fullname != MODULE and not MODEL.fullmatch(fullname):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            follow_transformers()
        else:
            spec.loader = ThenFollow(spec.loader)
        return spec


class ThenFollow(Loader):
    """Loads a module by its own loader, which it hands back, and calls `follow_transformers`."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the module's own loader make it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if module.__name__ == MODULE:
            register()  # it is ready, though Python does not say so yet
        else:
            follow_transformers()
