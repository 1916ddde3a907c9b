"""Which repetitions are worth a loop, and what is told of those that stay unrolled."""

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

# Operators that one node becomes, forward and backward, where it is not one.
_OPERATORS = {
    torch.gru_cell: 20, torch.lstm_cell: 20, torch.rnn_tanh_cell: 6, torch.gru: 24, torch.lstm: 24,
    torch.nn.functional.linear: 3, torch.matmul: 3, torch.bmm: 3, operator.matmul: 3,
}  # fmt: skip
# Seconds that Inductor needs for one of them, and what a loop needs whatever its length, on one core: a GRUCell of 256
# steps took 190 s. Shorter loops than _SHORT compile in about the time that a rolled one does.
_SECONDS, _LOOP, _SHORT = 0.03, 10.0, 16


def is_worth_it(nodes: Sequence[Node], run: Run, options: Options) -> bool:
    """Whether the loop is to be rolled up: with "auto", where that is expected to compile faster."""
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
    """Loops whose steps look alike but are not: what differs."""
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
    """Whether every step takes something of the one before it."""
    place = {node: i for i, node in enumerate(nodes[run.start : run.start + run.length])}
    linked = set()
    for node, i in place.items():
        for operand in operands(node):
            before = place.get(value_of(operand).root)
            if before is not None and before // run.period == i // run.period - 1:
                linked.add(i // run.period)
    return len(linked) >= run.length // run.period - 1
