"""Whole models as a GPU would run them, without a GPU, compared with the oracle: the generated code of the forward and
the rewritten backward, with its Triton kernels interpreted. ``tests/test_on_gpu.py`` does the same on a real GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cells import CASES as CELLS  # noqa: E402
from test_any_cell import every_step, gradients  # noqa: E402
from test_recurrent_modules import CASES as MODULES  # noqa: E402
from test_recurrent_modules import retold  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from zoo import CASES  # noqa: E402

import hwbp_compiler  # noqa: E402
from hwbp_compiler import generate  # noqa: E402
from hwbp_compiler.testing import assert_gradients_close, probe_loss, reference_gradients  # noqa: E402

BY_NAME = {case.name: case for case in CASES}
MODELS = ["mlp_module_list", "gru_2_layers_interleaved_every_step", "highway_network"]


class Interpreted(generate._Generating):
    """Compiles every graph for a GPU, and runs the result."""

    def _what_runs(self, compiled: Any, eager: Any) -> Any:
        return compiled

    def _generate(self, module: torch.fx.GraphModule, example_inputs: Any, **about: Any) -> Any:
        from triton_interpreter import load

        super()._generate(module, example_inputs, **about)
        run = load(self.graphs[-1].source)
        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def as_on_a_gpu(model: Any, **options: Any) -> Any:
    ours, patches = generate.parse({"rewrite": "always", "min_length": 2, "strict": True, **options})
    patches |= dict.fromkeys(generate._MEASURING, False)
    where = generate.Target.parse("cuda:sm_90")
    generate.register_lowerings()
    interpreted = Interpreted(ours, patches, where)
    step = interpreted.trace(model, None)
    step.chains = interpreted.chains
    return step


def backward(step: Any, model: Any, args: Any, loss: Any) -> dict[Any, torch.Tensor]:
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves |= {i: a for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad}
    found = torch.autograd.grad(loss(step(*args)), list(leaves.values()), allow_unused=True)
    return {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
    }


def check_model(name: str) -> None:
    model, args, loss = BY_NAME[name].build()
    _, expected = reference_gradients(BY_NAME[name].program(model), args, loss, 1, 0.2)
    step = as_on_a_gpu(model, iterations=1, damping=0.2)
    found = backward(step, model, args, loss)
    assert any(chain.decision == "rewritten" for chain in step.chains)
    assert_gradients_close(found, expected, 1e-7)


def check_module(kind: str) -> None:
    case = next(case for case in MODULES if case.state)
    model, args = case.build(kind)
    _, expected = reference_gradients(retold(model), args, probe_loss, 2, 0.3)
    step = as_on_a_gpu(model, iterations=2, damping=0.3)
    found = backward(step, model, args, probe_loss)
    assert any(chain.decision == "rewritten" for chain in step.chains)
    assert_gradients_close(found, expected, 1e-9)


def check_cell(name: str) -> None:
    case = next(case for case in CELLS if case.name == name)
    cell, x, state = case.build(7)
    args = (x, *pytree.tree_leaves(state))
    _, expected = reference_gradients(case.program(cell), args, every_step, "exact" if case.linear else 1)
    step = as_on_a_gpu(lambda *given: hwbp_compiler.recurrent(*given), iterations=1)
    _, found = gradients(step, cell, x, state, every_step)
    assert_gradients_close(found, expected, 1e-8)


CHECKS = [
    *(("model", name) for name in MODELS),
    *(("module", kind) for kind in ("GRU", "LSTM")),
    *(("cell", name) for name in ("LiGRU",)),
]


@pytest.mark.parametrize(("what", "name"), CHECKS)
def test_interpreted_on_a_cpu_it_has_the_oracles_gradients(what, name):
    run = subprocess.run(
        [sys.executable, "-c", f"import test_interpreted_models as test; test.check_{what}({name!r})"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
