"""C++ kernels for CPUs, built per dtype on first use in the way Inductor builds its own.

They need nothing beyond what ``torch.compile`` needs on a CPU. The libraries are stored in Inductor's cache directory.
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
    """One source file, which uses ``HIGHWAY_TYPE`` as its dtype.

    source   the file
    before   files whose text is put in front
    types    the C++ name of each supported dtype; one is built at a time, in a second or two instead of ten
    taken    extracts the function from the built library
    without  the message logged, once per reason and at ``level``, if the kernel cannot be built
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
        """Build again at the next use, and log again what is missing."""
        self._loaded: dict[torch.dtype, Kernel | None] = {}
        self._logged: set[str] = set()

    def load(self, dtype: torch.dtype) -> Kernel | None:
        """The kernel for ``dtype``; None if the dtype is not supported or the kernel cannot be built."""
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
        parts = [f"#define HIGHWAY_TYPE {self.types[dtype]}", *(f.read_text() for f in (*self.before, self.source))]
        return self.taken(build("\n".join(parts)))


def build(source: str) -> Any:
    """The ctypes library of C++ source text.

    CppCodeCache compiles with the compiler and flags of Inductor's CPU kernels, under a lock, into Inductor's cache
    directory.

    Raises:
        Exception: whatever a missing or broken compiler raises.
    """
    from hwbp_compiler.torch_private import CppCodeCache

    # Inductor turns fused multiply-add off to match eager mode; our kernels have nothing to match. Their loops are
    # already vectorised, so -O3 gains nothing and takes half as much compile time again.
    flags = () if sys.platform == "win32" else ("-O2", "-ffp-contract=fast")
    return CppCodeCache.load(source, extra_flags=flags)
