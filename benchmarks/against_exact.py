"""What an approximate gradient costs beside the best exact alternative: rows of claims, and a plot of the ratios.

A case measures several ways to get the exact gradient: eager mode, Inductor, JAX, exact backprop compiled
with this backend. A user would take the fastest of them otherwise, so ours is compared with that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows import Row, doubtful

# Runs that give the exact gradient, and what a reader knows them by.
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
    """One case: a step of ours and the fastest exact step. ``step`` names the figure in the rows."""

    case: str
    ours: Row
    exact: Row
    exact_name: str
    step: str = "step"

    @property
    def disturbed(self) -> bool:
        """A spread of more than half the median: the ratio is no evidence."""
        return bool(doubtful(self.ours, self.step) or doubtful(self.exact, self.step))

    @property
    def ratio(self) -> float:
        """Above 1: ours is faster."""
        return self.exact[f"{self.step}_ms"] / self.ours[f"{self.step}_ms"]

    def milliseconds(self, row: Row) -> str:
        """The median with three digits, and a question mark where the spread is more than half of it."""
        ms = row[f"{self.step}_ms"]
        return f"{ms:.{max(0, 2 - len(str(int(ms))) + 1)}f}{doubtful(row, self.step)}"

    def in_words(self) -> str:
        """For a cell of the index."""
        times = f"{self.milliseconds(self.ours)} ms against {self.milliseconds(self.exact)} ms ({self.exact_name})"
        return f"{self.ratio:.2f}x: {self.case}; {times}"


@dataclass(frozen=True)
class Claim:
    """A row of the index."""

    what: str
    best: str
    worst: str
    device: str
    suite: str
    page: str


def duel(
    case: str, runs: dict[str, Row], ours: str, names: dict[str, str] = EXACT_RUNS, step: str = "step"
) -> Duel | None:
    """``ours`` against the fastest exact run; None where one of the two was not measured."""
    exact = [run for run in names if run in runs and run != ours and f"{step}_ms" in runs[run]]
    if ours not in runs or not exact:
        return None
    best = min(exact, key=lambda run: runs[run][f"{step}_ms"])
    return Duel(case, runs[ours], runs[best], names[best], step)


def claim(what: str, duels: Sequence[Duel], suite: str, page: str) -> Claim | None:
    """The best and the worst of ``duels``; None where there are none."""
    if not duels:
        return None
    ranked = best_last(duels)
    device = ", ".join(dict.fromkeys(d.ours["device_name"] for d in duels))
    cases = f"{len(duels)} case{'s' * (len(duels) > 1)}"
    return Claim(f"{what} ({cases})", ranked[-1].in_words(), ranked[0].in_words(), device, suite, page)


def best_last(duels: Sequence[Duel]) -> list[Duel]:
    """By ratio. Disturbed cases are left out, unless there are no others."""
    quiet = [d for d in duels if not d.disturbed]
    return sorted(quiet or duels, key=lambda d: d.ratio)


def plot(series: dict[str, Iterable[Duel]], path: Path) -> bool:
    """Ratios of all cases, one row a case; whether there was anything to draw. Right of 1 ours is faster."""
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
