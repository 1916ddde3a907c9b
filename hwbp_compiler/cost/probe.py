"""Figures that were measured on a device, on disk beside Inductor's caches.

``python -m hwbp_compiler doctor --probe`` measures them (:mod:`hwbp_compiler.measure_device`). A compilation never
does: without a file, the table's figures count (:mod:`.devices`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from hwbp_compiler.torch_private import cache_dir


@dataclass(frozen=True)
class Probe:
    """What was measured.

    flops    per second, of a large float32 product; on a CPU per core
    bytes    of memory per second, read or written by a copy
    launch   seconds to launch a small kernel
    piece    seconds to pass one small tensor into a stack
    step     seconds of Python in a time step of a loop
    """

    flops: float
    bytes: float
    launch: float
    piece: float
    step: float

    def relative_to(self, other: Probe) -> Probe:
        """Each figure divided by that of ``other``."""
        return Probe(**{field.name: getattr(self, field.name) / getattr(other, field.name) for field in fields(Probe)})

    def __str__(self) -> str:
        return (
            f"{self.flops / 1e9:.0f} GF/s, {self.bytes / 1e9:.1f} GB/s, {self.launch * 1e6:.1f} us a launch, "
            f"{self.piece * 1e6:.1f} us a stacked tensor, {self.step * 1e6:.1f} us a step"
        )


def stored(device: torch.device) -> Probe | None:
    """What was measured on this kind of device and is on disk; None if nothing is, or if it cannot be read. Code for a
    GPU may be generated where there is none: nothing was measured then.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return _read(str(path(device)))


def keep(device: torch.device, found: Probe) -> Path:
    """Write what was measured, and count with it from now on. Returns the file. OSError if it cannot be written."""
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"device": name_of(device), **asdict(found)}, indent=2) + "\n", encoding="utf-8")
    _read.cache_clear()
    return file


def path(device: torch.device) -> Path:
    """The file for this kind of device, this version of torch and this number of threads."""
    what = f"{name_of(device)} torch {torch.__version__} threads {torch.get_num_threads()}"
    return Path(cache_dir()) / "highway_probe" / f"{device.type}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def digest() -> str:
    """Changes with the figures on disk; empty if there are none. Part of the key in torch.compile's caches."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return " ".join(str(found) for device in devices if (found := stored(device)) is not None)


@functools.cache
def _read(file: str) -> Probe | None:
    try:
        told = json.loads(Path(file).read_text(encoding="utf-8"))
        found = Probe(**{field.name: float(told[field.name]) for field in fields(Probe)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(value > 0 for value in asdict(found).values()) else None


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
