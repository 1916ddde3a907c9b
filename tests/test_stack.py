"""``torch.ops.highway.stack``: what compiled code assumes about its result holds for every input."""

from __future__ import annotations

import pytest
import torch

import hwbp_compiler.stack

LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 4, 3, 5).transpose(1, 2),
    "expanded": lambda: torch.randn(2, 1, 4, 5).expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_is_contiguous_and_so_is_its_meta_version(layout):
    tensors = [LAYOUTS[layout]() for _ in range(3)]
    result = hwbp_compiler.stack.operator(tensors)
    assert result.is_contiguous()
    assert torch.equal(result, torch.stack(tensors))
    torch.library.opcheck(hwbp_compiler.stack.operator, (tensors,))
