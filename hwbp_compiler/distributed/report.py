"""Report how ``ScheduleHighway`` would run a stage and what the ranks would exchange, without starting a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .chains import Plan, StagePlan
from .highway_of_stage import find_highway


@dataclass(frozen=True)
class StageReport:
    """What :func:`explain` found about one stage.

    Attributes:
        module: the name of the stage's class.
        links: number of residual links in the stage.
        multiplier: P_s as text, the highway through the stage.
        reason: why the stage has no highway; "" if it has one. A stage without a highway is exact, and others wait for
            it.
        advice: what to change to give it a highway; "" if there is no advice.
        state_bytes: size in bytes of the gradient at its output, for these inputs. Every rank sends this in a round.
        once_bytes: size in bytes of P_s, which is sent once a step; 0 if P_s is a number.
    """

    module: str
    links: int
    multiplier: str
    reason: str
    advice: str
    state_bytes: int
    once_bytes: int

    def __str__(self) -> str:
        if self.reason:
            return f"{self.module}: exact, and waited for: {self.reason}. {self.advice}".rstrip()
        once = f", and {self.once_bytes:,} bytes once" if self.once_bytes else ""
        return (
            f"{self.module}: a segment of {self.links} links, P = {self.multiplier}. A micro-batch sends "
            f"{self.state_bytes:,} bytes a round{once}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON. Sizes are in bytes."""
        return asdict(self)


def explain(stage: nn.Module, *args: Any, **kwargs: Any) -> StageReport:
    """Report how ``ScheduleHighway`` would treat ``stage`` in the middle of a pipeline, on one micro-batch.

    It needs only this process. The stage is traced, not run, and left as it was.

    Args:
        stage: the module that ``PipelineStage`` would get.
        *args: its positional arguments. Those that require a gradient are taken for activations. If none does, all
            floating-point ones are.
        **kwargs: its keyword arguments.

    Returns:
        A :class:`StageReport`; ``print`` shows it.
    """
    chosen = any(isinstance(a, Tensor) and a.requires_grad for a in args)

    def wanted(a: Any) -> bool:
        return isinstance(a, Tensor) and (a.requires_grad if chosen else a.is_floating_point())

    given = tuple(a.detach().clone().requires_grad_() if wanted(a) else a for a in args)
    with torch.enable_grad():
        found = find_highway(stage, given, kwargs)
    size = sum(a.nbytes for a in given if isinstance(a, Tensor) and a.requires_grad)
    why = found.why
    return StageReport(
        type(stage).__name__,
        found.links,
        found.text,
        why.text if why else "",
        why.advice if why else "",
        size,
        size if found.exists and found.number is None else 0,
    )


def described(plan: Plan, iterations: int | None, batches: int) -> str:
    """The stages and chains of a schedule, one per line."""
    lines = []
    for index, stage in enumerate(plan.stages):
        lines.append(f"stage {index} (rank {stage.rank}, {stage.module}): {_what(plan, index)}")
    for chain in plan.chains:
        rounds = chain.rounds(iterations)
        size = batches * sum(prod(shape) * dtype.itemsize for shape, dtype in plan.stages[chain.last + 1].takes)
        exact = " (ordinary backprop)" if rounds == chain.segments - 1 else ""
        lines.append(
            f"stages {chain.first} to {chain.last}: {chain.segments} segments, {rounds} rounds{exact}; "
            f"{size:,} bytes a rank and round"
        )
    return "\n".join(lines)


def _what(plan: Plan, index: int) -> str:
    stage: StagePlan = plan.stages[index]
    if index == len(plan.stages) - 1:
        return "holds the loss; exact"
    if index == 0:
        return "next to the input; nothing crosses it"
    if not stage.has_highway:
        return f"exact, and waited for: {stage.reason}"
    return f"a segment of {stage.links} links, P = {stage.text}"


__all__: Sequence[str] = ["StageReport", "described", "explain"]
