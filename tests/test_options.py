"""What options= and mode= accept, and how they refuse the rest."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwbp_compiler import HighwayError, OptionError, Options
from hwbp_compiler.options import parse


def test_no_options_mean_the_documented_defaults():
    assert parse(None) == parse({}) == (Options(), {})
    assert dataclasses.asdict(Options()) == {
        "iterations": "auto",
        "segment": "auto",
        "damping": "auto",
        "target_cosine": 0.99,
        "check_every": 200,
        "max_extra_memory": None,
        "reroll": "auto",
        "rewrite": "profitable",
        "min_length": 4,
        "strict": False,
    }


@given(st.integers(min_value=0))
def test_a_number_of_iterations_alone_means_the_paper(k):
    said = parse({"iterations": k})[0]
    assert (said.iterations, said.segment, said.damping, said.auto) == (k, 1, 0.0, False)


def test_what_is_said_is_kept_and_the_rest_is_chosen():
    assert parse({"segment": 16})[0] == Options(iterations="auto", segment=16, damping="auto")
    assert Options(damping=0.2).iterations == "auto"
    assert Options(iterations=2, segment="auto").damping == 0.0
    assert {how.segment for how in Options(segment=16).tried(256)} == {16}
    assert {how.iterations for how in Options(iterations=2, segment="auto").tried(256)} == {2}
    assert {how.damping for how in Options(damping=0.2).tried(256)} == {0.2}
    assert not Options(iterations="exact").auto


@given(st.integers(1, 600), st.sampled_from(["auto", 0, 1, 3]), st.sampled_from(["auto", 1, 2, 7]))
def test_nothing_that_is_tried_is_ordinary_backprop(length, iterations, segment):
    for how in Options(iterations=iterations, segment=segment).tried(length):
        count = -(-length // how.segment)
        assert how.iterations < (length if how.segment == 1 else count - 1)


@given(st.integers(min_value=0))
def test_iterations_take_any_integer_from_zero(k):
    assert Options(iterations=k).iterations == k


@given(st.floats(0, 1))
def test_damping_takes_any_number_from_zero_to_one(gamma):
    assert Options(damping=gamma).damping == gamma


@pytest.mark.parametrize(
    "key, given, kept",
    [
        ("iterations", "exact", "exact"),
        ("iterations", "auto", "auto"),
        ("segment", "auto", "auto"),
        ("damping", "auto", "auto"),
        ("target_cosine", np.float32(0.5), 0.5),
        ("check_every", np.int64(7), 7),
        ("max_extra_memory", np.int64(7), 7),
        ("max_extra_memory", "2.5%", "2.5%"),
        ("max_extra_memory", None, None),
        ("iterations", np.int32(3), 3),
        ("segment", np.int64(16), 16),
        ("min_length", np.int64(1), 1),
        ("damping", 1, 1.0),
        ("damping", np.float32(0.25), 0.25),
        ("rewrite", "always", "always"),
        ("reroll", "never", "never"),
        ("strict", True, True),
    ],
)
def test_accepted_values_are_kept_as_plain_python(key, given, kept):
    value = getattr(parse({key: given})[0], key)
    assert value == kept and type(value) is type(kept)


REFUSED = [
    *(("iterations", v) for v in (True, False, 1.5, 2.0, None, -1, "x", "4", np.float64(2), np.True_, [4])),
    *(("damping", v) for v in (True, False, float("nan"), float("inf"), -0.1, 1.01, "0.2", None, np.True_)),
    *(("rewrite", v) for v in ("allways", True, None, ["always"])),
    *(("reroll", v) for v in ("profitable", False, None, ["always"])),
    *(("segment", v) for v in (0, -1, True, 1.5, 2.0, None, "x", "exact", np.float64(2), [4])),
    *(("target_cosine", v) for v in (True, 0, 1, 1.0, -0.5, float("nan"), "auto", None)),
    *(("check_every", v) for v in (0, -3, True, 2.0, "auto", None)),
    *(("max_extra_memory", v) for v in (True, -1, 1.5, "25", "0%", "101%", "x%", [4])),
    *(("min_length", v) for v in (0, -3, True, 2.0, "4", None)),
    *(("strict", v) for v in (1, 0, "yes", None, np.True_)),
]
ALLOWED = {
    "iterations": 'an integer >= 0, "exact" (ordinary backprop) or "auto"',
    "damping": 'a number from 0 to 1 or "auto"',
    "target_cosine": "a number between 0 and 1, both excluded",
    "check_every": "an integer >= 1",
    "max_extra_memory": 'bytes, an integer >= 0, a share of the device\'s memory such as "25%", or None',
    "rewrite": "one of 'profitable', 'always', 'never'",
    "reroll": "one of 'auto', 'always', 'never'",
    "segment": 'an integer >= 1 or "auto"',
    "min_length": "an integer >= 1",
    "strict": "True or False",
}


@pytest.mark.parametrize("key, value", REFUSED, ids=repr)
def test_a_refusal_names_the_key_the_value_what_is_allowed_and_what_to_do(key, value):
    with pytest.raises(OptionError) as refusal:
        parse({key: value})
    for part in (repr(key), f"= {value!r} ", ALLOWED[key], "or leave the key out"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("key, value", REFUSED, ids=repr)
def test_options_cannot_be_made_with_a_refused_value_either(key, value):
    with pytest.raises(OptionError):
        Options(**{key: value})


@pytest.mark.parametrize(
    "key, nearest",
    [("iteration", "iterations"), ("min-lenght", "min_length"), ("max_autotun", "max_autotune")],
)
def test_unknown_key_names_the_nearest_valid_names(key, nearest):
    with pytest.raises(OptionError) as refusal:
        parse({key: 17})
    for part in (repr(key), "17", f"Did you mean {nearest!r}", "'iterations', 'segment', 'damping'", "list_options()"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("key", ["qqqqqqqq", 3, None], ids=repr)
def test_unknown_key_like_no_other_is_refused_too(key):
    with pytest.raises(OptionError, match="known neither"):
        parse({key: 1})


@pytest.mark.parametrize("options", [["iterations"], "iterations", 4], ids=repr)
def test_options_that_are_no_mapping_are_refused(options):
    with pytest.raises(OptionError, match=r"options = .*takes a dict"):
        parse(options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_autotune": True},
        {"max-autotune": True, "epilogue_fusion": False},
        {"triton.cudagraphs": False, "trace.enabled": False},
    ],
    ids=repr,
)
def test_other_keys_become_the_patches_inductor_makes_of_them(options):
    ours, patches = parse({"iterations": 2, **options, "strict": True})
    assert ours == Options(iterations=2, strict=True)
    assert patches == torch._TorchCompileInductorWrapper(None, options, None).config


def test_a_dash_stands_for_an_underscore_in_our_keys_as_in_inductors():
    assert parse({"min-length": 7})[0].min_length == 7


@pytest.mark.parametrize("key, value, type_", [("max_autotune", "yes", "bool"), ("max-fusion-size", 1.5, "int")])
def test_a_value_of_a_type_inductor_refuses_is_refused_with_the_type_it_takes(key, value, type_):
    with pytest.raises(RuntimeError):
        torch.compile(torch.nn.Linear(1, 1), backend="inductor", options={key: value})
    with pytest.raises(OptionError) as refusal:
        parse({key: value})
    for part in (repr(key), repr(value), f"type {type_} ", "Inductor"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("mode", [None, *torch._inductor.list_mode_options()])
def test_a_mode_becomes_the_patches_inductor_makes_of_it(mode):
    assert parse(None, mode) == (Options(), torch._TorchCompileInductorWrapper(mode, None, None).config)


def test_an_option_overrides_the_mode():
    assert parse({"max_autotune": False}, "max-autotune-no-cudagraphs")[1] == {
        "max_autotune": False,
        "coordinate_descent_tuning": True,
    }


@pytest.mark.parametrize("mode", ["fast", 3, ["default"]], ids=repr)
def test_an_unknown_mode_is_refused_with_the_known_ones(mode):
    with pytest.raises(OptionError) as refusal:
        parse(None, mode)
    for part in (repr(mode), "'default'", "'max-autotune'"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("error", [OptionError, ValueError, HighwayError, RuntimeError])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("bad", [{"options": {"iterations": True}}, {"mode": "fast"}], ids=repr)
def test_torch_compile_itself_raises_before_the_model_is_ever_called(error, fullgraph, bad):
    with pytest.raises(error):
        torch.compile(torch.nn.Linear(1, 1), backend="highway", fullgraph=fullgraph, **bad)


def test_options_that_turn_bad_later_raise_the_same_error_from_the_first_call():
    options = {"iterations": 2}
    model = torch.compile(torch.nn.Linear(1, 1), backend="highway", options=options)
    options["iterations"] = -1
    with pytest.raises(OptionError, match="'iterations' = -1"):
        model(torch.ones(1))


def test_options_of_other_backends_are_not_looked_at():
    import hwbp_compiler.backend  # noqa: F401

    def other(gm, inputs, *, options):
        return gm

    compiled = torch.compile(torch.nn.Linear(1, 1), backend=other, options={"iterations": -1})
    assert compiled(torch.ones(1)).shape == (1,)
