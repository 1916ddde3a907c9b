"""Recognise a known program elsewhere in the graph, walking backward from its outputs.

The first link of a chain has no join before it that would tell where it starts; that it is built like its
neighbour does. Matching the neighbour's program backward from the first join finds its input, drops nothing that
belongs to the link (a ReLU or LayerNorm after the last addition) and takes in nothing else (pooling, a final norm).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from .info import GraphInfo
from .program import INPUT, SUM, External, Program, Ref, _constant, _dtype_of, sum_terms
from .rules import shape_of


class _Mismatch(Exception):
    pass


def match_backward(template: Program, outputs: Sequence[Node], info: GraphInfo) -> Program | None:
    """The program equal to ``template`` that ends in ``outputs``; None where there is none.

    An input that only ever appears as a term of a sum may be absent: it is zero then (the cell state's gradient at
    the last step of an LSTM).
    """
    try:
        return _Matcher(template, info).run(outputs)
    except _Mismatch:
        return None


class _Matcher:
    def __init__(self, template: Program, info: GraphInfo) -> None:
        self.template = template
        self.info = info
        self.bound: list[Node | None] = [None] * len(template.statements)
        self.externals: list[Node | None] = [None] * len(template.externals)
        self.injections: dict[int, list[Node]] = {}
        self.undecided: list[tuple[int, int]] = []  # (sum, input) pairs to settle once the rest is known

    def run(self, outputs: Sequence[Node]) -> Program:
        template = self.template
        for statement, node in zip(template.outputs, outputs, strict=True):
            self._bind(statement, node)
        for i in reversed(range(template.arity, len(template.statements))):
            node = self.bound[i]
            if node is None:
                raise _Mismatch
            statement = template.statements[i]
            if (shape_of(node), _dtype_of(node)) != (statement.shape, statement.dtype):
                raise _Mismatch
            if statement.target is SUM:
                self._match_sum(i, node)
            else:
                self._match_operation(i, node)
        for i, wanted in self.undecided:
            self._settle(i, wanted)
        if all(n is None for n in self.bound[: template.arity]) or any(n is None for n in self.externals):
            raise _Mismatch
        return Program(
            arity=template.arity,
            statements=list(template.statements),
            raw=list(self.bound),
            outputs=list(template.outputs),
            externals=[n for n in self.externals if n is not None],
            injections={i: terms for i, terms in self.injections.items() if terms},
        )

    def _bind(self, i: int, node: Node) -> None:
        if self.bound[i] is None:
            statement = self.template.statements[i]
            if statement.target is INPUT and (shape_of(node), _dtype_of(node)) != (statement.shape, statement.dtype):
                raise _Mismatch
            self.bound[i] = node
        elif self.bound[i] is not node:
            raise _Mismatch

    def _match_operation(self, i: int, node: Node) -> None:
        statement = self.template.statements[i]
        if node.op != "call_function" or node.target is not statement.target or len(node.args) != len(statement.args):
            raise _Mismatch
        if tuple(sorted((k, _constant(v)) for k, v in node.kwargs.items())) != statement.kwargs:
            raise _Mismatch
        for expected, actual in zip(statement.args, node.args, strict=True):
            self._match_argument(expected, actual)

    def _match_argument(self, expected, actual) -> None:
        if isinstance(expected, Ref):
            if not isinstance(actual, Node):
                raise _Mismatch
            self._bind(expected.id, actual)
        elif isinstance(expected, External):
            known = self.template.externals[expected.slot]
            if not isinstance(actual, Node) or (shape_of(actual), _dtype_of(actual)) != (
                shape_of(known),
                _dtype_of(known),
            ):
                raise _Mismatch
            self.externals[expected.slot] = actual
        elif isinstance(expected, tuple):
            if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
                raise _Mismatch
            for e, a in zip(expected, actual, strict=True):
                self._match_argument(e, a)
        elif isinstance(actual, Node) or _constant(actual) != expected:
            raise _Mismatch

    def _match_sum(self, i: int, node: Node) -> None:
        terms = sum_terms(node, self.info)
        missing: list[int] = []
        for ref in self.template.statements[i].args:
            target = self.bound[ref.id]
            if target is not None and target in terms:
                terms.remove(target)
            elif ref.id < self.template.arity:
                self.undecided.append((i, ref.id))
            else:
                missing.append(ref.id)
        for wanted in missing:
            raw = self.template.raw[wanted]
            assert raw is not None
            found = next((t for d in (3, 1) for t in terms if _alike(t, raw, d)), None)
            if found is None:
                raise _Mismatch
            terms.remove(found)
            self._bind(wanted, found)
        self.injections[i] = terms

    def _settle(self, i: int, wanted: int) -> None:
        left = self.injections[i]
        node = self.bound[wanted]
        if node is not None:
            if node not in left:
                raise _Mismatch
            left.remove(node)
        elif left:
            self._bind(wanted, left.pop())


def _alike(a: object, b: object, depth: int) -> bool:
    """Same operators and shapes, ``depth`` levels down."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return isinstance(a, Node) == isinstance(b, Node)
    if a.target != b.target and a.op == b.op == "call_function":
        return False
    if a.op != b.op or shape_of(a) != shape_of(b):
        return False
    if depth == 0 or a.op != "call_function":
        return True
    return len(a.args) == len(b.args) and all(_alike(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))
