"""C++ kernels for a CPU, built for a dtype on first use as Inductor builds its own.

Nothing needs to be installed beyond what ``torch.compile`` needs on a CPU, and libraries are kept in Inductor's cache
directory.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hwbp_compiler.errors import first_line

log = logging.getLogger("hwbp_compiler")

Kernel = Callable[..., Any]


class NativeKernel:
    """One source file, which calls the dtype ``HIGHWAY_TYPE``.

    source   the file
    before   files whose text goes before its own
    types    what it calls each dtype that it serves; one is built at a time: a second or two instead of ten
    taken    takes the function out of the library that was built
    without  what is logged, once for each reason and at ``level``, where it cannot be built
    """

    def __init__(
        self,
        source: Path,
        types: Mapping[torch.dtype, str],
        taken: Callable[[Any], Kernel],
        without: str,
        level: int = logging.WARNING,
        before: Sequence[Path] = (),
    ) -> None:
        self.source, self.before, self.types, self.taken = source, before, types, taken
        self.without, self.level = without, level
        self.forget()

    def forget(self) -> None:
        """Build anew at the next use, and log again what is missing."""
        self._loaded: dict[torch.dtype, Kernel | None] = {}
        self._logged: set[str] = set()

    def load(self, dtype: torch.dtype) -> Kernel | None:
        """The kernel for ``dtype``; None where it does not serve it, or cannot be built."""
        if dtype not in self._loaded:
            self._loaded[dtype] = self._try_to_build(dtype) if dtype in self.types else None
        return self._loaded[dtype]

    def _try_to_build(self, dtype: torch.dtype) -> Kernel | None:
        try:
            return self.build(dtype)
        except Exception as error:  # whatever a missing or broken compiler raises
            reason = first_line(error)
            if reason not in self._logged:
                self._logged.add(reason)
                log.log(self.level, "%s: %s", self.without, reason)
                log.debug("building %s failed", self.source.name, exc_info=True)
            return None

    def build(self, dtype: torch.dtype) -> Kernel:
        # CppCodeCache compiles with the compiler and flags of Inductor's CPU kernels, under a lock, into Inductor's
        # cache directory, and returns a ctypes library.
        from hwbp_compiler.torch_private import CppCodeCache

        # Inductor switches fused multiply-add off to match eager mode; ours have nothing to match. Their loops are
        # written out in vectors, and -O3 finds nothing more in them for half as much compile time again.
        flags = () if sys.platform == "win32" else ("-O2", "-ffp-contract=fast")
        parts = [f"#define HIGHWAY_TYPE {self.types[dtype]}", *(f.read_text() for f in (*self.before, self.source))]
        return self.taken(CppCodeCache.load("\n".join(parts), extra_flags=flags))
