"""Assertions about ``torch.compile(model, backend="highway")`` for a user's own model.

Every assertion works on float64 copies of the model and its inputs. It compiles the copy with ``rewrite="always"`` and
compares it with eager mode or with the oracle, never with Inductor. Random numbers are drawn as in eager mode
(``fallback_random``), so dropout uses the same masks on both sides.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hwbp_compiler.counting import counters
from hwbp_compiler.options import Options, Truncation, made_by
from hwbp_compiler.rolled.function import exactly

from .compare import Gradients, assert_gradients_close, assert_outputs_close
from .losses import probe_loss
from .reference import Program, reference_gradients

Loss = Callable[[Any], Tensor]

# Longer chains stay exact if k reaches their length, whatever is requested, because every round adds nodes to the
# graph.
_MOST_ROUNDS = 32


class AtFullLength(Options):
    """Options that rewrite chains of up to 32 links even with as many iterations as they have links.

    The result is ordinary backprop, computed by the rewritten code. It is of no use in training, but it can be compared
    with eager mode.
    """

    def truncation(self, length: int) -> Truncation | None:
        found = super().truncation(length)
        if found is None and self.iterations != "exact" and not self.auto and length <= _MOST_ROUNDS:
            return replace(self.numbers, iterations=self.needed(length))
        return found


@contextlib.contextmanager
def rewriting_at_full_length() -> Iterator[None]:
    """A context in which ``torch.compile`` takes its options as :class:`AtFullLength`."""
    token = made_by.set(AtFullLength)
    try:
        yield
    finally:
        made_by.reset(token)


SEED = 1234


def assert_forward_unchanged(
    model: nn.Module,
    args: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    tolerance: float = 1e-12,
    seed: int = SEED,
) -> None:
    """Assert that the compiled model returns the same outputs as eager mode in training, and changes buffers alike.

    Args:
        model: the module to check, in any dtype. The check uses float64 copies; the module itself does not change.
        args: the model's positional arguments, as a tuple. Floating-point tensors are converted to float64.
        options: further options of ``torch.compile``. ``rewrite`` is always "always"; ``min_length`` is 2 unless
            given.
        tolerance: the largest allowed error of a tensor, relative to its largest entry, or to 1 if that is larger.
        seed: the seed of the random numbers that the model draws (dropout).

    Raises:
        AssertionError: an output or a buffer differs; the message names it.
        TypeError: ``args`` is not a tuple.
    """
    eager, compiled, inputs = _copies(model, args)
    torch.manual_seed(seed)
    expected = eager(*inputs)
    torch.manual_seed(seed)
    got = _compile(compiled, options)(*inputs)
    assert_outputs_close(got, expected, tolerance)
    assert_outputs_close(dict(compiled.named_buffers()), dict(eager.named_buffers()), tolerance, "buffers")


def assert_exact_at_full_length(
    model: nn.Module,
    args: Sequence[Any],
    loss: Loss = probe_loss,
    *,
    options: Mapping[str, Any] | None = None,
    tolerance: float = 1e-9,
    seed: int = SEED,
) -> None:
    """Assert that the gradients are those of backprop with "exact", and with as many iterations as a chain has links.

    That is w^L of Fagnou et al., ICLR 2025, Theorems 1 and 2: every gradient path crosses at most L blocks.

    With segments of S > 1 links, C - 1 iterations are enough for a chain of C segments. To check this, the assertion
    rewrites chains of up to 32 links with that many iterations. An ordinary compilation leaves such chains unchanged.
    The claim holds for every ``damping`` and ``segment``; the assertion uses those in ``options``.

    Args:
        model: the module to check, in any dtype. The check uses float64 copies; the module itself does not change.
        args: the model's positional arguments, as a tuple. Floating-point tensors are converted to float64.
        loss: ``loss(output) -> scalar``. The default, :func:`probe_loss`, depends on every output.
        options: further options of ``torch.compile``. ``rewrite`` is always "always"; ``min_length`` is 2 unless
            given.
        tolerance: the largest allowed error of a gradient, relative to its norm.
        seed: the seed of the random numbers that the model draws (dropout).

    Raises:
        AssertionError: the claim does not hold. The message names the gradient with the largest error.
        TypeError: ``args`` is not a tuple.
        ValueError: nothing requires a gradient, or the loss is not one number.
    """
    eager, compiled, inputs = _copies(model, args)
    before = {name: buffer.clone() for name, buffer in compiled.named_buffers()}
    with exactly():
        expected = _gradients(eager, eager, inputs, loss, seed)
    for iterations in (10**6, "exact"):
        _put_back(compiled, before)
        step = _compile(compiled, {**(options or {}), "iterations": iterations})
        with rewriting_at_full_length():
            got = _gradients(step, compiled, inputs, loss, seed)
        assert_gradients_close(got, expected, tolerance, what=f"iterations={iterations!r}")


def assert_linear(
    model: nn.Module,
    args: Sequence[Any],
    loss: Loss = probe_loss,
    *,
    options: Mapping[str, Any] | None = None,
    tolerance: float = 1e-9,
    seed: int = SEED,
) -> None:
    """Assert that the gradients are linear in the loss, truncated or not: twice the loss gives twice the gradients, and
    the negative loss the negative gradients. (These factors are exact in every dtype.)

    Without a k in ``options`` this is checked with k = 4, because "auto" may change k from one step to the next.

    Args:
        model: the module to check, in any dtype. The check uses float64 copies; the module itself does not change.
        args: the model's positional arguments, as a tuple. Floating-point tensors are converted to float64.
        loss: ``loss(output) -> scalar``. The default, :func:`probe_loss`, depends on every output.
        options: further options of ``torch.compile``. ``rewrite`` is always "always"; ``min_length`` is 2 unless
            given.
        tolerance: the largest allowed error of a gradient, relative to its norm.
        seed: the seed of the random numbers that the model draws (dropout).

    Raises:
        AssertionError: the claim does not hold. The message names the gradient with the largest error.
        TypeError: ``args`` is not a tuple.
        ValueError: nothing requires a gradient, or the loss is not one number.
    """
    _, compiled, inputs = _copies(model, args)
    before = {name: buffer.clone() for name, buffer in compiled.named_buffers()}
    step = _compile(compiled, {"iterations": 4, **(options or {})})
    once = _gradients(step, compiled, inputs, loss, seed)
    for factor in (2.0, -1.0):
        _put_back(compiled, before)
        scaled = _gradients(step, compiled, inputs, partial(_scaled, factor, loss), seed)
        wanted = {key: factor * gradient for key, gradient in once.items()}
        assert_gradients_close(scaled, wanted, tolerance, what=f"{factor} times the loss")


def assert_matches_truncation(
    model: nn.Module,
    args: Sequence[Any],
    loss: Loss,
    program: Callable[[nn.Module], Program],
    iterations: int | Literal["exact"],
    damping: float = 0.0,
    *,
    segment: int = 1,
    options: Mapping[str, Any] | None = None,
    tolerance: float = 1e-6,
    seed: int = SEED,
) -> None:
    """Assert that the compiled model has the gradients of w^k, which :func:`reference_gradients` computes.

    Args:
        model: the module to check, in any dtype. The check uses float64 copies; the module itself does not change.
        args: the model's positional arguments, as a tuple. Floating-point tensors are converted to float64.
        loss: ``loss(output) -> scalar``.
        program: ``program(model)`` describes the model and its chains for the oracle, as a :class:`Program`.
        iterations: k, an integer >= 0 or "exact".
        damping: gamma, a number in [0, 1].
        segment: S, links per segment.
        options: further options of ``torch.compile``. ``rewrite`` is always "always"; ``min_length`` is 2 unless
            given. If they contain ``iterations``, ``damping`` or ``segment``, these are ignored.
        tolerance: the largest allowed error of a gradient, relative to its norm.
        seed: the seed of the random numbers that the model draws (dropout).

    Raises:
        AssertionError: the claim does not hold. The message names the gradient with the largest error.
        TypeError: ``args`` is not a tuple.
        ValueError: nothing requires a gradient, or the loss is not one number.
    """
    _, compiled, inputs = _copies(model, args)
    before = {name: buffer.clone() for name, buffer in compiled.named_buffers()}
    torch.manual_seed(seed)
    _, expected = reference_gradients(program(compiled), inputs, loss, iterations, damping, segment=segment)
    _put_back(compiled, before)
    chosen = {"iterations": iterations, "damping": damping, "segment": segment}
    step = _compile(compiled, {**(options or {}), **chosen})
    got = _gradients(step, compiled, inputs, loss, seed)
    assert_gradients_close(got, expected, tolerance, what=_listed(chosen))


def assert_closer(
    reference: Tensor | Gradients,
    actual: Tensor | Gradients,
    competitor: Tensor | Gradients,
    *,
    slack: float = 1.5,
) -> None:
    """Assert that ``actual`` is about as near to ``reference`` as ``competitor`` is. For results in low precision.

    The distance of ``actual`` may be ``slack`` times that of ``competitor``. One unit in the last place of ``actual``'s
    dtype, relative to the reference's largest entry, is always allowed.

    Args:
        reference: a tensor or a mapping of tensors, computed in float64.
        actual: the same computation in low precision; tensors of the same shapes, under the same keys.
        competitor: the same computation in the precision of ``actual``, done in a trusted way.
        slack: the factor by which the distance of ``actual`` may exceed that of ``competitor``.

    Raises:
        AssertionError: ``actual`` is too far from the reference. The message gives both distances.
    """
    if isinstance(reference, Mapping):
        assert isinstance(actual, Mapping) and isinstance(competitor, Mapping)
        for key, exact in reference.items():
            _assert_closer(exact, actual[key], competitor[key], slack, f"{key}: ")
    else:
        assert isinstance(actual, Tensor) and isinstance(competitor, Tensor)
        _assert_closer(reference, actual, competitor, slack, "")


def _assert_closer(reference: Tensor, actual: Tensor, competitor: Tensor, slack: float, name: str) -> None:
    exact = reference.detach().double()
    distance, allowed = ((t.detach().double() - exact).norm().item() for t in (actual, competitor))
    largest = exact.abs().max().item() if exact.numel() else 0.0
    unit = torch.finfo(actual.dtype).eps * largest * max(1, exact.numel()) ** 0.5
    assert distance <= slack * allowed + unit, (
        f"{name}{distance:.3e} from the float64 reference, the competitor {allowed:.3e} "
        f"(slack {slack}, rounding {unit:.3e})"
    )


def check(
    model: nn.Module,
    args: Sequence[Any],
    loss: Loss = probe_loss,
    program: Callable[[nn.Module], Program] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    iterations: Sequence[int] = (0, 1, 2),
    damping: Sequence[float] = (0.0, 0.2),
    segment: Sequence[int] = (1, 2),
) -> bool:
    """Run every assertion on ``model``. Print one line for each, and a verdict.

    If no chain of the model was rewritten, it prints that too: the assertions then say nothing about Highway-BP.

    Args:
        model: the module to check, in any dtype. The check uses float64 copies; the module itself does not change.
        args: the model's positional arguments, as a tuple. Floating-point tensors are converted to float64.
        loss: ``loss(output) -> scalar``. The default, :func:`probe_loss`, depends on every output.
        program: ``program(model)`` describes the model and its chains for the oracle, as a :class:`Program`. Without
            it, truncated gradients are not checked.
        options: further options of ``torch.compile``. ``rewrite`` is always "always"; ``min_length`` is 2 unless
            given.
        iterations: values of k for the oracle.
        damping: values of gamma, for the oracle and for exactness at full length.
        segment: values of S for the oracle. S = 1 is checked with all pairs of ``iterations`` and ``damping``. Every
            other S is checked once, with one iteration and no damping.

    Returns:
        True if all assertions hold, False if any fails. It does not raise AssertionError.

    Raises:
        TypeError: ``args`` is not a tuple.
        ValueError: nothing requires a gradient, or the loss is not one number.
    """
    claims: list[tuple[str, Callable[[], None]]] = [
        ("forward unchanged", partial(assert_forward_unchanged, model, args, options=options))
    ]
    claims.append(("linear in the incoming gradient", partial(assert_linear, model, args, loss, options=options)))
    for gamma in damping:
        damped = {**(options or {}), "damping": gamma}
        exact = partial(assert_exact_at_full_length, model, args, loss, options=damped)
        claims.append((f"exact at full length, damping={gamma}", exact))
    if program is not None:
        for size in segment:
            for k, gamma in product(iterations, damping) if size == 1 else ((1, 0.0),):
                chosen: dict[str, Any] = {"iterations": k, "damping": gamma, "segment": size}
                matches = partial(assert_matches_truncation, model, args, loss, program, **chosen, options=options)
                claims.append((f"{_listed(chosen)} as the oracle", matches))
    failures, before = 0, counters()["chains_rewritten"]
    for name, claim in claims:
        try:
            claim()
        except AssertionError as error:
            failures += 1
            print(f"FAILS  {name}: {error}")
        else:
            print(f"holds  {name}")
    print(f"{len(claims) - failures} of {len(claims)} claims hold.")
    if counters()["chains_rewritten"] == before:
        print("No chain was rewritten in any of them: explain(model, *args) says why.")
    return failures == 0


# ---------------------------------------------------------------------------------------------------------


def _listed(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in chosen.items())


def _scaled(factor: float, loss: Loss, output: Any) -> Tensor:
    return factor * loss(output)


def _copies(model: nn.Module, args: Sequence[Any]) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """Two float64 copies of the model and one of its inputs."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args is {type(args).__name__}; it must be a tuple of what the model is called with: (x,)")
    first = copy.deepcopy(model).double()
    second = copy.deepcopy(first)

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return first, second, tuple(pytree.tree_map(widen, tuple(args)))


def _put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore the buffers, so that the next forward pass starts from the same values. A forward pass may count its
    calls, for example.
    """
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _compile(model: nn.Module, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    merged = {"min_length": 2, "fallback_random": True, **(options or {}), "rewrite": "always"}
    return torch.compile(model, backend="highway", options=merged)


def _gradients(
    step: Callable[..., Any], model: nn.Module, args: Sequence[Any], loss: Loss, seed: int
) -> dict[str | int, Tensor]:
    leaves: dict[str | int, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves.update((i, a) for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad)
    if not leaves:
        raise ValueError("no parameter of the model and none of args requires a gradient; there is nothing to compare")
    torch.manual_seed(seed)
    value = loss(step(*args))
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(output) gives {given}; it must be one number, as a tensor")
    if not value.requires_grad:
        raise ValueError("loss(output) depends on nothing that requires a gradient; there is nothing to compare")
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
    }
