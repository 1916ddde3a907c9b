"""A checked step: compute the exact gradient and that of every rung of the ladder, and compare them.

The backward passes of all rungs are added to the joint graph of ordinary backprop. What they share with it, or with one
another, is computed once. The graph runs in eager mode (:mod:`.halves`): it runs only once in some hundred steps, and
compiling it would take longer than all its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from hwbp_compiler import passes
from hwbp_compiler.cost.devices import COMPILE_NODE
from hwbp_compiler.cost.ladder import Rung, ladder, saved
from hwbp_compiler.engine.watch import last_change
from hwbp_compiler.errors import first_line
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.joint_pass import HighwayPass, warn_once
from hwbp_compiler.options import Options, Truncation

from .measured import Check, Sums, relative
from .merge import Merging
from .observe import copied, first_gradient, observe_with

# A form is worth compiling if that takes no longer than the form saves in so many steps.
STEPS = 1000

_CHUNK = 1 << 22  # how many numbers are held in float64 at a time

library = torch.library.Library("highway", "FRAGMENT")
tags = (torch.Tag.pt2_compliant_tag,)
library.define("moments(Tensor exact, Tensor other) -> Tensor", tags=tags)
moments = torch.ops.highway.moments.default


def _moments(exact: Tensor, other: Tensor) -> Tensor:
    """[3] float64: <exact, other>, |exact|^2, |other|^2."""
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (exact.detach(), other.detach()))
    total = a.new_zeros(3, dtype=torch.float64)
    for x, y in zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True):
        x, y = x.double(), y.double()
        total += torch.stack([x.dot(y), x.dot(x), y.dot(y)])
    return total


library.impl("moments", _moments, "CompositeExplicitAutograd")
torch.library.register_fake(
    "highway::moments", lambda exact, other: exact.new_empty(3, dtype=torch.float64), lib=library
)


@dataclass
class _Approximate:
    """What one tensor of moments compares: the gradient of input number ``position`` in one form, with the exact one or
    (``change``) with the same form at fewer iterations; and the chains it comes from.
    """

    rung: int
    position: int
    chains: tuple[str, ...]
    change: bool = False


@dataclass(frozen=True)
class CheckedPass(HighwayPass):
    """Ordinary backprop by HighwayPass, plus the gradients of other forms.

    given         the forms; if empty, the ladder of the graph
    hands_out     the form whose gradient the step uses; None for exact backprop's
    retraced      ``retraced(options)`` gives the joint graph with other options for what is decided before tracing
                  (loops), and the decisions; None if there is no such thing
    progress      called after each form
    names         of the graph's inputs
    rungs         filled by the pass: the forms compared. If empty, the graph is exact backprop alone
    """

    given: tuple[Truncation, ...] = ()
    hands_out: Truncation | None = None
    retraced: Callable[[Options], tuple[Graph, Sequence[ChainRecord]]] | None = field(
        default=None, compare=False, repr=False
    )
    progress: Callable[[], Any] | None = field(default=None, compare=False, repr=False)
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)
    rungs: list[Rung] = field(default_factory=list, init=False, compare=False, repr=False)
    compared: list[_Approximate] = field(default_factory=list, init=False, compare=False, repr=False)
    watched: list[int] = field(default_factory=list, init=False, compare=False, repr=False)

    def __call__(self, graph: Graph) -> None:
        if not any(is_tangent(node) for node in graph.nodes):
            super().__call__(graph)
            return
        untouched = copied(graph)
        super().__call__(graph)
        found = [Rung(how, inf) for how in self.given]
        if not found and not _talks_to_others(graph):
            found = ladder([*self.loops, *self.records])
        if not found:
            return
        adding = _Adding(graph, self.compared, self.watched)
        for rung in found:
            try:
                self._add(adding, rung, untouched)
            except Exception as error:
                if self.options.strict:
                    raise
                warn_once(first_line(error), f"comparing the form {rung.how} failed", "it is not used")
            if self.progress is not None:
                self.progress()
        adding.finish()

    def _add(self, adding: _Adding, rung: Rung, untouched: Graph) -> None:
        options = self.options.at(rung.how, watched=not self.given)
        nodes = len(untouched.nodes)
        other, loops = (copied(untouched), ()) if self.retraced is None else self.retraced(options)
        origins = _Origins()
        records = [*loops, *passes.run(other, options, origins)]
        worth = rung.saves * STEPS >= (len(other.nodes) - nodes) * COMPILE_NODE
        worth = worth or options.rewrite == "always"
        if worth and adding.add(len(self.rungs), rung.how, other, origins, rung.how == self.hands_out):
            self.rungs.append(rung if rung.how not in self.given else Rung(rung.how, saved(records)))

    def uuid(self) -> str | None:  # type: ignore[override]
        """None, which keeps the graph out of torch.compile's caches, if forms are given. A cache entry for the same
        options could hold code that compares nothing.
        """
        return None if self.given else super().uuid()

    def measured(self, values: Sequence[Tensor], parameters: Sequence[bool], upstream: Sequence[bool]) -> Check:
        """The check that results from the moments. ``parameters`` and ``upstream`` say which inputs are parameters and
        which come from another graph.
        """
        wanted = any(parameters[a.position] for a in self.compared if a.position < len(parameters))
        totals, chains, single, before, above = ([Sums() for _ in self.rungs] for _ in range(5))
        named = self.names if len(self.names) == len(parameters) else ()
        compared, changes = values[: len(self.compared)], values[len(self.compared) :]
        last = [nan for _ in self.rungs]
        for rung, change, size in zip(self.watched, changes[::2], changes[1::2], strict=True):
            last[rung] = relative(change.item(), size.item())
        for entry, tensor in zip(self.compared, compared, strict=True):
            going_on = upstream[entry.position] and not entry.change
            if wanted and not parameters[entry.position] and not going_on:
                continue
            three = tensor.tolist()
            if going_on:
                above[entry.rung].add([""], three)
            if wanted and not parameters[entry.position]:
                continue
            if entry.change:
                before[entry.rung].add([""], three)
                continue
            totals[entry.rung].add([""], three)
            chains[entry.rung].add(entry.chains, three)
            name = named[entry.position] if named else ""
            single[entry.rung].add([name or f"input {entry.position}"], three)
        return Check(
            [rung.how for rung in self.rungs],
            [sums.all for sums in totals],
            [sums.compared() for sums in chains],
            [sums.compared() for sums in single],
            [_change(now, then) for now, then in zip(totals, before, strict=True)],
            [rung.saves for rung in self.rungs],
            [sums.all for sums in above],
            last,
        )


def _change(total: Sums, before: Sums) -> float:
    if "" not in total.sums or "" not in before.sums:
        return nan
    (_, exact, _), (dot, less, more) = total.sums[""], before.sums[""]
    return float((max(less - 2 * dot + more, 0.0) / exact) ** 0.5) if exact else nan


def _talks_to_others(graph: Graph) -> bool:
    """Whether other processes take part in the graph: they would have to make the same check and use the same form."""
    return any(getattr(node.target, "namespace", "").endswith("c10d_functional") for node in graph.nodes)


class _Adding:
    """Adds the gradients of other forms to ``graph``, and the comparison with the exact ones."""

    def __init__(self, graph: Graph, compared: list[_Approximate], watched: list[int]) -> None:
        self.graph, self.compared, self.watched = graph, compared, watched
        self.merging = Merging(graph)
        self.output = graph.output_node()
        self.results: list[Any] = list(self.output.args[0])  # type: ignore[arg-type]
        self.exact = list(self.results)
        self.first = first_gradient(graph)
        self.moments: list[Node] = []
        self.changes: list[Node] = []  # two numbers for each entry of ``watched``
        self.before: dict[tuple[int, float], list[Any]] = {}  # by S and gamma: the last form added

    def add(self, rung: int, how: Truncation, other: Graph, origins: _Origins, hand_out: bool) -> bool:
        """Add a form. Return whether any of its gradients is not exact."""
        compared = len(self.compared)
        change = last_change(other) or ()
        theirs: list[Any] = list(other.output_node().args[0])  # type: ignore[arg-type]
        other.output_node().args = ((*theirs, *change),)
        merged = self.merging.add(other)
        merged, change = merged[: len(theirs)], tuple(merged[len(theirs) :])
        less = self.before.get((how.segment, how.damping))
        self.before[how.segment, how.damping] = merged
        for at in range(self.first, len(self.exact)):
            exact, mine = self.exact[at], merged[at]
            if not isinstance(exact, Node) or not isinstance(mine, Node) or exact is mine:
                continue
            value = exact.meta["val"]
            if not (value.is_floating_point() or value.is_complex()):
                continue
            chains = origins.chains_of(theirs[at])
            self._compare(exact, mine, _Approximate(rung, at - self.first, chains))
            if less is not None:
                self._compare(less[at], mine, _Approximate(rung, at - self.first, chains, change=True))
            if hand_out:
                self.results[at] = mine
        differs = len(self.compared) > compared
        if differs and change:
            self.watched.append(rung)
            self.changes += change
        return differs

    def _compare(self, one: Node, other: Node, what: _Approximate) -> None:
        with self.graph.inserting_before(self.output):
            self.moments.append(self.graph.call_function(moments, (one, other)))
        self.moments[-1].meta["val"] = self._three_numbers(one.meta["val"].device)
        self.compared.append(what)

    def _three_numbers(self, device: torch.device) -> Any:
        """A value in the fake mode of the graph's own values. A graph traced again has values in another fake mode."""
        mode = next(node.meta["val"].fake_mode for node in self.exact[self.first :] if isinstance(node, Node))
        with mode:
            return torch.empty(3, dtype=torch.float64, device=device)

    def finish(self) -> None:
        """Make one gradient depend on the comparison."""
        if self.moments:
            self.output.args = (tuple(self.results),)
            observe_with(self.graph, [*self.moments, *self.changes])
        self.graph.lint()


class _Origins:
    """A watcher of the passes that knows which chain a gradient comes from."""

    def __init__(self) -> None:
        self.chain_of: dict[Node, str] = {}

    def found(self, record: ChainRecord, candidate: Any, origins: Any) -> None: ...

    def found_module(self, records: list[ChainRecord], backward: Node) -> None: ...

    def rewritten(self, record: ChainRecord, candidate: Any, rewriting: Any) -> None:
        self.chain_of |= dict.fromkeys(rewriting.created, record.name)

    def rewrote_module(self, records: list[ChainRecord], created: list[Node]) -> None:
        self.chain_of |= dict.fromkeys(created, records[0].name)

    def chains_of(self, gradient: Node) -> tuple[str, ...]:
        """The chains whose rewritten form ``gradient`` is taken from directly, not the chains before those."""
        found: dict[str, None] = {}
        seen, todo = {gradient}, [gradient]
        while todo:
            node = todo.pop()
            if node in self.chain_of:
                found[self.chain_of[node]] = None
                continue
            todo += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
        return tuple(found)
