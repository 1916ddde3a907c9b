"""The oracle itself, compared with plain autograd, path enumeration, and fixed points."""

from __future__ import annotations

import pytest
import torch
from zoo import CASES, EVERYDAY

from hwbp_compiler.testing.compare import (
    assert_gradients_close,
    assert_outputs_close,
    relative_error,
)
from hwbp_compiler.testing.judge import plainly
from hwbp_compiler.testing.reference import (
    Link,
    Program,
    _matrix,
    fixed_point,
    highway_bp,
    reference_gradients,
    sum_over_paths,
)

SEED = 7
WITH_PROGRAM = [case for case in CASES if case.program is not None]
WITH_CHAINS = [case for case in WITH_PROGRAM if case.chains]
TRUNCATING = [case for case in WITH_CHAINS if not case.elementwise]


def cases(which):
    return pytest.mark.parametrize("case", which, ids=str)


def autograd(model, args, loss):
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves.update((i, a) for i, a in enumerate(args) if a.requires_grad)
    torch.manual_seed(SEED)
    output = model(*args)
    found = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return output, {k: z if g is None else g for k, g, z in zip(leaves, found, zeros, strict=True)}


def oracle(case, iterations, damping=0.0, **kwargs):
    model, args, loss = case.build()
    torch.manual_seed(SEED)
    return reference_gradients(case.program(model), args, loss, iterations, damping, **kwargs)


def tolerances(case, relative):
    """A model that computes in float32 inside is compared in float32; any other is compared to ``relative``."""
    return {"tolerance": max(relative, case.tolerance if case.noise > 1e-9 else 0.0), "noise": case.noise}


@cases(WITH_PROGRAM)
def test_program_computes_what_the_model_computes(case):
    model, args, _ = case.build()
    torch.manual_seed(SEED)
    expected = model(*args)
    output, _ = oracle(case, 0)
    assert_outputs_close(output, expected, case.forward_tolerance)


@cases(WITH_PROGRAM)
def test_iterations_equal_to_length_is_autograd_at_every_damping(case):
    _, exact = autograd(*case.build())
    for damping, segment in ((0.0, 1), (0.3, 1), (1.0, 1), (0.3, 3)):
        _, found = oracle(case, "exact", damping, segment=segment)
        assert_gradients_close(found, exact, **tolerances(case, 1e-10), what=f"gamma={damping}, S={segment}")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in EVERYDAY else [pytest.mark.slow])
        for case in WITH_CHAINS
    ],
)
def test_w_sums_the_paths_that_cross_at_most_k_blocks(case):
    for iterations, damping, segment in ((0, 0.3, 1), (1, 0.0, 1), (2, 0.2, 1), (1, 0.2, 2)):
        _, found = oracle(case, iterations, damping, segment=segment, solver=highway_bp)
        _, paths = oracle(case, iterations, damping, segment=segment, solver=sum_over_paths)
        what = f"k={iterations}, gamma={damping}, S={segment}"
        assert_gradients_close(found, paths, **tolerances(case, 1e-9), what=what)


@cases(WITH_CHAINS)
def test_damping_one_is_fixed_point_iteration(case):
    for iterations in (0, 1, 3):
        _, found = oracle(case, iterations, 1.0)
        _, expected = oracle(case, iterations, 1.0, solver=fixed_point)
        assert_gradients_close(found, expected, **tolerances(case, 1e-9), what=f"k={iterations}")


@cases([case for case in WITH_CHAINS if case.elementwise])
def test_a_diagonal_recurrence_needs_no_iteration(case):
    _, exact = autograd(*case.build())
    _, found = oracle(case, 0)
    assert_gradients_close(found, exact, 1e-10)


@cases(TRUNCATING)
def test_few_iterations_are_not_backprop(case):
    """Otherwise agreement with the oracle would prove nothing."""
    _, exact = oracle(case, "exact")
    for iterations in (0, 1):
        _, found = oracle(case, iterations)
        assert relative_error(found, exact) > 1e-3, f"k={iterations}"


@cases(WITH_CHAINS)
def test_damping_matters_before_full_length(case):
    _, plain = oracle(case, 1)
    _, damped = oracle(case, 1, 0.5)
    assert relative_error(damped, plain) > 1e-3


@cases([case for case in WITH_PROGRAM if case.chains == ()])
def test_without_a_chain_every_iteration_count_is_backprop(case):
    _, exact = autograd(*case.build())
    _, found = oracle(case, 0)
    assert_gradients_close(found, exact, 1e-12)


def is_kind(kind, diagonal):
    """Whether the highways of a chain are of the kind that the case expects."""
    if kind == "1":
        return bool((diagonal == 1).all())
    if kind == "mask":
        return set(diagonal.tolist()) == {0.0, 1.0}
    return bool((diagonal != 1).any())


@cases(WITH_CHAINS)
def test_highways_are_elementwise_and_of_the_stated_kind(case):
    seen = []

    def record(links, contributions, *settings):
        seen.append((links, contributions))
        return highway_bp(links, contributions, *settings)

    oracle(case, 0, solver=record)
    # Autograd runs the chain nearest the loss first; the cases list theirs in any order.
    assert sorted(len(links) for links, _ in seen) == sorted(chain.length for chain in case.chains)
    kinds = {chain.multiplier for chain in case.chains}
    assert len(kinds) == 1
    for links, contributions in seen:
        width, size = len(contributions[0]), contributions[0][0].numel()
        diagonals = []
        for link in links:
            parts = _matrix(link.highway, contributions[0]).reshape(width, size, width, size).transpose(1, 2)
            for part in parts.reshape(-1, size, size):
                assert torch.equal(part, torch.diag(part.diagonal())), "K mixes elements"
            diagonals.append(parts[-1, -1].diagonal())  # for a tuple state, the cell
        assert is_kind(next(iter(kinds)), torch.cat(diagonals))


def test_the_loss_of_a_side_output_is_felt_before_its_block():
    """One link h1 = h0 + W h0 with a side output s = V h0: at k = 0 the first state gets g + s' V, not g W."""
    torch.manual_seed(0)
    w, v = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    g, s = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def step(state, side, hold):
        (h,) = state
        return (h + hold(h @ w.T),), (h @ v.T,)

    def forward(run, x):
        chain = run([Link(step)], (x,))
        return chain.states[1][0], chain.outputs[0][0]

    program = Program({"w": w, "v": v}, forward)
    _, found = reference_gradients(program, (x,), lambda out: (g * out[0]).sum() + (s * out[1]).sum(), 0)
    torch.testing.assert_close(found[0], g + s @ v)
    torch.testing.assert_close(found["w"], g.T @ x)
    torch.testing.assert_close(found["v"], s.T @ x)


def test_two_links_by_hand():
    """h1 = a h0 + W h0, h2 = a h1 + W h1: w_0 at k = 0, 1, 2 written out."""
    torch.manual_seed(0)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    a, damping = 0.7, 0.25
    g = torch.randn(1, 3, dtype=torch.float64)
    program = Program(
        {"w": w},
        lambda run, x: run(
            [Link(lambda state, side, hold: ((a * state[0] + hold(state[0] @ w.T),), ()))] * 2, (x,)
        ).states[-1][0],
    )
    k = (1 - damping) * a * torch.eye(3, dtype=torch.float64)
    j = w.detach() + damping * a * torch.eye(3, dtype=torch.float64)
    expected = [g @ k @ k, g @ (k @ k + j @ k + k @ j), g @ (k + j) @ (k + j)]
    for iterations, by_hand in enumerate(expected):
        _, found = reference_gradients(program, (x,), lambda out: (g * out).sum(), iterations, damping)
        torch.testing.assert_close(found[0], by_hand)


# ------------------------------------------------------------------------------------------------ segments


def random_chain(length, components):
    """A chain of ``length`` links between states of ``components`` vectors, where each component is on the highway of
    every other. It is a program that returns all states except the first.
    """
    torch.manual_seed(length)
    size = 2 * components
    weights = [torch.randn(size, size, dtype=torch.float64, requires_grad=True) for _ in range(length)]
    gates = [torch.rand(components, components, 2, dtype=torch.float64) for _ in range(length)]

    def link(weight, gate):
        def step(state, side, hold):
            mixed = hold(torch.tanh(torch.cat(state) @ weight)).chunk(components)
            along = [sum(k * torch.sin(h) for k, h in zip(row, state, strict=True)) for row in gate]
            return tuple(a + m for a, m in zip(along, mixed, strict=True)), ()

        return Link(step)

    def forward(run, *state):
        return run([link(w, g) for w, g in zip(weights, gates, strict=True)], state).states[1:]

    start = tuple(torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(components))
    return Program({f"w{i}": w for i, w in enumerate(weights)}, forward), start


def links_of(program, start):
    """The links that the oracle sees, each at its state."""
    found = []

    def record(links, contributions, *settings):
        found.extend(links)
        return contributions

    reference_gradients(program, start, lambda states: sum(t.sum() for t in states[-1]), 0, solver=record)
    return found


def distance(found, expected):
    """The distance between two lists of states, relative to the largest entry of all."""
    pairs = [(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True)]
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


LENGTHS = (1, 5, 6)


def sizes(length):
    return sorted({1, 2, 3, 5, length, length + 3})


@pytest.mark.parametrize("every", [True, False], ids=["losses at every state", "loss at the last"])
@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_w_sums_the_paths_that_leave_the_highway_in_at_most_k_segments(length, components, every):
    links = links_of(*random_chain(length, components))
    contributions = [
        tuple((every or i == length) * torch.randn(2, dtype=torch.float64) for _ in range(components))
        for i in range(length + 1)
    ]
    for segment in sizes(length):
        for k in sorted({0, 1, 2, -(-length // segment) - 1}):
            for damping in (0.0, 0.3):
                w = highway_bp(links, contributions, k, damping, segment)
                paths = sum_over_paths(links, contributions, k, damping, segment)
                assert distance(w, paths) < 1e-12, f"S={segment}, k={k}, gamma={damping}"


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_iterations_one_fewer_than_segments_are_backprop_and_fewer_are_not(length, components, damping):
    program, start = random_chain(length, components)

    def loss(states):
        return sum((i + 1) * torch.cos(t).sum() for i, state in enumerate(states) for t in state)

    leaves = {**program.parameters, **dict(enumerate(start))}
    exact = dict(zip(leaves, torch.autograd.grad(loss(program.forward(plainly, *start)), leaves.values()), strict=True))
    for segment in sizes(length):
        if segment == 1:
            continue
        enough = -(-length // segment) - 1  # 0 if one segment holds the chain
        for k in (enough, enough + 3, "exact"):
            _, found = reference_gradients(program, start, loss, k, damping, segment=segment)
            assert_gradients_close(found, exact, 1e-12, what=f"S={segment}, k={k}")
        if enough:
            _, found = reference_gradients(program, start, loss, enough - 1, damping, segment=segment)
            assert relative_error(found, exact) > 1e-3, f"S={segment}"


def test_three_links_in_segments_of_two_by_hand():
    """Segments {1} and {2, 3}, loss at h_3: exact down to h_1, the highway to it, exact from it to h_0."""
    program, start = random_chain(3, 1)
    links = links_of(program, start)
    m1, m2, m3 = (_matrix(link.whole, start) for link in links)
    _, k2, k3 = (0.75 * _matrix(link.highway, start) for link in links)
    g = torch.randn(2, dtype=torch.float64)
    nothing = torch.zeros_like(g)
    expected = [
        [g @ k3 @ k2 @ m1, g @ k3 @ k2, g @ m3, g],
        [g @ m3 @ m2 @ m1, g @ m3 @ m2, g @ m3, g],
    ]
    for iterations, by_hand in enumerate(expected):
        w = highway_bp(links, [(nothing,)] * 3 + [(g,)], iterations, 0.25, 2)
        for (found,), wanted in zip(w, by_hand, strict=True):
            torch.testing.assert_close(found, wanted)


def test_what_has_no_segments_says_so():
    program, start = random_chain(3, 1)
    with pytest.raises(ValueError, match="segment is 2, it must be 1"):
        reference_gradients(program, start, lambda states: states[-1][0].sum(), 1, segment=2, solver=fixed_point)
    with pytest.raises(ValueError, match="segment is 0; it must be at least 1"):
        reference_gradients(program, start, lambda states: states[-1][0].sum(), 1, segment=0)
