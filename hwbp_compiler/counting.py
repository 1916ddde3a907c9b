"""What the backend has done in this process so far."""

from __future__ import annotations

from .torch_private import counter

NAMES = (
    "graphs_seen",
    "inference_graphs",
    "chains_found",
    "chains_rewritten",
    "chains_declined",
    "failures",
)


def count(name: str, by: int = 1) -> None:
    counter()[name] += by


def counters() -> dict[str, int]:
    """What the backend has done in this process so far.

    Returns:
        A snapshot of the counts. ``graphs_seen`` counts the graphs the rewrite was shown, ``inference_graphs`` those
        among them without a backward pass. ``chains_found`` is ``chains_rewritten + chains_declined``. ``failures``
        counts graphs left as they were because a step raised. Further keys, ``"declined: <reason>"``, count why chains
        were declined, by the names of :class:`hwbp_compiler.reasons.Reason` in lower case.

    A compilation answered from torch.compile's caches runs no pass and counts nothing here.
    """
    return {**dict.fromkeys(NAMES, 0), **counter()}


def reset_counters() -> None:
    """Start counting from zero again."""
    counter().clear()
