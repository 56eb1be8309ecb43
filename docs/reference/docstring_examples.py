"""For mkdocstrings: the section that docstrings call ``Example`` is what Griffe calls ``Examples``."""

import re
from typing import Any

import griffe


class DocstringExamples(griffe.Extension):
    """Renames the section, so that it is shown as code that was run and not as a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
