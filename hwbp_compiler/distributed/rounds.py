"""One chain of segments, each on a rank: e^0 .. e^k of docs/design.md, section 4.6, "Segments".

    e^0       e_{s-1} = P_s e_s                                   from the head down, no backward pass
    v_s       out_s(e^t_s) - P_s e^t_s                            all ranks at once: one input gradient of each stage
    e^{t+1}   e_{s-1} = v_s + P_s e^{t+1}_s                       one all-gather of v, then a scan on every rank

No loss contributes to a state between stages, so no c is added. P is the same in every round and is gathered once.
Tensors are [M, *state] for M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from .chains import Chain

Gather = Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]
"""From this rank's rows by segment to those of all segments."""


def ends_of_segments(
    chain: Chain,
    mine: Collection[int],
    head: Tensor,
    products: Mapping[int, Tensor | float],
    through: Callable[[int, Tensor], Tensor],
    gather: Gather,
    iterations: int | None,
) -> dict[int, Tensor]:
    """e^k_s of the segments in ``mine``, each [M, *state].

    head       e of segment ``chain.last``, exact
    products   P_s by segment, for those above the lowest of ``mine``: a number, or [M, *state]
    through    ``through(s, e)``: out_s, the gradient at segment s's input for the gradient e at its output
    """
    lowest = min(mine)
    own = [s for s in mine if s in chain.inner]
    values: Mapping[int, Tensor] = {}

    def scan() -> dict[int, Tensor]:
        e = {chain.last: head}
        for s in range(chain.last, lowest, -1):
            carried = times(products[s], e[s])
            e[s - 1] = values[s] + carried if s in values else carried
        return e

    e = scan()
    sent: dict[int, Tensor] = {}
    for t in range(chain.rounds(iterations)):
        for s in own:
            # The t + 1 segments nearest the head are exact already, and so is what they send.
            if t == 0 or s < chain.last - t + 1:
                sent[s] = through(s, e[s]) - times(products[s], e[s])
        values = gather(sent)
        e = scan()
    return {s: e[s] for s in mine}


def times(product: Tensor | float, e: Tensor) -> Tensor:
    """P e; P is a diagonal."""
    return e if isinstance(product, float) and product == 1.0 else torch.mul(e, product)
