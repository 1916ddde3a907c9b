"""Committed results -> ``docs/benchmarks/`` and the tables of the READMEs: ``python -m benchmarks report``"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import accuracy_report, auto_report, beyond_report, decisions_report, paper, segments_report
from .against_exact import EXACT_RUNS, Claim, Duel, best_last, claim, duel, plot
from .harness import ROOT, say
from .rows import FOLDER, Row, by, doubtful, markdown, places, time

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
EXAMPLES = ROOT / "examples" / "README.md"
START, END = "<!-- results: python -m benchmarks report -->", "<!-- end of results -->"


def rows(suite: str) -> list[Row]:
    """All committed rows of a suite, of every device."""
    found: list[Row] = []
    for path in sorted(RESULTS.glob(f"{suite}-*.jsonl")):
        if "-quick" not in path.name:
            found += [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return found


def write() -> None:
    """Rewrite the pages, and what stands between the two marks in README.md and examples/README.md."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    written = []
    for page in PAGES:
        text = page.section()
        if text:
            written.append(page)
            whole = as_page(text, worst_and_best(page.name))
            (FOLDER / f"{page.name}.md").write_text(whole + "\n", encoding="utf-8")
    (FOLDER / "index.md").write_text(index(written) + "\n", encoding="utf-8")
    between_marks(README, in_short())
    between_marks(EXAMPLES, expected())
    names = (FOLDER / "index.md", *(FOLDER / f"{page.name}.md" for page in written), README, EXAMPLES)
    say(f"written: {', '.join(str(path.relative_to(ROOT)) for path in names)}")


def as_page(section: str, cases: str = "") -> str:
    """A section as a page: the plots right below its title, and every heading one level up. ``cases`` come before the
    first heading after the title.
    """
    title, *blocks = section.split("\n\n")
    plots = [block for block in blocks if block.startswith("![")]
    rest = [re.sub(r"^##", "#", block) for block in blocks if not block.startswith("![")]
    if cases:
        first = next((i for i, block in enumerate(rest) if block.startswith("#")), len(rest))
        rest.insert(first, cases)
    return "\n\n".join([title.removeprefix("#"), *plots, *rest])


def between_marks(path: Path, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    before, _, rest = whole.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{path.name} lacks the marks {START!r} and {END!r}")
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


HEAD = """# Benchmarks

Each row is a claim. Most compare the time of a training step with the **best exact alternative**: the fastest way to
get the exact gradient that was measured in the same run. Their figure is a ratio, in the worst case and in the best.
Above 1 this backend is faster. Losing cases are listed like winning ones, here and on every page.

`k = 2` rewrites every chain. `k = 2, profitable` rewrites only what is expected to become faster. The
[glossary](../glossary.md) explains the words."""

HOW = """## How it was measured

- `python -m benchmarks run --suite NAME` measures a suite again. The name stands above each table.
- `python -m benchmarks report` writes all these pages from `benchmarks/results/`.
- All competitors of a table ran in one process and took turns.
- Times are medians, with the interquartile range in brackets. If that range is more than half of the median, the
  machine was disturbed. A question mark says so, and ratios in that row are only a hint. The tables above leave such
  cases out.
- Every table names its machine, version of torch and commit."""


def ratio(row: Row, what: str) -> str:
    return f"{row[f'{what}_ratio']:.2f}x" if f"{what}_ratio" in row else ""


def shown(row: Row) -> str:
    return SHOWN.get(row["run"], row["run"])


def memory(row: Row, group: list[Row]) -> str:
    """Megabytes, of a table in which all are known. What a process resides in, which some suites read on a CPU, misses
    what its allocator has kept from before: a table with a zero in it is no measurement."""
    if any(r.get("peak_memory_mb") is None or r["peak_memory_mb"] <= 0 for r in group):
        return ""
    return f"{row['peak_memory_mb']:.1f}"


def compiling(row: Row) -> str:
    """Seconds of the first call, cold and (where it was measured) from warm caches; nothing where a suite was compiled
    ahead."""
    if "compile_s" in row:
        cold = row["compile_s"]
    else:
        parts = row["compile_forward_s"], row["compile_backward_s"]
        cold = None if None in parts else sum(parts)
    if cold is None:
        return ""
    warm = row.get("compile_warm_s")
    return f"{cold:.1f}" if warm is None else f"{cold:.1f} / {warm:.1f}"


# -- sections -------------------------------------------------------------------------------------------------------


def deep() -> str | None:
    found = rows("deep")
    if not found:
        return None
    parts = [
        "## Unrolled chains\n\n`python -m benchmarks run --suite deep`. Models whose links are all "
        "written out in the graph, compiled with this backend and with stock Inductor.\n\n"
        "- **Baseline**: `torch.compile` with Inductor, the run `inductor`.\n"
        f"{READING}\n"
        "- **Cosine**: of the gradient of all parameters with the exact one, at initialisation.\n"
        f"- **Compile**: seconds of the first call, cold and, where it was measured, from warm caches. {SHARED}",
        f"### In short\n\n{deep_in_short()}",
    ]
    if plot(deep_duels(), FOLDER / "unrolled.svg"):
        parts.append("![Step time against Inductor](unrolled.svg)")
    for (case, why, _), group in by(found, "case", "why", "device").items():
        lines = [
            (
                shown(r), time(r, "backward"), f"{r['backward_ratio']:.2f}x", time(r, "step"),
                f"{r['step_ratio']:.2f}x", f"{r['cosine']:.4f}",
                compiling(r),
                memory(r, group),
            )
            for r in group
        ]  # fmt: skip
        head = ("run", *BACKWARD_AND_STEP, "cosine", "compile, cold / warm", "peak MB")
        parts.append(f"### {case}\n\n{why}. {places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


# Runs as the pages call them, where the rows call them otherwise. The rows' "auto" is older than ``iterations="auto"``.
SHOWN = {"auto": "k=2, profitable"}

READING = """\
- **Runs**: `k=2` rewrites every chain (`rewrite="always"`). `k=2, profitable` rewrites only chains that are expected to
  become faster (`rewrite="profitable"`, the default of that option). `fpi` is fixed-point iteration (damping 1).
- **Times**: in milliseconds. A ratio is the baseline's time divided by the time to its left: above 1 the run is faster
  than the baseline."""

OWN_EXACT = "- **The run `exact`**: ordinary backprop, compiled with this backend."

BACKWARD_AND_STEP = ("backward", "ratio", "whole step", "ratio")

SHARED = (
    "A cold compilation is the first one of its program. C++ that two programs share (mostly that of the forward pass) "
    "is compiled only once, for Inductor's program, which comes first. So the seconds of all others are too low."
)

RECURRENT = ("kind", "batch", "hidden", "steps", "layers", "dtype", "matmul", "device")


def recurrent_rows() -> list[Row]:
    """In the order of the suite, whenever they were measured."""
    kinds = ("GRU", "LSTM", "RNN")
    found = [{"layers": 1, "dtype": "float32", "matmul": "highest"} | row for row in rows("recurrent")]
    return sorted(
        found, key=lambda r: (r["device"], kinds.index(r["kind"]), r["layers"], r["steps"], r["batch"], r["dtype"])
    )


def case_of(row: Row, mark: str = "") -> str:
    """In words."""
    layers = f" of {row['layers']} layers" if row["layers"] > 1 else ""
    precision = "" if row["device"] == "cpu" else f", {precision_of(row)}"
    shape = f"batch {row['batch']}, hidden {row['hidden']}, {row['steps']} steps"
    return f"{mark}{row['kind']}{mark}{layers}, {shape}{precision}"


def precision_of(row: Row) -> str:
    return "float32 (TF32)" if row["matmul"] == "high" else row["dtype"]


def recurrent() -> str | None:
    found = recurrent_rows()
    if not found:
        return None
    parts = [
        "## Recurrent modules\n\n`python -m benchmarks run --suite recurrent`. `nn.GRU`, `nn.LSTM` and `nn.RNN`, "
        "compiled with this backend and in eager mode.\n\n"
        "- **Baseline**: eager mode, the run `eager`, because stock `torch.compile` leaves these modules to it. On a "
        "GPU that is cuDNN, which rounds float32 products to TF32 by default. Ours does so where the table says TF32 "
        '(`torch.set_float32_matmul_precision("high")`).\n'
        f"{READING} The forward and the backward pass are timed to their ends, so on a GPU both include the time that "
        "Python takes to launch them.\n"
        f"{OWN_EXACT}\n"
        "- **Cosine**: of the weights' gradient with the exact one, at initialisation.\n"
        "- **Compile**: seconds of the first call, cold (except for C++ that an earlier run of the same table has "
        "compiled) and from warm caches.",
        f"### In short\n\nThe fastest run of each row is in bold.\n\n{recurrent_in_short()}",
    ]
    for device, words in (("cpu", "CPU"), ("cuda", "GPU")):
        if plot(recurrent_duels(device), FOLDER / f"recurrent-{device}.svg"):
            parts.append(f"![Step time against the best exact alternative, {words}](recurrent-{device}.svg)")
    for _, group in by(found, *RECURRENT).items():
        lines = [
            (
                shown(r), time(r, "forward"), time(r, "backward"), ratio(r, "backward"), time(r, "step"),
                ratio(r, "step"), f"{r['cosine']:.5f}",
                compiling(r),
                "" if r["peak_memory_mb"] is None else f"{r['peak_memory_mb']:.0f}",
            )
            for r in group
        ]  # fmt: skip
        head = ("run", "forward", *BACKWARD_AND_STEP, "cosine", "compile, cold / warm", "peak MB")
        parts.append(f"### {case_of(group[0])}\n\n{places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def cells() -> str | None:
    found = sorted(rows("cells"), key=lambda r: (r["device"], r["length"]))
    if not found:
        return None
    parts = [
        "## Cells of one's own\n\n`python -m benchmarks run --suite cells`. `hwbp_compiler.recurrent` against the same "
        "loop written in Python.\n\n"
        "- **Baseline**: the Python loop in eager mode, the run `eager`. `inductor` is the same loop compiled by stock "
        "Inductor, which unrolls it.\n"
        f"{READING}\n{OWN_EXACT}\n"
        "- **Cosine**: of the gradient of all parameters with that of eager mode, at initialisation.\n"
        "- **First call**: in seconds. It compiles nothing if a cell of the same code and sizes has run at another "
        "length before.\n\n"
        "**A LayerNorm in the cell needs a larger k, or a smaller gain.** It scales what comes from the state to size "
        "1, however small the weights are. So much of an untrained cell's gradient goes through the blocks. The low "
        "cosines of the LayerNorm-GRU are those of w^k as the paper defines it, with the update gate as K "
        "(`tests/test_any_cell.py` compares with the definition). If the gain starts at 0.1, the same cell has the "
        "cosines of a GRU without a norm."
    ]
    if plot(cells_duels(), FOLDER / "cells.svg"):
        parts.append("![Step time against the best exact alternative](cells.svg)")
    for (case, batch, hidden, length, _), group in by(found, "case", "batch", "hidden", "length", "device").items():
        eager = next(r for r in group if r["run"] == "eager")
        lines = [
            (
                shown(r), time(r, "backward"), f"{eager['backward_ms'] / r['backward_ms']:.2f}x", time(r, "step"),
                f"{eager['step_ms'] / r['step_ms']:.2f}x", f"{r['cosine']:.5f}",
                "" if r["run"] == "eager" else f"{r['compile_s']:.0f}",
            )
            for r in group
        ]  # fmt: skip
        head = ("run", *BACKWARD_AND_STEP, "cosine", "first call")
        title = f"{case}, batch {batch}, hidden {hidden}, {length} steps"
        parts.append(f"### {title}\n\n{places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def loops() -> str | None:
    found = sorted(rows("loops"), key=lambda r: (r["device"], r["case"], r["batch"], r["length"]))
    if not found:
        return None
    parts = [
        "## Python loops over time\n\n`python -m benchmarks run --suite loops`. A loop over a cell, hidden 64, in "
        "eager mode, compiled by stock Inductor (to 256 steps), and rolled up again; `module` is `nn.GRU` or "
        "`nn.LSTM` in eager mode. Compile: seconds of the first step, cold, less those in which Dynamo traces the "
        "loop, which are the same for every backend. Whole training steps, in milliseconds. *Called often*: after so "
        "many steps that a short loop runs in one C++ call, as longer ones do from the first call. "
        "The cosine is that of untrained weights; [quality](quality.md) has trained ones."
    ]
    for (case, batch, _), cases in by(found, "case", "batch", "device").items():
        lines = []
        for (length,), group in by(cases, "length").items():
            eager = next(r for r in group if r["run"] == "eager")
            for r in group:
                own = "" if r["compile_s"] is None else f"{r['compile_s'] - r['traced_s']:.1f}"
                traced = "" if r["traced_s"] is None else f"{r['traced_s']:.1f}"
                quick = f"{eager['step_ms'] / r['step_ms']:.2f}x"
                lines.append((str(length), r["run"], time(r, "step"), quick, f"{r['cosine']:.5f}", traced, own))
        head = ("steps", "run", "whole step", "ratio", "cosine", "Dynamo, s", "compile, s")
        parts.append(f"### {case}, batch {batch}\n\n{places(cases)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def engines() -> str | None:
    found = rows("engines")
    if not found:
        return None
    lines, worst = [], 0.0
    for (name, how), group in by(found, "name", "how").items():
        module, loop = (next(r for r in group if r["run"] == run) for run in ("module", "loop"))
        ratio = loop["backward_ms"] / module["backward_ms"]
        worst = max(worst, ratio)
        memory = f"{module['peak_mb']:.1f} / {loop['peak_mb']:.1f}"
        lines.append((name, how, time(module, "backward"), time(loop, "backward"), f"{ratio:.2f}x", memory))
    head = ("layer", "gradient", "own formulas, backward", "loop engine, backward", "ratio", "peak MB: own / loop")
    return (
        f"## One engine or two\n\n`python -m benchmarks run --suite engines`. {places(found)}\n\n"
        "`nn.GRU` and `nn.LSTM` have an operator and formulas of their own. Any other cell goes through the loop "
        "engine. This table shows what one engine for both would cost: the ratio is the loop engine's time divided by "
        f"that of the own formulas, {worst:.2f}x in the worst case.\n\n{markdown(head, lines)}"
    )


def compile_time() -> str | None:
    found = rows("compile")
    if not found:
        return None
    lines = [
        (r["case"], r["size"], r["nodes_before"], r["nodes_after"], r["backward_before"], r["backward_after"],
         f"{r['pass_s']:.2f}")
        for r in found
    ]  # fmt: skip
    head = ("model", "links", "nodes before", "after", "of the backward pass: before", "after", "pass, seconds")
    return (
        f"## The rewriting pass\n\n`python -m benchmarks run --suite compile`. {places(found)}\n\n"
        f"{markdown(head, lines)}\n\n"
        "Nodes of the backward pass are operators on gradients. Operators that only take a row out of a stack "
        "(`select`) are not counted."
    )


def scaling() -> str | None:
    from .scaling import AXES

    curves = list(AXES)  # in their order, whenever they were measured
    found = sorted(rows("scaling"), key=lambda r: (r["device"], curves.index(r["curve"]), r["size"]))
    if not found:
        return None
    draw_scaling(found)
    lines = []
    for (curve, axis, size), group in by(found, "curve", "axis", "size").items():
        runs = {r["run"]: r for r in group}
        two, stock = runs["k=2"], runs["inductor"]
        auto = "rewritten" if runs["auto"]["cosine"] < 1 - 1e-9 else "exact"
        compiling = " / ".join(f"{r['compile_forward_s'] + r['compile_backward_s']:.1f}" for r in (stock, two))
        ratio = f"{two['step_ratio']:.2f}x"
        lines.append((curve, f"{size} {axis}", time(stock, "step"), time(two, "step"), ratio, auto, compiling))
    head = ("model", "size", "Inductor, step", "k = 2, step", "ratio", DEFAULT, "compile, s: Inductor / k = 2")
    return (
        f"## Scaling\n\n`python -m benchmarks run --suite scaling`. {places(found)}\n\n"
        f"The step of `k = 2` rewrites every chain. The column `{DEFAULT}` says what becomes of the chain with "
        '`rewrite="profitable"`, the default of that option. Steps are in milliseconds. A ratio is Inductor\'s time '
        "divided by that of k = 2: above 1 k = 2 is faster. Inductor does not compile `nn.GRU`, but leaves it to "
        "PyTorch's own kernels.\n\n"
        f"{SHARED} One program is part of several curves (32 blocks, width 64, batch 8). It is compiled only in the "
        "first.\n\n"
        f"![Step and compile time against size](scaling.svg)\n\n{markdown(head, lines)}"
    )


def scan() -> str | None:
    found = rows("scan")
    if not found:
        return None
    parts = [
        "## The scan\n\n`python -m benchmarks run --suite scan`. float32, along the first dimension, multipliers of "
        "the values' shape. The baseline is a copy that moves the same number of bytes as a scan. It allocates its "
        "output, as all others do. The copy writes as much as it reads, and a scan writes half as much as it reads. So "
        "a scan can be faster if new memory is slow to get."
    ]
    for (shape, _), group in by([r | {"shape": tuple(r["shape"])} for r in found], "shape", "device").items():
        lines = [
            (r["run"], r["not_run"], "", "", "")
            if "not_run" in r
            else (
                r["run"],
                time(r, "run"),
                f"{r['gb_per_s']:.1f}",
                f"{r['least_ms']:.2f}",
                f"{100 * r['of_copy']:.0f} % ({100 * r['of_copy_least']:.0f} %)",
            )
            for r in group
        ]
        head = ("run", "milliseconds", "GB/s", "least, ms", "of the copy's bandwidth (of the least times)")
        parts.append(f"### {list(shape)}\n\n{places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def draw_scaling(found: list[Row]) -> None:
    """Step time (solid) and compile time (dotted) against size, one panel a curve."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hwbp"  # the same results give the same file
    from matplotlib import pyplot

    curves = by(found, "curve", "axis")
    columns = min(4, len(curves))
    lines = -(-len(curves) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(curves) :]:
        panel.set_visible(False)
    for ((curve, axis), group), panel in zip(curves.items(), axes.flat, strict=False):
        for i, run in enumerate(("inductor", "k=2")):
            points = sorted(
                (r["size"], r["step_ms"], 1e3 * (r["compile_forward_s"] + r["compile_backward_s"]))
                for r in group if r["run"] == run
            )  # fmt: skip
            sizes, steps, compiling = zip(*points, strict=True)
            panel.loglog(sizes, steps, color=f"C{i}", marker="o", markersize=4, label=f"{run}, step")
            panel.loglog(sizes, compiling, ":", color=f"C{i}", marker=".", label=f"{run}, cold compile")
        panel.set_title(curve, fontsize="medium")
        panel.set(xlabel=axis, ylabel="ms")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(FOLDER / "scaling.svg", metadata={"Date": None})
    pyplot.close(figure)


def accuracy() -> str | None:
    return accuracy_report.section(rows("accuracy"), FOLDER)


def segments() -> str | None:
    return segments_report.section(rows("segments"), FOLDER)


def auto() -> str | None:
    return auto_report.section(rows("auto"), FOLDER)


def decided() -> str | None:
    return decisions_report.section(rows)


def beyond() -> str | None:
    return beyond_report.section(rows("beyond"))


def papers_own() -> str:
    lines: list[tuple[object, ...]] = []
    for case, (exact, highway, fixed_point) in paper.STEP_MS.items():
        lines.append((case, exact, "Highway-BP", *(f"{ms} ({exact / ms:.1f}x)" for ms in highway)))
        lines.append(("", "", "FPI", *(f"{ms} ({exact / ms:.1f}x)" for ms in fixed_point)))
        lines += ours_beside(case)
    table = markdown(("model", "backprop", "method", *(f"k = {k}" for k in paper.ITERATIONS)), lines)
    return (
        "## The paper's own figures\n\n"
        "Fagnou et al., ICLR 2025, Table 6: milliseconds of a training step on an NVIDIA GPU (A100, A40 or RTX A6000), "
        "batch 128, hidden size 512 (256 steps) or 64 (1024 steps). The ratio to the paper's own sequential backprop "
        "is in brackets. Our figures are below the paper's. They are from the tables of [recurrent "
        "modules](recurrent.md): the recurrent layers alone, without embedding and head, on the GPU named there, with "
        "the ratio to cuDNN's backprop. GPU and baseline differ from the paper's, so neither milliseconds nor ratios "
        f"can be compared directly.\n\n{table}"
    )


def ours_beside(case: str) -> list[tuple[object, ...]]:
    kind, layers, steps = paper.CASES[case]
    found = [r for r in recurrent_rows() if r["device"] == "cuda" and precision_of(r) != "float32"]
    lines: list[tuple[object, ...]] = []
    for _, group in by(found, *RECURRENT).items():
        runs = {r["run"]: r for r in group}
        eager = runs["eager"]
        if (eager["kind"], eager["layers"], eager["steps"]) == (kind, layers, steps):
            every = [runs.get(f"k={k}") for k in paper.ITERATIONS]
            told = ("" if r is None else f"{r['step_ms']:.1f} ({r['step_ratio']:.1f}x)" for r in every)
            lines.append(("", f"{eager['step_ms']:.1f}", f"ours, {precision_of(eager)}", *told))
    return lines


def expected() -> str:
    return accuracy_report.in_short(rows("accuracy"))


# -- ours against the best exact alternative ------------------------------------------------------------------------

K2, SEGMENTED, DEFAULT, OUR_EXACT = "k = 2", "k = 1, S = 16", "k = 2, profitable", "exact backprop"
OF_RUN = {"k=2": K2, "k=1, S=16": SEGMENTED, "auto": DEFAULT, "exact": OUR_EXACT}
CHOSEN = '`iterations="auto"`, between two checks'  # the run "auto" of the suite of that name


def duels(
    groups: Iterator[tuple[str, dict[str, Row]]], *runs: str, names: dict[str, str] = OF_RUN
) -> dict[str, list[Duel]]:
    """For each of ``runs``, by its name in ``names``, what it is compared with in every group. Exact backprop compiled
    with this backend is an alternative to what is approximate, and is itself compared with what is not ours."""
    found: dict[str, list[Duel]] = {names[run]: [] for run in runs}
    for case, group in groups:
        known = dict(EXACT_RUNS)
        if next(iter(group.values()))["device"] == "cuda":
            known["eager"] = "cuDNN"
        for run in runs:
            others = {name: words for name, words in known.items() if run != "exact" or name != "exact"}
            met = duel(case, group, run, others)
            if met is not None and (run == "exact" or not exact_whatever_k(group)):
                found[names[run]].append(met)
    return found


def exact_whatever_k(group: dict[str, Row]) -> bool:
    """A chain whose blocks are empty (a linear recurrence), or no chain at all: k = 2 is the exact gradient."""
    least = group.get("k=0") or group.get("k=2") or group.get("auto", {})
    return least.get("cosine", 0.0) > 1 - 1e-7


def recurrent_duels(device: str, kinds: tuple[str, ...] = ("GRU", "LSTM", "RNN")) -> dict[str, list[Duel]]:
    def groups() -> Iterator[tuple[str, dict[str, Row]]]:
        for _, group in by(recurrent_rows(), *RECURRENT).items():
            if group[0]["device"] == device and group[0]["kind"] in kinds:
                yield case_of(group[0], "`").replace("`", "`nn.", 1), {r["run"]: r for r in group}

    return duels(groups(), "k=2", "k=1, S=16", "auto", "exact")


def cells_duels() -> dict[str, list[Duel]]:
    def groups() -> Iterator[tuple[str, dict[str, Row]]]:
        keys = ("case", "batch", "hidden", "length", "device")
        for (case, batch, hidden, length, _), group in by(rows("cells"), *keys).items():
            yield f"`recurrent`, {case}, batch {batch}, hidden {hidden}, {length} steps", {r["run"]: r for r in group}

    return duels(groups(), "k=2", "auto", "exact")


def deep_duels() -> dict[str, list[Duel]]:
    groups = ((case, {r["run"]: r for r in group}) for (case, _), group in by(rows("deep"), "case", "device").items())
    return duels(groups, "k=2", "auto")


def scaling_duels() -> dict[str, list[Duel]]:
    """Without `nn.GRU`: its exact form was not measured in this suite, and Inductor does not compile it."""
    found = [r for r in rows("scaling") if not r["case"].startswith("nn.")]
    groups = ((case, {r["run"]: r for r in group}) for (case, _), group in by(found, "case", "device").items())
    return duels(groups, "k=2")


def segments_duels() -> dict[str, list[Duel]]:
    found = [r for r in rows("segments") if r["kind"] == "time"]
    names = {"k=2, S=1": "k=2", "k=1, S=16": "k=1, S=16"}
    groups = (
        (f"{case}, batch {batch}, trained", {names.get(r["run"], r["run"]): r for r in group})
        for (case, batch, _), group in by(found, "case", "batch", "device").items()
    )
    return duels(groups, "k=2", "k=1, S=16")


def auto_duels() -> dict[str, list[Duel]]:
    found = [r for r in rows("auto") if r["kind"] == "time"]
    groups = (
        (case if "batch" in case else f"{case}, batch {batch}", {r["run"]: r for r in group})
        for (case, batch, _), group in by(found, "case", "batch", "device").items()
    )
    return duels(groups, "auto", names={"auto": CHOSEN})


def scan_duels() -> dict[str, list[Duel]]:
    """The scan itself, on each device, beside other implementations of the same scan."""
    found: dict[str, list[Duel]] = {}
    general = ("Hillis-Steele compiled", "associative_scan compiled", "Python loop", "assoc-scan", "accelerated-scan")
    measured = [r | {"shape": tuple(r["shape"])} for r in rows("scan") if "not_run" not in r]
    for (shape, device), group in by(measured, "shape", "device").items():
        runs = {r["run"]: r for r in group}
        ours = {"linear_scan": general, "linear_scan compiled": general, "linear_scan, K = 1": ("torch.cumsum, K = 1",)}
        for run, others in ours.items():
            met = duel(f"{run}, {list(shape)}", runs, run, {name: name for name in others}, "run")
            if met is not None:
                found.setdefault(device, []).append(met)
    return found


MODULES = "Recurrent modules on a {}"
CELLS = "Cells of one's own"
CHAINS = "Unrolled chains"
TRAINED = "Trained models"
DEFAULTS = "The default options"
SCAN = "The scan"
PASS = "The rewriting pass"


def claims() -> list[Claim]:
    """Of every suite, by topic, in the order of the pages."""
    found: list[Claim | None] = []
    for device, words in (("cpu", "CPU"), ("cuda", "GPU")):
        topic = MODULES.format(words)
        for kind in ("GRU", "LSTM"):
            met = recurrent_duels(device, (kind,))
            for form in (K2, SEGMENTED, DEFAULT):
                found.append(claim(topic, f"`nn.{kind}`, {form}", met[form], "recurrent", "recurrent"))
        exact = recurrent_duels(device)[OUR_EXACT]
        found.append(claim(topic, f"all modules, {OUR_EXACT}", exact, "recurrent", "recurrent"))
    for form, met in cells_duels().items():
        found.append(claim(CELLS, f"`recurrent`, {form}", met, "cells", "cells"))
    for form, met in deep_duels().items():
        found.append(claim(CHAINS, f"all models, {form}", met, "deep", "unrolled"))
    found.append(claim(CHAINS, f"many sizes, {K2}", scaling_duels()[K2], "scaling", "scaling"))
    found += quality_claims()
    for form, met in segments_duels().items():
        found.append(claim(TRAINED, f"a step, {form}", met, "segments", "segments"))
    found.append(cosine_claim())
    for form, met in auto_duels().items():
        found.append(claim(DEFAULTS, f"a step, {form}", met, "auto", "auto"))
    for device, met in scan_duels().items():
        found.append(claim(SCAN, f"`linear_scan` on a {'CPU' if device == 'cpu' else 'GPU'}", met, "scan", "scan"))
    found.append(pass_claim())
    return [each for each in found if each is not None]


def quality_claims() -> list[Claim]:
    """Held-out quality at k = 3 beside exact backprop's: where ours is most behind, and where most ahead."""
    results = accuracy_report.Results(rows("accuracy"))
    met = []
    for case in results.cases:
        ours, exact = (results.quality.get((case.name, run)) for run in ("k=3", "exact"))
        if ours is not None and exact is not None:
            better = ours.mean - exact.mean if accuracy_report.HIGHER_IS_BETTER[ours.metric] else exact.mean - ours.mean
            # In standard deviations, since accuracies and losses have no unit in common.
            words = f"{accuracy_report.WORDS[ours.metric].split(',')[0]}, {case.name}"
            met.append((better / max(ours.spread, exact.spread, 1e-9), words, f"{ours} against {exact}"))
    devices = ", ".join(dict.fromkeys(r["device_name"] for r in rows("accuracy")))
    ranked = {"worst": min(met), "best": max(met)} if met else {}
    found = []
    for which, (_, words, told) in ranked.items():
        what, of = f"{words}, k = 3 against exact", f"the {which} of {len(met)}"
        found.append(Claim(TRAINED, what, told, of, devices, "accuracy", "quality"))
    return found


def cosine_claim() -> Claim | None:
    """The gradient of trained models at k = 1, S = 16, where that is not ordinary backprop."""
    found = [r for r in rows("segments") if r["kind"] == "cosine" and not r["exact"]]
    found = [r for r in found if (r["k"], r["segment"]) == (1, 16)]
    if not found:
        return None
    ranked = sorted(found, key=lambda r: r["cosine"])
    worst, best = (f"{r['cosine']:.3f} ({r['case']})" for r in (ranked[0], ranked[-1]))
    devices = ", ".join(dict.fromkeys(r["device_name"] for r in found))
    what = f"cosine with the exact gradient, {SEGMENTED}"
    return Claim(TRAINED, what, f"{worst} to {best}", f"{len(found)} models", devices, "segments", "segments")


def pass_claim() -> Claim | None:
    found = sorted(rows("compile"), key=lambda r: r["pass_s"])
    if not found:
        return None
    best, worst = (f"{r['pass_s']:.2f} s ({r['case']}, {r['size']} links)" for r in (found[0], found[-1]))
    devices = ", ".join(dict.fromkeys(r["device_name"] for r in found))
    what = "seconds that it adds to a compilation"
    return Claim(PASS, what, f"{worst} to {best}", f"{len(found)} graphs", devices, "compile", "pass")


# -- pages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    name: str
    title: str
    section: Callable[[], str | None]


PAGES = [
    Page("recurrent", "Recurrent modules: `nn.GRU`, `nn.LSTM`, `nn.RNN`, on a CPU and on a GPU", recurrent),
    Page("cells", "Cells of one's own through `hwbp_compiler.recurrent`", cells),
    Page("loops", "Python loops over time, rolled up again", loops),
    Page("unrolled", "Unrolled chains: residual stacks, a Transformer, a ResNet, loops over cells", deep),
    Page("scaling", "Step and compile time against size", scaling),
    Page("quality", "What trained models reach, for every k; the paper's claims, checked", accuracy),
    Page("segments", "Quality and time against k and S, on trained models", segments),
    Page("auto", 'Trainings with the default options, `iterations="auto"`', auto),
    Page("beyond", "What else was tried: damping, Anderson, fitted steps, random k, an estimate of the error", beyond),
    Page("decisions", "How often the cost model chose the faster form, and what errors cost", decided),
    Page("scan", "The scan against other implementations", scan),
    Page("engines", "Recurrent modules by formulas of their own, or as cells of the loop engine", engines),
    Page("pass", "How long the rewriting pass takes", compile_time),
    Page("paper", "The paper's own figures beside ours", papers_own),
]


def index(written: list[Page]) -> str:
    """Claims by topic, one figure each."""
    pages = {page.name for page in written}
    topics: dict[str, list[Claim]] = {}
    for each in claims():
        if each.page in pages:
            topics.setdefault(each.topic, []).append(each)
    parts = [HEAD]
    for topic, found in topics.items():
        suites = ", ".join(dict.fromkeys(f"`--suite {c.suite}`" for c in found))
        devices = ", ".join(dict.fromkeys(name for c in found for name in c.device.split(", ")))
        lines = [(f"[{c.what}]({c.page}.md{f'#{CASES_ANCHOR}' if c.duels else ''})", c.figure, c.of) for c in found]
        table = markdown(("claim", "worst to best", "of"), lines)
        parts.append(f"## {topic}\n\nMeasured by {suites}, on {devices}.\n\n{table}")
    listed = "\n".join(f"- [{page.title}]({page.name}.md)" for page in written)
    more = "- [Several hundred architectures: which chains are found](../coverage.md)"
    return "\n\n".join([*parts, HOW, f"## Pages\n\n{listed}\n{more}"])


CASES_TITLE, CASES_ANCHOR = "Worst and best cases", "worst-and-best-cases"


def worst_and_best(name: str) -> str:
    """The cases behind the index's figures, for the page ``name``. Empty if the index says it all."""
    found = [c for c in claims() if c.page == name and c.duels]
    if not found:
        return ""
    several = len({c.topic for c in found}) > 1
    lines = []
    for c in found:
        for which, d in zip(("worst", "best"), (c.duels[0], c.duels[-1]), strict=True):
            exact = f"{d.milliseconds(d.exact)} ({d.exact_name})"
            what = f"{c.topic.removeprefix(MODULES.format(''))}: {c.what}" if several else c.what
            lines.append((what, f"{which} of {c.of}", d.case, d.milliseconds(d.ours), exact, f"{d.ratio:.2f}x"))
    head = ("claim", "which", "case", "this backend, ms", "best exact alternative, ms", "ratio")
    intro = "A training step against the best exact alternative: the fastest that was measured in the same run."
    if name == "scan":
        head = (*head[:4], "best other, ms", "ratio")
        intro = "Against the fastest other implementation of the same scan."
    return f"## {CASES_TITLE}\n\n{intro}\n\n{markdown(head, lines)}"


SHOWN_IN_README = 12


def in_short() -> str:
    """README's table: for every kind of model the best and the worst case at k = 2, and the best exact alternative."""
    kinds: list[tuple[str, list[Duel]]] = []
    for device, words in (("cpu", "CPU"), ("cuda", "GPU")):
        kinds += [(words, recurrent_duels(device, (kind,))[K2]) for kind in ("GRU", "LSTM")]
    kinds += [("CPU", cells_duels()[K2]), ("CPU", deep_duels()[K2])]
    lines = []
    for words, met in kinds:
        ranked = best_last(met)
        for d in ranked[-1:] + ranked[: len(ranked) > 1]:
            alternative = f"{d.milliseconds(d.exact)} ({d.exact_name})"
            lines.append(
                (d.case, words, alternative, d.milliseconds(d.ours), f"{d.ratio:.2f}x", f"{d.ours['cosine']:.3f}")
            )
    head = ("milliseconds of a training step", "on", "best exact alternative", "k = 2", "ratio", "cosine, untrained")
    measured = {f"{d.ours['device_name']}, {d.ours['threads']} threads" for _, met in kinds for d in met}
    return f"{markdown(head, lines[:SHOWN_IN_README])}\n\nMeasured on: {'; '.join(sorted(measured))}."


def recurrent_in_short() -> str:
    """A table for each device."""
    return "\n\n".join(map(recurrent_on, by(recurrent_rows(), "device").values()))


IN_SHORT = {"eager": "eager mode", "jax": "JAX", "exact": "exact", "k=2": "k = 2", "k=1, S=16": "k = 1, S = 16"}


def recurrent_on(found: list[Row]) -> str:
    on_a_cpu = found[0]["device"] == "cpu"
    measured = {r["run"] for r in found}
    runs = [run for run in IN_SHORT if run in measured]
    lines = []
    for _, group in by(found, *RECURRENT).items():
        chosen = {r["run"]: r for r in group}
        fastest = min(chosen[run]["step_ms"] for run in runs if run in chosen)
        cells = [in_bold_if(chosen.get(run), fastest) for run in runs]
        decided = "rewritten" if chosen["auto"]["cosine"] < 1 - 1e-7 else "exact"
        lines.append((case_of(chosen["auto"], "`").replace("`", "`nn.", 1), *cells, decided))
    names = IN_SHORT if on_a_cpu else IN_SHORT | {"eager": "cuDNN"}
    head = ("recurrent, milliseconds of a step", *(names[run] for run in runs), DEFAULT)
    told = (
        "`exact` is ordinary backprop, compiled with this backend. The last column says what becomes of the chain with "
        '`rewrite="profitable"`. An `nn.RNN` has no highway.'
    )
    return f"{markdown(head, lines)}\n\n{told} {places(found)}."


def in_bold_if(row: Row | None, fastest: float) -> str:
    if row is None:
        return ""
    words = f"{row['step_ms']:.1f}{doubtful(row, 'step')}"
    return f"**{words}**" if row["step_ms"] == fastest else words


def deep_in_short() -> str:
    lines = []
    found = rows("deep")
    for (case, _), group in by(found, "case", "device").items():
        chosen = {r["run"]: r for r in group}
        two, auto = chosen["k=2"], chosen["auto"]
        lines.append(
            (case, f"{two['backward_ratio']:.2f}x", f"{two['step_ratio']:.2f}x", f"{two['cosine']:.4f}",
             "rewritten" if auto["cosine"] < 1 - 1e-9 else "exact")
        )  # fmt: skip
    head = ("unrolled, k = 2, against Inductor", "backward", "whole step", "cosine", DEFAULT)
    told = 'The last column says what becomes of the chain with `rewrite="profitable"`.'
    return f"{markdown(head, lines)}\n\n{told} {places(found)}." if found else ""
