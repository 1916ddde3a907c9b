"""Report what looks like a chain but is not one. Only ``explain`` uses this.

``find_chains`` says nothing about code without an elementwise path. A user who expected a chain there wants to know
why: features are concatenated, a shortcut contains a layer, or the steps of a loop are not in the graph.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node

from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.origin import Origins, by_frequency, module_of, name_range, source_line
from hwbp_compiler.graph.program import sum_terms, why_not_linear
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.rules import Kind, is_complex, operator_name, shape_of
from hwbp_compiler.graph.settled import is_settled
from hwbp_compiler.reasons import Reason, Why

from .check_separation import Refusal
from .find_chains import Track, find_chains, root_of_sum
from .find_recurrences import SHORTEST_RECURRENCE, find_recurrences, find_wide_recurrences
from .in_other_words import in_other_words
from .records import collapsed, refused

aten = torch.ops.aten

_CUTS = {aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem}
_LOOPS = {"scan", "while_loop", "associative_scan", "map_impl"}
_PROJECTIONS = {aten.convolution_backward.default: "a convolution", aten.mm.default: "a linear layer"}
# Two concatenations in a row occur everywhere (gates, heads). A densely connected network has more.
_SHORTEST_CONCATENATION = 3
_SHORTEST_STRETCH = 3
_LARGEST_STEP = 2_000
_MOST_STREAMS = 8


def near_misses(graph: Graph, chains: Sequence[ChainRecord]) -> list[ChainRecord]:
    """Records of what was refused without a record; ``chains`` are the existing records."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    in_other_words(copy, {node for node in copy.nodes if is_settled(node)})
    info = GraphInfo(copy, {node for node in copy.nodes if is_settled(node)})
    if not info.has_tangents:
        return []
    origins = Origins(copy)
    found = [*(list(_concatenations(info)) or _kept_features(info)), *_projections(info), *_loops(info)]
    found += [*_unknown(info), *_mixed(info), *_interrupted(info, origins), *_recurrences(info, origins)]
    lines = {(c.source, c.reason_code) for c in chains}
    return [r for r in collapsed([_told(f, origins) for f in found]) if (r.source, r.reason_code) not in lines]


def _told(refusal: Refusal, origins: Origins) -> ChainRecord:
    """The record of a refusal. Concatenated features get the line that concatenates, not a line inside a block."""
    record = refused(refusal, origins)
    if refusal.why.code is Reason.FEATURES_CONCATENATED:
        calls = {node.meta.get("seq_nr") for node in refusal.nodes}
        cats = [n for call in calls for n in origins.by_call.get(call, ()) if n.target is aten.cat.default]
        if lines := by_frequency(map(source_line, cats)):
            record.source, record.sources = lines[0], lines[:1]
            adding = name_range([module_of(n) for n in cats if source_line(n) == lines[0]])
            record.module = adding or origins.of_nodes(refusal.nodes).inside
    return record


class _ThroughCuts(GraphInfo):
    """A view of the graph in which cutting off a piece counts as elementwise."""

    def elementwise(self, source: int, i: int) -> bool:
        return super().elementwise(source, i) or self.nodes[i].target in _CUTS


class _ThroughUnknown(GraphInfo):
    """A view of the graph in which an operator without a rule counts as elementwise."""

    def passed(self, i: int) -> bool:
        return self.nodes[i].op == "call_function" and super().kind(i) is None

    def elementwise(self, source: int, i: int) -> bool:
        unknown = self.passed(i) and shape_of(self.nodes[source]) == shape_of(self.nodes[i])
        return unknown or super().elementwise(source, i)


class _ThroughComplex(GraphInfo):
    """A view of the graph in which a conversion between real and complex numbers counts as layout."""

    def passed(self, i: int) -> bool:
        return self.nodes[i].op == "call_function" and super().kind(i) is None and is_complex(self.nodes[i])

    def kind(self, i: int) -> Kind | None:
        return Kind.LAYOUT if self.passed(i) else super().kind(i)

    def elementwise(self, source: int, i: int) -> bool:
        return self.passed(i) or super().elementwise(source, i)


class _ThroughMixers(GraphInfo):
    """A view of the graph in which a product that mixes a few streams, and no features, counts as elementwise."""

    def mixed(self, i: int) -> set[int]:
        """The numbers of streams before and behind the product ``i``; none if it is no such product."""
        node = self.nodes[i]
        if node.target not in (aten.mm.default, aten.bmm.default):
            return set()
        left, right = (operand for operand in node.args if isinstance(operand, Node))
        carried = [self.carries[self.index[operand]] for operand in (left, right)]
        (*_, rows, inner), (*_, columns) = left.meta["val"].shape, right.meta["val"].shape
        kept, streams = (rows, {inner, columns}) if carried == [True, False] else (columns, {inner, rows})
        few = all(isinstance(n, int) and n <= _MOST_STREAMS for n in streams)
        return streams if few and sum(carried) == 1 and kept > max(streams) else set()

    def elementwise(self, source: int, i: int) -> bool:
        # The matrix may give one stream more, the input of the block; its gradient has a place beside the others.
        padded = self.nodes[i].target is aten.slice_scatter.default
        return super().elementwise(source, i) or padded or bool(self.mixed(i))


def _mixed(info: GraphInfo) -> Iterator[Refusal]:
    """Stretches that would be chains if the streams of the state were not mixed by a matrix (hyper-connections)."""
    loose = _ThroughMixers(info.graph)
    proper = {j for track in find_chains(info) for j in track.joins}
    for track in find_chains(loose):
        joins = [j for j in track.joins if j not in proper]
        if len(joins) < _SHORTEST_STRETCH:
            continue
        inside = sorted(info.between({min(track.branches, default=joins[0])}, {joins[-1]}))
        # A linear layer mixes features: those in the last dimension.
        features = {(shape_of(info.nodes[j]) or (0,))[-1] for j in joins}
        mixers = sum(bool(streams) and features.isdisjoint(streams) for streams in map(loose.mixed, inside))
        if mixers:
            yield Refusal(tuple(info.nodes[i] for i in inside), mixers, Reason.STREAMS_MIXED.of())


def _unknown(info: GraphInfo) -> Iterator[Refusal]:
    """Stretches that would be chains if an operator without a rule were not on their elementwise path."""
    proper = {j for track in find_chains(info) for j in track.joins}
    covered: set[int] = set()
    looks: tuple[_ThroughComplex | _ThroughUnknown, ...] = (_ThroughComplex(info.graph), _ThroughUnknown(info.graph))
    for loose in looks:
        tracks = find_chains(loose)
        if isinstance(loose, _ThroughComplex):
            tracks += find_recurrences(loose, proper.union(*(t.joins for t in tracks)), SHORTEST_RECURRENCE)
        for track in tracks:
            joins = [j for j in track.joins if j not in proper]
            inside = info.between({min(track.branches, default=joins[0])}, {joins[-1]}) if joins else set()
            cuts = [info.nodes[i] for i in sorted(inside - covered) if loose.passed(i)]
            if len(joins) >= _SHORTEST_STRETCH and cuts:
                covered |= inside
                name = by_frequency(map(operator_name, cuts))[0]
                (first, *_) = (node for node in cuts if operator_name(node) == name)
                nodes = tuple(info.nodes[i] for i in sorted(inside))
                yield Refusal(nodes, len(joins), why_not_linear(first, on_trunk=True))


def _recurrences(info: GraphInfo, origins: Origins) -> Iterator[Refusal]:
    """Entirely elementwise recurrences, like those of ``find_recurrences``, but with a state of several tensors. They
    are recognized by one line of the user's code that runs again and again.
    """
    tracks = [t for t in find_chains(info) if len(t.joins) > 1]
    excluded = set().union(*(info.between({min(t.branches, default=t.joins[0])}, {t.joins[-1]}) for t in tracks))
    covered: set[str] = set()
    for inside in find_wide_recurrences(info, excluded, SHORTEST_RECURRENCE):
        nodes = tuple(info.nodes[i] for i in sorted(inside))
        run = {n for call in {n.meta.get("seq_nr") for n in nodes} for n in origins.by_call.get(call, ())}
        times = Counter((source_line(n), n.target) for n in run)
        repeated = {key: count for key, count in times.items() if key[0] and count >= SHORTEST_RECURRENCE}
        lines = {line for line, _ in repeated}
        if repeated and covered.isdisjoint(lines):
            covered |= lines
            yield Refusal(
                nodes, min(repeated.values()), Reason.WIDE_ELEMENTWISE_RECURRENCE.of()
            )  # a line may call an operator twice in a step


def _concatenations(info: GraphInfo) -> Iterator[Refusal]:
    proper = {j for track in find_chains(info) for j in track.joins}
    loose = _ThroughCuts(info.graph)
    for track in find_chains(loose):
        joins = [j for j in track.joins if j not in proper]
        shapes = {shape_of(info.nodes[j]) for j in joins}
        if len(joins) >= _SHORTEST_CONCATENATION and len(shapes) > 1:
            inside = sorted(info.between({joins[0]}, {joins[-1]}))
            yield Refusal(tuple(info.nodes[i] for i in inside), len(joins), Reason.FEATURES_CONCATENATED.of())


def _kept_features(info: GraphInfo) -> list[Refusal]:
    """The same network with its features kept in a list: the gradient of each feature is a sum of pieces, cut from the
    gradients of several inputs of growing width.
    """
    sums: list[int] = []
    for i in range(len(info.nodes)):
        inner = len(info.users[i]) == 1 and info.is_sum(info.users[i][0])
        if info.is_sum(i) and not inner:
            cuts = [c for term in sum_terms(info.nodes[i]) if (c := _cut_behind(info, info.index[term]))]
            if len({shape_of(info.nodes[info.sources[c][0]]) for c in cuts}) > 1:
                sums.append(i)
    if len(sums) < _SHORTEST_CONCATENATION:
        return []
    inside = info.between({sums[0]}, {sums[-1]}) or set(sums)
    return [Refusal(tuple(info.nodes[i] for i in sorted(inside)), len(sums), Reason.FEATURES_CONCATENATED.of())]


def _cut_behind(info: GraphInfo, node: int) -> int | None:
    """The cut that ``node`` is only a view of, if it is a gradient."""
    while info.sources[node]:
        if info.nodes[node].target in _CUTS:
            return node
        if info.kind(node) is not Kind.LAYOUT:
            return None
        node = info.sources[node][0]
    return None


def _projections(info: GraphInfo) -> Iterator[Refusal]:
    """Places where a track ends because both paths to the state before pass through a layer."""
    tracks = find_chains(info)
    heads = {branch for track in tracks for branch in track.branches}
    for track in tracks:
        start = _branch(info, track.joins[-1])
        meeting = None if start is None else _meeting(info, start)
        if start is None or meeting is None:
            continue
        join, counts, layers = meeting
        before, after = (_sizes(info, i) for i in (join, start))
        # Two layers side by side, or one beside none, are a block with a shortcut only if a chain continues behind
        # them.
        goes_on = _branch(info, join) in heads
        cut = min(counts) == 0 and max(counts) > 0 and before != after and goes_on
        if not cut and (min(counts) != 1 or not layers or max(counts) < 2 and not goes_on):
            continue
        if not any(info.kind(i) is Kind.HEAVY for i in info.descendants({join}) - {join}):
            continue  # the gradient of a parameter, or of the model's input: there is no block before
        what = [f"has {layers} in it"] if layers else []
        what += [f"changes its shape from {before} to {after}"] if before != after else []
        yield Refusal(
            tuple(info.nodes[i] for i in sorted(info.between({start}, {join}) - {start})),
            1,
            Reason.SHORTCUT_HAS_LAYER.of(what=" and ".join(what)),
        )


def _branch(info: GraphInfo, node: int) -> int | None:
    """The first node from ``node`` on that more than one path leaves."""
    while len(info.users[node]) == 1:
        node = info.users[node][0]
    return node if info.users[node] else None


def _meeting(info: GraphInfo, start: int) -> tuple[int, list[int], str] | None:
    """The sum where all paths from ``start`` meet again. For each term, the most layers on a path to it; and the name
    of the layer of the term with the fewest.
    """
    layers = {start: (0, "")}
    waiting = list(info.users[start])
    heapq.heapify(waiting)
    queued = set(waiting)
    while waiting and len(layers) < _LARGEST_STEP:
        node = heapq.heappop(waiting)
        sources = [layers[p] for p in info.sources[node] if p in layers]
        if not waiting and info.is_sum(node) and len(sources) > 1:
            return root_of_sum(info, node), [depth for depth, _ in sources], min(sources)[1]
        depth, name = max(sources)
        if info.kind(node) in (Kind.HEAVY, None):
            depth, name = depth + 1, _PROJECTIONS.get(info.nodes[node].target, name)
        layers[node] = (depth, name)
        for user in info.users[node]:
            if user not in queued:
                queued.add(user)
                heapq.heappush(waiting, user)
    return None


def _sizes(info: GraphInfo, i: int) -> str:
    return "[" + ", ".join(map(str, shape_of(info.nodes[i]) or ())) + "]"


def _interrupted(info: GraphInfo, origins: Origins) -> Iterator[Refusal]:
    """Successive tracks of one or two joins, with the same operator between them every time."""
    tracks = sorted(find_chains(info), key=lambda t: t.joins[0])
    short = [t for t in tracks if len(t.joins) <= 2 and t.branches]
    stretch: list[Track] = []
    whys: list[Why] = []
    for track, following in itertools.zip_longest(short, short[1:]):
        why = None if following is None else _between_tracks(info, origins, track, following)
        stretch.append(track)
        if following is not None and why is not None and why == (whys[-1] if whys else why):
            whys.append(why)
            continue
        if len(whys) + 1 >= _SHORTEST_STRETCH:
            inside = info.between({stretch[0].branches[0]}, {stretch[-1].joins[-1]})
            nodes = tuple(info.nodes[i] for i in sorted(inside))
            yield Refusal(nodes, sum(len(t.joins) for t in stretch), whys[0])
        stretch, whys = [], []


_LAYERS = {"addmm": "a linear layer", "mm": "a linear layer", "convolution": "a convolution"}


def _between_tracks(info: GraphInfo, origins: Origins, track: Track, following: Track) -> Why | None:
    """The reason, if exactly one operator of the forward pass stands between the two tracks; otherwise None."""
    end, start = track.joins[-1], following.branches[0]
    if start <= end:
        return None
    inside = info.between({end}, {start}) - {end}
    cuts = [info.nodes[i] for i in inside if info.kind(i) not in (Kind.ELEMENTWISE, Kind.LAYOUT)]
    calls = {node.meta.get("seq_nr") for node in cuts}
    if not inside or len(calls) != 1:
        return None
    if unknown := [n for n in cuts if info.kind(info.index[n]) is None]:
        return why_not_linear(unknown[0], on_trunk=True)
    forward = [n for n in origins.by_call.get(calls.pop(), ()) if info.kind(info.index[n]) is not Kind.LAYOUT]
    if not forward:
        return None
    # If an operator was decomposed, name the one that the user called.
    called = getattr(forward[0].meta.get("original_aten"), "_schema", None)
    name = (operator_name(forward[0]) if called is None else called.name).removeprefix("aten::")
    return Reason.INTERRUPTED.of(operator=_LAYERS.get(name, f"torch's {name.strip('_')}"))


def is_piece_of(record: ChainRecord, missed: Sequence[ChainRecord]) -> bool:
    """Whether ``record`` is about one link of a stretch that a record of ``missed`` covers as a whole."""
    whole = {m.source for m in missed if m.length >= _SHORTEST_STRETCH}
    return record.decision == "declined" and record.length <= 2 and record.source in whole


def _loops(info: GraphInfo) -> Iterator[Refusal]:
    for i, node in enumerate(info.nodes):
        name = operator_name(node) if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
        if info.carries[i] and name in _LOOPS:
            yield Refusal((node,), 0, Reason.HIGHER_ORDER_LOOP.of(name=name))
