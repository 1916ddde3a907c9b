"""Change options between training steps: ``set_options``, ``set_iterations`` and ``Schedule``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwbp_compiler.errors import OptionError
from hwbp_compiler.options import parse
from hwbp_compiler.skipped import Compiled
from hwbp_compiler.torch_private import context_of

_CHANGEABLE = ("iterations", "segment", "damping", "target_cosine", "check_every")


def set_options(compiled: Any, **options: Any) -> None:
    """Change options of a compiled model or function. They hold from its next call on.

    Call this between steps. If a forward pass has already run, its backward pass still uses the old options. New
    options are compiled when they are first used, and the code is kept. Dynamo does not trace the model again.

    Args:
        compiled: what ``torch.compile(model, backend="highway")`` returned, or a model on which
            ``model.compile(backend="highway")`` was called.
        **options: any of ``iterations``, ``segment``, ``damping``, ``target_cosine``, ``check_every``, with the values
            and the meaning they have in ``torch.compile``. Options that are not given stay as they are.

    Raises:
        OptionError: a value is not allowed, or an option cannot be changed. Then no option is changed.
        TypeError: ``compiled`` is not compiled with ``backend="highway"``.

    >>> set_options(compiled, iterations=1, segment=16)
    """
    mine = compiled_as(compiled)
    only_changeable(options)
    given, mode = mine.given
    changed = {**(given or {}), **options}
    mine.options = parse(changed, mode)[0]
    mine.given = changed, mode


def only_changeable(options: Mapping[str, Any]) -> None:
    for key in options:
        if key not in _CHANGEABLE:
            raise OptionError(
                f"set_options: option {key!r} (given as {options[key]!r}) cannot be changed after torch.compile; "
                f"{', '.join(map(repr, _CHANGEABLE))} can. Compile the model again with it."
            )


def set_iterations(compiled: Any, iterations: Any) -> None:
    """Change ``iterations`` alone. See :func:`set_options`.

    Args:
        compiled: a model or function compiled with ``backend="highway"``.
        iterations: k, an integer >= 0, "exact" or "auto".

    Raises:
        OptionError: the value is not allowed.
        TypeError: ``compiled`` is not compiled with ``backend="highway"``.
    """
    set_options(compiled, iterations=iterations)


class Schedule:
    """Options that change at given steps.

    Args:
        compiled: a model or function compiled with ``backend="highway"``.
        milestones: maps a step, counted from 0, to the options that hold from that step on. The options are those of
            :func:`set_options`.

    Raises:
        OptionError: a value is not allowed, or an option cannot be changed.
        ValueError: a step is not an integer >= 0.
        TypeError: ``compiled`` is not compiled with ``backend="highway"``.

    >>> schedule = Schedule(compiled, {0: {"iterations": 1, "segment": 16}, 9000: {"iterations": "exact"}})
    >>> for batch in batches:
    ...     schedule.step()
    ...     train(batch)
    """

    def __init__(self, compiled: Any, milestones: Mapping[int, Mapping[str, Any]]) -> None:
        for step, options in milestones.items():
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError(f"Schedule: milestone {step!r} is not allowed; it takes the number of a step, >= 0")
            only_changeable(options)
            parse(options)
        self.given = compiled_as(compiled).given
        self.compiled, self.milestones, self.steps = compiled, dict(milestones), 0

    def step(self) -> None:
        """Call this before each training step."""
        if self.steps in self.milestones:
            set_options(self.compiled, **self.milestones[self.steps])
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, to save in a checkpoint.

        Returns:
            ``{"steps": n}``, where n is the number of calls to :meth:`step` so far.
        """
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, with the options that held at that step.

        Args:
            state: what :meth:`state_dict` returned.
        """
        self.steps = int(state["steps"])
        mine = compiled_as(self.compiled)
        mine.given, mine.options = self.given, parse(*self.given)[0]
        for step in sorted(step for step in self.milestones if step < self.steps):
            set_options(self.compiled, **self.milestones[step])


def compiled_as(compiled: Any) -> Compiled:
    """The record kept for ``compiled``. Raises TypeError if it was not compiled with our backend."""
    context = context_of(compiled)
    found = next((a for a in getattr(context, "args", ()) if isinstance(a, Compiled)), None)
    if found is None:
        raise TypeError(
            f'{type(compiled).__name__} is not compiled with backend="highway"; pass the result of '
            'torch.compile(model, backend="highway"), or a model on which model.compile(backend="highway") was called'
        )
    return found
