"""Is there something better than a grid of (k, S)? ``python -m benchmarks run --suite beyond``

Everything is measured on the models of the suite "segments", trained with exact gradients. The rewritten graph runs in
eager mode, and what the solver marks (w^k, or with segments e^k: the gradients at the segments' last states) can be
read and replaced before the rest of the backward pass uses it. Rows of ``"kind": "method"`` give the cosine with the
exact gradient of all parameters, over held-out batches, after k iterations and, in this order:

``plain``      the algorithm as it is
``damped``     the same with damping 0.1 (``damped 0.1``) and 0.3
``anderson``   the last two steps mixed so that the mixed change is smallest (Anderson acceleration of depth 2; k >= 2)
``fitted``     w^k + a (w^k - w^{k-1}) with one number a for each state or segment, fitted by least squares to the exact
               gradient of another batch: what a checked step could learn
``diagonal``   every link replaced by one fixed diagonal matrix for the whole chain, fitted in the same way (after
               Caillon, Fagnou and Allauzen 2025, arXiv 2503.23104); ``diagonals``: one matrix for each link. No
               iteration. Only where the loss reads nothing but the last state
``random``     k drawn at every step so that its mean is k, the changes divided by the probability of their being made
               (Russian roulette): unbiased. The expected cosine of one draw, and ``spread``, the root mean square of
               its distance from the exact gradient, relative to the exact gradient's norm

Rows of ``"kind": "tail"`` compare the relative error of the gradient with an estimate that needs no exact gradient: the
last change times b / (1 - b), where b is the ratio of the last two changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hwbp_compiler.engine.watch import mark
from hwbp_compiler.options import Truncation
from hwbp_compiler.testing.capture import Capture, JointGraph, options
from hwbp_compiler.testing.compare import cosine, relative_error

from .harness import say
from .segments import BATCHES, CASES, QUICK, Compared, Gradients, trained

RESUMES = True
MOST = 8  # iterations
DAMPINGS = (0.1, 0.3)
CHOSEN = {
    "GRU, 64 steps": (1, 8, 16),
    "LSTM, 64 steps": (1, 8, 16),
    "GRU, 256 steps": (1, 16, 32),
    "GRU, text": (1, 8, 16),
    "Transformer, text": (1, 4),
    "ResNet32, digits": (1, 4),
    "quick": (1, 8),
}
COUNTS = (1, 2, 4, 8)

Marked = list[Tensor]  # one tensor per component of the state: [states or segments, batch, ...]


class Marks(TorchDispatchMode):
    """Reads what is marked in a backward pass, or gives ``instead`` to the rest of it."""

    def __init__(self, instead: Marked | None = None) -> None:
        super().__init__()
        self.instead = instead
        self.now: Marked = []
        self.before: Marked = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not mark:
            return func(*args, **(kwargs or {}))
        self.now.append(args[0].clone())
        self.before.append(args[1].clone())
        used = args[0] if self.instead is None else self.instead[len(self.now) - 1]
        return used.clone()


class Trials(Compared):
    """The gradients of a case's batches by different methods. Some methods learn from the last batch, and all are
    judged by the others.
    """

    judged = range(BATCHES - 1)

    def one(self, batch: int, how: Truncation, instead: Marked | None = None) -> tuple[Gradients, Marks]:
        self.captured.args, self.captured.loss = (self.batches[batch][0],), self.loss(batch)
        marks = Marks(instead)

        def backward(joint: JointGraph, tangents: list[Any]) -> list[Any]:
            joint.rewritten(self.captured._options)  # cached: the passes must not see the mode, nor must Dynamo
            with marks:
                return Capture.backward(self.captured, joint, tangents)

        self.captured.backward = backward  # type: ignore[method-assign]
        _, gradients, records = self.captured.gradients(options().at(how, watched=True))
        lengths = [record.length for record in records if record.decision == "rewritten"]
        if lengths != [self.case.length]:
            raise LookupError(f"{self.case.name}: chains of {lengths} links rewritten, not of {self.case.length}")
        return gradients, marks

    def cosines(self, of: Callable[..., Gradients]) -> dict[str, Any]:
        found = [cosine(of(batch), self.exact[batch]) for batch in self.judged]
        return {"cosine": sum(found) / len(found), "cosines": found}


class Course:
    """The iterations of one segment length: gradients and marks for every k, by batch."""

    def __init__(self, trials: Trials, segment: int) -> None:
        self.trials, self.segment = trials, segment
        self.needed = Truncation(0, segment=segment).needed(trials.case.length)
        self.last = min(MOST, self.needed - 1)
        self.runs = [[trials.one(batch, self.how(k)) for k in range(self.last + 1)] for batch in range(BATCHES)]

    def how(self, iterations: int, damping: float = 0.0) -> Truncation:
        return Truncation(iterations, damping, self.segment)

    def gradient(self, batch: int, k: int) -> Gradients:
        return self.runs[batch][k][0]

    def marked(self, batch: int, k: int) -> Marked:
        return self.runs[batch][k][1].now if k else self.runs[batch][1][1].before

    def rows(self) -> Iterator[dict[str, Any]]:
        for k in [0, *COUNTS]:
            if k <= self.last:
                yield {"method": "plain", "k": k, **self.trials.cosines(lambda batch, k=k: self.gradient(batch, k))}
        for k in COUNTS:
            if k <= self.last:
                for name, cosines in self.others(k):
                    yield {"method": name, "k": k, **cosines}
        if self.segment == 1 and self.trials.case.model == "pixels":
            for name, all_links in (("diagonal", True), ("diagonals", False)):
                yield {"method": name, "k": 0, **self.with_instead(1, self.by_diagonals(all_links))}
        if self.needed <= MOST:
            yield from self.drawn()

    def others(self, k: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for damping in DAMPINGS:
            how = self.how(k, damping)
            yield f"damped {damping}", self.trials.cosines(lambda batch, how=how: self.trials.one(batch, how)[0])
        if k >= 2:
            yield "anderson", self.with_instead(k, lambda batch: self.mixed(batch, k))
        yield "fitted", self.with_instead(k, self.fitted(k))

    def with_instead(self, k: int, marked: Callable[[int], Marked]) -> dict[str, Any]:
        return self.trials.cosines(lambda batch: self.trials.one(batch, self.how(k), marked(batch))[0])

    def mixed(self, batch: int, k: int) -> Marked:
        """Anderson acceleration of depth 2, for each sample by itself."""
        series = list(zip(*(self.marked(batch, j) for j in (k - 2, k - 1, k)), strict=True))
        steps = [(b - a, c - b) for a, b, c in series]

        def over_samples(parts: Iterator[Tensor]) -> Tensor:
            return sum(part.transpose(0, 1).flatten(1).double().sum(1) for part in parts)  # type: ignore[return-value]

        across = over_samples(first * (first - second) for first, second in steps)
        size = over_samples((first - second) ** 2 for first, second in steps)
        share = torch.where(size > 0, across / size, 1.0)

        def mix(b: Tensor, c: Tensor) -> Tensor:
            theta = share.to(b.dtype).view(1, -1, *[1] * (b.dim() - 2))
            return theta * c + (1 - theta) * b

        return [mix(b, c) for _, b, c in series]

    def exact_of_the_last(self) -> Marked:
        """What the marks are after all iterations but the last, which changes nothing but the chain's first state."""
        return self.trials.one(BATCHES - 1, self.how(self.needed - 1))[1].now

    def fitted(self, k: int) -> Callable[[int], Marked]:
        factors = []
        now, before = self.marked(BATCHES - 1, k), self.marked(BATCHES - 1, k - 1)
        for right, a, b in zip(self.exact_of_the_last(), now, before, strict=True):
            error, change = ((t.flatten(1).double()) for t in (right - a, a - b))
            size = (change**2).sum(1)
            factor = torch.where(size > 0, (error * change).sum(1) / size, 0.0)
            factors.append(factor.to(a.dtype).view(-1, *[1] * (a.dim() - 1)))

        def marked(batch: int) -> Marked:
            pairs = zip(self.marked(batch, k), self.marked(batch, k - 1), factors, strict=True)
            return [a + factor * (a - b) for a, b, factor in pairs]

        return marked

    def by_diagonals(self, all_links: bool) -> Callable[[int], Marked]:
        diagonals = []
        for w in self.exact_of_the_last():
            across, size = (w[:-1] * w[1:]).double().sum(1), (w[1:] ** 2).double().sum(1)  # [links, ...]
            if all_links:
                across, size = (t.sum(0, keepdim=True).expand_as(t) for t in (across, size))
            diagonals.append(torch.where(size > 0, across / size, 0.0).to(w.dtype))

        def marked(batch: int) -> Marked:
            found = []
            for head, diagonal in zip((m[-1] for m in self.marked(batch, 1)), diagonals, strict=True):
                steps = itertools.accumulate(reversed(diagonal), lambda w, d: d * w, initial=head)
                found.append(torch.stack(list(steps)[::-1]))
            return found

        return marked

    # -- drawn at random --------------------------------------------------------------------------------------------

    def drawn(self) -> Iterator[dict[str, Any]]:
        for k in COUNTS:
            if k < self.needed:
                p = probability(k, self.needed)
                chances = [p**j * (1 - p) for j in range(self.needed)] + [p**self.needed]
                cosines, spreads = [], []
                for batch in self.trials.judged:
                    exact = self.trials.exact[batch]
                    draws = list(self.draws(batch, p))
                    cosines.append(sum(c * cosine(g, exact) for c, g in zip(chances, draws, strict=True)))
                    errors = [relative_error(g, exact) ** 2 for g in draws]
                    spreads.append(sum(c * e for c, e in zip(chances, errors, strict=True)) ** 0.5)
                mean = sum(cosines) / len(cosines)
                yield {"method": "random", "k": k, "cosine": mean, "cosines": cosines, "spread": max(spreads)}

    def draws(self, batch: int, p: float) -> Iterator[Gradients]:
        """The estimate for every k that may be drawn."""
        steps = [self.gradient(batch, j) for j in range(self.needed)] + [self.trials.exact[batch]]
        total = steps[0]
        yield total
        for j, (less, more) in enumerate(itertools.pairwise(steps), start=1):
            total = {name: total[name] + (more[name] - less[name]) / p**j for name in total}
            yield total

    # -- the tail -----------------------------------------------------------------------------------------------------

    def tails(self) -> Iterator[dict[str, Any]]:
        for k in COUNTS:
            if 2 <= k <= self.last:
                pairs = [(self.estimate(batch, k), self.error(batch, k)) for batch in self.trials.judged]
                yield {"k": k, "estimates": [a for a, _ in pairs], "errors": [b for _, b in pairs]}

    def error(self, batch: int, k: int) -> float:
        return relative_error(self.gradient(batch, k), self.trials.exact[batch])

    def estimate(self, batch: int, k: int) -> float | None:
        """None: the changes grow."""
        e = [torch.cat([m.flatten().double() for m in self.marked(batch, j)]) for j in (k - 2, k - 1, k)]
        less, change = float((e[1] - e[0]).norm()), float((e[2] - e[1]).norm())
        b = change / less if less else 0.0
        return None if b >= 1 else change / float(e[2].norm()) * b / (1 - b)


def probability(mean: float, most: int) -> float:
    """The p for which a number drawn with P(K >= j) = p^j for j <= ``most``, else 0, has this mean."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(1, most + 1)) < mean else (low, middle)
    return low


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    """Nothing is compiled ahead."""
    return []


def run(
    device: str, quick: bool, done: list[dict[str, Any]], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Any]]:
    """The rows that ``done`` lacks."""
    had = {(row["case"], row["segment"]) for row in done}
    for case in QUICK if quick else CASES:
        segments = [s for s in CHOSEN.get(case.name, ()) if (case.name, s) not in had]
        if not segments or not wanted(f"{case.name};"):
            continue
        trials = Trials(case, trained(case, device, not quick), device)
        for segment in segments:
            course = Course(trials, segment)
            about = {"case": case.name, "segment": segment, "length": case.length}
            found = [{"kind": "method", **about, **row} for row in course.rows()]
            found += [{"kind": "tail", **about, **row} for row in course.tails()]
            for row in found:
                if "method" in row:
                    say(f"{case.name}, S={segment}, k={row['k']}, {row['method']}: {row['cosine']:.4f}")
            yield from found
