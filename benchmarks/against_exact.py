"""Compare the time of an approximate gradient with the best exact alternative: table rows, and a plot of the ratios.

Each case measures several ways to compute the exact gradient: eager mode, Inductor, JAX, and exact backprop compiled
with this backend. Without Highway-BP a user would choose the fastest of them, so the comparison is with that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import Row, doubtful

# Runs that give the exact gradient, with the names that the pages use.
EXACT_RUNS = {
    "eager": "eager mode",
    "inductor": "Inductor",
    "Inductor": "Inductor",
    "jax": "JAX",
    "jax, unrolled": "JAX, unrolled",
    "loop": "Inductor, a loop over cells",
    "exact": "exact with this backend",
}


@dataclass(frozen=True)
class Duel:
    """One case: our step and the fastest exact step. ``step`` is the name of the measured time in the rows."""

    case: str
    ours: Row
    exact: Row
    exact_name: str
    step: str = "step"

    @property
    def disturbed(self) -> bool:
        """Whether a measurement varies by more than half its median, so that the ratio proves nothing."""
        return bool(doubtful(self.ours, self.step) or doubtful(self.exact, self.step))

    @property
    def ratio(self) -> float:
        """The exact time divided by ours: above 1, ours is faster."""
        return self.exact[f"{self.step}_ms"] / self.ours[f"{self.step}_ms"]

    def milliseconds(self, row: Row) -> str:
        """The median with three digits, and a question mark if the spread is more than half of the median."""
        ms = row[f"{self.step}_ms"]
        return f"{ms:.{max(0, 2 - len(str(int(ms))) + 1)}f}{doubtful(row, self.step)}"


@dataclass(frozen=True)
class Claim:
    """One row of the index page.

    topic           the heading it stands under
    what            what is claimed
    figure          the worst and the best figure
    of              how many cases there are
    device, suite   where it was measured, and by what
    page            the page that has all figures
    duels           the cases, the worst first; empty if ``figure`` says it all
    """

    topic: str
    what: str
    figure: str
    of: str
    device: str
    suite: str
    page: str
    duels: tuple[Duel, ...] = ()


def duel(
    case: str, runs: dict[str, Row], ours: str, names: dict[str, str] = EXACT_RUNS, step: str = "step"
) -> Duel | None:
    """Compare ``ours`` with the fastest exact run. None if either was not measured."""
    exact = [run for run in names if run in runs and run != ours and f"{step}_ms" in runs[run]]
    if ours not in runs or not exact:
        return None
    best = min(exact, key=lambda run: runs[run][f"{step}_ms"])
    return Duel(case, runs[ours], runs[best], names[best], step)


def claim(topic: str, what: str, duels: Sequence[Duel], suite: str, page: str) -> Claim | None:
    """The worst and the best of ``duels``, or None if there are none."""
    if not duels:
        return None
    ranked = best_last(duels)
    device = ", ".join(dict.fromkeys(d.ours["device_name"] for d in duels))
    figure = f"{ranked[0].ratio:.2f}x to {ranked[-1].ratio:.2f}x"
    cases = f"{len(duels)} case{'s' * (len(duels) > 1)}"
    return Claim(topic, what, figure, cases, device, suite, page, tuple(ranked))


def best_last(duels: Sequence[Duel]) -> list[Duel]:
    """``duels`` sorted by ratio. Disturbed cases are left out, unless there are no others."""
    quiet = [d for d in duels if not d.disturbed]
    return sorted(quiet or duels, key=lambda d: d.ratio)


def plot(series: dict[str, Iterable[Duel]], path: Path) -> bool:
    """Draw the ratios of all cases, one row per case; right of 1, ours is faster. Returns whether there were any."""
    drawn = {name: found for name, duels in series.items() if (found := list(duels))}
    cases = list(dict.fromkeys(d.case for duels in drawn.values() for d in duels))
    if not cases:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hwbp"  # the same results give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.27 * len(cases)), layout="constrained")
    for i, (name, duels) in enumerate(drawn.items()):
        places = [-cases.index(d.case) for d in duels]
        axis.plot([d.ratio for d in duels], places, "osD^v"[i % 5], color=f"C{i}", markersize=5, alpha=0.8, label=name)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks([-i for i in range(len(cases))], [case.replace("`", "") for case in cases], fontsize="small")
    axis.set(xscale="log", xlabel="times as fast as the best exact alternative")
    low, high = axis.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", linewidth=0.4)
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.6 / len(cases)), ncols=len(drawn))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
