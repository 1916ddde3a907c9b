"""The page ``docs/benchmarks/auto.md``: quality, cosines during training, and the time of a step."""

from __future__ import annotations

from pathlib import Path

from .accuracy_report import Quality
from .auto import CHECK_EVERY, OWN, RUNS
from .rows import Row, markdown, places, time
from .segments_report import told, unit

FIGURE = "auto.svg"
LEAST = 0.95
EXACT = "exact backprop"
AUTO = 'iterations="auto"'


def section(found: list[Row], folder: Path) -> str | None:
    """``folder`` is the folder of the page and of the figure."""
    if not found:
        return None
    parts = [
        "## The default options\n\n`python -m benchmarks run --suite auto`. With the default options, k and S are "
        '"auto": they are [chosen while the model trains](../choosing.md#leave-it-alone-auto). This page calls such a '
        f"run `{AUTO}`, and compares it with exact backprop. Models, seeds and batches are those of "
        f"[segments](segments.md). Checks happen at every {CHECK_EVERY}th step, because these trainings are short."
    ]
    courses = [row for row in found if row["kind"] == "course"]
    if figure(courses, folder):
        parts.append(f"![Cosine of the form in use with the exact gradient, at every check]({FIGURE})")
    parts += [part for part in (quality(courses), times([row for row in found if row["kind"] == "time"])) if part]
    return "\n\n".join(parts)


def quality(courses: list[Row]) -> str:
    """One line per case: what both runs reach, which forms were in use, and how good those were."""
    lines = []
    for case in OWN:
        runs = {run: [r for r in courses if r["case"] == case.name and r["run"] == run] for run in RUNS}
        if not all(runs.values()):
            continue
        reached = (told(Quality(case.metric, [row["value"] for row in rows])) for rows in runs.values())
        lines.append((f"{case.name}, {unit(case)}", *reached, *forms(runs["auto"])))
    if not lines:
        return ""
    head = (
        "model",
        *map(shown, RUNS),
        "form in use at the checks",
        "least cosine of it",
        f"checks in a row below {LEAST:g}, at most",
    )
    return (
        "### Trained with the defaults\n\nHeld-out quality, mean ± standard deviation over seeds. If nothing is "
        f"expected to be faster, `{AUTO}` is exact backprop. {places(courses)}\n\n{markdown(head, lines)}"
    )


def shown(run: str) -> str:
    """The name of a run on the page."""
    return f"`{AUTO}`" if run == "auto" else run


def forms(auto: list[Row]) -> tuple[str, str, str]:
    """Which forms were in use and how often, over all seeds; the smallest cosine; the longest time below ``LEAST``."""
    shares: dict[str, int] = {}
    used: list[list[float]] = []
    for row in auto:
        used.append([cosine for *_, cosine, trains in row["checks"] if trains])
        for _, k, segment, _, trains in row["checks"]:
            if trains:
                name = f"k={k}, S={segment}"
                shares[name] = shares.get(name, 0) + 1
        checks = len({step for step, *_ in row["checks"]})
        shares[EXACT] = shares.get(EXACT, 0) + checks - len(used[-1])
    total = sum(shares.values())
    if not total:
        return EXACT, "", ""
    listed = ", ".join(f"{name} {n / total:.0%}" for name, n in sorted(shares.items(), key=lambda s: -s[1]) if n)
    if not any(used):
        return listed, "", ""
    return listed, f"{min(c for each in used for c in each):.3f}", str(max(map(longest_below, used)))


def longest_below(cosines: list[float]) -> int:
    longest = here = 0
    for cosine in cosines:
        here = here + 1 if cosine < LEAST else 0
        longest = max(longest, here)
    return longest


def times(found: list[Row]) -> str:
    cases = list(dict.fromkeys(row["case"] for row in found))
    lines: list[tuple[object, ...]] = []
    checked = []
    for case in cases:
        runs = {row["run"]: row for row in found if row["case"] == case}
        others = min(row["step_ms"] for run, row in runs.items() if run != "auto")
        ratio = f"{others / runs['auto']['step_ms']:.2f}x"
        check = runs["auto"].get("checked_ms")  # rows before 2026-11-30 timed some steps that were not checks
        batch, length = runs["auto"]["batch"], runs["auto"]["length"]
        cells = (time(row, "step") for row in runs.values())
        checked.append("" if check is None else f"{check:.1f}")
        lines.append((case, batch, length, *cells, ratio))
    if not lines:
        return ""
    head = ("model", "batch", "links", *map(shown, runs), "ratio")
    if any(checked):
        head, lines = (*head, "a check"), [(*line, ms) for line, ms in zip(lines, checked, strict=True)]
    return (
        "### A step\n\nMilliseconds of forward and backward pass at initialisation, median (interquartile range). "
        f"Steps with `{AUTO}` are timed between two checks. A ratio is the fastest other time divided by that of "
        f"`{AUTO}`: above 1 the default options are faster. {places(found)}\n\n{markdown(head, lines)}"
    )


def figure(courses: list[Row], folder: Path) -> bool:
    """Draw the figure. Returns whether there is anything to draw."""
    drawn = [row for row in courses if any(trains for *_, trains in row["checks"])]
    cases = list(dict.fromkeys(row["case"] for row in drawn))
    if not cases:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hwbp"  # the same results give the same file
    from matplotlib import pyplot

    made, axes = pyplot.subplots(
        1, len(cases), figsize=(3.2 * len(cases), 3.0), squeeze=False, sharey=True, layout="constrained"
    )
    for case, axis in zip(cases, axes[0], strict=True):
        for row in drawn:
            if row["case"] == case:
                points = [(step, cosine) for step, _, _, cosine, trains in row["checks"] if trains]
                axis.plot(*zip(*points, strict=True), marker=".", linewidth=0.8, label=f"seed {row['seed']}")
        axis.axhline(0.99, color="black", linewidth=0.6, linestyle="--")
        axis.set(title=case, xlabel="step")
    axes[0, 0].set(ylabel="cosine of the form in use")
    axes[0, 0].legend(fontsize="small")
    made.savefig(folder / FIGURE, metadata={"Date": None})
    pyplot.close(made)
    return True
