"""``torch.ops.highway.stack`` stacks one tensor per link to [links, ...]. ``torch.ops.highway.cat`` concatenates
pieces.

Note [One call to stack]
~~~~~~~~~~~~~~~~~~~~~~~~
``highway::stack`` is ``torch.stack`` as an operator that Inductor calls and does not compile. Inductor compiles a
concatenation to one loop per piece. For a recurrence of 256 steps these are thousands of lines of C++ per saved tensor,
and most of the compile time of the backward. A call is one line of code and one pass over the pieces, and the forward
saves the same tensors as before.

Note [A concatenation with memory of its own]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
``highway::cat`` is ``torch.cat``, but its pieces keep their own memory. With ``aten::cat`` Inductor places the pieces
inside the result, and this sharing gave wrong values (Note [Pieces of a concatenation] in ``pieces.py``). On a CPU the
operator is called. In GPU code every element is loaded where it is used (``scan/inductor.py``).
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
    # Writes into a given result. Without one, torch.stack copies the strides of channels-last images.
    return torch.stack(tensors, out=_fake(tensors))


library.impl("stack", _stack, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=library)

library.define("cat(Tensor[] tensors, int dim=0) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("cat", torch.cat, "CompositeExplicitAutograd")
torch.library.register_fake("highway::cat", torch.cat, lib=library)
cat = torch.ops.highway.cat.default
