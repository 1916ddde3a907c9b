"""max_extra_memory: how much memory the rewritten form may hold beyond exact backprop."""

from __future__ import annotations

import pytest
import torch
from small import Residuals
from torch import nn

import hwbp_compiler
from hwbp_compiler.memory import memory_of
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Reason

ASKED = {"iterations": 1, "rewrite": "always"}


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(4, 4)

    def forward(self, x):
        return self.inner(x)[0]


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRUCell(4, 4)

    def forward(self, x):
        def cell(x, h):
            h = self.inner(x, h)
            return h, h

        return hwbp_compiler.recurrent(cell, x, torch.zeros(3, 4))[0]


@pytest.mark.parametrize("make, x", [(Residuals, (3, 4)), (Module, (6, 3, 4)), (Loop, (6, 3, 4))], ids=lambda a: str(a))
def test_a_chain_that_needs_more_than_it_may_stays_exact_and_says_so(make, x):
    model, x = make(), torch.randn(x)
    (chain,) = hwbp_compiler.explain(model, x, options=ASKED).chains
    needed = chain.added_bytes
    assert chain.decision == "rewritten" and needed > 0
    (enough,) = hwbp_compiler.explain(model, x, options={**ASKED, "max_extra_memory": needed}).chains
    assert enough.decision == "rewritten" and enough.added_bytes == needed
    report = hwbp_compiler.explain(model, x, options={**ASKED, "max_extra_memory": needed - 1})
    (less,) = report.chains
    assert less.decision == "declined" and less.reason_code is Reason.NEEDS_MEMORY
    assert f"max_extra_memory={needed - 1} allows" in less.reason
    names = [node.name for node in report.graph_after.graph.nodes]
    exact = hwbp_compiler.explain(model, x, options={"iterations": "exact"}).graph_after
    assert len(names) == len(exact.graph.nodes)


def test_a_share_is_of_the_devices_memory():
    device = torch.device("cpu")
    assert Options(max_extra_memory="50%").memory_limit(device) == memory_of(device) / 2 > 2**28
    assert Options(max_extra_memory=3).memory_limit(device) == 3
    assert Options().memory_limit(device) == float("inf")
