"""The page ``docs/benchmarks/beyond.md``: what was tried beside a grid of (k, S), and whether it was better."""

from __future__ import annotations

from .rows import Row, by, markdown, places
from .segments_report import runs

METHODS = ("damped 0.1", "damped 0.3", "anderson", "fitted", "random")
CLEAR = 0.01  # of a cosine: a smaller difference counts as none
TARGETS = (0.99, 0.9)


def section(found: list[Row]) -> str | None:
    if not found:
        return None
    methods, tails = ([row for row in found if row["kind"] == kind] for kind in ("method", "tail"))
    parts = [
        "## Beyond a grid of (k, S)\n\n`python -m benchmarks run --suite beyond`. Cosine of all parameter gradients "
        "with the exact ones, for models trained with exact gradients: the mean over three held-out batches of 32. "
        f"{places(found)}",
        EXPLAINED,
        verdict(methods),
    ]
    parts += [table(case, rows) for (case,), rows in by(methods, "case").items()]
    if tails:
        parts.append(hits(tails))
    return "\n\n".join(parts)


EXPLAINED = """- *plain*: k iterations of the algorithm as it is.
- *damped*: the same with damping 0.1 or 0.3.
- *anderson*: the last two iterations mixed, for each sample, so that the mixed change is smallest.
- *fitted*: w^k + a (w^k - w^{k-1}). Each state (or segment) has its own number a, fitted by least squares to the exact
  gradient of another batch.
- *random*: k is drawn at every step, with the mean k, and changes are divided by the probability that they are made.
  That is unbiased. The figure is the expected cosine of one draw. In brackets: the root mean square of the distance
  from the exact gradient, relative to its norm.
- *diagonal*: every link is replaced by one diagonal matrix, fitted like *fitted* (after Caillon, Fagnou and Allauzen
  2025, arXiv 2503.23104); *diagonals*: each link by its own. No iteration is needed."""


def of_method(rows: list[Row], name: str) -> dict[tuple[str, int, int], Row]:
    return {(row["case"], row["segment"], row["k"]): row for row in rows if row["method"] == name}


def verdict(rows: list[Row]) -> str:
    """How often each method beats the plain algorithm: at the same k and S, and at the same arithmetic with the best S
    of each.
    """
    plain = of_method(rows, "plain")
    best = best_by_runs(plain)
    lines = []
    for name in METHODS:
        mine = of_method(rows, name)
        same = [(row["cosine"], plain[key]["cosine"]) for key, row in mine.items() if key in plain]
        equal = [(cosine, best[key]) for key, cosine in best_by_runs(mine).items() if key in best]
        lines.append((name, *duels(same), *duels(equal)))
    counts = ("better", "worse", "largest gain")
    head = ("method", "at the same k and S", *counts, "with the best k and S", *counts)
    return (
        "### Compared with the plain algorithm\n\nFirst at the same k and S. Then with the best k and S of each that "
        "take at most the same arithmetic (k iterations, or k + 1 runs over segments): this is what a grid offers. "
        f"Differences of at most {CLEAR} count as none.\n\n{markdown(head, lines)}"
    )


def best_by_runs(found: dict[tuple[str, int, int], Row]) -> dict[tuple[str, int], float]:
    """The highest cosine that a case reaches with at most so much arithmetic."""
    spent = [(case, runs(k, segment), row["cosine"]) for (case, segment, k), row in found.items()]
    return {(case, most): max(cosine for c, n, cosine in spent if c == case and n <= most) for case, most, _ in spent}


def duels(pairs: list[tuple[float, float]]) -> tuple[int, int, int, str]:
    better = sum(a > b + CLEAR for a, b in pairs)
    worse = sum(a < b - CLEAR for a, b in pairs)
    return len(pairs), better, worse, f"{max((a - b for a, b in pairs), default=0.0):+.3f}"


def table(case: str, rows: list[Row]) -> str:
    found = {name: of_method(rows, name) for name in ("plain", *METHODS)}
    shown = [name for name in ("plain", *METHODS) if found[name]]
    lines = []
    for key in found["plain"]:
        lines.append((f"S = {key[1]}, k = {key[2]}", *(cell(found[name].get(key)) for name in shown)))
    head = f"{rows[0]['length']} links", *shown
    text = f"### {case}\n\n{markdown(head, lines)}"
    others = [row for row in rows if row["method"].startswith("diagonal")]
    if others:
        text += "\n\nWithout iterations: " + ", ".join(f"{row['method']} {row['cosine']:.3f}" for row in others) + "."
    return text


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['cosine']:.3f}" + (f" ({row['spread']:.2f})" if "spread" in row else "")


def hits(rows: list[Row]) -> str:
    """How often the estimate of the tail was right."""
    pairs = [pair for row in rows for pair in zip(row["estimates"], row["errors"], strict=True)]
    lines = []
    for target in TARGETS:
        most = (2 * (1 - target)) ** 0.5
        said = [(estimate is not None and estimate <= most, error <= most) for estimate, error in pairs]
        counts = [said.count(what) for what in ((True, True), (True, False), (False, True), (False, False))]
        lines.append((f"{target:g}: error at most {most:.3f}", *counts))
    head = ("target cosine", "said good, is good", "said good, is poor", "said poor, is good", "said poor, is poor")
    return (
        "### An estimate without the exact gradient\n\nThe relative error is estimated as the last change times "
        "b / (1 - b), where b is the ratio of the last two changes. If the changes grow (b >= 1), the gradient counts "
        f"as poor. {len(pairs)} gradients of the models above, with k of 2 or more:\n\n{markdown(head, lines)}\n\n"
        "It is an estimate and no bound, because terms can grow before they fall. `auto` does not rely on it."
    )
