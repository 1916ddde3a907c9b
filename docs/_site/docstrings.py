"""Docstrings as Markdown: roles such as ``:func:`explain``` become code, and doctests become blocks of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|data|attr|exc|obj):`~?\.*([^`]+)`")
_DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n[ \t]*\S.*)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"\s*::$", ":", text, flags=re.MULTILINE)  # the block that follows is indented
    return _DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
