"""The link of a stage as the passes use it: its program, its split into K and J, and whether it is affine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from hwbp_compiler.graph.chain import Chain
from hwbp_compiler.graph.describe import STANDS_FOR, multiplier_text
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import (
    Program,
    _Builder,
    has_block,
    is_heavy,
)
from hwbp_compiler.graph.record import GroupRecord
from hwbp_compiler.graph.rules import linear_arguments, operands, operator_name
from hwbp_compiler.passes.split_links import Split, split_links
from hwbp_compiler.reasons import Declined, Reason, Why

from .stages import Stage
from .trace import depends_on, trace_decomposed, trace_vjp


@dataclass
class Backward:
    """The backward of one link: ``(own state, per_step, shared, gradient) -> gradients`` of all arguments but the last.

    arguments   nodes of the link's arguments: state, then per_step, then shared
    gradients   one node per argument; None if the argument gets no gradient
    program     from the gradient at the next state to the gradient at this state
    split       K; None if the link has no sound K, and then ``why`` gives the reason
    """

    module: GraphModule
    arguments: list[Node]
    tangents: list[Node]
    gradients: list[Node | None]
    program: Program | None = None
    split: Split | None = None
    why: Why | None = None

    @property
    def has_block(self) -> bool:
        return self.program is None or has_block(self.program)

    @property
    def multiplier(self) -> str:
        if self.program is None:
            return ""
        return multiplier_text(self.program, self.split.support) if self.split is not None else "0"

    def group(self, length: int) -> GroupRecord:
        """Describe one link; ``length`` of them are alike."""
        return _group(self.program, self.multiplier, length)


@dataclass
class Affine:
    """A link ``s' = A s + b``. A is triangular with diagonal entries, and neither A nor b depends on the state."""

    module: GraphModule
    arguments: list[Node]
    program: Program
    split: Split

    @property
    def multiplier(self) -> str:
        return multiplier_text(self.program, self.split.support)

    def group(self, length: int) -> GroupRecord:
        return _group(self.program, self.multiplier, length)


def look_backward(stage: Stage, fake_mode: Any) -> Backward:
    assert stage.link is not None
    vjp = trace_vjp(stage.link, fake_mode)
    width = len(stage.members)
    info = GraphInfo(vjp.module.graph, tangents=set(vjp.tangents))
    _name_arguments(vjp.arguments[width:], stage)
    found = Backward(vjp.module, vjp.arguments, vjp.tangents, vjp.gradients)
    try:
        found.program = _program(info, vjp.tangents, vjp.gradients[:width])
        found.split = _split(found.program)
    except Declined as declined:
        found.why = declined.why
    return found


def look_for_affine(stage: Stage, fake_mode: Any) -> Affine | None:
    """The link as an affine program, if it is affine and its matrix is triangular with diagonal entries; else None."""
    assert stage.link is not None
    module = trace_decomposed(stage.link, fake_mode)
    arguments = list(module.graph.find_nodes(op="placeholder"))
    width = len(stage.members)
    if not all(_is_scanned(state.meta["val"]) for state in arguments[:width]):
        return None
    _name_arguments(arguments[width:], stage)
    _numbers_as_tensors(module.graph, arguments[:width], fake_mode)
    results = list(module.graph.find_nodes(op="output")[0].args[0])
    info = GraphInfo(module.graph, tangents=set(arguments[:width]))
    try:
        program = _program(info, arguments[:width], results)
        split = _split(program)
    except Declined:
        return None
    return Affine(module, arguments, program, split) if not has_block(program) else None


def _is_scanned(state: torch.Tensor) -> bool:
    return state.is_floating_point() or state.is_complex()


def _numbers_as_tensors(graph: Graph, state: list[Node], fake_mode: Any) -> None:
    """Turn numbers that are added to state-dependent values into tensors. They are part of b, and a program finds b
    through its tensors.
    """
    moving = depends_on(state, graph)
    for node in graph.nodes:
        taken = {p for p, n in operands(node) if n in moving}
        linear = linear_arguments(node, taken) if taken else None
        for p in (linear or frozenset()) - taken:
            number = node.args[p] if p < len(node.args) else 0
            if not isinstance(number, (int, float, complex)) or number == 0:
                continue
            like = node.meta["val"]
            options = {"dtype": like.dtype, "device": like.device}
            with graph.inserting_before(node):
                made = graph.call_function(torch.ops.aten.full.default, ([], number), options)
            with fake_mode:
                made.meta["val"] = torch.full([], number, **options)
            node.update_arg(p, made)


def _name_arguments(arguments: list[Node], stage: Stage) -> None:
    for argument, origin in zip(arguments, [*stage.per_step, *stage.shared], strict=True):
        argument.meta[STANDS_FOR] = origin


def _program(info: GraphInfo, inputs: list[Node], outputs: Sequence[Node | None]) -> Program:
    dependent = {n for n in info.nodes if info.carries[info.index[n]]} - set(inputs)
    for node, before in zip(outputs, inputs, strict=True):
        if node is None or (node not in dependent and node not in inputs):
            raise Declined(Reason.COMPONENT_WITHOUT_GRADIENT)
        like = before.meta["val"]
        if node.meta["val"].shape != like.shape or node.meta["val"].dtype != like.dtype:
            raise Declined(Reason.CELL_CHANGES_STATE)
    return _Builder(info, dependent, tuple(inputs), set()).build(outputs)  # type: ignore[arg-type]


def _split(program: Program) -> Split:
    state = tuple(program.raw[i] for i in program.outputs)
    split = split_links(Chain([program.inputs, state], [program]))
    if not split.support:
        raise Declined(Reason.NO_ELEMENTWISE_PATH)
    return split


def _group(program: Program | None, multiplier: str, length: int) -> GroupRecord:
    assert program is not None
    heavy = Counter(
        operator_name(node).removeprefix("aten::")
        for i, node in enumerate(program.raw)
        if node is not None and i >= program.arity and is_heavy(program, i)
    )
    return GroupRecord(length, dict(heavy), multiplier)
