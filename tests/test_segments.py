"""Segments of unrolled chains: exact inside, highway across, compared with the oracle (docs/design.md, "Segments").

The claims for recurrent modules and user-defined cells are in test_recurrent_modules.py and test_any_cell.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwbp_compiler.cost.decide import ordinary, shorter
from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.testing import models, reference_gradients, strategies
from hwbp_compiler.testing.assertions import AtFullLength
from hwbp_compiler.testing.capture import options, trace
from hwbp_compiler.testing.compare import assert_gradients_close
from hwbp_compiler.testing.fuzz import Setting, check
from hwbp_compiler.testing.models import Model, Recurrence, Stack

DEPTH = 7  # remainders of 1, 1 and 2 links for segments of 2, 3 and 5
SEGMENTS = (2, 3, 5, DEPTH, DEPTH + 2)
ALTERNATING = ("mlp", "attention", "mlp", "attention", "mlp", "attention", "mlp")


def chains() -> dict[str, Model]:
    def one(**made) -> Model:
        return Model(stacks=(Stack(depth=DEPTH, width=4, **made),), batch=2, length=2)

    return {
        "one group": one(),
        "attention and MLP links": one(blocks=ALTERNATING),
        "losses at every state": one(heads=True),
        "penalties": one(penalties=(1, 4)),
        "a recurrent loop": Model(stacks=(Recurrence(width=3, cell="lstm", start="learnt"),), batch=2, length=DEPTH),
    }


@pytest.mark.parametrize("name", chains())
def test_gradients_are_those_of_the_segmented_w(name):
    """At every S and k short of backprop, and at full length, with and without damping."""
    spec = chains()[name]
    model, args, loss = models.build(spec)
    traced = trace(*models.build(spec))
    for segment in SEGMENTS:
        count = -(-DEPTH // segment)
        for iterations in {0, 1, 2, count - 1}:
            for damping in (0.0, 0.3):
                chosen = vars(options(iterations=iterations, damping=damping, segment=segment))
                _, found, records = traced.gradients(AtFullLength(**chosen))
                assert [r.decision for r in records] == ["rewritten"], [r.reason for r in records]
                program = next(models.programs(model))
                _, expected = reference_gradients(program, args, loss, iterations, damping, segment=segment)
                what = f"S={segment}, k={iterations}, damping={damping}"
                assert_gradients_close(found, expected, 1e-10, what=what)


@pytest.mark.parametrize("segment", SEGMENTS)
def test_enough_iterations_for_all_segments_are_left_to_backprop(segment):
    chosen = Options(segment=segment, iterations=10)
    assert chosen.truncation(DEPTH) is None
    needed = chosen.needed(DEPTH)
    assert needed == -(-DEPTH // segment) - 1
    if needed:
        just_short = Options(segment=segment, iterations=needed - 1)
        assert just_short.truncation(DEPTH) == Truncation(needed - 1, 0.0, segment)


@given(length=st.integers(1, 12), segment=st.integers(1, 14), iterations=st.integers(0, 14) | st.just("exact"))
def test_what_is_advised_is_no_ordinary_backprop(length, segment, iterations):
    chosen = Options(segment=segment, iterations=iterations)
    why = ordinary(length, chosen)
    assert (why is None) == (chosen.truncation(length) is not None)
    if why is None or length == 1:
        assert why is None or why.advice.startswith("Nothing to do: a single link")
        return
    for advice in (why.advice, shorter(length, chosen).advice):
        if "egment below" in advice:
            advised = Options(segment=int(re.search(r"egment below (\d+)", advice)[1]) - 1, iterations=0)
        else:
            number = re.search(r"terations below (\d+)", advice)
            least = int(number[1]) - 1 if number else int(re.search(r"iterations=(\d+) or fewer", advice)[1])
            advised = Options(segment=segment, iterations=least)
        assert advised.truncation(length) is not None, advice


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=strategies.models(max_stacks=1, max_depth=6, max_width=3, loops=True),
    segment=st.sampled_from((2, 3, 4)),
    iterations=st.sampled_from((0, 1, 2)),
    damping=st.sampled_from((0.0, 0.3)),
)
def test_any_model_has_the_gradients_of_the_segmented_w(spec, segment, iterations, damping):
    torch.manual_seed(0)
    check(spec, (Setting(iterations, damping, segment=segment),))
