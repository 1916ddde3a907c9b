"""Decide which form the next step takes, from cosines and step counts without a clock: a seed reproduces a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

# If no rung is good enough, checks become rarer, by up to this factor.
_RAREST = 16

# The last change of w differs from batch to batch. Growth by less than this factor is no jump.
_NOISE = 1.25

# At most this many checks between two regular ones are brought forward.
_SOONER = 4


@dataclass
class Policy:
    """Rungs are numbered from 0, the cheapest. Number ``rungs`` is exact backprop, where training starts.

    rungs    how many there are besides exact backprop
    target   the lowest cosine of a form in use
    every    steps from one check to the next
    iterations  k of each rung
    shared   several modules take turns: checks then hit different modules, and the policy never moves to a cheaper
             form, because a check sees only one of the modules
    """

    rungs: int
    target: float
    every: int
    iterations: Sequence[int] = ()
    position: int = field(init=False)
    until_check: int = field(default=0, init=False)
    rarer: int = field(default=1, init=False)
    missed: int = field(default=0, init=False)
    waiting: bool = field(default=False, init=False)
    checks: int = field(default=0, init=False)
    lost: set[int] = field(default_factory=set, init=False)
    shared: bool = field(default=False, init=False)
    jump: float = field(default=inf, init=False)
    caution: float = field(default=1.0, init=False)
    early: bool = field(default=False, init=False)

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

    def notice(self, change: float) -> bool:
        """Record how much the last iteration changed w in a step, |w^k - w^{k-1}| / |w^k|. Return whether that brings
        the next check forward.
        """
        sooner = self.every // _SOONER + self.until_check - self._steps_to_come() - 1
        if not change > self.jump or sooner >= self.until_check:
            return False
        self.until_check, self.jump, self.early = max(sooner, 0), inf, True
        return True

    def _what_is_a_jump(self, rung: int, cosine: float, change: float) -> float:
        """Up to which change the cosine is expected to stay above the target.

        An iteration multiplies what is still missing by about the same factor, so that the last change is about its
        k-th power, and the relative error its (k + 1)-th. 1 - cosine is about half the square of the error.
        """
        if not (change > 0 and cosine == cosine):
            return inf
        k = self.iterations[rung]
        room = ((1 - self.target) / (1 - cosine)) ** (k / (2 * (k + 1))) if cosine < 1 else inf
        return change * max(room, _NOISE**self.caution)

    def observe(self, cosines: Sequence[float], changes: Sequence[float] = ()) -> None:
        """Record the cosine that a check measured for every rung, and how much the last iteration changed w; nan if it
        measured none.
        """
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
        # A check that came early in vain makes the next one less likely to come early.
        self.caution = 1.0 if not here >= self.target else self.caution * (2.0 if self.early else 0.5)
        self.caution, self.early, self.jump = max(self.caution, 1.0), False, inf
        self.position = min(good, default=self.exact)
        if self.position < self.rungs and changes:
            self.jump = self._what_is_a_jump(self.position, cosines[self.position], changes[self.position])
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
