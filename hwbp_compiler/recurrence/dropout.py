"""``highway::dropout_noise``: the random factors that PyTorch's recurrent kernels multiply in between two layers."""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "dropout_noise(Tensor input, float p) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
operator = torch.ops.highway.dropout_noise.default


def _dropout_noise(input: Tensor, p: float) -> Tensor:
    """Draws the factors like ``torch.dropout``: from the same generator, in the same order."""
    noise = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    return noise.zero_() if p == 1 else noise.bernoulli_(1 - p).div_(1 - p)


def _fake(input: Tensor, p: float) -> Tensor:
    return input.new_empty(input.shape)


library.impl("dropout_noise", _dropout_noise, "CompositeExplicitAutograd")
torch.library.register_fake("highway::dropout_noise", _fake, lib=library)
torch.library.register_autograd("highway::dropout_noise", lambda ctx, grad: (None, None), lib=library)
