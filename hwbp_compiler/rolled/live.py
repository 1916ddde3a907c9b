"""Run the batching rules on tensors: every operator is called at once instead of being written into a graph.

AOTAutograd traces what runs here when the recurrence is compiled. The number of time steps and all other sizes are
whatever the tracer uses, including symbols, so no size has to be known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from hwbp_compiler.engine.emitter import Emitter, Value, flattened, mapped
from hwbp_compiler.graph.rules import operands
from hwbp_compiler.reasons import Declined, Reason

aten = torch.ops.aten
prims = torch.ops.prims

# Decompositions produce a few operators for which autograd has no formula. What runs here may still be differentiated.
_DIFFERENTIABLE = {
    prims.convert_element_type.default: lambda tensor, dtype: tensor.to(dtype),
    prims.fma.default: lambda a, b, c: a * b + c,
}


class Live:
    """Replaces a graph node: an operator that has been called, and its result (``meta["val"]``)."""

    __slots__ = ("args", "kwargs", "meta", "target")

    def __init__(self, target: Any, args: tuple, kwargs: dict, value: Any) -> None:
        self.target, self.args, self.kwargs, self.meta = target, args, kwargs, {"val": value}


def constant(value: Any, batched: bool) -> Value:
    """A tensor (``[T, ...]`` if ``batched``) or a size, as an operand of the rules."""
    return Value(Live(None, (), {}, value), batched)  # type: ignore[arg-type]


class LiveEmitter(Emitter):
    """Emits for ``count`` time steps. ``sizes`` maps the traced step's sizes to the actual ones. A size given as an
    expression is a traced one; any other is an actual one.
    """

    def __init__(self, count: Any, sizes: Sizes) -> None:
        self.count = count
        self.here = sizes
        self.created = []
        self.puts = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        function = _DIFFERENTIABLE.get(target, target)
        return Live(target, args, kwargs, function(*_values(args), **_values(kwargs)))

    def size(self, value: Any) -> Any:
        if isinstance(value, Live):
            return value.meta["val"]
        if isinstance(value, sympy.Expr):
            return self.here[value]
        return value

    def reshape(self, node: Any, shape: Sequence) -> Any:
        return self.call(aten.reshape.default, node, [self.size(s) for s in shape])

    def vmap(self, target: Any, args: tuple, kwargs: dict) -> Value | list[Value]:
        values = [v for v in flattened(args) if isinstance(v, Value)]

        def one_step(*tensors: Tensor) -> Any:
            replaced = iter(tensors)
            return target(*mapped(args, lambda _: next(replaced)), **kwargs)

        in_dims = tuple(0 if v.batched else None for v in values)
        try:
            result = torch.vmap(one_step, in_dims=in_dims)(*(v.tensor for v in values))
        except Exception as error:
            raise Declined(Reason.NO_BATCHING_RULE.of(operator=target, error=error)) from error
        if isinstance(result, (tuple, list)):
            return [constant(r, True) for r in result]
        return constant(result, True)


def _values(structure: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.meta["val"] if isinstance(leaf, Live) else leaf, structure)


class AllSteps:
    """Evaluates nodes of a traced step for all time steps at once, each when it is first needed.

    ``known`` are the values to start from: inputs and states, ``[T, ...]``, and values that are the same for all steps.
    """

    def __init__(self, emitter: LiveEmitter, known: Mapping[Node, Value]) -> None:
        self.emitter = emitter
        self.known: dict[Node, Any] = dict(known)

    def __getitem__(self, node: Node) -> Any:
        """Return a Value, or a list of Values for an operator with several results."""
        todo = [node]
        while todo:
            current = todo[-1]
            missing = [n for _, n in operands(current) if n not in self.known] if current not in self.known else []
            if missing:
                todo += missing
                continue
            if current not in self.known:
                self.known[current] = self._evaluate(current)
            todo.pop()
        return self.known[node]

    def _evaluate(self, node: Node) -> Any:
        if node.op != "call_function":
            raise AssertionError(f"{node.op} {node.name} has no value")
        args = self._argument(node.args)
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        if any(isinstance(v, Value) for v in flattened(tuple(kwargs.values()))):
            raise Declined(Reason.TENSOR_BY_KEYWORD.of(operator=node.target))
        if node.target is aten.sym_size.int and args[0].batched:
            return constant(args[0].shape[args[1]], False)
        value = args[0]
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(value, list):
            return value[args[1]]
        return self.emitter.apply(node.target, args, kwargs)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            value = self.known[argument]
            # A size is not a tensor to batch; rules take sizes unchanged.
            return value.tensor if isinstance(value, Value) and not isinstance(value.tensor, Tensor) else value
        if isinstance(argument, (list, tuple)):
            return tuple(self._argument(a) for a in argument)
        return argument


class Sizes:
    """Maps the symbolic sizes of a traced step to the actual ones, given arguments with the sizes in ``values``.

    Every size of an argument gives an equation between its traced expression and the actual size. While tracing goes
    on, torch may find that two symbols are equal, or that one is four times the other. So all expressions, including
    those in a program, are compared in their current form.
    """

    def __init__(self, values: Mapping[Node, Value]) -> None:
        self._known: dict[sympy.Expr, Any] = {}
        self._now: Callable[[sympy.Expr], sympy.Expr] = lambda expression: expression
        pairs = [pair for node, value in values.items() for pair in _sizes(node.meta.get("val"), value)]
        for size, here in pairs:
            self._now = size.node.shape_env.replace
            if size.node.expr.free_symbols:
                self._known.setdefault(size.node.expr, here)
        while any([self._solve(equation) for equation in list(self._known)]):  # one solution may help to solve another
            pass

    def __getitem__(self, expression: sympy.Expr) -> Any:
        """Raises Declined if the arguments do not determine the size."""
        from hwbp_compiler.torch_private import PythonReferenceAnalysis, sympy_interp

        expression = self._now(expression)
        if expression.is_Integer:
            return int(expression)
        names = {known: sympy.Dummy(integer=True, positive=True) for known in self._known}
        plain = expression.xreplace(names)
        if not plain.free_symbols <= set(names.values()):
            raise Declined(Reason.SIZE_NOT_GIVEN.of(size=expression))
        return sympy_interp(PythonReferenceAnalysis, {names[known]: here for known, here in self._known.items()}, plain)

    def _solve(self, equation: sympy.Expr) -> bool:
        """Solve ``a * s + b = here`` for its only unknown symbol s. Return whether that gave a new value."""
        unknown = equation.free_symbols - self._known.keys()
        if len(unknown) != 1:
            return False
        (symbol,) = unknown
        factor = sympy.expand(equation).coeff(symbol)
        rest = sympy.expand(equation - factor * symbol)
        if factor == 0 or symbol in factor.free_symbols | rest.free_symbols:
            return False
        self._known[symbol] = (self._known[equation] - self[rest]) // self[factor]
        return True


def _sizes(traced: Any, value: Value) -> list[tuple[torch.SymInt, Any]]:
    """The symbolic sizes of a traced argument, each with its actual value."""
    if isinstance(traced, Tensor):
        pairs = zip(traced.shape, value.shape, strict=True)
    else:
        pairs = zip([traced], [value.tensor], strict=True)
    return [(size, here) for size, here in pairs if isinstance(size, torch.SymInt)]
