"""In the joint graph: ``highway::recurrent_module_backward`` becomes Highway-BP in plain operators, or stays exact.

Exact means PyTorch's own backward kernel where there is one (cuDNN, oneDNN). On a CPU there is none for a GRU or an
RNN, and PyTorch replays every operator of every step. There, everything except the step from state to state is computed
for all steps at once (``recurrence.runs.exact``).
"""

from __future__ import annotations

import copy
import logging
import operator as python
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compiler.cost.decide import Decision, decide, needs_memory
from hwbp_compiler.cost.estimate import Estimate
from hwbp_compiler.cost.modules import estimate_recurrent
from hwbp_compiler.engine.emitter import decompositions
from hwbp_compiler.engine.inline import inline, needed
from hwbp_compiler.graph.origin import module_of, source_line
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.graph.rules import Kind, rule_of
from hwbp_compiler.graph.sizes import bytes_of, hint
from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.reasons import Declined, Reason
from hwbp_compiler.recurrence import gru, lstm, rnn
from hwbp_compiler.recurrence.layer import Gradients, Layer
from hwbp_compiler.recurrence.operator import backward_operator
from hwbp_compiler.recurrence.operator import operator as forward_operator

log = logging.getLogger(__name__)

# The kinds for which PyTorch has no backward kernel on a CPU.
THROUGH_TIME = ("gru", "rnn_tanh", "rnn_relu")

_CELLS = {"gru": gru, "lstm": lstm}
_NAMES = {"gru": "GRU", "lstm": "LSTM", "rnn_tanh": "tanh RNN", "rnn_relu": "ReLU RNN"}


class Watcher(Protocol):
    """Observes, and changes nothing. ``records`` belong to one module: one chain for each layer and direction."""

    def found_module(self, records: list[ChainRecord], backward: Node) -> None:
        """Called before the decision on ``backward``, the module's backward pass as one operator."""

    def rewrote_module(self, records: list[ChainRecord], created: list[Node]) -> None:
        """Called after the module was rewritten."""


def rewrite_recurrent_modules(
    graph: Graph, options: Options, watcher: Watcher | None = None
) -> tuple[list[ChainRecord], set[Node]]:
    """Decide on every recurrent layer of the joint graph and rewrite in place. Returns the decisions and the emitted
    nodes.
    """
    records: list[ChainRecord] = []
    created: set[Node] = set()
    record_nothing(graph)  # except what a backward pass requests
    _join_copies(graph)
    stepwise = _called_step_by_step(graph)
    for node in graph.find_nodes(op="call_function", target=backward_operator):
        call = _BackwardCall.of(node)
        mine = _described(call)
        records += mine
        if watcher is not None:
            watcher.found_module(mine, node)
        call.record(call.wanted)
        decision = call.unsound() or _decide(call, options)
        if node in stepwise and options.iterations != "exact" and not (decision.rewrites or decision.candidates):
            decision = Decision(Reason.CALLED_STEP_BY_STEP.of())
        for record in mine:
            record.estimate, record.candidates = decision.estimate, decision.candidates
            record.because(decision.why)
        if not decision.rewrites and not call.goes_through_time:
            continue
        truncation = options.truncation(call.length) if decision.rewrites else None
        try:
            emitted = []
            if truncation is not None:
                try:
                    emitted = _rewrite(graph, call, truncation, options)
                except Declined as declined:
                    truncation = None
                    for record in mine:
                        record.because(declined.why)
            if truncation is None and call.goes_through_time:
                emitted = _rewrite(graph, call, None, options)
        except Exception as error:
            if options.strict:
                raise
            for record in mine:
                record.failed = True
                record.because(Reason.DEFECT.of(error=f"{type(error).__name__}: {error}"))
            log.debug("rewriting a recurrent layer failed", exc_info=error)
            continue
        created.update(emitted)
        if truncation is not None:
            for record in mine:
                record.rewritten(truncation)
                record.added_bytes = _held_at_once(emitted)
            if watcher is not None:
                watcher.rewrote_module(mine, emitted)
    return _collapsed(records), created


def _called_step_by_step(graph: Graph) -> set[Node]:
    """Backward operators of calls with one step whose state comes from another such call or goes into one."""
    calls = map(_BackwardCall.of, graph.find_nodes(op="call_function", target=backward_operator))
    single = {call.kept.args[0]: call for call in calls if call.unsound() is None and call.length == 1}
    found: set[Node] = set()
    for call in single.values():
        todo, seen = list(call.state), set(call.state)
        while todo:
            node = todo.pop()
            if node in single:
                found |= {call.node, single[node].node}
                continue
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
    return found


def _collapsed(records: list[ChainRecord]) -> list[ChainRecord]:
    """Merge equal refusals of several calls with one step each into one record that counts them."""
    kept: dict[Hashable, ChainRecord] = {}
    for number, record in enumerate(records):
        alike = record.decision == "declined" and record.length == 1
        key = (record.module, record.source, record.reason) if alike else (number,)
        if kept.setdefault(key, record) is not record:
            kept[key].times += 1
    return list(kept.values())


def _described(call: _BackwardCall) -> list[ChainRecord]:
    """One record for each layer and direction."""
    source, module = source_line(call.node), module_of(call.node)
    # Without an elementwise path there is no chain to draw.
    members = [0] * call.length if call.multiplier != "0" else []
    group = GroupRecord(call.length, {"mm": 1}, call.multiplier, module, source)
    record = ChainRecord(
        call.length, "declined", "", call.multiplier, [group], source, module=module,
        sources=[source] if source else [], members=members, modules=[module] * len(members),
    )  # fmt: skip
    return [copy.copy(record) for _ in range(call.chains)]


def _held_at_once(nodes: Sequence[Node], kept: Set[Node] = frozenset()) -> int:
    """The most bytes that these nodes hold at a time. Nodes run in this order, and each is kept until its last use, or
    to the end if it is in ``kept``. Fusion needs less.
    """
    position = {node: i for i, node in enumerate(nodes)}
    owner: dict[Node, Node] = {}  # the node whose memory a node shares
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        rule = rule_of(node)
        source = node.args[0] if rule is not None and rule.kind is Kind.LAYOUT else None
        owner[node] = owner.get(source, node) if isinstance(source, Node) else node
        ends = [len(nodes)] if node in kept else []
        last[owner[node]] = max(
            [i, *ends, last.get(owner[node], 0), *(position.get(u, len(nodes)) for u in node.users)]
        )
    held = most = 0
    freed: dict[int, int] = {}
    for i, node in enumerate(nodes):
        if owner[node] is node:
            size = bytes_of(node.meta.get("val"))
            held += size
            freed[last[node]] = freed.get(last[node], 0) + size
        most = max(most, held)
        held -= freed.pop(i, 0)
    return most


def record_nothing(graph: Graph) -> None:
    """Stop every forward pass from recording."""
    for node in graph.find_nodes(op="call_function", target=forward_operator):
        node.args = (*node.args[:-1], [])


def _join_copies(graph: Graph) -> None:
    """Merge an output with its copy (``replace_recurrent_modules``): nothing is changed in place any more."""
    for forward in graph.find_nodes(op="call_function", target=forward_operator):
        for output in [user for user in forward.users if user.args[1] == 0]:
            for cloned in [user for user in output.users if user.target is torch.ops.aten.clone.default]:
                cloned.replace_all_uses_with(output)
                graph.erase_node(cloned)


@dataclass(frozen=True)
class _BackwardCall:
    """A call of the backward operator; its arguments are nodes."""

    node: Node
    kind: str
    incoming: tuple[Node | None, ...]
    output: Node
    kept: Node
    input: Node
    batch_sizes: Node | None
    state: tuple[Node, ...]
    weights: tuple[Node, ...]
    has_biases: bool
    layers: int
    bidirectional: bool
    autocast: torch.dtype | None
    wanted: list[bool]

    @classmethod
    def of(cls, node: Node) -> _BackwardCall:
        kind, *incoming, output, kept, input, sizes, state, weights = node.args[:10]
        biases, layers, _, _, both, cast, _, wanted = node.args[10:]
        return cls(
            node, kind, tuple(incoming), output, kept, input, sizes, tuple(state), tuple(weights), biases, layers, both,
            cast, list(wanted),
        )  # fmt: skip

    @property
    def chains(self) -> int:
        """One for each layer and direction."""
        return self.layers * (1 + self.bidirectional)

    @property
    def length(self) -> int:
        return hint((self.input if self.batch_sizes is None else self.batch_sizes).meta["val"].shape[0])

    @property
    def multiplier(self) -> str:
        return _CELLS[self.kind].MULTIPLIER if self.kind in _CELLS else "0"

    @property
    def goes_through_time(self) -> bool:
        """Whether its exact backward pass computes everything at once except the step from state to state."""
        alone = self.chains == 1 and self.batch_sizes is None and self.autocast is None
        return self.kind in THROUGH_TIME and self.output.meta["val"].device.type == "cpu" and alone

    def record(self, needed: list[bool]) -> None:
        """Make the forward pass record what these tensors' gradients need."""
        forward = self.kept.args[0]
        assert isinstance(forward, Node)
        forward.args = (*forward.args[:-1], needed)

    def unsound(self) -> Decision | None:
        """Why this cannot be rewritten; None if it can."""
        if self.kind not in _CELLS:
            return Decision(Reason.MODULE_WITHOUT_PATH.of(module=_NAMES[self.kind]))
        if self.batch_sizes is not None:
            return Decision(Reason.PACKED_SEQUENCE.of())
        if len(self.weights) != self.chains * (4 if self.has_biases else 2):
            return Decision(Reason.PROJECTIONS.of())
        if self.autocast is not None:
            return Decision(Reason.MODULE_UNDER_AUTOCAST.of())
        return None


def _decide(call: _BackwardCall, options: Options) -> Decision:
    """The decision on a layer that can be rewritten."""
    input, output = call.input.meta["val"], call.output.meta["val"]

    def estimate(how: Truncation) -> Estimate:
        return estimate_recurrent(call.kind, input, output, how, call.layers, 1 + call.bidirectional)

    # Several layers or directions share a call only if taking them apart would not pay.
    return decide(call.length, options, estimate, may_pay=call.chains == 1)


def _rewrite(graph: Graph, call: _BackwardCall, truncation: Truncation | None, options: Options) -> list[Node]:
    """Rewrite into Highway-BP form, or into exact backprop through time if ``truncation`` is None. Returns the nodes
    emitted. Raises Declined, with the graph unchanged, if that takes more memory than is allowed.
    """
    steps = call.input.meta["val"].shape[0]
    if truncation is not None and not _is_short_of(truncation, call.length, steps):
        raise AssertionError("iterations reach the length")
    given = [n for n in call.incoming if n is not None]
    operands = [*given, call.output, call.input, *call.state, *call.weights]

    def formula(*tensors: Tensor) -> list[Tensor]:
        rest = list(tensors)
        incoming = [rest.pop(0) if n is not None else None for n in call.incoming]
        output, input = rest.pop(0), rest.pop(0)
        state = tuple(rest.pop(0) for _ in call.state)
        layer = Layer(input, output, state, *rest)
        return _gradients(call.kind, layer, incoming, truncation).flat(call.has_biases)

    values = [n.meta["val"] for n in operands]
    with values[-1].fake_mode:
        traced = make_fx(formula, decompositions())(*values)
    created: list[Node] = []

    def emit(node: Node, args: Any, kwargs: Any) -> Node:
        with graph.inserting_before(call.node):
            created.append(graph.create_node(node.op, node.target, args, kwargs))
        created[-1].meta = {**node.meta, "stack_trace": call.node.meta.get("stack_trace")}
        return created[-1]

    results: Any = inline(traced.graph, operands, emit)
    wanted = {results[user.args[1]] for user in call.node.users}
    emitted = needed(operands, wanted & set(created))
    for node in reversed(created):
        if node not in emitted:
            graph.erase_node(node)
    created = [node for node in created if node in emitted]
    held = _held_at_once(created, wanted)
    if truncation is not None and held > (limit := options.memory_limit(values[-1].device)):
        for node in reversed(created):
            graph.erase_node(node)
        raise Declined(needs_memory(held, limit, options))
    for user in list(call.node.users):
        assert user.target is python.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call.node)
    call.record([])
    return created


def _is_short_of(how: Truncation, length: int, steps: Any) -> bool:
    """Whether ``how`` is less than ordinary backprop. If the number of steps is symbolic, the guard recompiles for a
    shorter sequence. (Testing writes out as many iterations as are ordinary backprop of ``length`` steps.)
    """
    needed = (how.iterations + 1) * how.segment if how.segment > 1 else how.iterations
    return bool(steps > needed) or length <= needed


def _gradients(kind: str, layer: Layer, incoming: Sequence[Tensor | None], truncation: Truncation | None) -> Gradients:
    grad_output, grad_h_n, grad_c_n = incoming
    if kind == "lstm":
        assert truncation is not None
        return lstm.gradients(layer, grad_output, grad_h_n, grad_c_n, truncation)
    if kind == "gru":
        return gru.gradients(layer, grad_output, grad_h_n, truncation)
    return rnn.gradients(kind, layer, grad_output, grad_h_n)
