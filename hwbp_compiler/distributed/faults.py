"""When a rank fails, the others report which one and why, instead of a closed connection.

A rank that raises leaves a note in the process group's store. A rank whose communication fails (the other end is gone,
or the group's time-out is over) looks for such a note. If there is none, it sets an alarm. A thread on every rank
checks the store now and then, and answers an alarm with what its rank is doing. A rank that does not answer has ended.
A rank that answers that it is computing, and for how long, is stalled. The first finding is what all ranks report.

Notes and alarms of a fault that the ranks survived must not be mistaken for those of a later one. So their keys contain
the number of agreements that the group has reached. This number is the same on all ranks, because each takes part in
all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from hwbp_compiler import torch_private
from hwbp_compiler.errors import HighwayError, first_line

from .errors import RankError

POLL = 0.5
"""Seconds between two checks of the store, each a round trip."""

PATIENCE = 5.0
"""Seconds that the ranks have to answer an alarm: several checks, even on a busy machine."""

STALL = 1.0
"""Seconds of computing after which a rank that others wait for is reported as stalled; a shorter time may only mean
that it just began.
"""

# gloo raises plain RuntimeErrors.
_OF_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|socket", re.IGNORECASE
)

# For errors within a stage's own pass, where data parallelism communicates too. The stage's own messages must not
# match.
_OF_COMMUNICATION_WITHIN = re.compile(r"\bgloo/|ProcessGroup(Gloo|NCCL)|ncclSystemError|ncclRemoteError")


@dataclass
class _Group:
    """State of a process group: agreements so far, the watch used last, and the alarm answered last."""

    agreements: int = 0
    watch: weakref.ref[Watch] | None = None
    answered: bytes | None = None


_GROUPS: weakref.WeakKeyDictionary[Any, _Group] = weakref.WeakKeyDictionary()


class Watch:
    """Knows what this rank is doing, and finds out about the others. One per schedule and group."""

    def __init__(self, where: str, group: dist.ProcessGroup | None, name: str) -> None:
        self.where, self.name = where, name
        self.rank, self._global = dist.get_rank(group), dist.get_process_group_ranks(group)
        self.ranks = len(self._global)
        self._now = ("outside of the schedule", False, time.monotonic())
        self._store = torch_private.default_store()
        group = group or dist.group.WORLD
        self._of_group = _GROUPS.setdefault(group, _Group())
        self._of_group.watch = weakref.ref(self)
        self._key = f"hwbp/{group.group_name}"  # type: ignore[union-attr]
        self._stop = threading.Event()
        thread = threading.Thread(target=_answer, args=(weakref.ref(self), self._stop), daemon=True)
        thread.start()
        weakref.finalize(self, self._stop.set)
        atexit.register(self._stop.set)

    # -- what this rank is doing --------------------------------------------------------------------------------

    def agreed(self) -> None:
        """All ranks have reached an agreement, so earlier faults are over."""
        self._of_group.agreements += 1

    def say(self, what: str, waiting: bool = False) -> None:
        self._now = (what, waiting, time.monotonic())

    @contextlib.contextmanager
    def computing(self, what: str) -> Iterator[None]:
        self.say(what)
        yield  # an error leaves the state unchanged
        self.say("waiting for other ranks", waiting=True)

    # -- faults -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Wraps everything that communicates. An error of this rank passes through unchanged. A communication error
        becomes a :class:`RankError` that names the rank that caused it.
        """
        self._of_group.watch = weakref.ref(self)
        self.say("waiting for other ranks", waiting=True)
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if not is_communication(error):
                chain = _chain(error)
                self._note(f"{self._me()} raised {first_line(chain[-1])}")
                ours = next((e for e in chain[1:] if isinstance(e, HighwayError)), None)
                if ours is not None:
                    raise ours from None  # torch's wrapper adds no information
                raise
            self.say("its connection to another rank is lost", waiting=True)
            raise RankError(f"{self.where}: {self._found(error)}") from error
        self.say("outside of the schedule")

    def _me(self) -> str:
        return self._of(self.rank, self.name)

    def _of(self, rank: int, *said: str) -> str:
        """A rank of the group, with its other names."""
        said = (*said, f"global rank {self._global[rank]}") if self._global[rank] != rank else said
        return f"rank {rank} ({', '.join(said)})" if said else f"rank {rank}"

    def _note(self, text: str) -> str:
        """Leave a note, unless there is one already. Return the first note of all ranks."""
        with contextlib.suppress(Exception):
            return self._store.compare_set(self._failed(), "", text).decode()
        return text

    def _failed(self, later: int = 0) -> str:
        return f"{self._key}/{self._of_group.agreements + later}/failed"

    def _found(self, error: Exception) -> str:
        said = f"this rank ({self._me()}) saw: {first_line(_chain(error)[-1])}"
        try:
            self._store.set(f"{self._key}/alarm", str(self._of_group.agreements))
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if self._store.check([self._failed()]):
                    break
                # Left by a rank that reached the agreement this rank is waiting for.
                if self._store.check([self._failed(1)]):
                    return f"{self._store.get(self._failed(1)).decode()}; {said}"
                time.sleep(POLL / 5)
            return f"{self._note(self._culprits())}; {said}"
        except Exception as lost:
            return (
                "the store of the process group does not answer, so the process that hosts it (rank 0, unless torchrun "
                f"does) has probably ended: {first_line(lost)}; {said}"
            )

    def _culprits(self) -> str:
        silent, busy = [], []
        for rank in range(self.ranks):
            key = f"{self._key}/{self._of_group.agreements}/doing/{rank}"
            if rank == self.rank:
                continue
            if not self._store.check([key]):
                silent.append(self._of(rank))
                continue
            doing = json.loads(self._store.get(key))
            if not doing["waiting"] and doing["seconds"] > STALL:
                busy.append(f"{self._of(rank, doing['name'])} stalls: {doing['what']} for {doing['seconds']:.0f} s")
        if silent:
            return f"{', '.join(silent)} does not answer: its process has ended, or hangs"
        return "; ".join(busy) or (
            "all ranks of the group answer and wait for others: their calls do not match, or a rank outside of the "
            "group failed (data parallelism)"
        )

    def answer(self) -> None:
        """Report what this rank is doing if there is an alarm. Of several watches of a group, the one used last
        answers.
        """
        group = self._of_group
        if group.watch is None or group.watch() is not self or not self._store.check([f"{self._key}/alarm"]):
            return
        alarm = self._store.get(f"{self._key}/alarm")
        if alarm == group.answered:
            return
        what, waiting, since = self._now
        doing = {"name": self.name, "what": what, "waiting": waiting, "seconds": time.monotonic() - since}
        self._store.set(f"{self._key}/{alarm.decode()}/doing/{self.rank}", json.dumps(doing))
        group.answered = alarm


def _answer(watch: weakref.ref[Watch], stop: threading.Event) -> None:
    while not stop.wait(POLL):
        alive = watch()
        if alive is None:
            return
        try:
            alive.answer()
        except Exception:
            return  # the store is gone
        del alive


def is_communication(error: BaseException) -> bool:
    """Whether ``error`` was caused by another rank."""
    if isinstance(error, HighwayError):
        return False
    first = _chain(error)[-1]  # torch wraps errors from a stage's forward or backward pass
    if isinstance(first, dist.DistError):
        return True
    words = _OF_COMMUNICATION if first is error else _OF_COMMUNICATION_WITHIN
    return type(first) is RuntimeError and words.search(str(first)) is not None


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and its causes, with the first cause last."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


_WATCHES: weakref.WeakKeyDictionary[Any, dict[str, Watch]] = weakref.WeakKeyDictionary()


def watch_of(where: str, group: dist.ProcessGroup, name: str) -> Watch:
    """One watch for every group and use."""
    known = _WATCHES.setdefault(group, {})
    if where not in known:
        known[where] = Watch(where, group, name)
    return known[where]
