"""The expected cost of a chain's backward pass, link after link and rewritten: bytes, flops and launches.

Substitution launches every operator once per link; the rewritten form launches it once per group and iteration. But the
rewritten form computes every block ``iterations`` more times, and it copies what must be stacked (saved tensors, and
the weights of links that have their own).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from hwbp_compiler.engine.stacking import StackPlan, is_shared
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.program import INPUT, SUM, External, Program, Ref, closure, references
from hwbp_compiler.graph.rules import Kind, rule_of
from hwbp_compiler.graph.sizes import bytes_of, hint
from hwbp_compiler.options import Truncation

from .devices import Device, device_figures

aten = torch.ops.aten

# If the ratio of the two estimates is above this, a rewrite is not worth the risk that the estimates are off.
_MARGIN = 0.8


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a chain's backward pass.

    Attributes:
        substitution: seconds, link after link.
        rewritten: seconds in the rewritten form.
        copied_bytes: bytes copied to stack what belongs to each link.
    """

    substitution: float
    rewritten: float
    copied_bytes: int

    @property
    def ratio(self) -> float:
        """How many times as fast the rewritten form is expected to be."""
        return self.substitution / self.rewritten if self.rewritten else float("inf")

    @property
    def pays(self) -> bool:
        """Whether the rewritten form is expected to be faster by a clear margin."""
        return self.rewritten < _MARGIN * self.substitution

    def __str__(self) -> str:
        return (
            f"{self.substitution * 1e3:.3g} ms link after link, {self.rewritten * 1e3:.3g} ms rewritten "
            f"({self.ratio:.2g}x), {self.copied_bytes / 1e6:.3g} MB stacked"
        )


def estimate(chain: Chain, groups: list[Group], how: Truncation) -> Estimate:
    """The cost of ``chain``'s backward, unchanged and rewritten."""
    like = next(n for n in chain.states[0] if n is not None).meta["val"]
    figures = device_figures(like.device)
    substitution = rewritten = 0.0
    copied = 0
    blocks = False
    for group in groups:
        program = group.template
        block = set().union(*(closure(program, i) for i in program.outputs)) if program.outputs else set()
        sides = set().union(*(closure(program, i) for i in group.exports)) if group.exports else set()
        heavy = any(_kind(program, i) is Kind.HEAVY for i in block)
        blocks = blocks or heavy
        lanes = len(group.lanes)
        summed = _summed(group)
        substitution += lanes * (seconds_of(group, block | sides, figures, 1) + _accumulating(group, figures))
        if heavy:
            rewritten += of_blocks(group, block, figures, how, group.lanes)
        rewritten += seconds_of(group, sides, figures, lanes, summed)
        bytes_copied, pieces = _copied(group)
        copied += bytes_copied
        rewritten += (pieces + _handed_out(group)) * figures.piece
    rewritten += chain.width * of_scans(like, len(chain.links), figures, how, blocks)
    rewritten += 2 * copied / figures.bytes
    return Estimate(substitution, rewritten, copied)


def of_blocks(group: Group, block: set[int], figures: Device, how: Truncation, positions: Sequence[int]) -> float:
    """Seconds for the blocks of links ``positions``, counted from the loss, in all iterations or runs together."""
    if how.segment == 1:
        return how.iterations * seconds_of(group, block, figures, len(positions))
    at_step = Counter(position % how.segment for position in positions)
    return (how.iterations + 1) * sum(seconds_of(group, block, figures, lanes) for lanes in at_step.values())


def of_scans(like: Tensor, links: int, figures: Device, how: Truncation, blocks: bool) -> float:
    """Seconds for all scans of one component."""

    def scan(rows: int) -> float:
        return 2 * figures.launch + figures.seconds(3 * rows * bytes_of(like) / figures.cache_bytes)

    if not blocks:
        return scan(links + 1)
    if how.segment == 1:
        return (how.iterations + 1) * scan(links + 1)
    products = scan(links) if how.iterations else 0.0
    return scan(links + 1) + products + how.iterations * scan(how.segments(links))


def _kind(program: Program, i: int) -> Kind | None:
    statement = program.statements[i]
    if statement.target in (SUM, INPUT):
        return Kind.ELEMENTWISE
    node = program.raw[i]
    rule = rule_of(node) if node is not None else None
    return None if rule is None else rule.kind


def seconds_of(
    group: Group, statements: set[int], figures: Device, lanes: int, summed: frozenset[int] = frozenset()
) -> float:
    """Seconds for ``statements``, once, for ``lanes`` links at a time; ``summed`` ones leave one sum over links.

    Cheap operators fuse into one loop per heavy operator or reduction. Such a loop costs one launch, plus its bytes at
    cache speed. What all links share (an RNN's weights) is read once, whatever the number of lanes.
    """
    program = group.template
    total = 0.0
    fused = 0
    kernels = 1
    for i in statements:
        node = program.raw[i]
        if node is None:
            continue
        size = bytes_of(node.meta.get("val"))
        kind = _kind(program, i)
        if kind is Kind.LAYOUT:
            continue
        if kind is Kind.HEAVY:
            moved = size if i in summed else lanes * size
            for argument in program.statements[i].args:
                moved += _bytes_of_argument(group, argument, lanes)
            work = max(lanes * _flops(node) / figures.flops, moved / figures.cache_bytes)
            total += figures.launch + figures.seconds(work)
            kernels += 1
        else:
            fused += size
            kernels += node.target is aten.sum.dim_IntList
    return total + kernels * figures.launch + figures.seconds(lanes * fused / figures.cache_bytes)


def _summed(group: Group) -> frozenset[int]:
    """Exports of which only the sum over links is needed (an RNN's weight gradients), also behind changes of layout."""
    found: set[int] = set()
    for i in group.exports:
        if all(n is None or _is_accumulated(n) for n in group.raw(i)):
            while i not in found:
                found.add(i)
                arguments = [ref.id for ref in references(group.template.statements[i].args)]
                if _kind(group.template, i) is Kind.LAYOUT and arguments:
                    i = arguments[0]
    return frozenset(found)


def _is_accumulated(node: Node) -> bool:
    return len(node.users) == 1 and next(iter(node.users)).target is aten.add.Tensor


def _accumulating(group: Group, figures: Device) -> float:
    """Seconds to add one link's summed exports to those of the others, as substitution does."""
    nodes = [n for i in group.exports if (n := group.template.raw[i]) is not None and _is_accumulated(n)]
    return sum(figures.seconds(bytes_of(n.meta.get("val")) / figures.cache_bytes) for n in nodes)


def _bytes_of_argument(group: Group, argument: object, lanes: int) -> int:
    """Bytes read from one operand for ``lanes`` links."""
    if isinstance(argument, tuple):
        return sum(_bytes_of_argument(group, a, lanes) for a in argument)
    if isinstance(argument, Ref):
        node = group.template.raw[argument.id]
        return 0 if node is None else lanes * bytes_of(node.meta.get("val"))
    if isinstance(argument, External):
        nodes = group.external(argument.slot)
        return (1 if is_shared(tuple(nodes)) else lanes) * bytes_of(nodes[0].meta.get("val"))
    return 0


def _flops(node: Node) -> float:
    from torch.utils.flop_counter import flop_registry

    packet = getattr(node.target, "overloadpacket", None)
    formula: Callable[..., Any] | None = flop_registry.get(packet)
    value = node.meta.get("val")
    if formula is None or isinstance(value, torch.SymInt):
        return 2.0 * bytes_of(value)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: _with_hints(n.meta["val"]))
    try:
        return float(formula(*args, **kwargs, out_val=_with_hints(value)))
    except Exception:  # a formula may refuse unknown shapes; the estimate then does without it
        return 2.0 * bytes_of(value)


def _with_hints(value: object) -> object:
    """``value`` with numbers for symbolic sizes: computing with a symbol would specialise the graph to its size."""
    if isinstance(value, (tuple, list)):
        return type(value)(_with_hints(v) for v in value)
    if isinstance(value, torch.SymInt):
        return hint(value)
    if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
        return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    return value


def _copied(group: Group) -> tuple[int, int]:
    """Bytes and number of the tensors that are copied into stacks."""
    copies = StackPlan(group.external_tuples).copies()
    return sum(bytes_of(n.meta.get("val")) for nodes in copies for n in nodes), sum(map(len, copies))


def _handed_out(group: Group) -> int:
    """Tensors that the rest of the graph takes from the group link by link. A sum over links counts as none."""
    nodes = [n for i in group.exports for n in group.raw(i) if n is not None]
    return sum(not _is_accumulated(n) for n in nodes)
