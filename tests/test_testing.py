"""The assertions of ``hwbp_compiler.testing`` pass for a correct compiler and fail for a wrong one."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small import Residual
from torch import nn
from zoo import CASES

import hwbp_compiler
from hwbp_compiler import testing
from hwbp_compiler.testing import assertions, capture, judge, models

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def small():
    """Four blocks, float32, and the same written for the oracle."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(4)))
    x = torch.randn(3, 4, requires_grad=True)

    def program(model):
        def forward(run, x):
            return run([_link(block) for block in model], (x,)).states[-1][0]

        return testing.Program(dict(model.named_parameters()), forward)

    return model, (x,), program


class _OverTime(nn.Module):
    def __init__(self, whole: bool):
        super().__init__()
        self.whole, self.gru, self.cell = whole, nn.GRU(4, 5), nn.GRUCell(4, 5)

    def step(self, x, h):
        h = self.cell(x, h)
        return h, h

    def forward(self, x):
        if self.whole:
            return self.gru(x)[0]
        return hwbp_compiler.recurrent(self.step, x, x.new_zeros(x.shape[1], 5))[0]


def _link(block):
    return testing.Link(lambda state, side, hold: ((state[0] + hold(torch.tanh(block.linear(state[0]))),), ()))


def exact_backend(model, options):
    """A compiler that ignores ``iterations``."""
    return model


def doubling_backend(model, options):
    """A compiler with wrong gradients and a correct forward."""

    def step(*args):
        out = model(*args)
        return out.detach() + 2 * (out - out.detach())

    return step


def shifting_backend(model, options):
    """A compiler with a wrong forward."""
    return lambda *args: model(*args) + 1e-9


@pytest.fixture
def compile_with(monkeypatch):
    return lambda backend: monkeypatch.setattr(assertions, "_compile", backend)


def test_a_right_compiler_passes(small, compile_with):
    model, args, _ = small
    compile_with(exact_backend)
    testing.assert_forward_unchanged(model, args)
    testing.assert_exact_at_full_length(model, args)


def test_a_wrong_gradient_is_noticed(small, compile_with):
    model, args, _ = small
    compile_with(doubling_backend)
    testing.assert_forward_unchanged(model, args)
    with pytest.raises(AssertionError, match="is off by"):
        testing.assert_exact_at_full_length(model, args)


@pytest.mark.parametrize("segment", [1, 2])
@pytest.mark.parametrize("kind", ["blocks", "module", "loop"])
def test_full_length_is_checked_in_the_rewritten_form(kind, segment, monkeypatch):
    """Ordinarily a chain is not rewritten if k reaches its length. The assertion would then prove nothing."""
    torch.manual_seed(0)
    if kind == "blocks":
        model, x = nn.Sequential(*(Residual() for _ in range(6))), torch.randn(3, 4)
    else:
        model, x = _OverTime(kind == "module"), torch.randn(6, 2, 4)
    options = {"damping": 0.3, "segment": segment}
    hwbp_compiler.reset_counters()
    testing.assert_exact_at_full_length(model, (x,), options=options)
    assert hwbp_compiler.counters()["chains_rewritten"] == 1

    whole = assertions.AtFullLength.truncation

    def fewer(options, length):
        found = whole(options, length)
        return found and dataclasses.replace(found, iterations=found.iterations - 2)

    monkeypatch.setattr(assertions.AtFullLength, "truncation", fewer)
    with pytest.raises(AssertionError, match="iterations=1000000: .* is off by"):
        testing.assert_exact_at_full_length(model, (x,), options=options)


def test_check_says_where_nothing_was_rewritten(capsys):
    assert testing.check(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.randn(3, 4),), damping=(0.0,))
    assert "No chain was rewritten" in capsys.readouterr().out


def test_a_wrong_output_is_noticed(small, compile_with):
    model, args, _ = small
    compile_with(shifting_backend)
    with pytest.raises(AssertionError, match="outputs"):
        testing.assert_forward_unchanged(model, args)


def test_gradients_that_are_not_linear_are_noticed(small, compile_with):
    model, args, _ = small

    def clipping_backend(model, options):
        def step(*args):
            out = model(*args)
            out.register_hook(lambda g: g.clamp(-1.0, 1.0))
            return out

        return step

    compile_with(exact_backend)
    testing.assert_linear(model, args)
    compile_with(clipping_backend)
    with pytest.raises(AssertionError, match="times the loss"):
        testing.assert_linear(model, args)


class _Counts(Residual):
    """Its multiplier is the number of its forward passes, and part of it is computed in float32."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + torch.tanh(self.linear(x)).float().to(x.dtype) * self.calls


def test_a_model_that_counts_its_calls_and_rounds_inside_is_no_failure(compile_with):
    torch.manual_seed(0)
    compile_with(exact_backend)
    assert testing.check(nn.Sequential(*(_Counts() for _ in range(4))), (torch.randn(3, 4),), damping=(0.0,))


def test_what_cannot_be_checked_is_named(small):
    model, (x,), _ = small
    with pytest.raises(TypeError, match=r"args is Tensor; it must be a tuple"):
        testing.check(model, x)
    with pytest.raises(ValueError, match=r"loss\(output\) gives shape \(3, 4\); it must be one number"):
        testing.assert_linear(model, (x,), lambda output: output)
    with pytest.raises(ValueError, match="nothing to compare"):
        testing.assert_linear(nn.ReLU(), (torch.randn(3),))
    with pytest.raises(ValueError, match="nothing to compare"):
        testing.assert_linear(model, (x,), lambda output: torch.ones(()))


def test_backprop_is_not_a_truncation(small, compile_with):
    model, args, program = small
    compile_with(exact_backend)
    testing.assert_matches_truncation(model, args, testing.probe_loss, program, iterations=4)
    with pytest.raises(AssertionError, match="iterations=1"):
        testing.assert_matches_truncation(model, args, testing.probe_loss, program, iterations=1)


def test_check_counts_the_claims_that_hold(small, compile_with, capsys):
    model, args, program = small
    compile_with(exact_backend)
    assert not testing.check(model, args, program=program, iterations=(1, 4), damping=(0.0,))
    said = capsys.readouterr().out
    assert "5 of 6 claims hold" in said  # in two segments, one iteration is backprop
    assert "iterations=1, damping=0.0, segment=2 as the oracle" in said


def test_check_asks_for_each_segment_once(monkeypatch):
    asked = []
    monkeypatch.setattr(assertions, "assert_matches_truncation", lambda *_, **chosen: asked.append(chosen))
    for name in ("assert_forward_unchanged", "assert_linear", "assert_exact_at_full_length"):
        monkeypatch.setattr(assertions, name, lambda *_, **__: None)
    testing.check(nn.Linear(2, 2), (), program=lambda model: None, damping=(0.0, 0.2), segment=(1, 2, 4))
    settings = [(given["segment"], given["iterations"], given["damping"]) for given in asked]
    assert settings == [(1, k, gamma) for k in (0, 1, 2) for gamma in (0.0, 0.2)] + [(2, 1, 0.0), (4, 1, 0.0)]


def test_a_wrong_segment_is_noticed(small, compile_with):
    model, args, program = small
    compile_with(exact_backend)
    testing.assert_matches_truncation(model, args, testing.probe_loss, program, 1, segment=2)
    with pytest.raises(AssertionError, match="iterations=0, damping=0.0, segment=2: "):
        testing.assert_matches_truncation(model, args, testing.probe_loss, program, 0, segment=2)


def test_check_passes_with_segments(capsys):
    """Six blocks: three segments of two links, so that one iteration is short of backprop."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(6)))

    def program(model):
        return testing.Program(
            dict(model.named_parameters()),
            lambda run, x: run([_link(block) for block in model], (x,)).states[-1][0],
        )

    x = torch.randn(3, 4, requires_grad=True)
    assert testing.check(model, (x,), program=program, iterations=(1,), damping=(0.0,), segment=(1, 2))
    said = capsys.readouterr().out
    assert "holds  iterations=1, damping=0.0, segment=2 as the oracle" in said
    assert "No chain was rewritten" not in said


@pytest.mark.parametrize(
    ("outside", "length", "tails"),
    [(2, 4, False), (1, 5, False), (0, 7, True)],
    ids=["begins at the first state that requires a gradient", "begins a link before it", "takes the link in front"],
)
def test_with_segments_the_judge_knows_where_a_chain_begins(outside, length, tails):
    """Six blocks in segments of two, k = 0. Where the chain begins decides what is truncated next to the input."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(6))).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=tails)
    if not tails:  # the first two states require no gradient
        model[0].requires_grad_(False)

    def program(outside, in_front=False):
        def forward(run, x):
            for block in model[:outside]:
                x = block(x)
            links = [_link(block) for block in model[outside:]]
            if in_front:
                links.insert(0, testing.Link(lambda state, side, hold: ((state[0] * 1.0,), ())))
            return run(links, (x,)).states[-1][0]

        return testing.Program(dict(model.named_parameters()), forward)

    def judged(length):
        record = SimpleNamespace(length=length, decision="rewritten", reason="")
        return judge.judge(
            [program(0)], (x,), testing.probe_loss, output, found, [record], iterations=0, damping=0.2, segment=2,
            tails=tails,
        )  # fmt: skip

    output, found = testing.reference_gradients(
        program(outside, in_front=tails), (x,), testing.probe_loss, 0, 0.2, segment=2
    )
    assert judged(length).rewritten == (True,)
    with pytest.raises(AssertionError, match="S=2: .* is off by"):
        judged(6 if tails else 9 - length)


def test_the_judge_takes_no_other_segment():
    torch.manual_seed(0)
    spec = models.Model(stacks=(models.Stack(depth=6),))
    model, args, loss = models.build(spec)
    output, found = testing.reference_gradients(models.program(model), args, loss, 1, segment=2)
    record = SimpleNamespace(length=6, decision="rewritten", reason="")
    judged = partial(judge.judge, [models.program(model)], args, loss, output, found, [record])
    assert judged(iterations=1, damping=0.0, segment=2).rewritten == (True,)
    for segment in (1, 3):
        with pytest.raises(AssertionError, match=f"S={segment}: .* is off by"):
            judged(iterations=1, damping=0.0, segment=segment)


def test_assertions_leave_the_users_model_alone(small, compile_with):
    model, args, _ = small
    compile_with(exact_backend)
    testing.assert_exact_at_full_length(model, args)
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert args[0].grad is None


def test_closer_means_no_further_than_the_competitor():
    torch.manual_seed(0)
    exact = torch.randn(100, dtype=torch.float64)
    competitor = exact + 1e-3 * torch.randn(100, dtype=torch.float64)
    testing.assert_closer(exact, exact + 0.9 * (competitor - exact), competitor)
    with pytest.raises(AssertionError, match="from the float64 reference"):
        testing.assert_closer(exact, exact + 2.0 * (competitor - exact), competitor)


def test_closer_compares_mappings_entry_by_entry():
    exact = {"a": torch.zeros(3), "b": torch.ones(3)}
    with pytest.raises(AssertionError, match="^b: "):
        testing.assert_closer(exact, {"a": torch.zeros(3), "b": torch.zeros(3)}, exact)


def test_a_gradient_that_is_missing_or_not_a_number_is_noticed():
    one = {"w": torch.ones(2)}
    with pytest.raises(AssertionError, match="only one side has w"):
        testing.assert_gradients_close({}, one, 1e-6)
    with pytest.raises(AssertionError, match="is off by nan"):
        testing.assert_gradients_close({"w": torch.tensor([1.0, float("nan")])}, one, 1e-6)
    both = {"w": torch.tensor([1.0, float("nan"), float("inf")])}
    testing.assert_gradients_close(both, both, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_module_list", "gru_cell_every_step", "torch_encoder_post_norm_dropout"])
def test_the_compiler_passes_every_claim(name):
    case = BY_NAME[name]
    model, args, loss = case.build()
    assert testing.check(model, args, loss, case.program, iterations=(0, 2), damping=(0.2,))


class Broken(nn.Module):
    """Three stacks of one class between graph breaks: Dynamo makes one graph of them and runs it three times."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = x + torch.nn.functional.dropout(layer(x).tanh(), 0.3)
            return x

    def __init__(self):
        super().__init__()
        self.stacks = nn.ModuleList(self.Stack() for _ in range(3))

    def forward(self, x):
        for stack in self.stacks:
            torch._dynamo.graph_break()
            x = stack(x)
        return x


def test_a_graph_that_runs_several_times_is_captured_with_each_of_its_runs():
    torch.manual_seed(0)
    model, x = Broken().double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    captured = capture.capture(model, (x,), testing.probe_loss)
    leaves = list(capture.leaves_of(model, (x,)).values())
    torch.manual_seed(1)
    expected = torch.autograd.grad(testing.probe_loss(model(x)), leaves)
    for how in (None, assertions.AtFullLength(iterations=4, rewrite="always", damping=0.0, strict=True)):
        torch.manual_seed(1)
        _, found, records = captured.gradients(how)
        assert len(captured.joints) == 1 and [r.decision for r in records] == ["rewritten"] * (3 if how else 0)
        for mine, right in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_trace_refuses_what_changes_a_tensor_that_is_used_elsewhere():
    def loop(cell, x):
        h = x.new_zeros(2, 4)
        for x_t in x:
            h = cell(x_t, h)
        return h

    class Loop(nn.GRUCell):
        def forward(self, x):
            return loop(super().forward, x)

    with pytest.raises(NotImplementedError, match="changes .*, which is used elsewhere; use capture"):
        capture.trace(Loop(3, 4), (torch.randn(6, 2, 3),), lambda output: output.sum())
