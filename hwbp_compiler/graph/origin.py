"""Find where in the user's model a link comes from: its source line and its module.

Autograd numbers the calls of the forward pass, and the backward nodes of a call carry the call's number
(``meta["seq_nr"]``). So the nodes of a link identify the forward nodes of its block. The residual addition or gated
update is the addition that uses the block's result.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .program import Program
from .rules import Kind, rule_of

aten = torch.ops.aten

_ADDITIONS = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.lerp.Tensor,
    aten.lerp.Scalar,
    aten.addcmul.default,
    torch.ops.prims.fma.default,
}
# Copies of a value that is saved for the backward pass.
_COPIES = {aten.alias.default, aten.detach.default}
# Between a block's last call and the addition there may be a view, a cast, a dropout mask or a scale.
_STEPS_TO_ADDITION = 12


@dataclass(frozen=True)
class Origin:
    """The origin of one link; fields are empty if unknown.

    source    ``file:line: code`` of the residual addition or gated update
    module    dotted name of the module whose code adds
    inside    dotted name of the module that holds the block
    forward   the block's forward nodes and the addition, in the order they run
    addition  the node that adds
    """

    source: str = ""
    module: str = ""
    inside: str = ""
    forward: tuple[Node, ...] = ()
    addition: Node | None = None


class Origins:
    """The forward nodes of a joint graph by the number of their call. Built once, before anything is rewritten."""

    def __init__(self, graph: Graph) -> None:
        self.order: dict[Node, int] = {}
        self.by_call: dict[int, list[Node]] = {}
        for i, node in enumerate(graph.nodes):
            self.order[node] = i
            call = node.meta.get("seq_nr")
            if node.op == "call_function" and call is not None and not _is_backward(node):
                self.by_call.setdefault(call, []).append(node)

    def of_link(self, link: Program) -> Origin:
        return self.of_nodes(n for n in link.raw[link.arity :] if n is not None)

    def of_nodes(self, nodes: Iterable[Node]) -> Origin:
        """The origin of a block, from some of its backward nodes."""
        nodes = list(nodes)
        calls = {n.meta.get("seq_nr") for n in nodes if not _accumulates(n)}
        forward = sorted((n for c in calls for n in self.by_call.get(c, ())), key=self.order.__getitem__)
        if not forward:
            return Origin(next(filter(None, map(source_line, nodes)), ""))
        addition = self._addition(forward)
        heavy = [n for n in forward if _kind(n) is Kind.HEAVY] or forward
        run = sorted({*forward, addition}, key=self.order.__getitem__)
        return Origin(
            source_line(addition) or source_line(forward[-1]),
            module_of(addition),
            common([module_of(n) for n in heavy]),
            tuple(run),
            addition,
        )

    def modules(self, origin: Origin) -> list[str]:
        """The modules of a stretch of blocks, found from every addition that is like the last one and on its line, in
        order.

        An addition leaves no node in the backward graph. So the additions of the stretch are searched for between its
        first node and the last addition. A batch norm's additions on the same line differ in their shapes.
        """
        last = origin.addition
        if last is None:
            return []
        start, end = self.order[origin.forward[0]], self.order[last]
        source = source_line(last)
        return [
            module_of(node)
            for node, i in self.order.items()
            if start <= i <= end
            and node.target == last.target
            and _shape(node) == _shape(last)
            and not _is_backward(node)
            and (node is last or _adds(node) and source_line(node) == source)
        ]

    def _addition(self, forward: Sequence[Node]) -> Node:
        """The residual addition or gated update of a block: the addition that uses its last value, or that made it."""
        last = forward[-1]
        while last.target in _COPIES and not self._users(last):
            last = last.all_input_nodes[0]
        inside = set(forward)
        first = self.order[forward[0]]
        # The node that runs last may be a side output (a penalty). The right addition also uses a value from before the
        # block, no matter which value of the block leads to it. If there are several blocks, it is that of the last
        # one.
        heaviest = max((self.order[n] for n in forward if _kind(n) is Kind.HEAVY), default=-1)
        found = [
            addition
            for node in (last, *reversed(forward))
            for addition in self._additions_behind(node)
            if self.order[addition] > heaviest
            and any(self._is_from_before(operand, first, inside) for operand in addition.all_input_nodes)
        ]
        if found:  # additions to a batch norm's running statistics count too, but are small
            return max(found, key=lambda addition: len(_shape(addition)))
        for addition in self._additions_behind(last):
            return addition
        todo, seen = [last], {last}
        while todo:
            # Latest first: of several sums that lead to the last value, take the nearest.
            node = todo.pop(max(range(len(todo)), key=lambda i: self.order[todo[i]]))
            if _adds(node):
                return node
            for source in node.all_input_nodes:
                if source not in seen and (source in inside or self.order.get(source, -1) > first):
                    seen.add(source)
                    if _kind(source) is not Kind.HEAVY:
                        todo.append(source)
        return last

    def _additions_behind(self, node: Node) -> Iterator[Node]:
        """The additions that use ``node``, reached only through elementwise operators and layout changes with a single
        user.
        """
        for _ in range(_STEPS_TO_ADDITION):
            users = self._users(node)
            if len(users) != 1 or _kind(users[0]) not in (Kind.ELEMENTWISE, Kind.LAYOUT):
                return
            node = users[0]
            if _adds(node):
                yield node

    def _is_from_before(self, node: Node, first: int, inside: set[Node]) -> bool:
        """Whether the node depends on nothing in the block (nodes ``inside``, beginning at position ``first``)."""
        todo, seen = [node], {node}
        while todo:
            node = todo.pop()
            if node in inside:
                return False
            for source in node.all_input_nodes:
                if source not in seen and self.order.get(source, -1) >= first:
                    seen.add(source)
                    todo.append(source)
        return True

    def _users(self, node: Node) -> list[Node]:
        """The users of ``node`` in the forward pass, without copies that are kept only for the backward pass."""
        users = [u for u in node.users if u in self.order and not _is_backward(u)]
        return [u for u in users if u.target not in _COPIES or self._users(u)]


def _kind(node: Node) -> Kind | None:
    if node.target in _FORWARD_HEAVY:
        return Kind.HEAVY
    if node.target in _ADDITIONS:
        return Kind.ELEMENTWISE
    rule = rule_of(node)
    return None if rule is None else rule.kind


# The rule table is about gradients; these operators occur only in the forward pass.
_FORWARD_HEAVY = {aten.convolution.default, aten._scaled_dot_product_flash_attention_for_cpu.default}


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _adds(node: Node) -> bool:
    """Whether the node adds two tensors of one shape. The bias of a layer and the epsilon of a norm do not count."""
    if node.target not in _ADDITIONS:
        return False
    shapes = [tuple(n.meta["val"].shape) for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    mine = node.meta.get("val")
    return isinstance(mine, torch.Tensor) and sum(s == tuple(mine.shape) for s in shapes) >= 2 and mine.dim() > 0


def _is_backward(node: Node) -> bool:
    return bool(node.meta.get("autograd_backward")) or node.meta.get("partitioner_tag") == "is_backward"


def _accumulates(node: Node) -> bool:
    """Autograd's own additions belong to no call of the forward pass, whatever number they carry."""
    return bool(node.meta.get("is_gradient_acc")) or _ACCUMULATION in (node.meta.get("stack_trace") or "")


_ACCUMULATION = "Gradient addition node"


# -- names ------------------------------------------------------------------------------------------------------


def source_line(node: Node) -> str:
    """``file:line: code`` of the user's innermost line that made ``node``; "" if unknown."""
    lines = source_lines(node)
    return lines[-1] if lines else ""


def source_lines(node: Node) -> list[str]:
    """All of the user's own lines that led to ``node``, outermost first."""
    trace = (node.meta.get("stack_trace") or "").partition(_ACCUMULATION)[0]
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n(?!\s*File ")\s*([^\n]*))?', trace)
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    return [f"{path}:{line}: {code.strip()}" for path, line, code in own]


def module_of(node: Node) -> str:
    """The dotted name of the innermost module whose forward made ``node``; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    names = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple) and entry]
    return plain_name(names[-1]) if names else ""


def names_of_inputs(graph: Graph) -> list[str]:
    """What the user calls the inputs of a Dynamo graph: ``blocks.0.up.weight``."""
    sources = [getattr(node.meta.get("grapharg"), "source", None) for node in graph.find_nodes(op="placeholder")]
    # A method of Dynamo's before torch 2.12, an attribute since.
    names = [getattr(source, "name", "") for source in sources]
    return [plain_name(str(name() if callable(name) else name)) for name in names]


def plain_name(name: str) -> str:
    """``L['self'].blocks.0`` -> ``blocks.0``; also from ``L['self']._modules['blocks']._parameters['weight']``. The key
    of an ``nn.ModuleDict`` may hold quotes and brackets; it is kept unchanged.
    """
    name = re.sub(r"^[LG]\['\w+'\](\.__self__)?", "", name)
    name = re.sub(r"(?<=[^.\]])@\d+(?=$|\.)", "", name)  # the suffix for the second or third call of a module
    return _KEY.sub(lambda found: "." + _unquoted(found[1]), name).strip(".")


_KEY = re.compile(
    r"""(?:\._(?:modules|parameters|buffers))?\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^'"\]]*)\]""", re.DOTALL
)


def _unquoted(key: str) -> str:
    return str(ast.literal_eval(key)) if key[:1] in ("'", '"') else key


def common(names: Sequence[str]) -> str:
    """The module that contains all of these: ``encoder`` for ``encoder.0`` and ``encoder.1``."""
    if not names:
        return ""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def modules_of(origins: Sequence[Origin]) -> list[str]:
    """One module name per link: the module that adds if it distinguishes the links, otherwise the one that holds the
    block.
    """
    adding, inside = [o.module for o in origins], [o.inside for o in origins]
    return adding if len(set(adding)) > 1 or len(set(inside)) == 1 and adding[0] else inside


def name_range(names: Sequence[str]) -> str:
    """``blocks.0..blocks.23`` for many, ``cell`` for one, "" for none."""
    distinct = list(dict.fromkeys(filter(None, names)))
    return "" if not distinct else distinct[0] if len(distinct) == 1 else f"{distinct[0]}..{distinct[-1]}"


def in_order(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts ``blocks.9`` before ``blocks.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def by_frequency(lines: Iterable[str]) -> list[str]:
    """Distinct lines, most frequent first; equally frequent ones in the given order."""
    return [line for line, _ in Counter(filter(None, lines)).most_common()]
