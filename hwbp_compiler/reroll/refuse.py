"""Decide which repetitions are worth a loop, and record why the others stay unrolled."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch.fx import GraphModule, Node

from hwbp_compiler.graph.origin import source_line
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Declined

from .find import LEAST, Run, loosely, runs, working
from .steps import same_constants
from .values import operands, value_of

# How many operators one node becomes, forward and backward, if not one.
_OPERATORS = {
    torch.gru_cell: 20, torch.lstm_cell: 20, torch.rnn_tanh_cell: 6, torch.gru: 24, torch.lstm: 24,
    torch.nn.functional.linear: 3, torch.matmul: 3, torch.bmm: 3, operator.matmul: 3,
}  # fmt: skip
# Seconds that Inductor needs for one operator, and for a loop of any length, on one core: a GRUCell of 256 steps took
# 190 s. Loops shorter than _SHORT compile in about the time that a rolled one does.
_SECONDS, _LOOP, _SHORT = 0.03, 10.0, 16


def is_worth_it(nodes: Sequence[Node], run: Run, options: Options) -> bool:
    """Whether to roll up the loop. With "auto", only if that is expected to compile faster."""
    if options.reroll == "always":
        return True
    steps = run.length // run.period
    operators = sum(_OPERATORS.get(node.target, 1) for node in nodes[run.start : run.start + run.period])
    return steps >= _SHORT and operators * steps * _SECONDS > _LOOP


def refusal(nodes: Sequence[Node], run: Run, declined: Declined) -> ChainRecord:
    length = run.length // run.period
    source = next((line for node in nodes[run.start : run.start + run.period] if (line := source_line(node))), "")
    record = ChainRecord(length, "declined", "", source=source, sources=[source] if source else [])
    record.because(declined.why.after(f"a Python loop of {length} steps stays unrolled: "))
    return record


def told_apart(gm: GraphModule, options: Options) -> Iterator[tuple[set[Node], ChainRecord]]:
    """Yield loops whose steps look alike but differ, with the difference."""
    nodes = working(gm.graph)
    seen: set[Node] = set()
    for run in runs([loosely(node) for node in nodes], LEAST):
        among = set(nodes[run.start : run.start + run.length])
        if among & seen or not is_worth_it(nodes, run, options) or not _recurs(nodes, run):
            continue
        blocks = [list(nodes[run.start + t * run.period :][: run.period]) for t in range(run.length // run.period)]
        try:
            for pair in zip(blocks, blocks[1:], strict=False):
                same_constants(list(pair))
        except Declined as declined:
            seen |= among
            yield among, refusal(nodes, run, declined)


def _recurs(nodes: Sequence[Node], run: Run) -> bool:
    """Whether every step uses something from the step before it."""
    place = {node: i for i, node in enumerate(nodes[run.start : run.start + run.length])}
    linked = set()
    for node, i in place.items():
        for operand in operands(node):
            before = place.get(value_of(operand).root)
            if before is not None and before // run.period == i // run.period - 1:
                linked.add(i // run.period)
    return len(linked) >= run.length // run.period - 1
