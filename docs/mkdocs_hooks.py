"""What MkDocs calls while it builds the site: links to files outside of the documents become their words and a path."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^]]*)]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **page: Any) -> str:
    """Return ``markdown`` as it can be read without a checkout."""
    return OUTSIDE.sub(lambda link: words_for(link[1], link[2]), markdown)


def words_for(words: str, path: str) -> str:
    """The words of a link, and where in the repository it leads, where they don't say so."""
    if words.strip("`") in (path, path.rsplit("/", 1)[-1]):
        return f"`{path}`"
    return f"{words} (`{path}`)"
