"""Claims about reasons: scripts can rely on their names, and no decision depends on their texts."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from small import Residuals
from torch import nn

import hwbp_compiler
from hwbp_compiler.reasons import Declined, Reason

ROOT = Path(hwbp_compiler.__file__).parent
WIDTH = 4


def test_no_two_reasons_are_one():
    """An enum merges members with equal values, so two reasons with the same words would become one."""
    assert len(Reason.__members__) == len(list(Reason)) == len({(r.text, r.advice) for r in Reason})


def test_a_declined_reason_carries_its_words():
    why = Reason.STATE_TOO_WIDE.of(width=5, widest=3)
    error = Declined(why)
    assert error.why is why and str(error) == why.text and why.text.startswith("5 tensors pass")
    assert Declined(Reason.CONNECTION_SKIPS_STEPS).why == Reason.CONNECTION_SKIPS_STEPS.of()
    assert why.after("left exact: ").code is Reason.STATE_TOO_WIDE


def compared_with_words(tree: ast.AST) -> list[str]:
    """Code that compares a reason or advice with anything but another one, or takes its text apart."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = [s for s in sides if isinstance(s, ast.Attribute) and s.attr in ("reason", "advice")]
            if words and len(words) < len(sides):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            value = node.func.value
            taken_apart = node.func.attr in ("startswith", "endswith", "partition", "split", "replace", "find")
            if taken_apart and isinstance(value, ast.Attribute) and value.attr in ("reason", "advice"):
                found.append(ast.unparse(node))
    return found


def test_no_decision_reads_the_words():
    files = [*ROOT.rglob("*.py"), *(ROOT / "passes").resolve().glob("*.py")]
    assert len(files) > 90
    found = {f"{file.name}: {text}" for file in files for text in compared_with_words(ast.parse(file.read_text()))}
    # An estimate that the reason includes is not printed twice, and chains that differ only in it look alike.
    assert found == {
        "text.py: str(chain.estimate) not in chain.reason",
        "alike.py: chain.reason.replace(str(chain.estimate), '')",
    }


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH * (i + 1), WIDTH) for i in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], -1)
        return x


class HyperConnections(nn.Module):
    """Two streams, mixed by a matrix. With ``also_read``, one more column of the matrix gives the block's input."""

    def __init__(self, also_read=False):
        super().__init__()
        self.also_read = also_read
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.mix = nn.ParameterList(torch.eye(2, 2 + also_read) + 0.1 * torch.randn(2, 2 + also_read) for _ in range(5))

    def forward(self, x):
        streams = x.unsqueeze(1) * torch.arange(1.0, 3.0)[:, None]
        for layer, mix in zip(self.layers, self.mix, strict=True):
            read = torch.einsum("bsc,s->bc", streams, mix[:, -1])
            streams = torch.einsum("st,bsc->btc", mix, streams)
            if self.also_read:
                read, streams = streams[:, -1], streams[:, :-1]
            streams = streams + torch.tanh(layer(read)).unsqueeze(1)
        return streams.sum(1)


class TwoPaths(nn.Module):
    """As many rows as numbers, and linear layers on both paths: nothing is mixed but features."""

    def __init__(self):
        super().__init__()
        self.f, self.g = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5)) for _ in range(2))

    def forward(self, x):
        for f, g in zip(self.f, self.g, strict=True):
            x = f(x) + torch.tanh(g(x)).square()
        return x


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * sum(seen)
            seen.append(x)
        return x


def reported(model, **options):
    torch.manual_seed(0)
    return hwbp_compiler.explain(model(), torch.randn(3, WIDTH, requires_grad=True), options=options)


@pytest.mark.parametrize(
    ("model", "options", "code"),
    [
        (DenseNet, {}, Reason.FEATURES_CONCATENATED),
        (HyperConnections, {}, Reason.STREAMS_MIXED),
        (lambda: HyperConnections(also_read=True), {}, Reason.STREAMS_MIXED),
        (Residuals, {"iterations": "exact"}, Reason.EXACT_ASKED_FOR),
        (Residuals, {"iterations": 5}, Reason.ITERATIONS_REACH_LENGTH),
        (Residuals, {"iterations": 2, "segment": 2}, Reason.ITERATIONS_REACH_SEGMENTS),
        (Residuals, {"min_length": 6}, Reason.TOO_SHORT),
        (Residuals, {"iterations": 1, "rewrite": "always"}, Reason.REWRITTEN_ALWAYS),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_a_script_may_ask_why(model, options, code):
    report = reported(model, **options)
    (chain,) = report.chains
    assert chain.reason_code is code
    assert json.loads(json.dumps(report.to_dict()))["chains"][0]["reason_code"] == code.name


class Crossing(nn.Module):
    """Two streams: ``alone`` blocks each, then ``pairs`` of blocks that read both, with ``own`` blocks behind each."""

    def __init__(self, alone: int, pairs: int, own: int):
        super().__init__()
        self.pairs, self.own = pairs, own
        self.alone = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * alone))
        self.both = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2 * pairs))
        self.after = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * pairs * own))

    @property
    def links(self):
        return len(self.alone) + len(self.both) + len(self.after)

    def forward(self, x):
        a = b = x
        for m, n in zip(self.alone[::2], self.alone[1::2], strict=True):
            a, b = a + m(a).tanh(), b + n(b).tanh()
        after = iter(self.after)
        for m, n in zip(self.both[::2], self.both[1::2], strict=True):
            a, b = a + m(torch.cat([a, b], -1)).tanh(), b + n(torch.cat([b, a], -1)).tanh()
            for _ in range(self.own):
                a, b = a + next(after)(a).tanh(), b + next(after)(b).tanh()
        return a, b


@pytest.mark.parametrize("shape", [(4, 2, 2), (4, 2, 1), (2, 3, 2)])
def test_every_link_that_another_chain_cuts_off_has_a_record(shape):
    model = Crossing(*shape)
    chains = hwbp_compiler.explain(
        model, torch.randn(3, WIDTH, requires_grad=True), options={"rewrite": "always", "min_length": 2}
    ).chains
    lost = [chain for chain in chains if chain.decision == "declined"]
    assert {chain.reason_code for chain in lost} == {Reason.CUT_OFF}
    assert sum(chain.length for chain in chains) == model.links


def test_chains_that_stay_as_they_are_cut_nothing_off():
    """The decoder has chains that overlap: as long as none is rewritten, no link is lost to another one."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)) for _ in range(4))

        def forward(self, x):
            for own, query, cross, last in self.layers:
                gate = query(x).tanh()
                x = x + own(x).tanh()
                x = x + cross(x * gate).tanh()
                x = x + last(x).tanh()
            return x

    for model in (Decoder(), Crossing(4, 2, 2)):
        x = torch.randn(3, WIDTH, requires_grad=True)
        found = hwbp_compiler.explain(model, x, options={"rewrite": "profitable", "min_length": 2, "iterations": 1})
        assert {chain.decision for chain in found.chains} == {"declined"}
        assert Reason.CUT_OFF not in {chain.reason_code for chain in found.chains}


@pytest.mark.parametrize("rows", [3, 4 * WIDTH])
def test_layers_on_both_paths_do_not_mix_streams(rows):
    model, x = TwoPaths(), torch.randn(rows, WIDTH, requires_grad=True)
    codes = {chain.reason_code for chain in hwbp_compiler.explain(model, x).chains}
    assert Reason.STREAMS_MIXED not in codes


@pytest.mark.parametrize("model", [DenseNet, HyperConnections, Skipping])
def test_other_words_change_nothing_else(model, monkeypatch):
    def told(report):
        return [(c.length, c.decision, c.reason_code, c.source, c.multiplier, c.times) for c in report.chains]

    before = told(reported(model, rewrite="always"))
    for reason in Reason:
        monkeypatch.setattr(reason, "text", f"{reason.name} reworded", raising=True)
    report = reported(model, rewrite="always")
    assert told(report) == before
    assert all("reworded" in chain.reason for chain in report.chains)
