"""Run several checks in turns, and build the kernels of all of them as one library.

A check that runs generated code waits for the C++ compiler, even if its file is small. So each check stops where it
needs kernels, and the next one begins. When all have stopped, their kernels are built together.

Each check has a thread of its own, but only one of them runs at a time: the checks share what Inductor, sympy and the
fake tensors have cached, which processes would not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .generated import build_library, builder


@dataclass
class Outcome:
    """What a task has returned or raised."""

    result: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


def outcomes(tasks: Sequence[Callable[[], Any]]) -> list[Outcome]:
    """Run every task until it needs kernels, build these, and run the tasks to their end or until they need more."""
    turns = [_Turn(task) for task in tasks]
    while unfinished := [turn for turn in turns if not turn.finished]:
        for turn in unfinished:
            turn.go_on()
        sources = {name: code for turn in unfinished for name, code in turn.sources.items()}
        library = build_library(sources) if sources else ""
        for turn in unfinished:
            turn.library = library
    return [turn.outcome for turn in turns]


class _Turn:
    def __init__(self, task: Callable[[], Any]) -> None:
        self.task, self.outcome = task, Outcome()
        self.sources: Mapping[str, str] = {}
        self.library = ""
        self.finished = False
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def go_on(self) -> None:
        """Let the task run until it needs kernels or ends."""
        self.sources = {}
        if self._thread.ident is None:
            self._thread.start()
        self._mine.release()
        self._others.acquire()

    def _run(self) -> None:
        self._mine.acquire()
        builder.set(self._built_with_others)
        try:
            self.outcome.result = self.task()
        except Exception as error:
            self.outcome.error = error
        self.finished = True
        self._others.release()

    def _built_with_others(self, sources: Mapping[str, str]) -> str:
        self.sources = dict(sources)
        self._others.release()
        self._mine.acquire()
        return self.library


__all__ = ["Outcome", "outcomes"]
