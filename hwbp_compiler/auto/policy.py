"""Decide which form the next step takes, from cosines and step counts without a clock: a seed reproduces a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# If no rung is good enough, checks become rarer, by up to this factor.
_RAREST = 16


@dataclass
class Policy:
    """Rungs are numbered from 0, the cheapest. Number ``rungs`` is exact backprop, where training starts.

    rungs    how many there are besides exact backprop
    target   the lowest cosine of a form in use
    every    steps from one check to the next
    shared   several modules take turns: checks then hit different modules, and the policy never moves to a cheaper
             form, because a check sees only one of the modules
    """

    rungs: int
    target: float
    every: int
    position: int = field(init=False)
    until_check: int = field(default=0, init=False)
    rarer: int = field(default=1, init=False)
    missed: int = field(default=0, init=False)
    waiting: bool = field(default=False, init=False)
    checks: int = field(default=0, init=False)
    lost: set[int] = field(default_factory=set, init=False)
    shared: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.position = self.rungs

    @property
    def exact(self) -> int:
        return self.rungs

    @property
    def downhill(self) -> float:
        """The lowest cosine for moving to a cheaper form than the one in use: half as far from 1 as the target. Without
        this margin, a form near the target would come and go.
        """
        return 1 - (1 - self.target) / 2

    def checks_now(self) -> bool:
        """Whether this step is a check; call it once per step. After True, the caller must call ``observe`` or
        ``nothing_seen``.
        """
        if len(self.lost) == self.rungs:
            return False
        if self.waiting:  # the last check had no backward pass
            self.nothing_seen()
        if self.until_check > 0:
            self.until_check -= 1
            return False
        self.waiting = True
        self.until_check = self._steps_to_come()
        return True

    def observe(self, cosines: Sequence[float]) -> None:
        """Record the cosine that a check measured for every rung; nan if it measured none."""
        self.waiting, self.missed = False, 0
        self.checks += 1
        usable = [i for i in range(self.rungs) if i not in self.lost]
        here = cosines[self.position] if self.position < self.rungs else 1.0
        if self.position == self.exact or not here >= self.target:  # nan is not good either
            least = self.target if self.checks == 1 or self.position < self.rungs else self.downhill
            good = [i for i in usable if cosines[i] >= least]
        elif self.shared:
            good = [self.position]
        else:
            cheaper = [i for i in usable if i < self.position and cosines[i] >= self.downhill]
            good = cheaper or [self.position]
        self.position = min(good, default=self.exact)
        self.rarer = min(2 * self.rarer, _RAREST) if self.position == self.exact else 1
        self.until_check = self._steps_to_come()

    def _steps_to_come(self) -> int:
        """Steps without a check after this one."""
        return self.every * self.rarer - 1 + (self.checks % 2 if self.shared else 0)

    def nothing_seen(self) -> None:
        """The check found nothing: there was no backward pass, or the gradient was zero or not finite. The next check
        follows soon, and later each time this repeats.
        """
        self.waiting = False
        self.until_check = min(2**self.missed, self.every) - 1
        self.missed += 1

    def lose(self, rung: int) -> None:
        """This form cannot be used after all."""
        self.lost.add(rung)
        if self.position == rung:
            self.position = self.exact
