"""All ranks agree: on options and versions before the first step, and on the plan whenever a stage changes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hwbp_compiler.digest import source_digest
from hwbp_compiler.errors import first_line

from .chains import Plan, StagePlan
from .errors import RankError

if TYPE_CHECKING:
    from .schedule import ScheduleHighway


def agree_on_options(schedule: ScheduleHighway) -> None:
    """Raise :class:`RankError` on every rank if any two ranks differ."""
    stage = schedule.stage
    mine = {
        "torch": torch.__version__,
        "hwbp_compiler (a hash of its sources)": source_digest()[:16],
        "iterations": "exact" if schedule.iterations is None else schedule.iterations,
        "damping": schedule.damping,
        "n_microbatches": schedule.batches,
        "scale_grads": schedule.scale_grads,
        "num_stages": stage.num_stages,
        "loss_fn given": schedule.has_loss,
    }
    same_everywhere("ScheduleHighway", mine, stage.group)


def same_everywhere(where: str, mine: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    everyone = _all(mine, group)
    for rank, theirs in enumerate(everyone):
        for key, value in everyone[0].items():
            if theirs.get(key) != value:
                raise RankError(
                    f"{where}: rank {rank} has {key} = {theirs.get(key)!r}, rank 0 has {value!r}. "
                    "Give every rank the same, and start again."
                )


def compared(where: str, mine: dict[str, Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """:func:`same_everywhere`, cheap enough for every call: only two numbers are sent, and the values themselves only
    if the numbers differ.
    """
    number = int.from_bytes(hashlib.sha256(repr(mine).encode()).digest()[:7], "big")
    largest = torch.tensor([number, -number], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    if int(largest[0]) != -int(largest[1]):
        same_everywhere(where, mine, group)


def nothing_new(schedule: ScheduleHighway, here: bool) -> bool:
    """Whether no rank has news. Costs one number per rank and step."""
    flag = torch.tensor([0 if here else 1], device=schedule.stage.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=schedule.stage.group)
    return not int(flag)


def agree_on_plan(schedule: ScheduleHighway, mine: StagePlan, failure: Exception | None) -> Plan:
    """The stages of all ranks in order. Raises :class:`RankError` on every rank if one of them failed."""
    index = schedule.stage.stage_index
    everyone = _all((index, mine, failure and first_line(failure)), schedule.stage.group)
    for rank, (stage, _, failed) in enumerate(everyone):
        if failed:
            raise RankError(f"ScheduleHighway: rank {rank} (stage {stage}) failed: {failed}") from failure
    stages = sorted(everyone, key=lambda told: told[0])
    return Plan(tuple(plan for _, plan, _ in stages), schedule.iterations)


def _all(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
