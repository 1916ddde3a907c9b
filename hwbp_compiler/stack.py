"""``torch.ops.highway.stack``: [links, ...] from one tensor per link. ``torch.ops.highway.cat``: pieces side by side.

Note [One call to stack]
~~~~~~~~~~~~~~~~~~~~~~~~
It is ``torch.stack``, as an operator that Inductor calls rather than compiles. Compiled, a concatenation is one loop
per piece: for a recurrence of 256 steps that is thousands of lines of C++ per saved tensor, most of the compile time of
the whole backward. Called, it is one line and one pass over the pieces; what the forward saves stays what it was.

Note [A concatenation with memory of its own]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
``highway::cat`` is ``torch.cat`` whose pieces stay where they are. Those of ``aten::cat`` become parts of the whole,
and sharing memory went wrong (Note [Pieces of a concatenation] in ``pieces.py``). On a CPU it is called; in GPU code
every element is loaded where it is used (``scan/inductor.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "highway::stack"

library = torch.library.Library("highway", "FRAGMENT")
library.define("stack(Tensor[] tensors) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
operator = torch.ops.highway.stack.default


def _fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((len(tensors), *tensors[0].shape))


def _stack(tensors: list[Tensor]) -> Tensor:
    # Into a given result: left to itself, torch.stack hands on the strides of images that are channels-last.
    return torch.stack(tensors, out=_fake(tensors))


library.impl("stack", _stack, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=library)

library.define("cat(Tensor[] tensors, int dim=0) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("cat", torch.cat, "CompositeExplicitAutograd")
torch.library.register_fake("highway::cat", torch.cat, lib=library)
cat = torch.ops.highway.cat.default
