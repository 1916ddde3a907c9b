"""Find entirely elementwise recurrences: ``h' = a * h + b``, with gates that see only the input.

``find_chains`` finds no join in them, because nothing heavy joins their track. They are recognized by a long
elementwise path that something leaves at every step: the gradients of the gates and of the input.
"""

from __future__ import annotations

from collections import Counter

from hwbp_compiler.graph.chain import Chain
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import SUM, Statement, references

from .find_chains import Track

# Two or three multiplications in a row occur everywhere. A recurrence has more.
SHORTEST_RECURRENCE = 4


def _operands(statement: Statement) -> list[int]:
    return [ref.id for ref in references(statement.args)]


def find_recurrences(info: GraphInfo, excluded: set[int], min_length: int) -> list[Track]:
    """Tracks of at least ``min_length`` states along elementwise paths that avoid the ``excluded`` nodes."""
    free = [c and i not in excluded for i, c in enumerate(info.carries)]
    tracks: list[Track] = []
    while True:
        inside = _longest(info, free, min_length)
        if inside is None:
            return tracks
        ways = [_separating_forks(info, inside), _separating_forks(info, inside, from_inside=True)]
        states = max((_one_per_period(info, forks) for forks in ways), key=len)
        states += _one_more(info, inside, states)
        if len(states) >= min_length:
            tracks.append(Track(tuple(states), ()))


def shifted(info: GraphInfo, chain: Chain) -> list[Track]:
    """The same recurrence, cut at each other place that every path through a link of ``chain`` passes.

    A step ``tanh(a * h + b)`` has its branch points before the tanh, where the gates take their gradients. Its state is
    behind the tanh.
    """
    link, reach = chain.links[0], 0
    found: list[Track] = []
    last_user = {j: i for i, statement in enumerate(link.statements) for j in _operands(statement)}
    # A term of a sum is only a part of the gradient.
    terms = {j for statement in link.statements if statement.target is SUM for j in _operands(statement)}
    for i in range(max(link.outputs)):
        if link.arity <= i and reach <= i and i not in terms:
            nodes = (program.raw[i] for program in chain.links)
            found.append(Track(tuple(info.index[n] for n in nodes if n is not None), ()))
        reach = max(reach, last_user[i])
    return found


def find_wide_recurrences(info: GraphInfo, excluded: set[int], min_length: int) -> list[set[int]]:
    """The nodes of equally long elementwise paths without single states: several tensors pass from step to step."""
    free = [c and i not in excluded for i, c in enumerate(info.carries)]
    found: list[set[int]] = []
    while (inside := _longest(info, free, min_length)) is not None:
        leaving = sum(any(u not in inside for u in info.users[i]) for i in inside)
        if len(_separating_forks(info, inside)) < min_length <= leaving:
            found.append(inside)
    return found


def _longest(info: GraphInfo, free: list[bool], min_length: int) -> set[int] | None:
    """The nodes along the longest elementwise path through ``free`` nodes. They are then marked as not free."""
    count = len(info.nodes)
    forks = [0] * count  # most branch points on an elementwise path that starts here
    ahead: list[int | None] = [None] * count
    for i in range(count - 1, -1, -1):
        if not free[i]:
            continue
        for user in info.users[i]:
            best = ahead[i]
            if free[user] and info.elementwise(i, user) and (best is None or forks[user] > forks[best]):
                ahead[i] = user
        forks[i] = int(len(info.users[i]) > 1) + (0 if (after := ahead[i]) is None else forks[after])
    start = max(range(count), key=lambda i: forks[i], default=None)
    if start is None or forks[start] < min_length:
        return None
    path = [start]
    while (following := ahead[path[-1]]) is not None:
        path.append(following)
    inside = _elementwise_between(info, path[0], path[-1], free)
    for i in inside:
        free[i] = False
    return inside


def _elementwise_between(info: GraphInfo, start: int, end: int, free: list[bool]) -> set[int]:
    forward = {start}
    todo = [start]
    while todo:
        node = todo.pop()
        for user in info.users[node]:
            if user not in forward and user <= end and free[user] and info.elementwise(node, user):
                forward.add(user)
                todo.append(user)
    inside = {end}
    todo = [end]
    while todo:
        node = todo.pop()
        for source in info.sources[node]:
            if source in forward and source not in inside and info.elementwise(source, node):
                inside.add(source)
                todo.append(source)
    return inside


def _separating_forks(info: GraphInfo, inside: set[int], from_inside: bool = False) -> list[int]:
    """Nodes that every path inside passes through and from which something outside takes a gradient. With
    ``from_inside``, it is enough that several paths go on from there: gates that see the state element by element take
    no gradient outside.
    """
    found: list[int] = []
    for node in _separating(info, inside):
        users = [u for u in info.users[node] if u in inside]
        if len(users) < len(info.users[node]) or (from_inside and len(users) > 1):
            found.append(node)
    return found


def _one_more(info: GraphInfo, inside: set[int], states: list[int]) -> list[int]:
    """The state behind the first step, if nothing outside takes a gradient from it: the input of a linear recurrence
    may get its gradient as a whole, for all steps at once.
    """
    if len(states) < 2:
        return []
    stops = _separating(info, inside)
    *_, before, last = states
    step = [info.nodes[i].target for i in stops if before < i <= last]
    behind = [i for i in stops if i > last][: len(step)]
    return behind[-1:] if [info.nodes[i].target for i in behind] == step else []


def _separating(info: GraphInfo, inside: set[int]) -> list[int]:
    """Nodes that every path inside passes through."""
    found: list[int] = []
    reach = -1
    for node in sorted(inside):
        if reach <= node:
            found.append(node)
        reach = max([reach, *(u for u in info.users[node] if u in inside)])
    return found


def _one_per_period(info: GraphInfo, states: list[int]) -> list[int]:
    """One state per step: a step that multiplies twice has two branch points, but the link is the whole step."""
    kinds = Counter(_kind(info, i) for i in states)
    if len(kinds) < 2:
        return states
    common, times = kinds.most_common(1)[0]
    if times * len(kinds) > 0.8 * len(states) and times > 2:
        return [i for i in states if _kind(info, i) == common]
    # Behind the first step there is no state, only the gradients of its gates: one more product with other users.
    return states if _kind(info, states[-1]) == common else states[:-1]


def _kind(info: GraphInfo, i: int) -> tuple[str, ...]:
    """The operators that take a gradient from ``i``. The operator of ``i`` itself depends on whether a loss is added
    there.
    """
    return tuple(sorted(str(info.nodes[u].target) for u in info.users[i]))
