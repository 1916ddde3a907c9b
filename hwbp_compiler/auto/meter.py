"""Measure how good the gradient is while a model trains."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .control import compiled_as
from .measured import Check, Compared

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """One comparison with the exact gradient.

    number      counts the readings, from 0
    iterations, segment, damping   k, S and gamma of the form that was compared
    cosine, relative_error         over all parameters whose gradient this form approximates
    chains      cosine and relative error of each chain
    trains      whether the model was training with this form at that step
    """

    number: int
    iterations: int
    segment: int
    damping: float
    cosine: float
    relative_error: float
    chains: dict[str, Compared]
    trains: bool

    @property
    def figures(self) -> dict[str, float]:
        """Cosine and relative error, under the names that loggers show."""
        form = f"k{self.iterations}_S{self.segment}"
        return {f"highway/cosine/{form}": self.cosine, f"highway/relative_error/{form}": self.relative_error}


class GradientMeter:
    """Compares the gradient of ``model`` with the exact one during training, once every ``every`` steps.

    The training itself does not change: such a step uses the same gradient as without the meter. With "auto", every
    check gives one reading for each form that it compares. A reading becomes available one step after it was measured.

    Args:
        model: a model or function compiled with ``backend="highway"``.
        every: steps from one reading to the next. A step with a reading is slower: it runs without generated code.
        callback: called with each :class:`Reading`.
        writer: a TensorBoard ``SummaryWriter``, or any object with the same ``add_scalar(tag, value, step)``.
        csv_path: a file. Each reading is appended to it as one line.
        warn_below: log a warning if the gradient that the model trains with has a lower cosine. None: never warn.

    Attributes:
        readings: all readings, oldest first.

    Raises:
        ValueError: ``every`` is not an integer >= 1.
        TypeError: ``model`` is not compiled with ``backend="highway"``.

    Call :meth:`close` to stop the comparisons, or use the meter in a ``with`` block.

    >>> meter = GradientMeter(compiled, every=100)
    >>> train(compiled)
    >>> meter.last.cosine
    """

    def __init__(
        self,
        model: Any,
        every: int = 200,
        *,
        callback: Callable[[Reading], None] | None = None,
        writer: Any = None,
        csv_path: str | os.PathLike[str] | None = None,
        warn_below: float | None = 0.9,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"GradientMeter: every = {every!r} is not allowed; it takes an integer >= 1")
        self.every, self.callback, self.writer, self.warn_below = every, callback, writer, warn_below
        self.csv_path = None if csv_path is None else Path(csv_path)
        self.readings: list[Reading] = []
        self._compiled = compiled_as(model)
        self._compiled.meter = self

    @property
    def last(self) -> Reading | None:
        """The newest reading, or None if there is none yet."""
        return self.readings[-1] if self.readings else None

    def reads(self, model: Any) -> bool:
        """Whether this meter reads ``model``: it was made for this compiled callable and is not closed."""
        return self._compiled is compiled_as(model) and self._compiled.meter is self

    def close(self) -> None:
        """Stop the comparisons."""
        if self._compiled.meter is self:
            self._compiled.meter = None

    def __enter__(self) -> GradientMeter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def take(self, check: Check) -> None:
        """Called by the model with the measurements of a step."""
        for how, total, chains in zip(check.forms, check.total, check.chains, strict=True):
            figures = total.cosine, total.relative_error, chains, how == check.used
            reading = Reading(len(self.readings), how.iterations, how.segment, how.damping, *figures)
            self.readings.append(reading)
            self._pass_on(reading)

    def _pass_on(self, reading: Reading) -> None:
        if self.writer is not None:
            for name, value in reading.figures.items():
                self.writer.add_scalar(name, value, reading.number)
        if self.csv_path is not None:
            self._append(self.csv_path, reading)
        if reading.trains and self.warn_below is not None and reading.cosine < self.warn_below:
            log.warning(
                "the gradient with iterations=%d, segment=%d has a cosine of %.3f with the exact one, below %g. More "
                "iterations, a larger segment, or iterations=\"auto\" improve it.",
                reading.iterations, reading.segment, reading.cosine, self.warn_below,
            )  # fmt: skip
        if self.callback is not None:
            self.callback(reading)

    @staticmethod
    def _append(path: Path, reading: Reading) -> None:
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="") as file:
            lines = csv.writer(file)
            if new:
                lines.writerow(["number", "iterations", "segment", "damping", "cosine", "relative_error"])
            lines.writerow(
                [reading.number, reading.iterations, reading.segment, reading.damping, reading.cosine,
                 reading.relative_error]
            )  # fmt: skip
