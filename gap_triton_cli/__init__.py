"""The command line: ``gap-triton demo | run | methods | eval | bench | info``.

It is a package of its own because ``import gap_triton`` imports torch and transformers, which takes seconds. Here they are
imported by the commands that need them, so help and refusals come at once.
"""

from .app import app

__all__ = ["app"]
