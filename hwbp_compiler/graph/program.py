"""A link as a program: the affine map from one state of a chain to the next, cut out of the joint graph.

Note [Normal form]
~~~~~~~~~~~~~~~~~~
Two links are evaluated together if their programs are equal. So a program must not depend on node names, on the order
of nodes in the graph, or on how additions are associated:

- statements are numbered by a depth-first walk from the outputs;
- a tree of single-use additions is one n-ary ``SUM``; its terms are ordered by their structure;
- an operand of a sum that does not depend on the state (a loss at this step, another branch of the model) is an
  *injection*: it is stored separately and is not part of the structure, so a link with a loss and one without are
  equal;
- every output is a sum, if necessary with one term;
- other operands that do not depend on the state (saved tensors, weights) are *externals*: the structure contains only
  their shape and dtype. For a size that a block computes it contains the expression, so links that are evaluated
  together agree in every size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from hwbp_compiler.graph.rules import is_heavy_operator
from hwbp_compiler.reasons import Declined, Reason, Why

from .info import GraphInfo
from .rules import (
    dtype_of,
    form_of,
    is_complex,
    is_elementwise_edge,
    is_never_linear,
    linear_arguments,
    operands,
    operator_name,
    rule_of,
    shape_of,
    size_of,
)

SUM = "sum"
INPUT = "input"
ADD = torch.ops.aten.add.Tensor

State = tuple["Node | None", ...]
"""The nodes that form one state of a chain; None means that the component is zero."""


def why_not_linear(node: Node, on_trunk: bool = False) -> Why:
    """Why a gradient cannot pass ``node`` if ``linear_arguments`` has no answer, in a block or, if ``on_trunk``, on its
    way past the blocks.
    """
    name = operator_name(node)
    if rule_of(node) is not None or is_never_linear(node):
        return Reason.NOT_LINEAR_IN_GRADIENT.of(operator=name)
    if is_complex(node):
        on = f"the state is complex and passes through {name}"
        what = on if on_trunk else f"a block computes with complex numbers ({name})"
        return Reason.COMPLEX.of(what=what)
    return (Reason.NO_RULE_ON_TRUNK if on_trunk else Reason.NO_RULE_IN_BLOCK).of(operator=name)


@dataclass(frozen=True)
class Ref:
    """Argument: the value of statement ``id`` of the same program."""

    id: int


@dataclass(frozen=True)
class External:
    """Argument: the ``slot``-th external. ``additive`` if it is added and not multiplied."""

    slot: int
    additive: bool = False


@dataclass(frozen=True)
class Statement:
    """One operation. ``args`` holds Ref, External and constants. ``kwargs`` holds (name, External or constant), sorted
    by name; no operator is linear in a keyword argument. ``shape`` and ``dtype`` describe the result.
    """

    target: object
    args: tuple
    kwargs: tuple
    shape: tuple | None
    dtype: torch.dtype | None


@dataclass
class Program:
    """An affine map between states.

    statements   in dependency order; the first ``arity`` are the inputs
    raw          the graph node of each statement (None for a zero input)
    outputs      the statement of each component of the next state; () if nothing follows
    externals    node per external slot
    injections   statement -> nodes added to it (only for statements that are sums)
    remainders   output statement -> (node, terms): the node is that output plus terms that depend on the chain itself
                 (a sum over links, such as the gradient of a context that every link reads); the output has no node
    """

    arity: int
    statements: list[Statement] = field(default_factory=list)
    raw: list[Node | None] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    externals: list[Node] = field(default_factory=list)
    injections: dict[int, list[Node]] = field(default_factory=dict)
    remainders: dict[int, tuple[Node, list[Node]]] = field(default_factory=dict)

    @property
    def signature(self) -> tuple:
        outside = tuple(map(form_of, self.externals))
        return (self.arity, tuple(self.statements), tuple(self.outputs), outside)

    @property
    def inputs(self) -> State:
        return tuple(self.raw[: self.arity])

    def copy(self) -> Program:
        """The same link, to which statements can be added without changing this one."""
        return replace(self, statements=list(self.statements), raw=list(self.raw), externals=list(self.externals))

    def statement_of(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.raw) if node is not None}


def sum_terms(root: Node, leaves: Iterable[Node] = ()) -> list[Node]:
    """Leaves of the tree of single-use, equal-shape additions under ``root`` (``[root]`` if it is not an addition)."""
    stop = set(leaves)
    terms: list[Node] = []
    todo = [root]
    while todo:
        node = todo.pop()
        inner = node is root or (len(node.users) == 1 and node not in stop)
        if inner and _is_plain_add(node):
            todo.extend(reversed(node.args))  # type: ignore[arg-type]
        else:
            terms.append(node)
    return terms


def root_of(node: Node) -> Node:
    """The last of the single-use additions that ``node`` is a term of."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target is ADD and not user.kwargs:
        node = user
    return node


def inner_additions(root: Node) -> set[Node]:
    """The single-use additions that are parts of the sum ``root``."""
    found: set[Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        inner = [n for n in node.all_input_nodes if n.target is ADD and len(n.users) == 1] if node.target is ADD else []
        found.update(inner)
        todo += inner
    return found


def _is_plain_add(node: Node) -> bool:
    if node.target is not ADD or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return False
    return all(form_of(a) == form_of(node) for a in node.args)  # type: ignore[arg-type]


def extract(info: GraphInfo, inputs: State, outputs: Sequence[Node], tainted: set[int], last: bool = False) -> Program:
    """The program from state ``inputs`` to state ``outputs``.

    ``tainted`` are the indices of everything that depends on the chain. None of it may enter the link except through
    ``inputs`` (separation: no path bypasses a state). If nothing follows (``last``), other gradients of the state may
    enter; they are stored as remainders. Raises Declined.
    """
    index = info.index
    starts = {index[n] for n in inputs if n is not None}
    ends = {index[n] for n in outputs}
    dependent = {info.nodes[i] for i in info.between(starts, ends)} - {n for n in inputs if n is not None}
    for node in outputs:
        if node not in dependent and node not in inputs:
            raise Declined(Reason.NOTHING_FROM_STEP_BEFORE)
    builder = _Builder(info, dependent, inputs, tainted)
    builder.ends = set(outputs) if last else set()
    return builder.build(outputs)


class _Builder:
    def __init__(self, info: GraphInfo, dependent: set[Node], inputs: State, tainted: set[int]) -> None:
        self.info = info
        self.dependent = dependent
        self.tainted = tainted
        self.ends: set[Node] = set()
        self.program = Program(arity=len(inputs))
        self.id_of: dict[Node, int] = {}
        self.hash_of: list[int] = []
        self.input_nodes = {n for n in inputs if n is not None}
        for position, node in enumerate(inputs):
            like = node if node is not None else next(n for n in inputs if n is not None)
            self._append(Statement(INPUT, (position,), (), shape_of(like), dtype_of(like)), node)

    def _append(self, statement: Statement, raw: Node | None) -> int:
        self.program.statements.append(statement)
        self.program.raw.append(raw)
        self.hash_of.append(self._hash(statement))
        if raw is not None:
            self.id_of[raw] = len(self.program.raw) - 1
        return len(self.program.raw) - 1

    def _hash(self, statement: Statement) -> int:
        def key(value):
            if isinstance(value, Ref):
                return ("ref", self.hash_of[value.id])
            if isinstance(value, External):
                node = self.program.externals[value.slot]
                return ("ext", value.additive, *map(str, form_of(node)))
            if isinstance(value, tuple):
                return tuple(key(v) for v in value)
            return str(value)

        text = repr((str(statement.target), key(statement.args), key(statement.kwargs), str(statement.shape)))
        # Not hash(): for strings it differs between processes, and so would the order of the emitted nodes.
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def build(self, outputs: Sequence[Node]) -> Program:
        for node in outputs:
            self._visit(node, set(outputs))
        for node in outputs:
            i = self.id_of[node]
            if self.program.statements[i].target is not SUM:
                i = self._append(Statement(SUM, (Ref(i),), (), shape_of(node), dtype_of(node)), None)
                self.program.raw[i] = node
            self.program.outputs.append(i)
        used = {ref.id for statement in self.program.statements for ref in references(statement.args)}
        for i in self.program.remainders:
            if i in used:  # a reader of the whole sum would get only a part
                raise Declined(Reason.CONNECTION_SKIPS_STEPS)
            self.program.raw[i] = None
        return _numbered_from_outputs(self.program, self.hash_of)

    def _is_state(self, node: Node) -> bool:
        return node in self.dependent or node in self.input_nodes

    def _visit(self, root: Node, outputs: set[Node]) -> None:
        """Depth-first without recursion, because links can be thousands of nodes deep."""
        todo: list[tuple[Node, bool]] = [(root, False)]
        while todo:
            node, ready = todo.pop()
            if node in self.id_of:
                continue
            terms = self._terms(node, outputs)
            children = [n for _, n in operands(node)] if terms is None else terms
            if not ready:
                todo.append((node, True))
                todo.extend((n, False) for n in reversed(children) if self._is_state(n) and n not in self.id_of)
            elif terms is not None:
                self._add_sum(node, terms)
            else:
                self._add_operation(node)

    def _terms(self, node: Node, outputs: set[Node]) -> list[Node] | None:
        if not _is_plain_add(node):
            return None
        return sum_terms(node, self.input_nodes | (outputs - {node}))

    def _check_outside(self, node: Node) -> None:
        if self.info.index[node] in self.tainted:
            raise Declined(Reason.CONNECTION_SKIPS_STEPS)

    def _add_sum(self, node: Node, terms: list[Node]) -> None:
        inside = [t for t in terms if self._is_state(t)]
        outside = [t for t in terms if not self._is_state(t)]
        remainder = node in self.ends and any(self.info.index[t] in self.tainted for t in outside)
        if remainder:  # a term that the link adds to its state and to a value that every link reads counts for both
            outside += [t for i, t in enumerate(inside) if t in inside[:i]]
            inside = list(dict.fromkeys(inside))
        for term in outside if not remainder else ():
            self._check_outside(term)
        ids = sorted((self.id_of[t] for t in inside), key=lambda i: (self.hash_of[i], i))
        args = tuple(Ref(i) for i in ids)
        i = self._append(Statement(SUM, args, (), shape_of(node), dtype_of(node)), node)
        if remainder:
            self.program.remainders[i] = (node, outside)
        elif outside:
            self.program.injections[i] = outside

    def _add_operation(self, node: Node) -> None:
        positions = {p for p, n in operands(node) if self._is_state(n)}
        linear = linear_arguments(node, positions)
        if linear is None:
            raise Declined(why_not_linear(node))
        args = tuple(self._argument(a, p in linear) for p, a in enumerate(node.args))
        for p in linear - positions:
            added = node.args[p] if p < len(node.args) else 0
            if isinstance(added, Node) and size_of(added) is not None:
                added = "that is a size"
            if isinstance(added, (int, float, str)) and added != 0:
                raise Declined(Reason.ADDS_CONSTANT.of(constant=added))
        # Sorted by name only, because the values may not be comparable. None depends on the state, as checked above.
        kwargs = tuple((k, self._argument(node.kwargs[k], False)) for k in sorted(node.kwargs))
        self._append(Statement(node.target, args, kwargs, shape_of(node), dtype_of(node)), node)

    def _argument(self, value: object, additive: bool):
        if isinstance(value, Node):
            if self._is_state(value):
                return Ref(self.id_of[value])
            self._check_outside(value)
            self.program.externals.append(value)
            return External(len(self.program.externals) - 1, additive)
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(v, additive) for v in value)
        return _constant(value)


def _numbered_from_outputs(program: Program, hash_of: list[int]) -> Program:
    """The same program in the numbering of the normal form: sums are visited in the order of their terms' structure."""
    order = list(range(program.arity))
    seen = set(order)
    for output in program.outputs:
        todo = [(output, False)]
        while todo:
            i, ready = todo.pop()
            if ready:
                order.append(i)
            elif i not in seen:
                seen.add(i)
                todo.append((i, True))
                children = [ref.id for ref in references(program.statements[i].args)]
                if program.statements[i].target is SUM:
                    children.sort(key=hash_of.__getitem__)
                todo.extend((c, False) for c in reversed(children))
    number = {old: new for new, old in enumerate(order)}
    found = Program(program.arity, raw=[program.raw[i] for i in order])

    def argument(value):
        if isinstance(value, Ref):
            return Ref(number[value.id])
        if isinstance(value, External):
            found.externals.append(program.externals[value.slot])
            return External(len(found.externals) - 1, value.additive)
        if isinstance(value, tuple):
            return tuple(argument(v) for v in value)
        return value

    for i in order:
        statement = program.statements[i]
        args = statement.args
        if statement.target is SUM:
            args = tuple(sorted(args, key=lambda r: (hash_of[r.id], number[r.id])))
        found.statements.append(
            replace(statement, args=tuple(argument(a) for a in args), kwargs=argument(statement.kwargs))
        )
    found.outputs = [number[i] for i in program.outputs]
    found.injections = {number[i]: terms for i, terms in program.injections.items()}
    found.remainders = {number[i]: rest for i, rest in program.remainders.items()}
    return found


def references(args: Iterable) -> Iterator[Ref]:
    """All statements that ``args`` refer to, in order and with repetitions."""
    for a in args:
        if isinstance(a, Ref):
            yield a
        elif isinstance(a, tuple):
            yield from references(a)


def closure(program: Program, end: int) -> set[int]:
    """The statements that statement ``end`` depends on, including itself, excluding inputs."""
    needed: set[int] = set()
    todo = [end]
    while todo:
        i = todo.pop()
        if i not in needed and i >= program.arity:
            needed.add(i)
            todo.extend(ref.id for ref in references(program.statements[i].args))
    return needed


def inputs_of(program: Program, end: int) -> set[int]:
    """The components of the state that statement ``end`` depends on."""
    used = {ref.id for i in closure(program, end) for ref in references(program.statements[i].args)}
    return {i for i in used | {end} if i < program.arity}


def has_block(program: Program) -> bool:
    """False if no statement between the states uses the state other than elementwise, so that J = 0."""
    inside = set().union(*(closure(program, i) for i in program.outputs))
    return not all(elementwise_argument(program, i, r) for i in inside for r in references(program.statements[i].args))


def is_heavy(program: Program, i: int) -> bool:
    """Whether statement ``i`` is a heavy operator, as blocks contain them."""
    node = program.raw[i]
    return node is not None and program.statements[i].target not in (SUM, INPUT) and is_heavy_operator(node)


def _constant(value: object):
    """A hashable form of a constant argument; symbolic sizes by their expression."""
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple(_constant(v) for v in value)
    return value


def elementwise_argument(program: Program, statement: int, ref: Ref) -> bool:
    """Whether the result's element i depends only on element i of ``ref``, up to a fixed change of shape.

    The answer must stay the same over time: K is looked for and computed at different moments.
    """
    if program.statements[statement].target is SUM:
        return True
    node, source = program.raw[statement], program.raw[ref.id]
    if node is None or source is None:
        return False
    return is_elementwise_edge(source, node, (program.statements[ref.id].shape, program.statements[statement].shape))
