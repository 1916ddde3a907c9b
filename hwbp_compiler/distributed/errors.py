"""Errors of training on several processes. Each message gives the rank, the reason, and what to do."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from hwbp_compiler.errors import HighwayError, OptionError
from hwbp_compiler.options import Options


class RankError(HighwayError):
    """A rank failed, or differs from the others. Every rank that is still running raises it."""


class StageError(HighwayError, ValueError):
    """The stage or module cannot be run in this way."""


def checked(where: str, **values: Any) -> Options:
    """Check ``iterations``, ``damping`` and ``segment`` as :class:`Options` does. "auto" is not supported yet."""
    for key, value in values.items():
        if isinstance(value, str) and value == "auto":
            refuse(where, key, value, "a number" + (' or "exact"' if key == "iterations" else ""))
    try:
        return Options(**values)
    except OptionError as error:
        text = str(error).replace('backend="highway": option', f"{where}: option")
        text = text.replace(', "exact" (ordinary backprop) or "auto"', ' or "exact" (ordinary backprop)')
        text = re.sub(r"options=\{'(\w+)': 'auto'\}", lambda found: f"{found[1]}={_EXAMPLES[found[1]]}", text)
        raise OptionError(text.replace(' or "auto"', "").replace("leave the key out", "leave it out")) from None


_EXAMPLES = {"iterations": 4, "damping": 0.1}


def refuse(where: str, key: str, value: Any, allowed: str) -> NoReturn:
    raise OptionError(
        f"{where}: option {key!r} = {value!r} ({type(value).__name__}) is not allowed; it takes {allowed}. "
        f"Pass such a value, or leave {key!r} out."
    )
