"""Committed results -> ``docs/benchmarks.md`` and the table of README.md: ``python -m benchmarks report``"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from . import accuracy_report, auto_report, paper, segments_report
from .harness import ROOT, say
from .rows import PAGE, Row, by, doubtful, markdown, places, time

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
    """Rewrite the page, and the text between the two marks in README.md and examples/README.md."""
    parts = [HEAD]
    for section in SECTIONS:
        text = section()
        if text:
            parts.append(text)
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    between_marks(README, in_short())
    between_marks(EXAMPLES, expected())
    say(f"written: {', '.join(str(path.relative_to(ROOT)) for path in (PAGE, README, EXAMPLES))}")


def between_marks(path: Path, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    before, _, rest = whole.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{path.name} lacks the marks {START!r} and {END!r}")
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


HEAD = """# Benchmarks

Written by `python -m benchmarks report` from `benchmarks/results/`; `python -m benchmarks run` measures again. All
competitors of a table ran in one process and took turns. Tables give medians, the interquartile range in brackets, and
ratios to the baseline's median: above 1 is faster. Cases that lose are listed too. A question mark means that an
interquartile range is more than half its median because the machine was disturbed: ratios in that row
are only a hint."""


def ratio(row: Row, what: str) -> str:
    return f"{row[f'{what}_ratio']:.2f}x" if f"{what}_ratio" in row else ""


def memory(row: Row, group: list[Row]) -> str:
    """Megabytes, if all rows of the table have them. Some suites read the resident memory on a CPU, which misses what
    the allocator kept from before. So a table with a zero in it shows no memory.
    """
    if any(r.get("peak_memory_mb") is None or r["peak_memory_mb"] <= 0 for r in group):
        return ""
    return f"{row['peak_memory_mb']:.1f}"


def compiling(row: Row) -> str:
    """Seconds of the first call, cold and (if measured) from warm caches. Empty if the suite was compiled ahead."""
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
        "## Unrolled chains\n\n`python -m benchmarks run --suite deep`. Baseline: `torch.compile` with Inductor. "
        '`auto` is what `rewrite="profitable"`, the default, decides at k = 2. `fpi` is fixed-point iteration '
        "(gamma = 1). The cosine compares all parameter gradients with the exact ones. Times are in milliseconds, the "
        f"first call in seconds: cold, and (if it was measured) from warm caches. {SHARED}"
    ]
    for (case, why, _), group in by(found, "case", "why", "device").items():
        lines = [
            (
                r["run"], time(r, "backward"), f"{r['backward_ratio']:.2f}x", time(r, "step"),
                f"{r['step_ratio']:.2f}x", f"{r['cosine']:.4f}",
                compiling(r),
                memory(r, group),
            )
            for r in group
        ]  # fmt: skip
        head = ("run", "backward", "", "whole step", "", "cosine", "compile, cold / warm", "peak MB")
        parts.append(f"### {case}\n\n{why}. {places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


SHARED = (
    "A cold compilation is the first of its program, but some of its code may be compiled already: Inductor is "
    "measured first, and C++ that two programs share (mostly of the forward pass) is compiled once, so the seconds of "
    "all others are too low."
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
    """A description of the case."""
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
        "## Recurrent modules\n\n`python -m benchmarks run --suite recurrent`. Baseline: `nn.GRU`, "
        "`nn.LSTM` or `nn.RNN` in eager mode, where stock `torch.compile` leaves them. On a GPU that is cuDNN, which "
        "rounds float32 products to TF32 by default. Our products are rounded to TF32 where the table says so "
        '(`torch.set_float32_matmul_precision("high")`). `auto` is what `rewrite="profitable"`, the default, decides '
        "at k = 2; `fpi` is fixed-point iteration (gamma = 1). The cosine compares the weights' gradient with the "
        "exact one. Times are in milliseconds. The first call, which compiles, is in seconds (if it was measured): "
        "cold (except for C++ shared with runs above it in the table), and from warm caches. Forward and backward are "
        "each timed to completion, so on a GPU each includes the time that Python takes to launch it."
    ]
    for _, group in by(found, *RECURRENT).items():
        lines = [
            (
                r["run"], time(r, "forward"), time(r, "backward"), ratio(r, "backward"), time(r, "step"),
                ratio(r, "step"), f"{r['cosine']:.5f}",
                compiling(r),
                "" if r["peak_memory_mb"] is None else f"{r['peak_memory_mb']:.0f}",
            )
            for r in group
        ]  # fmt: skip
        head = ("run", "forward", "backward", "", "whole step", "", "cosine", "compile, cold / warm", "peak MB")
        parts.append(f"### {case_of(group[0])}\n\n{places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def cells() -> str | None:
    found = sorted(rows("cells"), key=lambda r: (r["device"], r["length"]))
    if not found:
        return None
    parts = [
        "## Cells of one's own\n\n`python -m benchmarks run --suite cells`. `hwbp_compiler.recurrent` against the same "
        "loop written in Python: in eager mode, the baseline, and compiled by stock Inductor (`inductor`), which "
        "unrolls it. `auto` is the default at k = 2. The cosine compares all parameter gradients with eager mode's. "
        "Times are in milliseconds, the first call in seconds: a cold compilation, or none if a cell with the same "
        "code and sizes has run at another length before.\n\n"
        "**A LayerNorm in the cell needs a larger k, or a smaller gain.** It scales what comes from the state to size "
        "1, however small the weights are, so much of an untrained cell's gradient goes through the blocks. The low "
        "cosines of the LayerNorm-GRU are not an error of the rewrite: they are those of w^k as the paper defines it, "
        "with the update gate as K (`tests/test_any_cell.py` compares with the definition). With a gain that starts "
        "at 0.1, the same cell has the cosines of a GRU without a norm."
    ]
    for (case, batch, hidden, length, _), group in by(found, "case", "batch", "hidden", "length", "device").items():
        eager = next(r for r in group if r["run"] == "eager")
        lines = [
            (
                r["run"], time(r, "backward"), f"{eager['backward_ms'] / r['backward_ms']:.2f}x", time(r, "step"),
                f"{eager['step_ms'] / r['step_ms']:.2f}x", f"{r['cosine']:.5f}",
                "" if r["run"] == "eager" else f"{r['compile_s']:.0f}",
            )
            for r in group
        ]  # fmt: skip
        head = ("run", "backward", "", "whole step", "", "cosine", "first call")
        title = f"{case}, batch {batch}, hidden {hidden}, {length} steps"
        parts.append(f"### {title}\n\n{places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def loops() -> str | None:
    found = sorted(rows("loops"), key=lambda r: (r["device"], r["case"], r["batch"], r["length"]))
    if not found:
        return None
    parts = [
        "## Python loops over time\n\n`python -m benchmarks run --suite loops`. A loop over a cell, hidden 64, in "
        "eager mode, compiled by stock Inductor (to 256 steps), and rerolled; `module` is `nn.GRU` or `nn.LSTM` in "
        "eager mode. Compile: seconds of the first step, cold, without the time in which Dynamo traces the loop, "
        "which is the same for every backend. Times are of whole training steps, in milliseconds."
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
        head = ("steps", "run", "step", "", "cosine", "Dynamo, s", "compile, s")
        parts.append(f"### {case}, batch {batch}\n\n{places(cases)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def compile_time() -> str | None:
    found = rows("compile")
    if not found:
        return None
    lines = [
        (r["case"], r["size"], r["nodes_before"], r["nodes_after"], r["backward_before"], r["backward_after"],
         f"{r['pass_s']:.2f}")
        for r in found
    ]  # fmt: skip
    head = ("model", "links", "nodes before", "after", "of the backward", "after", "pass, seconds")
    return (
        f"## The pass\n\n`python -m benchmarks run --suite compile`. {places(found)}\n\n{markdown(head, lines)}\n\n"
        "Nodes of the backward: operators on gradients, taking a row out of a stack (`select`) not counted."
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
        auto = "rewritten" if runs["auto"]["cosine"] < 1 - 1e-9 else "left alone"
        compiling = " / ".join(f"{r['compile_forward_s'] + r['compile_backward_s']:.1f}" for r in (stock, two))
        ratio = f"{two['step_ratio']:.2f}x"
        lines.append((curve, f"{size} {axis}", time(stock, "step"), time(two, "step"), ratio, auto, compiling))
    head = ("model", "size", "Inductor, step", "k = 2, step", "", "by default", "compile, s: Inductor / k = 2")
    return (
        f"## Scaling\n\n`python -m benchmarks run --suite scaling`. {places(found)}\n\n"
        "`nn.GRU` is not compiled by Inductor, which leaves it to PyTorch's own kernels. "
        f"{SHARED} A program that is in several curves (32 blocks, width 64, batch 8) is compiled only in the "
        "first.\n\n"
        f"![Step and compile time against size](scaling.svg)\n\n{markdown(head, lines)}"
    )


def scan() -> str | None:
    found = rows("scan")
    if not found:
        return None
    parts = [
        "## The scan\n\n`python -m benchmarks run --suite scan`. float32, along the first dimension, multipliers of "
        "the values' shape. Baseline: a copy that moves the same bytes (the inputs read, the output written); it "
        "allocates its output, as all others do. The copy writes as much as it reads, a scan half as much: where new "
        "memory is slow to get, a scan can be faster."
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
        head = ("", "milliseconds", "GB/s", "least", "of the copy's bandwidth (of the shortest times)")
        parts.append(f"### {list(shape)}\n\n{places(group)}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def draw_scaling(found: list[Row]) -> None:
    """Step time (solid) and compile time (dotted) against size, one panel per curve."""
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
    figure.savefig(PAGE.parent / "scaling.svg", metadata={"Date": None})
    pyplot.close(figure)


def accuracy() -> str | None:

    return accuracy_report.section(rows("accuracy"))


def segments() -> str | None:
    return segments_report.section(rows("segments"), PAGE.parent)


def auto() -> str | None:
    return auto_report.section(rows("auto"), PAGE.parent)


def papers_own() -> str:
    lines: list[tuple[object, ...]] = []
    for case, (exact, highway, fixed_point) in paper.STEP_MS.items():
        lines.append((case, exact, "Highway-BP", *(f"{ms} ({exact / ms:.1f}x)" for ms in highway)))
        lines.append(("", "", "FPI", *(f"{ms} ({exact / ms:.1f}x)" for ms in fixed_point)))
        lines += ours_beside(case)
    table = markdown(("", "backprop", "method", *(f"k = {k}" for k in paper.ITERATIONS)), lines)
    return (
        "## The paper's own figures\n\n"
        "Fagnou et al., ICLR 2025, Table 6: milliseconds of a training step on an NVIDIA GPU (A100, A40 or RTX A6000), "
        "batch 128, hidden size 512 (256 steps) or 64 (1024 steps), and in brackets the ratio to their own sequential "
        "backprop. Our figures from the tables above follow: only the recurrent layers, without embedding and head, on "
        "the GPU named there, and the ratio to cuDNN's own backprop. GPU and baseline differ from the paper's, so "
        f"neither milliseconds nor ratios can be compared directly.\n\n{table}"
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


SECTIONS: list[Callable[[], str | None]] = [
    recurrent, cells, loops, deep, compile_time, scaling, accuracy, segments, auto, scan, papers_own,
]  # fmt: skip


def in_short() -> str:
    """README's tables: the time of a step with every recurrent module, quality and time of trained models, and k = 2 of
    every unrolled chain with the cost model's decision.
    """
    tables = [recurrent_in_short(), segments_report.in_short(rows("segments"), README.parent / "docs"), deep_in_short()]
    return "\n\n".join(filter(None, tables)) + "\n\nAll tables: [docs/benchmarks.md](docs/benchmarks.md)."


def recurrent_in_short() -> str:
    """One table per device."""
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
    head = ("recurrent, milliseconds of a step", *(names[run] for run in runs), "k = 2 by default")
    told = "`exact` is ordinary backprop compiled with this backend. An `nn.RNN` has no highway."
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
             "rewritten" if auto["cosine"] < 1 - 1e-9 else "left alone")
        )  # fmt: skip
    head = ("unrolled, k = 2, against Inductor", "backward", "whole step", "cosine", "by default")
    return f"{markdown(head, lines)}\n\n{places(found)}." if found else ""
