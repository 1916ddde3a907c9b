"""How fast devices are: the one table that the estimates read.

:class:`Device` describes operators that a compiled graph calls one by one. :class:`Kernels` describes the kernels of
recurrent modules and the tall products of their rewritten form. The numbers give the order of magnitude. Where the
machine at hand was measured (:mod:`.probe`), its figures count instead. Decisions need a clear gain, and
``rewrite="always"`` overrides them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from hwbp_compiler.graph.sizes import hint

from .probe import Probe, stored

# Seconds to compile a node of a joint graph: the right size on one core of a server CPU.
COMPILE_NODE = 0.012

# Loops of at least so many steps run in one C++ call on a CPU (rolled/native_loop.py), whose step takes NATIVE_STEP
# seconds besides its kernels. A thousand passes then save about as long as building it takes.
NATIVE_FROM = 1000
NATIVE_STEP = 1.5e-6


Figures = TypeVar("Figures", "Device", "Kernels")


@dataclass(frozen=True)
class Device:
    """The speed of a device, and the cost of a call.

    flops         per second, of a large product, per core
    bytes         of memory per second, read or written
    cache_bytes   per second, of data touched just before, per core
    launch        seconds to launch a library call or a kernel
    piece         seconds to pass one link's tensor into a stack or out of one
    step          seconds of Python in a time step of a loop: finding the rows and calling the compiled step
    cores         that share the work of one launch, where it is long enough
    grain         seconds of work that are worth sharing
    native        whether long loops run in C++
    """

    flops: float
    bytes: float
    cache_bytes: float
    launch: float
    piece: float
    step: float
    cores: int = 1
    grain: float = 0.0
    native: bool = False

    def step_of(self, length: int) -> float:
        """Seconds of a step of a loop of ``length`` steps, besides its kernels."""
        return NATIVE_STEP if self.native and length >= NATIVE_FROM else self.step

    def seconds(self, work: float) -> float:
        """Seconds for work that takes ``work`` seconds on one core."""
        shared = min(1.0, work / self.grain) if self.grain else 1.0
        return work / (1 + (self.cores - 1) * shared)


def device_figures(device: torch.device) -> Device:
    """Fitted to measurements on one kind of server core. The numbers for accelerators are round figures without
    measurements.
    """
    table, found = _of_the_table(device), stored(device)
    if found is None:
        return table
    if device.type != "cpu":
        return replace(
            table, flops=found.flops, bytes=found.bytes, launch=found.launch, piece=found.piece, step=found.step
        )
    by = found.relative_to(_FITTED_ON)
    return _times(table, flops=by.flops, bytes=by.bytes, launch=by.launch, piece=by.piece, step=by.step)


# ``doctor --probe`` on the CPU that the table was fitted on. The table's figures are those that explain the times of
# compiled code, and not what a probe measures. So another CPU's figures are the table's, times the ratio of the probes.
_FITTED_ON = Probe(flops=78e9, bytes=16e9, launch=3.9e-6, piece=0.13e-6, step=2.1e-6)


def _of_the_table(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device(200e9, 8e9, 60e9, 2e-6, 1e-6, 6e-6, cores(), 3e-5, native=True)
    return Device(15e12, 1.0e12, 4.0e12, 6e-6, 1e-6, 6e-6)


def _times(figures: Figures, **factors: float) -> Figures:
    """``figures`` with some of them multiplied."""
    return replace(figures, **{name: getattr(figures, name) * factor for name, factor in factors.items()})


def cores() -> int:
    """Cores that torch's threads may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, int(torch.get_num_threads()))


@dataclass(frozen=True)
class Kernels:
    """Figures for recurrent modules: flops per second of tall products, bytes per second, and seconds of a compiled
    call. ``step`` and ``element`` are seconds per step, and per element of the state and step, of the exact backward
    pass (with PyTorch's own kernel: of both passes). ``more`` is the time of a further layer or direction relative to
    the first, if one kernel runs them side by side. ``kernel_flops`` are those of PyTorch's own kernel; ``run_flops``
    those of a run over segments on one of ``cores``, and ``run_step`` its seconds per step besides the products.
    """

    flops: float
    bytes: float
    launch: float
    step: float = 0.0
    element: float = 0.0
    more: float = 1.0
    kernel_flops: float = 0.0
    run_flops: float = 0.0
    run_step: float = 0.0
    cores: int = 1


def kernel_figures(kind: str, like: Tensor) -> Kernels:
    """The table's figures. On a CPU that was measured, they change as those of :class:`Device` do."""
    table, found = _kernels(kind, like), stored(like.device)
    if found is None or like.device.type != "cpu":
        return table
    by = found.relative_to(_FITTED_ON)
    return _times(table, flops=by.flops, run_flops=by.flops, bytes=by.bytes, launch=by.launch)


def _kernels(kind: str, like: Tensor) -> Kernels:
    if like.device.type != "cpu":
        return _kernels_of_a_gpu(kind, like)
    flops, width = 150e9 * cores() * 4 / like.element_size(), like.element_size() / 4
    run = {"run_flops": 60e9 / max(1.0, width), "run_step": 0.3e-6, "cores": cores()}
    if kind == "lstm" and like.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        return Kernels(flops, bytes=12e9, launch=6e-6, step=5e-6, element=15e-9, **run)  # oneDNN's
    if kind == "gru":
        return Kernels(flops, bytes=20e9, launch=6e-6, **run)
    return Kernels(flops, bytes=12e9, launch=6e-6, step=60e-6, element=10e-9 * width, **run)


def _kernels_of_a_gpu(kind: str, like: Tensor) -> Kernels:
    """cuDNN runs all steps in one kernel if the state is small, but not in bfloat16."""
    full, tf32, low = 45e12, 180e12, 400e12
    flops = kernel = low if like.element_size() < 4 else full
    if like.dtype is torch.float32:
        flops = tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else full
        kernel = tf32 if torch.backends.cudnn.rnn.fp32_precision == "tf32" else full
    small = hint(like.shape[-1]) <= 256 and like.dtype is not torch.bfloat16
    step = {"gru": 6e-6, "lstm": 2e-6} if small else {"gru": 21e-6, "lstm": 16e-6}
    return Kernels(flops, 2.5e12, launch=10e-6, step=step[kind], element=5e-11, more=0.5, kernel_flops=kernel)
