"""The page ``docs/benchmarks/decisions.md``: how often the cost model chose the faster form, and what errors cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .rows import Row, by, markdown

SUITES = ("recurrent", "cells", "deep", "scaling")
# What tells two measured cases of a suite apart.
WORDS = ("device_name", "case", "kind", "batch", "hidden", "steps", "layers", "length", "dtype", "matmul")
CLOSE = 0.05  # a form that takes at most this share longer counts as equally fast


@dataclass(frozen=True)
class Decision:
    """A case measured in both forms. ``cost``: how much longer the chosen form takes than the faster one."""

    suite: str
    case: str
    rewritten: bool
    exact_ms: float
    rewritten_ms: float

    @property
    def cost(self) -> float:
        chosen = self.rewritten_ms if self.rewritten else self.exact_ms
        return chosen / min(self.exact_ms, self.rewritten_ms) - 1

    @property
    def right(self) -> bool:
        return self.cost <= CLOSE


def decisions(rows: Callable[[str], list[Row]]) -> list[Decision]:
    """One for each case in which exact backprop, k = 2, and what the cost model chose for k = 2 were measured."""
    found = []
    for suite in SUITES:
        for key, group in by(rows(suite), *WORDS).items():
            runs = {row["run"]: row for row in group}
            exact = runs.get("exact") or runs.get("inductor")
            if exact is None or not {"auto", "k=2"} <= set(runs) or is_exact(runs["k=2"]):
                continue  # without a block both forms are exact, and nothing tells which one was chosen
            if "exact" not in runs and str(exact["case"]).startswith("nn."):
                continue  # the other form of a module is our exact one, and here only PyTorch's was measured
            case = ", ".join(said(*pair) for pair in zip(WORDS, key, strict=True) if pair[1] is not None)
            times = exact["step_ms"], runs["k=2"]["step_ms"]
            found.append(Decision(suite, case, not is_exact(runs["auto"]), *times))
    return found


def said(word: str, value: object) -> str:
    if word in ("steps", "layers"):
        return f"{value} {word}"
    return f"{word} {value}" if isinstance(value, int) else str(value)


def is_exact(row: Row) -> bool:
    return bool(row["cosine"] > 1 - 1e-7)


def section(rows: Callable[[str], list[Row]]) -> str | None:
    found = decisions(rows)
    if not found:
        return None
    wrong = sorted((d for d in found if not d.right), key=lambda d: -d.cost)
    right, cost = len(found) - len(wrong), sum(d.cost for d in found) / len(found)
    lines = [(d.case, chosen(d), f"{d.exact_ms:.2f}", f"{d.rewritten_ms:.2f}", f"{d.cost:.0%}") for d in wrong]
    return "\n\n".join([
        "## Decisions of the cost model\n\nFrom the results of the suites "
        f"{joined(f'`{suite}`' for suite in SUITES)}: {len(found)} cases in which exact backprop and k = 2 were both "
        'measured, and what `rewrite="profitable"` chose at that commit. A decision counts as right if the chosen form '
        f"takes at most {CLOSE:.0%} longer than the faster one.",
        f"**{right} of {len(found)} decisions ({right / len(found):.0%}) are right.** On average over all cases, the "
        f"chosen form takes {cost:.1%} longer than the faster one. Always exact would "
        f"take {regret(found, False):.0%} longer, always k = 2 {regret(found, True):.0%}.",
        "### Wrong decisions\n\nMilliseconds of a step.\n\n"
        + (markdown(("case", "chosen", "exact", "k = 2", "cost"), lines) if lines else "None."),
    ])  # fmt: skip


def chosen(d: Decision) -> str:
    return "k = 2" if d.rewritten else "exact"


def regret(found: list[Decision], rewritten: bool) -> float:
    """The mean cost of always choosing the same form."""
    costs = [Decision(d.suite, d.case, rewritten, d.exact_ms, d.rewritten_ms).cost for d in found]
    return sum(costs) / len(costs)


def joined(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last
