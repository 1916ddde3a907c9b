"""K as readable text."""

from __future__ import annotations

import re

import sympy
import torch
from torch.fx import Node

from .program import INPUT, SUM, External, Program, Ref, elementwise_argument
from .rules import Kind, rule_of, size_of

aten = torch.ops.aten
prims = torch.ops.prims

_TRANSPARENT = {"clone", "alias", "detach", "_to_copy", "convert_element_type", "expand", "view", "_unsafe_view"}
_TRANSPARENT |= {"reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "getitem", "select", "slice"}
_TRANSPARENT |= {"split", "split_with_sizes", "unbind", "chunk"}
# In the backward pass a complex factor is the conjugate of the forward one. The text describes the forward one.
_TRANSPARENT |= {"conj", "_conj", "conj_physical", "_conj_physical", "resolve_conj"}
_MASKS = {"le", "lt", "ge", "gt", "eq", "ne", "logical_not", "logical_and", "logical_or", "bitwise_not", "bernoulli"}
_COMPLEMENTS = {"le", "lt", "logical_not", "bitwise_not", "eq"}
_DEPTH = 4

STANDS_FOR = "highway_stands_for"
"""Meta key for an argument of a graph cut out of another one: the original node."""


def multiplier(program: Program, to: int, source: int) -> sympy.Expr:
    """The diagonal of K from component ``source`` to ``to``, over named factors (PAPER section 2 as an expression)."""
    values: list[sympy.Expr | None] = []
    for i, statement in enumerate(program.statements[: program.outputs[to] + 1]):
        if statement.target is INPUT:
            values.append(sympy.Integer(1) if i == source else None)
        else:
            values.append(_statement(program, i, values))
    result = values[program.outputs[to]]
    return sympy.Integer(0) if result is None else sympy.simplify(result)


def _statement(program: Program, i: int, values: list) -> sympy.Expr | None:
    statement = program.statements[i]

    def argument(a):
        if isinstance(a, Ref):
            return values[a.id] if elementwise_argument(program, i, a) else None
        if isinstance(a, External):
            return describe(program.externals[a.slot])
        return sympy.sympify(a) if isinstance(a, (int, float)) and not isinstance(a, bool) else None

    carried = [
        (p, values[a.id])
        for p, a in enumerate(statement.args)
        if isinstance(a, Ref) and elementwise_argument(program, i, a) and values[a.id] is not None
    ]
    if not carried:
        return None
    if statement.target is SUM:
        return sum((v for _, v in carried), sympy.Integer(0))
    node = program.raw[i]
    rule = rule_of(node) if node is not None else None
    if rule is None or rule.kind not in (Kind.ELEMENTWISE, Kind.LAYOUT):
        return None
    name = _name(statement.target)
    position, value = carried[0]
    if rule.kind is Kind.LAYOUT or name in _TRANSPARENT:
        return value
    if name == "neg":
        return -value
    if name == "sub":
        first = next((v for p, v in carried if p == 0), sympy.Integer(0))
        return first - next((v for p, v in carried if p == 1), sympy.Integer(0))
    if name == "add":
        return sum((v for _, v in carried), sympy.Integer(0))
    if name in ("mul", "div"):
        other = argument(statement.args[1 - position])
        if other is None:
            return value
        return value * other if name == "mul" else value / other
    if name == "where":
        condition = statement.args[0]
        chosen = program.externals[condition.slot] if isinstance(condition, External) else node
        assert chosen is not None
        mask = _symbol("mask", chosen)
        # where(x <= 0, 0, g) keeps what a ReLU's mask keeps: its condition is the complement of the mask.
        where_kept = 2 if _name(chosen.target) in _COMPLEMENTS else 1
        return sum((v * (mask if p == where_kept else 1 - mask) for p, v in carried), sympy.Integer(0))
    if name == "fma":
        a, b, _ = statement.args
        product = [argument(x) for x in (a, b)]
        total = product[0] * product[1] if any(p in (0, 1) for p, _ in carried) and None not in product else 0
        return total + sum(v for p, v in carried if p == 2)
    return value * sympy.Symbol(f"{name}(...)")


def _name(target: object) -> str:
    named = getattr(target, "overloadpacket", target)
    return str(getattr(named, "__name__", named))


def describe(node: Node, depth: int = _DEPTH) -> sympy.Expr:
    """A factor named by its origin: ``sigmoid(...)``, ``mask``, ``weight``, ``1/sigma``."""
    if STANDS_FOR in node.meta:
        return describe(node.meta[STANDS_FOR], depth)
    if size_of(node) is not None:
        return _symbol("size", node)
    if node.op != "call_function":
        return _symbol("weight", node)
    name = _name(node.target)
    if name in _MASKS:
        return _symbol("mask", node)
    if name in _TRANSPARENT and isinstance(node.args[0], Node):
        return describe(node.args[0], depth)
    if name in ("full", "scalar_tensor") and isinstance(node.args[-1], (int, float)):
        return sympy.sympify(node.args[-1])
    if name == "rsqrt":
        return 1 / _symbol("sigma", node)
    if name == "sqrt":
        return _symbol("sigma", node)
    if depth and name in ("add", "sub", "mul", "div", "neg", "reciprocal") and len(node.args) <= 2:
        parts = [
            describe(a, depth - 1) if isinstance(a, Node) else sympy.sympify(a)
            for a in node.args
            if isinstance(a, (Node, int, float))
        ]
        if len(parts) == len(node.args):
            return _combine(name, parts)
    return _symbol(f"{name}(...)", node)


def _symbol(name: str, node: Node | None) -> sympy.Symbol:
    """A symbol per node: two sigmoids, or two masks, are different factors, although the text gives them one name."""
    return sympy.Symbol(f"{name}@{node.name if node is not None else ''}", positive=True)


def _combine(name: str, parts: list) -> sympy.Expr:
    if name == "add":
        return parts[0] + parts[1]
    if name == "sub":
        return parts[0] - parts[1]
    if name == "mul":
        return parts[0] * parts[1]
    if name == "div":
        return parts[0] / parts[1]
    return -parts[0] if name == "neg" else 1 / parts[0]


def multiplier_text(program: Program, support: frozenset[tuple[int, int]]) -> str:
    """K of one link: ``"1"``, ``"sigmoid(...)"``, ``"weight/sigma"``. A state of several components has one entry per
    elementwise path, in the direction of the forward pass (``"c->h: ..."``).
    """
    if support == {(0, 0)}:
        return _text(multiplier(program, 0, 0))
    names = _component_names(program.arity, support)
    # The gradient goes from component `source` to component `to`; the forward path goes the other way.
    return "; ".join(
        f"{names[to]}->{names[source]}: {_text(multiplier(program, to, source))}" for to, source in sorted(support)
    )


def _component_names(width: int, support: frozenset[tuple[int, int]]) -> list[str]:
    if width == 2 and (1, 1) in support and (0, 0) not in support:
        return ["h", "c"]  # only the second feeds itself: hidden and cell state
    return [f"s{i + 1}" for i in range(width)]


def _text(expression: sympy.Expr) -> str:
    text = re.sub(r"@\w*", "", str(expression))
    text = re.sub(r"\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):g}", text)
    return re.sub(r"(?<![\w.)])1\*", "", text)
