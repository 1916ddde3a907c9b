"""How the forward pass joins one link to the next.

Note [Wires]
~~~~~~~~~~~~
In the backward pass, two products of one gradient can look the same: ``w * a`` is the gradient of the state before a
step ``a * h``, and ``w * h`` is that of the gate. Only the forward pass distinguishes them: the state of one step is an
operand of the next. A *wire* leads from an external of a link to an external of the link before it in the model. The
wires that all links of a chain share determine what its first and its last link must look like.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from .info import GraphInfo
from .match import same_value
from .program import Program
from .rules import operands

Route = tuple[tuple[object, int], ...]
"""The way from a node to an operand of an operand ...: (operator, number of the operand)."""

# Limits of the search. Wires are short, and a link's externals are found within a few operators of it.
_SEARCHED = 200
_OPERATORS_OF_AN_EXTERNAL = 2
_CLIMBED = 3
_USERS = 8


@dataclass(frozen=True)
class End:
    """An external of a link, or a value that it was computed from."""

    slot: int
    route: Route


@dataclass(frozen=True)
class Wire:
    """A path from ``later`` up to a user of users (``up``), over to another operand of it (number ``turn``), and down
    ``down`` to ``earlier`` in the step before. If ``up`` is empty, the path goes straight down.
    """

    later: End
    up: Route
    turn: int
    down: Route
    earlier: End


class Pattern:
    """What consecutive links have in common in their externals. ``pairs`` are (the later one in the model, the earlier
    one). All earlier ones are equal, and so are all later ones.

    shared   slot -> the value that all of them take
    wires    from every link to the next one (the step before it in the model)
    """

    def __init__(self, info: GraphInfo, pairs: Sequence[tuple[Program, Program]]) -> None:
        self.info = info
        equal = {id(n): n for pair in pairs for n in pair if n.statements == pairs[0][1].statements}.values()
        columns = zip(*(link.externals for link in equal), strict=True) if len(equal) > 1 else ()
        self.shared = {
            slot: column[0] for slot, column in enumerate(columns) if all(same_value(n, column[0]) for n in column[1:])
        }
        found = [self._between(later, earlier) for later, earlier in pairs]
        self.wires = set.intersection(*found) if found else set()

    @property
    def is_known(self) -> bool:
        return bool(self.shared or self.wires)

    def fits(self, later: Program) -> Callable[[int, Node], bool]:
        """Return a function that says whether the link before ``later`` in the model can take a node at a slot."""
        ends = [(wire.earlier, self._reached(wire, later)) for wire in self.wires]

        def fits(slot: int, node: Node) -> bool:
            if slot in self.shared and not same_value(node, self.shared[slot]):
                return False
            return all(_follow(node, end.route) in reached for end, reached in ends if end.slot == slot)

        return fits

    def follows(self, earlier: Program, later: Program) -> bool:
        """Whether ``earlier`` can be the link that follows ``later`` in the chain."""
        fits = self.fits(later)
        return all(fits(slot, node) for slot, node in enumerate(earlier.externals))

    def may_be_first(self, link: Program) -> bool:
        """Whether the multiplier of ``link`` is used in the forward pass as in the other links, up to the state of the
        step.

        This matters if a link is only one product with a tensor of the model: ``c * h`` is not a step ``a * h + b``.
        Computed multipliers need no check: they are computed alike in all links, or they do not fit.
        """
        if max(link.outputs) > link.arity + 1:
            return True
        shortest: dict[End, Wire] = {}
        for wire in sorted(self.wires, key=lambda w: len(w.down)):
            shortest.setdefault(wire.earlier, wire)
        asked = [w for end, w in shortest.items() if len(w.up) == 1 and not end.route]
        leaves = [(w, link.externals[w.earlier.slot]) for w in asked]
        return all(self._climbed(n, w.down[::-1]) for w, n in leaves if n.op != "call_function")

    def _between(self, later: Program, earlier: Program) -> set[Wire]:
        """The shortest wires from ``later`` to ``earlier``, from every end to every end."""
        sources, sinks = _ends(later), _ends(earlier)
        common = {node for end, node in sources.items() if sinks.get(end) is node}
        goals: dict[Node, list[End]] = {}
        for end, node in sinks.items():
            if node not in common:
                goals.setdefault(node, []).append(end)
        found: set[Wire] = set()
        for end, node in sources.items():
            if node in common:
                continue
            for starts in self._starts(node):
                mine = {
                    Wire(end, up, turn, route, goal)
                    for up, turn, start in starts
                    for reached, route in _below(start, goals)
                    for goal in goals[reached]
                }
                found |= mine
                if mine:
                    break
        # h is computed from the a of the step before, except the first h. If h itself is reached, that is enough.
        nearest = {w.earlier.slot: len(w.earlier.route) for w in sorted(found, key=lambda w: -len(w.earlier.route))}
        return {w for w in found if len(w.earlier.route) == nearest[w.earlier.slot]}

    def _reached(self, wire: Wire, later: Program) -> set[Node]:
        """The nodes that ``wire`` reaches from ``later``."""
        node = _follow(later.externals[wire.later.slot], wire.later.route)
        if node is None:
            return set()
        starts = [_operand(top, wire.turn) for top in self._climbed(node, wire.up)] if wire.up else [node]
        return {end for n in starts if n is not None and (end := _follow(n, wire.down)) is not None}

    def _climbed(self, node: Node, up: Route) -> set[Node]:
        nodes = {node}
        for target, number in up:
            nodes = {u for n in nodes for u in self._users(n) if u.target == target and _operand(u, number) is n}
        return nodes

    def _users(self, node: Node) -> list[Node]:
        index, carries = self.info.index, self.info.carries
        users = [u for u in node.users if u.op == "call_function" and not carries[index[u]]]
        return users if len(users) <= _USERS else []

    def _starts(self, node: Node) -> Iterator[list[tuple[Route, int, Node]]]:
        """Where wires may start to go down: ``node`` itself, other operands of its users, of their users, and so on."""
        yield [((), 0, node)]
        tops: list[tuple[Route, Node]] = [((), node)]
        for _ in range(_CLIMBED):
            tops = [
                ((*up, (user.target, i)), user)
                for up, top in tops
                for user in self._users(top)
                for i, (_, operand) in enumerate(operands(user))
                if operand is top
            ]
            yield [
                (up, turn, other)
                for up, top in tops
                for turn, (_, other) in enumerate(operands(top))
                if turn != up[-1][1]
            ]


def _ends(link: Program) -> dict[End, Node]:
    found: dict[End, Node] = {}
    for slot, node in enumerate(link.externals):
        for route, inner in _walk(node, _OPERATORS_OF_AN_EXTERNAL):
            found.setdefault(End(slot, route), inner)
    return found


def _walk(node: Node, depth: int) -> Iterator[tuple[Route, Node]]:
    yield (), node
    if depth:
        for number, (_, operand) in enumerate(operands(node)):
            for route, inner in _walk(operand, depth - 1):
                yield ((node.target, number), *route), inner


def _below(start: Node, goals: Container[Node]) -> Iterator[tuple[Node, Route]]:
    """Every goal that ``start`` depends on, with the shortest route to it."""
    routes: dict[Node, Route] = {start: ()}
    todo = deque([start])
    while todo and len(routes) < _SEARCHED:
        node = todo.popleft()
        if node in goals:
            yield node, routes[node]
        for number, (_, operand) in enumerate(operands(node)):
            if operand not in routes:
                routes[operand] = (*routes[node], (node.target, number))
                todo.append(operand)


def _operand(node: Node, number: int) -> Node | None:
    found = operands(node)
    return found[number][1] if number < len(found) else None


def _follow(node: Node, route: Route) -> Node | None:
    for target, number in route:
        below = _operand(node, number) if node.target == target else None
        if below is None:
            return None
        node = below
    return node
