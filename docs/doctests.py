"""An extension of griffe: examples in docstrings, which are doctests, as blocks of code."""

import re
from typing import Any

from griffe import Extension, Module, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)


class Doctests(Extension):
    """Puts a fence around each doctest; Markdown would read it as a quotation."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring and not obj.is_module:
            obj.docstring.value = EXAMPLE.sub("```python\n\\g<0>\n```", obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        if pkg.docstring:
            pkg.docstring.value = EXAMPLE.sub("```python\n\\g<0>\n```", pkg.docstring.value)
