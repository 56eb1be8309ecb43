"""For MkDocs: links of notebooks to other pages, which mkdocs-jupyter leaves as they are."""

import re
from typing import Any


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Point links to ``.md`` and ``.ipynb`` at the pages that are made of them."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="([^":]+)\.(?:md|ipynb)(#[^"]*)?"', r'href="\1.html\2"', html)
