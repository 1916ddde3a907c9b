"""Recognise a known program elsewhere in the graph, walking backward from its outputs.

The first link of a chain has no join before it that marks its start, but it is built like its neighbour. Matching the
neighbour's program backward from the first join finds the link's input. The match keeps everything that belongs to the
link (a ReLU or LayerNorm after the last addition) and adds nothing else (pooling, a final norm).
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set

import torch
from torch.fx import Node

from .info import GraphInfo
from .program import (
    ADD,
    INPUT,
    SUM,
    External,
    Program,
    Ref,
    State,
    _constant,
    closure,
    inner_additions,
    inputs_of,
    references,
    sum_terms,
)
from .rules import form_of, shape_of, size_of

# The maximum depth of nested trials, in sums of similar terms.
_DEEPEST = 8
# How many choices among similar terms are tried.
_MOST_CHOICES = 16


class _Mismatch(Exception):
    pass


class Ambiguous(Exception):
    """Several nodes could match, and the choice makes a difference."""


Fits = Callable[[int, Node], bool]
"""Whether a node can be the external of a program at a slot."""


def match_backward(template: Program, outputs: Sequence[Node], info: GraphInfo) -> Program | None:
    """The program equal to ``template`` that ends in ``outputs``; None if there is none.

    An input that leads only to terms of sums may be absent; it is then zero (the gradient of the cell state at the last
    step of an LSTM, or of a stream that the loss does not read).
    """
    choices: list[int] = []
    for _ in range(_MOST_CHOICES):
        matcher = _Matcher(template, info, choices=choices)
        try:
            return matcher.run(outputs)
        except _Mismatch:
            if not matcher.chosen:
                return None
            # What fits in one sum may not fit what the others need.
            *choices, last = matcher.chosen
            choices.append(last + 1)
    return None


_SoFar = tuple[list[Node | None], list[Node | None], dict[int, list[Node]], set[int]]


class _Matcher:
    def __init__(
        self,
        template: Program,
        info: GraphInfo,
        forbidden: Set[int] = frozenset(),
        fits: Fits = lambda slot, node: True,
        choices: Sequence[int] = (),
    ) -> None:
        """``choices``: in sums with several terms that fit, which of them to take; the first if there are no more."""
        self.template = template
        self.choices = choices
        self.chosen: list[int] = []
        self.fits = fits
        self.forbidden = forbidden
        self.info = info
        self.bound: list[Node | None] = [None] * len(template.statements)
        self.externals: list[Node | None] = [None] * len(template.externals)
        self.injections: dict[int, list[Node]] = {}
        self.remainders: dict[int, tuple[Node, list[Node]]] = {}
        self.trials = 0  # how many trials are nested
        self.undecided: list[tuple[int, int]] = []  # (sum, input) pairs to resolve once the rest is known
        self.absent: set[int] = set()  # inputs that are zero, and what they lead to

    def run(self, outputs: Sequence[Node]) -> Program:
        template = self.template
        for statement, node in zip(template.outputs, outputs, strict=True):
            self._bind(statement, node)
        self._match_statements(reversed(range(template.arity, max(template.outputs) + 1)))
        if all(n is None for n in self.bound[: template.arity]):
            raise _Mismatch
        return self.program()

    def program(self) -> Program:
        """The matched program. Slots of unmatched statements keep the template's externals: any value of the right
        shape will do, since nothing is computed from them.
        """
        template = self.template
        return Program(
            arity=template.arity,
            statements=list(template.statements),
            raw=list(self.bound),
            outputs=list(template.outputs),
            externals=[n if n is not None else template.externals[i] for i, n in enumerate(self.externals)],
            injections={i: terms for i, terms in self.injections.items() if terms},
            remainders=dict(self.remainders),
        )

    def _match_statements(self, statements: Iterable[int]) -> None:
        for i in statements:
            node = self.bound[i]
            if node is None:
                if i in self.absent:
                    continue
                raise _Mismatch
            statement = self.template.statements[i]
            if form_of(node) != (statement.shape, statement.dtype):
                raise _Mismatch
            if statement.target is SUM:
                self._match_sum(i, node)
            else:
                self._match_operation(i, node)
        for i, wanted in self.undecided:
            self._settle(i, wanted)
        self.undecided.clear()

    def try_statement(self, i: int, node: Node, needed: Sequence[int], output: bool = False) -> bool:
        """Match statement ``i`` and the statements it depends on (``needed``, descending) against ``node``. A mismatch
        changes nothing. An ``output`` may be one part of the sum ``node``.
        """
        before = self._so_far()
        try:
            self._bind(i, node)
            self._match_statements(needed)
            if output:
                self._set_remainder_aside(i, node)
            self._check_distinct()
            return True
        except _Mismatch:
            self._back_to(before)
            self.remainders.pop(i, None)
            self.undecided.clear()
            return False

    def _so_far(self) -> _SoFar:
        return (
            list(self.bound),
            list(self.externals),
            {k: list(v) for k, v in self.injections.items()},
            set(self.absent),
        )

    def _back_to(self, before: _SoFar) -> None:
        self.bound, self.externals, self.injections, self.absent = before

    def _set_remainder_aside(self, i: int, node: Node) -> None:
        terms = self.injections.get(i, [])
        inside = [t for t in terms if self.info.index[t] in self.forbidden]
        if inside:
            self.injections[i] = [t for t in terms if t not in inside]
            self.remainders[i] = (node, inside)
            self.bound[i] = None

    def _check_distinct(self) -> None:
        """Each statement must have a separate node, except a sum and its term if it has no others. No external may
        depend on the chain.
        """
        owner: dict[Node, int] = {}
        for i, node in enumerate(self.bound):
            if node is not None and node in owner:
                statement = self.template.statements[i]
                present = [ref.id for ref in references(statement.args) if self.bound[ref.id] is not None]
                if statement.target is not SUM or present != [owner[node]]:
                    raise _Mismatch
            if node is not None:
                owner[node] = i
        outside = [n for n in self.externals if n is not None]
        outside += [t for terms in self.injections.values() for t in terms]
        if any(self.info.index[n] in self.forbidden for n in outside):
            raise _Mismatch

    def _bind(self, i: int, node: Node) -> None:
        if self.bound[i] is None:
            statement = self.template.statements[i]
            if statement.target is INPUT and form_of(node) != (statement.shape, statement.dtype):
                raise _Mismatch
            self.bound[i] = node
        elif self.bound[i] is not node:
            raise _Mismatch

    def _match_operation(self, i: int, node: Node) -> None:
        statement = self.template.statements[i]
        if node.op != "call_function" or node.target is not statement.target or len(node.args) != len(statement.args):
            raise _Mismatch
        if sorted(node.kwargs) != [name for name, _ in statement.kwargs]:
            raise _Mismatch
        for expected, actual in zip(statement.args, node.args, strict=True):
            self._match_argument(expected, actual)
        for name, expected in statement.kwargs:
            self._match_argument(expected, node.kwargs[name])

    def _match_argument(self, expected, actual) -> None:
        if isinstance(expected, Ref):
            if not isinstance(actual, Node):
                raise _Mismatch
            self._bind(expected.id, actual)
        elif isinstance(expected, External):
            known = self.template.externals[expected.slot]
            if not isinstance(actual, Node) or form_of(actual) != form_of(known):
                raise _Mismatch
            if not self.fits(expected.slot, actual):
                raise _Mismatch
            self.externals[expected.slot] = actual
        elif isinstance(expected, tuple):
            if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
                raise _Mismatch
            for e, a in zip(expected, actual, strict=True):
                self._match_argument(e, a)
        elif isinstance(actual, Node) or _constant(actual) != expected:
            raise _Mismatch

    def _match_sum(self, i: int, node: Node) -> None:
        refs = self.template.statements[i].args
        # A state that is itself a sum and that only this link reads is still one term.
        terms = sum_terms(node, [found for ref in refs if (found := self.bound[ref.id]) is not None])
        missing: list[int] = []
        for ref in refs:
            target = self.bound[ref.id]
            if target is not None and target in terms:
                terms.remove(target)
            elif ref.id in self.absent:
                continue
            elif ref.id < self.template.arity:
                self.undecided.append((i, ref.id))
            else:
                missing.append(ref.id)
        # The largest term first: what a short one is made of is found in many.
        missing.sort(key=lambda term: -len(closure(self.template, term)))
        self.injections[i] = self._match_terms(missing, terms)

    def _match_terms(self, missing: list[int], terms: list[Node]) -> list[Node]:
        """Bind every statement of ``missing`` to one of ``terms``, and return the others. A sum may have similar terms,
        for example of the first state if every link reads it. The first that fit are taken.
        """
        if not missing:
            return terms
        wanted, *later = missing
        if wanted in self.absent:
            return self._match_terms(later, terms)
        raw = self.template.raw[wanted]
        assert raw is not None
        fitting = [t for t in terms if self._has_constants(wanted, t)]
        alike = list(dict.fromkeys(t for d in (3, 1, 0) for t in fitting if _alike(t, raw, d)))
        if not alike:
            if not (behind := self._only_from_an_input(wanted)):
                raise _Mismatch
            self.absent |= behind
            return self._match_terms(later, terms)
        same = [node for node in alike if node.target is raw.target]
        if len(alike) == 1 or len(same) == 1 or self.trials >= _DEEPEST:
            (found, *_) = same or alike
            self._bind(wanted, found)
            return self._match_terms(later, _without(terms, found))
        needed = sorted(closure(self.template, wanted), reverse=True)
        undecided, self.undecided = self.undecided, []
        decided = len(self.chosen)
        passed_over = self.choices[decided] if self.trials == 0 and decided < len(self.choices) else 0
        position = 0
        self.trials += 1
        try:
            for node in alike:
                before = self._so_far()
                # An input that a sum still needs must be one of its remaining terms.
                if self.try_statement(wanted, node, needed) and all(
                    self.bound[input] is None or self.bound[input] in self.injections[i]
                    for i, input in undecided
                    if i in self.injections
                ):
                    with contextlib.suppress(_Mismatch):
                        left = self._match_terms(later, _without(terms, node))
                        if position == passed_over:
                            if self.trials == 1:
                                self.chosen.append(position)
                            return left
                        position += 1
                self._back_to(before)
        finally:
            self.undecided = undecided
            self.trials -= 1
        raise _Mismatch

    def _has_constants(self, i: int, node: Node) -> bool:
        """Whether ``node`` has the constants of statement ``i``, such as the factor of a product."""
        statement = self.template.statements[i]
        if node.target is not statement.target or len(node.args) != len(statement.args):
            return True  # whether it fits at all is seen elsewhere
        pairs = zip(statement.args, node.args, strict=True)
        return all(
            isinstance(e, Ref | External | tuple) or not isinstance(a, Node) and _constant(a) == e for e, a in pairs
        )

    def _only_from_an_input(self, term: int) -> set[int]:
        """If ``term`` depends on one unmatched input that leads only to terms of sums: the input and all these terms,
        with what is between, blocks included. Otherwise nothing.
        """
        template, inputs = self.template, inputs_of(self.template, term)
        if len(inputs) != 1 or None in template.raw:  # some link must have a node for every statement
            return set()
        found = set(inputs)
        for i, statement in enumerate(template.statements):
            used = {ref.id for ref in references((statement.args, statement.kwargs))}
            if used.isdisjoint(found) or (statement.target is SUM and not used <= found):
                continue
            if not used <= found:
                return set()
            found.add(i)
        matched = any(self.bound[i] is not None for i in found)
        return found if term in found and not matched and found.isdisjoint(template.outputs) else set()

    def _settle(self, i: int, wanted: int) -> None:
        left = self.injections[i]
        node = self.bound[wanted]
        if node is not None:
            if node not in left:
                raise _Mismatch
            left.remove(node)
        elif left and wanted not in self.absent:
            # If nothing else is added there in the template, the input is all that is left.
            whole = None if self.template.injections.get(i) else self._sum_of(left, i)
            self._bind(wanted, left.pop() if whole is None else whole)
            if whole is not None:
                left.clear()

    def _sum_of(self, terms: list[Node], i: int) -> Node | None:
        """The addition inside the sum ``i`` that adds up exactly ``terms``."""
        root = self.bound[i]
        inner = inner_additions(root) if root is not None and len(terms) > 1 else set()
        return next((node for node in inner if Counter(sum_terms(node)) == Counter(terms)), None)


def _without(nodes: list[Node], node: Node) -> list[Node]:
    """``nodes`` without one occurrence of ``node``."""
    left = list(nodes)
    left.remove(node)
    return left


def match_sides(
    template: Program,
    state: State,
    sides: Sequence[tuple[int, Sequence[int]]],
    candidates: Sequence[Node],
    info: GraphInfo,
    tainted: Set[int],
    fits: Fits,
) -> Program | None:
    """``template``'s side outputs, computed from ``state``. None unless all are found in ``candidates``.

    ``sides`` are (statement, the statements it needs, descending). No external may be ``tainted``, and every one must
    satisfy ``fits``: if input and state have the same size, only the weights distinguish their gradients.

    Outputs are matched if there are any: the first state of a model may need a gradient in all, some or none of its
    components (``outputs`` is empty then). A side output is computed from the final w, so any alignment of it is
    correct. An output becomes a state, so it must be the right one; Ambiguous is raised if two nodes match it.
    """
    needed_by = {i: sorted(closure(template, i), reverse=True) for i in template.outputs}
    largest_first = sorted(sides, key=lambda side: -len(side[1]))

    def attempt(chosen: dict[int, Node]) -> _Matcher | None:
        matcher = _Matcher(template, info, tainted, fits)
        matcher.bound[: template.arity] = list(state)
        for i, node in chosen.items():
            if not matcher.try_statement(i, node, needed_by[i], output=True):
                return None
        for i, needed in largest_first:
            if matcher.bound[i] is not None:
                continue
            used = {*matcher.bound, *chosen.values()}
            shape, dtype = template.statements[i].shape, template.statements[i].dtype
            for node in candidates:
                alike = node not in used and form_of(node) == (shape, dtype)
                if alike and matcher.try_statement(i, node, needed):
                    break
            else:
                return None
        return matcher

    # A state is a whole sum, so try the root of its additions before its terms. But if something else is added there
    # that depends on this state, more links follow.
    roots_first = [node for node in sorted(candidates, key=_is_term) if node not in state]
    outputs: dict[int, Node] = {}
    for i in template.outputs:
        is_whole = False
        for node in roots_first:
            if node in outputs.values() or (found := attempt({**outputs, i: node})) is None:
                continue
            if i in outputs and not _is_part_of(node, outputs[i]):
                raise Ambiguous
            if i not in outputs or (not is_whole and i not in found.remainders):
                outputs[i] = node
                is_whole = i not in found.remainders
    matcher = attempt(outputs)
    if matcher is None:
        return None
    program = matcher.program()
    if not outputs:
        program.outputs = []
    return program


def _is_part_of(node: Node, root: Node) -> bool:
    """Whether ``node`` is a term of the sum ``root``, or the sum of some of its terms."""
    while node is not root and _is_term(node):
        node = next(iter(node.users))
    return node is root


def _is_term(node: Node) -> bool:
    """Whether the node is a single-use term of an addition."""
    user = next(iter(node.users), None)
    return user is not None and len(node.users) == 1 and user.target is ADD and shape_of(user) == shape_of(node)


def _alike(a: object, b: object, depth: int) -> bool:
    """Same operators and shapes, ``depth`` levels down."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return isinstance(a, Node) == isinstance(b, Node)
    if shape_of(a) != shape_of(b) or size_of(a) != size_of(b):
        return False
    if size_of(a) is not None:
        return True  # no matter how it is computed
    if ADD in (a.target, b.target):
        return True  # a sum may lack a term and then is not an addition
    if a.op != b.op or (a.op == "call_function" and a.target != b.target):
        return False
    if depth == 0 or a.op != "call_function":
        return True
    return len(a.args) == len(b.args) and all(_alike(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def same_value(a: object, b: object, depth: int = 8) -> bool:
    """Whether both are the same node or size, or the same function of equal arguments: every step may transpose an
    RNN's weights again.

    Only PyTorch's own operators are known to depend on their arguments alone, except those that draw random numbers.
    """
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return not isinstance(a, Node) and not isinstance(b, Node) and _constant(a) == _constant(b)
    if size_of(a) is not None:
        return size_of(a) == size_of(b)
    if depth == 0 or a.op != "call_function" or b.op != "call_function" or a.target is not b.target:
        return False
    if not _is_function(a.target) or len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((a.kwargs[k], b.kwargs[k]) for k in a.kwargs)]
    return all(same_value(x, y, depth - 1) for x, y in pairs)


def _is_function(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return target.namespace in ("aten", "prims") and torch.Tag.nondeterministic_seeded not in target.tags
