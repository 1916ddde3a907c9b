"""What ranks exchange in the backward pass: heads, products and v, in the pipeline's own process group.

Every rank of the group takes part in every collective, in the order of the plan. A rank without a part in a chain posts
its share early and continues computing; it waits for these collectives at the end of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chains import Chain, Plan


class Crossing:
    """The collectives of one step. ``batches`` is M, the number of micro-batches."""

    def __init__(self, group: dist.ProcessGroup | None, plan: Plan, device: torch.device, batches: int) -> None:
        self.group, self.plan, self.device, self.batches = group, plan, device, batches
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.bytes = 0  # received by this rank
        self._posted: list[tuple[dist.Work, Any]] = []

    # -- the head of a chain ------------------------------------------------------------------------------------

    def give_head(self, chain: Chain, tensors: Sequence[Tensor]) -> None:
        """Called by the stage after the chain: broadcast its input gradients, [M, *shape] each."""
        for tensor in tensors:
            self._broadcast(chain, tensor, wait=False)

    def take_head(self, chain: Chain) -> list[Tensor]:
        found = [
            torch.empty(self.batches, *shape, dtype=dtype, device=self.device) for shape, dtype in self._head(chain)
        ]
        for tensor in found:
            self._broadcast(chain, tensor, wait=True)
        self.bytes += sum(t.nbytes for t in found)
        return found

    def _head(self, chain: Chain) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return self.plan.stages[chain.last + 1].takes

    def _broadcast(self, chain: Chain, tensor: Tensor, wait: bool) -> None:
        source = self.plan.stages[chain.last + 1].rank
        work = dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)
        self._after(work, tensor, wait)

    # -- rows of the segments of a chain ------------------------------------------------------------------------

    def gather(self, chain: Chain, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Gather rows [M, *state] by inner segment: from this rank's own to those of all inner segments."""
        own, gathered = self._buffers(chain)
        for place, s in enumerate(self._of_rank(chain, self.rank)):
            if s in rows:
                own[place].copy_(rows[s])
        self._all_gather(own, gathered, wait=True)
        self.bytes += sum(g.nbytes for r, g in enumerate(gathered) if r != self.rank)
        return {
            s: gathered[rank][place] for rank in range(self.size) for place, s in enumerate(self._of_rank(chain, rank))
        }

    def _buffers(self, chain: Chain) -> tuple[Tensor, list[Tensor]]:
        ((shape, dtype),) = self._head(chain)
        places = max(Counter(self.plan.stages[s].rank for s in chain.inner).values())
        full = (places, self.batches, *shape)
        own = torch.zeros(full, dtype=dtype, device=self.device)
        return own, [torch.empty(full, dtype=dtype, device=self.device) for _ in range(self.size)]

    def _of_rank(self, chain: Chain, rank: int) -> list[int]:
        return [s for s in chain.inner if self.plan.stages[s].rank == rank]

    def _all_gather(self, own: Tensor, gathered: list[Tensor], wait: bool) -> None:
        self._after(dist.all_gather(gathered, own, group=self.group, async_op=True), (own, gathered), wait)

    # -- of other ranks -----------------------------------------------------------------------------------------

    def stand_by_for_products(self, chain: Chain) -> None:
        """Post this rank's share for a chain of which it has no segment. The next two methods do the same."""
        self.stand_by_for_rounds(chain, int(needs_products(self.plan, chain)))

    def stand_by_for_head(self, chain: Chain) -> None:
        for shape, dtype in self._head(chain):
            self._broadcast(chain, torch.empty(self.batches, *shape, dtype=dtype, device=self.device), wait=False)

    def stand_by_for_rounds(self, chain: Chain, rounds: int) -> None:
        for _ in range(rounds):
            self._all_gather(*self._buffers(chain), wait=False)

    def _after(self, work: dist.Work, tensors: Any, wait: bool) -> None:
        if wait:
            work.wait()
        else:
            self._posted.append((work, tensors))  # the tensors must live until the collective is done

    def finish(self) -> None:
        for work, _ in self._posted:
            work.wait()
        self._posted.clear()


def needs_products(plan: Plan, chain: Chain) -> bool:
    """Whether any P of ``chain`` is a tensor, which must be sent once; a number is known to all ranks."""
    return any(plan.stages[s].diagonal for s in chain.inner)
