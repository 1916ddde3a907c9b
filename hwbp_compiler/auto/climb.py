"""``Climb``: switch to the next options in a user's list when the measured cosine is too low."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwbp_compiler.options import parse

from .control import only_changeable, set_options
from .meter import GradientMeter


class Climb:
    """Switches to the next of several options whenever the gradient is too far from the exact one.

    ``iterations="auto"`` makes its own choice among the forms that it expects to be faster than exact backprop. Use
    ``Climb`` to decide yourself which options are tried, and in which order. It never goes back to an earlier rung.

    Args:
        compiled: a model compiled with ``backend="highway"``.
        rungs: options for :func:`set_options`, the cheapest first. The last may be ``{"iterations": "exact"}``.
        meter: a :class:`GradientMeter` of the same model. Its readings decide when to switch.
        below: switch when the cosine with the exact gradient is below this number, in (0, 1).

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
        """Call this before each training step. It sees each reading one step after the measurement."""
        new, self._read = self.meter.readings[self._read :], len(self.meter.readings)
        # A gradient that is zero or not finite has no cosine (nan), and says nothing about the rung.
        poor = any(reading.trains and reading.cosine < self.below for reading in new)
        if poor and self.position + 1 < len(self.rungs):
            self.position += 1
            set_options(self.compiled, **self.rungs[self.position])

    def state_dict(self) -> dict[str, Any]:
        """The current rung, to save in a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to the rung that :meth:`state_dict` saved.

        Raises:
            ValueError: there is no such rung.
        """
        position = int(state["position"])
        if not 0 <= position < len(self.rungs):
            raise ValueError(f"Climb: position = {position} is not allowed; there are {len(self.rungs)} rungs")
        self.position = position
        set_options(self.compiled, **self.rungs[position])
