"""One hash over the package's source. It is part of every key under which torch.compile caches our work."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from . import passes

SOURCE_SUFFIXES = {".py", ".cpp", ".h"}


@functools.cache
def source_digest() -> str:
    """A hash over the names and contents of all source files of the package, computed once per process.

    Compiled graphs outlive the process in torch.compile's caches. A cached graph is used without running a pass, so the
    key must cover everything the passes do.
    """
    # In a checkout passes/ lies beside the package, in a wheel inside it. Both give the same names.
    found: dict[str, Path] = {}
    for roots, prefix in (([Path(__file__).parent], Path()), (passes.__path__, Path("passes"))):
        for root in roots:
            for path in Path(root).rglob("*"):
                if path.suffix in SOURCE_SUFFIXES:
                    found[(prefix / path.relative_to(root)).as_posix()] = path
    digest = hashlib.sha256()
    for name in sorted(found):
        content = found[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
