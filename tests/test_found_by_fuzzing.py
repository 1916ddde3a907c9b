"""Programs for which the fuzzer once found wrong gradients. Each fails if the fix made for it is undone."""

from __future__ import annotations

import functools

import pytest
import torch

from hwbp_compiler.testing import (
    assert_gradients_close,
    fuzz,
    generated,
    judge,
    models,
    probe_loss,
    reference_gradients,
    routes,
    turns,
)
from hwbp_compiler.testing.capture import capture, leaves_of, options
from hwbp_compiler.testing.fuzz import Setting, check
from hwbp_compiler.testing.models import Model, Recurrence, Stack, Streams
from hwbp_compiler.testing.reference import Link, Program

FOUND = {
    # The head was taken for a link with fewer blocks, and its own second block for a loss, so a part that must be cut
    # was exact.
    "parallel_block_at_the_end": (
        Model(stacks=(Stack(depth=4, width=2, blocks=("mlp", "parallel")),), batch=1, length=1),
        Setting(0, 0.0),
    ),
    # Input and state have one size, so the gradient of the first input was taken for that of the first state.
    "lstm_whose_input_is_as_wide_as_its_state": (
        Model(stacks=(Recurrence(width=2, cell="lstm", start="learnt"),), length=4),
        Setting(0, 0.0),
    ),
    # With one sentence at a time, the weights' gradient is an outer product instead of a matrix product. The first
    # step's link then has nothing heavy in it, and was left out.
    "lstm_with_a_batch_of_one": (
        Model(stacks=(Recurrence(width=3, cell="lstm", start="learnt"),), batch=1, length=5, input_grad=False),
        Setting(0, 0.0),
    ),
    # There is no state behind the first step. The gradient of its gate was taken for a state's gradient, and damped.
    "three_steps_of_an_elementwise_recurrence": (
        Model(stacks=(Recurrence(cell="min_gru"),), batch=1, length=3),
        Setting(0, 0.2),
    ),
    # A group of one link evaluated its view on a state with other strides: no rewrite, and a warning.
    "mixer_alone_in_its_group": (
        Model(
            stacks=(Stack(depth=4, width=2, blocks=("mlp", "mixer"), penalties=(1, 2, 3, 4), skip=(0, 3)),),
            batch=3,
            length=3,
        ),
        Setting(0, 0.0),
    ),
    # Not wrong: all gradients vanish except for rounding, which the judge took for an error.
    "batch_norm_that_cancels_every_gradient": (
        Model(stacks=(Stack(depth=4, pre="batch", after="batch", frozen=(1, 2, 4)),), length=1, input_grad=False),
        Setting(0, 0.0, 2),
    ),
    # Not wrong: the chain ends before a skip adds one of its own states. The oracle lacked this reading.
    "skip_added_behind_the_chain": (
        Model(stacks=(Stack(depth=4, width=2, update="scalar", skip=(1, 4), frozen=(2,)),), batch=1, length=1),
        Setting(2, 0.0, 2),
    ),
    # The first block differs from the others, and was matched as if it were one of them and ended in no state.
    "skip_from_the_first_state": (
        Model(stacks=(Stack(skip=(0, 2)),), batch=3, length=1),
        Setting(0, 0.2),
    ),
    "blocks_that_all_differ": (
        Model(stacks=(Stack(blocks=("parallel", "mlp", "shift")),), batch=1, length=1),
        Setting(0, 0.0),
    ),
    # Every block reads the first state. The sums for it on the way counted as bypasses, and a link was lost.
    "first_state_read_again": (
        Model(stacks=(Stack(depth=4, penalties=(1,), rereads=True),), batch=3, length=1),
        Setting(0, 0.0),
    ),
    "first_state_read_again_behind_a_norm": (
        Model(stacks=(Stack(depth=4, width=2, pre="group", rereads=True),), batch=1, length=1),
        Setting(0, 0.0),
    ),
    # No weight requires a gradient, so only the first state itself reveals the first step.
    "frozen_lstm_with_a_given_state": (
        Model(
            stacks=(Recurrence(width=5, cell="lstm", start="given", frozen=True),), batch=5, length=6, input_grad=False
        ),
        Setting(0, 0.0),
    ),
    # ``prims.rev``, the gradient of a running sum, had no rule, so the chain was declined.
    "running_mean": (Model(stacks=(Stack(blocks=("cumulative",)),), length=3), Setting(1, 0.2)),
    # The last step has the gradient of one stream only. It was no link, because the others' blocks are missing there.
    "streams_of_which_the_loss_reads_one": (
        Model(stacks=(Streams(depth=5, ends="first"),)),
        Setting(1, 0.2),
    ),
    # What one stream gets from another looks like what the head of that stream is.
    "streams_that_do_not_read_themselves": (
        Model(stacks=(Streams(depth=5, others=True, ends="first"),)),
        Setting(1, 0.2),
    ),
    # In the first step only one component was found; the others were taken for parts of larger sums.
    "three_streams_in_turns": (Model(stacks=(Streams(depth=5, count=3, in_turns=True),)), Setting(1, 0.2)),
    # A part of a larger sum was counted term by term: no rewrite, and a warning.
    "streams_in_turns_whose_states_are_returned": (
        Model(stacks=(Streams(depth=5, count=3, update="gate", in_turns=True, taps=(1, 2), ends="first"),)),
        Setting(1, 0.2),
    ),
    # The search failed with a KeyError at a link that ends in a part of a sum.
    "few_streams_whose_states_are_returned": (
        Model(stacks=(Streams(after="tanh", taps=(1, 2)),)),
        Setting(9, 0.0),
    ),
}
REWRITTEN = {
    "running_mean",
    "streams_of_which_the_loss_reads_one",
    "streams_that_do_not_read_themselves",
    "three_streams_in_turns",
    "streams_in_turns_whose_states_are_returned",
}


@pytest.mark.parametrize("name", FOUND)
def test_what_the_fuzzer_once_found_is_right_now(name):
    spec, setting = FOUND[name]
    ((verdict, records),) = check(spec, (setting,))
    if name in REWRITTEN:
        assert verdict.rewritten == (True,), [record.reason for record in records]


def test_a_short_run_finds_nothing(tmp_path):
    fuzzer = fuzz.Fuzzer(seed=0, seconds=300, folder=tmp_path, dynamo=0.0, inductor=0.0)
    report = fuzzer.run(max_programs=12)
    assert not report.failures, report
    assert report.programs == 12 and report.chains["rewritten"]


def test_programs_checked_abreast_are_those_checked_one_by_one(tmp_path):
    reports = [
        fuzz.Fuzzer(seed=5, seconds=300, folder=tmp_path, dynamo=0.0, inductor=0.0, abreast=abreast).run(max_programs=6)
        for abreast in (1, 4)
    ]
    assert str(reports[0]) == str(reports[1]) and reports[0].checks >= 6


def test_the_kernels_of_checks_abreast_are_one_library(monkeypatch):
    libraries = []

    def build(sources):
        libraries.append(dict(sources))
        return f"library {len(libraries)}"

    def needs(*kernels):
        return lambda: [generated.builder.get()({name: f"code of {name}"}) for name in kernels]

    def fails():
        raise ValueError("before it needed kernels")

    monkeypatch.setattr(turns, "build_library", build)
    first, nothing, failed, last = turns.outcomes([needs("a", "b"), needs(), fails, needs("c")])
    assert (first.get(), nothing.get(), last.get()) == (["library 1", "library 2"], [], ["library 1"])
    assert [set(sources) for sources in libraries] == [{"a", "c"}, {"b"}]
    with pytest.raises(ValueError, match="before it needed"):
        failed.get()


def test_a_check_that_needs_all_of_torch_compile_is_not_interrupted(monkeypatch):
    """It notes what the passes of the whole process do, and would note those of the other checks too."""
    asked = []
    monkeypatch.setattr(turns, "build_library", lambda sources: asked.append(sources))
    changes_in_place = Model(stacks=(Stack(width=2, blocks=("in_place",)),), batch=1, length=1)
    check = functools.partial(fuzz.check, changes_in_place, (Setting(1, 0.0),), "generated")
    (outcome,) = turns.outcomes([check])
    assert outcome.get() and not asked


def test_it_is_torch_that_stops_at_a_model_that_changes_slices_in_place():
    """Before Inductor, the fuzzer tries other backends. If this fails, it need no longer expect errors of theirs."""
    stack = Stack(width=2, blocks=("shift", "in_place"), update="normed_gate", pre="batch_eval", frozen=(1, 2))
    model, args, _ = models.build(Model(stacks=(stack,), batch=3))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        torch.compile(model, backend="aot_eager")(*args)


@pytest.mark.parametrize("abreast", [1, 4])
def test_a_wrong_gradient_is_found_made_small_and_saved(abreast, tmp_path, monkeypatch):
    right = routes._traced

    def wrong(spec, chosen):
        for output, gradients, records in right(spec, chosen):
            yield output, {key: 1.001 * gradient for key, gradient in gradients.items()}, records

    monkeypatch.setattr(routes, "_traced", wrong)
    fuzzer = fuzz.Fuzzer(seed=0, seconds=60, folder=tmp_path, dynamo=0.0, inductor=0.0, shrinking=2, abreast=abreast)
    report = fuzzer.run(max_programs=4)
    assert report.failures
    script = report.failures[0].read_text()
    with pytest.raises(AssertionError, match="is off by"):
        exec(compile(script, "saved", "exec"), {})


def test_readings_of_a_skip_are_sound_and_all_compute_the_model():
    spec = Model(stacks=(Stack(depth=4, skip=(0, 3), taps=(1, 4), penalties=(2,)),))
    model, args, _ = models.build(spec)
    output = model(*args)
    count = 0
    for program in models.programs(model):
        retold = program.forward(judge.plainly, *args)
        assert all(a.equal(b) for a, b in zip(retold["taps"], output["taps"], strict=True))
        assert retold["final"].allclose(output["final"])
        count += 1
    assert count > 5


@pytest.mark.parametrize("block", ["sized", "in_place", "pool", "attention"])
def test_a_layer_before_the_blocks_that_looks_like_their_last_layer_is_no_link(block):
    """It was counted, so that segments began in the wrong places."""
    spec = Model(stacks=(Stack(blocks=(block,)),), batch=1, length=3, stem=True, input_grad=False)
    settings = Setting(0, 0.0), Setting(0, 0.0, segment=2), Setting(1, 0.2)
    for verdict, records in check(spec, settings):
        assert verdict.rewritten == (True,) and [record.length for record in records] == [3]


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("act", [torch.tanh, torch.relu, torch.clone])
def test_a_layer_built_like_a_block_is_no_link_but_the_first_block_is(stem, input_grad, act):
    """Both have weights of their own and the same backward pass. Only the forward pass tells them apart."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6)).double()

    def start(x):
        return act(layers[5](x)) if stem else x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers if stem else layers[:5]

        def forward(self, x):
            x = start(x)
            for layer in layers[:5]:
                x = x + act(layer(x))
            return x

    def retold(run, x):
        blocks = [Link(lambda s, side, hold, m=m: ((s[0] + hold(act(m(s[0]))),), ())) for m in layers[:5]]
        return run(blocks, (start(x),)).states[-1][0]

    model, x = Net(), torch.randn(3, 4, dtype=torch.float64, requires_grad=input_grad)
    captured = capture(model, (x,), probe_loss)
    for k, segment in ((0, 1), (0, 2), (1, 2), (0, 4)):
        _, found, (record,) = captured.gradients(options(iterations=k, segment=segment))
        _, expected = reference_gradients(
            Program(dict(model.named_parameters()), retold), (x,), probe_loss, k, segment=segment
        )
        assert (record.length, record.decision) == (5, "rewritten")
        assert_gradients_close(found, expected, 1e-10, 1e-13)


def test_a_part_of_a_state_of_symbolic_sizes():
    """The chain was silently passed over, because a mask was made only if every size is a number."""
    model = Model(
        stacks=(Stack(depth=4, blocks=("heads",), update="part", after="rms"),), batch=2, length=4, dynamic=True
    )
    ((verdict, records),) = check(model, (Setting(1, 0.2),), "dynamo")
    assert [record.decision for record in records] == ["rewritten"]


def test_a_rolled_step_that_divides_by_sizes_that_are_symbols():
    """The quotient was passed to an operator that takes integers."""
    stack = Stack(blocks=("cross",), update="curved", pre="batch_eval", after="batch", shared=1, layout="flat")
    model, args, loss = models.build(Model(stacks=(stack,), stem=True, head=True, dynamic=True, seed=2))
    captured = capture(model, args, loss, dynamic=True)
    captured._options = options(reroll="always", iterations="exact")
    _, found, records = captured.gradients(captured._options)
    assert any(loop.length >= 3 for loop in captured._loops), records
    leaves = leaves_of(model, args)
    exact = torch.autograd.grad(loss(model(*args)), list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), exact, strict=True):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10)
