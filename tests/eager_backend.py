"""The rewritten joint graph without generated code, see ``hwbp_compiler.testing.capture``."""

from hwbp_compiler.testing.capture import (
    Capture,
    JointGraph,
    Trace,
    capture,
    decompositions,
    eager_highway,
    leaves_of,
    options,
    run_passes,
    trace,
)

__all__ = [
    "Capture",
    "JointGraph",
    "Trace",
    "capture",
    "decompositions",
    "eager_highway",
    "leaves_of",
    "options",
    "run_passes",
    "trace",
]
