"""Every test starts as if in a fresh process, and none reads or writes the user's compile caches."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Before torch is imported. A directory of its own for the session, which xdist's workers and the processes
# that tests start inherit, so that compiled C++ is shared.
if not WORKER:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="hwbp_test_")
# A pool of compile processes takes longer to start than these tests' kernels take to compile.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch._functorch import config as functorch_config  # noqa: E402
from torch._inductor import config as inductor_config  # noqa: E402

import hwbp_compiler  # noqa: E402

# Compilation's structured trace: hundreds of empty records in the report of every failing test.
logging.getLogger("torch.__trace").propagate = False


def pytest_configure(config: pytest.Config) -> None:
    if WORKER:
        torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not WORKER:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_state():
    torch._dynamo.reset()
    hwbp_compiler.reset_counters()
    torch.manual_seed(0)
    # A graph found in a cache runs no pass, and what a test counts would depend on the tests before it.
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()
