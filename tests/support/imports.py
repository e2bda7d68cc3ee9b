"""What a file imports, read from its source."""

from __future__ import annotations

import ast


def imported(source: str) -> set[str]:
    """Every part of every name that ``source`` imports, inside of functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= set(node.module.split("."))
    return names
