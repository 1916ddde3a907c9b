"""A run over the segments of a recurrent layer gives the same as its links one by one, however it is computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hwbp_compiler.recurrence import cpu_runs, runs
from hwbp_compiler.recurrence.runs import Links

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def link_by_link(links: Links, ends: list[Tensor], segment: int, whole: bool) -> list[Tensor]:
    """The module's formulas, one sequence and one step at a time."""
    steps, batch, hidden = links.values.shape
    lasts = list(range(steps - 1, -1, -segment))[::-1]
    if not whole:
        lasts = lasts[1:]
    kept = [torch.full_like(links.values, torch.nan) for _ in ends]
    out = [torch.full((len(lasts), batch, hidden), torch.nan, dtype=torch.float64) for _ in ends]
    for lane, last in enumerate(lasts):
        state = [end[lane] for end in ends]
        for t in range(last, max(last - segment, -1), -1):
            for rows, s in zip(kept, state, strict=True):
                rows[t] = s
            of_gates = [state[-1] if len(state) == 2 and gate < 3 else state[0] for gate in range(links.into.shape[2])]
            moved = torch.cat([links.into[t, :, g] * w for g, w in enumerate(of_gates)], dim=1) @ links.weight
            h = moved + (links.values[t - 1] if t else 0)
            m = torch.zeros(()) if links.multipliers is None else links.multipliers[t]
            if links.through is None:
                state = [h + m * state[0]]
            else:
                state = [h, m * state[1] + (links.through[t - 1] * h if t else 0)]
        for result, s in zip(out, state, strict=True):
            result[lane] = s
    return [*kept, *(o[0] for o in out)] if whole else out


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(sorted(GATES)))
    # Sizes around those of a tile: rows of 4, 6 and 12, vectors of 4 to 16 numbers, blocks of 72 rows.
    steps = draw(st.one_of(st.integers(1, 12), st.sampled_from([40, 150])))
    batch, hidden = draw(st.sampled_from([1, 2, 3, 7, 13])), draw(st.sampled_from([1, 3, 4, 8, 15, 16, 17, 33, 70]))
    segment = draw(st.one_of(st.integers(1, steps + 1), st.just(steps)))
    whole = draw(st.booleans()) or steps <= segment
    threads = draw(st.sampled_from([1, 2, 3]))
    torch.manual_seed(draw(st.integers(0, 1000)))

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    through = values(steps, batch, hidden) if kind == "lstm" else None
    multipliers = None if kind == "rnn" else torch.rand(steps, batch, hidden, dtype=torch.float64)
    into = values(steps, batch, GATES[kind] + 1, hidden)[:, :, 1:]  # a view, as for a GRU
    weight = values(GATES[kind] * hidden, hidden) / (GATES[kind] * hidden) ** 0.5 / 2
    lanes = -(-steps // segment) - (not whole)
    ends = [values(lanes, batch, hidden) for _ in range(2 if kind == "lstm" else 1)]
    return Links(values(steps, batch, hidden), multipliers, through, into, weight), ends, segment, whole, threads


def arguments(links: Links) -> tuple[Tensor | None, ...]:
    return links.values, links.multipliers, links.through, links.into, links.weight


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_run_is_its_links_one_after_the_other(case):
    links, ends, segment, whole, threads = case
    expected = link_by_link(links, ends, segment, whole)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {
            "one call on a CPU": cpu_runs.run(*arguments(links), ends, segment, whole),
            "written out": runs.written_out(links, ends, segment, whole),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_runs, "run", lambda *_: None)
            found["without a compiler"] = runs.operator(*arguments(links), ends, segment, whole)
    finally:
        torch.set_num_threads(before)
    for how, results in found.items():
        assert results is not None and len(results) == len(expected), how
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda text, how=how: f"{how}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_few_bits_are_rounded_once(dtype):
    """Not after every step. Rounding a result once costs half an eps of it. The bound is 4 eps of the largest result;
    the rest is for the float32 sums over 200 steps.
    """
    torch.manual_seed(0)
    steps, batch, hidden = 200, 3, 20
    wide = Links(
        torch.randn(steps, batch, hidden), torch.rand(steps, batch, hidden), None,
        torch.randn(steps, batch, 3, hidden), torch.randn(3 * hidden, hidden) / 20,
    )  # fmt: skip
    narrow = [None if t is None else t.to(dtype) for t in arguments(wide)]
    end = torch.randn(1, batch, hidden).to(dtype)
    expected = link_by_link(Links(*[None if t is None else t.double() for t in narrow]), [end.double()], steps, True)
    for ours, theirs in zip(runs.operator(*narrow, [end], steps, True), expected, strict=True):
        assert ours.dtype is dtype
        scale = theirs.abs().max()
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_an_empty_batch_and_a_lone_segment_are_no_special_case():
    empty = Links(torch.empty(5, 0, 3), torch.empty(5, 0, 3), None, torch.empty(5, 0, 3, 3), torch.randn(9, 3))
    assert [r.shape for r in runs.operator(*arguments(empty), [torch.empty(3, 0, 3)], 2, True)] == [(5, 0, 3), (0, 3)]
    one = Links(torch.randn(2, 1, 3), torch.rand(2, 1, 3), None, torch.randn(2, 1, 3, 3), torch.randn(9, 3))
    assert runs.operator(*arguments(one), [torch.empty(0, 1, 3)], 4, False)[0].shape == (0, 1, 3)
