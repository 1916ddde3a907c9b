"""All ranks agree: on options and versions before the first step, and on the plan whenever a stage changes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from hwbp_compiler.digest import source_digest
from hwbp_compiler.errors import first_line

from .chains import Plan, StagePlan
from .errors import RankError


def agree_on_options(stage: Any, options: dict[str, Any]) -> None:
    """Raise :class:`RankError` on every rank if any two ranks differ."""
    mine = {
        "torch": torch.__version__,
        "hwbp_compiler (a hash of its sources)": source_digest()[:16],
        "num_stages": stage.num_stages,
        **options,
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


def nothing_new(stage: Any, here: bool) -> bool:
    """Whether nothing has changed on any rank. Each rank sends one number per step."""
    flag = torch.tensor([0 if here else 1], device=stage.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=stage.group)
    return not int(flag)


def agree_on_plan(stage: Any, iterations: int | None, mine: StagePlan, failure: Exception | None) -> Plan:
    """The stages of all ranks in order. Raises :class:`RankError` on every rank if one of them failed."""
    everyone = _all((stage.stage_index, mine, failure and first_line(failure)), stage.group)
    for rank, (index, _, failed) in enumerate(everyone):
        if failed:
            raise RankError(f"ScheduleHighway: rank {rank} (stage {index}) failed: {failed}") from failure
    stages = sorted(everyone, key=lambda answer: answer[0])
    return Plan(tuple(plan for _, plan, _ in stages), iterations)


def _all(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
