"""Random residual models: the compiler's gradients always equal the oracle's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from hwbp_compiler.testing import assert_gradients_close, models, reference_gradients, strategies, sum_over_paths
from hwbp_compiler.testing.capture import capture, options, trace
from hwbp_compiler.testing.compare import assert_outputs_close

unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck))
# Always the same few small models, without shrinking, which would take minutes; the slow tests do it.
everyday = settings(
    unhurried, max_examples=12, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
many = settings(unhurried, max_examples=300)
small = strategies.models(max_stacks=2, max_depth=4)


def autograd(spec):
    model, args, loss = models.build(spec)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves.update({0: args[0]} if spec.input_grad else {})
    output = model(*args)
    if not leaves:  # the whole model is frozen
        return output, {}
    found = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return output, {k: z if g is None else g for k, g, z in zip(leaves, found, zeros, strict=True)}


def oracle(spec, iterations, damping, **kwargs):
    model, args, loss = models.build(spec)
    return reference_gradients(models.program(model), args, loss, iterations, damping, **kwargs)


def compiled(spec, *settings, through=trace):
    """Output, gradients and records for each (iterations, damping), from one traced joint graph."""
    traced = through(*models.build(spec))
    return [traced.gradients(options(iterations=k, damping=gamma)) for k, gamma in settings]


@settings(everyday, max_examples=50)
@given(strategies.models())
def test_retold_models_compute_what_the_model_computes(spec):
    output, exact = autograd(spec)
    retold, found = oracle(spec, "exact", 0.3)
    assert_outputs_close(retold, output, 1e-11)
    assert_gradients_close(found, exact, 1e-9)


@everyday
@given(strategies.models(max_depth=4, max_width=3), strategies.iterations(), strategies.dampings())
def test_retold_models_sum_over_paths(spec, iterations, damping):
    _, found = oracle(spec, iterations, damping)
    _, paths = oracle(spec, iterations, damping, solver=sum_over_paths)
    assert_gradients_close(found, paths, 1e-8)


def check(spec, iterations, damping, through=trace):
    """The gradients are the oracle's, and every stack is one chain."""
    settings = ((iterations, damping), (1, 0.0))
    runs = compiled(spec, *settings, through=through)
    for (k, gamma), (output, found, _) in zip(settings, runs, strict=True):
        expected_output, expected = oracle(spec, k, gamma)
        assert_outputs_close(output, expected_output, 1e-11)
        assert_gradients_close(found, expected, 1e-6, what=f"k={k}, gamma={gamma}")
    rewritten = sorted(record.length for record in runs[-1][2] if record.decision == "rewritten")
    lengths = list(spec.chain_lengths)
    allowed = [sorted(lengths)]
    if not (spec.input_grad or spec.stem):  # nothing below the first chain requires a gradient
        allowed.append(sorted([lengths[0] - 1, *lengths[1:]]))
    assert rewritten in allowed


@everyday
@given(small, strategies.iterations(), strategies.dampings())
def test_gradients_match_the_oracle(spec, iterations, damping):
    check(spec, iterations, damping)


@settings(everyday, max_examples=2)
@given(strategies.models(), strategies.iterations(), strategies.dampings())
def test_through_dynamo_gradients_match_the_oracle(spec, iterations, damping):
    check(spec, iterations, damping, through=capture)


@everyday
@given(strategies.models(max_stacks=2, max_depth=4, skips=True), strategies.dampings())
def test_enough_iterations_are_backprop_whatever_the_skips(spec, damping):
    runs = compiled(spec, (1, damping), (10**6, damping))
    output, exact = autograd(spec)
    for (got, found, _), is_exact in zip(runs, (False, True), strict=True):
        assert_outputs_close(got, output, 1e-11)
        if is_exact:
            assert_gradients_close(found, exact, 1e-9)


@pytest.mark.slow
@many
@given(strategies.models(), strategies.iterations(), strategies.dampings())
def test_many_gradients_match_the_oracle(spec, iterations, damping):
    check(spec, iterations, damping)
