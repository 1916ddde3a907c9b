"""Python loops over time, which Dynamo unrolls, are rerolled: the same function, the same gradients."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from cells import CASES
from cells import in_a_loop as over_time
from loops import LOOPS, REFUSED, B, H, I, T, series
from torch import nn
from torch.utils import _pytree as pytree

import hwbp_compiler
from hwbp_compiler.reroll import find, reroll_loops
from hwbp_compiler.reroll.rows import Rows
from hwbp_compiler.testing import assert_gradients_close, probe_loss, reference_gradients
from hwbp_compiler.testing.capture import capture, leaves_of, options
from hwbp_compiler.testing.compare import assert_outputs_close

ROLL = {"reroll": "always", "rewrite": "always"}


def captured(model, args, **wanted):
    """Output, gradients, and the records of the loops and of all chains."""
    found = capture(model, args, probe_loss)
    how = options(**{**ROLL, "iterations": "exact", **wanted})
    found._options = how
    torch.manual_seed(1)
    output, gradients, records = found.gradients(how)
    return output, gradients, found._loops, records


def eagerly(model, args):
    torch.manual_seed(1)
    output = model(*args)
    leaves = leaves_of(model, args)
    found = torch.autograd.grad(probe_loss(output), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return output, {key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in pairs}


def build(case):
    torch.manual_seed(0)
    model = case.model().double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return model, case.args()
    finally:
        torch.set_default_dtype(default)


@pytest.fixture(autouse=True)
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case.name)
def test_a_rolled_loop_is_the_loop_that_was_written(case):
    """The forward is equal to the last bits and every gradient to 1e-10, and no step is left in the graph."""
    model, args = build(case)
    expected, reference = eagerly(model, args)
    output, found, loops, records = captured(model, args)
    assert sorted(loop.length for loop in loops if not _is_a_sum(loop)) == sorted(case.lengths * case.recurrences)
    assert not any("stays unrolled" in record.reason for record in records)
    assert_outputs_close(pytree.tree_leaves(output), pytree.tree_leaves(expected), 1e-14)
    assert_gradients_close(found, reference, 1e-10)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_cannot_be_rolled_up_is_left_as_it_is_and_the_reason_told(case):
    model, args = build(case)
    expected, reference = eagerly(model, args)
    model, args = build(case)  # some change their buffers
    output, found, _, records = captured(model, args)
    told = [record for record in records if "stays unrolled" in record.reason]
    assert len(told) == 1
    assert case.reason in told[0].reason
    assert told[0].decision == "declined"
    assert told[0].advice
    assert told[0].length == T
    assert_outputs_close(pytree.tree_leaves(output), pytree.tree_leaves(expected), 1e-14)
    assert_gradients_close(found, reference, 1e-10)


def _is_a_sum(loop):
    return "linear recurrence" in loop.reason and loop.multiplier == "1"


class Over(nn.Module):
    """A cell over time, as a Python loop."""

    def __init__(self, case, cell):
        super().__init__()
        self.cell, self.structure = cell, None

    def forward(self, x, *leaves):
        return over_time(self.cell, x, pytree.tree_unflatten(leaves, self.structure))


@pytest.mark.parametrize("case", [c for c in CASES if c.multiplier != "0"], ids=lambda case: case.name)
def test_truncated_gradients_are_those_of_the_oracle(case):
    cell, x, state = case.build(7)
    model = Over(case, cell)
    leaves, model.structure = pytree.tree_flatten(state)
    args = (x, *leaves)
    found = capture(model, args, probe_loss)
    for segment, iterations, damping in [(1, 0, 0.0), (1, 2, 0.0), (1, 1, 0.3), (2, 1, 0.0), (3, 0, 0.3)]:
        how = options(**ROLL, iterations=iterations, segment=segment, damping=damping)
        found._options = how
        _, gradients, _ = found.gradients(how)
        (loop,) = found._loops
        assert (loop.length, loop.decision) == (7, "rewritten")
        k = "exact" if case.linear else iterations
        _, reference = reference_gradients(
            case.program(cell), args, probe_loss, k, 0.0 if case.linear else damping, segment=segment
        )
        assert_gradients_close({_plain(key): g for key, g in gradients.items()}, reference, 1e-8)


def _plain(name):
    return name.removeprefix("cell.") if isinstance(name, str) else name


# -- the option -----------------------------------------------------------------------------------------------------


class Last(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.cell, self.steps = nn.GRUCell(I, H), steps

    def forward(self, x):
        h = x.new_zeros(B, H)
        for t in range(self.steps):
            h = self.cell(x[:, t], h)
        return h


def prepared(model, *args, **wanted):
    """Nodes of the graph behind the pass, and the loops."""
    seen = []

    def backend(gm, inputs):
        found = reroll_loops(gm, options(**wanted))
        seen.append((len(gm.graph.nodes), found))
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args)
    return seen[0]


def test_auto_rolls_up_what_would_take_long_to_compile():
    for steps, rolled in ((6, False), (40, True)):
        _, found = prepared(Last(steps), series(B, steps, I))
        assert len(found.loops) == rolled
        assert not found.records


def test_layers_that_are_given_their_weights_are_no_loop_over_time():
    """Rerolled, their weights would be stacked in every forward pass. They are rerolled only on request."""

    def layers(x, weights):
        for w, b, v, c, g in weights:
            x = x + g * (torch.tanh(x @ w + b) @ v + c)
        return x

    shapes = ((H, H), (H,), (H, H), (H,), (H,))
    given = [tuple(torch.randn(s).requires_grad_() for s in shapes) for _ in range(40)]
    for reroll, rolled in (("auto", 0), ("always", 1)):
        _, found = prepared(layers, torch.randn(B, H), given, reroll=reroll)
        assert len(found.loops) == rolled
        assert not found.records


def test_never_leaves_all_loops():
    nodes, found = prepared(Last(40), series(B, 40, I), reroll="never")
    assert nodes > 80
    assert not found.loops


def test_the_rolled_graph_does_not_grow_with_the_number_of_steps():
    sizes = {prepared(Last(steps), series(B, steps, I), reroll="always")[0] for steps in (5, 50)}
    assert len(sizes) == 1


def test_options_say_what_reroll_may_be():
    with pytest.raises(hwbp_compiler.OptionError, match="'reroll' = 'sometimes'.*'auto', 'always', 'never'"):
        hwbp_compiler.Options(reroll="sometimes")


def test_explain_shows_the_loop_and_the_line_it_is_on():
    report = hwbp_compiler.explain(Last(T), series(), options={**ROLL, "iterations": 1})
    (chain,) = report.chains
    assert (chain.length, chain.decision, chain.multiplier) == (T, "rewritten", "sigmoid(...)")
    assert "test_reroll.py" in chain.source
    assert "self.cell(x[:, t], h)" in chain.source
    assert "highway_bp" not in report.graph_before.code


def test_explain_gives_the_reason_why_a_loop_stays_unrolled():
    case = next(case for case in REFUSED if case.name == "constant_of_the_step")
    model, args = build(case)
    report = hwbp_compiler.explain(model, *args, options=ROLL)
    told = [chain for chain in report.chains if "stays unrolled" in chain.reason]
    assert [chain.reason_code.name for chain in told] == ["CONSTANT_DEPENDS_ON_STEP"]
    assert "loops.py" in told[0].source


def test_a_long_loop_is_told_how_to_skip_tracing(caplog):
    with caplog.at_level(logging.INFO, "hwbp_compiler"):
        prepared(Last(256), series(B, 256, I))
    assert "256 steps was rerolled" in caplog.text
    assert "hwbp_compiler.recurrent" in caplog.text


def test_compiled_by_inductor_it_is_the_same():
    model, x = Last(8).double(), series(B, 8, I)
    expected, reference = eagerly(model, (x,))
    compiled = torch.compile(model, backend="highway", options={**ROLL, "iterations": "exact", "strict": True})
    output = compiled(x)
    found = torch.autograd.grad(probe_loss(output), [*model.parameters(), x])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    for gradient, wanted in zip(found, reference.values(), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


# -- pieces ---------------------------------------------------------------------------------------------------------


def test_runs_are_found_whatever_stands_around_them():
    looks = [*"ab", *"xyz" * 5, *"xy", "q", *"uv" * 4]
    found = find.runs(looks, 3)
    assert [(run.start, run.period, run.length) for run in found] == [(2, 3, 17), (20, 2, 8)]


def test_rows_that_are_not_evenly_spaced_are_none():
    every = ("slice", None, None, None)
    assert Rows.of([(every, t) for t in (0, 2, 4)], (3, 9, 2)) == Rows((every, ("slice", 0, 5, 2), every), 1, None, 2)
    assert Rows.of([(every, t) for t in (-1, -2, -3)], (3, 9, 2)).stride == -1
    assert Rows.of([(every, t) for t in (0, 1, 4)], (3, 9, 2)) is None
    assert Rows.of([(t, t) for t in range(3)], (3, 9, 2)) is None


# -- regions --------------------------------------------------------------------------------------------------------


class InARegion(nn.Module):
    def __init__(self, around, inside):
        super().__init__()
        self.cell, self.around, self.inside = nn.GRUCell(I, H), around, inside

    def forward(self, x):
        h = x.new_zeros(B, H)
        with self.around():
            for t in range(T):
                with self.inside():
                    new = self.cell(x[:, t], h).to(h.dtype)
                h = 0.5 * h + new
            y = h @ self.cell.weight_hh.t()
        return y + x.sum() * 0


def low():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "around, inside",
    [(low, contextlib.nullcontext), (contextlib.nullcontext, low), (torch.no_grad, contextlib.nullcontext)],
    ids=["autocast", "autocast_in_the_step", "no_grad"],
)
def test_a_loop_in_a_region_is_traced_as_it_would_run(around, inside):
    """Autocast's casts are in the loop, whether the region is around it or in the step."""
    model, x = InARegion(around, inside).float(), torch.randn(B, T, I, dtype=torch.float32, requires_grad=True)
    expected, reference = eagerly(model, (x,))
    output, found, loops, records = captured(model, (x,))
    assert [loop.length for loop in loops] == [T]
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=0.02)  # bfloat16
    for key, gradient in reference.items():
        assert (found[key] - gradient).norm() <= 0.03 * gradient.norm() + 1e-6  # eight bits, summed in another order


class InCheckpoints(nn.Module):
    """Stretches of time, each in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.cell, self.write = nn.GRUCell(I, H), nn.Linear(H, 1)

    def stretch(self, x, h):
        written = []
        for t in range(T):
            h = self.cell(x[:, t], h)
            written.append(self.write(h))
        return torch.stack(written, 1), h

    def forward(self, x):
        h, written = x.new_zeros(B, H), []
        for part in x.split(T, 1):
            y, h = torch.utils.checkpoint.checkpoint(self.stretch, part, h, use_reentrant=False)
            written.append(y)
        return torch.cat(written, 1), h


def test_loops_in_checkpoints_are_rerolled():
    model, x = InCheckpoints().double(), series(B, 2 * T, I)
    expected, reference = eagerly(model, (x,))
    compiled = torch.compile(model, backend="highway", options={**ROLL, "iterations": "exact", "strict": True})
    output = compiled(x)
    found = torch.autograd.grad(probe_loss(output), [*model.parameters(), x])
    for given, wanted in zip([*output, *found], [*expected, *reference.values()], strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-10)
    explained = hwbp_compiler.explain(model, x, options={**ROLL, "iterations": 1})
    assert [chain.length for chain in explained.chains if chain.decision == "rewritten"] == [T, T]
