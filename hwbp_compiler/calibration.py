"""``calibrate``: find the k, S and gamma that a model needs, by measuring its gradients on one batch."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .auto.forms import Checks, Forms
from .auto.measured import Check, Compared
from .auto.source import Source
from .backend import compiled_in_one_form
from .errors import HighwayError
from .options import Options, Truncation, parse
from .recurrence.tracing import traced_whole
from .report.measure import backward
from .report.restore import isolated, left_as_it_was
from .torch_private import RUNS_IN, SERVES

_ITERATIONS, _SEGMENTS, _DAMPINGS = (0, 1, 2, 4, 8), (1, 4, 8, 16, 32), (0.0,)
_WARM_UP, _REPEATS = 2, 5


@dataclass
class Row:
    """One form of the model's backward pass.

    iterations, segment, damping   k, S and gamma
    cosine          with the exact gradient, over all parameters whose gradient is approximated
    relative_error  norm of the difference relative to the exact norm, over the same parameters
    change          norm of the difference to the previous row with the same S and gamma, relative to the exact norm;
                    nan in the first such row
    saves           seconds per step that this form is expected to save; negative if exact backprop is faster
    seconds         median time of a step, if ``measure=True``; else None
    chains          cosine and relative error of each chain
    parameters      cosine and relative error of each parameter
    """

    iterations: int
    segment: int
    damping: float
    cosine: float
    relative_error: float
    change: float
    saves: float
    seconds: float | None = None
    chains: dict[str, Compared] = field(default_factory=dict)
    parameters: dict[str, Compared] = field(default_factory=dict)


@dataclass
class Calibration:
    """What :func:`calibrate` found.

    table          one :class:`Row` for each form, sorted by S, gamma and k
    target_cosine  the cosine that ``options`` must reach
    exact_seconds  median time of a step with exact gradients, if ``measure=True``; else None
    """

    table: list[Row]
    target_cosine: float
    exact_seconds: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options for ``torch.compile``: the cheapest form that reaches the target, or ``{"iterations": "exact"}`` if
        no form that reaches it is faster.
        """
        best = self.best
        if best is None:
            return {"iterations": "exact"}
        return {"iterations": best.iterations, "segment": best.segment, "damping": best.damping}

    @property
    def best(self) -> Row | None:
        """The row that :attr:`options` come from, or None if they are exact backprop."""
        good = [row for row in self.table if row.cosine >= self.target_cosine and self._gain(row) > 0]
        return max(good, key=self._gain, default=None)

    def _gain(self, row: Row) -> float:
        if row.seconds is not None and self.exact_seconds is not None:
            return self.exact_seconds - row.seconds
        return row.saves

    @property
    def growing(self) -> list[Row]:
        """Rows whose last iteration changed the gradient more than the iteration before it did."""
        found = {(row.segment, row.damping, row.iterations): row for row in self.table}
        grown = []
        for (segment, damping, k), row in found.items():
            less = found.get((segment, damping, k - 1))
            if less is not None and (segment, damping, k - 2) in found and row.change > less.change:
                grown.append(row)
        return grown

    def __str__(self) -> str:
        titles = [("k", 4), ("S", 5), ("gamma", 6), ("cosine", 9), ("rel. error", 11), ("change", 9)]
        titles += [("saves", 10), ("step", 10)]
        lines = [" ".join(title.rjust(width) for title, width in titles)]
        for row in self.table:
            change = "" if isnan(row.change) else f"{row.change:.2e}"
            step = "" if row.seconds is None else f"{1e3 * row.seconds:.3f} ms"
            figures = (
                f"{row.cosine:>9.5f} {row.relative_error:>11.2e} {change:>9} {1e3 * row.saves:>7.3f} ms {step:>10}"
            )
            lines.append(f"{row.iterations:>4} {row.segment:>5} {row.damping:>6g} {figures}")
        if self.exact_seconds is not None:
            lines.append(f"exact backprop: {1e3 * self.exact_seconds:.3f} ms a step")
        for row in self.growing:
            lines.append(f"terms grow: iteration {row.iterations} changes more than the one before (S = {row.segment})")
        lines.append(f"options for a cosine of {self.target_cosine:g}: {self.options}" + self._why_exact())
        return "\n".join(lines)

    def _why_exact(self) -> str:
        if self.best is not None:
            return ""
        good = any(row.cosine >= self.target_cosine for row in self.table)
        return " (exact backprop is faster)" if good else " (no form tried is good enough)"

    def to_dict(self) -> dict[str, Any]:
        """The calibration as plain data, ready for JSON. Infinite and nan become None. Times are in seconds."""
        return _finite(
            {
                "options": self.options,
                "target_cosine": self.target_cosine,
                "exact_seconds": self.exact_seconds,
                "table": [asdict(row) for row in self.table],
            }
        )

    def plot(self, path: Any = None) -> Any:
        """Draw the relative error against k, one line for each pair of S and gamma.

        Args:
            path: the file to write, with any suffix that matplotlib knows. None: write no file.

        Returns:
            matplotlib's figure.

        Raises:
            HighwayError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise HighwayError("Calibration.plot needs matplotlib; pip install matplotlib") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for (segment, damping), rows in itertools.groupby(self.table, key=lambda row: (row.segment, row.damping)):
            drawn = [(row.iterations, row.relative_error) for row in rows if row.relative_error > 0]
            damped = f", gamma = {damping:g}" if damping else ""
            axes.plot(*zip(*drawn, strict=True), marker="o", label=f"S = {segment}{damped}") if drawn else None
        axes.set(xlabel="iterations k", ylabel="relative error of the gradient", yscale="log")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def calibrate(
    model: Callable[..., Any],
    args: Any,
    loss: Callable[[Any], Tensor],
    target_cosine: float = 0.999,
    *,
    kwargs: Mapping[str, Any] | None = None,
    iterations: Iterable[int] = _ITERATIONS,
    segments: Iterable[int] = _SEGMENTS,
    dampings: Iterable[float] = _DAMPINGS,
    measure: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Calibration:
    """Compare the gradients for several k, S and gamma with the exact gradient, on one batch.

    Each combination of k, S and gamma is one *form* of the backward pass. One forward pass, the exact backward pass
    and those of all forms run together, and what they share is computed once. Every chain that can be rewritten
    soundly is rewritten, also where it would not be faster. The model is left as it was: parameters and their
    ``.grad``, buffers, inputs, and the states of the random number generators. Calibrate a trained model, on the data
    it was trained on: before training every form looks good.

    Args:
        model: a module or function, compiled already or not.
        args: its positional arguments, as a tuple. Anything else is passed as the only argument.
        loss: ``loss(output) -> scalar``.
        target_cosine: the cosine with the exact gradient that the recommended options must reach.
        kwargs: the model's keyword arguments.
        iterations: values of k. A form is left out if it is ordinary backprop for every chain.
        segments: values of S.
        dampings: values of gamma.
        measure: also compile and time a training step on these inputs: exact backprop, and the forms that reach the
            target and are expected to be faster. If none is expected to be faster, the cheapest that reaches it.
        options: further options of ``torch.compile``, such as ``min_length``.

    Returns:
        A :class:`Calibration`. Its ``.options`` are for ``torch.compile``; its ``.table`` has a row for each form.

    Raises:
        OptionError: a value is not allowed.
        HighwayError: the model has no chain, or no gradient.

    >>> calibration = calibrate(model, (x,), lambda output: F.cross_entropy(output, y))
    >>> print(calibration)
    >>> compiled = torch.compile(model, backend="highway", options=calibration.options)
    """
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    sizes, gammas, counts = (sorted({*values}) for values in (segments, dampings, iterations))
    grid = [Truncation(k, gamma, size) for size in sizes for gamma in gammas for k in counts]
    for how in grid:
        parse({**(options or {}), "iterations": how.iterations, "segment": how.segment, "damping": how.damping})
    Options(target_cosine=target_cosine)
    bar = _Bar(len(grid), "calibrate")
    try:
        checks = checks_of(model, args, kwargs, loss, grid, dict(options or {}), bar.advance)
    finally:
        bar.close()
    if not checks:
        raise HighwayError(
            "calibrate: nothing to choose: the model has no chain that can be rewritten, or no gradient. "
            "hwbp_compiler.explain(model, ...) gives the reasons."
        )
    found = Calibration(_rows(checks), target_cosine)
    if measure:
        _measure(found, model, args, kwargs, loss, dict(options or {}))
    return found


def checks_of(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], Tensor],
    given: Sequence[Truncation],
    options: Mapping[str, Any],
    progress: Callable[[], Any] | None = None,
) -> list[Check]:
    """What one step measures about the ``given`` forms: one check for each of the model's graphs with a chain."""
    chosen = {"rewrite": "always", **options, "iterations": "exact", "segment": 1, "damping": 0.0}
    ours, patches = parse(chosen)
    arrived: list[Callable[[], Check] | None] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def compile(module: GraphModule, inputs: list[Any], options: Options, **how: Any) -> Callable[..., Any]:
            return compiled_in_one_form(module, inputs, options, patches, **how)

        checking = Checks(Forms(Source.of(module, inputs), compile), arrived.append, tuple(given), progress=progress)
        compiled = compile(module, inputs, ours, looking=checking.of)

        def run(*values: Any) -> Any:
            keep(values)
            return compiled(*values)

        return run

    setattr(backend, SERVES, True)
    setattr(backend, RUNS_IN, traced_whole)
    with left_as_it_was(model) as keep, torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        keep([args, kwargs])
        compiled = torch.compile(model, backend=backend, **isolated())  # type: ignore[call-overload]
        backward(loss(compiled(*args, **kwargs)))
        if None in arrived:
            raise HighwayError("calibrate: the gradients could not be computed; the warning before this says why")
        return [found() for found in arrived if found is not None]


def _rows(checks: Sequence[Check]) -> list[Row]:
    """One row for each form. If the model has several graphs, the row holds the worst of them and the sum of what they
    save.
    """
    rows = []
    for how in dict.fromkeys(how for check in checks for how in check.forms):
        parts = [(check, check.forms.index(how)) for check in checks if how in check.forms]
        worst, at = min(parts, key=lambda part: _or_less(part[0].total[part[1]].cosine))
        if all(not check.parameters[i] for check, i in parts):
            continue  # ordinary backprop of every chain
        rows.append(
            Row(
                how.iterations,
                how.segment,
                how.damping,
                worst.total[at].cosine,
                worst.total[at].relative_error,
                worst.changes[at],
                sum(check.saves[i] for check, i in parts),
                chains={name: c for check, i in parts for name, c in check.chains[i].items()},
                parameters={name: c for check, i in parts for name, c in check.parameters[i].items()},
            )  # fmt: skip
        )
    return rows


def _or_less(cosine: float) -> float:
    """Order values that are not finite below all others."""
    return -inf if isnan(cosine) else cosine


def _measure(found: Calibration, model: Any, args: Any, kwargs: Any, loss: Any, options: dict[str, Any]) -> None:
    """Time steps of exact backprop and of the forms that reach the target, in turn, so that noise affects all."""
    good = sorted((row for row in found.table if row.cosine >= found.target_cosine), key=lambda row: -row.saves)
    rows = [row for row in good if row.saves > 0] or good[:1]
    exact: dict[str, Any] = {"iterations": "exact"}
    chosen = [{"iterations": row.iterations, "segment": row.segment, "damping": row.damping} for row in rows]
    with left_as_it_was(model) as keep:
        keep([args, kwargs])
        steps = [
            torch.compile(model, backend="highway", options=options | {"rewrite": "always"} | how, **isolated())  # type: ignore[call-overload]
            for how in [exact, *chosen]
        ]
        times: list[list[float]] = [[] for _ in steps]
        bar = _Bar((_WARM_UP + _REPEATS) * len(steps), "measure")
        for turn in range(_WARM_UP + _REPEATS):
            for step, mine in zip(steps, times, strict=True):
                start = time.perf_counter()
                backward(loss(step(*args, **kwargs)))
                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
                if turn >= _WARM_UP:
                    mine.append(time.perf_counter() - start)
                bar.advance()
        bar.close()
    found.exact_seconds = statistics.median(times[0])
    for row, mine in zip(rows, times[1:], strict=True):
        row.seconds = statistics.median(mine)


class _Bar:
    """A progress bar, if stderr is a terminal and tqdm is installed."""

    def __init__(self, total: int, what: str) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=what, leave=False)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
