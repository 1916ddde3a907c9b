"""The page ``docs/benchmarks/segments.md`` and its figure: quality of the gradient against a step's time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .accuracy_report import SEEN, WORDS, Quality
from .rows import Row, markdown, places, time
from .segments import CASES, CLIP, Case, Way

DRAWN = ("GRU, 64 steps", "GRU, 256 steps")
FIGURE = "segments.svg"


class Results:
    """The rows of the suite, of which any may be missing; of rows measured twice the last counts."""

    def __init__(self, found: list[Row]) -> None:
        self.rows = found
        self.cosines: dict[str, dict[tuple[int, int], Row]] = {}  # case -> (k, S) -> row
        self.times: dict[tuple[str, int], dict[str, Row]] = {}  # case, batch -> run -> row
        self.courses: dict[str, dict[str, dict[int, Row]]] = {}  # case -> run -> seed -> row
        for row in found:
            if row["kind"] == "cosine":
                self.cosines.setdefault(row["case"], {})[row["k"], row["segment"]] = row
            elif row["kind"] == "time":
                self.times.setdefault((row["case"], row["batch"]), {})[row["run"]] = row
            else:
                self.courses.setdefault(row["case"], {}).setdefault(row["run"], {})[row["seed"]] = row

    def cosine(self, case: str, iterations: int, segment: int) -> float | None:
        row = self.cosines.get(case, {}).get((iterations, segment))
        return None if row is None else row["cosine"]

    def quality(self, case: str, run: str) -> Quality | None:
        seeds = self.courses.get(case, {}).get(run)
        if not seeds:
            return None
        found = list(seeds.values())
        return Quality(found[0]["metric"], [row["value"] for row in found])


def section(found: list[Row], folder: Path) -> str | None:
    """``folder``: where the page lies, and the figure beside it."""
    if not found:
        return None
    results = Results(found)
    parts = [
        "## Segments\n\n`python -m benchmarks run --suite segments`. Every model was trained with exact gradients "
        f"(Adam, the examples' schedule, gradients clipped to a norm of {CLIP:g}), because an untrained model would "
        "prove nothing."
    ]
    if figure(results, folder):
        parts.append(f"![Cosine with the exact gradient against the time of a step]({FIGURE})")
    parts += [part for part in (in_short(results), gradients(results), times(results), courses(results)) if part]
    return "\n\n".join(parts)


def in_short(results: Results) -> str:
    """Cosines of trained models at few (k, S)."""
    lines = []
    for case in CASES:
        if case.name in results.cosines:
            quarter = ((1, case.quarter),)
            cells = [short_cell(results.cosines[case.name].get(key)) for key in (*SHORT, *quarter)]
            lines.append((f"{case.name}, {case.length} links", *cells))
    if not lines:
        return ""
    head = (
        "trained models, cosine",
        *(f"k = {k}" + (f", S = {s}" if s > 1 else "") for k, s in SHORT),
        "k = 1, S = L/4",
    )
    return f"In short, for a few pairs (k, S):\n\n{markdown(head, lines)}"


SHORT = ((2, 1), (8, 1), (1, 16), (2, 16))


def short_cell(row: Row | None) -> str:
    return "" if row is None else "exact" if row["exact"] else f"{row['cosine']:.3f}"


# -- tables ---------------------------------------------------------------------------------------------------------


def runs(iterations: int, segment: int) -> int:
    """How often the arithmetic of a backward pass over the states is done: once an iteration at S = 1."""
    return iterations if segment == 1 else iterations + 1


def gradients(results: Results) -> str:
    tables = [table(case, results.cosines[case.name]) for case in CASES if case.name in results.cosines]
    if not tables:
        return ""
    return "\n\n".join([
        "### The gradient of a trained model\n\nThe cosine between the gradient of all parameters and the exact one, "
        "at the trained weights. It is the mean over four held-out batches of 32. The lowest of the four is in "
        "brackets if it is lower by more than 0.01. S = 1 is the paper's algorithm. A run over segments costs as much "
        "arithmetic as one iteration of the paper. Bold figures take at most two runs or iterations. "
        f"{against_the_paper(results)}",
        *tables,
    ])  # fmt: skip


def against_the_paper(results: Results) -> str:
    """Two runs over segments of 16 links beside k = 8 of the paper, counted; cases in which it loses are named."""
    pairs = []
    for case in CASES:
        ours, paper = results.cosine(case.name, 1, 16), results.cosine(case.name, 8, 1)
        if ours is not None and paper is not None and not case.is_exact(1, 16):
            pairs.append((case.name, ours, paper))
    if not pairs:
        return ""
    wins = sum(ours > paper + SEEN for _, ours, paper in pairs)
    lost = [f"{name}: {ours:.3f} against {paper:.3f}" for name, ours, paper in pairs if ours < paper - SEEN]
    words = (
        "Two runs over segments of 16 (k = 1) are nearer to the exact gradient than eight iterations of the paper in "
        f"{wins} of {len(pairs)} cases"
    )
    if alike := len(pairs) - wins - len(lost):
        words += f", and as near (within {SEEN}) in {alike}"
    return f"{words}. Not in {'; '.join(lost)}." if lost else f"{words}."


def table(case: Case, found: dict[tuple[int, int], Row]) -> str:
    ks, sizes = (sorted({key[i] for key in found}) for i in (0, 1))
    lines = [(f"S = {s}", *(cell(found.get((k, s))) for k in ks)) for s in sizes if not all_exact(found, s)]
    any_row = next(iter(found.values()))
    value = f"{any_row['value']:.1%}" if any_row["metric"] == "accuracy" else f"{any_row['value']:.3f}"
    trained = f"{any_row['length']} links, trained to a {WORDS[any_row['metric']].split(',')[0]} of {value}"
    head = ("segment", *(f"k = {k}" for k in ks))
    return f"#### {case.name}\n\n{trained}. {places(list(found.values()))}\n\n{markdown(head, lines)}"


def all_exact(found: dict[tuple[int, int], Row], segment: int) -> bool:
    return all(row["exact"] for (_, s), row in found.items() if s == segment)


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["exact"]:
        return "exact"
    words = f"{row['cosine']:.3f}"
    if min(row["cosines"]) < row["cosine"] - 0.01:
        words += f" ({min(row['cosines']):.3f})"
    return f"**{words}**" if runs(row["k"], row["segment"]) <= 2 else words


def times(results: Results) -> str:
    lines = []
    for case in CASES:
        for (name, batch), group in results.times.items():
            if name != case.name:
                continue
            base = group.get("exact")
            for run, row in group.items():
                cosine = results.cosine(name, row["k"], row["segment"]) if row["k"] is not None else 1.0
                lines.append((
                    f"{name}, batch {batch}" if run == next(iter(group)) else "", run, time(row, "backward"),
                    f"{base['backward_ms'] / row['backward_ms']:.2f}x" if base else "", time(row, "step"),
                    f"{base['step_ms'] / row['step_ms']:.2f}x" if base else "",
                    "" if cosine is None else f"{cosine:.3f}",
                    "" if row["compile_s"] is None else f"{row['compile_s']:.1f}",
                ))  # fmt: skip
    if not lines:
        return ""
    head = ("model", "run", "backward", "ratio", "whole step", "ratio", "cosine", "compile, s")
    found = [row for row in results.rows if row["kind"] == "time"]
    return (
        "### The time of a step\n\nA compiled step of the trained models on a held-out batch; `eager` is plain "
        "PyTorch. Times are in milliseconds. A ratio is the time of `exact`, ordinary backprop compiled with the same "
        "backend, divided by the time to its left: above 1 the run is faster. "
        f"{places(found)}\n\n"
        f"{markdown(head, lines)}"
    )


def courses(results: Results) -> str:
    cases = [case for case in CASES if case.name in results.courses]
    if not cases:
        return ""
    labels = list(dict.fromkeys(way.label for case in cases for way in case.course_ways()))
    lines = []
    for case in cases:
        qualities = {label: results.quality(case.name, label) for label in labels}
        lines.append((f"{case.name}, {unit(case)}", *("" if q is None else told(q) for q in qualities.values())))
    found = [row for row in results.rows if row["kind"] == "course"]
    return (
        "### Trained with these gradients\n\nHeld-out quality at the end of the same short schedule, mean ± standard "
        "deviation over seeds. The same seed gives the same weights and batches to all. "
        f"{places(found)}\n\n{markdown(('model', *labels), lines)}"
    )


def unit(case: Case) -> str:
    return "accuracy" if case.metric == "accuracy" else "loss"


def told(quality: Quality) -> str:
    n = len(quality.values)
    return str(quality) if n > 1 else f"{quality} (one seed)"


# -- the figure -----------------------------------------------------------------------------------------------------


def points(results: Results, case: str) -> list[tuple[Way, float, float, float]]:
    """Way, milliseconds of a step, their interquartile range, cosine: what was both timed and compared."""
    batches = [batch for name, batch in results.times if name == case]
    found = []
    for row in results.times[case, max(batches)].values() if batches else ():
        if row["run"] == "eager":
            continue
        way = Way(row["run"], row["k"], row["segment"])
        cosine = 1.0 if way.iterations is None else results.cosine(case, way.iterations, way.segment)
        if cosine is not None:
            found.append((way, row["step_ms"], row["step_iqr_ms"], cosine))
    return found


def figure(results: Results, folder: Path) -> bool:
    """Whether there is anything to draw."""
    panels = {case: found for case in DRAWN if len(found := points(results, case)) > 1}
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hwbp"  # the same results give the same file
    from matplotlib import pyplot

    how: dict[str, Any] = {"figsize": (4.4 * len(panels), 3.4), "squeeze": False, "layout": "constrained"}
    drawn, axes = pyplot.subplots(1, len(panels), **how)
    for (case, found), axis in zip(panels.items(), axes[0], strict=True):
        ms_of = [ms for _, ms, _, _ in found]
        for label, color, mine in (
            ("exact", "black", [p for p in found if p[0].iterations is None]),
            ("the paper (S = 1)", "C0", [p for p in found if p[0].iterations is not None and p[0].segment == 1]),
            ("segments", "C1", [p for p in found if p[0].iterations is not None and p[0].segment > 1]),
        ):
            if not mine:
                continue
            ways, ms, spread, cosines = zip(*mine, strict=True)
            half = [s / 2 for s in spread]
            axis.errorbar(ms, cosines, xerr=half, fmt="o", color=color, markersize=5, capsize=2, label=label)
            for way, x, y in zip(ways, ms, cosines, strict=True):
                near = (0 < other - y < 0.08 and abs(at - x) < 0.3 * max(ms_of) for _, at, _, other in found)
                below = 0.97 < y < 1 or any(near)  # `exact`, and what lies close above, is labelled above
                place = {"xytext": (0, -12 if below else 6), "textcoords": "offset points", "ha": "center"}
                axis.annotate(way.label, (x, y), fontsize="x-small", **place)
        middle = statistics.median(ms for _, ms, _, _ in found)
        axis.set(title=f"{case}, trained", xlabel="milliseconds of a step", ylabel="cosine with the exact gradient")
        axis.set(xlim=(0, max(1.2 * max(ms for _, ms, _, _ in found), 1.5 * middle)), ylim=(0, 1.12))
    axes[0, 0].legend(fontsize="small", loc="lower right")
    drawn.savefig(folder / FIGURE, metadata={"Date": None})
    pyplot.close(drawn)
    return True
