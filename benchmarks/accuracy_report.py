"""The page ``docs/benchmarks/quality.md``, its two figures, and the paper's claims beside the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .accuracy import CASES, FPI, HIGHWAY, SEEDS
from .rows import Row, by, markdown, places

HIGHER_IS_BETTER = {"accuracy": True, "held_out_loss": False}
SEEN = 0.001  # a cosine that falls by less has not fallen
WORDS = {"accuracy": "held-out accuracy", "held_out_loss": "held-out loss, nats per character"}


@dataclass(frozen=True)
class Quality:
    """One method in one case: what its runs reached, seed by seed."""

    metric: str
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return f"{self.mean:.1%} ± {self.spread:.1%}"
        return f"{self.mean:.3f} ± {self.spread:.3f}"

    def better_than(self, other: Quality) -> bool:
        return self.mean > other.mean if HIGHER_IS_BETTER[self.metric] else self.mean < other.mean

    def as_good_as(self, other: Quality) -> bool:
        """Better, or no further behind than the larger of the two spreads."""
        return self.better_than(other) or abs(self.mean - other.mean) <= max(self.spread, other.spread)


class Results:
    def __init__(self, found: list[Row]) -> None:
        self.rows = found
        self.quality: dict[tuple[str, str], Quality] = {}
        self.cosines: dict[tuple[str, str], Row] = {}
        for (kind, case, run), group in by(found, "kind", "case", "run").items():
            if kind == "quality":
                self.quality[case, run] = Quality(group[0]["metric"], [row["value"] for row in group])
            else:
                self.cosines[case, run] = group[-1]
        self.cases = [case for case in CASES if (case.name, "exact") in self.quality]


def section(found: list[Row], folder: Path) -> str | None:
    """``folder``: where the page lies, and the figures beside it."""
    if not found:
        return None
    results = Results(found)
    figures(results, folder)
    seeds = len(SEEDS)
    parts = [
        "## Quality\n\n`python -m benchmarks run --suite accuracy`. The models, data and schedules of `examples/`, "
        f"mean ± standard deviation over {seeds} seeds; the same seed gives the same weights and batches to all "
        "methods. FPI is fixed-point iteration (damping 1). The cosine compares each method's gradient with the "
        "exact one, at weights that the exact run of the first seed passes through: before training, where the cosine "
        f"is lowest, and at the end. {took(found)}\n\n"
        "![Held-out accuracy or loss against k](accuracy.svg)\n\n![Cosine with the exact gradient](cosine.svg)",
        claims(results),
    ]
    for case in results.cases:
        group = [row for row in found if row["case"] == case.name and row["kind"] == "quality"]
        lines = []
        for method in case.methods:
            if (case.name, method.label) not in results.quality:
                continue
            row = next(row for row in group if row["run"] == method.label)
            cosines = results.cosines.get((case.name, method.label), {}).get("cosines")
            seen = (f"{cosines[0]:.3f}", f"{min(cosines):.3f}", f"{cosines[-1]:.3f}") if cosines else ("", "", "")
            damping = "" if method.iterations is None else f"{row['damping']:g}"
            quality = results.quality[case.name, method.label]
            n = "" if len(quality.values) == seeds else f" ({len(quality.values)} seeds)"
            lines.append((method.label, damping, f"{quality}{n}", *seen))
        head = ("run", "damping", WORDS[case.metric], "cosine: start", "lowest", "end")
        command = next(row["command"] for row in group if row["run"] == "exact")
        everything = [row for row in found if row["case"] == case.name]
        parts.append(f"### {case.name}\n\n`{command}`. {places(everything)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def took(found: list[Row]) -> str:
    """How long all runs together lasted, for who wants to repeat them."""
    runs = [row for row in found if row["kind"] == "quality"]
    training = sum(row["seconds"] for row in runs) / 60
    compiled = {(row["case"], row["run"], row["commit"], row["compile_s"]) for row in runs}
    compiling = sum(seconds for *_, seconds in compiled) / 60
    threads = max(row["threads"] for row in runs)
    return (
        f"The {len(runs)} runs took {training:.0f} minutes of training and {compiling:.0f} of compiling, "
        f"one after another, on {threads} thread{'s' * (threads > 1)} of a machine that did other work too."
    )


def in_short(found: list[Row]) -> str:
    """For ``examples/README.md``: exact, Highway-BP and FPI at k = 3."""
    results = Results(found)
    lines = []
    for case in results.cases:
        command = " ".join(["python", f"examples/{case.example}.py", *case.words])
        cells = [results.quality.get((case.name, run)) for run in ("exact", "k=3", "FPI k=3")]
        if None not in cells:
            lines.append((f"`{command}`", WORDS[case.metric], *cells))
    return markdown(("command", "measured", "exact", "Highway-BP, k = 3", "FPI, k = 3"), lines)


# -- the paper's claims ---------------------------------------------------------------------------------------------


def claims(results: Results) -> str:
    checks = [small_k(results), beats_fpi(results), fpi_fails(results), later(results), damping_helps(results)]
    text = [f"* **{claim}** {verdict}. {numbers}" for claim, verdict, numbers in filter(None, checks)]
    if not text:
        return ""
    return (
        '### What the paper claims\n\nA method is "as good as" another if it is better, or worse by at most the '
        "larger of the two standard deviations.\n\n" + "\n".join(text)
    )


def listed(comparisons: Iterable[str], lead: str = "") -> str:
    """Comparisons as a list below ``lead``."""
    return lead + "".join(f"\n    - {each}" for each in comparisons)


def verdict(right: int, of: int) -> str:
    return (
        "Confirmed" if right == of else "Not confirmed" if right == 0 else f"Confirmed in {right} of {of} comparisons"
    )


def small_k(results: Results) -> tuple[str, str, str] | None:
    found = []
    for case in results.cases:
        exact = results.quality[case.name, "exact"]
        tried = [(m, q) for m in HIGHWAY if (q := results.quality.get((case.name, m.label))) is not None]
        if tried:
            found.append((case.name, exact, next(((m, q) for m, q in tried if q.as_good_as(exact)), None)))
    if not found:
        return None
    resnet = next((first for name, _, first in found if name.startswith("ResNet")), None)
    numbers = listed(
        (
            f"{name}: exact {exact}, " + (f"k = {first[0].iterations} {first[1]}" if first else "no k up to 10")
            for name, exact, first in found
        ),
        "The smallest k that is as good as exact backprop:",
    )
    good = resnet is not None and (resnet[0].iterations or 0) <= 5
    return (
        "A small k suffices for a deep ResNet (the paper: k = 4 for 54 links; here 15 links).",
        "Confirmed" if good else "Not confirmed",
        numbers,
    )


def beats_fpi(results: Results) -> tuple[str, str, str] | None:
    pairs = []
    for case in results.cases:
        for fpi in FPI:
            ours, theirs = (results.quality.get((case.name, label)) for label in (f"k={fpi.iterations}", fpi.label))
            if ours is not None and theirs is not None:
                pairs.append((case.name, fpi.iterations, ours, theirs))
    if not pairs:
        return None
    numbers = listed(
        (f"{name}, k = {k}: {ours} against {theirs}" for name, k, ours, theirs in pairs), "Highway-BP against FPI:"
    )
    wins = sum(ours.better_than(theirs) for _, _, ours, theirs in pairs)
    return "Highway-BP beats FPI at equal k.", verdict(wins, len(pairs)), numbers


def fpi_fails(results: Results) -> tuple[str, str, str] | None:
    name = "GRU, pixel by pixel"
    wanted = [results.quality.get((name, label)) for label in ("exact", "k=10", "FPI k=10")]
    if None in wanted:
        return None
    exact, ours, fpi = (quality for quality in wanted if quality is not None)
    fails, holds = not fpi.as_good_as(exact), ours.as_good_as(exact)
    said = "Confirmed" if fails and holds else "Not confirmed" if not fails else "Confirmed for FPI"
    return (
        "FPI fails where only the last state has a loss; Highway-BP with k = 10 does not.",
        said,
        f"{name}, 64 steps: exact {exact}, Highway-BP k = 10 {ours}, FPI k = 10 {fpi}.",
    )


def later(results: Results) -> tuple[str, str, str] | None:
    falls = []
    for case in results.cases:
        for method in HIGHWAY:
            row = results.cosines.get((case.name, method.label))
            if row is not None and method.iterations in (1, 3, 5):
                falls.append((case.name, method.iterations, row["cosines"][0], row["cosines"][-1]))
    if not falls:
        return None
    numbers = listed(
        (f"{name}, k = {k}: {start:.3f} to {end:.3f}" for name, k, start, end in falls),
        f"Cosine with the exact gradient before training and at its end (a fall counts from {SEEN} on):",
    )
    lower = sum(start - end > SEEN for _, _, start, end in falls)
    return (
        "More iterations are needed late in training.",
        verdict(lower, len(falls)),
        numbers,
    )


def damping_helps(results: Results) -> tuple[str, str, str] | None:
    name, damped, plain = "Transformer, text", "k=3", "k=3, damping 0"
    ours, without = (results.quality.get((name, label)) for label in (damped, plain))
    if ours is None or without is None:
        return None
    numbers = f"{name}, k = 3: held-out loss {ours} with damping, {without} without"
    courses = [results.cosines.get((name, label), {}).get("cosines") for label in (damped, plain)]
    if None not in courses:
        numbers += f"; cosine at the end {courses[0][-1]:.3f} with, {courses[1][-1]:.3f} without"
    return (
        "A Transformer needs damping (the paper: GPT-2 diverges without; here 12 links).",
        "Not confirmed" if without.as_good_as(ours) else "Confirmed",
        f"{numbers}.",
    )


# -- figures --------------------------------------------------------------------------------------------------------


def figures(results: Results, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hwbp"  # the same results give the same file
    from matplotlib import pyplot

    count = len(results.cases)
    if not count:
        return
    how: dict[str, Any] = {"figsize": (3.4 * count, 3.2), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(1, count, **how)
    for case, axis in zip(results.cases, axes[0], strict=True):
        exact = results.quality[case.name, "exact"]
        axis.axhline(exact.mean, color="black", linewidth=1, label="exact")
        axis.axhspan(exact.mean - exact.spread, exact.mean + exact.spread, color="black", alpha=0.1)
        for label, methods in (("Highway-BP", HIGHWAY), ("FPI", FPI)):
            points = [
                (m.iterations, q.mean, q.spread)
                for m in methods
                if (q := results.quality.get((case.name, m.label))) is not None
            ]
            if points:
                ks, means, spreads = zip(*points, strict=True)
                axis.errorbar(ks, means, spreads, marker="o", markersize=4, capsize=3, label=label)
        axis.set(title=case.name, xlabel="k", ylabel=WORDS[case.metric])
    axes[0, 0].legend()
    figure.savefig(folder / "accuracy.svg", metadata={"Date": None})
    pyplot.close(figure)

    figure, axes = pyplot.subplots(1, count, **how)
    for case, axis in zip(results.cases, axes[0], strict=True):
        for i, method in enumerate([*HIGHWAY, *FPI]):
            row = results.cosines.get((case.name, method.label))
            if row is not None:
                style = "--" if method in FPI else "-"
                axis.plot(row["steps"], row["cosines"], style, color=f"C{i}", marker=".", label=method.label)
        axis.set(title=case.name, xlabel="training step", ylabel="cosine with the exact gradient", ylim=(None, 1.02))
    axes[0, 0].legend(fontsize="small")
    figure.savefig(folder / "cosine.svg", metadata={"Date": None})
    pyplot.close(figure)
