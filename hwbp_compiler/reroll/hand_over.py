"""Pass the results of a loop to the users of its steps."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from .series import Writer, joined
from .values import is_part, only_splits

# Up to so many rows are taken one by one. More are taken all at once, so that their gradient is one tensor.
_FEW = 4


@dataclass
class HandOver:
    """One value of every step, or of the last.

    gone    the steps' nodes, which will be erased
    at      nodes that hold the value, by the number of the step
    series  the values of all ``count`` steps; None if only the last is used
    state   the last value, if it is part of the state
    """

    write: Writer
    gone: set[Node]
    at: dict[int, list[Node]]
    series: Node | None
    state: Node | None
    count: int
    rows: dict[int, Node] = field(default_factory=dict)

    def run(self) -> None:
        order = {node: t for t, nodes in self.at.items() for node in nodes}
        for consumer in dict.fromkeys(user for node in order for user in node.users):
            if not self._stays(consumer):
                continue
            if self.series is not None and self._joins(consumer, order):
                continue
            for node in list(consumer.all_input_nodes):
                if node in order:
                    consumer.replace_input_with(node, self._one(order[node], consumer.op == "output"))

    def _stays(self, user: Node) -> bool:
        if user in self.gone:
            return False
        return not (is_part(user) or only_splits(user)) or any(map(self._stays, user.users))

    def _joins(self, consumer: Node, order: dict[Node, int]) -> bool:
        graph = self.write.graph
        with graph.inserting_before(consumer):
            assert self.series is not None
            found = joined(consumer, order, self.series, self.count, self.write)
        if found is None:
            return False
        consumer.replace_all_uses_with(found)
        graph.erase_node(consumer)
        return True

    def _one(self, t: int, leaves: bool) -> Node:
        if t == self.count - 1 and self.state is not None:
            return self.state
        assert self.series is not None
        if t not in self.rows:
            if len(self.at) <= _FEW:
                self.rows[t] = self.write.call(torch.select, self.series, 0, t)
            else:
                apart = self.rows.setdefault(-1, self._apart())
                self.rows[t] = self.write.call(operator.getitem, apart, t)
        # The caller of a model may change what it returns.
        return self.write.call(torch.clone, self.rows[t]) if leaves else self.rows[t]

    def _apart(self) -> Node:
        return self.rows.get(-1) or self.write.call(torch.unbind, self.series, 0)
