"""Pictures as SVG text: a chain with its track, blocks and segments, and the error of w^k against k.

Colours are CSS variables that the page defines for light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hwbp_compiler.graph.record import ChainRecord

from .data import ErrorAt
from .text import short

# -- which links are drawn --------------------------------------------------------------------------------------

# Chains up to this length are drawn completely.
_WHOLE = 8
_LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Fold:
    """``links`` links from ``start`` on that repeat the ``period`` links before them."""

    start: int
    links: int
    period: int


def folded(kinds: Sequence[object]) -> list[int | Fold]:
    """The parts to draw of a chain whose links have these kinds: positions, and folds for repetitions.

    >>> folded("ab" * 500)
    [0, 1, Fold(start=2, links=996, period=2), 998, 999]
    """
    return _folded(kinds, 0, len(kinds))


def _folded(kinds: Sequence[object], start: int, end: int) -> list[int | Fold]:
    if end - start <= _WHOLE:
        return list(range(start, end))
    best = (0, 0, 1)
    for period in range(1, min(_LONGEST_PERIOD, (end - start) // 3) + 1):
        run = start
        for i in range(start, end - period + 1):
            if i < end - period and kinds[i] == kinds[i + period]:
                continue
            length = i + period - run  # kinds repeat with this period over [run, run + length)
            hidden = (length - 2 * period) // period * period
            if hidden > best[1]:
                best = (run + period, hidden, period)
            run = i + 1
    first, hidden, period = best
    if hidden < 2:  # nothing repeats: leave out the middle anyway
        hidden = end - start - _WHOLE
        first, period = start + _WHOLE // 2, 0
        return [*range(start, first), Fold(first, hidden, 0), *range(first + hidden, end)]
    return [*_folded(kinds, start, first), Fold(first, hidden, period), *_folded(kinds, first + hidden, end)]


# -- a chain ----------------------------------------------------------------------------------------------------

_WIDTH = 360
_TRACK = 112
_BOX, _BOX_WIDTH, _BOX_HEIGHT = 164, 188, 46
_LINK, _FOLD, _TOP = 84, 60, 40
_TICKS = 8  # at most so many marks for segments that end inside a fold
COLOURS = 6


def chain_svg(chain: ChainRecord, number: int) -> str:
    """Draw the track from top (input) to bottom (loss), blocks to its right, K and side losses to its left.

    Every block is ``<g class="block" data-chain data-group data-link>``; the page handles a click on it.
    """
    losses = set(chain.side_losses)
    kinds = [(member, i in losses) for i, member in enumerate(chain.members)]
    ends = list(range(chain.length, 0, -chain.segment))[:0:-1] if chain.segments and chain.segment else []
    y = _TOP
    tracks: list[str] = []  # under everything else
    lines = [f'<circle class="state" cx="{_TRACK}" cy="{y}" r="5"/>', _label(_TRACK - 14, y, "h0", "state-name")]
    lines.append(_label(_TRACK, y - 18, "input", "end", "middle"))
    for item in folded(kinds):
        if isinstance(item, Fold):
            tracks.append(_track(y, y + _FOLD, "track folded"))
            lines.append(_fold(item, y, [s for s in ends if item.start < s < item.start + item.links]))
            y += _FOLD
            state = item.start + item.links
            lines.append(_join(y, state))
        else:
            tracks.append(_track(y, y + _LINK, "track"))
            lines.append(_link(chain, number, item, y))
            y += _LINK
            state = item + 1
            lines.append(_join(y, state))
            if item in losses and item < len(kinds) - 1:
                lines.append(_side_loss(y))
        if state in ends:
            lines.append(_segment_end(y, ends.index(state) + 1))
    lines.append(_label(_TRACK, y + 28, "to the loss", "end", "middle"))
    label = escape(f"chain of {chain.length} links: track, blocks beside it, K on its edges")
    return (
        f'<svg class="chain" viewBox="0 0 {_WIDTH} {y + 40}" role="group" aria-label="{label}">'
        + "".join(tracks + lines)
        + "</svg>"
    )


def _track(start: int, end: int, kind: str) -> str:
    return f'<line class="{kind}" x1="{_TRACK}" y1="{start}" x2="{_TRACK}" y2="{end}"/>'


def _link(chain: ChainRecord, number: int, i: int, y: int) -> str:
    group = chain.members[i]
    record = chain.groups[group]
    middle, end = y + _LINK // 2, y + _LINK
    k = record.multiplier or chain.multiplier
    module = (chain.modules[i] if i < len(chain.modules) else "") or "block"
    heavy = " · ".join(f"{times} {short(name)}" for name, times in record.operators.items()) or "elementwise"
    title = escape(f"link {i + 1} of {len(chain.members)}: {module}; K = {k}")
    up, down = middle - 12, middle + 12
    leaves = f"M{_TRACK},{y + 6} C{_TRACK},{up} {_TRACK + 20},{up} {_BOX},{up}"
    returns = f"M{_BOX},{down} C{_TRACK + 20},{down} {_TRACK},{down} {_TRACK},{end - 8}"
    size = f'width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="8"'
    box = (
        f'<g class="block g{group % COLOURS}" tabindex="0" role="button" aria-label="{title}" '
        f'data-chain="{number}" data-group="{group}" data-link="{i + 1}" data-module="{escape(module)}">'
        f'<title>{title}</title><path class="branch" d="{leaves}"/><path class="branch" d="{returns}"/>'
        f'<rect x="{_BOX}" y="{middle - _BOX_HEIGHT // 2}" {size}/>'
        f"{_label(_BOX + 12, middle - 8, _cut(module, 25, True), 'block-name', 'start')}"
        f"{_label(_BOX + 12, middle + 11, _cut(heavy, 29), 'block-operators', 'start')}"
        "</g>"
    )
    edge = f'<g class="edge"><title>K = {escape(k)}</title>{_label(_TRACK - 12, middle, _cut(k, 15), "k")}</g>'
    return edge + box


def _fold(fold: Fold, y: int, ends: Sequence[int]) -> str:
    """``ends`` are the states inside the fold that end a segment."""
    times = fold.links // fold.period if fold.period else 0
    text = f"{fold.links} more links" if not times else f"the same {times} times more"
    if fold.period > 1:
        text = f"the {fold.period} above, {times} times more"
    middle = y + _FOLD // 2
    parts = [_label(_BOX, middle - (8 if ends else 0), text, "fold-text", "start")]
    if ends:
        parts.append(_label(_BOX, middle + 8, f"over {len(ends) + 1} segments", "fold-text", "start"))
        shown = min(len(ends), _TICKS)
        parts += [_cut_line(y + _FOLD * (i + 1) / (shown + 1), _TRACK - 14, _TRACK + 14) for i in range(shown)]
    return f'<g class="fold" data-links="{fold.links}">{"".join(parts)}</g>'


def _join(y: int, state: int) -> str:
    cross = f"M{_TRACK - 4},{y} h8 M{_TRACK},{y - 4} v8"
    return f'<circle class="join" cx="{_TRACK}" cy="{y}" r="8"/><path class="plus" d="{cross}"/>' + _label(
        _TRACK - 14, y, f"h{state}", "state-name"
    )


def _side_loss(y: int) -> str:
    return (
        f'<g class="side-loss"><title>a gradient of its own arrives here</title>'
        f'<line class="side" x1="46" y1="{y}" x2="{_TRACK - 53}" y2="{y}"/>{_label(40, y, "loss", "side-name")}</g>'
    )


def _segment_end(y: int, number: int) -> str:
    return (
        f'<g class="segment"><title>what leaves segment {number} here towards the input goes along the highway</title>'
        f"{_cut_line(y + 12, 8, _WIDTH - 8)}"
        f"{_label(_WIDTH - 8, y + 2, f'segment {number} ends', 'segment-name')}</g>"
    )


def _cut_line(y: float, start: int, end: int) -> str:
    return f'<line class="cut" x1="{start}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>'


def _label(x: float, y: float, text: str, kind: str, anchor: str = "end") -> str:
    return (
        f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}" dominant-baseline="central">{escape(text)}</text>'
    )


def _cut(text: str, size: int, keep_end: bool = False) -> str:
    if len(text) <= size:
        return text
    return "…" + text[1 - size :] if keep_end else text[: size - 1] + "…"


# -- the error of w^k -------------------------------------------------------------------------------------------

_PLOT_WIDTH, _PLOT_HEIGHT, _LEFT, _BOTTOM = 360, 220, 56, 36


def errors_svg(errors: Sequence[ErrorAt]) -> str:
    """Relative error and 1 - cosine of the parameter gradient against k, on a logarithmic axis, with one curve for each
    S.
    """
    ks, sizes = sorted({e.iterations for e in errors}), sorted({e.segment for e in errors})
    values = [v for e in errors for v in _drawn(e).values() if math.isfinite(v)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(k: int) -> float:
        return _LEFT + 12 + ks.index(k) * (_PLOT_WIDTH - _LEFT - 44) / max(1, len(ks) - 1)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if math.isfinite(value) else 1.0
        return 16 + (1 - share) * (_PLOT_HEIGHT - _BOTTOM - 16)

    parts = []
    for decade in range(low, high + 1, max(1, (high - low) // 5)):
        at = y(10.0**decade)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{_PLOT_WIDTH - 12}" y2="{at:.1f}"/>')
        parts.append(_label(_LEFT - 8, at, f"1e{decade}", "axis"))
    parts += [_label(x(k), _PLOT_HEIGHT - _BOTTOM + 16, str(k), "axis", "middle") for k in ks]
    parts.append(_label((_LEFT + _PLOT_WIDTH) / 2, _PLOT_HEIGHT - 6, "k", "axis", "middle"))
    for size in sizes:
        mine = [e for e in errors if e.segment == size]
        for name in ("error", "cosine"):
            points = " ".join(f"{x(e.iterations):.1f},{y(_drawn(e)[name]):.1f}" for e in mine)
            parts.append(f'<polyline class="curve {name}" points="{points}"/>')
            for e in mine:
                shown = f"relative error {e.relative_error:.3g}, cosine {e.cosine:.6f}"
                which = f"k = {e.iterations}" + (f", S = {e.segment}" if len(sizes) > 1 else "")
                parts.append(
                    f'<circle class="point {name}" cx="{x(e.iterations):.1f}" cy="{y(_drawn(e)[name]):.1f}" r="3.5">'
                    f"<title>{which}: {shown}</title></circle>"
                )
        if len(sizes) > 1:
            last = mine[-1]
            parts.append(_label(x(last.iterations) + 6, y(_drawn(last)["error"]), f"S={size}", "axis", "start"))
    return (
        f'<svg class="errors" viewBox="0 0 {_PLOT_WIDTH} {_PLOT_HEIGHT}" role="img" '
        f'aria-label="error of the parameter gradient against k">' + "".join(parts) + "</svg>"
    )


def _drawn(error: ErrorAt) -> dict[str, float]:
    """The values limited to what a logarithmic axis can show."""
    return {"error": max(error.relative_error, 1e-12), "cosine": max(1 - error.cosine, 1e-12)}
