"""The blocks of a chain as readable text: the user's source lines, and the backward pass before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch.fx import Graph, Node

from hwbp_compiler.graph.describe import STANDS_FOR
from hwbp_compiler.graph.origin import Origin, source_line
from hwbp_compiler.graph.program import INPUT, SUM, External, Program, Ref, closure
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.rules import Kind, is_heavy_operator, rule_of
from hwbp_compiler.graph.settled import MARK
from hwbp_compiler.passes.candidates import Candidate
from hwbp_compiler.passes.rewrite import Rewriting
from hwbp_compiler.rolled.recurrence import Plan
from hwbp_compiler.rolled.replace_loops import is_ours

from .data import BlockPrograms

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
    torch.complex64: "c64",
}


class Programs:
    """Watches the passes and records the programs of each chain. ``names`` are the user's names of graph inputs."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names = names or {}
        self.blocks: dict[int, list[BlockPrograms]] = {}
        self.rest: dict[int, str] = {}
        self._rewritten: list[tuple[ChainRecord, Candidate, Rewriting]] = []

    def found(self, record: ChainRecord, candidate: Candidate, origins: list[Origin]) -> None:
        self.blocks[id(record)] = [
            BlockPrograms(
                _forward_lines(_sample(record, origins, number)),
                _before(group.template, group.exports, self.names),
                example=len(origins) - group.lanes[group.programs.index(group.template)],
            )
            for number, group in enumerate(candidate.groups)
        ]

    def rewritten(self, record: ChainRecord, candidate: Candidate, rewriting: Rewriting) -> None:
        self._rewritten.append((record, candidate, rewriting))

    def found_module(self, records: list[ChainRecord], backward: Node) -> None:
        for record in records:
            before = "\n".join(["# one operator, which computes the steps one after another", _line(backward)])
            self.blocks[id(record)] = [BlockPrograms(list(record.sources), before, example=record.length)]

    def rewrote_module(self, records: list[ChainRecord], created: list[Node]) -> None:
        after = "\n".join(map(_line, created))
        for record in records:
            self.blocks[id(record)][0].after = after

    def finish(self) -> None:
        """Called after the last chain: leave out nodes of an earlier rewriting that a later one removed."""
        for record, _, rewriting in self._rewritten:
            parts: dict[int | None, list[str]] = {}
            bounds = [start for _, _, start in rewriting.sections] + [len(rewriting.created)]
            heavy: dict[int, Counter[str]] = {}
            for (title, group, start), end in zip(rewriting.sections, bounds[1:], strict=True):
                nodes = [n for n in rewriting.created[start:end] if not n._erased]
                if nodes:
                    parts.setdefault(group, []).append("\n".join([f"# {title}", *map(_line, nodes)]))
                if group is not None and title == "iteration 1":
                    heavy[group] = Counter(_name(n.target) for n in nodes if is_heavy_operator(n))
            for number, blocks in enumerate(self.blocks[id(record)]):
                blocks.after = "\n\n".join(parts.get(number, ()))
                record.groups[number].batched = [f"{times} {name}" for name, times in heavy.get(number, {}).items()]
            self.rest[id(record)] = "\n\n".join(parts.get(None, ()))
        self._rewritten.clear()


def _sample(record: ChainRecord, origins: list[Origin], group: int) -> Origin:
    """A link of the group. If possible not the first or last of the chain, which may be cut short."""
    mine = [i for i, member in enumerate(record.members) if member == group]
    return origins[mine[len(mine) // 2]] if mine else Origin()


def _forward_lines(origin: Origin) -> list[str]:
    return list(dict.fromkeys(filter(None, map(source_line, origin.forward))))


# -- a loop of hwbp_compiler.recurrent -----------------------------------------------------------------------------


def of_loop(plan: Plan, length: int, joint: Graph, names: Mapping[str, str]) -> list[BlockPrograms]:
    """The only group of a loop over time; ``joint`` holds its backward pass. ``names`` are the user's names for what
    the step takes from outside.
    """
    assert plan.stage.link is not None
    lines = [source_line(node) for node in plan.stage.link.graph.nodes if node.op == "call_function"]
    forward = [line for line in dict.fromkeys(filter(None, lines)) if not is_ours(line)]
    if plan.affine is not None:
        after = "# autograd differentiates the scan: one scan in reverse, exact, without iterations"
        return [BlockPrograms(forward, "# step after step", after, length)]
    assert plan.loop is not None
    program = plan.loop.backward.program
    before = "" if program is None else _before(program, (), names)
    emitted = [node for node in joint.nodes if node.meta.get(MARK) == plan.loop.name]
    after = "\n".join(map(_line, emitted)) if plan.how.truncation is not None else ""
    return [BlockPrograms(forward, before, after, length)]


# -- a link's program, before -----------------------------------------------------------------------------------


def _before(program: Program, exports: Iterable[int], given: Mapping[str, str]) -> str:
    """First the path from state to state, then the side outputs."""
    track = set().union(*(closure(program, i) for i in program.outputs)) if program.outputs else set()
    sides = set().union(*(closure(program, i) for i in exports)) - track if exports else set()
    names = {i: _state(program, i) for i in range(program.arity)}
    lines = [f"def backward({', '.join(_typed(names[i], program.statements[i]) for i in names)}):"]
    for title, chosen in (("the gradient of the state before the block", track), ("side outputs", sides)):
        if not chosen:
            continue
        lines.append(f"    # {title}")
        for i in sorted(chosen):
            names[i] = f"v{i}"
            lines.append(f"    {_typed(names[i], program.statements[i])} = {_call(program, i, names, given)}")
        if chosen is track:
            lines.append(f"    # -> {', '.join(names[i] for i in program.outputs)}")
    return "\n".join(lines)


def _state(program: Program, i: int) -> str:
    return "g" if program.arity == 1 else f"g{i + 1}"


def _typed(name: str, statement) -> str:
    if statement.shape is None:
        return name
    return f"{name}: {_SHORT.get(statement.dtype, statement.dtype)}[{', '.join(map(str, statement.shape))}]"


def _call(program: Program, i: int, names: dict[int, str], given: Mapping[str, str]) -> str:
    statement = program.statements[i]

    def text(value) -> str:
        if isinstance(value, Ref):
            return names.get(value.id, f"v{value.id}")
        if isinstance(value, External):
            return _external(program.externals[value.slot], given)
        if isinstance(value, tuple):
            return "[" + ", ".join(map(text, value)) + "]"
        return str(value)

    if statement.target is INPUT:
        return "0"
    if statement.target is SUM:
        terms = [text(a) for a in statement.args] + [n.name for n in program.injections.get(i, ())]
        return " + ".join(terms)
    args = [text(a) for a in statement.args] + [f"{k}={text(v)}" for k, v in statement.kwargs]
    return f"{_name(statement.target)}({', '.join(args)})"


def _external(node: Node, given: Mapping[str, str]) -> str:
    """A weight by its own name, looking through views; anything else by its name in the graph."""
    source, transposed = node, ""
    for _ in range(8):
        if STANDS_FOR in source.meta:
            source = source.meta[STANDS_FOR]
            continue
        rule = rule_of(source)
        is_view = source.target is torch.ops.aten.alias.default or rule is not None and rule.kind is Kind.LAYOUT
        if not is_view or not isinstance(source.args[0], Node):
            break
        if source.target in (torch.ops.aten.permute.default, torch.ops.aten.t.default):
            transposed = "" if transposed else ".T"
        source = source.args[0]
    return given[source.name] + transposed if given.get(source.name) else node.name


# -- nodes, after -----------------------------------------------------------------------------------------------


def _line(node: Node) -> str:
    args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    value = node.meta.get("val")
    kind = ""
    if isinstance(value, torch.Tensor):
        kind = f": {_SHORT.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"
    return f"{node.name}{kind} = {_name(node.target)}({', '.join(args)})"


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        shown = [_text(v) for v in (value[:3] if len(value) > 8 else value)]
        return f"[{', '.join(shown)}{f', ... {len(value)} in all' if len(value) > 8 else ''}]"
    return value.name if isinstance(value, Node) else str(value)


def _name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return str(getattr(target, "__name__", target))
