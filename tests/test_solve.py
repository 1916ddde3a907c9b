"""Claims about the solver: w^k of random links, with several components, both as tensors and as a graph.

The oracle goes link by link: w_i^0 = b_i + (1 - gamma) K w_{i+1}^0 and
w_i^{t+1} = b_i + J w_{i+1}^t + gamma K w_{i+1}^t + (1 - gamma) K w_{i+1}^{t+1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

import hwbp_compiler.scan  # noqa: F401  (registers the operator)
from hwbp_compiler.engine.emitter import Emitter
from hwbp_compiler.engine.solve import Highway, solve
from hwbp_compiler.engine.solve_graph import GraphSeries
from hwbp_compiler.engine.solve_tensors import TensorSeries

aten = torch.ops.aten
SIZE = 3


@dataclass(frozen=True)
class Links:
    """K: numbers, or [L, SIZE]. J per (to, from): [L, SIZE, SIZE], or none if there is no block. b: [L, SIZE]."""

    length: int
    width: int
    k: dict[tuple[int, int], Tensor | float]
    j: dict[tuple[int, int], Tensor]
    b: list[Tensor | None]
    heads: list[Tensor]


@st.composite
def links(draw: st.DrawFn) -> Links:
    length, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [(to, source) for to in range(width) for source in range(to + 1)]
    k: dict[tuple[int, int], Tensor | float] = {}
    for pair in draw(st.sets(st.sampled_from(pairs))):
        k[pair] = draw(st.sampled_from([1.0, 0.5])) if draw(st.booleans()) else made(length, SIZE)
    block = draw(st.booleans())
    j = {(a, c): made(length, SIZE, SIZE) for a in range(width) for c in range(width) if block}
    b = [made(length, SIZE) if draw(st.booleans()) else None for _ in range(width)]
    return Links(length, width, k, j, b, [made(SIZE) for _ in range(width)])


def at(k: Tensor | float, i: int) -> Tensor | float:
    return k if isinstance(k, float) else k[i]


def oracle(links: Links, iterations: int, damping: float) -> list[Tensor]:
    """Rows 0..L for each component, computed element by element from the recurrence."""
    before: list[list[Tensor]] | None = None
    for _ in range(iterations + 1):
        rows = [[head] for head in links.heads]  # from the last to the first
        for i in reversed(range(links.length)):
            after = [r[-1] for r in rows]
            for to in range(links.width):
                w = torch.zeros(SIZE, dtype=torch.float64) if links.b[to] is None else links.b[to][i].clone()
                for source in range(links.width):
                    if (to, source) in links.k:
                        w += (1 - damping) * at(links.k[to, source], i) * after[source]
                        if before is not None:
                            w += damping * at(links.k[to, source], i) * before[source][i + 1]
                    if before is not None and (to, source) in links.j:
                        w += links.j[to, source][i] @ before[source][i + 1]
                rows[to].append(w)
        before = [list(reversed(r)) for r in rows]
    assert before is not None
    return [torch.stack(r) for r in before]


def backprop(links: Links) -> list[Tensor]:
    """Substitution: K + J, one link after the other."""
    rows = [[head] for head in links.heads]
    for i in reversed(range(links.length)):
        after = [r[-1] for r in rows]
        for to in range(links.width):
            w = torch.zeros(SIZE, dtype=torch.float64) if links.b[to] is None else links.b[to][i].clone()
            for source in range(links.width):
                w += at(links.k.get((to, source), 0.0), i) * after[source]
                if (to, source) in links.j:
                    w += links.j[to, source][i] @ after[source]
            rows[to].append(w)
    return [torch.stack(r[::-1]) for r in rows]


def on_tensors(links: Links, iterations: int, damping: float) -> list[Tensor]:
    def blocks(_: int, rows: list[Tensor]) -> list[Tensor | None]:
        return [_sum([torch.bmm(j, rows[s][1:, :, None])[:, :, 0] for (a, s), j in links.j.items() if a == to])
                for to in range(links.width)]  # fmt: skip

    series = TensorSeries(links.length, links.heads)
    highway = Highway(range(links.width), links.k, links.heads, links.b)
    return solve(series, highway, blocks, iterations, damping)


def _sum(terms: list[Tensor]) -> Tensor | None:
    return sum(terms[1:], terms[0]) if terms else None


def in_a_graph(links: Links, iterations: int, damping: float) -> list[Tensor]:
    graph, values, mode = fx.Graph(), [], FakeTensorMode()

    def node(tensor: Tensor) -> fx.Node:
        made = graph.placeholder(f"input_{len(values)}")
        made.meta["val"] = mode.from_tensor(tensor)
        values.append(tensor)
        return made

    k = {pair: k if isinstance(k, float) else node(k) for pair, k in links.k.items()}
    j = {pair: node(tensor) for pair, tensor in links.j.items()}
    heads, b = [node(h) for h in links.heads], [None if t is None else node(t) for t in links.b]
    output = graph.output(())
    e = Emitter(graph, output, mode, links.length)

    def blocks(_: int, rows: list[fx.Node]) -> list[fx.Node | None]:
        found: list[fx.Node | None] = []
        for to in range(links.width):
            total = None
            for source in (s for a, s in j if a == to):
                column = e.call(aten.unsqueeze.default, e.call(aten.slice.Tensor, rows[source], 0, 1, 2**62), 2)
                term = e.call(aten.squeeze.dim, e.call(aten.bmm.default, j[to, source], column), 2)
                total = term if total is None else e.call(aten.add.Tensor, total, term)
            found.append(total)
        return found

    series = GraphSeries(e, links.length, [h.meta["val"] for h in heads])
    output.args = (tuple(solve(series, Highway(range(links.width), k, heads, b), blocks, iterations, damping)),)
    graph.lint()
    return list(fx.Interpreter(torch.nn.Module(), graph=graph).run(*values))


@pytest.mark.parametrize("run", [on_tensors, in_a_graph])
@settings(max_examples=60, deadline=None)
@given(links=links(), iterations=st.integers(0, 6), damping=st.sampled_from([0.0, 0.3, 1.0]))
def test_w_is_that_of_the_recurrence_link_by_link(run, links, iterations, damping):
    found, expected = run(links, iterations, damping), oracle(links, iterations, damping)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)  # products of up to six random matrices


@pytest.mark.parametrize("run", [on_tensors, in_a_graph])
@settings(max_examples=30, deadline=None)
@given(links=links(), damping=st.sampled_from([0.0, 0.3, 1.0]))
def test_as_many_iterations_as_links_are_backprop(run, links, damping):
    for have, want in zip(run(links, links.length, damping), backprop(links), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
