"""The pieces of a concatenation keep their memory as long as it is needed: Note [Pieces of a concatenation], and
related cases.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compiler.pieces import KeepPieces, keeping_pieces
from hwbp_compiler.testing import generated
from hwbp_compiler.testing.capture import decompositions

# -- how memory is handed on in generated code --------------------------------------------------------------------

_VIEW = re.compile(r"^\s*(\w+) = reinterpret_tensor\((\w+),.*# alias")
_REUSED = re.compile(r"^\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*# reuse")


def overwritten_pieces(code: str) -> list[str]:
    """Lines of the generated Python code that give the memory of a piece to another buffer."""
    pieces: set[str] = set()
    found = []
    for line in code.splitlines():
        if view := _VIEW.match(line):
            pieces.add(view[1])
        elif (reused := _REUSED.match(line)) and reused[2] in pieces:
            found.append(line.strip())
    return found


def test_a_line_that_overwrites_a_piece_is_seen():
    code = """
        buf2 = empty_strided_cpu((6, 5, 6), (30, 6, 1), torch.float64)
        buf0 = reinterpret_tensor(buf2, (5, 5, 6), (30, 6, 1), 0)  # alias
        buf4 = buf2; del buf2  # reuse
        buf5 = buf0; del buf0  # reuse
        buf6 = reinterpret_tensor(buf0, (30, 5), (5, 1), 0); del buf0  # reuse
    """
    assert [line[:4] for line in overwritten_pieces(code)] == ["buf5", "buf6"]


# -- programs of a user's own -------------------------------------------------------------------------------------


def piece_of_a_cat(t, h, g, m):
    x = 1 - t
    y = torch.cat([x, g])
    s = torch.mm(y.view(30, 6), m)
    p = s.view(6, 5, 6)[:5] * t
    q = (p * h) * (t * x)
    bm = torch.bmm(p.transpose(1, 2).contiguous(), h)
    return bm, q.sum(1), torch.bmm(q.transpose(1, 2), h), s


def last_piece(t, h, g, m):
    x = 1 - t
    y = torch.cat([g, x])
    s = torch.mm(y.view(30, 6), m)
    p = s.view(6, 5, 6)[1:] * t
    q = (p * h) * (t * x)
    bm = torch.bmm(p.transpose(1, 2).contiguous(), h)
    return bm, q.sum(1), torch.bmm(q.transpose(1, 2), h), s


def piece_of_a_piece(t, h, g, m):
    x = 1 - t
    y = torch.cat([torch.cat([x, g]), g * 2])
    s = torch.mm(y.view(35, 6), m)
    p = s.view(7, 5, 6)[:5] * t
    q = (p * h) * (t * x)
    rows = p.flatten(0, 1)
    bm = torch.mm(torch.cat([rows, rows[:10] * 3]), m)
    return bm, q.sum(1), torch.bmm(q.transpose(1, 2), h), s


PROGRAMS = [piece_of_a_cat, last_piece, piece_of_a_piece]


def inputs():
    torch.manual_seed(0)
    shapes = (5, 5, 6), (5, 5, 6), (1, 5, 6), (6, 6)
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rewrite", ["profitable", "never"])
def test_a_result_is_not_written_over_a_piece_that_gives_its_memory_away(program, rewrite):
    arguments = inputs()
    compiled = torch.compile(program, backend="highway", options={"rewrite": rewrite, "fx_graph_cache": False})
    found, codes = run_and_get_code(compiled, *arguments)
    for have, want in zip(found, program(*arguments), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)  # float64, and sums of about ten terms
    assert not any(map(overwritten_pieces, codes))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_inductor_alone_writes_over_the_piece(program):
    """If this fails, torch has fixed it, and the rule can be removed."""
    arguments = inputs()
    found, codes = run_and_get_code(torch.compile(program, options={"fx_graph_cache": False}), *arguments)
    assert not torch.allclose(found[2], program(*arguments)[2])
    assert any(map(overwritten_pieces, codes))


def test_the_fuzzer_sees_what_is_overwritten(monkeypatch):
    graph = make_fx(piece_of_a_cat, decompositions(), tracing_mode="fake")(*inputs())
    found = generated.run_generated(graph, graph.graph, inputs())
    torch.testing.assert_close(found[2], piece_of_a_cat(*inputs())[2], rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(generated, "keeping_pieces", dict)
    with pytest.raises(AssertionError, match="when memory is reused"):
        generated.run_generated(graph, graph.graph, inputs())


# -- what the rewrite emits ---------------------------------------------------------------------------------------


class Highway(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.block = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        t = torch.sigmoid(self.gate(x))
        return t * torch.relu(self.block(x)) + (1 - t) * x


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_highway_network_where_sizes_coincide(iterations):
    """(L + 1) B = L W: the gates' gradients were wrong by several times the largest one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Highway(6) for _ in range(5))).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    options = {"rewrite": "always", "iterations": iterations, "strict": True, "fx_graph_cache": False}
    parameters = [x, *model.parameters()]
    results = []
    for more in ({}, {"inplace_buffers": False, "allow_buffer_reuse": False}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="highway", options={**options, **more})

        def step(compiled=compiled):
            return torch.autograd.grad(compiled(x).sin().sum(), parameters)

        found, codes = run_and_get_code(step)
        assert not any(map(overwritten_pieces, codes))
        results.append(found)
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


# -- the pass itself ----------------------------------------------------------------------------------------------


def first(nodes):
    first.calls += 1
    return nodes


first.calls = 0


def test_a_scheduler_pass_of_the_users_own_still_runs():
    with inductor_config.patch(_pre_fusion_custom_pass=first, force_disable_caches=True):
        compiled = torch.compile(piece_of_a_cat, backend="highway")
        found = compiled(*inputs())
    assert first.calls > 0
    torch.testing.assert_close(found[2], piece_of_a_cat(*inputs())[2], rtol=1e-12, atol=1e-12)


def test_graphs_stay_cacheable_unless_the_users_pass_is_not():
    assert KeepPieces().uuid() and KeepPieces(KeepPieces()).uuid()
    assert KeepPieces(first).uuid() is None
    again = keeping_pieces(keeping_pieces({}))
    assert again == keeping_pieces({})
