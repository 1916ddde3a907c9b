"""``hwbp_compiler.recurrent``: any cell over time, against the oracle and against a Python loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cells import CASES, GRU, HIDDEN, INPUT, LSTM, CellCase, MinGRU, TanhRNN, in_a_loop
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import hwbp_compiler
from hwbp_compiler import HighwayError, OptionError, recurrent
from hwbp_compiler.options import Truncation, parse
from hwbp_compiler.rolled import function, lanes, loop
from hwbp_compiler.rolled.chain import How
from hwbp_compiler.rolled.replace_loops import replace_loops
from hwbp_compiler.testing.compare import assert_gradients_close, assert_outputs_close
from hwbp_compiler.testing.losses import probe_loss
from hwbp_compiler.testing.reference import reference_gradients
from hwbp_compiler.torch_private import SERVES, AnyNumber

LENGTH = 7
SEGMENTED = [(2, 0, 0.0), (2, 1, 0.3), (2, 2, 0.0), (2, 3, 0.3), (3, 1, 0.0), (3, 2, 0.0), (5, 0, 0.3), (5, 1, 0.0),
             (7, 0, 0.0), (9, 0, 0.0)]  # fmt: skip


# -- the same cell as a loop, rolled, and retold for the oracle ---------------------------------------------------


def every_step(result):
    return probe_loss(result)


def last_step(result):
    return probe_loss(result[0][-1])


def last_state(result):
    return probe_loss(pytree.tree_leaves(result[1]))


def gradients(run, cell, x, state, loss):
    """The output, and the gradients: by name for parameters, at position 0 for the inputs and from 1 for the state's
    leaves.
    """
    leaves = [x, *pytree.tree_leaves(state)]
    output = run(cell, x, state)
    named = dict(cell.named_parameters()) if isinstance(cell, nn.Module) else {}
    wanted = {**named, **dict(enumerate(leaves))}
    found = torch.autograd.grad(loss(output), list(wanted.values()), allow_unused=True)
    return output, {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(wanted.items(), found, strict=True)
    }


class Captured:
    """A backend that puts only the rolled form into the graph. The options of its chains may change between runs."""

    def __init__(self, **options) -> None:
        self.options = parse(options)[0]
        self.recurrences = []
        setattr(self, SERVES, True)

    def __call__(self, gm, inputs):
        self.recurrences += replace_loops(gm, self.options, lambda own: parse(own)[0])
        return gm

    def compiled(self, fullgraph=True):
        return torch.compile(lambda *args: function._loop(*args, ""), backend=self, fullgraph=fullgraph)


def rolled(case: CellCase, length: int):
    cell, x, state = case.build(length)
    captured = Captured(rewrite="always", iterations=0, min_length=1)
    run = captured.compiled()
    run(cell, x, state)
    (recurrence,) = captured.recurrences
    return cell, x, state, run, recurrence


def assert_matches_oracle(case, cell, x, state, run, iterations, damping, loss, tolerance=1e-8, segment=1):
    output, found = gradients(run, cell, x, state, loss)
    args = (x, *pytree.tree_leaves(state))
    expected, reference = reference_gradients(case.program(cell), args, loss, iterations, damping, segment=segment)
    assert_outputs_close(pytree.tree_leaves(output), pytree.tree_leaves(expected), 1e-12)
    assert_gradients_close(found, reference, tolerance)


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_the_paper(case):
    """Every parameter, the inputs and the initial state, in float64, for every k and damping."""
    cell, x, state, run, recurrence = rolled(case, LENGTH)
    (plan,) = recurrence.plans
    for damping in (0.0, 0.2, 1.0):
        for iterations in (0, 1, 2, 5, LENGTH):
            k, gamma = iterations, damping
            if case.multiplier == "0" or case.linear:  # nothing is approximated
                k, gamma = "exact", 0.0
            else:
                plan.how = How(Truncation(iterations, damping))
            assert_matches_oracle(case, cell, x, state, run, k, gamma, every_step)


@pytest.mark.parametrize("case", [c for c in CASES if c.multiplier != "0" and not c.linear], ids=lambda case: case.name)
def test_gradients_are_exact_inside_a_segment_and_truncated_across(case):
    """LENGTH = 7: segments of 2 or 3 leave a remainder of 1, segments of 5 leave 2, and 7 and 9 are one segment."""
    cell, x, state, run, recurrence = rolled(case, LENGTH)
    (plan,) = recurrence.plans
    for segment, iterations, damping in SEGMENTED:
        plan.how = How(Truncation(iterations, damping, segment))
        loss = last_step if iterations == 1 else every_step
        assert_matches_oracle(case, cell, x, state, run, iterations, damping, loss, segment=segment)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step_by_step_is_backprop_through_time(case):
    cell, x, state, run, recurrence = rolled(case, LENGTH)
    for plan in recurrence.plans:
        plan.how = How(None)
    for loss in (every_step, last_step, last_state):
        output, found = gradients(run, cell, x, state, loss)
        expected, reference = gradients(in_a_loop, cell, x, state, loss)
        assert_outputs_close(output, expected, 1e-12)
        assert_gradients_close(found, reference, 1e-9)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shortest_loops(case, length):
    cell, x, state, run, recurrence = rolled(case, length)
    for plan in recurrence.plans:
        iterations = 0 if plan.loop is not None and plan.loop.backward.split is not None else None
        plan.how = How(None if iterations is None else Truncation(iterations))
        k = "exact" if iterations is None else 0
        assert_matches_oracle(case, cell, x, state, run, k, 0.0, last_step)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_report_says_what_k_is(case):
    *_, recurrence = rolled(case, LENGTH)
    (record,) = recurrence.records
    assert case.multiplier in record.multiplier
    assert record.length == LENGTH
    assert record.decision == ("declined" if case.multiplier == "0" else "rewritten")
    assert "cells.py" in record.source or "torch" in record.source
    if case.multiplier == "0":
        assert "no elementwise path" in record.reason
    if case.linear:
        assert "exact at k = 0" in record.reason


# -- as users call it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.make in (GRU, LSTM)], ids=lambda case: case.name)
def test_eager_mode_compiles_the_loop_by_itself(case):
    cell, x, state = case.build(LENGTH)
    options = {"iterations": 2, "damping": 0.2, "rewrite": "always"}
    run = lambda *args: recurrent(*args, options=options)  # noqa: E731
    assert_matches_oracle(case, cell, x, state, run, 2, 0.2, every_step)
    counted = hwbp_compiler.counters()
    assert (counted["chains_rewritten"], counted["failures"]) == (1, 0)


def assert_same_as_the_loop(cell, x, state, options=None, loss=every_step, tolerance=1e-9, run=None):
    run = run or (lambda *args: recurrent(*args, options=options))
    output, found = gradients(run, cell, x, state, loss)
    expected, reference = gradients(in_a_loop, cell, x, state, loss)
    assert_outputs_close(output, expected, 1e-12)
    assert_gradients_close(found, reference, tolerance)


def test_iterations_equal_to_length_is_backprop():
    cell, x, state = CellCase(GRU, "").build(5)
    assert_same_as_the_loop(cell, x, state, {"iterations": 5, "rewrite": "always"})
    counted = hwbp_compiler.counters()
    assert counted["declined: iterations_reach_length"] == 1


def test_a_new_length_compiles_nothing_new():
    cell, x, state = CellCase(GRU, "").build(9)
    options = {"iterations": 1, "rewrite": "always"}
    run = lambda *args: recurrent(*args, options=options)  # noqa: E731
    for length in (9, 14, 23):
        x = torch.randn(length, *x.shape[1:], dtype=x.dtype, requires_grad=True)
        assert_matches_oracle(CellCase(GRU, ""), cell, x, state, run, 1, 0.0, every_step)
        assert hwbp_compiler.counters()["graphs_seen"] == 1
    assert hwbp_compiler.counters()["failures"] == 0


def test_a_new_length_compiles_nothing_new_with_segments():
    """With 9, 15 and 23 steps, segments of 2 leave a remainder of 1. So no lane is ever alone."""
    cell, x, state = CellCase(GRU, "").build(9)
    options = {"iterations": 1, "segment": 2, "rewrite": "always"}
    run = lambda *args: recurrent(*args, options=options)  # noqa: E731
    lanes._compiled.cache_clear()
    for length in (9, 15, 23):
        x = torch.randn(length, *x.shape[1:], dtype=x.dtype, requires_grad=True)
        assert_matches_oracle(CellCase(GRU, ""), cell, x, state, run, 1, 0.0, every_step, segment=2)
        assert hwbp_compiler.counters()["graphs_seen"] == 1
        assert lanes._compiled.cache_info().currsize == 2  # one for the run across, one for the last run
    assert hwbp_compiler.counters()["failures"] == 0


def test_a_step_over_lanes_serves_the_numbers_it_was_compiled_for():
    """Tracing uses four lanes. If the step compares this size with another, the code must not serve other sizes."""
    given = AnyNumber(((((3,), (3, 1), torch.float64, torch.device("cpu")),), ()), None)
    assert all(given.allows(number) for number in (2, 4, 5))
    with given.mode:
        assert given.examples[0].shape[0] == 4
    assert [given.allows(number) for number in (2, 4, 5)] == [False, True, False]


def test_inside_a_function_compiled_for_us_it_is_one_graph_with_the_functions_options():
    case = CellCase(GRU, "")
    cell, x, state = case.build(LENGTH)

    def model(cell, x, state):
        outputs, last = recurrent(cell, torch.cos(x), state)
        return outputs * 2.0, last

    options = {"iterations": 1, "damping": 0.2, "rewrite": "always"}
    compiled = torch.compile(model, backend="highway", fullgraph=True, options=options)
    output, found = gradients(compiled, cell, x, state, every_step)
    program = case.program(cell)
    plain = program.forward

    def retold(run_chain, x, *state):
        outputs, last = plain(run_chain, torch.cos(x), *state)
        return outputs * 2.0, last

    object.__setattr__(program, "forward", retold)
    expected, reference = reference_gradients(program, (x, state), every_step, 1, 0.2)
    assert_gradients_close(found, reference, 1e-8)


@pytest.mark.parametrize("make", [GRU, MinGRU, TanhRNN])
def test_an_empty_batch(make):
    cell = make().double()
    x, h = leaf(LENGTH, 0, 4), leaf(0, 5)
    for iterations in ("exact", 2):
        assert_same_as_the_loop(cell, x, h, {"iterations": iterations, "rewrite": "always", "strict": True})


@pytest.mark.parametrize("iterations", ["exact", 2])
def test_a_cell_may_compute_with_a_batch_size_that_is_a_symbol(iterations):
    own = GRU().double()

    def cell(x, h):
        h = own(x, h)[1]
        h = h + torch.ones(h.shape[0], 1, dtype=h.dtype) / h.shape[0] + h.mean(0, keepdim=True) / (2 * h.shape[0])
        return h, h

    options = {"iterations": iterations, "rewrite": "always", "strict": True}
    compiled = torch.compile(
        lambda x, h: recurrent(cell, x, h), backend="highway", dynamic=True, fullgraph=True, options=options
    )

    def all_gradients(run, x, h):
        out, last = run(cell, x, h)
        leaves = [x, h, *own.parameters()]
        return [out, last, *torch.autograd.grad(out.sin().sum() + last.sum(), leaves)]

    for batch in (3, 5):
        x, h = leaf(LENGTH, batch, INPUT), leaf(batch, HIDDEN)
        # the batch size is a number here
        known = in_a_loop if iterations == "exact" else partial(recurrent, options=options)
        found, expected = (all_gradients(run, x, h) for run in (lambda _, x, h: compiled(x, h), known))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    counted = hwbp_compiler.counters()
    assert counted["failures"] == 0
    assert counted["chains_rewritten"] == (0 if iterations == "exact" else counted["chains_found"])


@pytest.mark.parametrize("make", [GRU, MinGRU])
def test_what_is_returned_may_be_changed_in_place(make):
    """The result shares no memory with the states that the backward pass reads, or with the inputs."""
    cell, x, h = CellCase(make, "").build(LENGTH)

    def everything(x, h):
        out, h = cell(x, h)
        return (out, x, x.sum()), h

    def run(over_time):
        (out, read, sums), last = over_time(everything, x, h)
        assert not any(t is x for t in (out, read))
        with torch.no_grad():
            read.zero_()
        out[2:].mul_(2)
        last.exp_()
        sums.relu_()
        wanted = [x, h, *cell.parameters()]
        return out, last, sums, *torch.autograd.grad(probe_loss((out, last, sums)), wanted)

    def loop(cell, x, h):
        rows = []
        for t in range(LENGTH):
            row, h = cell(x[t], h)
            rows.append(row)
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), h

    before = x.detach().clone()
    found = run(lambda *args: recurrent(*args, options={"iterations": "exact", "strict": True}))
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)
    for a, b in zip(found, run(loop), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_inputs_look_to_another_backend_as_if_they_had_not_been_here():
    x = torch.randn(LENGTH, 3)
    recurrent(lambda x, h: (h, 0.5 * h + x), x, torch.zeros(3))
    assert not hasattr(x, "_dynamo_weak_dynamic_indices")


def test_its_own_options_win_inside_a_compiled_function():
    cell, x, state = CellCase(GRU, "").build(LENGTH)

    @torch.compile(backend="highway", fullgraph=True, options={"iterations": 0, "rewrite": "always"})
    def model(cell, x, state):
        return recurrent(cell, x, state, options={"iterations": "exact"})

    assert_same_as_the_loop(cell, x, state, run=model)


@pytest.mark.parametrize("within", [False, True], ids=["", "in_a_checkpoint"])
def test_autocast_inside_a_compiled_function_holds_for_the_step(within):
    """The step is traced before the function's graph runs, so before autocast is switched on there."""
    torch.manual_seed(0)
    linear, plain = nn.Linear(4, 4), nn.Linear(4, 4)

    def cell(x, h):
        with torch.autocast("cpu", enabled=False):
            kept = plain(h)
        h = 0.5 * h + torch.tanh(linear(h) + x + kept)
        return (linear(h), kept), h

    def model(over_time, x, h):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(over_time, cell, x, h, use_reentrant=False) if within else over_time(cell, x, h)

    def loop(cell, x, h):
        rows = []
        for row in x.unbind(0):
            out, h = cell(row, h)
            rows.append(out)
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), h

    x, h = torch.randn(LENGTH, 3, 4, requires_grad=True), torch.randn(3, 4)
    compiled = torch.compile(model, backend="highway", fullgraph=True, options={"iterations": "exact", "strict": True})
    wanted = [x, *linear.parameters(), *plain.parameters()]
    (found, kept), last = compiled(recurrent, x, h)
    (expected, _), _ = model(loop, x, h)
    assert (found.dtype, kept.dtype, last.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    (exact, exactly_kept), exact_last = loop(cell, x, h)
    gradients = torch.autograd.grad(probe_loss((found.float(), kept, last)), wanted)
    reference = torch.autograd.grad(probe_loss((exact, exactly_kept, exact_last)), wanted)
    for a, b in zip(gradients, reference, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99


def test_under_another_backend_it_is_a_graph_break_and_right():
    cell, x, state = CellCase(GRU, "").build(LENGTH)

    @torch.compile(backend="aot_eager")
    def model(cell, x, state):
        outputs, last = recurrent(cell, torch.cos(x), state, options={"iterations": "exact"})
        return outputs * 2.0, last

    def loop(cell, x, state):
        outputs, last = in_a_loop(cell, torch.cos(x), state)
        return outputs * 2.0, last

    _, found = gradients(model, cell, x, state, every_step)
    _, reference = gradients(loop, cell, x, state, every_step)
    assert_gradients_close(found, reference, 1e-9)
    assert hwbp_compiler.counters()["chains_found"] == 1


# -- cells of all kinds -------------------------------------------------------------------------------------------


def exactly(cell, x, state, loss=every_step, **options):
    """Run through the rolled form, without Inductor. Returns the recurrence too."""
    captured = Captured(**{"iterations": "exact", "min_length": 1, **options})
    assert_same_as_the_loop(cell, x, state, run=captured.compiled(), loss=loss)
    (recurrence,) = captured.recurrences
    return recurrence


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_tensors_a_function_captures_get_their_gradient():
    w, u = leaf(4, 4), leaf(4, 4)

    def cell(x, h):
        h = torch.sigmoid(x @ w) * h + torch.tanh(h @ u)
        return h, h

    x, h = leaf(LENGTH, 3, 4), leaf(3, 4)
    captured = Captured(iterations="exact")
    found = torch.autograd.grad(every_step(captured.compiled()(cell, x, h)), [w, u])
    reference = torch.autograd.grad(every_step(in_a_loop(cell, x, h)), [w, u])
    assert_gradients_close(dict(enumerate(found)), dict(enumerate(reference)), 1e-9)


def test_nested_inputs_and_state_and_several_outputs():
    m = nn.Linear(4, 4).double()

    def cell(x, s):
        (a, [b]), y = (s["a"], s["b"]), x["p"] * x["q"][0]
        a = torch.sigmoid(y) * a + m(b)
        b = 0.5 * b + torch.tanh(m(a))
        return (a + b, {"z": a * y}), {"b": [b], "a": a}

    captured = Captured(iterations="exact")
    inputs = {"p": leaf(LENGTH, 3, 4), "q": (leaf(LENGTH, 3, 4),)}
    state = {"a": leaf(3, 4), "b": [leaf(3, 4)]}
    outputs, last = captured.compiled()(cell, inputs, state)
    assert outputs[1]["z"].shape == (LENGTH, 3, 4) and last["b"][0].shape == (3, 4)
    s, rows = state, []
    for t in range(LENGTH):
        o, s = cell(pytree.tree_map(lambda v: v[t], inputs), s)  # noqa: B023
        rows.append(o)
    expected = pytree.tree_map(lambda *r: torch.stack(r), *rows), s
    wanted = [*pytree.tree_leaves((inputs, state)), *m.parameters()]
    found, reference = (
        dict(enumerate(torch.autograd.grad(probe_loss([o, s["a"], s["b"]]), wanted)))
        for o, s in ((outputs, last), expected)
    )
    assert_gradients_close(found, reference, 1e-9)


def test_two_layers_in_one_cell_are_two_chains():
    """CONTRACT: one chain per layer, also when the layers are interleaved in one time loop."""
    first, second = nn.GRUCell(4, 5).double(), nn.GRUCell(5, 5).double()

    def cell(x, state):
        a = first(x, state[0])
        b = second(a, state[1])
        return b, (a, b)

    recurrence = exactly(cell, leaf(LENGTH, 3, 4), (leaf(3, 5), leaf(3, 5)))
    assert [plan.stage.members for plan in recurrence.plans] == [[0], [1]]


def test_a_state_that_only_waits_needs_no_loop():
    m = nn.Linear(4, 4).double()

    def cell(x, before):  # a token shift
        return m(x - before), x

    recurrence = exactly(cell, leaf(LENGTH, 3, 4), leaf(3, 4))
    assert recurrence.records == [] and recurrence.plans[0].stage.link is None


def test_a_state_may_be_copied_to_other_strides():
    """As with attention heads: the state is transposed, made contiguous, and viewed."""
    linear = nn.Linear(6, 6).double()

    def cell(x, h):
        heads = linear(h).view(3, 2, 3).transpose(0, 1).contiguous().view(2, 9)
        h = 0.8 * h + torch.tanh(x + heads.view(2, 3, 3).transpose(0, 1).reshape(3, 6))
        return h, h

    recurrence = exactly(cell, leaf(LENGTH, 3, 6), leaf(3, 6), strict=True)
    assert recurrence.plans is not None


def test_a_state_handed_on_as_it_is():
    assert exactly(lambda x, h: (x * h, h), leaf(LENGTH, 3), leaf(3)).plans is not None


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_diagonal_recurrence_is_a_scan_both_ways(dtype):
    """An LRU: ``h' = lambda h + B x``, ``y = Re(C h)``."""
    decay, inward, outward = leaf(6, dtype=dtype), leaf(4, 6, dtype=dtype), leaf(6, 4, dtype=dtype)
    real = torch.float32 if dtype is torch.complex64 else torch.float64

    def cell(x, h):
        h = torch.exp(-decay.abs()) * torch.exp(1j * decay.angle()) * h + x.to(dtype) @ inward
        return (h @ outward).real, h

    x, h = leaf(LENGTH, 3, 4, dtype=real), leaf(3, 6, dtype=dtype)
    captured = Captured(iterations=0)
    wanted = [x, h, decay, inward, outward]
    found, reference = (
        torch.autograd.grad(output.square().sum() + last.abs().sum(), wanted)
        for output, last in (captured.compiled()(cell, x, h), in_a_loop(cell, x, h))
    )
    tolerance = 1e-4 if dtype is torch.complex64 else 1e-9
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    ((plan,), (record,)) = captured.recurrences[0].plans, captured.recurrences[0].records
    assert plan.affine is not None and record.decision == "rewritten"


@pytest.mark.parametrize(
    "cell",
    [
        lambda x, h: (h, h + x.sum()),
        lambda x, h: (h, x.sum(-1, keepdim=True) - 0.5 * h),
        lambda x, h: (h, x[0] - 0.5 * h),
    ],
    ids=["number", "column", "row"],
)
def test_a_linear_recurrence_may_broadcast_what_it_adds(cell):
    recurrence = exactly(cell, leaf(LENGTH, 3, 4), leaf(3, 4))
    assert recurrence.plans[0].affine is not None


def test_attributes_of_what_a_cell_is_given():
    """Dynamo moves ``h.T`` of a region's argument to before the region, where it would be the same in every step."""
    w = leaf(4, 4)
    cell = lambda x, h: (h.T + x.mT, torch.sigmoid(x) * h + (w.T @ h.T).T)  # noqa: E731
    exactly(cell, leaf(LENGTH, 3, 4), leaf(3, 4))
    rotate = torch.polar(torch.full((4,), 0.9, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64))
    cell = lambda x, h: (h.real, rotate * h + 1 + x)  # noqa: E731
    x, h = leaf(LENGTH, 3, 4), leaf(3, 4, dtype=torch.complex128)
    found = recurrent(cell, x, h, options={"strict": True})[0]
    expected = in_a_loop(cell, x, h)[0]
    for a, b in zip(*(torch.autograd.grad(probe_loss(r), [x, h]) for r in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_state_that_forgets_everything():
    exactly(lambda x, h: (h * x, torch.ones_like(h)), leaf(LENGTH, 3), leaf(3), strict=True)


@pytest.mark.parametrize(
    "cell",
    [
        lambda x, h: (h, 1 - 0.5 * h + x),
        lambda x, h: (h, torch.add(torch.sigmoid(x) * h, 2, alpha=0.3)),
        lambda x, h: (h, torch.where(x > 0, 0.5 * h, 3.0) - 1),
    ],
    ids=["from_a_number", "scaled", "chosen"],
)
def test_a_linear_recurrence_may_add_numbers(cell):
    recurrence = exactly(cell, leaf(LENGTH, 3, 4), leaf(3, 4))
    assert recurrence.plans[0].affine is not None


def test_a_state_that_counts_is_no_scan():
    """Only a recurrence with gradients becomes a scan. One of integers runs step by step."""

    def cell(x, state):
        h, steps, positive = state
        return h * steps, (0.5 * h + x / (1 + positive), steps + 1, positive + (x > 0).long())

    x, h = leaf(LENGTH, 3), leaf(3)
    state = (h, torch.zeros((), dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    found, (_, *counted) = Captured(iterations=0, strict=True).compiled()(cell, x, state)
    expected, (_, *counts) = in_a_loop(cell, x, state)
    for a, b in zip(counted, counts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(probe_loss(found), (x, h)), torch.autograd.grad(probe_loss(expected), (x, h)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_step_that_indexes_does_not_read_what_memory_holds(monkeypatch):
    """A step is traced on tensors with arbitrary contents. Here, unwritten memory is full of the largest integers."""
    loop._compiled.cache_clear()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        x, h = leaf(LENGTH, 3, 4), leaf(3, 4)
        cell = lambda x, h: (h, torch.sigmoid(h.roll(1, -1)) * h + x)  # noqa: E731
        wanted = [x, h]
        found, expected = (
            torch.autograd.grad(probe_loss(pytree.tree_leaves(run(cell, x, h))), wanted)
            for run in (lambda *a: recurrent(*a, options={"iterations": "exact", "strict": True}), in_a_loop)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_linear_recurrences_run_no_loop():
    cell, x, state = CellCase(MinGRU, "").build(LENGTH)
    captured = Captured(iterations=0)
    captured.compiled()(cell, x, state)
    traced = make_fx(captured.recurrences[0])(state, x, *cell.parameters())
    called = {str(node.target) for node in traced.graph.nodes}
    assert "highway.linear_scan.default" in called and "highway.loop.default" not in called


def test_a_triangular_linear_state():
    """Position and velocity: the second feeds the first."""

    def cell(x, state):
        position, velocity = state
        velocity = 0.9 * velocity + x
        return position, (0.8 * position + 0.1 * velocity, velocity)

    recurrence = exactly(cell, leaf(LENGTH, 3), (leaf(3), leaf(3)))
    assert all(plan.affine is not None for plan in recurrence.plans)


def test_a_masked_state_keeps_its_value_past_the_end():
    cell = nn.GRUCell(4, 5).double()

    def masked(x, h):
        value, alive = x
        h = torch.where(alive.unsqueeze(-1), cell(value, h), h)
        return h, h

    x, h = leaf(LENGTH, 3, 4), leaf(3, 5)
    alive = torch.arange(LENGTH).unsqueeze(1) < torch.tensor([7, 5, 2])
    captured = Captured(iterations="exact")
    wanted = [x, h, *cell.parameters()]
    found = torch.autograd.grad(every_step(captured.compiled()(masked, (x, alive), h)), wanted)
    rows, s = [], h
    for t in range(LENGTH):
        _, s = masked((x[t], alive[t]), s)
        rows.append(s)
    reference = torch.autograd.grad(every_step((torch.stack(rows), s)), wanted)
    assert_gradients_close(dict(enumerate(found)), dict(enumerate(reference)), 1e-9)


# -- what is not rolled, and says so ------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def stops_gradients(x, h):
    with torch.no_grad():
        scale = torch.sigmoid(h)
    h = scale * h + x
    return h, h


def own_function(x, h):
    h = torch.sigmoid(x) * Doubled.apply(h) + torch.tanh(h)
    return h, h


@pytest.mark.parametrize(
    ("cell", "why"), [(stops_gradients, "gradients on or off"), (own_function, "its own derivative")]
)
def test_what_autograd_would_see_otherwise_is_recorded(cell, why):
    recurrence = exactly(cell, leaf(LENGTH, 3), leaf(3))
    assert recurrence.plans is None
    assert why in recurrence.records[0].reason and recurrence.records[0].decision == "declined"


def test_a_loop_in_a_cell_is_rolled_where_the_cell_is_not():
    linear = nn.Linear(4, 4).double()

    def inner(x, h):
        h = 0.8 * h + torch.tanh(linear(h) + x)
        return h, h

    def cell(over_time, x, h):
        outputs, last = over_time(inner, x, h)
        return outputs.mean(0), 0.5 * h + last

    exact = {"iterations": "exact", "strict": True}
    x, h = leaf(5, 3, 2, 4), leaf(2, 4)
    found = recurrent(lambda *args: cell(recurrent, *args), x, h, options=exact)
    expected = in_a_loop(lambda *args: cell(in_a_loop, *args), x, h)
    assert hwbp_compiler.counters()["declined: cell_runs_loop"] == 1
    wanted = [x, h, *linear.parameters()]
    for a, b in zip(*(torch.autograd.grad(probe_loss(r), wanted) for r in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_recurrent_module_in_a_cell_is_right_and_the_reason_names_it():
    gru = nn.GRU(4, 4).double()

    def cell(x, h):
        outputs, last = gru(x, h.unsqueeze(0))
        return outputs, 0.5 * h + last[0]

    x, h = leaf(5, 3, 2, 4), leaf(2, 4)
    report = hwbp_compiler.explain(lambda x, h: recurrent(cell, x, h), x, h)
    assert "contains a recurrent module (GRU)" in report.chains[0].reason
    assert_same_as_the_loop(cell, x, h, {"iterations": "exact", "strict": True})


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_checkpoint_and_a_loop(where):
    """A checkpoint inside the compiled function is a region of the graph. A checkpoint around it counts the tensors
    that autograd saves.
    """
    cell, x, h = CellCase(GRU, "").build(LENGTH)
    options = {"iterations": "exact", "strict": True}
    if where == "inside":
        run = torch.compile(
            lambda *args: checkpoint(recurrent, *args, use_reentrant=False), backend="highway", options=options
        )
    else:
        alone = lambda *args: recurrent(*args, options=options)  # noqa: E731
        run = lambda *args: checkpoint(alone, *args, use_reentrant=False)  # noqa: E731
    assert_same_as_the_loop(cell, x, h, run=run)
    assert hwbp_compiler.counters()["failures"] == 0


def test_detach_stops_a_gradient():
    def cell(x, h):
        h = torch.sigmoid(x * h.detach()) * h + torch.tanh(x + h).detach()
        return h, h

    assert exactly(cell, leaf(LENGTH, 3), leaf(3)).plans is not None


def test_a_cell_with_dropout_is_recorded_with_the_masks_it_drew():
    drop = nn.Dropout(0.5)

    def cell(x, h):
        h = torch.sigmoid(x) * h + drop(torch.tanh(x - h))
        return h, h

    x, h = leaf(LENGTH, 3, 4), leaf(3, 4)
    captured = Captured(iterations=0)
    results = []
    for run in (captured.compiled(), in_a_loop):
        torch.manual_seed(3)
        output = run(cell, x, h)
        results.append(dict(enumerate(torch.autograd.grad(every_step(output), [x, h]))))
    assert_gradients_close(*results, 1e-9)
    assert "random numbers" in captured.recurrences[0].records[0].reason


@torch.library.custom_op("hwbp_test::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


halved.register_fake(torch.empty_like)
halved.register_autograd(lambda ctx, grad: halved(grad))


def test_an_operator_the_passes_do_not_know_is_exact_without_unrolling():
    def cell(x, h):
        h = torch.sigmoid(x) * h + halved(h)
        return h, h

    recurrence = exactly(cell, leaf(LENGTH, 3, 4), leaf(3, 4), iterations=0, rewrite="always")
    (record,) = recurrence.records
    assert recurrence.plans is not None and record.decision == "declined" and "hwbp_test::halved" in record.reason


def test_a_linear_solve_in_the_cell_is_right():
    a = torch.eye(4, dtype=torch.float64) + 0.1

    def cell(x, h):
        h = torch.sigmoid(x) * h + torch.linalg.solve(a, h, left=False)
        return h, h

    assert "\n" not in exactly(cell, leaf(LENGTH, 3, 4), leaf(3, 4)).records[0].reason


def scaled_in_place(x, h):
    h.mul_(torch.sigmoid(x))
    return h, h


def grows(x, h):
    return h, torch.cat([h, h], -1)


def forgets(x, h):
    return h


def other_structure(x, h):
    return h, (h, h)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (scaled_in_place, "changes component 0 of its state in place"),
        (grows, r"turns a state of shape \(3, 4\) into one of shape \(3, 8\)"),
        (forgets, "must return a pair"),
        (other_structure, "returns a state of structure"),
        (lambda x, h: (h, print(h) or h), "cannot be traced in one piece"),
        (lambda x, h: (h, h @ x), "itself raises"),
    ],
)
def test_a_cell_that_cannot_be_compiled_is_told_why(cell, says):
    with pytest.raises(HighwayError, match=says):
        recurrent(cell, leaf(LENGTH, 3, 4), torch.zeros(3, 4, dtype=torch.float64))


def test_arguments_are_checked():
    cell, x, h = GRU(), torch.zeros(2, 3, 4), torch.zeros(3, 5)
    with pytest.raises(OptionError, match="iterations"):
        recurrent(cell, x, h, options={"iterations": -1})
    with pytest.raises(TypeError, match=r"state\['h'\] is float"):
        recurrent(cell, x, {"h": 0.5})
    with pytest.raises(ValueError, match="the number of time steps"):
        recurrent(cell, (x, x[:1]), h)
    with pytest.raises(ValueError, match="the number of time steps"):
        recurrent(cell, x[:0], h)


@pytest.mark.parametrize("length", [1, 5])
def test_inputs_of_different_lengths_are_refused_inside_a_compiled_function_too(length):
    cell = lambda x, h: (h, 0.5 * h + x[0] + x[1])  # noqa: E731
    model = torch.compile(lambda *x: recurrent(cell, x, torch.zeros(3)), backend="highway", fullgraph=True)
    with pytest.raises(Exception, match="the inputs differ in dim 0"):
        model(torch.randn(LENGTH, 3), torch.randn(length, 3))


# -- what is told -------------------------------------------------------------------------------------------------


def test_without_gradients_the_loop_is_just_run():
    cell, x, state = CellCase(TanhRNN, "").build(LENGTH)
    with torch.no_grad():
        output = recurrent(cell, x, state)
    assert_outputs_close(output, in_a_loop(cell, x, state), 1e-12)


def test_explain_shows_the_loop_and_its_k():
    cell, x, state = CellCase(GRU, "").build(LENGTH)
    model = lambda x, state: recurrent(cell, x, state)  # noqa: E731
    report = hwbp_compiler.explain(model, x, state, options={"iterations": 2, "rewrite": "always"})
    (chain,) = report.chains
    assert (chain.length, chain.multiplier, chain.decision) == (LENGTH, "sigmoid(...)", "rewritten")
    assert "cells.py" in chain.source
    assert "sigmoid(...)" in str(report)


def relative_error(found, exact):
    a, b = (torch.cat([g[name].flatten() for name in exact if isinstance(name, str)]) for g in (found, exact))
    return float((a - b).norm() / b.norm())


def test_explain_measures_the_error_of_a_loop():
    case = next(c for c in CASES if c.make is GRU)
    cell, x, state = case.build(LENGTH)
    model = lambda x, state: recurrent(cell, x, state, options={"iterations": 1})  # noqa: E731
    report = hwbp_compiler.explain(model, x, state, loss=every_step, errors=[0, 2, LENGTH])
    found = {k: reference_gradients(case.program(cell), (x, state), every_step, k, 0.0)[1] for k in (0, 2, "exact")}
    expected = [relative_error(found[k], found["exact"]) for k in (0, 2)]
    errors = [e.relative_error for e in report.graphs[0].errors]
    assert errors == pytest.approx([*expected, 0.0], rel=1e-6, abs=1e-12) and expected[0] > 1e-3


def test_explain_draws_a_loop_and_shows_its_programs(tmp_path):
    cell, x, state = CellCase(GRU, "").build(LENGTH)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x, state):
            return recurrent(self.cell, x, state)

    report = hwbp_compiler.explain(Model(), x, state, options={"iterations": 2, "rewrite": "always"})
    (chain,) = report.chains
    assert chain.module.startswith("cell") and chain.members == [0] * LENGTH
    ((program,),) = report.graphs[0].programs
    assert any("cells.py" in line for line in program.forward)
    assert all("function.py" not in line for line in program.forward)
    assert "cell." in program.before and "mm(" in program.before
    assert f"[{LENGTH}, " in program.after and "linear_scan" in program.after
    report.to_html(tmp_path / "page.html")
    assert f'data-link="{LENGTH}"' in (tmp_path / "page.html").read_text()
    assert "its loops rewritten before it was traced" in str(report) and ", unchanged" not in str(report)
    report.save_repro(tmp_path / "repro.py")
    assert "For a report about them, send the cell" in (tmp_path / "repro.py").read_text()


@pytest.mark.parametrize("options", [{"iterations": "exact"}, {"min_length": 20}, {"iterations": 7}])
def test_a_loop_that_is_not_rewritten_says_what_to_change(options):
    cell, x, state = CellCase(GRU, "").build(LENGTH)
    model = lambda x, state: recurrent(cell, x, state)  # noqa: E731
    (chain,) = hwbp_compiler.explain(model, x, state, options=options).chains
    assert chain.decision == "declined" and chain.advice
    assert hwbp_compiler.explain(model, x, state, options={"iterations": 6}).chains[0].decision == "rewritten"


@pytest.mark.parametrize("cell", [stops_gradients, own_function, nn.Dropout])
def test_a_cell_that_is_stepped_through_says_what_to_change(cell):
    if cell is nn.Dropout:
        drop = nn.Dropout(0.5)
        cell = lambda x, h: (h, torch.sigmoid(x) * drop(h))  # noqa: E731
    chain = hwbp_compiler.explain(lambda x, h: recurrent(cell, x, h), leaf(LENGTH, 3), leaf(3)).chains[0]
    assert "which unrolls the loop" in chain.reason and chain.advice
    assert chain.decision == "declined" and not chain.failed
