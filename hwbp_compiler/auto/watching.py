"""The part that the callbacks of all trainers share: find the compiled model, and measure its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .climb import Climb
from .control import Schedule, compiled_as
from .meter import GradientMeter


class Watching:
    """Args:
    every: steps from one reading of the gradient to the next.
    milestones: as for :class:`Schedule`; None: no schedule.
    rungs: as for :class:`Climb`; None: no climbing.
    below: as for :class:`Climb`. The meter also warns below this cosine.
    """

    def __init__(
        self,
        every: int = 200,
        milestones: Mapping[int, Mapping[str, Any]] | None = None,
        rungs: Sequence[Mapping[str, Any]] | None = None,
        below: float = 0.95,
    ) -> None:
        self.every, self.milestones, self.rungs, self.below = every, milestones, rungs, below
        self.meter: GradientMeter | None = None
        self.followers: dict[str, Schedule | Climb] = {}
        self._state: Mapping[str, Any] = {}
        self._read = 0

    def start(self, candidates: Iterable[Any], steps: int | None = None) -> None:
        """Attach to the first of ``candidates``, or of the modules in them, that is compiled with our backend. The
        schedule continues after ``steps`` steps; None: where its saved state stands.

        Raises:
            TypeError: no candidate is compiled with our backend.
        """
        if self.meter is not None:
            return
        compiled = first_compiled(candidates)
        self.meter = GradientMeter(compiled, every=self.every, warn_below=self.below)
        if self.milestones is not None:
            self.followers["schedule"] = Schedule(compiled, self.milestones)
            if steps is not None:
                self._state = {**self._state, "schedule": {"steps": steps}}
        if self.rungs is not None:
            self.followers["climb"] = Climb(compiled, self.rungs, self.meter, below=self.below)
        for name, follower in self.followers.items():
            if name in self._state:
                follower.load_state_dict(self._state[name])

    def step(self) -> dict[str, float]:
        """Call this before each training step. Returns the readings since the last call, as figures to log."""
        assert self.meter is not None
        for follower in self.followers.values():
            follower.step()
        new, self._read = self.meter.readings[self._read :], len(self.meter.readings)
        return {name: value for reading in new for name, value in reading.figures.items()}

    def stop(self) -> None:
        """The training is over. Its last state is kept."""
        if self.meter is not None:
            self.meter.close()
        self._state = self.state_dict()
        self.meter, self.followers, self._read = None, {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: follower.state_dict() for name, follower in self.followers.items()} or dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the options that held when :meth:`state_dict` was called: now, or when the training starts."""
        self._state = dict(state)
        for name, follower in self.followers.items():
            if name in state:
                follower.load_state_dict(state[name])


def first_compiled(candidates: Iterable[Any]) -> Any:
    seen: list[str] = []
    for candidate in candidates:
        seen.append(type(candidate).__name__)
        for module in candidate.modules() if isinstance(candidate, nn.Module) else [candidate]:
            try:
                compiled_as(module)
            except TypeError:
                continue
            return module
    raise TypeError(
        f'no model compiled with backend="highway" was found in {", ".join(seen) or "nothing"}; compile it first, '
        "or give the compiled model to the callback"
    )
