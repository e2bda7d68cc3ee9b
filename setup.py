"""Packaging of gap-triton; pyproject.toml says everything but the text for the page of an index."""

import re
from pathlib import Path

from setuptools import setup


def for_an_index(readme: str) -> str:
    """``readme`` as it can be read without a checkout: its pictures and the links to its files become their words."""
    away = r"\((?!https?://|#)[^)]*\)"
    readme = re.sub(r"!\[([^]]*)]" + away, r"*Picture in the repository: \1.*", readme)
    return re.sub(r"\[([^]]*)]" + away, r"\1", readme)


setup(
    long_description=for_an_index((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
