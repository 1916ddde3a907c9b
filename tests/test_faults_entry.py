"""Ways into the package: a piece by itself, in a process that has loaded nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def output_of(code: str) -> str:
    """Of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("pool", ["nn.MaxPool2d(2)", "nn.AdaptiveMaxPool2d(2)", "nn.AvgPool2d(2)"])
def test_the_backend_that_generates_no_code_works_by_itself(pool):
    output_of(f"""
from hwbp_compiler.testing.capture import eager_highway, options
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 2, 3), {pool}).double()
x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
torch.compile(model, backend=eager_highway(options()))(x).sum().backward()
found = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model(x).sum().backward()
for a, p in zip(found, model.parameters(), strict=True):
    torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)
""")
