"""``nn.GRU`` written for JAX: ``jax.lax.scan`` under ``jit``, the exact counterpart on a CPU.

As in PyTorch's kernels, the products with the inputs are computed outside the loop. JAX gives the output and all
gradients in one compiled call, so there is no separate forward to time.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


def available() -> bool:
    try:
        import jax  # noqa: F401
    except ImportError:
        return False
    return True


class JaxGRU:
    """A contender like :class:`~benchmarks.recurrent.Contender`. ``unroll``: steps per turn of the loop."""

    k, gamma = None, 0.0

    def __init__(self, name: str, layer: nn.GRU, x: torch.Tensor, target: torch.Tensor, unroll: int = 1) -> None:
        import jax
        import jax.numpy as jnp

        hidden = layer.hidden_size

        def forward(weights: list[Any], x: Any) -> Any:
            w_ih, w_hh, b_ih, b_hh = weights
            of_x = x @ w_ih.T + b_ih

            def cell(h: Any, of_x: Any) -> tuple[Any, Any]:
                of_h = h @ w_hh.T + b_hh
                r = jax.nn.sigmoid(of_x[:, :hidden] + of_h[:, :hidden])
                z = jax.nn.sigmoid(of_x[:, hidden : 2 * hidden] + of_h[:, hidden : 2 * hidden])
                n = jnp.tanh(of_x[:, 2 * hidden :] + r * of_h[:, 2 * hidden :])
                h = n + z * (h - n)
                return h, h

            return jax.lax.scan(cell, jnp.zeros((x.shape[1], hidden), x.dtype), of_x, unroll=unroll)[1]

        def step(weights: list[Any], x: Any, target: Any) -> Any:
            output, back = jax.vjp(forward, weights, x)
            return output, back(target)

        self.name = name
        self.given = [jnp.asarray(p.detach().numpy()) for p in layer.parameters()], *map(_array, (x, target))
        self.function, self.ready = jax.jit(step), jax.block_until_ready
        start = time.perf_counter()
        _, (gradients, _) = self.ready(self.function(*self.given))
        self.compile_s = time.perf_counter() - start
        self.gradient = torch.cat([torch.from_numpy(_copy(g)).flatten() for g in gradients]).double()

    def compile_again(self) -> None:
        """By default, JAX keeps no compiled code between processes."""

    def step(self) -> dict[str, float]:
        start = time.perf_counter()
        self.ready(self.function(*self.given))
        return {"step": time.perf_counter() - start}

    def memory(self) -> None:
        """PyTorch's profiler does not see JAX's memory."""


def _array(tensor: torch.Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(tensor.detach().numpy())


def _copy(array: Any) -> Any:
    import numpy

    return numpy.array(array)
