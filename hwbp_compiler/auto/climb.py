"""Options that follow the measured cosine up a ladder of the user's own: ``Climb``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwbp_compiler.options import parse

from .control import only_changeable, set_options
from .meter import GradientMeter


class Climb:
    """Takes the next of several options whenever the gradient is worse than it should be.

    ``iterations="auto"`` chooses by itself among what it expects to be faster than exact backprop. ``Climb`` is for
    those who want to say which options are tried, and in which order. It never goes down again.

    Args:
        compiled: a model compiled with ``backend="highway"``.
        rungs: options for :func:`set_options`, the cheapest first. The last may be ``{"iterations": "exact"}``.
        meter: a :class:`GradientMeter` of the same model. Its readings decide.
        below: the cosine with the exact gradient below which the next rung is taken, in (0, 1).

    Raises:
        OptionError: a rung names an option that cannot be changed, or a value that is not allowed.
        ValueError: there is no rung, ``below`` is not in (0, 1), or ``meter`` reads another model.

    >>> meter = GradientMeter(compiled, every=100)
    >>> climb = Climb(compiled, [{"iterations": 1, "segment": s} for s in (8, 32)] + [{"iterations": "exact"}], meter)
    >>> for batch in batches:
    ...     climb.step()
    ...     train(batch)
    """

    def __init__(
        self, compiled: Any, rungs: Sequence[Mapping[str, Any]], meter: GradientMeter, *, below: float = 0.95
    ) -> None:
        if not rungs:
            raise ValueError("Climb: rungs is empty; it takes at least one dict of options for set_options")
        if isinstance(below, bool) or not isinstance(below, (int, float)) or not 0 < below < 1:
            raise ValueError(f"Climb: below = {below!r} is not allowed; it takes a cosine between 0 and 1")
        if not meter.reads(compiled):
            raise ValueError("Climb: the meter does not read this model; give GradientMeter(compiled)")
        for options in rungs:
            only_changeable(options)
            parse(options)
        self.compiled, self.rungs, self.meter, self.below = compiled, [dict(options) for options in rungs], meter, below
        self.position = 0
        self._read = len(meter.readings)
        set_options(compiled, **self.rungs[0])

    def step(self) -> None:
        """Call this before each training step. A reading is there one step after it was measured."""
        new, self._read = self.meter.readings[self._read :], len(self.meter.readings)
        poor = any(reading.trains and not reading.cosine >= self.below for reading in new)
        if poor and self.position + 1 < len(self.rungs):
            self.position += 1
            set_options(self.compiled, **self.rungs[self.position])

    def state_dict(self) -> dict[str, Any]:
        """The rung it is on, for a checkpoint of the training."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue on the rung that :meth:`state_dict` gave.

        Raises:
            ValueError: there is no such rung.
        """
        position = int(state["position"])
        if not 0 <= position < len(self.rungs):
            raise ValueError(f"Climb: position = {position} is not allowed; there are {len(self.rungs)} rungs")
        self.position = position
        set_options(self.compiled, **self.rungs[position])
