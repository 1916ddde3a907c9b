"""Reasons that turned out to be untrue, or to omit what matters: the true reason, by model and code.

A person has checked these. An entry is used only if a model misses links and has this code.
"""

from __future__ import annotations

UNTRUE: dict[str, dict[str, str]] = {
    "LRU (package)": {"WIDE_ELEMENTWISE_RECURRENCE": "the state is one tensor, of complex numbers"},
    "RealNVP": {"TOO_SHORT": "every step updates a half of the state; nothing says why the chain is cut"},
    "two-step network": {"RESULTS_COME_BACK": "the state before the last is part of the state; nothing leaves it"},
}
