"""Split a step into stages: groups of state components that need one another's last value.

Each stage is computed for all time steps before the next one begins. Values that do not feed back into a state need no
loop: the input's part of the gates, a state that only delays a value, everything the cell returns. Two layers in one
cell are two stages, and so two chains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx
from torch.fx import GraphModule, Node

from .trace import Step, depends_on, fractions_in, operands_outside, subgraph


@dataclass
class Stage:
    """The components ``members`` of the state, and the link from their last values to the next ones.

    link        GraphModule ``(own state, per_step, shared) -> own next state``; None if no member needs a member's last
                value: then nothing recurs here
    per_step    nodes of the step that the link takes, one value per time step
    shared      nodes of the step that are the same at all time steps
    """

    members: list[int]
    link: GraphModule | None
    per_step: list[Node]
    shared: list[Node]


def split_stages(step: Step) -> list[Stage]:
    """The stages in an order in which each needs only earlier ones."""
    graph = step.module.graph
    reach = [depends_on([s], graph) for s in step.state]
    varying = depends_on([*step.state, *step.inputs], graph)
    needs = networkx.DiGraph()
    needs.add_nodes_from(range(len(step.state)))
    for to, node in enumerate(step.next_state):
        needs.add_edges_from((source, to) for source in range(len(step.state)) if node in reach[source])
    stages: list[Stage] = []
    known: set[Node] = set()
    for members in _in_order(needs):
        own = [step.state[m] for m in members]
        results = [step.next_state[m] for m in members]
        if not any(needs.has_edge(a, b) for a in members for b in members):
            stages.append(Stage(members, None, [], []))
        else:
            moving = depends_on(own, graph)
            taken = operands_outside(results, (moving - known) | fractions_in(graph))
            per_step = [n for n in taken if n in varying]
            shared = [n for n in taken if n not in varying]
            link = subgraph([*own, *per_step, *shared], results)
            stages.append(Stage(members, link, per_step, shared))
        known |= {*own, *results}
    return stages


def _in_order(needs: networkx.DiGraph) -> Iterator[list[int]]:
    condensed = networkx.condensation(needs)
    for group in networkx.lexicographical_topological_sort(condensed, key=lambda g: min(condensed.nodes[g]["members"])):
        yield sorted(condensed.nodes[group]["members"])
