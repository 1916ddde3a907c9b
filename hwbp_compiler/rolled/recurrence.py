"""A loop over time in a Dynamo graph, and the module that replaces it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from hwbp_compiler.digest import source_digest
from hwbp_compiler.errors import first_line
from hwbp_compiler.graph.origin import common, module_of
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.rules import Kind, rule_of
from hwbp_compiler.graph.sizes import hint
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Declined, Reason

from .chain import HighwayLoop, How, LoopLink, run_affine
from .decide_loop import decide_loop
from .link import Affine, look_backward, look_for_affine
from .live import AllSteps, LiveEmitter, Sizes, constant
from .loop import code_of, copy
from .stacked import take_apart
from .stages import Stage, split_stages
from .trace import Body, MutatingCell, Step, trace_step, without_autocast

log = logging.getLogger(__name__)


@dataclass
class Plan:
    """How one stage is run: as a scan, as a loop, or (with neither set) all steps at once."""

    stage: Stage
    affine: Affine | None = None
    loop: LoopLink | None = None
    how: How = field(default_factory=lambda: How(None))


class Recurrence(nn.Module):
    """``(*state, *inputs, *shared) -> (*last state, *outputs)``; inputs and outputs are ``[T, ...]``.

    It has no parameters: ``shared`` holds everything the cell uses from outside. If ``plans`` is None, the cell runs
    step by step while autograd records, exactly as written. ``records`` say what was found.
    """

    def __init__(self, cell: Body, states: int, inputs: int) -> None:
        super().__init__()
        self.cell: Body = cell
        self.states, self.inputs = states, inputs
        self.step: Step | None = None
        self.plans: list[Plan] | None = None
        self.records: list[ChainRecord] = []
        self.stacked: list[int | None] = [None] * states

    @property
    def recurring(self) -> list[Plan]:
        """The plans that ``records`` describe, in the same order; empty if the cell runs step by step."""
        return [plan for plan in self.plans or () if plan.stage.link is not None]

    def forward(self, *arguments: Any) -> tuple[Any, ...]:
        a, b = self.states, self.states + self.inputs
        state, inputs, shared = arguments[:a], arguments[a:b], arguments[b:]
        if self.plans is None or self.step is None:
            return self._recorded(state, inputs, shared)
        with without_autocast(state[0].device.type):
            return self._in_stages(self.step, self.plans, list(state), list(inputs), list(shared))

    def step_through(self) -> None:
        """From now on, run the cell step by step, as it is written."""
        self.step = self.plans = None

    def __reduce__(self) -> Any:
        """For torch.compile's caches, whose key is the pickled graph: everything that determines the result."""
        plans = [
            (p.stage.members, p.affine is not None, p.loop.code if p.loop else "", p.how) for p in self.plans or ()
        ]
        cell = self.cell.module.code, self.cell.order, self.cell.results, self.states, self.inputs
        return str, (f"{cell} {plans} {source_digest()}",)

    def _recorded(self, state: Sequence[Tensor], inputs: Sequence[Tensor], shared: Sequence[Any]) -> tuple[Any, ...]:
        rows: list[tuple[Tensor, ...]] = []
        for t in range(int(inputs[0].shape[0])):
            found = self.cell(*state, *(x[t] for x in inputs), *shared)
            state, row = found[: self.states], found[self.states :]
            rows.append(tuple(row))
        return (*state, *(torch.stack(column) for column in zip(*rows, strict=True)))

    def _in_stages(self, step: Step, plans: list[Plan], state: list, inputs: list, shared: list) -> tuple[Any, ...]:
        length = inputs[0].shape[0]
        counts = [1 if dim is None else s.shape[dim] for s, dim in zip(state, self.stacked, strict=True)]
        state = [entry for s, dim in zip(state, self.stacked, strict=True)
                 for entry in ([s] if dim is None else [e.contiguous() for e in s.unbind(dim)])]  # fmt: skip
        known = {n: constant(x, True) for n, x in zip(step.inputs, inputs, strict=True)}
        known |= {n: constant(x, False) for n, x in zip(step.shared, shared, strict=True)}
        starts = {n: constant(s, False) for n, s in zip(step.state, state, strict=True)}
        values = AllSteps(LiveEmitter(length, Sizes({**known, **starts})), known)

        def tensor(node: Any, batched: bool) -> Any:
            value = values[node]
            return values.emitter.batch(value).meta["val"] if batched else value.tensor

        last: dict[int, Tensor] = {}
        for plan in plans:
            stage = plan.stage
            start = [state[m] for m in stage.members]
            if stage.link is None:
                found = [tensor(step.next_state[m], True) for m in stage.members]
            else:
                per_step = [tensor(n, True) for n in stage.per_step]
                same = [tensor(n, False) for n in stage.shared]
                if plan.affine is not None:
                    found = run_affine(plan.affine, length, start, per_step, same)
                else:
                    assert plan.loop is not None
                    found = list(HighwayLoop.apply(plan.loop, plan.how.at(length), length, *start, *per_step, *same))
            for member, first, rows in zip(stage.members, start, found, strict=True):
                values.known.setdefault(step.next_state[member], constant(rows, True))
                before = torch.cat([first.unsqueeze(0), rows[:-1]])
                values.known[step.state[member]] = constant(before, True)
                last[member] = copy(rows[-1])
        # As with torch.stack, callers may change what is returned in place. States and inputs must not change with it.
        held = {*step.state, *step.inputs, *step.shared, *step.next_state}
        rows = [(n, tensor(n, True)) for n in step.outputs]
        outputs = [copy(row) if _is_view_of(n, held) or not row.is_contiguous() else row for n, row in rows]
        ends = iter(last[m] for m in range(len(state)))
        whole = [next(ends) if dim is None else torch.stack([next(ends) for _ in range(count)], dim)
                 for dim, count in zip(self.stacked, counts, strict=True)]  # fmt: skip
        return (*whole, *outputs)


def _is_view_of(node: Node, nodes: set[Node]) -> bool:
    while node not in nodes:
        rule = rule_of(node)
        if rule is None or rule.kind is not Kind.LAYOUT or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return True


def build(
    name: str, cell: Body, state: list, inputs: list, shared: list, fake_mode: Any, options: Options, source: str
) -> Recurrence:
    """``cell`` over time. ``state``, ``inputs`` and ``shared`` are fake tensors (inputs ``[T, ...]``) or sizes."""
    made = Recurrence(cell, len(state), len(inputs))
    length = hint(inputs[0].shape[0])
    try:
        with fake_mode:
            first = [x[0] for x in inputs]
        step, stacked = take_apart(trace_step(cell, state, first, shared, fake_mode), fake_mode)
        with without_autocast(state[0].device.type):
            plans, records = _plans(name, step, fake_mode, options, length)
        for record, plan in zip(records, (p for p in plans if p.stage.link is not None), strict=True):
            _tell_where(record, plan.stage, source)
        made.step, made.plans, made.stacked = step, plans, stacked
        _rehearse(made, state, inputs, shared, fake_mode)
        made.records = records
    except MutatingCell:
        raise
    except Exception as error:
        made.step_through()
        declined = isinstance(error, (Declined, NotImplementedError))
        if not declined and options.strict:
            raise
        if isinstance(error, Declined):
            why = error.why
        else:
            code = Reason.CELL_UNTRACEABLE if declined else Reason.DEFECT_IN_LOOP
            why = code.of(error=error if declined else first_line(error))
        record = ChainRecord(length, "declined", "", source=source, sources=[source] if source else [])
        record.because(why.after("the cell runs step by step, which unrolls the loop: "))
        record.failed = not declined
        made.records = [record]
        log.debug("rolling a recurrence failed", exc_info=error)
    return made


def _tell_where(record: ChainRecord, stage: Stage, source: str) -> None:
    """Record the source line and the module of the links, and that all links are alike."""
    assert stage.link is not None
    record.source, record.sources = source, [source] if source else []
    record.module = common([module_of(node) for node in stage.link.graph.nodes if node.op == "call_function"])
    for group in record.groups:
        group.source, group.module = source, record.module
        record.members, record.modules = [0] * record.length, [record.module] * record.length


def _plans(
    name: str, step: Step, fake_mode: Any, options: Options, length: int
) -> tuple[list[Plan], list[ChainRecord]]:
    plans: list[Plan] = []
    records: list[ChainRecord] = []
    for stage in split_stages(step):
        plan = Plan(stage)
        plans.append(plan)
        if stage.link is None:
            continue
        plan.affine = look_for_affine(stage, fake_mode)
        if plan.affine is not None:
            record = ChainRecord(length, "rewritten", "", plan.affine.multiplier, [plan.affine.group(length)])
            record.because(Reason.LINEAR_RECURRENCE.of())
            records.append(record)
            continue
        backward = look_backward(stage, fake_mode)
        width = len(stage.members)
        link = list(stage.link.graph.find_nodes(op="placeholder"))
        results = stage.link.graph.find_nodes(op="output")[0].args[0]
        a = width + len(stage.per_step)
        code = code_of(stage.link.graph, link[:width], link[width:a], link[a:], results)
        plan.loop = LoopLink(f"{name}.{len(records)}", code, width, len(stage.per_step), backward)
        plan.how, record = decide_loop(backward, options, length)
        records.append(record)
    return plans, records


def _rehearse(made: Recurrence, state: list, inputs: list, shared: list, fake_mode: Any) -> None:
    """Run forward and backward on fake tensors for three steps, to find operators that cannot be batched."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.is_floating_point() or value.is_complex())

    with fake_mode, torch.enable_grad():
        shorter = [leaf(torch.empty_like(x[0]).expand(3, *x.shape[1:])) for x in inputs]
        arguments = [*map(leaf, state), *shorter, *map(leaf, shared)]
        results = [r for r in made(*arguments) if isinstance(r, Tensor) and r.requires_grad]
        wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        if results and wanted:
            torch.autograd.grad(results, wanted, [torch.empty_like(r) for r in results], allow_unused=True)
