"""Evaluate a group's program for all its links at once, as nodes of the rewritten graph.

A link is ``s' = K s + J s + b``. One interpreter computes each of the three parts and the whole:

    FULL     s' from the state, including injections           (for parameter and side gradients, once)
    STATE    the same without injections: K s + J s             (the input of a heavy operator inside J)
    REST     J s: an elementwise edge passes REST on, a heavy one takes the STATE of its operand
    INJECT   b: the state is zero
    Coefficient(c)   the diagonal of K from state component c: ones in, heavy edges cut

None means zero everywhere, so zeros cost no node.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from hwbp_compiler.graph.chain import Group
from hwbp_compiler.graph.program import INPUT, SUM, External, Ref, Statement, elementwise_argument, references
from hwbp_compiler.graph.rules import Kind, as_written, is_zero, linear_arguments, rule_of, shape_of

from .batching import convolution_backward
from .emitter import Args, Emitter, Keywords, Value

aten = torch.ops.aten
prims = torch.ops.prims


class Mode(enum.Enum):
    FULL = "full"
    STATE = "state"
    REST = "rest"
    INJECT = "inject"


@dataclass(frozen=True)
class Coefficient:
    component: int


Asked = Mode | Coefficient


class Evaluator:
    """Evaluates one group for one set of state values. ``stack(slot)`` gives an external for all lanes.
    ``inject(statement)`` gives the stacked injections of a sum, or None.
    """

    def __init__(
        self,
        emitter: Emitter,
        group: Group,
        states: Sequence[Value | None],
        stack: Callable[[int], Value],
        inject: Callable[[int], Value | None],
    ) -> None:
        self.e = emitter
        self.group = group
        self.program = group.template
        self.states = states
        self.stack = stack
        self.inject = inject
        self._memo: dict[tuple[Asked, int], Any] = {}

    def value(self, mode: Asked, statement: int) -> Any:
        """A Value, a list of Values, a float (a coefficient that is the same number everywhere), or None for zero."""
        todo = [(mode, statement)]
        while todo:  # no recursion over statements, because links can be deep
            key = todo[-1]
            if key in self._memo:
                todo.pop()
                continue
            wanted = [k for k in self._requirements(*key) if k not in self._memo]
            if wanted:
                todo.extend(wanted)
                continue
            self._memo[key] = self._compute(*key)
            todo.pop()
        return self._memo[mode, statement]

    # -- what a statement needs --------------------------------------------------------------------------------

    def _operand_mode(self, mode: Asked, i: int, ref: Ref) -> Asked | None:
        """The mode in which statement i takes ``ref``; None if the edge is cut."""
        if mode is Mode.REST:
            return mode if elementwise_argument(self.program, i, ref) else Mode.STATE
        if isinstance(mode, Coefficient):
            return mode if elementwise_argument(self.program, i, ref) else None
        return mode

    def _requirements(self, mode: Asked, i: int) -> Iterator[tuple[Asked, int]]:
        statement = self.program.statements[i]
        if statement.target is INPUT:
            return
        if self._is_convolution_output(statement):
            i = statement.args[0].id
            statement = self.program.statements[i]
        for ref in references(statement.args):
            wanted = self._operand_mode(mode, i, ref)
            if wanted is not None:
                yield (wanted, ref.id)

    def _is_convolution_output(self, statement: Statement) -> bool:
        return (
            statement.target is operator.getitem
            and isinstance(statement.args[0], Ref)
            and self.program.statements[statement.args[0].id].target is aten.convolution_backward.default
        )

    # -- one statement ------------------------------------------------------------------------------------------

    def _compute(self, mode: Asked, i: int) -> Any:
        statement = self.program.statements[i]
        if statement.target is INPUT:
            return self._input(mode, statement.args[0])
        if statement.target is SUM:
            return self._sum(mode, i)
        if statement.target is operator.getitem:
            return self._item(mode, i)
        if statement.target is aten.convolution_backward.default:
            return None  # evaluated per output, see _item
        return self._operation(mode, i)

    def _input(self, mode: Asked, position: int) -> Value | float | None:
        if mode in (Mode.FULL, Mode.STATE):
            return self.states[position]
        if isinstance(mode, Coefficient) and mode.component == position:
            return 1.0
        return None

    def _sum(self, mode: Asked, i: int) -> Any:
        terms = [self._operand(mode, i, r) for r in self.program.statements[i].args]
        if mode in (Mode.FULL, Mode.INJECT):
            terms.append(self.inject(i))
        terms = [t for t in terms if t is not None]
        if not terms:
            return None
        constant = sum(t for t in terms if isinstance(t, float))
        values = [t for t in terms if isinstance(t, Value)]
        if not values:
            return float(constant)
        total = values[0]
        for other in values[1:]:
            total = self._apply(aten.add.Tensor, (total, other), {})
        return self._apply(aten.add.Tensor, (total, constant), {}) if constant else total

    def _apply(self, target: Any, args: Args, kwargs: Keywords) -> Any:
        return self.e.apply(target, args, kwargs)

    def _operand(self, mode: Asked, i: int, ref: Ref) -> Any:
        wanted = self._operand_mode(mode, i, ref)
        return None if wanted is None else self._memo[wanted, ref.id]

    def _item(self, mode: Asked, i: int) -> Any:
        statement = self.program.statements[i]
        source, which = statement.args
        if self._is_convolution_output(statement):
            args = self._arguments(mode, source.id)
            return None if args is None else convolution_backward(self.e, args, which)
        values = self._operand(mode, i, source)
        return None if values is None else values[which]

    def _operation(self, mode: Asked, i: int) -> Any:
        statement = self.program.statements[i]
        if isinstance(mode, Coefficient):
            short = self._coefficient(mode, i)
            if short is not NotImplemented:
                return short
        args = self._arguments(mode, i)
        if args is None:
            return None
        simple = self._with_zeros(statement.target, args)
        if simple is not NotImplemented:
            return simple
        return self._apply(statement.target, args, self._keywords(statement))

    def _keywords(self, statement: Statement) -> Keywords:
        return {k: self._outside(v) for k, v in statement.kwargs}

    def _outside(self, a: Any) -> Any:
        """An argument that does not depend on the state. Rules take sizes unchanged, not as tensors to batch."""
        if isinstance(a, External):
            value = self.stack(a.slot)
            return value if isinstance(value.tensor, torch.Tensor) else self.e.size(value.node)
        return tuple(map(self._outside, a)) if isinstance(a, tuple) else a

    def _with_zeros(self, target: Any, args: Args) -> Any:
        """add and sub with a zero operand, without creating zeros."""
        if target in (aten.add.Tensor, aten.sub.Tensor) and args[1] is _Zero:
            return args[0]
        if target is aten.add.Tensor and args[0] is _Zero:
            return args[1]
        if target is aten.sub.Tensor and args[0] is _Zero:
            return self._apply(aten.neg.default, (args[1],), {})
        return NotImplemented

    def _arguments(self, mode: Asked, i: int) -> Args | None:
        """The statement's arguments in ``mode``; None if the statement is linear in something that is zero."""
        statement = self.program.statements[i]
        linear = self._linear(i)
        alive = False

        def argument(a: Any, additive: bool) -> Any:
            nonlocal alive
            if isinstance(a, Ref):
                value = self._operand(mode, i, a)
                if value is None and not additive:
                    # This position is not linear. It occurs only when a whole side computation is evaluated.
                    raise AssertionError(f"statement {i} needs a value that is zero")
                if value is not None:
                    alive = alive or additive
                    return value
                return _zero_like(a)
            if isinstance(a, External):
                if additive:
                    nodes = self.group.external(a.slot)
                    if all(is_zero(n) for n in nodes) or mode not in (Mode.FULL, Mode.INJECT):
                        return _zero_external(a)
                    alive = True
                return self._outside(a)
            if isinstance(a, tuple):
                return tuple(argument(x, additive) for x in a)
            return a

        args = tuple(argument(a, p in linear) for p, a in enumerate(statement.args))
        if not alive:
            return None
        if statement.target in (aten.add.Tensor, aten.sub.Tensor) and not statement.kwargs:
            first, second = args[0], args[1]
            zeros = isinstance(first, (_zero_like, _zero_external)), isinstance(second, (_zero_like, _zero_external))
            if any(zeros) and not all(zeros) and self._has_the_shape(i, 1 if zeros[0] else 0):
                return (_Zero if zeros[0] else first, _Zero if zeros[1] else second)
        return tuple(self._materialise(a) for a in args)

    def _has_the_shape(self, i: int, position: int) -> bool:
        """Whether this operand alone has the result's shape. If not, it may broadcast to the shape of the zeros."""
        node = self.program.raw[i]
        assert node is not None
        operand = node.args[position]
        return isinstance(operand, Node) and shape_of(operand) == shape_of(node)

    def _like(self, ref: Ref) -> torch.Tensor:
        node = self.program.raw[ref.id]
        assert node is not None
        value: torch.Tensor = node.meta["val"]
        return value

    def _linear(self, i: int) -> frozenset[int]:
        node = self.program.raw[i]
        assert node is not None
        mine = self.program.statements[i]
        positions = {p for p, a in enumerate(mine.args) if any(True for _ in references((a,)))}
        found = linear_arguments(node, positions)
        # A side statement may have no linear argument in the table; then all its arguments are needed.
        return found if found is not None else frozenset(positions)

    def _materialise(self, a: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(self._materialise(x) for x in a)
        if isinstance(a, _zero_like):
            statement = self.program.statements[a.ref.id]
            like = self._like(a.ref)
            return Value(self.e.full(statement.shape or (), 0.0, like, statement.dtype), False)
        if isinstance(a, _zero_external):
            return self._zeros_like(a.external)
        return a

    # -- coefficients -------------------------------------------------------------------------------------------

    def _coefficient(self, mode: Coefficient, i: int) -> Any:
        """A number stays a number through views, casts and scalings; otherwise it becomes a tensor."""
        statement = self.program.statements[i]
        values = {p: self._operand(mode, i, a) for p, a in enumerate(statement.args) if isinstance(a, Ref)}
        present = {p: v for p, v in values.items() if v is not None}
        if not present:
            return None
        rule = rule_of(self.program.raw[i])
        assert rule is not None
        numbers = {p: v for p, v in present.items() if isinstance(v, float)}
        target = statement.target
        if len(numbers) == 1 and len(present) == 1 and not (target is aten.sub.Tensor and statement.kwargs):
            ((position, number),) = numbers.items()
            if rule.kind is Kind.LAYOUT or target in _IDENTITY:
                return number
            if target is aten.neg.default:
                return -number
            if target is aten.sub.Tensor:
                return number if position == 0 else -number
            if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
                other = statement.args[1 - position]
                if isinstance(other, (int, float)):
                    return number * other if target in (aten.mul.Tensor, aten.mul.Scalar) else number / other
                factor = self._outside(other)
                if isinstance(factor, Value) and target is aten.mul.Tensor:
                    factor = self.e.convert(factor, statement.dtype)
                    return factor if number == 1.0 else self._apply(aten.mul.Tensor, (factor, number), {})
        return self._coefficient_by_operator(mode, i, present)

    def _coefficient_by_operator(self, mode: Coefficient, i: int, present: dict[int, Any]) -> Any:
        statement = self.program.statements[i]
        args: list[Any] = []
        for p, a in enumerate(statement.args):
            if isinstance(a, Ref):
                source = self.program.statements[a.id]
                like = self._like(a)
                v = present.get(p)
                if v is None or isinstance(v, float):
                    v = Value(self.e.full(source.shape or (), v or 0.0, like, source.dtype), False)
                else:
                    v = self._expand(v, source.shape or ())
                args.append(v)
            elif isinstance(a, External):
                args.append(self._zeros_like(a) if a.additive else self._outside(a))
            else:
                args.append(self._outside(a))
        return self._apply(statement.target, tuple(args), self._keywords(statement))

    def _zeros_like(self, external: External) -> Value:
        node = self.program.externals[external.slot]
        return Value(self.e.full(shape_of(node) or (), 0.0, node.meta["val"]), False)

    def _expand(self, value: Value, shape: tuple[Any, ...]) -> Value:
        if tuple(as_written(s) for s in value.shape) == shape:
            return value
        node = self.e.aligned(value, len(shape))
        sizes = [self.e.size(s) for s in shape]
        return Value(
            self.e.call(aten.expand.default, node, [self.e.count, *sizes] if value.batched else sizes), value.batched
        )


_IDENTITY = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
}


class _ZeroType:
    pass


_Zero = _ZeroType()


@dataclass(frozen=True)
class _zero_like:
    ref: Ref


@dataclass(frozen=True)
class _zero_external:
    external: External
