"""``highway::run_segments``: substitution inside the segments of a recurrent layer, for all segments at once.

Row t of a series belongs to link t, which leads from the state after step t to the state before it. Segments are
counted from the last row; the first takes the remainder. A run is S steps. Each step is one product over C times the
batch:

    GRU, RNN    w' = c + m w + (p w) W
    LSTM        h' = c + (p_i e, p_f e, p_g e, p_o h) W        e' = m e + q h'        (recurrence/lstm.py: h and e)

where c (and q) belong to the state that the link leads to. On a CPU a run is one call (:mod:`.cpu_runs`). So is exact
backprop, a run over one segment of all steps (:func:`exact`). On other devices, if T is a number, the steps are written
out and compiled with the code around them (:func:`written_out`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hwbp_compiler.engine.segments import Cut
from hwbp_compiler.torch_private import below_autograd

from . import cpu_runs

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "run_segments(Tensor values, Tensor? multipliers, Tensor? through, Tensor into, Tensor weight, Tensor[] ends, "
    "SymInt segment, bool whole) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operator = torch.ops.highway.run_segments.default


@dataclass(frozen=True)
class Links:
    """All links of a layer.

    values       c [T, B, H]: the losses' contribution at h_1 ... h_T
    multipliers  m [T, B, H]; None for zeros
    through      q [T, B, H] of an LSTM, else None
    into         p [T, B, G, H]: the factors that multiply a gradient of the state for each gate
    weight       W [G H, H]
    """

    values: Tensor
    multipliers: Tensor | None
    through: Tensor | None
    into: Tensor
    weight: Tensor

    @functools.cached_property
    def factors(self) -> Tensor:
        """p, m and q (not for a GRU) in one tensor [T, B, G + 2, H]. The states are multiplied by p and m at once.
        Written out, a step is then one kernel and one product; with m separate it would need two kernels, one of the
        state's size and one of the gates' size. q is included so that it is computed once and not in every step.
        """
        apart = [part.unsqueeze(2) for part in (self.multipliers, self.through) if part is not None]
        return torch.cat([self.into, *apart], 2) if apart else self.into

    def onward(self, states: Sequence[Tensor], rows: slice) -> tuple[Tensor, Tensor | None]:
        """What comes through the weights of links ``rows``, and past them: [lanes, B, H] each."""
        gates = self.into.shape[2]
        factors = self.factors[rows][:, :, : gates + 1]
        if self.through is None:
            met = factors * states[0].unsqueeze(2)
        else:
            h, e = (s.unsqueeze(2) for s in states)
            of_output = torch.arange(gates + 1, device=h.device).view(-1, 1) == 3
            met = factors * torch.where(of_output, h, e)
        moved = torch.mm(met.flatten(0, 1)[:, :gates].flatten(1), self.weight).view(states[0].shape)
        return moved, None if self.multipliers is None else met[:, :, gates]

    def step(self, states: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """The states before links ``rows``, computed from those after: [lanes, B, H] per component. No loss contributes
        at the state before link 0.
        """
        moved, kept = self.onward(states, rows)
        if rows.start > 0:
            return self._joined(
                moved, kept, slice(rows.start - 1, -1 if rows.stop is None else rows.stop - 1, rows.step)
            )
        first = [part[:1] for part in (moved, kept) if part is not None]
        of_first = first if self.through is not None else [sum(first[1:], first[0])]
        if rows.stop is not None:  # link 0 alone
            return of_first
        rest = self._joined(moved[1:], None if kept is None else kept[1:], slice(rows.step - 1, -1, rows.step))
        return [torch.cat([a, b]) for a, b in zip(of_first, rest, strict=True)]

    def _joined(self, moved: Tensor, kept: Tensor | None, before: slice) -> list[Tensor]:
        h = self.values[before] + moved
        if self.through is None:
            return [h if kept is None else h + kept]
        assert kept is not None
        return [h, kept + self.factors[before][:, :, -1] * h]


def exact(links: Links, last: Tensor) -> list[Tensor]:
    """Ordinary backprop along the states, from the gradient at the last state [B, H]; for GRU and RNN layers, since an
    LSTM uses PyTorch's own. On a CPU PyTorch has no backward kernel for a GRU or RNN: autograd replays every small
    operator of every step, including the products for the weights. Here only the gradient of the state waits for the
    next step.

    Returns w [T, B, H], and the resulting gradient before the first link [B, H].
    """
    values = links.values
    given = values, links.multipliers, links.through, links.into, links.weight
    return operator(*given, [last.unsqueeze(0)], values.shape[0], True)  # type: ignore[no-any-return]


class LayerRuns:
    """:class:`~hwbp_compiler.engine.segments.Runs` of a layer, with rows h_1 ... h_T. After the last run, ``of_first``
    holds the gradient before the first link, [B, H] per component.
    """

    def __init__(self, links: Links, segment: int) -> None:
        self.links, self.segment = links, segment
        self.of_first: list[Tensor] = []

    @property
    def cut(self) -> Cut:
        """The segments of h_1 ... h_T; the link to h_1 lies outside."""
        return Cut.of(self.links.values.shape[0], self.segment, outside=1)

    def across(self, iteration: int, ends: list[Tensor]) -> list[Tensor]:
        return self._run(ends, False)

    def through(self, ends: list[Tensor]) -> list[Tensor]:
        found = self._run(ends, True)
        self.of_first = found[len(ends) :]
        return found[: len(ends)]

    def _run(self, ends: list[Tensor], whole: bool) -> list[Tensor]:
        of = self.links
        # With a symbolic number of steps, every remainder would be compiled separately, so nothing is written out then.
        if of.values.device.type != "cpu" and isinstance(of.values.shape[0], int):
            return written_out(of, ends, self.segment, whole)
        given = of.values, of.multipliers, of.through, of.into, of.weight
        return operator(*given, ends, self.segment, whole)  # type: ignore[no-any-return]


def written_out(links: Links, ends: list[Tensor], segment: int, whole: bool) -> list[Tensor]:
    """A run step by step, without a special operator. Returns what :func:`_run_segments` returns."""
    cut = Cut.of(links.values.shape[0], segment)
    if not whole:
        for step in range(segment):  # the segment next to the input is left out
            ends = links.step(ends, slice(cut.first + segment - 1 - step, None, segment))
        return ends
    of_first, of_rest = [[e[:1] for e in ends]], [[e[1:] for e in ends]]
    for rows, with_first, with_rest in cut.last_run():
        if with_first and with_rest:
            ends = links.step(ends, rows)
            of_first.append([e[:1] for e in ends])
            of_rest.append([e[1:] for e in ends])
        else:
            mine = of_first if with_first else of_rest
            mine.append(links.step(mine[-1], rows))
    found = []
    for c in range(len(ends)):
        pieces = [states[c] for states in reversed(of_first[:-1])]
        if cut.count > 1:
            pieces.append(torch.stack([states[c] for states in reversed(of_rest)], 1).flatten(0, 1))
        found.append(torch.cat(pieces))
    return [*found, *(e[0] for e in of_first[-1])]


def _run_segments(
    values: Tensor,
    multipliers: Tensor | None,
    through: Tensor | None,
    into: Tensor,
    weight: Tensor,
    ends: list[Tensor],
    segment: int,
    whole: bool,
) -> list[Tensor]:
    """Arguments as in :class:`Links`. ``ends`` are e_s [C, B, H] per component if ``whole``, otherwise those of
    segments 2..C.

    Returns, per component, the gradients before segments 2..C, [C - 1, B, H]. If ``whole``, returns instead the rows
    h_1 ... h_T [T, B, H], then the gradient before the first link [B, H].
    """
    links = Links(values, multipliers, through, into, weight)
    cut = Cut.of(values.shape[0], segment)
    with below_autograd():
        ours = cpu_runs.run(values, multipliers, through, into, weight, ends, segment, whole)
        if ours is not None:
            return ours
        if not whole:
            return [e.contiguous() for e in written_out(links, list(ends), segment, False)]
        # In place: each step writes the rows that the next one reads.
        rows = [values.new_empty(values.shape) for _ in ends]
        of_first = [values.new_empty(values.shape[1:]) for _ in ends]
        for series, end in zip(rows, ends, strict=True):
            series[cut.first - 1 :: segment] = end
        for taken, _, with_rest in cut.last_run():
            states = links.step([series[taken] for series in rows], taken)
            start = taken.start - 1
            if start < 0:
                for result, state in zip(of_first, states, strict=True):
                    result.copy_(state[0])
                states, start = [state[1:] for state in states], segment - 1
            if with_rest:
                for series, state in zip(rows, states, strict=True):
                    series[start:-1:segment] = state
            elif taken.start:
                for series, state in zip(rows, states, strict=True):
                    series[start] = state[0]
        return [*rows, *of_first]


def _fake(
    values: Tensor,
    multipliers: Any,
    through: Any,
    into: Any,
    weight: Any,
    ends: list[Tensor],
    segment: Any,
    whole: bool,
) -> list[Tensor]:
    if not whole:
        return [e.new_empty(e.shape) for e in ends]
    return [*(values.new_empty(values.shape) for _ in ends), *(values.new_empty(values.shape[1:]) for _ in ends)]


library.impl("run_segments", _run_segments, "CompositeExplicitAutograd")
torch.library.register_fake("highway::run_segments", _fake, lib=library)
