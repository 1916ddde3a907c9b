"""``hwbp_compiler.recurrent``: run a cell over time."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hwbp_compiler.errors import HighwayError
from hwbp_compiler.options import parse
from hwbp_compiler.torch_private import TorchDynamoException, serving_backend, wrap

from .replace_loops import encode, enter, first, rolled


def recurrent(
    cell: Callable[[Any, Any], tuple[Any, Any]],
    inputs: Any,
    state: Any,
    *,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Run ``cell`` over time, like the loop ::

        outputs = []
        for t in range(T):
            output, state = cell(inputs[t], state)
            outputs.append(output)
        return torch.stack(outputs), state

    The loop is compiled without being unrolled, and its backward pass is Highway-BP: ``W^0 = scan(c, K)`` and
    ``W^{i+1} = scan(c + J W^i, K)``. Row t of W is the gradient at the state after t steps (Fagnou et al., ICLR 2025,
    Theorems 1 and 2; docs/design.md, section 5).

    Args:
        cell: any function or module ``(x_t, state) -> (output, next_state)`` that ``torch.compile`` can trace in one
            piece. Its parameters and the tensors it captures get their gradients. The cell may change in place only
            tensors that it has made itself. The output is a tensor, a tuple, list or dict of tensors, or None.
        inputs: a tensor ``[T, ...]`` of any dtype, or a tuple, list or dict of such tensors, T >= 1; ``x_t`` is row t
            of each.
        state: the state before the first step: a tensor, or a (nested) tuple, list or dict of tensors. ``next_state``
            must have the same structure and shapes. It is kept in the dtypes and on the devices of ``state``.
        options: as for ``torch.compile(..., backend="highway", options=...)``. Inside a function compiled with
            ``backend="highway"``, None means the function's options, and options given here replace them all. But if
            ``iterations`` is not given here, those of ``iterations``, ``segment`` and ``damping`` that are not given
            are still the function's.

    Returns:
        ``(outputs, state)``: every output stacked, ``[T, ...]``, and the state after the last step.

    Raises:
        OptionError: an option is not allowed.
        TypeError: ``inputs`` or ``state`` contain something that is not a tensor.
        ValueError: the inputs differ in length, or their length is 0.
        HighwayError: the cell cannot be traced. The message says which part of it.

    Only inputs and states are kept for the backward pass. It computes the gates again, for all steps at once. The
    compiler finds K in the graph of the cell. Components of the state that do not depend on one another's past form
    separate chains.

    The gradient is exact if the recurrence has no elementwise path (K = 0), if ``iterations`` is "exact" or at least T,
    or if the recurrence is linear: ``s' = a * s + b``, with gates that do not depend on s (LRU, minGRU). A linear
    recurrence is a scan in both directions.

    Some cells are unrolled, like a Python loop over the cell, and stay exact: those that draw random numbers (dropout),
    contain a custom ``autograd.Function`` or switch gradients off. ``explain`` gives the reason.

    In eager mode the loop compiles itself, once for all T. In a function compiled with ``backend="highway"`` it becomes
    part of the function's graph. Under another backend it breaks the graph, and compiles itself. So the gradients of a
    model that calls ``recurrent`` follow ``options`` even if the model is not compiled. To get the exact gradients in
    eager mode for comparison, use ``hwbp_compiler.testing.exactly``.

    >>> cell = lambda x, h: (h, 0.5 * h + x)
    >>> recurrent(cell, torch.ones(3, 1), torch.zeros(1))[0].flatten()
    tensor([0.0000, 1.0000, 1.5000])
    """
    if torch.compiler.is_dynamo_compiling() and serving_backend():
        return _loop(cell, inputs, state, encode(options))
    return _by_itself(cell, inputs, state, options)


def _loop(cell: Callable[..., Any], inputs: Any, state: Any, options: str) -> tuple[Any, Any]:
    """The code that Dynamo traces; see :mod:`.capture`."""
    leaves, structure = pytree.tree_flatten(state)
    rows, structure_of_rows = pytree.tree_flatten(inputs)
    if any(row.shape[0] != rows[0].shape[0] for row in rows):  # an input of one row would broadcast
        raise ValueError("recurrent: the inputs differ in dim 0, the number of time steps; it must be the same for all")
    # A tensor passed twice is two components of the state, and the cell may capture it too. Views keep them apart.
    leaves = [leaf.contiguous().view_as(leaf) for leaf in leaves]
    rows = [row.view_as(row) for row in rows]
    count = len(leaves)

    def step(*arguments: Tensor) -> tuple[list[Tensor], Any]:
        # Views made in here: Dynamo would take an attribute (x.T, x.real) of an argument outside the step.
        arguments = tuple(argument.view_as(argument) for argument in arguments)
        before = pytree.tree_unflatten(arguments[:count], structure)
        made = cell(pytree.tree_unflatten(arguments[count:], structure_of_rows), before)
        # Dynamo 2.11 raises an assertion when it unpacks anything else.
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise TypeError("recurrent: the cell must return a pair (output, next_state)")
        output, following = made
        # Copies, so that each is a result of the step. They are removed later.
        kept = [_like(new, old).clone() for new, old in zip(_leaves_like(before, following), arguments, strict=False)]
        return kept, () if output is None else pytree.tree_map(torch.clone, output)

    kept, output = wrap(step, *map(enter, leaves), *map(first, rows))
    outputs, structure_of_output = pytree.tree_flatten(output)
    found = rolled(kept, outputs, leaves, rows, options)
    stacked = pytree.tree_unflatten(found[count:], structure_of_output)
    return stacked, pytree.tree_unflatten(found[:count], structure)


def _like(new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise ValueError("recurrent: the cell returns a state whose shape differs from that of the state passed in")
    return new.to(old.dtype).contiguous()


def _leaves_like(like: Any, tree: Any) -> list[Any]:
    """The leaves of ``tree`` in the order of ``like``'s leaves: the entries of a dict may be in another order."""
    if isinstance(like, dict) and isinstance(tree, dict) and like.keys() == tree.keys():
        return [leaf for key in like for leaf in _leaves_like(like[key], tree[key])]
    if isinstance(like, (tuple, list)) and isinstance(tree, (tuple, list)) and len(like) == len(tree):
        return [leaf for a, b in zip(like, tree, strict=True) for leaf in _leaves_like(a, b)]
    if isinstance(like, (dict, tuple, list)) or isinstance(tree, (dict, tuple, list)):
        raise ValueError("recurrent: the cell returns a state whose structure differs from that of the state passed in")
    return pytree.tree_leaves(tree)  # type: ignore[no-any-return]


@torch.compiler.disable(reason="hwbp_compiler.recurrent under another backend compiles itself")
def _by_itself(cell: Any, inputs: Any, state: Any, options: Mapping[str, Any] | None) -> tuple[Any, Any]:
    parse(options)
    if _exactly.get():
        options = {**(options or {}), "iterations": "exact"}
    _check(inputs, state)
    compiled = _compiled(cell, options)
    # Mark views: a mark stays on its tensor and would affect other compilations.
    inputs = pytree.tree_map(lambda leaf: leaf.view_as(leaf), inputs)
    for leaf in pytree.tree_leaves(inputs):
        torch._dynamo.maybe_mark_dynamic(leaf, 0)
    try:
        return compiled(cell, inputs, state, "")  # type: ignore[no-any-return]
    except TorchDynamoException as error:
        raise HighwayError(f"recurrent: {_why(cell, inputs, state, error)}") from error


def _check(inputs: Any, state: Any) -> None:
    for name, tree in (("inputs", inputs), ("state", state)):
        leaves = pytree.tree_flatten_with_path(tree)[0]
        if not leaves:
            raise ValueError(f"recurrent: {name} holds no tensor; give at least one")
        for path, leaf in leaves:
            if not isinstance(leaf, Tensor):
                where = f"{name}{pytree.keystr(path)}"
                raise TypeError(f"recurrent: {where} is {type(leaf).__name__}; only tensors are allowed")
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1 or shapes[0][0] == 0:
        raise ValueError(
            f"recurrent: inputs have the shapes {', '.join(map(str, shapes))}; dim 0 must be the number of time steps, "
            "at least 1 and the same for all"
        )


_exactly = ContextVar("exactly", default=False)


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """A context in which ``hwbp_compiler.recurrent`` uses ordinary backprop in eager mode, whatever its options are.
    Use it to get exact gradients for comparison.

    Yields:
        Nothing. Models that are already compiled with ``torch.compile`` do not change.

    >>> with exactly():
    ...     loss(model(x)).backward()
    """
    token = _exactly.set(True)
    try:
        yield
    finally:
        _exactly.reset(token)


_COMPILED: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _compiled(cell: Any, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """One compiled loop per module or function. A function is identified by its code, so a lambda made again finds the
    same loop.
    """
    key = cell if isinstance(cell, nn.Module) else getattr(getattr(cell, "__func__", cell), "__code__", type(cell))
    made = _COMPILED.setdefault(key, {})
    chosen = repr(sorted((options or {}).items(), key=str))
    if chosen not in made:
        # Dynamo stores its compilations with the code object. Each loop has its own, so none evicts another's.
        fresh = types.FunctionType(_loop.__code__.replace(), _loop.__globals__, _loop.__name__)
        made[chosen] = torch.compile(fresh, backend="highway", fullgraph=True, options=dict(options or {}))
    return made[chosen]  # type: ignore[no-any-return]


def _why(cell: Any, inputs: Any, state: Any, error: Exception) -> str:
    """What in the cell cannot be compiled, found by running it once; otherwise torch's message."""
    try:
        with torch.no_grad():
            x = pytree.tree_map(lambda t: t[0].clone(), inputs)
            before = pytree.tree_map(torch.clone, state)
            versions = [(n, t, t._version) for n, t in _named(x, before)]
            made = cell(x, before)
            for name, tensor, version in versions:
                if tensor._version != version:
                    return (
                        f"the cell changes {name} in place, but the loop needs every state unchanged. Write the change "
                        "as a new tensor (h * z instead of h.mul_(z))"
                    )
        if not isinstance(made, tuple) or len(made) != 2:
            return f"the cell returns {type(made).__name__}; it must return a pair (output, next_state)"
        try:
            new = _leaves_like(state, made[1])
        except ValueError:
            given, returned = pytree.tree_structure(state), pytree.tree_structure(made[1])
            return f"the cell returns a state of structure {returned}, but the state passed in has {given}"
        for a, b in zip(pytree.tree_leaves(state), new, strict=True):
            if not isinstance(b, Tensor) or a.shape != b.shape:
                shape = tuple(b.shape) if isinstance(b, Tensor) else b
                return f"the cell turns a state of shape {tuple(a.shape)} into one of shape {shape}; they must be equal"
        for leaf in pytree.tree_leaves(made[0]):
            if made[0] is not None and not isinstance(leaf, Tensor):
                return f"the cell's output holds {leaf!r}; only tensors are allowed, or None for no output"
    except Exception as own:
        return f"the cell itself raises {type(own).__name__}: {own}"
    return f"the cell cannot be traced in one piece. torch.compile says: {error}"


def _named(x: Any, state: Any) -> list[tuple[str, Tensor]]:
    return [
        *((f"input {i}", t) for i, t in enumerate(pytree.tree_leaves(x))),
        *((f"component {i} of its state", t) for i, t in enumerate(pytree.tree_leaves(state))),
    ]
