"""``docs/coverage.md``: one row per model, from the committed results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..harness import ROOT, say
from ..rows import Row, markdown
from .measure import OUTCOMES, missing, outcome, right
from .runner import rows
from .untrue import UNTRUE

JUDGED = ("all", "reason", "untrue", "silent", "wrong")
PAGE = ROOT / "docs" / "coverage.md"

HEAD = """# Coverage

Written by `python -m benchmarks.coverage report` from `benchmarks/results/coverage.jsonl`.
`python -m benchmarks.coverage run` measures models that are missing there. The models are real architectures with tiny
sizes and random weights. Nothing is downloaded. Models of packages need
`pip install --no-deps -r benchmarks/coverage/packages.txt`. If a package is not installed, its models are skipped.

A person has counted the residual links of every model in its source (`benchmarks/coverage/`). The compiler runs
with `rewrite="always"`, `min_length=2`, `damping=0`. No code is generated: the rewritten joint graph is run directly.
Models run in eval mode, so that nothing is random, and in float64 if their code allows it."""

COLUMNS = """- *Expected*: the lengths of the chains that the person counted.
- *Found*: the lengths of the chains that the compiler found, rewritten or declined.
- *Rewritten*: the lengths of the chains that it rewrote. Empty if they are the same as *found*.
- *Reasons*: why links are missed, as names of `hwbp_compiler.reasons.Reason`. `note` is a note about the
  whole model, for example a graph break.
- *At full length*: chains are rewritten with as many iterations as they have links. The column shows the largest
  difference of any parameter's gradient from eager mode, relative to that gradient's norm (plus a thousandth of all
  gradients' norm). At most 1e-9 is allowed. `f32` marks a model in which gradients pass through float32: there the
  limit is 1e-4. `torch` marks a model whose gradients also differ under torch.compile without this compiler: there
  the difference from torch.compile's gradients counts.
- *Cosine*: between all parameter gradients at k = 1 and those of eager mode. The weights are random, so it says nothing
  about a trained model."""


def write() -> None:
    found = sorted(map(judged, rows()), key=lambda row: (row["family"].lower(), row["name"].lower()))
    PAGE.write_text("\n\n".join([HEAD, summary(found), listed(found), COLUMNS, table(found)]) + "\n", encoding="utf-8")
    say(f"written: {PAGE.relative_to(ROOT)}")


def judged(row: Row) -> Row:
    """With today's judgement of the outcome: whether a reason is true is found out after a model was measured."""
    return row | {"outcome": outcome(row["name"], row)} if row["outcome"] in JUDGED else row


def summary(found: list[Row]) -> str:
    counts = Counter(row["outcome"] for row in found)
    ran = [row for row in found if row["outcome"] not in ("does not run", "not compiled by torch")]
    with_links = [row for row in ran if row["expected"]]
    good = [row for row in with_links if row["outcome"] in ("all", "reason")]
    double = [row for row in ran if row.get("dtype") == "float64" and right(row)]
    lines = [
        f"- {len(found)} models, {len(with_links)} of them with residual links.",
        f"- In {len(good)} of the models with residual links ({share(good, with_links)}), all expected links are "
        "rewritten, or the compiler gives a reason that has not been found untrue. In "
        f"{share([row for row in with_links if row['outcome'] == 'all'], with_links)} all are rewritten.",
        f"- In {len([r for r in ran if right(r)])} of {len(ran)} models, gradients at full length are those of eager "
        f"mode. {len(double)} of these were compared in float64 throughout.",
        f"- In {len([row for row in ran if surplus(row)])} models more links are rewritten than the person counted.",
    ]
    table = markdown(("outcome", "models"), [(OUTCOMES[key], counts[key]) for key in OUTCOMES if counts[key]])
    versions = sorted({f"{row['package']} {row['version']}" for row in found if row.get("package")})
    torch = ", ".join(sorted({row["torch"] for row in found}))
    where = f"Measured with torch {torch} and {', '.join(versions)}." if versions else f"Measured with torch {torch}."
    which = "The table counts all models, with and without residual links."
    return "\n\n".join(["## In short", "\n".join(lines), which, table, where])


def share(part: list[Row], whole: list[Row]) -> str:
    return f"{len(part) / len(whole):.1%}" if whole else "0%"


def surplus(row: Row) -> bool:
    return bool(missing(row.get("rewritten", []), row["expected"]))


def listed(found: list[Row]) -> str:
    """List the wrong results in the text, so that a table does not hide them."""
    parts = []
    for kind, title in (
        ("wrong", "Wrong gradients"), ("crash", "Crashes"), ("silent", "Missed without a record"),
        ("untrue", "Missed with a reason that is not true"), ("time", "Stopped at the time limit"),
        ("memory", "Stopped at the memory limit"), ("not compiled by torch", "Not compiled by torch"),
        ("does not run", "Not run"),
    ):  # fmt: skip
        here = [f"- {row['name']}{told(row)}" for row in found if row["outcome"] == kind]
        if here:
            parts.append(f"### {title}\n\n" + "\n".join(here))
    reasons = Counter(code for row in found if row["outcome"] in ("reason", "untrue") for code in codes(row))
    if reasons:
        lines = [(f"`{code}`", count) for code, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
        parts.append("### Reasons\n\n" + markdown(("code", "models that miss links"), lines))
    return "\n\n".join(["## What is missed", *parts]) if parts else "## What is missed\n\nNothing."


def told(row: Row) -> str:
    if row["outcome"] == "wrong":
        return f": {row['exact']:.1e} off in {row['worst']}"
    if row["outcome"] == "untrue":
        false = sorted(UNTRUE[row["name"]].items())
        return ": " + "; ".join(f"`{code}` is reported, but {truth}" for code, truth in false if code in codes(row))
    error = row.get("error") or row.get("failure")
    return f": {' '.join(error.split())[:200]}" if error else ""


def codes(row: Row) -> list[str]:
    found = {str(record["code"]) for record in row.get("declined", [])}
    return sorted(found | ({"note"} if row.get("notes") and row["outcome"] != "all" else set()))


def lengths(values: Iterable[int]) -> str:
    """``4 x 6`` for four chains of six links."""
    parts = [f"{times} x {length}" if times > 1 else str(length) for length, times in sorted(Counter(values).items())]
    return ", ".join(parts) or "0"


def table(found: list[Row]) -> str:
    lines = []
    for row in found:
        rewritten, seen = lengths(row.get("rewritten", [])), lengths(row.get("found", []))
        missed = row["outcome"] != "all" or not row["expected"]
        single = " f32" if row.get("dtype", "float64") != "float64" else ""
        torch = " torch" if "beyond_torch" in row else ""
        lines.append((
            row["family"], row["name"], lengths(row["expected"]), seen, "" if rewritten == seen else rewritten,
            ", ".join(codes(row)) if missed and row["outcome"] in ("all", "reason", "untrue") else row["outcome"]
            if row["outcome"] != "all" else "",
            f"{row['exact']:.0e}{single}{torch}" if "exact" in row else "",
            f"{row['cosine']:.3f}" if row.get("rewritten") and "cosine" in row else "",
        ))  # fmt: skip
    head = ("family", "model", "expected", "found", "rewritten", "reasons", "at full length", "cosine, k = 1")
    return "## Models\n\n" + markdown(head, lines)
