"""``total += loss``: a state that is changed in place where nothing can see it."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from .steps import Carried, Steps
from .values import example, memory_of

OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}  # fmt: skip


def is_running_total(steps: Steps, place: int) -> bool:
    """Whether node ``place`` changes in place a state that nothing else reads until the last step is done. A new tensor
    in every step is then equivalent.
    """
    column = [block[place] for block in steps.blocks]
    carried = steps.sources[place][0]
    if not isinstance(carried, Carried) or carried.lag != 1 or carried.parts or carried.place != place:
        return False
    start = carried.starts[0]
    held = example(column[0])
    if start.parts or not isinstance(held, Tensor) or start.root.op not in ("call_function", "call_method"):
        return False
    other = example(column[0].args[1])
    shape = other.shape if isinstance(other, Tensor) else ()
    if torch.result_type(held, other) != held.dtype or torch.broadcast_shapes(held.shape, shape) != held.shape:
        return False  # in-place addition keeps dtype and shape
    here = memory_of(column[0])
    mine = {start.root, *column}
    for node in column[0].graph.nodes:
        if node not in mine and node.op != "output" and memory_of(node) & here:
            return False  # another name for it, or a view of it
    readers = [user for node in (start.root, *column[:-1]) for user in node.users]
    return all(user in mine for user in readers)
