"""Check that the gradients are those of w^k for the chains that were rewritten, and of backprop for all others.

The oracle's :class:`Program` knows the chains by construction. The compiler's records say which chains were rewritten,
by length. The gradients must match some choice of chains with these lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compare import Gradients, assert_gradients_close, assert_outputs_close, relative_error
from .reference import ChainRun, Hold, Link, Program, RunChain, Tensors, keep, reference_gradients


@dataclass(frozen=True)
class Verdict:
    """The program that matched. For each of its chains: the lengths it can have, and whether it was rewritten.

    ``missed`` is the number of chains of at least ``least`` links for which there is no record at all.
    """

    lengths: tuple[frozenset[int], ...]
    rewritten: tuple[bool, ...]
    missed: int


def chain_lengths(program: Program, args: Sequence[Any]) -> list[frozenset[int]]:
    """The lengths that each chain of ``program`` can have, in the order in which they run.

    Only the links after the first state that requires a gradient count. If the input and the parameters of the first
    links require none, these links take no part. The link that leads to the first such state may belong to the chain
    or be computed outside it: both are correct.
    """
    found: list[frozenset[int]] = []

    def run(links: Sequence[Link], state: Tensors) -> ChainRun:
        done = plainly(links, state)
        idle = sum(not any(t.requires_grad for t in state) for state in done.states)
        length = len(links) - idle
        found.append(frozenset({length, length + 1} if idle else {length}))
        return done

    program.forward(run, *args)
    return found


def plainly(links: Sequence[Link], state: Tensors) -> ChainRun:
    """Run a chain as eager mode does: a ``run_chain`` for :class:`Program` with which autograd is backprop."""
    states, outputs = [state], []
    for link in links:
        state, sideways = link.step(state, link.side, keep)
        states.append(state)
        outputs.append(sideways)
    return ChainRun(states, outputs)


def judge(
    programs: Iterable[Program],
    args: Sequence[Any],
    loss: Callable[[Any], Tensor],
    output: Any,
    gradients: Gradients,
    records: Collection[Any],
    *,
    iterations: int,
    damping: float,
    segment: int = 1,
    least: int = 2,
    tails: bool = False,
    tolerance: float = 1e-6,
    noise: float = 1e-12,
    forward_tolerance: float = 1e-11,
) -> Verdict:
    """Raise AssertionError unless one of ``programs`` explains ``gradients`` and ``records``.

    programs   the model as programs of the oracle; several if it is open which chains the model has
    tails      a chain may count the link in front of it, which is exact: its outputs are computed with the chain's
    least      the shortest chain that must be found (``min_length``, or longer)
    records    ``.length``, ``.decision``, ``.reason`` of every chain the compiler has found
    segment    S, links per segment. For S > 1 it matters where a chain begins: see :func:`_beginning`
    """
    rewritten = sorted(record.length for record in records if record.decision == "rewritten")
    closest: tuple[float, str] = (float("inf"), f"no choice of chains has the lengths {rewritten} that were rewritten")
    for program in programs:
        lengths = chain_lengths(program, args)
        if tails:
            lengths = [n | {max(n) + 1} for n in lengths]
        for chosen in _choices(lengths, rewritten, each_length=segment > 1):
            exact = [i for i in range(len(lengths)) if i not in chosen]
            begun = program if segment == 1 else _beginning(program, chosen)
            torch.manual_seed(0)
            expected_output, expected = reference_gradients(
                begun, args, loss, iterations, damping, segment=segment, exact=exact
            )
            assert_outputs_close(output, expected_output, forward_tolerance)
            try:
                what = f"k={iterations}, gamma={damping}, S={segment}"
                # The losses here give gradients of order one. If a normalisation cancels them, only rounding is left.
                assert_gradients_close(gradients, expected, tolerance, noise, what, least=0.01)
            except AssertionError as error:
                distance = relative_error(gradients, expected)
                if not distance >= closest[0]:  # also true if it is nan
                    closest = (distance, f"{error}; rewritten {rewritten}, chains {[sorted(n) for n in lengths]}")
                continue
            eligible = sum(min(n) >= least for i, n in enumerate(lengths) if i in exact)
            declined = sum(record.decision == "declined" for record in records)
            flags = tuple(i in chosen for i in range(len(lengths)))
            return Verdict(tuple(lengths), flags, max(0, eligible - declined))
    raise AssertionError(closest[1])


def _choices(
    lengths: Sequence[frozenset[int]], rewritten: list[int], each_length: bool = False
) -> Iterator[dict[int, int]]:
    """Sets of chains whose lengths are those of ``rewritten`` in some order. For each set one such order, or all of
    them.
    """
    for chosen in itertools.combinations(range(len(lengths)), len(rewritten)):
        options = itertools.product(*(sorted(lengths[i]) for i in chosen))
        orders = (dict(zip(chosen, option, strict=True)) for option in options if sorted(option) == rewritten)
        yield from orders if each_length else itertools.islice(orders, 1)


def _beginning(program: Program, lengths: Mapping[int, int]) -> Program:
    """``program`` with the chains numbered in ``lengths`` adjusted to these lengths, by links next to the input.

    A chain's first state lies inside a segment, but a state that a link leads to may be the last of its segment, and so
    be truncated. If there are too many links, the extra ones (whose states require no gradient) run outside the chain.
    If a link is missing, it is the one in front, which is exact: an identity replaces it.
    """

    def forward(run: RunChain, *args: Any) -> Any:
        numbers = itertools.count()

        def begun(links: Sequence[Link], state: Tensors) -> ChainRun:
            more = lengths.get(next(numbers), len(links)) - len(links)
            if more > 0:
                done = run([*[Link(_identity)] * more, *links], state)
                return ChainRun(done.states[more:], done.outputs[more:])
            first = plainly(links[:-more], state)  # empty if the number of links is right
            rest = run(links[-more:], first.states[-1])
            return ChainRun([*first.states[:-1], *rest.states], first.outputs + rest.outputs)

        return program.forward(begun, *args)

    return Program(program.parameters, forward)


def _identity(state: Tensors, side: Tensors, hold: Hold, /) -> tuple[Tensors, Tensors]:
    return state, ()
