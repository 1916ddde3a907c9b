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
        A copy of the counts. ``graphs_seen`` is the number of graphs that reached the rewrite, and
        ``inference_graphs`` the number of these that have no backward pass. ``chains_found`` is ``chains_rewritten +
        chains_declined``. ``failures`` is the number of graphs that were left unchanged because a step raised an error.
        Each key ``"declined: <reason>"`` counts the chains declined for this reason; it has the name of a member of
        :class:`hwbp_compiler.reasons.Reason` in lower case.

    "auto" adds ``checks``, how often gradients were compared, and ``checks_brought_forward``, how many of these came
    early because the last iteration changed w by more than before.

    A graph that torch.compile takes from its caches is not counted, because no pass runs.
    """
    return {**dict.fromkeys(NAMES, 0), **counter()}


def reset_counters() -> None:
    """Set all counts to zero."""
    counter().clear()
