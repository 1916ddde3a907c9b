"""Compare two sets of gradients: as one number, or with an assertion that names the worst gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Gradients = Mapping[str | int, Tensor]


def total_norm(gradients: Gradients) -> float:
    """The norm of all gradients taken as one vector."""
    return float(sum(float(g.detach().double().square().sum()) for g in gradients.values()) ** 0.5)


def relative_error(actual: Gradients, reference: Gradients) -> float:
    """``|actual - reference| / |reference|``, all gradients taken as one vector.

    Args:
        actual: gradients by name or position.
        reference: gradients of the same shapes, under the same keys.

    Returns:
        A number >= 0; 0 if both are zero.
    """
    difference = total_norm({k: actual[k].double() - g.double() for k, g in reference.items()})
    return difference / total_norm(reference) if difference else 0.0


def cosine(actual: Gradients, reference: Gradients) -> float:
    """The cosine of the angle between the two, each taken as one vector.

    Args:
        actual: gradients by name or position.
        reference: gradients of the same shapes, under the same keys.

    Returns:
        A number from -1 to 1; 1 if either is zero.
    """
    dot = sum(float((actual[k].double() * g.double()).sum()) for k, g in reference.items())
    norms = total_norm(actual) * total_norm(reference)
    cosine = float(dot / norms) if norms else 1.0
    return max(-1.0, min(1.0, cosine)) if cosine == cosine else cosine  # rounding may lead out of [-1, 1]


def assert_gradients_close(
    actual: Gradients,
    reference: Gradients,
    tolerance: float,
    noise: float = 1e-12,
    what: str = "gradients",
    least: float = 0.0,
) -> None:
    """Assert ``|actual - g| <= tolerance |g| + noise max(|reference|, least)`` for every gradient g of ``reference``.

    Here ``|reference|`` is the norm of all gradients together. Two nan values in the same place count as equal, and so
    do two equal infinities.

    Args:
        actual: gradients by name or position.
        reference: gradients of the same shapes, under the same keys.
        tolerance: the largest error allowed, relative to the norm of each gradient.
        noise: the largest error allowed, relative to the norm of all gradients together. It is for gradients that are
            zero in exact arithmetic (the key bias of an attention), so that both sides hold only rounding errors.
        least: if that norm is smaller than this, this is used instead. It is for models in which all gradients are
            zero as the sum of terms that are not.
        what: the first words of the message.

    Raises:
        AssertionError: a gradient is too far off (the message names the worst one), or the keys or shapes differ.
    """
    unmatched = sorted(map(str, set(actual) ^ set(reference)))
    assert not unmatched, f"{what}: only one side has {', '.join(unmatched)}"
    floor = noise * max(least, total_norm({k: g.nan_to_num(0.0, 0.0, 0.0) for k, g in reference.items()}))
    worst, message = 1.0, ""
    for key, expected in reference.items():
        got, expected = actual[key].detach().double(), expected.detach().double()
        assert got.shape == expected.shape, f"{what}: {key} has shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        same = (got == expected) | (got.isnan() & expected.isnan())
        error = float(torch.where(same, 0.0, got - expected).norm())
        allowed = tolerance * float(torch.where(expected.isfinite(), expected, 0.0).norm()) + floor
        excess = error / allowed if allowed else (0.0 if error == 0.0 else float("inf"))
        if not excess <= worst:  # also true if the error is nan
            norm = float(expected.norm())
            worst = excess
            message = f"{what}: {key} is off by {error:.3e}, its reference has norm {norm:.3e} (allowed: {allowed:.3e})"
    assert not message, message


def assert_outputs_close(actual: Any, reference: Any, tolerance: float, what: str = "outputs") -> None:
    """Check that the structures are equal and every tensor is within ``tolerance`` times its largest entry (or 1 if
    that is larger).
    """
    got, got_spec = pytree.tree_flatten(actual)
    expected, expected_spec = pytree.tree_flatten(reference)
    assert got_spec == expected_spec, f"{what}: structure {got_spec}, not {expected_spec}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if isinstance(b, Tensor):
            scale = max(1.0, float(b.detach().double().nan_to_num().abs().max()) if b.numel() else 0.0)
            torch.testing.assert_close(
                a.detach().double(), b.detach().double(), rtol=0.0, atol=tolerance * scale, equal_nan=True,
                msg=lambda m, n=number: f"{what}, tensor {n}: {m}",
            )  # fmt: skip
        else:
            assert a == b, f"{what}, value {number}: {a!r}, not {b!r}"
