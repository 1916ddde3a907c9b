"""iterations="auto": which form is chosen, that each step has the gradient of its form, and what can be changed while a
model trains (docs/design.md, "Auto").
"""

from __future__ import annotations

import copy
import csv
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Residuals
from torch import nn
from torch.utils.checkpoint import checkpoint

import hwbp_compiler
from hwbp_compiler import Climb, GradientMeter, HighwayError, OptionError, Schedule, set_iterations, set_options
from hwbp_compiler.auto import forms as forms_module
from hwbp_compiler.auto.check import CheckedPass, copied
from hwbp_compiler.auto.measured import Compared
from hwbp_compiler.auto.merge import Merging
from hwbp_compiler.auto.meter import Reading
from hwbp_compiler.auto.policy import Policy
from hwbp_compiler.auto.watching import Watching
from hwbp_compiler.cost.estimate import Estimate
from hwbp_compiler.cost.ladder import RUNGS, Rung, ladder
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.testing import models, reference_gradients
from hwbp_compiler.testing.models import Model, Stack

# -- the policy ---------------------------------------------------------------------------------------------------

COSINES = st.floats(-1, 1) | st.just(math.nan)


@settings(deadline=None)
@given(st.integers(1, 5), st.lists(st.lists(COSINES, min_size=5, max_size=5), max_size=20), st.floats(0.5, 0.999))
def test_after_a_check_the_form_in_use_is_the_cheapest_good_one_or_exact(rungs, checks, target):
    """Or a more expensive form that was in use, as long as no cheaper one is clearly good. Never a form below the
    target.
    """
    policy = Policy(rungs, target, every=1)
    for cosines in checks:
        cosines = cosines[:rungs]
        before = policy.position
        assert policy.checks_now()
        if all(map(math.isnan, cosines)):
            policy.nothing_seen()
            assert policy.position == before
            policy.until_check = 0
            continue
        policy.observe(cosines)
        policy.until_check = 0
        if policy.position != policy.exact:
            assert cosines[policy.position] >= target
        for cheaper in range(min(policy.position, rungs)):
            assert not cosines[cheaper] >= policy.downhill
        if before != policy.exact and not cosines[before] >= target:
            assert not any(cosines[i] >= target for i in range(min(policy.position, rungs)))


def test_where_modules_share_a_graph_checks_change_places_and_no_cheaper_form_is_taken():
    policy = Policy(2, 0.99, every=4)
    policy.shared = True
    checked = []
    for number in range(60):
        if policy.checks_now():
            checked.append(number)
            policy.observe([0.5, 1.0] if len(checked) == 1 else [1.0, 1.0])
            assert policy.position == 1
    assert {number % 2 for number in checked} == {0, 1} and {number % 4 for number in checked} == {0, 1, 2, 3}


def test_a_form_near_the_target_does_not_come_and_go():
    policy = Policy(2, 0.99, every=1)
    positions = []
    for cosine in (0.9895, 0.992, 0.9895, 0.992, 0.996):
        assert policy.checks_now()
        policy.observe([cosine, 0.999])
        positions.append(policy.position)
    assert positions == [1, 1, 1, 1, 0]


@given(st.integers(1, 9), st.integers(1, 50))
def test_the_first_step_is_a_check_and_then_every_so_many(every, steps):
    policy = Policy(1, 0.99, every)
    checked = []
    for step in range(steps):
        if policy.checks_now():
            checked.append(step)
            policy.observe([1.0])
    assert checked == list(range(0, steps, every))


def test_checks_become_rare_where_nothing_is_good_and_frequent_again_where_something_is():
    policy = Policy(1, 0.99, every=10)
    checked = []
    for step in range(3000):
        if policy.checks_now():
            checked.append(step)
            policy.observe([0.5 if step < 1000 else 1.0])
    gaps = [b - a for a, b in zip(checked, checked[1:], strict=False)]
    assert gaps[:6] == [20, 40, 80, 160, 160, 160] and gaps[-1] == 10


def test_steps_without_a_backward_pass_are_soon_hardly_ever_checks():
    policy = Policy(1, 0.99, every=50)
    checked = [step for step in range(1000) if policy.checks_now()]
    assert checked[:6] == [0, 1, 3, 7, 15, 31] and len(checked) < 30


def test_a_form_that_is_lost_is_not_chosen_again_and_without_forms_nothing_is_checked():
    policy = Policy(2, 0.99, every=1)
    assert policy.checks_now()
    policy.observe([1.0, 1.0])
    policy.lose(0)
    assert policy.position == policy.exact and policy.checks_now()
    policy.observe([1.0, 1.0])
    assert policy.position == 1
    policy.lose(1)
    assert policy.position == policy.exact and not any(policy.checks_now() for _ in range(100))


# -- the ladder ---------------------------------------------------------------------------------------------------

HOW = st.builds(Truncation, st.integers(0, 4), st.just(0.0), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))


@given(st.lists(st.dictionaries(HOW, st.floats(0.1, 10)), max_size=4))
def test_a_dearer_rung_reaches_further(chains):
    records = [
        ChainRecord(100, "declined", "", candidates=tuple((how, Estimate(20.0, 20 - s, 0)) for how, s in chain.items()))
        for chain in chains
    ]
    rungs = ladder(records)
    assert len(rungs) <= RUNGS and bool(rungs) == any(chains)
    for one, other in zip(rungs, rungs[1:], strict=False):
        assert one.saves >= other.saves and one.how.reach < other.how.reach
    if rungs:
        all_of = {how for chain in chains for how in chain}
        assert rungs[-1].how.reach == max(how.reach for how in all_of)


# -- merging ------------------------------------------------------------------------------------------------------


def test_what_two_graphs_share_is_computed_once_and_random_numbers_are_the_same():
    def drawn(graph, x, at):
        noise = [graph.call_function(torch.ops.aten.rand.default, ([2, 3],)) for _ in range(2)]
        return graph.call_function(torch.ops.aten.mul.Tensor, (x, noise[at]))

    module = torch.fx.GraphModule({}, torch.fx.Graph())
    one = module.graph
    x = one.placeholder("primals_1")
    twice = [one.call_function(torch.ops.aten.sin.default, (x,)) for _ in range(2)]
    cosine = one.call_function(torch.ops.aten.cos.default, (twice[1],))
    one.output((drawn(one, x, 0), cosine))
    other = torch.fx.Graph(module)
    y = other.placeholder("primals_1")
    product = drawn(other, y, 1)
    cosine = other.call_function(torch.ops.aten.cos.default, (other.call_function(torch.ops.aten.sin.default, (y,)),))
    other.output((product, other.call_function(torch.ops.aten.sin.default, (product,)), cosine))
    merging = Merging(one)
    first, second, third = merging.add(other)
    assert third.args == (twice[1],)  # values that the graph itself computes twice are still found
    assert merging.add(copied(other)) == [first, second, third]
    one.lint()
    targets = [node.target for node in one.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.aten.rand.default) == 2 and targets.count(torch.ops.aten.mul.Tensor) == 2
    assert first.args == (x, first.args[1]) and second.args == (first,)


# -- whole steps --------------------------------------------------------------------------------------------------

FORMS = [(1, 4), (2, 4)]


class Residual(nn.Module):
    """A model with state that a check must not disturb: dropout, and buffers that the forward pass changes."""

    def __init__(self, depth: int = 11, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        for block in self.blocks:
            x = x + 0.3 * torch.tanh(nn.functional.dropout(block(x), 0.2, self.training))
        return self.norm(x)


def step(compiled, model, x, seed=0):
    """Loss and gradients of one step. The parameters stay unchanged."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = (compiled(x) ** 3).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.fixture(scope="module")
def trained():
    """One model, compiled once by each backend, and five steps with each. Every second step is a check."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            model, x = Residual(), torch.randn(8, 6)
            exact = torch.compile(model, backend="inductor")
            auto = torch.compile(model, backend="highway", options={"rewrite": "always", "check_every": 2})
            found = []
            for number in range(5):
                buffers = copy.deepcopy(dict(model.named_buffers()))
                expected = (*step(exact, model, x, number), copy.deepcopy(dict(model.named_buffers())))
                after = torch.get_rng_state()
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
                got = (*step(auto, model, x, number), copy.deepcopy(dict(model.named_buffers())))
                assert torch.equal(after, torch.get_rng_state())
                found.append((expected, got))
            yield model, x, auto, found
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_check_is_a_step_of_inductor_with_its_dropout_masks_buffers_and_gradients(trained):
    for (loss, gradients, buffers), (mine, found, changed) in trained[3][::2]:
        torch.testing.assert_close(mine, loss)
        torch.testing.assert_close(changed, buffers)
        torch.testing.assert_close(found, gradients)


def test_between_checks_the_chosen_form_runs_and_its_gradient_is_above_the_target(trained):
    for (loss, gradients, buffers), (mine, found, changed) in trained[3][1::2]:
        torch.testing.assert_close(mine, loss)
        torch.testing.assert_close(changed, buffers)
        cosine = torch.cosine_similarity(flat(gradients), flat(found), dim=0)
        assert 0.99 <= cosine < 1 - 1e-6


def test_set_options_takes_effect_at_the_next_step_and_what_was_compiled_is_kept(trained):
    model, x, auto, found = trained
    hwbp_compiler.reset_counters()
    (_, exact, _), _ = found[0]
    set_iterations(auto, "exact")
    torch.testing.assert_close(step(auto, model, x)[1], exact)
    graphs = hwbp_compiler.counters()["graphs_seen"]
    set_options(auto, iterations=0)
    poor = step(auto, model, x)[1]
    assert torch.cosine_similarity(flat(poor), flat(exact), dim=0) < 0.99
    set_iterations(auto, "exact")
    torch.testing.assert_close(step(auto, model, x)[1], exact)
    set_options(auto, iterations=0)
    torch.testing.assert_close(step(auto, model, x)[1], poor)
    assert hwbp_compiler.counters()["graphs_seen"] == graphs + 1  # k = 0 alone
    schedule = Schedule(auto, {0: {"iterations": 0}, 1: {"iterations": "exact"}})
    schedule.step()
    torch.testing.assert_close(step(auto, model, x)[1], poor)
    schedule.step()
    torch.testing.assert_close(step(auto, model, x)[1], exact)
    resumed = Schedule(auto, {0: {"iterations": 0}, 1: {"iterations": "exact"}, 7: {"iterations": 0}})
    set_options(auto, iterations=0)
    resumed.load_state_dict(schedule.state_dict())
    torch.testing.assert_close(step(auto, model, x)[1], exact)


def test_a_meter_reads_along_and_changes_no_step(trained, tmp_path, caplog):
    model, x, auto, found = trained
    (_, exact, _), _ = found[0]
    set_options(auto, iterations=0, segment=1, damping=0.0)
    poor = step(auto, model, x)[1]
    seen, scalars = [], []

    class Writer:
        def add_scalar(self, tag, value, number):
            scalars.append((tag, number))

    path = tmp_path / "meter.csv"
    with (
        caplog.at_level(logging.WARNING),
        GradientMeter(auto, every=2, callback=seen.append, writer=Writer(), csv_path=path, warn_below=0.9999) as meter,
    ):
        for _ in range(4):
            torch.testing.assert_close(step(auto, model, x)[1], poor)
    step(auto, model, x)
    assert len(seen) == 2 and seen == meter.readings and meter.last is seen[-1]
    # Without damping, all parameters of the blocks belong to one chain, and those of the norm are exact.
    blocks = [{n: g for n, g in gradients.items() if "blocks" in n} for gradients in (exact, poor)]
    a, b = map(flat, blocks)
    (chain,) = meter.last.chains.values()
    for figures in (meter.last, chain):
        assert figures.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-9)
        assert figures.relative_error == pytest.approx(float((a - b).norm() / a.norm()), abs=1e-7)
    assert [float(row["cosine"]) for row in csv.DictReader(path.open())] == [r.cosine for r in seen]
    assert scalars[0] == ("highway/cosine/k0_S1", 0) and len(scalars) == 4
    assert sum("has a cosine of" in message for message in caplog.messages) == 2


def test_a_climb_takes_the_next_rung_when_the_cosine_falls_and_continues_after_a_restart(trained):
    model, x, auto, found = trained
    (_, exact, _), _ = found[0]
    rungs = [{"iterations": 0, "segment": 1, "damping": 0.0}, {"iterations": "exact"}]
    with GradientMeter(auto, every=1, warn_below=None) as meter:
        content = Climb(auto, rungs, meter, below=0.01)
        climb = Climb(auto, rungs, meter, below=0.9999)
        gradients = []
        for _ in range(3):
            content.step()
            climb.step()
            gradients.append(step(auto, model, x)[1])
        assert torch.cosine_similarity(flat(gradients[0]), flat(exact), dim=0) < 0.99
        torch.testing.assert_close(gradients[2], exact)
        assert (content.position, climb.position) == (0, 1)
        resumed = Climb(auto, rungs, meter)
        resumed.load_state_dict(climb.state_dict())
        torch.testing.assert_close(step(auto, model, x)[1], exact)
        with pytest.raises(ValueError, match="position = 2"):
            resumed.load_state_dict({"position": 2})


def test_a_gradient_without_a_cosine_is_no_reason_to_climb(trained):
    _, _, auto, _ = trained
    with GradientMeter(auto) as meter:
        climb = Climb(auto, [{"iterations": 1}, {"iterations": "exact"}], meter)
        for cosine, position in ((math.nan, 0), (0.99, 0), (0.5, 1)):
            meter.readings.append(Reading(len(meter.readings), 1, 1, 0.0, cosine, 0.1, {}, trains=True))
            climb.step()
            assert climb.position == position


def test_a_callback_continues_its_milestones_where_the_training_is_or_where_it_was_saved(trained):
    _, _, auto, _ = trained
    milestones = {0: {"iterations": 0, "segment": 1, "damping": 0.0}, 5: {"iterations": "exact"}}
    saved = {"schedule": {"steps": 7}}
    for state, steps, last in (({}, None, 0), ({}, 7, "exact"), (saved, None, "exact"), (saved, 0, 0)):
        watching = Watching(milestones=milestones)
        watching.load_state_dict(state)
        watching.start([auto], steps)
        watching.step()
        assert forms_of(auto).iterations == last
        watching.stop()
        assert watching.state_dict() == {"schedule": {"steps": (steps or 7 if last == "exact" else 0) + 1}}


def test_a_climb_says_what_it_cannot_do(trained):
    _, _, auto, _ = trained
    meter = GradientMeter(auto)
    with pytest.raises(ValueError, match="rungs is empty"):
        Climb(auto, [], meter)
    with pytest.raises(ValueError, match="below = 1.5"):
        Climb(auto, [{"iterations": 1}], meter, below=1.5)
    with pytest.raises(OptionError, match="'rewrite'.*cannot be changed"):
        Climb(auto, [{"rewrite": "never"}], meter)
    meter.close()
    with pytest.raises(ValueError, match="does not read this model"):
        Climb(auto, [{"iterations": 1}], meter)


def test_what_cannot_be_changed_is_refused_and_nothing_changes(trained):
    model, _, auto, _ = trained
    before = forms_of(auto)
    with pytest.raises(OptionError, match="'rewrite'.*cannot be changed"):
        set_options(auto, rewrite="never")
    with pytest.raises(OptionError, match="'iterations' = -1"):
        set_options(auto, iterations=-1, segment=2)
    assert forms_of(auto) == before
    for other in (model, torch.compile(model, backend="eager"), print):
        with pytest.raises(TypeError, match='not compiled with backend="highway"'):
            set_iterations(other, 1)
    with pytest.raises(ValueError, match="milestone -1"):
        Schedule(auto, {-1: {}})
    with pytest.raises(ValueError, match="every = 0"):
        GradientMeter(auto, every=0)


def forms_of(compiled):
    from hwbp_compiler.auto.control import compiled_as

    return compiled_as(compiled).options


def test_functions_and_modules_compiled_in_place_take_set_options_too():
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(6)]

    def run(x):
        for w in weights:
            x = x + torch.tanh(x @ w)
        return x

    compiled = torch.compile(run, backend="highway", options={"iterations": "exact", "rewrite": "always"})
    x = torch.randn(3, 4)
    exact = torch.autograd.grad(compiled(x).sum(), weights)
    set_options(compiled, iterations=0)
    poor = torch.autograd.grad(compiled(x).sum(), weights)
    assert not torch.allclose(exact[0], poor[0]) and torch.allclose(exact[-1], poor[-1])
    module = nn.Linear(2, 2)
    module.compile(backend="highway")
    set_iterations(module, 1)


# -- what a check measures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [("mlp",) * 9, ("attention", "mlp") * 5], ids=["one group", "two groups"])
def test_the_cosine_of_a_check_is_the_oracles(blocks):
    """For every form, with damping: the cosine of the reference's w^k gradient and eager mode's, in float64."""
    spec = Model(stacks=(Stack(depth=len(blocks), width=4, blocks=blocks),), batch=2, length=3)
    model, args, loss = models.build(spec)
    given = [Truncation(k, damping, s) for k, s in ((0, 1), (1, 2), (1, 3)) for damping in (0.0, 0.3)]
    (check,) = checked(model, args, loss, given)
    _, exact = reference_gradients(next(models.programs(model)), args, loss, "exact")
    for how, total in zip(given, check.total, strict=True):
        _, other = reference_gradients(
            next(models.programs(model)), args, loss, how.iterations, how.damping, segment=how.segment
        )
        compared = check.parameters[given.index(how)].keys()
        for name in [n for n in exact if isinstance(n, str) and n not in compared]:
            torch.testing.assert_close(exact[name], other[name], rtol=1e-12, atol=0)
        a, b = (torch.cat([g[n].flatten() for n in compared]) for g in (exact, other))
        assert total.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-9)
        assert total.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)


def checked(model, args, loss, given):
    """Run one step that compares the ``given`` forms. Returns its measurements, one per graph."""
    from hwbp_compiler.calibration import checks_of

    return checks_of(model, args, {}, loss, given, {})


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = {"cell": nn.GRUCell, "lstm": nn.LSTM, "gru": nn.GRU}[kind](3, 4)

    def forward(self, x):
        if self.kind == "cell":
            return hwbp_compiler.recurrent(self.cell, x, torch.zeros(x.shape[1], 4, dtype=x.dtype))[0]
        return self.inner(x)[0]

    def cell(self, x, h):
        h = self.inner(x, h)
        return h, h


@pytest.mark.parametrize("kind", ["gru", "lstm", "cell"])
def test_recurrent_models_of_any_length_choose_too(kind):
    """A check has eager mode's gradients, the steps between checks have good ones. A new length compiles nothing."""
    torch.manual_seed(1)
    model = Recurrent(kind).double()
    options = {"rewrite": "always", "check_every": 3, "iterations": 1, "segment": "auto"}
    compiled = torch.compile(model, backend="highway", options=options, dynamic=True)
    for number in range(5):
        x = torch.randn(40 + 2 * number, 2, 3, dtype=torch.float64)
        with hwbp_compiler.testing.exactly():
            _, exact = step(model, model, x)
        _, found = step(compiled, model, x)
        if number == 1:
            graphs = hwbp_compiler.counters()["graphs_seen"]
        if number in (0, 3):
            torch.testing.assert_close(found, exact)
        else:
            cosine = torch.cosine_similarity(flat(exact), flat(found), dim=0)
            assert cosine >= 0.99 and not torch.allclose(flat(exact), flat(found), rtol=1e-12, atol=0)
    assert hwbp_compiler.counters()["graphs_seen"] == graphs


def test_a_loop_takes_from_its_function_what_its_own_options_do_not_say(caplog):
    cell = nn.GRUCell(2, 3)

    def run(own):
        def step(x, h):
            h = cell(x, h)
            return h, h

        return lambda x: hwbp_compiler.recurrent(step, x, torch.zeros(1, 3), options=own)[0]

    def form(own, **outer):
        report = hwbp_compiler.explain(run(own), torch.randn(12, 1, 2), options={"rewrite": "always", **outer})
        return report.chains[0].iterations, report.chains[0].segment

    always = {"rewrite": "always"}
    assert form({"min_length": 2, **always}, iterations=3) == (3, 1)
    assert form({"segment": 4, **always}, iterations=1) == (1, 4)
    assert form({"iterations": 2, **always}, iterations=1, segment=4) == (2, 1)
    assert "keeps exact gradients" not in caplog.text
    assert form({"iterations": "auto", **always}, iterations=1) == (None, None)
    assert "the loop keeps exact gradients" in caplog.text


# -- what must not go wrong ---------------------------------------------------------------------------------------

AUTO = {"rewrite": "always", "check_every": 2}


def stack(depth: int = 8, width: int = 4, batch: int = 3):
    torch.manual_seed(2)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

        def forward(self, x):
            for block in self.blocks:
                x = x + 0.1 * torch.tanh(block(x))
            return x

    return Small(), torch.randn(batch, width)


def test_a_form_that_cannot_be_compiled_leaves_exact_steps_and_a_warning(monkeypatch, caplog):
    model, x = stack()
    hwbp_compiler.reset_counters()
    compiled = torch.compile(model, backend="highway", options=AUTO)

    def compiled_late(self, how):
        raise RuntimeError("no space left")

    monkeypatch.setattr(forms_module.Source, "compiled", compiled_late)
    _, exact = step(model, model, x)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):  # exact backprop cannot be compiled either
            torch.testing.assert_close(step(compiled, model, x)[1], exact)
    assert "no space left" in caplog.text and hwbp_compiler.counters()["failures"] >= 2


def test_a_gradient_that_is_not_finite_or_zero_decides_nothing():
    model, x = stack()
    compiled = torch.compile(model, backend="highway", options=AUTO)
    (compiled(x).sum() * 0).backward()
    model.zero_grad()
    (compiled(x).sum() * math.inf).backward()
    hwbp_compiler.reset_counters()
    for _ in range(4):
        step(compiled, model, x)
    assert hwbp_compiler.counters()["checks"] >= 1


def test_under_a_checkpoint_in_eager_mode_the_steps_are_exact():
    """A checkpoint runs the forward pass again in the backward pass, and compares what the two runs save."""
    model, x = stack()
    compiled = torch.compile(model, backend="highway", options=AUTO)
    _, exact = step(model, model, x)
    for _ in range(4):
        model.zero_grad()
        (checkpoint(compiled, x.requires_grad_(), use_reentrant=False) ** 3).sum().backward()
        torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, exact)


def test_a_checkpoint_is_run_again_in_the_form_it_had_whatever_other_calls_have_measured():
    model, x = stack()
    compiled = torch.compile(model, backend="highway", options=AUTO)

    def twice(run):
        model.zero_grad()
        h = checkpoint(run, x.requires_grad_(), use_reentrant=False)
        (run(h) ** 3).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    exact = twice(model)
    for _ in range(3):
        found = twice(compiled)
        assert torch.cosine_similarity(flat(found), flat(exact), dim=0) > 0.98


class Centred(nn.Module):
    """A buffer that follows the output of a recurrent module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 4)
        self.register_buffer("center", torch.zeros(4))

    def forward(self, x):
        h = self.inner(x)[0]
        self.center.lerp_(h.detach().mean((0, 1)), 0.1)
        return h


def test_a_check_runs_the_forward_pass_once():
    torch.manual_seed(3)
    model, x = Centred(), torch.randn(8, 2, 3)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="highway", options={**AUTO, "check_every": 1})
    for _ in range(2):
        _, exact = step(other, other, x)
        _, found = step(compiled, model, x)
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(model.center, other.center)


def test_modules_that_share_a_graph_are_all_checked():
    """Blocks of one class share a graph. A form is used only if it is good for all of them."""
    torch.manual_seed(4)
    # The first has an input without a gradient, and its own graph.
    first, good, bad = (Residuals(8) for _ in range(3))
    with torch.no_grad():
        for p in good.parameters():
            p *= 0.01
    options = {**AUTO, "check_every": 2}
    for block in (first, good, bad):
        block.compile(backend="highway", options=options)
    # Every second call of the graph is for the last block. Checks at every second call would see only that block.
    whole, x = nn.Sequential(first, bad, good), torch.randn(5, 4)
    hwbp_compiler.reset_counters()
    eager = copy.deepcopy(whole)
    for block in eager:
        block._compiled_call_impl = None
    _, exact = step(eager, eager, x)
    for number in range(12):
        _, found = step(whole, whole, x)
        if number == 0:
            assert hwbp_compiler.counters()["graphs_seen"] == 2
        if number > 7:
            ours, theirs = (torch.cat([g[n].flatten() for n in g if n.startswith("1.")]) for g in (found, exact))
            assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_what_goes_on_to_an_earlier_graph_counts_too(float64):
    """Parameters of an earlier graph train on a gradient that has crossed every link."""
    torch.manual_seed(2)
    stem, blocks = nn.Linear(4, 4), Residuals(8)

    def run(x):
        h = stem(x)
        torch._dynamo.graph_break()
        return blocks(h)

    (check,) = checked(run, (torch.randn(5, 4),), lambda y: (y**3).sum(), [Truncation(0), Truncation(2)])
    for total, upstream, worst in zip(check.total, check.upstream, check.worst, strict=True):
        assert upstream.cosine < total.cosine and worst == upstream.cosine


def test_where_nothing_pays_there_is_one_compilation_and_no_check():
    # wide enough to occupy all cores: nothing is gained by running links at once
    model, x = stack(5, width=64, batch=2048)
    hwbp_compiler.reset_counters()
    compiled = torch.compile(model, backend="highway", options={"check_every": 1})
    _, exact = step(model, model, x)
    for _ in range(3):
        torch.testing.assert_close(
            step(compiled, model, x)[1], exact, rtol=1e-4, atol=1e-4 * float(flat(exact).abs().max())
        )
    counters = hwbp_compiler.counters()
    assert counters["graphs_seen"] == 1 and "checks" not in counters and counters["declined: no_candidate"] == 1


def test_strict_says_what_failed(monkeypatch):
    model, x = stack()
    compiled = torch.compile(model, backend="highway", options={**AUTO, "strict": True})
    step(compiled, model, x)
    monkeypatch.setattr(forms_module.Source, "compiled", lambda self, how: 1 / 0)
    with pytest.raises((HighwayError, ZeroDivisionError)):
        step(compiled, model, x)


def test_code_that_compares_nothing_is_never_taken_from_the_cache_for_code_that_does():
    options = Options(iterations="exact")
    assert CheckedPass(options, given=(Truncation(1),)).uuid() is None
    assert CheckedPass(options).uuid() is not None


def test_rungs_are_few_and_spread():
    steps = [Truncation(k, 0.0, s) for s in (2, 4, 8, 16, 32, 64) for k in (0, 1)]
    record = ChainRecord(200, "declined", "", candidates=tuple((h, Estimate(100.0, 10.0 + h.reach, 0)) for h in steps))
    rungs = ladder([record])
    assert len(rungs) == RUNGS and isinstance(rungs[0], Rung)
    assert rungs[0].how.reach == 2 and rungs[-1].how.reach == 128
    assert Options().tried(200)[0] == Truncation(0, 0.0, 1)


def test_a_cosine_is_never_above_one_though_its_sums_are_rounded_apart():
    assert Compared.of(1.0002, 1.0, 1.0).cosine == 1.0
    assert Compared.of(-1.0002, 1.0, 1.0).cosine == -1.0
    assert math.isnan(Compared.of(math.nan, 1.0, 1.0).cosine)
