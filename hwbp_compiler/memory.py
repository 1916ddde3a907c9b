"""How much memory a device has."""

from __future__ import annotations

import os

import torch


def memory_of(device: torch.device) -> int:
    """The total memory of ``device`` in bytes. For a device that is not present, that of the CPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
