"""In the joint graph: ``highway::recurrent_backward`` becomes Highway-BP in plain operators, or stays exact.

Exact is PyTorch's own backward kernel where it has one (cuDNN, oneDNN). On a CPU it has none for a GRU or an RNN, and
replays every operator of every step; there all but the step from state to state is done at once (``through_time``).
"""

from __future__ import annotations

import logging
import operator as python
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compiler.graph.batching import decompositions
from hwbp_compiler.graph.origin import module_of, source_line
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.options import Options
from hwbp_compiler.recurrence import gru, lstm, rnn
from hwbp_compiler.recurrence.layer import Gradients, Layer
from hwbp_compiler.recurrence.operator import backward_operator
from hwbp_compiler.recurrence.operator import operator as forward_operator

from .decide_recurrent import estimate_recurrent

log = logging.getLogger(__name__)

THROUGH_TIME = ("gru", "rnn_tanh", "rnn_relu")

_CELLS = {"gru": gru, "lstm": lstm}
_NO_PATH = "no elementwise path: a step of a {} sees the state before it through a matrix alone (K = 0)"
_NAMES = {"gru": "GRU", "lstm": "LSTM", "rnn_tanh": "tanh RNN", "rnn_relu": "ReLU RNN"}


def rewrite_recurrent_modules(graph: Graph, options: Options) -> tuple[list[ChainRecord], set[Node]]:
    """Decide every recurrent layer of the joint graph and rewrite in place; what was decided, and the nodes emitted."""
    records: list[ChainRecord] = []
    created: set[Node] = set()
    record_nothing(graph)  # but what a backward pass asks for
    _join_copies(graph)
    for node in graph.find_nodes(op="call_function", target=backward_operator):
        call = _Backward.of(node)
        record = _described(call)
        records += [record] * call.chains
        call.record(call.wanted)
        reason = call.unsound() or _decline(call, options, record)
        if reason is not None:
            record.reason = reason
            if not call.goes_through_time:
                continue
        iterations = None if reason is not None else int(options.iterations)
        try:
            created |= _rewrite(graph, call, iterations, options.damping)
        except Exception as error:
            if options.strict:
                raise
            record.failed, record.reason = True, f"{type(error).__name__}: {error}"
            log.debug("rewriting a recurrent layer failed", exc_info=error)
            continue
        if reason is None:
            record.decision = "rewritten"
    return records, created


def _described(call: _Backward) -> ChainRecord:
    source, module = source_line(call.node), module_of(call.node)
    group = GroupRecord(call.length, {"mm": 1}, call.multiplier, module, source)
    return ChainRecord(
        call.length, "declined", "", call.multiplier, [group], source, module=module, sources=[source] if source else []
    )


def record_nothing(graph: Graph) -> None:
    """Let no forward pass record."""
    for node in graph.find_nodes(op="call_function", target=forward_operator):
        node.args = (*node.args[:-1], [])


def _join_copies(graph: Graph) -> None:
    """Nothing is changed in place any more: an output and its copy (``replace_recurrent_modules``) are one."""
    for forward in graph.find_nodes(op="call_function", target=forward_operator):
        for output in [user for user in forward.users if user.args[1] == 0]:
            for copy in [user for user in output.users if user.target is torch.ops.aten.clone.default]:
                copy.replace_all_uses_with(output)
                graph.erase_node(copy)


@dataclass(frozen=True)
class _Backward:
    """A call of the backward operator, its arguments being nodes."""

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
    def of(cls, node: Node) -> _Backward:
        kind, *incoming, output, kept, input, sizes, state, weights = node.args[:10]
        biases, layers, _, _, both, cast, _, wanted = node.args[10:]
        return cls(
            node, kind, tuple(incoming), output, kept, input, sizes, tuple(state), tuple(weights), biases, layers, both,
            cast, list(wanted),
        )  # type: ignore[arg-type]  # fmt: skip

    @property
    def chains(self) -> int:
        """One for each layer and direction."""
        return self.layers * (1 + self.bidirectional)

    @property
    def length(self) -> int:
        steps = (self.input if self.batch_sizes is None else self.batch_sizes).meta["val"].shape[0]
        return steps if isinstance(steps, int) else int(steps.node.hint)

    @property
    def multiplier(self) -> str:
        return _CELLS[self.kind].MULTIPLIER if self.kind in _CELLS else "0"

    @property
    def goes_through_time(self) -> bool:
        """Whether its exact backward pass can be all but the step from state to state at once, and is faster so."""
        on_a_cpu = self.output.meta["val"].device.type == "cpu"
        alone = self.chains == 1 and self.batch_sizes is None and self.autocast is None
        return self.kind in THROUGH_TIME and on_a_cpu and alone

    def record(self, needed: list[bool]) -> None:
        """Let the forward pass record what leads to these tensors."""
        forward = self.kept.args[0]
        assert isinstance(forward, Node)
        forward.args = (*forward.args[:-1], needed)

    def unsound(self) -> str | None:
        """Why this cannot be rewritten; None if it can."""
        if self.kind not in _CELLS:
            return _NO_PATH.format(_NAMES[self.kind])
        if self.batch_sizes is not None:
            return "a packed sequence: its steps have batches of different sizes. PyTorch's own kernel is used"
        if len(self.weights) != self.chains * (4 if self.has_biases else 2):
            return "an LSTM with projections (proj_size). PyTorch's own kernel is used"
        if self.autocast is not None:
            return "under autocast PyTorch's own kernel is used"
        return None


def _decline(call: _Backward, options: Options, record: ChainRecord) -> str | None:
    """Why the layer is left to ordinary backprop, or None. Puts the estimate into ``record``."""
    if options.iterations == "exact":
        record.advice = f"Any iterations below {call.length}."
        return 'iterations="exact" asks for ordinary backprop'
    if call.length < options.min_length:
        record.advice = f"min_length={call.length} lets it be considered."
        return f"shorter than min_length={options.min_length}"
    if options.iterations >= call.length:
        record.advice = f"iterations below {call.length}, or leave it: these gradients are exact."
        return f"iterations={options.iterations} reaches the chain's length {call.length}: that is ordinary backprop"
    expected = estimate_recurrent(
        call.kind, call.input.meta["val"], call.output.meta["val"], int(options.iterations)
    )
    record.estimate = expected
    if options.rewrite == "always":
        record.reason = f'rewrite="always"; estimated {expected}'
    elif expected.pays:
        record.reason = f"expected to be faster: {expected}"
    else:
        record.advice = 'rewrite="always" rewrites it all the same; fewer iterations or a smaller batch may pay.'
        return f"not expected to be faster: {expected}"
    return None


def _rewrite(graph: Graph, call: _Backward, iterations: int | None, damping: float) -> set[Node]:
    """In Highway-BP form; exact, through time, if ``iterations`` is None."""
    steps = call.input.meta["val"].shape[0]
    if iterations is not None and not steps > iterations:  # symbolic: the guard makes a shorter sequence compile anew
        raise AssertionError("iterations reach the length")
    given = [n for n in call.incoming if n is not None]
    operands = [*given, call.output, call.input, *call.state, *call.weights]

    def formula(*tensors: Tensor) -> list[Tensor]:
        rest = list(tensors)
        incoming = [rest.pop(0) if n is not None else None for n in call.incoming]
        output, input = rest.pop(0), rest.pop(0)
        state = tuple(rest.pop(0) for _ in call.state)
        layer = Layer(input, output, state, *rest)
        return _gradients(call.kind, layer, incoming, iterations, damping).flat(call.has_biases)

    values = [n.meta["val"] for n in operands]
    with values[-1].fake_mode:
        traced = make_fx(formula, decompositions())(*values)
    created, results = _inline(graph, call.node, traced.graph, operands)
    for user in list(call.node.users):
        assert user.target is python.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call.node)
    call.record([])
    alive = set(created)
    for node in reversed(created):
        if not node.users:
            graph.erase_node(node)
            alive.discard(node)
    return alive


def _gradients(
    kind: str, layer: Layer, incoming: Sequence[Tensor | None], iterations: int | None, damping: float
) -> Gradients:
    grad_output, grad_h_n, grad_c_n = incoming
    if kind == "lstm":
        assert iterations is not None
        return lstm.gradients(layer, grad_output, grad_h_n, grad_c_n, iterations, damping)
    if kind == "gru":
        return gru.gradients(layer, grad_output, grad_h_n, iterations, damping)
    return rnn.gradients(kind, layer, grad_output, grad_h_n)


def _inline(graph: Graph, before: Node, traced: Graph, operands: Sequence[Node]) -> tuple[list[Node], Any]:
    """Copy a traced graph to ``before``: the new nodes, and its results."""
    environment: dict[Node, Node] = {}
    remaining = iter(operands)
    created: list[Node] = []
    for node in traced.nodes:
        if node.op == "placeholder":
            environment[node] = next(remaining)
        elif node.op == "call_function":
            with graph.inserting_before(before):
                new = graph.node_copy(node, environment.__getitem__)
            new.meta = {**node.meta, "stack_trace": before.meta.get("stack_trace")}
            created.append(new)
            environment[node] = new
        elif node.op == "output":
            return created, torch.fx.map_arg(node.args[0], environment.__getitem__)
        else:
            raise NotImplementedError(f"a traced constant ({node.target}) cannot be inlined")
    raise AssertionError("no output")
