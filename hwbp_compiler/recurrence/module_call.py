"""The arguments of ``torch.gru``, ``lstm``, ``rnn_tanh`` and ``rnn_relu`` in one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class ModuleCall:
    """One call; tensors may be graph nodes.

    input        [T, B, I], [B, T, I] if ``batch_first``, or [sum of batch_sizes, I]
    batch_sizes  of a packed sequence, else None
    state        (h_0,), for an LSTM (h_0, c_0); each [layers * directions, B, H]
    weights      per layer and direction w_ih, w_hh and, if present, b_ih, b_hh and the projection w_hr
    """

    kind: str
    input: Any
    batch_sizes: Any
    state: tuple[Any, ...]
    weights: tuple[Any, ...]
    has_biases: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @classmethod
    def of(cls, kind: str, args: Sequence[Any], kwargs: dict[str, Any]) -> ModuleCall:
        """From the arguments of either overload: ``(input, hx, params, has_biases, num_layers, dropout, train,
        bidirectional, batch_first)`` or ``(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train,
        bidirectional)``.
        """
        names = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
        given = dict(kwargs)
        packed = "data" in given or "batch_sizes" in given or (len(args) > 3 and isinstance(args[3], (list, tuple)))
        order = ("data", "batch_sizes", *names) if packed else ("input", *names, "batch_first")
        given.update(zip(order, args, strict=False))
        hx = given["hx"]
        return cls(
            kind,
            given["data" if packed else "input"],
            given.get("batch_sizes"),
            tuple(hx) if isinstance(hx, (list, tuple)) else (hx,),
            tuple(given["params"]),
            bool(given["has_biases"]),
            int(given["num_layers"]),
            given["dropout"],
            bool(given["train"]),
            bool(given["bidirectional"]),
            bool(given.get("batch_first", False)),
        )

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The tensors that can have a gradient."""
        return (self.input, *self.state, *self.weights)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def cells(self) -> list[tuple[Any, ...]]:
        """The weights of each layer and direction, in the order of the states' first dimension."""
        count = len(self.weights) // (self.layers * self.directions)
        return [self.weights[i : i + count] for i in range(0, len(self.weights), count)]
