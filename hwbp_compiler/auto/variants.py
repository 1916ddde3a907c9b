"""The callable that Dynamo gets for a graph. Before each forward pass it picks the form that is in force.

Only then are the options known: ``set_options`` changes them from one step to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from hwbp_compiler.counting import count
from hwbp_compiler.errors import first_line
from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.skipped import running
from hwbp_compiler.torch_private import saves_through_hooks

from .forms import Checks, Compile, Forms
from .measured import Check, least
from .policy import Policy
from .source import Guards, Source

log = logging.getLogger(__name__)


class Steps(Protocol):
    """How a graph's steps run while the same options are in force."""

    def run(self, values: Sequence[Any]) -> Any: ...


class Variants:
    """One graph from Dynamo; ``options`` are those it was compiled with."""

    def __init__(
        self, source: Source, module: GraphModule, inputs: list[Any], options: Options, compile: Compile
    ) -> None:
        """``module`` and ``inputs`` are compiled here, while Dynamo waits."""
        self.options = options
        self.forms = Forms(source, compile)
        self.steps: dict[tuple[Options, int | None], Steps] = {}
        self._compile(module, inputs, options, compile)
        source.handed_over()

    def _compile(self, module: GraphModule, inputs: list[Any], options: Options, compile: Compile) -> None:
        if options.auto:
            checks = Checks(self.forms, lambda found: None)
            compiled = compile(module, inputs, options, looking=checks.of)
            if checks.rungs:
                self.steps[options, None] = Automatic(self.forms, options, checks, compiled)
                return
            options = options.exactly()
        else:
            compiled = compile(module, inputs, options)
        self.forms.keep(options, compiled)
        self.steps[self.options, None] = Fixed(self.forms, options)

    def __call__(self, *values: Any) -> Any:
        by = running()
        options, meter = self.options, None
        if by is not None:
            options, meter = by.options or options, by.meter
        # A meter needs its own checks if the form is fixed. With "auto" it uses the policy's checks.
        metered = None if meter is None or options.auto else meter.every
        steps = self.steps.get((options, metered))
        if steps is None:
            steps = self.steps[options, metered] = self._started(options, metered)
        return steps.run(values)

    def _started(self, options: Options, every: int | None) -> Steps:
        """The first step with these options."""
        if every is not None and options.iterations != "exact":
            return Metered(self.forms, options, every)
        if not options.auto:
            return Fixed(self.forms, options)
        checks = Checks(self.forms, lambda found: None)
        compiled, guards = self.forms.late(options, checks)
        if checks.rungs:
            return Automatic(self.forms, options, checks, compiled, guards)
        self.forms.made[options.exactly()] = compiled, guards
        return Fixed(self.forms, options.exactly())


class Fixed:
    """The same form at every step."""

    def __init__(self, forms: Forms, options: Options) -> None:
        self.forms, self.options = forms, options

    def run(self, values: Sequence[Any]) -> Any:
        return self.forms.run(self.options, values)


class Metered:
    """The same form at every step. Every so many steps, its gradient is also compared with the exact one."""

    def __init__(self, forms: Forms, options: Options, every: int) -> None:
        self.forms, self.options = forms, options
        self.every, self.steps = every, 0
        how = options.numbers
        self._arrived: list[Callable[[], Check] | None] = []
        checks = Checks(forms, self._arrived.append, given=(how,), hands_out=how)
        self.checked, self.guards = forms.late(options.exactly(), checks)
        self.compares = bool(checks.rungs)

    def run(self, values: Sequence[Any]) -> Any:
        while self._arrived:
            if (found := self._arrived.pop(0)) is not None:
                report(found(), self.options.numbers)
        due = self.compares and self.steps % self.every == 0 and not saves_through_hooks()
        self.steps += 1
        due = due and self.guards.hold(values)
        return self.checked(*values) if due else self.forms.run(self.options, values)


class Automatic:
    """The form that the policy chooses. The policy also decides on the checks."""

    def __init__(
        self,
        forms: Forms,
        options: Options,
        checks: Checks,
        checked: Callable[..., Any],
        guards: Guards | None = None,
    ) -> None:
        self.forms, self.checked = forms, checked
        self.guards = guards or Guards(forms.source)
        self.parameter = forms.source.first_parameter
        self.owner: int | None = None
        self.rungs = [rung.how for rung in checks.rungs]
        # Computed once: constructing options validates them, which takes longer than the rest of a call.
        self.exact, self.at = options.exactly(), [options.at(how, watched=True) for how in self.rungs]
        steps = [how.iterations for how in self.rungs]
        self.policy = Policy(len(self.rungs), options.target_cosine, options.check_every, steps)
        self._arrived: list[Callable[[], Check] | None] = []
        checks.seen = self._arrived.append

    def run(self, values: Sequence[Any]) -> Any:
        exact, otherwise = self.exact, self.checked if self.guards.hold(values) else None
        if saves_through_hooks():
            # A checkpoint in eager mode runs this again, perhaps after other calls, and compares what both runs save.
            return self.forms.run(exact, values, otherwise)
        self._look_for_others(values)
        self._take()
        self._watch()
        if otherwise is not None and self.policy.checks_now():
            try:
                return self.checked(*values)
            except torch.OutOfMemoryError as error:
                log.warning("a check does not fit (%s); all steps are exact from now on", first_line(error))
                self._give_up()
        position = self.policy.position
        if position != self.policy.exact:
            options = self.at[position]
            if self.forms.has(options, values):
                return self.forms.run(options, values)
            if self.forms.made[options] is None:
                self.policy.lose(position)
        # A check computes the exact gradient too: slow, but right.
        return self.forms.run(exact, values, otherwise)

    def _look_for_others(self, values: Sequence[Any]) -> None:
        """Detect whether several modules share this graph, as blocks of one class that are compiled separately. Checks
        visit them in turn.
        """
        if self.parameter is not None and not self.policy.shared:
            owner = id(values[self.parameter])
            self.policy.shared = self.owner not in (None, owner)
            self.owner = owner

    def _give_up(self) -> None:
        for rung in range(len(self.rungs)):
            self.policy.lose(rung)

    def _take(self) -> None:
        """Process what checks have found since the last step. The host waits for the device here, once per check."""
        worst: list[float] = []
        changes: list[float] = []
        while self._arrived:
            found = self._arrived.pop(0)
            if found is None:
                self._give_up()
                continue
            check = found()
            report(check, self._used)
            count("checks")
            cosines = check.worst
            if any(cosine == cosine for cosine in cosines):  # several calls in one step: the worst counts
                worst = list(map(least, worst, cosines)) if worst else cosines
                changes = list(map(max, changes, check.last_changes)) if changes else check.last_changes
            elif not worst:
                self.policy.nothing_seen()
        if worst:
            before = self.policy.position
            self.policy.observe(worst, changes)
            self._tell(before, worst)
            for watched in self.forms.changes.values():
                watched.forget()

    def _watch(self) -> None:
        """Process what the form in use has measured in the steps since."""
        position = self.policy.position
        if position == self.policy.exact or (watched := self.forms.changes.get(self.at[position])) is None:
            return
        for change in watched.take():
            if self.policy.notice(change):
                count("checks_brought_forward")
                log.debug("the last iteration changes w by %.3g of its norm: the next check comes sooner", change)

    def _tell(self, before: int, cosines: list[float]) -> None:
        measured = ", ".join(f"{c:.4f} at {how}" for how, c in zip(self.rungs, cosines, strict=True))
        log.debug("checked: cosine with the exact gradient %s", measured)
        if self.policy.position != before or self.policy.checks == 1:
            chosen = self._used or "exact backprop"
            log.info("auto chooses %s: cosine with the exact gradient %s", chosen, measured)

    @property
    def _used(self) -> Truncation | None:
        """The form in use; None for exact backprop."""
        position = self.policy.position
        return None if position == self.policy.exact else self.rungs[position]


def report(check: Check, used: Truncation | None) -> None:
    """Pass the check to the meter of the running callable, if it has one."""
    by = running()
    check.used = used
    if by is not None and by.meter is not None:
        by.meter.take(check)
