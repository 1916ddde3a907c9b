"""How the rest of a graph depends on equal steps in it: what it takes from them, and which of their changes it could
see.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from hwbp_compiler.reasons import Declined, Reason

from .steps import Carried, Inner, Row, Same, Steps, name_of
from .values import changed_by, example, is_part, memory_of, only_splits, operands, part_of_index


@dataclass(frozen=True)
class Write:
    """Every step writes ``source`` into ``target[indices[t]]``."""

    place: int
    target: Node
    indices: tuple[tuple[Any, ...], ...]
    source: Inner


@dataclass
class Around:
    """The rest of the graph around the steps.

    writes   writes of the steps into tensors made before them; these nodes are not part of the step
    taken    value -> {t: nodes} that the rest of the graph uses
    kept     nodes of the last step that stay, because the rest of the graph needs them and no other step does
    """

    steps: Steps
    writes: list[Write] = field(default_factory=list)
    taken: dict[Inner, dict[int, list[Node]]] = field(default_factory=dict)
    kept: set[Node] = field(default_factory=set)

    @classmethod
    def of(cls, steps: Steps) -> Around:
        """Raises Declined if the rest of the graph sees the steps, or they see it, in a way that a loop would not
        preserve.
        """
        found = cls(steps, list(_writes(steps)))
        found._check_indices()
        found._check_memory()
        found._take()
        return found

    def _check_indices(self) -> None:
        """If a step writes into a tensor of its own, it must be the same place in every step."""
        writing = {write.place for write in self.writes}
        for place, node in enumerate(self.steps.blocks[0]):
            if node.target is operator.setitem and place not in writing:
                for block in self.steps.blocks:
                    before, after = _without_nodes(node.args[1]), _without_nodes(block[place].args[1])
                    if before != after:
                        why = Reason.CONSTANT_DEPENDS_ON_STEP
                        raise Declined(why.of(operator="setitem", before=before, after=after))

    # -- memory --------------------------------------------------------------------------------------------------------

    def _check_memory(self) -> None:
        """Nothing after the loop may change in place what the steps made, and the steps may not read what they write
        into.
        """
        steps = self.steps
        made = set().union(*(memory_of(node) for node in steps.where if node.target is not operator.setitem))
        node = steps.last[-1].next
        while node.op != "root":
            watched = operands(node) if _watches_gradients(node) else changed_by(node)
            if any(memory_of(changed) & made for changed in watched):
                raise Declined(Reason.CHANGED_AFTER_LOOP.of(operator=name_of(node)))
            node = node.next
        written = [memory_of(write.target) for write in self.writes]
        everywhere = set().union(*written)
        if sum(map(len, written)) > len(everywhere):
            raise Declined(Reason.WRITTEN_IS_READ)
        for write in self.writes:
            kept = memory_of(steps.blocks[0][write.source.place])
            for node in steps.blocks[0][write.place + 1 :]:
                if any(memory_of(changed) & kept for changed in changed_by(node)):
                    raise Declined(Reason.CHANGED_AFTER_WRITE)
        targets = {write.place for write in self.writes}
        for place, node in enumerate(steps.blocks[0]):
            pairs = zip(operands(node), steps.sources[place], strict=False)
            for number, (operand, source) in enumerate(pairs):
                if place in targets and number == 0:
                    continue
                read = [operand]
                if isinstance(source, (Row, Carried)):
                    read += [v.root for v in (source.values if isinstance(source, Row) else source.starts)]
                if any(memory_of(r) & everywhere for r in read):
                    raise Declined(Reason.WRITTEN_IS_READ)

    # -- what is taken -------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        steps = self.steps
        last = steps.count - 1
        found: dict[Inner, dict[int, list[Node]]] = {}
        for node, t in self._made():
            if any(self._is_outside(user) for user in node.users):
                inner = steps.inner(node)
                assert inner is not None
                found.setdefault(inner, {}).setdefault(t, []).append(node)
        self._carried = {(c.place, c.parts) for c in steps.of(Carried)}
        changed = [node for block_node in steps.last for node in changed_by(block_node)]
        self._changed = set().union(*map(memory_of, changed))
        self._switches = any(example(node) is None and node.target is not operator.setitem for node in steps.last)
        self.taken = {inner: at for inner, at in found.items() if at.keys() != {last}}
        self._in_all = {inner.place for inner in self.taken}
        for inner, at in found.items():
            if inner not in self.taken or at.keys() == {last}:
                for node in at[last]:
                    self._settle(node, last)

    def _made(self) -> Iterator[tuple[Node, int]]:
        """The steps' nodes and all nodes that take parts of them, with the number of the step."""
        seen: set[Node] = set()
        for node, (t, _) in self.steps.where.items():
            todo = [node]
            while todo:
                node = todo.pop()
                if node in seen:
                    continue
                seen.add(node)
                yield node, t
                users = list(node.users)
                for user in users:
                    if only_splits(user):
                        users += user.users
                    elif is_part(user) and self.steps.inner(user) is not None:
                        todo.append(user)

    def _is_outside(self, user: Node) -> bool:
        if only_splits(user):
            return any(map(self._is_outside, user.users))
        return user not in self.steps.where and not (is_part(user) and self.steps.inner(user) is not None)

    def _settle(self, node: Node, last: int) -> None:
        """Decide how the rest gets a value that it takes only from the last step: from the last state, from nodes of
        that step that stay, or otherwise from a value of all steps.
        """
        level = node
        while True:
            inner = self.steps.inner(level)
            if inner is not None and (inner.place, inner.parts) in self._carried:
                return self._add(inner, last, level)
            if not is_part(level) and not only_splits(level):
                break
            level = level.args[0]  # type: ignore[assignment]
        if self._may_stay(level):
            return self._keep(level, last)
        inner = self.steps.inner(node)
        assert inner is not None
        return self._add(inner, last, node)

    def _add(self, inner: Inner, last: int, node: Node) -> None:
        nodes = self.taken.setdefault(inner, {}).setdefault(last, [])
        if node not in nodes:
            nodes.append(node)

    def _may_stay(self, node: Node) -> bool:
        """Whether the node needs the states before the last step only through that step's results."""
        if node in self.kept:
            return True
        place = self.steps.where[node][1]
        if place in self._in_all or self._switches or any(changed_by(node)):
            return False
        if any(memory_of(n) & self._changed for n in (node, *operands(node))):
            return False
        return not any(isinstance(source, Carried) for source in self.steps.sources[place])

    def _keep(self, node: Node, last: int) -> None:
        if node in self.kept:
            return
        self.kept.add(node)
        for operand in operands(node):
            if self.steps.inner(operand) is not None:
                self._settle(operand, last)


def _without_nodes(index: Any) -> str:
    return repr(map_aggregate(index, lambda item: "node" if isinstance(item, Node) else item))


def _watches_gradients(node: Node) -> bool:
    """A hook, or gradients requested in the graph: both see the whole gradient of their argument."""
    return "hook" in name_of(node) or node.target is torch.autograd.grad


def _writes(steps: Steps) -> Iterator[Write]:
    for place, node in enumerate(steps.blocks[0]):
        if node.target is not operator.setitem or not isinstance(steps.sources[place][0], Same):
            continue  # otherwise it writes into a tensor that the step made or carries
        target, *others = steps.sources[place]
        indices = [part_of_index(block[place].args[1]) for block in steps.blocks]
        if len(others) != 1 or not isinstance(others[0], Inner) or None in indices:
            raise Declined(Reason.STEP_WRITES_OUTSIDE)
        yield Write(place, target.node, tuple(indices), others[0])  # type: ignore[union-attr,arg-type]
